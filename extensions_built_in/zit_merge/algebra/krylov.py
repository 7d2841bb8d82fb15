"""Leading singular vectors of a change that is neither thin nor a Kronecker product alone.

Block Krylov iteration (Golub, Luk and Overton 1981; Musco and Musco 2015): the space spanned by V, X'X V, (X'X)^2 V, ... holds
the leading right singular vectors of X to rounding after some passes, and Rayleigh-Ritz takes them out of it. X is only ever
multiplied with thin matrices.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

_EXTRA = 16  # columns beyond those asked for: the iteration converges by the gap to the first that is left out
_GAIN = {torch.float64: 1e-13, torch.float32: 1e-8}  # relative; a pass that adds less energy has only found rounding


class Operator(Protocol):
    """A matrix that need not be written out: a `Delta`, or a dense one."""

    @property
    def shape(self) -> Any:
        """(out, in)."""

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""

    @property
    def T(self) -> Any:  # noqa: N802 - as torch calls it
        """Its transpose."""

    def __matmul__(self, x: Tensor) -> Tensor:
        """Its product with a thin matrix."""


def leading(x: Operator, rank: int, sums: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets of a change, in float64.

    Args:
        x: (out, in), in the dtype of the sums.
        rank: How many.
        sums: Of products with x. In float32 the error of the approximation was 1e-7 above the smallest one at most, on random and
            flat spectra and those that fall as 1/k and 1/k^2, in a half to a quarter of the time; what is small stays in float64.

    Returns:
        (out, p), (p,), (p, in) with p = min(rank, numerical rank). The start is drawn from a fixed seed: the result depends on it
        by rounding alone, its bytes never change.
    """
    out, into = x.shape
    if out < into:
        left, sigma, right = leading(x.T, rank, sums)
        return right.T, sigma, left.T

    def times(matrix: Operator, thin: Tensor) -> Tensor:
        return (matrix @ thin.to(sums)).double()

    width = min(rank + _EXTRA, into)
    start = torch.randn(into, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(x.device)
    basis = torch.linalg.qr(start).Q
    image = times(x, basis)
    gram = image.T @ image
    values, vectors = torch.linalg.eigh(gram)
    energy, gain = float(values[-rank:].sum()), torch.inf
    while gain > _GAIN[sums] * energy and basis.shape[1] < into:
        if 2 * (basis.shape[1] + width) > into:  # from here on the whole of X is cheaper
            basis = torch.eye(into, dtype=torch.float64, device=x.device)
            image = times(x, basis)
            gram = image.T @ image
        else:
            block = times(x.T, image[:, -width:])
            for _ in range(2):  # the second pass takes off what rounding left of the basis
                block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
            fresh = times(x, block)
            cross = image.T @ fresh
            gram = torch.cat([torch.cat([gram, cross], 1), torch.cat([cross.T, fresh.T @ fresh], 1)])
            basis, image = torch.cat([basis, block], 1), torch.cat([image, fresh], 1)
        values, vectors = torch.linalg.eigh(gram)
        gain, energy = float(values[-rank:].sum()) - energy, float(values[-rank:].sum())
    values, vectors = values[-rank:].flip(0), vectors[:, -rank:].flip(1)
    alive = max(1, int((values > values[0] * torch.finfo(values.dtype).eps * len(gram)).sum()))
    sigma = values[:alive].clamp(min=0).sqrt()
    left = image @ vectors[:, :alive] / torch.where(sigma > 0, sigma, 1.0)
    return left, sigma, (basis @ vectors[:, :alive]).T
