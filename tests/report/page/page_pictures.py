"""Pictures as a model would render them: of one colour, and such that no JPEG makes them small."""

from __future__ import annotations

import io
import random

from PIL import Image


def png(image: Image.Image) -> bytes:
    """A PNG file's bytes."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def plain(colour: str, width: int = 64, height: int = 64) -> bytes:
    """One colour."""
    return png(Image.new("RGB", (width, height), colour))


def noisy(seed: int, width: int, height: int | None = None) -> bytes:
    """Noise, a square unless a height is given."""
    size = width, height or width
    return png(Image.frombytes("RGB", size, random.Random(seed).randbytes(3 * size[0] * size[1])))
