"""From rendered pictures to files for people and programs: samples, contact sheets, JSON, charts and presets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL.Image import Image

from .. import __version__
from ..config.schema import Ablate
from ..errors import ZitMergeError, counted, located
from ..files.paths import without_users
from ..progress import SILENT, Progress
from ..wording import copyable
from .ablation import Ablation, measure
from .ablation_text import ablation_text
from .image_store import ImageStore
from .plan import ImageGrid, Picture, PictureRecords, PreviewPlan, specs_text
from .section_yaml import section_yaml
from .settings import ImageSpec
from .sheet import Block, edge_of, sheet
from .variants import AdapterVariant


@dataclass(frozen=True)
class GridPicture:
    """A picture as it is on a sheet.

    Attributes:
        heading: Of its spec.
        label: Of its variant.
        yaml: The section that makes it, for a cell of a sweep; else empty.
        path: Its file.
    """

    heading: str
    label: str
    yaml: str
    path: Path


@dataclass(frozen=True)
class GridResult:
    """The outputs of a grid.

    Attributes:
        grid: What was asked for.
        pictures: Spec by spec.
        ablation: What was measured; None for other grids.
        files: The sheet, then everything else that was written besides pictures.
        notes: What a person should know, a sentence each.
        preset: The YAML of the ablation's preset; empty if there is none.
    """

    grid: ImageGrid
    pictures: Sequence[GridPicture]
    ablation: Ablation | None
    files: Sequence[Path]
    notes: Sequence[str] = ()
    preset: str = ""

    def text(self) -> str:
        """For the terminal."""
        lines = [
            f"{self.grid.title}: {counted(len(self.pictures), 'picture')}",
            *(f"    {copyable(path)}" for path in self.files),
        ]
        return "\n".join([*lines, *self.notes, *([ablation_text(self.ablation)] if self.ablation else [])])


class GridWriter:
    """Writes the outputs of grids whose pictures are all in the store.

    Args:
        preview: The plan of the grids.
        store: Has the pictures.
        records: What they were made from.
        progress: Shows the groups of an ablation, and may stop the work.
    """

    def __init__(self, preview: PreviewPlan, store: ImageStore, records: PictureRecords, progress: Progress = SILENT):
        self._preview, self._store, self._records, self._progress = preview, store, records, progress

    def write(self, grid: ImageGrid) -> GridResult:
        """Writes everything of a grid.

        Args:
            grid: One of the plan.

        Raises:
            ZitMergeError: A picture can't be read, or a file can't be written.
        """
        ablation = self._measure(grid, grid.ablate) if grid.ablate else None
        if not ablation:  # an ablation's are to be measured: too many, and too similar, to look at one by one
            self._add_samples(grid)
        yamls = [section_yaml(self._preview.section, cell.plan.spec, shared=True) for cell in grid.cells]
        yamls = yamls or [""] * len(grid.variants)
        facts = self._facts(grid, yamls) | ({"ablation": ablation.facts()} if ablation else {})
        files = [
            self._store.write(f"{grid.name}.png", self._sheet(grid, ablation)),
            self._store.write(f"{grid.name}.json", json.dumps(without_users(facts), indent=1, default=str).encode()),
        ]
        notes, preset = list[str](), ""
        if ablation and grid.ablate:
            files.append(self._store.write(f"{grid.name}_chart.png", _chart(ablation)))
            preset, notes = _preset(grid.ablate, ablation)
            if preset:
                files.append(self._store.write(f"{grid.ablate.preset}.yaml", preset.encode()))
                notes = [f"to use the preset {grid.ablate.preset}: preset: {copyable(files[-1])}"]
        return GridResult(grid, self._pictures(grid, yamls), ablation, files, notes, preset)

    def _digest(self, variant: AdapterVariant, spec: ImageSpec) -> str:
        return self._records.digests[Picture(variant, spec)]

    def _pictures(self, grid: ImageGrid, yamls: Sequence[str]) -> list[GridPicture]:
        return [
            GridPicture(heading, label, text, self._store.path(self._digest(variant, spec)))
            for spec, heading in zip(grid.specs, grid.headings, strict=True)
            for variant, label, text in zip(grid.variants, grid.labels, yamls, strict=True)
        ]

    def _add_samples(self, grid: ImageGrid) -> None:
        told: dict[str, tuple[str, str]] = {}
        for variant, label in zip(grid.variants, grid.labels, strict=True):
            for spec, heading in zip(grid.specs, grid.headings, strict=True):
                told.setdefault(self._digest(variant, spec), (label, heading))
        labels, headings = zip(*told.values(), strict=True)
        self._store.add_samples(list(told), labels, headings)

    def _sheet(self, grid: ImageGrid, ablation: Ablation | None) -> bytes:
        """The contact sheet as PNG."""
        edge = edge_of(len(grid.variants) * len(grid.specs), grid.across)
        blocks = [
            Block(
                heading,
                [
                    (label, self._store.load(self._digest(variant, spec), edge))
                    for variant, label in zip(grid.variants, grid.labels, strict=True)
                ],
            )
            for spec, heading in zip(grid.specs, grid.headings, strict=True)
        ]
        footer = ablation.caveat if ablation else f"{specs_text(grid.specs)}; {self._preview.settings.name}"
        content = BytesIO()
        sheet(grid.title, blocks, grid.across, footer).save(content, "PNG")
        return content.getvalue()

    def _measure(self, grid: ImageGrid, ablate: Ablate) -> Ablation:
        def load(variant: AdapterVariant) -> list[Image]:
            return [self._store.load(self._digest(variant, spec)) for spec in grid.specs]

        base, full, *parts = grid.variants
        with located(f"{grid.plan.loc}.ablate.metrics"):
            return measure(
                _LazyPictures(dict(zip((g.name for g in grid.groups), parts, strict=True)), load),
                load(full),
                load(base),
                groups=grid.groups,
                by=ablate.by,
                mode=ablate.mode,
                lora=grid.plan.path.name,
                specs=grid.specs,
                metrics=ablate.metrics,
                progress=self._progress,
            )

    def _facts(self, grid: ImageGrid, yamls: Sequence[str]) -> dict[str, Any]:
        """The content of a sheet, for programs."""
        variants = [
            {
                "label": label,
                "pictures": [f"pictures/{self._digest(variant, spec)}.png" for spec in grid.specs],
                "follows_from": self._records.variants[variant],
                **({"section": text} if text else {}),
            }
            for variant, label, text in zip(grid.variants, grid.labels, yamls, strict=True)
        ]
        return {
            "made_by": f"zit_merge {__version__}",
            "job": self._preview.context.job,
            "step": grid.plan.name,
            "kind": grid.kind,
            "title": grid.title,
            "scene": self._preview.settings.record(),
            "shots": [spec.record() for spec in grid.specs],
            "looks": variants,
        }


class _LazyPictures(Mapping[str, list[Image]]):
    """Group -> its pictures, loaded on access: all of them at once can take gigabytes."""

    def __init__(self, variants: Mapping[str, AdapterVariant], load: Callable[[AdapterVariant], list[Image]]):
        self._variants, self._load = variants, load

    def __getitem__(self, group: str) -> list[Image]:
        return self._load(self._variants[group])

    def __iter__(self) -> Iterator[str]:
        return iter(self._variants)

    def __len__(self) -> int:
        return len(self._variants)


def _chart(ablation: Ablation) -> bytes:
    """The chart as PNG."""
    from .chart import draw

    content = BytesIO()
    draw(ablation, content)
    return content.getvalue()


def _preset(ablate: Ablate, ablation: Ablation) -> tuple[str, list[str]]:
    """The YAML of the preset that was asked for, or why there is none."""
    name = ablate.preset
    if not name:
        return "", []
    try:
        return ablation.preset_yaml(name, ablate.metrics[0]), []
    except ZitMergeError as e:
        return "", [f"no preset {name}: {e}"]
