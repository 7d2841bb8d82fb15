"""A world of small captioned pictures whose factors can be read back from pixels by rules.

A picture has 16 x 16 pixels of RGB in [0, 1]: one subject, one to three times, in the four cells of a 2 x 2 grid, in one style
under one light. The base model is trained on `BASE_SUBJECTS` and `BASE_STYLES`; LoRAs add `NEW_SUBJECTS` and `NEW_STYLES`, whose
names no base caption contains.

- subject: a drawing of 6 x 6 pixels with a body and a mark at a fixed place; it lies in any corner of its cell of 8 x 8
- style: three colours (ground, body, mark) and a texture of the ground
- layout: the occupied cells, hence the count
- light: even, or falling off to one side

Everything follows from a seed. Colours vary a little from picture to picture, so that every measure has a range and not a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np

VERSION = 1  # of the pictures that a seed gives; weights of another version have another name
SIZE, CELL, DRAWING = 16, 8, 6  # pixels of a picture's, a cell's and a subject's side
OFFSETS = [(y, x) for y in (0, 2) for x in (0, 2)]  # of a subject in its cell: on the grid of Z-Image's patches of 2 x 2
TEXTURE = 0.08  # amplitude of a texture, in units of full brightness
COLOUR_SPREAD = 0.02  # standard deviation of a palette's colours from picture to picture
GRAIN = 0.01  # standard deviation of the noise of a pixel

# . ground  # body  o mark
BASE_SUBJECTS = {
    "ball": [".####.", "######", "##oo##", "##oo##", "######", ".####."],
    "frame": ["######", "#....#", "#.oo.#", "#.oo.#", "#....#", "######"],
    "cross": ["..##..", "..##..", "##oo##", "##oo##", "..##..", "..##.."],
    "tent": ["..##..", "..##..", ".####.", ".####.", "##oo##", "##oo##"],
    "brick": ["......", "######", "oo####", "oo####", "######", "......"],
    "post": [".####.", ".#oo#.", ".#oo#.", ".####.", ".####.", ".####."],
}
NEW_SUBJECTS = {
    "zib": ["##....", "##....", "##....", "##..oo", "######", "######"],
    "fland": ["##..##", "##..##", "##..##", "##oo##", "######", "######"],
    "mirp": ["####..", "####..", "..##..", "..oo..", "..####", "..####"],
    "vosk": ["##..##", "##..##", "..oo..", "..oo..", "##..##", "##..##"],
}
SUBJECTS = BASE_SUBJECTS | NEW_SUBJECTS


class Style(NamedTuple):
    """Three colours in RGB, 0 to 1, and the name of the ground's texture."""

    ground: tuple[float, float, float]
    body: tuple[float, float, float]
    mark: tuple[float, float, float]
    texture: str


BASE_STYLES = {
    "poster": Style((0.85, 0.80, 0.65), (0.75, 0.20, 0.20), (0.20, 0.20, 0.40), "plain"),
    "night": Style((0.20, 0.22, 0.40), (0.85, 0.75, 0.30), (0.85, 0.85, 0.85), "dots"),
    "meadow": Style((0.38, 0.60, 0.32), (0.85, 0.82, 0.78), (0.70, 0.25, 0.50), "rows"),
    "clay": Style((0.58, 0.36, 0.28), (0.30, 0.72, 0.72), (0.18, 0.16, 0.16), "checks"),
    "ink": Style((0.78, 0.78, 0.78), (0.25, 0.25, 0.28), (0.85, 0.52, 0.22), "columns"),
}
NEW_STYLES = {
    "gleb": Style((0.46, 0.32, 0.64), (0.66, 0.84, 0.34), (0.84, 0.84, 0.84), "diagonal"),
    "torv": Style((0.20, 0.44, 0.46), (0.86, 0.60, 0.60), (0.18, 0.18, 0.22), "rows"),
    "hask": Style((0.84, 0.62, 0.34), (0.24, 0.28, 0.64), (0.84, 0.84, 0.80), "dots"),
}
STYLES = BASE_STYLES | NEW_STYLES

LIGHTS = {"even": (0.85, 0.85), "left": (1.0, 0.65), "right": (0.65, 1.0)}  # gain of the first and of the last column
CELLS = {"northwest": (0, 0), "northeast": (0, 1), "southwest": (1, 0), "southeast": (1, 1)}  # row and column of the grid
LAYOUTS = [cells for count in (1, 2, 3) for cells in combinations(CELLS, count)]
COUNTS = ("", "one", "two", "three")


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Attributes:
        subject: A key of `SUBJECTS`.
        style: A key of `STYLES`.
        light: A key of `LIGHTS`.
        cells: The occupied ones, keys of `CELLS`.
    """

    subject: str
    style: str
    light: str
    cells: tuple[str, ...]

    @property
    def caption(self) -> str:
        """All factors in words: "two ball northwest southeast night even"."""
        return " ".join([COUNTS[len(self.cells)], self.subject, *self.cells, self.style, self.light])


class Pictures(NamedTuple):
    """`pixels`, (n, 16, 16, 3) float32 in [0, 1], with a scene and a caption each."""

    pixels: np.ndarray
    scenes: list[Scene]
    captions: list[str]


def _textures() -> dict[str, np.ndarray]:
    y, x = np.mgrid[:SIZE, :SIZE]
    dots = ((x % 4 // 2 + y % 4 // 2) == 2) * 1.0
    signs = {"rows": y // 2, "columns": x // 2, "checks": x // 2 + y // 2, "diagonal": (x + y) // 2}
    found = {name: 1.0 - 2.0 * (of % 2) for name, of in signs.items()}
    return {"plain": np.zeros((SIZE, SIZE)), "dots": (dots - dots.mean()) / dots.std(), **found}


TEXTURES = _textures()  # (16, 16) each: mean 0, mean square 1 unless plain


def labels(subject: str) -> np.ndarray:
    """The drawing of a subject, (6, 6): 0 ground, 1 body, 2 mark.

    Args:
        subject: A key of `SUBJECTS`.
    """
    return np.array([[".#o".index(sign) for sign in row] for row in SUBJECTS[subject]])


def gain(light: str) -> np.ndarray:
    """Brightness over the columns, (16,).

    Args:
        light: A key of `LIGHTS`.
    """
    return np.linspace(*LIGHTS[light], SIZE)


def render(scene: Scene, random: np.random.Generator) -> np.ndarray:
    """A picture of the scene, (16, 16, 3) float32 in [0, 1].

    Args:
        scene: What it shows.
        random: For the subjects' places in their cells, the colours' spread and the grain.
    """
    style, parts = STYLES[scene.style], np.zeros((SIZE, SIZE), int)
    for cell in scene.cells:
        row, column = CELLS[cell]
        y, x = OFFSETS[random.integers(len(OFFSETS))]
        y, x = CELL * row + y, CELL * column + x
        parts[y : y + DRAWING, x : x + DRAWING] = labels(scene.subject)
    palette = np.array([style.ground, style.body, style.mark]) + random.normal(0, COLOUR_SPREAD, (3, 3))
    ground = (parts == 0)[..., None] * TEXTURE * TEXTURES[style.texture][..., None]
    picture = (palette[parts] + ground) * gain(scene.light)[:, None] + random.normal(0, GRAIN, (SIZE, SIZE, 3))
    return picture.clip(0, 1).astype(np.float32)


def draw(
    count: int,
    seed: int | Sequence[int],
    subjects: Sequence[str] = tuple(BASE_SUBJECTS),
    styles: Sequence[str] = tuple(BASE_STYLES),
    dropped: float = 0.0,
) -> Pictures:
    """Random pictures; every factor is uniform and independent of the others.

    Args:
        count: How many.
        seed: Same seed, same pictures.
        subjects: Their choice.
        styles: Their choice.
        dropped: Chance of each caption to lose a factor (subject, layout, style or light), each factor on its own.
    """
    random = np.random.default_rng(seed)
    pixels, scenes, captions = np.empty((count, SIZE, SIZE, 3), np.float32), [], []
    for n in range(count):
        subject, style, light = (options[int(random.integers(len(options)))] for options in (subjects, styles, tuple(LIGHTS)))
        scene = Scene(subject, style, light, LAYOUTS[random.integers(len(LAYOUTS))])
        pixels[n] = render(scene, random)
        kept = [bool(chance) for chance in random.random(4) >= dropped]
        layout = (COUNTS[len(scene.cells)], *scene.cells)
        # the order of `Scene.caption`
        words = [layout[:1] * kept[1], (subject,) * kept[0], layout[1:] * kept[1], (style,) * kept[2], (light,) * kept[3]]
        scenes.append(scene)
        captions.append(" ".join(word for group in words for word in group))
    return Pictures(pixels, scenes, captions)
