"""pydantic's errors in the words of a config."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from pydantic import BaseModel, ValidationError

from ..errors import SettingError, joined, nearest
from ..files.text import reading

_FORMS = {
    "name": "letters, digits, _ . and - are",
    "preset": "letters, digits, _ . and - are",
    "prompts": "any text but an empty one is",
    "metrics": "any text but an empty one is",
    "device": "auto, cpu, cuda, cuda:N and mps are",
    **dict.fromkeys(("sha256", "base_sha256"), "64 hexadecimal digits are"),
    **dict.fromkeys(("base", "extract"), "any text but an empty one is"),
    "file": "a file name that ends in .safetensors is",
}
_HOST_KEYS = (
    "sqlite_db_path",
    "performance_log_every",
    "model",
    "datasets",
    "sample",
    "train",
    "trigger_word",
    "logging",
    "training_folder",
)
_RECIPE_KEYS = ("job", "made_by", "file", "strengths", "unmatched", "adapter", "trained_on", "base_sha256")
# What keys take that may have one form or another.
_EITHER = {
    "bake": "true, false or a mapping, such as {base: trainer}",
    "layers": "ranges, such as {0-9: 0.5}, or 30 numbers",
    "preview": "true, false or a mapping, such as {size: 768}",
    "sweep": "a mapping of one key or two, such as {ratio: [0.5, 1.0]}",
    "ablate": "a mapping, such as {by: layers}",
    "prompts": "a list of prompts, or a text file with one on each line",
    "seed": "a whole number from 0 to 2^63 - 1, or a list of them",
    "size": "a side in pixels, or [width, height]",
}
_SHOWN = 100  # letters of a value that a message repeats
_OF_FORM = ("dict_type", "list_type", "model_type", "int_type", "string_type", "too_short", "too_long")


def setting_error(
    error: ValidationError, owners: Mapping[str, type[BaseModel]], top: type[BaseModel], written: object = None
) -> SettingError:
    """One of pydantic's errors in our words: an unknown key before a missing one, since it is often the same mistake; then the
    innermost, since a number or a list is tried as both.

    Args:
        error: What pydantic found.
        owners: Key -> the model of what lies below it, for the keys that are known there.
        top: The model of what lies below none of these.
        written: What was checked, as it was before its nulls were left out.
    """
    first = min(error.errors(), key=lambda e: (e["type"] != "extra_forbidden", -len(_path(e["loc"]))))
    loc = _path(first["loc"])
    where = ""
    for part in loc:
        where = f"{where}[{part}]" if isinstance(part, int) else joined(where, str(part))
    if first["type"] == "extra_forbidden":
        return SettingError(_unknown(loc, owners, top), where)
    hint = ""
    if first["type"] == "missing" and _is_null(written, loc):
        hint = ", YAML reads what is written there as null: write a value, in quotes if it is the word itself"
    elif first["type"] == "missing" and loc[-1] == "ratio":
        hint = " (the strength of this LoRA, such as ratio: 1.0)"
    return SettingError(f"{_trouble(first, loc)}{hint}", where)


def _trouble(error: Mapping[str, Any], loc: Sequence[int | str]) -> str:
    """What is wrong with the value at a location."""
    kind, limits, value = error["type"], error.get("ctx", {}), repr(error["input"])
    value = value if len(value) <= _SHOWN else f"{value[:_SHOWN]}..."
    if isinstance(error["input"], date):
        value = str(error["input"])
    if kind in _OF_FORM and loc and loc[-1] in _EITHER:
        return f"must be {_EITHER[loc[-1]]}, not {value}"
    form = _FORMS.get(next((part for part in reversed(loc) if isinstance(part, str)), ""), "another form is")
    messages = {
        "missing": "is missing",
        "float_type": f"must be a number, not {value}",
        "int_type": f"must be a whole number, not {value}",
        "finite_number": f"must be a finite number, not {value}",
        "string_type": f"must be text, not {value}{reading(error['input'])}",
        "bool_type": f"must be true or false, not {value}",
        "list_type": f"must be a list, not {value}",
        "dict_type": f"must be a mapping, not {value}",
        "model_type": f"must be a mapping, not {value}",
        "too_short": "must have at least one entry",
        "greater_than_equal": f"must be at least {limits.get('ge')}, not {value}",
        "less_than_equal": f"must be at most {limits.get('le')}, not {value}",
        "literal_error": f"must be {limits.get('expected')}, not {value}",
        "string_pattern_mismatch": f"has a form that is not allowed: {value} ({form} allowed)",
    }
    return messages.get(kind) or str(error["msg"]).removeprefix("Value error, ")


def _is_null(written: object, loc: Sequence[int | str]) -> bool:
    """Whether the key is written without a value, which counts as missing."""
    for part in loc[:-1]:
        written = written[part] if isinstance(written, Mapping | list) else None  # type: ignore[index]
    return isinstance(written, Mapping) and loc[-1] in written


def _unknown(loc: Sequence[int | str], owners: Mapping[str, type[BaseModel]], top: type[BaseModel]) -> str:
    """The message for a key that the schema does not have at its place."""
    owner, key = next((owners[str(part)] for part in reversed(loc[:-1]) if part in owners), top), str(loc[-1])
    if owner is top and "steps" in owners and key in owners["steps"].model_fields and key not in _RECIPE_KEYS:
        return "belongs to a step, not to the section: move it into one"
    shown = [k for k in owner.model_fields if k not in (*_HOST_KEYS, *_RECIPE_KEYS)]
    return f"unknown key{nearest(key, shown)}; known here: {', '.join(shown)}"


def _path(loc: Sequence[int | str]) -> list[int | str]:
    """A location without the names that pydantic gives to alternatives of a union: `int`, `list[float]`, `constrained-str`."""
    alternative = r"float|int|str|Extract|constrained-\w+|(list|dict|function-\w+|union|nullable)\[.*\]"
    return [part for part in loc if not (isinstance(part, str) and re.fullmatch(alternative, part))]
