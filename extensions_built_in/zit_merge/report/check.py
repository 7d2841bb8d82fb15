"""What a file contains, compared with what was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

from ..algebra.factors import Factors, distance, norm, scale, stack
from ..formats.reader import TensorReader, load_lora
from ..plan import StepPlan


def wanted(plan: StepPlan) -> Iterator[tuple[str, list[tuple[float, Factors]]]]:
    """(module, [(strength with alpha / rank, factors as stored)]) for every module that an input changes."""
    loras = [i.lora or load_lora(i.path) for i in plan.inputs]
    with ExitStack() as files:
        readers = [files.enter_context(TensorReader(lora)) for lora in loras]
        for module in plan.shapes:
            yield (
                module,
                [
                    (i.strengths[module] * lora.pairs[module].scale, reader.factors(module))
                    for i, lora, reader in zip(plan.inputs, loras, readers, strict=True)
                    if i.counts(module)
                ],
            )


def residuals(plan: StepPlan, path: Path) -> dict[str, float]:
    """|written - wanted| / |wanted| of each module, through Gram matrices: no dense delta is formed.

    The floor is about 1e-8, the square root of float64's rounding. A module that should be zero gives its norm.
    """
    out = load_lora(path)
    with TensorReader(out) as written:
        found = {}
        for module, parts in wanted(plan):
            got = scale(written.factors(module), out.pairs[module].scale)
            if not parts:
                found[module] = norm(got)
                continue
            want = stack([Factors(x.up.double() * s, x.down.double()) for s, x in parts])
            size = norm(want)
            found[module] = distance(Factors(got.up.double(), got.down.double()), want) / size if size else norm(got)
    return found


def dense_residual(plan: StepPlan, path: Path, module: str) -> float:
    """The same for one module the plain way: every delta multiplied out in float64, summed, compared."""
    out = load_lora(path)
    got = out[module]
    want = torch.zeros(plan.shapes[module], dtype=torch.float64)
    for name, parts in wanted(plan):
        if name == module:
            for s, x in parts:
                want += s * (x.up.double() @ x.down.double())
    return float((got.up.double() @ got.down.double() - want).norm() / want.norm())
