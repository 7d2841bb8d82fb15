"""Which pictures a section asks for: every look of every step, on every shot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

from ..config import Ablate, Preview, Section
from ..errors import ZitMergeError, counted
from ..plan import Input, StepPlan
from ..sources import Site
from . import metrics
from .ablation import Group, groups
from .looks import Look, OfInput, OfStep, Without
from .scene import Scene, Shot, scene_of, shots_of
from .sweep import Cell, axes_of, cells_of

LIMIT = 200  # pictures that need no `confirm: true`
GROUPS = 10
_ACROSS = 8  # pictures beside each other on a sheet, where nothing else asks for a number


class Picture(NamedTuple):
    """One look on one shot."""

    look: Look
    shot: Shot


@dataclass(frozen=True)
class Exhibit:
    """What stands together on a sheet.

    Attributes:
        kind: `preview`, `sweep` or `ablate`.
        plan: The step.
        looks: In the order of the sheet.
        shots: Each look is rendered on all of them.
        across: How many looks stand in a row.
        title: One line.
        cells: Of a sweep, one for each look.
        groups: Of an ablation, one for each look after the base and the whole.
        asked: Of an ablation.
    """

    kind: str
    plan: StepPlan
    looks: Sequence[Look]
    shots: Sequence[Shot]
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
        """One for each look, no two alike."""
        return _distinct([look.label for look in self.looks])

    @property
    def headings(self) -> list[str]:
        """One for each shot, no two alike."""
        short = [f"{shot.prompt} (seed {shot.seed})" for shot in self.shots]
        return short if len(set(short)) == len(short) else [f"{s.prompt} ({shots_text([s])})" for s in self.shots]

    def pictures(self) -> Iterator[Picture]:
        """Look by look, since changing the LoRA takes time too."""
        for look in self.looks:
            for shot in self.shots:
                yield Picture(look, shot)


@dataclass(frozen=True)
class Exhibition:
    """All pictures of a section.

    Attributes:
        site: Where it runs.
        scene: The model.
        exhibits: In order of the steps.
        section: For the YAML of a sweep's cells.
    """

    site: Site
    scene: Scene
    exhibits: Sequence[Exhibit]
    section: Section

    def pictures(self) -> list[Picture]:
        """Every picture once."""
        return list(dict.fromkeys(p for exhibit in self.exhibits for p in exhibit.pictures()))

    def text(self) -> str:
        """For the plan that is printed."""
        lines = [f"pictures      {len(self.pictures())} with {self.scene.name}"]
        for exhibit in self.exhibits:
            size = f"{counted(len(exhibit.looks), 'look')} x {counted(len(exhibit.shots), 'shot')}"
            lines.append(f"  {exhibit.title}: {size}, {shots_text(exhibit.shots)}")
        return "\n".join(lines)


def _distinct(labels: Sequence[str]) -> list[str]:
    """The labels; those that are there already with a number behind them."""
    found: list[str] = []
    for label in labels:
        numbered = (f"{label} ({n})" for n in count(2))
        found.append(label if label not in found else next(name for name in numbered if name not in [*found, *labels]))
    return found


def shots_text(shots: Sequence[Shot]) -> str:
    """`1024 x 1024 pixels, 9 steps, guidance 1, seed 42`."""

    def one(values: Sequence[Any]) -> str:
        return ", ".join(dict.fromkeys(map(str, values)))

    sizes = one([f"{s.width} x {s.height}" for s in shots])
    guidance = one([f"{s.guidance:g}" for s in shots])
    seeds = one([s.seed for s in shots])
    return f"{sizes} pixels, {one([s.steps for s in shots])} steps, guidance {guidance}, seed {seeds}"


def asks_for_pictures(section: Section) -> bool:
    """Whether any step is to be shown."""
    return any(step.preview or step.sweep or step.ablate for step in section.steps)


def exhibition_of(section: Section, site: Site, plans: Sequence[StepPlan]) -> Exhibition:
    """The pictures of a section.

    Args:
        section: Validated.
        site: Where it runs.
        plans: Of its steps; before a training what the files hold need not be known.

    Raises:
        ZitMergeError: Pictures can't be had as they are asked for; nothing that a merge needs.
    """
    scene = scene_of(section, site)
    looks = _Looks()
    numbers = {step.name: i for i, step in enumerate(section.steps)}
    exhibits = [e for plan in plans for e in _of_step(plan, site, scene, looks, site.at(f"steps[{numbers[plan.name]}]"))]
    found = Exhibition(site, scene, exhibits, section)
    number = len(found.pictures())
    confirmed = any(asked and asked.confirm for step in section.steps for asked in (step.preview, step.ablate))
    if number > LIMIT and not confirmed:
        most = max(exhibits, key=lambda e: len(e.looks) * len(e.shots))
        raise ZitMergeError(
            f"{most.plan.place}.{most.kind}: these are {number} pictures, {len(most.looks)} x {len(most.shots)} of them here: "
            "set confirm: true in preview if you want them all, or take fewer prompts, values or groups"
        )
    return found


class _Looks:
    """Equal looks of several steps as one, so that they are counted once."""

    def __init__(self):
        self.base = Look("base")
        self._inputs: dict[tuple, OfInput] = {}

    def of_input(self, i: Input) -> OfInput:
        key = (i.step.name if i.step else i.path, i.spec.alpha, i.spec.qkv, tuple(i.spec.drop))
        return self._inputs.setdefault(key, OfInput(i.label, i))


def _of_step(plan: StepPlan, site: Site, scene: Scene, looks: _Looks, place: str) -> Iterator[Exhibit]:
    step, asked = plan.spec, plan.spec.preview or Preview()
    result = OfStep(plan.name, plan)
    if step.preview or step.sweep:
        shots = shots_of(asked, scene, site, f"{place}.preview")
    if step.preview:
        inputs = list(dict.fromkeys(map(looks.of_input, plan.inputs)))
        parts = {"base": [looks.base], "inputs": inputs, "result": [result]}
        shown = [look for part in dict.fromkeys(asked.compare) for look in parts[part]]
        yield Exhibit("preview", plan, shown, shots, min(len(shown), _ACROSS), f"{plan.name}: previews")
    if step.sweep:
        axes = axes_of(step, f"{place}.sweep")
        cells = cells_of(plan, axes, f"{place}.sweep")
        title = f"{plan.name}: {' and '.join(axis.key for axis in axes)}"
        shown = [OfStep(f"{cell.number}: {', '.join(cell.labels)}", cell.plan) for cell in cells]
        yield Exhibit("sweep", plan, shown, shots, len(axes[0].values), title, cells=cells)
    if step.ablate:
        yield _ablation(
            plan, step.ablate, shots_of(_asked(asked, step.ablate), scene, site, f"{place}.ablate"), looks, result, place
        )


def _asked(preview: Preview, ablate: Ablate) -> Preview:
    """The preview's settings with the ablation's own prompts."""
    return preview.model_copy(update={"prompts": ablate.prompts}) if ablate.prompts is not None else preview


def _ablation(plan: StepPlan, asked: Ablate, shots: Sequence[Shot], looks: _Looks, whole: Look, place: str) -> Exhibit:
    for n, name in enumerate(asked.metrics):
        metrics.metric(name, f"{place}.ablate.metrics[{n}]")
    if asked.by == "components" and asked.groups:
        raise ZitMergeError(f"{place}.ablate.groups: are runs of layers, by: components has none: drop groups, or use by: cells")
    present = [m for m in plan.ranks if any(i.counts(m) for i in plan.inputs)]
    found = groups(asked.by, asked.groups or GROUPS, present)
    only = asked.mode == "only"
    shown = [Without(f"{'only' if only else 'without'} {group.name}", whole, group, only) for group in found]
    title = f"{plan.name}: {'only' if only else 'without'} one of its {asked.by}"
    shown = [looks.base, whole, *shown]
    return Exhibit("ablate", plan, shown, shots, min(len(shown), _ACROSS), title, groups=found, asked=asked)
