"""The steps of a section, in order. What is there from the same recipe is not made again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ..errors import of_step
from ..files.atomic import copy_file, hold_part, remove_part, remove_parts
from ..formats.reader import load_lora
from ..planning.types import StepPlan
from ..progress import SILENT, Progress
from .bake import bake, baked_before
from .made import Baked, Done, Hashes, take_inventory
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
    files = {path: stamp for plan in plans for path, stamp in plan.hashed.items()}
    with contextlib.ExitStack() as cleanup, Hashes(files) as hashes:
        for plan in plans:
            cleanup.callback(remove_part, plan.path)
            if plan.bake:
                remove_part(plan.bake.path)  # an older model comes back that a killed run was about to replace
                cleanup.callback(remove_part, plan.bake.path)
        for folder in dict.fromkeys(path.parent for plan in plans for path in (plan.path, *plan.targets)):
            cleanup.callback(remove_parts, folder)
        models = _models(plans, hashes)
        inventory, done = take_inventory(plans, hashes, models), dict[str, StepPlan]()
        steps = dict(inventory.there)
        for plan in plans:
            plan = plan.over(done)
            lora, step = inventory.there.get(plan.path), None
            if plan.name in inventory.steps:
                with of_step(plan.name):
                    step = write_step(plan, steps, hashes, device, progress)
                steps[step.path] = load_lora(step.path)
                if not plan.spec.keep:
                    cleanup.enter_context(hold_part(step.path))
            elif lora:
                step = Done(plan.as_found(lora), plan.path, False, lora.verdict)
            if step:
                done[plan.name] = plan = step.plan
                if step.made or any(copy not in inventory.there for copy in plan.targets):
                    with of_step(plan.name):
                        for copy in plan.targets[1:]:
                            copy_file(step.path, copy.parent)
            if plan.bake:
                with of_step(plan.name):
                    baked = models.get(plan.bake.path) or bake(plan, steps, hashes, device, progress)
                alone = Done(plan, baked.path, baked.made, baked.verdict)
                step = (step if step and plan.spec.keep else alone)._replace(baked=baked)
            if step:  # else nothing that is left to do uses it
                yield step


def _models(plans: Sequence[StepPlan], hashes: Hashes) -> dict[Path, Baked]:
    """The whole models that are there from the same recipe and base."""
    found = {}
    for plan in plans:
        if plan.bake:
            with of_step(plan.name):
                if baked := baked_before(plan, hashes):
                    found[baked.path] = baked
    return found
