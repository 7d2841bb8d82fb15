"""What `inspect --plot` draws, as numbers: norms and singular values of each file, and how alike several are.

`figure` draws it. That module alone imports matplotlib, and only when a picture was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from ...algebra.delta import Delta, Kron
from ...algebra.least_squares import cosines
from ...algebra.overlap import is_thin
from ...algebra.truncate import singular_values
from ...analysis.compare import Readers, Watched, same_model
from ...errors import ZitMergeError
from ...files.atomic import part_path, write_whole
from ...files.paths import check_writable, user_path
from ...formats.reader import LoraFile
from ...wording import ranks_text

ENDINGS = (".png", ".pdf", ".svg")
SHOWN = 6  # files that have a map and a line of their own
PAIRED = 4  # files up to which every pair has a map
FULLY = 512  # singular values of a change at most
LEADING = 32  # of one that is neither thin nor a Kron: there they take seconds


@dataclass(frozen=True)
class Portrait:
    """What is drawn of one file.

    Attributes:
        name: Of the file, without its folder.
        ranks: Lowest and highest rank as text, `at most` where they are no LoRA's.
        norms: Module -> Frobenius norm of its change, alpha / rank folded in; None where a tensor is not finite.
        norm: Of the whole change, broken modules left out.
        values: (modules, p) in float64, the singular values of each module, largest first, 0 where it has fewer; None for files
            beyond the first SHOWN.
        energy: Squared norm of these modules together.
        is_cut: Some module has more values than p.
        has_questions: It is read by what is known, and leaves something open.
    """

    name: str
    ranks: str
    norms: Mapping[str, float | None]
    norm: float
    values: Tensor | None
    energy: float
    is_cut: bool
    has_questions: bool

    def quartiles(self) -> Tensor:
        """(3, p): lower quartile, median and upper quartile of the singular values over the modules that are not zero."""
        return torch.quantile(self.values[self.values[:, 0] > 0], torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), dim=0)

    def kept(self) -> Tensor:
        """(p,): the share of the file's energy that a rank of 1 .. p for every module keeps."""
        return self.values.square().sum(0).cumsum(0) / self.energy if self.energy else torch.zeros(self.values.shape[1])


@dataclass(frozen=True)
class Survey:
    """What is drawn of several files.

    Attributes:
        files: One or more.
        cosines: (N, N) of the whole files, NaN beside one that is zero.
        pairs: (i, j) -> module that both change -> cosine, NaN where one of the two is zero; none for over PAIRED files.
    """

    files: tuple[Portrait, ...]
    cosines: Tensor
    pairs: Mapping[tuple[int, int], Mapping[str, float]]


def survey(loras: Sequence[LoraFile], watched: Watched = iter) -> Survey:
    """Measures what is drawn, module by module.

    Args:
        loras: One or more files.
        watched: Passes the modules on one by one, such as a progress bar.

    Raises:
        ZitMergeError: The files are not of one model, can't be read, or one of several is broken; a broken file alone is shown.
    """
    modules, count = same_model(loras), len(loras)
    gram = torch.zeros(count, count, dtype=torch.float64)
    norms: list[dict[str, float | None]] = [{} for _ in loras]
    spectra: list[list[_Spectrum]] = [[] for _ in loras]
    pairs: dict[tuple[int, int], dict[str, float]] = {p: {} for p in combinations(range(count), 2) if count <= PAIRED}
    with Readers(loras) as readers:
        for module in watched(modules):
            try:
                deltas = readers.deltas(module)
                inner = readers.products(module, deltas)
            except ZitMergeError:  # a tensor is not finite: the rest of the file can be shown, but not compared with others
                if count > 1:
                    raise
                norms[0][module] = None
                continue
            here, alike = list(deltas), _cosines(inner)
            gram[torch.tensor(here)[:, None], torch.tensor(here)] += inner
            for at, (i, delta) in enumerate(deltas.items()):
                norms[i][module] = _root(inner[at, at])
                if i < SHOWN:
                    spectra[i].append(_spectrum(delta))
                for to in range(at + 1, len(here) if pairs else 0):
                    pairs[i, here[to]][module] = float(alike[at, to])
    portraits = (_portrait(*found) for found in zip(loras, norms, spectra, gram.diagonal(), strict=True))
    return Survey(tuple(portraits), _cosines(gram), pairs)


_Spectrum = tuple[Tensor, bool]  # singular values, and whether there are more


def _spectrum(delta: Delta) -> _Spectrum:
    most = FULLY if isinstance(delta, Kron) or is_thin(delta) else LEADING
    values = singular_values(delta, most)
    return values.cpu(), len(values) == most < min(delta.rank, *delta.shape)


def _portrait(lora: LoraFile, norms: Mapping[str, float | None], spectra: Sequence[_Spectrum], energy: Tensor) -> Portrait:
    values, is_cut = _table(spectra)
    return Portrait(
        name=lora.path.name,
        ranks=ranks_text(lora.ranks, lora.algorithms),
        norms=norms,
        norm=_root(energy),
        values=values,
        energy=max(float(energy), 0.0),
        is_cut=is_cut,
        has_questions=bool(lora.questions),
    )


def _table(spectra: Sequence[_Spectrum]) -> tuple[Tensor | None, bool]:
    """(modules, p): as many values as are known of every module, zeros where it has no more."""
    if not spectra:
        return None, False
    cuts = [len(values) for values, is_cut in spectra if is_cut]
    width = min(cuts, default=max(len(values) for values, _ in spectra))
    return torch.stack([torch.nn.functional.pad(v[:width], (0, width - len(v[:width]))) for v, _ in spectra]), bool(cuts)


def _root(energy: Tensor) -> float:
    return max(float(energy), 0.0) ** 0.5


def _cosines(gram: Tensor) -> Tensor:
    """NaN beside a zero, of which no angle is known."""
    norms = gram.diagonal()
    return torch.where((norms[:, None] > 0) & (norms > 0), cosines(gram), math.nan)


def target(path: Path, files: Sequence[Path]) -> Path:
    """Where a picture may be written, to be asked before anything is read.

    Args:
        path: As it was named.
        files: What is drawn.

    Raises:
        ZitMergeError: It is no picture, can't be written there, is one of the files, or matplotlib is not installed.
    """
    path = user_path(path, "--plot")
    if path.suffix.lower() not in ENDINGS:
        raise ZitMergeError(f"--plot {path}: pictures are written as .png, .pdf or .svg: give it one of these endings")
    if not path.parent.is_dir():
        raise ZitMergeError(f"--plot {path}: {path.parent} is not a folder: make it or mend the path")
    if path.is_dir():
        raise ZitMergeError(f"--plot {path}: is a folder: name a file in it")
    user_path(part_path(path), "--plot")  # its name may be too long where that of the picture is not
    check_writable(path.parent, "--plot")
    if path.exists() and any(f.exists() and f.samefile(path) for f in files):
        raise ZitMergeError(f"--plot {path}: is one of the LoRAs: give the picture another name")
    try:
        from . import files as figure  # noqa: F401
    except ImportError as e:
        raise ZitMergeError(f"--plot needs matplotlib ({e}): python -m pip install matplotlib") from e
    return path


def plot(loras: Sequence[LoraFile], path: Path, watched: Watched = iter) -> None:
    """Draws files into a picture; one that is there already is replaced once the new one is whole.

    Args:
        loras: One or more files.
        path: See `target`; its ending is the format.
        watched: See `survey`.

    Raises:
        ZitMergeError: See `survey`; or the picture can't be written.
    """
    from . import files as figure

    picture = BytesIO()
    figure.save(survey(loras, watched), picture, path.suffix.lower().removeprefix("."))
    write_whole(path, [picture.getvalue()])
