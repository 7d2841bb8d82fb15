"""How strong several deltas are in another one, from inner products alone.

gram        (N, N), gram[i, j] = <delta_i, delta_j>, of one module or summed over many
products    (N,), <delta_i, delta>
"""

from __future__ import annotations

import torch
from torch import Tensor

ALIKE = 1e-3  # smallest eigenvalue of the cosines below which two strengths can't be told apart: cos 0.999 for two LoRAs


def cosines(gram: Tensor) -> Tensor:
    """(N, N) from the Gram matrix; 0 beside a zero delta."""
    norms = gram.diagonal().clamp(min=0).sqrt()
    lengths = torch.outer(norms, norms)
    return torch.where(lengths > 0, gram / lengths, 0.0).clamp(-1, 1)


def least_squares(gram: Tensor, products: Tensor) -> tuple[float | None, ...]:
    """The strengths x that bring sum_i x_i delta_i nearest to a delta.

    Args:
        gram: (N, N).
        products: (N,).

    Returns:
        N numbers; None for a delta that is zero. Of deltas that can't be told apart, the smallest numbers that do.
    """
    norms = gram.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    solved = inverse * (torch.linalg.pinv(cosines(gram), hermitian=True, rtol=1e-9) @ (inverse * products))
    return tuple(x if n else None for x, n in zip(solved.tolist(), norms.tolist(), strict=True))


def groups(gram: Tensor) -> list[list[int]]:
    """Which deltas can't be told apart: groups that have a combination as good as zero.

    Args:
        gram: (N, N).
    """
    alive = [i for i, n in enumerate(gram.diagonal().tolist()) if n > 0]
    if len(alive) < 2:
        return []
    values, vectors = torch.linalg.eigh(cosines(gram)[alive][:, alive])
    null = vectors[:, values < ALIKE]
    found: list[set[int]] = []
    for i, j in ((null @ null.T).abs() > 0.5 / len(alive)).nonzero().tolist():  # N equal ones have 1 / N there
        touching = [g for g in found if i in g or j in g]
        found = [g for g in found if g not in touching] + [set().union({i, j}, *touching)]
    return sorted(sorted(alive[i] for i in g) for g in found if len(g) > 1)
