"""What the tests of the reader share: files on disk, the deltas that are read from them, the sentences they are refused with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.dense import product, relative
from oracles.producers import PRODUCERS, Made, save, save_sidecars, small_shapes
from safetensors.torch import save_file

from extensions_built_in.zit_merge import ZitMergeError, load_lora

SHAPES = small_shapes(dim=24, ffn=40, temb=16, cap=20, n_layers=2, n_refiners=2)
SHAPES |= {"t_embedder.mlp.0": (48, 32), "t_embedder.mlp.2": (16, 48)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NEEDS_BASE = ("dora", "oft", "ia3", "glora")
# What a producer's file holds beside weight matrices: it is read with this dropped.
VECTORS = {
    "ai-toolkit-all-layers": ("norm",),
    "ai-toolkit-full-some": ("bias",),
    "comfyui-full-diff": ("bias",),
    "comfyui-train-all": ("norm", "bias"),
    "comfyui-extract-all": ("norm", "bias"),
    "lycoris-norm": ("norm",),
}
READABLE = [name for name, producer in PRODUCERS.items() if producer.kind not in NEEDS_BASE]

Q = "layers.0.attention.to_q"
QKV = tuple(f"layers.0.attention.to_{c}" for c in "qkv")
FUSED = "diffusion_model.layers.0.attention.qkv"


def write(folder: Path, name: str, dtype=torch.float32, rank=4, seed=0, *, shapes=SHAPES, stem=None) -> tuple[Path, Made]:
    """A producer's file, with what lies beside it."""
    made = PRODUCERS[name].make(shapes, rank, seed, dtype)
    path = folder / f"{stem or name}.safetensors"
    save(made, path)
    save_sidecars(made, folder)
    return path, made


def store(folder: Path, tensors: Mapping[str, torch.Tensor], name="lora", metadata=None) -> Path:
    """A file of these tensors; slices and repeats are copied."""
    path = folder / f"{name}.safetensors"
    save_file({key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}, path, metadata)
    return path


def normal(*shape: int, seed=0, size=1.0) -> torch.Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


def dense(lora, module: str) -> torch.Tensor:
    """A delta as read, multiplied out in float64."""
    return product(*lora[module].map(torch.Tensor.double).expand())


def check(lora, deltas: Mapping[str, torch.Tensor], tolerance=1e-6) -> None:
    """The file holds these deltas and no others."""
    assert set(lora) == set(deltas)
    assert lora.shapes == {module: tuple(delta.shape) for module, delta in deltas.items()}
    off = {module: relative(dense(lora, module), delta) for module, delta in deltas.items()}
    assert {module: error for module, error in off.items() if not error < tolerance} == {}


def refusal(path: Path, **answers: Any) -> str:
    """The one sentence with which a file is refused, less the path: a folder's name must not satisfy a test."""
    with pytest.raises(ZitMergeError) as error:
        load_lora(path, **answers)
    return sentence(error, path)


def sentence(error: pytest.ExceptionInfo, start: object) -> str:
    """The message, which is one sentence, less the path or place that it starts with."""
    message = str(error.value)
    assert message.startswith(f"{start}: "), message
    assert "\n" not in message
    assert not message.endswith((".", " "))
    return message.removeprefix(f"{start}: ")


def question(path: Path, **answers: Any) -> str:
    """The one question that a file leaves open; whoever reads a change of it all the same is told so."""
    lora = load_lora(path, **answers)
    (asked,) = lora.questions
    assert "\n" not in asked
    for module in lora:
        with pytest.raises(ZitMergeError) as error:
            lora[module]
        assert sentence(error, path) == asked
    return asked


def clear(path: Path, **answers: Any):
    """The file, which leaves nothing open."""
    lora = load_lora(path, **answers)
    assert lora.questions == ()
    assert lora.unmatched == ()
    return lora
