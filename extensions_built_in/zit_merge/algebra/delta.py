"""A change of one weight in each of the forms that files have, behind one small interface.

    Factors   up @ down                        LoRA, and LoHa and dense differences written as one
    Kron      left kron right                  LoKr: rank a * b from two small matrices, never multiplied out
    Framed    (up left) core (right down)      what a rule makes of several: a small matrix between orthonormal frames
    Sum       delta_1 + delta_2 + ...          what lies side by side: a LoKr and a LoRA, factors not yet stacked

Each has `shape` (out, in), `rank` (an upper bound of its rank), `T`, `@` with a thin matrix, `times(strength)`, `map(function)`
on its tensors, and `expand()`, the same delta as Factors of that rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from .factors import Factors, single, stack, wide


class Kron(NamedTuple):
    """delta = L kron R with L = left.up @ left.down (p, q) and R = right.up @ right.down (s, t); (out, in) = (p s, q t).

    Row i of the delta belongs to row i // s of L and row i % s of R, a column likewise (Van Loan, 2000).

    Attributes:
        left: (p, a), (a, q).
        right: (s, b), (b, t).
    """

    left: Factors
    right: Factors

    @property
    def rank(self) -> int:
        """Of the product: the ranks multiply."""
        return self.left.rank * self.right.rank

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        (p, q), (s, t) = self.left.shape, self.right.shape
        return p * s, q * t

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.left.device

    @property
    def T(self) -> Kron:  # noqa: N802
        """(L kron R)' = L' kron R'."""
        return Kron(self.left.T, self.right.T)

    def __matmul__(self, x: Tensor) -> Tensor:
        """delta @ x: (in, n) -> (out, n) through the small factors: L (R x) with x folded to (q, t, n)."""
        (p, q), (s, t) = self.left.shape, self.right.shape
        inner = self.right @ x.reshape(q, t, -1).transpose(0, 1).reshape(t, -1)  # (s, q n)
        inner = inner.reshape(s, q, -1).transpose(0, 1).reshape(q, -1)  # (q, s n)
        return (self.left @ inner).reshape(p * s, -1)

    def map(self, change: Callable[[Tensor], Tensor]) -> Kron:
        """The same function applied to all tensors."""
        return Kron(self.left.map(change), self.right.map(change))

    def times(self, strength: float) -> Kron:
        """strength * delta: strength goes into `left`, the smaller factor."""
        return self if strength == 1 else Kron(self.left.times(strength), self.right)

    def expand(self) -> Factors:
        """Exactly, without an SVD: (A B) kron (C D) = (A kron C) (B kron D)."""
        # torch.kron fails on transposed views with a side of 1; copies it takes
        left, right = self.map(lambda t: single(t).clone(memory_format=torch.contiguous_format))
        return Factors(torch.kron(left.up, right.up), torch.kron(left.down, right.down))

    def rows(self, first: int, last: int) -> Kron | Factors:
        """Rows first .. last - 1 of the delta: a Kron again where whole rows of L are taken, else Factors.

        Args:
            first: The first row.
            last: The row after the last one.
        """
        s = self.right.shape[0]
        if first % s == 0 and last % s == 0:
            return Kron(Factors(self.left.up[first // s : last // s], self.left.down), self.right)
        full = self.expand()
        return Factors(full.up[first:last], full.down)


class Framed(NamedTuple):
    """delta = frame_1 @ core @ frame_2 with frame_1 = up @ left (out, p) and frame_2 = right @ down (q, in).

    The columns of frame_1 and the rows of frame_2 are orthonormal (see `core` for how closely), so that norms and singular values
    are those of the core. They stay combinations of the long factors: few of them are ever multiplied out.

    Attributes:
        up: (out, R).
        left: (R, p).
        core: (p, q).
        right: (q, S).
        down: (S, in).
    """

    up: Tensor
    left: Tensor
    core: Tensor
    right: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        """At most that of the core."""
        return min(self.core.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.core.device

    @property
    def T(self) -> Framed:  # noqa: N802
        """The transposed delta."""
        return Framed(self.down.T, self.right.T, self.core.T, self.left.T, self.up.T)

    def __matmul__(self, x: Tensor) -> Tensor:
        """delta @ x: (in, n) -> (out, n)."""
        return self.up @ (self.left @ (self.core @ (self.right @ (self.down @ x))))

    def map(self, change: Callable[[Tensor], Tensor]) -> Framed:
        """The same function applied to all tensors."""
        return Framed(*map(change, self))

    def times(self, strength: float) -> Framed:
        """strength * delta."""
        return self if strength == 1 else self._replace(core=self.core * strength)

    def expand(self) -> Factors:
        """Factors of rank min(p, q), in float64 where the tensors are not of one dtype."""
        up, left, core, right, down = self.map(wide) if len({t.dtype for t in self}) > 1 else self
        p, q = core.shape
        return Factors(up @ left, core @ right @ down) if p <= q else Factors(up @ (left @ core), right @ down)


class Sum(NamedTuple):
    """delta = sum of the parts' deltas.

    Attributes:
        parts: Two or more changes of the same weight.
    """

    parts: tuple[Single, ...]

    @property
    def rank(self) -> int:
        """Ranks add up."""
        return sum(p.rank for p in self.parts)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.parts[0].shape

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.parts[0].device

    @property
    def T(self) -> Sum:  # noqa: N802
        """The transposed delta."""
        return Sum(tuple(p.T for p in self.parts))

    def __matmul__(self, x: Tensor) -> Tensor:
        """delta @ x: (in, n) -> (out, n)."""
        first, *rest = (p @ x for p in self.parts)
        return sum(rest, first)

    def map(self, change: Callable[[Tensor], Tensor]) -> Sum:
        """The same function applied to all tensors."""
        return Sum(tuple(p.map(change) for p in self.parts))

    def times(self, strength: float) -> Sum:
        """strength * delta."""
        return Sum(tuple(p.times(strength) for p in self.parts))

    def expand(self) -> Factors:
        """The parts' components side by side."""
        return stack([p.expand() for p in self.parts])


Single = Factors | Kron | Framed
Delta = Single | Sum


def applied(delta: Delta, x: Tensor) -> Tensor:
    """What a change adds to the output of its linear layer.

    Args:
        delta: (out, in), in the dtype and on the device of x.
        x: (..., in).

    Returns:
        (..., out).
    """
    if isinstance(delta, Factors):
        return linear(linear(x, delta.down), delta.up)
    return (delta @ x.reshape(-1, x.shape[-1]).T).T.reshape(*x.shape[:-1], -1)


def as_dense(x: Delta) -> Tensor | None:
    """The dense delta of a full difference, which stands beside an identity."""
    if not isinstance(x, Factors) or x.rank != min(x.shape):
        return None
    delta, other = (x.up, x.down) if x.down.shape[0] == x.down.shape[1] else (x.down, x.up)
    return delta if torch.equal(other, torch.eye(x.rank, dtype=other.dtype, device=other.device)) else None


def parts(x: Delta) -> tuple[Single, ...]:
    """What a change is the sum of: itself, but for a Sum."""
    return x.parts if isinstance(x, Sum) else (x,)


def nbytes(x: Delta) -> int:
    """Bytes of all its tensors."""
    sizes: list[int] = []

    def weigh(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    x.map(weigh)
    return sum(sizes)
