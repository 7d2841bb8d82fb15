"""Draws files: strength per layer and component, spectra, overlap. A4 wide, as high as it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from ...analysis.advice import two_digits
from ...errors import counted
from ...model.zimage import COMPONENTS, MODULES, SECTIONS, at, section_components
from ...wording import ranks_text
from . import heatmap
from .canvas import LARGE, LINE, MARGIN, NORMAL, SMALL, WIDTH, Canvas, settings, wrapped
from .data import PAIRED, SHOWN, FileData, PlotData
from .heatmap import ABSENT, ABSENT_IN_ONE, BROKEN, ZERO, Cell, Mark, Scale
from .spectra import draw_spectra

_GUTTER = 0.5  # beside an axes, for its labels
_ROW, _TICKS, _TITLES, _BETWEEN = 0.13, 0.42, 0.31, 0.15  # of a map
_GAP = 2.6  # columns between sections, room for the names of the refiners
_NUMBERED = 12  # files up to which cosines are printed
_NAMED = 40  # files that are listed by name
_WIDE_SPREAD = 50.0  # highest norm over lowest from which on colours follow the logarithm
_LOWEST = 1e-4  # share of the highest norm below which they don't


class _Strip(NamedTuple):
    """A map of layers x components."""

    title: str
    name: str  # of a file, cut to what is left of the line
    detail: str
    values: Mapping[str, float | Mark]
    absent: Mark

    def numbers(self) -> list[float]:
        return [v for v in self.values.values() if not isinstance(v, Mark)]


class _Block(NamedTuple):
    """A part of the picture: its height, and what draws it from there down."""

    height: float
    draw: Callable[[Canvas, float], object]


def draw(data: PlotData) -> Figure:
    """The picture, with an Agg canvas."""
    with settings():
        return _draw(data)


def save(data: PlotData, file: BinaryIO, kind: str) -> None:
    """Writes the picture.

    Args:
        data: What is drawn.
        file: Open for writing.
        kind: `png`, `pdf` or `svg`.
    """
    with settings():
        _draw(data).savefig(file, format=kind)


def _draw(data: PlotData) -> Figure:
    blocks = [*_strengths(data), *_spectra(data), *(_overlap(data) if len(data.files) > 1 else []), *_notes(data)]
    canvas, top = Canvas(2 * MARGIN + sum(b.height for b in blocks)), MARGIN
    for block in blocks:
        block.draw(canvas, top)
        top += block.height
    return canvas.figure


def _heading(text: str) -> _Block:
    return _Block(0.27, lambda canvas, top: canvas.text(MARGIN, top, text, LARGE, weight="bold"))


def _strengths(data: PlotData) -> list[_Block]:
    strips = [_norm_strip(i, f) for i, f in enumerate(data.files[:SHOWN])]
    scale = Scale(
        _norm_scale([v for s in strips for v in s.numbers()]), "cividis", "Frobenius norm of the change, alpha / rank folded in"
    )
    return [_heading("How strong: every module's change, layer by layer"), *_maps(strips, scale, _columns(data))]


def _norm_strip(number: int, file: FileData) -> _Strip:
    others = [n for m, n in file.norms.items() if MODULES[m].section == "other"]
    rank = ranks_text(file.lora.ranks, file.lora.algorithms)
    words = [f"norm {file.norm:.4g}", f"rank {rank}", counted(len(file.norms), "module")]
    if others:
        words.append(f"{len(others)} of them not in this map (norm {math.hypot(*(n or 0.0 for n in others)):.3g})")
    values = {m: BROKEN if n is None else n or ZERO for m, n in file.norms.items()}
    return _Strip(f"LoRA {number + 1}: ", file.lora.path.name, ", ".join(words), values, ABSENT)


def _norm_scale(values: Sequence[float]) -> Normalize:
    high, low = max(values, default=1.0), min(values, default=0.0)
    return LogNorm(max(low, high * _LOWEST), high) if low * _WIDE_SPREAD < high and values else Normalize(0, high)


class _Column(NamedTuple):
    """A layer, or a block of a refiner, and where it is."""

    left: float
    section: str
    number: int


def _columns(data: PlotData) -> list[_Column]:
    """The layers, and the refiners that any file changes."""
    used = {MODULES[m].section for f in data.files[:SHOWN] for m in f.norms} | {"layers"}
    columns: list[_Column] = []
    for section in (s for s in SECTIONS if s in used):
        left = columns[-1].left + 1 + _GAP if columns else 0.0
        columns += [_Column(left + number, section, number) for number in range(SECTIONS[section])]
    return columns


def _maps(strips: Sequence[_Strip], scale: Scale, columns: Sequence[_Column]) -> list[_Block]:
    """Strips, one over the whole width or two beside each other, and their key."""
    across = min(len(strips), 2)
    room = (WIDTH - 2 * MARGIN - (across - 1) * _BETWEEN) / across
    tall = _TITLES + len(COMPONENTS) * _ROW + _TICKS
    cells = [_cells(strip, columns) for strip in strips]
    marks = {cell.value for own in cells for cell in own if isinstance(cell.value, Mark)}

    def draw_maps(canvas: Canvas, top: float) -> None:
        for k, (strip, own) in enumerate(zip(strips, cells, strict=True)):
            left, down = MARGIN + k % across * (room + _BETWEEN), top + k // across * tall
            canvas.named(left, down, room, strip.title, strip.name, NORMAL)
            canvas.text(left, down + LINE, strip.detail, color="#404040")
            axes = canvas.axes(left + _GUTTER, down + _TITLES, room - _GUTTER, len(COMPONENTS) * _ROW)
            axes.set_xlim(0, columns[-1].left + 1)
            heatmap.name_components(axes)
            heatmap.fill(axes, own, scale)
            _name_columns(axes, columns, every=1 if across == 1 else 5)

    def draw_key(canvas: Canvas, top: float) -> None:
        heatmap.key(canvas, MARGIN + _GUTTER, top + 0.03, 3.2, scale, marks)

    return [_Block(-(-len(strips) // across) * tall, draw_maps), _Block(0.62, draw_key)]


def _cells(strip: _Strip, columns: Sequence[_Column]) -> list[Cell]:
    """A cell for everything that the model has."""
    return [
        Cell(left, COMPONENTS.index(component), strip.values.get(at(section, number, component).name, strip.absent))
        for left, section, number in columns
        for component in section_components(section)
    ]


def _name_columns(axes: Axes, columns: Sequence[_Column], every: int) -> None:
    """Numbers below the columns, below them the sections."""
    shown = [c for c in columns if c.number % every == 0 or c.section != "layers"]
    axes.set_xticks([c.left + 0.5 for c in shown], [str(c.number) for c in shown])
    for section in dict.fromkeys(c.section for c in columns):
        lefts = [c.left for c in columns if c.section == section]
        words = "layer" if section == "layers" else section.replace("_", "\n")
        middle, across = (lefts[0] + lefts[-1] + 1) / 2, axes.get_xaxis_transform()
        how: dict[str, Any] = {"xytext": (0, -11), "textcoords": "offset points", "annotation_clip": False}
        axes.annotate(words, (middle, 0), xycoords=across, **how, ha="center", va="top", size=SMALL, linespacing=1.0)


def _spectra(data: PlotData) -> list[_Block]:
    tall, wide = 1.9, (WIDTH - 2 * MARGIN - 2 * _GUTTER - 0.2) / 2

    def draw_lines(canvas: Canvas, top: float) -> None:
        left, right = MARGIN + _GUTTER, WIDTH - MARGIN - wide
        canvas.text(left, top, "singular values of a module: median and quartiles", NORMAL)
        canvas.text(right, top, "energy of the whole file, kept by one rank for every module", NORMAL)
        values, energy = (canvas.axes(x, top + 0.2, wide, tall) for x in (left, right))
        if legend := draw_spectra(values, energy, data.files[:SHOWN]):
            canvas.legend(left, top + tall + 0.55, legend)

    return [_heading("How many directions: singular values and rank"), _Block(tall + 0.95, draw_lines)]


def _overlap(data: PlotData) -> list[_Block]:
    blocks = [_heading("How alike: cosine 1 is the same change, 0 unrelated, -1 the opposite"), _matrix(data)]
    if not data.pairs:
        return blocks
    strips = [_pair_strip(data, i, j) for i, j in data.pairs]
    most = max((abs(v) for s in strips for v in s.numbers()), default=1.0)
    most = next(limit for limit in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, math.inf) if most <= limit * (1 + 1e-9))
    scale = Scale(Normalize(-most, most), "PuOr", "cosine of the two changes of a module")
    return [*blocks, *_maps(strips, scale, _columns(data))]


def _pair_strip(data: PlotData, i: int, j: int) -> _Strip:
    values = {m: ZERO if math.isnan(v) else v for m, v in data.pairs[i, j].items()}
    whole = float(data.cosines[i, j])
    told = "no angle, one of them is zero" if math.isnan(whole) else f"whole files {two_digits(whole)}"
    return _Strip(f"LoRA {i + 1} and {j + 1}", "", f"{told}, {counted(len(values), 'module')} in both", values, ABSENT_IN_ONE)


def _matrix(data: PlotData) -> _Block:
    """Cosines of the whole files on the left, which file is which on the right."""
    count = len(data.files)
    side = max(1.2, 0.34 * count) if count <= _NUMBERED else min(4.3, max(3.0, 0.11 * count))
    listed = min(count, _NAMED) + (count > _NAMED)
    left = MARGIN + _GUTTER + side + 0.9

    def draw_matrix(canvas: Canvas, top: float) -> None:
        scale = Scale(Normalize(-1, 1), "PuOr", "cosine of the whole files")
        _cosines(canvas.axes(MARGIN + _GUTTER, top + 0.03, side, side), data, scale)
        bar = canvas.axes(MARGIN + _GUTTER + side + 0.12, top + 0.03, 0.1, side)
        heatmap.colour_bar(canvas.figure, bar, scale, "vertical")
        for k, file in enumerate(data.files[:_NAMED]):
            canvas.named(left, top + 0.03 + k * LINE, WIDTH - MARGIN - left, f"LoRA {k + 1}: ", file.lora.path.name)
        if count > _NAMED:
            canvas.text(left, top + 0.03 + _NAMED * LINE, f"and {count - _NAMED} more")

    return _Block(max(side + 0.45, listed * LINE + 0.2), draw_matrix)


def _cosines(axes: Axes, data: PlotData, scale: Scale) -> None:
    count = len(data.files)
    cells = [Cell(j, i, value) for i, row in enumerate(data.cosines.tolist()) for j, value in enumerate(row)]
    heatmap.fill(axes, cells, scale, is_ruled=count <= _NAMED)
    axes.set(xlim=(0, count), ylim=(count, 0), xlabel="LoRA", ylabel="LoRA")
    step = 1 if count <= _NAMED else 5 * -(-count // (5 * _NAMED))
    numbers = [k for k in range(1, count + 1) if k % step == 0]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([k - 0.5 for k in numbers], [str(k) for k in numbers])
    if count > 20:
        axes.tick_params(axis="x", labelrotation=90)
    if count <= _NUMBERED:
        heatmap.write_numbers(axes, cells, _cosine, scale)


def _cosine(value: float) -> str:
    return "-" if math.isnan(value) else two_digits(value)


def _notes(data: PlotData) -> list[_Block]:
    lines = wrapped(_remarks(data), "  ")
    return [_Block(0.1 + len(lines) * LINE, lambda canvas, top: canvas.lines(top + 0.1, lines))] if lines else []


def _remarks(data: PlotData) -> Iterator[str]:
    """What the pictures leave out."""
    count = len(data.files)
    if count > SHOWN:
        yield f"The maps and lines are those of the first {SHOWN} files, {count - SHOWN} more are in the cosines only."
    if count > _NUMBERED:
        yield f"The cosines of over {_NUMBERED} files are shown as colours only; inspect --json has the numbers."
    if count > PAIRED:
        yield f"Layer by layer the files are compared where there are {PAIRED} at most."
    for i, file in enumerate(data.files):
        if file.lora.questions:
            yield f"LoRA {i + 1} leaves open how it is to be read (inspect says what); it is shown by what is known."
        if not file.norm:
            yield f"LoRA {i + 1} is zero as far as it is whole: it has no lines."
        if broken := sum(n is None and not file.lora.changes[m][0].needs_base for m, n in file.norms.items()):
            yield f"LoRA {i + 1} holds NaN or infinity in {counted(broken, 'module')}: its norm and its lines are of the others."
        if file.is_cut:
            yield f"LoRA {i + 1} has changes of so high a rank that its lines end at {file.drawn.shape[1]} singular values."
