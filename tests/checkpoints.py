"""Whole transformers of Z-Image at a small size, in every form that they lie on disks in, written and read without the package.

The heads are as wide as the real ones (128), so that the sizes alone tell the config of the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from clients.comfyui import NORMS
from oracles import producers
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = Mapping[str, Tensor]

DIM, FFN, TEMB, CAPTION, LAYERS = 128, 341, 128, 32, 2  # ffn: int(dim / 3 * 8)
SHAPES = producers.small_shapes(dim=DIM, ffn=FFN, temb=TEMB, cap=CAPTION, n_layers=LAYERS)
CONFIG = {
    "_class_name": "ZImageTransformer2DModel",
    "all_patch_size": [2],
    "all_f_patch_size": [1],
    "in_channels": 16,
    "dim": DIM,
    "n_layers": LAYERS,
    "n_refiner_layers": 2,
    "n_heads": 1,
    "n_kv_heads": 1,
    "norm_eps": 1e-05,
    "qk_norm": True,
    "cap_feat_dim": CAPTION,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "mine": "kept",  # what a newer diffusers may put there
}
INDEX = "diffusion_pytorch_model.safetensors.index.json"
ONE = "diffusion_pytorch_model.safetensors"
QKV = ("to_q", "to_k", "to_v")


def sizes(shapes: producers.Shapes = SHAPES) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor, by diffusers' names; a head is as wide as the model."""
    dim, caption = shapes["cap_embedder.1"]
    found: dict[str, tuple[int, ...]] = {"x_pad_token": (1, dim), "cap_pad_token": (1, dim), "cap_embedder.0.weight": (caption,)}
    for module, shape in shapes.items():
        found[f"{module}.weight"] = shape
        if not re.search(r"\.(attention|feed_forward)\.", module):
            found[f"{module}.bias"] = shape[:1]
        if module.endswith("attention.to_q"):
            found |= {f"{module.removesuffix('attention.to_q')}{norm}.weight": (dim,) for norm in NORMS}
    return found


def model(
    seed: int = 0, dtype: torch.dtype = torch.bfloat16, shapes: producers.Shapes = SHAPES, std: float = 0.05
) -> dict[str, Tensor]:
    """A transformer of random numbers, by diffusers' names."""
    random = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=random) * std).to(dtype) for name, shape in sizes(shapes).items()}


def native(tensors: Tensors, prefix: str = "") -> dict[str, Tensor]:
    """The same with the original checkpoint's names: q, k and v are one."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, end = name.rpartition(".")
        if stem.endswith(".attention.to_q"):
            fused = [tensors[f"{stem[:-1]}{letter}.{end}"] for letter in "qkv"]
            found[f"{prefix}{stem[:-4]}qkv.{end}"] = torch.cat(fused)
        elif not stem.endswith((".attention.to_k", ".attention.to_v")):
            for old, new in (
                (r"\.attention\.to_out\.0\.", ".attention.out."),
                (r"\.norm_([qk])\.", r".\1_norm."),
                (r"^all_x_embedder\.2-1\.", "x_embedder."),
                (r"^all_final_layer\.2-1\.", "final_layer."),
            ):
                name = re.sub(old, new, name)
            found[prefix + name] = tensor
    return found


def from_native(tensors: Tensors, prefix: str = "") -> dict[str, Tensor]:
    """The way back, by the names of the tensors that a model of as many layers has; what is no part of it is left out."""
    count = 1 + max(int(m[1]) for key in tensors if (m := re.match(rf"{re.escape(prefix)}layers\.(\d+)\.", key)))
    names = sizes(producers.small_shapes(n_layers=count))
    marks = native({name: torch.full((1,), n) for n, name in enumerate(names)}, prefix)
    by_number, found = list(names), dict[str, Tensor]()
    for key, numbers in marks.items():
        for number, tensor in zip(numbers.tolist(), tensors[key].chunk(len(numbers)), strict=True):
            found[by_number[number]] = tensor
    return {name: found[name] for name in names}


def write_one(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
    """A file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: t.contiguous() for k, t in tensors.items()}, path, dict(metadata) if metadata else None)
    return path


def write_folder(path: Path, tensors: Tensors) -> Path:
    """diffusers' folder with one file."""
    write_one(path / ONE, tensors)
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def write_shards(path: Path, tensors: Tensors, count: int = 3) -> Path:
    """diffusers' folder with several files and their index."""
    names = sorted(tensors)
    table = {}
    for n in range(count):
        file = f"diffusion_pytorch_model-{n + 1:05d}-of-{count:05d}.safetensors"
        write_one(path / file, {name: tensors[name] for name in names[n::count]})
        table |= dict.fromkeys(names[n::count], file)
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": table}))
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def write_repository(path: Path, tensors: Tensors) -> Path:
    """The folder of a whole pipeline."""
    write_shards(path / "transformer", tensors)
    (path / "model_index.json").write_text("{}")
    return path


WRITERS: Mapping[str, Callable[[Path, Tensors], Path]] = {
    "folder": write_folder,
    "shards": write_shards,
    "repository": write_repository,
    "flat": lambda path, tensors: write_one(path.with_suffix(".safetensors"), tensors),
    "wrapped": lambda path, tensors: write_one(
        path.with_suffix(".safetensors"), {f"transformer.{k}": t for k, t in tensors.items()}
    ),
    "comfyui": lambda path, tensors: write_one(path.with_suffix(".safetensors"), native(tensors)),
    "prefixed": lambda path, tensors: write_one(path.with_suffix(".safetensors"), native(tensors, "model.diffusion_model.")),
}

BESIDE = {
    "text_encoders.qwen3_4b.transformer.model.layers.0.mlp.up_proj.weight": torch.full((4, 4), 0.5, dtype=torch.bfloat16),
    "text_encoders.qwen3_4b.transformer.model.layers.0.mlp.up_proj.scale_weight": torch.ones(()),
    "text_encoders.qwen3_4b.scaled_fp8": torch.zeros(0),
    "vae.decoder.conv_in.weight": torch.arange(36.0).view(4, 1, 3, 3),
    "vae.steps": torch.tensor(7),
}


def write_all_in_one(path: Path, tensors: Tensors) -> Path:
    """ComfyUI's checkpoint with text encoder and VAE in it."""
    return write_one(path.with_suffix(".safetensors"), native(tensors, "model.diffusion_model.") | BESIDE)


def read_folder(path: Path) -> dict[str, Tensor]:
    """All tensors of a diffusers folder; its index has to name every tensor's file."""
    found: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        here = load_file(file)
        if (path / INDEX).exists():
            table = json.loads((path / INDEX).read_text())["weight_map"]
            assert {key for key, name in table.items() if name == file.name} == here.keys()
        assert not found.keys() & here.keys()
        found |= here
    return found


def read(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """A written transformer by diffusers' names: a folder, or ComfyUI's file."""
    return read_folder(path) if path.is_dir() else from_native(load_file(path), prefix)
