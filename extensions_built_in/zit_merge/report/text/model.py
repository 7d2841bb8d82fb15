"""A whole model as text, and how strong LoRAs are in it."""

from __future__ import annotations

from collections.abc import Iterator

from ...analysis.advice import two_digits
from ...analysis.attribution import amount
from ...analysis.model import ModelFacts, SourcesInModel
from ...errors import counted
from ...wording import listed, middle, percent, row, shorten, size_text
from .describe import check_text, merged_from
from .table import norm_table, value_table

_BEYOND = 1.5  # times the rest that rounding is expected to leave: more is something else


def model_text(found: ModelFacts) -> str:
    """A model for people."""
    steps = (found.recipe or {}).get("steps")
    bake = steps[-1].get("bake") if isinstance(steps, list) and steps and isinstance(steps[-1], dict) else None
    base = bake.get("base") if isinstance(bake, dict) else None
    lines = {
        "model": middle(found.file),
        "form": f"{found.form}, {counted(found.files, 'file')}, {size_text(found.bytes)}",
        "tensors": f"{found.tensors} of the transformer" + (f", {found.others} others" if found.others else ""),
        "dtype": ", ".join(f"{name} in {n} tensors" if len(found.dtypes) > 1 else name for name, n in found.dtypes.items()),
        "sizes": f"width {found.sizes['dim']}, {counted(found.sizes['layers'], 'layer')}",
        "title": shorten(found.title or "", 80),
        "base": shorten(str(base), 80) if base else "",
        "merged in": merged_from(found.recipe or {}),
        "check": _check(found),
        "recipe": f"recipe {middle(found.file)} prints it" if found.recipe else "",
    }
    return "\n".join(line for label, text in lines.items() if text for line in row(label, text))


def _check(found: ModelFacts) -> str:
    if not found.check:
        return ""
    reasons = found.check.get("reasons")
    shares = [r["share"] for r in reasons if isinstance(r, dict) and "share" in r] if isinstance(reasons, list) else []
    survives = f"{percent(shares[0])} of the change survives" if shares and isinstance(shares[0], float) else ""
    return "; ".join(filter(None, [survives, check_text(found.check)]))


def sources_text(found: SourcesInModel) -> str:
    """A model beside its base, and the LoRAs in it, for people."""
    lines = [*row("model", middle(found.model)), *row("base", middle(found.base))]
    lines += row("difference", _difference(found))
    for n, source in enumerate(found.sources):
        strength = found.strengths[n]
        many = ", one of many that fit" if any(n in group for group in found.alike) else ""
        told = "none, it changes nothing there" if strength is None else f"strength {amount(strength)}{many}"
        lines += row(f"source {n + 1}", f"{middle(source)}: {told}")
    lines.append("")
    for i, sentence in enumerate(_verdict(found)):
        lines += row("" if i else "verdict", f"- {sentence}")
    if found.norm and not found.sources:
        lines += ["", "norm of the difference, per layer and component", *norm_table(found.norms)]
    for n in range(len(found.sources)):
        lines += _modules(found, n)
    return "\n".join(lines)


def _difference(found: SourcesInModel) -> str:
    equal = f"{found.equal} of {counted(len(found.norms), 'weight')} equal"
    return f"norm {found.norm:.4g}, {equal}" + (
        f", {counted(len(found.vectors), 'norm or bias')} changed" if found.vectors else ""
    )


def _verdict(found: SourcesInModel) -> Iterator[str]:
    if found.equal == len(found.norms):
        yield "every weight is that of the base, bit for bit: no LoRA was baked into this model"
    elif not found.norm:
        yield "every weight has the value that it has in the base: no LoRA was baked into this model"
    elif found.sources:
        rest = f"they leave {percent(found.rest)} of the difference, rounding is expected to leave {percent(found.rounding)}"
        if found.rest <= max(_BEYOND * found.rounding, 0.01):
            yield f"the sources at these strengths, and rounding: {rest}"
        else:
            yield f"there is more than the sources in it: {rest}"
    if found.alike:
        groups = (listed([str(n + 1) for n in group]) for group in found.alike)
        yield f"too alike to be told apart: sources {'; '.join(groups)}"
    if found.vectors:
        energy = sum(v * v for v in found.vectors.values())
        share = percent(energy / (energy + found.norm**2))
        yield f"{share} of the energy of the difference lies in norms, biases and tokens, which no LoRA can hold"


def _modules(found: SourcesInModel, n: int) -> Iterator[str]:
    """Layers x components of one source, or one line where they are equal."""
    values = {m: two_digits(strength) for m, x in found.modules.items() if (strength := x[n]) is not None}
    title = f"strength of source {n + 1} in each module"
    if len(set(values.values())) == 1:
        yield from ("", f"{title}: {next(iter(values.values()))} in all {counted(len(values), 'module')}")
    elif values:
        yield from ("", title, *value_table({m: v if len(v) <= 6 else f"{float(v):.0e}" for m, v in values.items()}))
