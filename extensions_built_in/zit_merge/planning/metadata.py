"""The metadata of an output."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..formats.metadata import adapter_metadata, kohya_metadata, merged_metadata
from ..formats.verdict import placeholder
from ..wording import public_name
from .types import StepBasis, StepPlan, with_hashes


def bake_metadata(plan: StepPlan, recipe: Mapping[str, Any], hashes: Mapping[Path, str] | None = None) -> dict[str, str]:
    """The metadata of the whole model that a step writes, but for what its check finds.

    Args:
        plan: A step that bakes.
        recipe: Of the model, with paths in place of hashes.
        hashes: Path -> hash, of the step's inputs and of the base; None for placeholders.
    """
    assert plan.bake and plan.bake.base, "a model that is written has a base that is there"
    hashes = dict.fromkeys((*plan.hashed, plan.bake.base.path), "0" * 64) if hashes is None else hashes
    used = [(public_name(i.label.removesuffix(".safetensors")), i.metadata) for i in plan.inputs]
    merged = merged_metadata(public_name(plan.bake.path.stem), with_hashes(recipe, hashes), __version__, used)
    return {key: text for key, text in merged.items() if not key.startswith("ss_")} | {
        "modelspec.architecture": "Z-Image",
        "modelspec.merged_from": f"{public_name(plan.bake.label)}, {merged['modelspec.merged_from']}",
    }


def draft_metadata(step: StepBasis, ranks: Mapping[str, int], recipe: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a step's output, with placeholders for the hashes of its inputs and for what its check finds.

    Args:
        step: The step.
        ranks: Module -> rank, of every module written.
        recipe: Of the step, with paths in place of hashes.
    """
    used = [
        (public_name(i.label.removesuffix(".safetensors")), i.metadata) for i in step.inputs if any(map(i.counts, i.known.ranks))
    ]
    hashed = with_hashes(recipe, dict.fromkeys(step.hashed, "0" * 64))
    metadata = placeholder(len(step.inputs)) | merged_metadata(public_name(step.path.stem), hashed, __version__, used)
    if step.kept_lokr or not ranks:
        return metadata
    if step.spec.save.format == "kohya":
        metadata |= kohya_metadata(ranks)
    return metadata | ({} if step.spec.save.uniform else adapter_metadata(ranks))
