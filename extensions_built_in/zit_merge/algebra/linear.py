"""Methods that are linear in the deltas."""

from __future__ import annotations

from collections.abc import Sequence

from .delta import Delta, Sum
from .factors import Factors, stack


def sum(deltas: Sequence[Delta]) -> Delta:  # noqa: A001 - the method's name in the config
    """sum_i delta_i, exactly: the factors are stacked, no product of one LoRA meets a factor of another.

    Args:
        deltas: One change per LoRA that touches the weight, strength included.

    Returns:
        Factors of rank sum r_i; a Kron stays what it is, alone or as one part of a Sum.
    """
    if len(deltas) == 1:
        return deltas[0]
    thin = [d for d in deltas if isinstance(d, Factors)]
    others = [d for d in deltas if not isinstance(d, Factors)]
    return Sum((*others, *([stack(thin)] if thin else []))) if others else stack(thin)
