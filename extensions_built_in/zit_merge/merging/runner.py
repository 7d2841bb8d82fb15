"""The steps of a section, in order. What is there from the same recipe is not made again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from ..files.atomic import copy_file, remove_part
from ..formats.reader import load_lora
from ..planning.step import revised
from ..planning.types import StepPlan
from ..progress import SILENT, Progress
from .made import Done, Hashes, is_made, steps_to_make
from .write import write_step


def run_plans(plans: Sequence[StepPlan], device: torch.device, progress: Progress = SILENT) -> Iterator[Done]:
    """Runs the steps of one section.

    Args:
        plans: Final, in order.
        device: Where the algebra runs.
        progress: Shows how far it is, and may stop it.

    Yields:
        Each step when it is done. Files of steps that are not kept are gone at the end.

    Raises:
        ZitMergeError: With no part of the failing step's file left behind.
    """
    for plan in plans:
        remove_part(plan.path)
    with contextlib.ExitStack() as cleanup, Hashes(path for plan in plans for path in plan.hashed) as hashes:
        wanted = steps_to_make(plans, hashes)
        done: dict[str, StepPlan] = {}
        for plan in plans:
            plan, is_wanted = _over(plan, done), plan.name in wanted
            step = write_step(plan, hashes, device, progress) if is_wanted else Done(plan, plan.output_path, False)
            done[plan.name] = step.plan
            if not plan.spec.keep:
                cleanup.callback(step.path.unlink, missing_ok=True)
            if plan.spec.copy_to and (is_wanted or not is_made(plan, hashes, plan.targets[1])):
                copy_file(step.path, plan.targets[1].parent)
            if plan.spec.keep or is_wanted:
                yield step if is_wanted else step._replace(verdict=load_lora(step.path).verdict)


def _over(plan: StepPlan, done: Mapping[str, StepPlan]) -> StepPlan:
    """The plan over the earlier steps as they came out: ranks that followed from the numbers are known now."""
    if not any(i.step and i.step.follows_from_numbers for i in plan.inputs):
        return plan
    inputs = []
    for i in plan.inputs:
        earlier = done.get(i.step.name) if i.step else None
        if earlier and earlier.output_path.is_file():
            # of a step that was kept, the plan does not know the ranks
            i = replace(i, step=earlier, known=replace(earlier.result, ranks=load_lora(earlier.output_path).ranks))
        inputs.append(i)
    return revised(plan, inputs=tuple(inputs))
