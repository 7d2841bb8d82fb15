"""SSR in the small world: `algebra.activations`, fed by the bench's own pictures.

`whole` drops the restriction to the LoRAs' spaces (RegMean, arXiv 2212.09849): with C_k = X_k X_k'

    merged = (sum_k delta_k C_k) (sum_k C_k + ridge tr / in I)^-1

Modules that see the time alone are summed, as the experiment does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from extensions_built_in.zit_merge.algebra.activations import effects, mixing, orthonormal
from extensions_built_in.zit_merge.algebra.factors import Factors, stack
from tests.benchmarks.small_world import loras
from tests.benchmarks.small_world.compare import Bench, what_of


def regmean(deltas: Sequence[Tensor], products: Sequence[Tensor], ridge: float) -> Tensor:
    """The dense merge of the formula above, (out, in) in float64.

    Args:
        deltas: Of each LoRA, (out, in).
        products: X_k X_k' of each LoRA, (in, in).
        ridge: Relative to the mean of the diagonal of their sum.
    """
    wanted = sum(delta.double() @ product.double() for delta, product in zip(deltas, products, strict=True))
    gram = torch.stack([product.double() for product in products]).sum(0)
    ridged = gram + ridge * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(ridged, torch.as_tensor(wanted).T).T


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
        ridge: See `mixing`.
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
        return f"{'RegMean' if self.whole else 'SSR'} ({self.pictures} pictures{'' if self.worn else ', not worn'})"

    def factors(self, paths: Sequence[Path]) -> loras.Factors:
        """What the merge adds to the model.

        Args:
            paths: LoRAs.
        """
        given, products = self._seen(paths)
        found = {}
        for module, parts in given.items():
            whole, seen = stack(parts), products.get(module)
            if seen is None:
                found[module] = whole.up.float(), whole.down.float()
            elif self.whole:
                merged = regmean([part.up @ part.down for part in parts], seen, self.ridge)
                found[module] = merged.float(), torch.eye(whole.down.shape[1])
            else:
                mixed = mixing(seen, [part.rank for part in parts], self.ridge)
                found[module] = (whole.up @ mixed).float(), whole.down.float()
        return found

    def strengths(self, paths: Sequence[Path]) -> Tensor:
        """(N, N), at [j, k] how strong LoRA j is in the merge on the activations of LoRA k: see `effects`.

        Args:
            paths: LoRAs.
        """
        given, products = self._seen(paths)
        sums = torch.zeros(2, len(paths), len(paths), dtype=torch.float64)
        for module, seen in products.items():
            parts = given[module]
            ranks = [part.rank for part in parts]
            sums += effects(stack(parts).up, mixing(seen, ranks, self.ridge), seen, ranks)
        return sums[0] / sums[1]

    def _seen(self, paths: Sequence[Path]) -> tuple[dict[str, list[Factors]], dict[str, list[Tensor]]]:
        """The LoRAs' changes with orthonormal rows, and the products of activations where a module sees more than the time."""
        given = [loras.load(path) for path in paths]
        parts = {module: [orthonormal(Factors(*one[module])) for one in given] for module in given[0]}
        asked = {module: some for module, some in parts.items() if "adaLN" not in module}
        sides = {m: torch.eye(some[0].shape[1]) if self.whole else stack(some).down.float() for m, some in asked.items()}
        calm, seen = replace(self.bench, count=self.pictures, seed=self.bench.seed + 1000), []
        for path, one in zip(paths, given, strict=True):
            with loras.worn(self.bench.model, (one, float(self.worn))), gathered(self.bench.model, sides) as products:
                calm.pictures(calm.scenes([what_of(path)]))
            seen.append(products)
        return parts, {module: [one[module] for one in seen] for module in asked}
