"""blocks, layers, effects and overrides -> one factor for each module of Z-Image; with the ratio, its strength.

    factor = blocks * layers * effects        unless `overrides` names the module: then the override alone
    strength = ratio * factor

In `blocks` and `overrides` the smallest set that names a module wins, in `layers` the narrowest range; it replaces the wider
one. Two that are equally wide and overlap are an error, since nothing would say which is meant.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, prod
from typing import Any, TypeVar

from ..errors import SettingError, located, nearest
from . import zimage
from .zimage import ALIASES, COMPONENTS, EFFECTS, GROUPS, MODULES, N_LAYERS, OTHER, REFINERS, SECTIONS, Module

Depth = float | Sequence[float]
T = TypeVar("T")

TABLES = ("blocks", "layers", "effects", "overrides")  # the strength keys that are tables
_LAYERS = re.compile(r"(\d{1,9})(?:\s*-\s*(\d{1,9}))?")


@dataclass(frozen=True)
class Weights:
    """The strength keys of one LoRA but its ratio, as a config has them.

    Attributes:
        blocks: Component or group -> factor.
        layers: Layer range -> factor or gradient; or one factor for each of the 30 layers.
        effects: Effect group -> factor.
        overrides: LAYERS.COMPONENT -> factor.
    """

    blocks: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, Depth] | Sequence[float] = field(default_factory=dict)
    effects: Mapping[str, float] = field(default_factory=dict)
    overrides: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FactorTable:
    """The strength keys of one LoRA without groups, ranges and aliases: one number for each place that they name.

    Attributes:
        components: Component -> factor, of blocks and effects.
        layers: (section, index) -> factor, for those that are named.
        overrides: Module -> factor, in the place of the other two.
    """

    components: Mapping[str, float]
    layers: Mapping[tuple[str, int], float]
    overrides: Mapping[str, float]

    def of(self, module: Module) -> float:
        """The factor of a module, which the ratio is multiplied with."""
        if module.name in self.overrides:
            return self.overrides[module.name]
        return self.components.get(module.component, 1.0) * self.layers.get((module.section, module.index), 1.0)


def factor_table(weights: Weights) -> FactorTable:
    """The factors that the strength keys spell.

    Raises:
        SettingError: A key that selects nothing, or two that can't be told apart; located from the table on: `blocks.to_w`.
    """
    with located("blocks"):
        blocks = _blocks(weights.blocks)
    with located("layers"):
        layers = _layers(weights.layers)
    with located("effects"):
        effects = _effects(weights.effects)
    with located("overrides"):
        overrides = _overrides(weights.overrides)
    return FactorTable({c: blocks.get(c, 1.0) * effects[c] for c in COMPONENTS}, layers, overrides)


def factors(weights: Weights) -> dict[str, float]:
    """The factor of each of the 276 modules.

    Raises:
        SettingError: As `factor_table`.
    """
    table = factor_table(weights)
    return {module.name: table.of(module) for module in MODULES.values()}


def strengths(ratio: float, factors: Mapping[str, float]) -> dict[str, float]:
    """The strength of each module.

    Args:
        ratio: Of the LoRA.
        factors: Module -> factor.

    Raises:
        SettingError: One is too large for a number.
    """
    table = {module: ratio * factor for module, factor in factors.items()}
    for name, strength in table.items():
        if not isfinite(strength):
            raise SettingError(f"the strength of {name} is {strength}: use smaller numbers")
    return table


def canonical_key(table: str, key: str) -> str:
    """A key of a strength table in its one spelling, equal for all that name the same set.

    Args:
        table: One of TABLES.
        key: As a user wrote it: `adaLN`, `0 - 9`, `3-3`, `3-3.adaLN`.

    Returns:
        `adaLN_modulation`, `0-9`, `3`, `3.adaLN_modulation`; a key that selects nothing stays as it is.
    """
    if table == "layers":
        return _canonical_layers(key)
    if table != "overrides":
        return zimage.canonical_component(key)
    layers, dot, component = key.rpartition(".")
    return f"{_canonical_layers(layers)}{dot}{zimage.canonical_component(component)}"


def _canonical_layers(key: str) -> str:
    match = _LAYERS.fullmatch(key)
    return _row(int(match[1]), int(match[2] or match[1])) if match else key


def union(below: Mapping[str, Any] | Sequence[float], above: Mapping[str, Any] | Sequence[float], table: str) -> Any:
    """Two strength tables of one kind as one; where both name the same set, the entry of `above` counts.

    Args:
        below: Such as a preset's; a list is replaced.
        above: Such as the user's own. A list of 30 layers counts as 30 entries of one layer each.
        table: One of TABLES.
    """
    below, above = entries(below), entries(above)
    if not isinstance(below, Mapping) or not isinstance(above, Mapping):
        return above  # a list of another length is no set of entries; `factor_table` says what is wrong with it
    named = {canonical_key(table, key) for key in above}
    return {key: value for key, value in below.items() if canonical_key(table, key) not in named} | dict(above)


def entries(table: Mapping[str, Any] | Sequence[float]) -> Mapping[str, Any] | Sequence[float]:
    """A list of 30 layers as 30 entries; anything else as it is."""
    if isinstance(table, Mapping) or len(table) != N_LAYERS:
        return table
    return {str(layer): factor for layer, factor in enumerate(table)}


def _blocks(blocks: Mapping[str, float]) -> dict[str, float]:
    """component -> factor, from the smallest group that names it."""
    claims = [(key, dict.fromkeys(_members(key, key), float(factor))) for key, factor in blocks.items()]
    return _smallest_wins(claims)


def _members(key: str, loc: str) -> tuple[str, ...]:
    """The components that a component or group means; `loc` is the key that it is a part of."""
    component = zimage.canonical_component(key)
    if component in COMPONENTS:
        return (component,)
    if key in GROUPS:
        return GROUPS[key]
    known = [*COMPONENTS, *ALIASES, *GROUPS]
    raise SettingError(f"Z-Image has no such component{nearest(key, known)}; there are {', '.join(known)}", loc)


def _effects(effects: Mapping[str, float]) -> dict[str, float]:
    """component -> product of the factors of the effect groups that contain it."""
    for key in effects:
        if key not in EFFECTS:
            raise SettingError(f"no such effect group{nearest(key, EFFECTS)}; there are {', '.join(EFFECTS)}", key)
    return {c: prod(f for key, f in effects.items() if c in EFFECTS[key]) for c in COMPONENTS}


def _layers(layers: Mapping[str, Depth] | Sequence[float]) -> dict[tuple[str, int], float]:
    """(section, index) -> factor, from the narrowest range that covers it."""
    if not isinstance(layers, Mapping):
        if len(layers) != N_LAYERS:
            raise SettingError(f"a plain list has one number for each of the {N_LAYERS} layers, this one has {len(layers)}")
        return {("layers", i): float(factor) for i, factor in enumerate(layers)}
    claims = []
    for key, value in layers.items():
        with located(key):
            spots = _spots(key)
            claims.append((key, dict(zip(spots, _spread(value, len(spots)), strict=True))))
    return _smallest_wins(claims)


def _smallest_wins(claims: Sequence[tuple[str, Mapping[T, float]]]) -> dict[T, float]:
    """spot -> factor of the key that claims the fewest spots.

    Args:
        claims: (key, {spot: factor}) for each key of a config table.

    Raises:
        SettingError: Two keys of one size claim the same spot.
    """
    by_size: dict[T, dict[int, tuple[str, float]]] = {}
    for key, spots in claims:
        for spot, factor in spots.items():
            rivals = by_size.setdefault(spot, {})
            if len(spots) in rivals:
                raise SettingError(f"{rivals[len(spots)][0]} and {key} overlap and are equally wide: keep or split one of them")
            rivals[len(spots)] = (key, factor)
    return {spot: rivals[min(rivals)][1] for spot, rivals in by_size.items()}


def _spots(key: str) -> list[tuple[str, int]]:
    """The (section, index) that a layer key covers."""
    if key == "other":
        return [("other", 0)]
    if key in REFINERS:
        return [(key, i) for i in range(SECTIONS[key])]
    return [("layers", i) for i in _range(key)]


def _range(key: str) -> range:
    match = _LAYERS.fullmatch(key)
    if not match:
        raise SettingError(f"not a layer; write 3, 0-9, {', '.join(REFINERS)} or other{nearest(key, (*REFINERS, 'other'))}")
    first, last = int(match[1]), int(match[2] or match[1])
    if last >= N_LAYERS or first > last:
        raise SettingError(f"Z-Image's layers are 0 to {N_LAYERS - 1}, a range runs from the lower to the higher")
    return range(first, last + 1)


def _spread(value: Depth, count: int) -> list[float]:
    """One factor per layer: the number itself, or the list interpolated linearly over the range, ends included."""
    if isinstance(value, int | float):
        return [float(value)] * count
    if len(value) < 2 or count < 2:
        raise SettingError("a gradient is a list of two or more numbers over two or more layers")
    spread = []
    for i in range(count):
        left, rest = divmod(i * (len(value) - 1), count - 1)
        right = value[min(left + 1, len(value) - 1)]
        spread.append(value[left] + (right - value[left]) * rest / (count - 1))
    return spread


def _overrides(overrides: Mapping[str, float]) -> dict[str, float]:
    """module -> factor, from the override that names the fewest modules."""
    claims = [(key, {m.name: float(factor) for m in _select(key)}) for key, factor in overrides.items()]
    return _smallest_wins(claims)


def _select(key: str) -> list[Module]:
    """The modules that LAYERS.COMPONENT names."""
    match = re.fullmatch(r"(?P<section>noise_refiner|context_refiner)(?:\.(?P<index>\d{1,9}))?\.(?P<part>.+)", key)
    if match:
        if int(match["index"] or 0) >= SECTIONS[match["section"]]:
            raise SettingError(f"{match['section']} has the layers 0 and 1", key)
        spots = [(match["section"], int(match["index"]))] if match["index"] else _spots(match["section"])
        part = match["part"]
    else:
        where, _, part = key.partition(".")
        if not part:
            raise SettingError("an override is LAYERS.COMPONENT, such as 3.to_q, 20-25.to_v, *.w2 or noise_refiner.to_k", key)
        if where == "layers":
            raise SettingError(f"write {part}, without layers.", key)
        if where == "other":
            return _select_other(part, key)
        with located(where):
            spots = [(s, i) for s, n in SECTIONS.items() for i in range(n)] if where == "*" else _spots(where)
    members = _members(part, key)
    selected = [zimage.at(s, i, c) for s, i in spots for c in members if c in zimage.section_components(s)]
    if not selected:
        raise SettingError(f"{spots[0][0]} has no {part}", key)
    return selected


def _select_other(part: str, loc: str) -> list[Module]:
    selected = [
        zimage.at("other", 0, name)
        for name in OTHER
        if part in (name, zimage.at("other", 0, name).name) or name.startswith(part + ".")
    ]
    if not selected:
        known = dict.fromkeys([*(name.split(".")[0] for name in OTHER), *OTHER])
        raise SettingError(f"no such part{nearest(part, known)}; there are {', '.join(known)}", loc)
    return selected


def compact(table: Mapping[str, float]) -> dict[str, object]:
    """The table of strengths for a recipe: runs of equal layers share a row of values in the order of COMPONENTS.

    Args:
        table: Module -> strength, all 276.

    Returns:
        {"0-9": [8 numbers], "10-29": [...], "noise_refiner": [8], "context_refiner": [7], "other": [6]}, where a refiner whose
        two layers differ has a row for each: "noise_refiner.0".
    """
    rows: dict[str, object] = {}
    for section in SECTIONS:
        for first, last, row in runs(table, section):
            rows[row_name(section, first, last)] = row
    rows["other"] = [table[zimage.at("other", 0, name).name] for name in OTHER]
    return rows


def runs(table: Mapping[str, T], section: str) -> list[tuple[int, int, list[T]]]:
    """(first, last, row) for each run of layers of a section whose rows of values are equal.

    Args:
        table: Module -> value.
        section: `layers`, `noise_refiner`, `context_refiner`.
    """
    found: list[tuple[int, int, list[T]]] = []
    for i in range(SECTIONS[section]):
        row = [table[zimage.at(section, i, c).name] for c in zimage.section_components(section)]
        if found and found[-1][2] == row:
            found[-1] = (found[-1][0], i, row)
        else:
            found.append((i, i, row))
    return found


def row_name(section: str, first: int, last: int) -> str:
    """How a run of layers is called: 3, 0-9, noise_refiner, noise_refiner.0.

    Args:
        section: Of the model.
        first: The first layer.
        last: The last layer.
    """
    if section == "layers":
        return _row(first, last)
    return section if last - first + 1 == SECTIONS[section] else f"{section}.{first}"


def _row(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
