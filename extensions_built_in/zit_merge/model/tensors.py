"""Every tensor of Z-Image's transformer, under diffusers' name and under that of the original checkpoint.

ComfyUI has kept the original's names: q, k and v of a block are the thirds of one `qkv`, in this order, and some parts are called
otherwise. Sources: diffusers `transformer_z_image.py` and ComfyUI `comfy/utils.py` (z_image_to_diffusers).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .zimage import MODULES, SECTIONS

_QKV = ("to_q", "to_k", "to_v")
_NORMS = ("attention.norm_q", "attention.norm_k", "attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
_NATIVE_NORMS = {"norm_q": "q_norm", "norm_k": "k_norm"}
_NATIVE_OTHERS = {"final_layer.adaLN_modulation": "final_layer.adaLN_modulation.1", "cap_embedder": "cap_embedder.1"}


@dataclass(frozen=True)
class ModelTensor:
    """One tensor of the transformer.

    Attributes:
        name: In diffusers.
        native: In the original checkpoint and in ComfyUI; three share that of a fused qkv.
        third: Which third of its rows this one is there, or None.
        module: The canonical name of the linear layer whose weight it is; None for biases, norms and tokens.
    """

    name: str
    native: str
    third: int | None = None
    module: str | None = None


def native_name(module: str) -> str:
    """The original checkpoint's name of a module, which ComfyUI uses too: q, k and v share one."""
    found = MODULES[module]
    if found.section == "other":
        return _NATIVE_OTHERS.get(found.component, found.component)
    name = module.replace(".attention.to_out.0", ".attention.out")
    return re.sub(r"\.attention\.to_[qkv]$", ".attention.qkv", name)


def block_of(name: str) -> str | None:
    """`layers.3` of a tensor in it; None for one outside of all blocks."""
    section, _, rest = name.partition(".")
    return f"{section}.{rest.partition('.')[0]}" if section in SECTIONS else None


def _tensors() -> Iterator[ModelTensor]:
    yield ModelTensor("x_pad_token", "x_pad_token")
    yield ModelTensor("cap_pad_token", "cap_pad_token")
    yield ModelTensor("cap_embedder.0.weight", "cap_embedder.0.weight")
    block = None
    for module in MODULES.values():
        here = block_of(module.name)
        if here and here != block:
            block = here
            for norm in _NORMS:
                head, _, last = f"{block}.{norm}".rpartition(".")
                yield ModelTensor(f"{block}.{norm}.weight", f"{head}.{_NATIVE_NORMS.get(last, last)}.weight")
        native = native_name(module.name)
        third = _QKV.index(module.component) if module.component in _QKV else None
        yield ModelTensor(f"{module.name}.weight", f"{native}.weight", third, module.name)
        if module.section == "other" or module.component == "adaLN_modulation":
            yield ModelTensor(f"{module.name}.bias", f"{native}.bias")


TENSORS: Mapping[str, ModelTensor] = {t.name: t for t in _tensors()}  # the 521
