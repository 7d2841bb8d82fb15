"""A low-rank change of one weight, kept as its two factors.

Notation, here and in the whole folder:

    delta = up @ down        (out, in) = (out, r) @ (r, in)

`up` is what the field also calls lora_B or lora_up, `down` is lora_A or lora_down, `r` the rank. Column k of `up` with row k of
`down` is one *component*: a rank-1 change. The factors have a gauge: (up @ Q, inv(Q) @ down) is the same delta for every
invertible Q. No function here may let a delta depend on it, which rules out adding `up` to `up` and `down` to `down`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """delta = up @ down.

    Attributes:
        up: (out, r).
        down: (r, in).
    """

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        """Number of components, zero ones included."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self.up.device

    @property
    def T(self) -> Factors:  # noqa: N802 - as torch calls it
        """The transposed delta."""
        return Factors(self.down.T, self.up.T)

    def __matmul__(self, x: Tensor) -> Tensor:
        """delta @ x: (in, n) -> (out, n)."""
        return self.up @ (self.down @ x)

    def map(self, change: Callable[[Tensor], Tensor]) -> Factors:
        """The same function applied to both factors: a dtype, a device."""
        return Factors(change(self.up), change(self.down))

    def times(self, strength: float) -> Factors:
        """strength * delta. Sign and strength go into `up`; a strength of 1 leaves the factors as they are, bit for bit.

        Where `up` can't hold them, powers of two of the strength go into `down`.
        """
        if strength == 1:
            return self
        scaled = Factors(single(self.up) * strength, self.down)
        if strength == 0 or scaled.up.numel() == 0 or LOW < peak(scaled.up) < 1 / LOW:
            return scaled
        mantissa, exponent = math.frexp(strength)
        level = leveled(self.map(single), exponent)
        return Factors(level.up * mantissa, level.down)

    def expand(self) -> Factors:
        """Itself: other forms of a change become factors here."""
        return self


def wide(x: Tensor) -> Tensor:
    """`x` in float64, on the CPU where its device has none (MPS)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def single(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if it is that."""
    return x if x.dtype == torch.float64 else x.float()


def is_finite(x: Tensor) -> bool:
    """Whether no element is NaN or infinite. One sum tells in nearly every case; elements are looked at only if it overflows."""
    return math.isfinite(float(x.sum())) or bool(torch.isfinite(x).all())


def peak(x: Tensor) -> float:
    """The largest absolute value; NaN if one is. Many times as fast as torch's infinity norm."""
    low, high = x.aminmax()
    return float(torch.maximum(-low, high))


def lengths(x: Tensor) -> Tensor:
    """(n, R) -> (R,) lengths of the columns in float64, in a third of the time of torch's norm where rows are contiguous."""
    if not x.is_contiguous():
        return wide(torch.linalg.vector_norm(x, dim=0, dtype=torch.promote_types(x.dtype, torch.float32)))
    return torch.stack([wide(rows).square().sum(0) for rows in x.split(_ROWS)]).sum(0).sqrt()


_ROWS = 1024  # that are cast to float64 at once
LOW = 2.0**-100  # an element that float32 rounds to nothing, or coarsely, is small beside one of this size


def leveled(x: Factors, exponent: int = 0, which: Tensor | None = None) -> Factors:
    """2^exponent * delta with components of about one size in `up` and in `down`, by powers of two, which are exact.

    Half of a component may be zero: the other half is zero then too.

    Args:
        x: (out, in).
        exponent: Of two.
        which: (r,) the components that may be shared out anew; None is all.
    """
    ups, downs = (wide(t).abs().mean(d).cpu() for t, d in ((x.up, 0), (x.down, 1)))
    alive = (ups > 0) & (downs > 0)
    shift = ((downs / ups).log2() + exponent) / 2
    shift = torch.where(alive if which is None else alive & which.cpu(), shift.round(), 0.0).to(x.up)
    alive = alive.to(x.device)
    return Factors(_ldexp(x.up * alive, shift), _ldexp(x.down * alive[:, None], (exponent - shift)[:, None]))


def _ldexp(x: Tensor, exponent: Tensor) -> Tensor:
    """x 2^exponent; in two steps, since float32 has no 2^128."""
    half = (exponent / 2).round()
    return torch.ldexp(torch.ldexp(x, half), exponent - half)


def whole(delta: Tensor) -> Factors:
    """A dense delta (out, in) as factors of rank min(out, in): itself beside an identity."""
    out, into = delta.shape
    eye = torch.eye(min(out, into), dtype=delta.dtype, device=delta.device)
    return Factors(delta, eye) if into <= out else Factors(eye, delta)


def hadamard(x: Factors, y: Factors) -> Factors:
    """The elementwise product of two deltas (LoHa), exactly: every component of one times every component of the other.

    (x.up @ x.down) * (y.up @ y.down) = up @ down, where the rows of `up` are the Kronecker products of the rows of x.up and y.up,
    and the columns of `down` those of the columns (the row-wise and column-wise Khatri-Rao products).

    Args:
        x: (out, in), rank r.
        y: (out, in), rank s.

    Returns:
        up: (out, r_x r_y), down: (r_x r_y, in), float32 or wider.
    """
    x, y = x.map(single), y.map(single)
    up = (x.up[:, :, None] * y.up[:, None, :]).flatten(1)
    down = (x.down[:, None, :] * y.down[None, :, :]).flatten(0, 1)
    return Factors(up, down)


def stack(parts: Sequence[Factors]) -> Factors:
    """The exact sum of the deltas: ranks add up, nothing is rounded.

    Args:
        parts: One or more changes of the same weight.

    Returns:
        up: (out, sum r_i), down: (sum r_i, in), in the widest dtype of the parts.
    """
    if len(parts) == 1:
        return parts[0]
    return Factors(_cat([p.up for p in parts], 1), _cat([p.down for p in parts], 0))


def _cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    dtypes = {t.dtype for t in tensors}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float64 if torch.float64 in dtypes else torch.float32
    return torch.cat([t.to(dtype) for t in tensors], dim)


def pad(x: Factors, rank: int) -> Factors:
    """The same delta with zero components appended until there are `rank`.

    Args:
        x: (out, in).
        rank: At least that of x.
    """
    missing = rank - x.rank
    if missing == 0:
        return x
    return Factors(torch.nn.functional.pad(x.up, (0, missing)), torch.nn.functional.pad(x.down, (0, 0, 0, missing)))


def balance(x: Factors) -> Factors:
    """The same delta with |up[:, k]| = |down[k]| for each component, zero components dropped (one is always kept).

    A lopsided pair, B times 1e6 with A over 1e6, would otherwise drown its neighbours under the relative cut-off of `roots`.
    """
    ups, downs = x.up.norm(dim=0), x.down.norm(dim=1)
    alive = (ups > 0) & (downs > 0)
    if not alive.any():
        return Factors(torch.zeros_like(x.up[:, :1]), torch.zeros_like(x.down[:1]))
    ratio = (downs[alive] / ups[alive]).sqrt()
    return Factors(x.up[:, alive] * ratio, x.down[alive] / ratio[:, None])


_COLUMNS = {torch.float32: 64, torch.float64: 24}  # of a Gram matrix at a time: whole widths of a matrix product's kernel


def gramian(x: Tensor | Iterable[Tensor], others: Sequence[int] = ()) -> Tensor:
    """x'x in float64, summed in the dtype of x: (n, R) -> (R, R). What lies above the diagonal is not computed twice.

    Args:
        x: (n, R), or some rows of it at a time.
        others: (R,) for each column the first one behind it whose product with it is asked for, in ascending order; products with
            those between may be left out, as zeros. By default all are asked for.
    """
    found = torch.empty(0)
    for rows in [x] if isinstance(x, Tensor) else x:
        found = found if len(found) else rows.new_zeros(rows.shape[1], rows.shape[1])
        step = _COLUMNS[rows.dtype]
        for i in range(0, rows.shape[1], step):
            first = others[i] if others else i
            found[first:, i : i + step].addmm_(rows[:, first:].T, rows[:, i : i + step])
    found = found.double().tril()
    return found + found.tril(-1).T


def roots(gram: Tensor) -> tuple[Tensor, Tensor]:
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


def fold(x: Factors) -> Factors:
    """At most min(out, in) components: a longer stack (adaLN has in = 256) is multiplied out into its shorter side."""
    out, into = x.shape
    if x.rank <= min(out, into):
        return x
    eye = torch.eye(min(out, into), dtype=x.up.dtype, device=x.up.device)
    return Factors(x.up @ x.down, eye) if into <= out else Factors(eye, x.up @ x.down)
