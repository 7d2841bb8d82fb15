"""Tables of layers x components."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from ...model import zimage
from ...model.strengths import row_name, runs
from ...model.zimage import COMPONENTS, OTHER, SECTIONS
from ...wording import aligned, beside

COLUMN = 6  # letters in a cell
_WIDTH = 74  # of a table


def strength_table(strengths: Mapping[str, float], present: Collection[str]) -> list[str]:
    """Layers x components; equal neighbouring layers share a row, a dash is a module that the LoRA does not have.

    Args:
        strengths: Module -> strength.
        present: The modules that the LoRA has.
    """
    return _table(
        lambda section: [(a, b) for a, b, _ in runs(strengths, section)],
        lambda module: strengths[module],
        present,
    )


def norm_table(norms: Mapping[str, float | str]) -> list[str]:
    """Layers x components of a LoRA's Frobenius norms, a row for each layer; a word of six letters may stand for a norm."""
    return _table(lambda section: [(i, i) for i in range(SECTIONS[section])], lambda module: norms[module], norms)


def value_table(values: Mapping[str, float | str]) -> list[str]:
    """Layers x components of anything that a file says of its modules; equal neighbouring layers share a row.

    Args:
        values: Module -> value, for the modules that the file has; texts of six letters at most.
    """
    everywhere = {module: values.get(module) for module in zimage.MODULES}
    return _table(lambda section: [(a, b) for a, b, _ in runs(everywhere, section)], lambda module: values[module], values)


def grouped_table(values: Mapping[str, str], present: Collection[str]) -> list[str]:
    """Layers x components of a word for each of the 276 modules; equal neighbouring layers share a row.

    Args:
        values: Module -> word of six letters at most.
        present: The modules that have a cell.
    """
    return _table(lambda section: [(a, b) for a, b, _ in runs(values, section)], lambda module: values[module], present)


def _table(
    rows: Callable[[str], Sequence[tuple[int, int]]], value: Callable[[str], float | str], present: Collection[str]
) -> list[str]:
    heads = ["adaLN" if c == "adaLN_modulation" else c for c in COMPONENTS]
    found: list[list[str]] = []
    for section in SECTIONS:
        for first, last in rows(section):
            cells = [[m for i in range(first, last + 1) if (m := _module(section, i, c)) in present] for c in COMPONENTS]
            if any(cells):
                found.append([row_name(section, first, last), *(short(value(here[0])) if here else "-" for here in cells)])
    layers, *columns = zip(*found, strict=True) if found else [()] * (1 + len(heads))
    texts = [_column(head, column) for head, column in zip(heads, columns, strict=True)]
    lines = ["".join(cells).rstrip() for cells in zip([f"{name:<18}" for name in ("layer", *layers)], *texts, strict=True)]
    others = [f"{o} {short(value(m))}" for o in OTHER if (m := zimage.at("other", 0, o).name) in present]
    return lines + (beside("other: ", others, _WIDTH) if others else [])


def _column(head: str, texts: Sequence[str]) -> list[str]:
    """A column of seven letters; the units are below each other where there is room for it."""
    cells = aligned(texts) if texts else []
    return [f"{cell:>{COLUMN + 1}}" for cell in (head, *(cells if cells and len(cells[0]) <= COLUMN else texts))]


def short(value: float | str) -> str:
    """In six letters, with as many digits as they hold; texts as they are."""
    if isinstance(value, str):
        return value
    texts = (f"{value:.3g}", f"{value:.0f}" if abs(value) >= 1 else "", f"{value:.2g}", f"{value:.1g}", f"{value:.0e}")
    shorter = (text.replace("e+", "e") if len(text) > COLUMN else text for text in texts)
    return next((text for text in shorter if text and len(text) <= COLUMN), "-0")  # above -1e-99, which has seven letters


def _module(section: str, index: int, component: str) -> str:
    return zimage.at(section, index, component).name if component in zimage.section_components(section) else ""
