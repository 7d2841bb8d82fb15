"""config + what is known -> Plan: what is read, how strong, which rank, what is written, how large.

A plan is made twice. The forecast, before a training, describes the LoRA to come by what the config says of it; the final plan
reads the files' headers. Both are made here by the same code, so that whatever can be known early is checked early.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from pathlib import Path

import torch

from .. import __version__
from ..config.schema import Lora, RankRule, Section, Step
from ..errors import ZitMergeError, nearest
from ..files import hub
from ..files.atomic import part_path
from ..formats import lokr, writer
from ..formats.header import common_dtype
from ..formats.metadata import Adapter, adapter_metadata, dumps, kohya_metadata, merged_metadata, read_adapter
from ..formats.reader import LoraFile, load_lora, unmatched_error
from ..merging.verify import placeholder
from ..model.strengths import compact, strengths
from ..model.zimage import MODULES, REAL_SIZES, infer_sizes
from .outputs import check_output, check_room
from .recipe import recipe_of
from .sources import RunContext, checkpoint_loras, resolve, trained_step
from .training import LoraSpec
from .warnings import notes

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
        path: Where the file is or will be.
        lora: The opened file; None for an earlier step's, for a training still to come, and for one still on the hub.
        step: It is the output of this earlier step.
        source: What a recipe calls it, where that is not its label.
    """

    spec: Lora
    label: str
    outline: LoraSpec
    strengths: Mapping[str, float]
    path: Path
    lora: LoraFile | None = None
    step: StepPlan | None = None
    source: str = ""

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
        ranks: Module -> rank, of every module written; the same throughout unless `uniform: false`.
        stacked: Module -> components before truncation.
        dtype: Of the factors written.
        path: The output.
        bytes: Its size; 0 while it is not known.
        notes: What a person should know, a sentence each.
        place: Of the step in the config.
        prefix: What the names of outputs begin with.
        is_open: The ranks are only bounds: they follow from singular values, which `execute` looks at.
    """

    job: str
    spec: Step
    inputs: tuple[Input, ...]
    shapes: Mapping[str, tuple[int, int]]
    ranks: Mapping[str, int]
    stacked: Mapping[str, int]
    dtype: torch.dtype
    path: Path
    bytes: int = 0
    notes: tuple[str, ...] = ()
    place: str = ""
    prefix: str = "merged_"
    is_open: bool = False

    @property
    def name(self) -> str:
        """The step's name."""
        return self.spec.name

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(self.ranks.values(), default=0)

    @property
    def cut(self) -> set[str]:
        """The modules whose change is approximated by one of lower rank."""
        return set() if self.spec.save.keep_lokr else {m for m, n in self.stacked.items() if self.ranks[m] < n}

    @property
    def kept(self) -> LoraFile | None:
        """The LoKr that stays one, if the step only weighs it."""
        return self.inputs[0].lora if self.spec.save.keep_lokr else None

    @property
    def output_path(self) -> Path:
        """Where later steps of the run find it: a step that is not kept never gets its final name."""
        return self.path if self.spec.keep else part_path(self.path)

    @property
    def outline(self) -> LoraSpec:
        """What later steps can know of it."""
        if self.spec.save.keep_lokr:
            return replace(self.inputs[0].outline, dtype=self.dtype)
        fused = {m for unit in self.form.units(self.ranks).values() if len(unit) > 1 for m in unit}  # block-diagonal
        return LoraSpec({m: 3 * r if m in fused else r for m, r in self.ranks.items()}, self.shapes, self.dtype)

    @property
    def form(self) -> writer.Form:
        """How the output names things."""
        return writer.FORMS[self.spec.save.format]

    def layout(self) -> writer.Layout:
        """The tensors of the output, in order."""
        if self.kept:
            return lokr.layout(self.kept, self.dtype)
        return writer.layout(self.shapes, self.ranks, self.dtype, self.form)

    @cached_property
    def hashed(self) -> list[Path]:
        """The files whose SHA-256 the recipe needs: this step's own, and those of the steps that it uses."""
        own = [i.lora.path for i in self.inputs if i.lora]
        fed = [path for i in self.inputs if i.step for path in i.step.hashed]
        return list(dict.fromkeys(own + fed))

    def metadata(self, hashes: Mapping[Path, str]) -> dict[str, str]:
        """The output's metadata, once the inputs' hashes are known."""
        used = [(i.label.removesuffix(".safetensors"), i.metadata()) for i in self.inputs if any(map(i.counts, i.outline.ranks))]
        merged = merged_metadata(self.path.stem, recipe_of(self, hashes), __version__, used)
        if self.kept:
            return merged
        if self.spec.save.format == "kohya":
            merged |= kohya_metadata(self.ranks)
        return merged | ({} if self.spec.save.uniform else adapter_metadata(self.ranks))

    @cached_property
    def draft(self) -> dict[str, str]:
        """The metadata with placeholders of at least the same length for the hashes and what the check will find."""
        return self.metadata(dict.fromkeys(self.hashed, "0" * 64)) | placeholder(len(self.inputs))

    def targets(self) -> list[Path]:
        """Every file that will be there at the end."""
        copies = [Path(self.spec.copy_to).expanduser() / self.path.name] if self.spec.copy_to else []
        return [self.path, *copies] if self.spec.keep else []


def plan_section(section: Section, site: RunContext, *, before_training: bool = False, only: str | None = None) -> list[StepPlan]:
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
    check_room(list(plans.values()), site)
    return list(plans.values())


def _needed(section: Section, site: RunContext, only: str | None) -> set[str]:
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
    step: Step, site: RunContext, place: str, section: Section, plans: Mapping[str, StepPlan], before_training: bool
) -> StepPlan:
    if step.checkpoints:
        loras = checkpoint_loras(step.checkpoints, site, f"{place}.checkpoints", before_training)
        step = step.model_copy(update={"loras": loras})
    inputs = tuple(
        _plan_input(
            spec,
            step,
            site,
            f"{place}.checkpoints" if step.checkpoints else f"{place}.loras[{j}]",
            section,
            plans,
            before_training,
        )
        for j, spec in enumerate(step.loras)
    )
    dtype = _DTYPES.get(step.save.dtype) or common_dtype(i.outline.dtype for i in inputs)
    plan = StepPlan(site.job, step, inputs, {}, {}, {}, dtype, site.output(step), place=place, prefix=site.prefix)
    plan = settle(plan)
    check_output(plan, site)
    return plan


def settle(plan: StepPlan, chosen: Mapping[str, int] | None = None) -> StepPlan:
    """The plan with the shapes, ranks, size and notes that follow from its inputs.

    Args:
        plan: With job, step, inputs, dtype and path.
        chosen: Module -> rank, once a rule has been settled by the numbers.

    Raises:
        ZitMergeError: The inputs don't belong together, or the rank has no meaning for them.
    """
    step, inputs = plan.spec, plan.inputs
    sizes = _sizes(inputs, step.shapes, plan.place)
    stacked = {
        m: sum(i.outline.ranks[m] for i in inputs if i.counts(m)) for m in MODULES if any(m in i.outline.ranks for i in inputs)
    }
    known = all(i.outline.shapes for i in inputs)
    _check_rank(step, inputs, known, plan.place)
    if known:
        stacked = {m: min(n, *MODULES[m].shape(sizes)) for m, n in stacked.items()}
    shapes = {m: MODULES[m].shape(sizes) for m in writer.complete(stacked, sizes)} if known else {}
    if step.save.keep_lokr:
        shapes = {m: shape for m, shape in shapes.items() if m in stacked}
    plan = replace(plan, shapes=shapes, stacked=stacked, is_open=isinstance(step.rank, RankRule) and not chosen)
    plan = _sized(plan, chosen or {m: stacked.get(m, 0) for m in shapes or stacked})
    if isinstance(step.rank, RankRule) and step.rank.size_mb and plan.bytes:
        plan = _fitted(plan, int(step.rank.size_mb * 1e6))
    return replace(plan, notes=notes(plan))


def _sized(plan: StepPlan, most: Mapping[str, int]) -> StepPlan:
    """With the ranks that were asked for, none above `most`, and the size that follows."""
    plan = replace(plan, ranks=_ranks(plan.spec, plan.inputs, most))
    if not plan.shapes or (plan.spec.save.keep_lokr and not plan.kept):
        return plan
    return replace(plan, bytes=writer.header_size(plan.layout(), plan.draft) + writer.data_size(plan.layout()))


def _fitted(plan: StepPlan, limit: int) -> StepPlan:
    """With the largest common rank whose file takes at most `limit` bytes. Raises where rank 1 takes more.

    With `uniform: false` the ranks that are found here are bounds: the components are chosen by their singular values.
    """

    def capped(rank: int) -> StepPlan:
        return _sized(plan, {m: min(n, rank) for m, n in most.items()})

    most = dict(plan.ranks)
    if (least := capped(1).bytes) > limit:
        raise ZitMergeError(
            f"{plan.place}.rank: a file of rank 1 takes {ceil(least / 1e3) / 1e3:g} MB: set size_mb to that or more"
        )
    if not plan.is_open or plan.bytes <= limit:
        return replace(plan, is_open=False)
    if not plan.spec.save.uniform:
        return replace(plan, bytes=limit)
    best = bisect_right(range(1, plan.rank + 1), limit, key=lambda rank: capped(rank).bytes)
    return replace(capped(best), is_open=False)


def _check_rank(step: Step, inputs: Sequence[Input], known: bool, place: str) -> None:
    """Raises where a rank, or keep_lokr, has no meaning for these inputs."""
    other = next((i for i in inputs if not i.outline.is_lora), None)
    if step.save.keep_lokr:
        asked = (len(inputs), step.method, step.rank, step.save.format, step.save.uniform)
        if asked != (1, "sum", "exact", "ai-toolkit", True):
            raise ZitMergeError(
                f"{place}.save.keep_lokr: only one LoKr that is weighed can stay a LoKr, without method, rank, format or "
                "uniform: drop them, or keep_lokr"
            )
        lora, outline = inputs[0].lora, inputs[0].outline
        if inputs[0].step:
            raise ZitMergeError(
                f"{place}.save.keep_lokr: {inputs[0].label} is an earlier step: give the LoKr's own file, with all weights here"
            )
        known_lokr = "LoKr" in outline.algorithms or not outline.ranks  # what is still on the hub is looked at when it is here
        reason = lokr.why_not(lora) if lora else None if known_lokr else f"{inputs[0].label} is no LoKr"
        if reason:
            raise ZitMergeError(f"{place}.save.keep_lokr: {reason}: drop keep_lokr")
    elif other and step.rank == "same":
        what = "/".join(a for a in other.outline.algorithms if a != "LoRA")
        raise ZitMergeError(
            f"{place}.rank: same is the rank of LoRAs, {other.label} is a {what}: give a number, such as rank: 64"
        )
    elif other and step.rank == "exact" and not known and not step.confirm_size:
        what = "/".join(a for a in other.outline.algorithms if a != "LoRA")
        raise ZitMergeError(
            f"{place}.rank: {other.label} is a {what}, which takes the full rank of the model to hold exactly: set rank: 64"
            + (", or save: {keep_lokr: true} to weigh it alone" if what == "LoKr" and len(inputs) == 1 else "")
            + ", or confirm_size: true if you want it so"
        )


def _ranks(step: Step, inputs: Sequence[Input], most: Mapping[str, int]) -> dict[str, int]:
    """The rank of every module written: what was asked for, as far as the inputs hold it."""
    if isinstance(step.rank, RankRule):
        asked = step.rank.max
    else:
        asked = {"exact": None, "same": max((i.outline.rank for i in inputs), default=1)}.get(step.rank, step.rank)
    ranks = {m: max(1, n if asked is None else min(n, asked)) for m, n in most.items()}
    largest = max(ranks.values(), default=1)
    if step.save.uniform:
        return dict.fromkeys(ranks, largest)
    return ranks | ({writer.ALWAYS: largest} if writer.ALWAYS in ranks else {})  # AI-Toolkit reads its rank there


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
    spec: Lora, step: Step, site: RunContext, place: str, section: Section, plans: Mapping[str, StepPlan], before_training: bool
) -> Input:
    table = _strengths(spec, place)
    if spec.strengths is not None:
        _check_table(spec, table, place)
    if not spec.sha256 and (earlier := plans.get(spec.lora)):
        for key in ("alpha", "qkv", "drop"):
            if getattr(spec, key):
                raise ZitMergeError(f"{place}.{key}: the file of the step {spec.lora} leaves nothing open: drop {key}")
        return Input(spec, spec.lora, earlier.outline, table, earlier.output_path, step=earlier)
    if not spec.sha256 and spec.lora in {s.name for s in section.steps}:
        raise ZitMergeError(f"{place}.lora: {spec.lora} is this step or a later one: a step can use only the steps before it")
    path = resolve(spec, site, f"{place}.lora", section, before_training)
    if path is None:
        return _plan_absent(spec, step, site, table)
    for earlier in plans.values():
        if path.resolve() in {target.resolve() for target in earlier.targets()}:
            raise ZitMergeError(f"{place}.lora: {spec.lora} is what the step {earlier.name} writes: use lora: {earlier.name}")
    lora = load_lora(path, alpha=spec.alpha, qkv=spec.qkv, drop=spec.drop, adapter=_recorded(spec, place))
    if lora.unmatched and not step.allow_unmatched:
        raise unmatched_error(lora, f"{place}.lora")
    if lora.questions:
        raise ZitMergeError(f"{place}: {lora.path.name}: {lora.questions[0]}")
    outline = LoraSpec(lora.ranks, lora.shapes, lora.dtype, tuple(lora.algorithms))
    if spec.lora.startswith(hub.HUB_PREFIX):
        file = hub.parse(spec.lora, place)
        pinned = spec.lora if spec.sha256 else file.pinned(hub.commit_of(path))
        return Input(spec, file.name, outline, table, path, lora, source=pinned)
    return Input(spec, Path(spec.lora).name if spec.sha256 else path.name, outline, table, path, lora)


def _strengths(spec: Lora, place: str) -> dict[str, float]:
    try:
        return strengths(spec.weights(place))
    except ZitMergeError as e:
        if spec.preset and "overlap" in str(e):  # one of the two may be a key that the user never typed
            raise ZitMergeError(f"{e} (the preset {spec.preset} has entries of its own there)") from None
        raise


def _plan_absent(spec: Lora, step: Step, site: RunContext, table: Mapping[str, float]) -> Input:
    """What a training will save, or what the hub has and nobody has fetched."""
    if spec.lora.startswith(hub.HUB_PREFIX):
        name = hub.parse(spec.lora, site.place).name
        return Input(spec, name, LoraSpec({}, {}, torch.bfloat16), table, Path(name))
    path = site.training.file(trained_step(spec.lora))
    return Input(spec, path.name, site.training.outline(step.shapes, spec.drop), table, path)


def _recorded(spec: Lora, place: str) -> Adapter | None:
    """The adapter's config that a recipe carries."""
    if spec.adapter is None:
        return None
    try:
        return read_adapter(dumps(spec.adapter), "the recipe")
    except ValueError as e:
        raise ZitMergeError(f"{place}.adapter: {e}: take the recipe from the file again") from None


def _check_table(spec: Lora, table: Mapping[str, float], place: str) -> None:
    if spec.strengths != compact(table):
        raise ZitMergeError(
            f"{place}.strengths: the table does not follow from ratio, blocks, layers, effects and overrides: "
            "drop it if you changed them; else another version of zit_merge made this recipe"
        )
