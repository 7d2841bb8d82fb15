"""The picture of an ablation, as a file. matplotlib is loaded only when it is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from ..report.plots import require_matplotlib
from .ablation import Ablation


def draw(ablation: Ablation, file: Path | BinaryIO) -> None:
    """Writes the picture as PNG.

    Args:
        ablation: What is drawn.
        file: A path, or open for writing.

    Raises:
        ZitMergeError: matplotlib is not installed.
    """
    require_matplotlib("ablate: its picture")
    from .chart_figure import draw_chart

    draw_chart(ablation).savefig(file, format="png")
