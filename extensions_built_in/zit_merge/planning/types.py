"""What a plan is made of. A StepPlan is complete when it is made; a rank that follows from the numbers gives a second one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.schema import Bake, Lora, RankRule, Step
from ..errors import ZitMergeError
from ..files.atomic import part_path
from ..files.paths import user_path
from ..formats.checkpoint import Checkpoint, Seen
from ..formats.checkpoint_writer import checkpoint_layout
from ..formats.difference import Difference
from ..formats.forms import FORMS, Form
from ..formats.metadata import BASE_KEY, CHECK_KEY, OF_RANKS, RECIPE_KEY, Base, adapter_ranks, dumps
from ..formats.reader import LoraFile
from ..formats.safetensors_file import size_of
from ..formats.spec import Layout, LoraSpec
from ..model.strengths import compact

if TYPE_CHECKING:
    import torch


def with_hashes(recipe: Mapping[str, Any], hashes: Mapping[Path, str]) -> dict[str, Any]:
    """A recipe with hashes in place of paths.

    Args:
        recipe: With paths.
        hashes: Path -> SHA-256 of the tensor data.
    """

    def hashed(lora: Mapping[str, Any]) -> dict[str, Any]:
        return {key: hashes[value] if isinstance(value, Path) else value for key, value in lora.items()}

    steps = [{**hashed(step), "loras": [hashed(lora) for lora in step["loras"]]} for step in recipe["steps"]]
    return {**recipe, "steps": [s | ({"bake": hashed(s["bake"])} if "bake" in s else {}) for s in steps]}


@dataclass(frozen=True)
class Input:
    """One LoRA of a step.

    Attributes:
        spec: As the config has it; its ratio stands here alone.
        label: Its name in recipes and tables: a file name, or the name of an earlier step.
        known: Ranks, shapes, dtype.
        factors: Module -> factor of its weights, for all of Z-Image; the ratio is no part of it.
        path: Where the file is or will be.
        lora: The opened file; None for an earlier step's, for a training still to come, and for one still on the hub.
        pair: The two models whose difference it is.
        model: Whose weights its changes need, where they do.
        model_label: What a recipe calls that.
        step: It is the output of this earlier step.
        source: What a recipe calls it, where that is not its label.
        base: What it was trained on, where the job or a recipe says it.
    """

    spec: Lora
    label: str
    known: LoraSpec
    factors: Mapping[str, float]
    path: Path
    lora: LoraFile | None = None
    pair: Difference | None = None
    model: Checkpoint | None = None
    model_label: str = ""
    step: StepPlan | None = None
    source: str = ""
    base: Base = field(default_factory=dict)

    @property
    def models(self) -> tuple[Checkpoint, ...]:
        """The whole models that it is read from, or with."""
        return (self.pair.tuned, self.pair.base) if self.pair else (self.model,) if self.model else ()

    @cached_property
    def strengths(self) -> Mapping[str, float]:
        """Module -> ratio * factor."""
        return {module: self.spec.ratio * factor for module, factor in self.factors.items()}

    @cached_property
    def rows(self) -> Mapping[str, object]:
        """The strengths as a recipe has them: runs of equal layers share a row."""
        return compact(self.strengths)

    def counts(self, module: str) -> bool:
        """Whether it changes the output at this module."""
        return module in self.known.ranks and self.strengths[module] != 0

    @property
    def metadata(self) -> Mapping[str, str]:
        """The file's own, or what the step before us will write."""
        if self.step:
            return self.step.draft
        own = self.lora.metadata if self.lora else {}
        return {**own, BASE_KEY: dumps([self.base])} if self.base else own


@dataclass(frozen=True)
class BakeTarget:
    """The whole model that a step writes.

    Attributes:
        spec: As the config has it.
        base: What the merge is added to; None while it is on the hub.
        label: What a recipe calls the base.
        path: A folder for diffusers, else a file.
    """

    spec: Bake
    base: Checkpoint | None
    label: str
    path: Path

    @property
    def size(self) -> int:
        """Its bytes, headers left out; 0 while its base is not known."""
        if self.base is None:
            return 0
        return sum(size_of(t.dtype, t.shape) for t in checkpoint_layout(self.base, self.spec.format, self.spec.dtype))


@dataclass(frozen=True, kw_only=True)
class StepBasis:
    """What a step's plan follows from.

    Attributes:
        job: The job's name.
        spec: The step as the config has it.
        inputs: In the order of the config.
        dtype_name: Of the factors written, as a config has it.
        path: The output.
        loc: Of the step in the config.
        prefix: What the names of outputs begin with.
        bake: The whole model that it writes, if it does.
        weights: The model by whose norms a rule for the rank weighs, if it does; None while it is on the hub too.
        weights_label: What a recipe calls that.
    """

    job: str
    spec: Step
    inputs: tuple[Input, ...]
    dtype_name: str
    path: Path
    loc: str
    prefix: str
    bake: BakeTarget | None = None
    weights: Checkpoint | None = None
    weights_label: str = ""

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors written, as torch has it."""
        from ..formats.dtypes import TORCH_DTYPES

        return TORCH_DTYPES[self.dtype_name]

    @property
    def name(self) -> str:
        """The step's name."""
        return self.spec.name

    @property
    def rank_limit(self) -> int | None:
        """The highest rank that was asked for; None where nothing limits it."""
        asked = self.spec.rank
        if isinstance(asked, RankRule):
            return asked.max
        if asked == "same":
            return max((i.known.rank for i in self.inputs), default=1)
        return asked if isinstance(asked, int) else None

    @property
    def kept_lokr(self) -> LoraFile | None:
        """The LoKr that stays one, if the step only scales it."""
        return self.inputs[0].lora if self.spec.save.keep_lokr else None

    @property
    def output_path(self) -> Path:
        """Where later steps of the run find it: a step that is not kept never gets its final name."""
        return self.path if self.spec.keep else part_path(self.path)

    @contextlib.contextmanager
    def computing(self, module: str) -> Iterator[None]:
        """Decompositions that numbers without end make impossible as a sentence.

        Args:
            module: What is computed.
        """
        import torch

        try:
            yield
        except torch.linalg.LinAlgError as e:
            raise ZitMergeError(
                f"{self.path.name}: {module} is too large to be computed: use smaller strengths, or leave the LoRA out that is "
                "so strong there (inspect shows its norms)"
            ) from e

    @property
    def form(self) -> Form:
        """How the output names things."""
        return FORMS[self.spec.save.format]

    @cached_property
    def hashed(self) -> Mapping[Path, Seen]:
        """The files whose SHA-256 the recipe needs, as they were read: this step's own, and those of the steps that it uses."""
        found: dict[Path, Seen] = {i.lora.path: i.lora.stamp for i in self.inputs if i.lora}
        for i in self.inputs:
            found |= i.step.hashed if i.step else {}
            found |= {model.path: model for model in i.models}
        if self.weights:
            found[self.weights.path] = self.weights
        return found

    @cached_property
    def copy_folder(self) -> Path:
        """Where a copy goes.

        Raises:
            SettingError: `copy_to` is no path.
        """
        return user_path(self.spec.copy_to or "")

    @property
    def targets(self) -> list[Path]:
        """Every file that will be there at the end: the output, and its copy."""
        copies = [self.copy_folder / self.path.name] if self.spec.copy_to else []
        return [self.path, *copies] if self.spec.keep else []


Planner = Callable[[StepBasis, "Mapping[str, int] | None"], "StepPlan"]


@dataclass(frozen=True, kw_only=True)
class StepPlan(StepBasis):
    """One merge, complete.

    Attributes:
        shapes: Module -> (out, in) of every module written, in the model's order; empty while the sizes are not known.
        stacked: Module -> components before truncation.
        ranks: Module -> rank, of every module written; the same throughout unless `uniform: false`.
        is_open: The ranks are only bounds: they follow from singular values, which the run looks at.
        layout: The tensors of the output, in order; empty while they are not known.
        recipe: What makes the output again, with the paths of files in place of their hashes.
        draft: The output's metadata, with placeholders of at least the same length for what only the run finds.
        bytes: The output's size; 0 while it is not known.
        planner: Makes a plan of what it follows from and, once the numbers are known, module -> rank.
        warnings: What a person should know, a sentence each.
    """

    shapes: Mapping[str, tuple[int, int]]
    stacked: Mapping[str, int]
    ranks: Mapping[str, int]
    is_open: bool
    layout: Layout
    recipe: Mapping[str, Any]
    draft: Mapping[str, str]
    bytes: int
    planner: Planner = field(repr=False, compare=False)
    warnings: tuple[str, ...] = ()

    def revised(self, chosen: Mapping[str, int] | None = None, **changes: Any) -> StepPlan:
        """A second plan, where something is known or wanted otherwise than in this one, which stays as it is.

        Args:
            chosen: Module -> rank, once the numbers have settled a rule for the rank.
            changes: Fields of StepBasis: `inputs`, `spec`.

        Raises:
            SettingError: The inputs don't belong together, or the rank has no meaning for them.
        """
        basis = {f.name: getattr(self, f.name) for f in fields(StepBasis)} | changes
        return self.planner(StepBasis(**basis), chosen)

    def over(self, done: Mapping[str, StepPlan]) -> StepPlan:
        """The plan over the earlier steps as they came out: ranks that followed from the numbers are known now.

        Args:
            done: Name -> plan of the steps before it, as they were run.
        """
        if not any(i.step and i.step.follows_from_numbers for i in self.inputs):
            return self
        earlier = [done.get(i.step.name) if i.step else None for i in self.inputs]
        inputs = [replace(i, step=e, known=e.result) if e else i for i, e in zip(self.inputs, earlier, strict=True)]
        return self.revised(inputs=tuple(inputs))

    def as_found(self, file: LoraFile) -> StepPlan:
        """The plan of its file, which is there, with the ranks that followed from the numbers."""
        if not self.is_open:
            return self
        if self.spec.save.uniform:
            return self.revised(dict.fromkeys(self.ranks, min(file.ranks.values())))  # fused modules have the sum of theirs
        return self.revised(adapter_ranks(file.metadata, self.ranks))

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(self.ranks.values(), default=0)

    @cached_property
    def cut(self) -> frozenset[str]:
        """The modules whose change is approximated by one of lower rank."""
        return frozenset(() if self.spec.save.keep_lokr else (m for m, n in self.stacked.items() if self.ranks[m] < n))

    def metadata(self, hashes: Mapping[Path, str]) -> dict[str, str]:
        """The output's metadata, but for what its check finds.

        Args:
            hashes: Path -> SHA-256 of the tensor data, for every file of `hashed`.
        """
        draft = {key: text for key, text in self.draft.items() if key != CHECK_KEY}
        return draft | {RECIPE_KEY: dumps(with_hashes(self.recipe, hashes))}

    def made(self, metadata: Mapping[str, str], hashes: Mapping[Path, str]) -> bool:
        """Whether a file of these metadata is the output of this recipe, by this version.

        Args:
            metadata: Of the file.
            hashes: Path -> SHA-256 of the tensor data, for every file of `hashed`.
        """
        wanted, found = self.metadata(hashes), {key: text for key, text in metadata.items() if key != CHECK_KEY}
        fixed = wanted.keys() - set(OF_RANKS if self.follows_from_numbers else ())
        return found.keys() == wanted.keys() and all(found[key] == wanted[key] for key in fixed)

    @cached_property
    def follows_from_numbers(self) -> bool:
        """Whether its ranks, or those of a step that it uses, are known only when the numbers are."""
        return self.is_open or any(i.step.follows_from_numbers for i in self.inputs if i.step)

    @cached_property
    def result(self) -> LoraSpec:
        """What later steps can know of the output."""
        if self.spec.save.keep_lokr:
            known = self.inputs[0].known
            ranks = self.ranks if self.kept_lokr else known.ranks
            return LoraSpec(ranks, known.shapes, self.dtype_name, known.algorithms)
        units = self.form.units(self.ranks).values()
        ranks = {m: sum(self.ranks[n] for n in unit) for unit in units for m in unit}  # fused ones are block-diagonal
        return LoraSpec(ranks, self.shapes, self.dtype_name)


def steps_to_make(plans: Sequence[StepPlan], there: Collection[Path]) -> set[str]:
    """Names of the steps whose LoRA is not there, and of those that they use and that are not there either.

    Args:
        plans: Of a section, in order.
        there: The outputs, whole models too, that are there from the same recipe.
    """
    steps: set[str] = set()
    for plan in reversed(plans):
        is_made = plan.name in steps or (plan.spec.keep and plan.path not in there)
        if is_made:
            steps.add(plan.name)
        if is_made or (plan.bake and plan.bake.path not in there):
            steps |= {i.step.name for i in plan.inputs if i.step and i.step.path not in there}
    return steps
