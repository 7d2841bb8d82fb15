"""Methods that look at directions: the singular vectors of each LoRA and the spaces that they span."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from .core import FAINT, core_space
from .delta import Delta
from .factors import Factors, stack, wide
from .linear import add
from .parameters import Within
from .products import norm
from .truncate import svd


def tsv(deltas: Sequence[Delta]) -> Delta:
    """Make the singular vectors of all LoRAs orthogonal to each other, then sum.

    Formula: U S V' with U = polar([U_1 ... U_N]), V = polar([V_1 ... V_N]), S = diag(S_1 ... S_N), from delta_i = U_i S_i V_i';
        polar(X) = X (X'X)^(-1/2)
    Source: TSV-Merge (Gargiulo et al. 2025, arXiv 2412.00081), all singular vectors kept, which a LoRA affords
    Use: LoRAs that share directions: what two of them hold in common counts about once. Unrelated ones are summed. Of two that
        are nearly one it keeps the difference at full strength: average those.
    """
    if len(deltas) == 1:
        return deltas[0]
    space = core_space(deltas, in_axes=False)
    parts = [triplets(p) for p in space.parts]
    if not any(len(s) for _, s, _ in parts):
        return add(deltas)
    left, right = (_polar(torch.cat(b, 1)) for b in ([u for u, _, _ in parts], [v.T for *_, v in parts]))
    return space.back((left * torch.cat([s for _, s, _ in parts])) @ right.T)


def project(
    deltas: Sequence[Delta],
    *,
    mu: Annotated[float, Within(0)] = 0.5,
    yields: Literal["first", "second", "both"] = "first",
    components: Annotated[int, Within(0)] = 0,
) -> Delta:
    """One LoRA gives way in the directions that the other one uses.

    Formula: delta_1 (I - mu / (1 + mu) V V') + delta_2, V the right singular vectors of delta_2; mu = 0 is the plain sum, a large
        mu takes delta_1 out of those directions altogether
    Source: NP-LoRA (2025, arXiv 2511.11051): the content comes first and yields, the style second; mu as in its ComfyUI node
    Use: a subject with a style, when the style fades or the subject bleeds into it.

    Args:
        deltas: One change of the weight for each LoRA, strength included.
        mu: How far it gives way.
        yields: Which of the two does; `both` projects each one against the other.
        components: How many of the largest singular directions are protected; 0 is all of them.
    """
    if len(deltas) == 1:
        return deltas[0]
    first, second = (d.map(wide) for d in deltas)
    share = mu / (1 + mu)
    return add(
        [
            first if yields == "second" else _yield(first, second, share, components),
            second if yields == "first" else _yield(second, first, share, components),
        ]
    )


def _yield(x: Delta, other: Delta, share: float, components: int) -> Delta:
    """x (I - share V V')."""
    right = triplets(other, components or None)[2]
    if isinstance(x, Factors):
        return Factors(x.up, x.down - share * (x.down @ right.T) @ right)
    return add([x, Factors(-share * (x @ right.T), right)])


def shared_once(deltas: Sequence[Delta], *, tau: Annotated[float, Within(0, 1)] = 0.5) -> Delta:
    """Experimental: what several LoRAs have in common counts once, not once for each.

    Formula: sum_i (delta_i - UU' delta_i VV') + sum_i w_i UU' delta_i VV'; the columns of U are the eigenvectors of sum_i P_i
        whose eigenvalues, which count the LoRAs that hold a direction, are above 1 + tau (N - 1); P_i is the projector on the
        column space of delta_i, V the same for the row spaces; w_i is the size of UU' delta_i VV' as a share of all of them
    Source: our own proposal: Z-Image Turbo LoRAs are thought to lose its distillation alike. Shown on synthetic LoRAs only; on
        LoRAs trained in a small world it did what the sum does (docs/evidence.md)
    Use: to try when a stack of LoRAs burns although each one alone is fine. Without common directions it is the plain sum; in a
        narrow weight some are common by chance: two unrelated LoRAs of rank 32 reach 1.66 on the 256 inputs of adaLN.

    Args:
        deltas: One change of the weight for each LoRA, strength included.
        tau: Share of the other LoRAs that must hold a direction before it counts as common.
    """
    if len(deltas) == 1:
        return deltas[0]
    space = core_space(deltas, in_axes=False)
    own = [t for t in map(triplets, space.parts) if len(t[1])]  # a zero change holds no direction and is not counted
    if len(own) < 2:
        return add(deltas)
    left, right = _common([u for u, _, _ in own], tau), _common([v.T for _, _, v in own], tau)
    shared = [Factors(left @ (left.T @ p.up), (p.down @ right) @ right.T) for p in space.parts]
    sizes = torch.tensor([norm(s) for s in shared], dtype=torch.float64)
    weights = sizes / sizes.sum() if float(sizes.sum()) > 0 else sizes
    up, down = stack([*space.parts, *(s.times(w - 1) for s, w in zip(shared, weights.tolist(), strict=True))])
    return space.back(up @ down)


def counts(bases: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """How many subspaces hold a direction.

    Args:
        bases: Orthonormal columns, (n, r_i) each.

    Returns:
        (n,) eigenvalues of the sum of the projectors, between 0 and N, the largest first, and their vectors (n, n).
    """
    values, vectors = torch.linalg.eigh(sum(b @ b.T for b in bases))
    return values.flip(0), vectors.flip(1)


def _common(bases: Sequence[Tensor], tau: float) -> Tensor:
    """(n, c): orthonormal columns that span what is common to them."""
    projectors, bar = sum(b @ b.T for b in bases), 1 + tau * (len(bases) - 1) + 1e-9  # 1 with its rounding is one LoRA's own
    if float(torch.linalg.eigvalsh(projectors)[-1]) <= bar:  # half the work, and often all of it
        return bases[0][:, :0]
    values, vectors = counts(bases)
    return vectors[:, values > bar]


def triplets(x: Delta, components: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(out, p), (p,), (p, in): the singular triplets of what was trained, without those of rounding; none of a zero change.

    Args:
        x: (out, in).
        components: How many; None is all.
    """
    left, sigma, right = svd(x.map(wide), components)
    alive = int(((sigma > FAINT * sigma[0]) & (sigma > 0)).sum())
    return left[:, :alive], sigma[:alive], right[:alive]


def _polar(x: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (rows, where it has more columns than rows): x (x'x)^(-1/2), (n, R).

    Directions that the columns do not span stay empty.
    """
    is_wide = x.shape[1] > x.shape[0]
    values, vectors = torch.linalg.eigh(x @ x.T if is_wide else x.T @ x)
    alive = values > (values[-1:] * torch.finfo(values.dtype).eps * len(values))
    vectors, root = vectors[:, alive], values[alive].sqrt()
    return vectors @ ((vectors.T @ x) / root[:, None]) if is_wide else (x @ (vectors / root)) @ vectors.T
