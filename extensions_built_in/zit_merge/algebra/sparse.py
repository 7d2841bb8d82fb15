"""Methods that look at single entries: trim, drop at random, elect a sign. All of them in the core space (`core`).

One LoRA alone has nothing to be reconciled with and stays as it is. What is drawn at random comes from the seed, and falls to the
LoRAs by where their energy lies, so their order in the config does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from .core import core_space
from .delta import Delta
from .parameters import Within, check_della

Density = Annotated[float, Within(0, 1, above=True)]
Seed = Annotated[int, Within(0, 2**32 - 1)]
# Rounding has a sign too. Axes as faint as core.FAINT are known to some 1e-10, so much may be left where a LoRA has nothing.
_NOTHING = 1e-9


def ties(deltas: Sequence[Delta], *, density: Density = 0.2) -> Delta:
    """Trim, elect a sign, average what agrees.

    Formula: of each core keep the `density` largest entries; entry by entry the sign of the sum wins, and the mean of the entries
        of that sign remains
    Source: TIES-Merging (Yadav et al. 2023, arXiv 2306.01708), density 0.2 as there; in the core space
    Use: LoRAs that fight over the same directions. It weakens unrelated ones less than a mean does, more than a sum.

    Args:
        deltas: One change of the weight for each LoRA, strength included.
        density: Share of the entries that is kept.
    """
    return _in_core(deltas, lambda cores: _disjoint_mean(_trim(cores, density)))


def dare_linear(deltas: Sequence[Delta], *, density: Density = 0.5, seed: Seed = 0) -> Delta:
    """Drop entries at random, scale up the rest, sum.

    Formula: sum_i mask_i * core_i / density, each entry of mask_i 1 with probability `density`
    Source: DARE (Yu et al. 2024, arXiv 2311.03099), which drops half of the entries and more; in the core space
    Use: an experiment. The expected result is the plain sum, what is added is noise: on LoRAs trained in a small world it was
        worse than the sum (docs/evidence.md).

    Args:
        deltas: One change of the weight for each LoRA, strength included.
        density: Probability with which an entry is kept.
        seed: Of the draw.
    """
    return _in_core(deltas, lambda cores: _drop(cores, torch.full_like(cores, density), seed).sum(0))


def dare_ties(deltas: Sequence[Delta], *, density: Density = 0.5, seed: Seed = 0) -> Delta:
    """Drop entries at random, scale up the rest, elect a sign, average what agrees.

    Formula: ties with DARE's random masks in the place of the trimming
    Source: DARE (arXiv 2311.03099) with the election of TIES (arXiv 2306.01708); in the core space
    Use: an experiment, as dare_linear.

    Args:
        deltas: One change of the weight for each LoRA, strength included.
        density: Probability with which an entry is kept.
        seed: Of the draw.
    """
    return _in_core(deltas, lambda cores: _disjoint_mean(_drop(cores, torch.full_like(cores, density), seed)))


def della(
    deltas: Sequence[Delta],
    *,
    density: Density = 0.5,
    epsilon: Annotated[float, Within(0, 1)] = 0.15,
    seed: Seed = 0,
) -> Delta:
    """Drop entries at random, small ones more often, scale up the rest, elect a sign, average what agrees.

    Formula: as dare_ties; in each row of a core the entries are kept with probabilities from density - epsilon / 2 (the smallest)
        to density + epsilon / 2 (the largest), in equal steps, and divided by them
    Source: DELLA-Merging (Deep et al. 2024, arXiv 2406.11617); in the core space
    Use: as dare_ties, with less noise in what matters most.

    Args:
        deltas: One change of the weight for each LoRA, strength included.
        density: Mean probability with which an entry is kept.
        epsilon: Distance between the largest and the smallest of the probabilities.
        seed: Of the draw.

    Raises:
        ValueError: The probabilities leave 0 to 1.
    """
    check_della(density=density, epsilon=epsilon)

    def merged(cores: Tensor) -> Tensor:
        size = cores.shape[-1]
        places = torch.arange(size, dtype=cores.dtype, device=cores.device).expand_as(cores)
        places = torch.empty_like(cores).scatter_(-1, _ascending(cores.abs()), places)  # 0 is the smallest of its row
        spread = places / (size - 1) - 0.5 if size > 1 else torch.zeros_like(cores)
        return _disjoint_mean(_drop(cores, density + epsilon * spread, seed))

    return _in_core(deltas, merged)


def _in_core(deltas: Sequence[Delta], rule: Callable[[Tensor], Tensor]) -> Delta:
    """A rule (N, p, q) -> (p, q) applied in the core space; one delta alone stays as it is."""
    if len(deltas) == 1:
        return deltas[0]
    space = core_space(deltas)
    return space.back(rule(space.cores))


def _trim(cores: Tensor, density: float) -> Tensor:
    """(N, p, q): of each the `density` largest entries by size, at least one; the others zero."""
    entries = cores.flatten(1)
    kept = entries.abs().topk(max(1, int(density * entries.shape[1])), sorted=False).indices
    return torch.zeros_like(entries).scatter_(1, kept, entries.gather(1, kept)).view_as(cores)


def _disjoint_mean(cores: Tensor) -> Tensor:
    """(N, p, q) -> (p, q): the mean of the entries whose sign is that of the sum; what is zero has no vote, a draw gives zero."""
    sizes, total = cores.flatten(1).norm(dim=1), cores.sum(0)
    elected = torch.where(total.abs() > _NOTHING * sizes.max(), total.sign(), 0.0)
    agrees = (cores * elected).gt_(_NOTHING * sizes[:, None, None])  # 1 or 0
    count = agrees.sum(0).clamp(min=1)
    return agrees.mul_(cores).sum(0) / count


def _ascending(x: Tensor) -> Tensor:
    """The order of the entries of each row; by numpy where it can, in a sixth of torch's time."""
    return x.argsort(-1) if x.device.type != "cpu" else torch.from_numpy(np.argsort(x.numpy(), -1))


def _drop(cores: Tensor, keep: Tensor, seed: int) -> Tensor:
    """(N, p, q): each entry is kept with its probability and divided by it, else zero."""
    draws = torch.rand(cores.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    draws = torch.empty_like(draws).index_copy_(0, _order(cores), draws).to(cores.device)
    return torch.where(draws < keep, cores / keep, 0.0)


def _order(cores: Tensor) -> Tensor:
    """The LoRAs in an order of their own: by energy, counted less along the axes, so that equal norms are told apart."""
    places = torch.arange(cores.shape[1])[:, None] + 2**0.5 * torch.arange(cores.shape[2])
    return ((cores.cpu() ** 2) / (1 + places)).sum((1, 2)).argsort(descending=True)
