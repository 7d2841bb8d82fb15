"""Whether the outputs of a plan may be written where they belong: names, sizes, files that are somebody else's, disks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..errors import SettingError, ZitMergeError, located
from ..files.paths import check_writable
from ..formats import lokr
from ..formats.metadata import made_by
from ..formats.reader import load_lora
from ..wording import public_name
from .context import RunContext
from .types import StepPlan

SIZE_LIMIT = 2_000_000_000  # bytes of one output that need confirm_size
NAME_LIMIT = 255  # bytes of a file name, on every common file system


def check_output(plan: StepPlan, context: RunContext) -> None:
    """Checks the file of a step.

    Args:
        plan: The step.
        context: Where it runs.

    Raises:
        SettingError: The file can't or must not be written; located from the step on.
    """
    if len(os.fsencode(f"{plan.path.name}.part")) > NAME_LIMIT:
        raise SettingError(f"{plan.path.name[:60]}... is too long for a file name: shorten the step's or the job's name", "name")
    if plan.bytes > SIZE_LIMIT and not plan.spec.confirm_size:
        cap = "rank: {energy: 0.99, max: 64}" if plan.is_open else "rank: 64"
        raise SettingError(
            f"{plan.path.name} would take {plan.bytes / 1e9:.1f} GB at rank {plan.rank}: set {cap}, "
            + ("save: {keep_lokr: true} to keep it a LoKr, " if _could_stay(plan) else "")
            + "or confirm_size: true if you want it so"
        )
    if plan.spec.copy_to:
        with located("copy_to"):
            _check_copy(plan, context)
    for target in plan.targets:
        for i in plan.inputs:
            if i.path.exists() and target.exists() and i.path.samefile(target):
                raise SettingError(f"{target} is both an input and the output: give the step another name")
        _check_ours(target, plan)


def _could_stay(plan: StepPlan) -> bool:
    """Whether keep_lokr would do for this step."""
    only = plan.inputs[0] if len(plan.inputs) == 1 and plan.spec.rank == "exact" else None
    return bool(only and "LoKr" in only.known.algorithms and (not only.lora or not lokr.why_not(only.lora)))


def _check_copy(plan: StepPlan, context: RunContext) -> None:
    if not plan.spec.keep:
        raise SettingError("the step is not kept (keep: false), so there is nothing to copy: drop one of the two")
    folder = plan.copy_folder
    if context.training and context.training.claims(folder / plan.path.name):
        raise SettingError(f"AI-Toolkit would take the copy for a checkpoint of {plan.job}: give another folder")
    if not folder.is_dir():
        raise SettingError(f"{folder} is not a folder: create it or correct the path")
    check_writable(folder)


def _check_ours(target: Path, plan: StepPlan) -> None:
    """A file that this step of this job wrote may be replaced, any other may not."""
    if not os.path.lexists(target):
        return
    try:
        wrote = made_by(load_lora(target).metadata) if target.is_file() else None
    except ZitMergeError:
        wrote = None
    if wrote != (public_name(plan.job), public_name(plan.name)):
        raise SettingError(
            f"{target} exists and was not written by this step of this job: move it away, or give the step another name"
        )


def check_room(plans: Sequence[StepPlan], context: RunContext) -> None:
    """Checks the folders and disks of all outputs.

    Args:
        plans: Of a section.
        context: Where it runs.

    Raises:
        SettingError: A folder can't be written, or has no space for everything that will be; located from the section on.
    """
    with located("output_dir"):
        check_writable(context.output_dir)
    disks: dict[int, tuple[str, Path, int]] = {}
    for plan in plans:
        for i, path in enumerate(plan.targets or [plan.output_path]):
            loc = "copy_to" if i else "output_dir"
            with located(loc):
                parent = check_writable(path.parent)
            disk = parent.stat().st_dev
            first, where, needed = disks.get(disk, (loc, parent, 0))
            replaced = path.stat().st_size if path.is_file() else 0
            disks[disk] = first, where, needed + max(0, plan.bytes - replaced)
    for loc, parent, needed in disks.values():
        free = shutil.disk_usage(parent).free
        if needed > free:
            raise SettingError(
                f"the outputs need {needed / 1e6:,.0f} MB, the disk of {parent} has {free / 1e6:,.0f} MB free: "
                "free some, or set a smaller rank or another folder",
                loc,
            )
