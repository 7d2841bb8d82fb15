"""`sweep`: one or two strength keys of a step at several values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from ..config.rules import check_step
from ..config.schema import Lora, Step
from ..errors import ZitMergeError, counted, nearest
from ..model.strengths import strengths
from ..model.zimage import canonical_component
from ..planning.plan import StepPlan, settle
from .plan import SweepCell

Value = float | Sequence[float]
_TABLES = ("blocks", "layers", "effects", "overrides")
_LISTED = 5  # numbers of a gradient in a label


@dataclass(frozen=True)
class SweepAxis:
    """A strength key and its values.

    Attributes:
        key: As it was written: `ratio`, `blocks.to_v`, `loras[1].layers.0-9`.
        lora: Index of its LoRA in the step.
        table: `ratio`, or the table of the key.
        entry: Its key in the table; empty for `ratio`, and for a list of all 30 layers.
        values: In order.
        place: Of the table, for messages.
    """

    key: str
    lora: int
    table: str
    entry: str
    values: Sequence[Value]
    place: str

    @property
    def strength(self) -> tuple[int, str, str]:
        """The same for keys that name the same strength."""
        return self.lora, self.table, self.canonical(self.entry)

    def canonical(self, entry: str) -> str:
        """The one spelling of a key of the axis's table."""
        return _canonical(entry)

    def label(self, value: Value) -> str:
        """`blocks.to_v 0.5`."""
        words = [f"{v:g}" for v in ([value] if isinstance(value, int | float) else value)]
        short = words if len(words) <= _LISTED else [*words[: _LISTED - 1], "...", words[-1]]
        return f"{self.key} {', '.join(short)}"


def axes_of(step: Step, place: str) -> list[SweepAxis]:
    """The axes of a step's sweep, the one that varies fastest first.

    Args:
        step: With a sweep.
        place: Of the sweep, for messages.

    Raises:
        ZitMergeError: A key does not name one strength of one LoRA.
    """
    if step.checkpoints:
        raise ZitMergeError(
            f"{place}: an average over checkpoints has no strengths to vary: use it as a LoRA of another step and sweep that"
        )
    found = [_axis(key, values, step, place) for key, values in step.sweep.items()]
    whole = {axis.lora for axis in found if axis.table == "layers" and not axis.entry}  # a list of 30 sets every range
    doubled = any(axis.table == "layers" and axis.entry and axis.lora in whole for axis in found)
    if doubled or len({axis.strength for axis in found}) < len(found):
        raise ZitMergeError(f"{place}: {' and '.join(a.key for a in found)} are one strength: keep one of them")
    return found


_KEY = re.compile(r"(loras\[(\d+)\]\.)?(ratio|layers|(?:blocks|layers|effects|overrides)\.(.+))")


def _axis(key: str, values: Sequence[Value], step: Step, sweep: str) -> SweepAxis:
    match, place, count = _KEY.fullmatch(key), f"{sweep}.{key}", len(step.loras)
    if not match:
        raise ZitMergeError(
            f"{place}: is not a strength of a LoRA{_meant(key)}; write it as ratio, blocks.to_v, layers.0-9, effects.detail, "
            "overrides.3.to_q, with loras[1]. before it for the second LoRA"
        )
    prefix, number, name, entry = match.groups("")
    lora, table = int(number or 0), name.partition(".")[0]
    if not prefix and count > 1:
        raise ZitMergeError(f"{place}: the step has {count} LoRAs: say which one, such as loras[0].{key}")
    if lora >= count:
        raise ZitMergeError(f"{place}: the step has {counted(count, 'LoRA')}, the first is loras[0]: correct the number")
    lists = [isinstance(value, Sequence) for value in values]
    if table != "layers" and any(lists):
        raise ZitMergeError(f"{place}: takes numbers, a list of numbers is a gradient over layers: write it under layers")
    if name == "layers" and not all(lists):
        raise ZitMergeError(f"{place}: takes lists of 30 numbers; write layers.0-9 for one number, or for a gradient")
    if table == "layers" and entry and not isinstance(step.loras[lora].layers, dict):
        raise ZitMergeError(f"{place}: loras[{lora}].layers is a list of 30 numbers: write it as ranges to sweep one of them")
    return SweepAxis(key, lora, table, entry, list(values), f"{sweep}.{prefix}".rstrip("."))


def _meant(key: str) -> str:
    """Suggests the table that a key may mean."""
    word, known = re.split(r"[.\[]", key.rpartition("].")[2])[0], ("ratio", *_TABLES)
    return "" if word in known else nearest(word, known)


def cells_of(plan: StepPlan, axes: Sequence[SweepAxis], place: str) -> list[SweepCell]:
    """Every combination of the axes' values, row by row: the first axis varies fastest.

    Args:
        plan: The step.
        axes: From `axes_of`.
        place: Of the sweep, for messages.

    Raises:
        ZitMergeError: The strength keys don't allow a combination.
    """
    for axis in axes:
        _check_effect(plan, axis, f"{place}.{axis.key}")
    found = []
    for number, values in enumerate(product(*(axis.values for axis in reversed(axes))), 1):
        chosen = plan
        for axis, value in zip(axes, reversed(values), strict=True):
            chosen = _with(chosen, axis, value)
        check_step(chosen.spec, place)
        labels = tuple(axis.label(value) for axis, value in zip(axes, reversed(values), strict=True))
        found.append(SweepCell(number, labels, settle(chosen)))
    return found


def _check_effect(plan: StepPlan, axis: SweepAxis, place: str) -> None:
    """Raises where the values of an axis make no difference."""
    tables = [_with(plan, axis, value).inputs[axis.lora].strengths for value in axis.values]
    if any(value != axis.values[0] for value in axis.values) and all(table == tables[0] for table in tables):
        raise ZitMergeError(
            f"{place}: has no effect, other keys of loras[{axis.lora}] override it everywhere (a narrower one, an override, a "
            "ratio of 0): drop them, or sweep one of them"
        )


def _with(plan: StepPlan, axis: SweepAxis, value: Value) -> StepPlan:
    """The step with one strength at a value; its ranks do not follow yet."""
    lora = _set(plan.spec.loras[axis.lora], axis, value)
    loras = [lora if n == axis.lora else other for n, other in enumerate(plan.spec.loras)]
    table = strengths(lora.weights(axis.place))
    inputs = tuple(replace(i, spec=lora, strengths=table) if n == axis.lora else i for n, i in enumerate(plan.inputs))
    return replace(plan, spec=plan.spec.model_copy(update={"loras": loras}), inputs=inputs)


def _set(lora: Lora, axis: SweepAxis, value: Value) -> Lora:
    """A LoRA's entry with a strength at a value, which replaces the same key in other spellings and a recipe's table."""
    lora = lora.model_copy(update={"strengths": None})
    if not axis.entry:
        return lora.model_copy(update={axis.table: value})
    name = axis.canonical(axis.entry)
    others = {key: v for key, v in getattr(lora, axis.table).items() if axis.canonical(key) != name}
    return lora.model_copy(update={axis.table: others | {axis.entry: value}})


def _canonical(entry: str) -> str:
    """The same for every spelling of an entry: `3.adaLN`, `3-3.adaLN_modulation`."""
    where, dot, component = entry.rpartition(".")
    layers = re.sub(r"^(\d+)\s*-\s*(\d+)$", lambda m: m[1] if m[1] == m[2] else f"{m[1]}-{m[2]}", where or component)
    return f"{layers}{dot}{canonical_component(component)}" if dot else canonical_component(layers)
