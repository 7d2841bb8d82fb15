"""Renders the pictures of a preview that are not in the store yet, in as many processes as there are, and writes its grids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from ..errors import ZitMergeError, counted, joined, located
from ..merging.made import Hashes
from ..merging.readers import StepReaders, delta_reader
from ..planning.planned import Planned
from ..progress import SILENT, Progress
from ..report.page.galleries import Gallery, Measures, Preview
from ..report.page.run import RunPage
from .image_store import image_store
from .metrics import METRICS, metric
from .outputs import GridResult, GridWriter
from .pictures import missing_pictures, rendered_pictures
from .plan import Picture, PictureRecords, PreviewPlan, specs_text
from .rendering import Load, Workers

Say = Callable[[str], None]


def render_section(
    preview: PreviewPlan,
    planned: Planned,
    page: RunPage,
    say: Say,
    progress: Progress,
    load: Load,
    workers: Workers | None = None,
) -> None:
    """Renders a section's pictures, tells what was done, and writes the page.

    Args:
        preview: The pictures.
        planned: The section, its steps as they came out.
        page: Of the run, the section begun.
        say: Prints a text.
        progress: Shows how far it is, and may stop it.
        load: Loads the model.
        workers: The processes that share the work.

    Raises:
        ZitMergeError: A picture could not be rendered or written.
    """
    try:
        for text in render(preview, planned.device, load, progress, on_grid=on_page(page, preview), workers=workers):
            say(text)
    finally:
        if page.has_pictures:  # else an older page, which may have them all, stays
            say(page.write())


def render(
    preview: PreviewPlan,
    device: torch.device,
    load: Load,
    progress: Progress = SILENT,
    *,
    on_grid: Callable[[GridResult], None] = lambda result: None,
    workers: Workers | None = None,
) -> Iterator[str]:
    """Renders the missing pictures of a preview and writes its grids.

    Args:
        preview: The plan.
        device: Where the algebra runs.
        load: Loads the model.
        progress: Shows how far it is, and may stop it.
        on_grid: Called with each grid that was written.
        workers: The processes that share the work; the main one writes.

    Yields:
        What was done, for people; nothing in other processes than the main one.

    Raises:
        ZitMergeError: A picture can't be rendered, or a file can't be written.
    """
    store, workers = image_store(preview.context, preview.settings.row), workers or Workers()
    for text in import_metrics(preview):
        if workers.is_main:
            yield text
    pictures = preview.pictures()
    files = {path: stamp for variant in dict.fromkeys(p.variant for p in pictures) for path, stamp in variant.files().items()}
    with Hashes(files) as hashes:
        records = PictureRecords(preview, hashes.of(files))
        missing = missing_pictures(pictures, records, store)
        workers.gather([])  # all processes have looked before the first one writes
        grids = _Grids(preview, GridWriter(preview, store, records, progress), records, missing, on_grid)
        read = delta_reader(lambda: StepReaders(hashes, device, progress))
        rendered = rendered_pictures(preview, workers.mine(missing), store, records, read, load, progress)
        if workers.is_alone:
            yield from grids.finished(())
            for picture in rendered:
                yield from grids.finished([picture])
            return
        _render_share(rendered, workers)
        if workers.is_main:
            yield from grids.finished(missing)


def _render_share(rendered: Iterator[Picture], workers: Workers) -> None:
    """Renders the pictures of this process and waits for the others; what failed in one of them is raised in all."""
    errors = []
    try:
        for _ in rendered:
            pass
    except ZitMergeError as e:
        errors.append(str(e))
    if errors := workers.gather(errors):
        raise ZitMergeError(errors[0])


def import_metrics(preview: PreviewPlan) -> Iterator[str]:
    """Imports the user's own metrics, which a check does not: it runs no code that a config names.

    Args:
        preview: The plan.

    Yields:
        Which module is imported next.

    Raises:
        SettingError: It can't be imported, or has no such function.
    """
    for grid in preview.grids:
        for n, name in enumerate(grid.ablate.metrics if grid.ablate else ()):
            if name not in METRICS:
                yield f"importing {name.partition(':')[0]} for metrics"
                with located(joined(grid.plan.loc, f"ablate.metrics[{n}]")):
                    metric(name)


class _Grids:
    """Writes each grid as soon as its pictures are there, so that finished ones can be looked at.

    Args:
        preview: The plan.
        writer: Writes them.
        records: The names of the pictures.
        missing: The pictures that are still to be rendered.
        on_grid: Called with each grid that was written.
    """

    def __init__(
        self,
        preview: PreviewPlan,
        writer: GridWriter,
        records: PictureRecords,
        missing: Sequence[Picture],
        on_grid: Callable[[GridResult], None],
    ):
        self._writer, self._on_grid = writer, on_grid
        self._waiting = [(grid, {records.digests[p] for p in grid.pictures()}) for grid in preview.grids]
        self._digests, self._missing = records.digests, {records.digests[p] for p in missing}
        self._new = set[str]()  # rendered, and in no grid yet

    def finished(self, pictures: Sequence[Picture]) -> Iterator[str]:
        """Writes the grids that are complete with these pictures, in order.

        Args:
            pictures: They are in the store now.
        """
        digests = {self._digests[picture] for picture in pictures}
        self._missing -= digests
        self._new |= digests
        while self._waiting and not self._waiting[0][1] & self._missing:
            grid, wanted = self._waiting.pop(0)
            count = len(wanted & self._new)
            self._new -= wanted
            yield f"{counted(count, 'picture')} rendered, {len(wanted) - count} of {len(wanted)} reused"
            result = self._writer.write(grid)
            self._on_grid(result)
            yield result.text()


def on_page(page: RunPage, preview: PreviewPlan) -> Callable[[GridResult], None]:
    """Shows grids on a page, for `run_preview`.

    Args:
        page: The section of the preview has begun on it.
        preview: The plan of the grids.
    """
    return lambda result: page.show(preview.context, result.grid.plan.name, _gallery(result))


def _gallery(result: GridResult) -> Gallery:
    pictures = [Preview(p.heading, p.label, p.path, p.yaml) for p in result.pictures]
    note, measures = specs_text(result.grid.specs), None
    if ablation := result.ablation:
        metrics = list(ablation.distances)
        rows = [(g.name, [ablation.share(metric, g.name) for metric in metrics]) for g in ablation.groups]
        measures = Measures(metrics, rows, result.preset)
        note = f"{note}. {ablation.meaning} {ablation.caveat}"
    return Gallery(result.grid.title, note, pictures, measures)
