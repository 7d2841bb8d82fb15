"""Where the changes of a file are found: dataclasses between its header and its reader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FULL = "full difference"


@dataclass(frozen=True)
class Change:
    """Where one change of one module is found in a file.

    Attributes:
        algorithm: LoRA, LoKr, LoHa or full difference.
        keys: Part -> key: up, down; w1 or w1_a and w1_b, w2 or w2_a and w2_b; diff.
        sizes: Part -> shape as stored.
        scale: alpha / rank; 1 where alpha has no meaning.
        rank: No change of this form has a higher one.
        shape: (out, in) of the change.
        dtype_name: Of the tensors; one that holds them all where they differ. One of `spec.DTYPES`.
        alpha: As stored, or None.
        third: Which third of the rows this module owns in a fused qkv, else None.
        native: Whether it stands under the original checkpoint's name where diffusers has another.
    """

    algorithm: str
    keys: Mapping[str, str]
    sizes: Mapping[str, tuple[int, ...]]
    scale: float
    rank: int
    shape: tuple[int, int]
    dtype_name: str
    alpha: float | None = None
    third: int | None = None
    native: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The same as torch has it."""
        from .dtypes import TORCH_DTYPES

        return TORCH_DTYPES[self.dtype_name]


@dataclass
class Group:
    """The keys of one change under one name: of one module, or of the three of a fused qkv.

    Attributes:
        algorithm, keys, native: As in Change.
        modules: Canonical names.
        alpha: Key of alpha, if there is one.
        prefix: Of the keys.
    """

    algorithm: str
    modules: tuple[str, ...]
    native: bool
    prefix: str
    alpha: str | None
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def is_scaled(self) -> bool:
        """Whether alpha has a meaning: a LoKr of two whole factors and a full difference are not scaled (LyCORIS)."""
        return self.algorithm in ("LoRA", "LoHa") or (self.algorithm == "LoKr" and not {"w1", "w2"} <= set(self.keys))
