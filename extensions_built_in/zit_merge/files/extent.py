"""Documents that can be walked through: not without end, and in a time that their text explains."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

TOO_DEEP = "is nested too deeply, or contains itself: write it in fewer levels"
_LEVELS = 64
_ALIASES = 20_000  # values that aliases may add, and ten times those that are written


class ExtentError(ValueError):
    """A document contains itself, is nested too deeply, or its aliases multiply."""


def read_json(text: str) -> Any:
    """What a JSON text of another program holds.

    Raises:
        ValueError: It is no JSON, or nested too deeply.
    """
    try:
        found = json.loads(text.removeprefix("\ufeff"))
    except RecursionError:
        raise ExtentError(TOO_DEEP) from None
    check_extent(found)
    return found


def check_extent(value: Any) -> None:
    """Raises unless a document can be walked through.

    Args:
        value: Data, or the nodes of YAML before they are made data.

    Raises:
        ExtentError: The sentence goes behind the document's name.
    """
    extents: dict[int, tuple[int, int] | None] = {}
    written = 1

    def extent(value: Any, depth: int) -> tuple[int, int]:
        """(values with aliases written out, levels)."""
        nonlocal written
        if not (children := _children(value)):
            return 1, 0
        found = extents.get(id(value), (0, 0))
        if found == (0, 0) and depth < _LEVELS:
            extents[id(value)] = None  # until it is done
            written += len(children)
            parts = [extent(child, depth + 1) for child in children]
            found = extents[id(value)] = 1 + sum(size for size, _ in parts), 1 + max(levels for _, levels in parts)
        if not found or not found[0] or depth + found[1] > _LEVELS:
            raise ExtentError(TOO_DEEP)
        return found

    size, _ = extent(value, 0)
    if size > _ALIASES + 10 * written:
        raise ExtentError(f"has aliases (*) that stand for {size:.3g} values: write fewer")


def _children(value: Any) -> list[Any]:
    """Of data or of a node; empty where it has none."""
    if isinstance(value, yaml.MappingNode):
        return [node for pair in value.value for node in pair]
    if isinstance(value, yaml.SequenceNode | list | tuple):
        return list(value.value if isinstance(value, yaml.Node) else value)
    return list(value.values()) if isinstance(value, Mapping) else []
