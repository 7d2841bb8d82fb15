"""An ablation as text: a table of shares for each metric, the strongest parts, and what limits the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..model.zimage import COMPONENTS
from ..wording import WIDTH, aligned, beside, columns, padded, squeezed, wrapped
from .ablation import NAME, Ablation, number
from .groups import BY_CELLS, LEAVE_OUT, SHORT

_NAMED = 3  # groups in a sentence
_LABEL, _CELL, _ACROSS = 18, 14, 4  # letters of a group's name and of a cell; metrics beside each other
_COLUMN = 7  # letters of a component's column


def ablation_text(ablation: Ablation) -> str:
    """The tables in the order of the model, so that neighbours are next to each other, then the strongest parts and notes."""
    what = "left out in turn" if ablation.mode == LEAVE_OUT else "alone"
    lines = wrapped(f"{squeezed(ablation.lora, NAME)}, each part {what}: {ablation.rendered}", 0)
    lines += ["", *wrapped(ablation.meaning)]
    if ablation.groups:
        lines += _cell_tables(ablation) if ablation.by == BY_CELLS else _group_tables(ablation)
    lines += ["", *_orders(ablation)]
    lines += ["", *(line for sentence in (*ablation.notes(), ablation.caveat) for line in wrapped(sentence))]
    return "\n".join(lines)


def _orders(ablation: Ablation) -> Iterator[str]:
    """For each metric what 100 % is, and the strongest and weakest groups."""
    names = [squeezed(m, _LABEL) for m in ablation.distances]
    for name, m in zip(names, ablation.distances, strict=True):
        order = _order(ablation, m) if ablation.ranked(m) else ["no change"]
        yield from beside(f"  {padded(name, max(map(columns, names)))}  ", [f"100 % is {ablation.whole(m):.3g}", *order])


def _order(ablation: Ablation, metric: str) -> list[str]:
    """`strongest layers 3-5 (62 %; first in 3 of 4 pictures)`, `layers 0-2 (50 %)`, ..., `weakest other (2.0 %)`."""
    ranked = ablation.ranked(metric)
    named = [f"{name} ({number(share)} %)" for name, share in ranked]
    rows = zip(*(ablation.shares(metric, name) for name, _ in ranked), strict=True)
    pictures = [shares for shares in rows if None not in shares]
    if len(pictures) > 1:
        first = sum(shares[0] == max(shares) for shares in pictures)
        named[0] = f"{named[0][:-1]}; first in {first} of {len(pictures)} pictures)"
    rest = [f"weakest {named[-1]}"] if len(named) > _NAMED else []
    return [f"strongest {named[0]}", *named[1:_NAMED], *rest]


def _group_tables(ablation: Ablation) -> Iterator[str]:
    """A row for each group: share and, in brackets, its lowest and highest of the pictures; a few metrics side by side."""
    metrics = [*ablation.distances]
    for at in range(0, len(metrics), _ACROSS):
        columns = [_column(ablation, m) for m in metrics[at : at + _ACROSS]]
        names = [f"  {name:<{_LABEL - 2}}" for name in ("part", *(g.name for g in ablation.groups))]
        yield ""
        yield from ("".join(cells).rstrip() for cells in zip(names, *columns, strict=True))


def _column(ablation: Ablation, metric: str) -> list[str]:
    shares = aligned([number(ablation.share(metric, g.name)) for g in ablation.groups])
    spreads = [_spread(ablation.shares(metric, g.name)) for g in ablation.groups]
    cells = (f"{share} {spread}" for share, spread in zip(shares, spreads, strict=True))
    fitting = (cell if len(cell) <= _CELL else share for cell, share in zip(cells, shares, strict=True))
    return [f" {padded(text, _CELL)}" for text in (squeezed(metric, _CELL), *fitting)]


def _spread(shares: Sequence[float | None]) -> str:
    known = [share for share in shares if share is not None]
    return f"({number(min(known))}-{number(max(known))})" if len(known) > 1 else ""


def _cell_tables(ablation: Ablation) -> Iterator[str]:
    """Runs of layers x components for each metric, the undivided parts below."""
    heads = [SHORT.get(c, c) for c in COMPONENTS]
    for m in ablation.distances:
        shares = {g.key: number(ablation.share(m, g.name)) for g in ablation.groups}
        runs = dict.fromkeys(g.key.partition(".")[0] for g in ablation.groups if g.table == "overrides")
        columns = [[heads[k], *aligned([shares.get(f"{run}.{c}", "") for run in runs])] for k, c in enumerate(COMPONENTS)]
        rows = zip(("layer", *runs), *columns, strict=True)
        yield ""
        yield f"  {squeezed(m, WIDTH - 20)}, share in %"
        yield from (f"    {run:<8}{''.join(f'{c:>{_COLUMN}}' for c in cells)}".rstrip() for run, *cells in rows)
        if rest := [f"{g.name} {shares[g.key]}" for g in ablation.groups if g.table != "overrides"]:
            yield f"    {', '.join(rest)}"
