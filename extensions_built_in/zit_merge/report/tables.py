"""Plans and files as text that fits 80 columns, in ASCII (on Windows AI-Toolkit's log is not UTF-8)."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from .. import zimage
from ..algebra.factors import norm, scale
from ..algebra.methods import METHODS
from ..formats.metadata import read_recipe, trigger_words
from ..formats.reader import LoraFile, TensorReader
from ..plan import DTYPE_NAMES, StepPlan
from ..weights import row_name, runs
from ..zimage import COMPONENTS, MODULES, OTHER, SECTIONS


def plan_text(plan: StepPlan) -> str:
    """One step as the dry run shows it: what goes in, how strong, what comes out."""
    lines = [f"step {plan.name}: {len(plan.inputs)} LoRA{'s' * (len(plan.inputs) > 1)} -> {plan.path}"]
    if not plan.spec.keep:
        lines[0] = f"step {plan.name}: {len(plan.inputs)} LoRA{'s' * (len(plan.inputs) > 1)}, for later steps only (keep: false)"
    for i in plan.inputs:
        what = f"{len(i.outline.ranks)} modules, rank {_span(i.outline.ranks.values())}, {DTYPE_NAMES[i.outline.dtype]}"
        if not i.lora and not i.step:
            what += ", still to be trained"
        lines += ["", f"  {i.label}  ratio {i.spec.ratio:g}  ({what})"]
        lines += [f"    {line}" for line in strength_table(i.strengths, i.outline.ranks)]
    size = f"{plan.bytes / 1e6:,.1f} MB" if plan.bytes else "size known after the training"
    lines += ["", f"  writes {len(plan.shapes or plan.stacked)} modules, rank {plan.rank}, {DTYPE_NAMES[plan.dtype]}, {size}"]
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


def norm_table(norms: Mapping[str, float]) -> list[str]:
    """Layers x components of a LoRA's Frobenius norms, a row for each layer."""
    return _table(lambda section: [(i, i) for i in range(SECTIONS[section])], lambda module: norms[module], norms)


def _table(
    rows: Callable[[str], Sequence[tuple[int, int]]], value: Callable[[str], float], present: Collection[str]
) -> list[str]:
    names = ["adaLN" if c == "adaLN_modulation" else c for c in COMPONENTS]
    lines = [f"{'layer':<18}" + "".join(f"{n:>7}" for n in names)]
    for section in SECTIONS:
        for first, last in rows(section):
            cells = [[m for i in range(first, last + 1) if (m := _module(section, i, c)) in present] for c in COMPONENTS]
            if any(cells):
                texts = (f"{_short(value(here[0])):>7}" if here else f"{'-':>7}" for here in cells)
                lines.append(f"{row_name(section, first, last):<18}" + "".join(texts))
    others = [f"{o} {value(m):.3g}" for o in OTHER if (m := zimage.at("other", 0, o).name) in present]
    return lines + (textwrap.wrap("other: " + ", ".join(others), 74) if others else [])


def _short(value: float) -> str:
    text = f"{value:.3g}"
    return text if len(text) <= 6 else f"{value:.1g}"


def _module(section: str, index: int, component: str) -> str:
    return zimage.at(section, index, component).name if component in zimage.section_components(section) else ""


def _span(values: Collection[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def describe(lora: LoraFile) -> dict[str, Any]:
    """Everything `inspect` knows of a file, ready for JSON.

    Returns:
        file, format (key styles), modules (how many), ranks and alphas (module -> value), dtype, norms (module -> Frobenius norm
        of the change, alpha folded in), skipped, unmatched, trigger_words, base_model, recipe (None without one).
    """
    with TensorReader(lora) as tensors:
        norms = {name: norm(scale(tensors.factors(name), pair.scale)) for name, pair in lora.pairs.items()}
    return {
        "file": lora.path.name,
        "format": list(lora.styles),
        "modules": len(lora.pairs),
        "ranks": {name: pair.rank for name, pair in lora.pairs.items()},
        "alphas": dict(lora.alphas),
        "dtype": DTYPE_NAMES[lora.dtype],
        "norms": norms,
        "norm": sum(n * n for n in norms.values()) ** 0.5,
        "skipped": list(lora.skipped),
        "unmatched": list(lora.unmatched),
        "trigger_words": trigger_words(lora.metadata),
        "base_model": lora.metadata.get("ss_base_model_version"),
        "recipe": read_recipe(lora.metadata),
    }


def inspect_text(facts: Mapping[str, Any]) -> str:
    """`describe` for people."""
    alphas = sorted({round(facts["alphas"][m] / facts["ranks"][m], 6) for m in facts["alphas"]})
    counts = {s: sum(1 for m in facts["ranks"] if MODULES[m].section == s) for s in (*SECTIONS, "other")}
    rows = {
        "file": facts["file"],
        "keys": ", ".join(facts["format"]),
        "modules": f"{facts['modules']} ({', '.join(f'{n} in {s}' for s, n in counts.items() if n)})",
        "rank": f"{_span(facts['ranks'].values())}, {facts['dtype']}",
        "alpha/rank": ", ".join(f"{a:g}" for a in alphas) if alphas else "no alpha: 1",
        "norm": f"{facts['norm']:.4g}",
        "base model": facts["base_model"] or "not named",
        "trigger words": ", ".join(facts["trigger_words"]) or "none named",
        "made by": f"zit_merge, see `recipe {facts['file']}`" if facts["recipe"] else "",
        "left out": f"{len(facts['skipped'])} keys outside of the transformer ({facts['skipped'][0]} ...)"
        if facts["skipped"]
        else "",
        "unknown": f"{len(facts['unmatched'])} keys ({', '.join(facts['unmatched'][:3])})" if facts["unmatched"] else "",
    }
    lines = []
    for name, text in rows.items():
        lines += textwrap.wrap(text, 78, initial_indent=f"{name:<14}", subsequent_indent=" " * 14, break_long_words=False)
    return "\n".join([*lines, "", "norm of the change, per layer and component", *norm_table(facts["norms"])])


def done_text(plan: StepPlan, path: Path) -> str:
    """One line for a file that was written."""
    if not plan.spec.keep:
        return f"{plan.name}: merged for later steps ({len(plan.shapes)} modules, rank {plan.rank})"
    size = path.stat().st_size / 1e6
    copied = f", copied to {plan.spec.copy_to}" if plan.spec.copy_to else ""
    return f"wrote {path} ({len(plan.shapes)} modules, rank {plan.rank}, {DTYPE_NAMES[plan.dtype]}, {size:,.1f} MB){copied}"


def methods_text() -> str:
    """The merge methods with their parameters and what they do, from their signatures."""
    lines = []
    for name, method in METHODS.items():
        parameters = list(signature(method).parameters.values())[1:]
        shown = ", ".join(f"{p.name}={p.default}" for p in parameters) or "no parameters"
        lines += [f"{name}  ({shown})", f"    {(method.__doc__ or '').splitlines()[0]}"]
    return "\n".join(lines)
