"""Words that every report uses: 80 columns, printable ASCII, nothing that a file says steers the terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

WIDTH = 78  # 80 columns without the last two: some consoles break a line that fills them
_LABEL = 14
TITLE = 120  # letters of a file's name, two lines


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def some(names: Sequence[str], what: str = "modules") -> str:
    """`layers.0.attention.to_q`, or how many with the first as an example.

    Args:
        names: Of modules or keys.
        what: One of them is called.
    """
    return names[0] if len(names) == 1 else f"{len(names)} {what} (e.g. {names[0]})"


def ranges(numbers: Sequence[int]) -> str:
    """`1, 3 and 5-9` of rising numbers."""
    runs = neighbours(numbers)
    return listed([part for a, b in runs for part in ([f"{a}-{b}"] if b > a + 1 else map(str, range(a, b + 1)))])


def neighbours(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """(first, last) of each run of rising numbers without a gap."""
    runs: list[tuple[int, int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], n
        else:
            runs.append((n, n))
    return runs


def row(label: str, text: str) -> list[str]:
    """A label and a text beside it, wrapped; words that are too long for a line are broken.

    Args:
        label: Of at most as many letters as the column.
        text: One or more sentences.
    """
    lines = _wrap(plain(text), WIDTH - _LABEL, rest="  " * text.startswith("- "))
    return [f"{label if i == 0 else '':<{_LABEL}}{line}" for i, line in enumerate(lines)]


def plain(text: str) -> str:
    """One line of printable ASCII: what a file says of itself must not steer the terminal."""
    text = re.sub(r"\s+", " ", text).strip().encode("ascii", "backslashreplace").decode()
    return re.sub(r"[\x00-\x1f\x7f]", "?", text)


def wrapped(text: str, indent: int = 2) -> list[str]:
    """A sentence in lines of their own, those after the first further in; words that are too long for a line are broken.

    Args:
        text: The sentence.
        indent: Spaces before its first line.
    """
    first, rest = " " * indent, " " * (indent + 2)
    return _wrap(plain(text), WIDTH, first, rest)


def _wrap(text: str, width: int, first: str = "", rest: str = "") -> list[str]:
    """textwrap's lines, which may end in a space where a word that was broken fills one to the last letter."""
    lines = textwrap.wrap(text, width, break_on_hyphens=False, initial_indent=first, subsequent_indent=rest)
    return [line.rstrip() for line in lines]


def beside(left: str, parts: Sequence[str], width: int = WIDTH) -> list[str]:
    """`left`, then `parts` with commas between them; what does not fit goes on below. A part that fits is not broken.

    Args:
        left: Before the first line.
        parts: What is listed.
        width: Of a line.
    """
    room = width - len(left)
    text = ", ".join(part.replace(" ", "\xa0") if len(part) < room else part for part in parts)
    lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
    return [(left if i == 0 else " " * len(left)) + line.replace("\xa0", " ") for i, line in enumerate(lines)]


def aligned(texts: Sequence[str]) -> list[str]:
    """Numbers in a column of equal width, their units below each other: `0.45 `, `0.495`, `   - `."""
    heads = [re.findall(r"-?\d+|.*", text)[0] for text in texts]
    before = max(map(len, heads))
    lines = [" " * (before - len(head)) + text for head, text in zip(heads, texts, strict=True)]
    width = max(map(len, lines))
    return [f"{line:<{width}}" for line in lines]


def copyable(path: Path | str) -> str:
    """A path for a line of its own: as it is, but for what is not printable ASCII."""
    text = str(path).encode("ascii", "backslashreplace").decode()
    return re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def squeezed(name: str, most: int) -> str:
    """Beginning and end of a name that is too long for its place, without what all files end in: `my_charac...000002500`.

    Args:
        name: Of a file.
        most: Letters.
    """
    if len(plain(name)) > most:
        name = name.removesuffix(".safetensors")
    if len(shown := plain(name)) <= most:
        return shown
    tail = (most - 3) // 2
    head, end = _fitting(name, most - 3 - tail), _fitting(name[::-1], tail)[::-1]
    return f"{plain(head)}...{plain(end)}"


def _fitting(name: str, most: int) -> str:
    """As many whole letters from the start as `most` letters of ASCII show."""
    return next(name[:n] for n in range(min(len(name), most), -1, -1) if len(plain(name[:n])) <= most)


def shorten(text: str, most: int) -> str:
    """The beginning of a long text, and how long it is.

    Args:
        text: Of a file.
        most: Letters that are shown.
    """
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


def ranks_text(ranks: Mapping[str, int], algorithms: Iterable[str]) -> str:
    """`32`, `4-32`, `3840 at most` where not all of it is LoRA.

    Args:
        ranks: Module -> rank.
        algorithms: Of the file's changes.
    """
    return span(ranks.values()) + (" at most" if set(algorithms) - {"LoRA"} else "")


def span(values: Collection[int]) -> str:
    """`32`, or `4-32` where they differ."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"
