"""Plan -> files, one module at a time: read, merge, truncate, round, write.

Memory stays at a few modules of every input, one that is merged and those that are checked beside it, whatever the size of the
files. The inputs are hashed in threads meanwhile.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..algebra import ranks
from ..algebra.delta import Delta, norm
from ..algebra.factors import Factors, is_finite, pad
from ..algebra.methods import METHODS
from ..algebra.rounding import to_dtype
from ..algebra.truncate import singular_values, truncate
from ..errors import ZitMergeError
from ..files.atomic import copy_file, open_exclusively, part_path
from ..formats import lokr, writer
from ..formats.metadata import CHECK_KEY, OF_RANKS
from ..formats.reader import TensorReader, load_lora, tensor_hash
from ..planning.plan import DTYPE_NAMES, Input, StepPlan, settle
from .merger import Merger, Reader, Watched
from .verify import Audit, Verdict

Tick = Callable[[StepPlan, int], None]  # called after each module with the number done; may raise to stop
# Passes the modules of a pass before the merge on one by one, with the step and what is looked at; may raise to stop.
Passing = Callable[[StepPlan, str, Sequence[str]], Iterable[str]]


class Done(NamedTuple):
    """A step that is done.

    Attributes:
        plan: As it was run, its ranks settled.
        path: Its file.
        made: Whether it was made now; else it was there already, from the same recipe.
        verdict: What the check of the file found, now or when it was made; None for a file that does not say.
    """

    plan: StepPlan
    path: Path
    made: bool
    verdict: Verdict | None = None


def run_plans(
    plans: Sequence[StepPlan], device: torch.device, tick: Tick = lambda plan, done: None, passing: Passing | None = None
) -> Iterator[Done]:
    """Runs the steps in order; a step whose file is there from the same recipe is not made again.

    Args:
        plans: Final plans of one section.
        device: Where the algebra runs.
        tick: Progress, and the place to stop from.
        passing: The same where all modules are looked at before the merge; None calls `tick` with 0 after each.

    Yields:
        Each step when it is done. Files of steps that are not kept are gone at the end.

    Raises:
        ZitMergeError: With no part of the failing step's file left behind.
    """
    passing = passing or _ticking(tick)
    for plan in plans:
        _clear(part_path(plan.path))
    with contextlib.ExitStack() as cleanup:
        pool = ThreadPoolExecutor(max_workers=2)
        cleanup.callback(pool.shutdown, cancel_futures=True)
        hashes = {path: pool.submit(tensor_hash, path) for path in dict.fromkeys(p for plan in plans for p in plan.hashed)}
        there = {plan.name for plan in plans if plan.spec.keep and _is_made(plan, hashes, plan.path)}
        wanted = _to_make(plans, there)
        settled: dict[str, StepPlan] = {}
        for plan in plans:
            plan, path, verdict = _renewed(plan, settled), plan.output_path, None
            if plan.name in wanted:
                plan, path, verdict = _run(plan, hashes, device, tick, passing)
            settled[plan.name] = plan
            if not plan.spec.keep:
                cleanup.callback(path.unlink, missing_ok=True)
            elif plan.spec.copy_to and (plan.name in wanted or not _is_made(plan, hashes, plan.targets()[1])):
                copy_file(path, Path(plan.spec.copy_to).expanduser())
            if plan.spec.keep or plan.name in wanted:
                yield Done(plan, path, plan.name in wanted, verdict or Verdict.read(load_lora(path).metadata))


class Computed:
    """What a step would write, module by module, without a file; read like one.

    Args:
        plan: Final.
        readers: Of its inputs.
        device: Where the algebra runs.
        watched: Passes the modules of a pass over all of them on one by one; may raise to stop.
    """

    def __init__(self, plan: StepPlan, readers: Sequence[Reader], device: torch.device, watched: Watched = iter):
        self._readers, self._merger = readers, Merger(plan, readers, device, watched)
        self.plan = _with_ranks(plan, self._merger, watched)

    def delta(self, module: str) -> tuple[float, Delta]:
        """1.0 and the factors as the file would hold them."""
        merger, plan = self._merger, self.plan
        if plan.kept:
            written = lokr.weighed(plan.kept.changes[module][0], self._readers[0], plan.inputs[0].strengths[module], plan.dtype)
            return 1.0, lokr.delta(written)
        return 1.0, _finish(merger.merged(module, merger.deltas(module), merger.factors(module)), plan, module)


def reader_of(
    plan: StepPlan,
    hashes: Mapping[Path, Future[str]],
    device: torch.device,
    files: contextlib.ExitStack,
    watched: Watched = iter,
) -> Reader:
    """Reads a step's result: from its file where that is there from the same recipe, else computed.

    Args:
        plan: Final.
        hashes: Of `plan.hashed`.
        device: Where the algebra runs.
        files: Closes the files.
        watched: Passes the modules of a pass before on one by one; may raise to stop.
    """
    if plan.spec.keep and _is_made(plan, hashes, plan.path):
        return files.enter_context(TensorReader(load_lora(plan.path)))
    readers = [input_reader(i, hashes, device, files, watched) for i in plan.inputs]
    if any(i.step and _follows_from_numbers(i.step) for i in plan.inputs):  # known now, as in `_renewed`
        plan = settle(replace(plan, inputs=tuple(map(_known, plan.inputs, readers))))
    return Computed(plan, readers, device, watched)


def _known(i: Input, reader: Reader) -> Input:
    """An input as its reader found it: an earlier step with the ranks that it came out with."""
    if not i.step:
        return i
    if isinstance(reader, Computed):
        return replace(i, step=reader.plan, outline=reader.plan.outline)
    return replace(i, outline=replace(i.step.outline, ranks=load_lora(i.step.path).ranks))


def input_reader(
    i: Input, hashes: Mapping[Path, Future[str]], device: torch.device, files: contextlib.ExitStack, watched: Watched = iter
) -> Reader:
    """Reads an input of a step: its file, or what an earlier step makes; arguments as `reader_of`."""
    return files.enter_context(TensorReader(i.lora)) if i.lora else reader_of(i.step, hashes, device, files, watched)


def _renewed(plan: StepPlan, settled: Mapping[str, StepPlan]) -> StepPlan:
    """The plan over the earlier steps as they came out: a rank that followed from the numbers is known now."""

    def renewed(i: Input) -> Input:
        if not i.step or not settled[i.step.name].output_path.is_file():
            return i
        step = settled[i.step.name]
        lora = load_lora(step.output_path)  # of a step that was kept, the plan does not know the ranks
        return replace(i, step=step, outline=replace(step.outline, ranks=lora.ranks))

    if not any(i.step and _follows_from_numbers(i.step) for i in plan.inputs):
        return plan
    return settle(replace(plan, inputs=tuple(map(renewed, plan.inputs))))


def _follows_from_numbers(plan: StepPlan) -> bool:
    return plan.is_open or any(i.step and _follows_from_numbers(i.step) for i in plan.inputs)


def _is_made(plan: StepPlan, hashes: Mapping[Path, Future[str]], path: Path) -> bool:
    """Whether a file is the step's output, whole, and made by this recipe with this version."""
    if not path.is_file():
        return False
    try:
        found = load_lora(path).metadata
    except ZitMergeError:
        return False
    wanted = plan.metadata({path: hashes[path].result() for path in plan.hashed})
    open_keys = {CHECK_KEY, *(OF_RANKS if _follows_from_numbers(plan) else ())}
    return {k: v for k, v in found.items() if k not in open_keys} == {k: v for k, v in wanted.items() if k not in open_keys}


def made(plan: StepPlan) -> Done | None:
    """A step whose file is there from the same recipe.

    Args:
        plan: Final.
    """
    with ThreadPoolExecutor(max_workers=2) as pool:
        hashes = {path: pool.submit(tensor_hash, path) for path in plan.hashed}
        is_made = plan.spec.keep and _is_made(plan, hashes, plan.path)
    return Done(plan, plan.path, False, Verdict.read(load_lora(plan.path).metadata)) if is_made else None


def _to_make(plans: Sequence[StepPlan], there: Collection[str]) -> set[str]:
    """The steps to run: those whose file is not there, and the unkept ones that they use."""
    wanted: set[str] = set()
    for plan in reversed(plans):
        if plan.name in wanted or (plan.spec.keep and plan.name not in there):
            wanted |= {plan.name, *(i.step.name for i in plan.inputs if i.step and i.step.name not in there)}
    return wanted


def _ticking(tick: Tick) -> Passing:
    def passing(plan: StepPlan, what: str, modules: Sequence[str]) -> Iterator[str]:
        for module in modules:
            yield module
            tick(plan, 0)

    return passing


def _run(
    plan: StepPlan, hashes: Mapping[Path, Future[str]], device: torch.device, tick: Tick, passing: Passing
) -> tuple[StepPlan, Path, Verdict]:
    with _threads(plan), contextlib.ExitStack() as files:
        readers = [files.enter_context(TensorReader(i.lora or load_lora(i.path))) for i in plan.inputs]
        merger = Merger(plan, readers, device, partial(passing, plan, "angles"))
        plan = _with_ranks(plan, merger, partial(passing, plan, "ranks"))
        audit = Audit([i.spec.ratio for i in plan.inputs], plan.dtype, plan.cut)
        with writer.LoraWriter(plan.path, plan.layout(), plan.draft) as out:
            if plan.kept:
                _weigh(plan, readers[0], merger, out, audit, tick)
            else:
                _write(plan, merger, out, audit, tick)
            files.close()  # Windows replaces no file that is mapped
            verdict = audit.verdict()
            metadata = plan.metadata({path: hashes[path].result() for path in plan.hashed}) | verdict.metadata()
            return plan, out.finish(metadata, publish=plan.spec.keep), verdict


def _with_ranks(plan: StepPlan, merger: Merger, watched: Watched) -> StepPlan:
    """Settles a rank that follows from the singular values of all modules."""
    if not plan.is_open:
        return plan
    rule, spectra, total = plan.spec.rank, {}, 0.0
    for module in watched(list(plan.shapes)):
        merged = merger.merged(module, merger.deltas(module), merger.factors(module))
        spectra[module] = torch.zeros(1, dtype=torch.float64)
        if merged is not None:
            spectra[module] = singular_values(merged, plan.ranks[module]).cpu()
            total += norm(merged) ** 2
    costs = {module: sum(plan.shapes[module]) for module in spectra}
    if rule.size_mb:
        chosen = ranks.ranks_that_fit(spectra, costs, lambda r: settle(plan, r).bytes <= rule.size_mb * 1e6)
    elif plan.spec.save.uniform:
        chosen = dict.fromkeys(spectra, ranks.common_rank(spectra, rule.energy, total))
    else:
        chosen = ranks.ranks_of_energy(spectra, costs, rule.energy, total)
    return settle(plan, chosen)


def _write(plan: StepPlan, merger: Merger, out: writer.LoraWriter, audit: Audit, tick: Tick) -> None:
    """Merges, checks and writes module after module."""
    form, done = plan.form, 0
    units = form.units(plan.shapes)
    if form.alpha:
        for stem, modules in units.items():
            out.write(f"{stem}.alpha", torch.tensor(float(sum(plan.ranks[m] for m in modules))))
    with _Checker(audit) as checker:
        for stem, modules in units.items():
            whole = writer.fuse([_module(plan, merger, checker, module) for module in modules])
            out.write(stem + form.down, whole.down)
            out.write(stem + form.up, whole.up)
            del whole  # it may be a view of an input's mapped file, which a caller's traceback would keep open
            done += len(modules)
            tick(plan, done)


def _module(plan: StepPlan, merger: Merger, checker: _Checker, module: str) -> Factors:
    """One module, merged and handed to the check."""
    deltas, factors = merger.deltas(module), merger.factors(module)
    merged = merger.merged(module, deltas, factors)
    written = _finish(merged, plan, module)
    checker.add(module, deltas, factors, merged, written)
    return written


class _Checker:
    """Checks modules in a thread of its own while the next ones are merged and written; `add` is the audit's."""

    def __init__(self, audit: Audit):
        self._audit, self._pool = audit, ThreadPoolExecutor(max_workers=1)
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> _Checker:
        return self

    def add(self, *module: Any) -> None:
        """Hands a module over; waits while one is pending, so that memory stays at three modules."""
        self._pending.append(self._pool.submit(self._audit.add, *module))
        if len(self._pending) > 1:
            self._pending.popleft().result()

    def __exit__(self, kind: type | None, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        for future in () if kind else self._pending:
            future.result()


def _weigh(plan: StepPlan, reader: TensorReader, merger: Merger, out: writer.LoraWriter, audit: Audit, tick: Tick) -> None:
    """Writes a LoKr that stays one."""
    lora, strengths = plan.kept, plan.inputs[0].strengths
    for key, (_, shape) in plan.layout().items():
        if shape == ():
            module = key.removeprefix(writer.FORMS["ai-toolkit"].prefix).removesuffix(".alpha")
            out.write(key, torch.tensor(lokr.alpha(lora.changes[module][0])))
    for done, module in enumerate(lora, 1):
        written = lokr.weighed(lora.changes[module][0], reader, strengths[module], plan.dtype)
        for key, tensor in lokr.tensors(module, written):
            out.write(key, _checked(tensor, plan, module))
        deltas, factors = merger.deltas(module), merger.factors(module)
        audit.add(module, deltas, factors, merger.merged(module, deltas, factors), lokr.delta(written))
        tick(plan, done)


@contextlib.contextmanager
def _threads(plan: StepPlan) -> Iterator[None]:
    """One torch thread where nothing is truncated: copying and scaling waits for memory, and threads that wait for each other
    beside the hashes only cost time."""
    before = torch.get_num_threads()
    if not plan.cut and not plan.is_open and METHODS[plan.spec.method].is_linear:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _finish(merged: Delta | None, plan: StepPlan, module: str) -> Factors:
    """The factors as they are written: at the file's rank, in its dtype, on the CPU."""
    rank, (out, into) = plan.ranks[module], plan.shapes[module]
    if merged is None:
        return Factors(torch.zeros(out, rank, dtype=plan.dtype), torch.zeros(rank, into, dtype=plan.dtype))
    factors = truncate(merged, rank) if merged.rank > rank else merged.expand()
    rounded = to_dtype(factors, plan.dtype)
    return pad(rounded.map(lambda t: _checked(t.cpu(), plan, module)), rank)


def _checked(tensor: Tensor, plan: StepPlan, module: str) -> Tensor:
    if not is_finite(tensor):
        name = DTYPE_NAMES[plan.dtype]
        cure = "save it as bf16 or fp32" if plan.dtype == torch.float16 else "use smaller strengths"
        raise ZitMergeError(f"{plan.path.name}: {module} is too large for {name}: {cure}")
    return tensor


def _clear(part: Path) -> None:
    """Removes what a killed run left; a part file that another run is writing stays and stops this one when its turn comes."""
    if part.is_file():
        with contextlib.suppress(ZitMergeError):
            open_exclusively(part).close()
            part.unlink()


def pick_device(name: str) -> torch.device:
    """The device of `device:`. `auto` is the first CUDA GPU, else the CPU; on MPS the algebra runs on the CPU (no float64).

    Raises:
        ZitMergeError: torch does not see the device that was named.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ZitMergeError(f"device: {name}: torch sees {torch.cuda.device_count()} CUDA GPUs here: use auto or cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ZitMergeError("device: mps: torch sees no Apple GPU here: use auto or cpu")
    return device
