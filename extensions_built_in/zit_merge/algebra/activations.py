"""SSR: the merge that does on the activations of each LoRA what that LoRA does there.

With delta_k = U_k D_k, strength included, U = [U_1 ... U_N] (out, R), D = [D_1; ...; D_N] (R, in), X_k (in, tokens) the inputs of
a module while the model draws what LoRA k was trained for, and Z_k = D X_k:

    merged = U M D,   M = argmin sum_k |M Z_k - E_k Z_k|^2 + ridge tr(G) / R |M|^2 = Q (G + ridge tr(G) / R I)^-1
    G = sum_k S_k,    Q = sum_k E_k S_k,    S_k = Z_k Z_k' (R, R),    E_k the identity on the rows of D_k, else 0

S_k is all that is kept of the activations. Activations that share nothing give M = I, the sum; equal ones M = I / N, the mean.
The rows of each D_k are orthonormal, so that the ridge does not depend on the gauge of a file's factors.

Source: SSR, arXiv 2606.10617, whose ridge is not scaled by the trace. RegMean (arXiv 2212.09849) in the space of the LoRAs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .delta import Delta
from .factors import Factors, wide
from .truncate import svd


def orthonormal(x: Delta) -> Factors:
    """The same delta with orthonormal rows in `down`, as many as its numerical rank, in float64.

    Args:
        x: (out, in).
    """
    up, sigma, down = svd(x.map(wide))
    return Factors(up * sigma, down)


def mixing(products: Sequence[Tensor], ranks: Sequence[int], ridge: float) -> Tensor:
    """M of the formula above, (R, R) in float64.

    Args:
        products: S_k of each LoRA, (R, R).
        ranks: r_k of each; they add up to R.
        ridge: Relative to the mean of the diagonal of G; above 0 where activations may lie in fewer than R dimensions.
    """
    gram = torch.stack([wide(product) for product in products]).sum(0)
    wanted = torch.cat([wide(product)[a:b] for product, (a, b) in zip(products, _spans(ranks), strict=True)])
    level = ridge * gram.trace() / len(gram) if gram.any() else 1.0  # without activations M is zero
    return torch.linalg.solve(gram + level * torch.eye(len(gram)).to(gram), wanted.T).T


def effects(ups: Tensor, mixed: Tensor, products: Sequence[Tensor], ranks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """How strong each LoRA is in the merge, on its own activations and on those of the others.

    Args:
        ups: U, (out, R).
        mixed: M, (R, R).
        products: S_k of each LoRA, (R, R).
        ranks: r_k of each.

    Returns:
        (N, N) and (N, N) in float64: at [j, k] <U_j M_j Z_k, U_j D_j X_k> and |U_j D_j X_k|^2, with the rows j of M. Summed over
        modules and divided, they are strengths: the identity is ideal, 1 / N everywhere an average.
    """
    inner, sizes = (torch.zeros(len(ranks), len(ranks), dtype=torch.float64) for _ in range(2))
    for j, (a, b) in enumerate(_spans(ranks)):
        gram = wide(ups[:, a:b]).T @ wide(ups[:, a:b])
        for k, product in enumerate(map(wide, products)):
            inner[j, k] = (gram * (mixed[a:b].to(gram) @ product[:, a:b])).sum()
            sizes[j, k] = (gram * product[a:b, a:b]).sum()
    return inner, sizes


def truncate_seen(x: Factors, gram: Tensor, rank: int) -> Factors:
    """The change of a lower rank that does nearly the same on the activations, where `truncate` looks at the weight alone.

    Formula: P P' x, the columns of P the leading left singular vectors of up G^(1/2): |(x - P P' x) [X_1 ... X_N]| is the least
        that a change of this rank can have (Eckart and Young 1936).

    Args:
        x: up (out, R), down D (R, in).
        gram: G, (R, R).
        rank: Of the result.
    """
    values, vectors = torch.linalg.eigh(wide(gram))
    up = wide(x.up)
    kept = torch.linalg.svd(up @ (vectors * values.clamp(min=0).sqrt()), full_matrices=False)[0][:, :rank]
    return Factors(kept, (kept.T @ up) @ wide(x.down))


def _spans(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """First and last + 1 component of each LoRA."""
    return list(pairwise(accumulate(ranks, initial=0)))
