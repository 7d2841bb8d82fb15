"""The exceptions of zit_merge, and the phrases that their messages share."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import PureWindowsPath

from .wording import masked, message


class ZitMergeError(Exception):
    """The input, the config or the machine prevents the work. The message says what is wrong, where, and what to do.

    Whoever prints it, AI-Toolkit too, gets one line that is fit for a terminal.

    Attributes:
        step: The step that it is about, where that is known.
        sentence_first: For a column that shows the beginning only: the step and the sentence come first, the place last.
    """

    step = ""
    sentence_first = False

    def __str__(self) -> str:
        loc, text = self._told()
        if not self.sentence_first:
            return message(f"{loc}: {text}" if loc else text)
        text = masked(text)  # before a part of a path is told
        path = re.match(_PATH, text)
        places = [loc, path[0] if path else ""]
        name = PureWindowsPath(path[0]).name + text[path.end() :] if path else text
        place = ", ".join(filter(None, places))
        return message(": ".join(filter(None, (self.step, name))) + (f" ({place})" if place else ""))

    def _told(self) -> tuple[str, str]:
        """(location, sentence)"""
        return "", super().__str__()


# An absolute path that begins a sentence; without blanks, or with any up to the ending of a LoRA.
_PATH = r"(?:/|[A-Za-z]:[\\/])(?:.*?\.safetensors|\S+?)(?=:? )"


class SettingError(ZitMergeError):
    """A setting is wrong. `located` completes its location on the way up, so that no function needs to be told where it is.

    Args:
        message: What is wrong and what to do.
        loc: Where, below the place that raises: `SettingError("must be positive", "blocks.to_q")`.
        is_complete: The location starts at the job already: the setting is in another section than the one that is looked at.

    Attributes:
        message: As given.
        loc: `process[1].steps[0].loras[0].blocks.to_q`, as far as it is known.
        is_complete: As given.
    """

    def __init__(self, message: str, loc: str = "", *, is_complete: bool = False):
        super().__init__(message, loc)
        self.message, self.loc, self.is_complete = message, loc, is_complete

    def _told(self) -> tuple[str, str]:
        return self.loc, self.message


@contextmanager
def located(loc: str) -> Iterator[None]:
    """Puts a location before that of every SettingError that passes and is not complete.

    Args:
        loc: A key, a path of keys, or a command-line flag; empty changes nothing.
    """
    try:
        yield
    except SettingError as e:
        e.loc = e.loc if e.is_complete else joined(loc, e.loc)
        raise


@contextmanager
def of_step(name: str) -> Iterator[None]:
    """Tells every error that passes which step it is about.

    Args:
        name: Of the step.
    """
    try:
        yield
    except ZitMergeError as e:
        e.step = e.step or name
        raise


def joined(*locs: str) -> str:
    """Locations as one path: `steps[0]` and `loras[1]` as `steps[0].loras[1]`; empty ones are left out."""
    return ".".join(filter(None, locs))


def not_available_yet(what: str, instead: str = "") -> SettingError:
    """The answer to a setting of the interface that this version does not have.

    Args:
        what: The setting, where the location does not name it.
        instead: What to do.
    """
    text = f"{what} is not available yet".lstrip() + " in this version of zit_merge"
    return SettingError(text + (f"; {instead}" if instead else ""))


def other_tensors(what: object, sha256: str) -> SettingError:
    """The error for a file or model that is not the one that a recipe names by its hash."""
    return SettingError(
        f"{what} does not hold the tensors of the recipe (sha256 {sha256[:12]}...): find the one that it was made from and name "
        "its folder with --loras"
    )


def counted(number: int, what: str) -> str:
    """`1 module`, `2 modules`.

    Args:
        number: How many.
        what: One of them.
    """
    return f"{number} {what}{'s' * (number != 1)}"


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the known word that looks most like `word`, else ''.

    Args:
        word: What was written.
        known: What could have been meant.
    """
    spelled = {str(k).lower(): str(k) for k in known}
    close = difflib.get_close_matches(str(word).lower(), spelled, n=1, cutoff=0.6)
    return f" (did you mean {spelled[close[0]]}?)" if close else ""
