"""Least squares of a file in its sources, summed over modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..algebra.least_squares import groups, least_squares

_DATA = 10  # numbers for each unknown before strengths that fit a module say something

Strengths = tuple["float | None", ...]


class Fitted(NamedTuple):
    """The n sources that change one module, in the file's change there.

    Attributes:
        here: Which sources they are.
        own: Strength of each.
        explained: The energy of the file that these explain.
        untold: Sources whose strengths can't be told from each other.
        found: (n + 1, n + 1): inner products of the changes, the file's own change last.
        data: How many numbers were fitted.
    """

    here: Sequence[int]
    own: Strengths
    explained: float
    untold: list[int]
    found: Tensor
    data: int


def fitted(here: Sequence[int], found: Tensor, data: int) -> Fitted:
    """Fits one module; the arguments are as in `Fitted`."""
    gram, products = found[:-1, :-1], found[:-1, -1]
    own = least_squares(gram, products)
    untold = [here[i] for group in groups(gram) for i in group]
    return Fitted(here, own, _explained(own, products), untold, found, data)


@dataclass
class Fit:
    """The strengths of the sources in a file, and what they leave.

    Attributes:
        count: How many sources.
        strengths: Module -> strength of each source there alone; None for one that does not change the module.
        untold: Module -> sources whose strengths can't be told from each other there.
        gram: (count, count) inner products of the sources in the file's modules.
        energy: Squared norm of the file in these modules.
        products: (count,) inner products of the sources with the file.
    """

    count: int
    strengths: dict[str, Strengths] = field(default_factory=dict)
    untold: dict[str, list[int]] = field(default_factory=dict)
    gram: Tensor = field(init=False)
    energy: float = 0.0
    products: Tensor = field(init=False)
    _own: float = 0.0
    _data: float = torch.inf

    def __post_init__(self) -> None:
        self.gram = torch.zeros(self.count, self.count, dtype=torch.float64)
        self.products = torch.zeros(self.count, dtype=torch.float64)

    def add(self, module: str, part: Fitted) -> None:
        """Adds a module."""
        at = torch.tensor(part.here)
        self.gram[at[:, None], at] += part.found[:-1, :-1]
        self.products[at] += part.found[:-1, -1]
        self.energy += float(part.found[-1, -1])
        self._own += part.explained
        if part.data:  # a module without any change decides nothing
            self._data = min(self._data, part.data / len(part.here))
        strengths = dict(zip(part.here, part.own, strict=True))
        self.strengths[module] = tuple(strengths.get(i) for i in range(self.count))
        if part.untold:
            self.untold[module] = part.untold

    @property
    def whole(self) -> Strengths:
        """Strength of each source over all modules."""
        return least_squares(self.gram, self.products)

    @property
    def rest(self) -> float:
        """|file - sources at one strength each| / |file|."""
        return self._rest(_explained(self.whole, self.products))

    @property
    def rest_by_module(self) -> float:
        """The same with strengths of its own for each module."""
        return self._rest(self._own)

    @property
    def is_decided(self) -> bool:
        """Whether there were enough numbers in each module for strengths of its own to mean something."""
        return self._data >= _DATA

    def told(self) -> dict[str, list[float | None]]:
        """Module -> strengths, None for those that can't be told from another one."""
        return {
            module: [None if i in self.untold.get(module, ()) else x for i, x in enumerate(strengths)]
            for module, strengths in self.strengths.items()
        }

    def _rest(self, explained: float) -> float:
        return max(1 - explained / self.energy, 0.0) ** 0.5 if self.energy else 0.0


def _explained(strengths: Strengths, products: Tensor) -> float:
    return sum(x * h for x, h in zip(strengths, products.tolist(), strict=True) if x is not None)
