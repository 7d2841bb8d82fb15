"""From an exhibition to pictures in the gallery: what is missing is rendered, by as many processes as there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL.Image import Image

from .. import __version__
from ..algebra.delta import Delta
from ..errors import ZitMergeError
from ..formats.reader import tensor_hash
from ..merging import Watched
from .exhibits import Exhibition, Picture
from .gallery import Gallery
from .looks import Desk, Look, digest
from .scene import Scene, Shot

Tick = Callable[[str, int, int], None]  # (what is shown, pictures done, of how many); called after each, may raise to stop


class Painter(Protocol):
    """A loaded model."""

    def wear(self, deltas: Iterable[tuple[str, Delta]]) -> None:
        """Puts a LoRA on it in the place of the one before."""

    def render(self, shot: Shot) -> Image:
        """One picture."""


class Team:
    """One process alone; the processes of a launch have one that divides the work."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes what all of them have made."""
        return True

    def mine(self, work: Sequence[Any]) -> Sequence[Any]:
        """The part of the work that falls to this process."""
        return work

    def gather(self, answers: Sequence[str]) -> list[str]:
        """The answers of all processes, in all of them; waits for the last one."""
        return list(answers)


class Studio:
    """Renders the pictures of an exhibition.

    Args:
        exhibition: What is shown.
        gallery: Where pictures lie.
        device: Where the algebra runs.
        team: The processes that share the work.
    """

    def __init__(self, exhibition: Exhibition, gallery: Gallery, device: torch.device, team: Team | None = None):
        self._gallery, self._device, self._team = gallery, device, team or Team()
        self._pictures = exhibition.pictures()
        self._scene = exhibition.scene
        looks = list(dict.fromkeys(p.look for p in self._pictures))
        with ThreadPoolExecutor(max_workers=2) as pool:
            files = dict.fromkeys(path for look in looks for path in look.files())
            self._hashes = {path: pool.submit(tensor_hash, path) for path in files}
        hashes = {path: future.result() for path, future in self._hashes.items()}
        self.records = {look: look.record(hashes) for look in looks}
        base = {"zit_merge": __version__, "scene": self._scene.record()}
        self._whole = {p: {**base, "look": self.records[p.look], "shot": p.shot.record()} for p in self._pictures}
        self.digests: Mapping[Picture, str] = {p: digest(record) for p, record in self._whole.items()}

    def missing(self) -> list[Picture]:
        """The pictures that are not there, each once."""
        first = {self.digests[p]: p for p in reversed(self._pictures)}
        return [p for p in self._pictures if first[self.digests[p]] is p and not self._gallery.has(self.digests[p])]

    def render(self, load: Callable[[Scene], AbstractContextManager[Painter]], tick: Tick, watched: Watched = iter) -> int:
        """Renders what is missing. Pictures that are done stay, whatever happens to the next.

        Args:
            load: Loads the model; called where there is something to render.
            tick: Progress, and the place to stop from.
            watched: Passes the modules of a pass over all of them on one by one; may raise to stop.

        Returns:
            How many were rendered, by all processes.

        Raises:
            ZitMergeError: From whichever process could not go on.
        """
        missing = self.missing()
        self._team.gather([])  # all have looked before the first one writes
        troubles = []
        try:
            self._render(self._team.mine(missing), load, tick, Desk(self._hashes, self._device, watched))
        except ZitMergeError as e:
            troubles.append(str(e))
        if troubles := self._team.gather(troubles):
            raise ZitMergeError(troubles[0])
        return len(missing)

    def _render(
        self, mine: Sequence[Picture], load: Callable[[Scene], AbstractContextManager[Painter]], tick: Tick, desk: Desk
    ) -> None:
        if not mine:
            return
        with load(self._scene) as painter:
            worn: Look | None = None
            for n, picture in enumerate(mine, 1):
                if picture.look is not worn:
                    painter.wear(picture.look.deltas(desk))
                    worn = picture.look
                self._gallery.save(self.digests[picture], painter.render(picture.shot), self._whole[picture])
                tick(picture.look.label, n, len(mine))

    def path(self, picture: Picture) -> Path:
        """Where a picture lies."""
        return self._gallery.path(self.digests[picture])
