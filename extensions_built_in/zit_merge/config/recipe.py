"""What a recipe may hold: what makes a file again, and nothing that says where files go or which code runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import SettingError, joined
from .schema import PROCESS_TYPE, Save

# At the top, and in the mappings below each of these keys; what is not named here is free, such as the parameters of a method.
_KEYS: Mapping[str, tuple[str, ...]] = {
    "": ("type", "made_by", "job", "steps"),
    "steps": (
        *("name", "file", "keep", "method", "params", "rank", "save", "shapes", "allow_unmatched", "confirm_size", "loras"),
        *("base", "base_sha256", "bake"),
    ),
    "loras": (
        *("lora", "sha256", "base", "ratio", "blocks", "layers", "effects", "overrides", "alpha", "qkv", "drop"),
        *("adapter", "trained_on", "strengths", "unmatched", "base_sha256"),
    ),
    "lora": ("extract", "base"),
    "bake": ("base", "format", "dtype", "rounding", "seed", "sha256", "file"),
    "trained_on": ("model", "arch", "adapter"),
    "rank": ("energy", "max", "size_mb", "weigh"),
    "save": tuple(Save.model_fields),
}


def only_recipe(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the recipe in a mapping, the locations of everything else in it).

    Args:
        raw: From the metadata of a file, which anybody may have written.
    """
    others: list[str] = []
    recipe = {"type": PROCESS_TYPE, **_kept(raw, "", "", others)}
    if not re.fullmatch(r"zit_merge [\w.+-]+", str(recipe.get("made_by"))):
        recipe["made_by"] = PROCESS_TYPE  # which makes it a recipe to `run`
    return recipe | {"type": PROCESS_TYPE}, others


def check_recipe(raw: Mapping[str, Any]) -> None:
    """Raises if a section that says what made it, as recipes do, has keys of a config.

    Args:
        raw: A bare section.
    """
    _, others = only_recipe(raw)
    if "made_by" in raw and others:
        remedy = "remove it, or make this a section of your own, without made_by and file"
        raise SettingError(f"no recipe has this key: {remedy}", others[0])


def _kept(table: Mapping[str, Any], owner: str, loc: str, others: list[str]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in table.items():
        here = joined(loc, str(key))
        if key not in _KEYS[owner]:
            others.append(here)
        elif key in _KEYS and isinstance(value, Mapping):
            kept[key] = _kept(value, key, here, others)
        elif key in _KEYS and isinstance(value, list):
            entries = ((f"{here}[{i}]", entry) for i, entry in enumerate(value))
            kept[key] = [_kept(e, key, at, others) if isinstance(e, Mapping) else e for at, e in entries]
        else:
            kept[key] = value
    return kept
