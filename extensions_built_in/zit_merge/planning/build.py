"""From a section to the plans of its steps.

A plan is made twice by the same code, so that whatever can be known early is checked early: the forecast, before a training,
describes the LoRA to come by what the config says of it; the final plan reads the files' headers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config.schema import TRAINING_ADAPTER, Extract, Lora, Section, Step
from ..errors import SettingError, located, nearest, of_step, other_tensors
from ..files import hub
from ..files.paths import unquoted
from ..formats.checkpoint import Checkpoint
from ..formats.header import common_dtype
from ..formats.metadata import Adapter, base_of, dumps, read_adapter
from ..formats.reader import LoraFile, dtype_name, load_lora, unmatched_error
from ..formats.spec import DTYPES, LoraSpec
from .context import RunContext
from .factors import lora_factors
from .models import bake_target, difference_input, model_label, open_model
from .outputs import check_output, check_room
from .sources import adapter_of_training, checkpoint_loras, is_trained, resolve, trained_step
from .step import step_plan
from .types import BakeTarget, Input, StepBasis, StepPlan


def plan_section(
    section: Section, context: RunContext, *, before_training: bool = False, only: str | None = None
) -> list[StepPlan]:
    """The plans of a section's steps, in order. Reads headers; writes nothing.

    Args:
        section: Validated.
        context: Where it runs.
        before_training: The trained LoRA need not be there yet.
        only: Plan this step and the earlier ones that it uses.

    Raises:
        SettingError: Anything that would stop the run and can be known now.
        ZitMergeError: A file that can't be read.
    """
    wanted = _needed(section, context, only)
    builder = _Builder(section, context, before_training)
    for i, step in enumerate(section.steps):
        if step.name == only and not step.keep and not step.bake:
            step = step.model_copy(update={"keep": True})  # asked for by name
        if step.name in wanted:
            with of_step(step.name):
                builder.add(step, context.at(f"steps[{i}]"))
    plans = list(builder.plans.values())
    with located(context.loc):
        check_room(plans, context, builder.there)
    return plans


def _needed(section: Section, context: RunContext, only: str | None) -> set[str]:
    names = [s.name for s in section.steps]
    if only is None:
        return set(names)
    if only not in names:
        where = context.loc or "the recipe"
        raise SettingError(f"{where} has no such step{nearest(only, names)}; there are {', '.join(names)}", f"--step {only}")
    wanted = {only}
    for step in reversed(section.steps):
        if step.name in wanted:
            wanted |= {lora.source for lora in step.loras} & set(names)
    return wanted


@dataclass(frozen=True)
class _Builder:
    """Plans steps over the earlier ones.

    Attributes:
        section: Validated.
        context: Where it runs.
        before_training: The trained LoRA need not be there yet.
        plans: Name -> plan of the steps so far.
        there: The outputs that are there and need not be made again.
        written: File that one of these steps writes -> the step's name.
        paths: Source and hash -> its file, found once for all steps that read it.
        loras: File with the answers to what it leaves open -> what it holds, read once.
        models: Source and shapes -> the model, described once; None while it is on the hub.
    """

    section: Section
    context: RunContext
    before_training: bool
    plans: dict[str, StepPlan] = field(default_factory=dict)
    there: set[Path] = field(default_factory=set)
    written: dict[Path, str] = field(default_factory=dict)
    paths: dict[tuple[str, str | None], Path | None] = field(default_factory=dict)
    loras: dict[tuple[Any, ...], LoraFile] = field(default_factory=dict)
    models: dict[tuple[str, str], Checkpoint | None] = field(default_factory=dict)

    @cached_property
    def names(self) -> Mapping[str, None]:
        """Of the section's steps, in order."""
        return dict.fromkeys(s.name for s in self.section.steps)

    def add(self, step: Step, loc: str) -> None:
        """Plans the next step."""
        step, inputs = self._inputs(step, loc)
        basis = StepBasis(
            job=self.context.job,
            spec=step,
            inputs=inputs,
            dtype_name=step.save.dtype if step.save.dtype in DTYPES else common_dtype(i.known.dtype_name for i in inputs),
            path=self.context.output(step),
            loc=loc,
            prefix=self.context.prefix,
            bake=self._target(step, loc),
            **self._weights(step, loc),
        )
        plan = step_plan(basis)
        with located(loc):
            self.there.update(check_output(plan, self.context))
        self.plans[step.name] = plan
        if plan.bake:
            owner = step.name if plan.bake.path in plan.targets else self.written.get(plan.bake.path.resolve())
            if owner:
                raise SettingError(f"{plan.bake.path.name} is what the step {owner} writes: give another name", f"{loc}.bake")
        written = [*plan.targets, *([plan.bake.path] if plan.bake else [])]
        self.written.update((target.resolve(), step.name) for target in written)

    def _weights(self, step: Step, loc: str) -> dict[str, Any]:
        """The model by whose norms the rank is chosen, and what a recipe calls it; fields of StepBasis."""
        if not (step.rank_rule and step.rank_rule.weigh):
            return {}
        source = step.base or (step.bake.base if step.bake else None)
        with located(loc):
            if source is None:
                raise SettingError(
                    "needs the model: set base to its path or to trainer (--base PATH on the command line)", "rank.weigh"
                )
            with located("base"):
                model = self._open(source, step)
                if model and step.base_sha256 and model.sha256() != step.base_sha256:
                    raise other_tensors(model.path, step.base_sha256)
        return {"weights": model, "weights_label": model_label(source, self.context)}

    def _open(self, source: str, step: Step) -> Checkpoint | None:
        key = source, step.shapes
        if key not in self.models:
            self.models[key] = open_model(source, self.context, step.shapes)
        return self.models[key]

    def _target(self, step: Step, loc: str) -> BakeTarget | None:
        with located(loc):
            return bake_target(step, self.context)

    def _inputs(self, step: Step, loc: str) -> tuple[Step, tuple[Input, ...]]:
        """The step with the LoRAs that it reads, and its inputs."""
        if not step.checkpoints:
            places = [f"{loc}.loras[{j}]" for j in range(len(step.loras))]
        else:
            place = f"{loc}.checkpoints"
            with located(place):
                loras = checkpoint_loras(step.checkpoints, self.context, self.before_training)
            step, places = step.model_copy(update={"loras": loras}), [place] * len(loras)
        inputs = []
        for spec, place in zip(step.loras, places, strict=True):
            with located(place):
                inputs.append(self._input(spec, step))
        return step, tuple(inputs)

    def _input(self, spec: Lora, step: Step) -> Input:
        if spec.source == TRAINING_ADAPTER and not spec.sha256:
            with located("lora"):
                spec = spec.model_copy(update={"lora": adapter_of_training(self.context)})
        if isinstance(spec.lora, Extract):
            with located("lora"):
                return difference_input(spec, spec.lora, self.context, step.shapes)
        bare = unquoted(spec.source)
        if (
            bare != spec.source
            and not spec.sha256
            and not any(os.path.lexists(folder / spec.source) for folder in self.context.folders)
        ):
            try:
                return self._input(spec.model_copy(update={"lora": bare}), step)
            except SettingError as e:
                e.message = f"{spec.source!r} was read without the quotes or blanks around it: {e.message}"
                raise
        table = lora_factors(spec)
        if not spec.sha256 and (earlier := self.plans.get(spec.source)):
            for key in ("alpha", "qkv", "drop"):
                if getattr(spec, key):
                    raise SettingError(f"the file of the step {spec.source} leaves nothing open: drop {key}", key)
            return Input(spec, spec.source, earlier.result, table, earlier.output_path, step=earlier)
        with located("lora"):
            path = self._path(spec)
        if path is None:
            return self._absent(spec, step, table)
        base = self._base(spec)
        lora = self._read(spec, path, step.allow_unmatched)
        model, model_name = self._model(spec, lora, step)
        known = LoraSpec(lora.ranks, lora.shapes, dtype_name(lora), tuple(lora.algorithms))
        if spec.source.startswith(hub.HUB_PREFIX):
            file = hub.parse(spec.source)
            if not spec.sha256:
                file = file.at(path)
            label, source = file.name, str(file)
        else:
            label, source = Path(spec.source).name if spec.sha256 else path.name, ""
        return Input(spec, label, known, table, path, lora, model=model, model_label=model_name, source=source, base=base)

    def _base(self, spec: Lora) -> dict[str, str]:
        """What it was trained on, as the training in the job or a recipe says."""
        if spec.trained_on:
            return base_of(**spec.trained_on.model_dump())
        return self.context.training.base if self.context.training and is_trained(spec) else {}

    def _path(self, spec: Lora) -> Path | None:
        if not spec.sha256 and spec.source in self.names:
            raise SettingError(f"{spec.source} is this step or a later one: a step can use only the steps before it")
        key = spec.source, spec.sha256
        if key not in self.paths:
            self.paths[key] = resolve(spec, self.context, list(self.names), self.before_training)
        path = self.paths[key]
        if path and (earlier := self.written.get(path.resolve())):
            raise SettingError(f"{spec.source} is what the step {earlier} writes: use lora: {earlier}")
        return path

    def _read(self, spec: Lora, path: Path, allow_unmatched: bool) -> LoraFile:
        key = path, spec.alpha, spec.qkv, tuple(spec.drop), dumps(spec.adapter)
        if key not in self.loras:
            self.loras[key] = load_lora(path, alpha=spec.alpha, qkv=spec.qkv, drop=spec.drop, adapter=_recorded(spec))
        lora = self.loras[key]
        if lora.unmatched and not allow_unmatched:
            raise unmatched_error(lora)
        if lora.questions:
            raise SettingError(f"{lora.path.name}: {lora.questions[0]} (see docs/formats.md)")
        return lora

    def _model(self, spec: Lora, lora: LoraFile, step: Step) -> tuple[Checkpoint | None, str]:
        """The model whose weights a LoRA's changes need, and what a recipe calls it.

        Raises:
            SettingError: None is named, or it is not the one of the recipe.
        """
        source = self._model_source(spec, step)
        if not lora.needs_base:
            return None, ""
        if source is None:
            raise SettingError(f"{lora.path.name}: {lora.base_question}")
        with located("base"):
            model = self._open(source, step)
        if model and spec.base_sha256 and model.sha256() != spec.base_sha256:
            raise other_tensors(model.path, spec.base_sha256)
        return model, model_label(source, self.context)

    def _model_source(self, spec: Lora, step: Step) -> str | None:
        return spec.base or (step.bake.base if step.bake else None) or step.base

    def _absent(self, spec: Lora, step: Step, table: Mapping[str, float]) -> Input:
        """What a training will save, or what the hub has and nobody has fetched."""
        if spec.source.startswith(hub.HUB_PREFIX):
            name = hub.parse(spec.source).name
            return Input(spec, name, LoraSpec({}, {}, "bf16"), table, Path(name))
        training = self.context.training
        assert training, "only a training's LoRA has no path before it is there"
        path, has_base = training.file(trained_step(spec.source)), self._model_source(spec, step) is not None
        return Input(spec, path.name, training.spec(step.shapes, spec.drop, has_base=has_base), table, path, base=training.base)


def _recorded(spec: Lora) -> Adapter | None:
    """The adapter's config that a recipe carries."""
    if spec.adapter is None:
        return None
    try:
        return read_adapter(dumps(spec.adapter), "the recipe")
    except ValueError as e:
        raise SettingError(f"{e}: take the recipe from the file again", "adapter") from None
