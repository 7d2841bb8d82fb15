"""From the steps of a section to the grids of pictures that they ask for: previews, sweeps and ablations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil, prod

from ..config.schema import SHOWN, Ablate, Preview, Section, Step
from ..errors import SettingError, joined, located
from ..planning.context import RunContext
from ..planning.types import Input, StepPlan
from .groups import BY_COMPONENTS, ONLY, module_groups
from .image_store import image_store
from .metrics import check_metric
from .plan import ImageGrid, PreviewPlan
from .samples import settings_of, specs_of
from .settings import ImageSpec, RenderSettings
from .sweep import axes_of, cells_of
from .variants import AdapterVariant, InputVariant, MaskedVariant, StepVariant

LIMIT = 200  # pictures that need no `confirm: true`
GROUPS = 10
_ACROSS = 8  # pictures in a row of a sheet at most, unless a sweep has more values


def preview_plan(section: Section, context: RunContext, plans: Sequence[StepPlan]) -> PreviewPlan:
    """The pictures of a section.

    Args:
        section: Validated.
        context: Where it runs.
        plans: Of its steps; before a training the content of its files need not be known.

    Raises:
        ZitMergeError: These pictures can't be rendered. Merges are not affected.
    """
    settings = settings_of(section, context)
    image_store(context, settings.row)  # raises where pictures can't be stored
    builder = _GridBuilder(section, context, settings)
    grids = [grid for plan in plans for grid in builder.grids(plan)]
    if not grids:
        steps = ", ".join(plan.loc or plan.name for plan in plans)
        raise SettingError("asks for no pictures: write preview: true, sweep or ablate there", steps)
    _check_presets(grids)
    preview = PreviewPlan(context, settings, grids, section)
    largest = max(grids, key=lambda grid: len(grid.variants) * len(grid.specs))
    with located(joined(largest.plan.loc, largest.kind)):
        _check_count(len(preview.pictures()), len(largest.variants), len(largest.specs), section)
    return preview


def _check_count(pictures: int, variants: int, specs: int, section: Section) -> None:
    """Raises where there are many pictures and nobody has confirmed them."""
    confirmable = [section.preview, *(part for step in section.steps for part in (step.preview, step.ablate))]
    if pictures > LIMIT and not any(part and part.confirm for part in confirmable):
        raise SettingError(
            f"these are {pictures} pictures, {variants} x {specs} of them here: set confirm: true in preview if you "
            "want them all, or use fewer prompts, values or groups"
        )


def _check_presets(grids: Sequence[ImageGrid]) -> None:
    """Raises where two ablations would write one preset."""
    locs: dict[str, str] = {}
    for grid in grids:
        if grid.ablate and (name := grid.ablate.preset):
            loc = joined(grid.plan.loc, "ablate.preset")
            if (other := locs.setdefault(name.lower(), loc)) != loc:
                raise SettingError(f"{name} is also the name at {other}: rename one of them", loc)


def _across(count: int) -> int:
    """How many of `count` variants are in a row, so that all rows are about equally long."""
    return ceil(count / ceil(count / _ACROSS))


class _GridBuilder:
    """Builds the grids of a section's steps; the base and equal inputs of several steps are one variant.

    Args:
        section: Validated.
        context: Where it runs.
        settings: The model and the training's samples.
    """

    def __init__(self, section: Section, context: RunContext, settings: RenderSettings):
        self._section, self._context, self._settings = section, context, settings
        self._base = AdapterVariant("base")
        self._inputs: dict[tuple, InputVariant] = {}

    def grids(self, plan: StepPlan) -> Iterator[ImageGrid]:
        """The grids of one step."""
        step, result = plan.spec, StepVariant(plan.name, plan)
        if step.preview:
            yield self._preview(plan, step.preview, result)
        if step.sweep:
            yield self._sweep(plan)
        if step.ablate:
            yield self._ablation(plan, step.ablate, result)

    def _asked(self, step: Step) -> Preview:
        """The settings of a step's pictures: its own `preview`, else the section's."""
        return step.preview or self._section.preview or Preview()

    def _loc(self, plan: StepPlan) -> str:
        """Where these settings were written."""
        return self._context.at("preview") if self._asked(plan.spec) == self._section.preview else joined(plan.loc, "preview")

    def _specs(self, plan: StepPlan) -> tuple[ImageSpec, ...]:
        return specs_of(self._asked(plan.spec), self._settings, self._context, self._loc(plan))

    def _input(self, i: Input) -> InputVariant:
        key = (i.step.name if i.step else i.path, i.spec.alpha, i.spec.qkv, tuple(i.spec.drop))
        return self._inputs.setdefault(key, InputVariant(i.label, i))

    def _preview(self, plan: StepPlan, asked: Preview, result: StepVariant) -> ImageGrid:
        inputs = list(dict.fromkeys(map(self._input, plan.inputs)))
        shown: list[Sequence[AdapterVariant]] = [[self._base], inputs, [result]]
        known = dict(zip(SHOWN, shown, strict=True))
        variants = [variant for name in dict.fromkeys(asked.compare) for variant in known[name]]
        return ImageGrid("preview", plan, variants, self._specs(plan), _across(len(variants)), f"{plan.name}: previews")

    def _sweep(self, plan: StepPlan) -> ImageGrid:
        specs = self._specs(plan)
        with located(joined(plan.loc, "sweep")):
            axes = axes_of(plan.spec)
            count = prod(len(axis.values) for axis in axes)
            _check_count(count * len(specs), count, len(specs), self._section)  # before all of them are planned
        cells = cells_of(plan, axes)
        variants = [StepVariant(f"{cell.number}: {', '.join(cell.labels)}", cell.plan) for cell in cells]
        across = len(axes[0].values) if len(axes) > 1 else _across(len(variants))
        title = f"{plan.name}: {' and '.join(axis.key for axis in axes)}"
        return ImageGrid("sweep", plan, variants, specs, across, title, cells=cells)

    def _ablation(self, plan: StepPlan, ablate: Ablate, whole: StepVariant) -> ImageGrid:
        specs = self._ablation_specs(plan, ablate)
        present = [m for m in plan.ranks if any(i.counts(m) for i in plan.inputs)]
        with located(joined(plan.loc, "ablate")):
            for n, name in enumerate(ablate.metrics):
                with located(f"metrics[{n}]"):
                    check_metric(name)
            if ablate.by == BY_COMPONENTS and ablate.groups:
                raise SettingError("are runs of layers, by: components has none: drop groups, or use by: cells", "groups")
            if plan.ranks and not present:
                raise SettingError("every strength of the step is 0, so no part has an effect: drop ablate")
        groups, only = module_groups(ablate.by, ablate.groups or GROUPS, present), ablate.mode == ONLY
        parts = [MaskedVariant(f"{'only' if only else 'without'} {group.name}", whole, group, only) for group in groups]
        variants = [self._base, whole, *parts]
        title = f"{plan.name}: ablation by {ablate.by}, {'each part alone' if only else 'each part left out in turn'}"
        return ImageGrid("ablate", plan, variants, specs, _across(len(variants)), title, groups=groups, ablate=ablate)

    def _ablation_specs(self, plan: StepPlan, ablate: Ablate) -> tuple[ImageSpec, ...]:
        """With the ablation's own prompts, if it has any."""
        if ablate.prompts is None:
            return self._specs(plan)
        asked = self._asked(plan.spec).model_copy(update={"prompts": ablate.prompts})
        return specs_of(asked, self._settings, self._context, self._loc(plan), joined(plan.loc, "ablate.prompts"))
