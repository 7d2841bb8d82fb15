"""The forms of a change that need the base model's weight: what their tensors must be, and what they tell of it.

The parts of a change by its algorithm (`PARTS`), what they are and who writes them; the formulas are in `algebra.based`.

    DoRA              magnitude (out,), of PEFT and AI-Toolkit; dora_scale (out, 1) or (1, in), of LyCORIS and OneTrainer; and the
                      parts of a LoRA, LoHa or LoKr
    OFT               blocks (n, b, b) and rescale (out, 1), of LyCORIS and kohya, on the outputs; packed (n, b (b - 1) / 2), of
                      PEFT and OneTrainer, on the inputs: in / b blocks, or one that all share; scaled, where OneTrainer's
                      `scaled_oft` stands beside it: divided by the root of its length
    BOFT              blocks (m, n, b, b) and rescale (out, 1), of LyCORIS, on the outputs; boft_R (m, n, b, b) and
                      boft_s (out, 1), of PEFT, on the inputs
    IA3               ia3_l (out, 1) or (1, in), of PEFT, begins at 1; on_input or on_output (size,), of LyCORIS, begins at 0
    GLoRA             a1 (in, r), a2 (r, in), b1 (out, r), b2 (r, in), of LyCORIS since 2.0; before, the two of a pair were named
                      the other way round, which their shapes tell
    replaced weight   set (out, in), of ComfyUI

Not recognised: kohya's own prefix `oft_unet_`, which no trainer of Z-Image writes; PEFT's OFT before 0.14; `oft_diag`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from ..errors import ZitMergeError
from .algorithms import BOFT, DORA, GLORA, IA3, OFT, SET

PARTS: Mapping[str, tuple[str, ...]] = {
    DORA: ("magnitude", "dora_scale"),
    OFT: ("blocks", "rescale", "packed", "scaled"),
    BOFT: ("blocks", "rescale", "boft_R", "boft_s"),
    IA3: ("ia3_l", "on_input", "on_output"),
    GLORA: ("a1", "a2", "b1", "b2"),
    SET: ("set",),
}


class Sides(NamedTuple):
    """What the tensors of a change tell of the weight that it changes; None is what they leave open.

    Attributes:
        out: Rows.
        into: Columns.
        rank: That no change of this form exceeds.
        inner: The r of alpha / r.
    """

    out: int | None
    into: int | None
    rank: int | None
    inner: int = 1


class Shapes(Protocol):
    """What a file's header says of shapes; see `header.Header`."""

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor."""

    def error(self, text: str) -> ZitMergeError:
        """An error of this file."""

    def broken(self, text: str) -> ZitMergeError:
        """An error of a file that holds no changes in this way."""


def sides(header: Shapes, algorithm: str, keys: Mapping[str, str]) -> Sides:
    """What the tensors of an OFT, BOFT, IA3, GLoRA or replaced weight tell of the weight.

    Args:
        header: Of the file.
        algorithm: Of the change.
        keys: Its parts.

    Raises:
        ZitMergeError: They do not fit each other, or no form of this algorithm.
    """
    return {OFT: _oft, BOFT: _boft, IA3: _ia3, GLORA: _glora, SET: _set}[algorithm](header, keys)


def check_magnitude(header: Shapes, keys: Mapping[str, str], out: int, into: int) -> None:
    """Raises ZitMergeError for a magnitude that is none of an (out, in) weight.

    Args:
        header: Of the file.
        keys: The parts of the DoRA.
        out: Rows.
        into: Columns.
    """
    if len(found := [keys[part] for part in PARTS[DORA] if part in keys]) > 1:
        raise header.error(f"{found[0]} and {found[1]} are both magnitudes of one DoRA: keep one of them")
    (key,) = found
    wanted = ((out,),) if "magnitude" in keys else ((out, 1), (1, into))
    if (shape := header.shape(key)) not in wanted:
        told = " or ".join(str(list(w)) for w in wanted)
        raise header.broken(f"{key} has shape {list(shape)}, the magnitude of a {out} x {into} weight has {told}")


def _oft(header: Shapes, keys: Mapping[str, str]) -> Sides:
    if "blocks" in keys:
        return _of_blocks(header, keys, 3)
    key = keys.get("packed") or keys.get("scaled")
    if not key:
        raise _alone(header, keys)
    shape = header.shape(key)
    size = triangle(shape[1]) if len(shape) == 2 and 0 not in shape else 0
    if not size or len(keys) > 1:
        raise header.broken(f"{key} has shape {list(shape)}, the triangles of an OFT's blocks are (n, b (b - 1) / 2)")
    return Sides(None, None if shape[0] == 1 else shape[0] * size, None)


def triangle(elements: int) -> int:
    """The b of b (b - 1) / 2; 0 where there is none."""
    size = (1 + math.isqrt(1 + 8 * elements)) // 2
    return size if size * (size - 1) // 2 == elements else 0


def _boft(header: Shapes, keys: Mapping[str, str]) -> Sides:
    if "blocks" in keys:
        return _of_blocks(header, keys, 4)
    if "boft_R" not in keys:
        raise _alone(header, keys)
    into = _width(header, keys["boft_R"], 4)
    if "boft_s" not in keys:
        return Sides(None, into, None)
    scale = header.shape(keys["boft_s"])
    if len(scale) != 2 or scale[1] != 1:
        raise header.broken(f"{keys['boft_s']} has shape {list(scale)}, the scale of a BOFT's rows is (out, 1)")
    return Sides(scale[0], into, None)


def _of_blocks(header: Shapes, keys: Mapping[str, str], dims: int) -> Sides:
    out = _width(header, keys["blocks"], dims)
    if "rescale" in keys and (shape := header.shape(keys["rescale"])) != (out, 1):
        raise header.broken(f"{keys['rescale']} has shape {list(shape)}, the scale of {out} rows is [{out}, 1]")
    return Sides(out, None, None)


def _width(header: Shapes, key: str, dims: int) -> int:
    """n b of blocks (n, b, b) or (m, n, b, b), whose stages must fit into n blocks."""
    shape = header.shape(key)
    if len(shape) != dims or 0 in shape or shape[-1] != shape[-2]:
        raise header.broken(f"{key} has shape {list(shape)}, an OFT's blocks are (n, b, b), a BOFT's (m, n, b, b)")
    stages = shape[0] if dims == 4 else 1
    if stages > 1 and (shape[-1] % 2 or shape[1] % 2 ** (stages - 1)):
        raise header.broken(f"{key} has {stages} stages, into which {shape[1]} blocks of {shape[-1]} can't be paired")
    return shape[-3] * shape[-1]


def _ia3(header: Shapes, keys: Mapping[str, str]) -> Sides:
    part, key = next(iter(keys.items()))
    shape = header.shape(key)
    if len(keys) > 1 or (part == "ia3_l" and (len(shape) != 2 or 1 not in shape)) or (part != "ia3_l" and len(shape) != 1):
        wanted = "(out, 1) or (1, in)" if part == "ia3_l" else "one number for each row or column"
        raise header.broken(f"{key} has shape {list(shape)}, the scale of an IA3 is {wanted}")
    if part == "ia3_l":
        return Sides(None, shape[1], None) if shape[0] == 1 else Sides(shape[0], None, None)
    return Sides(None, shape[0], None) if part == "on_input" else Sides(shape[0], None, None)


def _glora(header: Shapes, keys: Mapping[str, str]) -> Sides:
    for part in PARTS[GLORA]:
        if part not in keys:
            raise header.error(f"{next(iter(keys.values()))} has no {part}.weight beside it, a part is missing: get a whole file")
    shapes = {part: header.shape(key) for part, key in keys.items()}
    for a, b in ((0, 1), (1, 0)):  # who is first in a product
        pairs = [(shapes[f"{m}{1 + a}"], shapes[f"{m}{1 + b}"]) for m in "ab"]
        if all(len(x) == len(y) == 2 and x[1] == y[0] and 0 not in (*x, *y) for x, y in pairs):
            (into, rank), (_, width) = pairs[0]
            (out, inner), (_, columns) = pairs[1]
            if into == width == columns and rank == inner and rank < into:
                return Sides(out, into, 2 * rank, rank)
    told = ", ".join(f"{part} {list(shape)}" for part, shape in shapes.items())
    raise header.broken(f"{keys['a1']} and its like have the shapes {told}, which make no W a1 a2 + b1 b2")


def _set(header: Shapes, keys: Mapping[str, str]) -> Sides:
    shape = header.shape(keys["set"])
    if len(shape) != 2 or 0 in shape:
        raise header.broken(f"{keys['set']} has shape {list(shape)}, a weight is a matrix")
    return Sides(*shape, None)


def _alone(header: Shapes, keys: Mapping[str, str]) -> ZitMergeError:
    return header.error(f"{next(iter(keys.values()))} stands alone, what it scales is missing: get a whole file")
