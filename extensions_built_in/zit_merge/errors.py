"""The one exception of zit_merge, and the sentences that several places share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ZitMergeError(Exception):
    """The input, the config or the machine stands in the way. The message says what, where and what to do."""


def not_available_yet(what: str, instead: str = "") -> ZitMergeError:
    """The answer to a setting or command of the interface that this version does not have."""
    return ZitMergeError(f"{what} is not available yet in this version of zit_merge" + (f"; {instead}" if instead else ""))


def counted(number: int, what: str) -> str:
    """`1 module`, `2 modules`."""
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
