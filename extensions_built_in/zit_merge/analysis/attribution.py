"""What is known of the sources in a file, and what that says in sentences.

Sources are meant by their position, from 0. A strength is what a source's change, its alpha folded in, is multiplied with. A rest
is |file - what explains it| / |file| in the modules that the file and a source change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..wording import listed, percent, some
from .advice import cosine_text


@dataclass(frozen=True)
class BeforeCut:
    """A sum, as it was before it was truncated.

    Attributes:
        strengths: Of each source in it.
        rest: What they leave of the file between the projectors on its own columns and rows; near 0 if it was truncated.
        rest_by_module: The same with strengths of its own for each module.
        kept: Share of the sum's energy that the file kept.
    """

    strengths: Sequence[float | None]
    rest: float
    rest_by_module: float
    kept: float


@dataclass(frozen=True)
class AddedFactors:
    """With which strength the sources' factors went into the file's.

    Attributes:
        up: Of each source's up, alpha included.
        down: Of each source's down.
        rest: Near 0 if the tool added factors.
    """

    up: Sequence[float | None]
    down: Sequence[float | None]
    rest: float


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """A file and its sources. The attributes are the keys of the JSON, always all of them.

    Attributes:
        file: The file, as `measure.outline` has it.
        sources: The same for each source.
        kind: What the file is, as far as the numbers tell: `nothing`, `strengths`, `factors`, `truncated`, `by module`,
            `truncated by module`, `cross terms` or `something else`.
        verdict: Sentences: the same for people, and further findings; their wording may change.
        strengths: The least-squares strength of each source over the modules of the file; None for one without any change there.
        rest: What those strengths leave.
        explained: Share of the whole file's energy (squared norm) that they explain.
        modules: Module -> strength of each source in this module alone; None where it does not change the module or can't be
            told from another one. Before the cut, where `kind` begins with `truncated`.
        untold: Module -> the sources that can't be told apart there.
        rest_by_module: What strengths of its own for each module leave.
        shared: Cosine of each source with the file, over all modules of both; None for one that is zero.
        chance: The root mean square of that cosine for changes of these sizes in random directions.
        cosines: N lists of N: cosines of the sources in the file's modules.
        alike: Groups of sources that are too alike, or one too nearly the sum of others, to be told apart.
        before_cut: None where the file has the rank of its sources together, or a rank above 512.
        factors: None where the ranks do not fit that.
        inside: Share of the file's energy within the columns and rows of its sources; None where `kind` was settled without it
            or a rank is above 512.
        unknown: Modules of the file that no source changes.
        unknown_energy: Share of the file's energy in these.
        missing: Modules that a source changes and the file does not.
        recipe: Whether the file has a recipe of zit_merge.
    """

    file: Mapping[str, Any]
    sources: Sequence[Mapping[str, Any]]
    kind: str
    verdict: Sequence[str] = ()
    strengths: Sequence[float | None]
    rest: float
    explained: float
    modules: Mapping[str, Sequence[float | None]]
    untold: Mapping[str, Sequence[int]]
    rest_by_module: float
    shared: Sequence[float | None]
    chance: Sequence[float | None]
    cosines: Sequence[Sequence[float]]
    alike: Sequence[Sequence[int]]
    before_cut: BeforeCut | None
    factors: AddedFactors | None
    inside: float | None
    unknown: Sequence[str]
    unknown_energy: float
    missing: Sequence[str]
    recipe: bool

    @property
    def is_truncated(self) -> bool:
        """Whether the file is a truncated sum."""
        return self.kind.startswith("truncated")

    def to_json(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def verdict(found: Attribution, rounding: float) -> Iterator[str]:
    """What the file is, and further findings.

    Args:
        found: The numbers.
        rounding: What the rounding of the file's own numbers may leave.
    """
    factors, strengths = found.factors, _amounts(found.strengths)
    yield from _of_kind(found, strengths)
    if factors and found.kind in ("strengths", "factors") and factors.rest <= rounding and _is_squared(factors):
        yield (
            f"the strength was applied twice: its up and its down are each {_amounts(factors.up)}, so the effective strength "
            f"is {strengths}"
        )
    elif factors and found.kind == "factors":
        yield f"its up is {_amounts(factors.up)}, its down {_amounts(factors.down)}"
    yield from _of_alike(found)
    if found.unknown:
        yield f"in none of the sources: {some(found.unknown)}, {percent(found.unknown_energy)} of the energy of the file"
    if found.missing:
        yield f"in the sources but not in the file: {some(found.missing)}, what they do there is lost"
    if found.recipe:
        yield "zit_merge wrote the file: `recipe FILE` prints what was asked for"


def _of_kind(found: Attribution, strengths: str) -> Iterator[str]:
    kind, cut = found.kind, found.before_cut
    explained = f"{percent(1 - found.rest**2)} of its energy is explained by {strengths}"
    if kind == "nothing":
        yield "the file changes nothing in the modules of the sources"
    elif kind == "strengths":
        yield f"the file is {strengths}: rounding explains the rest ({percent(found.rest)})"
    elif kind == "truncated":
        assert cut is not None, "only a file with a sum before the cut counts as truncated"
        yield (
            f"the file is {_amounts(cut.strengths)}, truncated to rank {found.file['ranks']}, which kept "
            f"{percent(cut.kept)} of that sum's energy; a plain fit of what is left finds {strengths}"
        )
    elif kind == "by module":
        yield (
            "each module of the file is a weighted sum of the sources with strengths of its own, as block and layer weights "
            f"make them (tables below): rounding explains the rest ({percent(found.rest_by_module)}); over the whole file "
            f"{explained}"
        )
    elif kind == "truncated by module":
        yield (
            "each module of the file is a weighted sum of the sources with strengths of its own (tables below), truncated to "
            f"rank {found.file['ranks']}; over the whole file {explained}"
        )
    elif kind == "factors":
        yield (
            f"{explained}; the rest is cross terms: factors were added, not products, so that the up of each source meets "
            "the down of the others"
        )
    elif kind == "cross terms":
        yield (
            f"{explained}; the rest lies in the directions of the sources: cross terms, as adding factors in place of products "
            "makes them, or another method than a sum" + _may_be_cut(found)
        )
    else:
        outside = found.inside is not None and percent(1 - found.inside)
        where = f"{outside} of it lies outside of the directions of the sources" if outside else "the rest is something else"
        yield f"{explained}; {where}: other LoRAs, further training, or another method than a sum" + _may_be_cut(found)


def _may_be_cut(found: Attribution) -> str:
    return "; a part of the sum may have been cut by truncation" if found.before_cut else ""


def _is_squared(factors: AddedFactors) -> bool:
    """Whether both sides have the same strengths, and not all of them 0 or 1."""
    pairs = [(u, d) for u, d in zip(factors.up, factors.down, strict=True) if u is not None and d is not None]
    size = max((abs(u) for u, _ in pairs), default=0.0)
    is_telling = any(abs(u) > 0.05 * size and abs(u - 1) > 0.01 for u, _ in pairs)
    return is_telling and all(abs(u - d) <= 0.01 * size for u, d in pairs)


def _of_alike(found: Attribution) -> Iterator[str]:
    norms = [source["norm"] for source in found.sources]
    for group in found.alike:
        names = f"sources {listed([str(i + 1) for i in group])}"
        pairs = [abs(found.cosines[i][j]) for i in group for j in group if i < j]
        if min(pairs) < 0.99:
            yield f"{names} can't be told apart, one of them is nearly a sum of the others: their strengths here are one of many"
            continue
        first = group[0]
        total = sum((found.strengths[i] or 0.0) * found.cosines[i][first] * norms[i] for i in group) / (norms[first] or 1)
        yield (
            f"{names} are too alike (cosine {cosine_text(min(pairs))}) for one strength to be told from another: only what they "
            f"add up to can be, {amount(total)} of source {first + 1}"
        )


def _amounts(strengths: Sequence[float | None]) -> str:
    """`0.25 of source 1 and 0.25 of source 2`; those that are as good as 0 are left out, unless all are."""
    known = [(i, x) for i, x in enumerate(strengths) if x is not None]
    named = [(i, x) for i, x in known if abs(x) >= 0.005] or known
    return listed([f"{amount(x)} of source {i + 1}" for i, x in named]) or "nothing"


def amount(value: float) -> str:
    """Of a strength: three digits after the point, or two."""
    text = f"{value:.3f}".removesuffix("0") if abs(value) < 1000 else f"{value:.3g}"
    return "0.00" if text == "-0.00" else text
