"""The queue of a studio: requests wait here, one thread does them one after the other, and the newest measure wins."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from ..errors import ZitMergeError
from ..progress import Progress
from .entries import CANCELLED, DONE, FAILED, RUNNING, WAITING, Entry, Keeping, Look, Measuring
from .setting import Setting

T = TypeVar("T")
OPEN = "Studio open: see the Plugin tab"
_PAUSE = 0.25  # seconds between two looks at what else may end the studio
_TOLD = 0.1  # seconds between two numbers of a progress
_WAITING = 20  # requests of one kind that may wait


class Workshop(Protocol):
    """What does the work.

    Attributes:
        no_pictures: Why there are none; empty where there are.
        looks: In the order in which they were asked for.
        ready: The names of the pictures that are there.
    """

    no_pictures: str

    @property
    def looks(self) -> Sequence[Look]: ...

    @property
    def ready(self) -> frozenset[str] | set[str]: ...

    def is_start(self, setting: Setting) -> bool:
        """Whether nothing was composed: the step is as the section has it."""

    def measure(self, setting: Setting, progress: Progress) -> Mapping[str, Any]:
        """What a setting would make, for the page."""

    def add(self, setting: Setting, draft: bool) -> Look:
        """A look that waits, or the one that is there."""

    def render(self, look: Look, progress: Progress, on_load: Callable[[str], None]) -> Iterator[None]:
        """Renders a look; yields when there is something to show. `on_load` is told the model's name, and "" when it is there."""

    def write(self, done: Look | None = None) -> None:
        """Keeps the strip, this look of it too."""

    def jpeg(self, digest: str, edge: int) -> bytes:
        """A picture."""

    def name(self, found: object) -> str:
        """A name for a step that is kept."""

    def keep(self, setting: Setting, name: str, progress: Progress) -> Mapping[str, Any]:
        """Writes a setting as a step of this name; `file`, `verdict` and `judgement` for the page."""


class Dropped(Exception):
    """Nobody waits for this any more: a newer measure is there, or the look was cancelled."""


class PutOff(Exception):
    """The rest of a look waits until others have something to show."""


class Session:
    """What the server asks and one thread does.

    Args:
        workshop: Does the work.
        minutes: Without a request after which it closes.
        host: May stop everything, and shows what is going on.

    Attributes:
        closed: Why it is closed; empty while it is open.
    """

    def __init__(self, workshop: Workshop, minutes: float, host: Progress):
        self._shop, self._minutes, self.host, self.closed = workshop, minutes, host, ""
        self._change = threading.Condition()
        self._version, self._used, self._ids = 1, time.monotonic(), 0
        self._task: Mapping[str, Any] | None = None
        self._measuring: Measuring | None = None
        self._last: Setting | None = None
        self._kept: list[Keeping] = []

    @property
    def no_pictures(self) -> str:
        """Why there are none; empty where there are."""
        return self._shop.no_pictures

    # Of the server's threads; every method returns at once.

    def state(self, seen: int) -> dict[str, Any]:
        """What the page shows; less where nothing has changed.

        Args:
            seen: The version that the page has.
        """
        with self._change:
            told = {"version": self._version, "seconds_left": round(self._left()), "closed": self.closed or None}
            if seen == self._version:
                return told
            return told | {
                "task": self._task,
                "measure": self._measuring.facts() if self._measuring else None,
                "last": self._last.record() if self._last else None,
                "looks": [look.facts(self._shop.ready) for look in self._shop.looks],
                "kept": [one.facts() for one in self._kept],
            }

    def measure(self, setting: Setting) -> int:
        """Measures a setting; an older measure is dropped. Returns its number."""
        with self._asked():
            self._measuring = Measuring(self._next_id(), setting)
            if not self._shop.is_start(setting):  # as a page has it when it is opened again
                self._last = setting
            return self._measuring.id

    def look(self, setting: Setting, draft: bool) -> int:
        """Renders a setting. Returns the number of the look.

        Raises:
            ZitMergeError: There are no pictures, or too many wait.
        """
        if self._shop.no_pictures:
            raise ZitMergeError(self._shop.no_pictures)
        with self._asked():
            if len(self._waiting(self._shop.looks)) >= _WAITING:
                raise ZitMergeError(f"{_WAITING} looks wait: cancel them, or wait too")
            return self._shop.add(setting, draft).id

    def cancel(self) -> None:
        """Drops the looks that are not done."""
        with self._asked():
            for look in self._shop.looks:
                if look.status in (WAITING, RUNNING):
                    look.status = CANCELLED

    def keep(self, setting: Setting, name: object) -> int:
        """Writes a setting as a LoRA. Returns the number of the request.

        Raises:
            ZitMergeError: The name can't be used, or too many wait.
        """
        with self._asked():
            wanted, open_ones = self._shop.name(name), [one for one in self._kept if one.status in (WAITING, RUNNING)]
            if wanted.lower() in (one.name.lower() for one in open_ones):
                raise ZitMergeError(f"name: {wanted} is being written: choose another name")
            if len(open_ones) >= _WAITING:
                raise ZitMergeError(f"{_WAITING} LoRAs wait to be written: wait too")
            self._kept.append(Keeping(self._next_id(), setting, name=wanted))
            return self._kept[-1].id

    def favourite(self, number: object, on: bool) -> None:
        """Marks a look, or takes the mark away.

        Raises:
            ZitMergeError: There is no such look, or it can't be written down.
        """
        with self._asked():
            self._look(number).favourite = on
            self._shop.write()

    def picture(self, number: object, row: object, column: object, edge: int) -> bytes:
        """A picture of a look as a JPEG.

        Args:
            number: Of the look.
            row: Of its rows.
            column: Of its columns.
            edge: Pixels of its longer side at most.

        Raises:
            ZitMergeError: There is no such picture, or not yet.
        """
        with self._change:
            self._used = time.monotonic()
            digest = _at(_at(self._look(number).digests, row), column)
            if digest not in self._shop.ready:
                raise ZitMergeError("picture: it is not there yet")
        return self._shop.jpeg(digest, edge)

    def close(self, why: str) -> None:
        """Ends the studio when what runs is done or dropped.

        Args:
            why: For the page.
        """
        with self._changing():
            self.closed = self.closed or why

    def _look(self, number: object) -> Look:
        found = [look for look in self._shop.looks if look.id == number]
        if not found:
            raise ZitMergeError("look: there is none of that number")
        return found[0]

    def _next_id(self) -> int:
        self._ids += 1
        return self._ids

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """Somebody uses the studio.

        Raises:
            ZitMergeError: It is closed.
        """
        with self._changing():
            if self.closed:
                raise ZitMergeError("the studio is closed")
            self._used = time.monotonic()
            yield

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """The state changes, and whoever waits for that wakes up."""
        with self._change:
            yield
            self._version += 1
            self._change.notify_all()

    def _left(self) -> float:
        return max(60 * self._minutes - (time.monotonic() - self._used), 0.0)

    def _waiting(self, entries: Sequence[Any]) -> list[Any]:
        return [entry for entry in entries if entry.status == WAITING]

    # Of the one thread that works.

    def serve(self) -> None:
        """Does what is asked for until the studio is closed.

        Raises:
            KeyboardInterrupt: The host wants to stop; other exceptions that mean it likewise.
        """
        self.host.say(OPEN)
        while not self.closed:
            if not self._work():
                with self._change:
                    self._change.wait(_PAUSE)
                if not self._left():
                    self.close(f"nobody used it for {self._minutes:g} minutes")
            self.host.check()
        while kept := self._waiting(self._kept):  # they were promised
            self._keep(kept[0])

    def _work(self) -> bool:
        """Does the next thing, if there is one: a file before a measure, a measure before a look."""
        with self._change:
            kept = self._waiting(self._kept)
            looks = sorted(self._waiting(self._shop.looks), key=lambda look: bool(look.digests))  # new ones first
        if kept:
            self._keep(kept[0])
        elif self._measured():
            pass
        elif looks:
            self._render(looks[0])
        else:
            return False
        with self._changing():
            self._task, self._used = None, time.monotonic()  # long work is no idleness
        return True

    def _measured(self) -> bool:
        """Whether a measure was waiting; it is done now."""
        one = self._measuring
        if one is None or one.status != WAITING:
            return False
        with self._running(one):
            watch = Watch(
                self, "measure", one.setting.method, lambda: one is not self._measuring or self._is_over, Quiet(self.host)
            )
            one.found = self._shop.measure(one.setting, watch)
        return True

    @property
    def _is_over(self) -> bool:
        return bool(self.closed)

    def _render(self, look: Look) -> None:
        """Renders a look; what it shares with others, base and inputs, waits where another look has nothing to show yet."""
        watch = Watch(self, "look", look.label, lambda: look.status == CANCELLED or self._is_over, self.host)
        with self._running(look):
            for _ in self._shop.render(look, watch, lambda name: self.tell("load" if name else "look", name or look.label, 0, 0)):
                with self._changing():
                    kept = self._waiting(self._kept)
                for one in kept:
                    self._keep(one)
                self._measured()
                with self._change:
                    is_shown = all(row[-1] in self._shop.ready for row in look.digests)
                    others = [other for other in self._waiting(self._shop.looks) if not other.digests]
                if is_shown and others and not self._is_over:
                    raise PutOff
            with self._change:
                self._shop.write(look)
        self.host.say(OPEN)

    def _keep(self, one: Keeping) -> None:
        with self._running(one):
            one.made = self._shop.keep(one.setting, one.name, Watch(self, "keep", one.name, lambda: False, self.host))
        self.host.say(OPEN)

    @contextmanager
    def _running(self, one: Entry) -> Iterator[None]:
        """One request; what is wrong with it is told to the page, and the studio goes on."""
        with self._changing():
            if one.status == WAITING:  # else it was cancelled just now
                one.status = RUNNING
        error, status = "", DONE
        try:
            yield
        except PutOff:
            status = WAITING
        except Dropped:
            status = CANCELLED
        except ZitMergeError as e:
            error, status = str(e), FAILED
        except Exception as e:  # whatever a library raises costs this request, not the studio and the job
            traceback.print_exc()
            error, status = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}: the log has more", FAILED
        with self._changing():
            one.error, one.status = error, CANCELLED if one.status == CANCELLED else status

    def tell(self, kind: str, label: str, done: int, total: int) -> None:
        """Shows how far the work is.

        Args:
            kind: measure, look, keep or load.
            label: What of it.
            done: So many items.
            total: Of all.
        """
        with self._changing():
            self._task = {"kind": kind, "label": label, "done": done, "total": total}


def _at(entries: Sequence[Any], number: object) -> Any:
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(entries):
        raise ZitMergeError("picture: there is none of that row and column")
    return entries[number]


class Watch(Progress):
    """Shows the page how far a request is, and stops it where nobody waits for it any more.

    Args:
        session: Told.
        kind: measure, look or keep.
        label: What of it.
        is_dropped: Whether nobody waits.
        host: Shows it too, and may stop everything.
    """

    def __init__(self, session: Session, kind: str, label: str, is_dropped: Callable[[], bool], host: Progress):
        self._session, self._kind, self._label, self._is_dropped, self._host = session, kind, label, is_dropped, host

    def track(
        self, items: Collection[T], label: str, unit: str = "module", describe: Callable[[T], str] | None = None
    ) -> Iterator[T]:
        """See `Progress`.

        Raises:
            Dropped: Nobody waits for the rest.
        """
        told = 0.0
        for done, item in enumerate(self._host.track(items, label, unit, describe)):
            self.check()
            if time.monotonic() - told > _TOLD or unit == "picture":
                told = time.monotonic()
                self._session.tell(self._kind, self._label, done, len(items))
            yield item

    def check(self) -> None:
        """See `Progress`."""
        self._host.check()
        if self._is_dropped():
            raise Dropped


class Quiet(Progress):
    """What a host may stop, and does not show: a measure is over in seconds, and follows every move of a slider.

    Args:
        host: May stop everything.
    """

    def __init__(self, host: Progress):
        self._host = host

    def track(
        self, items: Collection[T], label: str, unit: str = "module", describe: Callable[[T], str] | None = None
    ) -> Iterator[T]:
        """See `Progress`."""
        for item in items:
            self._host.check()
            yield item

    def check(self) -> None:
        """See `Progress`."""
        self._host.check()
