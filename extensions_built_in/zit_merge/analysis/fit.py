"""Least squares of a file in its sources, summed over modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..algebra.least_squares import groups, least_squares

_DATA = 10  # numbers for each unknown before strengths that fit a module say something

Strengths = tuple["float | None", ...]


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

    def add(self, module: str, here: Sequence[int], found: Tensor, data: int) -> float:
        """Adds a module.

        Args:
            module: Its name.
            here: The n sources that change it.
            found: (n + 1, n + 1): inner products of their changes there, the file's own change last.
            data: How many numbers are fitted.

        Returns:
            The energy of the file that strengths of its own explain there.
        """
        at = torch.tensor(here)
        gram, products = found[:-1, :-1], found[:-1, -1]
        own = least_squares(gram, products)
        explained = _explained(own, products)
        self.gram[at[:, None], at] += gram
        self.products[at] += products
        self.energy += float(found[-1, -1])
        self._own += explained
        if data:  # a module without any change decides nothing
            self._data = min(self._data, data / len(here))
        strengths = dict(zip(here, own, strict=True))
        self.strengths[module] = tuple(strengths.get(i) for i in range(self.count))
        if untold := [here[i] for group in groups(gram) for i in group]:
            self.untold[module] = untold
        return explained

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
