"""The core space of several changes of one weight: N small matrices in place of N large ones, nothing lost.

With orthonormal columns L that span the columns of all deltas and orthonormal rows R that span their rows,

    delta_i = L core_i R        (out, in) = (out, p) @ (p, q) @ (q, in),  p and q at most sum r_i

so every inner product, norm and singular value of the deltas is one of the cores. Rules that look at single entries (trim, drop,
elect a sign) depend on the axes in which the entries are taken. Here these are the principal axes of the deltas together, each
taken at norm 1: the left singular vectors of [delta_1 / |delta_1| ... delta_N / |delta_N|] and the right ones of those below each
other, the largest first. They follow from the deltas alone, not from their strengths, from the gauge of their factors or from the
order of the LoRAs, and are unique up to sign unless singular values are equal. No rule here minds a sign.

Why not entry by entry in the model's own axes: there a trimmed or masked low-rank delta is no longer of low rank, and the
truncation that follows throws most of the rest away (see the README for the measured share).

`condensed` gives such a space without its axes, for questions that need none.

Core space merging: Panariello et al. 2025, arXiv 2509.17786, whose reference axes come from the stacked factors instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .delta import Delta, Framed
from .factors import Factors, gramian, roots, stack, wide

_FEW = 128  # components up to which all sums are in float64
_SURE = 1e-3  # eps times the condition of the components: what an angle may be off by
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
        return self.frames[0].up @ self.frames[0].down

    @property
    def right(self) -> Tensor:
        """(q, in), orthonormal rows."""
        return self.frames[1].up @ self.frames[1].down

    @property
    def cores(self) -> Tensor:
        """(N, p, q)."""
        return torch.stack([p.up @ p.down for p in self.parts])

    def back(self, core: Tensor) -> Framed:
        """The delta of one core (p, q)."""
        (up, left), (right, down) = self.frames
        return Framed(up, left, core, right, down)


def core_space(deltas: Sequence[Delta]) -> Core:
    """The common core space in its principal axes.

    Args:
        deltas: Changes of one weight, (out, in) each. Factors stay thin; a LoKr or a difference of full rank makes the cores as
            large as the weight.
    """
    parts = [d.map(wide).expand() for d in deltas]
    ranks = [p.rank for p in parts]
    up, down = stack(parts)
    ups, downs = gramian(up), gramian(down.T)
    # components of one size on either side, and deltas of norm 1: nothing drowns in the Gram matrices
    sizes = [torch.where(g.diagonal() > 0, g.diagonal(), 0.0).sqrt() for g in (ups, downs)]
    level = torch.where(sizes[0] * sizes[1] > 0, (sizes[1] / sizes[0]).sqrt(), 0.0)
    energies = [float((ups[a:b, a:b] * downs[a:b, a:b]).sum()) for a, b in _spans(ranks)]
    norms = torch.tensor(energies, dtype=torch.float64).clamp(min=0).sqrt()
    lengths = norms.repeat_interleave(torch.tensor(ranks)).to(up.device)
    unit = torch.where(lengths > 0, lengths.rsqrt(), 0.0)
    left = _side(up, ups, level * unit)
    right = _side(down.T, downs, torch.where(level > 0, 1 / level, 0.0) * unit)
    turn_left, turn_right = _principal(left.roots, right.roots, ranks), _principal(right.roots, left.roots, ranks)
    pairs = zip((turn_left.T @ left.roots).split(ranks, 1), (turn_right.T @ right.roots).split(ranks, 1), strict=True)
    cores = [Factors(x * n, y.T) for (x, y), n in zip(pairs, norms.tolist(), strict=True)]
    return Core((Factors(left.long, left.unroot @ turn_left), Factors((right.unroot @ turn_right).T, right.long.T)), cores)


def condensed(deltas: Sequence[Factors]) -> list[Factors] | None:
    """The same changes as small ones, (p, r_i), (r_i, q) with p and q at most sum r_i: norms, angles and singular values stay.

    Those of one change by itself to float64; of several together to float32, where they have over 128 components.

    Args:
        deltas: Changes of one weight.

    Returns:
        None where an inner product is no finite number.
    """
    ranks = [d.rank for d in deltas]
    ups, downs = (_coordinates(sides, ranks) for sides in ([d.up for d in deltas], [d.down.T for d in deltas]))
    if ups is None or downs is None:
        return None
    pairs = zip(ups.split(ranks, 1), downs.split(ranks, 1), strict=True)
    return [Factors(up, down.T) for up, down in pairs]


def _coordinates(sides: Sequence[Tensor], ranks: Sequence[int]) -> Tensor | None:
    """All columns in an orthonormal basis of what they span: N of (n, r_i) -> (p, R) in float64."""
    if sum(ranks) >= len(sides[0]):
        return torch.cat([wide(x) for x in sides], 1)
    for sums in (torch.float32, torch.float64) if sum(ranks) > _FEW else (torch.float64,):
        gram = gramian(torch.cat([x.to(sums) for x in sides], 1))
        for (a, b), x in zip(_spans(ranks), sides, strict=True):
            gram[a:b, a:b] = gramian(wide(x)) if sums == torch.float32 else gram[a:b, a:b]
        sizes = gram.diagonal().clamp(min=0).sqrt()
        if bool((sizes > 0).all()):
            root, failed = torch.linalg.cholesky_ex(gram / torch.outer(sizes, sizes))
            if not failed:
                inverse = torch.linalg.solve_triangular(root, torch.eye(len(root)).to(root), upper=False)
                if float(inverse.square().sum()) * torch.finfo(sums).eps < _SURE:
                    return root.T * sizes
    return roots(gram)[1] if torch.isfinite(gram).all() else None


class _Side(NamedTuple):
    """One side of all components, leveled: (long @ unroot) @ roots (n, R), where long @ unroot (n, p) is orthonormal."""

    long: Tensor
    unroot: Tensor
    roots: Tensor


def _side(x: Tensor, gram: Tensor, scale: Tensor) -> _Side:
    """Where the columns are as many as the rows, the basis is the identity."""
    if x.shape[1] >= x.shape[0]:
        eye = torch.eye(x.shape[0], dtype=x.dtype, device=x.device)
        return _Side(eye, eye, x * scale)
    unroot, found = roots(gram * torch.outer(scale, scale))
    return _Side(x, scale[:, None] * unroot, found)


def _spans(ranks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last + 1 component of each delta."""
    return pairwise(accumulate(ranks, initial=0))


def _principal(x: Tensor, y: Tensor, ranks: Sequence[int]) -> Tensor:
    """The left singular vectors of [x_1 y_1' ... x_N y_N'], without those of rounding: (p, R), (q, R) -> (p, p')."""
    pieces = (a @ (b.T @ b) @ a.T for a, b in zip(x.split(ranks, 1), y.split(ranks, 1), strict=True))
    values, vectors = torch.linalg.eigh(sum(pieces))
    values, vectors = values.flip(0), vectors.flip(1)
    return vectors[:, : max(1, int((values > FAINT**2 * values[0]).sum()))]  # a share of entries must not depend on padding
