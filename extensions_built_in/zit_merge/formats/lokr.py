"""A LoKr that is only scaled and stays a LoKr (`save: {keep_lokr: true}`).

As AI-Toolkit and LyCORIS write it: `diffusion_model.<module>.lokr_w1` (or `lokr_w1_a`, `lokr_w1_b`), `.lokr_w2` (likewise), and
`.alpha` = r where a factor is a product; beside two whole factors, where it has no meaning, it is 1, since lycoris-lora can't do
without. The strength goes into the smaller factor, w1. Pairs of a mixed file stay pairs. A product has two components at least,
as in `forms`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from .changes import Change
from .forms import FORMS, LEAST
from .reader import LoraFile, TensorReader
from .spec import Layout

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..algebra.delta import Delta, Kron
    from ..algebra.factors import Factors

_FORM = FORMS["ai-toolkit"]
_UPS, _DOWNS = ("up", "w1_a", "w2_a"), ("down", "w1_b", "w2_b")


def why_not(lora: LoraFile) -> str | None:
    """Why a file can't stay a LoKr; None if it can."""
    if "LoKr" not in lora.algorithms:
        return f"{lora.path.name} holds no LoKr"
    for module, changes in lora.changes.items():
        change = changes[0]
        if len(changes) > 1 or change.algorithm not in ("LoKr", "LoRA"):
            return f"{lora.path.name} changes {module} as a {change.algorithm}"
        if change.algorithm == "LoKr" and change.third is not None and _rows(change, "w1", "w1_a") % 3:
            return f"{lora.path.name} fuses q, k and v of {module} in a way that no Kronecker product splits"
    return None


def alpha_keys(modules: Iterable[str]) -> dict[str, str]:
    """Key of alpha -> module."""
    return {f"{_FORM.prefix}{module}.alpha": module for module in modules}


def layout(lora: LoraFile, dtype: str) -> Layout:
    """The tensors of the output, alphas first.

    Args:
        lora: The LoKr.
        dtype: Of the output, as a config has it.
    """
    alphas: Layout = dict.fromkeys(alpha_keys(lora.changes), ("fp32", ()))
    entries: Layout = {}
    for module, (change, *_) in lora.changes.items():
        entries |= {f"{_FORM.prefix}{module}{_suffix(part)}": (dtype, shape) for part, shape in _shapes(change).items()}
    return alphas | entries


def ranks(lora: LoraFile) -> dict[str, int]:
    """Module -> rank of the output as it is read back."""

    def rank(change: Change) -> int:
        shapes = _shapes(change)
        if "up" in shapes:
            return shapes["up"][1]
        return math.prod(min(shapes[w]) if w in shapes else shapes[f"{w}_a"][1] for w in ("w1", "w2"))

    return {module: min(rank(change), *change.shape) for module, (change, *_) in lora.changes.items()}


def _shapes(change: Change) -> dict[str, tuple[int, int]]:
    """Part -> shape in the output."""
    shapes = {}
    for part, (rows, columns) in change.sizes.items():
        if change.third is not None and part in ("w1", "w1_a", "up"):
            rows //= 3
        if part in _UPS:
            columns = max(columns, LEAST)
        elif part in _DOWNS:
            rows = max(rows, LEAST)
        shapes[part] = (rows, columns)
    return shapes


def scaled(change: Change, reader: TensorReader, strength: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one module at a strength.

    Args:
        change: Where its change is found.
        reader: Of its file.
        strength: What it is multiplied with, alpha / rank left out.
        dtype: Of the output.

    Returns:
        Part -> tensor, in the order of the layout, without alpha.
    """
    import torch

    from ..algebra.delta import Kron

    delta = reader.change(change).times(strength * change.scale)
    parts = (
        _lokr_parts(_level(delta) if dtype == torch.float16 else delta)
        if isinstance(delta, Kron)
        else dict(zip(("up", "down"), _at_least(delta), strict=True))
    )
    return {part: parts[part].to(dtype) for part in change.sizes}


def named(module: str, parts: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of one module as the file has them.

    Args:
        module: Its name.
        parts: From `scaled`.
    """
    for part, tensor in parts.items():
        yield f"{_FORM.prefix}{module}{_suffix(part)}", tensor


def delta(parts: Mapping[str, Tensor]) -> Delta:
    """The change that the parts make, whose scale is 1."""
    from ..algebra.delta import Kron
    from ..algebra.factors import Factors, whole

    if "up" in parts:
        return Factors(parts["up"], parts["down"])
    return Kron(
        *(whole(parts[name]) if name in parts else Factors(parts[f"{name}_a"], parts[f"{name}_b"]) for name in ("w1", "w2"))
    )


def alpha(change: Change) -> float:
    """alpha = r, so that the scale is 1."""
    shapes = _shapes(change)
    return float(next((shapes[part][1] for part in _UPS if part in shapes), 1))


def _at_least(factors: Factors) -> Factors:
    from ..algebra.factors import pad

    return pad(factors, max(LEAST, factors.rank))


def _lokr_parts(delta: Kron) -> dict[str, Tensor]:
    from ..algebra.factors import single

    parts: dict[str, Tensor] = {}
    for name, factor in zip(("w1", "w2"), delta, strict=True):
        wide, split = factor.map(single), _at_least(factor)
        parts |= {name: wide.up @ wide.down, f"{name}_a": split.up, f"{name}_b": split.down}
    return parts


def _level(delta: Kron) -> Kron:
    """The same delta with its two factors of about one size, by a power of two, where float16 would lose the smaller one."""
    from ..algebra.delta import Kron
    from ..algebra.factors import single

    left, right = (f.map(single) for f in delta)
    sizes = [float((f.up @ f.down).abs().mean()) for f in (left, right)]
    if min(sizes) == 0 or all(1e-3 < size < 1e3 for size in sizes):
        return delta
    shift = round((math.log2(sizes[1]) - math.log2(sizes[0])) / 2)
    return Kron(left.times(2.0**shift), right.times(2.0**-shift))


def _rows(change: Change, *parts: str) -> int:
    return next(change.sizes[p][0] for p in parts if p in change.sizes)


def _suffix(part: str) -> str:
    return {"up": _FORM.up, "down": _FORM.down}.get(part, f".lokr_{part}")
