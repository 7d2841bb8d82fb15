"""Draws an ablation: bars for the parts, a map of layers x components for cells; one panel for each metric. A4 wide.

matplotlib is loaded only when a picture is drawn. Places are in inches from the upper left corner, on the
canvas of `report.plots.canvas`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from ..errors import ZitMergeError
from ..model.zimage import ALIASES, COMPONENTS
from .ablation import Ablation, number
from .groups import BY_CELLS, LEAVE_OUT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARGIN, _BETWEEN = 0.35, 0.2
_LINE, _ROW = 0.135, 0.17  # of small text; of a bar or a cell
_NAMES, _COMPONENTS = 0.95, 0.5  # beside a panel, for the names of parts, of components
_TITLE, _TICKS, _BAR = 0.31, 0.42, 0.42  # above a panel; below it; for a scale of colours
_LETTER = 0.065  # width of a digit of small text, with a little air
_WIDEST = 0.45  # of a column of a map
_GAP = 0.6  # columns between the layers and what is no layer
_COLUMNS = 14  # of a map, up to which two stand beside each other
_OUTLIERS = 2.0  # times the largest share: single pictures beyond are drawn at the edge
_FILL, _DOT, _GREY = "#56B4E9", "#000000", "#404040"  # Okabe and Ito
_LETTERS = 130  # of small text in a line


class _Panel(NamedTuple):
    """Where the picture of one metric stands."""

    metric: str
    left: float
    top: float
    width: float


def draw(ablation: Ablation, file: Path | BinaryIO) -> None:
    """Writes the picture as PNG.

    Args:
        ablation: What is drawn.
        file: A path, or open for writing.

    Raises:
        ZitMergeError: matplotlib is not installed.
    """
    paper = _paper()
    with paper.settings():
        page(ablation).figure.savefig(file, format="png")


def page(ablation: Ablation) -> Any:
    """The page as `report.plots.canvas` has it, with its matplotlib figure as `figure`; in the settings of the caller."""
    paper = _paper()
    head, foot = _head(ablation), _foot(ablation)
    top = _MARGIN + 0.27 + _LINE * 1.3 + len(head) * _LINE + 0.12
    panels, height = _panels(ablation, top)
    made = paper.Canvas(top + height + len(foot) * _LINE + _MARGIN)
    what = "left out in turn" if ablation.mode == LEAVE_OUT else "on its own"
    made.text(_MARGIN, _MARGIN, f"What the parts do in pictures: each {what}", paper.LARGE, weight="bold")
    made.named(_MARGIN, _MARGIN + 0.27, paper.WIDTH - 2 * _MARGIN, "LoRA: ", ablation.lora, paper.NORMAL)
    _lines(made, top - 0.12 - len(head) * _LINE, head)
    for n, panel in enumerate(panels):
        made.named(panel.left, panel.top, panel.width, "", panel.metric, paper.NORMAL)
        made.text(panel.left, panel.top + _LINE, f"100 % is {ablation.whole(panel.metric):.3g}", color=_GREY)
        if ablation.by == BY_CELLS:
            _map(made, paper, ablation, panel)
        else:
            _bars(made, ablation, panel, is_first=n % _across(ablation) == 0)
    _lines(made, top + height, foot)
    return made


def _paper() -> ModuleType:
    try:
        from ..report.plots import canvas as paper
    except ImportError as e:
        raise ZitMergeError(f"ablate: its picture needs matplotlib ({e}): python -m pip install matplotlib") from e
    return paper


def _lines(made: Any, top: float, lines: Sequence[str]) -> None:
    for k, line in enumerate(lines):
        made.text(_MARGIN, top + k * _LINE, line)


def _head(ablation: Ablation) -> list[str]:
    return [line for text in (f"{ablation.rendered}.", ablation.meaning) for line in wrap(text, _LETTERS)]


def _foot(ablation: Ablation) -> list[str]:
    """What the marks mean, what there is to know, and the caveat."""
    texts = []
    if ablation.by != BY_CELLS and len(ablation.specs) > 1:
        texts.append("Bars: all pictures together. Dots: single pictures, those beyond the scale at its edge.")
    if _is_holey(ablation):
        texts.append("Hatched: the LoRA has nothing there.")
    return [line for text in (*texts, *ablation.notes(), ablation.caveat) for line in wrap(text, _LETTERS)]


# --- where the panels stand ----------------------------------------------------------------------------------------------------


def _across(ablation: Ablation) -> int:
    """Panels beside each other."""
    most = 4 if ablation.by != BY_CELLS else 2 if len(_runs(ablation)) + len(_wholes(ablation)) <= _COLUMNS else 1
    return min(len(ablation.distances), most)


def _panels(ablation: Ablation, top: float) -> tuple[list[_Panel], float]:
    """The panels from `top` on, and the height of them all."""
    from ..report.plots.canvas import WIDTH

    across, is_map = _across(ablation), ablation.by == BY_CELLS
    tall = _TITLE + _ROW * (len(COMPONENTS) if is_map else len(ablation.groups)) + _TICKS + (_BAR + 0.15 if is_map else 0.15)
    beside = _COMPONENTS * across if is_map else _NAMES  # bars have their names once in a row
    width = (WIDTH - 2 * _MARGIN - beside - (across - 1) * _BETWEEN) / across
    found = []
    for k, metric in enumerate(ablation.distances):
        row, column = divmod(k, across)
        left = _MARGIN + column * (width + _BETWEEN) + (_COMPONENTS * (column + 1) if is_map else _NAMES)
        found.append(_Panel(metric, left, top + row * tall, width))
    return found, tall * -(-len(found) // across)


# --- bars ----------------------------------------------------------------------------------------------------------------------


def _bars(made: Any, ablation: Ablation, panel: _Panel, *, is_first: bool) -> None:
    """A bar for each part, in the order of the model, and a dot for each picture."""
    names = [g.name for g in ablation.groups]
    axes = made.axes(panel.left, panel.top + _TITLE, panel.width, _ROW * len(names))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names if is_first else [""] * len(names))
    percent = [100 * share for name in names if (share := ablation.share(panel.metric, name)) is not None]
    if len(percent) < len(names):
        _nothing(axes)
        return
    singles = ((k, share) for k, name in enumerate(names) for share in ablation.shares(panel.metric, name))
    dots = [(k, 100 * share) for k, share in singles if share is not None]
    limit = 1.06 * max(*percent, min(max((x for _, x in dots), default=0), _OUTLIERS * max(percent)), 0.1)
    axes.barh(range(len(names)), percent, height=0.72, color=_FILL, linewidth=0)
    if len(ablation.specs) > 1:
        dot = {"s": 5, "facecolor": "none", "edgecolor": _DOT, "linewidth": 0.5, "clip_on": False}
        axes.scatter([min(x, limit) for _, x in dots], [k for k, _ in dots], **dot, zorder=3)
    _percent_axis(axes, limit)


def _percent_axis(axes: Axes, limit: float) -> None:
    axes.set(xlim=(0, limit), xlabel="share in %")
    axes.tick_params(axis="y", length=0, pad=5)  # beside a dot at 0
    axes.locator_params(axis="x", nbins=4)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(axis="x", linewidth=0.3, color="#c0c0c0")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if limit > 100:
        axes.axvline(100, color=_GREY, linewidth=0.8, linestyle=(0, (4, 2)))


def _nothing(axes: Axes) -> None:
    """A word in place of what can't be told."""
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.text(0.5, 0.5, "no change", transform=axes.transAxes, ha="center", va="center", size=7)


# --- maps ----------------------------------------------------------------------------------------------------------------------


def _runs(ablation: Ablation) -> list[str]:
    """The runs of layers, in order."""
    return list(dict.fromkeys(g.key.partition(".")[0] for g in ablation.groups if g.table == "overrides"))


def _wholes(ablation: Ablation) -> list[str]:
    """The parts that are no cells."""
    return [g.key for g in ablation.groups if g.table != "overrides"]


def _is_holey(ablation: Ablation) -> bool:
    return ablation.by == BY_CELLS and len(_runs(ablation)) * len(COMPONENTS) + len(_wholes(ablation)) > len(ablation.groups)


class _Rectangle(NamedTuple):
    """A rectangle of a map, in columns and rows."""

    left: float
    top: float
    height: float
    share: float | None  # None where the LoRA has nothing


def _cells(ablation: Ablation, metric: str) -> list[_Rectangle]:
    shares = {g.key: ablation.share(metric, g.name) for g in ablation.groups}
    runs = _runs(ablation)
    found = [_Rectangle(x, y, 1, shares.get(f"{run}.{c}")) for x, run in enumerate(runs) for y, c in enumerate(COMPONENTS)]
    start = len(runs) + _GAP * bool(runs)
    return found + [_Rectangle(start + k, 0, len(COMPONENTS), shares[key]) for k, key in enumerate(_wholes(ablation))]


def _map(made: Any, paper: ModuleType, ablation: Ablation, panel: _Panel) -> None:
    """Runs of layers x components, and the refiners and `other` as columns of their own."""
    cells = _cells(ablation, panel.metric)
    end = max(cell.left for cell in cells) + 1
    width, tall = min(panel.width / end, _WIDEST), _ROW * len(COMPONENTS)
    axes = made.axes(panel.left, panel.top + _TITLE, width * end, tall)
    if not ablation.ranked(panel.metric):
        _nothing(axes)
        return
    axes.set(xlim=(0, end), ylim=(len(COMPONENTS), 0))
    scale = paper.Scale(paper.Normalize(0, max(cell.share or 0 for cell in cells) * 100 or 1), "cividis", "share in %")
    _fill(axes, paper, cells, scale)
    if max(len(number(cell.share)) for cell in cells) * _LETTER <= width:
        _numbers(axes, cells, scale.norm)
    _name_cells(axes, ablation, sorted({cell.left for cell in cells}), width)
    bar = made.axes(
        panel.left, panel.top + _TITLE + tall + _TICKS + 0.05, min(max(width * end, 1.5), 3.2), 0.08
    )  # room for its ticks
    paper.colour_bar(made.figure, bar, scale, "horizontal")


def _name_cells(axes: Axes, ablation: Ablation, lefts: Sequence[float], width: float) -> None:
    """Components on the left, what the columns are below: upright where they are too narrow."""
    names = [*_runs(ablation), *(key.replace("_", "\n") for key in _wholes(ablation))]
    axes.set_yticks([k + 0.5 for k in range(len(COMPONENTS))], [_short(c) for c in COMPONENTS])
    axes.set_xticks([left + 0.5 for left in lefts], names, linespacing=0.9)
    for label in axes.get_xticklabels():
        label.set_rotation(90 if max(map(len, label.get_text().split("\n"))) * _LETTER > width else 0)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _fill(axes: Axes, paper: ModuleType, cells: Sequence[_Rectangle], scale: Any) -> None:
    colours = paper.ScalarMappable(scale.norm, scale.colours)
    absent = {"facecolor": paper.ABSENT.face, "hatch": paper.ABSENT.hatch, "edgecolor": paper.ABSENT.edge}
    for cell in cells:
        look = absent
        if cell.share is not None:
            look = {"facecolor": colours.to_rgba(100 * cell.share), "edgecolor": "white"}
        axes.bar(cell.left, cell.height, width=1, bottom=cell.top, align="edge", linewidth=0.3, **look)


def _numbers(axes: Axes, cells: Sequence[_Rectangle], norm: Any) -> None:
    for cell in cells:
        if cell.share is not None:
            place = (cell.left + 0.5, cell.top + cell.height / 2)
            colour = "white" if norm(100 * cell.share) < 0.45 else "black"
            axes.text(*place, number(cell.share), ha="center", va="center_baseline", color=colour, size=7)


def _short(component: str) -> str:
    return next((alias for alias, name in ALIASES.items() if name == component), component)
