"""What a change does to a few random inputs (Freivalds 1977): whether two changes are one, without their inner products.

For a block x of k = 16 Gaussian columns, |d x|^2 / k is on average |d|^2. Its relative standard deviation is at most
sqrt(2 / (k s)) where s = |d|^2 / sigma_1^2 >= 1 is the stable rank of d: 35 % for rank 1, 6 % at s = 32, less when it is summed
over modules. It tells d as smaller by a factor of t at most as often as chi^2 of k degrees of freedom is below k / t^2: 1e-3 for
t = 2, 6e-8 for t = 4, 4e-14 for t = 10. Inner products of long lists of components are taken of `shortened` factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from .components import Components
from .delta import Delta, Framed, as_dense
from .factors import Factors, lengths, stack, wide
from .products import gram, inner
from .sketch import shortened

COUNT = 16  # columns of a block
_BLOCK = 128  # components that are cast at once
_FEW, _THIN = 128, 1024  # components, of all changes and of one: between them inner products are taken of shortened factors


@lru_cache(maxsize=8)
def probes(into: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(into, 16) Gaussian numbers, always the same ones.

    Args:
        into: Columns of the changes.
        dtype: float64 has the numbers of float32.
        device: Where they go.
    """
    return torch.randn(into, COUNT, generator=torch.Generator().manual_seed(into)).to(device, dtype)


def image(x: Delta, block: Tensor) -> Tensor:
    """x @ block in the dtype of the block; of factors some components are cast at a time.

    Args:
        x: (out, in) as stored.
        block: (in, n).
    """
    if (dense := as_dense(x)) is not None:
        return dense.to(block.dtype) @ block
    if not isinstance(x, Factors) or x.up.dtype == x.down.dtype == block.dtype:
        return x.map(lambda t: t.to(block.dtype)) @ block
    found = block.new_zeros(x.shape[0], block.shape[1])
    for up, down in zip(x.up.split(_BLOCK, 1), x.down.split(_BLOCK), strict=True):
        found.addmm_(up.to(block.dtype), down.to(block.dtype) @ block)
    return found


class Probed(NamedTuple):
    """Several changes of one weight by what they do to the probes.

    Attributes:
        vectors: The N changes: in the dtype of the sums where they have few components, else as stored.
        inner: (N, N) inner products in float64 on the CPU; of their lengths exact, beside them of shortened factors where they
            have many components.
        images: (N, out * 16) in the dtype of the sums.
        is_exact: Whether all of `inner` is.
        remains: As `Components` has it, of thin changes.
    """

    vectors: Sequence[Delta]
    inner: Tensor
    images: Tensor
    is_exact: bool
    remains: float = 1.0

    @classmethod
    def of(cls, vectors: Sequence[Delta], sums: torch.dtype) -> Probed:
        """Reads each change once.

        Args:
            vectors: One or more.
            sums: float32 or float64.
        """
        (out, into), device = vectors[0].shape, vectors[0].device
        block = probes(into, sums, device)
        images = block.new_empty(len(vectors), out * COUNT)
        if _are_few(vectors):
            stacked, ranks = stack(_thin(vectors, sums)).map(lambda t: t.to(sums)), [v.rank for v in vectors]
            read = list(map(Factors, stacked.up.split(ranks, 1), stacked.down.split(ranks)))
            for row, (up, _), inputs in zip(images, read, (stacked.down @ block).split(ranks), strict=True):
                torch.mm(up, inputs, out=row.view(out, COUNT))
            seen = Components.of_stack(stacked, ranks)
            return cls(read, seen.inner, images, True, seen.remains)
        is_thin = all(isinstance(v, Factors | Framed) and v.rank <= _THIN for v in vectors)
        short, energies = list[Factors](), list[Tensor]()
        for row, vector in zip(images, vectors, strict=True):
            x = vector.map(lambda t: t.to(sums)) if is_thin else vector
            row.copy_(image(x, block).flatten())
            if is_thin and isinstance(x, Factors | Framed):
                short.append(shortened(x))
                energies.append(_product(x, x) if isinstance(x, Factors) else x.core.square().sum().double().cpu())
        if is_thin:
            whole = torch.stack(energies)
            remains = whole.sum() / torch.cat([sizes_of(x) for x in short]).square().sum().cpu()
            return cls(vectors, _of_length(_products(short), whole), images, False, float(remains))
        flat = all(isinstance(v, Factors) for v in vectors)
        return cls(vectors, gram(vectors, sums if flat else torch.float64), images, True)

    def difference(self, want: Tensor, written: Delta) -> Difference:
        """What was written less what was wanted.

        Args:
            want: (N,) what each change was wanted with.
            written: (out, in).
        """
        wanted = want.to(self.images) @ self.images
        got = image(written, self._block).flatten()
        missing = got - wanted
        crossed, sizes = self.images @ missing, torch.stack([t @ t for t in (missing, got, wanted)])
        crossed, sizes = crossed.double().cpu() / COUNT, sizes.double().cpu() / COUNT
        return Difference(self, want, written, missing.view(-1, COUNT), crossed, *sizes.tolist())

    def products(self, written: Delta) -> tuple[Tensor, float]:
        """Inner products with another change, exactly: ((N,), its own with itself).

        Args:
            written: (out, in).
        """
        if not isinstance(written, Factors) or not all(isinstance(v, Factors | Framed) for v in self.vectors):
            return torch.tensor([inner(v, written) for v in self.vectors], dtype=torch.float64), inner(written, written)
        other = written.map(lambda t: t.to(self.images.dtype))
        found = torch.stack([_product(v, other) for v in (*self.vectors, other)])
        return found[:-1], float(found[-1])

    @property
    def _block(self) -> Tensor:
        return probes(self.vectors[0].shape[1], self.images.dtype, self.images.device)


class Difference(NamedTuple):
    """What was written less what was wanted.

    Attributes:
        probed: The changes of which something was wanted.
        want: (N,) what each was wanted with.
        other: What was written, (out, in).
        image: (out, 16) of the difference.
        crossed: (N,) estimates of its inner products with the changes.
        energy: Of its squared norm.
        written: Of that of what was written.
        wanted: Of that of what was wanted.
    """

    probed: Probed
    want: Tensor
    other: Delta
    image: Tensor
    crossed: Tensor
    energy: float
    written: float
    wanted: float

    def largest(self) -> float:
        """Its largest singular value, from below: by block power iteration from its image."""
        if not self.energy > 0:
            return 0.0
        terms = [(v, float(w)) for v, w in zip(self.probed.vectors, self.want, strict=True) if w] + [(self.other, -1.0)]
        x = self.image
        for is_back in (True, False):
            basis = torch.linalg.qr(x).Q
            x = torch.stack([weight * image(v.T if is_back else v, basis) for v, weight in terms]).sum(0)
        return float(torch.linalg.eigvalsh((x.T @ x).double())[-1].clamp(min=0)) ** 0.5


class Truncation(NamedTuple):
    """What tells whether a truncation is right.

    Attributes:
        inner: (N, N) inner products of the changes of which something was wanted.
        column: (N,) those with what was written, exact.
        got: The squared norm of what was written.
        missed: An estimate of that of what is missing; None where it follows from the others, which are exact.
        sizes: Of the components that were written, |up_k| |down_k|.
        remains: As `Probed` has it.
        largest: Tells the largest component that is missing, from below but for rounding.
    """

    inner: Tensor
    column: Tensor
    got: float
    missed: float | None
    sizes: Tensor
    remains: float
    largest: Callable[[], float]

    @classmethod
    def of(cls, vectors: Sequence[Delta], want: Tensor, written: Factors, sums: torch.dtype) -> Truncation:
        """By Gram matrices of all components where they are few, else by probes.

        Args:
            vectors: The N changes.
            want: (N,) what each was wanted with.
            written: (out, in).
            sums: float32 or float64.
        """
        if _are_few(vectors):
            seen = Components.of([*_thin(vectors, sums), written], sums)
            inner, sizes = seen.inner, seen.sizes[len(seen.sizes) - written.rank :]
            largest = partial(seen.largest, torch.cat([want, -want.new_ones(1)]))
            return cls(inner[:-1, :-1], inner[:-1, -1], float(inner[-1, -1]), None, sizes, seen.remains, largest)
        probed = Probed.of(vectors, sums)
        missing, (column, got) = probed.difference(want, written), probed.products(written)
        missed = None if probed.is_exact else missing.energy
        return cls(probed.inner, column, got, missed, sizes_of(written), probed.remains, missing.largest)


def _are_few(vectors: Sequence[Delta]) -> bool:
    """Whether Gram matrices of all components are the shorter way."""
    return sum(v.rank for v in vectors) <= _FEW and all(isinstance(v, Factors | Framed) for v in vectors)


def _thin(vectors: Sequence[Delta], sums: torch.dtype) -> list[Factors]:
    """Factors and frames as factors; none is multiplied out in less than the dtype of the sums."""
    return [(v.map(lambda t: t.to(sums)) if isinstance(v, Framed) else v).expand() for v in vectors]


def sizes_of(x: Factors) -> Tensor:
    """|up_k| |down_k| of each component, in float64: the singular values of what `truncate` made."""
    return lengths(x.up) * torch.linalg.vector_norm(wide(x.down), dim=1)


def _product(x: Delta, y: Factors) -> Tensor:
    """Their inner product with sums in the dtype of y, in float64 on the CPU."""
    x = x.map(lambda t: t.to(y.up.dtype))
    found = (x.up.T @ y.up) * (x.down @ y.down.T) if isinstance(x, Factors) else (x @ y.down.T) * y.up
    return found.double().sum().cpu()


def _products(xs: Sequence[Factors]) -> Tensor:
    """All their inner products with sums in their dtype, in float64 on the CPU: half of the pairs, a row at a time."""
    whole, ranks = stack(xs), torch.tensor([x.rank for x in xs])
    owners, first = torch.arange(len(xs)).repeat_interleave(ranks), 0
    found = torch.zeros(len(xs), len(xs), dtype=torch.float64)
    for i, x in enumerate(xs):
        components = (x.up.T @ whole.up[:, first:]) * (x.down @ whole.down[first:].T)
        found[i].index_add_(0, owners[first:], components.double().sum(0).cpu())
        first += x.rank
    return found + found.triu(1).T


def _of_length(found: Tensor, energies: Tensor) -> Tensor:
    """Estimated inner products, set to lengths that are known."""
    told = found.diagonal()
    ratios = torch.where(told > 0, energies / told, torch.ones_like(told)).sqrt()
    return found * torch.outer(ratios, ratios)
