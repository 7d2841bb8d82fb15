"""What `inspect` tells of several files: how alike they are, what they share, and what a plain sum of them would do.

Everything here is about the numbers in the files. What a merge looks like in pictures is not known from them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ..algebra.delta import Delta, gram
from ..algebra.least_squares import cosines
from ..algebra.overlap import LEADING, THIN, Overlap, Side, directions, is_thin, overlap
from ..errors import ZitMergeError, counted
from ..formats.reader import LoraFile, TensorReader
from ..model.zimage import MODULES
from ..report.text.table import value_table
from ..wording import middle, row, shorten, span
from .advice import advice, cosine_text, loras_text, two_digits

Watched = Callable[[Collection[str]], Iterable[str]]
TAU = 0.5  # default of shared_once
_PAIR_TABLES = 3  # LoRAs up to which every pair has a table of its own
_COLUMNS = 11  # of the table of pairs, in 80 columns
_APART = 0.05  # cosines of components that differ by more are named
_RARE = 0.1  # common directions of a module on average, below which they have no table
_SENTENCE = 500


class Readers(ExitStack):
    """Several LoRA files that are read module by module."""

    def __init__(self, loras: Sequence[LoraFile]):
        super().__init__()
        self._loras, self._tensors = loras, [self.enter_context(TensorReader(lora)) for lora in loras]

    def deltas(self, module: str) -> dict[int, Delta]:
        """Position of a file -> its change of the module, alpha / rank folded in as far as it is known."""
        found = {}
        for i, lora in enumerate(self._loras):
            if module in lora:
                scale, delta = self._tensors[i].delta(module)
                found[i] = delta.times(scale)
        return found

    def products(self, module: str, deltas: Mapping[int, Delta]) -> Tensor:
        """Their inner products.

        Raises:
            ZitMergeError: One is too large for a number.
        """
        found = gram(list(deltas.values()))
        for i, energy in zip(deltas, found.diagonal().tolist(), strict=True):
            if not math.isfinite(energy):
                raise ZitMergeError(
                    f"{self._loras[i].path}: {module}: the norm of its change is too large for a number, the LoRA is broken: "
                    "use an earlier checkpoint of it"
                )
        return found


def same_model(loras: Sequence[LoraFile]) -> list[str]:
    """The modules that any of the files changes, in the model's order.

    Raises:
        ZitMergeError: Two files change a module as matrices of different shapes.
    """
    shapes: dict[str, tuple[tuple[int, int], LoraFile]] = {}
    for lora in loras:
        for module, (out, into) in lora.shapes.items():
            (known_out, known_in), first = shapes.setdefault(module, ((out, into), lora))
            if (known_out, known_in) != (out, into):
                raise ZitMergeError(
                    f"{first.path} changes {module} as a {known_out} x {known_in} matrix and {lora.path} as {out} x {into}: "
                    "they are of two models and have nothing to compare"
                )
    return [module for module in MODULES if module in shapes]


def outline(lora: LoraFile) -> dict[str, Any]:
    """The keys of a file that both reports begin with."""
    return {
        "file": lora.path.name,
        "modules": len(lora),
        "algorithms": lora.algorithms,
        "ranks": span(lora.ranks.values()),
        "questions": list(lora.questions),
        "unmatched": len(lora.unmatched),
    }


def compare(loras: Sequence[LoraFile], watched: Watched = iter) -> dict[str, Any]:
    """Everything `inspect` knows of two or more files together, ready for JSON: the keys are these, always all of them.

    Files are meant by their position, from 0. Deltas have their alpha folded in. A direction is a singular vector of a change: a
    column for what it writes, a row for what it reads. It is common when at least about half of the other LoRAs that change the
    module hold it too, and when random LoRAs of these ranks would not (see `algebra.overlap`).

    Args:
        loras: Two or more files.
        watched: Passes the modules on one by one, such as a progress bar.

    Returns:
        files: For each {file, modules, algorithms, ranks, questions, unmatched, norm}: the name without its folder, how many
            modules it changes, algorithm -> how many modules, lowest and highest rank as text, what it leaves open (it is
            compared by what is known), how many keys no rule explains, Frobenius norm of the whole change.
        cosines: N lists of N: cosines of the whole files.
        modules: Module -> {files, norms, cosines, directions}: which files change it, and of these, in that order, the norms and
            the cosines as above. `directions` is null where fewer than two of them are not zero, else {columns, rows, energy}:
            `columns` and `rows` are {of, values, shared, common, chance, told}: how many directions all have together, by
            how many LoRAs each of these is held (the eigenvalues of the sum of the projections, the largest first), k -> how many
            of them about k LoRAs hold, k from 2, how many are common, how many LoRAs a direction is held by through chance alone,
            whether anything can be told beside chance. `energy` is {columns, rows, both}, for each file the share of its
            squared norm in common columns, in common rows, between both.
        sum: {norm, unrelated, strongest}: norm of the plain sum at a ratio of 1 each, the root of the sum of the squared
            norms, which it would have if they were unrelated, and the norm of the strongest file.
        shared: {columns, rows, energy}: means over the modules that several files change: k -> directions that about k LoRAs
            hold, and for each file the share of the energy of its whole change in common directions, {columns, rows, both}.
        leading: Modules with a change of so high a rank that only its 128 leading directions were looked at.
        advice: [{kind, text}]: what it means for a merge. `kind` is one of empty, apart, same, alike, related, opposed,
            unrelated, common, unequal; the text is for people, its wording may change.

    Raises:
        ZitMergeError: The files are not of one model, or can't be read.
    """
    modules, count = same_model(loras), len(loras)
    total, energy = (torch.zeros(count, n, dtype=torch.float64) for n in (count, 3))
    found: dict[str, dict[str, Any]] = {}
    leading: list[str] = []
    with Readers(loras) as readers:
        for module in watched(modules):
            deltas = readers.deltas(module)
            here, inner = list(deltas), readers.products(module, deltas)
            total[torch.tensor(here)[:, None], torch.tensor(here)] += inner
            found[module] = {"files": here, "norms": inner.diagonal().sqrt().tolist(), "cosines": cosines(inner).tolist()}
            shared = overlap([directions(d) for d in deltas.values()], TAU) if (inner.diagonal() > 0).sum() > 1 else None
            found[module]["directions"] = shared and _directions(shared)
            if shared:
                energy[here] += shared.energy[:, 1:]
            if shared and not all(is_thin(d) for d in deltas.values()):
                leading.append(module)
    norms = total.diagonal().sqrt()
    facts = {
        "files": [outline(lora) | {"norm": n} for lora, n in zip(loras, norms.tolist(), strict=True)],
        "cosines": cosines(total).tolist(),
        "modules": found,
        "sum": {"norm": _root(total.sum()), "unrelated": float(norms.norm()), "strongest": float(norms.max())},
        "shared": _shared(found, energy, total.diagonal()),
        "leading": leading,
    }
    return facts | {"advice": [{"kind": kind, "text": text} for kind, text in advice(facts)]}


def _root(energy: Tensor) -> float:
    """Of a sum that rounding may have left below zero."""
    return max(float(energy), 0.0) ** 0.5


def _directions(found: Overlap) -> dict[str, Any]:
    whole = found.energy[:, :1]
    shares = torch.where(whole > 0, found.energy[:, 1:] / whole, 0.0).T.tolist()
    return {
        "columns": _side(found.columns),
        "rows": _side(found.rows),
        "energy": dict(zip(("columns", "rows", "both"), shares, strict=True)),
    }


def _side(side: Side) -> dict[str, Any]:
    shared: dict[str, int] = defaultdict(int)
    for value in side.values.tolist():
        if value > side.bar and round(value) > 1:
            shared[str(round(value))] += 1
    values = [round(value, 4) for value in side.values.tolist() if value > 1e-9]
    found = {"of": len(values), "values": values, "shared": shared}
    return found | {"common": side.common, "chance": side.chance, "told": math.isfinite(side.bar)}


def _shared(modules: Mapping[str, Mapping[str, Any]], energy: Tensor, whole: Tensor) -> dict[str, Any]:
    """Means over the modules that several files change."""
    several = [facts["directions"] for facts in modules.values() if facts["directions"]]

    def means(side: str) -> dict[str, float]:
        sums: dict[str, int] = defaultdict(int)
        for facts in several:
            for k, n in facts[side]["shared"].items():
                sums[k] += n
        return {k: sums[k] / len(several) for k in sorted(sums, key=int)}

    shares = torch.where(whole[:, None] > 0, energy / whole[:, None], 0.0).T.tolist()
    return {
        "columns": means("columns"),
        "rows": means("rows"),
        "energy": dict(zip(("columns", "rows", "both"), shares, strict=True)),
    }


def compare_text(facts: Mapping[str, Any]) -> str:
    """`compare` for people: 80 columns at most, ASCII."""
    files, count = facts["files"], len(facts["files"])
    lines = [line for i, f in enumerate(files) for line in file_lines(f"LoRA {i + 1}", f)]
    lines += ["", *row("plain sum", _sum_line(facts))]
    several = [f["directions"] for f in facts["modules"].values() if f["directions"]]
    if several:
        lines += row("together in", f"{len(several)} of {len(facts['modules'])} modules")
        for side, title in (("columns", "columns"), ("rows", "rows")):
            lines += row(f"shared {title}" if side == "rows" else "shared cols", _shared_line(facts, several, side))
    if facts["leading"]:
        lines += row("noted", leading_line(facts["leading"]))
    lines.append("")
    for i, found in enumerate(facts["advice"]):
        lines += row("" if i else "advice", f"- {shorten(found['text'], 2 * _SENTENCE)}")
    pairs = [(i, j) for i, j in combinations(range(count), 2)]
    if count > _PAIR_TABLES:
        lines += ["", "cosine of the whole files", *_matrix(facts["cosines"])]
        pairs = sorted(pairs, key=lambda p: -facts["cosines"][p[0]][p[1]])[:1]
        lines += ["", "layer by layer the two that are most alike:"]
    for i, j in pairs:
        lines += _pair_lines(facts, i, j)
    if places := _common_places(facts):
        lines += ["", "common directions of each module, columns/rows", *value_table(places)]
    return "\n".join(lines)


def file_lines(label: str, file: Mapping[str, Any]) -> list[str]:
    """A file's name, size and strength, and what it leaves open."""
    kinds = " and ".join(file["algorithms"])
    at_most = " at most" if set(file["algorithms"]) - {"LoRA"} else ""
    lines = row(label, middle(file["file"]))
    lines += row("", f"{counted(file['modules'], 'module')}, {kinds} of rank {file['ranks']}{at_most}, norm {file['norm']:.4g}")
    for question in file["questions"]:
        lines += row("", f"- compared by what is known, it leaves open: {shorten(question, _SENTENCE)}")
    if file["unmatched"]:
        lines += row("", f"- {counted(file['unmatched'], 'key')} that no rule explains left out")
    return lines


def leading_line(modules: Sequence[str]) -> str:
    """What was not looked at."""
    return (
        f"in {counted(len(modules), 'module')} (e.g. {modules[0]}) a change has a rank above {THIN}: only its {LEADING} leading "
        "directions were looked at"
    )


def _sum_line(facts: Mapping[str, Any]) -> str:
    norm, unrelated, strongest = (facts["sum"][key] for key in ("norm", "unrelated", "strongest"))
    if not strongest:
        return "nothing, all of them are zero"
    who = max(range(len(facts["files"])), key=lambda i: facts["files"][i]["norm"])
    return (
        f"at a ratio of 1 each {norm / strongest:.2f} times as strong as the strongest one, {loras_text([who])} (norm "
        f"{norm:.4g}); unrelated ones of these norms would make {unrelated / strongest:.2f} times"
    )


def _shared_line(facts: Mapping[str, Any], several: Sequence[Mapping[str, Any]], side: str) -> str:
    of = sum(d[side]["of"] for d in several) / len(several)
    shared = [f"{n:.1f} held by {k}" for k, n in facts["shared"][side].items() if n >= 0.05]
    text = f"of {of:.0f} directions of a module, on average: " + (", ".join(shared) if shared else "none held by several")
    if blind := sum(not d[side]["told"] for d in several):
        text += f"; nothing can be told in {counted(blind, 'module')}, where they fill the whole side"
    return text


def _pair_lines(facts: Mapping[str, Any], i: int, j: int) -> Iterator[str]:
    """Layers x components of one pair, and where it is most alike."""
    both = {m: f for m, f in facts["modules"].items() if i in f["files"] and j in f["files"]}
    if not both:
        yield from ("", f"cosine of LoRA {i + 1} and {j + 1}: no module is changed by both")
        return
    values = {}
    products_: dict[str, list[Sequence[float]]] = defaultdict(list)
    for module, f in both.items():
        at, to = f["files"].index(i), f["files"].index(j)
        cosine, length, other = f["cosines"][at][to], f["norms"][at], f["norms"][to]
        values[module] = two_digits(cosine)
        products_[_place(module)].append((cosine * length * other, length**2, other**2))
    whole = facts["cosines"][i][j]
    yield from ("", f"cosine of LoRA {i + 1} and {j + 1}, per layer and component (whole file: {cosine_text(whole)})")
    yield from value_table(values)
    parts = {name: _cosine([sum(column) for column in zip(*rows, strict=True)]) for name, rows in products_.items()}
    top = max(parts, key=parts.__getitem__)
    low = min(parts, key=parts.__getitem__)
    if parts[top] - parts[low] > _APART:
        yield f"most alike in {top} ({cosine_text(parts[top])}), least in {low} ({cosine_text(parts[low])})"


def _place(module: str) -> str:
    return MODULES[module].component if MODULES[module].section != "other" else "the other modules"


def _cosine(sums: Sequence[float]) -> float:
    product, first, second = sums
    length = (first * second) ** 0.5
    return product / length if length else 0.0


def _common_places(facts: Mapping[str, Any]) -> dict[str, str]:
    """Module -> how many `columns/rows` are common; none where there are hardly any."""
    found = {m: f["directions"] for m, f in facts["modules"].items() if f["directions"]}
    counts = {m: (d["columns"]["common"], d["rows"]["common"]) for m, d in found.items()}
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
