"""What a file contains, compared with what was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from ..algebra import linear
from ..algebra.delta import Delta
from ..algebra.factors import wide
from ..algebra.products import distance, norm
from ..formats.reader import TensorReader, load_lora
from ..planning.types import StepPlan
from .opened import open_input


def wanted(plan: StepPlan) -> Iterator[tuple[str, Delta | None]]:
    """(module, sum of strength * alpha / rank * change in float64) for every module written; None where no input changes it."""
    with ExitStack() as files:
        readers = [open_input(i, files) for i in plan.inputs]
        for module in plan.shapes:
            parts = []
            for i, reader in zip(plan.inputs, readers, strict=True):
                if i.counts(module):
                    scale, stored = reader.delta(module)
                    parts.append(stored.map(wide).times(i.strengths[module] * scale))
            yield module, linear.add(parts) if parts else None


def residuals(plan: StepPlan, path: Path) -> dict[str, float]:
    """|written - wanted| / |wanted| of each module, through Gram matrices: no dense delta is formed.

    The floor is about 1e-8, the square root of float64's rounding. A module that should be zero gives its norm.

    Args:
        plan: What was asked for; its inputs still there.
        path: The file.
    """
    out = load_lora(path)
    with TensorReader(out) as written:
        found = {}
        for module, want in wanted(plan):
            scale, stored = written.delta(module)
            got = stored.map(wide).times(scale)
            found[module] = distance(got, want) / size if want is not None and (size := norm(want)) else norm(got)
    return found


def dense_residual(plan: StepPlan, path: Path, module: str) -> float:
    """The same for one module the plain way: every delta multiplied out in float64, summed, compared.

    Args:
        plan: What was asked for.
        path: The file.
        module: Its name.
    """
    got = load_lora(path)[module].map(wide).expand()
    asked = next(delta for name, delta in wanted(plan) if name == module)
    assert asked is not None, "an input changes the module"
    want = asked.expand()
    dense = want.up @ want.down
    return float((got.up @ got.down - dense).norm() / dense.norm())
