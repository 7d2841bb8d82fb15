"""The canvas of all pictures of numbers: A4 wide, with letters that every name can be written in.

Places are in inches from the upper left corner. Every text is plain (`$` and `_` in names mean nothing), has letters that an
installed font can draw, and is cut where it would not fit.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from textwrap import wrap
from typing import Any

import matplotlib
from matplotlib import font_manager, ft2font
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator

WIDTH, DPI = 8.27, 200  # A4
SMALL, NORMAL, LARGE = 7.0, 7.5, 9.0  # points
MARGIN = 0.35
LINE = 0.135  # of small text
_LETTERS = 130  # of small text in a line

_OTHER_SCRIPTS = (  # families that hold them, where they are installed; DejaVu Sans comes with matplotlib
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR", "Source Han Sans SC"),
    *("Microsoft YaHei", "Yu Gothic", "Meiryo", "Malgun Gothic", "PingFang SC", "Hiragino Sans", "Hiragino Sans GB"),
    *("WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback", "Arial Unicode MS"),
)


class Canvas:
    """The figure, with places in inches from its upper left corner."""

    def __init__(self, height: float):
        self.height = height
        self.figure = Figure(figsize=(WIDTH, height), dpi=DPI)
        self._renderer = FigureCanvasAgg(self.figure).get_renderer()

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """An axes with thin lines.

        Args:
            left: Of its frame.
            top: Of its frame.
            width: Of its frame.
            height: Of its frame.
        """
        axes = self.figure.add_axes((left / WIDTH, 1 - (top + height) / self.height, width / WIDTH, height / self.height))
        axes.tick_params(length=2, pad=2, width=0.5)
        for spine in axes.spines.values():
            spine.set_linewidth(0.5)
        return axes

    def text(self, left: float, top: float, text: str, size: float = SMALL, **how: Any) -> Text:
        """Text below `top`.

        Args:
            left: Where it begins.
            top: Its upper edge.
            text: One line or more.
            size: Of its letters, in points.
            **how: Passed to matplotlib.
        """
        return self.figure.text(left / WIDTH, 1 - top / self.height, text, size=size, va="top", **how)

    def lines(self, top: float, lines: Iterable[str]) -> None:
        """Lines of small text below `top`.

        Args:
            top: Where the first begins.
            lines: From `wrapped`.
        """
        for k, line in enumerate(lines):
            self.text(MARGIN, top + k * LINE, line)

    def width(self, text: Text) -> float:
        """Of a text as it is drawn, in inches."""
        return text.get_window_extent(self._renderer).width / DPI

    def legend(self, left: float, top: float, handles: Sequence[Line2D | Patch]) -> None:
        """What lines and patches mean, beside each other.

        Args:
            left: Where the first begins.
            top: Their upper edge.
            handles: With their labels.
        """
        corner = (left / WIDTH, 1 - top / self.height)
        how = {"loc": "upper left", "frameon": False, "borderpad": 0, "borderaxespad": 0, "handlelength": 3, "columnspacing": 1.2}
        self.figure.legend(handles=handles, ncols=len(handles), bbox_to_anchor=corner, **how)

    def named(self, left: float, top: float, room: float, title: str, name: str, size: float = SMALL) -> None:
        """A title and a file's name, of which as much is shown as there is room for.

        Args:
            left: Where the title begins.
            top: Its upper edge.
            room: Width of both.
            title: What is shown whole.
            name: Of the file.
            size: Of the letters, in points.
        """
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
    """matplotlib's own defaults and our sizes until the picture is written: what a user has set, such as TeX, is not for us."""
    sizes = {f"{what}.labelsize": SMALL for what in ("xtick", "ytick", "axes")} | {"legend.fontsize": SMALL, "font.size": NORMAL}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(sizes | {"font.family": list(families()), "text.parse_math": False, "hatch.linewidth": 0.4})
        yield


@cache
def families() -> tuple[str, ...]:
    """The font families that are used, as far as they are installed."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return "DejaVu Sans", *(name for name in _OTHER_SCRIPTS if name in installed)


@cache
def fonts() -> tuple[ft2font.FT2Font, ...]:
    """The fonts of these families."""
    return tuple(font_manager.get_font(font_manager.findfont(name)) for name in families())


def drawable(text: str) -> str:
    """Letters that no installed font can draw, and control characters, as \\u escapes.

    Scripts from right to left need a text engine that matplotlib has from 3.11 on: before, their letters are in reverse order.
    """
    is_shaped = hasattr(ft2font, "__libraqm_version__")

    def can(letter: str) -> bool:
        is_ordered = is_shaped or unicodedata.bidirectional(letter) not in ("R", "AL")
        return letter.isprintable() and is_ordered and any(font.get_char_index(ord(letter)) for font in fonts())

    return "".join(c if can(c) else c.encode("unicode_escape").decode() for c in text)


def wrapped(texts: Iterable[str], indent: str = "") -> list[str]:
    """Sentences in lines of small text.

    Args:
        texts: The sentences.
        indent: Before the second line of each, and those after.
    """
    return [line for text in texts for line in wrap(drawable(text), _LETTERS, subsequent_indent=indent)]


def cut(name: str, letters: int) -> str:
    """The beginning and the end of a name.

    Args:
        name: The whole.
        letters: How many are kept.
    """
    end = letters // 3
    return f"{drawable(name[: letters - end])}...{drawable(name[len(name) - end :])}"


def plain_number() -> FuncFormatter:
    """For ticks; matplotlib's own writes powers in mathtext."""
    return FuncFormatter(lambda value, _: f"{value:g}")


def decades(low: float, high: float) -> LogLocator:
    """1, 2, 5, 10, ... where there are few decades, else 1, 10, 100, ...

    Args:
        low: Where the axis begins.
        high: Where it ends.
    """
    return LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,), numticks=8)
