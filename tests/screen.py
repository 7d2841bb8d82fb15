"""What a terminal does with a text."""

from __future__ import annotations

import unicodedata

_BIDI = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def steers(letter: str) -> bool:
    """Whether a terminal does something else with it than show it."""
    return unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(letter) in _BIDI


def columns(line: str) -> int:
    """How many columns a line takes."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in line)


def fits(text: str, width: int = 80) -> bool:
    """Whether every line does, and none steers the terminal."""
    return (
        not any(steers(letter) for line in text.split("\n") for letter in line) and max(map(columns, text.split("\n"))) <= width
    )
