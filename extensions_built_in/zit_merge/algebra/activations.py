"""SSR: the merge that does on the activations of each LoRA what that LoRA does there.

With delta_k = U_k D_k, strength included, U = [U_1 ... U_N] (out, R), D = [D_1; ...; D_N] (R, in), X_k (in, tokens) the inputs of
a module while the model draws what LoRA k was trained for, and Z_k = D X_k:

    merged = U M D,   M = argmin sum_k |M Z_k - E_k Z_k|^2 + ridge tr(G) / R |M|^2 = Q (G + ridge tr(G) / R I)^-1
    G = sum_k S_k,    Q = sum_k E_k S_k,    S_k = Z_k Z_k' (R, R),    E_k the identity on the rows of D_k, else 0

S_k is all that is kept of the activations. Activations that share nothing give M = I, the sum; equal ones M = I / N, the mean.
The rows of each D_k are orthonormal, so that the ridge does not depend on the gauge of a file's factors. The sums are over the
LoRAs that change the module.

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
        ridge: Above 0; relative to the mean of the diagonal of G.
    """
    gram = torch.stack([wide(product) for product in products]).sum(0)
    wanted = torch.cat([wide(product)[a:b] for product, (a, b) in zip(products, _spans(ranks), strict=True)])
    level = ridge * gram.trace() / len(gram) if gram.any() else 1.0  # without activations M is zero
    return torch.linalg.solve(gram + level * torch.eye(len(gram)).to(gram), wanted.T).T


def effects(ups: Tensor, mixed: Tensor, products: Sequence[Tensor], ranks: Sequence[int], frame: Tensor | None = None) -> Tensor:
    """How strong each LoRA is in the merge, on its own activations and on those of the others.

    Args:
        ups: U, (out, R).
        mixed: M, (R, R).
        products: S_k of each LoRA, (R, R).
        ranks: r_k of each.
        frame: P of `truncate_seen`, where the merge is cut to P P' U M D; (out, r).

    Returns:
        (2, N, N) in float64: at [0, j, k] <U_j M_j Z_k, U_j D_j X_k> with the rows j of M, at [1, j, k] |U_j D_j X_k|^2. Summed
        over modules and divided, they are strengths: the identity is ideal, 1 / N everywhere an average.
    """
    found = torch.zeros(2, len(ranks), len(ranks), dtype=torch.float64)
    for j, (a, b) in enumerate(_spans(ranks)):
        up = wide(ups[:, a:b])
        gram = up.T @ up
        kept = gram if frame is None else (up.T @ wide(frame)) @ (wide(frame).T @ up)
        for k, product in enumerate(map(wide, products)):
            found[0, j, k] = (kept * (mixed[a:b] @ product[:, a:b])).sum()
            found[1, j, k] = (gram * product[a:b, a:b]).sum()
    return found


def truncate_seen(x: Factors, gram: Tensor, rank: int) -> Factors:
    """The change of a lower rank that does nearly the same on the activations, where `truncate` looks at the weight alone.

    Formula: P P' x, the columns of P the leading left singular vectors of up G^(1/2): |(x - P P' x) [X_1 ... X_N]| is the least
        that a change of this rank can have (Eckart and Young 1936).

    Args:
        x: up (out, R), down D (R, in).
        gram: G, (R, R).
        rank: Of the result.

    Returns:
        P as up, (out, rank), and P' up D as down, in float64.
    """
    values, vectors = torch.linalg.eigh(wide(gram))
    up = wide(x.up)
    kept = torch.linalg.svd(up @ (vectors * values.clamp(min=0).sqrt()), full_matrices=False)[0][:, :rank]
    return Factors(kept, (kept.T @ up) @ wide(x.down))


def _spans(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """First and last + 1 component of each LoRA."""
    return list(pairwise(accumulate(ranks, initial=0)))
