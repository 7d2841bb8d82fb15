"""One pass over the modules of LoRA files: everything that a report, a plot or a page of them shows is measured here.

Every change is read once, and decomposed at most once: its singular vectors tell the directions that several files have in
common, its singular values are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..algebra.core import FAINT, Condensed, condensed
from ..algebra.delta import Delta, Kron
from ..algebra.factors import Factors
from ..algebra.least_squares import cosines
from ..algebra.overlap import LEADING, Overlap, Triplets, directions, is_thin, overlap
from ..algebra.precision import full_precision
from ..algebra.products import energy, gram
from ..algebra.truncate import singular_values
from ..errors import ZitMergeError
from ..formats.reader import LoraFile, TensorReader
from ..model.zimage import MODULES
from ..progress import SILENT, Progress
from ..wording import span

TAU = 0.5  # default of shared_once
DRAWN = 512  # singular values of a change at most
DRAWN_WIDE = 32  # of one that is neither thin nor a Kron: there they take seconds


class Readers(ExitStack):
    """Several LoRA files that are read module by module."""

    def __init__(self, loras: Sequence[LoraFile]):
        super().__init__()
        self._loras, self._tensors = loras, [self.enter_context(TensorReader(lora)) for lora in loras]

    def deltas(self, module: str) -> dict[int, Delta]:
        """Position of a file -> its change of the module, alpha / rank folded in as far as it is known.

        Raises:
            ZitMergeError: A tensor is not finite.
        """
        found = {}
        for i, lora in enumerate(self._loras):
            if module in lora:
                scale, delta = self._tensors[i].delta(module)
                found[i] = delta.times(scale)
        return found

    def condensed(
        self, module: str, deltas: Mapping[int, Delta], exactly: bool = False
    ) -> tuple[Condensed | None, ModuleProducts]:
        """Thin changes in a space as small as they are, None where one is not thin; and their inner products, in float64.

        Args:
            module: Its name.
            deltas: From `deltas`, at least one.
            exactly: As `core.condensed` has it.

        Raises:
            ZitMergeError: One is too large for a number.
        """
        thin = [d for d in deltas.values() if isinstance(d, Factors) and is_thin(d)]
        small = condensed(thin, exactly) if len(thin) == len(deltas) > 1 else None
        if len(deltas) == 1:
            found = torch.tensor([[energy(d) for d in deltas.values()]], dtype=torch.float64)
        else:
            found = small.inner if small else gram(list(deltas.values()))
        for i, size in zip(deltas, found.diagonal().tolist(), strict=True):
            if not math.isfinite(size):
                raise ZitMergeError(
                    f"{self._loras[i].path}: {module}: the norm of its change is too large for a number, the LoRA is broken: "
                    "use an earlier checkpoint of it"
                )
        return small, ModuleProducts(tuple(deltas), found.diagonal().clamp(min=0), found)


@dataclass(frozen=True)
class ModuleProducts:
    """Inner products of the changes that several LoRAs make in one module, alpha / rank folded in.

    Attributes:
        files: The n LoRAs that change it, by their positions.
        energies: (n,) squared Frobenius norms.
        pairs: (n, n) inner products; None where only the norms were taken.
    """

    files: tuple[int, ...]
    energies: Tensor
    pairs: Tensor | None

    @property
    def gram(self) -> Tensor:
        """(n, n): `pairs`, where more than the norms were taken."""
        assert self.pairs is not None, "nobody asks for products that were not taken"
        return self.pairs

    def energy(self, file: int) -> float:
        """Of one of the files."""
        return float(self.energies[self.files.index(file)])

    def cosine(self, file: int, other: int) -> float | None:
        """Of the changes of two files, 0 beside a zero; None where one of the two does not change the module.

        Args:
            file: The first.
            other: The second.
        """
        if file not in self.files or other not in self.files:
            return None
        at = [self.files.index(file), self.files.index(other)]
        return float(cosines(self.gram[at][:, at])[0, 1])


class Spectrum(NamedTuple):
    """Singular values of one change.

    Attributes:
        values: (p,), the largest first.
        is_cut: Whether there are more.
    """

    values: Tensor
    is_cut: bool


@dataclass(frozen=True)
class Measurement:
    """What one pass over several files found.

    Attributes:
        loras: The files. All that follows refers to them by their position.
        modules: Module -> inner products of the changes, in the model's order; without `broken`.
        common: Module that at least two of the files change -> the directions that these changes have in common.
        leading: Modules among these in which a change has so high a rank that only its leading directions were compared.
        spectra: Module -> singular values, for each of as many files as were asked for.
        broken: Module -> why it can't be read; of a single file only, several have to be whole.
    """

    loras: tuple[LoraFile, ...]
    modules: Mapping[str, ModuleProducts]
    common: Mapping[str, Overlap]
    leading: Sequence[str]
    spectra: Sequence[Mapping[str, Spectrum]]
    broken: Mapping[str, str]

    def gram(self) -> Tensor:
        """(N, N) inner products of the whole files."""
        total = torch.zeros(len(self.loras), len(self.loras), dtype=torch.float64)
        for found in self.modules.values():
            at = torch.tensor(found.files)
            total[at[:, None], at] += found.gram
        return total

    def common_energy(self) -> Tensor:
        """(N, 3) energy of each file in directions that several have in common: in columns, in rows, in both."""
        energy = torch.zeros(len(self.loras), 3, dtype=torch.float64)
        for module, found in self.common.items():
            energy[list(self.modules[module].files)] += found.energy[:, 1:]
        return energy

    def norms(self, number: int) -> dict[str, float | None]:
        """Module -> Frobenius norm of what one file changes, in the model's order; None where it is broken."""
        found = {m: p.energy(number) ** 0.5 for m, p in self.modules.items() if number in p.files}
        return {m: found.get(m) for m in self.loras[number]}


def outline(lora: LoraFile, norm: float) -> dict[str, Any]:
    """What a report begins with, for JSON.

    Args:
        lora: The file.
        norm: Of its whole change.
    """
    return {
        "file": lora.path.name,
        "modules": len(lora),
        "algorithms": lora.algorithms,
        "ranks": span(lora.ranks.values()),
        "questions": list(lora.questions),
        "unmatched": len(lora.unmatched),
        "norm": norm,
    }


def same_model(loras: Sequence[LoraFile]) -> list[str]:
    """The modules that any of the files changes, in the model's order.

    Raises:
        ZitMergeError: Two files change a module as matrices of different shapes.
    """
    shapes: dict[str, tuple[tuple[int, int], LoraFile]] = {}
    for lora in loras:
        for module, (out, into) in lora.shapes.items():
            (known_out, known_in), first = shapes.setdefault(module, ((out, into), lora))
            if (known_out, known_in) != (out, into):
                raise ZitMergeError(
                    f"{first.path} changes {module} as a {known_out} x {known_in} matrix and {lora.path} as {out} x {into}: "
                    "they are of two models and have nothing to compare"
                )
    return [module for module in MODULES if module in shapes]


class _Found(NamedTuple):
    """What was found in one module.

    Attributes:
        products: Inner products of the changes.
        common: The directions that they have in common; None where there are not two.
        is_leading: Only leading directions were compared.
        spectra: Position of a file -> singular values.
    """

    products: ModuleProducts
    common: Overlap | None
    is_leading: bool
    spectra: Mapping[int, Spectrum]


@full_precision()
def measure(loras: Sequence[LoraFile], spectra: int = 0, progress: Progress = SILENT) -> Measurement:
    """Measures files in one pass over their modules, in as many threads as torch has, a module in each.

    Args:
        loras: One or more files.
        spectra: Of how many files, from the first, the singular values are wanted.
        progress: Shows the modules, and may stop the pass.

    Raises:
        ZitMergeError: The files are not of one model, can't be read, or one of several holds NaN or infinity.
    """
    found, broken = dict[str, _Found](), dict[str, str]()
    shapes = {module: shape for lora in loras for module, shape in lora.shapes.items()}
    modules, label = same_model(loras), "compare" if len(loras) > 1 else loras[0].path.name
    with Readers(loras) as readers, threads() as pool:
        waiting = {m: pool.submit(_measured, m, readers, spectra, shapes[m]) for m in modules}
        for module in progress.track(modules, label):
            try:
                found[module] = waiting.pop(module).result()
            except ZitMergeError as e:  # the rest of the file can be shown, but not compared with others
                if len(loras) > 1:
                    raise
                broken[module] = str(e)
    values = [{m: f.spectra[i] for m, f in found.items() if i in f.spectra} for i in range(len(loras[:spectra]))]
    common = {m: f.common for m, f in found.items() if f.common}
    leading = [m for m, f in found.items() if f.is_leading]
    return Measurement(tuple(loras), {m: f.products for m, f in found.items()}, common, leading, values, broken)


@contextmanager
def threads() -> Iterator[ThreadPoolExecutor]:
    """Torch's threads, each for modules of its own: threads that share one small product mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(max_workers=before)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _measured(module: str, readers: Readers, spectra: int, shape: tuple[int, int]) -> _Found:
    deltas: Mapping[int, Delta] = readers.deltas(module)
    small, found = readers.condensed(module, deltas)
    deltas = dict(zip(deltas, small.deltas, strict=True)) if small else deltas
    parts = _decomposed(deltas, spectra) if (found.energies > 0).sum() > 1 else {}
    common = overlap([_compared(deltas[i], part) for i, part in parts.items()], TAU, shape) if parts else None
    is_leading = bool(parts) and not all(map(is_thin, deltas.values()))
    return _Found(found, common, is_leading, {i: _spectrum(deltas[i], parts.get(i)) for i in deltas.keys() & range(spectra)})


def _decomposed(deltas: Mapping[int, Delta], spectra: int) -> dict[int, Triplets]:
    """The directions of each change, as many as are compared, and as are drawn."""
    return {i: directions(d, DRAWN if i < spectra and isinstance(d, Kron) else None) for i, d in deltas.items()}


def _compared(delta: Delta, found: Triplets) -> Triplets:
    """Of a change of high rank the leading directions."""
    return found if is_thin(delta) else Triplets(found.left[:, :LEADING], found.sigma[:LEADING], found.right[:LEADING])


def _spectrum(delta: Delta, known: Triplets | None) -> Spectrum:
    """The singular values that are drawn, without those of rounding."""
    most = DRAWN if isinstance(delta, Kron) or is_thin(delta) else DRAWN_WIDE
    values = known.sigma[:most] if known else singular_values(delta, most)
    values = values[values > FAINT * values[:1]]
    return Spectrum(values, len(values) == most < min(delta.rank, *delta.shape))
