"""The merge methods by their published definitions on dense (out, in) float64 matrices: slow, obvious, nothing of the package.

`deltas` are the multiplied-out changes of one weight with their ratios in them, unless `ratios` are an argument.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

RANK = 1e-7  # singular values below this share of the largest one are zero: no test draws between 1e-6 and 1e-8


# --- operands ------------------------------------------------------------------------------------------------------------------


def rotation(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix (size, size)."""
    random = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=random, dtype=torch.float64)).Q


def gauges(x, seed: int = 0) -> Iterator:
    """The same delta in other factors, (up Q, inv(Q) down) with several Q. `x` is a named pair, up (out, r) and down (r, in)."""
    up, down = x.up.double(), x.down.double()
    rank = down.shape[0]
    turn, other = rotation(rank, seed), rotation(rank, seed + 1)
    spread = torch.logspace(-1.5, 1.5, rank, dtype=torch.float64)
    for q in (turn, turn * 1e6, torch.diag(spread) @ turn, other * spread @ turn):
        yield x._replace(up=up @ q, down=torch.linalg.inv(q) @ down)


# --- linear in the deltas ------------------------------------------------------------------------------------------------------


def plain_sum(deltas: Sequence[Tensor]) -> Tensor:
    """Task arithmetic."""
    return torch.stack(list(deltas)).sum(0)


def average(deltas: Sequence[Tensor], ratios: Sequence[float]) -> Tensor:
    """The weighted mean."""
    return plain_sum([r * d for r, d in zip(ratios, deltas, strict=True)]) / sum(ratios)


def normalize(deltas: Sequence[Tensor]) -> Tensor:
    """The sum at the norm of the largest delta."""
    merged = plain_sum(deltas)
    return merged * max(float(d.norm()) for d in deltas) / merged.norm()


def angle(x: Tensor, y: Tensor) -> float:
    """Between two matrices as vectors; exact for small angles and near pi, unlike the arc cosine (Kahan)."""
    u, v = x / x.norm(), y / y.norm()
    return 2 * math.atan2(float((u - v).norm()), float((u + v).norm()))


def slerp(x: Tensor, y: Tensor, t: float) -> Tensor:
    """Shoemake 1985."""
    a = angle(x, y)
    return (math.sin((1 - t) * a) * x + math.sin(t * a) * y) / math.sin(a)


def nuslerp(x: Tensor, y: Tensor, t: float) -> Tensor:
    """Directions on the sphere, norms on the line."""
    return slerp(x / x.norm(), y / y.norm(), t) * ((1 - t) * x.norm() + t * y.norm())


def log(m: Tensor, u: Tensor) -> Tensor:
    """The tangent at the unit m that leads to the unit u, its length the angle."""
    across = u - (m * u).sum() * m
    length = float(across.norm())
    return across if length == 0 else across * angle(m, u) / length


def spread(m: Tensor, units: Sequence[Tensor], shares: Sequence[float]) -> float:
    """The weighted squared geodesic distance of a direction, which the Karcher mean minimises."""
    return sum(w * angle(m, u) ** 2 for w, u in zip(shares, units, strict=True))


def karcher(deltas: Sequence[Tensor], ratios: Sequence[float]) -> Tensor:
    """The minimum of `spread` found by a quasi-Newton search in the whole space, at the mean norm."""
    shares = [r / sum(ratios) for r in ratios]
    units = torch.stack([(d / d.norm()).flatten() for d in deltas])
    point = average(list(units), shares).requires_grad_()
    search = torch.optim.LBFGS([point], max_iter=500, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        m = point / point.norm()
        angles = 2 * torch.atan2((m - units).norm(dim=1), (m + units).norm(dim=1))
        value = (torch.tensor(shares, dtype=torch.float64) * angles**2).sum()
        value.backward()
        return value

    search.step(loss)
    mean = (point / point.norm()).detach().view_as(deltas[0])
    return mean * sum(w * float(d.norm()) for w, d in zip(shares, deltas, strict=True))


# --- entries in the core space -------------------------------------------------------------------------------------------------


def alive(sigma: Tensor) -> int:
    """The numerical rank from singular values, the largest first."""
    return int((sigma > RANK * sigma[0]).sum())


def axes(deltas: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(out, p), (in, q): of the deltas, each at norm 1, the left singular vectors side by side, the right ones on top of each
    other."""
    units = [d / d.norm() for d in deltas if float(d.norm())] or list(deltas)
    left, sigma, _ = torch.linalg.svd(torch.cat(units, 1), full_matrices=False)
    _, tau, right = torch.linalg.svd(torch.cat(units, 0), full_matrices=False)
    return left[:, : alive(sigma)], right[: alive(tau)].T


def cores(deltas: Sequence[Tensor]) -> list[Tensor]:
    """The deltas in those axes."""
    left, right = axes(deltas)
    return [left.T @ d @ right for d in deltas]


def through_cores(deltas: Sequence[Tensor], rule: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """A rule from cores to one core, back among the deltas."""
    left, right = axes(deltas)
    return left @ rule(cores(deltas)) @ right.T


def trim(core: Tensor, density: float) -> Tensor:
    """The largest entries, one at least."""
    sizes = sorted(core.abs().flatten().tolist(), reverse=True)
    least = sizes[max(1, int(density * len(sizes))) - 1]
    return torch.where(core.abs() >= least, core, 0.0)


def elect(parts: Sequence[Tensor]) -> Tensor:
    """Entry by entry: the sign with more weight wins, and the mean of the entries of that sign remains."""
    merged = torch.zeros_like(parts[0])
    for i, j in itertools.product(*map(range, merged.shape)):
        entries = [float(part[i, j]) for part in parts if abs(part[i, j]) > 1e-9 * part.norm()]  # less is as good as nothing
        plus, minus = [e for e in entries if e > 0], [e for e in entries if e < 0]
        total = sum(plus) + sum(minus)  # nobody wins a draw
        winners = [] if abs(total) <= 1e-9 * max(part.norm() for part in parts) else plus if total > 0 else minus
        merged[i, j] = sum(winners) / len(winners) if winners else 0.0
    return merged


def ties(deltas: Sequence[Tensor], density: float) -> Tensor:
    """TIES-Merging (arXiv 2306.01708) of the cores."""
    return through_cores(deltas, lambda found: elect([trim(core, density) for core in found]))


def dropped(core: Tensor, keep: Tensor, draw: Tensor) -> Tensor:
    """What the draws leave of a core, each entry divided by its probability."""
    return torch.where(draw < keep, core / keep, 0.0)


def dare_linear(deltas: Sequence[Tensor], density: float, draws: Sequence[Tensor]) -> Tensor:
    """DARE (arXiv 2311.03099) of the cores, summed. `draws` are uniform numbers, (p, q) for each delta."""
    keep = torch.tensor(density, dtype=torch.float64)
    return through_cores(deltas, lambda found: plain_sum([dropped(c, keep, d) for c, d in zip(found, draws, strict=True)]))


def dare_ties(deltas: Sequence[Tensor], density: float, draws: Sequence[Tensor]) -> Tensor:
    """DARE of the cores with the election of TIES."""
    keep = torch.tensor(density, dtype=torch.float64)
    return through_cores(deltas, lambda found: elect([dropped(c, keep, d) for c, d in zip(found, draws, strict=True)]))


def keeps(core: Tensor, density: float, epsilon: float) -> Tensor:
    """DELLA's probabilities (arXiv 2406.11617): in a row from density - epsilon / 2 for the smallest entry, in equal steps."""
    found = torch.full_like(core, density)
    count = core.shape[1]
    for row in range(core.shape[0] if count > 1 else 0):
        for place, column in enumerate(np.argsort(core[row].abs().numpy())):
            found[row, column] = density - epsilon / 2 + epsilon * place / (count - 1)
    return found


def della(deltas: Sequence[Tensor], density: float, epsilon: float, draws: Sequence[Tensor]) -> Tensor:
    """DELLA-Merging of the cores."""

    def rule(found: list[Tensor]) -> Tensor:
        return elect([dropped(c, keeps(c, density, epsilon), d) for c, d in zip(found, draws, strict=True)])

    return through_cores(deltas, rule)


# --- directions ----------------------------------------------------------------------------------------------------------------


def triplets(delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(out, r), (r,), (in, r): the singular vectors of what is not zero."""
    left, sigma, right = torch.linalg.svd(delta, full_matrices=False)
    rank = alive(sigma)
    return left[:, :rank], sigma[:rank], right[:rank].T


def polar(x: Tensor) -> Tensor:
    """The partial isometry U V' of X = U S V'."""
    left, _, right = triplets(x)
    return left @ right.T


def tsv(deltas: Sequence[Tensor]) -> Tensor:
    """TSV-Merge (arXiv 2412.00081) with all singular vectors."""
    left, sigma, right = zip(*map(triplets, deltas), strict=True)
    return polar(torch.cat(left, 1)) @ torch.diag(torch.cat(sigma)) @ polar(torch.cat(right, 1)).T


def gives_way(x: Tensor, other: Tensor, mu: float, components: int = 0) -> Tensor:
    """x (I - mu / (1 + mu) V V') with the leading right singular vectors of `other`, all of them at 0."""
    right = triplets(other)[2][:, : components or None]
    return x @ (torch.eye(x.shape[1], dtype=torch.float64) - mu / (1 + mu) * right @ right.T)


def shared_once(deltas: Sequence[Tensor], tau: float) -> Tensor:
    """Directions that 1 + tau (N - 1) deltas hold count once: merging notes, 4.4, each part weighed by its size."""
    deltas = [d for d in deltas if float(d.norm())] or list(deltas)
    left = common([triplets(d)[0] for d in deltas], tau)
    right = common([triplets(d)[2] for d in deltas], tau)
    shared = [left @ left.T @ d @ right @ right.T for d in deltas]
    total = sum(float(s.norm()) for s in shared) or 1.0
    return plain_sum(deltas) - plain_sum(shared) + plain_sum([float(s.norm()) / total * s for s in shared])


def common(bases: Sequence[Tensor], tau: float) -> Tensor:
    """(n, k): the directions that so many of the subspaces hold, from the dense projectors."""
    values, vectors = torch.linalg.eigh(plain_sum([b @ b.T for b in bases]))
    return vectors[:, values > 1 + tau * (len(bases) - 1)]
