"""What `inspect` tells of a file."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from ..algebra.delta import norm
from ..formats.metadata import read_recipe, trigger_words
from ..formats.reader import LoraFile, TensorReader
from ..plan import DTYPE_NAMES
from ..zimage import MODULES, SECTIONS
from .tables import _span, norm_table


def describe(lora: LoraFile) -> dict[str, Any]:
    """Everything `inspect` knows of a file, ready for JSON.

    Returns:
        file, format (key styles), modules (how many), ranks and alphas (module -> value), dtype, norms (module -> Frobenius norm
        of the change, alpha folded in), skipped, unmatched, trigger_words, base_model, recipe (None without one).
    """
    with TensorReader(lora) as tensors:
        norms = {name: abs(scale) * norm(delta) for name in lora for scale, delta in [tensors.delta(name)]}
    return {
        "file": lora.path.name,
        "format": list(lora.styles),
        "modules": len(lora),
        "ranks": lora.ranks,
        "alphas": {name: alpha for name, (change, *_) in lora.changes.items() if (alpha := change.alpha) is not None},
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
