"""The weight after a change that depends on it, the slow and obvious way: the papers' formulas with whole matrices in float64.

Every function takes the tensors of one weight by their suffixes, as a file has them, and W (out, in), and gives W'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

Tensors = Mapping[str, torch.Tensor]


def dora(parts: Tensors, weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """m (W + D) / |W + D|, line by line; D with alpha / rank in it."""
    adapted = weight.double() + delta.double()
    magnitude = next(t for suffix, t in parts.items() if "magnitude" in suffix or "dora_scale" in suffix).double()
    is_columns = magnitude.ndim == 2 and magnitude.shape[0] == 1
    lines = adapted.T if is_columns else adapted
    scaled = torch.stack([m * line / math.sqrt(float(line @ line)) for m, line in zip(magnitude.flatten(), lines, strict=True)])
    return scaled.T if is_columns else scaled


def skewed(packed: torch.Tensor) -> torch.Tensor:
    """Blocks (n, b, b) from upper triangles, element by element."""
    count = packed.shape[1]
    size = next(b for b in range(1, 200) if b * (b - 1) // 2 == count)
    blocks = torch.zeros(len(packed), size, size, dtype=torch.float64)
    k = 0
    for i in range(size):
        for j in range(i + 1, size):
            blocks[:, i, j], blocks[:, j, i] = packed[:, k].double(), -packed[:, k].double()
            k += 1
    return blocks


def cayley(skew: torch.Tensor) -> torch.Tensor:
    """(I + Q)(I - Q)^-1."""
    eye = torch.eye(skew.shape[-1], dtype=torch.float64)
    return (eye + skew) @ torch.linalg.inv(eye - skew)


def oft_of_inputs(packed: torch.Tensor, weight: torch.Tensor, terms: int | None = None, *, is_old: bool = False) -> torch.Tensor:
    """W R' (PEFT): the inverse with the other sign, or so many terms of its series."""
    blocks = skewed(packed)
    if len(blocks) == 1:
        blocks = blocks.repeat(weight.shape[1] // blocks.shape[1], 1, 1)
    powers = [torch.linalg.matrix_power(blocks, k) for k in range(6)]
    if terms is None:
        turns = cayley(-blocks)
    else:
        assert terms == 5, "all that trainers use"
        turns = powers[0] + 2 * powers[1] + 2 * powers[2] + 2 * powers[3] + (2 if is_old else 1) * powers[4]
    return weight.double() @ torch.block_diag(*turns).T


def oft_of_outputs(parts: Tensors, weight: torch.Tensor) -> torch.Tensor:
    """c R' W (LyCORIS); alpha * out bounds the norm of all of Q."""
    turns = cayley(_bounded(parts, len(weight)))
    return _rescaled(parts, torch.block_diag(*turns).T @ weight.double())


def boft_of_outputs(parts: Tensors, weight: torch.Tensor) -> torch.Tensor:
    """c R_m ... R_1 W (LyCORIS): each factor as a whole matrix with its rows put in order."""
    found, half = weight.double(), parts[".oft_blocks"].shape[-1] // 2
    for i, turns in enumerate(cayley(_bounded(parts, len(weight)))):
        k = 2**i * half
        order = [c + j + g for c in range(0, len(weight), 2 * k) for j in range(k) for g in (0, k)]  # pairs, k apart
        found = _permuted(torch.block_diag(*turns), order) @ found
    return _rescaled(parts, found)


def boft_of_inputs(parts: Tensors, weight: torch.Tensor) -> torch.Tensor:
    """c W R' with R = R_m ... R_1 (PEFT): halves of blocks, those of even places first, are moved before and after."""
    blocks = next(t for suffix, t in parts.items() if "boft_R" in suffix).double()
    scale = next((t for suffix, t in parts.items() if "boft_s" in suffix), torch.ones(len(weight), 1)).double()
    width, size = weight.shape[1], blocks.shape[-1]
    found = torch.eye(width, dtype=torch.float64)
    for i, stage in enumerate(blocks):
        turn = torch.block_diag(*cayley(-(stage - stage.mT) / 2))
        if i:
            half, step = size // 2, size * 2**i
            halves = [*range(0, 2 ** (i + 1), 2), *range(1, 2 ** (i + 1), 2)]
            order = [c + h * half + j for c in range(0, width, step) for h in halves for j in range(half)]
            moved = torch.eye(width, dtype=torch.float64)[order]
            turn = moved @ turn @ moved.T
        found = turn @ found
    return scale * (weight.double() @ found.T)


def ia3(parts: Tensors, weight: torch.Tensor) -> torch.Tensor:
    """Rows or columns times l (PEFT) or 1 + w (LyCORIS)."""
    if ".on_input" in parts:
        scale = 1 + parts[".weight"].double()
        return weight.double() * scale if parts[".on_input"] == 1 else torch.diag(scale) @ weight.double()
    return weight.double() * next(iter(parts.values())).double()


def glora(parts: Tensors, weight: torch.Tensor, scale: float) -> torch.Tensor:
    """W + s (W a1 a2 + b1 b2)."""
    a1, a2, b1, b2 = (parts[f".{part}.weight"].double() for part in ("a1", "a2", "b1", "b2"))
    return weight.double() + scale * (weight.double() @ a1 @ a2 + b1 @ b2)


def _bounded(parts: Tensors, rows: int) -> torch.Tensor:
    blocks = parts[".oft_blocks"].double()
    skew, bound = blocks - blocks.mT, float(parts.get(".alpha", torch.tensor(0.0))) * rows
    norm = float(skew.flatten().norm())
    return skew * (bound / norm) if 0 < bound < norm else skew


def _rescaled(parts: Tensors, changed: torch.Tensor) -> torch.Tensor:
    return parts[".rescale"].double() * changed if ".rescale" in parts else changed


def _permuted(turn: torch.Tensor, order: list[int]) -> torch.Tensor:
    """P' turn P, where P puts row order[i] at place i."""
    moved = torch.eye(len(turn), dtype=torch.float64)[order]
    return moved.T @ turn @ moved
