"""The best approximation of a change by one of lower rank, without its dense (out, in) matrix.

Eckart-Young (1936): the singular vectors of the r largest singular values give the closest delta of rank r. Which road leads to
them depends on what the change is:

    thin factors     through the core, R x R for R stacked components. With the Cholesky factor L L' = up' up, W = up L'^(-1) is
                     orthonormal and delta delta' = W (L' down down' L) W': the eigenvectors A of the bracket give the left
                     singular vectors W A, and (W A)' delta = A' L' down is the other side. Gram matrices square the condition
                     number; where components depend on each other too much, the core S T' of up = P S and down' = Q T is
                     decomposed, with S = V^(1/2) E' from up' up = E V E' in float64, components balanced, null space left out
    a Kron           its singular values are the products of those of its two small matrices, its vectors their Kronecker
                     products: two small SVDs (merging LoKr)
    a Framed         those of its core, whose frames are orthonormal
    anything wide    block Krylov iteration (`krylov`): a LoKr with a LoRA, a LoHa of high rank, a dense difference
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .delta import Delta, Framed, Kron, as_dense
from .factors import Factors, balance, fold, gramian, lengths, roots, wide
from .krylov import leading

# The core's R x R decompositions against Krylov's passes: on 3840 x 3840 and 10240 x 3840 the core was the faster way up to 1024
# components whatever was kept, and up to about 12 times what is kept beyond that (tests/benchmarks/methods.py --thin, 2 cores).
_THIN, _SMALL = 12, 1024
_TINY = 1e-15  # norms between this and its inverse have squares that float32 holds
_CLEAR = 1e-9  # of the largest eigenvalue: what float64 tells well of a small one
_EXCESS = 1e-4  # of the energy that is left out, or of `_ROUNDING`: up to there an excess of 2e-7 was measured at most
_ROUNDING = 1e-6  # of the energy: what a rounding to bfloat16 or float16 costs at least
_CANCELLING = 1e-5  # of a singular vector: what float32 may cost
_SMALL_ERROR = 1e-7  # in units of the largest energy: nothing beside the rounding of float32


def truncate(x: Delta, rank: int, dtype: torch.dtype = torch.float64) -> Factors:
    """The closest delta of at most `rank` components, in the Frobenius norm.

    Args:
        x: The change, in any gauge; rank-deficient and lopsided factors too.
        rank: Components to keep, at least 1.
        dtype: Of the sums over long sides. float32 is taken where the error is estimated to stay within 1e-6 of the smallest one,
            or of that of a rounding to bfloat16; else float64.

    Returns:
        up: (out, p), down: (p, in) in float32 with p = min(rank, numerical rank of x), at least 1: each component carries the
        square root of its singular value on either side.
    """
    rank = min(rank, x.rank, *x.shape)
    if isinstance(x, Framed):
        left, sigma, right = _small_svd(wide(x.core), rank)
        up = _combined(x.up, wide(x.left) @ left, sigma, dtype)
        down = _combined(x.down.T, wide(x.right).T @ right.T, sigma, dtype).T
        return Factors(up.float(), down.float())
    if isinstance(x, Kron) or not _is_thin(x, rank):
        dense = as_dense(x)
        if dense is None or isinstance(x, Kron):
            left, sigma, right = svd(x.map(wide), rank)
        else:
            left, sigma, right = leading(dense.to(dtype), rank, dtype)
        return Factors((left * sigma.sqrt()).float(), (sigma.sqrt()[:, None] * right).float())
    for sums in dict.fromkeys((dtype, torch.float64)):
        up, down = thin = fold(x.expand().map(wide if sums == torch.float64 else torch.Tensor.float))
        if core := _cholesky_core(thin, rank):
            root = core.sigma.sqrt()
            return Factors((up @ (core.left * root).to(sums)).float(), ((root[:, None] * core.right).to(sums) @ down).float())
    left, sigma, right = _core_svd(thin, rank)
    return Factors((left * sigma.sqrt()).float(), (sigma.sqrt()[:, None] * right).float())


def _combined(long: Tensor, few: Tensor, sigma: Tensor, dtype: torch.dtype) -> Tensor:
    """long @ few, orthonormal, times the roots of sigma: (n, R), (R, p), (p,); in float64 where large terms cancel in it."""
    spread = float((lengths(long)[:, None] * few).norm(dim=0).max())
    sums = dtype if spread * torch.finfo(dtype).eps < _CANCELLING else torch.float64
    return long.to(sums) @ (few * sigma.sqrt()).to(sums)


def singular_values(x: Delta, most: int | None = None) -> Tensor:
    """The non-zero singular values of the delta, largest first: (p,) in float64.

    Args:
        x: (out, in).
        most: How many are wanted at most; where the change is wide and no Kron, all of them take a dense decomposition.
    """
    x = x.map(wide)
    if isinstance(x, Kron):
        return torch.outer(*(_spectrum(f) for f in x)).flatten().sort(descending=True).values[:most]
    if isinstance(x, Framed):
        return torch.linalg.svdvals(x.core)[:most]
    if _is_thin(x, most or x.rank):
        return _spectrum(fold(x.expand()))[:most]
    dense = as_dense(x)
    return leading(x if dense is None else dense, most or x.rank)[1]


def svd(x: Delta, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets of a change in float64.

    Args:
        x: (out, in).
        rank: How many; None is all that are not zero.

    Returns:
        (out, p), (p,), (p, in) with p = min(rank, numerical rank of x), at least 1.
    """
    rank = min(rank or x.rank, x.rank, *x.shape)
    if isinstance(x, Kron):
        return _kron_svd(x, rank)
    if isinstance(x, Framed):
        left, sigma, right = _small_svd(x.core, rank)
        return x.up @ (x.left @ left), sigma, (right @ x.right) @ x.down
    if not _is_thin(x, rank):
        return leading(x, rank)
    x = fold(x.expand())
    if core := _cholesky_core(x, rank):
        return x.up @ core.left, core.sigma, core.right @ x.down
    return _core_svd(x, rank)


def _is_thin(x: Delta, rank: int) -> bool:
    """Whether the core is the shorter way to the `rank` leading components."""
    return min(x.rank, *x.shape) <= max(_THIN * rank, _SMALL)


class _Core(NamedTuple):
    """Singular triplets of up @ down by their coefficients: (up @ left, sigma, right @ down).

    Attributes:
        left: (R, p).
        sigma: (p,), the largest first.
        right: (p, R).
    """

    left: Tensor
    sigma: Tensor
    right: Tensor


def _cholesky_core(x: Factors, rank: int) -> _Core | None:
    """The leading triplets from two Gram matrices, summed in the dtype of x; None where that would not be close enough.

    With unit columns in `up`, an entry of a Gram matrix is off by about eps. That turns the singular vectors i and j by
    eps (|L^-1|^2 (s_i^2 + s_j^2) + |x|^2) / (s_i^2 - s_j^2), where |x|^2 are the energies of all components, and costs the square
    of that times s_i^2 - s_j^2. Here that is asked of the largest one; how far the limits keep the rest from 1e-6 is measured, by
    tests/algebra/test_truncate.py on spectra from flat to steep.
    """
    sums, grams = x.up.dtype, [gramian(t) for t in (x.up, x.down.T)]
    sizes = [g.diagonal().sqrt() for g in grams]
    if not all(bool(((s > _TINY) & (s < 1 / _TINY)).all()) for s in sizes):
        return None
    ups = grams[0] / torch.outer(sizes[0], sizes[0])
    downs = grams[1] * torch.outer(sizes[0], sizes[0])
    root, failed = torch.linalg.cholesky_ex(ups)
    if failed:
        return None
    inverse = torch.linalg.solve_triangular(root, torch.eye(len(root), dtype=root.dtype, device=root.device), upper=False)
    core = root.T @ downs @ root
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    kept, vectors = values[-rank:].flip(0), vectors[:, -rank:].flip(1)
    total, left_out = float(values.sum()), max(float(values[:-rank].sum()), 0.0)
    spread, largest = float(inverse.square().sum()), float(kept[0])
    if not float(kept[-1]) > _CLEAR * largest:
        return None
    error = torch.finfo(sums).eps * (spread + float(downs.diagonal().sum()) / largest)
    floor = _ROUNDING * total if sums == torch.float32 else 0.0
    if not error**2 * largest <= _EXCESS * max(left_out, floor) and not error <= _SMALL_ERROR:
        return None
    sigma = kept.sqrt()
    return _Core((inverse.T @ vectors) / sizes[0][:, None], sigma, (vectors.T @ root.T) * sizes[0] / sigma[:, None])


def _core_svd(x: Factors, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Through the core S T' of the balanced factors."""
    up, down = balance(x)
    unroot_up, root_up = roots(up.T @ up)
    unroot_down, root_down = roots(down @ down.T)
    left, sigma, right = torch.linalg.svd(root_up @ root_down.T, full_matrices=False)
    return up @ (unroot_up @ left[:, :rank]), sigma[:rank], (right[:rank] @ unroot_down.T) @ down


def _kron_svd(x: Kron, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest of the products sigma_i tau_j, with u_i kron v_j as their vectors."""
    (u, sigma, v), (w, tau, z) = (_factor_svd(f) for f in x)
    products = torch.outer(sigma, tau).flatten()
    values, order = products.sort(descending=True, stable=True)
    keep = order[: max(1, min(rank, int((values > values[0] * torch.finfo(values.dtype).eps).sum())))]
    i, j = keep // len(tau), keep % len(tau)
    left = (u[:, None, i] * w[None, :, j]).flatten(0, 1)
    right = (v[i, :, None] * z[j, None, :]).flatten(1)
    return left, products[keep], right


def _factor_svd(x: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """Of a Kronecker factor: dense where it has no lower rank."""
    if 2 * x.rank <= min(x.shape):
        return _core_svd(x)
    return torch.linalg.svd(x.up @ x.down, full_matrices=False)


def _small_svd(x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading triplets of a small dense matrix, in half the time of all of them where they are few and clear."""
    if x.shape[0] > x.shape[1]:
        left, sigma, right = _small_svd(x.T, rank)
        return right.T, sigma, left.T
    if 4 * rank < len(x):
        values, vectors = torch.linalg.eigh(x @ x.T)
        if float(values[-rank]) > _CLEAR * float(values[-1]):
            sigma, left = values[-rank:].flip(0).sqrt(), vectors[:, -rank:].flip(1)
            return left, sigma, (left.T @ x) / sigma[:, None]
    left, sigma, right = torch.linalg.svd(x, full_matrices=False)
    return left[:, :rank], sigma[:rank], right[:rank]


def _spectrum(x: Factors) -> Tensor:
    up, down = balance(fold(x))
    return torch.linalg.svdvals(roots(up.T @ up)[1] @ roots(down @ down.T)[1].T)
