"""A low-rank change of one weight, kept as its two factors.

Notation, here and in the whole folder:

    delta = up @ down        (out, in) = (out, r) @ (r, in)

`up` is what the field also calls lora_B or lora_up, `down` is lora_A or lora_down, `r` the rank. Column k of `up` with row k of
`down` is one *component*: a rank-1 change. The factors have a gauge: (up @ Q, inv(Q) @ down) is the same delta for every
invertible Q. No function here may let a delta depend on it, which rules out adding `up` to `up` and `down` to `down`.

Sums over a factor's long side (Gram matrices) are taken in float64: their error is squared away when a norm is drawn from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """delta = up @ down.

    Attributes:
        up: (out, r).
        down: (r, in).
    """

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        """Number of components, zero ones included."""
        return self.down.shape[0]


def wide(x: Tensor) -> Tensor:
    """`x` in float64, on the CPU where its device has none (MPS)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def is_finite(x: Tensor) -> bool:
    """Whether no element is NaN or infinite. One sum tells in nearly every case; elements are looked at only if it overflows."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def scale(x: Factors, strength: float) -> Factors:
    """strength * delta. Sign and strength go into `up`; a strength of 1 leaves the factors as they are, bit for bit.

    Args:
        x: The change.
        strength: Any finite number.
    """
    return x if strength == 1 else Factors(x.up.float() * strength, x.down)


def stack(parts: Sequence[Factors]) -> Factors:
    """The exact sum of the deltas: ranks add up, nothing is rounded.

    Args:
        parts: One or more changes of the same weight.

    Returns:
        up: (out, sum r_i), down: (sum r_i, in), in the widest dtype of the parts.
    """
    if len(parts) == 1:
        return parts[0]
    return Factors(_cat([p.up for p in parts], 1), _cat([p.down for p in parts], 0))


def _cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    dtype = tensors[0].dtype if len({t.dtype for t in tensors}) == 1 else torch.float32
    return torch.cat([t.to(dtype) for t in tensors], dim)


def pad(x: Factors, rank: int) -> Factors:
    """The same delta with zero components appended until there are `rank`."""
    missing = rank - x.rank
    if missing == 0:
        return x
    return Factors(torch.nn.functional.pad(x.up, (0, missing)), torch.nn.functional.pad(x.down, (0, 0, 0, missing)))


def inner(x: Factors, y: Factors) -> float:
    """Frobenius inner product of two deltas: <x, y> = tr(up_x' up_y . down_y down_x'). Costs r x r products only."""
    ups, downs = wide(x.up).T @ wide(y.up), wide(x.down) @ wide(y.down).T
    return float((ups * downs).sum())


def norm(x: Factors) -> float:
    """Frobenius norm of the delta."""
    return max(inner(x, x), 0.0) ** 0.5


def distance(x: Factors, y: Factors) -> float:
    """Frobenius norm of the difference of two deltas; its floor is about 1e-8 of their norms (float64 Grams)."""
    return norm(Factors(torch.cat([wide(x.up), -wide(y.up)], 1), torch.cat([wide(x.down), wide(y.down)], 0)))
