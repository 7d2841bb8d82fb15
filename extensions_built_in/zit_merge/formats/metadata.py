"""What the metadata of LoRA files say, and what a merged file may say in turn."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

RECIPE_KEY = "zit_merge.recipe"
VERSION_KEY = "zit_merge.version"

ARCHITECTURE = "Z-Image/lora"  # what musubi and OneTrainer write; SwarmUI compares without regard to case


def tag_frequency(metadata: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """`ss_tag_frequency` as {folder: {tag: count}}; empty where it is absent or not of that form."""
    table = _json(metadata.get("ss_tag_frequency"))
    if not isinstance(table, dict):
        return {}
    return {
        str(folder): {str(t): int(n) for t, n in tags.items() if isinstance(n, int | float) and math.isfinite(n)}
        for folder, tags in table.items()
        if isinstance(tags, dict)
    }


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """The trigger words that a file names: `modelspec.trigger_phrase`, else AI-Toolkit's one tag per folder."""
    phrase = metadata.get("modelspec.trigger_phrase", "").strip()
    if phrase:
        return [phrase]
    return _unique(tag for tags in tag_frequency(metadata).values() if len(tags) == 1 for tag in tags)


def read_recipe(metadata: Mapping[str, str]) -> dict | None:
    """The recipe that zit_merge left in a file, or None."""
    recipe = _json(metadata.get(RECIPE_KEY))
    return recipe if isinstance(recipe, dict) else None


def made_by(metadata: Mapping[str, str]) -> tuple[str, str] | None:
    """(job, step) of the merge that wrote a file, or None."""
    recipe = read_recipe(metadata) or {}
    steps = recipe.get("steps")
    last = steps[-1] if isinstance(steps, list) and steps else None
    return (str(recipe.get("job")), str(last.get("name"))) if isinstance(last, dict) else None


def adapter_scales(metadata: Mapping[str, str]) -> set[float | None]:
    """The scales lora_alpha / r that `lora_adapter_metadata` (diffusers, SimpleTuner) asks for; None where it can't be told."""
    table = _json(metadata.get("lora_adapter_metadata"))
    if not isinstance(table, dict):
        return {None}
    own = {k.removeprefix("transformer."): v for k, v in table.items()}
    rank, alpha = own.get("r"), own.get("lora_alpha")
    numbers = all(isinstance(v, int | float) and math.isfinite(v) for v in (rank, alpha))
    if own.get("rank_pattern") or own.get("alpha_pattern") or not numbers or rank <= 0:
        return {None}
    return {alpha / (rank**0.5 if own.get("use_rslora") else rank)}


def merged_metadata(
    output_name: str, recipe: Mapping, version: str, inputs: Sequence[tuple[str, Mapping[str, str]]]
) -> dict[str, str]:
    """The metadata of a merged file.

    Never carried over: `sshs_*` and `modelspec.hash_sha256` (programs would take the file for an input), `training_info`
    (AI-Toolkit would resume its step count), `ss_network_*`, `lora_adapter_metadata` (they describe another file).

    Args:
        output_name: The file's name without its ending.
        recipe: What makes this file again.
        version: Of zit_merge.
        inputs: (name, metadata) of every LoRA that goes in with a strength other than 0.
    """
    tags: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for _, metadata in inputs:
        for folder, counts in tag_frequency(metadata).items():
            for tag, count in counts.items():
                tags[folder][tag] += count
    bases = _unique(m["ss_base_model_version"] for _, m in inputs if m.get("ss_base_model_version"))
    merged = {
        "format": "pt",
        VERSION_KEY: version,
        RECIPE_KEY: dumps(recipe),
        "ss_base_model_version": bases[0] if len(bases) == 1 else "zimage",  # AI-Toolkit's name for it
        "ss_output_name": output_name,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": ARCHITECTURE,
        "modelspec.implementation": "https://github.com/Tongyi-MAI/Z-Image",
        "modelspec.title": output_name,
        "modelspec.merged_from": ", ".join(metadata.get("modelspec.title") or name for name, metadata in inputs),
    }
    if tags:
        merged["ss_tag_frequency"] = dumps(tags)
    if triggers := _unique(word for _, metadata in inputs for word in trigger_words(metadata)):
        merged["modelspec.trigger_phrase"] = ", ".join(triggers)
    return merged


def dumps(value: object) -> str:
    """JSON in the one form that two runs agree on: no spaces, ASCII, the order of the mapping kept."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _json(text: str | None) -> object:
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError):  # somebody else's metadata: not ours to refuse
        return None


def _unique(items) -> list[str]:
    return list(dict.fromkeys(items))
