"""A step's method, applied to one module after the other."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..algebra.delta import Delta, gram
from ..algebra.linear import add
from ..algebra.methods import METHODS
from ..errors import ZitMergeError
from ..model.zimage import MODULES
from ..planning.plan import StepPlan

Watched = Callable[[Collection[str]], Iterable[str]]  # passes the modules of a pass on one by one; may raise to stop


class Reader(Protocol):
    """What reads a LoRA module by module."""

    def delta(self, module: str) -> tuple[float, Delta]:
        """(alpha / rank, change)."""


Deltas = Mapping[int, Delta]  # number of the input -> its change of one module, strength included


class Merger:
    """What the method makes of the inputs.

    A linear method that looks at lengths or angles takes them once over all modules when this is made.

    Args:
        plan: The step.
        readers: Of its inputs, opened.
        device: Where the algebra runs.
        watched: Passes the modules of a pass over all of them on one by one; may raise to stop.
    """

    def __init__(
        self,
        plan: StepPlan,
        readers: Sequence[Reader],
        device: torch.device,
        watched: Watched = iter,
    ):
        self._watched = watched
        self._plan, self._readers, self._device = plan, readers, device
        self._method = METHODS[plan.spec.method]
        self._parameters = {name: p.default for name, p in self._method.parameters.items()} | plan.spec.params
        self._per = self._parameters.pop("per", "file")
        self._grams = self._sum_grams() if self._method.per else {}

    def deltas(self, module: str) -> dict[int, Delta]:
        """Input -> its change of a module, strength included; only the inputs that count there."""
        found = {}
        for n, (i, reader) in enumerate(zip(self._plan.inputs, self._readers, strict=True)):
            if i.counts(module):
                alpha_over_rank, stored = reader.delta(module)
                found[n] = stored.map(lambda t: t.to(self._device)).times(i.strengths[module] * alpha_over_rank)
        return found

    def merged(self, module: str, deltas: Deltas, factors: Mapping[int, float] | None) -> Delta | None:
        """The method's answer for one module; None where no input changes it.

        Args:
            module: Its name.
            deltas: From `deltas`.
            factors: From `factors`.
        """
        if not deltas:
            return None
        if factors is not None:
            return add([delta.times(factors[n]) for n, delta in deltas.items()])
        parameters = dict(self._parameters)
        if "seed" in parameters:  # other draws in every module
            parameters["seed"] = zlib.crc32(f"{parameters['seed']} {module}".encode())
        return self._method.function(list(deltas.values()), **parameters)

    def factors(self, module: str) -> dict[int, float] | None:
        """Input -> what a linear method multiplies its delta with, strength included already; None for any other method.

        Raises:
            ZitMergeError: The method has none for these numbers.
        """
        if not self._method.is_linear:
            return None
        ratios = self._ratios()
        if not ratios:
            return {}
        gram = self._grams.get(self._scope(module), torch.zeros(len(ratios), len(ratios), dtype=torch.float64))
        weights = torch.tensor(list(ratios.values()), dtype=torch.float64)
        try:
            coefficients = self._method.function(gram, weights, **self._parameters)
        except ValueError as e:
            where = {"module": module, "layer": "/".join(map(str, self._scope(module))), "file": "the whole"}[self._per]
            raise ZitMergeError(f"{self._plan.place or self._plan.name}: {self._plan.spec.method}, {where}: {e}") from None
        return {n: float(c / r) for n, c, r in zip(ratios, coefficients, weights, strict=True)}

    def _ratios(self) -> dict[int, float]:
        """Input -> ratio, for those that take part."""
        return {n: i.spec.ratio for n, i in enumerate(self._plan.inputs) if i.spec.ratio}

    def _scope(self, module: str) -> tuple:
        """The part of the file over which lengths and angles are taken with this module's."""
        m = MODULES[module]
        return {"module": (module,), "layer": (m.section, m.index), "file": ()}[self._per]

    def _sum_grams(self) -> dict[tuple, Tensor]:
        """Scope -> Gram matrix of the deltas without their ratios."""
        ratios = self._ratios()
        numbers, grams = list(ratios), {}
        for module in self._watched(list(self._plan.shapes)):
            deltas = self.deltas(module)
            here = torch.zeros(len(numbers), len(numbers), dtype=torch.float64)
            if deltas:
                at = torch.tensor([numbers.index(n) for n in deltas])
                scales = torch.tensor([1 / ratios[n] for n in deltas], dtype=torch.float64)
                here[at[:, None], at] = gram(list(deltas.values())) * torch.outer(scales, scales)
            scope = self._scope(module)
            grams[scope] = grams[scope] + here if scope in grams else here
        return grams
