"""From rendered pictures to what people look at: samples, sheets, tables, JSON, presets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL.Image import Image

from .. import __version__
from ..config.schema import RankRule, Section, Step
from ..errors import ZitMergeError, counted
from ..planning.recipe import to_yaml
from ..wording import copyable
from .ablation import Ablation, measure
from .grids import ImageGrid, Picture, PreviewPlan, specs_text
from .image_store import ImageStore
from .runner import PreviewRunner
from .sheet import Block, edge_of, sheet
from .variants import AdapterVariant


@dataclass(frozen=True)
class GridResult:
    """What was written for a grid.

    Attributes:
        grid: What was asked for.
        sheet: The contact sheet.
        pictures: (heading, label, YAML of the section that makes it or nothing, file), as on the sheet.
        ablation: What was measured.
        files: Everything that was written for it beside its pictures.
        notes: What a person should know, a sentence each.
    """

    grid: ImageGrid
    sheet: Path
    pictures: tuple[tuple[str, str, str, Path], ...]
    ablation: Ablation | None
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """For the terminal."""
        lines = [
            f"{self.grid.title}: {counted(len(self.pictures), 'picture')}",
            *(f"    {copyable(path)}" for path in self.files),
        ]
        return "\n".join([*lines, *self.notes, *([self.ablation.text()] if self.ablation else [])])


def write_grid(grid: ImageGrid, preview: PreviewPlan, runner: PreviewRunner, store: ImageStore) -> GridResult:
    """Puts the pictures of a grid, all of which are there, into the job's samples, and writes what belongs to them.

    Args:
        grid: What is shown.
        preview: That it belongs to.
        runner: That rendered it.
        store: Where pictures lie.

    Raises:
        ZitMergeError: Something can't be written.
    """
    if grid.kind != "ablate":  # those are there to be measured: too many, and too alike, to look at one by one
        _into_samples(grid, runner, store)
    yamls = [section_yaml(preview.section, plain_step(cell.plan.spec)) for cell in grid.cells] or [""] * len(grid.variants)
    ablation = _measured(grid, runner, store) if grid.kind == "ablate" else None
    footer = ablation.caveat if ablation else f"{specs_text(grid.specs)}; {preview.settings.name}"
    files, notes = [store.write(f"{grid.name}.png", _sheet(grid, runner, store, footer))], []
    facts = _facts(grid, preview, runner, yamls) | ({"ablation": ablation.facts()} if ablation else {})
    files.append(store.write(f"{grid.name}.json", json.dumps(facts, indent=1, default=str).encode()))
    if ablation:
        extra, notes = _of_ablation(grid, ablation, store)
        files += extra
    pictures = tuple(
        (heading, label, text, store.path(runner.digests[Picture(variant, spec)]))
        for spec, heading in zip(grid.specs, grid.headings, strict=True)
        for variant, label, text in zip(grid.variants, grid.labels, yamls, strict=True)
    )
    return GridResult(grid, files[0], pictures, ablation, tuple(files), tuple(notes))


def _into_samples(grid: ImageGrid, runner: PreviewRunner, store: ImageStore) -> None:
    labels: dict[str, str] = {}
    for variant, label in zip(grid.variants, grid.labels, strict=True):
        for spec, heading in zip(grid.specs, grid.headings, strict=True):
            labels.setdefault(runner.digests[Picture(variant, spec)], f"{label}: {heading}")
    store.show(list(labels), list(labels.values()))


def _sheet(grid: ImageGrid, runner: PreviewRunner, store: ImageStore, footer: str) -> bytes:
    edge = edge_of(len(grid.variants) * len(grid.specs), grid.across)
    blocks = [
        Block(
            heading,
            [
                (label, store.load(runner.digests[Picture(variant, spec)], edge))
                for variant, label in zip(grid.variants, grid.labels, strict=True)
            ],
        )
        for spec, heading in zip(grid.specs, grid.headings, strict=True)
    ]
    content = BytesIO()
    sheet(grid.title, blocks, grid.across, footer).save(content, "PNG")
    return content.getvalue()


class _Loading(Mapping[str, list[Image]]):
    """Group -> its pictures, loaded when they are asked for: all of them at once can take gigabytes."""

    def __init__(self, variants: Mapping[str, AdapterVariant], load: Callable[[AdapterVariant], list[Image]]):
        self._variants, self._load = variants, load

    def __getitem__(self, group: str) -> list[Image]:
        return self._load(self._variants[group])

    def __iter__(self) -> Iterator[str]:
        return iter(self._variants)

    def __len__(self) -> int:
        return len(self._variants)


def _measured(grid: ImageGrid, runner: PreviewRunner, store: ImageStore) -> Ablation:
    def load(variant: AdapterVariant) -> list[Image]:
        return [store.load(runner.digests[Picture(variant, spec)]) for spec in grid.specs]

    base, full, *parts = grid.variants
    return measure(
        _Loading(dict(zip((g.name for g in grid.groups), parts, strict=True)), load),
        load(full),
        load(base),
        groups=grid.groups,
        by=grid.asked.by,
        mode=grid.asked.mode,
        lora=grid.plan.path.name,
        shots=[(spec.prompt, spec.seed) for spec in grid.specs],
        metrics=grid.asked.metrics,
        place=f"{grid.plan.place}.ablate.metrics",
        watched=runner.watched,
    )


def _of_ablation(grid: ImageGrid, ablation: Ablation, store: ImageStore) -> tuple[list[Path], list[str]]:
    """The chart, and the preset that was asked for."""
    from .chart import draw

    content = BytesIO()
    draw(ablation, content)
    files, name = [store.write(f"{grid.name}_chart.png", content.getvalue())], grid.asked.preset
    if not name:
        return files, []
    try:
        text = ablation.preset_yaml(name, grid.asked.metrics[0])
    except ZitMergeError as e:
        return files, [f"no preset {name}: {e}"]
    path = store.write(f"{name}.yaml", text.encode())
    return [*files, path], [f"to use the preset {name}: preset: {copyable(path)}"]


def _facts(grid: ImageGrid, preview: PreviewPlan, runner: PreviewRunner, yamls: list[str]) -> dict[str, Any]:
    """What is on a sheet, for programs."""
    variants = [
        {
            "label": label,
            "pictures": [f"pictures/{runner.digests[Picture(variant, spec)]}.png" for spec in grid.specs],
            "follows_from": runner.records[variant],
            **({"section": text} if text else {}),
        }
        for variant, label, text in zip(grid.variants, grid.labels, yamls, strict=True)
    ]
    return {
        "made_by": f"zit_merge {__version__}",
        "job": preview.context.job,
        "step": grid.plan.name,
        "kind": grid.kind,
        "title": grid.title,
        "scene": preview.settings.record(),
        "shots": [spec.record() for spec in grid.specs],
        "looks": variants,
    }


def section_yaml(section: Section, step: Mapping[str, Any]) -> str:
    """The section that makes one step, with the earlier steps that it uses.

    Args:
        section: As it was read.
        step: The step as a config has it; its file is kept.
    """
    names, wanted = {s.name: s for s in section.steps}, [{key: value for key, value in step.items() if key != "keep"}]
    used = [lora["lora"] for lora in step["loras"]]
    for earlier in reversed(section.steps):
        if earlier.name in used and earlier.name != step["name"]:
            wanted.insert(0, plain_step(earlier))
            used += [lora.lora for lora in names[earlier.name].loras]
    keys = ("device", "output_dir", "training_folder", "name")
    settings = {key: value for key in keys if (value := getattr(section, key)) not in (None, "auto")}
    return to_yaml({"type": "zit_merge", **settings, "steps": wanted})


def plain_step(step: Step) -> dict[str, Any]:
    """A step as a config has it, without what asks for pictures."""
    unlike = {"sweep", "ablate", "preview", "file", *({"rank"} if isinstance(step.rank, RankRule) else ())}
    plain = step.model_dump(exclude_defaults=True, exclude=unlike)
    return {"name": step.name, **plain, **({"rank": step.rank.record()} if isinstance(step.rank, RankRule) else {})}
