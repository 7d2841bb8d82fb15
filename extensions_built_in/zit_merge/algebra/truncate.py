"""The best approximation of a change by one of lower rank, without its dense (out, in) matrix.

Eckart-Young (1936): the singular vectors of the r largest singular values give the closest delta of rank r. Which road leads to
them depends on what the change is:

    thin factors     through the core. With up = P S and down' = Q T for orthonormal P, Q, the delta P (S T') Q' has the singular
                     values of the small S T', (R, R) for R stacked components. P S comes from the Gram matrix of `up`:
                     up' up = V L V', so S = L^(1/2) V' and P = up V L^(-1/2); the same for `down`. Gram matrices square the
                     condition number, which float64 affords for factors that were stored in 32 bits or fewer, once every
                     component is balanced between `up` and `down`
    a Kron           its singular values are the products of those of its two small matrices, its vectors their Kronecker
                     products: two small SVDs (merging LoKr)
    anything wide    block Krylov iteration (`krylov`): a LoKr with a LoRA, a LoHa of high rank, a dense difference
"""

from __future__ import annotations

import torch
from torch import Tensor

from .delta import Delta, Kron
from .factors import Factors, balance, fold, roots, wide
from .krylov import leading

# The core's R x R decompositions against Krylov's passes: on 3840 x 3840 and 10240 x 3840 the core was the faster way up to 1024
# components whatever was kept, and up to about 12 times what is kept beyond that (tests/benchmarks/methods.py --thin, 2 cores).
_THIN, _SMALL = 12, 1024


def truncate(x: Delta, rank: int) -> Factors:
    """The closest delta of at most `rank` components, in the Frobenius norm.

    Args:
        x: The change, in any gauge; rank-deficient and lopsided factors too.
        rank: Components to keep, at least 1.

    Returns:
        up: (out, p), down: (p, in) in float32 with p = min(rank, numerical rank of x), at least 1: each component carries the
        square root of its singular value on either side.
    """
    left, sigma, right = svd(x.map(wide), rank)
    root = sigma.sqrt()
    return Factors((left * root).float(), (root[:, None] * right).float())


def singular_values(x: Delta, most: int | None = None) -> Tensor:
    """The non-zero singular values of the delta, largest first: (p,) in float64.

    Args:
        x: (out, in).
        most: How many are wanted at most; where the change is wide and no Kron, all of them take a dense decomposition.
    """
    x = x.map(wide)
    if isinstance(x, Kron):
        return torch.outer(*(_spectrum(f) for f in x)).flatten().sort(descending=True).values[:most]
    return _spectrum(fold(x.expand()))[:most] if _is_thin(x, most or x.rank) else leading(x, most or x.rank)[1]


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
    return _core_svd(fold(x.expand()), rank) if _is_thin(x, rank) else leading(x, rank)


def _is_thin(x: Delta, rank: int) -> bool:
    """Whether the core is the shorter way to the `rank` leading components."""
    return min(x.rank, *x.shape) <= max(_THIN * rank, _SMALL)


def _core_svd(x: Factors, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Through the core S T' of the balanced factors."""
    up, down = balance(x)
    unroot_up, root_up = roots(up.T @ up)
    unroot_down, root_down = roots(down @ down.T)
    left, sigma, right = torch.linalg.svd(root_up @ root_down.T, full_matrices=False)
    return up @ (unroot_up @ left[:, :rank]), sigma[:rank], (right[:rank] @ unroot_down.T) @ down


def _kron_svd(x: Kron, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest of the products sigma_i tau_j, with u_i kron v_j as their vectors."""
    (u, sigma, v), (w, tau, z) = (_small_svd(f) for f in x)
    products = torch.outer(sigma, tau).flatten()
    values, order = products.sort(descending=True, stable=True)
    keep = order[: max(1, min(rank, int((values > values[0] * torch.finfo(values.dtype).eps).sum())))]
    i, j = keep // len(tau), keep % len(tau)
    left = (u[:, None, i] * w[None, :, j]).flatten(0, 1)
    right = (v[i, :, None] * z[j, None, :]).flatten(1)
    return left, products[keep], right


def _small_svd(x: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """Of a Kronecker factor: dense where it has no lower rank."""
    if 2 * x.rank <= min(x.shape):
        return _core_svd(x)
    return torch.linalg.svd(x.up @ x.down, full_matrices=False)


def _spectrum(x: Factors) -> Tensor:
    up, down = balance(fold(x))
    return torch.linalg.svdvals(roots(up.T @ up)[1] @ roots(down @ down.T)[1].T)
