"""The core space of several changes of one weight: N small matrices in place of N large ones, nothing lost.

With orthonormal columns L that span the columns of all deltas and orthonormal rows R that span their rows,

    delta_i = L core_i R        (out, in) = (out, p) @ (p, q) @ (q, in),  p and q at most sum r_i

so every inner product, norm and singular value of the deltas is one of the cores. Rules that look at single entries (trim, drop,
elect a sign) depend on the axes in which the entries are taken. Here these are the principal axes of the deltas together, each
taken at norm 1: the left singular vectors of [delta_1 / |delta_1| ... delta_N / |delta_N|] and the right ones of those below each
other, the largest first. They follow from the deltas alone, not from their strengths, from the gauge of their factors or from the
order of the LoRAs, and are unique up to sign unless singular values are equal. No rule here minds a sign.

Why not entry by entry in the model's own axes: there a trimmed or masked low-rank delta is no longer of low rank, and the
truncation that follows throws most of the rest away (see docs/methods.md for the measured share).

Everything follows from the Gram matrices of all components, (R, R): through their Cholesky factors, or their eigenvectors where
components depend on each other. Beyond 128 components those of different deltas are multiplied in float32, if a bound on the
condition allows it; each delta by itself always is in float64. Rules and questions that look at directions need no axes, which
they turn with: `condensed` has none.

Core space merging: Panariello et al. 2025, arXiv 2509.17786, whose reference axes come from the stacked factors instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .delta import Delta, Framed
from .factors import Factors, gramian, roots, single, wide

_FEW = 128  # components up to which all sums are in float64
_ROWS = 4096  # of all changes together that are cast at once
_SURE = {torch.float32: 1e-3, torch.float64: 1e-9}  # eps times the condition of the components: what an angle may be off by
FAINT = 1e-6  # of the largest singular value: what is fainter is the rounding of float32 factors, nothing that was trained


class Core(NamedTuple):
    """delta_i = left @ cores[i] @ right, in float64.

    Attributes:
        frames: Long factors and their combinations, as in `Framed`: left = up @ turn (out, p), right = turn @ down (q, in).
        parts: The N cores as Factors (p, r_i), (r_i, q).
    """

    frames: tuple[Factors, Factors]
    parts: Sequence[Factors]

    @property
    def left(self) -> Tensor:
        """(out, p), orthonormal columns."""
        return wide(self.frames[0].up) @ self.frames[0].down

    @property
    def right(self) -> Tensor:
        """(q, in), orthonormal rows."""
        return self.frames[1].up @ wide(self.frames[1].down)

    @property
    def cores(self) -> Tensor:
        """(N, p, q)."""
        return torch.stack([p.up @ p.down for p in self.parts])

    def back(self, core: Tensor) -> Framed:
        """The delta of one core (p, q)."""
        (up, left), (right, down) = self.frames
        return Framed(up, left, core, right, down)


def core_space(deltas: Sequence[Delta], in_axes: bool = True) -> Core:
    """The common core space.

    Args:
        deltas: Changes of one weight, (out, in) each. Factors stay thin; a LoKr or a difference of full rank makes the cores as
            large as the weight.
        in_axes: In its principal axes; else in any, which is enough for what looks at no entry and takes less time.
    """
    parts = [d.expand() for d in deltas]
    ranks = [p.rank for p in parts]
    left, right = _side([p.up for p in parts], ranks), _side([p.down.T for p in parts], ranks)
    # components of one size on either side, and deltas of norm 1, so that nothing drowns
    sizes = [side.gram.diagonal().clamp(min=0).sqrt() for side in (left, right)]
    level = torch.where(sizes[0] * sizes[1] > 0, (sizes[1] / sizes[0]).sqrt(), 0.0)
    energies = [float((left.gram[a:b, a:b] * right.gram[a:b, a:b]).sum()) for a, b in _spans(ranks)]
    norms = torch.tensor(energies, dtype=torch.float64).clamp(min=0).sqrt()
    lengths = norms.repeat_interleave(torch.tensor(ranks)).to(level.device)
    unit = torch.where(lengths > 0, lengths.rsqrt(), 0.0)
    ups, downs = left.roots * (level * unit), right.roots * (torch.where(level > 0, 1 / level, 0.0) * unit)
    unroots = left.unroot, right.unroot
    if in_axes:
        turns = _principal(ups, downs, ranks), _principal(downs, ups, ranks)
        unroots = unroots[0] @ turns[0], unroots[1] @ turns[1]
        ups, downs = turns[0].T @ ups, turns[1].T @ downs
    pairs = zip(ups.split(ranks, 1), downs.split(ranks, 1), norms.tolist(), strict=True)
    frames = Factors(single(left.long), unroots[0]), Factors(unroots[1].T, single(right.long).T)
    return Core(frames, [Factors(x * n, y.T) for x, y, n in pairs])


@dataclass(frozen=True)
class Condensed:
    """Changes of one weight as small ones.

    Attributes:
        ranks: r_i of each change.
        inner: (N, N) inner products, on the CPU.
    """

    ranks: Sequence[int]
    inner: Tensor
    _ups: _Side
    _downs: _Side

    @cached_property
    def deltas(self) -> list[Factors]:
        """(p, r_i), (r_i, q) with p and q at most sum r_i, in float64: norms, angles and singular values are those of the long
        ones.
        """
        pairs = zip(self._ups.roots.split(self.ranks, 1), self._downs.roots.split(self.ranks, 1), strict=True)
        return [Factors(x, y.T) for x, y in pairs]

    def is_full(self, i: int) -> bool:
        """Whether a change surely has as many singular values as components, so that no direction is spared in it.

        Args:
            i: Its position.
        """
        [(a, b)] = [span for n, span in enumerate(_spans(self.ranks)) if n == i]
        ups, downs = (side.gram[a:b, a:b] for side in (self._ups, self._downs))
        least = (ups.diagonal() * downs.diagonal()).min()
        for gram in (ups, downs):
            found = _inverse(gram, gram.diagonal().clamp(min=0).sqrt())
            least = least / found[1].square().sum() if found else torch.zeros(())
        return float(least) > FAINT**2 * float(self.inner[i, i])


def condensed(deltas: Sequence[Factors], exactly: bool = False) -> Condensed | None:
    """Changes of one weight in a space as small as they are, without its principal axes.

    One change by itself is exact to float64; several are to each other to float32, where they have over 128 components.

    Args:
        deltas: One or more.
        exactly: Several are to each other exact to float64 too; their small factors are taken only where they are asked for.

    Returns:
        None where an inner product is no finite number.
    """
    ranks = [d.rank for d in deltas]
    ups, downs = _side([d.up for d in deltas], ranks, exactly), _side([d.down.T for d in deltas], ranks, exactly)
    components = ups.gram * downs.gram
    if not torch.isfinite(components).all():
        return None
    inner = [[float(components[a:b, c:d].sum()) for c, d in _spans(ranks)] for a, b in _spans(ranks)]
    return Condensed(ranks, torch.tensor(inner, dtype=torch.float64), ups, downs)


@dataclass(frozen=True)
class _Side:
    """The columns of several deltas beside each other, (n, R) = (long @ unroot) @ roots, where long @ unroot is orthonormal.

    Attributes:
        long: (n, R), as stored.
        gram: (R, R) inner products of the columns, in float64.
        known: `unroot` and `roots`, where they are known already.
    """

    long: Tensor
    gram: Tensor
    known: tuple[Tensor, Tensor] | None = None

    @property
    def unroot(self) -> Tensor:
        """(R, p) in float64."""
        return self._rooted[0]

    @property
    def roots(self) -> Tensor:
        """(p, R) in float64."""
        return self._rooted[1]

    @cached_property
    def _rooted(self) -> tuple[Tensor, Tensor]:
        if known := self.known or _rooted(self.gram, torch.float64):
            return known
        sizes = self.gram.diagonal().clamp(min=0).sqrt()
        unit, inverse = _unit(self.gram, sizes)
        if not torch.isfinite(unit).all():
            return unit, unit
        unroot, root = roots(unit)
        return inverse[:, None] * unroot, root * sizes


def _side(sides: Sequence[Tensor], ranks: Sequence[int], exactly: bool = False) -> _Side:
    """From N of (n, r_i). Where the columns are as many as the rows, the basis is the identity."""
    is_tall = sides[0].is_contiguous()  # transposed ones lie below each other in memory
    long = torch.cat(list(sides), 1) if is_tall else torch.cat([x.T for x in sides]).T
    if long.shape[1] >= long.shape[0]:
        long, eye = wide(long), torch.eye(long.shape[0], dtype=torch.float64, device=long.device)
        return _Side(eye, gramian(long), (eye, long))
    if long.shape[1] > _FEW and not exactly:
        gram = gramian(map(torch.Tensor.float, long.split(_ROWS)), [b for a, b in _spans(ranks) for _ in range(a, b)])
        for (a, b), x in zip(_spans(ranks), sides, strict=True):
            gram[a:b, a:b] = gramian(map(wide, x.split(_ROWS)))
        if known := _rooted(gram, torch.float32):
            return _Side(long, gram, known)
    return _Side(long, gramian(map(wide, long.split(_ROWS))))


def _rooted(gram: Tensor, sums: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """`unroot` and `roots` of a Gram matrix that was summed in a dtype; None where components depend on each other too much."""
    sizes = gram.diagonal().clamp(min=0).sqrt()
    if not (found := _inverse(gram, sizes)) or not float(found[1].square().sum()) * torch.finfo(sums).eps < _SURE[sums]:
        return None
    root, solved = found
    return _unit(gram, sizes)[1][:, None] * solved.T, root.T * sizes


def _inverse(gram: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor] | None:
    """The Cholesky factor of a Gram matrix of components at length 1, and its inverse; None where it has none.

    The inverse of the smallest singular value of those components is at most the norm of the latter.
    """
    root, failed = torch.linalg.cholesky_ex(_unit(gram, sizes)[0])
    return None if failed else (root, torch.linalg.solve_triangular(root, torch.eye(len(root)).to(root), upper=False))


def _unit(gram: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The Gram matrix of components at length 1, and the inverse of their lengths; 0 for one without."""
    inverse = torch.where(sizes > 0, 1 / sizes, 0.0)
    return gram * torch.outer(inverse, inverse), inverse


def _spans(ranks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last + 1 component of each delta."""
    return pairwise(accumulate(ranks, initial=0))


def _principal(x: Tensor, y: Tensor, ranks: Sequence[int]) -> Tensor:
    """The left singular vectors of [x_1 y_1' ... x_N y_N'], without those of rounding: (p, R), (q, R) -> (p, p')."""
    pieces = [a @ (b.T @ b) for a, b in zip(x.split(ranks, 1), y.split(ranks, 1), strict=True)]
    values, vectors = torch.linalg.eigh(torch.cat(pieces, 1) @ x.T)
    values, vectors = values.flip(0), vectors.flip(1)
    return vectors[:, : max(1, int((values > FAINT**2 * values[0]).sum()))]  # a share of entries must not depend on padding
