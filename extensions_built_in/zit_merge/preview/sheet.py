"""A contact sheet: pictures side by side, each below its caption."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from math import ceil, isqrt, sqrt
from pathlib import Path
from typing import NamedTuple
from unicodedata import east_asian_width

from PIL import Image, ImageDraw, ImageFont

_WIDTH = 2048  # pixels of a row of pictures
_AREA = 24_000_000  # pixels of all pictures: larger files are slow to open, and some programs refuse them
_EDGES = 192, 512  # longest edge of a picture on the sheet: at least, if the area allows it, and at most
_SMALLEST = 96  # longest edge, however many pictures there are
_COLUMN, _LEAST = 144, 480  # width of a column, and of a block, at least
_TALL = 4  # height / width above which a sheet is split into columns
_GAP, _LINE, _SIZE = 12, 20, 15  # pixels: between pictures, of a line of text, of its letters
_PAPER, _INK, _FAINT = (255, 255, 255), (20, 20, 20), (90, 90, 90)
_LETTERS = 2000  # of a text that is drawn
# Fonts with Chinese, Japanese and Korean letters: Windows, macOS, and what Linux distributions have.
_EASTERN = (
    *("msyh.ttc", "malgun.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf"),
    *("wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf", "Arial Unicode.ttf"),
)


class Block(NamedTuple):
    """The pictures of one image spec.

    Attributes:
        heading: Prompt and seed.
        tiles: (caption, picture), row by row.
    """

    heading: str
    tiles: Sequence[tuple[str, Image.Image]]


def edge_of(count: int, across: int) -> int:
    """The longest side of a picture on a sheet; larger ones are scaled down to it.

    Args:
        count: Pictures on the sheet.
        across: Pictures in a row.
    """
    by_width = max((_WIDTH - _GAP) // across - _GAP, _EDGES[0])
    by_area = max(isqrt(_AREA // count) - _GAP, _SMALLEST)
    return min(by_width, by_area, _EDGES[1])


def sheet(title: str, blocks: Sequence[Block], across: int, footer: str = "") -> Image.Image:
    """Draws the sheet.

    Args:
        title: One line.
        blocks: One below the other; each may have pictures of another size.
        across: Pictures in a row.
        footer: A sentence below.

    Returns:
        An RGB image.
    """
    edge = edge_of(sum(len(block.tiles) for block in blocks), across)
    body = _in_columns([_block(block, across, edge) for block in blocks])
    parts = [_lines([_cut(title, body.width - 2 * _GAP, _SIZE + 5)], body.width, _INK, _SIZE + 5), body]
    if footer:
        parts.append(_lines(_wrapped(footer, body.width - 2 * _GAP, 6), body.width, _FAINT))
    return _below_each_other(parts, _GAP)


def legend(title: str, lines: Sequence[str], size: tuple[int, int]) -> Image.Image:
    """A tile of text in the size of a picture; the last line counts those that don't fit.

    Args:
        title: The first line.
        lines: Below it.
        size: (width, height) in pixels.

    Returns:
        An RGB image.
    """
    width, height = size
    letters = max(9, min(width, height) // 34)
    step = letters + letters // 2
    tile = Image.new("RGB", size, (38, 38, 42))
    draw, room = ImageDraw.Draw(tile), max(1, (height - letters) // step)
    shown = [title, "", *lines]
    if len(shown) > room:
        shown = [*shown[: room - 1], f"... and {len(shown) - room + 1} more"] if room > 1 else shown[:1]
    for n, line in enumerate(shown):
        text = _cut(line, width - 2 * letters, letters)
        draw.text((letters, letters // 2 + n * step), text, _PAPER, _font(letters, _is_eastern(text)))
    return tile


def labelled(picture: Image.Image, label: str) -> Image.Image:
    """A picture with its label in a band at its lower edge, in at most two lines.

    Args:
        picture: RGB; it is not changed.
        label: Such as `base`, or the values of a sweep.

    Returns:
        An RGB image of the same size.
    """
    letters = max(12, min(picture.size) // 28)
    margin = letters // 2
    lines = _wrapped(label, picture.width - 2 * margin, 2, letters)
    band = Image.new("RGB", (picture.width, margin + len(lines) * (letters + margin)), (0, 0, 0))
    whole, top = picture.copy(), max(0, picture.height - band.height)
    whole.paste(band, (0, top), Image.new("L", band.size, 165))
    draw = ImageDraw.Draw(whole)
    for n, line in enumerate(lines):
        draw.text((margin, top + margin // 2 + n * (letters + margin)), line, _PAPER, _font(letters, _is_eastern(line)))
    return whole


def _block(block: Block, across: int, edge: int) -> Image.Image:
    """A heading and the pictures of a block."""
    grid = _grid(block, across, edge)
    heading = _lines(_wrapped(block.heading, grid.width - 2 * _GAP, 3 if grid.width > 1000 else 6), grid.width, _INK)
    return _below_each_other([heading, grid])


def _grid(block: Block, across: int, edge: int) -> Image.Image:
    """The pictures of a block, each below its caption."""
    scale = min(edge / max(picture.size) for _, picture in block.tiles)
    pictures = [_scaled(picture, scale) for _, picture in block.tiles]
    across = min(across, len(pictures))
    column = max(_COLUMN, *(picture.width for picture in pictures))
    captions = [_wrapped(caption, column, 2) for caption, _ in block.tiles]
    above = max(map(len, captions)) * _LINE + _GAP // 2
    high = max(picture.height for picture in pictures) + above + _GAP
    width = max(_GAP + across * (column + _GAP), _LEAST)
    part = Image.new("RGB", (width, high * ceil(len(pictures) / across)), _PAPER)
    draw = ImageDraw.Draw(part)
    for n, (lines, picture) in enumerate(zip(captions, pictures, strict=True)):
        left, top = _GAP + n % across * (column + _GAP), n // across * high + above
        for k, line in enumerate(reversed(lines), 1):
            draw.text((left, top - k * _LINE - _GAP // 4), line, _INK, _font(_SIZE, _is_eastern(line)))
        part.paste(picture, (left, top))
    return part


def _scaled(picture: Image.Image, scale: float) -> Image.Image:
    width, height = (max(1, round(side * scale)) for side in picture.size)
    size = width, height
    return picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)


def _in_columns(parts: Sequence[Image.Image]) -> Image.Image:
    """Parts below each other, in so many columns that the sheet is not much higher than wide."""
    width, height = max(part.width for part in parts), sum(part.height for part in parts)
    columns: list[list[Image.Image]] = [[]]
    for part in parts:
        if sum(p.height for p in columns[-1]) >= height / ceil(sqrt(height / width / _TALL)):
            columns.append([])
        columns[-1].append(part)
    stacks = [_below_each_other(column) for column in columns]
    whole = Image.new("RGB", (sum(s.width for s in stacks), max(s.height for s in stacks)), _PAPER)
    left = 0
    for stack in stacks:
        whole.paste(stack, (left, 0))
        left += stack.width
    return whole


def _below_each_other(parts: Sequence[Image.Image], margin: int = 0) -> Image.Image:
    """Parts in a column, with a margin below."""
    whole = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts) + margin), _PAPER)
    top = 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height
    return whole


def _lines(lines: Sequence[str], width: int, ink: tuple[int, int, int], size: int = _SIZE) -> Image.Image:
    """Lines of text with a gap above and half a one below."""
    step = _LINE + size - _SIZE
    part = Image.new("RGB", (width, _GAP + len(lines) * step + _GAP // 2), _PAPER)
    draw = ImageDraw.Draw(part)
    for n, line in enumerate(lines):
        draw.text((_GAP, _GAP + n * step), line, ink, _font(size, _is_eastern(line)))
    return part


def _wrapped(text: str, width: int, most: int, size: int = _SIZE) -> list[str]:
    """A text in lines of at most `width` pixels, the last one cut where there are more than `most`."""
    rest, lines = _plain(text), list[str]()
    while _length(rest, size) > width and len(lines) < most - 1:
        fitting = max(1, bisect_right(range(1, len(rest)), float(width), key=lambda n: _length(rest[:n], size)))
        comma = rest.rfind(", ", 0, fitting) + 1 if most == 2 else 0  # between the two strengths of a caption
        space = comma if comma > fitting // 2 else rest.rfind(" ", 0, fitting + 1)
        at = space if space > fitting // 2 else fitting  # long words, and scripts without spaces
        lines.append(rest[:at].rstrip())
        rest = rest[at:].lstrip()
    return [*lines, _cut(rest, width, size)]


def _cut(text: str, width: int, size: int = _SIZE) -> str:
    """The text, cut with dots where it does not fit; brackets at its end, such as a seed, stay."""
    text = _plain(text)
    if _length(text, size) <= width:
        return text
    end = re.search(r" \([^()]*\)$", text)
    tail = f"...{end[0]}" if end and _length(f"...{end[0]}", size) <= width * 0.7 else "..."
    head = text[: end.start()] if end and end[0] in tail else text
    fitting = bisect_right(range(1, len(head) + 1), float(width), key=lambda n: _length(head[:n] + tail, size))
    return head[:fitting] + tail


def _plain(text: str) -> str:
    """Printable letters only, and not too many."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= _LETTERS else f"{text[: _LETTERS - 200]}... {text[-200:]}"


def _length(text: str, size: int = _SIZE) -> float:
    return _font(size, _is_eastern(text)).getlength(text)


def _is_eastern(text: str) -> bool:
    """Whether a text has Chinese, Japanese or Korean letters."""
    return any(east_asian_width(c) in "WF" and not 0x1F000 <= ord(c) < 0x20000 for c in text)  # those are emoji


@cache
def _font(size: int, eastern: bool = False) -> ImageFont.FreeTypeFont:
    """The font that comes with matplotlib, with Greek, Cyrillic, Hebrew and Arabic letters; for Chinese, Japanese and Korean the
    first of `_EASTERN` on this machine."""
    import matplotlib

    for name in _EASTERN if eastern else ():
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
