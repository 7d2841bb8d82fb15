"""From a preview to pictures in the store: what is missing is rendered, by as many processes as there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

import torch
from PIL.Image import Image

from .. import __version__
from ..algebra.delta import Delta
from ..errors import ZitMergeError
from ..formats.reader import tensor_hash
from ..merging.merger import Watched
from .grids import Picture, PreviewPlan
from .image_store import ImageStore
from .settings import ImageSpec, RenderSettings
from .variants import AdapterVariant, ReadContext, digest

Tick = Callable[[str, int, int], None]  # (what is shown, pictures done, of how many); called after each, may raise to stop


class Renderer(Protocol):
    """A loaded model."""

    def set_adapter(self, deltas: Iterable[tuple[str, Delta]]) -> None:
        """Puts a LoRA on it in the place of the one before."""

    def render(self, spec: ImageSpec) -> Image:
        """One picture."""


class Workers:
    """One process alone; the processes of a launch have one that divides the work."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes what all of them have made."""
        return True

    @property
    def is_alone(self) -> bool:
        """Whether there is no other process to wait for."""
        return True

    def share(self, count: int) -> int:
        """How much of so much work falls to this process, about."""
        return count

    def mine(self, work: Sequence[Any]) -> Sequence[Any]:
        """The part of the work that falls to this process."""
        return work

    def gather(self, answers: Sequence[str]) -> list[str]:
        """The answers of all processes, in all of them; waits for the last one."""
        return list(answers)


class PreviewRunner:
    """Renders the pictures of a preview. As a context it keeps the model loaded, once for all of them.

    Args:
        preview: What is shown.
        store: Where pictures lie.
        device: Where the algebra runs.
        load: Loads the model; called when there is something to render.
        tick: Progress, and the place to stop from.
        watched: Passes the modules of a pass over all of them on one by one; may raise to stop.
        workers: The processes that share the work.

    Attributes:
        watched: As it was given.
        records: AdapterVariant -> everything that its change follows from.
        digests: Picture -> the name that follows from all that it follows from.
    """

    def __init__(
        self,
        preview: PreviewPlan,
        store: ImageStore,
        device: torch.device,
        load: Callable[[RenderSettings], AbstractContextManager[Renderer]],
        tick: Tick,
        watched: Watched = iter,
        workers: Workers | None = None,
    ):
        self._store, self._load, self._tick, self._workers = store, load, tick, workers or Workers()
        self.watched, self._settings, self._pictures = watched, preview.settings, preview.pictures()
        variants = list(dict.fromkeys(p.variant for p in self._pictures))
        with ThreadPoolExecutor(max_workers=2) as pool:
            files = dict.fromkeys(path for variant in variants for path in variant.files())
            self._ctx = ReadContext({path: pool.submit(tensor_hash, path) for path in files}, device, watched)
        hashes = {path: future.result() for path, future in self._ctx.hashes.items()}
        self.records = {variant: variant.record(hashes) for variant in variants}
        shared = {"zit_merge": __version__, "scene": self._settings.record()}
        self._whole = {p: {**shared, "look": self.records[p.variant], "shot": p.spec.record()} for p in self._pictures}
        self.digests: Mapping[Picture, str] = {p: digest(record) for p, record in self._whole.items()}
        self._renderer: Renderer | None = None
        self._stack = ExitStack()
        self._done, self._total = 0, len(self.missing(self._pictures))

    def __enter__(self) -> PreviewRunner:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def missing(self, pictures: Iterable[Picture]) -> list[Picture]:
        """Those that are not in the store, each once."""
        first: dict[str, Picture] = {}
        for picture in pictures:
            first.setdefault(self.digests[picture], picture)
        return [picture for name, picture in first.items() if not self._store.has(name)]

    def render(self, pictures: Iterable[Picture]) -> int:
        """Renders what is missing. Pictures that are done stay, whatever happens to the next.

        Returns:
            How many were rendered, by all processes.

        Raises:
            ZitMergeError: From whichever process could not go on.
        """
        missing = self.missing(pictures)
        self._workers.gather([])  # all have looked before the first one writes
        troubles = []
        try:
            self._render(self._workers.mine(missing))
        except ZitMergeError as e:
            troubles.append(str(e))
        if troubles := self._workers.gather(troubles):
            raise ZitMergeError(troubles[0])
        return len(missing)

    def _render(self, mine: Sequence[Picture]) -> None:
        current: AdapterVariant | None = None
        for picture in mine:
            if self._renderer is None:
                self._renderer = self._stack.enter_context(self._load(self._settings))
            if picture.variant is not current:
                self._renderer.set_adapter(picture.variant.deltas(self._ctx))
                current = picture.variant
            self._store.save(self.digests[picture], self._renderer.render(picture.spec), self._whole[picture])
            self._done += 1
            self._tick(picture.variant.label, self._done, self._workers.share(self._total))
