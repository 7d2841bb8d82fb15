"""What is known of a LoRA without its numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

# The dtypes that files are written in: name in a config -> name in torch.
DTYPES: Mapping[str, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

CHECKPOINT_FORMATS = ("diffusers", "comfyui")  # of whole models
FP8 = "fp8"  # of a whole model: ComfyUI's scaled float8_e4m3fn
Layout = dict[str, tuple[str, tuple[int, ...]]]  # key of a tensor -> (dtype as a config has it, shape)


@dataclass(frozen=True)
class LoraSpec:
    """What is known of a LoRA without its numbers.

    Attributes:
        ranks: Module -> rank.
        shapes: Module -> (out, in); empty while only the rank is known.
        dtype_name: Of the factors, as a config has it.
        algorithms: Of the changes of its modules, as in `Change`.
    """

    ranks: Mapping[str, int]
    shapes: Mapping[str, tuple[int, int]]
    dtype_name: str
    algorithms: Collection[str] = ("LoRA",)

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(self.ranks.values(), default=1)

    @property
    def is_lora(self) -> bool:
        """Whether every rank is that of factors as a trainer chose it."""
        return set(self.algorithms) <= {"LoRA"}
