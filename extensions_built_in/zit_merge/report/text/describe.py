"""A file as text: who wrote it, what it changes and how strongly, what is missing and what is odd."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ...analysis.describe import Description
from ...formats.algorithms import BASED, FULL, SET
from ...formats.metadata import base_text
from ...formats.verdict import LARGE
from ...model.zimage import MODULES, SECTIONS
from ...wording import TITLE, listed, middle, percent, ranks_text, row, shorten, squeezed
from .table import norm_table, value_table

_WORDS = 300  # of trigger words and of the numbers of a check, five lines
_NAMED = 6  # LoRAs of a merge
_SENTENCE = 500
_KEY = 60
_BY = {"metadata": "by its metadata", "keys": "by its key style"}


def description_text(found: Description) -> str:
    """A file for people."""
    lines = [line for label, text in _head(found).items() if text for line in row(label, text)]
    for label, key in (("missing", "missing"), ("odd", "odd"), ("open", "questions"), ("noted", "remarks")):
        if getattr(found, key):
            lines.append("")
        for i, sentence in enumerate(getattr(found, key)):
            lines += row("" if i else label, f"- {shorten(sentence, _SENTENCE)}")
    unread = "unread" if set(found.algorithms) & set(BASED) else "broken"
    norms = {m: unread if n is None else n for m, n in found.norms.items()}
    lines += ["", "norm of the change, per layer and component", *norm_table(norms)]
    if len(set(found.ranks.values())) > 1 and "LoRA" in found.algorithms:
        lines += ["", "rank", *value_table({m: str(r) if r < 10**6 else f"{r:.0e}" for m, r in found.ranks.items()})]
    if len(set(found.scales.values())) > 1:
        scales = {m: "mixed" if s is None else _number(s) for m, s in found.scales.items()}
        lines += ["", "alpha / rank, as it is applied", *value_table(scales)]
    return "\n".join(lines)


def _head(found: Description) -> dict[str, str]:
    """Label -> text of the lines that every file has, and of some that it may have."""
    trainer, algorithms = found.trainer, found.algorithms
    version = f" {shorten(trainer.version, 40)}" if trainer and trainer.version else ""
    counts = Counter(MODULES[m].section for m in found.ranks)
    sections = ", ".join(f"{counts[s]} in {s}" for s in (*SECTIONS, "other") if counts[s])
    several = len(algorithms) > 1
    return {
        "file": middle(found.file),
        "made by": f"{trainer.name}{version}, {_BY[trainer.by]}" if trainer else "not recognised",
        "merged from": merged_from(found.recipe or {}),
        "check": check_text(found.check) if found.check else "",
        "format": _styles(found.format),
        "algorithm": ", ".join(f"{name} in {n} modules" if several else name for name, n in algorithms.items()),
        "modules": f"{found.modules} of {len(MODULES)} ({sections})",
        "rank": ranks_text(found.ranks, algorithms),
        "alpha": _alpha(found),
        "alpha/rank": _scales(found.scales.values()),
        "dtype": found.dtype,
        "norm": _norm(found),
        "base model": shorten(found.base_model or "not named", TITLE),
        "trained on": shorten("; ".join(map(base_text, found.base)), _WORDS),
        "trigger words": _words(found.trigger_words),
        "recipe": f"recipe {middle(found.file)} prints it" if found.recipe else "",
        "left out": f"{len(found.skipped)} keys that no merge takes, {_examples(found.skipped)}" if found.skipped else "",
        "unknown": f"{len(found.unmatched)} keys, {_examples(found.unmatched)}" if found.unmatched else "",
    }


def _norm(found: Description) -> str:
    if found.norm is not None:
        return f"{found.norm:.4g}"
    return "unknown without the base model" if set(found.algorithms) & set(BASED) else "unknown, some of it is broken"


def _words(words: Sequence[str]) -> str:
    """As many trigger words as fit, and how many there are."""
    shown: list[str] = []
    for word in words:
        if shown and len(", ".join([*shown, word])) > _WORDS:
            return f"{', '.join(shown)}, ... ({len(words):,} in all)"
        shown.append(shorten(word, _WORDS))
    return ", ".join(shown) or "none named"


def _examples(keys: Sequence[str]) -> str:
    return f"e.g. {', '.join(shorten(key, _KEY) for key in keys[:3])}"


def _styles(styles: Sequence[str]) -> str:
    """Each prefix once, with the endings of its keys."""
    endings: dict[str, list[str]] = defaultdict(list)
    for prefix, _, ending in (style.partition("* ") for style in styles):
        endings[prefix].append(ending)
    return ", ".join(f"{prefix}* {' '.join(own)}" for prefix, own in endings.items())


def merged_from(recipe: Mapping[str, Any]) -> str:
    """`0.9 of me.safetensors and 0.6 of style.safetensors`, as far as a recipe has the form of ours."""
    steps = recipe.get("steps")
    last = steps[-1] if isinstance(steps, list) and steps else None
    loras = last.get("loras") if isinstance(last, Mapping) else None
    pairs = [(x.get("ratio"), x.get("lora")) for x in loras if isinstance(x, Mapping)] if isinstance(loras, list) else []
    named = [f"{float(r):g} of {squeezed(n, 40)}" for r, n in pairs if isinstance(r, int | float) and isinstance(n, str)]
    return listed(named if len(named) <= _NAMED else [*named[: _NAMED - 1], f"{len(named) - _NAMED + 1} more"])


def check_text(check: Mapping[str, Any]) -> str:
    """What the check found when the file was written."""
    asked, got = (shorten(", ".join("-" if v is None else f"{v:g}" for v in check[key]), _WORDS) for key in ("asked", "got"))
    is_cut = check.get("cut", check["error"] > LARGE)
    left = f"{percent(check['kept'])} of the energy kept" if is_cut else f"rounding changed {percent(check['error'])}"
    return f"asked {asked}, got {got} of them; {left}"


def _alpha(found: Description) -> str:
    """The alphas as stored; beside whole factors and differences they are only said to have no meaning."""
    if not found.alphas:
        return "not in the keys"
    idle = set(found.algorithms) <= {"LoKr", FULL, SET} and set(found.scales.values()) == {1.0}
    return _numbers(found.alphas.values()) + (", without a meaning here" if idle else "")


def _scales(scales: Collection[float | None]) -> str:
    """Their span, and that there are modules whose changes have several."""
    known = [s for s in scales if s is not None]
    mixed = ["differs in changes that add up"] if None in scales else []
    return ", ".join([*([_numbers(known)] if known else []), *mixed])


def _number(value: float) -> str:
    """In six letters at most: 0.125, 1e-05, 1e+10."""
    text = f"{value:.3g}"
    return text if len(text) <= 6 else f"{value:.0e}"


def _numbers(values: Iterable[float | None]) -> str:
    """`0.5`, or `0.25 to 2`."""
    distinct = {math.inf if v is None else v for v in values}
    low, high = f"{min(distinct):.6g}", f"{max(distinct):.6g}"
    return low if low == high else f"{low} to {high}"
