"""How strong the inputs of a merge are at strength 1, module by module: what the page's maps and predictions are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...algebra.delta import Delta, gram, norm
from ...analysis.compare import Readers, Watched
from ...formats.reader import LoraFile, load_lora
from ...merging.made import Done
from ...merging.verify import PAIRS_UP_TO
from ...model.zimage import MODULES


class Cell(NamedTuple):
    """One module of n LoRAs.

    Attributes:
        inputs: The LoRAs that change it, by their numbers.
        energies: (n,) squared Frobenius norms at strength 1, alpha folded in; not finite where a file is broken.
        gram: (n, n) their inner products; None for more than 64 LoRAs.
    """

    inputs: tuple[int, ...]
    energies: Tensor
    gram: Tensor | None


def survey_files(loras: Sequence[LoraFile], watched: Watched = iter) -> dict[str, Cell]:
    """Module -> what LoRA files have there.

    Args:
        loras: The files.
        watched: Passes the modules on one by one, such as a progress bar.
    """
    return _survey(loras, [m for m in MODULES if any(m in lora for lora in loras)], watched)


def survey_step(done: Done, watched: Watched = iter) -> dict[str, Cell]:
    """Module -> what the inputs of a step have there; what its check did not measure is read from the files.

    Args:
        done: The step, its inputs still there.
        watched: Passes the modules that are read on one by one; may raise to stop.
    """
    plan, measured = done.plan, done.verdict.modules if done.verdict else {}
    present = {m: tuple(n for n, i in enumerate(plan.inputs) if m in i.known.ranks) for m in MODULES}
    known = {
        m: Cell(measured[m].inputs, measured[m].energies, measured[m].gram)
        for m, p in present.items()
        if m in measured and measured[m].inputs == p
    }
    missing = [m for m, inputs in present.items() if inputs and m not in known]
    return known | (_survey([i.lora or load_lora(i.path) for i in plan.inputs], missing, watched) if missing else {})


def _survey(loras: Sequence[LoraFile], modules: Sequence[str], watched: Watched) -> dict[str, Cell]:
    found = {}
    with Readers(loras) as readers:
        for module in watched(modules):
            found[module] = _cell(readers.deltas(module))
    return found


def written(done: Done, watched: Watched = iter) -> Mapping[str, float]:
    """Module -> squared norm of a step's result.

    Args:
        done: The step, its file still there.
        watched: Passes the modules that are read on one by one; may raise to stop.
    """
    if done.verdict and done.verdict.modules:
        return {m: measured.written for m, measured in done.verdict.modules.items()}
    with Readers([load_lora(done.path)]) as readers:
        return {module: norm(readers.deltas(module)[0]) ** 2 for module in watched(list(done.plan.shapes))}


def _cell(deltas: Mapping[int, Delta]) -> Cell:
    if len(deltas) > PAIRS_UP_TO:
        return Cell(tuple(deltas), torch.tensor([norm(d) ** 2 for d in deltas.values()], dtype=torch.float64), None)
    products = gram(list(deltas.values()), torch.float32)
    return Cell(tuple(deltas), products.diagonal().clamp(min=0), products)
