"""The plan of a section's pictures: grids of variants x image specs, what each picture is made from, and its name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from .. import __version__
from ..config.schema import Ablate, Section
from ..errors import counted
from ..planning.context import RunContext
from ..planning.types import StepPlan
from ..wording import row, wrapped
from .groups import ModuleGroup
from .settings import ImageSpec, RenderSettings
from .variants import AdapterVariant, digest

_LISTED = 6  # values of a setting in a sentence


class Picture(NamedTuple):
    """One variant rendered with one spec."""

    variant: AdapterVariant
    spec: ImageSpec


@dataclass(frozen=True)
class SweepCell:
    """One combination of the values of a sweep.

    Attributes:
        number: From 1, row by row.
        labels: One for each axis.
        plan: The step with these values.
    """

    number: int
    labels: tuple[str, ...]
    plan: StepPlan


@dataclass(frozen=True)
class ImageGrid:
    """The pictures of one contact sheet.

    Attributes:
        kind: `preview`, `sweep` or `ablate`.
        plan: The step.
        variants: In the order of the sheet.
        specs: Each variant is rendered with all of them.
        across: How many variants are in a row.
        title: One line.
        cells: Of a sweep, one for each variant.
        groups: Of an ablation, one for each variant after the base and the whole.
        ablate: Of an ablation, as the config has it.
    """

    kind: str
    plan: StepPlan
    variants: Sequence[AdapterVariant]
    specs: Sequence[ImageSpec]
    across: int
    title: str
    cells: Sequence[SweepCell] = ()
    groups: Sequence[ModuleGroup] = ()
    ablate: Ablate | None = None

    @property
    def name(self) -> str:
        """The stem of its files."""
        return f"{self.plan.name}_{self.kind}"

    @property
    def labels(self) -> list[str]:
        """One for each variant, all different."""
        return _distinct([variant.label for variant in self.variants])

    @property
    def headings(self) -> list[str]:
        """One for each spec, all different."""
        short = [f"{spec.prompt} (seed {spec.seed})" for spec in self.specs]
        long = [f"{spec.prompt} ({specs_text([spec])})" for spec in self.specs]
        return short if len(set(short)) == len(short) else _distinct(long)

    def pictures(self) -> Iterator[Picture]:
        """Variant by variant, since changing the adapter takes time too."""
        for variant in self.variants:
            for spec in self.specs:
                yield Picture(variant, spec)


@dataclass(frozen=True)
class PreviewPlan:
    """All pictures of a section.

    Attributes:
        context: Where it runs.
        settings: The model.
        grids: In the order of the steps.
        section: The section, for the YAML of a sweep's cells.
    """

    context: RunContext
    settings: RenderSettings
    grids: Sequence[ImageGrid]
    section: Section

    def pictures(self) -> list[Picture]:
        """Every picture once."""
        return list(dict.fromkeys(p for grid in self.grids for p in grid.pictures()))

    def text(self) -> str:
        """For the printed plan."""
        lines = row("pictures", f"{len(self.pictures())} with {self.settings.name}")
        for grid in self.grids:
            size = f"{counted(len(grid.variants), 'variant')} x {counted(len(grid.specs), 'picture')}"
            lines += wrapped(f"{grid.title}: {size}, {specs_text(grid.specs)}")
        return "\n".join(lines)


class PictureRecords:
    """What the pictures of a preview are made from, and their names, which are digests of it.

    Args:
        preview: The pictures.
        hashes: Path -> SHA-256 of the tensor data, for the files of all variants.

    Attributes:
        variants: Variant -> everything that determines its deltas.
        pictures: Picture -> everything that determines it.
        digests: Picture -> its name.
    """

    def __init__(self, preview: PreviewPlan, hashes: Mapping[Path, str]):
        pictures = preview.pictures()
        self.variants: Mapping[AdapterVariant, dict[str, Any]] = {
            variant: variant.record(hashes) for variant in dict.fromkeys(p.variant for p in pictures)
        }
        shared = {"zit_merge": __version__, "scene": preview.settings.record()}
        self.pictures: Mapping[Picture, dict[str, Any]] = {
            p: {**shared, "look": self.variants[p.variant], "shot": p.spec.record()} for p in pictures
        }
        self.digests: Mapping[Picture, str] = {p: digest(record) for p, record in self.pictures.items()}


def specs_text(specs: Sequence[ImageSpec]) -> str:
    """`1024 x 1024 pixels, 9 steps, guidance 1, seed 42`."""

    def listed(values: Sequence[Any]) -> str:
        found = list(dict.fromkeys(map(str, values)))
        return ", ".join(found if len(found) <= _LISTED else [*found[: _LISTED - 1], "...", found[-1]])

    sizes = listed([f"{s.width} x {s.height}" for s in specs])
    guidance = listed([f"{s.guidance:g}" for s in specs])
    seeds = listed([s.seed for s in specs])
    steps = listed([s.steps for s in specs])
    return f"{sizes} pixels, {steps} step{'s' * (steps != '1')}, guidance {guidance}, seed {seeds}"


def _distinct(labels: Sequence[str]) -> list[str]:
    """The labels, repeated ones with a number."""
    found: list[str] = []
    for label in labels:
        numbered = (f"{label} ({n})" for n in count(2))
        found.append(label if label not in found else next(name for name in numbered if name not in [*found, *labels]))
    return found
