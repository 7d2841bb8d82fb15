"""How far a pass over modules or pictures is: a bar on a terminal, plain lines in a log file, all of it ASCII on stderr."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from typing import Protocol, TypeVar

from tqdm import tqdm

from ..progress import Progress
from ..wording import shown, squeezed

T = TypeVar("T")

DELAY = 1.0  # seconds: what takes less is not shown
_APART, _SHARE = 10.0, 0.1  # seconds, and share of the modules, between two lines of a log
_TITLE = 30  # columns

Clock = Callable[[], float]


class _Shown(Protocol):
    """What shows one pass."""

    def to(self, done: int) -> None:
        """So many modules are finished."""

    def close(self) -> None:
        """The pass has ended, or was broken off."""


class Bar(Progress):
    """Shows on stderr what takes over a second; a pass within another one is not shown.

    Args:
        quiet: Show nothing.
        clock: Seconds, for the lines of a log.
    """

    def __init__(self, quiet: bool = False, clock: Clock = time.monotonic):
        self._quiet, self._clock = quiet, clock

    def track(
        self, items: Collection[T], label: str, unit: str = "module", describe: Callable[[T], str] | None = None
    ) -> Iterator[T]:
        """See `Progress`."""
        if self._quiet:
            yield from items
            return
        self._quiet = True
        try:
            with closing(_shown(label, len(items), self._clock, unit)) as shown:
                shown.to(0)
                for done, item in enumerate(items, 1):
                    yield item
                    shown.to(done)
        finally:
            self._quiet = False


def _shown(title: str, total: int, clock: Clock, unit: str) -> _Shown:
    """A bar where stderr is a terminal. A stream that keeps a log may lack `isatty`; without a console there is None."""
    title = shown(squeezed(title, _TITLE), sys.stderr)
    is_terminal = getattr(sys.stderr, "isatty", lambda: False)()
    return _Drawn(title, total, unit) if is_terminal else _Lines(title, total, clock, unit)


class _Drawn:
    """A bar that tqdm redraws in place."""

    def __init__(self, title: str, total: int, unit: str):
        self._bar = tqdm(total=total, desc=title, unit=unit, ascii=True, delay=DELAY, mininterval=0.5, file=sys.stderr)

    def to(self, done: int) -> None:
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class _Lines:
    """`soft: 60/240 modules, 3 s left`, the first after a second, then few: a log keeps every one of them."""

    def __init__(self, title: str, total: int, clock: Clock, unit: str):
        self._title, self._total, self._clock, self._unit = title, total, clock, unit
        self._first, self._since = 0, clock()  # items that were done when their pace began, and when that was
        self._not_before, self._from = self._since + DELAY, 0.0  # the time and the module of the next line, at the earliest

    def to(self, done: int) -> None:
        now = self._clock()
        if done == 0 or (done == 1 and self._unit == "picture"):  # the first picture waits for the model: no part of the pace
            self._first, self._since = done, now
        if now >= self._not_before and self._from <= done < self._total and sys.stderr is not None:
            self._not_before, self._from = now + _APART, done + _SHARE * self._total
            print(f"{self._title}: {done}/{self._total} {self._unit}s{self._left(done, now)}", file=sys.stderr, flush=True)

    def close(self) -> None:
        pass  # what was made is told by whoever made it

    def _left(self, done: int, now: float) -> str:
        """`, 3 s left` at the pace so far; nothing while there is none."""
        pace = (now - self._since) / (done - self._first) if done > self._first else 0.0
        return f", {_duration(pace * (self._total - done))} left" if pace > 0 else ""


def _duration(seconds: float) -> str:
    """`3 s`, `12 min`, `1 h 05 min`; rounded up, as nothing is done in 0 s."""
    if seconds <= 99:
        return f"{math.ceil(seconds)} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"
