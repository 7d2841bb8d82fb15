"""The one rounding at the end: float32 factors to the dtype of the file."""

from __future__ import annotations

import torch
from torch import Tensor

from .factors import Factors


def to_dtype(x: Factors, dtype: torch.dtype) -> Factors:
    """The factors in `dtype`, keeping their own scale where the dtype can hold it.

    A component that `dtype` would lose, one that overflows or sinks into the subnormal numbers of float16, is first balanced
    between `up` and `down` by a power of two, which is exact. Values that are already in `dtype` never move.

    Args:
        x: up (out, r), down (r, in), any floating dtype.
        dtype: float32, bfloat16 or float16.

    Returns:
        Factors in `dtype`. They hold infinities only if the delta itself is too large for it.
    """
    rounded = Factors(x.up.to(dtype), x.down.to(dtype))
    if dtype != torch.float16:  # bfloat16 and float32 share the range of the factors
        return rounded
    lost = _loses(x.up, rounded.up, 0) | _loses(x.down, rounded.down, 1)
    if not lost.any():
        return rounded
    up, down = x.up.float(), x.down.float()
    ups, downs = up.abs().mean(0), down.abs().mean(1)
    alive = (ups > 0) & (downs > 0)  # half of a zero component may be anything: write zeros
    shift = torch.where(lost & alive, ((downs / ups).log2() / 2).round(), 0.0)
    up, down = torch.ldexp(up * alive, shift), torch.ldexp(down * alive[:, None], -shift[:, None])
    return Factors(up.to(dtype), down.to(dtype))


def _loses(exact: Tensor, rounded: Tensor, dim: int) -> Tensor:
    """(r,) whether rounding cost a component clearly more than it costs normal numbers.

    Rounding to nearest moves a normal number by 0.17 eps of its size on average (a quarter of a unit in the last place over
    a log-uniform mantissa); eps / 4 is half as much again, reached when subnormals set in. Overflow gives inf, which is more.
    """
    if exact.dtype == rounded.dtype:
        return torch.zeros(exact.shape[1 - dim], dtype=torch.bool, device=exact.device)
    error = (exact.float() - rounded.float()).abs().sum(dim)
    return ~(error <= torch.finfo(rounded.dtype).eps / 4 * exact.float().abs().sum(dim))
