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
from .runner import PreviewRunner, Renderer, Tick, Workers
from .settings import RenderSettings


def show(
    preview: PreviewPlan,
    device: torch.device,
    load: Callable[[RenderSettings], AbstractContextManager[Renderer]],
    page: RunPage | None,
    tick: Tick,
    *,
    watched: Watched = iter,
    workers: Workers | None = None,
) -> Iterator[str]:
    """Renders what is missing of a preview and writes its outputs.

    Args:
        preview: What is shown.
        device: Where the algebra runs.
        load: Loads the model.
        page: Where the pictures are shown too; its section has begun. None in all processes but the main one.
        tick: Progress, and the place to stop from.
        watched: Passes the modules of a pass over all of them on one by one; may raise to stop.
        workers: The processes that share the work.

    Yields:
        What was done, for people; nothing in all processes but the main one.

    Raises:
        ZitMergeError: A picture could not be rendered or written.
    """
    store, workers = image_store(preview.context, preview.settings.row), workers or Workers()
    # One after the other, so that what is done can be looked at; several processes wait for each other once only.
    parts = [[e] for e in preview.grids] if workers.is_alone else [preview.grids]
    with PreviewRunner(preview, store, device, load, tick, watched, workers) as runner:
        for part in parts:
            pictures = dict.fromkeys(p for grid in part for p in grid.pictures())
            count = runner.render(pictures)
            if not workers.is_main:
                continue
            different = len({runner.digests[p] for p in pictures})
            yield f"{counted(count, 'picture')} rendered, {different - count} of {different} were there"
            for grid in part:
                result = write_grid(grid, preview, runner, store)
                if page:
                    page.show(preview.context, grid.plan.name, _on_page(result))
                yield result.text()


def _on_page(result: GridResult) -> Shown:
    previews = [Preview(heading, label, path, text) for heading, label, text, path in result.pictures]
    note = specs_text(result.grid.specs)
    measures = None
    if ablation := result.ablation:
        names = list(ablation.distances)
        rows = [(g.name, [ablation.share(m, g.name) for m in names]) for g in ablation.groups]
        preset = next((f.read_text(encoding="utf-8") for f in result.files if f.suffix == ".yaml"), "")
        measures = Measures(names, rows, preset)
        note = f"{note}. {ablation.meaning} {ablation.caveat}"
    return Shown(result.grid.title, note, previews, measures)
