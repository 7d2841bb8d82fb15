"""`sweep`: one or two strength keys of a step at several values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from ..config import Lora, Step, check_step
from ..errors import ZitMergeError
from ..plan import Input, StepPlan, settle
from ..weights import strengths
from ..zimage import canonical_component

Value = float | Sequence[float]
_TABLES = ("blocks", "layers", "effects", "overrides")


@dataclass(frozen=True)
class Axis:
    """A strength key and its values.

    Attributes:
        key: As it was written: `ratio`, `blocks.to_v`, `loras[1].layers.0-9`.
        lora: Which LoRA of the step it belongs to.
        table: `ratio`, or the table that it stands in.
        entry: Of the table; empty for `ratio`.
        values: In order.
    """

    key: str
    lora: int
    table: str
    entry: str
    values: Sequence[Value]

    def label(self, value: Value) -> str:
        """`blocks.to_v 0.5`."""
        return f"{self.key} {value:g}" if isinstance(value, int | float) else f"{self.key} {', '.join(f'{v:g}' for v in value)}"


@dataclass(frozen=True)
class Cell:
    """One combination of values.

    Attributes:
        number: From 1, row by row.
        labels: One for each axis.
        plan: The step with these values.
    """

    number: int
    labels: tuple[str, ...]
    plan: StepPlan


def axes_of(step: Step, place: str) -> list[Axis]:
    """The axes of a step's sweep, those that vary fastest first.

    Args:
        step: With a sweep.
        place: Of the sweep, for messages.

    Raises:
        ZitMergeError: A key that names no strength of one LoRA.
    """
    if step.checkpoints:
        raise ZitMergeError(
            f"{place}: an average over checkpoints has no strengths to go through: make a step of it that weighs it"
        )
    found = [_axis(key, values, step, f"{place}.{key}") for key, values in step.sweep.items()]
    if len({(a.lora, a.table, a.entry) for a in found}) < len(found):
        raise ZitMergeError(f"{place}: {' and '.join(a.key for a in found)} are one strength: keep one of them")
    return found


def _axis(key: str, values: Sequence[Value], step: Step, place: str) -> Axis:
    match = re.fullmatch(r"(?:loras\[(?P<lora>\d+)\]\.)?(?P<table>[a-z]+)(?:\.(?P<entry>.+))?", key)
    known = "ratio, blocks.to_v, layers.0-9, effects.detail, overrides.3.to_q"
    if not match or match["table"] not in ("ratio", *_TABLES) or (match["table"] == "ratio") != (match["entry"] is None):
        raise ZitMergeError(f"{place}: is no strength of a LoRA; write it like {known}, with loras[1]. before it for the second")
    if match["lora"] is None and len(step.loras) > 1:
        raise ZitMergeError(f"{place}: the step has {len(step.loras)} LoRAs: say which one, such as loras[0].{key}")
    lora = int(match["lora"] or 0)
    if lora >= len(step.loras):
        raise ZitMergeError(f"{place}: the step has {len(step.loras)} LoRAs, the first is loras[0]: mend the number")
    if match["table"] != "layers" and any(not isinstance(v, int | float) for v in values):
        raise ZitMergeError(f"{place}: takes numbers, a list of numbers is a gradient over layers: write it under layers")
    if match["table"] == "layers" and not isinstance(step.loras[lora].layers, dict):
        raise ZitMergeError(
            f"{place}: loras[{lora}].layers is a list of 30 numbers: write it as ranges to go through one of them"
        )
    return Axis(key, lora, match["table"], match["entry"] or "", list(values))


def cells_of(plan: StepPlan, axes: Sequence[Axis], place: str) -> list[Cell]:
    """Every combination of the axes' values, row by row: the first axis varies fastest.

    Args:
        plan: The step.
        axes: From `axes_of`.
        place: Of the sweep, for messages.

    Raises:
        ZitMergeError: A combination that the strength keys don't allow.
    """
    found = []
    for number, values in enumerate(product(*(axis.values for axis in reversed(axes))), 1):
        chosen = plan
        for axis, value in zip(axes, reversed(values), strict=True):
            chosen = _with(chosen, axis, value, f"{place}.{axis.key}")
        check_step(chosen.spec, place)
        labels = tuple(axis.label(value) for axis, value in zip(axes, reversed(values), strict=True))
        found.append(Cell(number, labels, settle(chosen)))
    return found


def _with(plan: StepPlan, axis: Axis, value: Value, place: str) -> StepPlan:
    """The step with one strength at a value; to be settled."""
    lora = _set(plan.spec.loras[axis.lora], axis, value)
    loras = [lora if n == axis.lora else other for n, other in enumerate(plan.spec.loras)]
    inputs = tuple(_weighed(i, lora, place) if n == axis.lora else i for n, i in enumerate(plan.inputs))
    return replace(plan, spec=plan.spec.model_copy(update={"loras": loras}), inputs=inputs)


def _weighed(i: Input, lora: Lora, place: str) -> Input:
    return replace(i, spec=lora, strengths=strengths(lora.weights(place)))


def _set(lora: Lora, axis: Axis, value: Value) -> Lora:
    """A LoRA's entry with a strength at a value; the same strength under another alias gives way, a recipe's table too."""
    lora = lora.model_copy(update={"strengths": None})
    if axis.table == "ratio":
        return lora.model_copy(update={"ratio": float(value)})
    name = _canonical(axis.entry)
    others = {key: v for key, v in getattr(lora, axis.table).items() if _canonical(key) != name}
    return lora.model_copy(update={axis.table: others | {axis.entry: value}})


def _canonical(entry: str) -> str:
    where, dot, component = entry.rpartition(".")
    return f"{where}{dot}{canonical_component(component)}"
