"""`run`."""

from __future__ import annotations

import argparse
from functools import partial

from ..config.job import load_job
from ..merging.made import Done
from ..planning.job import plan_job
from ..report.page.run import RunPage, run_page
from ..report.progress import Bar
from ..report.text.plan import plan_text
from ..section import run_section, what_is_not_right
from .console import say, tell_what_is_not_right


def run(args: argparse.Namespace) -> None:
    """Runs the sections of a config, or a recipe."""
    job, pages, done = load_job(args.config), list[RunPage](), list[Done]()
    for planned in plan_job(
        job, only=args.step, output_dir=args.output_dir, lora_folders=args.loras, may_download=not args.dry_run
    ):
        say(args, "\n\n".join(map(plan_text, planned.plans)) + "\n")
        if not args.dry_run:
            pages.append(run_page(planned.context, pages))
            pages[-1].begin(planned.context, job.processes[planned.index], planned.index)
            done += run_section(planned, pages[-1], partial(say, args), Bar(args.quiet))
        if planned.section.wants_pictures:
            say(args, "pictures are rendered by AI-Toolkit in its job, or by `preview` in its folder")
        if planned.section.studio:
            say(args, "the studio opens in AI-Toolkit's job; for files there is `studio`")
    tell_what_is_not_right(args, what_is_not_right(done))
