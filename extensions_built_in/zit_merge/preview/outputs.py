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
    """An exhibit that hangs.

    Attributes:
        exhibit: What was asked for.
        sheet: The contact sheet.
        pictures: (heading, label, YAML of the section that makes it or nothing, file), as on the sheet.
        ablation: What was measured.
        files: Everything that was written for it beside its pictures.
        notes: What a person should know, a sentence each.
    """

    exhibit: ImageGrid
    sheet: Path
    pictures: tuple[tuple[str, str, str, Path], ...]
    ablation: Ablation | None
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """For the terminal."""
        lines = [
            f"{self.exhibit.title}: {counted(len(self.pictures), 'picture')}",
            *(f"    {copyable(path)}" for path in self.files),
        ]
        return "\n".join([*lines, *self.notes, *([self.ablation.text()] if self.ablation else [])])


def write_grid(exhibit: ImageGrid, exhibition: PreviewPlan, studio: PreviewRunner, gallery: ImageStore) -> GridResult:
    """Puts the pictures of an exhibit, all of which are there, into the job's samples, and writes what belongs to them.

    Args:
        exhibit: What is shown.
        exhibition: That it belongs to.
        studio: That rendered it.
        gallery: Where pictures lie.

    Raises:
        ZitMergeError: Something can't be written.
    """
    if exhibit.kind != "ablate":  # those are there to be measured: too many, and too alike, to look at one by one
        _into_samples(exhibit, studio, gallery)
    yamls = [section_yaml(exhibition.section, plain_step(cell.plan.spec)) for cell in exhibit.cells] or [""] * len(exhibit.looks)
    ablation = _measured(exhibit, studio, gallery) if exhibit.kind == "ablate" else None
    footer = ablation.caveat if ablation else f"{specs_text(exhibit.shots)}; {exhibition.scene.name}"
    files, notes = [gallery.write(f"{exhibit.name}.png", _sheet(exhibit, studio, gallery, footer))], []
    facts = _facts(exhibit, exhibition, studio, yamls) | ({"ablation": ablation.facts()} if ablation else {})
    files.append(gallery.write(f"{exhibit.name}.json", json.dumps(facts, indent=1, default=str).encode()))
    if ablation:
        extra, notes = _of_ablation(exhibit, ablation, gallery)
        files += extra
    pictures = tuple(
        (heading, label, text, gallery.path(studio.digests[Picture(look, shot)]))
        for shot, heading in zip(exhibit.shots, exhibit.headings, strict=True)
        for look, label, text in zip(exhibit.looks, exhibit.labels, yamls, strict=True)
    )
    return GridResult(exhibit, files[0], pictures, ablation, tuple(files), tuple(notes))


def _into_samples(exhibit: ImageGrid, studio: PreviewRunner, gallery: ImageStore) -> None:
    labels: dict[str, str] = {}
    for look, label in zip(exhibit.looks, exhibit.labels, strict=True):
        for shot, heading in zip(exhibit.shots, exhibit.headings, strict=True):
            labels.setdefault(studio.digests[Picture(look, shot)], f"{label}: {heading}")
    gallery.show(list(labels), list(labels.values()))


def _sheet(exhibit: ImageGrid, studio: PreviewRunner, gallery: ImageStore, footer: str) -> bytes:
    edge = edge_of(len(exhibit.looks) * len(exhibit.shots), exhibit.across)
    blocks = [
        Block(
            heading,
            [
                (label, gallery.load(studio.digests[Picture(look, shot)], edge))
                for look, label in zip(exhibit.looks, exhibit.labels, strict=True)
            ],
        )
        for shot, heading in zip(exhibit.shots, exhibit.headings, strict=True)
    ]
    content = BytesIO()
    sheet(exhibit.title, blocks, exhibit.across, footer).save(content, "PNG")
    return content.getvalue()


class _Loading(Mapping[str, list[Image]]):
    """Group -> its pictures, loaded when they are asked for: all of them at once can take gigabytes."""

    def __init__(self, looks: Mapping[str, AdapterVariant], load: Callable[[AdapterVariant], list[Image]]):
        self._looks, self._load = looks, load

    def __getitem__(self, group: str) -> list[Image]:
        return self._load(self._looks[group])

    def __iter__(self) -> Iterator[str]:
        return iter(self._looks)

    def __len__(self) -> int:
        return len(self._looks)


def _measured(exhibit: ImageGrid, studio: PreviewRunner, gallery: ImageStore) -> Ablation:
    def load(look: AdapterVariant) -> list[Image]:
        return [gallery.load(studio.digests[Picture(look, shot)]) for shot in exhibit.shots]

    base, full, *parts = exhibit.looks
    return measure(
        _Loading(dict(zip((g.name for g in exhibit.groups), parts, strict=True)), load),
        load(full),
        load(base),
        groups=exhibit.groups,
        by=exhibit.asked.by,
        mode=exhibit.asked.mode,
        lora=exhibit.plan.path.name,
        shots=[(shot.prompt, shot.seed) for shot in exhibit.shots],
        metrics=exhibit.asked.metrics,
        place=f"{exhibit.plan.place}.ablate.metrics",
        watched=studio.watched,
    )


def _of_ablation(exhibit: ImageGrid, ablation: Ablation, gallery: ImageStore) -> tuple[list[Path], list[str]]:
    """The chart, and the preset that was asked for."""
    from .chart import draw

    content = BytesIO()
    draw(ablation, content)
    files, name = [gallery.write(f"{exhibit.name}_chart.png", content.getvalue())], exhibit.asked.preset
    if not name:
        return files, []
    try:
        text = ablation.preset_yaml(name, exhibit.asked.metrics[0])
    except ZitMergeError as e:
        return files, [f"no preset {name}: {e}"]
    path = gallery.write(f"{name}.yaml", text.encode())
    return [*files, path], [f"to use the preset {name}: preset: {copyable(path)}"]


def _facts(exhibit: ImageGrid, exhibition: PreviewPlan, studio: PreviewRunner, yamls: list[str]) -> dict[str, Any]:
    """What is on a sheet, for programs."""
    looks = [
        {
            "label": label,
            "pictures": [f"pictures/{studio.digests[Picture(look, shot)]}.png" for shot in exhibit.shots],
            "follows_from": studio.records[look],
            **({"section": text} if text else {}),
        }
        for look, label, text in zip(exhibit.looks, exhibit.labels, yamls, strict=True)
    ]
    return {
        "made_by": f"zit_merge {__version__}",
        "job": exhibition.site.job,
        "step": exhibit.plan.name,
        "kind": exhibit.kind,
        "title": exhibit.title,
        "scene": exhibition.scene.record(),
        "shots": [shot.record() for shot in exhibit.shots],
        "looks": looks,
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
