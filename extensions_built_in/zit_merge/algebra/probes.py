"""What a change does to a few random inputs (Freivalds 1977): whether two changes are one, without their inner products.

For a block x of k = 16 Gaussian columns, |d x|^2 / k is on average |d|^2. Its relative standard deviation is at most
sqrt(2 / (k s)) where s = |d|^2 / sigma_1^2 >= 1 is the stable rank of d: 35 % for rank 1, 6 % at s = 32, less when it is summed
over modules. It tells d as smaller by a factor of t at most as often as chi^2 of k degrees of freedom is below k / t^2: 1e-3 for
t = 2, 6e-8 for t = 4, 4e-14 for t = 10. Inner products of long lists of components are taken of `shortened` factors.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .delta import Delta
from .factors import Factors

COUNT = 16  # columns of a block
_BLOCK = 128  # components that are cast at once
_SHORT = 521  # a prime: rows that are heads, or repeat with another power of two, meet in no one sum


@lru_cache(maxsize=8)
def probes(into: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(into, 16) Gaussian numbers, always the same ones.

    Args:
        into: Columns of the changes.
        dtype: float64 has the numbers of float32.
        device: Where they go.
    """
    return torch.randn(into, COUNT, generator=torch.Generator().manual_seed(into)).to(device, dtype)


def image(x: Delta, block: Tensor) -> Tensor:
    """x @ block in the dtype of the block; of factors some components are cast at a time.

    Args:
        x: (out, in) as stored.
        block: (in, n).
    """
    if not isinstance(x, Factors) or x.up.dtype == x.down.dtype == block.dtype:
        return x.map(lambda t: t.to(block.dtype)) @ block
    found = block.new_zeros(x.shape[0], block.shape[1])
    for up, down in zip(x.up.split(_BLOCK, 1), x.down.split(_BLOCK), strict=True):
        found.addmm_(up.to(block.dtype), down.to(block.dtype) @ block)
    return found


def shortened(x: Factors) -> Factors:
    """Factors (521, r), (r, 521) whose inner products are on average those of the long ones: sums of rows with random signs.

    Among eight random changes of rank 32 and Z-Image's shapes, cosines were 0.003 off (root mean square) for equal singular
    values and 0.007 where they fall as 1/k, 0.04 at most; squared lengths 1 and 5 %. That of a difference is kept too, so that
    two changes that are nearly alike stay so.

    Args:
        x: (out, in), each side as it is where it is not over twice as long.
    """
    return Factors(_shortened(x.up), _shortened(x.down.T).T)


def _shortened(x: Tensor) -> Tensor:
    """A count sketch (Charikar, Chen and Farach-Colton 2002) of the rows, in float32 or wider."""
    rows, columns = x.shape
    if rows <= 2 * _SHORT:
        return x
    signs = _signs(rows, x.device)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    folds = -(-rows // _SHORT)
    if x.is_contiguous():
        signed = x.new_zeros(folds * _SHORT, columns, dtype=dtype)
        torch.mul(x, signs, out=signed[:rows])
        return signed.view(folds, _SHORT, columns).sum(0)
    signed = x.new_zeros(columns, folds * _SHORT, dtype=dtype)
    torch.mul(x.T, signs.T, out=signed[:, :rows])
    return signed.view(columns, folds, _SHORT).sum(1).T


@lru_cache(maxsize=8)
def _signs(rows: int, device: torch.device) -> Tensor:
    """(rows, 1), each 1 or -1."""
    drawn = torch.randint(0, 2, (rows, 1), generator=torch.Generator().manual_seed(rows))
    return (drawn * 2 - 1).float().to(device)
