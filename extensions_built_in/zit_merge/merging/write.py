"""One step into its file, module by module: read, merge, truncate, round, check, write.

Memory stays at a few modules of every input, one that is merged and those that are checked beside it, whatever the size of the
files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from ..algebra.methods import METHODS
from ..algebra.precision import full_precision
from ..formats import lokr
from ..formats.forms import fuse
from ..formats.reader import LoraFile
from ..formats.safetensors_writer import SafetensorsWriter
from ..planning.types import StepPlan
from ..progress import Progress
from .extraction import beyond_loras, extraction_remarks
from .fallback import else_on_cpu
from .made import Done, Hashes
from .merger import Made
from .opened import open_input
from .results import Result
from .verify import Verifier

_AT_ONCE = 1024  # components of the modules that are merged at a time: some 0.8 GB in the core space
_WORKERS = 4  # the check, one module after the other, keeps up with so many
_KEPT = 31 << 20  # bytes: just below the largest block from which glibc learns


def write_step(plan: StepPlan, steps: Mapping[Path, LoraFile], hashes: Hashes, device: torch.device, progress: Progress) -> Done:
    """Makes a step's file; on the CPU from the start again where a GPU runs out of memory.

    Args:
        plan: Final.
        steps: Path -> file of the steps that are done; those that it uses are among them.
        hashes: Of `plan.hashed`.
        device: Where the algebra runs.
        progress: Shows how far it is.

    Raises:
        ZitMergeError: With no part of the file left behind.
    """
    done, remarks = else_on_cpu(lambda on: _write_step(plan, steps, hashes, on, progress), device)
    return done._replace(remarks=(*remarks, *done.remarks))


def _write_step(plan: StepPlan, steps: Mapping[Path, LoraFile], hashes: Hashes, device: torch.device, progress: Progress) -> Done:
    with threads_for(plan, device) as workers, full_precision(), contextlib.ExitStack() as files:
        readers = [open_input(i, files, steps.get(i.path)) for i in plan.inputs]
        result = Result(plan, readers, device, progress, workers=workers)
        plan, write = result.plan, _write_lokr if plan.kept_lokr else write_lora
        with SafetensorsWriter(plan.path, plan.layout, plan.draft, publish=plan.spec.keep) as out:
            with Verifier(plan) as verifier:
                write(result, out, verifier.add, progress)
            beyond = beyond_loras(readers)
            files.close()  # raises if an input was changed; and Windows replaces no open file
            verdict = verifier.verdict()
            metadata = plan.metadata(hashes.of(plan.hashed)) | verdict.metadata()
            path = out.finish(metadata)
    return Done(plan, path, True, verdict, remarks=extraction_remarks(plan, verdict, beyond, path))


@contextlib.contextmanager
def threads_for(plan: StepPlan, device: torch.device) -> Iterator[int]:
    """Half of torch's threads for each of merge and check, which run beside each other: threads that wait for a core cost time.
    One where nothing is decomposed: copying and scaling waits for memory. The memory of a module is kept for the next one.

    Args:
        plan: The step.
        device: Where the algebra runs.

    Yields:
        How many modules are merged at a time. One on a GPU, and where a module takes much memory.
    """
    _keep_freed_memory()
    before = torch.get_num_threads()
    is_exact = not plan.cut and not plan.is_open and METHODS[plan.spec.method].is_linear
    whole = [plan, *_nested(plan)]
    is_alone = is_exact or device.type != "cpu" or any(i.pair or i.model for p in whole for i in p.inputs)
    largest = max((1, *(n for p in whole for n in p.stacked.values())))
    workers = 1 if is_alone else max(1, min(before, _WORKERS, _AT_ONCE // largest))
    torch.set_num_threads(1 if is_exact else max(1, before // 2))
    try:
        yield workers
    finally:
        torch.set_num_threads(before)


def _keep_freed_memory() -> None:
    """Has glibc keep what one module frees for the next one, for the rest of the process: twice the largest block that was ever
    freed, 64 MB at most. Else it may hand the memory of every module back to the system, which clears it each time.
    """
    torch.empty(_KEPT, dtype=torch.uint8)  # never touched, so that no memory is behind it


def _nested(plan: StepPlan) -> Iterator[StepPlan]:
    """The earlier steps that it uses: a measure computes those whose files are not there along with it."""
    for i in plan.inputs:
        if i.step:
            yield i.step
            yield from _nested(i.step)


def write_lora(result: Result, out: SafetensorsWriter, add: Callable[[Made], object], progress: Progress) -> None:
    """Writes what a step makes, module by module.

    Args:
        result: Of the step.
        out: Open, with the layout of the step's plan.
        add: Called with each module before it is written.
        progress: Shows how far it is.
    """
    form, ranks = result.plan.form, result.plan.ranks
    if form.alpha:
        for stem, modules in form.units(ranks).items():
            out.write(f"{stem}.alpha", torch.tensor(float(sum(ranks[m] for m in modules))))
    for stem, made in result.units(progress):
        for one in made:
            add(one)
        whole = fuse([one.written.expand() for one in made])
        out.write(stem + form.down, whole.down)
        out.write(stem + form.up, whole.up)


def _write_lokr(result: Result, out: SafetensorsWriter, add: Callable[[Made], object], progress: Progress) -> None:
    """Writes a LoKr that stays one."""
    changes = result.plan.kept_lokr.changes if result.plan.kept_lokr else {}
    for key, module in lokr.alpha_keys(changes).items():
        out.write(key, torch.tensor(lokr.alpha(changes[module][0])))
    for _, (made,) in result.units(progress):
        for key, tensor in lokr.named(made.merged.module, made.tensors):
            out.write(key, tensor)
        add(made)
