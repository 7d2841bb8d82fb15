"""LoRA files as each trainer writes them, beside the slow and obvious delta of every module.

An oracle for readers: nothing here comes from the package under test. Each producer lays out a state dict by
the definition of its format and computes the deltas from the tensors as stored, rounding included.

Notation: a module's weight is (out, in); `down` (A) is (r, in), `up` (B) is (out, r);
delta = up @ down * alpha / r. A *unit* is what a file stores under one name: one diffusers module, or several
of them stacked by rows (the native `attention.qkv`).
"""

import hashlib
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

Shapes = dict[str, tuple[int, int]]  # diffusers module name -> (out, in)
Tensors = dict[str, torch.Tensor]

FAKE_HASH = "f" * 64  # recognisable: an output that carries it has copied an input's identity
AI_TOOLKIT_FULL_ALPHA = 9999999999.0  # what ai-toolkit stores beside two full LoKr factors; inf in fp16
QKV_PARTS = 3


@dataclass(frozen=True)
class Made:
    """One file.

    Attributes:
        tensors: What the file holds.
        metadata: Its safetensors metadata.
        deltas: Diffusers module name -> float64 delta (out, in), from the stored tensors by the format's own
            rule. Empty where the rule needs the base weights.
        sidecars: File name -> text of what the trainer puts beside the file.
    """

    tensors: Tensors
    metadata: dict[str, str]
    deltas: Tensors
    sidecars: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Producer:
    """A trainer or converter.

    Attributes:
        name: Slug.
        make: (shapes, rank, seed, dtype) -> one file.
        kind: "lora", "lokr", "loha", "lora+lokr", "full", "full-mixed", "norm", or one that needs the
            base weights: "dora", "oft", "ia3", "glora".
        alpha: Where the scale comes from: "key", "metadata", "sidecar" or "none".
        note: What is peculiar.
    """

    name: str
    make: Callable[[Shapes, int, int, torch.dtype], Made]
    kind: str
    alpha: str
    note: str


def save(made: Made, path: str | Path) -> None:
    """Writes the safetensors file, without the sidecars."""
    tensors = {key: tensor.contiguous() for key, tensor in made.tensors.items()}
    save_file(tensors, str(path), metadata=made.metadata or None)


def save_sidecars(made: Made, folder: str | Path) -> None:
    """Writes what the trainer puts beside the file."""
    for name, text in made.sidecars.items():
        (Path(folder) / name).write_text(text, encoding="utf-8")


def _block_shapes(block: str, dim: int, ffn: int, temb: int | None) -> Shapes:
    """The linears of one transformer block; `temb` None means no adaLN."""
    attention = {f"{block}.attention.{leaf}": (dim, dim) for leaf in ("to_q", "to_k", "to_v", "to_out.0")}
    feed_forward = {
        f"{block}.feed_forward.w1": (ffn, dim),
        f"{block}.feed_forward.w2": (dim, ffn),
        f"{block}.feed_forward.w3": (ffn, dim),
    }
    ada_ln = {} if temb is None else {f"{block}.adaLN_modulation.0": (4 * dim, temb)}
    return attention | feed_forward | ada_ln


def small_shapes(dim: int = 48, ffn: int = 128, temb: int = 32, cap: int = 40, n_layers: int = 30, n_refiners: int = 2) -> Shapes:
    """The linears of Z-Image under their real names and in their real order, at other sizes.

    Args:
        dim: Width of the blocks.
        ffn: Hidden width of the feed-forward layers.
        temb: Width of the time embedding.
        cap: Width of the text features.
        n_layers: Number of main blocks.
        n_refiners: Number of blocks in each of the two refiners.

    Returns:
        Module name -> (out, in).
    """
    shapes: Shapes = {
        "all_x_embedder.2-1": (dim, 64),
        "all_final_layer.2-1.linear": (64, dim),
        "all_final_layer.2-1.adaLN_modulation.1": (dim, temb),
    }
    for index in range(n_refiners):
        shapes |= _block_shapes(f"noise_refiner.{index}", dim, ffn, temb)
    for index in range(n_refiners):
        shapes |= _block_shapes(f"context_refiner.{index}", dim, ffn, None)
    shapes |= {
        "t_embedder.mlp.0": (1024, 256),
        "t_embedder.mlp.2": (temb, 1024),
        "cap_embedder.1": (dim, cap),
    }
    for index in range(n_layers):
        shapes |= _block_shapes(f"layers.{index}", dim, ffn, temb)
    return shapes


def _in_layers(name: str) -> bool:
    return name.startswith("layers.")


def _in_block(name: str) -> bool:
    return name.startswith(("layers.", "noise_refiner.", "context_refiner."))


def _is_attention(name: str) -> bool:
    return ".attention." in name


def _is_core(name: str) -> bool:
    return ".attention." in name or ".feed_forward." in name


def _is_core_in_layers(name: str) -> bool:
    return _in_layers(name) and _is_core(name)


def _is_ada_ln_in_layers(name: str) -> bool:
    return _in_layers(name) and not _is_core(name)


def _is_qkv(name: str) -> bool:
    return name.endswith((".to_q", ".to_k", ".to_v"))


def _is_core_in_layers_not_qkv(name: str) -> bool:
    return _is_core_in_layers(name) and not _is_qkv(name)


def _is_qkv_in_layers(name: str) -> bool:
    return _in_layers(name) and _is_qkv(name)


def _is_attention_in_layers(name: str) -> bool:
    return _in_layers(name) and _is_attention(name)


def _any(name: str) -> bool:
    return True


def _native(name: str) -> str:
    """The original checkpoint's name: what ComfyUI calls the module. q, k and v share one."""
    name = name.replace("all_x_embedder.2-1", "x_embedder").replace("all_final_layer.2-1", "final_layer")
    name = name.replace(".attention.to_out.0", ".attention.out")
    return re.sub(r"\.attention\.to_[qkv]$", ".attention.qkv", name)


def _native_qkv_only(name: str) -> str:
    """Fuses q, k, v outside `layers`, but leaves `to_out.0` its name there, as musubi's converter does."""
    return _native(name) if _in_layers(name) or _is_qkv(name) else name


def _as_is(name: str) -> str:
    return name


def _dotted(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


def _flat(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name.replace(".", "_")


def _garbled(name: str) -> str:
    """Every underscore became a dot; only attention and feed-forward were repaired."""
    words = re.sub(r"\.attention\.to\.(q|k|v|out)(?=\.|$)", r".attention.to_\1", name.replace("_", "."))
    return "diffusion_model." + words.replace(".feed.forward.", ".feed_forward.")


def _garbled_everywhere(name: str) -> str:
    return "diffusion_model." + name.replace("_", ".")


def _dot_qkv(prefix: str) -> Callable[[str], str]:
    """`attention.to.q` for `attention.to_q`; everything else keeps its name."""
    return lambda name: prefix + re.sub(r"\.to_([qkv])$", r".to.\1", name)


@dataclass(frozen=True)
class _Alpha:
    """The alpha of a module.

    Attributes:
        of: Rank -> alpha.
        where: "key", "metadata", "sidecar"; "up" or "both" for an alpha multiplied into those factors;
            "ignored" for a key without meaning.
        dtype: Of the stored key; None means that of the file.
        rslora: The scale is alpha / sqrt(r).
    """

    of: Callable[[int], float]
    where: str
    dtype: torch.dtype | None = None
    rslora: bool = False

    def scale(self, rank: int) -> float:
        """The scale before any rounding."""
        return self.of(rank) / (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True)
class _Unit:
    """What a file stores under one name.

    Attributes:
        name: Name in the file's naming, without prefix.
        parts: The diffusers modules stacked in it, in order of rows.
        rows: The rows of each part.
        width: in.
        rank: r.
        seed: Of the file.
        dtype: Of the file.
    """

    name: str
    parts: tuple[str, ...]
    rows: tuple[int, ...]
    width: int
    rank: int
    seed: int
    dtype: torch.dtype

    @property
    def out(self) -> int:
        """Rows of the stacked weight."""
        return sum(self.rows)

    def normal(self, label: str, *shape: int, std: float, name: str | None = None) -> torch.Tensor:
        """Normal numbers that depend on seed, module and label alone, rounded to the file's dtype."""
        return _normal(f"{self.seed}/{name or self.name}/{label}", shape, std).to(self.dtype)

    def key(self, value: float, dtype: torch.dtype | None) -> torch.Tensor:
        """A scalar as stored."""
        return torch.tensor(value, dtype=torch.float64).to(dtype or self.dtype)


# suffix -> tensor, and the unit's delta (out, in) if it has one without the base weights
_Piece = tuple[Tensors, torch.Tensor | None]
_Algo = Callable[[_Unit, _Alpha | None], _Piece]


def _normal(label: str, shape: Iterable[int], std: float) -> torch.Tensor:
    """Float32 normal numbers seeded by a text, so that the order of modules has no influence."""
    seed = int.from_bytes(hashlib.sha256(label.encode()).digest()[:7], "big")
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) * std


def _const(value: float) -> Callable[[int], float]:
    return lambda rank: value


def _times(factor: float) -> Callable[[int], float]:
    return lambda rank: factor * rank


def _half_plus_one(rank: int) -> float:
    return 0.5 * rank + 1.0


def _key(of: Callable[[int], float], dtype: torch.dtype | None = None) -> _Alpha:
    return _Alpha(of, "key", dtype)


def _stored_scale(unit: _Unit, alpha: _Alpha | None, rank: int, times: int = 1) -> tuple[Tensors, float]:
    """The alpha key, if the file has one, and the scale that a reader of the file must apply.

    Args:
        unit: The unit.
        alpha: Its alpha.
        rank: The rank the reader sees.
        times: Factor of the stored alpha (fused units keep their scale by a larger alpha).
    """
    if alpha is None or alpha.where in ("up", "both"):
        return {}, 1.0
    if alpha.where != "key":
        return {}, alpha.scale(rank)
    stored = unit.key(alpha.of(unit.rank) * times, alpha.dtype)
    return {".alpha": stored}, stored.double().item() / rank


def _balanced(number: int) -> tuple[int, int]:
    """The two factors of a number that lie closest together, the smaller one first."""
    small = max(divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0)
    return small, number // small


AB = (".lora_A.weight", ".lora_B.weight")
DOWN_UP = (".lora_down.weight", ".lora_up.weight")


def _pair(unit: _Unit, name: str, rows: int, alpha: _Alpha | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The stored down (r, in) and up (rows, r) of one module, with alpha multiplied in where it is."""
    down = unit.normal("down", unit.rank, unit.width, std=0.02, name=name)
    up = unit.normal("up", rows, unit.rank, std=0.01, name=name)
    if alpha is not None and alpha.where == "up":
        up = (up.float() * alpha.scale(unit.rank)).to(unit.dtype)
    if alpha is not None and alpha.where == "both":
        root = math.sqrt(alpha.scale(unit.rank))
        down, up = (down.float() * root).to(unit.dtype), (up.float() * root).to(unit.dtype)
    return down, up


def _lora(unit: _Unit, alpha: _Alpha | None, *, suffixes: tuple[str, str]) -> _Piece:
    """One low-rank pair; the parts of a fused unit share `down`."""
    down, up = _pair(unit, unit.name, unit.out, alpha)
    key, scale = _stored_scale(unit, alpha, unit.rank)
    return {suffixes[0]: down, suffixes[1]: up} | key, up.double() @ down.double() * scale


def _block_lora(unit: _Unit, alpha: _Alpha | None, *, suffixes: tuple[str, str]) -> _Piece:
    """The pairs of all parts in one: down stacked (n*r, in), up block-diagonal (n*out, n*r), alpha * n."""
    pairs = [_pair(unit, part, rows, alpha) for part, rows in zip(unit.parts, unit.rows, strict=True)]
    down = torch.cat([pair[0] for pair in pairs])
    # float() because the small formats have no block_diag; the zeros and the values survive the way back
    up = torch.block_diag(*[pair[1].float() for pair in pairs]).to(unit.dtype)
    key, scale = _stored_scale(unit, alpha, down.shape[0], times=len(pairs))
    return {suffixes[0]: down, suffixes[1]: up} | key, up.double() @ down.double() * scale


def _own_rank_lora(unit: _Unit, alpha: _Alpha | None) -> _Piece:
    """What an SVD of something else leaves: a rank of its own (3r) and a float32 alpha equal to it."""
    rank = QKV_PARTS * unit.rank
    down = unit.normal("svd_down", rank, unit.width, std=0.02)
    up = unit.normal("svd_up", unit.out, rank, std=0.01)
    key = {".alpha": torch.tensor(float(rank))}
    return {DOWN_UP[0]: down, DOWN_UP[1]: up} | key, up.double() @ down.double()


def _loha(unit: _Unit, alpha: _Alpha | None) -> _Piece:
    """(w1_a @ w1_b) * (w2_a @ w2_b) * alpha / r, elementwise."""
    factors = {
        ".hada_w1_a": unit.normal("w1_a", unit.out, unit.rank, std=0.1),
        ".hada_w1_b": unit.normal("w1_b", unit.rank, unit.width, std=0.1),
        ".hada_w2_a": unit.normal("w2_a", unit.out, unit.rank, std=0.1),
        ".hada_w2_b": unit.normal("w2_b", unit.rank, unit.width, std=0.1),
    }
    w1_a, w1_b, w2_a, w2_b = (tensor.double() for tensor in factors.values())
    key, scale = _stored_scale(unit, alpha, unit.rank)
    return factors | key, (w1_a @ w1_b) * (w2_a @ w2_b) * scale


def _lokr_factor(unit: _Unit, label: str, shape: tuple[int, int], split: bool, std: float) -> Tensors:
    """One Kronecker factor, whole or as a product of rank r."""
    if not split:
        return {f".lokr_{label}": unit.normal(label, *shape, std=std)}
    return {
        f".lokr_{label}_a": unit.normal(f"{label}_a", shape[0], unit.rank, std=std),
        f".lokr_{label}_b": unit.normal(f"{label}_b", unit.rank, shape[1], std=1.0),
    }


def _product(factor: Tensors) -> torch.Tensor:
    """A Kronecker factor in float64."""
    tensors = [tensor.double() for tensor in factor.values()]
    return tensors[0] if len(tensors) == 1 else tensors[0] @ tensors[1]


def _lokr(
    unit: _Unit,
    alpha: _Alpha | None,
    *,
    split1: bool = False,
    split2: bool | None = False,
    full_alpha: Callable[[int], float] = float,
) -> _Piece:
    """kron(w1, w2), times alpha / r if a factor is a product.

    Args:
        unit: The unit.
        alpha: Its alpha.
        split1: w1 is stored as a product.
        split2: w2 is stored as a product; None means the trainers' rule, which small modules escape.
        full_alpha: Rank -> the alpha stored beside two whole factors, where it has no meaning.
    """
    (out_l, out_k), (in_m, in_n) = _balanced(unit.out), _balanced(unit.width)
    if split2 is None:
        split2 = unit.rank < max(out_k, in_n) / 2
    w1 = _lokr_factor(unit, "w1", (out_l, in_m), split1, 0.2)
    w2 = _lokr_factor(unit, "w2", (out_k, in_n), split2, 0.01)
    delta = torch.kron(_product(w1), _product(w2))
    if alpha is None:
        return w1 | w2, delta
    if not (split1 or split2):
        return w1 | w2 | {".alpha": unit.key(full_alpha(unit.rank), alpha.dtype)}, delta
    key, scale = _stored_scale(unit, alpha, unit.rank)
    return w1 | w2 | key, delta * scale


def _diff(unit: _Unit, alpha: _Alpha | None, *, suffix: str) -> _Piece:
    """The whole delta."""
    delta = unit.normal("diff", unit.out, unit.width, std=0.001)
    return {suffix: delta}, delta.double()


def _dora(unit: _Unit, alpha: _Alpha | None, *, suffixes: tuple[str, str], magnitude: str, axis: str) -> _Piece:
    """A pair and a magnitude: "out" (out,), "column" (out, 1) or "in" (1, in). Its delta needs the base."""
    tensors, _ = _lora(unit, alpha, suffixes=suffixes)
    shape = {"out": (unit.out,), "column": (unit.out, 1), "in": (1, unit.width)}[axis]
    return tensors | {magnitude: (1 + unit.normal("magnitude", *shape, std=0.1).float()).to(unit.dtype)}, None


def _peft_oft(unit: _Unit, alpha: _Alpha | None) -> _Piece:
    """Packed upper triangles of skew matrices: (in / b, b * (b - 1) / 2)."""
    block = max(size for size in range(1, max(2, unit.rank) + 1) if unit.width % size == 0)
    return {".oft_R.weight": unit.normal("oft", unit.width // block, block * (block - 1) // 2, std=0.05)}, None


def _diag_oft(unit: _Unit, alpha: _Alpha | None) -> _Piece:
    """Skew blocks on the output side: (n, b, b); alpha is the constraint."""
    block = max(size for size in range(1, max(2, unit.rank) + 1) if unit.out % size == 0)
    blocks = unit.normal("oft", unit.out // block, block, block, std=0.05)
    return {".oft_blocks": blocks} | _stored_scale(unit, alpha, unit.rank)[0], None


def _boft(unit: _Unit, alpha: _Alpha | None) -> _Piece:
    """Butterfly stages of skew blocks: (m, n, b, b); b is even, n a power of 2, m one more than n - 1 has binary ones."""
    number = 4 if unit.out % 8 == 0 else 2
    block = unit.out // number
    blocks = unit.normal("boft", 3 if number == 4 else 2, number, block, block, std=0.05)
    return {".oft_blocks": blocks} | _stored_scale(unit, alpha, unit.rank)[0], None


def _ia3(unit: _Unit, alpha: _Alpha | None) -> _Piece:
    """A scale for each output row."""
    return {".weight": unit.normal("ia3", unit.out, std=0.05), ".on_input": torch.tensor(0)}, None


def _glora(unit: _Unit, alpha: _Alpha | None) -> _Piece:
    """W @ a1 @ a2 + b1 @ b2."""
    tensors = {
        ".a1.weight": unit.normal("a1", unit.width, unit.rank, std=0.01),
        ".a2.weight": unit.normal("a2", unit.rank, unit.width, std=0.02),
        ".b1.weight": unit.normal("b1", unit.out, unit.rank, std=0.01),
        ".b2.weight": unit.normal("b2", unit.rank, unit.width, std=0.02),
    }
    return tensors | _stored_scale(unit, alpha, unit.rank)[0], None


@dataclass(frozen=True)
class _Job:
    """What a trainer knows when it writes metadata.

    Attributes:
        slug: Of the producer.
        rank: Of the file.
        alpha: Of the file, if it has one.
        ranks: Unit name -> rank.
    """

    slug: str
    rank: int
    alpha: _Alpha | None
    ranks: dict[str, int]

    @property
    def trigger(self) -> str:
        """The trigger word."""
        return "trg_" + self.slug.replace("-", "_")

    @property
    def alpha_value(self) -> float:
        """Alpha, which is the rank for trainers that have none."""
        return float(self.rank) if self.alpha is None else self.alpha.of(self.rank)


def _no_meta(job: _Job) -> dict[str, str]:
    return {}


def _pt_meta(job: _Job) -> dict[str, str]:
    return {"format": "pt"}


def _ai_toolkit_meta(job: _Job) -> dict[str, str]:
    return {
        "format": "pt",
        "name": job.slug,
        "version": "1.0",
        "software": json.dumps({"name": "ai-toolkit", "repo": "https://github.com/ostris/ai-toolkit", "version": "0.12.26"}),
        "training_info": json.dumps({"step": 2500, "epoch": 25}),
        "ss_base_model_version": "zimage",
        "ss_output_name": job.slug,
        "ss_tag_frequency": json.dumps({f"1_{job.trigger}": {job.trigger: 1}}),
        "sshs_model_hash": FAKE_HASH,
        "sshs_legacy_hash": FAKE_HASH[:8],
    }


def _modelspec(job: _Job, implementation: str) -> dict[str, str]:
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "Z-Image/lora",
        "modelspec.implementation": implementation,
        "modelspec.title": job.slug,
        "modelspec.date": "2026-06-24T08:19:42",
        "modelspec.resolution": "1024x1024",
    }


def _kohya_meta(job: _Job, *, module: str = "networks.lora_zimage") -> dict[str, str]:
    dim = str(job.rank) if set(job.ranks.values()) == {job.rank} else "Dynamic"
    alpha = str(job.alpha_value) if dim != "Dynamic" else "Dynamic"
    return _modelspec(job, "https://github.com/Tongyi-MAI/Z-Image") | {
        "ss_v2": "False",
        "ss_base_model_version": "z_image",
        "ss_network_module": module,
        "ss_network_dim": dim,
        "ss_network_alpha": alpha,
        "ss_network_args": "null" if module == "networks.lora_zimage" else json.dumps({"factor": "-1"}),
        "ss_output_name": job.slug,
        "ss_training_started_at": "1782257982.0",
        "ss_tag_frequency": json.dumps({"img": {job.trigger: 40, "portrait": 7}}),
        "sshs_model_hash": FAKE_HASH,
        "sshs_legacy_hash": FAKE_HASH[:8],
    }


def _onetrainer_meta(job: _Job) -> dict[str, str]:
    config = {"model_type": "Z_IMAGE", "lora_rank": job.rank, "lora_alpha": job.alpha_value}
    return _modelspec(job, "https://github.com/huggingface/diffusers") | {
        "modelspec.hash_sha256": "0x" + FAKE_HASH,
        "ot_branch": "master",
        "ot_revision": "23df383",
        "ot_config": json.dumps(config),
    }


def _peft_config(job: _Job) -> dict[str, object]:
    """The fields of a peft LoraConfig that matter for the scale, and some that do not."""
    alpha = job.alpha_value
    return {
        "peft_type": "LORA",
        "r": job.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "use_rslora": job.alpha is not None and job.alpha.rslora,
        "use_dora": False,
        "rank_pattern": {name: rank for name, rank in job.ranks.items() if rank != job.rank},
        "alpha_pattern": {} if job.alpha is None else _alpha_pattern(job, job.alpha),
        "target_modules": ["to_k", "to_out.0", "to_q", "to_v"],
        "lora_dropout": 0.0,
        "bias": "none",
    }


def _alpha_pattern(job: _Job, alpha: _Alpha) -> dict[str, float]:
    return {name: alpha.of(rank) for name, rank in job.ranks.items() if alpha.of(rank) != alpha.of(job.rank)}


def _adapter_meta(job: _Job) -> dict[str, str]:
    """diffusers: the peft config under the component's prefix, as one JSON text."""
    packed = {f"transformer.{key}": value for key, value in _peft_config(job).items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(packed, indent=2, sort_keys=True)}


def _lycoris_meta(job: _Job, *, algo: str) -> dict[str, str]:
    config = {"algo": algo, "multiplier": 1.0, "linear_dim": job.rank, "linear_alpha": job.alpha_value}
    return {"format": "pt", "lycoris_config": json.dumps(config)}


def _none_meta(job: _Job) -> dict[str, str]:
    return {"lora_dim": str(job.rank), "alpha": str(job.alpha_value), "num_modules": str(len(job.ranks))}


def _peft_sidecar(job: _Job) -> dict[str, str]:
    return {"adapter_config.json": json.dumps(_peft_config(job), indent=2, sort_keys=True)}


def _norm_sizes(shapes: Shapes) -> dict[str, int]:
    """The RMSNorms of the blocks: diffusers name -> length."""
    sizes: dict[str, int] = {}
    for name, (dim, _) in shapes.items():
        if name.endswith(".attention.to_q"):
            block = name.removesuffix(".attention.to_q")
            head = dim // 30 if dim % 30 == 0 else 8  # the real model has 30 heads
            sizes |= {f"{block}.attention.norm_q": head, f"{block}.attention.norm_k": head}
            sizes |= {f"{block}.{norm}{index}": dim for norm in ("attention_norm", "ffn_norm") for index in (1, 2)}
    return sizes


def _native_norm(name: str) -> str:
    return re.sub(r"\.norm_([qk])$", r".\1_norm", name)


_Extra = Callable[[Shapes, int, torch.dtype], Tensors]


def _norm_diffs(shapes: Shapes, seed: int, dtype: torch.dtype, *, stem: Callable[[str], str], suffix: str) -> Tensors:
    """A change of each norm in `layers`."""
    sizes = {name: size for name, size in _norm_sizes(shapes).items() if _in_layers(name)}
    return {stem(name) + suffix: _normal(f"{seed}/{name}/norm", (size,), 0.01).to(dtype) for name, size in sizes.items()}


def _bias_diffs(
    shapes: Shapes,
    seed: int,
    dtype: torch.dtype,
    *,
    stem: Callable[[str], str],
    targets: Callable[[str], bool] = _any,
) -> Tensors:
    """A change of each bias: attention and feed-forward have none, everything else has one."""
    names = [name for name in shapes if targets(name) and not _is_core(name)]
    return {stem(_native(name)) + ".diff_b": _normal(f"{seed}/{name}/bias", (shapes[name][0],), 0.01).to(dtype) for name in names}


def _comfy_extras(shapes: Shapes, seed: int, dtype: torch.dtype) -> Tensors:
    """ComfyUI's own files: norms and biases of the native model."""
    prefix = _dotted("diffusion_model.")
    norms = _norm_diffs(shapes, seed, dtype, stem=lambda name: prefix(_native_norm(name)), suffix=".diff")
    return norms | _bias_diffs(shapes, seed, dtype, stem=prefix)


@dataclass(frozen=True)
class _Recipe:
    """How a producer lays out its file.

    Attributes:
        slug: Of the producer.
        targets: The diffusers modules it trains.
        stem: Unit name -> key without suffix.
        algo: Unit -> tensors and delta.
        alpha: None where the file has none and the scale is 1.
        meta: Metadata of the file.
        unit: Diffusers name -> unit name; modules of one name are fused.
        rank_of: (unit name, rank) -> the unit's rank.
        extra: Further tensors, under full keys.
        sidecars: Files beside the file.
        dtype: Of the factors, where the tool leaves no choice.
        kind: As in Producer.
    """

    slug: str
    targets: Callable[[str], bool]
    stem: Callable[[str], str]
    algo: _Algo
    alpha: _Alpha | None = None
    meta: Callable[[_Job], dict[str, str]] = _no_meta
    unit: Callable[[str], str] = _as_is
    rank_of: Callable[[str, int], int] = lambda name, rank: rank
    extra: _Extra | None = None
    sidecars: Callable[[_Job], dict[str, str]] = _no_meta
    dtype: torch.dtype | None = None
    kind: str = "lora"


def _units(recipe: _Recipe, shapes: Shapes, rank: int, seed: int, dtype: torch.dtype) -> list[_Unit]:
    """Groups the targeted modules by the name under which the file stores them."""
    groups: dict[str, list[str]] = {}
    for name in filter(recipe.targets, shapes):
        groups.setdefault(recipe.unit(name), []).append(name)
    return [
        _Unit(
            name=name,
            parts=tuple(parts),
            rows=tuple(shapes[part][0] for part in parts),
            width=shapes[parts[0]][1],
            rank=recipe.rank_of(name, rank),
            seed=seed,
            dtype=dtype,
        )
        for name, parts in groups.items()
    ]


def _make(recipe: _Recipe, shapes: Shapes, rank: int, seed: int, dtype: torch.dtype) -> Made:
    """Runs a recipe."""
    dtype = recipe.dtype or dtype
    tensors: Tensors = {}
    deltas: Tensors = {}
    units = _units(recipe, shapes, rank, seed, dtype)
    for unit in units:
        piece, delta = recipe.algo(unit, recipe.alpha)
        tensors |= {recipe.stem(unit.name) + suffix: tensor for suffix, tensor in piece.items()}
        if delta is not None:
            rows = torch.split(delta, list(unit.rows))
            deltas |= {part: row.clone() for part, row in zip(unit.parts, rows, strict=True)}
    if recipe.extra is not None:
        tensors |= recipe.extra(shapes, seed, dtype)
    job = _Job(recipe.slug, rank, recipe.alpha, {unit.name: unit.rank for unit in units})
    return Made(tensors, recipe.meta(job), deltas, recipe.sidecars(job))


def _make_all(recipes: tuple[_Recipe, ...], shapes: Shapes, rank: int, seed: int, dtype: torch.dtype) -> Made:
    """One file of several recipes; the metadata are those of the first."""
    made = [_make(recipe, shapes, rank, seed, dtype) for recipe in recipes]
    tensors = {key: tensor for one in made for key, tensor in one.tensors.items()}
    deltas = {name: delta for one in made for name, delta in one.deltas.items()}
    return Made(tensors, made[0].metadata, deltas)


def _make_anime_z(how: tuple[_Recipe, bool], shapes: Shapes, rank: int, seed: int, dtype: torch.dtype) -> Made:
    """Split modules, and the same changes again as `qkv` and `out`: only the split ones count.

    Args:
        how: The recipe of the split modules, and whether the alphas of `to.q` stand under `to_q`.
        shapes: The model.
        rank: Of the split pairs.
        seed: Of the file.
        dtype: Of the file.
    """
    recipe, apart = how
    made = _make(recipe, shapes, rank, seed, dtype)
    twice = replace(recipe, targets=_is_attention_in_layers, unit=_native, algo=partial(_block_lora, suffixes=LORA_DOT))
    tensors = {
        re.sub(r"\.to\.([qkv])\.alpha$", r".to_\1.alpha", key) if apart else key: tensor for key, tensor in made.tensors.items()
    }
    return Made(tensors | _make(twice, shapes, rank, seed, dtype).tensors, made.metadata, made.deltas)


def _varying_rank(name: str, rank: int) -> int:
    """A rank between 1 and 2r that differs from module to module, always the same for a name."""
    return 1 + zlib.crc32(name.encode()) % (2 * rank)


AB_DEFAULT = (".lora_A.default.weight", ".lora_B.default.weight")
AB_BARE = (".lora_A", ".lora_B")
LORA_DOT = (".lora.down.weight", ".lora.up.weight")
LORA_LINEAR = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
LORA_UNDERSCORE = ("_lora.down.weight", "_lora.up.weight")

_DM = _dotted("diffusion_model.")
_TR = _dotted("transformer.")
_BARE = _dotted("")
_KOHYA = _flat("lora_unet_")
_KOHYA_TWICE = _flat("lora_unet__")
_LYCORIS = _flat("lycoris_")
_PEFT = _dotted("base_model.model.")

_ONE = _key(_const(1.0))
_ONE_FP32 = _key(_const(1.0), torch.float32)
_HALF = _key(_times(0.5))
_HALF_FP32 = _key(_times(0.5), torch.float32)
_THREE_QUARTERS_FP32 = _key(_times(0.75), torch.float32)
_HUGE = _Alpha(_const(AI_TOOLKIT_FULL_ALPHA), "ignored")
_CONFIGURED = _Alpha(float, "ignored")

_ab = partial(_lora, suffixes=AB)
_down_up = partial(_lora, suffixes=DOWN_UP)
_blocks = partial(_block_lora, suffixes=DOWN_UP)
_diffs = partial(_diff, suffix=".diff")
_lokr_split = partial(_lokr, split2=True)
_lokr_both = partial(_lokr, split1=True, split2=True)
_lokr_rule = partial(_lokr, split2=None)
_lokr_ai = partial(_lokr, full_alpha=_const(AI_TOOLKIT_FULL_ALPHA))

_ai_meta = _ai_toolkit_meta
_ot_meta = _onetrainer_meta
_lokr_meta = partial(_kohya_meta, module="networks.lokr")
_loha_meta = partial(_kohya_meta, module="networks.loha")


_NOTES = {
    "ai-toolkit": "no alpha; 240 modules",
    "ai-toolkit-all": "transformer_only: false; all 276",
    "musubi": "alpha is 1 by default; split q, k, v",
    "musubi-convert-other": "sqrt(alpha / r) in both factors; garbled noise.refiner, adaLN.modulation",
    "musubi-convert-other-old": "before 2026-01-17: to.q, to.out.0 and feed.forward are garbled too",
    "musubi-comfy": "fused qkv of rank 3r, block-diagonal up, alpha * 3",
    "musubi-comfy-blocks": "in the refiners q, k, v are fused but to_out_0 keeps its name",
    "kohya-resized": "rank, alpha and scale differ from module to module; ss_network_dim is Dynamic",
    "onetrainer-legacy": "transformer. with lora_down, lora_up, alpha",
    "onetrainer-diffusers": "alpha / r in lora_B",
    "onetrainer-kohya": "all_x_embedder_2-1 keeps its hyphen",
    "onetrainer-original": "bare names, A / B with alpha",
    "onetrainer-comfy": "ai-toolkit's names, but an alpha that is not the rank",
    "simpletuner-peft": "alpha in lora_adapter_metadata only",
    "simpletuner-comfyui": "alpha as a key and again in the metadata: apply it once",
    "simpletuner-lycoris-locon": "lycoris_ and flat diffusers names",
    "diffusers": "alpha in the metadata equals the rank",
    "diffusers-alpha": "--rank 32 with the default alpha 4: scale 0.125, which only diffusers applies",
    "diffusers-rslora": "use_rslora: alpha / sqrt(r)",
    "diffusers-patterns": "rank_pattern and alpha_pattern in the metadata",
    "peft": "alpha in adapter_config.json only",
    "diffsynth": "bare names, .default., no alpha, no metadata",
    "diffusion-pipe": "fused qkv and out, no alpha",
    "videox-fun": "double underscore",
    "none-trainer": "lora_down, lora_up, fp32 alpha",
    "none-trainer-old": "attention.to.q",
    "none-converter": "fused qkv of rank 3r, alpha * 3, no metadata",
    "none-converter-fp8": "the same, all in fp8_e4m3fn",
    "comfyui-train": "fused, alpha 1; the linears only",
    "comfyui-extract": "fused, no alpha, fp16",
    "lora-linear-layer": ".lora_linear_layer.down.weight",
    "lora-ab-bare": "lora_A without .weight",
    "lora-dot": ".lora.down.weight",
    "lora-underscore": "_lora.down.weight",
    "ai-toolkit-lokr": "whole factors, meaningless alpha 9999999999",
    "ai-toolkit-lokr-fp16": "the same in fp16: alpha is inf",
    "ai-toolkit-lokr-old": "the same under lycoris_ and flat names",
    "ai-toolkit-lokr-split": "w2_a, w2_b; alpha counts",
    "musubi-lokr": "w2_a, w2_b; alpha 1",
    "onetrainer-lokr": "w2 is a product only where r < max(w2) / 2; alpha counts only there",
    "simpletuner-lycoris-lokr": "whole factors; alpha is the configured rank",
    "lycoris-lokr-both": "w1_a, w1_b, w2_a, w2_b",
    "diffusion-pipe-lokr": "whole factors of fused qkv, no alpha",
    "diffusion-pipe-lokr-split": "w2_a, w2_b of fused qkv, no alpha: scale 1",
    "musubi-loha": "alpha 1",
    "musubi-convert-other-loha": "garbled names, alpha kept",
    "onetrainer-loha": "transformer.",
    "lycoris-loha": "lycoris_ and flat names",
    "comfyui-train-loha": "fused qkv: the product is formed first, then cut by rows",
    "ai-toolkit-fullrank": "lora_A alone, (out, in): it is the delta",
    "comfyui-full-diff": ".diff of fused linears, .diff_b",
    "lycoris-full": "lycoris_ and .diff",
    "ai-toolkit-all-layers": "pairs, and .diff on the norms",
    "comfyui-train-all": "pairs, .diff on norms, .diff_b on biases",
    "comfyui-extract-all": "the same without alpha, fp16",
    "lycoris-norm": "pairs, and w_norm on the norms",
    "ai-toolkit-dora": ".magnitude (out,)",
    "onetrainer-dora": "dora_scale (1, in)",
    "onetrainer-diffusers-dora": "lora_magnitude_vector.weight (out,)",
    "lycoris-dora": "dora_scale (out, 1)",
    "onetrainer-oft": "oft_R.weight (in / b, b (b - 1) / 2)",
    "lycoris-oft": "oft_blocks (n, b, b); alpha is the constraint",
    "lycoris-boft": "oft_blocks (m, n, b, b)",
    "lycoris-ia3": ".weight (out,) and .on_input",
    "lycoris-glora": "a1, a2, b1, b2",
    "musubi-comfy-lokr": "fused qkv as LoRA with a rank of its own, the rest as LoKr",
    "ai-toolkit-full-some": "full_if_contains: adaLN as .diff and .diff_b, the rest as pairs",
    "anime-z": "to.q.lora.down, and the same changes again under qkv.lora and out.lora: count once",
    "anime-z-alpha-apart": "the same, but the alphas of to.q, to.k, to.v stand under to_q, to_k, to_v",
}


def _comfyui_adapter_meta(job: _Job) -> dict[str, str]:
    return _adapter_meta(job) | {"modelspec.architecture": "z-image-turbo/lora"}


def _locon_meta(job: _Job) -> dict[str, str]:
    return _lycoris_meta(job, algo="lora")


def _toolkit_pairs() -> list[_Recipe]:
    """Low-rank pairs of ai-toolkit, musubi and OneTrainer."""
    dm, tr, ko = _DM, _TR, _KOHYA
    core = _is_core_in_layers
    r = partial(_Recipe, kind="lora")
    sqrt, sqrt_one = _Alpha(_const(3.0), "both"), _Alpha(_const(1.0), "both")
    resized = _key(_half_plus_one)
    return [
        r("ai-toolkit", _in_layers, dm, _ab, None, _ai_meta),
        r("ai-toolkit-all", _any, dm, _ab, None, _ai_meta),
        r("musubi", core, ko, _down_up, _ONE, _kohya_meta),
        r("musubi-convert-other", _any, _garbled, _ab, sqrt, _kohya_meta),
        r("musubi-convert-other-old", core, _garbled_everywhere, _ab, sqrt_one, _kohya_meta),
        r("musubi-comfy", core, ko, _blocks, _ONE, _kohya_meta, _native),
        r("musubi-comfy-blocks", _in_block, ko, _blocks, _key(_times(0.75)), _kohya_meta, _native_qkv_only),
        r("kohya-resized", core, ko, _down_up, resized, _kohya_meta, rank_of=_varying_rank),
        r("onetrainer-legacy", _any, tr, _down_up, _ONE, _ot_meta),
        r("onetrainer-diffusers", _any, tr, _ab, _Alpha(_const(3.0), "up"), _ot_meta),
        r("onetrainer-kohya", _any, ko, _down_up, _HALF, _ot_meta),
        r("onetrainer-original", _any, _BARE, _ab, _key(_times(1.5)), _ot_meta),
        r("onetrainer-comfy", _any, dm, _ab, _key(_times(2.0)), _ot_meta),
    ]


def _peft_pairs() -> list[_Recipe]:
    """Low-rank pairs of the trainers that stand on diffusers and peft."""
    attention, tr, bare = _is_attention, _TR, _BARE
    r = partial(_Recipe, kind="lora")
    eighth, patterns = _Alpha(_times(0.125), "metadata"), _Alpha(_half_plus_one, "metadata")
    rslora = _Alpha(_const(3.0), "metadata", rslora=True)
    default = partial(_lora, suffixes=AB_DEFAULT)
    return [
        r("simpletuner-peft", attention, tr, _ab, _Alpha(_times(0.5), "metadata"), _adapter_meta),
        r("simpletuner-comfyui", attention, _DM, _ab, _THREE_QUARTERS_FP32, _comfyui_adapter_meta),
        r("simpletuner-lycoris-locon", _is_core, _LYCORIS, _down_up, _HALF, _locon_meta),
        r("diffusers", attention, tr, _ab, _Alpha(float, "metadata"), _adapter_meta),
        r("diffusers-alpha", attention, tr, _ab, eighth, _adapter_meta),
        r("diffusers-rslora", attention, tr, _ab, rslora, _adapter_meta),
        r("diffusers-patterns", attention, tr, _ab, patterns, _adapter_meta, rank_of=_varying_rank),
        r("peft", attention, _PEFT, _ab, _Alpha(_times(1.5), "sidecar"), _pt_meta, sidecars=_peft_sidecar),
        r("diffsynth", _is_core, bare, default),
    ]


def _other_pairs() -> list[_Recipe]:
    """Low-rank pairs of the rest, and forms that ComfyUI reads whoever writes them."""
    core, dm, tr, ko = _is_core_in_layers, _DM, _TR, _KOHYA
    r = partial(_Recipe, kind="lora")
    three, half, fp8 = _key(_const(3.0), torch.float32), _HALF_FP32, torch.float8_e4m3fn
    linear, bare = partial(_lora, suffixes=LORA_LINEAR), partial(_lora, suffixes=AB_BARE)
    dot, underscore = partial(_lora, suffixes=LORA_DOT), partial(_lora, suffixes=LORA_UNDERSCORE)
    return [
        r("diffusion-pipe", _in_block, dm, _ab, None, _pt_meta, _native),
        r("videox-fun", _any, _KOHYA_TWICE, _down_up, _key(_times(0.25)), _pt_meta),
        r("none-trainer", core, dm, _down_up, half, _none_meta),
        r("none-trainer-old", core, _dot_qkv("diffusion_model."), _down_up, three, _none_meta),
        r("none-converter", core, ko, _blocks, half, unit=_native),
        r("none-converter-fp8", core, ko, _blocks, _ONE, unit=_native, dtype=fp8),
        r("comfyui-train", _any, dm, _down_up, _ONE_FP32, unit=_native),
        r("comfyui-extract", _any, dm, _down_up, unit=_native, dtype=torch.float16),
        r("lora-linear-layer", _is_attention, tr, linear, _HALF),
        r("lora-ab-bare", _is_core, dm, bare, _key(_times(1.5))),
        r("lora-dot", _is_core, tr, dot, _key(_times(0.75))),
        r("lora-underscore", _is_core, dm, underscore, _ONE),
    ]


def _lokr_files() -> list[_Recipe]:
    """Kronecker products."""
    core, dm, lyco, both_alpha = _is_core_in_layers, _DM, _LYCORIS, _key(_times(0.75))
    r = partial(_Recipe, kind="lokr")
    meta = partial(_lycoris_meta, algo="lokr")
    fp16 = torch.float16
    return [
        r("ai-toolkit-lokr", _in_layers, dm, _lokr_ai, _HUGE, _ai_meta),
        r("ai-toolkit-lokr-fp16", _in_layers, dm, _lokr_ai, _HUGE, _ai_meta, dtype=fp16),
        r("ai-toolkit-lokr-old", _in_layers, lyco, _lokr_ai, _HUGE, _ai_meta),
        r("ai-toolkit-lokr-split", _in_layers, dm, _lokr_split, _HALF, _ai_meta),
        r("musubi-lokr", core, _KOHYA, _lokr_split, _ONE, _lokr_meta),
        r("onetrainer-lokr", _any, _TR, _lokr_rule, _ONE, _ot_meta),
        r("simpletuner-lycoris-lokr", _is_core, lyco, _lokr, _CONFIGURED, meta),
        r("lycoris-lokr-both", _is_core, lyco, _lokr_both, both_alpha, meta),
        r("diffusion-pipe-lokr", _in_block, dm, _lokr, None, _pt_meta, _native),
        r("diffusion-pipe-lokr-split", _in_block, dm, _lokr_split, None, _pt_meta, _native),
    ]


def _loha_files() -> list[_Recipe]:
    """Hadamard products."""
    core, meta = _is_core_in_layers, partial(_lycoris_meta, algo="loha")
    r = partial(_Recipe, kind="loha")
    return [
        r("musubi-loha", core, _KOHYA, _loha, _ONE, _loha_meta),
        r("musubi-convert-other-loha", _in_block, _garbled, _loha, _ONE, _loha_meta),
        r("onetrainer-loha", _any, _TR, _loha, _ONE, _ot_meta),
        r("lycoris-loha", _is_core, _LYCORIS, _loha, _key(_times(1.5)), meta),
        r("comfyui-train-loha", _any, _DM, _loha, _ONE_FP32, unit=_native),
    ]


def _whole_files() -> list[_Recipe]:
    """Whole deltas, alone or beside pairs; changes of norms and biases."""
    dm, lyco = _DM, _LYCORIS
    lora_a, meta = partial(_diff, suffix=AB[0]), partial(_lycoris_meta, algo="full")
    biases = partial(_bias_diffs, stem=dm)
    norms = partial(_norm_diffs, stem=dm, suffix=".diff")
    w_norms = partial(_norm_diffs, stem=lyco, suffix=".w_norm")
    full, mixed, norm = (partial(_Recipe, kind=kind) for kind in ("full", "full-mixed", "norm"))
    both = {"unit": _native, "extra": _comfy_extras}
    fp16 = torch.float16
    return [
        full("ai-toolkit-fullrank", _in_layers, dm, lora_a, None, _ai_meta),
        full("comfyui-full-diff", _any, dm, _diffs, unit=_native, extra=biases, dtype=fp16),
        full("lycoris-full", _is_core, lyco, _diffs, None, meta),
        mixed("ai-toolkit-all-layers", _in_layers, dm, _ab, None, _ai_meta, extra=norms),
        mixed("comfyui-train-all", _any, dm, _down_up, _ONE_FP32, **both),
        mixed("comfyui-extract-all", _any, dm, _down_up, **both, dtype=fp16),
        norm("lycoris-norm", _is_core, lyco, _down_up, _key(_const(3.0)), _locon_meta, extra=w_norms),
    ]


def _base_files() -> list[_Recipe]:
    """Kinds whose delta needs the base weights."""
    lyco, tr, core = _LYCORIS, _TR, _is_core
    ai = partial(_dora, suffixes=AB, magnitude=".magnitude", axis="out")
    peft = partial(_dora, suffixes=AB, magnitude=".lora_magnitude_vector.weight", axis="out")
    per_input = partial(_dora, suffixes=DOWN_UP, magnitude=".dora_scale", axis="in")
    per_output = partial(_dora, suffixes=DOWN_UP, magnitude=".dora_scale", axis="column")
    oft, boft = partial(_lycoris_meta, algo="diag-oft"), partial(_lycoris_meta, algo="boft")
    ia3, glora = partial(_lycoris_meta, algo="ia3"), partial(_lycoris_meta, algo="glora")
    r, folded = _Recipe, _Alpha(_const(1.0), "up")
    return [
        r("ai-toolkit-dora", _in_layers, _DM, ai, None, _ai_meta, kind="dora"),
        r("onetrainer-dora", _any, tr, per_input, _ONE, _ot_meta, kind="dora"),
        r("onetrainer-diffusers-dora", _any, tr, peft, folded, _ot_meta, kind="dora"),
        r("lycoris-dora", core, lyco, per_output, _ONE, _locon_meta, kind="dora"),
        r("onetrainer-oft", _any, tr, _peft_oft, None, _ot_meta, kind="oft"),
        r("lycoris-oft", core, lyco, _diag_oft, _ONE, oft, kind="oft"),
        r("lycoris-boft", core, lyco, _boft, _ONE, boft, kind="oft"),
        r("lycoris-ia3", core, lyco, _ia3, None, ia3, kind="ia3"),
        r("lycoris-glora", core, lyco, _glora, _ONE, glora, kind="glora"),
    ]


def _joined_files() -> list[Producer]:
    """Files that one recipe cannot say."""
    slug = "musubi-comfy-lokr"
    qkv = _Recipe(slug, _is_qkv_in_layers, _KOHYA, _own_rank_lora, None, _lokr_meta, _native)
    rest = _Recipe(slug, _is_core_in_layers_not_qkv, _KOHYA, _lokr_split, _ONE, unit=_native)
    slug = "ai-toolkit-full-some"
    pairs = _Recipe(slug, _is_core_in_layers, _DM, _ab, None, _ai_meta)
    biases = partial(_bias_diffs, stem=_DM, targets=_is_ada_ln_in_layers)
    full = _Recipe(slug, _is_ada_ln_in_layers, _DM, _diffs, extra=biases)
    dot = partial(_lora, suffixes=LORA_DOT)
    anime = _Recipe("anime-z", _is_core_in_layers, _dot_qkv(""), dot, _HALF, _pt_meta)
    apart = _Recipe("anime-z-alpha-apart", _is_core_in_layers, _dot_qkv(""), dot, _HALF, _pt_meta)
    return [
        Producer(qkv.slug, partial(_make_all, (qkv, rest)), "lora+lokr", "key", _NOTES[qkv.slug]),
        Producer(full.slug, partial(_make_all, (pairs, full)), "full-mixed", "none", _NOTES[full.slug]),
        Producer(anime.slug, partial(_make_anime_z, (anime, False)), "lora", "key", _NOTES[anime.slug]),
        Producer(apart.slug, partial(_make_anime_z, (apart, True)), "lora", "key", _NOTES[apart.slug]),
    ]


def _producer(recipe: _Recipe) -> Producer:
    """A file of one recipe. An alpha in the factors, or without meaning, is none of a reader's business."""
    where = "none" if recipe.alpha is None else recipe.alpha.where
    where = "none" if where in ("up", "both", "ignored") else where
    return Producer(recipe.slug, partial(_make, recipe), recipe.kind, where, _NOTES[recipe.slug])


def _by_name(producers: Iterable[Producer]) -> dict[str, Producer]:
    """Keys the producers by name; one that occurs twice would hide another."""
    named: dict[str, Producer] = {}
    for producer in producers:
        if producer.name in named:
            raise ValueError(f"two producers are called {producer.name}")
        named[producer.name] = producer
    return named


_RECIPES = [
    *_toolkit_pairs(),
    *_peft_pairs(),
    *_other_pairs(),
    *_lokr_files(),
    *_loha_files(),
    *_whole_files(),
    *_base_files(),
]

PRODUCERS: dict[str, Producer] = _by_name([*map(_producer, _RECIPES), *_joined_files()])
