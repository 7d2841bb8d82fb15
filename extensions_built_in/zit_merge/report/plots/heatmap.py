"""The heat map of all pictures: cells with a colour of a scale or a mark in its place, a row for each component, and the key."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, Locator, MaxNLocator

from ...model.zimage import ALIASES, COMPONENTS
from .canvas import SMALL, Canvas, decades, plain_number

_LINE = 0.3  # points, between cells
_BAR = 0.1  # inches, a scale of colours
_DARK = 0.5  # luminance below which letters on a cell are white
_SHORT = {name: alias for alias, name in ALIASES.items()}


class Mark(NamedTuple):
    """What a cell has that has no value."""

    text: str
    face: str
    hatch: str
    edge: str


ABSENT = Mark("not in the file", "#d9d9d9", "//////", "#8c8c8c")
ABSENT_IN_ONE = Mark("not in both files", *ABSENT[1:])
ZERO = Mark("zero", "white", "", "#8c8c8c")
BROKEN = Mark("broken: infinite or NaN", "white", "xxxxxx", "#D55E00")


class Scale(NamedTuple):
    """Colours of a map."""

    norm: Normalize
    colours: str
    label: str


class Cell(NamedTuple):
    """A rectangle of a map, in columns and rows.

    Attributes:
        left: Its first column.
        top: Its first row.
        value: Its number, or what it has in place of one.
        width: In columns.
        height: In rows.
    """

    left: float
    top: float
    value: float | Mark
    width: float = 1
    height: float = 1


def fill(axes: Axes, cells: Iterable[Cell], scale: Scale, is_ruled: bool = True) -> None:
    """Draws the cells.

    Args:
        axes: Where they are; its limits are left as they are.
        cells: Those whose value is NaN stay empty.
        scale: Their colours.
        is_ruled: Whether white lines divide them.
    """
    groups: dict[Mark | None, list[Cell]] = {}
    for cell in cells:
        if isinstance(cell.value, Mark) or not math.isnan(cell.value):
            groups.setdefault(cell.value if isinstance(cell.value, Mark) else None, []).append(cell)
    look: dict[str, Any]
    for mark, members in groups.items():
        if mark:
            look = {"facecolor": mark.face, "hatch": mark.hatch, "edgecolor": mark.edge}
        else:
            look = {"array": np.array([c.value for c in members]), "norm": scale.norm, "cmap": scale.colours}
            look["edgecolor"] = "white" if is_ruled else "face"
        axes.add_collection(PolyCollection([_corners(c) for c in members], linewidth=_LINE, **look))


def _corners(cell: Cell) -> list[tuple[float, float]]:
    right, bottom = cell.left + cell.width, cell.top + cell.height
    return [(cell.left, cell.top), (right, cell.top), (right, bottom), (cell.left, bottom)]


def write_numbers(axes: Axes, cells: Iterable[Cell], text: Callable[[float], str], scale: Scale) -> None:
    """Writes the value of each cell that has one, in letters that can be read on its colour.

    Args:
        axes: Where the cells are.
        cells: With their values; those with a mark stay as they are.
        text: What is written for a value.
        scale: Their colours.
    """
    colours = ScalarMappable(scale.norm, scale.colours)
    for cell in cells:
        if isinstance(cell.value, Mark):
            continue
        red, green, blue, _ = colours.to_rgba(cell.value)  # type: ignore[arg-type]  # takes a single number too
        is_dark = not math.isnan(cell.value) and 0.299 * red + 0.587 * green + 0.114 * blue < _DARK
        place = cell.left + cell.width / 2, cell.top + cell.height / 2
        axes.text(*place, text(cell.value), ha="center", va="center_baseline", size=SMALL, color="white" if is_dark else "black")


def name_components(axes: Axes) -> None:
    """A row for each component, with its name on the left."""
    axes.set_ylim(len(COMPONENTS), 0)
    axes.set_yticks([k + 0.5 for k in range(len(COMPONENTS))], [_SHORT.get(c, c) for c in COMPONENTS])
    axes.spines[:].set_visible(False)


def key(canvas: Canvas, left: float, top: float, width: float, scale: Scale, marks: Collection[Mark] = ()) -> None:
    """The scale, and beside it what has no colour.

    Args:
        canvas: Where it is drawn.
        left: Of the scale.
        top: Of the scale.
        width: Of the scale.
        scale: The colours.
        marks: Those that the maps have.
    """
    colour_bar(canvas.figure, canvas.axes(left, top, width, _BAR), scale, "horizontal")
    if marks:
        patches = [Patch(facecolor=m.face, hatch=m.hatch, edgecolor=m.edge, linewidth=0.5, label=m.text) for m in sorted(marks)]
        canvas.legend(left + width + 0.4, top - 0.05, patches)


def colour_bar(figure: Figure, axes: Axes, scale: Scale, orientation: str) -> None:
    """A scale of colours with its numbers.

    Args:
        figure: The picture.
        axes: Where in it.
        scale: The colours.
        orientation: `horizontal` or `vertical`.
    """
    low, high = scale.norm.vmin, scale.norm.vmax
    assert low is not None and high is not None, "a scale has limits"
    ticks: Locator
    if isinstance(scale.norm, LogNorm):
        ticks = decades(low, high)
    else:
        ticks = FixedLocator(np.linspace(low, high, 5).tolist()) if low < 0 else MaxNLocator(5)
    how: dict[str, Any] = {"orientation": orientation, "ticks": ticks, "format": plain_number(), "label": scale.label}
    bar = figure.colorbar(ScalarMappable(scale.norm, scale.colours), cax=axes, **how)
    bar.ax.minorticks_off()
    bar.outline.set_linewidth(0.5)
