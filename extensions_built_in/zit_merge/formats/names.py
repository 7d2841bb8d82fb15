"""What trainers call Z-Image's modules, and what the parts of a LoRA are called.

A key is `prefix + module + suffix`. The prefix and the suffix are taken off by the tables below; the module in between is
compared with the inventory after `.`, `_` and `-` are removed and letters are lowered. So `layers_0_attention_to_out_0`,
`layers.0.attention.to.out.0` and `layers.0.attention.to_out.0` are one name, garbled names included, and nothing is matched
by a part of it. Sources: the trainers' and clients' code; who writes what stands beside each entry.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .. import zimage
from ..errors import nearest
from ..zimage import MODULES

# Longest first, so that no prefix hides a longer one. The bare form comes last.
PREFIXES: tuple[str, ...] = (
    "base_model.model.transformer.",  # InvokeAI's reading of PEFT
    "base_model.model.",  # peft save_pretrained
    "diffusion_model.",  # AI-Toolkit, ComfyUI, diffusion-pipe, None trainer, OneTrainer COMFY
    "lora_unet__",  # VideoX-Fun
    "transformer.",  # diffusers, OneTrainer LEGACY and DIFFUSERS, SimpleTuner
    "lora_unet_",  # musubi, OneTrainer KOHYA
    "lycoris_",  # LyCORIS, SimpleTuner, old AI-Toolkit LoKr
    "",  # DiffSynth, OneTrainer ORIGINAL
)

# suffix -> part. Longest first for the same reason.
SUFFIXES: Mapping[str, str] = {
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_A.default.weight": "down",  # DiffSynth, PEFT with its adapter's name
    ".lora_B.default.weight": "up",
    ".lora_down.weight": "down",  # kohya and its family
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",  # Anime-Z
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_A.weight": "down",  # PEFT, AI-Toolkit
    ".lora_B.weight": "up",
    ".lora_A": "down",
    ".lora_B": "up",
    ".alpha": "alpha",
}

# What is not a pair of LoRA factors, by the ending of its key.
_FOREIGN: Mapping[str, str] = {
    r"\.lokr_(w1|w2|w1_a|w1_b|w2_a|w2_b|t2)$": "LoKr",
    r"\.hada_(w1_a|w1_b|w2_a|w2_b|t1|t2)$": "LoHa",
    r"\.(dora_scale|magnitude|lora_magnitude_vector(\.default)?(\.weight)?)$": "DoRA",
    r"\.oft_(blocks|diag|R(\.default)?(\.weight)?)$": "OFT",
    r"\.on_input$": "IA3",
    r"\.(a1|a2|b1|b2)\.weight$": "GLoRA",
    r"\.(diff|diff_b|set_weight)$": "full weight differences",
    r"\.(w_norm|b_norm)$": "norm weights",
    r"\.lora_mid\.weight$": "Tucker-decomposed LoRA",
    r"\.bias_(indices|values|size)$": "sparse bias",
}

_TEXT_ENCODER = ("text_encoder.", "text_encoders.", "text_encoder_", "text_model.", "lora_te")


@dataclass(frozen=True)
class Part:
    """What one key of a file is.

    Attributes:
        part: `up`, `down`, `alpha`; `skip` for what is known and left alone; `foreign` for another algorithm; `unknown`.
        modules: Canonical names; three for a fused qkv, none unless part is up, down or alpha.
        note: For skip and foreign: what it is.
        style: `prefix* suffix` as found, to name the format.
    """

    part: str
    modules: tuple[str, ...] = ()
    note: str = ""
    style: str = ""


def parse_key(key: str) -> Part:
    """What this key of a LoRA file is; `unknown` if no rule explains it."""
    if key.startswith(_TEXT_ENCODER):
        return Part("skip", note="text encoder")
    if "_aux." in key:
        return Part("skip", note="auxiliary tensor of a slider tool")
    for pattern, algorithm in _FOREIGN.items():
        if re.search(pattern, key):
            return Part("foreign", note=algorithm)
    suffix = next((s for s in SUFFIXES if key.endswith(s)), None)
    if suffix is None:
        return Part("unknown")
    stem = key.removesuffix(suffix)
    for prefix in PREFIXES:
        modules = _SPELLINGS.get(_flat(stem.removeprefix(prefix))) if stem.startswith(prefix) else None
        if modules:
            return Part(SUFFIXES[suffix], modules, style=f"{prefix}* {suffix}")
    return Part("unknown")


def nearest_key(key: str) -> str:
    """' (did you mean ...?)' with the known key that looks most like this one."""
    suffix = next((s for s in SUFFIXES if key.endswith(s)), "")
    prefix = next(p for p in PREFIXES if key.startswith(p))
    module = key.removesuffix(suffix).removeprefix(prefix)
    return nearest(prefix + module + suffix, (prefix + m + (suffix or ".lora_A.weight") for m in MODULES))


def _flat(name: str) -> str:
    """Without separators, but for one between digits: layers.1.0 is not layers.10."""
    return re.sub(r"[._-]", "", re.sub(r"(?<=\d)[._-]+(?=\d)", "~", name)).lower()


def _spellings() -> dict[str, tuple[str, ...]]:
    """flattened name -> canonical modules, for every spelling that a trainer or client is known to use."""
    table: dict[str, tuple[str, ...]] = {}
    for module in MODULES.values():
        block = module.name.removesuffix(".attention.to_out.0")
        names = [module.name]
        if module.component == "to_out":
            names += [f"{block}.attention.{out}" for out in ("to_out", "out", "out.0")]  # ComfyUI: attention.out
        elif module.component == "adaLN_modulation":
            names.append(module.name.removesuffix(".0"))
        elif module.section == "other":
            names.append(module.component)  # the original checkpoint's x_embedder, final_layer.linear, ...
            names += {
                "final_layer.adaLN_modulation": ["final_layer.adaLN_modulation.1"],
                "cap_embedder": ["cap_embedder.1"],
            }.get(module.component, [])
        for name in names:
            table[_flat(name)] = (module.name,)
    for section, count in zimage.SECTIONS.items():
        for i in range(count):
            fused = tuple(f"{section}.{i}.attention.{c}" for c in ("to_q", "to_k", "to_v"))  # rows in this order
            table[_flat(f"{section}.{i}.attention.qkv")] = fused
    return table


_SPELLINGS = _spellings()
