"""Whether the outputs of a plan may be written where they belong: names, sizes, files that are somebody else's, disks."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import SettingError, ZitMergeError, located
from ..files.atomic import check_part, check_unused, part_path
from ..files.paths import check_writable, system_path
from ..formats import lokr
from ..formats.checkpoint import open_checkpoint
from ..formats.checkpoint_writer import config_of, is_checkpoint_file
from ..formats.metadata import CHECK_KEY, RECIPE_KEY, made_by
from ..formats.reader import load_lora
from ..wording import public_name, size_text
from .context import RunContext
from .metadata import bake_metadata
from .recipe import bake_recipe
from .types import BakeTarget, StepPlan, steps_to_make

SIZE_LIMIT = 2_000_000_000  # bytes of one output that need confirm_size
NAME_LIMIT = 255  # bytes of a file name, on every common file system


def check_output(plan: StepPlan, context: RunContext) -> set[Path]:
    """Checks the file of a step.

    Args:
        plan: The step.
        context: Where it runs.

    Returns:
        Those of its targets that are there and, as far as their metadata tell, would come out the same again.

    Raises:
        SettingError: The file can't or must not be written; located from the step on.
    """
    if len(os.fsencode(f"{plan.path.name}.part")) > NAME_LIMIT:
        raise SettingError(f"{plan.path.name[:60]}... is too long for a file name: shorten the step's or the job's name", "name")
    system_path(plan.path)
    if plan.bake:
        with located("bake"):
            is_baked = _check_bake(plan, plan.bake, context)
    is_written = plan.spec.keep or not plan.bake
    if is_written and plan.bytes > SIZE_LIMIT and not plan.spec.confirm_size:
        cap = "rank: {energy: 0.99, max: 64}" if plan.is_open else "rank: 64"
        raise SettingError(
            f"{plan.path.name} would take {size_text(plan.bytes)} at rank {plan.rank}: set {cap}, "
            + ("save: {keep_lokr: true} to keep it a LoKr, " if _could_stay(plan) else "")
            + "or confirm_size: true if you want it so (see docs/ranks.md)"
        )
    if plan.spec.copy_to:
        with located("copy_to"):
            _check_copy(plan, context)
    for target in dict.fromkeys((plan.path, *plan.targets)):
        check_part(target)
    there = {plan.bake.path} if plan.bake and is_baked else set()
    for target in plan.targets:
        for i in plan.inputs:
            if i.path.exists() and target.exists() and i.path.samefile(target):
                raise SettingError(f"{target} is both an input and the output: give the step another name")
        if _check_ours(target, plan):
            there.add(target)
    return there


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


def _check_bake(plan: StepPlan, bake: BakeTarget, context: RunContext) -> bool:
    """Raises unless the whole model of a step can be written, and be told from its base.

    Returns:
        Whether it is there and, as far as its metadata tell, would come out the same again.
    """
    path, base = bake.path, bake.base
    if len(os.fsencode(f"{path.name}.parts")) > NAME_LIMIT:
        raise SettingError(f"{path.name[:60]}... is too long for a file name: shorten the step's or the job's name")
    if context.claims(path):
        raise SettingError(f"AI-Toolkit would take {path.name} for a checkpoint of {plan.job}: set another output_dir")
    if (bake.spec.format == "comfyui") != (path.suffix == ".safetensors"):
        form = {"comfyui": "one .safetensors file", "diffusers": "a folder, whose name has no such ending"}[bake.spec.format]
        raise SettingError(f"{path.name}: format: {bake.spec.format} is {form}: give another name or format")
    if base:
        read = [base, *(model for i in plan.inputs for model in i.models), *([plan.weights] if plan.weights else [])]
        for model in read:
            own = [model.path, *(file for file, _ in model.files)]
            if path.exists() and any(p.exists() and p.samefile(path) for p in (*own, *own[1].parents)):
                what = "the base" if model is base else f"{model.path.name}, which the step reads"
                raise SettingError(f"{path} is {what}, or holds it: give the step another name")
        if base.path.is_dir() and base.path.resolve() in path.resolve().parents:
            raise SettingError(f"{path} is in the folder of the base, which would be another model with it: give another folder")
        if bake.spec.format == "diffusers":
            config_of(base)
        for module in [m for m in plan.shapes if any(i.counts(m) for i in plan.inputs)]:
            if (shape := base.shapes.get(module)) != plan.shapes[module]:
                told = "not there" if shape is None else f"{shape[0]} x {shape[1]}"
                wanted = " x ".join(map(str, plan.shapes[module]))
                raise SettingError(f"{module} is {told} in {bake.label}, {wanted} in the LoRAs: give their own model", "base")
    check_part(path)
    metadata = _metadata_of_ours(path, plan, lambda: open_checkpoint(path, shapes=plan.spec.shapes, quantized=True).metadata)
    if others := sorted(p.name for p in path.glob("*") if not is_checkpoint_file(p.name)):
        raise SettingError(f"{path} is replaced as a whole and holds {others[0]}, which zit_merge did not write: move it away")
    return bool(metadata and base) and _would_be_the_same(plan, metadata)


def _would_be_the_same(plan: StepPlan, metadata: Mapping[str, str]) -> bool:
    """Whether a whole model has the metadata that the step would give it, hashes aside: only a run takes those of the inputs."""
    found = {key: text for key, text in metadata.items() if key != CHECK_KEY}
    found[RECIPE_KEY] = re.sub(r"[0-9a-f]{64}", "0" * 64, found[RECIPE_KEY])
    return found == bake_metadata(plan, bake_recipe(plan))


def _metadata_of_ours(path: Path, plan: StepPlan, read: Callable[[], Mapping[str, str]]) -> Mapping[str, str]:
    """What the metadata of an output say; none where nothing is. One that this step of this job wrote may be replaced, no other.

    Args:
        path: Its path.
        plan: Of the step.
        read: Reads it.
    """
    for is_first in (True, False):
        if not os.path.lexists(path):
            return {}
        with contextlib.suppress(ZitMergeError):
            metadata = read()
            if made_by(metadata) == (public_name(plan.job), public_name(plan.name)):
                return metadata
        if is_first:  # another run may be replacing it just now, or was between the two looks
            check_unused(path)
    raise SettingError(f"{path} exists and was not written by this step of this job: move it away, or give the step another name")


def _check_ours(target: Path, plan: StepPlan) -> bool:
    """Whether a target is there as the step would make it."""
    metadata = _metadata_of_ours(target, plan, lambda: load_lora(target).metadata if target.is_file() else {})
    if not metadata:
        return False
    paths = [
        value
        for step in plan.recipe["steps"]
        for table in (step, *step["loras"])
        for value in table.values()
        if isinstance(value, Path)
    ]
    hashes = re.findall(r'"(?:base_)?sha256":"([0-9a-f]{64})"', metadata[RECIPE_KEY])  # only a run takes those of the inputs
    return len(paths) == len(hashes) and plan.made(metadata, dict(zip(paths, hashes, strict=True)))


@dataclass
class _Disk:
    """What the outputs of a section take on one disk, file after file.

    Attributes:
        loc: The setting that named the first folder on it.
        folder: That folder.
        taken: Bytes more than now.
        peak: The most of them at any time: a new file is written beside the one that it replaces.
        sizes: File -> its bytes.
    """

    loc: str
    folder: Path
    taken: int = 0
    peak: int = 0
    sizes: dict[Path, int] = field(default_factory=dict)

    def write(self, path: Path, size: int) -> None:
        """A file is written."""
        if path not in self.sizes:
            part = path if path.suffix == ".part" else part_path(path)
            self.taken -= _bytes_freed(part) + _bytes_freed(path.with_name(f"{path.name}.parts"))  # left by a killed run
            self.sizes[path] = 0 if part == path else _bytes_freed(path)
        self.peak = max(self.peak, self.taken + size)
        self.taken += size - self.sizes[path]
        self.sizes[path] = size


def _bytes_freed(path: Path) -> int:
    """What the disk gets back when a file is replaced; nothing where it has another name too, or is a link."""
    try:
        facts = path.lstat()
    except OSError:
        return 0
    if stat.S_ISDIR(facts.st_mode):
        return sum(map(_bytes_freed, path.iterdir()))
    return facts.st_size if stat.S_ISREG(facts.st_mode) and facts.st_nlink == 1 else 0


def check_room(plans: Sequence[StepPlan], context: RunContext, there: Collection[Path]) -> None:
    """Checks the folders and disks of all outputs.

    Args:
        plans: Of a section.
        context: Where it runs.
        there: The outputs that are there and will not be made again.

    Raises:
        SettingError: A folder can't be written, or has no space for everything that will be; located from the section on.
    """
    with located("output_dir"):
        check_writable(context.output_dir)
    disks: dict[int, _Disk] = {}
    to_make = steps_to_make(plans, there)
    for plan in plans:
        for i, path in enumerate(plan.targets or [plan.output_path]):
            loc = "copy_to" if i else "output_dir"
            with located(loc):
                parent = check_writable(path.parent)
            disk = disks.setdefault(parent.stat().st_dev, _Disk(loc, parent))
            if plan.name in to_make or (i and path not in there):
                disk.write(path, plan.bytes)
        if plan.bake:
            parent = check_writable(plan.bake.path.parent)
            disk = disks.setdefault(parent.stat().st_dev, _Disk("output_dir", parent))
            if plan.bake.path not in there:
                disk.write(plan.bake.path, plan.bake.size)
    for disk in disks.values():
        free = shutil.disk_usage(disk.folder).free
        if disk.peak > free:
            raise SettingError(
                f"the outputs need {size_text(disk.peak)}, each beside the file that it replaces, the disk of {disk.folder} "
                f"has {size_text(free)} free: free some, or set a smaller rank or another folder",
                disk.loc,
            )
