"""What is told of a LoRA that was extracted from a model: what no LoRA can hold, and how much each rank holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..algebra.truncate import singular_values
from ..formats.difference import DifferenceReader
from ..formats.reader import TensorReader, load_lora
from ..formats.reading import Reader
from ..formats.verdict import Verdict
from ..planning.types import StepPlan
from ..wording import percent

_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def beyond_loras(readers: Sequence[Reader]) -> dict[int, float]:
    """Input -> squared norm of what its model changed in norms, biases and tokens, for those that are differences of models."""
    return {n: sum(r.vectors().values()) for n, r in enumerate(readers) if isinstance(r, DifferenceReader)}


def extraction_remarks(
    plan: StepPlan, verdict: Verdict, beyond: Mapping[int, float], path: Path | None = None
) -> tuple[str, ...]:
    """Sentences on the differences of models that went into a file.

    Args:
        plan: As it was run.
        verdict: Of the file.
        beyond: From `beyond_loras`.
        path: The file, if it is a LoRA.
    """
    found = []
    for n, energy in beyond.items():
        source, label = plan.inputs[n], plan.inputs[n].label
        energies = {name: float(m.energies[m.inputs.index(n)]) for name, m in verdict.modules.items() if n in m.inputs}
        inside = sum(energies.values())
        if not all(map(source.counts, source.known.ranks)):
            continue  # of what has no strength nothing was read
        if not inside + energy:
            found.append(f"{label} and its base are equal in every tensor")
        elif energy:
            where = "norms, biases and tokens, which no LoRA can hold"
            found.append(f"{percent(energy / (inside + energy))} of what {label} changed lies in {where}")
        if path and inside and len(plan.inputs) == 1 and plan.cut:
            found.append(_by_rank(path, sum(source.strengths[m] ** 2 * e for m, e in energies.items())))
    return tuple(found)


def _by_rank(path: Path, energy: float) -> str:
    """How much of a difference each rank holds, up to that of the file."""
    lora = load_lora(path)
    kept = torch.zeros(lora.rank, dtype=torch.float64)
    with TensorReader(lora) as reader:
        for module in lora:
            scale, delta = reader.delta(module)
            values = singular_values(delta.times(scale), lora.rank).double().cpu() ** 2
            kept[: len(values)] += values
    shares = kept.cumsum(0) / energy
    ranks = [rank for rank in _RANKS if rank < lora.rank] + [lora.rank]
    told = ", ".join(f"{rank} {percent(float(shares[rank - 1]))}" for rank in ranks)
    return f"of what the model changed in its weights a file of each rank holds: {told}"
