"""What trainers call Z-Image's modules, and what the parts of a LoRA are called.

A key is `prefix + module + suffix`. The prefix and the suffix are taken off by the tables below; the module in between is
compared with the inventory after `.`, `_` and `-` are removed and letters are lowered. So `layers_0_attention_to_out_0`,
`layers.0.attention.to.out.0` and `layers.0.attention.to_out.0` are one name, garbled names included, and nothing is matched
by a part of it. Sources: the trainers' and clients' code; who writes what stands beside each entry.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..errors import nearest
from ..model import zimage
from ..model.zimage import MODULES

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

# suffix -> (algorithm, part). Longest first for the same reason.
SUFFIXES: Mapping[str, tuple[str, str]] = {
    ".lora_linear_layer.down.weight": ("LoRA", "down"),
    ".lora_linear_layer.up.weight": ("LoRA", "up"),
    ".lora_A.default.weight": ("LoRA", "down"),  # DiffSynth, PEFT with its adapter's name
    ".lora_B.default.weight": ("LoRA", "up"),
    ".lora_down.weight": ("LoRA", "down"),  # kohya and its family
    ".lora_up.weight": ("LoRA", "up"),
    ".lora.down.weight": ("LoRA", "down"),  # Anime-Z
    ".lora.up.weight": ("LoRA", "up"),
    "_lora.down.weight": ("LoRA", "down"),
    "_lora.up.weight": ("LoRA", "up"),
    ".lora_A.weight": ("LoRA", "down"),  # PEFT, AI-Toolkit
    ".lora_B.weight": ("LoRA", "up"),
    ".lora_A": ("LoRA", "down"),
    ".lora_B": ("LoRA", "up"),
    **{f".lokr_{part}": ("LoKr", part) for part in ("w1_a", "w1_b", "w2_a", "w2_b", "w1", "w2")},  # LyCORIS, PEFT
    **{f".hada_{part}": ("LoHa", part) for part in ("w1_a", "w1_b", "w2_a", "w2_b")},
    ".diff": ("full difference", "diff"),
    ".alpha": ("", "alpha"),
}

# Changes of what is no weight matrix, by the ending of the key: a LoRA file has no place for them.
_VECTORS: Mapping[str, str] = {".diff": "norm", ".w_norm": "norm", ".b_norm": "norm", ".diff_b": "bias"}

# Whatever changes a weight by a rule that needs the weight itself, or by one that Z-Image's layers do not have.
_NEEDS_BASE = "its change depends on the base model's weights, which no merge of LoRAs reads"
_FOREIGN: Mapping[str, tuple[str, str]] = {
    r"\.(dora_scale|magnitude|lora_magnitude_vector(\.default)?(\.weight)?)$": ("DoRA", _NEEDS_BASE),
    r"\.oft_(blocks|diag|R(\.default)?(\.weight)?)$": ("OFT or BOFT", _NEEDS_BASE),
    r"\.on_input$": ("IA3", _NEEDS_BASE),
    r"\.(a1|a2|b1|b2)\.weight$": ("GLoRA", _NEEDS_BASE),
    r"\.(lambda_layer|[pq]_layer\.weight)$": ("T-LoRA", "its change depends on the timestep"),
    r"\.set_weight$": ("a replaced weight (set_weight)", _NEEDS_BASE),
    r"\.bias_(indices|values|size)$": ("the sparse residual of a LyCORIS extraction", "no LoRA file can hold it"),
    r"\.(lora_mid\.weight|lokr_t2|hada_t1|hada_t2)$": ("a Tucker decomposition", "Z-Image has no convolutions for it"),
}

_TEXT_ENCODER = ("text_encoder.", "text_encoders.", "text_encoder_", "text_model.", "lora_te")


@dataclass(frozen=True)
class Part:
    """What one key of a file is.

    Attributes:
        part: Of a change: `up`, `down`, `alpha`, `w1`, `w2_a`, `diff`, ...; `norm` and `bias` for vectors; `skip` for what is
            known and left alone; `foreign` for an algorithm that can't be merged; `unknown`.
        algorithm: LoRA, LoKr, LoHa or full difference; empty for alpha and all that is no part of a change.
        modules: Canonical names; three for a fused qkv.
        native: Whether the module has the original checkpoint's name where diffusers has another (`attention.qkv`).
        prefix: As found.
        suffix: As found.
        note: For skip and foreign: what it is and why.
    """

    part: str
    algorithm: str = ""
    modules: tuple[str, ...] = ()
    native: bool = False
    prefix: str = ""
    suffix: str = ""
    note: str = ""

    @property
    def style(self) -> str:
        """`prefix* suffix`, to name the format."""
        return f"{self.prefix}* {self.suffix}"


def parse_key(key: str) -> Part:
    """What this key of a LoRA file is; `unknown` if no rule explains it."""
    if key.startswith(_TEXT_ENCODER):
        return Part("skip", note="text encoder")
    if "_aux." in key:
        return Part("skip", note="auxiliary tensor of a slider tool")
    for pattern, (algorithm, reason) in _FOREIGN.items():
        if re.search(pattern, key):
            return Part("foreign", algorithm, note=reason)
    suffix = next((s for s in SUFFIXES if key.endswith(s)), None)
    if suffix:
        algorithm, part = SUFFIXES[suffix]
        for prefix, name in _stems(key.removesuffix(suffix)):
            if name in _SPELLINGS:
                modules, native = _SPELLINGS[name]
                return Part(part, algorithm, modules, native, prefix, suffix)
    vector = next((s for s in _VECTORS if key.endswith(s)), None)
    if vector and any(name in _VECTOR_NAMES for _, name in _stems(key.removesuffix(vector))):
        return Part(_VECTORS[vector])
    return Part("unknown")


def _stems(stem: str) -> Iterator[tuple[str, str]]:
    """(prefix, flattened module name) for each prefix that the stem may have."""
    return ((p, _flat(stem.removeprefix(p))) for p in PREFIXES if stem.startswith(p))


def native_name(module: str) -> str:
    """The original checkpoint's name of a module, which ComfyUI uses too: q, k and v share one."""
    found = MODULES[module]
    if found.section == "other":
        return {"final_layer.adaLN_modulation": "final_layer.adaLN_modulation.1", "cap_embedder": "cap_embedder.1"}.get(
            found.component, found.component
        )
    name = module.replace(".attention.to_out.0", ".attention.out")
    return re.sub(r"\.attention\.to_[qkv]$", ".attention.qkv", name)


def nearest_key(key: str) -> str:
    """' (did you mean ...?)' with the known key that looks most like this one."""
    suffix = next((s for s in SUFFIXES if key.endswith(s)), "")
    prefix = next(p for p in PREFIXES if key.startswith(p))
    module = key.removesuffix(suffix).removeprefix(prefix)
    return nearest(prefix + module + suffix, (prefix + m + (suffix or ".lora_A.weight") for m in MODULES))


def _flat(name: str) -> str:
    """Without separators, but for one between digits: layers.1.0 is not layers.10."""
    return re.sub(r"[._-]", "", re.sub(r"(?<=\d)[._-]+(?=\d)", "~", name)).lower()


def _spellings() -> dict[str, tuple[tuple[str, ...], bool]]:
    """flattened name -> (canonical modules, native), for every spelling that a trainer or client is known to use."""
    table: dict[str, tuple[tuple[str, ...], bool]] = {}
    for module in MODULES.values():
        own, native = [module.name], [native_name(module.name)]
        if module.component in ("to_q", "to_k", "to_v"):
            native = []  # fused, below
        elif module.component == "to_out":
            own.append(module.name.removesuffix(".0"))
            native.append(native[0] + ".0")
        elif module.component == "adaLN_modulation":
            own.append(module.name.removesuffix(".0"))
        elif module.section == "other":
            native.append(module.component)
        table |= {_flat(name): ((module.name,), True) for name in native}
        table |= {_flat(name): ((module.name,), False) for name in own}
    for block in _blocks():
        fused = tuple(f"{block}.attention.{c}" for c in ("to_q", "to_k", "to_v"))  # rows in this order
        table[_flat(f"{block}.attention.qkv")] = fused, True
    return table


def _vector_names() -> set[str]:
    """The flattened names of what has a bias or is a norm or a token: no weight matrix (diffusers transformer_z_image.py)."""
    names = {"x_pad_token", "cap_pad_token", "cap_embedder.0"}
    for block in _blocks():
        names |= {f"{block}.{norm}{i}" for norm in ("attention_norm", "ffn_norm") for i in (1, 2)}
        names |= {f"{block}.attention.{norm}" for norm in ("norm_q", "norm_k", "q_norm", "k_norm")}  # ComfyUI: q_norm
    return {_flat(name) for name in names} | set(_SPELLINGS)


def _blocks() -> list[str]:
    return [f"{section}.{i}" for section, count in zimage.SECTIONS.items() for i in range(count)]


_SPELLINGS = _spellings()
_VECTOR_NAMES = _vector_names()
