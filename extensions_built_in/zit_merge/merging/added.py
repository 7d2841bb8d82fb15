"""The change of one module on its way into a whole model: added to the weight rows by rows, and measured in what was written."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from ..algebra.delta import Delta
from ..algebra.dense import dense_rows, rounded
from ..algebra.factors import Factors
from ..algebra.products import gram
from .merger import Merged

_CANCELS = 0.01  # of the inputs' energy: what is left of less is summed in float64
_THIN = 0.5  # of the shorter side: components up to which a change is never multiplied out to be measured


class AddedChange:
    """The change of one module, added to its weight rows by rows.

    Args:
        merged: As the method makes it, at the step's rank.
        is_cut: Whether that is less than the inputs have.

    Attributes:
        module: Its name.
        parts: Input -> its part.
        want: (n + k,) what the n inputs and, unless the change is their plain combination, the change itself count in what was
            asked for; that may be more than the step's rank holds.
    """

    def __init__(self, merged: Merged, is_cut: bool):
        assert merged.delta is not None, "a module that nothing changes is copied"
        self.module, self.parts = merged.module, merged.parts
        self._delta = _float32(merged.delta)
        self._vectors = [_float32(p.bare) for p in merged.parts.values()]
        weights = [0.0] * len(self._vectors)
        if merged.coefficients is not None:
            weights = [merged.coefficients[n] * p.factor for n, p in merged.parts.items()]
        self.want = self._aim = torch.tensor(weights, dtype=torch.float64)
        if merged.coefficients is None or is_cut:
            self._vectors.append(self._delta)
            self._aim = torch.tensor([0.0] * len(weights) + [1.0], dtype=torch.float64)
            self.want = self._aim if merged.coefficients is None else torch.tensor([*weights, 0.0], dtype=torch.float64)
        self._thin = [v for v in self._vectors if isinstance(v, Factors) and _is_thin(v)]
        into = self._delta.shape[1]
        self._downs = torch.cat([torch.zeros(0, into, device=self._delta.device), *(v.down for v in self._thin)]).T
        self._crossed: dict[int, Tensor] = {}  # first row -> (n + k,) inner products of the vectors with what was written
        self._energies: dict[int, tuple[float, float]] = {}  # first row -> |g|^2, |g - d|^2

    def sum(self, rows: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """(rows of the weight from the first on, the same with the change in them), float32, until this thread's next call."""
        weight, changed, _ = _scratch(rows)
        weight.copy_(rows)
        last = first + len(rows)
        if isinstance(self._delta, Factors) and _is_thin(self._delta):
            torch.addmm(weight, self._delta.up[first:last], self._delta.down, out=changed)
        else:
            torch.add(weight, dense_rows(self._delta, first, last), out=changed)
        return weight, changed

    def added(
        self, rows: Tensor, first: int, dtype: torch.dtype, scale: float, generator: torch.Generator | None
    ) -> tuple[Tensor, bool]:
        """(rows of the weight from the first on with the change in them, over `scale`, rounded to `dtype`; whether all of these
        numbers are finite)."""
        weight, changed = self.sum(rows, first)
        found = rounded(changed if scale == 1 else changed / scale, dtype, generator)
        found = found.clone() if found is changed else found
        got = _scratch(rows)[2].copy_(found).mul_(scale)
        missed = _energy(changed.sub_(got))  # by itself: beside g float32 would lose it
        self._measure(got.sub_(weight), missed, first, first + len(rows))
        return found, math.isfinite(missed)

    def _measure(self, got: Tensor, missed: float, first: int, last: int) -> None:
        images = iter((got @ self._downs).split([v.rank for v in self._thin], 1))
        crossed = torch.zeros(len(self._vectors), dtype=torch.float64)
        for n, vector in enumerate(self._vectors):
            if isinstance(vector, Factors) and _is_thin(vector):
                crossed[n] = (next(images) * vector.up[first:last]).sum(dtype=torch.float64)
            else:
                crossed[n] = (got * dense_rows(vector, first, last)).sum(dtype=torch.float64)
        self._crossed[first], self._energies[first] = crossed, (_energy(got), missed)

    def sums(self) -> tuple[float, float, tuple[float, float, float]]:
        """(<g, d>, |d|^2, the energies that `Sums.add` takes), d at the step's rank."""
        self._gram, size = self._products_of_vectors()
        written, missed = (sum(self._energies[first][n] for first in sorted(self._energies)) for n in (0, 1))
        products = self._products()
        crossed, wanted = float(self._aim @ products), size
        if self.want is not self._aim:  # what was asked for is more than d
            wanted = float(self.want @ self._gram @ self.want)
            missed = wanted - 2 * float(self.want @ products) + written
        return crossed, max(size, 0.0), (max(wanted, 0.0), max(missed, 0.0), written)

    def _products_of_vectors(self) -> tuple[Tensor, float]:
        """(inner products of the vectors, |d|^2), from sums in float32 unless the inputs cancel in d."""
        for sums in (torch.float32, torch.float64):
            found = gram(self._vectors, sums)
            size = float(self._aim @ found @ self._aim)
            if size > _CANCELS * float(self._aim.square() @ found.diagonal()):
                break
        return found, size

    def _products(self) -> Tensor:
        return torch.stack([self._crossed[first] for first in sorted(self._crossed)]).sum(0)

    def products(self, written: float) -> Tensor:
        """(n + k + 1, n + k + 1) inner products of the vectors and of what was written."""
        size = len(self._vectors)
        found = torch.full((size + 1, size + 1), written, dtype=torch.float64)
        found[:size, :size] = self._gram
        found[size, :size] = found[:size, size] = self._products()
        return found


_local = threading.local()


def _scratch(rows: Tensor) -> Tensor:
    """Three float32 tensors of this shape, the same memory every time: fresh pages cost as much as the arithmetic."""
    kept: dict[torch.device, Tensor] = _local.__dict__.setdefault("kept", {})
    if rows.device not in kept or kept[rows.device].numel() < 3 * rows.numel():
        kept[rows.device] = torch.empty(3 * rows.numel(), device=rows.device)
    return kept[rows.device][: 3 * rows.numel()].view(3, *rows.shape)


def _energy(x: Tensor) -> float:
    """Squared norm; infinite or NaN where a number of x is."""
    flat = x.reshape(-1)
    return float(torch.dot(flat, flat))


def _float32(delta: Delta) -> Delta:
    return delta.expand().map(lambda t: t.float()) if _all_factors(delta) else delta.map(lambda t: t.float())


def _all_factors(delta: Delta) -> bool:
    return all(isinstance(p, Factors) for p in getattr(delta, "parts", (delta,)))


def _is_thin(delta: Delta) -> bool:
    return isinstance(delta, Factors) and delta.rank <= _THIN * min(delta.shape)
