"""What a step makes, module by module, whether it is written to a file or only looked at."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ..algebra import ranks
from ..algebra.delta import Delta, parts
from ..algebra.factors import Factors, is_finite, pad, stack
from ..algebra.precision import full_precision
from ..algebra.products import norm
from ..algebra.rounding import to_dtype
from ..algebra.truncate import singular_values, truncate
from ..config.schema import RankRule
from ..errors import ZitMergeError
from ..formats import lokr
from ..formats.checkpoint import CheckpointReader
from ..formats.dtypes import DTYPE_NAMES
from ..formats.reader import TensorReader
from ..formats.reading import Reader
from ..planning.types import StepPlan
from ..progress import SILENT, Progress
from .merger import Made, Merged, Merger


class Result:
    """What a step makes; reads like a file of its rank and dtype.

    Args:
        plan: Final.
        readers: Of its inputs, opened.
        device: Where the algebra runs.
        progress: Shows the passes that are needed first.
        merger: What is merged by another way than the step's method.
        workers: How many modules `units` makes at a time.

    Attributes:
        plan: With the ranks that follow from the numbers, if they do.
    """

    def __init__(
        self,
        plan: StepPlan,
        readers: Sequence[Reader],
        device: torch.device,
        progress: Progress = SILENT,
        merger: Merger | None = None,
        workers: int = 1,
    ):
        self._readers, self._merger = readers, merger or Merger(plan, readers, device, progress)
        self._workers = workers
        merged = self._merger.each(progress, f"ranks of {plan.name}")
        self.plan = ranked(plan, merged) if plan.is_open else plan

    def units(self, progress: Progress) -> Iterator[tuple[str, list[Made]]]:
        """(stem of its keys, its modules) of everything that the file holds, in order.

        Args:
            progress: Shows the pass, module by module.
        """
        units = self.plan.form.units(self.plan.shapes)
        stems, made = {modules[-1]: stem for stem, modules in units.items()}, list[Made]()
        order = [m for modules in units.values() for m in modules]
        with contextlib.closing(self._in_order(order)) as ahead:
            for module in progress.track(order, self.plan.name):
                made.append(next(ahead))
                if module in stems:
                    yield stems[module], made
                    made = []

    def _in_order(self, modules: Sequence[str]) -> Generator[Made, None, None]:
        """Each module in its turn; as many at a time as there are workers: threads that share one small product mostly wait for
        each other."""
        if self._workers == 1:
            yield from map(self.made, modules)
            return
        before = torch.get_num_threads()
        torch.set_num_threads(max(1, 2 * before // (self._workers + 1)))  # the check has the last of these shares
        pool = ThreadPoolExecutor(self._workers, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))
        waiting = deque[Future[Made]]()
        try:
            for module in modules:
                waiting.append(pool.submit(self.made, module))
                if len(waiting) > self._workers:  # one waits, so that no worker does
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)

    def made(self, module: str) -> Made:
        """One module.

        Raises:
            ZitMergeError: It is too large for the dtype.
        """
        with full_precision(), self.plan.computing(module):
            return self._made(module)

    def _made(self, module: str) -> Made:
        merged = self._merger.of(module)
        if not self.plan.kept_lokr:
            written = self._finished(merged.delta, module)
            return Made(merged if merged.coefficients is None else merged._replace(delta=None), written)  # parts have it all
        change, strength = self.plan.kept_lokr.changes[module][0], self.plan.inputs[0].strengths[module]
        reader = self._readers[0]
        assert isinstance(reader, TensorReader), "a LoKr that is kept is read from its file"
        tensors = lokr.scaled(change, reader, strength, self.plan.dtype)
        tensors = {name: self._checked(tensor, module) for name, tensor in tensors.items()}
        return Made(merged, lokr.delta(tensors), tensors)

    def answer(self, module: str) -> Merged:
        """One module as the method makes it, at the step's rank, before its factors are rounded."""
        with self.plan.computing(module):
            merged = self._merger.of(module)
            if merged.delta is None or module not in self.plan.cut:
                return merged
            return merged._replace(delta=truncate(merged.delta, self.plan.ranks[module], torch.float32))

    def delta(self, module: str) -> tuple[float, Delta]:
        """1.0 and the change as the file would hold it; see `Reader`."""
        return 1.0, self.made(module).written

    def _finished(self, delta: Delta | None, module: str) -> Factors:
        """The factors at the file's rank, in its dtype, on the CPU."""
        rank, (out, into), dtype = self.plan.ranks[module], self.plan.shapes[module], self.plan.dtype
        if delta is None:
            return Factors(torch.zeros(out, rank, dtype=dtype), torch.zeros(rank, into, dtype=dtype))
        sums = torch.float64 if dtype == torch.float32 else torch.float32  # beside the rounding of 16 bits
        changes = [truncate(delta, rank, sums)] if delta.rank > rank else [p.expand() for p in parts(delta)]
        rounded = stack([to_dtype(factors, dtype) for factors in changes])
        return pad(rounded.map(lambda t: self._checked(t.cpu(), module)), rank)

    def _checked(self, tensor: Tensor, module: str) -> Tensor:
        if not is_finite(tensor):
            cure = "save it as bf16 or fp32" if self.plan.dtype == torch.float16 else "use smaller strengths"
            raise ZitMergeError(f"{self.plan.path.name}: {module} is too large for {DTYPE_NAMES[self.plan.dtype]}: {cure}")
        return tensor


def ranked(plan: StepPlan, merged: Iterable[Merged]) -> StepPlan:
    """A second plan with the ranks that follow from the singular values of all modules.

    Args:
        plan: The first one, whose ranks are bounds.
        merged: Every module that it writes.
    """
    rule, spectra, total = plan.spec.rank_rule or RankRule(), dict[str, torch.Tensor](), 0.0
    with CheckpointReader(plan.weights) if plan.weights else contextlib.nullcontext() as weights:
        lengths = {m: weights.norm(m) for m in plan.shapes if m in weights} if weights else {}

    def fits(chosen: Mapping[str, int]) -> bool:
        return plan.revised(chosen).bytes <= (rule.size_mb or 0.0) * 1e6

    for module, _, _, delta in merged:
        spectra[module] = torch.zeros(1, dtype=torch.float64)
        if delta is not None:
            with plan.computing(module):
                spectra[module] = singular_values(delta, plan.ranks[module]).cpu() / lengths.get(module, 1.0)
            total += (norm(delta) / lengths.get(module, 1.0)) ** 2
    costs, least = {module: sum(plan.shapes[module]) for module in spectra}, plan.form.least_ranks(plan.shapes)
    if rule.size_mb:
        chosen = ranks.ranks_that_fit(spectra, costs, fits, least)
    elif plan.spec.save.uniform:
        chosen = dict.fromkeys(spectra, ranks.common_rank(spectra, rule.energy or 1.0, total))
    else:
        chosen = ranks.ranks_of_energy(spectra, costs, rule.energy or 1.0, total, least)
    return plan.revised(chosen)
