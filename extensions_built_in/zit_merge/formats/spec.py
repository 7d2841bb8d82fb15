"""What is known of a LoRA without its numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

# The dtypes that files are written in, by their names in a config.
DTYPES: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class LoraSpec:
    """What is known of a LoRA without its numbers.

    Attributes:
        ranks: Module -> rank.
        shapes: Module -> (out, in); empty while only the rank is known.
        dtype: Of the factors.
        algorithms: LoRA, LoKr, LoHa, full difference: what changes its modules.
    """

    ranks: Mapping[str, int]
    shapes: Mapping[str, tuple[int, int]]
    dtype: torch.dtype
    algorithms: Collection[str] = ("LoRA",)

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(self.ranks.values(), default=1)

    @property
    def is_lora(self) -> bool:
        """Whether every rank is that of factors as a trainer chose it."""
        return set(self.algorithms) <= {"LoRA"}
