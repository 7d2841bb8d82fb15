"""Values as the page takes them: the model, numbers with a few digits, texts of bounded length."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from typing import Any

from ...config.presets import presets
from ...model.strengths import FactorTable, factor_table
from ...model.zimage import COMPONENTS, MODULES, N_LAYERS, REFINERS, SECTIONS
from ...wording import masked

TEXT, NAME = 600, 300  # letters of a sentence, and of a name


@cache
def anatomy() -> dict[str, Any]:
    """The model and the presets, which every page needs."""
    return {
        "modules": [[m.name, m.section, m.index, m.component] for m in MODULES.values()],
        "components": list(COMPONENTS),
        "blocks": dict(SECTIONS),
        "presets": {name: {"idea": p.idea, **weights(factor_table(p.weights))} for name, p in presets().items()},
    }


def weights(found: FactorTable) -> dict[str, Any]:
    """Factors in the form that the composer edits: a number for each component, layer and refiner, and the overrides."""
    number_of = {module: n for n, module in enumerate(MODULES)}
    return {
        "components": [found.components[c] for c in COMPONENTS],
        "layers": [found.layers.get(("layers", i), 1.0) for i in range(N_LAYERS)],
        **{section: found.layers.get((section, 0), 1.0) for section in (*REFINERS, "other")},
        "overrides": [[number_of[m], factor] for m, factor in found.overrides.items()],
    }


def number(value: float | None, digits: int = 5) -> float | None:
    """With a few digits; None for what is no number.

    Args:
        value: Finite or not.
        digits: Significant ones.
    """
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")


def text(value: object, most: int = TEXT) -> str:
    """A text of a file or a config: its beginning and how long it is, without control characters.

    Args:
        value: Shown as `str` has it.
        most: Letters that are shown.
    """
    whole = masked(str(value))
    shown = "".join(c if c.isprintable() or c == " " else " " for c in whole[:most])
    return shown if len(whole) <= most else f"{shown}... ({len(whole):,} characters)"


def texts(values: Iterable[object], most: int) -> list[str]:
    """The first of several texts, and how many more there are.

    Args:
        values: In order.
        most: How many are shown.
    """
    whole = [text(v) for v in values]
    return whole if len(whole) <= most else [*whole[:most], f"... and {len(whole) - most:,} more"]
