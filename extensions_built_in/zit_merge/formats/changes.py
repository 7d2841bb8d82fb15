"""Where the changes of a file are found: dataclasses between its header and its reader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .algorithms import BASED, GLORA, Rotation

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Change:
    """Where one change of one module is found in a file.

    Attributes:
        algorithm: LoRA, LoKr, LoHa, full difference, or one of BASED.
        keys: Part -> key: up, down; w1 or w1_a and w1_b, w2 or w2_a and w2_b; diff; of BASED those in `sides.PARTS`.
        sizes: Part -> shape as stored.
        scale: alpha / rank; 1 where alpha has no meaning. Of a DoRA it belongs inside of the norm.
        rank: No change of this form has a higher one.
        shape: (out, in) of the change.
        dtype_name: Of the tensors; one that holds them all where they differ. One of `spec.DTYPES`.
        alpha: As stored, or None; of LyCORIS' OFT and BOFT the constraint, per row.
        third: Which third of the rows this module owns in a fused qkv, else None.
        native: Whether it stands under the original checkpoint's name where diffusers has another.
        inner: Of a DoRA: LoRA, LoHa or LoKr, whose change is added before the norm is taken.
        modules: Canonical names of what is stored as one: the module, or q, k and v.
        rotation: Of an OFT that is stored as triangles: how it becomes a rotation.
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
    inner: str = ""
    modules: tuple[str, ...] = ()
    rotation: Rotation | None = None

    @property
    def needs_base(self) -> bool:
        """Whether it can be told with the base model's weights only."""
        return self.algorithm in BASED

    @property
    def dtype(self) -> torch.dtype:
        """The same as torch has it."""
        from .dtypes import TORCH_DTYPES

        return TORCH_DTYPES[self.dtype_name]


@dataclass
class Group:
    """The keys of one change under one name: of one module, or of the three of a fused qkv.

    Attributes:
        algorithm, keys, native, inner: As in Change.
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
    inner: str = ""

    @property
    def is_scaled(self) -> bool:
        """Whether alpha is divided by a rank: not of a LoKr of two whole factors, nor of a full difference (LyCORIS)."""
        form = self.inner or self.algorithm
        return form in ("LoRA", "LoHa", GLORA) or (form == "LoKr" and not {"w1", "w2"} <= set(self.keys))

    @property
    def is_bounded(self) -> bool:
        """Whether alpha is the constraint of an OFT or a BOFT (LyCORIS)."""
        return "blocks" in self.keys
