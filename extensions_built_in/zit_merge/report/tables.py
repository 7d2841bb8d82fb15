"""Plans and files as text that fits 80 columns, in ASCII (on Windows AI-Toolkit's log is not UTF-8)."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..algebra.methods import METHODS
from ..algebra.parameters import paragraphs
from ..config.presets import is_file, origin_of, presets
from ..config.schema import RankRule
from ..errors import counted
from ..merging.runner import Done
from ..merging.verify import Verdict
from ..model import zimage
from ..model.strengths import row_name, runs
from ..model.zimage import COMPONENTS, OTHER, SECTIONS
from ..planning.plan import DTYPE_NAMES, Input, StepPlan
from ..planning.training import LoraSpec
from ..wording import WIDTH, aligned, beside, copyable, listed, percent, ranges, squeezed, wrapped

LARGE = 0.05  # an error of rounding that a person should hear of: usually 0.002 in bf16
_SHOWN = 10  # LoRAs in the table of what went in
_NAMED = 3  # LoRAs in a sentence
_NAME = 40  # letters of a name in a sentence
_COLUMN = 6  # letters in a cell
_TABLE = 74  # in a table
_ITS_RATIO = "everywhere its ratio"


def plan_text(plan: StepPlan) -> str:
    """One step as the dry run shows it: what goes in, how strong, what comes out, what else there is to know."""
    lines = [*wrapped(f"step {_step(plan)}: {_what_is_done(plan)}", 0), *_inputs(plan), *_strengths(plan), ""]
    size = f"{plan.bytes / 1e6:,.1f} MB{' at most' if plan.is_open else ''}" if plan.bytes else "size not known yet"
    if plan.spec.keep:
        lines += [*beside("  writes ", [*_written(plan), size]), f"    {copyable(plan.path)}"]
    else:
        lines += beside("  makes ", [*_written(plan), size, "for later steps only (keep: false)"])
    if plan.spec.copy_to:
        lines += ["  and a copy in", f"    {copyable(plan.targets()[1].parent)}"]
    lines += [""] * bool(plan.notes)
    for note in plan.notes:
        lines += wrapped(f"note: {note}")
    return "\n".join(lines)


def _step(plan: StepPlan) -> str:
    return squeezed(plan.name, _NAME)


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
    numbers = _numbers(plan)
    room = WIDTH - len(f"  {numbers[0]}  ratio {ratios[0]}  ") - max(len(", ".join(parts)) for parts in facts)
    names = _names(plan, min(max(room, 32), 48))
    left = (f"  {number}{name}  ratio {ratio}  " for number, name, ratio in zip(numbers, names, ratios, strict=True))
    return [line for first, parts in zip(left, facts, strict=True) for line in beside(first, parts)]


def _numbers(plan: StepPlan) -> list[str]:
    """What each input is called beside its name: nothing where there is only one."""
    count = len(plan.inputs)
    return [f"{n:>{len(str(count))}}  " if count > 1 else "" for n in range(1, count + 1)]


def _names(plan: StepPlan, most: int) -> list[str]:
    """The inputs' names, of one width and of so many letters at most."""
    names = [squeezed(i.label, most) for i in plan.inputs]
    width = max(map(len, names))
    return [f"{name:<{width}}" for name in names]


def _known_of(i: Input) -> list[str]:
    """`240 modules`, `rank 32`, `bf16`."""
    if not i.outline.ranks:
        return ["still on the hub"]
    facts = [counted(len(i.outline.ranks), "module"), _ranks(i.outline), DTYPE_NAMES[i.outline.dtype]]
    return facts if i.lora or i.step else [*facts, "still to be trained"]


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
        return f"LoRA {members[0] + 1} ({squeezed(plan.inputs[members[0]].label, _NAME)})"
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
    return squeezed(Path(preset).name if is_file(preset) else preset, 20)


def _present(i: Input) -> Collection[str]:
    """The modules that a LoRA has; all that it may have while it is still on the hub."""
    return i.outline.ranks or zimage.MODULES


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
    origins = origin_of(i.spec.chosen, own)
    return _table(
        lambda section: [(a, b) for a, b, _ in runs(origins, section)],
        lambda module: "." if origins[module] == "-" else origins[module],
        _present(i),
    )


def _table(
    rows: Callable[[str], Sequence[tuple[int, int]]], value: Callable[[str], float | str], present: Collection[str]
) -> list[str]:
    heads, lines = ["adaLN" if c == "adaLN_modulation" else c for c in COMPONENTS], []
    for section in SECTIONS:
        for first, last in rows(section):
            cells = [[m for i in range(first, last + 1) if (m := _module(section, i, c)) in present] for c in COMPONENTS]
            if any(cells):
                lines.append([row_name(section, first, last), *(_short(value(here[0])) if here else "-" for here in cells)])
    layers, *columns = zip(*lines, strict=True) if lines else [()] * (1 + len(heads))
    columns = [_column(head, texts) for head, texts in zip(heads, columns, strict=True)]
    lines = ["".join(cells).rstrip() for cells in zip([f"{name:<18}" for name in ("layer", *layers)], *columns, strict=True)]
    others = [f"{o} {_short(value(m))}" for o in OTHER if (m := zimage.at("other", 0, o).name) in present]
    return lines + (beside("other: ", others, _TABLE) if others else [])


def _column(head: str, texts: Sequence[str]) -> list[str]:
    """A column of seven letters; the units are below each other where there is room for it."""
    cells = aligned(texts) if texts else []
    return [f"{cell:>{_COLUMN + 1}}" for cell in (head, *(cells if cells and len(cells[0]) <= _COLUMN else texts))]


def _short(value: float | str) -> str:
    """In six letters, with as many digits as they hold; texts as they are."""
    if isinstance(value, str):
        return value
    texts = (f"{value:.3g}", f"{value:.0f}" if abs(value) >= 1 else "", f"{value:.2g}", f"{value:.1g}", f"{value:.0e}")
    texts = (text.replace("e+", "e") if len(text) > _COLUMN else text for text in texts)
    return next((text for text in texts if text and len(text) <= _COLUMN), "-0")  # above -1e-99, which has seven letters


def _ranks(outline: LoraSpec) -> str:
    """`rank 32`, `LoKr of rank 3840 at most`."""
    rank = f"rank {ranks_text(outline.ranks, outline.algorithms)}"
    return rank if outline.is_lora else f"{' and '.join(outline.algorithms)} of {rank}"


def _written(plan: StepPlan) -> list[str]:
    """`240 modules`, `rank 32`, `bf16`."""
    if not all(i.outline.ranks for i in plan.inputs):
        return ["what the files on the hub will tell"]
    modules = counted(len(plan.shapes or plan.stacked), "module")
    rank = "a LoKr as before" if plan.spec.save.keep_lokr else f"rank {span(plan.ranks.values())}"
    rank += " at most" if plan.is_open else ""
    form = [f"format {plan.spec.save.format}"] if plan.spec.save.format != "ai-toolkit" else []
    return [modules, rank, DTYPE_NAMES[plan.dtype], *form]


def _module(section: str, index: int, component: str) -> str:
    return zimage.at(section, index, component).name if component in zimage.section_components(section) else ""


def ranks_text(ranks: Mapping[str, int], algorithms: Iterable[str]) -> str:
    """`32`, `4-32`, `3840 at most` where not all of it is LoRA."""
    return span(ranks.values()) + (" at most" if set(algorithms) - {"LoRA"} else "")


def span(values: Collection[int]) -> str:
    """`32`, or `4-32` where they differ."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def done_text(done: Done) -> str:
    """A step that was made: whether it is right, what went in, what came out; or that its file was there already."""
    plan, verdict = done.plan, done.verdict
    if not done.made:
        kept = f"kept {squeezed(done.path.name, _NAME - 2)} (made before by the same recipe)"
        return "\n".join(wrapped(f"{kept}, {judgement(plan, verdict)}" if verdict else kept, 0))
    lines = [*wrapped(f"{_step(plan)} is {judgement(plan, verdict)}", 0), "", *_went_in(plan, verdict), ""]
    size = f"{(done.path.stat().st_size if plan.spec.keep else plan.bytes) / 1e6:,.1f} MB"  # the latter file is gone soon
    if plan.spec.keep:
        lines += [*beside("  wrote ", [*_written(plan), size]), f"    {copyable(done.path)}"]
    else:
        lines += beside("  made for later steps ", [*_written(plan), size])
    if plan.spec.copy_to:
        lines += ["  copied to", f"    {copyable(plan.targets()[1].parent)}"]
    if plan.cut and verdict.errors:
        lines += _energy_kept(verdict)
    if isinstance(plan.spec.rank, RankRule):
        lines += [f"  {line}".rstrip() for line in _rank_tables(plan, verdict)]
    return "\n".join(lines) + "\n"  # the report of the next step is apart


def judgement(plan: StepPlan, verdict: Verdict) -> str:
    """`right`, `off` or `empty`, and why: `right: as asked, rounding to bf16 changed 0.2 %`."""
    dtype, rule = DTYPE_NAMES[plan.dtype], plan.spec.rank
    if not verdict.cut and verdict.error > LARGE:
        return f"off by {percent(verdict.error)}: the inputs nearly cancel, {dtype} can't hold what is left; save it as fp32"
    if not _holds_anything(verdict):
        why = "the inputs cancel out" if any(verdict.asked) or verdict.alike else "nothing was asked for"
        return f"empty: {why}, zeros were written"
    if lost := [n for n in _told(verdict) if _share_of_asked(plan, verdict, n) < 0.5]:
        are, them = ("is", "it") if len(lost) == 1 else ("are", "them")
        cure = f"a larger rank keeps {them}" if verdict.cut else f"{dtype} can't hold {them} beside the others; save it as fp32"
        return f"off: {_named(plan, lost)} {are} mostly {'cut away' if verdict.cut else 'lost'}, {cure}"
    if loud := [n for n in _told(verdict) if _share_of_asked(plan, verdict, n) > 1.5]:
        cure = "a larger rank" if verdict.cut else "fp32"
        return f"off: {_named(plan, loud)} came out stronger than asked, {cure} holds what was asked for"
    if verdict.cut and isinstance(rule, RankRule) and rule.energy and verdict.kept < rule.energy:
        share = f"{percent(verdict.kept)} of the energy where {percent(rule.energy)} was asked for"
        return f"right: as far as max {rule.max} allows, {share}"
    if verdict.cut:
        return f"right: as asked, as far as rank {span(plan.ranks.values())} holds it"
    return f"right: as asked, rounding to {dtype} changed {percent(verdict.error)}"


def _holds_anything(verdict: Verdict) -> bool:
    """Of a verdict that was read from a file, as far as its strengths tell."""
    if verdict.modules:
        return any(measured.written for measured in verdict.modules.values())
    return any(verdict.got) or bool(verdict.alike)


def _told(verdict: Verdict) -> list[int]:
    """The inputs whose strength can be told."""
    return [n for n, asked in enumerate(verdict.asked) if asked and not any(n in group for group in verdict.alike)]


def _share_of_asked(plan: StepPlan, verdict: Verdict, n: int) -> float:
    """Got over asked; 1 for averages: what a cut takes from one save, it takes from its neighbours too."""
    return 1.0 if plan.spec.checkpoints else verdict.got[n] / verdict.asked[n]


def _named(plan: StepPlan, members: Sequence[int]) -> str:
    """`me and style`, `a, b, c and 27 more`."""
    names = [squeezed(plan.inputs[n].label.removesuffix(".safetensors"), _NAME) for n in members]
    return listed(names if len(names) <= _NAMED + 1 else [*names[:_NAMED], f"{len(names) - _NAMED} more"])


def _went_in(plan: StepPlan, verdict: Verdict) -> Iterator[str]:
    """Every input with what was asked of it and what the file holds; of many the strongest."""
    shown, columns = _strongest(plan, verdict), _columns(plan, verdict)
    names, numbers = _names(plan, 44), _numbers(plan)
    heads, cells = list(columns), [aligned([column[n] for n in shown]) for column in columns.values()]
    width = len(f"  {numbers[0]}{names[0]}")
    yield f"  {'went in':<{width - 2}}" + "".join(f"  {head:>{_wide(head)}}" for head in heads)
    for at, n in enumerate(shown):
        texts = (f"  {column[at]:>{_wide(head)}}" for head, column in zip(heads, cells, strict=True))
        yield f"  {numbers[n]}{names[n]}{''.join(texts)}".rstrip()
    if len(shown) < len(plan.inputs):
        yield f"  and {len(plan.inputs) - len(shown)} more, none with a larger ratio"
    if zero := [n for n in shown if verdict.asked[n] is None and plan.inputs[n].spec.ratio]:
        yield from wrapped(f"-: {_named(plan, zero)} {'changes' if len(zero) == 1 else 'change'} nothing, all zeros")
    for group in verdict.alike:
        yield from wrapped(f"?: {_named(plan, group)} are too alike to be told apart")


def _strongest(plan: StepPlan, verdict: Verdict) -> Sequence[int]:
    """The inputs that are shown: all of them, or those that came out wrong and those of the largest ratios."""
    count, told = len(plan.inputs), set(_told(verdict))

    def first(n: int) -> tuple[bool, float]:
        is_off = n in told and not 0.5 <= _share_of_asked(plan, verdict, n) <= 1.5
        return not is_off, -abs(plan.inputs[n].spec.ratio)

    return range(count) if count <= _SHOWN else sorted(range(count), key=first)[:_SHOWN]


def _columns(plan: StepPlan, verdict: Verdict) -> dict[str, list[str]]:
    """Heading -> a text for each input."""
    if plan.spec.checkpoints:  # alike by nature
        return {"ratio": [_short(i.spec.ratio) for i in plan.inputs]}
    alike = {n for group in verdict.alike for n in group}

    def texts(values: Sequence[float | None]) -> list[str]:
        return ["-" if v is None else "?" if n in alike else _short(v) for n, v in enumerate(values)]

    if not METHODS[plan.spec.method].is_linear:
        return {"holds about": texts(verdict.got)}
    asked = texts(verdict.asked)
    if plan.spec.method == "sum":  # what was asked of inputs that are alike is in the config
        asked = [_short(i.spec.ratio) if text == "?" else text for i, text in zip(plan.inputs, asked, strict=True)]
    return {"asked": asked, "got": texts(verdict.got)}


def _wide(head: str) -> int:
    return max(len(head), _COLUMN)


def _energy_kept(verdict: Verdict) -> list[str]:
    module, error = max(verdict.errors.items(), key=lambda item: item[1])
    return wrapped(f"{percent(verdict.kept)} of the energy kept, least in {module}: {percent(1 - error**2)}")


def _rank_tables(plan: StepPlan, verdict: Verdict) -> Iterator[str]:
    """What a rule for the rank left of every module, and the rank that it got."""
    yield from ("", "energy kept, in percent", *value_table({m: _share(1 - e**2) for m, e in verdict.errors.items()}))
    if not plan.spec.save.uniform:
        yield from ("", "rank", *value_table({m: str(r) for m, r in plan.ranks.items()}))


def _share(share: float) -> str:
    """In percent; not 100 unless it is."""
    return "100" if share >= 1 - 1e-12 else f"{min(100 * share, 99.9):.1f}"


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
