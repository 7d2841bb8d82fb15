"""What several changes of one weight have in common, and what of them is in another one.

    cosines        between whole deltas, from their Gram matrix
    directions     the sum of the projectors on the N column spaces (or row spaces) has eigenvalues from 0 to N: how many of the
                   spaces hold a direction. 1 is one LoRA's own direction, N one that all of them have
    chance         spaces that were drawn at random come near each other too, the nearer the more of the side they fill: two of
                   32 directions among the 256 inputs of adaLN have some that count as 1.66. What chance explains is not counted
    energy         a direction may be common and faint: the share of a LoRA's squared norm that lies in common ones tells
    projected      a truncated sum is the sum itself between the projectors on its own column and row space, so that the strengths
                   before the cut can be told from what the cut left
    inside         the energy of a change within the column and row spaces of others: adding factors in place of products makes
                   cross terms, which stay in there, another LoRA or a further training does not

Everything is taken in float64 from thin factors, or from the small ones of `core.condensed`; over 128 directions are counted in
float32. Of a change of high rank (LoKr, LoHa, full difference) the directions are its leading ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from .delta import Delta
from .factors import roots, wide
from .subspace import counts, triplets

THIN = 512  # rank up to which every direction of a change is looked at
LEADING = 128  # of a change of higher rank
_HELD = 1e-4  # of a projector: less is what sums in float32 leave of none
_MANY = 128  # directions, beyond which they are counted in float32
_FLUCTUATION = 3.0  # times n^(-2/3), as the largest eigenvalue of n dimensions scatters: no draw tested went that far


class Triplets(NamedTuple):
    """delta = left @ diag(sigma) @ right, or its leading part.

    Attributes:
        left: (out, p), orthonormal columns.
        sigma: (p,), the largest first.
        right: (p, in), orthonormal rows.
    """

    left: Tensor
    sigma: Tensor
    right: Tensor


class Side(NamedTuple):
    """The column spaces or the row spaces of several deltas.

    Attributes:
        values: How many of them hold a direction, the largest first.
        chance: What spaces of these sizes reach when they are drawn at random.
        bar: Above it chance has no part; infinite where they fill the side so that they must meet.
        common: How many of `values` are above 1 + tau (N - 1) too.
    """

    values: Tensor
    chance: float
    bar: float
    common: int

    @property
    def of(self) -> int:
        """How many directions there are."""
        return int((self.values > _HELD).sum())


class Overlap(NamedTuple):
    """What the directions of several deltas have in common.

    Attributes:
        columns: On the side of the outputs.
        rows: On the side of the inputs.
        energy: (N, 4): squared norm of each delta, and that of it which lies in common columns, in common rows, in both.
    """

    columns: Side
    rows: Side
    energy: Tensor


def is_thin(x: Delta) -> bool:
    """Whether all of its directions are looked at."""
    return min(x.rank, *x.shape) <= THIN


def directions(x: Delta, most: int | None = None) -> Triplets:
    """The singular triplets of a change.

    Args:
        x: (out, in).
        most: How many of the leading ones are wanted where its rank is high; None is LEADING.
    """
    return Triplets(*triplets(x, None if is_thin(x) else most or LEADING))


def overlap(parts: Sequence[Triplets], tau: float = 0.5, shape: tuple[int, int] | None = None) -> Overlap:
    """Which directions are common.

    Args:
        parts: Of N deltas of one weight.
        shape: (out, in) of the weight where the parts are `core.condensed`.
        tau: Share of the other deltas that must hold a direction before it counts as common, as in `subspace.shared_once`.
    """
    out, into = shape or (len(parts[0].left), parts[0].right.shape[1])
    columns, lefts = _side([p.left for p in parts], tau, out)
    rows, rights = _side([p.right.T for p in parts], tau, into)
    energy = []
    for p, left, right in zip(parts, lefts, rights, strict=True):
        weighted = p.sigma[:, None] * left, p.sigma[:, None] * right
        both = weighted[0].T @ right
        energy.append([float(t.square().sum()) for t in (p.sigma, *weighted, both)])
    return Overlap(columns, rows, torch.tensor(energy, dtype=torch.float64))


def _side(bases: Sequence[Tensor], tau: float, size: int) -> tuple[Side, list[Tensor]]:
    """The side, and where the common directions lie in each basis: (r_i, common)."""
    values = torch.linalg.eigvalsh(_projectors(bases)).double().flip(0).clamp(min=0)
    ranks = [b.shape[1] for b in bases if b.shape[1]]  # a zero change holds no direction
    edge, bar = chance(ranks, size)
    common = int((values > max(bar, 1 + tau * (len(ranks) - 1))).sum())
    coordinates = [c[:, :common] for c in held(bases)[1]] if common else [b.new_zeros(b.shape[1], 0) for b in bases]
    return Side(values, edge, bar, common), coordinates


def _projectors(bases: Sequence[Tensor]) -> Tensor:
    """A symmetric matrix with the eigenvalues of the sum of the projectors on what the bases span, zeros aside."""
    together = torch.cat(list(bases), 1)
    together = together.float() if min(together.shape) > _MANY else together
    return together @ together.T if together.shape[1] >= together.shape[0] else together.T @ together


def held(bases: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """How many subspaces hold a direction, for every direction that any of them holds.

    The sum of the projectors is B B' with B = [B_1 ... B_N]; B'B, as small as the ranks, has the same eigenvalues, zeros aside.

    Args:
        bases: Orthonormal columns, (n, r_i) each.

    Returns:
        (p,) eigenvalues, the largest first, and the coordinates of their directions in each basis, (r_i, p).
    """
    together = torch.cat(list(bases), 1)
    size, total = together.shape
    if total >= size:
        values, vectors = counts(bases)
        return values, [b.T @ vectors for b in bases]
    values, vectors = torch.linalg.eigh(together.T @ together)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    return values, list((vectors * values.sqrt()).split([b.shape[1] for b in bases]))


def chance(ranks: Sequence[int], size: int) -> tuple[float, float]:
    """What random subspaces reach.

    The spectrum of the sum of N projectors in general position ends at (sqrt((N-1) a) + sqrt(1-a))^2 when each fills a share a
    of a large space (the N-fold free convolution of a Bernoulli law). The mean share stands for unequal ones.

    Args:
        ranks: Their dimensions.
        size: Of the space.

    Returns:
        That edge, and the bar above which no draw has come; infinite where the spaces fill so much that they must meet.
    """
    count = len(ranks)
    if sum(ranks) > (count - 1) * size or count < 2:
        return float(count), inf  # dimensions that are left over lie in all of them
    share = sum(ranks) / count / size
    edge = min(float(count), max(1.0, (((count - 1) * share) ** 0.5 + (1 - share) ** 0.5) ** 2))
    return edge, min(edge * (1 + _FLUCTUATION * size ** (-2 / 3)), (edge + count) / 2, count - 1e-6)


def inside(x: Triplets, others: Sequence[Triplets]) -> float:
    """The energy of a change within the column spaces and row spaces that others span together.

    Args:
        x: Of the change, (out, in).
        others: Of the others, of the same shape.
    """
    left = _coordinates(x.left, torch.cat([o.left for o in others], 1))
    right = _coordinates(x.right.T, torch.cat([o.right.T for o in others], 1))
    return float(((left * x.sigma) @ right.T).square().sum())


def _coordinates(x: Tensor, spanning: Tensor) -> Tensor:
    """X'x in an orthonormal basis X of what `spanning` (n, R) spans."""
    if spanning.shape[1] == 0:
        return spanning.T @ x
    return roots(spanning.T @ spanning)[0].T @ (spanning.T @ x)


def projected(x: Triplets, deltas: Sequence[Delta]) -> Tensor:
    """Several deltas between the projectors on the column and row space of another, in its singular vectors: (N, p, p).

    In them x itself is diag(sigma). If it is a sum_i c_i delta_i that was truncated, it is sum_i c_i of these.

    Args:
        x: Of the change that gives the basis, (out, in) of rank p.
        deltas: The N others, (out, in).
    """
    return torch.stack([x.left.T @ (d.map(wide) @ x.right.T) for d in deltas])


def factor_products(factors: Sequence[Tensor]) -> Tensor:
    """Inner products of matrices of one height that are filled up with zero columns: (n, r_i) -> (N, N).

    Adding `up` to `up` and `down` to `down` is no sum of deltas; whether a file was made so shows in the factors themselves.
    """
    width = max(f.shape[1] for f in factors)
    rows = torch.stack([torch.nn.functional.pad(wide(f), (0, width - f.shape[1])).flatten() for f in factors])
    return rows @ rows.T
