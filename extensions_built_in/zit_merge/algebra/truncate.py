"""The best approximation of a low-rank change by one of lower rank, from its factors alone.

Eckart-Young (1936): the singular vectors of the r largest singular values give the closest delta of rank r. They are found
without the dense (out, in) matrix. With up = P S and down' = Q T for orthonormal P, Q,

    delta = P (S T') Q'

has the singular values of the small core S T', (R, R) for R stacked components. P S comes from the Gram matrix of `up`:
up' up = V L V', so S = L^(1/2) V' and P = up V L^(-1/2); the same for `down`. Gram matrices square the condition number, which
float64 affords for factors that were stored in 32 bits or fewer, once every component is balanced between `up` and `down`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .factors import Factors, wide


def truncate(x: Factors, rank: int) -> Factors:
    """The closest delta of at most `rank` components, in the Frobenius norm.

    Args:
        x: The change, `R` components, in any gauge; rank-deficient and lopsided ones too.
        rank: Components to keep, at least 1.

    Returns:
        up: (out, p), down: (p, in) in float32 with p = min(rank, numerical rank of x), at least 1: each component carries the
        square root of its singular value on either side.
    """
    up, down = _balance(_fold(Factors(wide(x.up), wide(x.down))))
    unroot_up, root_up = _roots(up.T @ up)
    unroot_down, root_down = _roots(down @ down.T)
    left, sigma, right = torch.linalg.svd(root_up @ root_down.T, full_matrices=False)
    left, sigma, right = left[:, :rank], sigma[:rank].sqrt(), right[:rank]
    return Factors((up @ (unroot_up @ left * sigma)).float(), ((sigma[:, None] * (right @ unroot_down.T)) @ down).float())


def singular_values(x: Factors) -> Tensor:
    """All non-zero singular values of the delta, largest first: (p,) in float64."""
    up, down = _balance(_fold(Factors(wide(x.up), wide(x.down))))
    return torch.linalg.svdvals(_roots(up.T @ up)[1] @ _roots(down @ down.T)[1].T)


def _fold(x: Factors) -> Factors:
    """At most min(out, in) components: a longer stack (adaLN has in = 256) is multiplied out into its shorter side."""
    out, into = x.up.shape[0], x.down.shape[1]
    if x.rank <= min(out, into):
        return x
    eye = torch.eye(min(out, into), dtype=x.up.dtype, device=x.up.device)
    return Factors(x.up @ x.down, eye) if into <= out else Factors(eye, x.up @ x.down)


def _balance(x: Factors) -> Factors:
    """The same delta with |up[:, k]| = |down[k]| for each component, zero components dropped (one is always kept).

    A lopsided pair, B times 1e6 with A over 1e6, would otherwise drown its neighbours under the relative cut-off of `_roots`.
    """
    ups, downs = x.up.norm(dim=0), x.down.norm(dim=1)
    alive = (ups > 0) & (downs > 0)
    if not alive.any():
        return Factors(torch.zeros_like(x.up[:, :1]), torch.zeros_like(x.down[:1]))
    ratio = (downs[alive] / ups[alive]).sqrt()
    return Factors(x.up[:, alive] * ratio, x.down[alive] / ratio[:, None])


def _roots(gram: Tensor) -> tuple[Tensor, Tensor]:
    """For a Gram matrix G = F'F (R, R): (U, S) with F U orthonormal and F = (F U) S; U is (R, p), S is (p, R).

    p leaves out the directions whose eigenvalue is rounding error of the largest one. One direction is always kept.
    """
    values, vectors = torch.linalg.eigh(gram)
    cutoff = values[-1] * torch.finfo(gram.dtype).eps * gram.shape[0]
    alive = values > cutoff
    if not alive.any():
        return torch.zeros_like(vectors[:, :1]), torch.zeros_like(vectors[:, :1]).T
    root = values[alive].sqrt()
    return vectors[:, alive] / root, root[:, None] * vectors[:, alive].T
