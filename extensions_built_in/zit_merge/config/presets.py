"""Presets: named sets of strength keys, put under the user's own, entry by entry. Shipped ones are in presets.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..errors import SettingError, ZitMergeError, located, nearest
from ..files.paths import unquoted
from ..files.text import TextFile, parse
from ..model.strengths import TABLES, Weights, entries, factor_table, factors
from .messages import setting_error
from .plain import plain_keys
from .schema import Preset, union_of

# Any two primes: the factor of a module whose entries have them for values is a product that says which ones decide it.
_FROM_PRESET, _OWN = 2, 3
_ENDINGS = (".yaml", ".yml")
_FORM = f"a file holds one preset: its name, below it idea and {', '.join(TABLES)}"


@cache
def presets() -> Mapping[str, Preset]:
    """Every shipped preset, in the order of the file."""
    raw = yaml.safe_load(Path(__file__).with_name("presets.yaml").read_text(encoding="utf-8"))
    return {name: Preset.model_validate(plain_keys(entry)) for name, entry in raw.items()}


def is_file(preset: str) -> bool:
    """Whether a preset is named by the file that holds it."""
    return preset.lower().endswith(_ENDINGS)


def find_preset(preset: str, folder: Path = Path()) -> Preset:
    """A preset by its name or its file.

    Args:
        preset: A shipped name, or a path to a .yaml file.
        folder: Where relative paths start, before the working directory.

    Raises:
        SettingError: There is no such preset or file, or the file is wrong.
    """
    preset = unquoted(preset)
    if is_file(preset):
        return _read(preset, folder)
    if preset in presets():
        return presets()[preset]
    known = f"there are {', '.join(presets())}, and .yaml files of your own"
    raise SettingError(f"no such preset: {preset!r}{nearest(preset, presets())}; {known}")


def origin_of(preset: Preset, own: Mapping[str, Any]) -> dict[str, str]:
    """Where the strength of each of the 276 modules comes from.

    Args:
        preset: What lies below.
        own: The user's tables on top.

    Returns:
        Module -> "preset", "own", "both", or "-" where no entry names it.

    Raises:
        SettingError: As `strengths.factors`.
    """
    labels: dict[str, Any] = {}
    for table, both in union_of(preset, own).items():
        mine = entries(own.get(table, {}))
        labels[table] = {key: _OWN if key in mine else _FROM_PRESET for key in both} if isinstance(mine, Mapping) else mine
    # The winners are those of `factors`, whatever its rules: it only multiplies the values of the entries that decide.
    # Few small primes are multiplied, so the products are exact.
    products = factors(Weights(**labels))
    words = {(True, True): "both", (True, False): "preset", (False, True): "own", (False, False): "-"}
    return {name: words[product % _FROM_PRESET == 0, product % _OWN == 0] for name, product in products.items()}


def _read(preset: str, folder: Path) -> Preset:
    path = _path(preset, folder)
    try:
        raw = parse(TextFile.read(path).text, path)
    except ZitMergeError as e:
        raise SettingError(str(e)) from None
    try:
        return _only_preset(raw)
    except SettingError as e:  # its location is one in that file, not in the config
        raise SettingError(f"{path}: {e}") from None


def _path(preset: str, folder: Path) -> Path:
    try:
        path = Path(preset).expanduser()
        for candidate in (folder / path, path):
            if candidate.is_file():
                return candidate
    except (OSError, RuntimeError, ValueError):  # no path that this system can have
        pass
    raise SettingError(f"{preset}: there is no such file: correct the path, or name a shipped preset")


def _only_preset(raw: object) -> Preset:
    """The one preset of a file.

    Raises:
        SettingError: The file holds something else, or selects what is not there.
    """
    if not isinstance(raw, Mapping) or not raw or any(_is_table(key, value) for key, value in raw.items()):
        raise SettingError(f"has no preset under a name; {_FORM}")
    if len(raw) > 1:
        raise SettingError(f"holds {len(raw)} presets ({', '.join(map(str, raw))}): keep one in each file")
    ((name, entry),) = raw.items()
    with located(str(name)):
        if not isinstance(entry, Mapping):
            raise SettingError(f"must have tables below it, not {entry!r}; {_FORM}")
        try:
            preset = Preset.model_validate(plain_keys(entry))
        except ValidationError as e:
            raise setting_error(e, {}, Preset) from None
        if not any(getattr(preset, table) for table in TABLES):
            raise SettingError(f"sets nothing; {_FORM}")
        factor_table(preset.weights)
    return preset


def _is_table(key: object, value: object) -> bool:
    """Whether a key at the top of a file is one of a preset's own; not where a preset is called `layers` itself."""
    keys = {"idea", *TABLES}
    return key in keys and not (isinstance(value, Mapping) and value and set(value) <= keys)
