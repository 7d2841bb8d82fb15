"""Shapes and ranks of what a step writes, from what is known of its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import SettingError
from ..formats import lokr
from ..formats.forms import ALWAYS, complete
from ..model.zimage import MODULES, REAL_SIZES, infer_sizes
from .types import Input, StepBasis


@dataclass(frozen=True)
class Extent:
    """What a step writes; fields of StepPlan.

    Attributes:
        shapes: Module -> (out, in) of every module written; empty while the sizes are not known.
        stacked: Module -> components before truncation.
        ranks: Module -> rank, of every module written.
    """

    shapes: Mapping[str, tuple[int, int]]
    stacked: Mapping[str, int]
    ranks: Mapping[str, int]


def extent_of(step: StepBasis, chosen: Mapping[str, int] | None = None) -> Extent:
    """The modules that a step writes, and the rank of each: what was asked for, as far as the inputs hold it.

    Args:
        step: The step.
        chosen: Module -> rank, once the numbers have settled a rule for the rank.

    Raises:
        SettingError: The inputs don't belong together, or the rank has no meaning for them.
    """
    inputs = step.inputs
    sizes, is_known = _sizes(step), all(i.known.shapes for i in inputs)
    stacked = {
        m: sum(i.known.ranks[m] for i in inputs if i.counts(m)) for m in MODULES if any(m in i.known.ranks for i in inputs)
    }
    _check_rank(step, is_known)
    if not is_known:
        return Extent({}, stacked, ranks_of(step, chosen or stacked))
    stacked = {m: min(n, *MODULES[m].shape(sizes)) for m, n in stacked.items()}
    if step.kept_lokr:
        return Extent({m: MODULES[m].shape(sizes) for m in stacked}, stacked, lokr.ranks(step.kept_lokr))
    shapes = {m: MODULES[m].shape(sizes) for m in complete(stacked, sizes)}
    return Extent(shapes, stacked, ranks_of(step, chosen or {m: stacked.get(m, 0) for m in shapes}))


def ranks_of(step: StepBasis, most: Mapping[str, int]) -> dict[str, int]:
    """The rank of every module written: what was asked for, as far as the inputs hold it, and what the form needs at least.

    Args:
        step: The step.
        most: Module -> the highest rank that it may have.
    """
    limit, least = step.rank_limit, step.form.least_ranks(most)
    ranks = {m: max(least[m], n if limit is None else min(n, limit)) for m, n in most.items()}
    largest = max(ranks.values(), default=1)
    if step.spec.save.uniform:
        return dict.fromkeys(ranks, largest)
    return ranks | ({ALWAYS: largest} if ALWAYS in ranks else {})  # AI-Toolkit reads its rank there


def _sizes(step: StepBasis) -> Mapping[str, int]:
    """The sizes of the model that all these changes belong to.

    Raises:
        SettingError: The shapes are not Z-Image's (strict), or not those of one model (free).
    """
    is_strict = step.spec.shapes == "strict"
    shapes: dict[str, tuple[int, int]] = {}
    for i in step.inputs:
        for name, shape in i.known.shapes.items():
            real = MODULES[name].shape() if is_strict else shapes.setdefault(name, shape)
            if tuple(shape) != tuple(real):
                raise SettingError(
                    f"{i.label} changes {name} as a {shape[0]} x {shape[1]} matrix, {real[0]} x {real[1]} is due: "
                    "it was trained for another model" + (" (shapes: free is for pruned Z-Images)" if is_strict else "")
                )
    if is_strict:
        return REAL_SIZES
    try:
        return infer_sizes(shapes)
    except ValueError as e:
        raise SettingError(f"the LoRAs do not belong to one model: {e}") from None


def _check_rank(step: StepBasis, is_known: bool) -> None:
    """Raises where a rank, or keep_lokr, has no meaning for these inputs."""
    spec, inputs = step.spec, step.inputs
    other = next((i for i in inputs if not i.known.is_lora), None)
    if spec.save.keep_lokr:
        _check_kept(step)
    elif other and spec.rank == "same":
        raise SettingError(
            f"same is the rank of LoRAs, {other.label} is a {_what(other)}: give a number, such as rank: 64", "rank"
        )
    elif other and spec.rank == "exact" and not is_known and not spec.confirm_size:
        alone = _what(other) == "LoKr" and len(inputs) == 1
        raise SettingError(
            f"{other.label} is a {_what(other)}, which takes the full rank of the model to hold exactly: set rank: 64"
            + (", or save: {keep_lokr: true} to scale it alone" if alone else "")
            + ", or confirm_size: true if you want it so (see docs/ranks.md)",
            "rank",
        )


def _what(i: Input) -> str:
    return "/".join(a for a in i.known.algorithms if a != "LoRA")


def _check_kept(step: StepBasis) -> None:
    """Raises unless the step is one that `keep_lokr` is for."""
    spec, (first, *more) = step.spec, step.inputs
    asked = (spec.method, spec.rank, spec.save.format, spec.save.uniform)
    if more or asked != ("sum", "exact", "ai-toolkit", True):
        raise SettingError(
            "only one LoKr that is scaled can stay a LoKr, without method, rank, format or uniform: drop them, or keep_lokr",
            "save.keep_lokr",
        )
    if first.step:
        raise SettingError(f"{first.label} is an earlier step: give the LoKr's own file, with all weights here", "save.keep_lokr")
    may_be = "LoKr" in first.known.algorithms or not first.known.ranks  # what is still on the hub is looked at when it is here
    reason = lokr.why_not(first.lora) if first.lora else None if may_be else f"{first.label} is no LoKr"
    if reason:
        raise SettingError(f"{reason}: drop keep_lokr", "save.keep_lokr")
