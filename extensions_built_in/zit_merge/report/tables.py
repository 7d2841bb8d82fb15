"""Plans and files as text that fits 80 columns, in ASCII (on Windows AI-Toolkit's log is not UTF-8)."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from inspect import signature
from pathlib import Path

import yaml

from .. import zimage
from ..algebra.methods import METHODS
from ..plan import DTYPE_NAMES, Input, StepPlan
from ..presets import origin_of, presets
from ..training import Outline
from ..weights import row_name, runs
from ..zimage import COMPONENTS, OTHER, SECTIONS


def plan_text(plan: StepPlan) -> str:
    """One step as the dry run shows it: what goes in, how strong, what comes out."""
    lines = [f"step {plan.name}: {len(plan.inputs)} LoRA{'s' * (len(plan.inputs) > 1)} -> {plan.path}"]
    if not plan.spec.keep:
        lines[0] = f"step {plan.name}: {len(plan.inputs)} LoRA{'s' * (len(plan.inputs) > 1)}, for later steps only (keep: false)"
    for i in plan.inputs:
        what = "still on the hub"
        if i.outline.ranks:
            what = f"{len(i.outline.ranks)} modules, {_ranks(i.outline)}, {DTYPE_NAMES[i.outline.dtype]}"
            what += "" if i.lora or i.step else ", still to be trained"
        lines += ["", f"  {i.label}  ratio {i.spec.ratio:g}  ({what})"]
        lines += [f"    {line}" for line in strength_table(i.strengths, i.outline.ranks)]
        if i.spec.preset:
            lines += ["", f"    where it comes from: preset {i.spec.preset}, your own, both, neither (.)"]
            lines += [f"    {line}" for line in _origin_table(i)]
    size = f"{plan.bytes / 1e6:,.1f} MB" if plan.bytes else "size not known yet"
    lines += ["", f"  writes {_written(plan)}, {size}"]
    if plan.spec.copy_to:
        lines.append(f"  and a copy in {plan.spec.copy_to}")
    for note in plan.notes:
        lines += textwrap.wrap(f"note: {note}", 78, initial_indent="  ", subsequent_indent="    ", break_long_words=False)
    return "\n".join(lines)


def strength_table(strengths: Mapping[str, float], present: Collection[str]) -> list[str]:
    """Layers x components; equal neighbouring layers share a row, a dash is a module that the LoRA does not have.

    Args:
        strengths: Module -> strength.
        present: The modules that the LoRA has.
    """
    return _table(
        lambda section: [(a, b) for a, b, _ in runs(strengths, section)],
        lambda module: strengths[module],
        present,
    )


def norm_table(norms: Mapping[str, float | str]) -> list[str]:
    """Layers x components of a LoRA's Frobenius norms, a row for each layer; a word of six letters may stand for a norm."""
    return _table(lambda section: [(i, i) for i in range(SECTIONS[section])], lambda module: norms[module], norms)


def value_table(values: Mapping[str, float | str]) -> list[str]:
    """Layers x components of anything that a file says of its modules; equal neighbouring layers share a row.

    Args:
        values: Module -> value, for the modules that the file has; texts of six letters at most.
    """
    everywhere = {module: values.get(module) for module in zimage.MODULES}
    return _table(lambda section: [(a, b) for a, b, _ in runs(everywhere, section)], lambda module: values[module], values)


def _origin_table(i: Input) -> list[str]:
    """Layers x components: which entries decide the strength of each module of a LoRA that has a preset."""
    own = {key: getattr(i.spec, key) for key in ("blocks", "layers", "effects", "overrides")}
    origins = origin_of(i.spec.preset, own)
    return _table(
        lambda section: [(a, b) for a, b, _ in runs(origins, section)],
        lambda module: "." if origins[module] == "-" else origins[module],
        i.outline.ranks,
    )


def _table(
    rows: Callable[[str], Sequence[tuple[int, int]]], value: Callable[[str], float | str], present: Collection[str]
) -> list[str]:
    names = ["adaLN" if c == "adaLN_modulation" else c for c in COMPONENTS]
    lines = [f"{'layer':<18}" + "".join(f"{n:>7}" for n in names)]
    for section in SECTIONS:
        for first, last in rows(section):
            cells = [[m for i in range(first, last + 1) if (m := _module(section, i, c)) in present] for c in COMPONENTS]
            if any(cells):
                texts = (f"{_short(value(here[0])):>7}" if here else f"{'-':>7}" for here in cells)
                lines.append(f"{row_name(section, first, last):<18}" + "".join(texts))
    others = [f"{o} {_short(value(m))}" for o in OTHER if (m := zimage.at("other", 0, o).name) in present]
    return lines + (textwrap.wrap("other: " + ", ".join(others), 74) if others else [])


def _short(value: float | str) -> str:
    """In six letters, with as many digits as they hold; texts as they are."""
    if isinstance(value, str):
        return value
    return next((text for digits in (3, 2) if len(text := f"{value:.{digits}g}") <= 6), f"{value:.1g}")


def _ranks(outline: Outline) -> str:
    """`rank 32`, `LoKr of rank 3840 at most`."""
    rank = f"rank {span(outline.ranks.values())}"
    return rank if outline.is_lora else f"{' and '.join(outline.algorithms)} of {rank} at most"


def _written(plan: StepPlan) -> str:
    """`240 modules, rank 32, bf16`."""
    if not all(i.outline.ranks for i in plan.inputs):
        return "what the files on the hub will tell"
    modules = f"{len(plan.shapes or plan.stacked)} modules"
    rank = "a LoKr as before" if plan.spec.save.keep_lokr else f"rank {span(plan.ranks.values())}"
    form = f", format {plan.spec.save.format}" if plan.spec.save.format != "ai-toolkit" else ""
    return f"{modules}, {rank}, {DTYPE_NAMES[plan.dtype]}{form}"


def _module(section: str, index: int, component: str) -> str:
    return zimage.at(section, index, component).name if component in zimage.section_components(section) else ""


def span(values: Collection[int]) -> str:
    """`32`, or `4-32` where they differ."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def done_text(plan: StepPlan, path: Path, made: bool = True) -> str:
    """One line for a file that was written, or that was there already."""
    if not made:
        return f"kept {path} (made before by the same recipe)"
    if not plan.spec.keep:
        return f"{plan.name}: merged for later steps ({_written(plan)})"
    size = path.stat().st_size / 1e6
    copied = f", copied to {plan.spec.copy_to}" if plan.spec.copy_to else ""
    return f"wrote {path} ({_written(plan)}, {size:,.1f} MB){copied}"


def methods_text() -> str:
    """The merge methods with their parameters and what they do, from their signatures."""
    lines = []
    for name, method in METHODS.items():
        parameters = list(signature(method).parameters.values())[1:]
        shown = ", ".join(f"{p.name}={p.default}" for p in parameters) or "no parameters"
        lines += [f"{name}  ({shown})", f"    {(method.__doc__ or '').splitlines()[0]}"]
    return "\n".join(lines)


def presets_text() -> str:
    """The shipped presets: what they set and whose idea it is."""
    lines = []
    for name, preset in presets().items():
        keys = ("blocks", "layers", "effects", "overrides")
        tables = (
            f"{key}: {yaml.safe_dump(v, default_flow_style=True, width=1000).strip()}"
            for key in keys
            if (v := getattr(preset, key))
        )
        lines.append(name)
        for text in (*tables, preset.idea):
            lines += textwrap.wrap(text, 78, initial_indent="    ", subsequent_indent="      ")
    return "\n".join(lines)
