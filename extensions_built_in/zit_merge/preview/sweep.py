"""`sweep`: one or two strength keys of a step at several values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from ..config.rules import check_step
from ..config.schema import Lora, Step
from ..errors import SettingError, counted, joined, located, nearest
from ..model.strengths import TABLES, canonical_key
from ..planning.factors import lora_factors
from ..planning.types import Input, StepPlan
from .plan import SweepCell

Value = float | Sequence[float]
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
        loc: Of its LoRA below the sweep: `loras[1]`; empty where the step has one.
    """

    key: str
    lora: int
    table: str
    entry: str
    values: Sequence[Value]
    loc: str

    @property
    def strength(self) -> tuple[int, str, str]:
        """The same for keys that name the same strength."""
        return self.lora, self.table, canonical_key(self.table, self.entry)

    def label(self, value: Value) -> str:
        """`blocks.to_v 0.5`."""
        words = [f"{v:g}" for v in ([value] if isinstance(value, int | float) else value)]
        short = words if len(words) <= _LISTED else [*words[: _LISTED - 1], "...", words[-1]]
        return f"{self.key} {', '.join(short)}"


def axes_of(step: Step) -> list[SweepAxis]:
    """The axes of a step's sweep, the one that varies fastest first.

    Args:
        step: With a sweep.

    Raises:
        SettingError: A key does not name one strength of one LoRA.
    """
    if step.checkpoints:
        raise SettingError(
            "an average over checkpoints has no strengths to vary: use it as a LoRA of another step and sweep that"
        )
    found = []
    for key, values in (step.sweep or {}).items():
        with located(key):
            found.append(_axis(key, values, step))
    whole = {axis.lora for axis in found if axis.table == "layers" and not axis.entry}  # a list of 30 sets every range
    doubled = any(axis.table == "layers" and axis.entry and axis.lora in whole for axis in found)
    if doubled or len({axis.strength for axis in found}) < len(found):
        raise SettingError(f"{' and '.join(a.key for a in found)} are one strength: keep one of them")
    return found


_KEY = re.compile(r"(loras\[(\d+)\]\.)?(ratio|layers|(?:blocks|layers|effects|overrides)\.(.+))")


def _axis(key: str, values: Sequence[Value], step: Step) -> SweepAxis:
    match, count = _KEY.fullmatch(key), len(step.loras)
    if not match:
        raise SettingError(
            f"is not a strength of a LoRA{_meant(key)}; write it as ratio, blocks.to_v, layers.0-9, effects.detail, "
            "overrides.3.to_q, with loras[1]. before it for the second LoRA"
        )
    prefix, number, name, entry = match.groups("")
    lora, table = int(number or 0), name.partition(".")[0]
    if not prefix and count > 1:
        raise SettingError(f"the step has {count} LoRAs: say which one, such as loras[0].{key}")
    if lora >= count:
        raise SettingError(f"the step has {counted(count, 'LoRA')}, the first is loras[0]: correct the number")
    lists = [isinstance(value, Sequence) for value in values]
    if table != "layers" and any(lists):
        raise SettingError("takes numbers, a list of numbers is a gradient over layers: write it under layers")
    if name == "layers" and not all(lists):
        raise SettingError("takes lists of 30 numbers; write layers.0-9 for one number, or for a gradient")
    if table == "layers" and entry and not isinstance(step.loras[lora].layers, dict):
        raise SettingError(f"loras[{lora}].layers is a list of 30 numbers: write it as ranges to sweep one of them")
    return SweepAxis(key, lora, table, entry, list(values), prefix.rstrip("."))


def _meant(key: str) -> str:
    """Suggests the table that a key may mean."""
    word, known = re.split(r"[.\[]", key.rpartition("].")[2])[0], ("ratio", *TABLES)
    return "" if word in known else nearest(word, known)


def cells_of(plan: StepPlan, axes: Sequence[SweepAxis]) -> list[SweepCell]:
    """Every combination of the axes' values, row by row: the first axis varies fastest.

    Args:
        plan: The step.
        axes: From `axes_of`.

    Raises:
        SettingError: The strength keys don't allow a combination; located by `plan.loc`.
    """
    chosen = []
    with located(joined(plan.loc, "sweep")):
        for axis in axes:
            _check_effect(plan, axis)
        for values in product(*(axis.values for axis in reversed(axes))):
            spec, inputs, labels = plan.spec, plan.inputs, []
            for axis, value in zip(axes, reversed(values), strict=True):
                spec, inputs = _with(spec, inputs, axis, value)
                labels.append(axis.label(value))
            check_step(spec)
            chosen.append((tuple(labels), spec, inputs))
    return [SweepCell(n, labels, plan.revised(spec=spec, inputs=inputs)) for n, (labels, spec, inputs) in enumerate(chosen, 1)]


def _check_effect(plan: StepPlan, axis: SweepAxis) -> None:
    """Raises where the values of an axis make no difference."""
    tables = [_with(plan.spec, plan.inputs, axis, value)[1][axis.lora].strengths for value in axis.values]
    if any(value != axis.values[0] for value in axis.values) and all(table == tables[0] for table in tables):
        raise SettingError(
            f"has no effect, other keys of loras[{axis.lora}] override it everywhere (a narrower one, an override, a "
            "ratio of 0): drop them, or sweep one of them",
            axis.key,
        )


def _with(spec: Step, inputs: tuple[Input, ...], axis: SweepAxis, value: Value) -> tuple[Step, tuple[Input, ...]]:
    """A step and its inputs with one strength at a value."""
    lora = _set(spec.loras[axis.lora], axis, value)
    with located(axis.loc):
        table = lora_factors(lora)
    changed = [replace(i, spec=lora, factors=table) if n == axis.lora else i for n, i in enumerate(inputs)]
    loras = [lora if n == axis.lora else other for n, other in enumerate(spec.loras)]
    return spec.model_copy(update={"loras": loras}), tuple(changed)


def _set(lora: Lora, axis: SweepAxis, value: Value) -> Lora:
    """A LoRA's entry with a strength at a value, which replaces the same key in other spellings and a recipe's table."""
    lora = lora.model_copy(update={"strengths": None})
    if not axis.entry:
        return lora.model_copy(update={axis.table: value})
    name = canonical_key(axis.table, axis.entry)
    others = {key: v for key, v in getattr(lora, axis.table).items() if canonical_key(axis.table, key) != name}
    return lora.model_copy(update={axis.table: others | {axis.entry: value}})
