"""A few thin changes of one weight, by the inner products of their components.

Two Gram matrices, of all columns of `up` and of all rows of `down`, hold what can be asked of any combination of the changes:

    <delta_i, delta_j> = the sum of ups * downs over the components of i and those of j
    |up_k| |down_k|    = the root of ups_kk downs_kk
    D D' (F c)         = F (downs ups c) for D = F G, with the weights of the combination in F and `ups`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .factors import Factors, gramian, stack

_TAME = 1e-20  # sums of squares between this and its inverse, and products of their roots, are well within float32
_BLOCK, _ROUNDS = 16, 3  # of the power iteration: vectors, and how often they are multiplied
_ROUNDING = 4  # units in the last place of a Gram matrix that tell nothing


class Components(NamedTuple):
    """N changes with R components in all.

    Attributes:
        ups: (R, R) in float64.
        downs: (R, R) in float64.
        inner: (N, N) inner products of the changes, in float64 on the CPU.
        owners: (R,) number of the change of each component.
        sums: The dtype in which the long sides were summed.
    """

    ups: Tensor
    downs: Tensor
    inner: Tensor
    owners: Tensor
    sums: torch.dtype

    @classmethod
    def of(cls, deltas: Sequence[Factors], sums: torch.dtype) -> Components:
        """Multiplies all changes at once; on the CPU where their device has no float64 (MPS).

        Args:
            deltas: One or more of one shape.
            sums: float32 takes half the time and tells a difference of two changes from about 1e-3 of their size on, float64
                from 1e-8.
        """
        whole = stack(deltas).map(lambda t: (t.cpu() if t.device.type == "mps" else t).to(sums))
        return cls.of_stack(whole, [d.rank for d in deltas])

    @classmethod
    def of_stack(cls, whole: Factors, ranks: Sequence[int]) -> Components:
        """The same of changes that lie side by side already.

        Args:
            whole: (out, in), in float32 or float64.
            ranks: How many components each change has.
        """
        owners = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks))
        ups, downs = _squares(whole.up), _squares(whole.down.T)
        products = (ups * downs).cpu()
        rows = products.new_zeros(len(ranks), len(products)).index_add_(0, owners, products)
        inner = products.new_zeros(len(ranks), len(ranks)).index_add_(1, owners, rows)
        return cls(ups, downs, inner, owners, whole.up.dtype)

    @property
    def sizes(self) -> Tensor:
        """(R,) |up_k| |down_k| in float64 on the CPU."""
        return (self.ups.diagonal() * self.downs.diagonal()).sqrt().cpu()

    @property
    def remains(self) -> float:
        """The energies of the changes over those of their components: 1 where these are orthogonal, small where they cancel;
        NaN where there are none, and of any sign where rounding is all that is left.
        """
        return float(self.inner.diagonal().sum() / self.sizes.square().sum())

    def largest(self, weights: Tensor) -> float:
        """The largest singular value of a combination, from below but for rounding: by block power iteration from its image of
        random inputs.

        A direction counts for less where rounding could have made it. Where the components of one change nearly cancel, the
        value may be rounding alone, and far too large.

        Args:
            weights: (N,), of the changes.
        """
        weight = weights[self.owners].to(self.ups)
        ups, eps = self.ups * torch.outer(weight, weight), torch.finfo(self.sums).eps
        if not float(ups.diagonal().max()) > 0:
            return 0.0
        size = self.downs.diagonal().sqrt()
        size = torch.where(size > 0, size, 1.0)
        noise = len(ups) * eps * torch.eye(len(ups)).to(ups)
        root, failed = torch.linalg.cholesky_ex(self.downs / torch.outer(size, size) + noise)
        random = torch.randn(len(ups), _BLOCK, generator=torch.Generator().manual_seed(len(ups))).to(ups)
        x = size[:, None] * (random if failed else root @ random)  # G times random inputs
        for _ in range(_ROUNDS):
            x = x / (x.square() * ups.diagonal()[:, None]).sum(0).sqrt().clamp(min=torch.finfo(x.dtype).tiny)
            right = ups @ x
            x, left = self.downs @ right, x
        values, vectors = torch.linalg.eigh(left.T @ right)  # the squared lengths of the left vectors F c
        basis = vectors / (values.clamp(min=0) + _ROUNDING * eps).sqrt()
        return max(float(torch.linalg.eigvalsh(basis.T @ right.T @ x @ basis)[-1]), 0.0) ** 0.5


def _squares(x: Tensor) -> Tensor:
    """x'x in float64, summed in the dtype of x; float32 is scaled meanwhile, so that no size overflows or vanishes."""
    found = gramian(x)
    tame = (found.diagonal() > _TAME) & (found.diagonal() < 1 / _TAME)
    if x.dtype == torch.float64 or bool(tame.all()):
        return found
    sizes = x.abs().amax(0)
    if bool((tame | (sizes == 0)).all()):
        return found
    size = sizes.max()
    if (sizes[sizes > 0] * 2.0**40 < size).any():  # columns so unlike need sizes of their own
        x = x / torch.where(sizes > 0, sizes, 1.0)
        return gramian(x) * torch.outer(sizes.double(), sizes.double())
    x = x / torch.where(size > 0, size, 1.0)
    return gramian(x) * size.double() ** 2
