"""What trainers call Z-Image's modules, and what the parts of a LoRA are called.

A key is `wrappers + module + suffix`. Wrappers are names of what the model was inside of; any number of them, in any order, is
taken off. The suffix is taken off by a table, after the name that PEFT gives an adapter. The module in between is compared with
the inventory after `.`, `_` and `-` are removed and letters are lowered. So `layers_0_attention_to_out_0`,
`layers.0.attention.to.out.0` and `layers.0.attention.to_out.0` are one name, garbled names included, and nothing is matched by a
part of it. Sources: the trainers' and clients' code; who writes what stands beside each entry.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice

from ..errors import nearest
from ..model import zimage
from ..model.tensors import native_name
from ..model.zimage import MODULES

# No module's name begins with one of these, so that taking them off is never ambiguous. Common sequences, and who writes them:
#   diffusion_model.               AI-Toolkit, ComfyUI, diffusion-pipe, None trainer, OneTrainer COMFY
#   transformer.                   diffusers, OneTrainer LEGACY and DIFFUSERS, SimpleTuner
#   lora_unet_, lora_unet__        musubi, OneTrainer KOHYA; VideoX-Fun
#   lycoris_                       LyCORIS, SimpleTuner, old AI-Toolkit LoKr
#   base_model.model.              peft save_pretrained; with transformer., InvokeAI's reading of it
#   lora_transformer_, transformer_    OneTrainer-style flat names; diffusers' kohya conversion
#   none                           DiffSynth, OneTrainer ORIGINAL
_WRAPPER = "base_model|diffusion_model|transformer|unet|dit|model|module|pipe|orig_mod|lora|lycoris"
_PREFIX = re.compile(rf"_*(?:(?:{_WRAPPER})[._]+)*")
# torch.compile, FSDP and activation checkpointing wrap single blocks too: these stand anywhere in a dotted name.
_INNER_WRAPPER = re.compile(r"(?:^|(?<=\.))_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")

# suffix -> (algorithm, part). Longest first, so that no suffix hides a longer one.
SUFFIXES: Mapping[str, tuple[str, str]] = {
    ".lora_linear_layer.down.weight": ("LoRA", "down"),
    ".lora_linear_layer.up.weight": ("LoRA", "up"),
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
    # What needs the base model's weight. `.weight` of LyCORIS' IA3 is told from a model's own by the `.on_input` beside it.
    ".dora_scale": ("DoRA", "dora_scale"),  # LyCORIS, OneTrainer, kohya's clients: (out, 1) or (1, in)
    ".magnitude": ("DoRA", "magnitude"),  # AI-Toolkit: (out,)
    ".lora_magnitude_vector.weight": ("DoRA", "magnitude"),  # PEFT, OneTrainer DIFFUSERS: (out,)
    ".lora_magnitude_vector": ("DoRA", "magnitude"),  # as PEFT saves it
    ".oft_blocks": ("OFT", "blocks"),  # LyCORIS, kohya: (n, b, b); BOFT: (m, n, b, b)
    ".rescale": ("OFT", "rescale"),
    ".oft_R.weight": ("OFT", "packed"),  # PEFT since 0.14, OneTrainer: (n, b (b - 1) / 2)
    ".oft_R.scaled_oft": ("OFT", "is_scaled"),  # OneTrainer
    ".boft_R": ("BOFT", "boft_R"),  # PEFT: (m, n, b, b)
    ".boft_s": ("BOFT", "boft_s"),
    ".ia3_l": ("IA3", "ia3_l"),  # PEFT: (out, 1) or (1, in)
    ".on_input": ("IA3", "on_input"),  # LyCORIS
    **{f".{part}.weight": ("GLoRA", part) for part in ("a1", "a2", "b1", "b2")},  # LyCORIS
    ".set_weight": ("replaced weight", "set"),  # ComfyUI
    ".alpha": ("", "alpha"),
}
# A PEFT model's state dict has the adapter's name there (`default` of DiffSynth); its parameters need no `.weight`.
_ADAPTER = re.compile(
    r"(?<=\.)(?:(?:lora_(?:[AB]|up|down|magnitude_vector)|oft_R)(\.[^.]+)(?=\.(?:weight|bias)$)"
    r"|(?:(?:lokr|hada)_w[12](?:_[ab])?|boft_[Rs]|ia3_l|lora_magnitude_vector)(\.(?!scale|weight)[^.]+)$)"
)

# What a tensor of float8 or int8 is multiplied with, by the ending that takes the place of its `.weight` (ComfyUI, torchao).
_SCALE = re.compile(r"(?:\.scale_weight|(?:\.weight)?[._]scale|\.weight_scale(?:_inv)?)$")
_INPUT_SCALE = re.compile(r"\.(?:scale_input|input_scale)$")  # of activations in float8: the weight is the same without it

# Changes of what is no weight matrix, by the ending of the key: a LoRA file has no place for them.
_VECTORS: Mapping[str, str] = {
    ".diff": "norm",
    ".w_norm": "norm",
    ".b_norm": "norm",
    ".diff_b": "bias",
    ".set_weight": "norm",
    **{f".{factor}.bias": "bias" for factor in ("lora_A", "lora_B", "lora_down", "lora_up", "lora.up")},  # PEFT: lora_bias
}

# A weight of the model itself, in a checkpoint or beside a LoRA (PEFT: base_layer, original_module, modules_to_save).
_WEIGHT = re.compile(r"(?:\.base_layer|\.original_module|\.modules_to_save\.[^.]+)?\.(?:weight|bias)$")

# Whatever no LoRA can hold, or by a rule that is not known.
_FOREIGN: Mapping[str, tuple[str, str]] = {
    r"\.oft_(diag|r)(\.|$)": ("an early form of OFT", "no program of today says what its change is"),
    r"\.(lambda_layer|[pq]_layer\.weight)$": ("T-LoRA", "its change depends on the timestep"),
    r"\.bias_(indices|values|size)$": ("the sparse residual of a LyCORIS extraction", "no LoRA file can hold it"),
    r"\.(lora_mid\.weight|lokr_t2|hada_t1|hada_t2|bm\.weight)$": (
        "a Tucker decomposition",
        "Z-Image has no convolutions for it",
    ),
}

# After the wrappers: kohya's te1, diffusers' text_encoder, ComfyUI's text_encoders, InvokeAI's qwen3-
_TEXT_ENCODER = re.compile(r"(?:te\d?|text_encoders?(?:_\d)?|text_model|qwen3)[._-]")

# First names of modules that other models have and Z-Image has not: Flux, SD3, Qwen-Image, Wan, SD 1.5, SDXL and their like.
_OF_OTHERS = re.compile(
    r"(?:(?:double|single|joint|down|up|input|output|transformer|single_transformer|middle|mid)_blocks?|blocks)[._]"
)


@dataclass(frozen=True)
class Part:
    """What one key of a file is.

    Attributes:
        part: Of a change: `up`, `down`, `alpha`, `w1`, `w2_a`, `diff`, ...; `scale` of one of these; `norm` and `bias` for
            vectors; `skip` for what is known and left alone; `foreign` for an algorithm that can't be merged; `weight` for one of
            the model itself; `unknown`.
        algorithm: As in `Change`; empty for alpha and all that is no part of a change.
        modules: Canonical names; three for a fused qkv. Of an unknown key: the modules whose names it begins with.
        native: Whether the module has the original checkpoint's name where diffusers has another (`attention.qkv`).
        prefix: As found, without what `torch.compile` and its like put there.
        suffix: As found.
        adapter: The name that PEFT gave the adapter, with its dot, or nothing.
        note: For skip and foreign: what it is and why.
    """

    part: str
    algorithm: str = ""
    modules: tuple[str, ...] = ()
    native: bool = False
    prefix: str = ""
    suffix: str = ""
    adapter: str = ""
    note: str = ""

    @property
    def is_of_change(self) -> bool:
        """Whether it is a part of a change, or the alpha of one."""
        return bool(self.algorithm) or self.part == "alpha"

    @property
    def style(self) -> str:
        """`prefix* suffix`, to name the format."""
        return f"{self.prefix}* {self.suffix}"


def parse_key(key: str) -> Part:
    """What this key of a LoRA file is; `unknown` if no rule explains it."""
    prefix, name = split_wrappers(key)
    if _TEXT_ENCODER.match(name):
        return Part("skip", note="text encoder")
    if "_aux." in key:
        return Part("skip", note="auxiliary tensor of a slider tool")
    for pattern, (algorithm, reason) in _FOREIGN.items():
        if re.search(pattern, key):
            return Part("foreign", algorithm, note=reason)
    if change := _part_of_change(prefix, name):
        return change
    if (scale := _SCALE.search(name)) and (of := _scaled(prefix, name[: scale.start()])):
        return replace(of, part="scale", algorithm="")
    plain = _without_adapter(name)[0]
    vector = next((s for s in _VECTORS if plain.endswith(s)), None)
    if vector and _flat(plain.removesuffix(vector)) in _VECTOR_NAMES:
        return Part(_VECTORS[vector])
    if (weight := _WEIGHT.search(name)) and _flat(name[: weight.start()]) in _VECTOR_NAMES:
        return Part("weight")
    modules = _modules_of(name)
    if modules and _INPUT_SCALE.search(name):
        return Part("skip", note="scale of activations")
    return Part("unknown", modules=modules)


def scaled_keys(key: str) -> tuple[str, str]:
    """The two keys that a scale of this key may belong to: with and without `.weight`."""
    of = _SCALE.sub("", key)
    return f"{of}.weight", of


def is_of_another_model(key: str) -> bool:
    """Whether a key has the name of a module that other models have and Z-Image has not."""
    return bool(_OF_OTHERS.match(split_wrappers(key)[1]))


def split_wrappers(key: str) -> tuple[str, str]:
    """(wrappers, the rest)."""
    key = _INNER_WRAPPER.sub("", key)
    prefix = _PREFIX.match(key)
    assert prefix, "it matches nothing at least"
    return prefix[0], key[prefix.end() :]


def _without_adapter(name: str) -> tuple[str, str]:
    """(name without PEFT's name of the adapter, that name with its dot)."""
    found = _ADAPTER.search(name)
    if not found:
        return name, ""
    group = 1 if found[1] else 2
    return name[: found.start(group)] + name[found.end(group) :], found[group]


def _part_of_change(prefix: str, name: str) -> Part | None:
    """The part of a change that has this name, by the tables of suffixes and modules."""
    plain, adapter = _without_adapter(name)
    suffix = next((s for s in SUFFIXES if plain.endswith(s)), None)
    stem = plain.removesuffix(suffix or "")
    if not suffix or not (found := _SPELLINGS.get(_flat(stem))):
        return None
    algorithm, part = SUFFIXES[suffix]
    return Part(part, algorithm, *found, prefix, name.removeprefix(stem), adapter)


def _scaled(prefix: str, name: str) -> Part | None:
    """The factor that a scale belongs to, whose own name may end in `.weight`."""
    parts = (_part_of_change(prefix, of) for of in (f"{name}.weight", name))
    return next((part for part in parts if part and part.algorithm), None)


def _modules_of(name: str) -> tuple[str, ...]:
    """The modules whose name this one begins with, up to one of its dots."""
    ends = [dot.start() for dot in islice(re.finditer(r"\.", name), 8)]  # garbled names have up to seven
    return next((found[0] for end in reversed(ends) if (found := _SPELLINGS.get(_flat(name[:end])))), ())


def nearest_key(key: str) -> str:
    """' (did you mean ...?)' with the known key that looks most like this one."""
    prefix, name = split_wrappers(key)
    suffix = next((s for s in SUFFIXES if name.endswith(s)), "")
    return nearest(prefix + name, (prefix + m + (suffix or ".lora_A.weight") for m in MODULES))


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
