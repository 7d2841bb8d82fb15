"""From what a step follows from to its complete plan: ranks, recipe, metadata, layout, size, warnings."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import fields
from math import ceil
from typing import Any, NamedTuple

from ..config.schema import RankRule
from ..errors import SettingError, located
from ..formats import lokr, writer
from .metadata import draft_metadata
from .ranks import Extent, extent_of, ranks_of
from .recipe import recipe_of
from .types import StepBasis, StepPlan
from .warnings import warnings_of

_BASIS = tuple(f.name for f in fields(StepBasis))


def step_plan(step: StepBasis, chosen: Mapping[str, int] | None = None) -> StepPlan:
    """The complete plan of a step.

    Args:
        step: What it follows from.
        chosen: Module -> rank, once the numbers have settled a rule for the rank.

    Raises:
        SettingError: The inputs don't belong together, or the rank has no meaning for them; located by `step.loc`.
    """
    with located(step.loc):
        extent, recipe = extent_of(step), recipe_of(step)
        is_rule, limit = isinstance(step.spec.rank, RankRule), getattr(step.spec.rank, "size_mb", None)
        output, is_open = _output(step, extent, recipe, chosen or extent.most), is_rule and not chosen
        if limit and output.bytes:
            output, is_open = _fitted(step, extent, recipe, output, is_open)
    basis = {name: getattr(step, name) for name in _BASIS}
    warnings = warnings_of(step, extent.stacked, output.ranks, is_open)
    return StepPlan(**basis, **output._asdict(), **vars(extent), recipe=recipe, is_open=is_open, warnings=warnings)


def revised(plan: StepPlan, chosen: Mapping[str, int] | None = None, **changes: Any) -> StepPlan:
    """A second plan, where something is known or wanted otherwise than in the first one.

    Args:
        plan: The first one; it stays as it is.
        chosen: Module -> rank, once the numbers have settled a rule for the rank.
        changes: Fields of StepBasis: `inputs`, `spec`.

    Raises:
        SettingError: As `step_plan`.
    """
    return step_plan(StepBasis(**{name: getattr(plan, name) for name in _BASIS} | changes), chosen)


class _Output(NamedTuple):
    """What follows from the ranks; fields of StepPlan."""

    ranks: Mapping[str, int]
    layout: writer.Layout
    draft: Mapping[str, str]
    bytes: int


def _output(step: StepBasis, extent: Extent, recipe: Mapping[str, Any], most: Mapping[str, int]) -> _Output:
    """The output with the ranks that were asked for, none above `most`."""
    ranks = ranks_of(step, most)
    draft = draft_metadata(step, ranks, recipe)
    layout = writer.Layout()
    if step.kept_lokr:
        layout = lokr.layout(step.kept_lokr, step.dtype)
    elif extent.shapes and not step.spec.save.keep_lokr:
        layout = writer.layout(extent.shapes, ranks, step.dtype, step.form)
    return _Output(ranks, layout, draft, writer.file_size(layout, draft) if layout else 0)


def _fitted(step: StepBasis, extent: Extent, recipe: Mapping[str, Any], whole: _Output, is_open: bool) -> tuple[_Output, bool]:
    """The output with the largest common rank that has room in `size_mb`, and whether its ranks are still open.

    With `uniform: false` the ranks that are found here are bounds: the components are chosen by their singular values.

    Raises:
        SettingError: Rank 1 takes more.
    """
    limit = int(step.spec.rank.size_mb * 1e6)

    def capped(rank: int) -> _Output:
        return _output(step, extent, recipe, {m: min(n, rank) for m, n in whole.ranks.items()})

    if (least := capped(1).bytes) > limit:
        raise SettingError(f"a file of rank 1 takes {ceil(least / 1e3) / 1e3:g} MB: set size_mb to that or more", "rank")
    if not is_open or whole.bytes <= limit:
        return whole, False
    if not step.spec.save.uniform:
        return whole._replace(bytes=limit), True
    best = bisect_right(range(1, max(whole.ranks.values()) + 1), limit, key=lambda rank: capped(rank).bytes)
    return capped(best), False
