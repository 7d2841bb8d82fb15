"""A plan as the dry run shows it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from ...config.presets import is_file, origin_of
from ...errors import counted
from ...formats.header import DTYPES as CONFIG_NAMES
from ...formats.spec import LoraSpec
from ...model import zimage
from ...planning.types import BakeTarget, Input, StepPlan
from ...wording import WIDTH, aligned, beside, columns, copyable, padded, ranges, ranks_text, size_text, span, squeezed, wrapped
from .table import grouped_table, strength_table

NAME = 40  # letters of a name in a sentence
_ITS_RATIO = "everywhere its ratio"


def plan_text(plan: StepPlan) -> str:
    """One step as the dry run shows it: what goes in, how strong, what comes out, what else there is to know."""
    lines = [*wrapped(f"step {step_name(plan)}: {_what_is_done(plan)}", 0), *_inputs(plan), *_strengths(plan), ""]
    size = f"{size_text(plan.bytes)}{' at most' if plan.is_open else ''}" if plan.bytes else "size not known yet"
    if plan.spec.keep:
        lines += [*beside("  writes ", [*written(plan), size]), f"    {copyable(plan.path)}"]
    elif not plan.bake:
        lines += beside("  makes ", [*written(plan), size, "for later steps only (keep: false)"])
    if plan.bake:
        lines += [*beside("  writes ", model_facts(plan.bake)), f"    {copyable(plan.bake.path)}"]
    if plan.spec.copy_to:
        lines += ["  and a copy in", f"    {copyable(plan.targets[1].parent)}"]
    lines += [""] * bool(plan.warnings)
    for warning in plan.warnings:
        lines += wrapped(f"note: {warning}")
    return "\n".join(lines)


def model_facts(bake: BakeTarget) -> list[str]:
    """`the whole model`, `Z-Image-Turbo with the merge in it`, `format comfyui`, `bf16`, `12.3 GB`."""
    facts = ["the whole model", f"{squeezed(bake.label, NAME)} with the merge in it", f"format {bake.spec.format}"]
    if bake.base is None:
        return [*facts, "size not known yet"]
    dtype = bake.spec.dtype or CONFIG_NAMES.get(bake.base.dtype_name, bake.base.dtype_name)
    rounding = ["rounded stochastically"] if bake.spec.rounding == "stochastic" else []
    return [*facts, dtype, *rounding, size_text(bake.size)]


def step_name(plan: StepPlan) -> str:
    return squeezed(plan.name, NAME)


def _what_is_done(plan: StepPlan) -> str:
    """`2 LoRAs, method ties (density 0.2)`."""
    spec, count = plan.spec, len(plan.inputs)
    if spec.checkpoints:
        return f"{counted(count, 'checkpoint')}, averaged"
    if count == 1 and spec.method == "sum":
        return "1 LoRA"
    given = ", ".join(f"{key} {value}" for key, value in spec.params.items())
    return f"{counted(count, 'LoRA')}, method {spec.method}" + f" ({given})" * bool(given)


def _inputs(plan: StepPlan) -> list[str]:
    """Every LoRA with its ratio and what is known of its file, below each other."""
    facts = [_known_of(i) for i in plan.inputs]
    ratios = aligned([f"{i.spec.ratio:g}" for i in plan.inputs])
    numbers = numbers_of(plan)
    room = WIDTH - len(f"  {numbers[0]}  ratio {ratios[0]}  ") - max(len(", ".join(parts)) for parts in facts)
    names = names_of(plan, min(max(room, 32), 48))
    left = (f"  {number}{name}  ratio {ratio}  " for number, name, ratio in zip(numbers, names, ratios, strict=True))
    return [line for first, parts in zip(left, facts, strict=True) for line in beside(first, parts)]


def numbers_of(plan: StepPlan) -> list[str]:
    """What each input is called beside its name: nothing where there is only one."""
    count = len(plan.inputs)
    return [f"{n:>{len(str(count))}}  " if count > 1 else "" for n in range(1, count + 1)]


def names_of(plan: StepPlan, most: int) -> list[str]:
    """The inputs' names, of one width and of so many columns at most.

    Args:
        plan: The step.
        most: Columns of a name.
    """
    names = [squeezed(i.label, most) for i in plan.inputs]
    width = max(map(columns, names))
    return [padded(name, width) for name in names]


def _known_of(i: Input) -> list[str]:
    """`240 modules`, `rank 32`, `bf16`."""
    if not i.known.ranks:
        return ["still on the hub"]
    facts = [counted(len(i.known.ranks), "module"), _ranks(i.known), i.known.dtype_name]
    return facts if i.lora or i.step or i.pair else [*facts, "still to be trained"]


def _strengths(plan: StepPlan) -> Iterator[str]:
    """How strong every LoRA is where; those of equal tables share one."""
    groups: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for n, i in enumerate(plan.inputs):
        groups.setdefault((_everywhere(i), tuple(_strength_lines(i))), []).append(n)
    is_apart = True
    for (everywhere, lines), members in groups.items():
        ratios = {plan.inputs[n].spec.ratio for n in members}
        if everywhere == _ITS_RATIO and len(ratios) == 1:
            everywhere = f"everywhere {ratios.pop():g}"
        who = f" of {_who(plan, members)}" if len(plan.inputs) > 1 else ""
        yield from [""] * (is_apart or bool(lines))
        yield from wrapped(f"strength{who}{': ' * bool(everywhere)}{everywhere}")
        yield from (f"    {line}" for line in lines)
        is_apart = bool(lines)


def _who(plan: StepPlan, members: Sequence[int]) -> str:
    """`LoRA 2 (style.safetensors)`, `LoRAs 1 and 3-7`."""
    if len(members) == 1:
        return f"LoRA {members[0] + 1} ({squeezed(plan.inputs[members[0]].label, NAME)})"
    return f"LoRAs {ranges([n + 1 for n in members])}"


def _everywhere(i: Input) -> str:
    """The strength of a LoRA that is equally strong in all its modules, in words; nothing for any other."""
    values = {i.strengths[m] for m in _present(i)}
    if len(values) > 1:
        return ""
    return _ITS_RATIO if values == {i.spec.ratio} else f"everywhere {values.pop():g}"


def _strength_lines(i: Input) -> Iterator[str]:
    """The table of a LoRA whose strength differs, and where a preset's strengths come from."""
    if not _everywhere(i):
        yield from strength_table(i.strengths, _present(i))
    if i.spec.preset:
        yield f"where it comes from: preset {_preset_name(i.spec.preset)}, your own, both, neither (.)"
        yield from _origin_table(i)


def _preset_name(preset: str) -> str:
    """Of a file the name without its folder, cut to what a line has room for."""
    return squeezed(Path(preset).name if is_file(preset) else preset, 19)


def _present(i: Input) -> Collection[str]:
    """The modules that a LoRA has; all that it may have while it is still on the hub."""
    return i.known.ranks or zimage.MODULES


def _origin_table(i: Input) -> list[str]:
    """Layers x components: which entries decide the strength of each module of a LoRA that has a preset."""
    preset = i.spec.found_preset
    assert preset is not None, "a planned step has looked its presets up"
    origins = origin_of(preset, i.spec.own)
    return grouped_table({module: "." if origin == "-" else origin for module, origin in origins.items()}, _present(i))


def _ranks(known: LoraSpec) -> str:
    """`rank 32`, `LoKr of rank 3840 at most`."""
    rank = f"rank {ranks_text(known.ranks, known.algorithms)}"
    return rank if known.is_lora else f"{' and '.join(known.algorithms)} of {rank}"


def written(plan: StepPlan) -> list[str]:
    """`240 modules`, `rank 32`, `bf16`."""
    if not all(i.known.ranks for i in plan.inputs):
        return ["what the files on the hub will tell"]
    modules = counted(len(plan.shapes or plan.stacked), "module")
    if added := len(plan.ranks.keys() - plan.stacked.keys()):
        modules += f" ({added} of zeros)"
    rank = "a LoKr as before" if plan.spec.save.keep_lokr else f"rank {span(plan.ranks.values())}"
    rank += " at most" if plan.is_open else ""
    form = [f"format {plan.spec.save.format}"] if plan.spec.save.format != "ai-toolkit" else []
    return [modules, rank, plan.dtype_name, *form]
