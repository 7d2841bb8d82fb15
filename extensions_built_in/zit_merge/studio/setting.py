"""What the page may ask for: strengths, a method and a rank for a step that is there. No text of it is ever a path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ZitMergeError, nearest
from ..wording import masked

STRENGTHS = ("ratio", "blocks", "layers", "overrides")
_RANK = ("energy", "max", "size_mb")


@dataclass(frozen=True)
class Setting:
    """What was composed on the page.

    Attributes:
        step: The step that it starts from.
        loras: For each LoRA of the step its strength keys; None leaves them as the step has them.
        method: The method.
        params: Its parameters.
        rank: As a config has it.
    """

    step: str
    loras: Sequence[Mapping[str, Any] | None]
    method: str
    params: Mapping[str, Any]
    rank: Any

    def record(self) -> dict[str, Any]:
        """As the page sent it."""
        return {"step": self.step, "loras": list(self.loras), "method": self.method, "params": self.params, "rank": self.rank}

    @property
    def label(self) -> str:
        """`ties, 0.8 + 0.5`: the method and the ratios that were set."""
        ratios = ["as before" if lora is None else f"{lora.get('ratio', 1):g}" for lora in self.loras]
        return f"{self.method}, {' + '.join(ratios) if len(ratios) <= 6 else f'{len(ratios)} LoRAs'}"


def read_setting(found: object) -> Setting:
    """A setting out of a request.

    Args:
        found: What JSON gave.

    Raises:
        ZitMergeError: It has another form; what its numbers mean is looked at when it is planned.
    """
    table = _table(found, "setting", ("step", "loras", "method", "params", "rank"))
    loras = table.get("loras")
    if not isinstance(loras, list):
        raise ZitMergeError("setting.loras: must be a list")
    strengths = [None if lora is None else _numbers(lora, f"setting.loras[{n}]", STRENGTHS) for n, lora in enumerate(loras)]
    params = _table(table.get("params", {}), "setting.params")
    for key, value in params.items():
        if not (isinstance(value, str | bool) or _is_number(value)):
            raise ZitMergeError(f"setting.params.{masked(key[:40])}: must be a number or a word")
    rank = table.get("rank", "exact")
    if isinstance(rank, Mapping):
        rank = _numbers(rank, "setting.rank", _RANK)
    elif rank not in ("exact", "same") and not (isinstance(rank, int) and _is_number(rank)):
        raise ZitMergeError("setting.rank: must be exact, same, a whole number or a rule")
    words = [table.get("step"), table.get("method", "sum")]
    if not all(isinstance(word, str) for word in words):
        raise ZitMergeError("setting: step and method must be words")
    return Setting(str(words[0]), strengths, str(words[1]), params, rank)


def _table(found: object, where: str, keys: Sequence[str] = ()) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise ZitMergeError(f"{where}: must be an object")
    for key in found:
        if keys and key not in keys:
            raise ZitMergeError(f"{where}: has no {masked(str(key)[:40])}{nearest(str(key)[:40], keys)}")
    return found


def _numbers(found: object, where: str, keys: Sequence[str]) -> Mapping[str, Any]:
    """An object whose values are numbers, or tables and lists of them: a text in it could be a path."""

    def is_plain(value: object, depth: int = 3) -> bool:
        if isinstance(value, int | float):
            return _is_number(value)
        entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else None
        return entries is not None and depth > 0 and all(is_plain(entry, depth - 1) for entry in entries)

    table = _table(found, where, keys)
    for key, value in table.items():
        if not is_plain(value):
            raise ZitMergeError(f"{where}.{key}: must be numbers")
    if not _is_number(table.get("ratio", 1)):
        raise ZitMergeError(f"{where}.ratio: must be a number")
    return table


def _is_number(value: object) -> bool:
    """Whether it is a number that is finite as a float too."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
