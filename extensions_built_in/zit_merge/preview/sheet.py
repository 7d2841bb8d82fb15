"""A contact sheet: pictures side by side, each with what it shows above it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

_WIDTH = 2048  # pixels that a row of pictures has to share
_EDGES = 192, 512  # longest edge of a picture on the sheet, at least and at most
_GAP, _LINE, _SIZE = 12, 20, 15  # pixels: between pictures, of a line of text, of its letters
_PAPER, _INK, _FAINT = (255, 255, 255), (20, 20, 20), (90, 90, 90)


class Block(NamedTuple):
    """The pictures of one shot.

    Attributes:
        heading: Prompt and seed.
        tiles: (caption, picture), row by row.
    """

    heading: str
    tiles: Sequence[tuple[str, Image.Image]]


def sheet(title: str, blocks: Sequence[Block], across: int, footer: str = "") -> Image.Image:
    """Draws the sheet.

    Args:
        title: One line.
        blocks: One below the other; each may have pictures of another size.
        across: Pictures in a row.
        footer: A sentence below.

    Returns:
        An RGB picture.
    """
    edge = min(max((_WIDTH - _GAP) // across - _GAP, _EDGES[0]), _EDGES[1])
    width = max(_GAP + across * (edge + _GAP), 720)
    parts = [_lines([title], width, _INK, size=_SIZE + 5)]
    parts += [
        part
        for block in blocks
        for part in (_lines(_wrapped(block.heading, width, 3), width, _INK), _grid(block, across, edge, width))
    ]
    parts += [_lines(_wrapped(footer, width, 6), width, _FAINT)] if footer else []
    whole = Image.new("RGB", (width, _GAP + sum(p.height for p in parts)), _PAPER)
    top = 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height
    return whole


def legend(title: str, lines: Sequence[str], size: tuple[int, int]) -> Image.Image:
    """A tile of text in the size of a picture; lines that it has no room for are left out."""
    width, height = size
    letters = max(9, min(width, height) // 34)
    step = letters + letters // 2
    tile = Image.new("RGB", size, (38, 38, 42))
    draw = ImageDraw.Draw(tile)
    for n, line in enumerate([title, "", *lines][: max(1, (height - step) // step)]):
        draw.text((letters, letters + n * step), _cut(line, width - 2 * letters, letters), _PAPER, _font(letters))
    return tile


def _grid(block: Block, across: int, edge: int, width: int) -> Image.Image:
    """The pictures of a block, each below its caption."""
    scale = min(edge / max(picture.size) for _, picture in block.tiles)
    tiles = [(caption, p.resize([max(1, round(side * scale)) for side in p.size], Image.LANCZOS)) for caption, p in block.tiles]
    high = max(picture.height for _, picture in tiles) + 2 * _LINE + _GAP
    part = Image.new("RGB", (width, high * -(-len(tiles) // across)), _PAPER)
    draw = ImageDraw.Draw(part)
    for n, (caption, picture) in enumerate(tiles):
        left, top = _GAP + n % across * (edge + _GAP), n // across * high
        lines = _wrapped(caption, edge, 2)
        for k, line in enumerate(lines):
            draw.text((left, top + (2 - len(lines) + k) * _LINE), line, _INK, _font(_SIZE))
        part.paste(picture, (left, top + 2 * _LINE))
    return part


def _lines(lines: Sequence[str], width: int, ink: tuple[int, int, int], size: int = _SIZE) -> Image.Image:
    part = Image.new("RGB", (width, _GAP + len(lines) * (_LINE + size - _SIZE)), _PAPER)
    draw = ImageDraw.Draw(part)
    for n, line in enumerate(lines):
        draw.text((_GAP, _GAP + n * _LINE), _cut(line, width - 2 * _GAP, size), ink, _font(size))
    return part


def _wrapped(text: str, width: int, most: int) -> list[str]:
    """A text in lines of at most `width` pixels, the last one cut where there are more than `most`."""
    lines: list[str] = []
    rest = text.split()
    while rest and len(lines) < most - 1:
        taken = next((n for n in range(len(rest), 0, -1) if _length(" ".join(rest[:n])) <= width - 2 * _GAP), 1)
        lines.append(_cut(" ".join(rest[:taken]), width - 2 * _GAP if most > 2 else width, _SIZE))
        rest = rest[taken:]
    return [*lines, _cut(" ".join(rest), width - 2 * _GAP if most > 2 else width, _SIZE)] if rest else lines


def _cut(text: str, width: int, size: int) -> str:
    """The text as far as it fits, with dots where it does not."""
    text = "".join(c if c.isprintable() else " " for c in text[:500])
    if _length(text, size) <= width:
        return text
    while text and _length(f"{text}...", size) > width:
        text = text[: int(len(text) * min(0.97, width / _length(f"{text}...", size)))]
    return f"{text}..."


def _length(text: str, size: int = _SIZE) -> float:
    return _font(size).getlength(text)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """The one font that every machine with matplotlib has, with Greek and Cyrillic letters."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
