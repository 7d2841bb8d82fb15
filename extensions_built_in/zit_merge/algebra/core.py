"""The core space of several changes of one weight: N small matrices in place of N large ones, nothing lost.

With orthonormal columns L that span the columns of all deltas and orthonormal rows R that span their rows,

    delta_i = L core_i R        (out, in) = (out, p) @ (p, q) @ (q, in),  p and q at most sum r_i

so every inner product, norm and singular value of the deltas is one of the cores. Rules that look at single entries (trim, drop,
elect a sign) depend on the axes in which the entries are taken. Here these are the principal axes of the deltas together, each
taken at norm 1: the left singular vectors of [delta_1 / |delta_1| ... delta_N / |delta_N|] and the right ones of those below each
other, the largest first. They follow from the deltas alone, not from their strengths, from the gauge of their factors or from the
order of the LoRAs, and are unique up to sign unless singular values are equal. No rule here minds a sign.

Why not entry by entry in the model's own axes: there a trimmed or masked low-rank delta is no longer of low rank, and the
truncation that follows throws most of the rest away (see the README for the measured share).

Core space merging: Panariello et al. 2025, arXiv 2509.17786, whose reference axes come from the stacked factors instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .delta import Delta, norm
from .factors import Factors, balance, roots, stack, wide

FAINT = 1e-6  # of the largest singular value: what is fainter is the rounding of float32 factors, nothing that was trained


class Core(NamedTuple):
    """delta_i = left @ cores[i] @ right, in float64.

    Attributes:
        left: (out, p), orthonormal columns.
        right: (q, in), orthonormal rows.
        cores: (N, p, q).
    """

    left: Tensor
    right: Tensor
    cores: Tensor

    def back(self, core: Tensor) -> Factors:
        """The delta of one core (p, q), as factors of rank min(p, q)."""
        p, q = core.shape
        return Factors(self.left, core @ self.right) if p <= q else Factors(self.left @ core, self.right)


def core_space(deltas: Sequence[Delta]) -> Core:
    """The common core space in its principal axes.

    Args:
        deltas: Changes of one weight, (out, in) each. Factors stay thin; a LoKr or a difference of full rank makes the cores as
            large as the weight.
    """
    deltas = [d.map(wide) for d in deltas]
    norms = torch.tensor([norm(d) for d in deltas], dtype=torch.float64)
    parts = [balance(d.times(1 / n if n else 0.0).expand()) for d, n in zip(deltas, norms.tolist(), strict=True)]
    everything = stack(parts)
    unroot_up, roots_up = _span(everything.up)
    unroot_down, roots_down = _span(everything.down.T)
    ranks = [p.rank for p in parts]
    pairs = zip(roots_up.split(ranks, 1), roots_down.split(ranks, 1), strict=True)
    cores = torch.stack([up @ down.T for up, down in pairs])
    turn_left, turn_right = _principal(cores), _principal(cores.mT)
    cores = turn_left.T @ cores @ turn_right * norms.to(cores.device)[:, None, None]
    left = turn_left if unroot_up is None else everything.up @ (unroot_up @ turn_left)
    right = turn_right if unroot_down is None else everything.down.T @ (unroot_down @ turn_right)
    return Core(left, right.T, cores)


def _principal(cores: Tensor) -> Tensor:
    """The left singular vectors of [core_1 ... core_N]: (N, p, q) -> (p, p'), p' without those of rounding."""
    u, sigma, _ = torch.linalg.svd(torch.cat(list(cores), 1), full_matrices=False)
    return u[:, : max(1, int((sigma > FAINT * sigma[0]).sum()))]  # a share of the entries must not depend on padding


def _span(x: Tensor) -> tuple[Tensor | None, Tensor]:
    """(unroot, coordinates): x (n, R) = basis @ coordinates (p, R) for the orthonormal basis x @ unroot (n, p).

    Where the columns are as many as the rows, the basis is the identity, and no unroot is given.
    """
    return (None, x) if x.shape[1] >= x.shape[0] else roots(x.T @ x)
