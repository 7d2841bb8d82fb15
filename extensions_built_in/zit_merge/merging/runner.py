"""The steps of a section, in order. What is there from the same recipe is not made again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from ..files.atomic import copy_file, remove_part
from ..planning.types import StepPlan
from ..progress import SILENT, Progress
from .made import Done, Hashes, found, needed
from .write import write_step


def run_plans(plans: Sequence[StepPlan], device: torch.device, progress: Progress = SILENT) -> Iterator[Done]:
    """Runs the steps of one section.

    Args:
        plans: Final, in order.
        device: Where the algebra runs.
        progress: Shows how far it is, and may stop it.

    Yields:
        Each step when it is done. Files of steps that are not kept are gone at the end, and what killed runs left.

    Raises:
        ZitMergeError: With no part of the failing step's file left behind.
    """
    with contextlib.ExitStack() as cleanup, Hashes(path for plan in plans for path in plan.hashed) as hashes:
        for plan in plans:
            cleanup.callback(remove_part, plan.path)
        to_do, done = needed(plans, hashes), dict[str, StepPlan]()
        for plan in plans:
            if plan.name in to_do.steps:
                step = write_step(plan.over(done), hashes, device, progress)
            elif plan.spec.keep:
                step = found(plan.over(done))
            else:
                continue  # nothing that is left to do uses it
            done[plan.name] = step.plan
            if plan.spec.copy_to and plan.name in to_do.steps | to_do.copies:
                copy_file(step.path, plan.targets[1].parent)
            yield step
