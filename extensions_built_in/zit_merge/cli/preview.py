"""`preview`: the pictures that a config asks for, in AI-Toolkit's folder."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial

from ..config.job import load_job
from ..errors import SettingError, ZitMergeError
from ..host.distributed import AccelerateWorkers
from ..host.render import ToolkitRenderer
from ..host.status import Status
from ..host.toolkit import device_of, silence
from ..host.watch import JobProgress
from ..merging.made import made_before
from ..planning.job import plan_job
from ..planning.planned import Planned
from ..preview.grids import preview_plan
from ..preview.plan import PreviewPlan
from ..preview.runner import render_section
from ..preview.section_yaml import section_yaml
from ..report.page.run import RunPage, run_page
from ..report.progress import Bar
from .console import say, show


def preview(args: argparse.Namespace) -> None:
    """Renders what is missing, prints what would be rendered, or prints the section of one picture of a sweep."""
    step, _, number = (args.yaml or "").partition(":")
    if args.yaml is not None and not step:
        raise SettingError("which picture? write --yaml STEP:NUMBER, such as both:7", "--yaml")
    job, pages, only = load_job(args.config), list[RunPage](), args.step or step or None
    found = False
    for planned in plan_job(job, only=only, output_dir=args.output_dir, lora_folders=args.loras, may_download=not args.dry_run):
        if not planned.section.wants_pictures:
            continue
        plans = [plan for plan in planned.plans if only in (None, plan.name)]
        pictures, found = preview_plan(planned.section, planned.context, plans), True
        if args.yaml:
            show(_cell_yaml(pictures, step, number).rstrip("\n"))
        elif args.dry_run:
            say(args, pictures.text())
        else:
            pages.append(run_page(planned.context, pages))
            pages[-1].begin(planned.context, job.processes[planned.index], planned.index)
            _render(args, pictures, planned, pages[-1])
    if not found:
        raise SettingError("no step asks for pictures: write preview: true, sweep or ablate on one", str(args.config))


def _cell_yaml(pictures: PreviewPlan, step: str, number: str) -> str:
    cells = {str(cell.number): cell for grid in pictures.grids for cell in grid.cells if grid.plan.name == step}
    if not cells:
        raise SettingError(f"the step {step} has no sweep, so no picture of it has a number: name one that has", "--yaml")
    if number not in cells:
        raise SettingError(f"the pictures of this sweep are numbered 1 to {len(cells)}: write --yaml {step}:1", "--yaml")
    return section_yaml(pictures.section, cells[number].plan.spec)


def _render(args: argparse.Namespace, pictures: PreviewPlan, planned: Planned, page: RunPage) -> None:
    """Renders; the page, of the main process, shows what was merged too, as far as it is there."""
    workers = AccelerateWorkers()
    args.quiet = args.quiet or not workers.is_main
    say(args, pictures.text())
    if workers.is_main:
        for done in filter(None, map(made_before, planned.plans)):
            page.add(done, Bar(args.quiet))
    load = silence()(ToolkitRenderer) if args.quiet else ToolkitRenderer
    try:
        with JobProgress(Status(), Bar(args.quiet)) as progress:
            planned = replace(planned, placed=device_of(planned.section.device))
            show = partial(say, args)
            render_section(pictures, planned, page, show, progress, progress.loading(load), workers)
    except ZitMergeError as e:
        if workers.is_main or str(e) not in workers.heard:
            raise
        raise SystemExit(1) from None  # the main process says it
