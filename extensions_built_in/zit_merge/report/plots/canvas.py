"""The paper that pictures of numbers are drawn on: A4 wide, with letters that every name can be written in.

Places are in inches from the upper left corner. Every text is plain (`$` and `_` in names mean nothing), has letters that a font
at hand can draw, and is cut where it would not fit.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import font_manager, ft2font
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator

WIDTH, DPI = 8.27, 200  # A4
SMALL, NORMAL, LARGE = 7.0, 7.5, 9.0  # points
MARGIN = 0.35
LINE = 0.135  # of small text

_OTHER_SCRIPTS = (  # families that hold them, where they are installed; DejaVu Sans comes with matplotlib
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR", "Source Han Sans SC"),
    *("Microsoft YaHei", "Yu Gothic", "Meiryo", "Malgun Gothic", "PingFang SC", "Hiragino Sans", "Hiragino Sans GB"),
    *("WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback", "Arial Unicode MS"),
)


class Mark(NamedTuple):
    """A cell that has no colour of the scale."""

    text: str
    face: str
    hatch: str
    edge: str


ABSENT = Mark("not in the file", "#d9d9d9", "//////", "#8c8c8c")


class Scale(NamedTuple):
    """Colours of a map."""

    norm: Normalize
    colours: str
    label: str


class Canvas:
    """The figure, with places in inches from its upper left corner."""

    def __init__(self, height: float):
        self.height = height
        self.figure = Figure(figsize=(WIDTH, height), dpi=DPI)
        self._renderer = FigureCanvasAgg(self.figure).get_renderer()

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """An axes without frame and ticks' lines."""
        axes = self.figure.add_axes((left / WIDTH, 1 - (top + height) / self.height, width / WIDTH, height / self.height))
        axes.tick_params(length=2, pad=2, width=0.5)
        for spine in axes.spines.values():
            spine.set_linewidth(0.5)
        return axes

    def text(self, left: float, top: float, text: str, size: float = SMALL, **how: Any) -> Text:
        """Text below `top`."""
        return self.figure.text(left / WIDTH, 1 - top / self.height, text, size=size, va="top", **how)

    def width(self, text: Text) -> float:
        """Of a text as it is drawn, in inches."""
        return text.get_window_extent(self._renderer).width / DPI

    def legend(self, left: float, top: float, handles: Sequence[Line2D | Patch]) -> None:
        """What lines and patches mean, beside each other."""
        corner = (left / WIDTH, 1 - top / self.height)
        how = {"loc": "upper left", "frameon": False, "borderpad": 0, "borderaxespad": 0, "handlelength": 3, "columnspacing": 1.2}
        self.figure.legend(handles=handles, ncols=len(handles), bbox_to_anchor=corner, **how)

    def named(self, left: float, top: float, room: float, title: str, name: str, size: float = SMALL) -> None:
        """A title and a file's name, of which as much is shown as there is room for."""
        drawn = self.text(left, top, f"{title}{drawable(name)}", size)
        low, high = 0, len(name)
        if self.width(drawn) <= room:
            return
        while low < high:  # the longest that fits
            letters = (low + high + 1) // 2
            drawn.set_text(f"{title}{cut(name, letters)}")
            low, high = (letters, high) if self.width(drawn) <= room else (low, letters - 1)
        drawn.set_text(f"{title}{cut(name, low)}")


@contextmanager
def settings() -> Iterator[None]:
    """matplotlib's own defaults and our sizes until the page is written: what a user has set, such as TeX, is not for us."""
    sizes = {f"{what}.labelsize": SMALL for what in ("xtick", "ytick", "axes")} | {"legend.fontsize": SMALL, "font.size": NORMAL}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(sizes | {"font.family": list(families()), "text.parse_math": False, "hatch.linewidth": 0.4})
        yield


@cache
def families() -> tuple[str, ...]:
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return "DejaVu Sans", *(name for name in _OTHER_SCRIPTS if name in installed)


@cache
def fonts() -> tuple[ft2font.FT2Font, ...]:
    return tuple(font_manager.get_font(font_manager.findfont(name)) for name in families())


def drawable(text: str) -> str:
    """Letters that no font at hand can draw, and those that only steer, as \\u escapes.

    Scripts from right to left need a text engine that matplotlib has from 3.11 on: before, their letters would stand backwards.
    """
    is_shaped = hasattr(ft2font, "__libraqm_version__")

    def can(letter: str) -> bool:
        is_ordered = is_shaped or unicodedata.bidirectional(letter) not in ("R", "AL")
        return letter.isprintable() and is_ordered and any(font.get_char_index(ord(letter)) for font in fonts())

    return "".join(c if can(c) else c.encode("unicode_escape").decode() for c in text)


def cut(name: str, letters: int) -> str:
    """So many letters of its beginning and end."""
    end = letters // 3
    return f"{drawable(name[: letters - end])}...{drawable(name[len(name) - end :])}"


def colour_bar(figure: Figure, axes: Axes, scale: Scale, orientation: str) -> None:
    low, high = scale.norm.vmin, scale.norm.vmax
    if isinstance(scale.norm, LogNorm):
        ticks = decades(low, high)
    else:
        ticks = FixedLocator(np.linspace(low, high, 5)) if low < 0 else MaxNLocator(5)
    how = {"orientation": orientation, "ticks": ticks, "format": plain_number(), "label": scale.label}
    bar = figure.colorbar(ScalarMappable(scale.norm, scale.colours), cax=axes, **how)
    bar.ax.minorticks_off()
    bar.outline.set_linewidth(0.5)


def plain_number() -> FuncFormatter:
    """For ticks; matplotlib's own writes powers in mathtext."""
    return FuncFormatter(lambda value, _: f"{value:g}")


def decades(low: float, high: float) -> LogLocator:
    """1, 2, 5, 10, ... where there are few decades, else 1, 10, 100, ..."""
    return LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,), numticks=8)
