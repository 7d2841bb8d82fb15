"""Words that every report uses: 80 columns, printable ASCII, nothing that a file says steers the terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

_LABEL, _WIDTH = 14, 78
TITLE = 120  # letters of a file's name, two lines


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def some(names: Sequence[str], what: str = "modules") -> str:
    """`layers.0.attention.to_q`, or how many with the first as an example."""
    return names[0] if len(names) == 1 else f"{len(names)} {what} (e.g. {names[0]})"


def row(label: str, text: str) -> list[str]:
    """A label and a text beside it, wrapped; words that are too long for a line are broken."""
    lines = textwrap.wrap(plain(text), _WIDTH - _LABEL, break_on_hyphens=False, subsequent_indent="  " * text.startswith("- "))
    return [f"{label if i == 0 else '':<{_LABEL}}{line}" for i, line in enumerate(lines)]


def plain(text: str) -> str:
    """One line of printable ASCII: what a file says of itself must not steer the terminal."""
    text = re.sub(r"\s+", " ", text).strip().encode("ascii", "backslashreplace").decode()
    return re.sub(r"[\x00-\x1f\x7f]", "?", text)


def shorten(text: str, most: int) -> str:
    """The beginning of a long text, and how long it is."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} letters)"


def middle(name: str) -> str:
    """Beginning and end of a long file name, and how long it is."""
    return name if len(name) <= TITLE else f"{name[: TITLE - 40]}...{name[-37:]} ({len(name)} letters)"


def percent(share: float) -> str:
    """`50 %`, `0.2 %`, `99.9 %`: not 0 or 100 % unless it is."""
    if 0 < share < 0.001:
        return "under 0.1 %"
    if share >= 0.9995:
        return "100 %" if share >= 1 - 1e-12 else "99.9 %"
    return f"{100 * share:.1f} %".replace(".0 %", " %")
