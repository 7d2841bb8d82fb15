"""A step that is done: whether it is right, what went in, what came out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...algebra.methods import METHODS
from ...formats.header import DTYPES as CONFIG_NAMES
from ...formats.verdict import LARGE, LOST, STRONGER, Reason, Verdict
from ...merging.made import Baked, Done
from ...planning.types import StepPlan
from ...wording import aligned, beside, columns, copyable, listed, percent, size_text, span, squeezed, wrapped
from .plan import NAME, model_facts, names_of, numbers_of, step_name, written
from .table import COLUMN, short, value_table

_SHOWN = 10  # LoRAs in the table of what went in
_EVEN = 0.98  # share of every module that survives: less in one of them shows all
_NAMED = 3  # LoRAs in a sentence


def done_text(done: Done) -> str:
    """A step that was made: whether it is right, what went in, what came out; or that its file was there already."""
    models = [_model_text(done.plan, done.baked)] if done.baked else []
    return "\n".join([*([_lora_text(done)] if done.is_lora else []), *models])


def _model_text(plan: StepPlan, baked: Baked) -> str:
    """A whole model that was written: how much of the change it holds, what went in."""
    assert plan.bake, "the step bakes"
    verdict = baked.verdict
    if not baked.made:
        kept = f"kept {squeezed(baked.path.name, NAME - 2)} (made before by the same recipe)"
        return "\n".join(wrapped(f"{kept}, {verdict_text(plan, verdict)}", 0))
    lines = [*wrapped(f"{step_name(plan)}, baked, is {verdict_text(plan, verdict)}", 0), "", *_went_in(plan, verdict), ""]
    lines += [*beside("  wrote ", model_facts(plan.bake)), f"    {copyable(baked.path)}"]
    if not plan.cut and verdict.error > LARGE:
        lines += wrapped(f"rounding adds noise of {percent(verdict.error)} of the change", 4)
    for remark in baked.remarks:
        lines += wrapped(f"  note: {remark}", 4)
    if baked.shares and min(baked.shares.values()) < _EVEN:
        table = value_table({m: f"{100 * share:.1f}" for m, share in baked.shares.items()})
        lines += ["", "  share of the change that survives, in percent", *(f"  {line}" for line in table)]
    return "\n".join(lines) + "\n"


def _lora_text(done: Done) -> str:
    plan, verdict = done.plan, done.verdict
    if not done.made:
        kept = f"kept {squeezed(done.path.name, NAME - 2)} (made before by the same recipe)"
        return "\n".join(wrapped(f"{kept}, {verdict_text(plan, verdict)}" if verdict else kept, 0))
    assert verdict is not None, "every file that is made is checked"
    lines = [*wrapped(f"{step_name(plan)} is {verdict_text(plan, verdict)}", 0), "", *_went_in(plan, verdict), ""]
    size = size_text(done.path.stat().st_size if plan.spec.keep else plan.bytes)  # the latter file is gone soon
    if plan.spec.keep:
        lines += [*beside("  wrote ", [*written(plan), size]), f"    {copyable(done.path)}"]
    else:
        lines += beside("  made for later steps ", [*written(plan), size])
    if plan.spec.copy_to:
        lines += ["  copied to", f"    {copyable(plan.targets[1].parent)}"]
    if plan.cut and verdict.errors:
        lines += _energy_kept(verdict)
    if plan.spec.rank_rule:
        lines += [f"  {line}".rstrip() for line in _rank_tables(plan, verdict)]
    for remark in done.remarks:
        lines += wrapped(f"  note: {remark}", 4)
    return "\n".join(lines) + "\n"  # the report of the next step is apart


def verdict_text(plan: StepPlan, verdict: Verdict) -> str:
    """The status of a result with its reasons, such as `right: as asked, rounding to bf16 changed 0.2 %`.

    Args:
        plan: The step.
        verdict: Of its file.
    """
    return "; ".join(_reason_text(plan, verdict.status, reason) for reason in verdict.reasons) or verdict.status


def _reason_text(plan: StepPlan, status: str, reason: Reason) -> str:
    dtype, kind, error = plan.dtype_name, reason["kind"], reason.get("error", 0.0)
    if kind in ("survives", "rounded_away"):
        share = f"{percent(reason['share'])} of the change survives rounding to {_model_dtype(plan)}"
        cure = "set rounding: stochastic or dtype: fp32" if reason["share"] < 1 else "set dtype: fp32"
        return f"{status}: {share}" + (f"; {cure}, or keep the LoRA apart" if kind == "rounded_away" else "")
    if kind == "cancelling":
        return f"{status} by {percent(error)}: the inputs nearly cancel, {dtype} can't hold what is left; save it as fp32"
    if kind in ("lost", "stronger"):
        return f"{status}: {_of_inputs(plan, reason, dtype)}"
    if kind == "capped":
        share = f"{percent(reason['kept'])} of the energy where {percent(reason['asked'])} was asked for"
        return f"{status}: as far as max {reason['max']} allows, {share}"
    sentences = {
        "cancelled": "the inputs cancel out, zeros were written",
        "nothing_asked": "nothing was asked for, zeros were written",
        "base_alone": "nothing was asked for, the base was written as it is",
        "cut": f"as asked, as far as rank {span(plan.ranks.values() or [0])} holds it",
        "rounding": f"as asked, rounding to {dtype} changed {percent(error)}",
    }
    return f"{status}: {sentences.get(kind, kind)}"


def _model_dtype(plan: StepPlan) -> str:
    assert plan.bake, "the step bakes"
    base = plan.bake.base
    return plan.bake.spec.dtype or (CONFIG_NAMES.get(base.dtype_name, base.dtype_name) if base else "its dtype")


def _of_inputs(plan: StepPlan, reason: Reason, dtype: str) -> str:
    """What happened to the inputs of a reason, and what helps."""
    names, is_one, is_cut = _named(plan, reason["inputs"]), len(reason["inputs"]) == 1, reason["cut"]
    if reason["kind"] == "stronger":
        return f"{names} came out stronger than asked, {'a larger rank' if is_cut else 'fp32'} holds what was asked for"
    are, them = ("is", "it") if is_one else ("are", "them")
    cure = f"a larger rank keeps {them}" if is_cut else f"{dtype} can't hold {them} beside the others; save it as fp32"
    return f"{names} {are} mostly {'cut away' if is_cut else 'lost'}, {cure}"


def _named(plan: StepPlan, members: Sequence[int]) -> str:
    """`me and style`, `a, b, c and 27 more`."""
    names = [squeezed(plan.inputs[n].label.removesuffix(".safetensors"), NAME) for n in members]
    return listed(names if len(names) <= _NAMED + 1 else [*names[:_NAMED], f"{len(names) - _NAMED} more"])


def _went_in(plan: StepPlan, verdict: Verdict) -> Iterator[str]:
    """Every input with what was asked of it and what the file holds; of many the strongest."""
    shown, values = _strongest(plan, verdict), _values(plan, verdict)
    names, numbers = names_of(plan, 44), numbers_of(plan)
    heads, cells = list(values), [aligned([column[n] for n in shown]) for column in values.values()]
    width = columns(f"  {numbers[0]}{names[0]}")
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
    count, told = len(plan.inputs), set(() if plan.spec.checkpoints else verdict.told)

    def first(n: int) -> tuple[bool, float]:
        is_off = n in told and not LOST <= verdict.share(n) <= STRONGER
        return not is_off, -abs(plan.inputs[n].spec.ratio)

    return range(count) if count <= _SHOWN else sorted(range(count), key=first)[:_SHOWN]


def _values(plan: StepPlan, verdict: Verdict) -> dict[str, list[str]]:
    """Heading -> a text for each input."""
    if plan.spec.checkpoints:  # alike by nature
        return {"ratio": [short(i.spec.ratio) for i in plan.inputs]}
    alike = {n for group in verdict.alike for n in group}

    def texts(values: Sequence[float | None]) -> list[str]:
        return ["-" if v is None else "?" if n in alike else short(v) for n, v in enumerate(values)]

    if not METHODS[plan.spec.method].is_linear:
        return {"holds about": texts(verdict.got)}
    asked = texts(verdict.asked)
    if plan.spec.method == "sum":  # what was asked of inputs that are alike is in the config
        asked = [short(i.spec.ratio) if text == "?" else text for i, text in zip(plan.inputs, asked, strict=True)]
    return {"asked": asked, "got": texts(verdict.got)}


def _wide(head: str) -> int:
    return max(len(head), COLUMN)


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
