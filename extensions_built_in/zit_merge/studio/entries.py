"""What was asked of a studio: measures, looks and LoRAs to keep, each with how far it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from .setting import Setting

WAITING, RUNNING, DONE, CANCELLED, FAILED = "waiting", "running", "done", "cancelled", "failed"


@dataclass
class Entry:
    """A request.

    Attributes:
        id: Its number; looks have numbers of their own.
        setting: What was composed.
        status: WAITING, RUNNING, DONE, CANCELLED or FAILED.
        error: Why it failed.
    """

    id: int
    setting: Setting
    status: str = WAITING
    error: str = ""


@dataclass
class Measuring(Entry):
    """A measure; there is one, the newest.

    Attributes:
        found: What was measured, for the page.
    """

    found: Mapping[str, Any] | None = None

    def facts(self) -> dict[str, Any]:
        """For the page."""
        return {key: getattr(self, key) for key in ("id", "status", "error", "found")}


@dataclass
class Keeping(Entry):
    """A setting that becomes a file.

    Attributes:
        name: Of the step.
        made: `file`, `verdict` and `judgement` of what was written, for the page.
    """

    name: str = ""
    made: Mapping[str, Any] | None = None

    def facts(self) -> dict[str, Any]:
        """For the page."""
        told = {key: getattr(self, key) for key in ("id", "name", "status", "error")}
        return told | dict(self.made or {"file": None, "verdict": None, "judgement": None})


@dataclass
class Look(Entry):
    """One entry of the strip.

    Attributes:
        draft: Smaller and in fewer steps.
        favourite: Marked by the user.
        columns: Caption and kind (`base`, `input`, `look`) of what is shown, the look last.
        rows: Prompt and seed of each row.
        digests: Row by row the names of the pictures, one for each column.
    """

    draft: bool = False
    favourite: bool = False
    columns: Sequence[tuple[str, str]] = ()
    rows: Sequence[str] = ()
    digests: Sequence[Sequence[str]] = ()

    @property
    def label(self) -> str:
        """What it shows, a few words."""
        return self.setting.label + ", draft" * self.draft

    def facts(self, ready: AbstractSet[str]) -> dict[str, Any]:
        """For the page.

        Args:
            ready: The pictures that are there.
        """
        return {
            **{key: getattr(self, key) for key in ("id", "draft", "favourite", "status", "error", "label")},
            "setting": self.setting.record(),
            "columns": [{"label": label, "kind": kind} for label, kind in self.columns],
            "rows": list(self.rows),
            "ready": [[digest in ready for digest in row] for row in self.digests],
        }

    def record(self) -> dict[str, Any]:
        """For the file of the strip."""
        kept = {key: getattr(self, key) for key in ("id", "draft", "favourite", "columns", "rows", "digests")}
        return {**kept, "setting": self.setting.record()}
