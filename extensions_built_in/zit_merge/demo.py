"""`demo`: two small LoRAs of real Z-Image shapes, merged with block weights and checked. No downloads."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from .api import Merge, merge
from .errors import ZitMergeError
from .files.atomic import os_errors
from .merging.residuals import dense_residual, residuals
from .model.zimage import MODULES
from .progress import Progress
from .report.page.facts import step_facts
from .report.page.render import Page
from .report.text.plan import plan_text
from .section import Say, run_section
from .wording import copyable

RANK, PAGE = 4, "demo_page.html"
CHECKED_DENSE = "layers.12.attention.to_v"
ROUNDING = 1e-6  # float32 keeps 6e-8 of each number; a wrong strength or a cross term would show at 1e-2 and above


def make_inputs(folder: Path) -> tuple[Path, Path]:
    """A LoRA as AI-Toolkit writes it (no alpha) and one as musubi-tuner writes it (alpha 1, other names, no adaLN)."""
    random = torch.Generator().manual_seed(0)
    face, style = {}, {}
    for module in (m for m in MODULES.values() if m.section == "layers"):
        out, into = module.shape()
        face[f"diffusion_model.{module.name}.lora_A.weight"] = _normal((RANK, into), 0.02, random)
        face[f"diffusion_model.{module.name}.lora_B.weight"] = _normal((out, RANK), 0.02, random)
        if module.component != "adaLN_modulation":
            flat = "lora_unet_" + module.name.replace(".", "_")
            style[f"{flat}.lora_down.weight"] = _normal((RANK, into), 0.02, random)
            style[f"{flat}.lora_up.weight"] = _normal((out, RANK), 0.04, random)
            style[f"{flat}.alpha"] = torch.tensor(1.0)
    paths = folder / "demo_face.safetensors", folder / "demo_style.safetensors"
    save_file(face, paths[0], {"ss_base_model_version": "zimage", "ss_tag_frequency": '{"1_zoe":{"zoe":1}}'})
    save_file(style, paths[1], {"ss_base_model_version": "z_image", "modelspec.trigger_phrase": "in ink style"})
    return paths


def _normal(shape: tuple[int, int], size: float, random: torch.Generator) -> torch.Tensor:
    return (torch.randn(shape, generator=random) * size).bfloat16()


def demo_merge(face: Path, style: Path) -> Merge:
    """The merge that the demo shows: every kind of weight once.

    Args:
        face: The first input.
        style: The second.
    """
    weights = {"ratio": 0.9, "blocks": {"adaLN_modulation": 0.7, "attention": 0.9, "to_q": 1.1}, "layers": {"0-9": [0.5, 1.0]}}
    return merge([(face, weights), (style, {"ratio": 0.6, "effects": {"composition": 0.2, "color_light": 1.3}})], dtype="fp32")


def run_demo(folder: Path, say: Say, progress: Progress) -> None:
    """Makes the inputs, merges them, checks every module, tells.

    Args:
        folder: Where the files go; it is made.
        say: Prints a line.
        progress: Shows how far the merge is.

    Raises:
        ZitMergeError: The result is not what was asked for.
    """
    with os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        face, style = make_inputs(folder)
    described, path = demo_merge(face, style), folder / "demo_merged.safetensors"
    planned = described.planned(path)
    (plan,) = planned.plans
    say(plan_text(plan) + "\n")
    page = Page("demo")
    page.begin(
        "", {**described.section, "output_dir": str(folder), "steps": [{**described.section["steps"][0], "name": plan.name}]}
    )
    for done in run_section(planned, None, say, progress):
        page.add(step_facts(done))
    found = residuals(plan, path)
    worst = max(found, key=lambda module: found[module])
    dense = dense_residual(plan, path, CHECKED_DENSE)
    say("once more, apart from the code that merges: |written - wanted| / |wanted|")
    say(f"  {len(found)} modules through Gram matrices: {found[worst]:.1e} at most, in")
    say(f"    {worst}")
    say(f"  {CHECKED_DENSE}, multiplied out: {dense:.1e}")
    if not max(found[worst], dense) < ROUNDING:
        raise ZitMergeError(
            f"{path}: is not the merge that was asked for ({worst} is off by {found[worst]:.1e}): please report this"
        )
    say(f"  right: rounding to fp32 explains up to {ROUNDING:.0e}")
    page.write(folder / PAGE)
    say(f"\nreport:\n    {copyable(folder / PAGE)}")
