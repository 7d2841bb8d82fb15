"""The numbers that the picture of files shows: norms and singular values of each file, and how alike several are."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from ...algebra.least_squares import cosines
from ...analysis.measure import Measurement, Spectrum
from ...formats.reader import LoraFile

SHOWN = 6  # files that have a map and a line of their own
PAIRED = 4  # files up to which every pair has a map


@dataclass(frozen=True)
class FileData:
    """What is drawn of one file.

    Attributes:
        lora: The file.
        norms: Module -> Frobenius norm of its change, alpha / rank folded in; None where a tensor is not finite.
        norm: Of the whole change, broken modules left out.
        values: (modules, p) in float64, the singular values of each module, largest first, 0 where it has fewer; None for files
            beyond the first SHOWN.
        energy: Squared norm of these modules together.
        is_cut: Some module has more values than p.
    """

    lora: LoraFile
    norms: Mapping[str, float | None]
    norm: float
    values: Tensor | None
    energy: float
    is_cut: bool

    @property
    def drawn(self) -> Tensor:
        """(modules, p): `values` of a file that has them."""
        assert self.values is not None, "only files with singular values have lines"
        return self.values

    def quartiles(self) -> Tensor:
        """(3, p): lower quartile, median and upper quartile of the singular values over the modules that are not zero."""
        return torch.quantile(self.drawn[self.drawn[:, 0] > 0], torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), dim=0)

    def kept(self) -> Tensor:
        """(p,): the share of the file's energy that a rank of 1 .. p for every module keeps."""
        return self.drawn.square().sum(0).cumsum(0) / self.energy if self.energy else torch.zeros(self.drawn.shape[1])


@dataclass(frozen=True)
class PlotData:
    """What is drawn of several files.

    Attributes:
        files: One or more.
        cosines: (N, N) of the whole files, NaN beside one that is zero.
        pairs: (i, j) -> module that both change -> cosine, NaN where one of the two is zero; none for over PAIRED files.
    """

    files: tuple[FileData, ...]
    cosines: Tensor
    pairs: Mapping[tuple[int, int], Mapping[str, float]]


def plot_data(measured: Measurement) -> PlotData:
    """What is drawn of files that were measured, with the spectra of the first SHOWN."""
    total, count = measured.gram(), len(measured.loras)
    pairs = {(i, j): _pair(measured, i, j) for i, j in combinations(range(count), 2)} if count <= PAIRED else {}
    files = (_file_data(measured, i, energy) for i, energy in enumerate(total.diagonal().tolist()))
    norms = total.diagonal()
    alike = torch.where((norms[:, None] > 0) & (norms > 0), cosines(total), math.nan)
    return PlotData(tuple(files), alike, pairs)


def _file_data(measured: Measurement, i: int, energy: float) -> FileData:
    values, is_cut = _table(measured.spectra[i].values() if i < min(SHOWN, len(measured.spectra)) else ())
    return FileData(measured.loras[i], measured.norms(i), energy**0.5, values, energy, is_cut)


def _table(spectra: Collection[Spectrum]) -> tuple[Tensor | None, bool]:
    """(modules, p): as many values as are known of every module, zeros where it has no more."""
    if not spectra:
        return None, False
    cuts = [len(values) for values, is_cut in spectra if is_cut]
    width = min(cuts, default=max(len(values) for values, _ in spectra))
    return torch.stack([torch.nn.functional.pad(v[:width], (0, width - len(v[:width]))) for v, _ in spectra]), bool(cuts)


def _pair(measured: Measurement, i: int, j: int) -> dict[str, float]:
    """Module that both change -> cosine."""
    return {
        module: cosine if found.energy(i) and found.energy(j) else math.nan
        for module, found in measured.modules.items()
        if (cosine := found.cosine(i, j)) is not None
    }
