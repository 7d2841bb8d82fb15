"""Plans and files as text that fits 80 columns, in ASCII (on Windows AI-Toolkit's log is not UTF-8)."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import yaml

from .. import zimage
from ..algebra.methods import METHODS
from ..algebra.parameters import paragraphs
from ..audit import Verdict
from ..config import RankRule
from ..execute import Done
from ..plan import DTYPE_NAMES, Input, StepPlan
from ..presets import origin_of, presets
from ..training import Outline
from ..weights import row_name, runs
from ..zimage import COMPONENTS, OTHER, SECTIONS
from .text import listed, percent, plain, shorten

LARGE = 0.05  # an error of rounding that a person should hear of: usually 0.002 in bf16
_SHOWN = 6  # LoRAs in the line of the check


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
    size = f"{plan.bytes / 1e6:,.1f} MB{' at most' if plan.is_open else ''}" if plan.bytes else "size not known yet"
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
    rank += " at most" if plan.is_open else ""
    form = f", format {plan.spec.save.format}" if plan.spec.save.format != "ai-toolkit" else ""
    return f"{modules}, {rank}, {DTYPE_NAMES[plan.dtype]}{form}"


def _module(section: str, index: int, component: str) -> str:
    return zimage.at(section, index, component).name if component in zimage.section_components(section) else ""


def span(values: Collection[int]) -> str:
    """`32`, or `4-32` where they differ."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def done_text(done: Done) -> str:
    """A file that was written, and what its check found; or one that was there already."""
    plan, path = done.plan, done.path
    if not done.made:
        return f"kept {path} (made before by the same recipe)"
    if plan.spec.keep:
        copied = f", copied to {plan.spec.copy_to}" if plan.spec.copy_to else ""
        lines = [f"wrote {path} ({_written(plan)}, {path.stat().st_size / 1e6:,.1f} MB){copied}"]
    else:
        lines = [f"{plan.name}: merged for later steps ({_written(plan)})"]
    if done.verdict:
        lines += textwrap.wrap(check_line(done), 78, initial_indent="  ", subsequent_indent="    ", break_long_words=False)
    if isinstance(plan.spec.rank, RankRule) and done.verdict:
        kept = {m: f"{100 * (1 - e**2):.4g}" for m, e in done.verdict.errors.items()}
        lines += ["", "  energy kept, in percent", *(f"  {line}" for line in value_table(kept))]
        if not plan.spec.save.uniform:
            lines += ["", "  rank", *(f"  {line}" for line in value_table({m: str(r) for m, r in plan.ranks.items()}))]
    return "\n".join(lines)


def check_line(done: Done) -> str:
    """Asked against got, in one line."""
    plan, verdict = done.plan, done.verdict
    words = [] if plan.spec.checkpoints else [_strengths_words(plan, verdict)]
    if plan.cut:
        module, error = max(verdict.errors.items(), key=lambda item: item[1])
        words.append(f"{percent(verdict.kept)} of the energy kept, at least {percent(1 - error**2)} ({module})")
        words += [f"{label} is mostly cut away, a larger rank keeps it" for label, a, g in _known(plan, verdict) if g / a < 0.5]
    elif verdict.error > LARGE:
        dtype = DTYPE_NAMES[plan.dtype]
        words.append(f"off by {verdict.error:.1%}: the inputs nearly cancel, {dtype} can't hold what is left; save it as fp32")
    else:
        words.append(f"off by {verdict.error:.1g}, rounding to {DTYPE_NAMES[plan.dtype]}")
    return "check: " + "; ".join(words)


def _strengths_words(plan: StepPlan, verdict: Verdict) -> str:
    """`asked 0.9 of a, 0.6 of b, got 0.9, 0.6`."""
    known = _known(plan, verdict)
    if not known and not verdict.alike:
        return "nothing was asked for, zeros were written"
    alike = [f"{listed([_name(plan, n) for n in group])} are too alike to be told apart" for group in verdict.alike]
    more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
    asked = ", ".join(f"{a:.3g} of {label}" for label, a, _ in known[:_SHOWN]) + more
    got = f", got {', '.join(f'{g:.3g}' for *_, g in known[:_SHOWN])}" if METHODS[plan.spec.method].is_linear else ""
    words = [f"{'asked' if got else 'holds about'} {asked}{got}"] if known else []
    return "; ".join([*words, *alike])


def _known(plan: StepPlan, verdict: Verdict) -> list[tuple[str, float, float]]:
    """(name, asked, got) of every input whose strength can be told."""
    found = enumerate(zip(verdict.asked, verdict.got, strict=True))
    return [(_name(plan, n), a, g) for n, (a, g) in found if a and not any(n in group for group in verdict.alike)]


def _name(plan: StepPlan, number: int) -> str:
    """An input's, short enough for a line."""
    return shorten(plain(plan.inputs[number].label.removesuffix(".safetensors")), 40)


def methods_text() -> str:
    """The merge methods, from their docstrings and signatures: what they do, where they come from, their parameters."""
    lines = []
    for name, method in METHODS.items():
        parts = paragraphs(method.function.__doc__ or "")
        lines += [*([""] if lines else []), *textwrap.wrap(f"{name}: {parts['']}", 78, subsequent_indent="    ")]
        for title in ("Formula", "Source", "Use"):
            lines += _hanging(f"{title.lower():<9}{' '.join(parts[title].split())}", 13)
        if method.takes:
            lines += _hanging(f"{'takes':<9}exactly {method.takes} LoRAs", 13)
        for p in method.parameters.values():
            allowed = " or ".join(p.choices) if p.choices else str(p.within or "")
            lines += _hanging(f"{p.name}: {p.default}{', ' * bool(allowed)}{allowed}. {p.text}", 8)
    return "\n".join(lines)


def methods_facts() -> dict[str, Any]:
    """The same for JSON: name -> {what, formula, source, use, takes, parameters: name -> {default, allowed, text}}."""
    facts = {}
    for name, method in METHODS.items():
        parts = paragraphs(method.function.__doc__ or "")
        texts = {title.lower(): " ".join(parts[title].split()) for title in ("Formula", "Source", "Use")}
        parameters = {
            p.name: {"default": p.default, "allowed": list(p.choices) or str(p.within or ""), "text": p.text}
            for p in method.parameters.values()
        }
        facts[name] = {"what": parts[""], **texts, "takes": method.takes, "parameters": parameters}
    return facts


def _hanging(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, 78, initial_indent="    ", subsequent_indent=" " * indent, break_long_words=False)


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
