"""From what a step follows from to its complete plan: ranks, recipe, metadata, layout, size, warnings."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import fields, replace
from math import ceil
from typing import Any, NamedTuple

from ..errors import SettingError, located
from ..formats import forms, lokr
from ..formats.safetensors_writer import file_size
from ..formats.spec import Layout
from .metadata import draft_metadata
from .ranks import Extent, extent_of, ranks_of
from .recipe import recipe_of
from .types import StepBasis, StepPlan
from .warnings import warnings_of


def step_plan(step: StepBasis, chosen: Mapping[str, int] | None = None) -> StepPlan:
    """The complete plan of a step.

    Args:
        step: What it follows from.
        chosen: Module -> rank, once the numbers have settled a rule for the rank.

    Raises:
        SettingError: The inputs don't belong together, or the rank has no meaning for them; located by `step.loc`.
    """
    rule = step.spec.rank_rule
    is_open = bool(rule) and not chosen
    with located(step.loc):
        extent = extent_of(step, chosen)
        output = _output(step, extent)
        if rule and rule.size_mb and output.bytes:
            extent, output, is_open = _fitted(step, extent, output, int(rule.size_mb * 1e6), is_open)
    basis = {f.name: getattr(step, f.name) for f in fields(StepBasis)}
    warnings = warnings_of(step, extent.stacked, extent.ranks, is_open)
    return StepPlan(**basis, **vars(extent), **output._asdict(), is_open=is_open, warnings=warnings, planner=step_plan)


class _Output(NamedTuple):
    """What follows from the ranks; fields of StepPlan."""

    recipe: Mapping[str, Any]
    draft: Mapping[str, str]
    layout: Layout
    bytes: int


def _output(step: StepBasis, extent: Extent) -> _Output:
    recipe = recipe_of(step)
    draft = draft_metadata(step, extent.ranks, recipe)
    layout = Layout()
    if step.kept_lokr:
        layout = lokr.layout(step.kept_lokr, step.dtype_name)
    elif extent.shapes and not step.spec.save.keep_lokr:
        layout = forms.layout(extent.shapes, extent.ranks, step.dtype_name, step.form)
    return _Output(recipe, draft, layout, file_size(layout, draft) if layout else 0)


def _fitted(step: StepBasis, extent: Extent, whole: _Output, limit: int, is_open: bool) -> tuple[Extent, _Output, bool]:
    """The largest common rank that has room in `limit` bytes, its output, and whether the ranks are still open.

    With `uniform: false` the ranks that are found here are bounds: the components are chosen by their singular values.

    Raises:
        SettingError: The lowest rank takes more.
    """

    def capped(rank: int) -> tuple[Extent, _Output]:
        lower = replace(extent, ranks=ranks_of(step, {m: min(n, rank) for m, n in extent.ranks.items()}))
        return lower, _output(step, lower)

    lowest, least = capped(1)
    if least.bytes > limit:
        rank, size = max(lowest.ranks.values()), ceil(least.bytes / 1e3) / 1e3
        raise SettingError(f"a file of rank {rank} takes {size:g} MB: set size_mb to that or more", "rank")
    if not is_open or whole.bytes <= limit:
        return extent, whole, False
    if not step.spec.save.uniform:
        return extent, whole._replace(bytes=limit), True
    best = bisect_right(range(1, max(extent.ranks.values()) + 1), limit, key=lambda rank: capped(rank)[1].bytes)
    return *capped(best), False
