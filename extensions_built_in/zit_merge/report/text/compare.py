"""Several files as text: how alike they are, what they share, what a plain sum would do."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from ...algebra.overlap import LEADING, THIN, Side
from ...analysis.advice import cosine_text, loras_text, two_digits
from ...analysis.compare import Comparison
from ...analysis.measure import outline
from ...errors import counted
from ...model.zimage import MODULES
from ...wording import middle, row, shorten
from .table import value_table

_PAIR_TABLES = 3  # LoRAs up to which every pair has a table of its own
_COLUMNS = 11  # of the table of pairs, in 80 columns
_APART = 0.05  # cosines of components that differ by more are named
_RARE = 0.1  # common directions of a module on average, below which they have no table
_SENTENCE = 500


def comparison_text(found: Comparison) -> str:
    """Several files for people."""
    measured, common = found.measured, found.measured.common.values()
    files = (outline(lora, norm) for lora, norm in zip(measured.loras, found.norms, strict=True))
    lines = [line for i, file in enumerate(files) for line in file_lines(f"LoRA {i + 1}", file)]
    lines += ["", *row("plain sum", _sum_line(found))]
    if common:
        lines += row("together in", f"{len(common)} of {len(measured.modules)} modules")
        lines += row("shared cols", _shared_line([c.columns for c in common], found.shared["columns"]))
        lines += row("shared rows", _shared_line([c.rows for c in common], found.shared["rows"]))
    if measured.leading:
        lines += row("noted", _leading_line(measured.leading))
    lines.append("")
    for i, (_, text) in enumerate(found.advice):
        lines += row("" if i else "advice", f"- {shorten(text, 2 * _SENTENCE)}")
    lines += _pairs_lines(found)
    if places := _common_places(found):
        lines += ["", "common directions of each module, columns/rows", *value_table(places)]
    return "\n".join(lines)


def file_lines(label: str, file: Mapping[str, Any]) -> list[str]:
    """A file's name, size and strength, and what it leaves open.

    Args:
        label: What it is called.
        file: From `measure.outline`.
    """
    kinds = " and ".join(file["algorithms"])
    at_most = " at most" if set(file["algorithms"]) - {"LoRA"} else ""
    lines = row(label, middle(file["file"]))
    lines += row("", f"{counted(file['modules'], 'module')}, {kinds} of rank {file['ranks']}{at_most}, norm {file['norm']:.4g}")
    for question in file["questions"]:
        lines += row("", f"- compared by what is known, it leaves open: {shorten(question, _SENTENCE)}")
    if file["unmatched"]:
        lines += row("", f"- {counted(file['unmatched'], 'key')} that no rule explains left out")
    return lines


def _leading_line(modules: Sequence[str]) -> str:
    """What was not looked at."""
    return (
        f"in {counted(len(modules), 'module')} (e.g. {modules[0]}) a change has a rank above {THIN}: only its {LEADING} leading "
        "directions were looked at"
    )


def _sum_line(found: Comparison) -> str:
    strongest = max(found.norms)
    if not strongest:
        return "nothing, all of them are zero"
    return (
        f"at a ratio of 1 each {found.sum_norm / strongest:.2f} times as strong as the strongest one, "
        f"{loras_text([found.norms.index(strongest)])} (norm {found.sum_norm:.4g}); unrelated ones of these norms would make "
        f"{found.unrelated_norm / strongest:.2f} times"
    )


def _shared_line(sides: Sequence[Side], shared: Mapping[str, float]) -> str:
    held = [f"{n:.1f} held by {k}" for k, n in shared.items() if n >= 0.05]
    of = sum(side.of for side in sides) / len(sides)
    text = f"of {of:.0f} directions of a module, on average: " + (", ".join(held) if held else "none held by several")
    if blind := sum(not math.isfinite(side.bar) for side in sides):
        text += f"; nothing can be told in {counted(blind, 'module')}, where they fill the whole side"
    return text


def _pairs_lines(found: Comparison) -> Iterator[str]:
    """A table of every pair, or of many files the cosines and the table of the pair that is most alike."""
    pairs = [*combinations(range(len(found.norms)), 2)]
    if len(found.norms) > _PAIR_TABLES:
        yield from ("", "cosine of the whole files", *_matrix(found.cosines))
        pairs = [max(pairs, key=lambda p: found.cosines[p[0]][p[1]])]
        yield from ("", "layer by layer the two that are most alike:")
    for i, j in pairs:
        yield from _pair_lines(found, i, j)


def _pair_lines(found: Comparison, i: int, j: int) -> Iterator[str]:
    """Layers x components of one pair, and where it is most alike."""
    values: dict[str, str] = {}
    products: dict[str, list[Sequence[float]]] = defaultdict(list)
    for module, there in found.measured.modules.items():
        if (cosine := there.cosine(i, j)) is not None:
            first, second = there.energy(i), there.energy(j)
            values[module] = two_digits(cosine)
            products[_place(module)].append((cosine * (first * second) ** 0.5, first, second))
    if not values:
        yield from ("", f"cosine of LoRA {i + 1} and {j + 1}: no module is changed by both")
        return
    whole = cosine_text(found.cosines[i][j])
    yield from ("", f"cosine of LoRA {i + 1} and {j + 1}, per layer and component (whole file: {whole})")
    yield from value_table(values)
    parts = {name: _cosine([sum(column) for column in zip(*rows, strict=True)]) for name, rows in products.items()}
    top, low = max(parts, key=parts.__getitem__), min(parts, key=parts.__getitem__)
    if parts[top] - parts[low] > _APART:
        yield f"most alike in {top} ({cosine_text(parts[top])}), least in {low} ({cosine_text(parts[low])})"


def _place(module: str) -> str:
    return MODULES[module].component if MODULES[module].section != "other" else "the other modules"


def _cosine(sums: Sequence[float]) -> float:
    product, first, second = sums
    length = (first * second) ** 0.5
    return product / length if length else 0.0


def _common_places(found: Comparison) -> dict[str, str]:
    """Module -> how many `columns/rows` are common; none where there are hardly any."""
    counts = {m: (common.columns.common, common.rows.common) for m, common in found.measured.common.items()}
    is_rare = sum(map(sum, counts.values())) < _RARE * len(counts)
    return {} if is_rare else {m: "{}/{}".format(*pair) for m, pair in counts.items()}


def _matrix(values: Sequence[Sequence[float]]) -> Iterator[str]:
    """The lower triangle, in blocks of columns."""
    for first in range(0, len(values) - 1, _COLUMNS):
        columns = range(first, min(first + _COLUMNS, len(values) - 1))
        yield f"{'LoRA':<6}" + "".join(f"{j + 1:>6}" for j in columns)
        for i in range(first + 1, len(values)):
            cells = (f"{two_digits(values[i][j]):>6}" for j in columns if j < i)
            yield f"{i + 1:<6}" + "".join(cells)
