"""The one rounding at the end: float32 factors to the dtype of the file."""

from __future__ import annotations

import torch
from torch import Tensor

from .factors import LOW, Factors, leveled, peak, single

_HEAD = 64  # rows in which a component shows that it is not faint; one that is faint there is looked at as a whole


def to_dtype(x: Factors, dtype: torch.dtype) -> Factors:
    """The factors in `dtype`, keeping their own scale where the dtype can hold it.

    A component that `dtype` would lose, one that overflows or sinks into its subnormal numbers, is first balanced
    between `up` and `down` by a power of two, which is exact. Values that are already in `dtype` never move.

    Args:
        x: up (out, r), down (r, in), any floating dtype.
        dtype: float32, bfloat16 or float16.

    Returns:
        Factors in `dtype`. They hold infinities only if the delta itself is too large for it.
    """
    rounded = Factors(x.up.to(dtype), x.down.to(dtype))
    loses = _loses if dtype == torch.float16 else _leaves  # bfloat16 and float32 have the range of nearly all factors
    lost = loses(x.up, rounded.up, 0) | loses(x.down, rounded.down, 1)
    return leveled(x.map(single), which=lost).map(lambda t: t.to(dtype)) if lost.any() else rounded


def scaled(x: Factors, strength: float, dtype: torch.dtype) -> Factors:
    """strength * delta on its way to `dtype`: what `to_dtype` would round `x.times(strength)` to, in fewer passes.

    Args:
        x: (out, in), as stored.
        strength: A number.
        dtype: float32, bfloat16 or float16.

    Returns:
        In `dtype` where both factors are in bfloat16 and far from the ends of its range; else not yet rounded.
    """
    if strength != 1 and x.up.numel() and x.up.dtype == x.down.dtype == dtype == torch.bfloat16:
        up = x.up.float().mul_(strength).to(dtype)
        if peak(up) < 1 / LOW and bool((up[:_HEAD].abs().amax(0) > LOW).all()):
            return Factors(up, x.down)
    return x.times(strength)


def _loses(exact: Tensor, rounded: Tensor, dim: int) -> Tensor:
    """(r,) whether rounding cost a component clearly more than it costs normal numbers.

    Rounding to nearest moves a normal number by 0.17 eps of its size on average (a quarter of a unit in the last place over
    a log-uniform mantissa); eps / 4 is half as much again, reached when subnormals set in. Overflow gives inf, which is more.
    """
    if exact.dtype == rounded.dtype:
        return torch.zeros(exact.shape[1 - dim], dtype=torch.bool, device=exact.device)
    error = (exact.float() - rounded.float()).abs().sum(dim)
    return ~(error <= torch.finfo(rounded.dtype).eps / 4 * exact.float().abs().sum(dim))


def _leaves(exact: Tensor, rounded: Tensor, dim: int) -> Tensor:
    """(r,) whether a component has no element in the middle of the range that float32 and bfloat16 share."""
    if exact.dtype == rounded.dtype or exact.numel() == 0:
        return torch.zeros(exact.shape[1 - dim], dtype=torch.bool, device=exact.device)
    peaks = exact.abs().amax(dim)
    return (peaks > 0) & ((peaks < LOW) | (peaks > 1 / LOW))
