"""SSR (arXiv 2606.10617) in the small world: a merge that does on each LoRA's own activations what that LoRA does there.

With delta_k = B_k A_k (alpha and strength in B_k), A = [A_1; ...; A_n] (R, in), B = [B_1 ... B_n] (out, R), X_k the inputs of a
module while the model wears LoRA k and draws what LoRA k was trained for, Z_k = A X_k:

    merged = B M A,   M = argmin sum_k |M Z_k - E_k Z_k|^2 + ridge tr(G) / R |M|^2 = Q (G + ridge tr(G) / R I)^-1
    G = sum_k Z_k Z_k',   Q = sum_k E_k Z_k Z_k',   E_k the identity on the rows of LoRA k, else 0

Only Z_k Z_k', an (R, R) matrix for each LoRA, is kept of the activations. `whole` drops the restriction to the LoRAs' spaces
(RegMean, arXiv 2212.09849): merged = (sum_k delta_k C_k) (sum_k C_k + ridge tr / in I)^-1 with C_k = X_k X_k'. All in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tests.benchmarks.small_world import loras
from tests.benchmarks.small_world.compare import Bench, what_of


def solve(products: Sequence[Tensor], sizes: Sequence[int], ridge: float) -> Tensor:
    """M of the formula above, (R, R) in float64.

    Args:
        products: Z_k Z_k' of each LoRA, (R, R).
        sizes: The rank of each; they add up to R.
        ridge: Relative to the mean of G's diagonal.
    """
    gram = torch.stack([product.double() for product in products]).sum(0)
    wanted = torch.cat([product.double()[rows] for product, rows in zip(products, _slices(sizes), strict=True)])
    return torch.linalg.solve(_ridged(gram, ridge), wanted.T).T


def regmean(deltas: Sequence[Tensor], products: Sequence[Tensor], ridge: float) -> Tensor:
    """The dense merge of the formula above, (out, in) in float64.

    Args:
        deltas: Of each LoRA, (out, in).
        products: X_k X_k' of each LoRA, (in, in).
        ridge: Relative to the mean of the diagonal of their sum.
    """
    wanted = sum(delta.double() @ product.double() for delta, product in zip(deltas, products, strict=True))
    gram = torch.stack([product.double() for product in products]).sum(0)
    return torch.linalg.solve(_ridged(gram, ridge), torch.as_tensor(wanted).T).T


def _ridged(gram: Tensor, ridge: float) -> Tensor:
    return gram + ridge * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)


def _slices(sizes: Sequence[int]) -> Iterator[slice]:
    first = 0
    for size in sizes:
        yield slice(first, first + size)
        first += size


@contextmanager
def gathered(model: object, sides: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Sums of (S x) (S x)' over the inputs x of modules while the model runs.

    Args:
        model: The transformer.
        sides: Module -> S, (rows, in).

    Yields:
        Module -> (rows, rows), complete when the context ends.
    """
    found = {name: torch.zeros(len(side), len(side), dtype=torch.float64) for name, side in sides.items()}
    hooks = []
    for name, linear in loras.targets(model).items():
        if name in sides:

            def add(_, given, name=name):
                seen = (given[0].detach().flatten(0, -2) @ sides[name].T).double()
                found[name] += seen.T @ seen

            hooks.append(linear.register_forward_pre_hook(add))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Ssr:
    """The merge, to be compared as `Merged` is.

    Attributes:
        bench: Whose model is asked. Its own scenes and noise are not used for the activations.
        pictures: Drawn for each LoRA.
        ridge: See `solve`.
        whole: Without the restriction to the LoRAs' spaces.
        worn: Whether the model wears a LoRA while its activations are gathered.
    """

    bench: Bench
    pictures: int = 8
    ridge: float = 1e-3
    whole: bool = False
    worn: bool = True

    @property
    def name(self) -> str:
        """For tables."""
        return f"{'regmean' if self.whole else 'ssr'} ({self.pictures} pictures{'' if self.worn else ', not worn'})"

    def factors(self, paths: Sequence[Path]) -> loras.Factors:
        """What the merge adds to the model.

        Args:
            paths: LoRAs.
        """
        given = [loras.load(path) for path in paths]
        downs = {module: torch.cat([one[module][1] for one in given]) for module in given[0]}
        sides = {module: torch.eye(down.shape[1]) for module, down in downs.items()} if self.whole else downs
        calm = replace(self.bench, count=self.pictures, seed=self.bench.seed + 1000)
        seen = []
        for path, one in zip(paths, given, strict=True):
            with loras.worn(self.bench.model, (one, float(self.worn))), gathered(self.bench.model, sides) as products:
                calm.pictures(calm.scenes([what_of(path)]))
            seen.append(products)
        found = {}
        for module, down in downs.items():
            pairs, products = [one[module] for one in given], [one[module] for one in seen]
            if self.whole:
                found[module] = regmean([up @ own for up, own in pairs], products, self.ridge).float(), torch.eye(down.shape[1])
            else:
                mixed = solve(products, [len(own) for _, own in pairs], self.ridge)
                found[module] = (torch.cat([up for up, _ in pairs], 1).double() @ mixed).float(), down
        return found

    def agreement(self, paths: Sequence[Path]) -> float:
        """How much the activations of a set of LoRAs are alike: mean over modules of cos(C_1, C_2), 0 to 1, of its first two.

        Args:
            paths: LoRAs.
        """
        given = [loras.load(path) for path in paths[:2]]
        sides = {module: torch.eye(pair[1].shape[1]) for module, pair in given[0].items()}
        calm, seen = replace(self.bench, count=self.pictures, seed=self.bench.seed + 1000), []
        for path, one in zip(paths, given, strict=False):
            with loras.worn(self.bench.model, (one, float(self.worn))), gathered(self.bench.model, sides) as products:
                calm.pictures(calm.scenes([what_of(path)]))
            seen.append(products)
        cosines = [float((seen[0][m] * seen[1][m]).sum() / (seen[0][m].norm() * seen[1][m].norm())) for m in sides]
        return sum(cosines) / len(cosines)
