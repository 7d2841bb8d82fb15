"""Averages over the checkpoints of one training, after the fact.

A power-function average weights training time t as t^gamma (Karras et al. 2024, "Analyzing and improving the training dynamics of
diffusion models", arXiv 2312.02696, section 3). `sigma_rel` is its relative standard deviation, the width of the profile as a
share of the training so far:

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))
"""

from __future__ import annotations

from collections.abc import Sequence

NARROWEST = 0.001
UNIFORM = 12**-0.5  # sigma_rel of gamma = 0, the plain mean


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the profile of a relative width.

    Args:
        sigma_rel: From 0.001 (as good as the last checkpoint alone) to 0.2887 (gamma 0: all times count the same). 0.05 and 0.10
            are the paper's examples.
    """
    if not NARROWEST <= sigma_rel <= UNIFORM + 1e-4:
        raise ValueError(f"sigma_rel must be from {NARROWEST} to {UNIFORM:.4f}, the width of the plain mean, not {sigma_rel:g}")
    t = sigma_rel**-2
    before, gamma = float("inf"), t**0.5  # above the largest root of (g + 2)^2 (g + 3) - t (g + 1), convex from there on
    while gamma < before:  # Newton's steps fall until rounding stops them
        value, slope = (gamma + 2) ** 2 * (gamma + 3) - t * (gamma + 1), (gamma + 2) * (3 * gamma + 8) - t
        before, gamma = gamma, gamma - value / slope
    return max(0.0, before)


def profile(steps: Sequence[int], gamma: float) -> list[float]:
    """The weight of each checkpoint: proportional to step^gamma, summing to 1; saves are taken to be evenly spaced.

    Args:
        steps: Training steps of the saves, rising.
        gamma: The exponent.
    """
    last = max(steps)
    weights = [(step / last) ** gamma for step in steps]
    return [w / sum(weights) for w in weights]
