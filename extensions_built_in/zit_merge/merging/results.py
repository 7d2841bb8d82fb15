"""What a step makes, module by module, whether it is written to a file or only looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..algebra import ranks
from ..algebra.delta import Delta, norm
from ..algebra.factors import Factors, is_finite, pad
from ..algebra.rounding import to_dtype
from ..algebra.truncate import singular_values, truncate
from ..errors import ZitMergeError
from ..formats import lokr
from ..formats.spec import DTYPE_NAMES
from ..planning.step import revised
from ..planning.types import StepPlan
from ..progress import SILENT, Progress
from .merger import Merger, Parts, Reader


class Made(NamedTuple):
    """One module.

    Attributes:
        parts: Input -> its part.
        coefficients: Input -> coefficient in a linear method; None for any other method.
        merged: The method's answer, before truncation and rounding; None where no input changes the module.
        written: The same as the file holds it: at its rank, in its dtype, on the CPU.
    """

    parts: Parts
    coefficients: Mapping[int, float] | None
    merged: Delta | None
    written: Delta


class Result:
    """What a step makes; reads like a file of rank and dtype as planned.

    Args:
        plan: Final.
        readers: Of its inputs, opened.
        device: Where the algebra runs.
        progress: Shows the passes that are needed first.

    Attributes:
        plan: With the ranks that follow from the numbers, if they do.
    """

    def __init__(self, plan: StepPlan, readers: Sequence[Reader], device: torch.device, progress: Progress = SILENT):
        self._readers, self._merger = readers, Merger(plan, readers, device, progress)
        self.plan = plan if not plan.is_open else self._ranked(plan, progress)

    def made(self, module: str) -> Made:
        """One module of a LoRA.

        Raises:
            ZitMergeError: It is too large for the dtype.
        """
        parts, coefficients = self._merger.parts(module), self._merger.coefficients(module)
        merged = self._merger.merged(module, parts, coefficients)
        return Made(parts, coefficients, merged, self._finished(merged, module))

    def scaled(self, module: str) -> tuple[Made, dict[str, Tensor]]:
        """One module of a LoKr that stays one, and its tensors: part -> tensor, without alpha.

        Raises:
            ZitMergeError: It is too large for the dtype.
        """
        parts, coefficients = self._merger.parts(module), self._merger.coefficients(module)
        merged, (change, *_) = self._merger.merged(module, parts, coefficients), self.plan.kept_lokr.changes[module]
        tensors = lokr.scaled(change, self._readers[0], self.plan.inputs[0].strengths[module], self.plan.dtype)
        tensors = {name: self._checked(tensor, module) for name, tensor in tensors.items()}
        return Made(parts, coefficients, merged, lokr.delta(tensors)), tensors

    def delta(self, module: str) -> tuple[float, Delta]:
        """1.0 and the change as the file would hold it; see `Reader`."""
        made = self.scaled(module)[0] if self.plan.kept_lokr else self.made(module)
        return 1.0, made.written

    def _ranked(self, plan: StepPlan, progress: Progress) -> StepPlan:
        """The plan with the ranks that follow from the singular values of all modules."""
        rule, spectra, total = plan.spec.rank, {}, 0.0
        for module in progress.track(list(plan.shapes), f"ranks of {plan.name}"):
            merged = self._merger.merged(module, self._merger.parts(module), self._merger.coefficients(module))
            spectra[module] = torch.zeros(1, dtype=torch.float64)
            if merged is not None:
                spectra[module] = singular_values(merged, plan.ranks[module]).cpu()
                total += norm(merged) ** 2
        costs = {module: sum(plan.shapes[module]) for module in spectra}
        if rule.size_mb:
            chosen = ranks.ranks_that_fit(spectra, costs, lambda r: revised(plan, r).bytes <= rule.size_mb * 1e6)
        elif plan.spec.save.uniform:
            chosen = dict.fromkeys(spectra, ranks.common_rank(spectra, rule.energy, total))
        else:
            chosen = ranks.ranks_of_energy(spectra, costs, rule.energy, total)
        return revised(plan, chosen)

    def _finished(self, merged: Delta | None, module: str) -> Factors:
        """The factors at the file's rank, in its dtype, on the CPU."""
        rank, (out, into), dtype = self.plan.ranks[module], self.plan.shapes[module], self.plan.dtype
        if merged is None:
            return Factors(torch.zeros(out, rank, dtype=dtype), torch.zeros(rank, into, dtype=dtype))
        factors = truncate(merged, rank) if merged.rank > rank else merged.expand()
        return pad(to_dtype(factors, dtype).map(lambda t: self._checked(t.cpu(), module)), rank)

    def _checked(self, tensor: Tensor, module: str) -> Tensor:
        if not is_finite(tensor):
            cure = "save it as bf16 or fp32" if self.plan.dtype == torch.float16 else "use smaller strengths"
            raise ZitMergeError(f"{self.plan.path.name}: {module} is too large for {DTYPE_NAMES[self.plan.dtype]}: {cure}")
        return tensor
