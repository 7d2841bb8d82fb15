"""Plan -> files, one module at a time: read, merge, truncate, round, write.

Memory stays at one module of every input, whatever the size of the files. The inputs are hashed in threads meanwhile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from .algebra.factors import Factors, is_finite, pad, scale
from .algebra.methods import METHODS
from .algebra.rounding import to_dtype
from .algebra.truncate import truncate
from .errors import ZitMergeError
from .formats import writer
from .formats.reader import LoraFile, TensorReader, load_lora
from .plan import DTYPE_NAMES, StepPlan

Tick = Callable[[StepPlan, int], None]  # called after each module with the number done; may raise to stop


def run_plans(
    plans: Sequence[StepPlan], device: torch.device, tick: Tick = lambda plan, done: None
) -> Iterator[tuple[StepPlan, Path]]:
    """Runs the steps in order and yields each one with its file; steps that are not kept are gone at the end.

    Args:
        plans: Final plans of one section.
        device: Where the algebra runs.
        tick: Progress, and the place to stop from.

    Raises:
        ZitMergeError: With no part of the failing step's file left behind.
    """
    for plan in plans:
        _clear(writer.part_path(plan.path))
    hashes: dict[Path, Future[str]] = {}
    with contextlib.ExitStack() as cleanup:
        pool = ThreadPoolExecutor(max_workers=2)
        cleanup.callback(pool.shutdown, cancel_futures=True)
        for plan in plans:
            for source in plan.hashed:
                if source not in hashes:
                    hashes[source] = pool.submit(LoraFile(source, {}, {}).sha256)
            path = _run(plan, hashes, device, tick)
            if not plan.spec.keep:
                cleanup.callback(path.unlink, missing_ok=True)
            elif plan.spec.copy_to:
                writer.copy_file(path, Path(plan.spec.copy_to).expanduser())
            yield plan, path


def _run(plan: StepPlan, hashes: Mapping[Path, Future[str]], device: torch.device, tick: Tick) -> Path:
    loras = [i.lora or load_lora(i.path) for i in plan.inputs]
    with _threads(plan), contextlib.ExitStack() as files:
        readers = [files.enter_context(TensorReader(lora)) for lora in loras]
        with writer.LoraWriter(plan.path, plan.layout(), plan.draft) as out:
            for module in plan.shapes:
                out.write(writer.alpha_key(module), torch.tensor(float(plan.rank)))
            for done, module in enumerate(plan.shapes, 1):
                merged = _finish(_merge(plan, module, loras, readers, device), plan, module)
                out.write(writer.down_key(module), merged.down)
                out.write(writer.up_key(module), merged.up)
                tick(plan, done)
            files.close()  # Windows replaces no file that is mapped
            return out.finish(plan.metadata({path: hashes[path].result() for path in plan.hashed}), publish=plan.spec.keep)


@contextlib.contextmanager
def _threads(plan: StepPlan) -> Iterator[None]:
    """One torch thread where nothing is truncated: copying and scaling waits for memory, and threads that wait for each other
    beside the hashes only cost time."""
    before = torch.get_num_threads()
    if max(plan.stacked.values()) <= plan.rank:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _merge(
    plan: StepPlan, module: str, loras: Sequence[LoraFile], readers: Sequence[TensorReader], device: torch.device
) -> Factors | None:
    """The method's answer for one module; None where no input changes it."""
    deltas = []
    for i, lora, reader in zip(plan.inputs, loras, readers, strict=True):
        if i.counts(module):
            stored = reader.factors(module)
            deltas.append(
                scale(Factors(stored.up.to(device), stored.down.to(device)), i.strengths[module] * lora.pairs[module].scale)
            )
    return METHODS[plan.spec.method](deltas, **plan.spec.params) if deltas else None


def _finish(merged: Factors | None, plan: StepPlan, module: str) -> Factors:
    """The factors as they are written: at the file's rank, in its dtype, on the CPU."""
    out, into = plan.shapes[module]
    if merged is None:
        return Factors(torch.zeros(out, plan.rank, dtype=plan.dtype), torch.zeros(plan.rank, into, dtype=plan.dtype))
    if merged.rank > plan.rank:
        merged = truncate(merged, plan.rank)
    rounded = to_dtype(merged, plan.dtype)
    if not (is_finite(rounded.up) and is_finite(rounded.down)):
        name = DTYPE_NAMES[plan.dtype]
        cure = "save it as bf16 or fp32" if plan.dtype == torch.float16 else "use smaller strengths"
        raise ZitMergeError(f"{plan.path.name}: {module} is too large for {name}: {cure}")
    return pad(Factors(rounded.up.cpu(), rounded.down.cpu()), plan.rank)


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
