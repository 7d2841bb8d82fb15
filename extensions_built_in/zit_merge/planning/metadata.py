"""The metadata of an output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import __version__
from ..formats.metadata import adapter_metadata, kohya_metadata, merged_metadata
from ..formats.verdict import placeholder
from .types import StepBasis


def output_metadata(step: StepBasis, ranks: Mapping[str, int], recipe: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a step's output, but for what its check finds.

    Args:
        step: The step.
        ranks: Module -> rank, of every module written.
        recipe: Of the step.
    """
    used = [(i.label.removesuffix(".safetensors"), i.metadata) for i in step.inputs if any(map(i.counts, i.known.ranks))]
    merged = merged_metadata(step.path.stem, recipe, __version__, used)
    if step.kept_lokr or not ranks:
        return merged
    if step.spec.save.format == "kohya":
        merged |= kohya_metadata(ranks)
    return merged | ({} if step.spec.save.uniform else adapter_metadata(ranks))


def draft_metadata(step: StepBasis, ranks: Mapping[str, int], recipe: Mapping[str, Any]) -> dict[str, str]:
    """The same with a placeholder for what the check finds, to reserve room for it.

    Args:
        step: The step.
        ranks: Module -> rank, of every module written.
        recipe: With placeholders of the same length for hashes.
    """
    return output_metadata(step, ranks, recipe) | placeholder(len(step.inputs))
