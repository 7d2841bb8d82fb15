"""Draws what `plot` has measured: strength per layer and component, spectra, overlap. A4 wide, as high as it takes.

Places are in inches from the upper left corner. Colour-blind people can tell the colours apart; lines differ by dashes and
markers too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from textwrap import wrap
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, NullLocator

from ...analysis.advice import two_digits
from ...errors import counted
from ...model.zimage import COMPONENTS, MODULES, SECTIONS, at, section_components
from .canvas import (
    ABSENT,
    LARGE,
    LINE,
    MARGIN,
    NORMAL,
    SMALL,
    WIDTH,
    Canvas,
    Mark,
    Scale,
    colour_bar,
    decades,
    plain_number,
    settings,
)
from .survey import PAIRED, SHOWN, Portrait, Survey

_GUTTER = 0.5  # beside an axes, for its labels
_NUMBERED = 12  # files up to which cosines are printed
_NAMED = 40  # files that are listed by name
_WIDE_SPREAD = 50.0  # highest norm over lowest from which on colours follow the logarithm
_LOWEST = 1e-4  # share of the highest norm below which they don't

# Okabe and Ito's palette without its yellow, which is too faint for a line
_LINES = (
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#CC79A7", ":", "D"),
    ("#56B4E9", (0, (6, 1, 1, 1, 1, 1)), "v"),
    ("#000000", (0, (8, 2)), "x"),
)
_APART = Mark("not in both files", *ABSENT[1:])
_ZERO = Mark("zero", "white", "", "#8c8c8c")
_BROKEN = Mark("broken: infinite or NaN", "white", "xxxxxx", "#D55E00")


class _Strip(NamedTuple):
    """A map of layers x components."""

    title: str
    name: str  # of a file, cut to what is left of the line
    detail: str
    values: Mapping[str, float]
    marks: Mapping[str, Mark]  # module -> what it is in place of a value
    absent: Mark


class _Block(NamedTuple):
    """A part of the page: its height, and what draws it from there down."""

    height: float
    draw: Callable[[Canvas, float], None]


def draw(survey: Survey) -> Figure:
    """The page, with an Agg canvas."""
    with settings():
        return _draw(survey)


def save(survey: Survey, file: BinaryIO, kind: str) -> None:
    """Writes the page.

    Args:
        survey: What is drawn.
        file: Open for writing.
        kind: `png`, `pdf` or `svg`.
    """
    with settings():
        _draw(survey).savefig(file, format=kind)


def _draw(survey: Survey) -> Figure:
    blocks = [*_strengths(survey), *_spectra(survey), *(_overlap(survey) if len(survey.files) > 1 else []), *_notes(survey)]
    page, top = Canvas(2 * MARGIN + sum(b.height for b in blocks)), MARGIN
    for block in blocks:
        block.draw(page, top)
        top += block.height
    return page.figure


def _heading(text: str) -> _Block:
    return _Block(0.27, lambda page, top: page.text(MARGIN, top, text, LARGE, weight="bold") and None)


# --- maps of layers x components -----------------------------------------------------------------------------------------------


class _Columns(NamedTuple):
    """Where blocks stand in a map: layers, and the refiners that any file changes."""

    edges: list[float]  # of the cells, gaps between the sections among them
    blocks: list[tuple[str, int] | None]  # section and index of each, None for a gap

    def middle(self, section: str) -> float:
        cells = [k for k, b in enumerate(self.blocks) if b and b[0] == section]
        return (self.edges[cells[0]] + self.edges[cells[-1] + 1]) / 2


def _columns(survey: Survey) -> _Columns:
    used = {MODULES[m].section for f in survey.files[:SHOWN] for m in f.norms} | {"layers"}
    columns = _Columns([0.0], [])
    for section in (s for s in SECTIONS if s in used):
        if columns.blocks:
            columns.blocks.append(None)
            columns.edges.append(columns.edges[-1] + 2.6)  # room for the names of the refiners
        for index in range(SECTIONS[section]):
            columns.blocks.append((section, index))
            columns.edges.append(columns.edges[-1] + 1)
    return columns


_ROW, _TICKS, _TITLES, _BETWEEN = 0.13, 0.42, 0.31, 0.15


def _maps(strips: Sequence[_Strip], scale: Scale, columns: _Columns) -> list[_Block]:
    """Strips, one over the whole width or two beside each other, and their scale."""
    across = min(len(strips), 2)
    room = (WIDTH - 2 * MARGIN - (across - 1) * _BETWEEN) / across
    tall = _TITLES + len(COMPONENTS) * _ROW + _TICKS

    def draw(page: Canvas, top: float) -> None:
        for k, strip in enumerate(strips):
            left, down = MARGIN + k % across * (room + _BETWEEN), top + k // across * tall
            page.named(left, down, room, strip.title, strip.name, NORMAL)
            page.text(left, down + LINE, strip.detail, color="#404040")
            axes = page.axes(left + _GUTTER, down + _TITLES, room - _GUTTER, len(COMPONENTS) * _ROW)
            _map(axes, strip, scale, columns, every=1 if across == 1 else 5)

    found = {mark for s in strips for mark in _marked(s, columns).values()}
    return [_Block(-(-len(strips) // across) * tall, draw), _Block(0.62, lambda page, top: _key(page, top, scale, found))]


def _map(axes: Axes, strip: _Strip, scale: Scale, columns: _Columns, every: int) -> None:
    cells = np.full((len(COMPONENTS), len(columns.blocks)), math.nan)
    patches: dict[Mark, list[Rectangle]] = {}
    marks = _marked(strip, columns)
    for row, column, module in _places(columns):
        if module in marks:
            width = columns.edges[column + 1] - columns.edges[column]
            patches.setdefault(marks[module], []).append(Rectangle((columns.edges[column], row), width, 1))
        else:
            cells[row, column] = strip.values[module]
    axes.pcolormesh(columns.edges, range(len(COMPONENTS) + 1), np.ma.masked_invalid(cells), norm=scale.norm, cmap=scale.colours)
    for mark, rectangles in patches.items():
        look = {"facecolor": mark.face, "hatch": mark.hatch, "edgecolor": mark.edge, "linewidth": 0.3}
        axes.add_collection(PatchCollection(rectangles, **look))
    axes.set(xlim=(0, columns.edges[-1]), ylim=(len(COMPONENTS), 0))
    axes.set_yticks([k + 0.5 for k in range(len(COMPONENTS))], ["adaLN" if c == "adaLN_modulation" else c for c in COMPONENTS])
    shown = [(k, b[1]) for k, b in enumerate(columns.blocks) if b and (b[1] % every == 0 or b[0] != "layers")]
    axes.set_xticks([(columns.edges[k] + columns.edges[k + 1]) / 2 for k, _ in shown], [str(index) for _, index in shown])
    axes.spines[:].set_visible(False)
    for section in {b[0] for b in columns.blocks if b}:
        words = "layer" if section == "layers" else section.replace("_", "\n")
        place = {"xy": (columns.middle(section), 0), "xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
        axes.annotate(words, **place, xytext=(0, -11), ha="center", va="top", size=SMALL, linespacing=1.0, annotation_clip=False)


def _places(columns: _Columns) -> Iterator[tuple[int, int, str]]:
    """(row, column, module) of every cell that the model has."""
    for column, block in enumerate(columns.blocks):
        for component in section_components(block[0]) if block else ():
            yield COMPONENTS.index(component), column, at(*block, component).name


def _marked(strip: _Strip, columns: _Columns) -> dict[str, Mark]:
    """Module -> mark of every cell that has no value."""
    modules = (module for *_, module in _places(columns))
    return {m: strip.marks.get(m, strip.absent) for m in modules if m not in strip.values}


def _key(page: Canvas, top: float, scale: Scale, marks: Collection[Mark]) -> None:
    """The scale on the left, what has no colour on the right."""
    axes = page.axes(MARGIN + _GUTTER, top + 0.03, 3.2, 0.1)
    colour_bar(page.figure, axes, scale, "horizontal")
    if marks:
        patches = [Patch(facecolor=m.face, hatch=m.hatch, edgecolor=m.edge, linewidth=0.5, label=m.text) for m in sorted(marks)]
        page.legend(MARGIN + _GUTTER + 3.6, top - 0.02, patches)


# --- strength ------------------------------------------------------------------------------------------------------------------


def _strengths(survey: Survey) -> list[_Block]:
    files = survey.files[:SHOWN]
    strips = [_norm_strip(i, f) for i, f in enumerate(files)]
    values = [v for s in strips for v in s.values.values()]
    scale = Scale(_norm_scale(values), "cividis", "Frobenius norm of the change, alpha / rank folded in")
    return [_heading("How strong: every module's change, layer by layer"), *_maps(strips, scale, _columns(survey))]


def _norm_strip(number: int, file: Portrait) -> _Strip:
    marks = {m: _BROKEN if n is None else _ZERO for m, n in file.norms.items() if not n}
    others = [n for m, n in file.norms.items() if MODULES[m].section == "other"]
    words = [f"norm {file.norm:.4g}", f"rank {file.ranks}", counted(len(file.norms), "module")]
    if others:
        words.append(f"{len(others)} of them not in this map (norm {math.hypot(*(n or 0.0 for n in others)):.3g})")
    values = {m: n for m, n in file.norms.items() if n}
    return _Strip(f"LoRA {number + 1}: ", file.name, ", ".join(words), values, marks, ABSENT)


def _norm_scale(values: Sequence[float]) -> Normalize:
    high, low = max(values, default=1.0), min(values, default=0.0)
    return LogNorm(max(low, high * _LOWEST), high) if low * _WIDE_SPREAD < high and values else Normalize(0, high)


# --- spectra -------------------------------------------------------------------------------------------------------------------


def _spectra(survey: Survey) -> list[_Block]:
    files = survey.files[:SHOWN]
    tall, wide = 1.9, (WIDTH - 2 * MARGIN - 2 * _GUTTER - 0.2) / 2

    def draw(page: Canvas, top: float) -> None:
        left = page.axes(MARGIN + _GUTTER, top + 0.2, wide, tall)
        right = page.axes(WIDTH - MARGIN - wide, top + 0.2, wide, tall)
        page.text(MARGIN + _GUTTER, top, "singular values of a module: median and quartiles", NORMAL)
        page.text(WIDTH - MARGIN - wide, top, "energy of the whole file, kept by one rank for every module", NORMAL)
        if not any(_alive(files)):
            _nothing(left)
            _nothing(right)
            return
        _spectrum_axes(left, files)
        _energy_axes(right, files)
        page.legend(MARGIN + _GUTTER, top + tall + 0.55, _legend(files))

    return [_heading("How many directions: singular values and rank"), _Block(tall + 0.95, draw)]


def _alive(files: Sequence[Portrait]) -> Iterator[tuple[int, Portrait]]:
    return ((i, f) for i, f in enumerate(files) if f.values is not None and f.energy > 0)


def _legend(files: Sequence[Portrait]) -> list[Line2D | Patch]:
    lines = [Line2D([], [], **_look(i), label=f"LoRA {i + 1}") for i, _ in _alive(files)]
    return [*lines, Patch(facecolor="#808080", alpha=0.3, label="quartiles")]


def _look(number: int) -> dict[str, Any]:
    colour, dashes, marker = _LINES[number]
    return {"color": colour, "linestyle": dashes, "marker": marker, "markersize": 3.5, "linewidth": 1.1}


def _nothing(axes: Axes) -> None:
    """A sentence in place of lines."""
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, "nothing: all zero or broken", transform=axes.transAxes, ha="center", va="center", size=NORMAL)


def _spectrum_axes(axes: Axes, files: Sequence[Portrait]) -> None:
    """Where the median is 0, most modules have no more values: the line ends."""
    lows, highs = [], []
    for i, file in _alive(files):
        low, middle, high = (row[row > 0].numpy() for row in file.quartiles())
        lines, at_ = range(1, len(middle) + 1), _powers(len(middle))
        axes.plot(lines, middle, **_look(i), markevery=[k - 1 for k in at_])
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


def _energy_axes(axes: Axes, files: Sequence[Portrait]) -> None:
    for i, file in _alive(files):
        kept = 100 * file.kept().numpy()
        axes.plot(range(1, len(kept) + 1), kept, **_look(i), markevery=[k - 1 for k in _powers(len(kept))])
    axes.set(ylabel="%", xlabel="rank", ylim=(0, 103))
    axes.set_yticks([0, 25, 50, 75, 90, 100], ["0", "25", "50", "75", "90", "100"])
    _ranks_below(axes, files)


def _powers(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`."""
    return [2**k for k in range(most.bit_length())]


def _ranks_below(axes: Axes, files: Sequence[Portrait]) -> None:
    """A logarithmic axis of ranks with powers of 2, as ranks are chosen."""
    most = max(f.values.shape[1] for _, f in _alive(files))
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.9, max(most, 2) * 1.1)
    axes.xaxis.set_major_locator(FixedLocator(_powers(max(most, 2))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(plain_number())
    axes.grid(linewidth=0.3, color="#c0c0c0")
    axes.set_axisbelow(True)


# --- overlap -------------------------------------------------------------------------------------------------------------------


def _overlap(survey: Survey) -> list[_Block]:
    blocks = [_heading("How alike: cosine 1 is the same change, 0 unrelated, -1 the opposite"), _matrix(survey)]
    if not survey.pairs:
        return blocks
    strips = [_pair_strip(survey, i, j) for i, j in survey.pairs]
    most = max((abs(v) for s in strips for v in s.values.values()), default=1.0)
    most = next(limit for limit in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, math.inf) if most <= limit * (1 + 1e-9))
    scale = Scale(Normalize(-most, most), "PuOr", "cosine of the two changes of a module")
    return [*blocks, *_maps(strips, scale, _columns(survey))]


def _pair_strip(survey: Survey, i: int, j: int) -> _Strip:
    found = survey.pairs[i, j]
    values = {m: v for m, v in found.items() if not math.isnan(v)}
    whole = float(survey.cosines[i, j])
    told = "no angle, one of them is zero" if math.isnan(whole) else f"whole files {two_digits(whole)}"
    detail = f"{told}, {counted(len(found), 'module')} in both"
    return _Strip(f"LoRA {i + 1} and {j + 1}", "", detail, values, dict.fromkeys(found.keys() - values.keys(), _ZERO), _APART)


def _matrix(survey: Survey) -> _Block:
    """Cosines of the whole files on the left, which file is which on the right."""
    count = len(survey.files)
    side = max(1.2, 0.34 * count) if count <= _NUMBERED else min(4.3, max(3.0, 0.11 * count))
    listed = min(count, _NAMED) + (count > _NAMED)
    left = MARGIN + _GUTTER + side + 0.9

    def draw(page: Canvas, top: float) -> None:
        axes = page.axes(MARGIN + _GUTTER, top + 0.03, side, side)
        scale = Scale(Normalize(-1, 1), "PuOr", "cosine of the whole files")
        _cosines(axes, survey, scale)
        colour_bar(page.figure, page.axes(MARGIN + _GUTTER + side + 0.12, top + 0.03, 0.1, side), scale, "vertical")
        for k, file in enumerate(survey.files[:_NAMED]):
            page.named(left, top + 0.03 + k * LINE, WIDTH - MARGIN - left, f"LoRA {k + 1}: ", file.name)
        if count > _NAMED:
            page.text(left, top + 0.03 + _NAMED * LINE, f"and {count - _NAMED} more")

    return _Block(max(side + 0.45, listed * LINE + 0.2), draw)


def _cosines(axes: Axes, survey: Survey, scale: Scale) -> None:
    values, count = survey.cosines.numpy(), len(survey.files)
    grid = {"edgecolors": "white", "linewidth": 0.3} if count <= _NAMED else {}
    axes.pcolormesh(np.ma.masked_invalid(values), norm=scale.norm, cmap=scale.colours, **grid)
    axes.set(xlim=(0, count), ylim=(count, 0), xlabel="LoRA", ylabel="LoRA")
    step = 1 if count <= _NAMED else 5 * -(-count // (5 * _NAMED))
    numbers = [k for k in range(1, count + 1) if k % step == 0]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([k - 0.5 for k in numbers], [str(k) for k in numbers])
    if count > 20:
        axes.tick_params(axis="x", labelrotation=90)
    for i in range(count if count <= _NUMBERED else 0):
        for j in range(count):
            value = float(values[i, j])
            colour = "white" if abs(value) > 0.6 else "black"
            text = "-" if math.isnan(value) else two_digits(value)
            axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", size=SMALL, color=colour)


# --- what the pictures leave out -----------------------------------------------------------------------------------------------


def _notes(survey: Survey) -> list[_Block]:
    lines = [line for text in _remarks(survey) for line in wrap(text, 130, subsequent_indent="  ")]

    def draw(page: Canvas, top: float) -> None:
        for k, line in enumerate(lines):
            page.text(MARGIN, top + 0.1 + k * LINE, line)

    return [_Block(0.1 + len(lines) * LINE, draw)] if lines else []


def _remarks(survey: Survey) -> Iterator[str]:
    files, count = survey.files, len(survey.files)
    if count > SHOWN:
        yield f"The maps and lines are those of the first {SHOWN} files, {count - SHOWN} more are in the cosines only."
    if count > _NUMBERED:
        yield f"The cosines of over {_NUMBERED} files are shown as colours only; inspect --json has the numbers."
    if count > PAIRED:
        yield f"Layer by layer the files are compared where there are {PAIRED} at most."
    for i, file in enumerate(files):
        if file.has_questions:
            yield f"LoRA {i + 1} leaves open how it is to be read (inspect says what); it is shown by what is known."
        if not file.norm:
            yield f"LoRA {i + 1} is zero as far as it is whole: it has no lines."
        if broken := sum(n is None for n in file.norms.values()):
            yield f"LoRA {i + 1} holds NaN or infinity in {counted(broken, 'module')}: its norm and its lines are of the others."
        if file.is_cut:
            yield f"LoRA {i + 1} has changes of so high a rank that its lines end at {file.values.shape[1]} singular values."
