"""What the parameters of a method may be."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import cleandoc, signature
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints


class Within(NamedTuple):
    """The range of a number, in the annotation of a parameter: Annotated[float, Within(0, 1)].

    Attributes:
        low: The smallest value.
        high: The largest value.
        above: `low` itself is left out.
    """

    low: float
    high: float = float("inf")
    above: bool = False

    def __str__(self) -> str:
        low = f"{'above' if self.above else 'from'} {self.low}"
        return low if self.high == float("inf") else f"{low} {'and at most' if self.above else 'to'} {self.high}"

    def holds(self, value: float) -> bool:
        """Whether a number lies in it."""
        return (self.low < value if self.above else self.low <= value) and value <= self.high


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method.

    Attributes:
        name: As in a config.
        default: Its value where none is given.
        kind: float or int; str for one of `choices`.
        within: The range of a number.
        choices: The words.
        text: What it means, a sentence.
    """

    name: str
    default: Any
    kind: type
    within: Within | None = None
    choices: tuple[str, ...] = ()
    text: str = ""

    def trouble(self, value: object) -> str:
        """Why a value can't be; empty if it can."""
        if self.choices:
            return "" if value in self.choices else f"must be one of {', '.join(self.choices)}, not {value!r}"
        is_number = isinstance(value, int if self.kind is int else (int, float)) and not isinstance(value, bool)
        if not (is_number and isinstance(value, int | float) and abs(value) < float("inf")):
            return f"must be a {'whole' if self.kind is int else 'finite'} number, not {value!r}"
        return "" if not self.within or self.within.holds(value) else f"must be {self.within}, not {value!r}"


PER = Parameter("per", "module", str, choices=("module", "layer", "file"), text="Over what lengths and angles are taken.")


def check_della(*, density: float, epsilon: float, **others: object) -> None:
    """Raises ValueError where the probabilities of `sparse.della` leave 0 to 1.

    Args:
        density: Their mean.
        epsilon: Distance between the largest and the smallest.
        **others: What does not matter here.
    """
    if density - epsilon / 2 <= 0 or density + epsilon / 2 > 1:
        raise ValueError(f"density {density:g} with epsilon {epsilon:g} keeps entries with probabilities outside of 0 to 1")


def parameters_of(function: Callable[..., Any]) -> dict[str, Parameter]:
    """The parameters of a method, from its signature: the keyword-only arguments, with the meanings from the docstring."""
    hints, texts = get_type_hints(function, include_extras=True), _meanings(function.__doc__ or "")
    return {
        p.name: _parameter(p.name, p.default, hints[p.name], texts.get(p.name, ""))
        for p in signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    }


def _parameter(name: str, default: Any, hint: Any, text: str) -> Parameter:
    if get_origin(hint) is Literal:
        return Parameter(name, default, str, choices=get_args(hint), text=text)
    kind, *within = get_args(hint) or (hint,)
    return Parameter(name, default, kind, within[0] if within else None, text=text)


def _meanings(doc: str) -> Mapping[str, str]:
    args = paragraphs(doc).get("Args", "")
    return {name: " ".join(text.split()) for name, text in re.findall(r"^(\w+): (.*(?:\n +.*)*)", args, re.MULTILINE)}


def paragraphs(doc: str) -> dict[str, str]:
    """The parts of a docstring by their titles, the summary under an empty one: Formula, Source, Use, Args, Raises."""
    found: dict[str, str] = {}
    title = ""
    for line in cleandoc(doc).splitlines():
        begin = re.match(r"(Formula|Source|Use|Args|Raises):(?: (.*))?$", line)
        if begin:
            title, line = begin[1], begin[2] or ""
        found[title] = f"{found[title]}\n{line}" if title in found else line
    return {title: cleandoc(text) for title, text in found.items()}
