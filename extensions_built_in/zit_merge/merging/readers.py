"""Reads what a step makes: from its file where that is there, else computed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch

from ..algebra.delta import Delta
from ..formats.reader import TensorReader, load_lora
from ..formats.reading import Reader
from ..planning.types import Input, StepPlan
from ..progress import SILENT, Progress
from .made import Hashes, made_file
from .opened import open_input
from .results import Result


class StepReaders:
    """Opens readers of inputs and steps. As a context it closes their files.

    Args:
        hashes: Of every file that the steps read.
        device: Where the algebra runs.
        progress: Shows the passes that computed steps need first.
    """

    def __init__(self, hashes: Hashes, device: torch.device, progress: Progress = SILENT):
        self._hashes, self._device, self._progress = hashes, device, progress
        self._files = contextlib.ExitStack()

    def __enter__(self) -> StepReaders:
        return self

    def __exit__(self, *exc: Any) -> None:
        self._files.__exit__(*exc)

    def of_input(self, i: Input) -> Reader:
        """Reads an input of a step: its file, or what an earlier step makes."""
        if i.step:
            return self.of_step(i.step)
        return open_input(i, self._files)

    def of_step(self, plan: StepPlan) -> Reader:
        """Reads a step's result: from its file where that is there from the same recipe, else computed."""
        if plan.spec.keep and (lora := made_file(plan, self._hashes, plan.path)):
            return self._files.enter_context(TensorReader(lora))
        return self.result(plan, self._device, self._progress)

    def result(self, plan: StepPlan, device: torch.device, progress: Progress, workers: int = 1) -> Result:
        """A step's result, computed.

        Args:
            plan: The step.
            device: Where the algebra runs.
            progress: Shows the passes that are needed first.
            workers: See `Result`.
        """
        readers = [self.of_input(i) for i in plan.inputs]
        if any(i.step and i.step.follows_from_numbers for i in plan.inputs):
            plan = plan.revised(inputs=tuple(map(_as_read, plan.inputs, readers)))
        return Result(plan, readers, device, progress, workers=workers)


def _as_read(i: Input, reader: Reader) -> Input:
    """An input as its reader found it: an earlier step with the ranks that it came out with."""
    if not i.step:
        return i
    if isinstance(reader, Result):
        return replace(i, step=reader.plan, known=reader.plan.result)
    return replace(i, known=replace(i.step.result, ranks=load_lora(i.step.path).ranks))


def delta_reader(
    opened: Callable[[], AbstractContextManager[StepReaders]],
) -> Callable[[Input | StepPlan], Iterator[tuple[str, Delta]]]:
    """Reads every module of an input at strength 1, or of a step's result; the files are open until the last module.

    Args:
        opened: Opens inputs and steps.
    """

    def read(source: Input | StepPlan) -> Iterator[tuple[str, Delta]]:
        with opened() as readers:
            reader = readers.of_input(source) if isinstance(source, Input) else readers.of_step(source)
            for module in source.known.ranks if isinstance(source, Input) else source.shapes:
                scale, delta = reader.delta(module)
                yield module, delta.times(scale)

    return read
