"""Parsed YAML and JSON in the one form that the schema takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import SettingError, joined
from ..files.text import reading


def plain_keys(value: Any, loc: str = "") -> Any:
    """Without nulls, which AI-Toolkit treats as absent, and with every key as text: layers may be written as integers.

    Args:
        value: As parsed.
        loc: Of the value, for messages: it walks down here.

    Raises:
        SettingError: A key that is no text, or two that are the same text.
    """
    if isinstance(value, list):
        return [plain_keys(v, f"{loc}[{i}]") for i, v in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    plain: dict[str, Any] = {}
    for key, entry in value.items():
        if isinstance(key, bool) or not isinstance(key, int | str):
            raise SettingError(f"a key must be text{reading(key)}", joined(loc, str(key)))
        if str(key) in plain:
            raise SettingError(f"duplicate key {key}: keep one of them", loc)
        if entry is not None:
            plain[str(key)] = plain_keys(entry, joined(loc, str(key)))
    return plain
