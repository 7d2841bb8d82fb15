"""A step's method, applied to one module after the other.

Ratio, factor, alpha / rank and stored change travel apart until one multiplication joins them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..algebra.delta import Delta, Sum
from ..algebra.factors import Factors
from ..algebra.linear import add
from ..algebra.methods import METHODS
from ..algebra.products import gram
from ..algebra.rounding import scaled
from ..errors import SettingError
from ..formats.reading import Reader
from ..model.zimage import MODULES
from ..planning.types import StepPlan
from ..progress import SILENT, Progress


class Part(NamedTuple):
    """The change of one module by one input.

    Attributes:
        ratio: Of the input.
        factor: Of its weights in this module.
        scale: alpha / rank.
        stored: The change as stored, (out, in).
    """

    ratio: float
    factor: float
    scale: float
    stored: Delta

    @property
    def bare(self) -> Delta:
        """The change at strength 1."""
        return self.stored.times(self.scale)

    def strength(self, coefficient: float) -> float:
        """coefficient * factor * alpha / rank; the ratio is the coefficient of a plain sum."""
        return coefficient * self.factor * self.scale

    def weighted(self, coefficient: float) -> Delta:
        """coefficient * factor * change."""
        return self.stored.times(self.strength(coefficient))


Parts = Mapping[int, Part]  # number of the input -> its part in one module


class Merged(NamedTuple):
    """One module as the method makes it.

    Attributes:
        module: Its name.
        parts: Input -> its part; only the inputs that count there.
        coefficients: Input -> coefficient of its change in a linear method, factor left out; None for any other method.
        delta: The method's answer, before truncation and rounding; None where no input changes the module, and once a linear
            method's is rounded.
    """

    module: str
    parts: Parts
    coefficients: Mapping[int, float] | None
    delta: Delta | None


class Made(NamedTuple):
    """One module.

    Attributes:
        merged: As the method makes it.
        written: The same as the file holds it: at its rank, in its dtype, on the CPU.
        tensors: Of a LoKr that stays one: part -> tensor, without alpha.
    """

    merged: Merged
    written: Delta
    tensors: Mapping[str, Tensor] = {}


class Merger:
    """What the method makes of the inputs.

    A linear method that looks at lengths or angles takes them once over all modules when this is made.

    Args:
        plan: The step.
        readers: Of its inputs, opened.
        device: Where the algebra runs.
        progress: Shows that pass.
    """

    def __init__(self, plan: StepPlan, readers: Sequence[Reader], device: torch.device, progress: Progress = SILENT):
        self._plan, self._readers, self._device = plan, readers, device
        self._method = METHODS[plan.spec.method]
        self._parameters = {name: p.default for name, p in self._method.parameters.items()} | plan.spec.params
        self._per = self._parameters.pop("per", "file")
        self._ratios = {n: i.spec.ratio for n, i in enumerate(plan.inputs) if i.spec.ratio}  # of those that take part
        self._grams = self._sum_grams(progress) if self._method.per else {}

    def each(self, progress: Progress, label: str) -> Iterator[Merged]:
        """All modules that are written, in order.

        Args:
            progress: Shows the pass.
            label: What it is called.
        """
        for module in progress.track(list(self._plan.shapes), label):
            yield self.of(module)

    def of(self, module: str) -> Merged:
        """One module.

        Raises:
            SettingError: The method has no coefficients for these numbers.
        """
        parts = self._parts(module)
        coefficients = self._coefficients(module) if self._method.is_linear else None
        if not parts:
            return Merged(module, parts, coefficients, None)
        if coefficients is not None:
            return Merged(module, parts, coefficients, self._sum(module, parts, coefficients))
        parameters = dict(self._parameters)
        if "seed" in parameters:  # other draws in every module
            parameters["seed"] = zlib.crc32(f"{parameters['seed']} {module}".encode())
        with self._plan.computing(module):
            delta = self._method.function([p.weighted(p.ratio) for p in parts.values()], **parameters)
        return Merged(module, parts, None, delta)

    def _sum(self, module: str, parts: Parts, coefficients: Mapping[int, float]) -> Delta:
        """Factors that nothing is cut from stay side by side: they are rounded one by one, and stacked then."""
        is_whole = module not in self._plan.cut and not self._plan.is_open
        thin = [(p.stored, p.strength(coefficients[n])) for n, p in parts.items() if isinstance(p.stored, Factors)]
        if is_whole and len(thin) == len(parts):
            whole = tuple(scaled(stored, strength, self._plan.dtype) for stored, strength in thin)
            return Sum(whole) if len(whole) > 1 else whole[0]
        return add([p.weighted(coefficients[n]) for n, p in parts.items()])

    def _parts(self, module: str) -> dict[int, Part]:
        found = {}
        for n, (i, reader) in enumerate(zip(self._plan.inputs, self._readers, strict=True)):
            if i.counts(module):
                scale, stored = reader.delta(module)
                found[n] = Part(i.spec.ratio, i.factors[module], scale, stored.map(lambda t: t.to(self._device)))
        return found

    def _coefficients(self, module: str) -> dict[int, float]:
        if not self._ratios:
            return {}
        gram = self._grams.get(self._scope(module), torch.zeros(len(self._ratios), len(self._ratios), dtype=torch.float64))
        ratios = torch.tensor(list(self._ratios.values()), dtype=torch.float64)
        try:
            found = self._method.function(gram, ratios, **self._parameters)
        except ValueError as e:
            where = {"module": module, "layer": "/".join(map(str, self._scope(module))), "file": "the whole"}[self._per]
            raise SettingError(f"{self._plan.spec.method}, {where}: {e}", self._plan.loc or self._plan.name) from None
        return dict(zip(self._ratios, found.tolist(), strict=True))

    def _scope(self, module: str) -> tuple:
        """The part of the file over which lengths and angles are taken with this module's."""
        m = MODULES[module]
        return {"module": (module,), "layer": (m.section, m.index), "file": ()}[self._per]

    def _sum_grams(self, progress: Progress) -> dict[tuple, Tensor]:
        """Scope -> (n, n) Gram matrix of the changes without their ratios."""
        numbers, grams = list(self._ratios), dict[tuple[object, ...], Tensor]()
        for module in progress.track(list(self._plan.shapes), f"angles of {self._plan.name}"):
            parts = self._parts(module)
            here = torch.zeros(len(numbers), len(numbers), dtype=torch.float64)
            if parts:
                at = torch.tensor([numbers.index(n) for n in parts])
                here[at[:, None], at] = gram([part.weighted(1.0) for part in parts.values()]).cpu()
            scope = self._scope(module)
            grams[scope] = grams[scope] + here if scope in grams else here
        return grams
