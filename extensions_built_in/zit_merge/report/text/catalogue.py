"""Catalogues: merge methods and presets."""

from __future__ import annotations

import textwrap
from typing import Any

import yaml

from ...algebra.methods import METHODS
from ...algebra.parameters import paragraphs
from ...config.presets import presets
from ...model.strengths import TABLES


def methods_text() -> str:
    """The merge methods, from their docstrings and signatures: what they do, where they come from, their parameters."""
    lines: list[str] = []
    for name, method in METHODS.items():
        parts = paragraphs(method.doc)
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
        parts = paragraphs(method.doc)
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
        tables = (
            f"{table}: {yaml.safe_dump(v, default_flow_style=True, width=1000).strip()}"
            for table in TABLES
            if (v := getattr(preset, table))
        )
        lines.append(name)
        for text in (*tables, preset.idea):
            lines += textwrap.wrap(text, 78, initial_indent="    ", subsequent_indent="      ")
    return "\n".join(lines)
