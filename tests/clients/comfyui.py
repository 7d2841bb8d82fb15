"""ComfyUI's rules for the keys of a Z-Image LoRA, as data, and what they make of a file.

The facts are read from Comfy-Org/ComfyUI as it is since a3b5d499 (2026-01-12): comfy/lora.py (model_lora_keys_unet, load_lora),
comfy/utils.py (z_image_to_diffusers), comfy/weight_adapter/{lora,loha,lokr}.py. What runs here is our own reading of them, for
machines without ComfyUI; test_comfyui.py compares it with the code itself. Good for LoRA, LoHa, LoKr and whole differences, not
for what needs the base weights.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

Shapes = Mapping[str, tuple[int, int]]  # diffusers module -> (out, in)
Tensors = Mapping[str, torch.Tensor]

# ComfyUI keeps the original checkpoint's names. (diffusers name, native name); what is not named here has one name in both.
NATIVE_NAMES: tuple[tuple[str, str], ...] = (
    (r"\.attention\.to_[qkv]$", ".attention.qkv"),
    (r"\.attention\.to_out\.0$", ".attention.out"),
    (r"\.attention\.norm_q$", ".attention.q_norm"),
    (r"\.attention\.norm_k$", ".attention.k_norm"),
    (r"^all_x_embedder\.2-1$", "x_embedder"),
    (r"^all_final_layer\.2-1\.", "final_layer."),
)
QKV = ("to_q", "to_k", "to_v")  # in this order the rows of attention.qkv

# (prefix, whose names follow, whether they are flat: every . an _), in ComfyUI's order: of two keys for one weight the later wins
PREFIXES: tuple[tuple[str, str, bool], ...] = (
    ("lora_unet_", "native", True),
    ("diffusion_model.", "native", False),
    ("diffusion_model.", "diffusers", False),
    ("transformer.", "diffusers", False),
    ("lycoris_", "diffusers", True),
    ("", "diffusers", False),
)

# (up, down), the first that is there counts. A down without its up is an unknown key; an up without its down breaks the loading.
PAIRS: tuple[tuple[str, str], ...] = (
    (".lora_up.weight", ".lora_down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    (".lora_B", ".lora_A"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
)
LOHA = (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b")
LOKR = tuple(f".lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b"))
WHOLE = (".w_norm", ".diff")  # a change of the weight itself
BIAS = (".b_norm", ".diff_b")
ALPHA = ".alpha"  # scale = alpha / rank; 1 without the key; nothing in the metadata counts
NEEDS_BASE = (".dora_scale", ".a1.weight", ".oft_blocks", ".set_weight", ".reshape_weight")

# The weights that are no linears: theirs are vectors, no business of a LoRA, but known to ComfyUI.
NORMS = ("attention.norm_q", "attention.norm_k", "attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")


@dataclass(frozen=True)
class Target:
    """Where a name leads: a native weight, and which third of its rows."""

    weight: str
    third: int | None = None


@dataclass
class Applied:
    """What ComfyUI makes of a file.

    Attributes:
        deltas: Diffusers module -> float64 (out, in); without the modules that nothing changes.
        ignored: Keys that lead nowhere; ComfyUI warns "lora key not loaded".
        failed: Native weights whose change has another size than they; ComfyUI logs an error and goes on without it.
        elsewhere: Keys that change norms and biases.
    """

    deltas: dict[str, torch.Tensor] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)


def native(module: str) -> str:
    """ComfyUI's name of a diffusers module."""
    for pattern, name in NATIVE_NAMES:
        module = re.sub(pattern, name, module)
    return module


def key_map(shapes: Shapes) -> dict[str, Target]:
    """Every name, prefix included and suffix not, under which ComfyUI looks for a LoRA.

    Args:
        shapes: The model's linears; their blocks have the usual norms.
    """
    blocks = dict.fromkeys(name.rpartition(".attention.")[0] for name in shapes if ".attention." in name)
    names = [*shapes, *(f"{block}.{norm}" for block in blocks for norm in NORMS), "cap_embedder.0"]
    found: dict[str, Target] = {}
    for whose in ("native", "diffusers"):  # all native ones come first
        for module in names:
            for prefix, _, flat in (p for p in PREFIXES if p[1] == whose):
                name = native(module) if whose == "native" else module
                third = QKV.index(module[-4:]) if whose == "diffusers" and module.endswith(QKV) else None
                found[prefix + (name.replace(".", "_") if flat else name)] = Target(native(module), third)
    return found


def apply(tensors: Tensors, shapes: Shapes) -> Applied:
    """What a file changes in ComfyUI.

    Args:
        tensors: The file.
        shapes: The model's linears.

    Raises:
        KeyError: ComfyUI can't load the file: a pair has only its up half, a LoHa or LoKr lacks a factor.
        NotImplementedError: The change depends on the base weights.
    """
    out = Applied()
    patches: dict[Target, torch.Tensor] = {}
    used: set[str] = set()
    for name, target in key_map(shapes).items():
        if any(name + suffix in tensors for suffix in NEEDS_BASE):
            raise NotImplementedError(f"{name}: needs the base weights")
        for delta, keys in _changes(name, tensors):
            patches[target] = delta  # of two kinds under one name the later wins
            used |= keys
        biases = {name + suffix for suffix in BIAS} & tensors.keys()
        used |= biases | ({name + ALPHA} & tensors.keys())
        out.elsewhere += sorted(biases)
    out.ignored = [key for key in tensors if key not in used]
    _add(out, patches, shapes)
    return out


def _changes(name: str, tensors: Tensors) -> Iterator[tuple[torch.Tensor, set[str]]]:
    """The deltas stored under one name, and the keys they are made of."""
    alpha = float(tensors[name + ALPHA]) if name + ALPHA in tensors else None
    for up, down in PAIRS:
        if name + up in tensors:
            yield _lora(tensors[name + up], tensors[name + down], alpha), {name + up, name + down}
            break
    if name + LOHA[0] in tensors:
        yield _loha(*(tensors[name + suffix] for suffix in LOHA), alpha=alpha), {name + suffix for suffix in LOHA}
    lokr = {suffix: tensors[name + suffix] for suffix in LOKR if name + suffix in tensors}
    if lokr:
        yield _lokr(lokr, alpha), {name + suffix for suffix in lokr}
    for suffix in WHOLE:
        if name + suffix in tensors:
            yield tensors[name + suffix].double(), {name + suffix}


def _lora(up: torch.Tensor, down: torch.Tensor, alpha: float | None) -> torch.Tensor:
    return up.double() @ down.double() * (1.0 if alpha is None else alpha / down.shape[0])


def _loha(w1_a: torch.Tensor, w1_b: torch.Tensor, w2_a: torch.Tensor, w2_b: torch.Tensor, *, alpha: float | None) -> torch.Tensor:
    scale = 1.0 if alpha is None else alpha / w1_b.shape[0]
    return (w1_a.double() @ w1_b.double()) * (w2_a.double() @ w2_b.double()) * scale


def _lokr(factors: Tensors, alpha: float | None) -> torch.Tensor:
    """kron(w1, w2); alpha counts only where a factor is a product, the rank is that of w2 before that of w1."""
    whole, rank = [], None
    for part in (".lokr_w1", ".lokr_w2"):
        if part in factors:
            whole.append(factors[part].double())
        else:
            whole.append(factors[f"{part}_a"].double() @ factors[f"{part}_b"].double())
            rank = factors[f"{part}_b"].shape[0]
    return torch.kron(*whole) * (1.0 if alpha is None or rank is None else alpha / rank)


def _add(out: Applied, patches: Mapping[Target, torch.Tensor], shapes: Shapes) -> None:
    """Adds the patches up: a change of the whole qkv and one of its third are two patches, both count."""
    for target, delta in patches.items():
        modules = [m for m in shapes if native(m) == target.weight]
        if target.third is not None:
            modules = [m for m in modules if m.endswith(QKV[target.third])]
        if not modules:
            out.elsewhere.append(target.weight)
            continue
        rows = [shapes[m][0] for m in modules]
        wanted = (sum(rows), shapes[modules[0]][1])
        if delta.numel() != wanted[0] * wanted[1]:
            out.failed.append(target.weight)
            continue
        for module, part in zip(modules, delta.reshape(wanted).split(rows), strict=True):
            out.deltas[module] = out.deltas.get(module, 0) + part
