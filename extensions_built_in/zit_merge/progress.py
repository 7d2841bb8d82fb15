"""One protocol for everything that takes long: `Progress.track` passes items on, shows how far they are, and may stop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """Shows nothing and stops nothing; the base of those that do."""

    def track(
        self, items: Collection[T], label: str, unit: str = "module", describe: Callable[[T], str] | None = None
    ) -> Iterator[T]:
        """Passes items on one by one; an item is done when the next one is asked for.

        Args:
            items: What is worked on.
            label: What is done, for people: a step's name, `ranks of soft`.
            unit: What one item is called.
            describe: What an item is called, where that tells more than its number.

        Raises:
            KeyboardInterrupt: Between two items, when somebody wants the work to stop; other exceptions that mean it likewise.
        """
        yield from items

    def check(self) -> None:
        """Raises, as `track` does, while there are no items: when the work waits for something."""

    def say(self, info: str) -> None:
        """Shows what is going on, where there is a place for it.

        Args:
            info: A few words.
        """


SILENT = Progress()
