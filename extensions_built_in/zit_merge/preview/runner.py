"""From an exhibition to pictures in the gallery: what is missing is rendered, by as many processes as there are."""

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


class Painter(Protocol):
    """A loaded model."""

    def set_adapter(self, deltas: Iterable[tuple[str, Delta]]) -> None:
        """Puts a LoRA on it in the place of the one before."""

    def render(self, shot: ImageSpec) -> Image:
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
    """Renders the pictures of an exhibition. As a context it keeps the model loaded, once for all of them.

    Args:
        exhibition: What is shown.
        gallery: Where pictures lie.
        device: Where the algebra runs.
        load: Loads the model; called when there is something to render.
        tick: Progress, and the place to stop from.
        watched: Passes the modules of a pass over all of them on one by one; may raise to stop.
        team: The processes that share the work.

    Attributes:
        watched: As it was given.
        records: AdapterVariant -> everything that its change follows from.
        digests: Picture -> the name that follows from all that it follows from.
    """

    def __init__(
        self,
        exhibition: PreviewPlan,
        gallery: ImageStore,
        device: torch.device,
        load: Callable[[RenderSettings], AbstractContextManager[Painter]],
        tick: Tick,
        watched: Watched = iter,
        team: Workers | None = None,
    ):
        self._gallery, self._load, self._tick, self._team = gallery, load, tick, team or Workers()
        self.watched, self._scene, self._pictures = watched, exhibition.scene, exhibition.pictures()
        looks = list(dict.fromkeys(p.look for p in self._pictures))
        with ThreadPoolExecutor(max_workers=2) as pool:
            files = dict.fromkeys(path for look in looks for path in look.files())
            self._ctx = ReadContext({path: pool.submit(tensor_hash, path) for path in files}, device, watched)
        hashes = {path: future.result() for path, future in self._ctx.hashes.items()}
        self.records = {look: look.record(hashes) for look in looks}
        shared = {"zit_merge": __version__, "scene": self._scene.record()}
        self._whole = {p: {**shared, "look": self.records[p.look], "shot": p.shot.record()} for p in self._pictures}
        self.digests: Mapping[Picture, str] = {p: digest(record) for p, record in self._whole.items()}
        self._painter: Painter | None = None
        self._stack = ExitStack()
        self._done, self._total = 0, len(self.missing(self._pictures))

    def __enter__(self) -> PreviewRunner:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def missing(self, pictures: Iterable[Picture]) -> list[Picture]:
        """Those that are not in the gallery, each once."""
        first: dict[str, Picture] = {}
        for picture in pictures:
            first.setdefault(self.digests[picture], picture)
        return [picture for name, picture in first.items() if not self._gallery.has(name)]

    def render(self, pictures: Iterable[Picture]) -> int:
        """Renders what is missing. Pictures that are done stay, whatever happens to the next.

        Returns:
            How many were rendered, by all processes.

        Raises:
            ZitMergeError: From whichever process could not go on.
        """
        missing = self.missing(pictures)
        self._team.gather([])  # all have looked before the first one writes
        troubles = []
        try:
            self._render(self._team.mine(missing))
        except ZitMergeError as e:
            troubles.append(str(e))
        if troubles := self._team.gather(troubles):
            raise ZitMergeError(troubles[0])
        return len(missing)

    def _render(self, mine: Sequence[Picture]) -> None:
        worn: AdapterVariant | None = None
        for picture in mine:
            if self._painter is None:
                self._painter = self._stack.enter_context(self._load(self._scene))
            if picture.look is not worn:
                self._painter.set_adapter(picture.look.deltas(self._ctx))
                worn = picture.look
            self._gallery.save(self.digests[picture], self._painter.render(picture.shot), self._whole[picture])
            self._done += 1
            self._tick(picture.look.label, self._done, self._team.share(self._total))
