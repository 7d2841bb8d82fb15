"""The pictures that a training of AI-Toolkit makes as its samples, as its source has it, without what it does not change.

Follows jobs/process/BaseSDTrainProcess.py sample(), toolkit/config_modules.py SampleConfig, SampleItem and GenerateImageConfig,
toolkit/prompt_utils.py inject_trigger_into_prompt and z_image.py generate_single_image; a test marked `toolkit` holds it against
them. Its defaults are those of a Turbo job in AI-Toolkit's UI in the place of the toolkit's own, which are for other models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TURBO = {"width": 1024, "height": 1024, "sample_steps": 9, "guidance_scale": 1, "seed": 42}


def samples(sample: Mapping[str, Any], trigger: str | None) -> list[tuple]:
    """(prompt, seed, width, height, steps, guidance, negative) of each sample of a training."""
    whole = TURBO | {"neg": False, "walk_seed": False} | dict(sample)
    found, seed = [], whole["seed"]
    for i, entry in enumerate(whole.get("samples", [{"prompt": p} for p in whole.get("prompts", [])])):
        item = {key: entry.get(key, whole[key]) for key in ("width", "height", "neg", "guidance_scale", "sample_steps")}
        if whole["walk_seed"]:
            seed = whole["seed"] + i
        prompt = entry["prompt"]
        if trigger is not None:
            prompt = prompt.replace("[name]", trigger).replace("[trigger]", trigger)
        if entry.get("seed") is not None:
            seed = entry["seed"]
        found.append(_image(prompt, item | {"seed": seed}))
    return found


def _image(prompt: str, settings: dict[str, Any]) -> tuple:
    text, *options = prompt.strip().split("--")
    kinds = {"w": ("width", int), "h": ("height", int), "n": ("neg", str)}
    kinds |= dict.fromkeys(("d", "seed"), ("seed", int)) | dict.fromkeys(("s", "steps"), ("sample_steps", int))
    kinds |= dict.fromkeys(("l", "cfg"), ("guidance_scale", float))
    for option in options:
        flag = option.split(" ")[0].strip()
        if flag in kinds:
            key, kind = kinds[flag]
            settings[key] = kind(option[len(flag) :].strip())
    width, height = (int(max(64, side - side % 8) // 16 * 16) for side in (settings["width"], settings["height"]))
    return (
        text.strip(),
        settings["seed"],
        width,
        height,
        settings["sample_steps"],
        settings["guidance_scale"],
        settings["neg"] or "",
    )
