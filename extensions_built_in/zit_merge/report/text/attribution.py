"""A file and its sources as text."""

from __future__ import annotations

from collections.abc import Iterator

from ...analysis.advice import two_digits
from ...analysis.attribution import Attribution, amount
from ...errors import counted
from ...wording import row, shorten
from .compare import file_lines
from .table import value_table

_SENTENCE = 1000


def attribution_text(found: Attribution) -> str:
    """A file and its sources for people."""
    lines = file_lines("file", found.file)
    for i, source in enumerate(found.sources):
        lines += file_lines(f"source {i + 1}", source)
        strength = found.strengths[i]
        many = ", one of many that fit" if any(i in group for group in found.alike) else ""
        lines += row("", "strength " + ("none, it changes nothing there" if strength is None else amount(strength) + many))
        shared, chance = found.shared[i], found.chance[i]
        if shared is not None and chance is not None:
            lines += row("", f"cosine {shared:.2g}, by chance {chance:.1g}")
    lines.append("")
    for i, sentence in enumerate(found.verdict):
        lines += row("" if i else "verdict", f"- {shorten(sentence, _SENTENCE)}")
    for i in range(len(found.sources)):
        lines += _strength_lines(found, i)
    return "\n".join(lines)


def _strength_lines(found: Attribution, i: int) -> Iterator[str]:
    """Layers x components of one source, or one line where they are equal."""
    known = {m: two_digits(strength) for m, x in found.modules.items() if (strength := x[i]) is not None}
    values = known | {m: "?" for m, who in found.untold.items() if i in who}
    title = f"strength of source {i + 1} in each module{' before the cut' if found.is_truncated else ''}"
    if len(set(values.values())) == 1:
        value, number = next(iter(values.values())), counted(len(values), "module")
        yield from ("", f"{title}: {'not to be told' if value == '?' else value} in all {number}")
    elif values:
        yield from ("", title, *value_table({m: v if len(v) <= 6 else f"{float(v):.0e}" for m, v in values.items()}))
        if "?" in values.values():
            yield "?: too alike another source to be told"
