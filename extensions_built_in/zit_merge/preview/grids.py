"""Which pictures a section asks for: every variant of every step, on every spec."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from math import ceil, prod
from typing import Any, NamedTuple

from ..config.schema import Ablate, Preview, Section
from ..errors import ZitMergeError, counted
from ..planning.context import RunContext
from ..planning.types import Input, StepPlan
from ..wording import row, wrapped
from . import metrics
from .ablation import Group, groups
from .image_store import image_store
from .settings import ImageSpec, RenderSettings, settings_of, specs_of
from .sweep import Cell, axes_of, cells_of
from .variants import AdapterVariant, InputVariant, MaskedVariant, StepVariant

LIMIT = 200  # pictures that need no `confirm: true`
GROUPS = 10
_LISTED = 6  # values of a setting, in a sentence
_ACROSS = 8  # pictures beside each other on a sheet at most, where nothing else asks for a number


class Picture(NamedTuple):
    """One variant on one spec."""

    variant: AdapterVariant
    spec: ImageSpec


@dataclass(frozen=True)
class ImageGrid:
    """What stands together on a sheet.

    Attributes:
        kind: `preview`, `sweep` or `ablate`.
        plan: The step.
        variants: In the order of the sheet.
        specs: Each variant is rendered on all of them.
        across: How many variants stand in a row.
        title: One line.
        cells: Of a sweep, one for each variant.
        groups: Of an ablation, one for each variant after the base and the whole.
        asked: Of an ablation.
    """

    kind: str
    plan: StepPlan
    variants: Sequence[AdapterVariant]
    specs: Sequence[ImageSpec]
    across: int
    title: str
    cells: Sequence[Cell] = ()
    groups: Sequence[Group] = ()
    asked: Ablate | None = None

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.plan.name}_{self.kind}"

    @property
    def labels(self) -> list[str]:
        """One for each variant, no two alike."""
        return _distinct([variant.label for variant in self.variants])

    @property
    def headings(self) -> list[str]:
        """One for each spec, no two alike."""
        short = [f"{spec.prompt} (seed {spec.seed})" for spec in self.specs]
        long = [f"{spec.prompt} ({specs_text([spec])})" for spec in self.specs]
        return short if len(set(short)) == len(short) else _distinct(long)

    def pictures(self) -> Iterator[Picture]:
        """Variant by variant, since changing the LoRA takes time too."""
        for variant in self.variants:
            for spec in self.specs:
                yield Picture(variant, spec)


@dataclass(frozen=True)
class PreviewPlan:
    """All pictures of a section.

    Attributes:
        context: Where it runs.
        settings: The model.
        grids: In order of the steps.
        section: For the YAML of a sweep's cells.
    """

    context: RunContext
    settings: RenderSettings
    grids: Sequence[ImageGrid]
    section: Section

    def pictures(self) -> list[Picture]:
        """Every picture once."""
        return list(dict.fromkeys(p for grid in self.grids for p in grid.pictures()))

    def text(self) -> str:
        """For the plan that is printed."""
        lines = row("pictures", f"{len(self.pictures())} with {self.settings.name}")
        for grid in self.grids:
            size = f"{counted(len(grid.variants), 'variant')} x {counted(len(grid.specs), 'picture')}"
            lines += wrapped(f"{grid.title}: {size}, {specs_text(grid.specs)}")
        return "\n".join(lines)


def _distinct(labels: Sequence[str]) -> list[str]:
    """The labels; those that are there already with a number behind them."""
    found: list[str] = []
    for label in labels:
        numbered = (f"{label} ({n})" for n in count(2))
        found.append(label if label not in found else next(name for name in numbered if name not in [*found, *labels]))
    return found


def specs_text(specs: Sequence[ImageSpec]) -> str:
    """`1024 x 1024 pixels, 9 steps, guidance 1, seed 42`."""

    def one(values: Sequence[Any]) -> str:
        found = list(dict.fromkeys(map(str, values)))
        return ", ".join(found if len(found) <= _LISTED else [*found[: _LISTED - 1], "...", found[-1]])

    sizes = one([f"{s.width} x {s.height}" for s in specs])
    guidance = one([f"{s.guidance:g}" for s in specs])
    seeds = one([s.seed for s in specs])
    steps = one([s.steps for s in specs])
    return f"{sizes} pixels, {steps} step{'s' * (steps != '1')}, guidance {guidance}, seed {seeds}"


def _across(count: int) -> int:
    """How many of so many variants stand in a row, so that no row is much shorter than the others."""
    return ceil(count / ceil(count / _ACROSS))


def asks_for_pictures(section: Section) -> bool:
    """Whether any step is to be shown."""
    return any(step.preview or step.sweep or step.ablate for step in section.steps)


def preview_plan(section: Section, context: RunContext, plans: Sequence[StepPlan]) -> PreviewPlan:
    """The pictures of a section.

    Args:
        section: Validated.
        context: Where it runs.
        plans: Of its steps; before a training what the files hold need not be known.

    Raises:
        ZitMergeError: Pictures can't be had as they are asked for; nothing that a merge needs.
    """
    settings = settings_of(section, context)
    image_store(context, settings.row)  # raises where there can be none
    variants = _Variants()
    grids = [e for plan in plans for e in _of_step(plan, section, context, settings, variants)]
    if not grids:
        asked = ", ".join(plan.place or plan.name for plan in plans)
        raise ZitMergeError(f"{asked}: asks for no pictures: write preview: true, sweep or ablate there")
    _check_presets(grids)
    found = PreviewPlan(context, settings, grids, section)
    most = max(grids, key=lambda e: len(e.variants) * len(e.specs))
    _check_number(len(found.pictures()), len(most.variants), len(most.specs), section, f"{most.plan.place}.{most.kind}")
    return found


def _check_number(number: int, variants: int, specs: int, section: Section, place: str) -> None:
    """Raises where there are more pictures than somebody may have wanted."""
    asked = [section.preview, *(part for step in section.steps for part in (step.preview, step.ablate))]
    if number > LIMIT and not any(part and part.confirm for part in asked):
        raise ZitMergeError(
            f"{place}: these are {number} pictures, {variants} x {specs} of them here: set confirm: true in preview if you want "
            "them all, or take fewer prompts, values or groups"
        )


def _check_presets(grids: Sequence[ImageGrid]) -> None:
    """Raises where two ablations would write one preset."""
    places: dict[str, str] = {}
    for grid in grids:
        if grid.asked and (name := grid.asked.preset):
            place = f"{grid.plan.place}.ablate.preset"
            if (other := places.setdefault(name.lower(), place)) != place:
                raise ZitMergeError(f"{place}: {name} is also the name at {other}: give one of them another name")


class _Variants:
    """Equal variants of several steps as one, so that they are counted once."""

    def __init__(self):
        self.base = AdapterVariant("base")
        self._inputs: dict[tuple, InputVariant] = {}

    def of_input(self, i: Input) -> InputVariant:
        key = (i.step.name if i.step else i.path, i.spec.alpha, i.spec.qkv, tuple(i.spec.drop))
        return self._inputs.setdefault(key, InputVariant(i.label, i))


def _of_step(
    plan: StepPlan, section: Section, context: RunContext, settings: RenderSettings, variants: _Variants
) -> Iterator[ImageGrid]:
    step, asked = plan.spec, plan.spec.preview or section.preview or Preview()
    place = context.at("preview") if asked == section.preview else f"{plan.place}.preview"
    result = StepVariant(plan.name, plan)
    if step.preview or step.sweep:
        specs = specs_of(asked, settings, context, place)
    if step.preview:
        inputs = list(dict.fromkeys(map(variants.of_input, plan.inputs)))
        parts = {"base": [variants.base], "inputs": inputs, "result": [result]}
        shown = [variant for part in dict.fromkeys(asked.compare) for variant in parts[part]]
        yield ImageGrid("preview", plan, shown, specs, _across(len(shown)), f"{plan.name}: previews")
    if step.sweep:
        yield _sweep(plan, specs, section)
    if step.ablate:
        own = {} if step.ablate.prompts is None else {"prompts": step.ablate.prompts}
        listed = f"{plan.place}.ablate.prompts" if own else f"{place}.prompts"
        specs = specs_of(asked.model_copy(update=own), settings, context, place, listed)
        yield _ablation(plan, step.ablate, specs, variants, result)


def _sweep(plan: StepPlan, specs: Sequence[ImageSpec], section: Section) -> ImageGrid:
    place = f"{plan.place}.sweep"
    axes = axes_of(plan.spec, place)
    number = prod(len(axis.values) for axis in axes)
    _check_number(number * len(specs), number, len(specs), section, place)  # before every one of them is planned
    cells = cells_of(plan, axes, place)
    title = f"{plan.name}: {' and '.join(axis.key for axis in axes)}"
    shown = [StepVariant(f"{cell.number}: {', '.join(cell.labels)}", cell.plan) for cell in cells]
    across = len(axes[0].values) if len(axes) > 1 else _across(len(shown))
    return ImageGrid("sweep", plan, shown, specs, across, title, cells=cells)


def _ablation(plan: StepPlan, asked: Ablate, specs: Sequence[ImageSpec], variants: _Variants, whole: AdapterVariant) -> ImageGrid:
    place = f"{plan.place}.ablate"
    for n, name in enumerate(asked.metrics):
        metrics.metric(name, f"{place}.metrics[{n}]")
    if asked.by == "components" and asked.groups:
        raise ZitMergeError(f"{place}.groups: are runs of layers, by: components has none: drop groups, or use by: cells")
    present = [m for m in plan.ranks if any(i.counts(m) for i in plan.inputs)]
    if plan.ranks and not present:
        raise ZitMergeError(f"{place}: every strength of the step is 0, so it has no part that does anything: drop ablate")
    found = groups(asked.by, asked.groups or GROUPS, present)
    only = asked.mode == "only"
    shown = [MaskedVariant(f"{'only' if only else 'without'} {group.name}", whole, group, only) for group in found]
    title = f"{plan.name}: ablation by {asked.by}, {'each part alone' if only else 'each part left out in turn'}"
    shown = [variants.base, whole, *shown]
    return ImageGrid("ablate", plan, shown, specs, _across(len(shown)), title, groups=found, asked=asked)
