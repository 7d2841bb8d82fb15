"""config + what is known -> Plan: what is read, how strong, which rank, what is written, how large.

A plan is made twice. The forecast, before a training, describes the LoRA to come by what the config says of it; the final plan
reads the files' headers. Both are made here by the same code, so that whatever can be known early is checked early.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from . import __version__
from .config import Lora, Section, Step
from .errors import ZitMergeError, nearest
from .formats import writer
from .formats.metadata import made_by, merged_metadata
from .formats.reader import LoraFile, common_dtype, load_lora, unmatched_error
from .recipe import recipe_of
from .sources import Site, check_writable, resolve, trained_step, user_path
from .training import Outline
from .weights import compact, strengths
from .zimage import GROUPS, MODULES, REAL_SIZES, canonical_component, infer_sizes

SIZE_LIMIT = 2_000_000_000  # bytes of one output that need confirm_size
NAME_LIMIT = 255  # bytes of a file name, on every common file system
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Input:
    """One LoRA of a step.

    Attributes:
        spec: As the config has it.
        label: Its name in recipes and tables: a file name, or the name of an earlier step.
        outline: Ranks, shapes, dtype.
        strengths: Module -> strength, for all of Z-Image.
        lora: The opened file; None for an earlier step's, or for a training still to come.
        step: It is the output of this earlier step.
        path: Where the file is or will be.
    """

    spec: Lora
    label: str
    outline: Outline
    strengths: Mapping[str, float]
    path: Path
    lora: LoraFile | None = None
    step: StepPlan | None = None

    def counts(self, module: str) -> bool:
        """Whether it changes the output at this module."""
        return module in self.outline.ranks and self.strengths[module] != 0

    def metadata(self) -> Mapping[str, str]:
        """The file's own, or what the step before us will write."""
        if self.step:
            return self.step.draft
        return self.lora.metadata if self.lora else {}


@dataclass(frozen=True)
class StepPlan:
    """One merge, settled.

    Attributes:
        job: The job's name.
        spec: The step as the config has it.
        inputs: In the order of the config.
        shapes: Module -> (out, in) of every module written, in the model's order; empty while the sizes are not known.
        rank: Of every module written.
        stacked: Module -> components before truncation.
        dtype: Of the factors written.
        path: The output.
        bytes: Its size; 0 while it is not known.
        notes: What a person should know, a sentence each.
    """

    job: str
    spec: Step
    inputs: tuple[Input, ...]
    shapes: Mapping[str, tuple[int, int]]
    rank: int
    stacked: Mapping[str, int]
    dtype: torch.dtype
    path: Path
    bytes: int = 0
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The step's name."""
        return self.spec.name

    @property
    def lies_at(self) -> Path:
        """Where later steps of the run find it: a step that is not kept never gets its final name."""
        return self.path if self.spec.keep else writer.part_path(self.path)

    @property
    def outline(self) -> Outline:
        """What later steps can know of it."""
        modules = self.shapes or self.stacked
        return Outline(dict.fromkeys(modules, self.rank), self.shapes, self.dtype)

    def layout(self) -> writer.Layout:
        """The tensors of the output, in order."""
        return writer.layout(self.shapes, self.rank, self.dtype)

    @cached_property
    def hashed(self) -> list[Path]:
        """The files whose SHA-256 the recipe needs: this step's own, and those of the steps that it uses."""
        own = [i.lora.path for i in self.inputs if i.lora]
        fed = [path for i in self.inputs if i.step for path in i.step.hashed]
        return list(dict.fromkeys(own + fed))

    def metadata(self, hashes: Mapping[Path, str]) -> dict[str, str]:
        """The output's metadata, once the inputs' hashes are known."""
        used = [(i.label.removesuffix(".safetensors"), i.metadata()) for i in self.inputs if any(map(i.counts, i.outline.ranks))]
        return merged_metadata(self.path.stem, recipe_of(self, hashes), __version__, used)

    @cached_property
    def draft(self) -> dict[str, str]:
        """The metadata with placeholders of the same length for the hashes."""
        return self.metadata(dict.fromkeys(self.hashed, "0" * 64))

    def targets(self) -> list[Path]:
        """Every file that will be there at the end."""
        copies = [Path(self.spec.copy_to).expanduser() / self.path.name] if self.spec.copy_to else []
        return [self.path, *copies] if self.spec.keep else []


def plan_section(section: Section, site: Site, *, before_training: bool = False, only: str | None = None) -> list[StepPlan]:
    """The plans of a section's steps, in order. Reads headers; writes nothing.

    Args:
        section: Validated.
        site: Where it runs.
        before_training: The trained LoRA need not be there yet.
        only: Plan this step and the earlier ones that it uses.

    Raises:
        ZitMergeError: Anything that would stop the run and can be known now.
    """
    wanted = _needed(section, site, only)
    plans: dict[str, StepPlan] = {}
    for i, step in enumerate(section.steps):
        if step.name == only and not step.keep:
            step = step.model_copy(update={"keep": True})  # asked for by name
        if step.name in wanted:
            plans[step.name] = _plan_step(step, site, site.at(f"steps[{i}]"), section, plans, before_training)
    _check_room(list(plans.values()), site)
    return list(plans.values())


def _needed(section: Section, site: Site, only: str | None) -> set[str]:
    names = [s.name for s in section.steps]
    if only is None:
        return set(names)
    if only not in names:
        raise ZitMergeError(
            f"--step {only}: {site.place or 'the recipe'} has no such step{nearest(only, names)}; there are {', '.join(names)}"
        )
    wanted = {only}
    for step in reversed(section.steps):
        if step.name in wanted:
            wanted |= {lora.lora for lora in step.loras} & set(names)
    return wanted


def _plan_step(
    step: Step, site: Site, place: str, section: Section, plans: Mapping[str, StepPlan], before_training: bool
) -> StepPlan:
    inputs = tuple(
        _plan_input(spec, step, site, f"{place}.loras[{j}]", section, plans, before_training) for j, spec in enumerate(step.loras)
    )
    sizes = _sizes(inputs, step.shapes, place)
    stacked = {
        m: sum(i.outline.ranks[m] for i in inputs if i.counts(m)) for m in MODULES if any(m in i.outline.ranks for i in inputs)
    }
    exact = max([1, *stacked.values()])
    rank = {"exact": exact, "same": max(max(i.outline.ranks.values()) for i in inputs)}.get(step.rank, step.rank)
    known = all(i.outline.shapes for i in inputs)
    shapes = {m: MODULES[m].shape(sizes) for m in writer.complete(stacked, sizes)} if known else {}
    dtype = _DTYPES.get(step.save.dtype) or common_dtype(i.outline.dtype for i in inputs)
    plan = StepPlan(
        site.job,
        step,
        inputs,
        shapes,
        min(rank, exact),
        stacked,
        dtype,
        site.output(step),
        notes=_notes(step, inputs, stacked, rank, exact, site),
    )
    if shapes:
        size = writer.header_size(plan.layout(), plan.draft) + writer.data_size(plan.layout())
        plan = replace(plan, bytes=size)
    _check_output(plan, site, place)
    return plan


def _sizes(inputs: Sequence[Input], mode: str, place: str) -> Mapping[str, int]:
    """The sizes of the model that all these changes belong to.

    Raises:
        ZitMergeError: The shapes are not Z-Image's (strict), or not those of one model (free).
    """
    shapes: dict[str, tuple[int, int]] = {}
    for i in inputs:
        for name, shape in i.outline.shapes.items():
            real = MODULES[name].shape() if mode == "strict" else shapes.setdefault(name, shape)
            if tuple(shape) != tuple(real):
                raise ZitMergeError(
                    f"{place}: {i.label} changes {name} as a {shape[0]} x {shape[1]} matrix, {real[0]} x {real[1]} is due: "
                    "it was trained for another model" + (" (shapes: free is for pruned Z-Images)" if mode == "strict" else "")
                )
    if mode == "strict":
        return REAL_SIZES
    try:
        return infer_sizes(shapes)
    except ValueError as e:
        raise ZitMergeError(f"{place}: the LoRAs do not belong to one model: {e}") from None


def _plan_input(
    spec: Lora, step: Step, site: Site, place: str, section: Section, plans: Mapping[str, StepPlan], before_training: bool
) -> Input:
    table = strengths(spec.weights(place))
    if spec.strengths is not None:
        _check_table(spec, table, place)
    if not spec.sha256 and (earlier := plans.get(spec.lora)):
        return Input(spec, spec.lora, earlier.outline, table, earlier.lies_at, step=earlier)
    if not spec.sha256 and spec.lora in {s.name for s in section.steps}:
        raise ZitMergeError(f"{place}.lora: {spec.lora} is this step or a later one: a step can use only the steps before it")
    path = resolve(spec, site, f"{place}.lora", section, before_training)
    if path is None:
        path = site.training.file(trained_step(spec.lora))
        return Input(spec, path.name, site.training.outline(step.shapes), table, path)
    for earlier in plans.values():
        if path.resolve() in {target.resolve() for target in earlier.targets()}:
            raise ZitMergeError(f"{place}.lora: {spec.lora} is what the step {earlier.name} writes: use lora: {earlier.name}")
    lora = load_lora(path)
    if lora.unmatched and not step.allow_unmatched:
        raise unmatched_error(lora, f"{place}.lora")
    label = Path(spec.lora).name if spec.sha256 else path.name
    return Input(spec, label, Outline({n: p.rank for n, p in lora.pairs.items()}, lora.shapes, lora.dtype), table, path, lora)


def _check_table(spec: Lora, table: Mapping[str, float], place: str) -> None:
    if spec.strengths != compact(table):
        raise ZitMergeError(
            f"{place}.strengths: the table does not follow from ratio, blocks, layers, effects and overrides: "
            "drop it if you changed them; else another version of zit_merge made this recipe"
        )


def _notes(step: Step, inputs: Sequence[Input], stacked: Mapping[str, int], rank: int, exact: int, site: Site) -> tuple[str, ...]:
    notes = []
    if site.prefix != "merged_":
        notes.append(
            f"the file is called {site.prefix}..., since AI-Toolkit would take merged_... for a checkpoint of {site.job}"
        )
    if rank > exact:
        notes.append(f"rank {rank} was asked for, {exact} holds everything: nothing is cut")
    if step.rank != "exact" and rank < exact:
        notes.append(f"rank {exact} holds everything, the best approximation of rank {rank} is written")
    for i in inputs:
        if i.lora and i.lora.skipped:
            notes.append(
                f"{i.label}: {len(i.lora.skipped)} keys outside of the transformer are left out ({i.lora.skipped[0]} ...)"
            )
        if i.lora and i.lora.unmatched:
            notes.append(f"{i.label}: {len(i.lora.unmatched)} unknown keys are left out: {', '.join(i.lora.unmatched[:3])}")
        if not any(map(i.counts, i.outline.ranks)):
            notes.append(f"{i.label}: every strength is 0, it has no effect")
        present = {MODULES[m].component for m in i.outline.ranks}
        for key in i.spec.blocks:
            if not present & {canonical_component(key), *GROUPS.get(key, ())}:
                notes.append(f"{i.label}: has no {key}, so its weight there has no effect")
    silent = sum(1 for n in stacked.values() if n == 0)
    if silent:
        notes.append(f"{silent} of {len(stacked)} modules have strength 0 throughout and are written as zeros")
    return tuple(notes)


def _check_output(plan: StepPlan, site: Site, place: str) -> None:
    if len(os.fsencode(f"{plan.path.name}.part")) > NAME_LIMIT:
        raise ZitMergeError(
            f"{place}.name: {plan.path.name[:60]}... is too long for a file name: shorten the step's or the job's name"
        )
    if plan.bytes > SIZE_LIMIT and not plan.spec.confirm_size:
        raise ZitMergeError(
            f"{place}: {plan.path.name} would take {plan.bytes / 1e9:.1f} GB at rank {plan.rank}: set rank: 64, "
            "or confirm_size: true if you want it so"
        )
    if plan.spec.copy_to:
        if not plan.spec.keep:
            raise ZitMergeError(
                f"{place}.copy_to: the step is not kept (keep: false), so there is nothing to copy: drop one of the two"
            )
        folder = user_path(plan.spec.copy_to, f"{place}.copy_to")
        if site.training and site.training.claims(folder / plan.path.name):
            raise ZitMergeError(
                f"{place}.copy_to: AI-Toolkit would take the copy for a checkpoint of {plan.job}: give another folder"
            )
        if not folder.is_dir():
            raise ZitMergeError(f"{place}.copy_to: {folder} is not a folder: make it or mend the path")
        check_writable(folder, f"{place}.copy_to")
    for target in plan.targets():
        for i in plan.inputs:
            if i.path.exists() and target.exists() and i.path.samefile(target):
                raise ZitMergeError(f"{place}: {target} is both an input and the output: give the step another name")
        _check_ours(target, plan, place)


def _check_ours(target: Path, plan: StepPlan, place: str) -> None:
    """A file that this step of this job wrote may be replaced, any other may not."""
    if not os.path.lexists(target):
        return
    try:
        wrote = made_by(load_lora(target).metadata) if target.is_file() else None
    except ZitMergeError:
        wrote = None
    if wrote != (plan.job, plan.name):
        raise ZitMergeError(
            f"{place}: {target} exists and was not written by this step of this job: move it away, or give the step another name"
        )


def _check_room(plans: Sequence[StepPlan], site: Site) -> None:
    """Folders that can be written, and space for everything that will be."""
    check_writable(site.output_dir, site.at("output_dir"))
    disks: dict[int, tuple[str, Path, int]] = {}
    for plan in plans:
        for i, path in enumerate(plan.targets() or [plan.lies_at]):
            place = site.at("copy_to" if i else "output_dir")
            parent = check_writable(path.parent, place)
            disk = parent.stat().st_dev
            first, where, needed = disks.get(disk, (place, parent, 0))
            disks[disk] = first, where, needed + plan.bytes
    for place, parent, needed in disks.values():
        free = shutil.disk_usage(parent).free
        if needed > free:
            raise ZitMergeError(
                f"{place}: the outputs need {needed / 1e6:,.0f} MB, the disk of {parent} has {free / 1e6:,.0f} MB free: "
                "free some, or set a smaller rank or another folder"
            )
