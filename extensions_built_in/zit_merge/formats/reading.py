"""How files are read: the user's answers to what one leaves open, and what a reader gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..errors import ZitMergeError
from .metadata import Adapter

if TYPE_CHECKING:
    from ..algebra.delta import Delta

ALPHA_FORMS = "key, metadata, none (alpha is the rank) or a number other than 0"
TWINS = ("split", "fused", "sum")
VECTORS = ("norm", "bias")


@dataclass(frozen=True)
class Reading:
    """The user's answers to what a file leaves open.

    Attributes:
        alpha: `key`, `metadata`, `none` (alpha is the rank), or a number for every module; None takes the key where there is
            one, else the metadata, else none.
        qkv: Where a module is changed twice, under diffusers' name and under the fused one: `split`, `fused` or `sum`.
        drop: `norm`, `bias`: changes of vectors, which no LoRA can hold, are left out.
        adapter: From a recipe: what lora_adapter_metadata or adapter_config.json said when it was made.
    """

    alpha: str | float | None = None
    qkv: str | None = None
    drop: Sequence[str] = ()
    adapter: Adapter | None = None

    def __post_init__(self) -> None:
        """Raises ZitMergeError for an answer that is none."""
        if not is_alpha(self.alpha) and self.alpha is not None:
            raise ZitMergeError(f"alpha: must be {ALPHA_FORMS}, not {self.alpha!r}")
        if self.qkv not in (None, *TWINS):
            raise ZitMergeError(f"qkv: must be {', '.join(TWINS)}, not {self.qkv!r}")
        for kind in self.drop:
            if isinstance(self.drop, str) or kind not in VECTORS:
                raise ZitMergeError(f"drop: must be a list of {' and '.join(VECTORS)}, not {self.drop!r}")


def is_alpha(value: object) -> bool:
    """Whether this is an answer to `alpha:`."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return math.isfinite(value) and value != 0
    return value in ("key", "metadata", "none")


class Reader(Protocol):
    """Reads a LoRA module by module."""

    def delta(self, module: str) -> tuple[float, Delta]:
        """(alpha / rank, change as stored)."""
