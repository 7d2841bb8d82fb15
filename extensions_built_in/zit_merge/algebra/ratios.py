"""What ratios mean before any tensor is there."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum


def cancels(weights: Sequence[float]) -> bool:
    """Whether weights sum to 0 but for rounding, so that no mean can divide by their sum."""
    return abs(fsum(weights)) <= 1e-12 * fsum(map(abs, weights))
