"""Renders the pictures of a preview that are not in the store yet, in as many processes as there are, and writes its grids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from ..algebra.delta import Delta
from ..errors import ZitMergeError, counted
from ..formats.reader import tensor_hash
from ..merging.merger import Watched
from ..merging.runner import input_reader, reader_of
from ..planning.plan import Input, StepPlan
from .image_store import ImageStore, image_store
from .outputs import GridResult, GridWriter
from .plan import Picture, PictureRecords, PreviewPlan
from .rendering import Load, Renderer, Workers
from .variants import AdapterVariant

Tick = Callable[[str, int, int], None]  # (variant, pictures done, of how many), after each picture; may raise to stop


class ReadContext(NamedTuple):
    """Reads inputs and steps, from files or by computing them.

    Attributes:
        hashes: Path -> SHA-256 of the tensor data, for every file in use.
        device: Where the algebra runs.
        watched: Passes the modules of a pass over all of them on one by one; may raise to stop.
    """

    hashes: dict[Path, Future[str]]
    device: torch.device
    watched: Watched = iter

    def deltas(self, source: Input | StepPlan) -> Iterator[tuple[str, Delta]]:
        """(module, delta) for every module of an input at strength 1, or of a step's result.

        Args:
            source: The input or the step; its files are open until the last module.
        """
        is_input = isinstance(source, Input)
        modules, open_reader = (source.outline.ranks, input_reader) if is_input else (source.shapes, reader_of)
        with ExitStack() as files:
            reader = open_reader(source, self.hashes, self.device, files, self.watched)
            for module in modules:
                scale, delta = reader.delta(module)
                yield module, delta.times(scale)


class PreviewRunner:
    """Renders pictures of a preview. As a context it keeps the model loaded, which is loaded once, when first needed.

    Args:
        preview: The plan of the pictures.
        store: Where pictures are kept.
        device: Where the algebra runs.
        load: Loads the model.
        tick: Called after each picture; may raise to stop.
        watched: Passes the modules of a pass over all of them on one by one; may raise to stop.
        workers: The processes that share the work.

    Attributes:
        records: What the pictures are made from.
    """

    def __init__(
        self,
        preview: PreviewPlan,
        store: ImageStore,
        device: torch.device,
        load: Load,
        tick: Tick,
        watched: Watched = iter,
        workers: Workers | None = None,
    ):
        self._store, self._load, self._tick, self._workers = store, load, tick, workers or Workers()
        self._settings, pictures = preview.settings, preview.pictures()
        with ThreadPoolExecutor(max_workers=2) as pool:
            files = dict.fromkeys(path for variant in dict.fromkeys(p.variant for p in pictures) for path in variant.files())
            self._read_context = ReadContext({path: pool.submit(tensor_hash, path) for path in files}, device, watched)
        self.records = PictureRecords(preview, {path: future.result() for path, future in self._read_context.hashes.items()})
        self._renderer: Renderer | None = None
        self._stack = ExitStack()
        self._done, self._total = 0, len(self.missing(pictures))

    def __enter__(self) -> PreviewRunner:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def missing(self, pictures: Iterable[Picture]) -> list[Picture]:
        """The pictures that are not in the store, without duplicates."""
        first: dict[str, Picture] = {}
        for picture in pictures:
            first.setdefault(self.records.digests[picture], picture)
        return [picture for name, picture in first.items() if not self._store.has(name)]

    def render(self, pictures: Iterable[Picture]) -> int:
        """Renders the missing pictures. Each is stored when it is done, whatever happens to the next.

        Args:
            pictures: Of the preview.

        Returns:
            How many were rendered, by all processes.

        Raises:
            ZitMergeError: The first error of any process.
        """
        missing = self.missing(pictures)
        self._workers.gather([])  # all processes have looked before the first one writes
        errors = []
        try:
            self._render(self._workers.mine(missing))
        except ZitMergeError as e:
            errors.append(str(e))
        if errors := self._workers.gather(errors):
            raise ZitMergeError(errors[0])
        return len(missing)

    def _render(self, mine: Sequence[Picture]) -> None:
        current: AdapterVariant | None = None
        for picture in mine:
            if self._renderer is None:
                self._renderer = self._stack.enter_context(self._load(self._settings))
            if picture.variant is not current:
                self._renderer.set_adapter(picture.variant.deltas(self._read_context.deltas))
                current = picture.variant
            image = self._renderer.render(picture.spec)
            self._store.save(self.records.digests[picture], image, self.records.pictures[picture])
            self._done += 1
            self._tick(picture.variant.label, self._done, self._workers.share(self._total))


def run_preview(
    preview: PreviewPlan,
    device: torch.device,
    load: Load,
    tick: Tick,
    *,
    on_grid: Callable[[GridResult], None] | None = None,
    watched: Watched = iter,
    workers: Workers | None = None,
) -> Iterator[str]:
    """Renders the missing pictures of a preview and writes its grids.

    Args:
        preview: The plan.
        device: Where the algebra runs.
        load: Loads the model.
        tick: Called after each picture; may raise to stop.
        on_grid: Called with each grid that was written.
        watched: Passes the modules of a pass over all of them on one by one; may raise to stop.
        workers: The processes that share the work; the main one writes.

    Yields:
        What was done, for people; nothing in other processes than the main one.

    Raises:
        ZitMergeError: A picture can't be rendered, or a file can't be written.
    """
    store, workers = image_store(preview.context, preview.settings.row), workers or Workers()
    # Grid by grid, so that finished ones can be looked at; several processes render all first and wait for each other once.
    batches = [[grid] for grid in preview.grids] if workers.is_alone else [preview.grids]
    with PreviewRunner(preview, store, device, load, tick, watched, workers) as runner:
        writer = GridWriter(preview, store, runner.records, watched)
        for batch in batches:
            pictures = dict.fromkeys(p for grid in batch for p in grid.pictures())
            count = runner.render(pictures)
            if not workers.is_main:
                continue
            total = len({runner.records.digests[p] for p in pictures})
            yield f"{counted(count, 'picture')} rendered, {total - count} of {total} reused"
            for grid in batch:
                result = writer.write(grid)
                if on_grid:
                    on_grid(result)
                yield result.text()
