"""What the check of a file found, as data: numbers, and a status with its reasons.

`right`  the file holds what was asked for, as far as its rank and dtype can
`off`    an input came out much weaker or stronger than asked, or rounding took most of what the inputs leave of each other
`empty`  zeros were written

The thresholds are here, and nowhere else. Each reason is {kind, ...numbers}:

    rounding         error                    right: |written - wanted| / |wanted| is that of the dtype
    cut              kept                     right: the share of the energy that the rank holds
    capped           kept, asked, max         right: `max` allowed less than the energy that was asked for
    cancelling       error                    off: the inputs nearly cancel, rounding is a large part of what is left
    lost             inputs, shares, cut      off: got / asked is under LOST for these inputs, by truncation or by rounding
    stronger         inputs, shares, cut      off: got / asked is over STRONGER for these inputs
    survives         share                    right: what is left of the change in a whole model, <got, asked> / <asked, asked>
    rounded_away     share                    off: that is less than SURVIVES, or as much too large
    base_alone                                empty: nothing was asked for, a model is the base as it was
    cancelled                                 empty: the inputs cancel each other
    nothing_asked                             empty: every strength is 0, or every input is
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .metadata import CHECK_KEY, dumps, read_check

if TYPE_CHECKING:
    from torch import Tensor

RIGHT, OFF, EMPTY = "right", "off", "empty"
LARGE = 0.05  # an error of rounding that a person should hear of: usually 0.002 in bf16
LOST, STRONGER = 0.5, 1.5  # got / asked
SURVIVES = 0.9  # of the change that a model was to get: an end of the strength that a person would see
_CAPPED = 1.05  # missing energy over what was allowed: the former may be an estimate
PAIRS_UP_TO = 64  # inputs whose inner products are kept for each module: their number grows with the square
_MOST = 1e99  # of got / asked, where next to nothing was asked

Reason = Mapping[str, Any]
Strengths = tuple["float | None", ...]


@dataclass(frozen=True)
class Measured:
    """What was measured in one module.

    Attributes:
        inputs: The n inputs that count there, by their numbers.
        energies: (n,) squared Frobenius norms of their changes at strength 1, alpha / rank folded in.
        gram: (n, n) inner products of these; None for more than 64 inputs.
        written: Squared norm of what was written.
        error: |written - wanted| / |wanted|.
    """

    inputs: tuple[int, ...]
    energies: Tensor
    gram: Tensor | None
    written: float
    error: float


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes:
        error: |written - wanted| / |wanted| over the file; |written| where nothing was wanted.
        kept: Share of the wanted energy.
        asked: Least-squares strength of each input in what was wanted; None for one without any change.
        got: The same in what was written.
        cut: Whether a module was written with a lower rank than it has.
        alike: Groups of inputs, by their numbers, that are too alike for their strengths to be told apart.
        modules: What was measured in each module that an input changes; empty where the verdict was read from a file.
        status: `right`, `off` or `empty`.
        reasons: Why, see the top of the module.
    """

    error: float
    kept: float
    asked: Strengths
    got: Strengths
    cut: bool = False
    alike: Sequence[Sequence[int]] = ()
    modules: Mapping[str, Measured] = field(default_factory=dict)
    status: str = RIGHT
    reasons: tuple[Reason, ...] = ()

    @property
    def errors(self) -> dict[str, float]:
        """Module -> |written - wanted| / |wanted|."""
        return {module: measured.error for module, measured in self.modules.items()}

    @property
    def told(self) -> list[int]:
        """The inputs whose strengths can be told, by their numbers."""
        hidden = {n for group in self.alike for n in group}
        pairs = enumerate(zip(self.asked, self.got, strict=True))
        return [n for n, (asked, got) in pairs if asked and got is not None and n not in hidden]

    def share(self, n: int) -> float:
        """How much of an input's strength went in: got / asked, at most 1e99, as JSON has no infinity.

        Args:
            n: One of `told`.
        """
        asked, got = self.asked[n], self.got[n]
        assert asked is not None and got is not None, "an input in `told` has both"
        return max(-_MOST, min(got / asked, _MOST))

    def metadata(self) -> dict[str, str]:
        """For the file."""
        lists = {key: [None if v is None else _short(v) for v in getattr(self, key)] for key in ("asked", "got")}
        numbers = {"error": _short(self.error), "kept": _short(self.kept, 6), **lists, "cut": self.cut}
        status = {"status": self.status, "reasons": [_rounded(reason) for reason in self.reasons]}
        return {CHECK_KEY: dumps(numbers | status)}

    @classmethod
    def read(cls, metadata: Mapping[str, str]) -> Verdict | None:
        """What the metadata of a file say; None where they say nothing. An older file's status follows from its numbers."""
        found = read_check(metadata)
        if found is None:
            return None
        read = cls(found["error"], found["kept"], tuple(found["asked"]), tuple(found["got"]), bool(found.get("cut")))
        if found.get("status") not in (RIGHT, OFF, EMPTY) or not _are_reasons(found.get("reasons")):
            return judged(read)
        return replace(read, status=found["status"], reasons=tuple(found["reasons"]))


def judged(found: Verdict, *, energy: float | None = None, most: int | None = None, averaged: bool = False) -> Verdict:
    """The verdict with the status that follows from its numbers.

    Args:
        found: The numbers.
        energy: The share of the energy that the rank rule asked for, if it is of that kind.
        most: The highest rank that the rule allows.
        averaged: The inputs are saves of one training: what a cut takes from one, it takes from its neighbours too.
    """

    def status(status: str, kind: str, **numbers: Any) -> Verdict:
        return replace(found, status=status, reasons=({"kind": kind, **numbers},))

    if not found.cut and found.error > LARGE:
        return status(OFF, "cancelling", error=found.error)
    if not _holds_anything(found):
        return status(EMPTY, "cancelled" if any(found.asked) or found.alike else "nothing_asked")
    if not averaged and (off := _of_strengths(found)):
        return off
    is_less = 1 - found.kept > _CAPPED * (1 - (energy or 0.0))
    if found.cut and energy and most and is_less:  # without `most` only rounding can be what is missing
        return status(RIGHT, "capped", kept=found.kept, asked=energy, max=most)
    return status(RIGHT, "cut", kept=found.kept) if found.cut else status(RIGHT, "rounding", error=found.error)


def _of_strengths(found: Verdict) -> Verdict | None:
    """The verdict where inputs came out much weaker or stronger than asked; None where they did not."""
    shares = {n: found.share(n) for n in found.told}
    for kind, inputs in (
        ("lost", [n for n, share in shares.items() if share < LOST]),
        ("stronger", [n for n, share in shares.items() if share > STRONGER]),
    ):
        if inputs:
            reason = {"kind": kind, "inputs": inputs, "shares": [shares[n] for n in inputs], "cut": found.cut}
            return replace(found, status=OFF, reasons=(reason,))
    return None


def judged_bake(found: Verdict, share: float | None, *, averaged: bool = False) -> Verdict:
    """The verdict on a whole model with the status that follows from its numbers.

    Args:
        found: The numbers.
        share: Of the change at the step's rank that it holds, <got, change> / <change, change>; None where there is none.
        averaged: As in `judged`.
    """
    if share is None:
        return replace(found, status=EMPTY, reasons=({"kind": "base_alone"},))
    if SURVIVES <= share <= 2 - SURVIVES and not averaged and (off := _of_strengths(found)):
        return off
    is_right = SURVIVES <= share <= 2 - SURVIVES
    reason = {"kind": "survives" if is_right else "rounded_away", "share": share}
    return replace(found, status=RIGHT if is_right else OFF, reasons=(reason,))


def placeholder(inputs: int) -> dict[str, str]:
    """Metadata at least as long as those of any verdict on so many inputs."""
    longest = -1.2345e-100
    many = (longest,) * inputs
    reason = {"kind": "nothing_asked", "inputs": [10**6] * inputs, "shares": list(many), "cut": False, "max": 10**6}
    return Verdict(longest, longest, many, many, status=EMPTY, reasons=(reason,)).metadata()


def _holds_anything(verdict: Verdict) -> bool:
    """Of a verdict that was read from a file, as far as its strengths tell."""
    if verdict.modules:
        return any(measured.written for measured in verdict.modules.values())
    return any(verdict.got) or bool(verdict.alike)


def _are_reasons(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(reason, dict) and "kind" in reason for reason in value)


def _rounded(reason: Reason) -> dict[str, Any]:
    """Floats with a few digits, all else as it is."""

    def short(value: Any) -> Any:
        if isinstance(value, list):
            return [short(v) for v in value]
        return _short(value, 6) if isinstance(value, float) else value

    return {key: short(value) for key, value in reason.items()}


def _short(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")
