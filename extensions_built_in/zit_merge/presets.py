"""Shipped presets: named sets of strength keys, read from presets.yaml and put under the user's own, entry by entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from . import zimage
from .errors import ZitMergeError, nearest
from .weights import Depth, Weights, strengths

# Any two primes: the strength of a module whose entries have them for values is a product that says which ones decide it.
_FROM_PRESET, _OWN = 2, 3


@dataclass(frozen=True)
class Preset:
    """One shipped preset: the strength keys as in a config, with every key as text.

    Attributes:
        idea: Whose idea it is, one line.
    """

    idea: str
    blocks: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, Depth] = field(default_factory=dict)
    effects: Mapping[str, float] = field(default_factory=dict)
    overrides: Mapping[str, float] = field(default_factory=dict)


_TABLES = ("blocks", "layers", "effects", "overrides")


@cache
def presets() -> Mapping[str, Preset]:
    """Every shipped preset, in the order of the file."""
    raw = yaml.safe_load(Path(__file__).with_name("presets.yaml").read_text(encoding="utf-8"))
    return {name: Preset(**{key: _plain(value) for key, value in entry.items()}) for name, entry in raw.items()}


def _plain(value: Any) -> Any:
    """As a config's values are once they are validated: keys are text, numbers are floats."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return float(value) if isinstance(value, int) else value


def preset_names() -> list[str]:
    """The names of the shipped presets, in the order of the file."""
    return list(presets())


def expand(preset: str, own: Mapping[str, Mapping[str, Any] | Sequence[float]], place: str) -> dict[str, Any]:
    """A preset with the user's own entries on top.

    Args:
        preset: Its name.
        own: The user's `blocks`, `layers`, `effects`, `overrides`, as far as they are there. A list of 30 layers counts as 30
            entries of one layer each.
        place: Of the LoRA, for messages.

    Returns:
        All four tables, for `Weights`.

    Raises:
        ZitMergeError: There is no such preset.
    """
    shipped = _named(preset, place)
    return {table: _union(getattr(shipped, table), _entries(own.get(table, {}))) for table in _TABLES}


def origin_of(preset: str, own: Mapping[str, Mapping[str, Any] | Sequence[float]], place: str = "weights") -> dict[str, str]:
    """Where the strength of each of the 276 modules comes from.

    Args:
        preset: The preset's name.
        own: The user's tables, as for `expand`.
        place: Of the LoRA, for messages.

    Returns:
        Module -> "preset", "own", "both", or "-" where no entry names it.

    Raises:
        ZitMergeError: As `expand` and `weights.strengths`.
    """
    labels: dict[str, Any] = {}
    for table, entries in expand(preset, own, place).items():
        mine = _entries(own.get(table, {}))
        labels[table] = {key: _OWN if key in mine else _FROM_PRESET for key in entries} if isinstance(mine, Mapping) else mine
    # The winners are those of `strengths`, whatever its rules: it only multiplies the values of the entries that decide.
    # Few small primes are multiplied, so the products are exact.
    products = strengths(Weights(1.0, **labels, place=place))
    words = {(True, True): "both", (True, False): "preset", (False, True): "own", (False, False): "-"}
    return {name: words[product % _FROM_PRESET == 0, product % _OWN == 0] for name, product in products.items()}


def _named(preset: str, place: str) -> Preset:
    if preset in presets():
        return presets()[preset]
    names = preset_names()
    raise ZitMergeError(f"{place}.preset: no such preset: {preset!r}{nearest(preset, names)}; there are {', '.join(names)}")


def _entries(table: Mapping[str, Any] | Sequence[float]) -> Mapping[str, Any] | Sequence[float]:
    """A list of 30 layers as 30 entries."""
    if isinstance(table, Mapping) or len(table) != zimage.N_LAYERS:
        return table
    return {str(layer): factor for layer, factor in enumerate(table)}


def _union(shipped: Mapping[str, Any], mine: Mapping[str, Any] | Sequence[float]) -> Any:
    """Both, without the shipped entries that the user names too, under whichever alias."""
    if not isinstance(mine, Mapping):
        return mine  # a list of another length is no set of entries; `weights` says what is wrong with it
    named = {_canonical(key) for key in mine}
    return {key: value for key, value in shipped.items() if _canonical(key) not in named} | dict(mine)


def _canonical(key: str) -> str:
    """A key of any table without aliases: adaLN, 3.adaLN."""
    where, dot, component = key.rpartition(".")
    return f"{where}{dot}{zimage.canonical_component(component)}"
