"""Plan -> files, one module at a time: read, merge, truncate, round, write.

Memory stays at one module of every input, whatever the size of the files. The inputs are hashed in threads meanwhile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from .algebra.delta import Delta
from .algebra.factors import Factors, is_finite, pad
from .algebra.methods import METHODS
from .algebra.rounding import to_dtype
from .algebra.truncate import truncate
from .errors import ZitMergeError
from .formats import lokr, writer
from .formats.reader import TensorReader, load_lora, tensor_hash
from .plan import DTYPE_NAMES, StepPlan

Tick = Callable[[StepPlan, int], None]  # called after each module with the number done; may raise to stop


def run_plans(
    plans: Sequence[StepPlan], device: torch.device, tick: Tick = lambda plan, done: None
) -> Iterator[tuple[StepPlan, Path, bool]]:
    """Runs the steps in order; a step whose file is there from the same recipe is not made again.

    Args:
        plans: Final plans of one section.
        device: Where the algebra runs.
        tick: Progress, and the place to stop from.

    Yields:
        (plan, its file, whether it was made now). Files of steps that are not kept are gone at the end.

    Raises:
        ZitMergeError: With no part of the failing step's file left behind.
    """
    for plan in plans:
        _clear(writer.part_path(plan.path))
    with contextlib.ExitStack() as cleanup:
        pool = ThreadPoolExecutor(max_workers=2)
        cleanup.callback(pool.shutdown, cancel_futures=True)
        hashes = {path: pool.submit(tensor_hash, path) for path in dict.fromkeys(p for plan in plans for p in plan.hashed)}
        there = {plan.name for plan in plans if plan.spec.keep and _is_made(plan, hashes, plan.path)}
        wanted = _to_make(plans, there)
        for plan in plans:
            path = _run(plan, hashes, device, tick) if plan.name in wanted else plan.lies_at
            if not plan.spec.keep:
                cleanup.callback(path.unlink, missing_ok=True)
            elif plan.spec.copy_to and (plan.name in wanted or not _is_made(plan, hashes, plan.targets()[1])):
                writer.copy_file(path, Path(plan.spec.copy_to).expanduser())
            if plan.spec.keep or plan.name in wanted:
                yield plan, path, plan.name in wanted


def _is_made(plan: StepPlan, hashes: Mapping[Path, Future[str]], path: Path) -> bool:
    """Whether a file is the step's output, whole, and made by this recipe with this version."""
    if not path.is_file():
        return False
    try:
        found = load_lora(path).metadata
    except ZitMergeError:
        return False
    return found == plan.metadata({path: hashes[path].result() for path in plan.hashed})


def _to_make(plans: Sequence[StepPlan], there: Collection[str]) -> set[str]:
    """The steps to run: those whose file is not there, and the unkept ones that they use."""
    wanted: set[str] = set()
    for plan in reversed(plans):
        if plan.name in wanted or (plan.spec.keep and plan.name not in there):
            wanted |= {plan.name, *(i.step.name for i in plan.inputs if i.step and i.step.name not in there)}
    return wanted


def _run(plan: StepPlan, hashes: Mapping[Path, Future[str]], device: torch.device, tick: Tick) -> Path:
    with _threads(plan), contextlib.ExitStack() as files:
        readers = [files.enter_context(TensorReader(i.lora or load_lora(i.path))) for i in plan.inputs]
        with writer.LoraWriter(plan.path, plan.layout(), plan.draft) as out:
            if plan.kept:
                _weigh(plan, readers[0], out, tick)
            else:
                _write(plan, readers, device, out, tick)
            files.close()  # Windows replaces no file that is mapped
            return out.finish(plan.metadata({path: hashes[path].result() for path in plan.hashed}), publish=plan.spec.keep)


def _write(plan: StepPlan, readers: Sequence[TensorReader], device: torch.device, out: writer.LoraWriter, tick: Tick) -> None:
    """Merges and writes module after module."""
    form, done = plan.form, 0
    units = form.units(plan.shapes)
    if form.alpha:
        for stem, modules in units.items():
            out.write(f"{stem}.alpha", torch.tensor(float(sum(plan.ranks[m] for m in modules))))
    for stem, modules in units.items():
        merged = writer.fuse([_finish(_merge(plan, module, readers, device), plan, module) for module in modules])
        out.write(stem + form.down, merged.down)
        out.write(stem + form.up, merged.up)
        done += len(modules)
        tick(plan, done)


def _weigh(plan: StepPlan, reader: TensorReader, out: writer.LoraWriter, tick: Tick) -> None:
    """Writes a LoKr that stays one."""
    lora, strengths = plan.kept, plan.inputs[0].strengths
    for key, (_, shape) in plan.layout().items():
        if shape == ():
            module = key.removeprefix(writer.FORMS["ai-toolkit"].prefix).removesuffix(".alpha")
            out.write(key, torch.tensor(lokr.alpha(lora.changes[module][0])))
    for done, module in enumerate(lora, 1):
        for key, tensor in lokr.tensors(lora, reader, module, strengths[module], plan.dtype):
            out.write(key, _checked(tensor, plan, module))
        tick(plan, done)


@contextlib.contextmanager
def _threads(plan: StepPlan) -> Iterator[None]:
    """One torch thread where nothing is truncated: copying and scaling waits for memory, and threads that wait for each other
    beside the hashes only cost time."""
    before = torch.get_num_threads()
    if max(plan.stacked.values()) <= plan.rank or plan.kept:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _merge(plan: StepPlan, module: str, readers: Sequence[TensorReader], device: torch.device) -> Delta | None:
    """The method's answer for one module; None where no input changes it."""
    deltas = []
    for i, reader in zip(plan.inputs, readers, strict=True):
        if i.counts(module):
            alpha_over_rank, stored = reader.delta(module)
            deltas.append(stored.map(lambda t: t.to(device)).times(i.strengths[module] * alpha_over_rank))
    return METHODS[plan.spec.method](deltas, **plan.spec.params) if deltas else None


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
            writer.open_exclusively(part).close()
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
