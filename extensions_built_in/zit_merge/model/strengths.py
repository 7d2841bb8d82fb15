"""ratio, blocks, layers, effects and overrides -> one strength for each module of Z-Image.

    strength = ratio * blocks * layers * effects        unless `overrides` names the module: then ratio * override

In `blocks` and `overrides` the smallest set that names a module wins, in `layers` the narrowest range; it replaces the wider
one. Two that are equally wide and overlap are an error, since nothing would say which is meant.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, prod
from typing import TypeVar

from ..errors import ZitMergeError, nearest
from . import zimage
from .zimage import ALIASES, COMPONENTS, EFFECTS, GROUPS, MODULES, N_LAYERS, OTHER, REFINERS, SECTIONS, Module

Depth = float | Sequence[float]
T = TypeVar("T")


@dataclass(frozen=True)
class Weights:
    """The strength keys of one LoRA, as they stand in a config.

    Attributes:
        ratio: The LoRA's strength.
        blocks: Component or group -> factor.
        layers: Layer range -> factor or gradient; or one factor for each of the 30 layers.
        effects: Effect group -> factor.
        overrides: LAYERS.COMPONENT -> factor.
        place: Where they stand, for messages: `process[1].steps[0].loras[0]`.
    """

    ratio: float
    blocks: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, Depth] | Sequence[float] = field(default_factory=dict)
    effects: Mapping[str, float] = field(default_factory=dict)
    overrides: Mapping[str, float] = field(default_factory=dict)
    place: str = "weights"


@dataclass(frozen=True)
class Factors:
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
        """What the ratio is multiplied with."""
        if module.name in self.overrides:
            return self.overrides[module.name]
        return self.components.get(module.component, 1.0) * self.layers.get((module.section, module.index), 1.0)


def factors(weights: Weights) -> Factors:
    """The factors that the strength keys spell.

    Raises:
        ZitMergeError: A key that selects nothing, or two that can't be told apart; the message names the place.
    """
    blocks = _blocks(weights.blocks, f"{weights.place}.blocks")
    layers = _layers(weights.layers, f"{weights.place}.layers")
    effects = _effects(weights.effects, f"{weights.place}.effects")
    components = {c: blocks.get(c, 1.0) * effects[c] for c in COMPONENTS}
    return Factors(components, layers, _overrides(weights.overrides, f"{weights.place}.overrides"))


def strengths(weights: Weights) -> dict[str, float]:
    """The strength of each of the 276 modules.

    Raises:
        ZitMergeError: As `factors`, and a strength that is too large for a number.
    """
    found = factors(weights)
    table = {module.name: weights.ratio * found.of(module) for module in MODULES.values()}
    for name, strength in table.items():
        if not isfinite(strength):
            raise ZitMergeError(f"{weights.place}: the strength of {name} is {strength}: use smaller numbers")
    return table


def _blocks(blocks: Mapping[str, float], place: str) -> dict[str, float]:
    """component -> factor, from the smallest group that names it."""
    claims = [(key, dict.fromkeys(_members(key, place), float(factor))) for key, factor in blocks.items()]
    return _smallest_wins(claims, place)


def _members(key: str, place: str) -> tuple[str, ...]:
    component = zimage.canonical_component(key)
    if component in COMPONENTS:
        return (component,)
    if key in GROUPS:
        return GROUPS[key]
    known = [*COMPONENTS, *ALIASES, *GROUPS]
    raise ZitMergeError(f"{place}.{key}: Z-Image has no such component{nearest(key, known)}; there are {', '.join(known)}")


def _effects(effects: Mapping[str, float], place: str) -> dict[str, float]:
    """component -> product of the factors of the effect groups that contain it."""
    for key in effects:
        if key not in EFFECTS:
            raise ZitMergeError(f"{place}.{key}: no such effect group{nearest(key, EFFECTS)}; there are {', '.join(EFFECTS)}")
    return {c: prod(f for key, f in effects.items() if c in EFFECTS[key]) for c in COMPONENTS}


def _layers(layers: Mapping[str, Depth] | Sequence[float], place: str) -> dict[tuple[str, int], float]:
    """(section, index) -> factor, from the narrowest range that covers it."""
    if not isinstance(layers, Mapping):
        if len(layers) != N_LAYERS:
            raise ZitMergeError(
                f"{place}: a plain list has one number for each of the {N_LAYERS} layers, this one has {len(layers)}"
            )
        return {("layers", i): float(factor) for i, factor in enumerate(layers)}
    claims = []
    for key, value in layers.items():
        spots = _spots(key, place)
        claims.append((key, dict(zip(spots, _spread(value, len(spots), f"{place}.{key}"), strict=True))))
    return _smallest_wins(claims, place)


def _smallest_wins(claims: Sequence[tuple[str, Mapping[T, float]]], place: str) -> dict[T, float]:
    """spot -> factor of the key that claims the fewest spots.

    Args:
        claims: (key, {spot: factor}) for each key of a config table.
        place: Of that table.

    Raises:
        ZitMergeError: Two keys of one size claim the same spot.
    """
    by_size: dict[T, dict[int, tuple[str, float]]] = {}
    for key, spots in claims:
        for spot, factor in spots.items():
            rivals = by_size.setdefault(spot, {})
            if len(spots) in rivals:
                raise ZitMergeError(
                    f"{place}: {rivals[len(spots)][0]} and {key} overlap and are equally wide: keep or split one of them"
                )
            rivals[len(spots)] = (key, factor)
    return {spot: rivals[min(rivals)][1] for spot, rivals in by_size.items()}


def _spots(key: str, place: str) -> list[tuple[str, int]]:
    """The (section, index) that a layer key covers."""
    if key == "other":
        return [("other", 0)]
    if key in REFINERS:
        return [(key, i) for i in range(SECTIONS[key])]
    return [("layers", i) for i in _range(key, f"{place}.{key}")]


def _range(key: str, place: str) -> range:
    match = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", key)
    if not match:
        raise ZitMergeError(
            f"{place}: not a layer; write 3, 0-9, {', '.join(REFINERS)} or other{nearest(key, (*REFINERS, 'other'))}"
        )
    first, last = int(match[1]), int(match[2] or match[1])
    if last >= N_LAYERS or first > last:
        raise ZitMergeError(f"{place}: Z-Image's layers are 0 to {N_LAYERS - 1}, a range runs from the lower to the higher")
    return range(first, last + 1)


def _spread(value: Depth, count: int, place: str) -> list[float]:
    """One factor per layer: the number itself, or the list interpolated linearly over the range, ends included."""
    if isinstance(value, int | float):
        return [float(value)] * count
    if len(value) < 2 or count < 2:
        raise ZitMergeError(f"{place}: a gradient is a list of two or more numbers over two or more layers")
    spread = []
    for i in range(count):
        left, rest = divmod(i * (len(value) - 1), count - 1)
        right = value[min(left + 1, len(value) - 1)]
        spread.append(value[left] + (right - value[left]) * rest / (count - 1))
    return spread


def _overrides(overrides: Mapping[str, float], place: str) -> dict[str, float]:
    """module -> factor, from the override that names the fewest modules."""
    claims = [(key, {m.name: float(factor) for m in _select(key, place)}) for key, factor in overrides.items()]
    return _smallest_wins(claims, place)


def _select(key: str, place: str) -> list[Module]:
    """The modules that LAYERS.COMPONENT names."""
    match = re.fullmatch(r"(?P<section>noise_refiner|context_refiner)(?:\.(?P<index>\d+))?\.(?P<part>.+)", key)
    if match:
        if int(match["index"] or 0) >= SECTIONS[match["section"]]:
            raise ZitMergeError(f"{place}.{key}: {match['section']} has the layers 0 and 1")
        spots = [(match["section"], int(match["index"]))] if match["index"] else _spots(match["section"], place)
        part = match["part"]
    else:
        where, _, part = key.partition(".")
        if not part:
            raise ZitMergeError(
                f"{place}.{key}: an override is LAYERS.COMPONENT, such as 3.to_q, 20-25.to_v, *.w2 or noise_refiner.to_k"
            )
        if where == "layers":
            raise ZitMergeError(f"{place}.{key}: write {part}, without layers.")
        if where == "other":
            return _select_other(part, f"{place}.{key}")
        spots = [(s, i) for s, n in SECTIONS.items() for i in range(n)] if where == "*" else _spots(where, place)
    members = _members(part, f"{place}.{key.removesuffix('.' + part)}")
    selected = [zimage.at(s, i, c) for s, i in spots for c in members if c in zimage.section_components(s)]
    if not selected:
        raise ZitMergeError(f"{place}.{key}: {spots[0][0]} has no {part}")
    return selected


def _select_other(part: str, place: str) -> list[Module]:
    selected = [
        zimage.at("other", 0, name)
        for name in OTHER
        if part in (name, zimage.at("other", 0, name).name) or name.startswith(part + ".")
    ]
    if not selected:
        known = dict.fromkeys([*(name.split(".")[0] for name in OTHER), *OTHER])
        raise ZitMergeError(f"{place}: no such part{nearest(part, known)}; there are {', '.join(known)}")
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


def runs(table: Mapping[str, float], section: str) -> list[tuple[int, int, list[float]]]:
    """(first, last, row) for each run of layers of a section whose rows of strengths are equal."""
    found: list[tuple[int, int, list[float]]] = []
    for i in range(SECTIONS[section]):
        row = [table[zimage.at(section, i, c).name] for c in zimage.section_components(section)]
        if found and found[-1][2] == row:
            found[-1] = (found[-1][0], i, row)
        else:
            found.append((i, i, row))
    return found


def row_name(section: str, first: int, last: int) -> str:
    """How a run of layers is called: 3, 0-9, noise_refiner, noise_refiner.0."""
    if section == "layers":
        return str(first) if first == last else f"{first}-{last}"
    return section if last - first + 1 == SECTIONS[section] else f"{section}.{first}"
