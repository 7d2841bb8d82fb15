"""Changes that depend on the weight they change: delta = W' - W, from W (out, in) and what a file stores.

    DoRA    W' = m (W + D) / |W + D|                           rows or columns of a length of their own
    OFT     W' = W R' on the inputs, R' W on the outputs       R orthogonal, in blocks along the diagonal
    BOFT    as OFT, R a product of such matrices               each in another order of the rows (a butterfly)
    IA3     W' = diag(l) W on the outputs, W diag(l) on the inputs
    GLoRA   W' = W + s (W A1 A2 + B1 B2)

Sources: DoRA, Liu et al. 2024 (arXiv 2402.09353), equation 5; OFT, Qiu et al. 2023 (arXiv 2306.07280), equation 4 and Cayley's
transform; BOFT, Liu et al. 2024 (arXiv 2311.06243), section 4; IA3, Liu et al. 2022 (arXiv 2205.05638); GLoRA, Chavan et al.
2023 (arXiv 2306.07967), of which LyCORIS has the terms A and B. The papers leave open what the programs settle differently; each
function names the programs whose convention it follows. That a norm counts as a constant while gradients are taken (DoRA, section
4.3) has no influence on the result.

All of it is computed in float64, and a rotation as R - I: where W' is close to W, their difference would lose the digits that
they share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .factors import Factors, wide


def dora(weight: Tensor, delta: Tensor, magnitude: Tensor, eps: float = 0.0) -> Tensor:
    """m (W + D) / (|W + D| + eps) - W, the norm of each row for a magnitude (out, 1), of each column for (1, in).

    PEFT and AI-Toolkit: rows, no eps. LyCORIS and OneTrainer: either axis, eps is that of float32. The paper's own axis is the
    column of a weight that is stored as (in, out): a row here. D includes alpha / rank.

    Args:
        weight: W (out, in).
        delta: D (out, in).
        magnitude: (out, 1) or (1, in).
        eps: What is added to the norm.

    Raises:
        ValueError: A row or column to which the magnitude gives a length is zero.
    """
    weight, magnitude = wide(weight), wide(magnitude)
    adapted = weight + wide(delta)
    axis = 1 if magnitude.shape[1] == 1 else 0
    norm = adapted.norm(dim=axis, keepdim=True) + eps
    if len(lost := ((norm == 0) & (magnitude != 0)).flatten().nonzero()):
        line = "row" if axis == 1 else "column"
        raise ValueError(f"{line} {int(lost[0])} of the weight with its change is zero, which has no direction")
    return adapted.mul_(torch.where(norm == 0, 0.0, magnitude / norm)).sub_(weight)


def skew(packed: Tensor, size: int) -> Tensor:
    """Skew-symmetric blocks from their upper triangles, row by row (PEFT since 0.14, OneTrainer).

    Args:
        packed: (n, b (b - 1) / 2).
        size: b.

    Returns:
        (n, b, b).
    """
    blocks = packed.new_zeros(len(packed), size, size)
    rows, columns = torch.triu_indices(size, size, 1)
    blocks[:, rows, columns] = packed
    return blocks - blocks.mT


def cayley(skewed: Tensor) -> Tensor:
    """R - I for R = (I + Q) (I - Q)^-1: 2 (I - Q)^-1 Q, without the difference of two close matrices.

    Args:
        skewed: Q (..., b, b), Q' = -Q: I - Q has an inverse and R is orthogonal. R of -Q is R'.
    """
    eye = torch.eye(skewed.shape[-1], dtype=skewed.dtype, device=skewed.device)
    return torch.linalg.solve(eye - skewed, 2 * skewed)


def neumann(skewed: Tensor, terms: int, is_old: bool = False) -> Tensor:
    """R - I for Cayley's R with (I - Q)^-1 cut off after some terms (PEFT `use_cayley_neumann`, OneTrainer): not orthogonal.

    Formula: 2 Q + 2 Q^2 + ... + 2 Q^(n-2) + Q^(n-1) for n terms; before PEFT 0.18 the last power counts twice too. With
    three terms PEFT has the powers of four.

    Args:
        skewed: Q (..., b, b).
        terms: n.
        is_old: As in PEFT before 0.18.
    """
    last = terms - 1 if is_old or terms < 3 else max(terms - 1, 3)
    found, power = torch.zeros_like(skewed), skewed
    for k in range(1, last + 1):
        found += power if k == last and not is_old and terms > 2 else 2 * power
        power = power @ skewed
    return found


def within_ball(skewed: Tensor, radius: float) -> Tensor:
    """Each block scaled down to a norm of at most radius / sqrt(n): constrained OFT (`coft`) of PEFT and OneTrainer.

    Args:
        skewed: Q (n, b, b), n as stored, where blocks that are shared are one.
        radius: `eps`.
    """
    norm = skewed.norm(dim=(1, 2), keepdim=True)
    return skewed * (radius / len(skewed) ** 0.5 / norm).clamp(max=1.0)


def constrained(skewed: Tensor, bound: float) -> Tensor:
    """All blocks scaled down together to a norm of `bound`; 0 and less bound nothing (LyCORIS: alpha * out).

    Kohya's `networks.oft`, of the same keys and otherwise the same rule, lets a bound of 0 turn the change off; it writes 1e-3.

    Args:
        skewed: Q, of all blocks and stages.
        bound: Of its Frobenius norm.
    """
    norm = float(skewed.norm()) + 1e-8
    return skewed * (bound / norm) if 0 < bound < norm else skewed


def rotated_inputs(weight: Tensor, turn: Tensor) -> Tensor:
    """W R' - W for R - I in blocks along the columns (PEFT, OneTrainer): the input is rotated, y = W R' x.

    Args:
        weight: W (out, n b).
        turn: R - I (n, b, b), or (1, b, b) for one that all blocks share.
    """
    weight = wide(weight)
    size = turn.shape[-1]
    blocks = weight.unflatten(1, (-1, size)).transpose(0, 1)  # (n, out, b)
    return torch.matmul(blocks, turn.mT).transpose(0, 1).flatten(1)


def rotated_outputs(weight: Tensor, turn: Tensor, rescale: Tensor | None = None) -> Tensor:
    """diag(c) R' W - W for R - I in blocks along the rows (LyCORIS diag-oft, kohya): block k is R_k' W_k.

    Args:
        weight: W (n b, in).
        turn: R - I (n, b, b).
        rescale: c (out, 1) of `rescaled`.
    """
    weight = wide(weight)
    delta = torch.matmul(turn.mT, weight.unflatten(0, turn.shape[:2])).flatten(0, 1)
    return _rescaled(weight, delta, rescale)


def butterfly_outputs(weight: Tensor, turns: Tensor, rescale: Tensor | None = None) -> Tensor:
    """diag(c) R_m ... R_1 W - W (LyCORIS boft).

    Stage i pairs row j of each 2 k rows with row j + k, k = 2^i b / 2; b / 2 such pairs make a block.

    Args:
        weight: W (n b, in).
        turns: R_i - I (m, n, b, b).
        rescale: c (out, 1) of `rescaled`.
    """
    weight = wide(weight)
    delta, half = torch.zeros_like(weight), turns.shape[-1] // 2
    for i, turn in enumerate(turns):
        k = 2**i * half
        pairs = (weight + delta).unflatten(0, (-1, 2, k)).transpose(1, 2).flatten(0, 2)
        step = torch.matmul(turn, pairs.unflatten(0, turn.shape[:2])).flatten(0, 1)
        delta = delta + step.unflatten(0, (-1, k, 2)).transpose(1, 2).flatten(0, 2)
    return _rescaled(weight, delta, rescale)


def butterfly_inputs(weight: Tensor, turns: Tensor, rescale: Tensor | None = None) -> Tensor:
    """diag(c) W R' - W with R = R_m ... R_1 (PEFT boft): y = diag(c) W R' x.

    Stage i takes the columns of each 2^i blocks as halves of a block and puts the even halves before the odd ones; what is
    rotated is their order before that.

    Args:
        weight: W (out, n b).
        turns: R_i - I (m, n, b, b).
        rescale: c (out, 1).
    """
    weight = wide(weight)
    columns = weight.T  # R acts on the rows of W'
    delta, half = torch.zeros_like(columns), turns.shape[-1] // 2
    for i, turn in enumerate(turns):
        before = columns + delta
        if i:  # the first stage keeps the order; its blocks may be of an odd size
            before = before.unflatten(0, (-1, 2, 2**i, half)).transpose(1, 2).flatten(0, 3)
        step = torch.matmul(turn, before.unflatten(0, turn.shape[:2])).flatten(0, 1)
        delta = delta + (step.unflatten(0, (-1, 2**i, 2, half)).transpose(1, 2).flatten(0, 3) if i else step)
    return _rescaled(weight, delta.T, rescale)


def _rescaled(weight: Tensor, delta: Tensor, rescale: Tensor | None) -> Tensor:
    """c (W + delta) - W."""
    if rescale is None:
        return delta
    return wide(rescale) * delta + (wide(rescale) - 1) * weight


def ia3(weight: Tensor, less_one: Tensor) -> Tensor:
    """diag(l) W - W or W diag(l) - W: W times l - 1.

    LyCORIS stores l - 1, which begins at 0 (`weight`, `on_input`), PEFT stores l (`ia3_l`). A bias that PEFT multiplies too is no
    part of a weight.

    Args:
        weight: W (out, in).
        less_one: l - 1, (out, 1) or (1, in).
    """
    return wide(weight) * wide(less_one)


def glora(weight: Tensor, a: Factors, b: Factors, scale: float) -> Factors:
    """s (W A1 A2 + B1 B2) as factors: [s W A1, s B1] [A2; B2] (LyCORIS; s is alpha / rank).

    Args:
        weight: W (out, in).
        a: A1 (in, r), A2 (r, in).
        b: B1 (out, r), B2 (r, in).
        scale: s.
    """
    up = torch.cat([wide(weight) @ wide(a.up), wide(b.up)], 1) * scale
    return Factors(up, torch.cat([wide(a.down), wide(b.down)]))
