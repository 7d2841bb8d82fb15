"""Methods that are linear in the deltas."""

from __future__ import annotations

from collections.abc import Sequence

from .factors import Factors, stack


def sum(deltas: Sequence[Factors]) -> Factors:  # noqa: A001 - the method's name in the config
    """sum_i delta_i, exactly: the factors are stacked, no product of one LoRA meets a factor of another.

    Args:
        deltas: One change per LoRA that touches the weight, strength included.

    Returns:
        up: (out, sum r_i), down: (sum r_i, in).
    """
    return stack(deltas)
