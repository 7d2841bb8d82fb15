"""A change multiplied out, some rows at a time, and the one rounding of a weight that it is added to."""

from __future__ import annotations

import torch
from torch import Tensor

from .delta import Delta, Kron, as_dense, parts
from .factors import Factors, is_finite

STOCHASTIC = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float8_e4m3fn: torch.int8}


def dense_rows(delta: Delta, first: int, last: int) -> Tensor:
    """Rows first .. last - 1 of a change, (last - first, in), multiplied out in float32.

    Args:
        delta: (out, in), its tensors in float32.
        first: The first row.
        last: The row after the last one.
    """
    one, *rest = (_rows(part, first, last) for part in parts(delta))
    return sum(rest, one)


def _rows(delta: Delta, first: int, last: int) -> Tensor:
    if isinstance(delta, Kron):
        left, right = delta.left, delta.right
        at, s = torch.arange(first, last, device=delta.device), right.shape[0]
        # row i of L kron R is row i // s of L kron row i % s of R
        upper, lower = left.up[at // s] @ left.down, right.up[at % s] @ right.down
        return (upper[:, :, None] * lower[:, None, :]).flatten(1)
    if not isinstance(delta, Factors):
        delta = delta.expand()
    whole = as_dense(delta)
    return delta.up[first:last] @ delta.down if whole is None else whole[first:last]


def rounded(x: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """float32 in another dtype: to the nearest value, or, with a generator, to one of the two neighbours, exact in the mean.

    Stochastic rounding takes the neighbour above with the probability (x - below) / (above - below), so that of many weights
    the sum of what is lost is zero (Connolly, Higham, Mary 2021). float32 has no neighbours to choose from: it stays,
    in float64 too.

    Args:
        x: Any shape, float32.
        dtype: float64, float32, bfloat16, float16 or float8_e4m3fn.
        generator: Of the draws, on the device of x.
    """
    if generator is None or dtype not in STOCHASTIC:
        return x.to(dtype)
    if dtype == torch.bfloat16:  # the upper half of a float32: what is added below carries over with that probability
        draws = torch.randint(1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
        bits = draws.add_(x.view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32)  # in place: fresh pages cost more
        return (bits if is_finite(x) else torch.where(x.isfinite(), bits, x)).to(dtype)
    near = x.to(dtype)
    error = x - near.float()
    step = torch.where(error.sign() == near.float().sign(), 1, -1).to(STOCHASTIC[dtype])  # in magnitude, as bits count it
    is_zero = near == 0
    far = (near.view(STOCHASTIC[dtype]) + torch.where(is_zero, 1, step)).view(dtype).float()
    far = torch.where(is_zero, far.abs().copysign(error), far)
    share = error / (far - near.float())
    draws = torch.rand(x.shape, generator=generator, device=x.device)
    return torch.where((error != 0) & far.isfinite() & (draws < share), far, near.float()).to(dtype)
