"""Methods that are linear in the deltas: merged = sum_i c_i * delta_i, all that differs is where the coefficients come from.

    gram       (N, N), gram[i, j] = <delta_i, delta_j>, of the deltas without their ratios: over one module, one layer or the file
    weights    (N,), the ratios
    returns    (N,), the coefficients c

Lengths and angles in the span of N deltas need nothing but their Gram matrix, so a slerp of two 3840 x 10240 changes is
arithmetic on a 2 x 2 matrix. `sum` and `normalize` take the ratios as strengths. The others are means: there only the
proportions of the ratios count, and the result is as strong as one LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import acos, cos, sin
from typing import Annotated

import torch
from torch import Tensor

from .delta import Delta, Sum
from .factors import Factors, stack
from .parameters import Within
from .ratios import cancels

_PARALLEL = 1e-6  # sin of an angle below which two directions are one: float64 Grams tell angles to about 1e-8
_OPPOSITE = "the LoRAs point in opposite directions, which have no mean: use method: average, or leave one out"


def add(deltas: Sequence[Delta]) -> Delta:
    """sum_i delta_i, exactly: the factors are stacked, no product of one LoRA meets a factor of another.

    Args:
        deltas: One or more changes of one weight, coefficients included.

    Returns:
        Factors of rank sum r_i; a Kron stays what it is, alone or as one part of a Sum.
    """
    if len(deltas) == 1:
        return deltas[0]
    thin = [d for d in deltas if isinstance(d, Factors)]
    others = [p for d in deltas if not isinstance(d, Factors) for p in (d.parts if isinstance(d, Sum) else (d,))]
    return Sum((*others, *([stack(thin)] if thin else []))) if others else stack(thin)


def sum(gram: Tensor, weights: Tensor) -> Tensor:  # noqa: A001 - the method's name in the config
    """The weighted sum.

    Formula: sum_i ratio_i delta_i
    Source: task arithmetic (Ilharco et al. 2023, arXiv 2212.04089)
    Use: the default. Each LoRA does what it does alone, as long as they change different things.
    """
    return weights


def average(gram: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean.

    Formula: sum_i ratio_i delta_i / sum_i ratio_i
    Source: model soups (Wortsman et al. 2022, arXiv 2203.05482)
    Use: saves of one training, or versions of one LoRA. Unrelated LoRAs end up at a fraction of their strength each.

    Raises:
        ValueError: The weights sum to zero.
    """
    return weights / _total(weights)


def normalize(gram: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum, scaled to the norm of the strongest LoRA in it.

    Formula: f sum_i ratio_i delta_i with f = max_i |ratio_i delta_i| / |sum_i ratio_i delta_i|
    Source: energy normalisation as merging tools for ComfyUI have it; norms from the Gram matrix
    Use: when a stack burns at full strength. One factor for the file (per: file) keeps the proportions between layers.

    Raises:
        ValueError: The LoRAs cancel each other.
    """
    energy = float(weights @ gram @ weights)
    largest = float((weights**2 * gram.diagonal()).max())
    if energy <= largest * _PARALLEL**2:
        if largest == 0:
            return weights
        raise ValueError("the LoRAs cancel each other, nothing is left to be normalised: use method: sum, or other ratios")
    return weights * (largest / energy) ** 0.5


def slerp(gram: Tensor, weights: Tensor) -> Tensor:
    """Spherical interpolation of two LoRAs.

    Formula: (sin((1-t) a) delta_1 + sin(t a) delta_2) / sin(a), a the angle between them, t = ratio_2 / (ratio_1 + ratio_2)
    Source: Shoemake 1985; as mergekit's slerp, but dot products below zero are left as they are
    Use: between two LoRAs of one subject, where the plain mean would lose strength. Parallel and opposite ones are averaged.

    Raises:
        ValueError: Negative weights, or weights that sum to zero.
    """
    t = _shares(weights)
    if len(t) == 1:
        return t
    angle = _angle(gram)
    if sin(angle) < _PARALLEL:
        return t
    return torch.sin(t * angle) / sin(angle)


def nuslerp(gram: Tensor, weights: Tensor) -> Tensor:
    """Spherical interpolation of two directions, the norm interpolated by itself.

    Formula: |m| m_t with m_t = slerp of delta_1 / |delta_1| and delta_2 / |delta_2|, |m| = (1-t) |delta_1| + t |delta_2|
    Source: after mergekit's nuslerp (t from the weights), with the norm taken out of the interpolation
    Use: as slerp, when one LoRA is much stronger than the other and must not decide the direction.

    Raises:
        ValueError: Negative weights, or weights that sum to zero.
    """
    t, norms = _shares(weights), gram.diagonal().sqrt()
    if float(t.min()) == 0 or float(norms.min()) == 0:
        return t
    cosines = gram / torch.outer(norms, norms)
    _refuse_opposite(cosines)
    return _unit(slerp(cosines, weights), cosines) / norms * float(t @ norms)


def karcher(
    gram: Tensor,
    weights: Tensor,
    *,
    max_iter: Annotated[int, Within(1, 10_000)] = 100,
    tol: Annotated[float, Within(0, 1, above=True)] = 1e-10,
) -> Tensor:
    """The mean direction of any number of LoRAs on the sphere, with the mean of their norms.

    Formula: the unit m with sum_i w_i log_m(delta_i / |delta_i|) = 0, times sum_i w_i |delta_i|; w = ratios / sum of ratios
    Source: Riemannian centre of mass (Karcher 1977), iterated as in mergekit's karcher, in the span's coefficients
    Use: as nuslerp for three LoRAs and more; for two it is nuslerp. LoRAs that all point apart have no mean direction.

    Args:
        gram: (N, N).
        weights: (N,).
        max_iter: Steps at most.
        tol: Length of a step, in radians, at which it ends.

    Raises:
        ValueError: Negative weights, weights that sum to zero, or directions that cancel each other.
    """
    w, norms = _shares(weights), gram.diagonal().sqrt()
    alive = (norms > 0) & (w > 0)
    if not alive.any():
        return torch.zeros_like(w)
    cosines = gram[alive][:, alive] / torch.outer(norms[alive], norms[alive])
    shares = w[alive] / w[alive].sum()
    mean = _unit(shares, cosines)
    for _ in range(max_iter):
        dots = (cosines @ mean).clamp(-1, 1)
        _refuse_opposite(dots)
        angles = torch.acos(dots)
        pulls = shares * torch.where(angles > _PARALLEL, angles / torch.sin(angles), 1.0)  # log_m(e) = a / sin(a) (e - cos(a) m)
        tangent = pulls - (pulls @ dots) * mean  # sum_i pull_i (e_i - dot_i mean), in coefficients
        length = max(float(tangent @ cosines @ tangent), 0.0) ** 0.5
        if length < tol:
            break
        mean = _unit(cos(length) * mean + sin(length) / length * tangent, cosines)
    coefficients = torch.zeros_like(w)
    coefficients[alive] = mean / norms[alive] * float(w @ norms)
    return coefficients


def _unit(coefficients: Tensor, gram: Tensor) -> Tensor:
    """The coefficients of the same direction at length 1."""
    energy = float(coefficients @ gram @ coefficients)
    if energy <= _PARALLEL**2:
        raise ValueError(_OPPOSITE)
    return coefficients / energy**0.5


def _refuse_opposite(cosines: Tensor) -> None:
    if float(cosines.min()) < -1 + _PARALLEL**2:
        raise ValueError(_OPPOSITE)


def _angle(gram: Tensor) -> float:
    """Between two deltas; 0 where one is zero."""
    length = float(gram[0, 0]) ** 0.5 * float(gram[1, 1]) ** 0.5
    return acos(min(1.0, max(-1.0, float(gram[0, 1]) / length))) if length else 0.0


def _total(weights: Tensor) -> float:
    if cancels(weights.tolist()):
        raise ValueError("the ratios sum to 0, a mean needs another sum")
    return float(weights.sum())


def _shares(weights: Tensor) -> Tensor:
    """Weights that sum to 1, none of them negative."""
    if float(weights.min()) < 0:
        raise ValueError("a negative ratio has no meaning between directions: use method: sum, or ratios from 0")
    return weights / _total(weights)
