"""The delta W' - W of the forms that need the base model's weight, from their tensors; the formulas are in `algebra.based`.

A merge multiplies the delta with its strength. The strength of a client does the same to GLoRA, IA3, replaced weights and an OFT
without `rescale`; a DoRA and a BOFT leave the base at another pace there, and PEFT knows only strength 1 of OFT and BOFT. ComfyUI
alone bounds LyCORIS' OFT by alpha in the place of alpha * out, and leaves out its `rescale`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .algorithms import DORA, GLORA, IA3, OFT, SET
from .changes import Change
from .sides import triangle

if TYPE_CHECKING:
    from torch import Tensor

    from ..algebra.factors import Factors

_EPS = 2.0**-23  # of float32: LyCORIS and OneTrainer add it to a norm


def mixes_rows(change: Change) -> bool:
    """Whether a row of the changed weight depends on other rows: of a fused q, k and v all three are needed then."""
    return "blocks" in change.keys or ("dora_scale" in change.keys and change.sizes["dora_scale"][0] == 1)


def delta(change: Change, weight: Tensor, read: Callable[..., Tensor], inner: Factors | None) -> Tensor | Factors:
    """W' - W of what is stored as one, or of its own third where no row depends on another; factors of a GLoRA.

    Args:
        change: Of BASED.
        weight: W (out, in): q, k and v in one for a fused change that mixes rows.
        read: (key, rows) -> tensor, or some of its rows.
        inner: Of a DoRA: the change that is added before the norm is taken, of the same rows, alpha / rank folded in.

    Raises:
        ValueError: The numbers have no such change.
    """
    from ..algebra import based
    from ..algebra.factors import Factors, wide

    keys, rows = change.keys, None
    if change.third is not None and not mixes_rows(change):
        rows = change.third * change.shape[0], (change.third + 1) * change.shape[0]

    def rotations(part: str) -> Tensor:
        blocks = wide(read(keys[part]))
        return blocks - blocks.mT

    if change.algorithm == DORA:
        assert inner is not None, "a DoRA has factors"
        dense = wide(inner.up) @ wide(inner.down)
        if "magnitude" in keys:
            return based.dora(weight, dense, read(keys["magnitude"], rows)[:, None])
        is_of_rows = change.sizes["dora_scale"][1] == 1
        return based.dora(weight, dense, read(keys["dora_scale"], rows if is_of_rows else None), _EPS)
    if change.algorithm == GLORA:
        first, second = "12" if change.sizes["a1"][0] == change.shape[1] else "21"
        a = Factors(read(keys[f"a{first}"]), read(keys[f"a{second}"]))
        b = Factors(read(keys[f"b{first}"], rows), read(keys[f"b{second}"]))
        return based.glora(weight, a, b, change.scale)
    if change.algorithm == IA3:
        (part, key), *_ = keys.items()
        is_of_rows = part == "on_output" or (part == "ia3_l" and change.sizes[part][1] == 1)
        scale = wide(read(key, rows if is_of_rows else None))
        scale = scale if part == "ia3_l" else scale[:, None] if is_of_rows else scale[None]
        return based.ia3(weight, scale - 1 if part == "ia3_l" else scale)
    if change.algorithm == SET:
        return wide(read(keys["set"], rows)) - wide(weight)
    if "blocks" in keys:
        turns = based.cayley(based.constrained(rotations("blocks"), (change.alpha or 0.0) * len(weight)))
        rescale = read(keys["rescale"]) if "rescale" in keys else None
        return (based.rotated_outputs if change.algorithm == OFT else based.butterfly_outputs)(weight, turns, rescale)
    if "boft_R" in keys:
        turns = based.cayley(-rotations("boft_R") / 2)
        return based.butterfly_inputs(weight, turns, read(keys["boft_s"], rows) if "boft_s" in keys else None)
    assert change.rotation, "a file that leaves it open is not read"
    packed, rule = wide(read(keys["scaled" if "scaled" in keys else "packed"])), change.rotation
    size = triangle(packed.shape[1])
    if weight.shape[1] % size:
        raise ValueError(f"blocks of {size} do not divide {weight.shape[1]} columns")
    skewed = based.skew(packed, size)
    if rule.bound is not None:
        skewed = based.within_ball(skewed, rule.bound)
    if "scaled" in keys:
        skewed = skewed / packed.shape[1] ** 0.5
    turn = based.cayley(-skewed) if rule.terms is None else based.neumann(skewed, rule.terms, rule.is_old)
    return based.rotated_inputs(weight, turn)
