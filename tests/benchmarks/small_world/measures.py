"""What a picture shows, read from its pixels by rules: subject, style, layout, light, and burn.

No rule knows the caption, and none is trained. Which subject stands where is read without the palette: a drawing laid over a cell
parts its pixels into ground, body and mark, and the drawing that explains most of the cell's variance by the three mean colours
is the one. Styles and textures are then read where no subject stands. Accuracies on the world's own pictures: `accuracy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np

from tests.benchmarks.small_world.world import (
    CELL,
    CELLS,
    DRAWING,
    GRAIN,
    LIGHTS,
    SIZE,
    STYLES,
    SUBJECTS,
    TEXTURE,
    TEXTURES,
    Scene,
    draw,
    gain,
    labels,
)

EXPLAINED = 0.5  # share of a cell's variance that a subject explains at least
CONTRAST = 0.4  # distance in RGB of its body from the ground at least; the world's lie at 0.6 to 0.9
PALETTE = 0.15  # palette distance up to which a style is there; other styles' lie at 0.2 and more
BURN = {"saturation": 0.5, "contrast": 0.6, "detail": 1.0}  # units of an excess: about the whole range of the world's pictures
BURNED = 0.05  # excess from which a picture counts as burned


@dataclass(frozen=True)
class Reading:
    """What a picture shows.

    Attributes:
        subject: A key of `SUBJECTS`, of the cell where a drawing fits best; "" without a subject.
        cells: The occupied ones, keys of `CELLS`.
        subjects: What stands in each of them.
        style: A key of `STYLES`, by ground and body; "" where no palette is near.
        texture: A key of `TEXTURES`.
        light: A key of `LIGHTS`.
        fit: Share of the variance of its occupied cells that the drawings explain, 0 to 1; 0 without a subject.
        palette_distance: Root mean square distance of ground and body from the nearest style's, RGB in [0, 1].
    """

    subject: str
    cells: tuple[str, ...]
    subjects: tuple[str, ...]
    style: str
    texture: str
    light: str
    fit: float
    palette_distance: float


@cache
def _drawings() -> tuple[np.ndarray, list[str]]:
    """One-hot parts (drawings, 3, 64) of a cell under each subject at every offset, and the subject of each."""
    parts, names = [], []
    for subject in SUBJECTS:
        for y, x in product(range(CELL - DRAWING + 1), repeat=2):
            cell = np.zeros((CELL, CELL), int)
            cell[y : y + DRAWING, x : x + DRAWING] = labels(subject)
            parts.append(np.eye(3)[cell.ravel()].T)
            names.append(subject)
    return np.array(parts), names


def _cells(picture: np.ndarray) -> np.ndarray:
    """(16, 16, channels) -> (4, 64, channels), in the order of `CELLS`."""
    parts = (picture[CELL * r : CELL * (r + 1), CELL * c : CELL * (c + 1)] for r, c in CELLS.values())
    return np.array([part.reshape(CELL * CELL, -1) for part in parts])


@dataclass(frozen=True)
class _Found:
    """Where subjects stand: the place of each in `CELLS`, its name, its fit; the ground's pixels (4, 64); colours of bodies."""

    places: list[int]
    subjects: list[str]
    fits: list[float]
    ground: np.ndarray
    bodies: list[np.ndarray]


def _find(cells: np.ndarray) -> _Found:
    parts, names = _drawings()
    sizes = parts.sum(-1)  # (drawings, 3)
    means = (parts.reshape(-1, CELL * CELL) @ cells).reshape(len(cells), *sizes.shape, 3) / sizes[..., None]
    middle = cells.mean(1)
    between = (sizes[..., None] * (means - middle[:, None, None]) ** 2).sum((2, 3))
    explained = between / (((cells - middle[:, None]) ** 2).sum((1, 2))[:, None] + 1e-9)
    found = _Found([], [], [], np.ones((len(cells), CELL * CELL), bool), [])
    for place, best in enumerate(explained.argmax(1)):
        ground, body, _ = means[place, best]
        if explained[place, best] >= EXPLAINED and np.linalg.norm(body - ground) >= CONTRAST:
            found.places.append(place)
            found.subjects.append(names[best])
            found.fits.append(float(explained[place, best]))
            found.ground[place] = parts[best, 0] > 0
            found.bodies.append(body)
    around = np.linalg.norm(cells - np.median(cells[found.ground], 0), axis=-1)
    found.ground[:] &= around < CONTRAST  # without what is left of subjects that no drawing explains
    return found


def read(picture: np.ndarray) -> Reading:
    """Reads one picture.

    Args:
        picture: (16, 16, 3) in [0, 1].
    """
    picture = picture.astype(np.float64)
    cells = _cells(picture)
    light = _light(cells.mean(-1), _find(cells).ground)
    cells = _cells(picture / gain(light)[:, None])
    found = _find(cells)
    ground = cells[found.ground].mean(0)
    body = np.mean(found.bodies, 0) if found.bodies else None
    distances = {name: _distance(ground, body, style.ground, style.body) for name, style in STYLES.items()}
    style = min(distances, key=lambda name: distances[name])
    return Reading(
        subject=found.subjects[int(np.argmax(found.fits))] if found.fits else "",
        cells=tuple(list(CELLS)[place] for place in found.places),
        subjects=tuple(found.subjects),
        style=style if distances[style] <= PALETTE else "",
        texture=_texture(cells.mean(-1), found.ground),
        light=light,
        fit=float(np.mean(found.fits)) if found.fits else 0.0,
        palette_distance=distances[style],
    )


def _light(brightness: np.ndarray, ground: np.ndarray) -> str:
    """By the slope of the ground's brightness over the columns, relative to its mean; halfway between two lights parts them."""
    column = _cells(np.mgrid[:SIZE, :SIZE, :1][1])[..., 0][ground]
    around = column - column.mean()
    slope = (brightness[ground] @ around) / (around @ around) * (SIZE - 1) / max(brightness[ground].mean(), 1e-3)
    first, last = LIGHTS["left"]
    half = (first - last) / (first + last)
    return "left" if slope < -half else "right" if slope > half else "even"


def _texture(brightness: np.ndarray, ground: np.ndarray) -> str:
    """The pattern that explains most of the ground's variance; "plain" where none has half of the world's amplitude."""
    found, around = {"plain": 0.0}, brightness[ground] - brightness[ground].mean()
    for name, texture in TEXTURES.items():
        pattern = _cells(texture[..., None])[..., 0][ground]
        pattern = pattern - pattern.mean()
        amplitude = (around @ pattern) / max(pattern @ pattern, 1e-9)
        if amplitude > TEXTURE / 2:
            found[name] = amplitude**2 * (pattern @ pattern)
    return max(found, key=lambda name: found[name])


def _distance(ground: np.ndarray, body: np.ndarray | None, of_ground: Sequence[float], of_body: Sequence[float]) -> float:
    """Root mean square over ground and body; over the ground alone without a body."""
    squares = [np.sum((ground - of_ground) ** 2)] + ([] if body is None else [np.sum((body - of_body) ** 2)])
    return float(np.sqrt(np.mean(squares)))


# --- burn ----------------------------------------------------------------------------------------------------------------------


def burn_values(pictures: np.ndarray) -> np.ndarray:
    """Saturation, contrast and detail of each picture, (n, 3).

    Saturation: the 90th percentile over all squares of 2 x 2 pixels of the largest minus the smallest of their mean R, G, B.
    Contrast: the 95th minus the 5th percentile of the brightness. Detail: the median size of what changes sign from pixel to
    pixel in both directions (diagonal coefficients of a Haar transform at every place), as a standard deviation; most places of
    the world's drawings and textures have none, so that it is the level of noise and of fine artefacts.

    Args:
        pictures: (n, 16, 16, 3) in [0, 1].
    """
    pictures = pictures.astype(np.float64)
    squares = (pictures[:, :-1, :-1] + pictures[:, 1:, :-1] + pictures[:, :-1, 1:] + pictures[:, 1:, 1:]) / 4
    saturation = np.quantile(np.ptp(squares, -1).reshape(len(pictures), -1), 0.9, axis=1)
    bright = pictures.mean(-1)
    low, high = np.quantile(bright.reshape(len(pictures), -1), (0.05, 0.95), axis=1)
    diagonal = (bright[:, :-1, :-1] - bright[:, 1:, :-1] - bright[:, :-1, 1:] + bright[:, 1:, 1:]) / 2
    detail = np.median(np.abs(diagonal).reshape(len(pictures), -1), 1) / 0.6745
    return np.stack([saturation, high - low, detail], 1)


@cache
def world_range(style: str = "") -> np.ndarray:
    """The 99th percentile of saturation, contrast and detail over 1000 pictures of all subjects, (3,).

    Args:
        style: Of the pictures; all styles without one.
    """
    return np.quantile(burn_values(draw(1000, 424242, tuple(SUBJECTS), (style,) if style else tuple(STYLES)).pixels), 0.99, 0)


def burn(pictures: np.ndarray, styles: Sequence[str] = ()) -> np.ndarray:
    """How far saturation, contrast and detail go beyond the world's range, in units of `BURN`, (n, 3); 0 within.

    Args:
        pictures: (n, 16, 16, 3) in [0, 1].
        styles: What was asked for, one for each picture: its range is taken, which is narrower than the whole world's.
    """
    ranges = np.array([world_range(style) for style in styles or [""]])
    return ((burn_values(pictures) - ranges) / np.array(list(BURN.values()))).clip(0)


def breakdown(pictures: np.ndarray) -> np.ndarray:
    """How far pictures go beyond the range of the style that they fit best, in any of the three, (n,); 0 within.

    Unlike `burn` by the asked style, a picture in another style is no breakdown.

    Args:
        pictures: (n, 16, 16, 3) in [0, 1].
    """
    values, units = burn_values(pictures), np.array(list(BURN.values()))
    return np.min([((values - world_range(style)) / units).clip(0).max(1) for style in STYLES], 0)


# --- judging -------------------------------------------------------------------------------------------------------------------


def judged(pictures: np.ndarray, scenes: Sequence[Scene]) -> list[dict[str, float]]:
    """How well each picture follows what was asked for, 0 to 1: `subject`, `layout`, `count`, `style`, `texture`, `light`.

    Args:
        pictures: (n, 16, 16, 3) in [0, 1].
        scenes: What was asked for, one each.
    """
    rows = []
    for picture, asked in zip(pictures, scenes, strict=True):
        seen = read(picture)
        there = dict(zip(seen.cells, seen.subjects, strict=True))
        rows.append(
            {
                "subject": np.mean([there.get(cell) == asked.subject for cell in asked.cells]),
                "layout": seen.cells == asked.cells,
                "count": len(seen.cells) == len(asked.cells),
                "style": seen.style == asked.style,
                "texture": seen.texture == STYLES[asked.style].texture,
                "light": seen.light == asked.light,
            }
        )
    return rows


def judge(pictures: np.ndarray, scenes: Sequence[Scene]) -> dict[str, float]:
    """How well pictures follow what was asked for; means over the pictures, 0 to 1, but for burn.

    `subject`: the asked subject stands in the asked cells (share of them). `layout`: exactly the asked cells are occupied.
    `count`: as many as asked. `style`: ground and body have the palette. `texture`, `light`: as they read. `burn_...`: mean
    excess over the range of the asked style; `burned`: share of pictures with an excess above `BURNED` in any of them.

    Args:
        pictures: (n, 16, 16, 3) in [0, 1].
        scenes: What was asked for, one each.
    """
    rows = judged(pictures, scenes)
    excess = burn(pictures, [scene.style for scene in scenes])
    found = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    found |= {f"burn_{name}": float(value) for name, value in zip(BURN, excess.mean(0), strict=True)}
    return found | {"burned": float((excess.max(1) > BURNED).mean())}


DAMAGE = {  # what burn is to find, as functions of pictures (n, 16, 16, 3) and a strength
    "saturation": lambda pictures, by: (pictures.mean(-1, keepdims=True) * (1 - by) + pictures * by).clip(0, 1),
    "contrast": lambda pictures, by: (pictures.mean((1, 2, 3), keepdims=True) * (1 - by) + pictures * by).clip(0, 1),
    "detail": lambda pictures, by: (pictures + (by - 1) * GRAIN * _white(pictures.shape)).clip(0, 1),
}


def _white(shape: tuple[int, ...]) -> np.ndarray:
    """Noise, the same in all three colours."""
    return np.random.default_rng(0).normal(size=(*shape[:-1], 1))


def accuracy(count: int, seed: int, noise: float = 0.0) -> dict[str, float]:
    """`judge` on the world's own pictures of all subjects and styles: 1 but for errors of the rules.

    Args:
        count: How many pictures.
        seed: Of the pictures and the noise.
        noise: Standard deviation of normal noise on R, G, B of each pixel, as a sampler may leave it.
    """
    drawn = draw(count, seed, tuple(SUBJECTS), tuple(STYLES))
    noisy = drawn.pixels + np.random.default_rng(seed).normal(0, noise, drawn.pixels.shape)
    return judge(noisy.clip(0, 1), drawn.scenes)


def burn_found(count: int, seed: int, damage: str, strength: float) -> float:
    """Share of damaged pictures of all subjects and styles whose excess is above `BURNED` in the measure of that name.

    Args:
        count: How many pictures.
        seed: Of the pictures.
        damage: A key of `DAMAGE`.
        strength: Factor on saturation or contrast; for detail the noise in units of the world's grain, plus one.
    """
    drawn = draw(count, seed, tuple(SUBJECTS), tuple(STYLES))
    excess = burn(DAMAGE[damage](drawn.pixels, strength), [scene.style for scene in drawn.scenes])
    return float((excess[:, list(BURN).index(damage)] > BURNED).mean())
