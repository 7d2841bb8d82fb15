"""Random deltas in the forms that files have, and what they are when multiplied out."""

import torch

from extensions_built_in.zit_merge.algebra.delta import Framed, Kron, Sum
from extensions_built_in.zit_merge.algebra.factors import Factors


def draw(out, into, rank, seed=0, dtype=torch.float32, size=1.0):
    random = torch.Generator().manual_seed(seed)
    up, down = torch.randn(out, rank, generator=random) * size, torch.randn(rank, into, generator=random)
    return Factors(up.to(dtype), down.to(dtype))


def kron(p, q, s, t, a, b, seed=0, dtype=torch.float32):
    """A Kron of shape (p s, q t) whose factors have the ranks a and b."""
    return Kron(draw(p, q, a, seed, dtype), draw(s, t, b, seed + 1, dtype))


def dense(x):
    """The delta in float64, by its definition."""
    if isinstance(x, Sum):
        return sum(map(dense, x.parts))
    if isinstance(x, Kron):
        return torch.kron(dense(x.left), dense(x.right))
    if isinstance(x, Framed):
        return x.up.double() @ x.left.double() @ x.core.double() @ x.right.double() @ x.down.double()
    return x.up.double() @ x.down.double()


def wholes(deltas):
    """All of them multiplied out."""
    return [dense(d) for d in deltas]


def sizes(deltas):
    """The sum of their norms."""
    return sum(float(w.norm()) for w in wholes(deltas))
