"""`inspect --html`: the page of existing files, whose composer makes the first merge of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...analysis.measure import Measurement
from ...config.schema import PROCESS_TYPE
from ...errors import ZitMergeError
from ...formats.reader import LoraFile
from ...model.zimage import MODULES
from .facts import files_facts
from .render import Page, is_ours


def check_target(path: Path) -> None:
    """Raises unless a page may be written there."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise ZitMergeError(f"--html {path}: the page is a .html file: give it that ending")
    if os.path.lexists(path) and not is_ours(path):
        raise ZitMergeError(f"--html {path}: exists and is no page of zit_merge: give another name")


def write_page(measured: Measurement, path: Path, full_paths: bool = False) -> None:
    """Writes the page of one or more files.

    Args:
        measured: The files.
        path: A .html file.
        full_paths: The names of users stay in paths.

    Raises:
        ZitMergeError: A file is broken, or the page can't be written.
    """
    check_target(path)
    loras = measured.loras
    more = f" and {len(loras) - 1} more" if len(loras) > 1 else ""
    page = Page(f"{loras[0].path.name}{more}", full_paths)
    page.begin("", section_of(loras))
    page.add(files_facts(measured))
    page.write(path)


def section_of(loras: Sequence[LoraFile]) -> dict[str, Any]:
    """A section that sums the files at a ratio of 1 each."""
    is_real = all(shape == MODULES[module].shape() for lora in loras for module, shape in lora.shapes.items())
    step = {"name": "merged", "loras": [{"lora": str(lora.path.absolute()), "ratio": 1} for lora in loras]}
    return {"type": PROCESS_TYPE, "output_dir": "output", **({} if is_real else {"shapes": "free"}), "steps": [step]}
