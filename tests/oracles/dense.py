"""What a merge has to be, the slow and obvious way: every delta multiplied out in float64, every file read without our reader."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

Deltas = Mapping[str, torch.Tensor]  # module -> (out, in) in float64

PREFIX = "diffusion_model."


def weighted_sum(parts: Sequence[tuple[Deltas, float | Mapping[str, float]]]) -> dict[str, torch.Tensor]:
    """sum_i strength_i * delta_i for every module that any part has.

    Args:
        parts: (module -> delta, one strength or module -> strength).
    """
    total: dict[str, torch.Tensor] = {}
    for deltas, strength in parts:
        for module, delta in deltas.items():
            factor = strength[module] if isinstance(strength, Mapping) else strength
            total[module] = total.get(module, torch.zeros_like(delta)) + factor * delta
    return total


def sizes(parts: Sequence[tuple[Deltas, float | Mapping[str, float]]]) -> dict[str, float]:
    """sum_i |strength_i| |delta_i|: what rounding errors are relative to, even where the sum cancels."""
    absolute: dict[str, float] = {}
    for deltas, strength in parts:
        for module, delta in deltas.items():
            factor = strength[module] if isinstance(strength, Mapping) else strength
            absolute[module] = absolute.get(module, 0.0) + abs(factor) * float(delta.norm())
    return absolute


def best_error(delta: torch.Tensor, rank: int) -> float:
    """The smallest Frobenius error that a matrix of this rank can have (Eckart-Young), from the dense singular values."""
    return float(torch.linalg.svdvals(delta.double())[rank:].square().sum().sqrt())


def product(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The delta of two factors."""
    return up.double() @ down.double()


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """|found - wanted| / |wanted|."""
    return float((found.double() - wanted).norm() / wanted.norm())


def read_deltas(path: str | Path) -> dict[str, torch.Tensor]:
    """The deltas of a file in the one form that every client reads, as a client reads it: B @ A * alpha / rank."""
    tensors = load_file(path)
    downs = [key for key in tensors if key.endswith(".lora_A.weight")]
    deltas = {}
    for key in downs:
        stem = key.removesuffix(".lora_A.weight")
        down, up, alpha = tensors[key], tensors[f"{stem}.lora_B.weight"], tensors[f"{stem}.alpha"]
        deltas[stem.removeprefix(PREFIX)] = product(up, down) * (alpha.double() / down.shape[0])
    if len(tensors) != 3 * len(downs):
        raise AssertionError(f"{path} holds more than lora_A, lora_B and alpha of each module")
    return deltas


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def read_header(path: str | Path) -> tuple[dict, int]:
    """The JSON header of a safetensors file and the number of bytes after it."""
    data = Path(path).read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), len(data) - 8 - length
