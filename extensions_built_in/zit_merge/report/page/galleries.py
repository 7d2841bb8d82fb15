"""Pictures on the page: galleries of them, and how small they have to be to fit."""

from __future__ import annotations

import base64
import io
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import ZitMergeError
from ...files.inputs import PICTURE_LIMIT, read_limited
from .values import NAME, number, text

PICTURES = 3_500_000  # bytes of a page for pictures, as long as those can be made smaller
_EDGE = 512  # pixels of a picture's longer side
_EDGES = range(96, _EDGE, 16)  # of pictures that have to be smaller
_QUALITY = 80  # of JPEG
_PROMPT = 4000  # letters: the seed stands behind the prompt, and must not be cut away


@dataclass(frozen=True)
class Preview:
    """A picture on the page.

    Attributes:
        row: What the pictures of a row have in common: a prompt and its seed.
        column: What it shows: `base`, an input, `result`.
        picture: The bytes of a PNG, JPEG or WebP file, or where it lies, so that not all of them are in memory.
        yaml: The section that makes this picture, where others than the page's own do.
    """

    row: str
    column: str
    picture: bytes | Path
    yaml: str = ""

    def thumbnail(self) -> bytes:
        """As the page shows it at most: a JPEG of up to 512 pixels a side.

        Raises:
            ZitMergeError: It is no picture.
        """
        try:
            return _smaller(self.picture, _EDGE)
        except Exception as e:  # Pillow has no class for broken pictures; zlib's and Python's own errors come through
            raise ZitMergeError(f"the picture {text(self.column)} of {text(self.row)} can't be read: {e}") from None


@dataclass(frozen=True)
class Measures:
    """How much of what a LoRA changes each of its parts changes.

    Attributes:
        metrics: What was measured, a name for each column.
        rows: The name of a part and its share by each metric: 1 is all that the LoRA changes, None where it has no number.
        preset: The YAML of weights that the shares suggest, empty for none.
    """

    metrics: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float | None]]]
    preset: str = ""

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        rows = [[text(name, NAME), [number(share) for share in shares]] for name, shares in self.rows]
        return {"metrics": [text(m, NAME) for m in self.metrics], "rows": rows, "preset": self.preset}


@dataclass(frozen=True)
class Gallery:
    """Pictures to compare.

    Attributes:
        title: What is compared.
        note: A sentence on how they were made.
        previews: The pictures; the first column is what the others of a row are compared with.
        measures: What was measured on them.
    """

    title: str
    note: str
    previews: Sequence[Preview]
    measures: Measures | None = None

    def facts(self) -> dict[str, Any]:
        """For JSON, but for the pictures, which are bytes yet. Rows, columns and YAML are numbered: their texts may be cut alike.

        Raises:
            ZitMergeError: A picture can't be read.
        """
        rows, columns, texts = (
            {value: n for n, value in enumerate(dict.fromkeys(getattr(p, key) for p in self.previews))}
            for key in ("row", "column", "yaml")
        )
        found = {(rows[p.row], columns[p.column]): p for p in self.previews}
        places = sorted(found)
        return {
            "title": text(self.title, NAME),
            "note": text(self.note),
            "rows": [text(row, _PROMPT) for row in rows],
            "columns": [text(column) for column in columns],
            "texts": list(texts),
            "previews": [{"row": at[0], "column": at[1], "text": texts[found[at].yaml]} for at in places],
            "pictures": [found[at].thumbnail() for at in places],
            "measures": self.measures and self.measures.facts(),
            "left_out": False,
        }


def fit(pictures: Sequence[Sequence[bytes]], galleries: Sequence[dict[str, Any]], budget: float) -> None:
    """Puts pictures into their galleries, smaller ones where they don't fit.

    Args:
        pictures: JPEGs of each gallery.
        galleries: Where they go.
        budget: Bytes for all of them.
    """
    budgets = _budgets([_size(own) for own in pictures], [len(own) ** 0.5 for own in pictures], budget)
    for own, gallery, most in zip(pictures, galleries, budgets, strict=True):
        edge, fitting = _fitting(own, most)
        gallery |= {"edge": edge, "pictures": [base64.b64encode(p).decode() for p in fitting]}


def _budgets(sizes: Sequence[float], weights: Sequence[float], budget: float) -> list[float]:
    """What each may take of a budget: what it needs, or its share by weight of what the modest ones leave.

    Galleries are weighted with the root of their count: hundreds of pictures leave a few the room to be seen well.
    """
    found, left = [0.0] * len(sizes), sum(weights)
    for n in sorted((n for n, weight in enumerate(weights) if weight), key=lambda n: sizes[n] / weights[n]):
        found[n] = min(sizes[n], budget * weights[n] / left)
        budget, left = budget - found[n], left - weights[n]
    return found


def _size(pictures: Sequence[bytes]) -> float:
    """Bytes as base64, a comma and quotes."""
    return sum(4 / 3 * len(p) + 5 for p in pictures)


def _fitting(pictures: Sequence[bytes], budget: float) -> tuple[int, Sequence[bytes]]:
    """Pictures as large as they may be together.

    Args:
        pictures: JPEGs of up to 512 pixels a side.
        budget: Bytes that they may take as base64.

    Returns:
        The longest side of any, 96 pixels at least, whatever the budget; JPEGs.
    """
    at = cache(lambda edge: [_smaller(p, edge) for p in pictures])
    if _size(pictures) <= budget:
        return _EDGE, pictures
    fitting = bisect_right(_EDGES, budget, key=lambda edge: _size(at(edge)))
    edge = _EDGES[max(fitting - 1, 0)]
    return edge, at(edge)


def _smaller(picture: bytes | Path, edge: int) -> bytes:
    """A JPEG of up to `edge` pixels a side, in the proportions of the picture."""
    from PIL import Image

    content = picture if isinstance(picture, bytes) else read_limited(picture, PICTURE_LIMIT)
    with Image.open(io.BytesIO(content)) as image:
        small, file = image if image.mode == "RGB" else image.convert("RGB"), io.BytesIO()
        small.thumbnail((edge, edge), Image.Resampling.LANCZOS)
        small.save(file, "JPEG", quality=_QUALITY, optimize=True)
    return file.getvalue()
