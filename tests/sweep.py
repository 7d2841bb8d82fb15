"""Sweeps of which the default run has a part; the other cases are `thorough`, and `.ci/run` has them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest
from hypothesis import HealthCheck, settings


def examples(count: int, **how: Any) -> settings:
    """So many examples of a property where everything runs, a part of them in the default run (see conftest.py)."""
    part = max(min(count, 10), count * settings.default.max_examples // 100)
    return settings(max_examples=part, deadline=None, suppress_health_check=[HealthCheck.too_slow], **how)


def sweep(names: str, *axes: Iterable[Any], ids: Callable[[Any], str] | None = None) -> pytest.MarkDecorator:
    """Parametrizes with every combination of the axes.

    In the default run every value has a case: the longest axis is walked once, the others over and over beside it.
    """
    values = [list(axis) for axis in axes]
    always = {tuple(i % len(axis) for axis in values) for i in range(max(map(len, values)))}
    places = product(*(range(len(axis)) for axis in values))
    cases = [_case([axis[i] for axis, i in zip(values, place, strict=True)], place in always) for place in places]
    return pytest.mark.parametrize(names.split(", "), cases, ids=ids)


def few(count: int, values: Iterable[Any]) -> list[Any]:
    """Values for `parametrize`, of which the default run has the first ones."""
    return [_case([value], i < count) for i, value in enumerate(values)]


def _case(values: list[Any], is_always: bool) -> Any:
    return pytest.param(*values, marks=() if is_always else pytest.mark.thorough)
