"""A section's pictures from beginning to end: what the job and `preview` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch

from ..errors import counted
from ..merging.merger import Watched
from ..report.page.galleries import Gallery as Shown
from ..report.page.galleries import Measures, Preview
from ..report.page.run import RunPage
from .grids import PreviewPlan, specs_text
from .image_store import image_store
from .outputs import GridResult, write_grid
from .runner import Painter, PreviewRunner, Tick, Workers
from .settings import RenderSettings


def show(
    exhibition: PreviewPlan,
    device: torch.device,
    load: Callable[[RenderSettings], AbstractContextManager[Painter]],
    page: RunPage | None,
    tick: Tick,
    *,
    watched: Watched = iter,
    team: Workers | None = None,
) -> Iterator[str]:
    """Renders what is missing of an exhibition and hangs it.

    Args:
        exhibition: What is shown.
        device: Where the algebra runs.
        load: Loads the model.
        page: Where the pictures are shown too; its section has begun. None in all processes but the main one.
        tick: Progress, and the place to stop from.
        watched: Passes the modules of a pass over all of them on one by one; may raise to stop.
        team: The processes that share the work.

    Yields:
        What was done, for people; nothing in all processes but the main one.

    Raises:
        ZitMergeError: A picture could not be rendered or written.
    """
    gallery, team = image_store(exhibition.site, exhibition.scene.row), team or Workers()
    # One after the other, so that what is done can be looked at; several processes wait for each other once only.
    parts = [[e] for e in exhibition.exhibits] if team.is_alone else [exhibition.exhibits]
    with PreviewRunner(exhibition, gallery, device, load, tick, watched, team) as studio:
        for part in parts:
            pictures = dict.fromkeys(p for exhibit in part for p in exhibit.pictures())
            count = studio.render(pictures)
            if not team.is_main:
                continue
            different = len({studio.digests[p] for p in pictures})
            yield f"{counted(count, 'picture')} rendered, {different - count} of {different} were there"
            for exhibit in part:
                hung = write_grid(exhibit, exhibition, studio, gallery)
                if page:
                    page.show(exhibition.site, exhibit.plan.name, _on_page(hung))
                yield hung.text()


def _on_page(hung: GridResult) -> Shown:
    previews = [Preview(heading, label, path, text) for heading, label, text, path in hung.pictures]
    note = specs_text(hung.exhibit.shots)
    measures = None
    if ablation := hung.ablation:
        names = list(ablation.distances)
        rows = [(g.name, [ablation.share(m, g.name) for m in names]) for g in ablation.groups]
        preset = next((f.read_text(encoding="utf-8") for f in hung.files if f.suffix == ".yaml"), "")
        measures = Measures(names, rows, preset)
        note = f"{note}. {ablation.meaning} {ablation.caveat}"
    return Shown(hung.exhibit.title, note, previews, measures)
