"""Words that every report and every message uses: 80 columns, in the letters that the stream has; nothing that a file says steers
the terminal, and nothing that the environment said is repeated.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

WIDTH = 78  # 80 columns without the last two: some consoles break a line that fills them
_LABEL = 14
TITLE = 120  # letters of a file's name, two lines
_WORD, _MESSAGE = 100, 2000  # letters of a word and of a whole message
# Control characters, the marks that turn a line around, and what has no width. Joiners stay: scripts and emoji need them.
_STEERING = re.compile(
    "[\0-\x09\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)
_FILLER = "\0"  # stands behind a letter of two columns while a text is wrapped
_TELLING = 4  # letters of a value that is no secret yet

_hidden: dict[str, str] = {}  # what the environment said -> the variable's name


def hide(value: str, name: str) -> None:
    """Remembers that a text came from the environment: messages show what was written, `${NAME}`.

    Args:
        value: Of a variable; a short one would be found in every word, and is not hidden.
        name: Of the variable.
    """
    forms = (value, repr(value)[1:-1], value.rstrip("/\\"), str(Path(os.path.expanduser(value))))
    _hidden.update({form: name for form in forms if len(form) >= _TELLING})


def forget() -> None:
    """Another job begins."""
    _hidden.clear()


def masked(text: str) -> str:
    """A text with `${NAME}` in the place of the value of each variable."""
    return _masked(text, "${{{}}}")


def public_name(name: str) -> str:
    """A name for the metadata of a file, with the name of each variable in the place of its value: a recipe fills nothing in."""
    return _masked(name, "{}")


def _masked(text: str, form: str) -> str:
    for value in sorted(_hidden, key=len, reverse=True):
        text = text.replace(value, form.format(_hidden[value]))
    return text


def shown(text: str, stream: TextIO | None = None) -> str:
    """What may go to a terminal, a log and AI-Toolkit's UI: the letters that the stream can encode; anything else is escaped.

    Args:
        text: One or more lines.
        stream: Where they go; None is stdout.
    """
    text = _STEERING.sub(lambda found: _escaped(found[0]), masked(text))
    encoding = getattr(stream or sys.stdout, "encoding", None) or "ascii"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _escaped(letter: str) -> str:
    return f"\\x{ord(letter):02x}" if letter < "\x80" else letter.encode("ascii", "backslashreplace").decode()


def message(text: str) -> str:
    """A sentence for people in one line; words that only a file or a config can make so long are shortened."""
    text = re.sub(rf"[^\s/\\]{{{_WORD + 1},}}", lambda found: _ends(found[0], _WORD), masked(text))
    return shown(_ends(text, _MESSAGE)).replace("\n", "\\n")


def _ends(text: str, most: int) -> str:
    """Beginning and end of a text that is too long."""
    tail = (most - 3) * 2 // 5
    return text if len(text) <= most else f"{text[: most - 3 - tail]}...{text[-tail:]}"


def columns(text: str) -> int:
    """How wide a terminal shows a line at most: Chinese and its like take two columns a letter."""
    return len(text) + sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)


def padded(text: str, width: int) -> str:
    """With spaces up to a number of columns."""
    return text + " " * (width - columns(text))


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
    """One line: what a file says of itself must not steer the terminal."""
    return shown(re.sub(r"\s+", " ", text).strip())


def wrapped(text: str, indent: int = 2) -> list[str]:
    """A sentence in lines of their own, those after the first further in; words that are too long for a line are broken.

    Args:
        text: The sentence.
        indent: Spaces before its first line.
    """
    first, rest = " " * indent, " " * (indent + 2)
    return _wrap(plain(text), WIDTH, first, rest)


def _wrap(text: str, width: int, first: str = "", rest: str = "", *, whole: bool = False) -> list[str]:
    """textwrap's lines, which may end in a space where a word that was broken fills one to the last letter."""
    text = "".join(letter + _FILLER * (columns(letter) - 1) for letter in text)
    wrapper = textwrap.TextWrapper(width, first, rest, break_long_words=not whole, break_on_hyphens=False)
    return [line.replace(_FILLER, "").rstrip() for line in wrapper.wrap(text)]


def beside(left: str, parts: Sequence[str], width: int = WIDTH) -> list[str]:
    """`left`, then `parts` with commas between them; what does not fit goes on below. A part that fits is not broken.

    Args:
        left: Before the first line.
        parts: What is listed.
        width: Of a line.
    """
    room = width - columns(left)
    text = ", ".join(part.replace(" ", "\xa0") if columns(part) < room else part for part in parts)
    lines = _wrap(text, room, whole=True)
    return [(left if i == 0 else " " * columns(left)) + line.replace("\xa0", " ") for i, line in enumerate(lines)]


def aligned(texts: Sequence[str]) -> list[str]:
    """Numbers in a column of equal width, their units below each other: `0.45 `, `0.495`, `   - `."""
    heads = [re.findall(r"-?\d+|.*", text)[0] for text in texts]
    before = max(map(len, heads))
    lines = [" " * (before - len(head)) + text for head, text in zip(heads, texts, strict=True)]
    width = max(map(len, lines))
    return [f"{line:<{width}}" for line in lines]


def copyable(path: Path | str) -> str:
    """A path for a line of its own: as it is, but for what the terminal can't show."""
    return shown(str(path)).replace("\n", "\\x0a")


def squeezed(name: str, most: int) -> str:
    """Beginning and end of a name that is too long for its place, without what all files end in: `my_charac...000002500`.

    Args:
        name: Of a file.
        most: Columns.
    """
    name = masked(name)  # before it is cut
    if columns(plain(name)) > most:
        name = name.removesuffix(".safetensors")
    if columns(whole := plain(name)) <= most:
        return whole
    tail = (most - 3) // 2
    head, end = _fitting(name, most - 3 - tail), _fitting(name[::-1], tail)[::-1]
    return f"{plain(head)}...{plain(end)}"


def _fitting(name: str, most: int) -> str:
    """As many whole letters from the start as `most` columns show."""
    return next(name[:n] for n in range(min(len(name), most), -1, -1) if columns(plain(name[:n])) <= most)


def shorten(text: str, most: int) -> str:
    """The beginning of a long text, and how long it is.

    Args:
        text: Of a file.
        most: Letters that are shown.
    """
    text = masked(text)
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} letters)"


def middle(name: str) -> str:
    """Beginning and end of a long file name, and how long it is."""
    name = masked(name)
    return name if len(name) <= TITLE else f"{name[: TITLE - 40]}...{name[-37:]} ({len(name)} letters)"


def percent(share: float) -> str:
    """`50 %`, `0.2 %`, `99.9 %`: not 0 or 100 % unless it is."""
    if 0 < share < 0.001:
        return "under 0.1 %"
    if share >= 0.9995:
        return "100 %" if share >= 1 - 1e-12 else "99.9 %"
    return f"{100 * share:.1f} %".replace(".0 %", " %")


def size_text(count: int) -> str:
    """`42.6 MB`, `1.36 GB`: bytes in powers of ten, as the page has them too."""
    return f"{count / 1e9:.2f} GB" if count >= 999.95e6 else f"{count / 1e6:.1f} MB"


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
