"""Inner products of changes, and what follows from them: norms, distances, Gram matrices.

Sums over a long side use float64 by default: float32 loses differences below about 1e-3 of the size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .components import Components
from .delta import Delta, Framed, Kron, Sum, as_dense, parts
from .factors import Factors, stack, wide


def inner(x: Delta, y: Delta) -> float:
    """Frobenius inner product of two deltas of one shape.

    For Factors, <x, y> = tr(up_x' up_y . down_y down_x'), r x r products only; for two Krons of the same layout the product of
    the inner products of their factors; anything else with Factors through `@`.

    Args:
        x: (out, in).
        y: (out, in).
    """
    if isinstance(x, Sum) or isinstance(y, Sum):
        return sum(inner(p, q) for p in parts(x) for q in parts(y))
    if isinstance(x, Kron) and isinstance(y, Kron) and x.left.shape == y.left.shape:
        return inner(x.left, y.left) * inner(x.right, y.right)
    if isinstance(x, Framed) and x is y:
        return float(wide(x.core).square().sum())
    x, y = sorted((x, y), key=lambda d: (isinstance(d, Factors), -d.rank))  # y is the one that gets expanded
    x, y = x.map(wide), y.map(wide).expand()
    if not isinstance(x, Factors):
        return float((y.up * (x @ y.down.T)).sum())
    return float(((x.up.T @ y.up) * (x.down @ y.down.T)).sum())


def gram(deltas: Sequence[Delta], dtype: torch.dtype = torch.float64) -> Tensor:
    """All inner products of several deltas of one shape.

    Args:
        deltas: One or more changes. Factors are stacked and multiplied at once, the others pair by pair: full differences, which
            stand beside an identity, as they are, LoKr through their small factors.
        dtype: Of the sums over the long sides of stacked Factors; see `Components.of`.

    Returns:
        (N, N) in float64 on the CPU.
    """
    flat = [as_dense(d) for d in deltas]
    stacked = [n for n, d in enumerate(deltas) if isinstance(d, Factors) and flat[n] is None]
    if sum(deltas[n].rank for n in stacked) > _STACKED:
        stacked = []
    found = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    if stacked:
        at = torch.tensor(stacked)
        found[at[:, None], at] = Components.of([d for n in stacked if isinstance(d := deltas[n], Factors)], dtype).inner
    for i, x in enumerate(deltas):
        for j, y in enumerate(deltas[: i + 1]):
            if i not in stacked or j not in stacked:
                one, other = flat[i], flat[j]
                found[i, j] = found[j, i] = inner(x, y) if one is None or other is None else _product(one, other)
    return found


_STACKED = 8192  # components that are multiplied at once: half a gigabyte in float32
_ROWS = 1 << 20  # numbers that are cast to float64 at a time


def _product(x: Tensor, y: Tensor) -> float:
    """Inner product of two dense changes, in float64."""
    step = max(1, _ROWS // x.shape[1])
    return sum(float((wide(a) * wide(b)).sum()) for a, b in zip(x.split(step), y.split(step), strict=True))


def norm(x: Delta) -> float:
    """Frobenius norm of the delta."""
    return math.sqrt(max(inner(x, x), 0.0))


def energy(x: Delta) -> float:
    """The squared Frobenius norm. Of factors that are stored in 16 bits, it is summed in float32, unless their components cancel:
    half the time; among 108 draws it was 1.3e-5 off at most.

    Args:
        x: (out, in), on the CPU.
    """
    if isinstance(x, Factors) and x.rank < min(x.shape) and x.up.dtype == x.down.dtype in (torch.bfloat16, torch.float16):
        seen = Components.of([x], torch.float32)
        products = seen.ups * seen.downs
        if float(products.sum()) > _CANCEL * float(products.abs().sum()):
            return float(products.sum())
    return float(gram([x]))


_CANCEL = 0.1  # of the sum of the sizes: what is left then is ten times as far off


def distance(x: Delta, y: Delta) -> float:
    """Frobenius norm of the difference of two deltas; its floor is about 1e-8 of their norms (float64 Grams).

    Args:
        x: (out, in).
        y: (out, in).
    """
    terms = (*parts(x.map(wide)), *parts(y.map(wide).times(-1.0)))
    thin = [p for p in terms if isinstance(p, Factors)]
    return norm(stack(thin) if len(thin) == len(terms) else Sum(terms))
