"""Progress in AI-Toolkit's UI, and its stop button, which is Ctrl+C too."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
from typing import Any, TypeVar

from ..errors import counted
from ..planning.types import StepPlan
from ..progress import Progress
from .status import Status

_PAUSE = 0.5  # seconds between two looks at the database

T = TypeVar("T")


class DeferredInterrupt:
    """As a context it holds back Ctrl+C until the work on one item is done: raised in the midst of a library or of the toolkit's
    database code it has been lost there. A second one acts at once.
    """

    def __init__(self):
        self._interrupted, self._at_once = False, False

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, kind: type | None, *exc: object) -> None:
        if hasattr(self, "_handler"):
            signal.signal(signal.SIGINT, self._handler)
        if kind is None and self._interrupted:
            raise KeyboardInterrupt

    def _interrupt(self, number: int, frame: object) -> None:
        self._interrupted = True
        signal.signal(signal.SIGINT, self._handler)
        if self._at_once:
            raise KeyboardInterrupt

    def _stop_if_interrupted(self) -> None:
        if self._interrupted:
            raise KeyboardInterrupt


class JobProgress(DeferredInterrupt, Progress):
    """Shows progress in the terminal and in the UI, and stops between two items when the user wants it.

    Args:
        status: Where the UI is told, and asked.
        bar: The terminal's progress.
        plans: The steps that are run: their passes, which are labelled with their names, count in the UI.
    """

    def __init__(self, status: Status, bar: Progress, plans: Sequence[StepPlan] = ()):
        super().__init__()
        self._status, self._bar = status, bar
        self._modules = {plan.name: len(plan.shapes) for plan in plans}
        self._before = dict(zip(self._modules, accumulate(self._modules.values(), initial=0), strict=False))
        self._start = self._told = time.monotonic()
        self._retell: Callable[[], None] = self._status.check

    def track(
        self, items: Collection[T], label: str, unit: str = "module", describe: Callable[[T], str] | None = None
    ) -> Iterator[T]:
        """See `Progress`.

        Raises:
            KeyboardInterrupt: Ctrl+C.
            JobStopped: The stop button, or the queue's.
        """
        total, is_picture = len(items), unit == "picture"
        for done, item in enumerate(self._bar.track(items, label, unit, describe)):
            name = describe(item) if describe else label
            if is_picture:
                self._picture(done, total, f"Picture {done + 1}/{total}: {name}")
            yield item
            if unit == "tensor":
                self._tensor(done + 1, total, name)
            elif not is_picture:
                self._module(done + 1, total, name)
            elif done + 1 == total:
                self._picture(total, total, f"{counted(total, 'picture')} rendered")

    def _module(self, done: int, total: int, label: str) -> None:
        """A module of a pass is done: the UI is told, and asked, about twice a second and at the end."""
        self._stop_if_interrupted()
        now, is_counted = time.monotonic(), label in self._modules
        if now - self._told < _PAUSE and not (is_counted and done == total):
            return
        self._told = now
        if not is_counted:
            self._status.check()
        else:
            overall = self._before[label] + round(done / total * self._modules[label])
            speed = f"{overall / max(now - self._start, 1e-3):.0f} modules/s"
            self._status.progress(f"Merging {label}: {done}/{total}", overall, sum(self._modules.values()), speed)

    def _tensor(self, done: int, total: int, label: str) -> None:
        """A tensor of a whole model is written: as `_module`."""
        self._stop_if_interrupted()
        now = time.monotonic()
        if done == 1:
            self._start = now
        if now - self._told >= _PAUSE or done == total:
            self._told = now
            speed = f"{(done - 1) / max(now - self._start, 1e-3):.0f} tensors/s"
            self._status.progress(f"{label[:1].upper()}{label[1:]}: {done}/{total}", done, total, speed)

    def _picture(self, done: int, total: int, info: str) -> None:
        """So many pictures are done. The first one waited for the model too: the pace is that of the others."""
        self._stop_if_interrupted()
        now = time.monotonic()
        if done == 1:
            self._start = now
        pace = f"{(now - self._start) / (done - 1):.1f} s/picture" if done > 1 else ""
        self._retell = lambda: self._status.progress(info, done, total, pace)
        self._retell()

    def check(self) -> None:
        """Raises if somebody wants the work to stop: between two steps of a picture, or while there is nothing to do.

        Raises:
            KeyboardInterrupt: Ctrl+C.
            JobStopped: The stop button, or the queue's.
        """
        self._stop_if_interrupted()
        if time.monotonic() - self._told >= _PAUSE:
            self._status.check()
            self._told = time.monotonic()

    def say(self, info: str) -> None:
        """Shows what is going on in the UI.

        Args:
            info: A few words.

        Raises:
            JobStopped: The stop button, or the queue's.
        """
        self._status.say(info)

    def loading(self, load: Callable[[Any], AbstractContextManager[Any]]) -> Callable[[Any], AbstractContextManager[Any]]:
        """The same loader of a model, shown in the UI, and to be stopped: a download may take an hour, nothing is left half done.

        Args:
            load: Makes a `Renderer`; what is passed on is passed to it.
        """

        @contextlib.contextmanager
        def loaded(settings: Any) -> Iterator[Any]:
            self._status.say("Loading the model for pictures")
            self._at_once = True
            try:
                model = load(settings)
            finally:
                self._at_once = False
            with model as renderer:
                self._stop_if_interrupted()  # some library may have lost it
                self._retell()  # the picture that the model was loaded for
                renderer.on_step = self.check
                yield renderer

        return loaded
