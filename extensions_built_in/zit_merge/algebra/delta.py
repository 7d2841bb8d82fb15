"""A change of one weight in each of the forms that files have, behind one small interface.

    Factors   up @ down                        LoRA, and LoHa and dense differences written as one
    Kron      left kron right                  LoKr: rank a * b from two small matrices, never multiplied out
    Framed    (up left) core (right down)      what a rule makes of several: a small matrix between orthonormal frames
    Sum       delta_1 + delta_2 + ...          what lies side by side: a LoKr and a LoRA, factors not yet stacked

Each has `shape` (out, in), `rank` (an upper bound of its rank), `T`, `@` with a thin matrix, `times(strength)`, `map(function)`
on its tensors, and `expand()`, the same delta as Factors of that rank. Sums over a long side (Gram matrices) are taken in
float64 here: their error is squared away when a norm is drawn from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from .factors import Factors, gramian, single, stack, wide


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
        dtype: Of the sums over the long sides of stacked Factors; float32 takes half the time and tells a difference of two
            deltas from about 1e-3 of their size on, float64 from 1e-8.

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
        found[at[:, None], at] = _stacked_gram([d for n in stacked if isinstance(d := deltas[n], Factors)], dtype)
    for i, x in enumerate(deltas):
        for j, y in enumerate(deltas[: i + 1]):
            if i not in stacked or j not in stacked:
                one, other = flat[i], flat[j]
                found[i, j] = found[j, i] = inner(x, y) if one is None or other is None else _product(one, other)
    return found


_STACKED = 8192  # components that are multiplied at once: half a gigabyte in float32


def _stacked_gram(deltas: Sequence[Factors], dtype: torch.dtype) -> Tensor:
    whole = stack([d.map(lambda t: (t.cpu() if t.device.type == "mps" else t).to(dtype)) for d in deltas])
    components = (_squares(whole.up) * _squares(whole.down.T)).cpu()
    owners = torch.arange(len(deltas)).repeat_interleave(torch.tensor([d.rank for d in deltas]))
    rows = components.new_zeros(len(deltas), len(owners)).index_add_(0, owners, components)
    return components.new_zeros(len(deltas), len(deltas)).index_add_(1, owners, rows)


_ROWS = 1 << 20  # numbers that are cast to float64 at a time


def _product(x: Tensor, y: Tensor) -> float:
    """Inner product of two dense changes, in float64."""
    step = max(1, _ROWS // x.shape[1])
    return sum(float((wide(a) * wide(b)).sum()) for a, b in zip(x.split(step), y.split(step), strict=True))


def as_dense(x: Delta) -> Tensor | None:
    """The dense delta of a full difference, which stands beside an identity."""
    if not isinstance(x, Factors) or x.rank != min(x.shape):
        return None
    delta, other = (x.up, x.down) if x.down.shape[0] == x.down.shape[1] else (x.down, x.up)
    return delta if torch.equal(other, torch.eye(x.rank, dtype=other.dtype, device=other.device)) else None


_TAME = 1e-20  # sums of squares between this and its inverse, and products of their roots, are well within float32


def _squares(x: Tensor) -> Tensor:
    """x'x in float64, summed in the dtype of x; float32 is scaled meanwhile, so that no size overflows or vanishes."""
    found = gramian(x)
    if x.dtype == torch.float64 or bool(((found.diagonal() > _TAME) & (found.diagonal() < 1 / _TAME)).all()):
        return found
    sizes = x.abs().amax(0)
    size = sizes.max()
    if (sizes[sizes > 0] * 2.0**40 < size).any():  # columns so unlike need sizes of their own
        x = x / torch.where(sizes > 0, sizes, 1.0)
        return gramian(x) * torch.outer(sizes.double(), sizes.double())
    x = x / torch.where(size > 0, size, 1.0)
    return gramian(x) * size.double() ** 2


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
        components = _squares(x.up.float()) * _squares(x.down.float().T)
        if float(components.sum()) > _CANCEL * float(components.abs().sum()):
            return float(components.sum())
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


def parts(x: Delta) -> tuple[Single, ...]:
    """What a change is the sum of: itself, but for a Sum."""
    return x.parts if isinstance(x, Sum) else (x,)
