"""How many components each module of a file keeps, from the singular values of all of them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Spectra = Mapping[str, Tensor]  # module -> singular values, largest first
_ONE: Mapping[str, int] = {}  # component in every module


def common_rank(spectra: Spectra, energy: float, total: float | None = None) -> int:
    """The smallest rank that keeps a share of the energy if every module gets it; the largest there is, if none does.

    Args:
        spectra: Module -> singular values, from the largest on.
        energy: Share of the sum of all squared singular values, above 0 and at most 1.
        total: That sum, where `spectra` do not hold all of them.
    """
    longest = max(len(sigma) for sigma in spectra.values())
    by_place = torch.zeros(longest, dtype=torch.float64)  # the energy of all first, all second, ... components
    for sigma in spectra.values():
        by_place[: len(sigma)] += sigma.cpu() ** 2
    return _reaching(by_place, energy, total)


def ranks_of_energy(
    spectra: Spectra, costs: Mapping[str, int], energy: float, total: float | None = None, least: Mapping[str, int] = _ONE
) -> dict[str, int]:
    """The ranks that keep a share of the energy in the smallest file, every module at least one component.

    Args:
        spectra: Module -> singular values, from the largest on.
        costs: Module -> what one component takes.
        energy: Share of the sum of all squared singular values.
        total: That sum, where `spectra` do not hold all of them.
        least: Module -> components that it has in the file in any case; one where it is not named.
    """
    modules, order = _by_worth(spectra, costs, least)
    values = torch.cat([sigma.cpu() for sigma in spectra.values()])[order] ** 2
    return _counted(modules[order][: _reaching(values, energy, total)], spectra)


def ranks_that_fit(
    spectra: Spectra, costs: Mapping[str, int], fits: Callable[[Mapping[str, int]], bool], least: Mapping[str, int] = _ONE
) -> dict[str, int]:
    """The ranks that keep the most energy in a file that still fits, every module at least one component.

    Args:
        spectra: Module -> singular values.
        costs: Module -> what one component takes.
        fits: Whether a file of such ranks fits.
        least: Module -> components that it has in the file in any case; one where it is not named.
    """
    modules, order = _by_worth(spectra, costs, least)
    ranked = modules[order]
    kept = bisect_left(range(len(ranked) + 1), True, key=lambda n: not fits(_counted(ranked[:n], spectra))) - 1
    return _counted(ranked[: max(kept, 0)], spectra)


def _by_worth(spectra: Spectra, costs: Mapping[str, int], least: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """(number of its module for each component, the components' order: first those that every module holds anyway, then by
    energy for what they take)."""
    modules = torch.cat([torch.full((len(sigma),), i) for i, sigma in enumerate(spectra.values())])
    worth = [sigma.cpu() ** 2 / costs[name] for name, sigma in spectra.items()]
    for name, values in zip(spectra, worth, strict=True):
        values[: least.get(name, 1)] = torch.inf
    return modules, torch.cat(worth).argsort(descending=True, stable=True)


def _counted(modules: Tensor, spectra: Spectra) -> dict[str, int]:
    counts = torch.bincount(modules, minlength=len(spectra)).tolist()
    return {name: max(1, count) for name, count in zip(spectra, counts, strict=True)}


def _reaching(energies: Tensor, share: float, total: float | None = None) -> int:
    """How many of the energies, from the first, hold a share of the total; at least one, and all of them if none do."""
    sums = energies.cumsum(0)
    enough = sums >= share * (total or float(sums[-1])) * (1 - 1e-12)  # a share of 1 must not fail by rounding
    return int(enough.int().argmax()) + 1 if enough.any() else len(energies)
