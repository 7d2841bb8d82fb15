"""Presets: named sets of strength keys, put under the user's own, entry by entry. Shipped ones are in presets.yaml.

A file of the user's own holds one preset in the same form:

    my_layers:
      idea: whose idea it is, one line
      layers: {0-9: 0.5, 10-29: [1.0, 0.6]}
      overrides: {20-25.to_v: 1.3}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from sys import float_info
from typing import Any

import yaml

from ..errors import ZitMergeError, nearest
from ..files.text import TextFile, parse
from ..model import zimage
from ..model.strengths import Depth, Weights, factors, strengths

# Any two primes: the strength of a module whose entries have them for values is a product that says which ones decide it.
_FROM_PRESET, _OWN = 2, 3


@dataclass(frozen=True)
class Preset:
    """The strength keys as in a config, with every key as text.

    Attributes:
        idea: Whose idea it is, one line; of a file, what it says of itself.
    """

    idea: str = ""
    blocks: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, Depth] = field(default_factory=dict)
    effects: Mapping[str, float] = field(default_factory=dict)
    overrides: Mapping[str, float] = field(default_factory=dict)


_TABLES: Mapping[str, str] = {"blocks": "to_q", "layers": "0-9", "effects": "detail", "overrides": "3.to_q"}  # and a key of each
_ENDINGS = (".yaml", ".yml")
_FORM = "a file holds one preset as presets.yaml has them: its name, below it idea, blocks, layers, effects, overrides"


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


def is_file(preset: str) -> bool:
    """Whether a preset is named by the file that holds it."""
    return preset.lower().endswith(_ENDINGS)


def load(preset: str, place: str) -> Preset:
    """A preset by its name or its file.

    Args:
        preset: A shipped name, or a path to a .yaml file, absolute or from the working directory.
        place: Of the LoRA, for messages.

    Raises:
        ZitMergeError: There is no such preset or file, or the file is wrong.
    """
    at = f"{place}.preset".lstrip(".")
    if is_file(preset):
        return _read(preset, at)
    if preset in presets():
        return presets()[preset]
    known = f"there are {', '.join(preset_names())}, and .yaml files of your own"
    raise ZitMergeError(f"{at}: no such preset: {preset!r}{nearest(preset, preset_names())}; {known}")


def expand(preset: str | Preset, own: Mapping[str, Mapping[str, Any] | Sequence[float]], place: str) -> dict[str, Any]:
    """A preset with the user's own entries on top.

    Args:
        preset: Its name, the path of a file (see `load`), or the preset itself.
        own: The user's `blocks`, `layers`, `effects`, `overrides`, as far as they are there. A list of 30 layers counts as 30
            entries of one layer each.
        place: Of the LoRA, for messages.

    Returns:
        All four tables, for `Weights`.

    Raises:
        ZitMergeError: As `load`.
    """
    shipped = preset if isinstance(preset, Preset) else load(preset, place)
    return {table: _union(getattr(shipped, table), _entries(own.get(table, {}))) for table in _TABLES}


def origin_of(
    preset: str | Preset, own: Mapping[str, Mapping[str, Any] | Sequence[float]], place: str = "weights"
) -> dict[str, str]:
    """Where the strength of each of the 276 modules comes from.

    Args:
        preset: As for `expand`.
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


def _read(preset: str, at: str) -> Preset:
    try:
        path = Path(preset).expanduser()
        is_there = path.is_file()
    except (OSError, RuntimeError, ValueError):  # no path that this system can have
        is_there = False
    if not is_there:
        raise ZitMergeError(f"{at}: {preset}: there is no such file: mend the path, or name a preset that is shipped")
    try:
        raw = parse(TextFile.read(path).text, path)
    except RecursionError:
        raise ZitMergeError(f"{at}: {path}: is nested too deeply, or contains itself") from None
    except ZitMergeError as e:
        raise ZitMergeError(f"{at}: {e}") from None
    return _checked(raw, f"{at}: {path}")


def _checked(raw: object, place: str) -> Preset:
    """The one preset of a file.

    Args:
        raw: What the file holds.
        place: Of the file, for messages.

    Raises:
        ZitMergeError: It is something else, or selects what is not there.
    """
    if not isinstance(raw, Mapping) or not raw or any(_is_table(key, value) for key, value in raw.items()):
        raise ZitMergeError(f"{place}: has no preset under a name; {_FORM}")
    if len(raw) > 1:
        raise ZitMergeError(f"{place}: holds {len(raw)} presets ({', '.join(map(str, raw))}): keep one in each file")
    ((name, entry),) = raw.items()
    place = f"{place}: {name}"
    if not isinstance(entry, Mapping):
        raise ZitMergeError(f"{place}: must have tables below it, not {entry!r}; {_FORM}")
    for key in entry:
        if key not in ("idea", *_TABLES):
            known = ("idea", *_TABLES)
            raise ZitMergeError(f"{place}.{key}: unknown key{nearest(str(key), known)}; known here: {', '.join(known)}")
    if not isinstance(entry.get("idea", ""), str):
        raise ZitMergeError(f"{place}.idea: must be text, not {entry['idea']!r}")
    tables = {key: _table(entry[key], key, f"{place}.{key}") for key in _TABLES if entry.get(key) is not None}
    if not tables:
        raise ZitMergeError(f"{place}: sets nothing; {_FORM}")
    factors(Weights(1.0, **tables, place=place))
    return Preset(entry.get("idea", ""), **tables)


def _is_table(key: object, value: object) -> bool:
    """Whether a key at the top of a file is one of a preset's own; not where a preset is called `layers` itself."""
    keys = {"idea", *_TABLES}
    return key in keys and not (isinstance(value, Mapping) and value and set(value) <= keys)


def _table(raw: object, table: str, place: str) -> dict[str, Any]:
    """One table of a file: keys are text, numbers are floats, a list of 30 layers is 30 entries."""
    if table == "layers" and isinstance(raw, list) and len(raw) == zimage.N_LAYERS:
        raw = dict(enumerate(raw))
    if not isinstance(raw, Mapping):
        raise ZitMergeError(f"{place}: must be a mapping, such as {{{_TABLES[table]}: 0.5}}, not {raw!r}")
    found: dict[str, Any] = {}
    for key, value in raw.items():
        if isinstance(key, bool) or not isinstance(key, int | str):
            raise ZitMergeError(f"{place}.{key}: a key must be text")
        if str(key) in found:
            raise ZitMergeError(f"{place}: {key} stands there twice: keep one of them")
        numbers = value if isinstance(value, list) and table == "layers" else [value]
        for number in numbers:
            if not _is_number(number):
                raise ZitMergeError(f"{place}.{key}: must be a finite number, not {number!r}")
        found[str(key)] = _plain(value)
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= float_info.max


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
