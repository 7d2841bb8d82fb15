"""How strong each source is in a file of any tool, and what else is in it.

The plain answer is the least-squares strength of each source in the file. It is low where a part of the sum was cut off or where
factors were added in place of products, so three more questions are asked of the numbers, each with an exact answer where it
applies: is the file a truncated sum, do the strengths differ from module to module, are its factors sums of the sources' factors?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..algebra.delta import Delta, Kron
from ..algebra.factors import Factors, wide
from ..algebra.least_squares import cosines, groups
from ..algebra.overlap import directions, factor_products, inside, is_thin, projected
from ..algebra.precision import full_precision
from ..formats.metadata import read_recipe
from ..formats.reader import LoraFile
from ..progress import SILENT, Progress
from .attribution import AddedFactors, Attribution, BeforeCut, verdict
from .fit import Fit
from .measure import ModuleProducts, Readers, outline, same_model

ROUNDING = 0.01  # |rest| / |file| that bfloat16 explains; two to three times what it leaves (measured)
INSIDE = 0.99  # share of a file's energy in the spaces of its sources from which on nothing else need be in it


@full_precision()
def attribute(lora: LoraFile, sources: Sequence[LoraFile], progress: Progress = SILENT) -> Attribution:
    """Looks for sources in a file, in one pass over their modules.

    Args:
        lora: The file, of any tool.
        sources: What may have gone into it.
        progress: Shows the modules, and may stop.

    Raises:
        ZitMergeError: The files are not of one model, or can't be read.
    """
    modules, found = same_model([lora, *sources]), _Evidence(len(sources), _rounding(lora))
    with Readers([lora, *sources]) as readers:
        for module in progress.track(modules, "sources"):
            deltas = readers.deltas(module)
            found.add(module, deltas, *readers.condensed(module, deltas))
    plain, kind, energy = found.plain, found.kind(), sum(found.energies.values())
    fit = found.cut if found.cut and kind.startswith("truncated") else plain
    unknown = [m for m in found.energies if m not in plain.strengths]
    attribution = Attribution(
        file=outline(lora, energy**0.5),
        sources=[outline(s, n) for s, n in zip(sources, found.owned.sqrt().tolist(), strict=True)],
        kind=kind,
        strengths=list(plain.whole),
        rest=plain.rest,
        explained=(1 - plain.rest**2) * plain.energy / energy if energy else 0.0,
        modules=fit.told(),
        untold=fit.untold,
        rest_by_module=plain.rest_by_module,
        shared=found.shared(plain.products),
        chance=found.shared(found.by_chance.sqrt()),
        cosines=cosines(plain.gram).tolist(),
        alike=groups(plain.gram),
        before_cut=found.before_cut(),
        factors=found.added_factors(),
        inside=found.inside if kind in ("cross terms", "something else") else None,
        unknown=unknown,
        unknown_energy=sum(found.energies[m] for m in unknown) / energy if energy else 0.0,
        missing=[m for m in modules if m not in lora],
        recipe=read_recipe(lora.metadata) is not None,
    )
    return replace(attribution, verdict=[*verdict(attribution, found.rounding)])


def _rounding(lora: LoraFile) -> float:
    """What the rounding of the file's own numbers may leave."""
    return max(ROUNDING, *(torch.finfo(c.dtype).eps for changes in lora.changes.values() for c in changes))


class _Evidence:
    """What one pass over the modules finds.

    Args:
        count: How many sources.
        rounding: What the rounding of the file's own numbers may leave.

    Attributes:
        plain: The file in its sources.
        cut: The same within the file's own columns and rows; None where its rank is too high for that.
        energies: Module -> squared norm of the file's change.
        owned: (count,) squared norm of each source.
    """

    def __init__(self, count: int, rounding: float):
        self.rounding = rounding
        self.plain = Fit(count)
        self.cut: Fit | None = Fit(count)
        self.energies: dict[str, float] = {}
        self.owned = torch.zeros(count, dtype=torch.float64)
        self.by_chance = torch.zeros(count, dtype=torch.float64)  # mean square of <file, source> in random directions
        self._factors: tuple[Fit, Fit] | None = (Fit(count), Fit(count))  # its up in those of the sources, its down in theirs
        self._within: float | None = 0.0  # its energy in the directions of the sources
        self._is_cut = False  # it is of a lower rank than its sources together

    def add(self, module: str, deltas: Mapping[int, Delta], small: Mapping[int, Delta], products: ModuleProducts) -> None:
        """Adds a module.

        Args:
            module: Its name.
            deltas: The changes; the file's has the number 0, that of source i the number i + 1.
            small: The same, condensed.
            products: Of them.
        """
        energies = dict(zip(deltas, products.energies.tolist(), strict=True))
        here = [i - 1 for i in deltas if i]
        for i in here:
            self.owned[i] += energies[i + 1]
        if 0 not in deltas:
            return
        self.energies[module] = energies[0]
        if not here:
            return
        file, *others = deltas.values()
        for i in here:
            self.by_chance[i] += energies[0] * energies[i + 1] / (file.shape[0] * file.shape[1])
        explained = self.plain.add(module, here, products.gram.roll((-1, -1), (0, 1)), file.shape[0] * file.shape[1])
        is_explained = explained >= (1 - self.rounding**2) * energies[0]
        condensed, *rest = small.values()
        self._add_directions(module, here, condensed, rest, explained if is_explained else None)
        self._add_factors(module, here, [*others, file])

    def _add_directions(
        self, module: str, here: Sequence[int], file: Delta, others: Sequence[Delta], explained: float | None
    ) -> None:
        """What of the sources is in the directions of the file, and what of the file in theirs.

        Args:
            module: Its name.
            here: The sources that change it.
            file: The file's change.
            others: The sources' changes.
            explained: The file's energy where a sum of the sources explains it, so that it lies in their directions.
        """
        if not is_thin(file):
            self.cut, self._within = None, None
        if self.cut is None:
            return
        x = directions(file)
        self._is_cut |= len(x.sigma) < min(sum(d.rank for d in others), *file.shape)
        cores = torch.cat([projected(x, others), x.sigma.diag()[None]]).flatten(1)
        self.cut.add(module, here, cores @ cores.T, len(x.sigma) ** 2)
        if not all(map(is_thin, others)):
            self._within = None
        if self._within is not None:
            self._within += inside(x, [directions(d) for d in others]) if explained is None else explained

    def _add_factors(self, module: str, here: Sequence[int], deltas: Sequence[Delta]) -> None:
        pairs = [pair for d in deltas if (pair := _two_factors(d)) is not None]
        if len(pairs) < len(deltas) or not _may_add_up(pairs):
            self._factors = None
        for side, fit in enumerate(self._factors or ()):
            factors = [pair[side] for pair in pairs]
            fit.add(module, here, factor_products(factors), factors[-1].numel())

    def shared(self, products: Tensor) -> list[float | None]:
        """Inner products with the file as cosines; None where a length is zero."""
        lengths = self.owned.sqrt() * sum(self.energies.values()) ** 0.5
        return [p / n if n else None for p, n in zip(products.tolist(), lengths.tolist(), strict=True)]

    @property
    def inside(self) -> float | None:
        """Share of the file's energy within the columns and rows of its sources."""
        return None if self._within is None else self._within / self.plain.energy

    def before_cut(self) -> BeforeCut | None:
        """The sum that the file may be cut from."""
        if not self.cut or not self._is_cut:
            return None
        strengths = self.cut.whole
        x = torch.tensor([s or 0.0 for s in strengths], dtype=torch.float64)
        whole = float(x @ self.plain.gram @ x)
        kept = min(self.plain.energy / whole, 1.0) if whole > 0 else 0.0
        return BeforeCut(list(strengths), self.cut.rest, self.cut.rest_by_module, kept)

    def added_factors(self) -> AddedFactors | None:
        """The factors that the file's may be sums of."""
        if not self._factors or not self.plain.strengths:
            return None
        up, down = self._factors
        return AddedFactors(list(up.whole), list(down.whole), max(up.rest_by_module, down.rest_by_module))

    def kind(self) -> str:
        """What the file is, as `Attribution.kind` lists it."""
        plain, fit, cut, factors = self.plain, self.cut, self.before_cut(), self.added_factors()
        if not plain.energy:
            return "nothing"
        if plain.rest <= self.rounding:
            return "strengths"
        if factors and factors.rest <= self.rounding:  # before truncation, which added factors of flat spectra look like too
            return "factors"
        if fit and cut and cut.rest <= self.rounding and groups(fit.gram) == groups(plain.gram):
            return "truncated"
        if plain.rest_by_module <= self.rounding:
            return "by module"
        if fit and cut and fit.is_decided and cut.rest_by_module <= self.rounding:
            return "truncated by module"
        return "cross terms" if (self.inside or 0.0) >= INSIDE else "something else"


def _two_factors(x: Delta) -> tuple[Tensor, Tensor] | None:
    """What a tool that adds key by key adds: up and down, or the two matrices of a LoKr."""
    if isinstance(x, Factors):
        return x.up, x.down.T
    if isinstance(x, Kron):
        return wide(x.left.up) @ wide(x.left.down), wide(x.right.up) @ wide(x.right.down)
    return None


def _may_add_up(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether the last one may be the sum of the others, zeros appended to the shorter ones."""
    heights = {tuple(t.shape[0] for t in pair) for pair in pairs}
    return len(heights) == 1 and all(pairs[-1][i].shape[1] == max(p[i].shape[1] for p in pairs[:-1]) for i in (0, 1))
