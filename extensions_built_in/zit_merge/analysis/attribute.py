"""How strong each source is in a file of any tool, and what else is in it.

The plain answer is the least-squares strength of each source in the file. It is low where a part of the sum was cut off or where
factors were added in place of products, so three more questions are asked of the numbers, each with an exact answer where it
applies: is the file a truncated sum, do the strengths differ from module to module, are its factors sums of the sources' factors?
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

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
from .fit import Fit, Fitted, fitted
from .measure import Readers, outline, same_model, threads

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
    with Readers([lora, *sources]) as readers, threads() as pool:
        waiting = {m: pool.submit(_looked, m, readers, found.rounding) for m in modules}
        for module in progress.track(modules, "sources"):
            found.add(module, waiting.pop(module).result())
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


class _Looked(NamedTuple):
    """What was found in one module.

    Attributes:
        energies: Number -> squared norm; the file's change has the number 0, that of source i the number i + 1.
        area: How many numbers the weight has.
        plain: The file in its sources; None, as all that follows, where not both the file and a source change the module.
        cut: The same within the file's own columns and rows; None where its rank is too high for that.
        is_cut: The file is of a lower rank than its sources together.
        within: Its energy in the directions of the sources; None where a rank is too high for that.
        factors: Its up in those of the sources, its down in theirs; None where they can't add up.
    """

    energies: Mapping[int, float]
    area: int
    plain: Fitted | None = None
    cut: Fitted | None = None
    is_cut: bool = False
    within: float | None = None
    factors: tuple[Fitted, Fitted] | None = None


def _looked(module: str, readers: Readers, rounding: float) -> _Looked:
    """Looks at a module.

    Args:
        module: Its name.
        readers: Of the file and of its sources.
        rounding: What the rounding of the file's own numbers may leave.
    """
    deltas = readers.deltas(module)
    small, products = readers.condensed(module, deltas, exactly=True)
    found = _Looked(dict(zip(deltas, products.energies.tolist(), strict=True)), math.prod(next(iter(deltas.values())).shape))
    here = [i - 1 for i in deltas if i]
    if 0 not in deltas or not here:
        return found
    file, *others = deltas.values()
    plain = fitted(here, products.gram.roll((-1, -1), (0, 1)), found.area)
    found = found._replace(plain=plain, factors=_added_factors(here, [*others, file]))
    # a sum of the sources, known to rounding, lies in their directions
    within = plain.explained if plain.explained >= (1 - rounding**2) * found.energies[0] else None
    if within is not None and small and file.rank >= min(sum(d.rank for d in others), *file.shape) and small.is_full(0):
        return found._replace(cut=plain._replace(data=file.rank**2), within=within)  # and fills them: there is nothing beside it
    if not is_thin(file):
        return found
    short: Sequence[Delta] = small.deltas if small else [*deltas.values()]
    file, *others = short
    x = directions(file)
    cores = torch.cat([projected(x, others), x.sigma.diag()[None]]).flatten(1)
    if not all(map(is_thin, others)):
        within = None
    elif within is None:
        within = inside(x, [directions(d) for d in others])
    is_cut = len(x.sigma) < min(sum(d.rank for d in others), *file.shape)
    return found._replace(cut=fitted(here, cores @ cores.T, len(x.sigma) ** 2), is_cut=is_cut, within=within)


def _added_factors(here: Sequence[int], deltas: Sequence[Delta]) -> tuple[Fitted, Fitted] | None:
    """The factors of the last change in those of the others."""
    pairs = [pair for d in deltas if (pair := _two_factors(d)) is not None]
    if len(pairs) < len(deltas) or not _may_add_up(pairs):
        return None
    ups, downs = ([pair[side] for pair in pairs] for side in (0, 1))
    return fitted(here, factor_products(ups), ups[-1].numel()), fitted(here, factor_products(downs), downs[-1].numel())


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
        self._factors: tuple[Fit, Fit] | None = (Fit(count), Fit(count))
        self._within: float | None = 0.0
        self._is_cut = False

    def add(self, module: str, part: _Looked) -> None:
        """Adds a module."""
        for number, energy in part.energies.items():
            if number:
                self.owned[number - 1] += energy
        if 0 in part.energies:
            self.energies[module] = part.energies[0]
        if not part.plain:
            return
        for i in part.plain.here:
            self.by_chance[i] += part.energies[0] * part.energies[i + 1] / part.area
        self.plain.add(module, part.plain)
        self._is_cut |= part.is_cut
        self._within = None if self._within is None or part.within is None else self._within + part.within
        self.cut = self.cut if part.cut else None
        if self.cut and part.cut:
            self.cut.add(module, part.cut)
        self._factors = self._factors if part.factors else None
        for fit, factors in zip(self._factors or (), part.factors or (), strict=False):
            fit.add(module, factors)

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
