"""How strong the inputs of a step are at strength 1, module by module, and its result: what the page's maps are made of."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack

import torch

from ...algebra.delta import Delta
from ...algebra.products import gram, norm
from ...analysis.measure import ModuleProducts, Readers
from ...formats.reader import load_lora
from ...formats.verdict import PAIRS_UP_TO
from ...merging.made import Done
from ...merging.opened import open_input
from ...model.zimage import MODULES
from ...planning.types import StepPlan
from ...progress import SILENT, Progress

LABEL = "page"  # of the passes, for people


def of_inputs(done: Done, progress: Progress = SILENT) -> dict[str, ModuleProducts]:
    """Module -> products of the inputs of a step; what its check did not measure is read from the files.

    Args:
        done: The step, its inputs still there.
        progress: Shows the modules that are read, and may stop the pass.

    Raises:
        ZitMergeError: An input can't be read.
    """
    plan, measured = done.plan, done.verdict.modules if done.verdict else {}
    present = {m: tuple(n for n, i in enumerate(plan.inputs) if m in i.known.ranks) for m in MODULES}
    known = {
        m: ModuleProducts(p, measured[m].energies, measured[m].gram)
        for m, p in present.items()
        if m in measured and measured[m].inputs == p
    }
    missing = [m for m, inputs in present.items() if inputs and m not in known]
    return known | (_read(plan, missing, progress) if missing else {})


def _read(plan: StepPlan, modules: Collection[str], progress: Progress) -> dict[str, ModuleProducts]:
    with ExitStack() as files:
        readers = [open_input(i, files) for i in plan.inputs]
        found = {}
        for module in progress.track(modules, LABEL):
            deltas = {}
            for n, (i, reader) in enumerate(zip(plan.inputs, readers, strict=True)):
                if module in i.known.ranks:
                    scale, stored = reader.delta(module)
                    deltas[n] = stored.times(scale)
            found[module] = _products(deltas)
        return found


def _products(deltas: Mapping[int, Delta]) -> ModuleProducts:
    if len(deltas) > PAIRS_UP_TO:
        return ModuleProducts(tuple(deltas), torch.tensor([norm(d) ** 2 for d in deltas.values()], dtype=torch.float64), None)
    found = gram(list(deltas.values()), torch.float32)
    return ModuleProducts(tuple(deltas), found.diagonal().clamp(min=0), found)


def of_result(done: Done, progress: Progress = SILENT) -> Mapping[str, float]:
    """Module -> squared norm of a step's result.

    Args:
        done: The step, its file still there.
        progress: Shows the modules that are read, and may stop the pass.

    Raises:
        ZitMergeError: The file can't be read.
    """
    if done.verdict and done.verdict.modules:
        return {m: measured.written for m, measured in done.verdict.modules.items()}
    with Readers([load_lora(done.path)]) as readers:
        return {module: norm(readers.deltas(module)[0]) ** 2 for module in progress.track(list(done.plan.shapes), LABEL)}
