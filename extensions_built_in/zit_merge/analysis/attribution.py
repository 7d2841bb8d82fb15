"""What `inspect OUT --sources A B` tells: how strong each source is in a file of any tool, and what else is in it.

The plain answer is the least-squares strength of each source in the file. It is low where a part of the sum was cut off or where
factors were added in place of products, so three more questions are asked of the numbers, each with an exact answer where it
applies: is the file a truncated sum, do the strengths differ from module to module, are its factors sums of the sources' factors?
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..algebra.delta import Delta, Kron
from ..algebra.factors import Factors
from ..algebra.least_squares import cosines, groups, least_squares
from ..algebra.overlap import directions, factor_products, inside, is_thin, projected
from ..errors import counted
from ..formats.metadata import read_recipe
from ..formats.reader import LoraFile
from ..report.text.table import value_table
from ..wording import listed, percent, row, shorten, some
from .advice import cosine_text, two_digits
from .compare import Readers, Watched, file_lines, outline, same_model

ROUNDING = 0.01  # |rest| / |file| that bfloat16 explains; two to three times what it leaves (measured)
INSIDE = 0.99  # share of a file's energy in the spaces of its sources from which on nothing else need be in it
_DATA = 10  # numbers for each unknown before strengths that fit a module say something
_SENTENCE = 1000

Strengths = tuple["float | None", ...]


@dataclass
class Fit:
    """Least squares of a file in its sources, summed over modules.

    Attributes:
        count: How many sources.
        strengths: Module -> strength of each source there alone; None for one that does not change the module.
        untold: Module -> sources whose strengths can't be told from each other there.
    """

    count: int
    strengths: dict[str, Strengths] = field(default_factory=dict)
    untold: dict[str, list[int]] = field(default_factory=dict)
    gram: Tensor = field(init=False)
    _products: Tensor = field(init=False)
    energy: float = 0.0
    _own: float = 0.0
    _data: float = torch.inf

    def __post_init__(self) -> None:
        self.gram = torch.zeros(self.count, self.count, dtype=torch.float64)
        self._products = torch.zeros(self.count, dtype=torch.float64)

    def add(self, module: str, here: Sequence[int], found: Tensor, data: int) -> None:
        """Adds a module.

        Args:
            module: Its name.
            here: The sources that change it.
            found: (n + 1, n + 1): inner products of their changes there, the file's own change last.
            data: How many numbers are fitted.
        """
        at = torch.tensor(here)
        gram, products = found[:-1, :-1], found[:-1, -1]
        own = least_squares(gram, products)
        self.gram[at[:, None], at] += gram
        self._products[at] += products
        self.energy += float(found[-1, -1])
        self._own += _explained(own, products)
        if data:  # a module without any change decides nothing
            self._data = min(self._data, data / len(here))
        strengths = dict(zip(here, own, strict=True))
        self.strengths[module] = tuple(strengths.get(i) for i in range(self.count))
        if untold := [here[i] for group in groups(gram) for i in group]:
            self.untold[module] = untold

    @property
    def whole(self) -> Strengths:
        """Strength of each source over all modules."""
        return least_squares(self.gram, self._products)

    @property
    def rest(self) -> float:
        """|file - sources at one strength each| / |file|."""
        return self._rest(_explained(self.whole, self._products))

    @property
    def rest_by_module(self) -> float:
        """The same with strengths of its own for each module."""
        return self._rest(self._own)

    @property
    def is_decided(self) -> bool:
        """Whether there were enough numbers in each module for strengths of its own to mean something."""
        return self._data >= _DATA

    def _rest(self, explained: float) -> float:
        return max(1 - explained / self.energy, 0.0) ** 0.5 if self.energy else 0.0


def _explained(strengths: Strengths, products: Tensor) -> float:
    return sum(x * h for x, h in zip(strengths, products.tolist(), strict=True) if x is not None)


@dataclass
class _Evidence:
    """What one pass over the modules finds.

    Attributes:
        plain: The file in its sources.
        cut: The same within the file's own columns and rows; None where its rank is too high for that.
        factors: Its up in those of the sources, its down in theirs; None where the ranks do not fit that.
        energies: Module -> squared norm of the file's change.
        owned: Squared norm of each source.
        is_cut: The file is of a lower rank than its sources together.
    """

    plain: Fit
    cut: Fit | None
    factors: tuple[Fit, Fit] | None
    energies: dict[str, float]
    owned: Tensor
    is_cut: bool = False

    def add(self, module: str, deltas: Mapping[int, Delta], gram: Tensor) -> None:
        """Adds a module; the file is 0 among its deltas, source i is i + 1."""
        here = [i - 1 for i in deltas if i]
        for i, energy in zip(deltas, gram.diagonal().tolist(), strict=True):
            if i:
                self.owned[i - 1] += energy
            else:
                self.energies[module] = energy
        if 0 not in deltas or not here:
            return
        file, *others = deltas.values()
        self.plain.add(module, here, gram.roll((-1, -1), (0, 1)), file.shape[0] * file.shape[1])
        if not is_thin(file):
            self.cut = None
        if self.cut:
            x = directions(file)
            self.is_cut |= len(x.sigma) < min(sum(d.rank for d in others), *file.shape)
            cores = torch.cat([projected(x, others), x.sigma.diag()[None]]).flatten(1)
            self.cut.add(module, here, cores @ cores.T, len(x.sigma) ** 2)
        pairs = [_two_factors(d) for d in (*others, file)]
        if not _may_add_up(pairs):
            self.factors = None
        for side, fit in enumerate(self.factors or ()):
            factors = [pair[side] for pair in pairs]
            fit.add(module, here, factor_products(factors), factors[-1].numel())


def _two_factors(x: Delta) -> tuple[Tensor, Tensor] | None:
    """What a tool that adds key by key adds: up and down, or the two matrices of a LoKr."""
    if isinstance(x, Factors):
        return x.up, x.down.T
    return tuple(f.up @ f.down for f in x) if isinstance(x, Kron) else None


def _may_add_up(pairs: Sequence[tuple[Tensor, Tensor] | None]) -> bool:
    """Whether the last one may be the sum of the others, zeros appended to the shorter ones."""
    if not all(pairs):
        return False
    heights = {tuple(t.shape[0] for t in pair) for pair in pairs}
    return len(heights) == 1 and all(pairs[-1][i].shape[1] == max(p[i].shape[1] for p in pairs[:-1]) for i in (0, 1))


def trace(lora: LoraFile, sources: Sequence[LoraFile], watched: Watched = iter) -> dict[str, Any]:
    """Everything that can be told of the sources in a file, ready for JSON: the keys are these, always all of them.

    Sources are meant by their position, from 0. A strength is what a source's change, its alpha folded in, is multiplied with. A
    rest is |file - what explains it| / |file| in the modules that the file and a source change.

    Args:
        lora: The file, of any tool.
        sources: What may have gone into it.
        watched: Passes the modules on one by one, such as a progress bar.

    Returns:
        file: {file, modules, algorithms, ranks, questions, unmatched, norm}, as `overlap.compare` has them.
        sources: The same for each source.
        kind: What the file is, as far as the numbers tell: `nothing`, `strengths`, `factors`, `truncated`, `by module`,
            `truncated by module`, `cross terms` or `something else`.
        verdict: Sentences: the same for people, and what else is to be said; their wording may change.
        strengths: The least-squares strength of each source over the modules of the file; null for one without any change there.
        rest: What those strengths leave.
        explained: Share of the whole file's energy (squared norm) that they explain.
        modules: Module -> strength of each source in this module alone; null where it does not change the module or can't be
            told from another one. Before the cut, where `kind` begins with `truncated`.
        untold: Module -> the sources that can't be told apart there.
        rest_by_module: What strengths of its own for each module leave.
        cosines: N lists of N: cosines of the sources in the file's modules.
        alike: Groups of sources that are too alike, or one too nearly the sum of others, to be told apart.
        before_cut: {strengths, rest, rest_by_module, kept}: the strengths in the sum before it was truncated, with a rest near 0
            if it was, and the share of that sum's energy that the file kept. Null where the file has the rank of its sources
            together, or a rank above 512.
        factors: {up, down, rest}: with which strength each source's up (alpha included) and down went into the file's, with a
            rest near 0 if the tool added factors. Null where the ranks do not fit that.
        inside: Share of the file's energy within the columns and rows of its sources; null where `kind` was settled without it
            or a rank is above 512.
        unknown: Modules of the file that no source changes.
        unknown_energy: Share of the file's energy in these.
        missing: Modules that a source changes and the file does not.
        recipe: Whether the file has a recipe of zit_merge.

    Raises:
        ZitMergeError: The files are not of one model, or can't be read.
    """
    modules, count = same_model([lora, *sources]), len(sources)
    zeros = torch.zeros(count, dtype=torch.float64)
    found = _Evidence(Fit(count), Fit(count), (Fit(count), Fit(count)), {}, zeros)
    with Readers([lora, *sources]) as readers:
        for module in watched(modules):
            deltas = readers.deltas(module)
            found.add(module, deltas, readers.products(module, deltas))
    plain, energy = found.plain, sum(found.energies.values())
    facts = {
        "file": outline(lora) | {"norm": energy**0.5},
        "sources": [outline(s) | {"norm": n} for s, n in zip(sources, found.owned.sqrt().tolist(), strict=True)],
        "kind": "",
        "verdict": [],
        "strengths": list(plain.whole),
        "rest": plain.rest,
        "explained": (1 - plain.rest**2) * plain.energy / energy if energy else 0.0,
        "modules": {},
        "untold": {},
        "rest_by_module": plain.rest_by_module,
        "cosines": cosines(plain.gram).tolist(),
        "alike": groups(plain.gram),
        "before_cut": _before_cut(plain, found.cut) if found.cut and found.is_cut else None,
        "factors": _factors(*found.factors) if found.factors and plain.strengths else None,
        "inside": None,
        "unknown": [m for m in found.energies if m not in plain.strengths],
        "unknown_energy": sum(e for m, e in found.energies.items() if m not in plain.strengths) / energy if energy else 0.0,
        "missing": [m for m in modules if m not in lora],
        "recipe": read_recipe(lora.metadata) is not None,
    }
    facts["kind"] = _kind(facts, _rounding(lora), found)
    if facts["kind"] == "something else":
        facts["inside"] = _inside(lora, sources, watched([m for m in modules if m in plain.strengths]), plain.energy)
        if (facts["inside"] or 0) >= INSIDE:
            facts["kind"] = "cross terms"
    fit = found.cut if facts["kind"].startswith("truncated") else plain
    untold = fit.untold
    facts["modules"] = {
        m: [None if i in untold.get(m, ()) else x for i, x in enumerate(strengths)] for m, strengths in fit.strengths.items()
    }
    return facts | {"untold": untold, "verdict": [*_verdict(facts, _rounding(lora))]}


def _rounding(lora: LoraFile) -> float:
    """What the rounding of the file's own numbers may leave."""
    return max(ROUNDING, *(torch.finfo(c.dtype).eps for changes in lora.changes.values() for c in changes))


def _before_cut(plain: Fit, cut: Fit) -> dict[str, Any]:
    strengths = cut.whole
    x = torch.tensor([s or 0.0 for s in strengths], dtype=torch.float64)
    whole = float(x @ plain.gram @ x)
    return {
        "strengths": list(strengths),
        "rest": cut.rest,
        "rest_by_module": cut.rest_by_module,
        "kept": min(plain.energy / whole, 1.0) if whole > 0 else 0.0,
    }


def _factors(ups: Fit, downs: Fit) -> dict[str, Any]:
    return {"up": list(ups.whole), "down": list(downs.whole), "rest": max(ups.rest_by_module, downs.rest_by_module)}


def _inside(lora: LoraFile, sources: Sequence[LoraFile], modules: Iterable[str], energy: float) -> float | None:
    """Share of the file's energy within the columns and rows of its sources."""
    within = 0.0
    with Readers([lora, *sources]) as readers:
        for module in modules:
            parts = list(readers.deltas(module).values())
            if not all(map(is_thin, parts)):
                return None
            file, *others = map(directions, parts)
            within += inside(file, others)
    return within / energy


def _kind(facts: Mapping[str, Any], rounding: float, found: _Evidence) -> str:
    cut, factors = facts["before_cut"], facts["factors"]
    if not found.plain.energy:
        return "nothing"
    if facts["rest"] <= rounding:
        return "strengths"
    if factors and factors["rest"] <= rounding:  # before truncation, which added factors of flat spectra look like too
        return "factors"
    if cut and cut["rest"] <= rounding and groups(found.cut.gram) == facts["alike"]:
        return "truncated"
    if facts["rest_by_module"] <= rounding:
        return "by module"
    if cut and found.cut.is_decided and cut["rest_by_module"] <= rounding:
        return "truncated by module"
    return "something else"


def _verdict(facts: Mapping[str, Any], rounding: float) -> Iterator[str]:
    factors, strengths = facts["factors"], _amounts(facts["strengths"])
    yield from _of_kind(facts, strengths)
    if facts["kind"] in ("strengths", "factors") and factors and factors["rest"] <= rounding and _is_squared(factors):
        yield (
            f"its up is {_amounts(factors['up'])} and so is its down, as a tool leaves it that was asked for that and applied it "
            f"to both: {strengths} came out"
        )
    elif facts["kind"] == "factors":
        yield f"its up is {_amounts(factors['up'])}, its down {_amounts(factors['down'])}"
    yield from _of_alike(facts)
    if unknown := facts["unknown"]:
        yield f"in none of the sources: {some(unknown)}, {percent(facts['unknown_energy'])} of the energy of the file"
    if missing := facts["missing"]:
        yield f"in the sources but not in the file: {some(missing)}, what they do there is lost"
    if facts["recipe"]:
        yield "zit_merge wrote the file: `recipe FILE` prints what was asked for"


def _of_kind(facts: Mapping[str, Any], strengths: str) -> Iterator[str]:
    kind, cut = facts["kind"], facts["before_cut"]
    explained = f"{percent(1 - facts['rest'] ** 2)} of its energy is explained by {strengths}"
    if kind == "nothing":
        yield "the file changes nothing in the modules of the sources"
    elif kind == "strengths":
        yield f"the file is {strengths}: rounding explains the rest ({percent(facts['rest'])})"
    elif kind == "truncated":
        yield (
            f"the file is {_amounts(cut['strengths'])}, truncated to rank {facts['file']['ranks']}, which kept "
            f"{percent(cut['kept'])} of that sum's energy; a plain fit of what is left finds {strengths}"
        )
    elif kind == "by module":
        yield (
            "each module of the file is a weighted sum of the sources with strengths of its own, as block and layer weights "
            f"make them (tables below): rounding explains the rest ({percent(facts['rest_by_module'])}); over the whole file "
            f"{explained}"
        )
    elif kind == "truncated by module":
        yield (
            "each module of the file is a weighted sum of the sources with strengths of its own (tables below), truncated to "
            f"rank {facts['file']['ranks']}; over the whole file {explained}"
        )
    elif kind == "factors":
        yield (
            f"{explained}; the rest is cross terms: factors were added, not products, so that the up of each source meets "
            "the down of the others"
        )
    elif kind == "cross terms":
        yield (
            f"{explained}; the rest lies in the directions of the sources: cross terms, as adding factors in place of products "
            "makes them, or another method than a sum" + _may_be_cut(facts)
        )
    else:
        outside = facts["inside"] is not None and percent(1 - facts["inside"])
        where = f"{outside} of it lies outside of the directions of the sources" if outside else "the rest is something else"
        yield f"{explained}; {where}: other LoRAs, further training, or another method than a sum" + _may_be_cut(facts)


def _may_be_cut(facts: Mapping[str, Any]) -> str:
    return "; a part of the sum may have been cut by truncation" if facts["before_cut"] else ""


def _is_squared(factors: Mapping[str, Any]) -> bool:
    """Whether both sides have the same strengths, and not all of them 0 or 1."""
    pairs = [(u, d) for u, d in zip(factors["up"], factors["down"], strict=True) if u is not None and d is not None]
    size = max((abs(u) for u, _ in pairs), default=0.0)
    is_telling = any(abs(u) > 0.05 * size and abs(u - 1) > 0.01 for u, _ in pairs)
    return is_telling and all(abs(u - d) <= 0.01 * size for u, d in pairs)


def _of_alike(facts: Mapping[str, Any]) -> Iterator[str]:
    for group in facts["alike"]:
        names = f"sources {listed([str(i + 1) for i in group])}"
        pairs = [abs(facts["cosines"][i][j]) for i in group for j in group if i < j]
        if min(pairs) < 0.99:
            yield f"{names} can't be told apart, one of them is nearly a sum of the others: their strengths here are one of many"
            continue
        first = group[0]
        total = sum(facts["strengths"][i] * facts["cosines"][i][first] * facts["sources"][i]["norm"] for i in group) / (
            facts["sources"][first]["norm"] or 1
        )
        yield (
            f"{names} are too alike (cosine {cosine_text(min(pairs))}) for one strength to be told from another: only what they "
            f"add up to can be, {_number(total)} of source {first + 1}"
        )


def _amounts(strengths: Sequence[float | None]) -> str:
    """`0.25 of source 1 and 0.25 of source 2`; those that are as good as 0 are left out, unless all are."""
    known = [(i, x) for i, x in enumerate(strengths) if x is not None]
    named = [(i, x) for i, x in known if abs(x) >= 0.005] or known
    return listed([f"{_number(x)} of source {i + 1}" for i, x in named]) or "nothing"


def _number(value: float) -> str:
    """Three digits after the point, or two."""
    text = f"{value:.3f}".removesuffix("0") if abs(value) < 1000 else f"{value:.3g}"
    return "0.00" if text == "-0.00" else text


def trace_text(facts: Mapping[str, Any]) -> str:
    """`trace` for people: 80 columns at most, ASCII."""
    lines = file_lines("file", facts["file"])
    for i, source in enumerate(facts["sources"]):
        lines += file_lines(f"source {i + 1}", source)
        strength = facts["strengths"][i]
        many = ", one of many that fit" if any(i in group for group in facts["alike"]) else ""
        lines += row("", "strength " + ("none, it changes nothing there" if strength is None else _number(strength) + many))
    lines.append("")
    for i, sentence in enumerate(facts["verdict"]):
        lines += row("" if i else "verdict", f"- {shorten(sentence, _SENTENCE)}")
    for i in range(len(facts["sources"])):
        lines += _strength_lines(facts, i)
    return "\n".join(lines)


def _strength_lines(facts: Mapping[str, Any], i: int) -> Iterator[str]:
    """Layers x components of one source, or one line where they are equal."""
    known = {m: two_digits(x[i]) for m, x in facts["modules"].items() if x[i] is not None}
    values = known | {m: "?" for m, who in facts["untold"].items() if i in who}
    before = " before the cut" if facts["kind"].startswith("truncated") else ""
    title = f"strength of source {i + 1} in each module{before}"
    if len(set(values.values())) == 1:
        value, number = next(iter(values.values())), counted(len(values), "module")
        yield from ("", f"{title}: {'not to be told' if value == '?' else value} in all {number}")
    elif values:
        yield from ("", title, *value_table({m: v if len(v) <= 6 else f"{float(v):.0e}" for m, v in values.items()}))
        if "?" in values.values():
            yield "?: too alike another source to be told"
