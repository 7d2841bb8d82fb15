"""Pictures on the report page."""

from __future__ import annotations

from collections.abc import Callable

from ..report.page.galleries import Gallery, Measures, Preview
from ..report.page.run import RunPage
from .outputs import GridResult
from .plan import PreviewPlan, specs_text


def on_page(page: RunPage, preview: PreviewPlan) -> Callable[[GridResult], None]:
    """Shows grids on a page, for `run_preview`.

    Args:
        page: The section of the preview has begun on it.
        preview: The plan of the grids.
    """
    return lambda result: page.show(preview.context, result.grid.plan.name, _gallery(result))


def _gallery(result: GridResult) -> Gallery:
    pictures = [Preview(p.heading, p.label, p.path, p.yaml) for p in result.pictures]
    note, measures = specs_text(result.grid.specs), None
    if ablation := result.ablation:
        metrics = list(ablation.distances)
        rows = [(g.name, [ablation.share(metric, g.name) for metric in metrics]) for g in ablation.groups]
        measures = Measures(metrics, rows, result.preset)
        note = f"{note}. {ablation.meaning} {ablation.caveat}"
    return Gallery(result.grid.title, note, pictures, measures)
