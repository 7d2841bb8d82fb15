"""`inspect --plot`: the picture of files, as a file."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from ...analysis.measure import Measurement
from ...errors import SettingError, located
from ...files.atomic import check_part, part_path, write_whole
from ...files.paths import check_writable, user_path
from . import require_matplotlib
from .data import plot_data

ENDINGS = (".png", ".pdf", ".svg")


def target(path: Path, files: Sequence[Path]) -> Path:
    """Where a picture may be written, to be asked before anything is read.

    Args:
        path: As it was named.
        files: What is drawn.

    Raises:
        ZitMergeError: It is no picture, can't be written there, is one of the files, or matplotlib is not installed.
    """
    with located("--plot"):
        path = user_path(path)
    with located(f"--plot {path}"):
        if path.suffix.lower() not in ENDINGS:
            raise SettingError("pictures are written as .png, .pdf or .svg: give it one of these endings")
        if not path.parent.is_dir():
            raise SettingError(f"{path.parent} is not a folder: create it or correct the path")
        if path.is_dir():
            raise SettingError("is a folder: name a file in it")
        if path.exists() and any(f.exists() and f.samefile(path) for f in files):
            raise SettingError("is one of the LoRAs: give the picture another name")
    with located("--plot"):
        user_path(part_path(path))  # its name may be too long where that of the picture is not
        check_part(path)
        check_writable(path.parent)
    require_matplotlib("--plot")
    return path


def write_plot(measured: Measurement, path: Path) -> None:
    """Draws files into a picture; one that is there already is replaced once the new one is whole.

    Args:
        measured: The files, with the spectra of the first `data.SHOWN`.
        path: See `target`; its ending is the format.

    Raises:
        ZitMergeError: The picture can't be written.
    """
    from .files import save

    picture = BytesIO()
    save(plot_data(measured), picture, path.suffix.lower().removeprefix("."))
    write_whole(path, [picture.getvalue()])
