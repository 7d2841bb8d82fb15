"""Draws an ablation: bars for the parts, a map of layers x components for cells; one panel for each metric. A4 wide.

Places are in inches from the upper left corner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ..model.zimage import COMPONENTS
from ..report.plots import heatmap
from ..report.plots.canvas import LARGE, LINE, MARGIN, NORMAL, SMALL, WIDTH, Canvas, settings, wrapped
from ..report.plots.heatmap import ABSENT, Cell, Mark, Scale
from .ablation import Ablation, number
from .groups import BY_CELLS, LEAVE_OUT

_BETWEEN = 0.2  # panels
_ROW = 0.17  # of a bar or a cell
_NAMES, _COMPONENTS = 0.95, 0.5  # beside a panel, for the names of parts, of components
_TITLE, _TICKS, _BAR = 0.31, 0.42, 0.42  # above a panel; below it; for a scale of colours
_LETTER = 0.065  # width of a digit of small text, with a little air
_WIDEST = 0.45  # of a column of a map
_GAP = 0.6  # columns between the layers and what is no layer
_COLUMNS = 14  # of a map, up to which two are drawn beside each other
_OUTLIERS = 2.0  # times the largest share: single pictures beyond are drawn at the edge
_FILL, _DOT, _GREY = "#56B4E9", "#000000", "#404040"  # Okabe and Ito


class _Panel(NamedTuple):
    """Where the picture of one metric is."""

    metric: str
    left: float
    top: float
    width: float


def draw_chart(ablation: Ablation) -> Figure:
    """The picture, with an Agg canvas."""
    with settings():
        head, foot = wrapped((f"{ablation.rendered}.", ablation.meaning)), wrapped(_foot(ablation))
        below_title = MARGIN + 0.27 + LINE * 1.3
        top = below_title + len(head) * LINE + 0.12
        panels, height = _panels(ablation, top)
        canvas = Canvas(top + height + len(foot) * LINE + MARGIN)
        what = "left out in turn" if ablation.mode == LEAVE_OUT else "on its own"
        canvas.text(MARGIN, MARGIN, f"What the parts do in pictures: each {what}", LARGE, weight="bold")
        canvas.named(MARGIN, MARGIN + 0.27, WIDTH - 2 * MARGIN, "LoRA: ", ablation.lora, NORMAL)
        canvas.lines(below_title, head)
        for n, panel in enumerate(panels):
            canvas.named(panel.left, panel.top, panel.width, "", panel.metric, NORMAL)
            canvas.text(panel.left, panel.top + LINE, f"100 % is {ablation.whole(panel.metric):.3g}", color=_GREY)
            if ablation.by == BY_CELLS:
                _draw_map(canvas, ablation, panel)
            else:
                _draw_bars(canvas, ablation, panel, is_first=n % _across(ablation) == 0)
        canvas.lines(top + height, foot)
        return canvas.figure


def _foot(ablation: Ablation) -> list[str]:
    """What the marks mean, what there is to know, and the caveat."""
    texts = []
    if ablation.by != BY_CELLS and len(ablation.specs) > 1:
        texts.append("Bars: all pictures together. Dots: single pictures, those beyond the scale at its edge.")
    if _is_holey(ablation):
        texts.append("Hatched: the LoRA has nothing there.")
    return [*texts, *ablation.notes(), ablation.caveat]


def _across(ablation: Ablation) -> int:
    """Panels beside each other."""
    most = 4 if ablation.by != BY_CELLS else 2 if len(_runs(ablation)) + len(_wholes(ablation)) <= _COLUMNS else 1
    return min(len(ablation.distances), most)


def _panels(ablation: Ablation, top: float) -> tuple[list[_Panel], float]:
    """The panels from `top` on, and the height of them all."""
    across, is_map = _across(ablation), ablation.by == BY_CELLS
    tall = _TITLE + _ROW * (len(COMPONENTS) if is_map else len(ablation.groups)) + _TICKS + (_BAR + 0.15 if is_map else 0.15)
    beside = _COMPONENTS * across if is_map else _NAMES  # bars have their names once in a row
    width = (WIDTH - 2 * MARGIN - beside - (across - 1) * _BETWEEN) / across
    found = []
    for k, metric in enumerate(ablation.distances):
        row, column = divmod(k, across)
        left = MARGIN + column * (width + _BETWEEN) + (_COMPONENTS * (column + 1) if is_map else _NAMES)
        found.append(_Panel(metric, left, top + row * tall, width))
    return found, tall * -(-len(found) // across)


def _draw_bars(canvas: Canvas, ablation: Ablation, panel: _Panel, *, is_first: bool) -> None:
    """A bar for each part, in the order of the model, and a dot for each picture."""
    names = [g.name for g in ablation.groups]
    axes = canvas.axes(panel.left, panel.top + _TITLE, panel.width, _ROW * len(names))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names if is_first else [""] * len(names))
    percent = [100 * share for name in names if (share := ablation.share(panel.metric, name)) is not None]
    if len(percent) < len(names):
        _say_nothing(axes)
        return
    singles = ((k, share) for k, name in enumerate(names) for share in ablation.shares(panel.metric, name))
    dots = [(k, 100 * share) for k, share in singles if share is not None]
    limit = 1.06 * max(*percent, min(max((x for _, x in dots), default=0), _OUTLIERS * max(percent)), 0.1)
    axes.barh(range(len(names)), percent, height=0.72, color=_FILL, linewidth=0)
    if len(ablation.specs) > 1:
        dot: dict[str, Any] = {"s": 5, "facecolor": "none", "edgecolor": _DOT, "linewidth": 0.5, "clip_on": False}
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


def _say_nothing(axes: Axes) -> None:
    """A word in place of what can't be told."""
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.text(0.5, 0.5, "no change", transform=axes.transAxes, ha="center", va="center", size=SMALL)


def _runs(ablation: Ablation) -> list[str]:
    """The runs of layers, in order."""
    return list(dict.fromkeys(g.key.partition(".")[0] for g in ablation.groups if g.table == "overrides"))


def _wholes(ablation: Ablation) -> list[str]:
    """The parts that are no cells."""
    return [g.key for g in ablation.groups if g.table != "overrides"]


def _is_holey(ablation: Ablation) -> bool:
    return ablation.by == BY_CELLS and len(_runs(ablation)) * len(COMPONENTS) + len(_wholes(ablation)) > len(ablation.groups)


def _cells(ablation: Ablation, metric: str) -> list[Cell]:
    """Shares in percent: runs of layers x components, and the refiners and `other` as columns of their own."""
    shares = {g.key: 100 * (ablation.share(metric, g.name) or 0.0) for g in ablation.groups}
    runs = _runs(ablation)
    found = [Cell(x, y, shares.get(f"{run}.{c}", ABSENT)) for x, run in enumerate(runs) for y, c in enumerate(COMPONENTS)]
    start = len(runs) + _GAP * bool(runs)
    return found + [Cell(start + k, 0, shares[key], height=len(COMPONENTS)) for k, key in enumerate(_wholes(ablation))]


def _draw_map(canvas: Canvas, ablation: Ablation, panel: _Panel) -> None:
    cells = _cells(ablation, panel.metric)
    end = max(cell.left for cell in cells) + 1
    width, tall = min(panel.width / end, _WIDEST), _ROW * len(COMPONENTS)
    axes = canvas.axes(panel.left, panel.top + _TITLE, width * end, tall)
    if not ablation.ranked(panel.metric):
        _say_nothing(axes)
        return
    axes.set_xlim(0, end)
    heatmap.name_components(axes)
    values = [cell.value for cell in cells if not isinstance(cell.value, Mark)]
    scale = Scale(Normalize(0, max(values) or 1), "cividis", "share in %")
    heatmap.fill(axes, cells, scale)
    if max(len(_percent(value)) for value in values) * _LETTER <= width:
        heatmap.write_numbers(axes, cells, _percent, scale)
    _name_columns(axes, ablation, sorted({cell.left for cell in cells}), width)
    room = min(max(width * end, 1.5), 3.2)  # for its ticks
    heatmap.key(canvas, panel.left, panel.top + _TITLE + tall + _TICKS + 0.05, room, scale)


def _percent(value: float) -> str:
    return number(value / 100)


def _name_columns(axes: Axes, ablation: Ablation, lefts: Sequence[float], width: float) -> None:
    """What the columns are, below them: upright where they are too narrow."""
    names = [*_runs(ablation), *(key.replace("_", "\n") for key in _wholes(ablation))]
    axes.set_xticks([left + 0.5 for left in lefts], names, linespacing=0.9)
    for label in axes.get_xticklabels():
        label.set_rotation(90 if max(map(len, label.get_text().split("\n"))) * _LETTER > width else 0)
    axes.tick_params(length=0)
