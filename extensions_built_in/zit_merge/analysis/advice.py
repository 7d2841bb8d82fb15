"""What the likeness of several LoRAs means for a merge, in sentences with their numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

from ..algebra.overlap import Overlap, Side
from ..errors import counted
from ..wording import listed

SAME, ALIKE, RELATED, OPPOSED = 0.999, 0.5, 0.1, -0.2  # cosines from which on, or down to which, pairs are called so
SHARED_ONE_SIDE, SHARED_BOTH = 0.05, 0.01  # shares of a LoRA's energy in common directions from which on they are worth a word
STRONGER = 2.0  # ratio of norms
GROWS = 1.1  # a sum this many times as strong as its strongest LoRA is worth a word
_PAIRS = 3  # named in a sentence


def advice(
    norms: Sequence[float],
    cosines: Sequence[Sequence[float]],
    sum_norm: float,
    common: Sequence[Overlap],
    energy: Mapping[str, Sequence[float]],
) -> Iterator[tuple[str, str]]:
    """(kind, sentence) of everything that the numbers say for a merge.

    Args:
        norms: Of N files.
        cosines: N lists of N.
        sum_norm: Norm of their sum.
        common: Of each module that several files change.
        energy: {columns, rows, both}: for each file the share of its energy in common directions.
    """
    alive = [i for i, n in enumerate(norms) if n > 0]
    if empty := [i for i, n in enumerate(norms) if n == 0]:
        verb, them = ("changes", "it") if len(empty) == 1 else ("change", "them")
        yield "empty", f"{loras_text(empty)} {verb} nothing, all zeros: leave {them} out"
    if len(alive) < 2:
        return
    if not common:
        yield (
            "apart",
            "no module is changed by more than one of them, so nothing can clash: method: sum keeps each as it is",
        )
        return
    pairs = {(i, j): cosines[i][j] for i, j in combinations(alive, 2)}
    yield from of_cosines(pairs, sum_norm / max(norms))
    if max(pairs.values()) <= ALIKE and min(pairs.values()) >= OPPOSED:
        yield from _of_directions(common, energy)
    weakest, strongest = min(alive, key=norms.__getitem__), max(alive, key=norms.__getitem__)
    if (times := norms[strongest] / norms[weakest]) > STRONGER:
        nuslerp = ", or method: nuslerp, which does not let it decide the direction" if len(alive) == 2 else ""
        yield (
            "unequal",
            f"{loras_text([strongest])} is {_times(times)} times as strong as {loras_text([weakest])} and outweighs it at equal "
            f"ratios; a ratio of {1 / times:.2g} for it makes them equally strong{nuslerp}",
        )


def of_cosines(pairs: Mapping[tuple[int, int], float], growth: float) -> Iterator[tuple[str, str]]:
    """(kind, sentence) of what the cosines say for a merge.

    Args:
        pairs: Two or more LoRAs, none of them zero: (i, j) -> cosine.
        growth: Norm of their sum, in norms of the strongest one.
    """
    count = len({i for pair in pairs for i in pair})
    ranked = sorted(pairs, key=pairs.__getitem__)
    same = [p for p in reversed(ranked) if pairs[p] > SAME]
    alike = [p for p in reversed(ranked) if ALIKE < pairs[p] <= SAME]
    related = [p for p in reversed(ranked) if RELATED < pairs[p] <= ALIKE]
    opposed = [p for p in ranked if pairs[p] < OPPOSED]
    against = [p for p in ranked if OPPOSED <= pairs[p] < -RELATED]
    mean = "slerp" if count == 2 else "karcher"
    if same:
        yield (
            "same",
            f"{_pairs(same, pairs)}: as good as the same change, a sum of two is that change at twice the strength: "
            "use one of them, or method: average",
        )
    if alike:
        yield (
            "alike",
            f"{_pairs(alike, pairs)}: alike, as saves of one training are; a sum counts what they share once "
            f"for each: method: average or {mean}, or for saves of one training a checkpoints step",
        )
    if opposed:
        yield (
            "opposed",
            f"{_pairs(opposed, pairs)}: opposed, a sum takes away from both: leave one out, or lower the ratio of the one that "
            "matters less",
        )
    if mixed := related + against:
        yield (
            "related",
            f"{_pairs(mixed, pairs)}: related in part; a sum makes that part stronger where the cosine is above 0 and weaker "
            f"where it is below: method: sum with smaller ratios, or {mean}",
        )
    rest = [v for v in pairs.values() if abs(v) <= RELATED]
    if rest and len(rest) < len(pairs):
        who = "the other pair is" if len(rest) == 1 else "all other pairs are"
        yield "unrelated", f"{who} unrelated (cosine {_range(rest)}): a sum adds these up as they are"
    elif rest:
        yield (
            "unrelated",
            f"they are unrelated (cosine {_range(rest)}): method: sum adds them up as they are; its norm grows with the root of "
            f"their number, here to {growth:.2f} times the strongest one" + _if_too_strong(growth),
        )


def _if_too_strong(growth: float) -> str:
    if growth <= GROWS:
        return ""
    return (
        f"; where pictures suffer, smaller ratios, about {1 / growth:.2f} (method: normalize takes that); compare ratios with a "
        "sweep before methods (docs/evidence.md)"
    )


def _of_directions(common: Sequence[Overlap], energy: Mapping[str, Sequence[float]]) -> Iterator[tuple[str, str]]:
    most = {side: max(shares) for side, shares in energy.items()}
    if most["both"] < SHARED_BOTH and max(most["columns"], most["rows"]) < SHARED_ONE_SIDE:
        return
    columns, rows = _on_average([c.columns for c in common]), _on_average([c.rows for c in common])
    found = (
        f"they have directions in common: on average {columns} columns and {rows} rows of a module, with "
        f"{_shares(energy['columns'])} of the energy of a LoRA in the columns, {_shares(energy['rows'])} in the rows and "
        f"{_shares(energy['both'])} in both"
    )
    if most["both"] >= SHARED_BOTH:
        yield "common", f"{found}; a sum adds up there: method: tsv, or shared_once (experimental), are worth a try"
    elif most["columns"] >= SHARED_ONE_SIDE:
        yield "common", f"{found}; on one side alone that need not be one effect twice: method: tsv is worth a try"
    else:
        yield (
            "common",
            f"{found}; in rows alone LoRAs meet whose trainings began with the same seed, whatever they show: no reason for "
            "another method than sum (docs/evidence.md)",
        )


def _on_average(sides: Sequence[Side]) -> str:
    """How many directions are common: `4.0 of 16`."""
    return f"{sum(s.common for s in sides) / len(sides):.1f} of {sum(s.of for s in sides) / len(sides):.0f}"


def loras_text(numbers: Sequence[int]) -> str:
    """`LoRA 1`, `LoRAs 1, 2 and 4`."""
    return f"LoRA{'s' * (len(numbers) > 1)} {listed([str(i + 1) for i in numbers])}"


def _pairs(pairs: Sequence[tuple[int, int]], values: Mapping[tuple[int, int], float]) -> str:
    """`LoRAs 1 and 2 (cosine 0.87), 1 and 3 (cosine 0.7) and 4 more pairs`."""
    named = [f"{i + 1} and {j + 1} (cosine {cosine_text(values[i, j])})" for i, j in pairs[:_PAIRS]]
    more = len(pairs) - len(named)
    return f"LoRAs {', '.join(named)}" + (f" and {counted(more, 'more pair')}" if more else "")


def _range(values: Sequence[float]) -> str:
    low, high = cosine_text(min(values)), cosine_text(max(values))
    return low if low == high else f"{low} to {high}"


def cosine_text(value: float) -> str:
    """Two digits, or four where two would say 1.00 of what is less."""
    text = two_digits(value)
    return f"{math.trunc(value * 1e4) / 1e4:.4f}" if text in ("1.00", "-1.00") and abs(value) < 1 - 5e-5 else text


def two_digits(value: float) -> str:
    """Without a minus before zero."""
    text = f"{value:.2f}"
    return text.removeprefix("-") if float(text) == 0 else text


def _percent(share: float) -> str:
    """Of an energy: `12 %`, `0.3 %`."""
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.1f} %"


def _shares(shares: Sequence[float]) -> str:
    """`12 %`, or `12 % to 15 %` where they differ."""
    low, high = _percent(min(shares)), _percent(max(shares))
    return low if low == high else f"{low} to {high}"


def _times(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.3g}"
