"""The forms in which programs read LoRA files.

The default, `ai-toolkit`, is the one that every client reads (measured, see docs/readers.md; musubi converts it):

    diffusion_model.<diffusers module>.lora_A.weight   (r, in)
    diffusion_model.<diffusers module>.lora_B.weight   (out, r)
    diffusion_model.<diffusers module>.alpha           float32 scalar = r

One rank r in every module (loaders up to diffusers 0.39 take one module's scale for all), alpha equal to it (some ignore it, some
require it), 2 at least (stable-diffusion.cpp takes the width of the input for a rank of 1 and divides alpha by it), q, k and v
together and w1 with w3 (stable-diffusion.cpp and Nunchaku count them), layers.0.attention.to_k always (AI-Toolkit reads the rank
there). The other forms hold the same modules under other names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import counted
from ..model import zimage
from ..model.tensors import native_name
from ..model.zimage import MODULES
from .spec import Layout

if TYPE_CHECKING:
    from torch import Tensor

    from ..algebra.factors import Factors

_TOGETHER: tuple[tuple[str, ...], ...] = (("to_q", "to_k", "to_v"), ("w1", "w3"))
ALWAYS = "layers.0.attention.to_k"
LEAST = 2  # components beside an alpha key: stable-diffusion.cpp reads the rank as ne[ggml_n_dims - 1] of down, its width for 1


@dataclass(frozen=True)
class Form:
    """How a form names things.

    Attributes:
        prefix: Of every key.
        down, up: Endings of the keys of the factors.
        alpha: Whether the file has alpha keys.
        flat: Dots of module names become underscores.
        native: The original checkpoint's names, q, k and v fused block by block.
    """

    prefix: str
    down: str = ".lora_A.weight"
    up: str = ".lora_B.weight"
    alpha: bool = True
    flat: bool = False
    native: bool = False

    def units(self, modules: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Key stem -> the modules it holds, in the order of the modules."""
        units: dict[str, tuple[str, ...]] = {}
        for module in modules:
            stem = native_name(module) if self.native else module
            stem = self.prefix + (stem.replace(".", "_") if self.flat else stem)
            units[stem] = (*units.get(stem, ()), module)
        return units

    def least_ranks(self, modules: Iterable[str]) -> dict[str, int]:
        """Module -> the lowest rank that it may have, so that no alpha stands beside a rank of 1."""
        units = self.units(modules).values()
        return {m: LEAST if self.alpha and len(unit) < LEAST else 1 for unit in units for m in unit}


FORMS: Mapping[str, Form] = {
    "ai-toolkit": Form("diffusion_model."),
    "diffusers": Form("transformer.", alpha=False),  # with alpha, every diffusers refuses it
    "kohya": Form("lora_unet_", ".lora_down.weight", ".lora_up.weight", flat=True),  # musubi
    "comfyui": Form("diffusion_model.", ".lora_down.weight", ".lora_up.weight", native=True),  # as ComfyUI's SaveLoRA
}


def complete(modules: Iterable[str], sizes: Mapping[str, int]) -> list[str]:
    """These modules and the ones that clients want beside them, in the model's order.

    Args:
        modules: Canonical names.
        sizes: The model's sizes; a module whose shape they do not give is not added.
    """
    wanted = {*modules, *([ALWAYS] if "dim" in sizes else [])}
    for name in list(wanted):
        module = MODULES[name]
        for together in _TOGETHER:
            if module.section != "other" and module.component in together:
                wanted |= {zimage.at(module.section, module.index, c).name for c in together}
    return [name for name in MODULES if name in wanted]


def why_padded(modules: Collection[str]) -> str:
    """Why a file holds these modules, which nothing changes, in a sentence.

    Args:
        modules: Of `complete`, one or more.
    """
    reasons = []
    if ALWAYS in modules:
        reasons.append(f"AI-Toolkit reads the rank at {ALWAYS}")
    if set(modules) - {ALWAYS}:
        reasons.append("programs count q, k and v of a block together, w1 and w3 too")
    return f"{counted(len(modules), 'module')} of zeros {'is' if len(modules) == 1 else 'are'} added: {', and '.join(reasons)}"


def layout(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int], dtype: str, form: Form) -> Layout:
    """key -> (dtype, shape) in the order of the file: alphas first, so that every tensor stays aligned to its size.

    Args:
        shapes: Module -> (out, in).
        ranks: Module -> rank.
        dtype: Of the factors.
        form: One of FORMS.
    """
    units = form.units(shapes)
    entries: Layout = {f"{stem}.alpha": ("fp32", ()) for stem in units} if form.alpha else {}
    for stem, modules in units.items():
        rank = sum(ranks[m] for m in modules)
        entries[stem + form.down] = (dtype, (rank, shapes[modules[0]][1]))
        entries[stem + form.up] = (dtype, (sum(shapes[m][0] for m in modules), rank))
    return entries


def fuse(parts: Sequence[Factors]) -> Factors:
    """The changes of the modules of one unit as one: down stacked (sum r, in), up block-diagonal (sum out, sum r)."""
    if len(parts) == 1:
        return parts[0]
    import torch

    from ..algebra.factors import Factors

    up: Tensor = torch.block_diag(*(p.up for p in parts))
    return Factors(up, torch.cat([p.down for p in parts]))
