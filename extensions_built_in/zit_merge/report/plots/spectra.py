"""Lines of singular values: how large they are, and how much energy a rank keeps.

Colour-blind people can tell the colours apart; lines differ by dashes and markers too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullLocator

from .canvas import NORMAL, decades, plain_number
from .data import FileData

# Okabe and Ito's palette without its yellow, which is too faint for a line
_LINES = (
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#CC79A7", ":", "D"),
    ("#56B4E9", (0, (6, 1, 1, 1, 1, 1)), "v"),
    ("#000000", (0, (8, 2)), "x"),
)


def draw_spectra(left: Axes, right: Axes, files: Sequence[FileData]) -> list[Line2D | Patch]:
    """Draws the lines of several files.

    Args:
        left: For the singular values of a module, median and quartiles. Where the median is 0, most modules have no more
            values: the line ends.
        right: For the energy of the whole file that one rank for every module keeps.
        files: The first ones.

    Returns:
        What the lines mean; nothing where there are none.
    """
    if not any(_alive(files)):
        for axes in (left, right):
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, "nothing: all zero or broken", transform=axes.transAxes, ha="center", va="center", size=NORMAL)
        return []
    _draw_values(left, files)
    _draw_energy(right, files)
    lines = [Line2D([], [], **_look(i), label=f"LoRA {i + 1}") for i, _ in _alive(files)]
    return [*lines, Patch(facecolor="#808080", alpha=0.3, label="quartiles")]


def _alive(files: Sequence[FileData]) -> Iterator[tuple[int, FileData]]:
    return ((i, f) for i, f in enumerate(files) if f.values is not None and f.energy > 0)


def _look(number: int) -> dict[str, Any]:
    colour, dashes, marker = _LINES[number]
    return {"color": colour, "linestyle": dashes, "marker": marker, "markersize": 3.5, "linewidth": 1.1}


def _draw_values(axes: Axes, files: Sequence[FileData]) -> None:
    lows, highs = [], []
    for i, file in _alive(files):
        low, middle, high = (row[row > 0].numpy() for row in file.quartiles())
        marked = [k - 1 for k in _powers(len(middle))]
        axes.plot(range(1, len(middle) + 1), middle, **_look(i), markevery=marked)
        floor = np.pad(low, (0, len(high) - len(low)), constant_values=1e-300)  # below every axes
        axes.fill_between(range(1, len(high) + 1), floor, high, color=_LINES[i][0], alpha=0.05 + 0.15 / len(files), linewidth=0)
        lows += [*low, *middle]
        highs += [*high]
    axes.set(ylabel="singular value", xlabel="its number, the largest first")
    axes.set_yscale("log")
    floor, ceiling = max(min(lows), max(highs) * 1e-6) / 1.5, max(highs) * 1.5
    axes.set_ylim(floor, ceiling)
    axes.yaxis.set_major_locator(decades(floor, ceiling))
    axes.yaxis.set_major_formatter(plain_number())
    axes.yaxis.set_minor_locator(NullLocator())
    _ranks_below(axes, files)


def _draw_energy(axes: Axes, files: Sequence[FileData]) -> None:
    for i, file in _alive(files):
        kept = 100 * file.kept().numpy()
        axes.plot(range(1, len(kept) + 1), kept, **_look(i), markevery=[k - 1 for k in _powers(len(kept))])
    axes.set(ylabel="%", xlabel="rank", ylim=(0, 103))
    axes.set_yticks([0, 25, 50, 75, 90, 100], ["0", "25", "50", "75", "90", "100"])
    _ranks_below(axes, files)


def _powers(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`."""
    return [2**k for k in range(most.bit_length())]


def _ranks_below(axes: Axes, files: Sequence[FileData]) -> None:
    """A logarithmic axis of ranks with powers of 2, as ranks are chosen."""
    most = max(f.drawn.shape[1] for _, f in _alive(files))
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.9, max(most, 2) * 1.1)
    axes.xaxis.set_major_locator(FixedLocator(_powers(max(most, 2))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(plain_number())
    axes.grid(linewidth=0.3, color="#c0c0c0")
    axes.set_axisbelow(True)
