"""Small LoRAs as pairs of factors, and the files that hold them: for tests that compare with whole matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from oracles.dense import product
from safetensors.torch import save_file
from torch import Tensor

DIM, FFN, ADALN = 48, 64, 16
BLOCK = {
    "attention.to_q": (DIM, DIM),
    "attention.to_k": (DIM, DIM),
    "attention.to_v": (DIM, DIM),
    "attention.to_out.0": (DIM, DIM),
    "feed_forward.w1": (FFN, DIM),
    "feed_forward.w2": (DIM, FFN),
    "feed_forward.w3": (FFN, DIM),
    "adaLN_modulation.0": (4 * DIM, ADALN),
}
MODULES = {f"layers.0.{path}": shape for path, shape in BLOCK.items()}


@dataclass(frozen=True)
class Pair:
    """One module of a LoRA: up (out, r), down (r, in), alpha or none."""

    up: Tensor
    down: Tensor
    alpha: float | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def delta(self) -> Tensor:
        """(out, in) in float64."""
        return product(self.up, self.down) * self.scale


Lora = dict[str, Pair]


def lora(
    rank: int = 8,
    seed: int = 0,
    alpha: float | None = None,
    modules: Mapping[str, tuple[int, int]] = MODULES,
    up: float = 0.05,
    down: float = 0.1,
) -> Lora:
    """Random factors of these sizes."""
    random = torch.Generator().manual_seed(seed)
    return {
        m: Pair(torch.randn(o, rank, generator=random) * up, torch.randn(rank, i, generator=random) * down, alpha)
        for m, (o, i) in modules.items()
    }


def deltas(one: Lora) -> dict[str, Tensor]:
    """Module -> (out, in)."""
    return {m: p.delta for m, p in one.items()}


def write(path: Path, one: Lora, name: Callable[[str], str] = lambda module: f"diffusion_model.{module}") -> Path:
    """Writes a file; `name` makes the stem of a module's keys."""
    tensors = {}
    for module, pair in one.items():
        tensors[f"{name(module)}.lora_A.weight"] = pair.down.clone(memory_format=torch.contiguous_format)
        tensors[f"{name(module)}.lora_B.weight"] = pair.up.clone(memory_format=torch.contiguous_format)
        if pair.alpha is not None:
            tensors[f"{name(module)}.alpha"] = torch.tensor(float(pair.alpha))
    save_file(tensors, path)
    return path


def rotated(one: Lora, seed: int = 0) -> Lora:
    """The same deltas in another basis of the rank."""
    turned = {}
    for module, p in one.items():
        random = torch.Generator().manual_seed(seed)
        q = torch.linalg.qr(torch.randn(p.rank, p.rank, generator=random, dtype=torch.float64)).Q
        turned[module] = Pair((p.up.double() @ q).float(), (q.T @ p.down.double()).float(), p.alpha)
    return turned


def later_save(one: Lora, change: float) -> Lora:
    """A later checkpoint of the same run."""
    other = lora(8, 9)
    return {m: Pair(p.up + change * other[m].up, p.down + change * other[m].down, p.alpha) for m, p in one.items()}
