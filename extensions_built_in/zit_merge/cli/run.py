"""`run` and `check`."""

from __future__ import annotations

import argparse
from functools import partial
from textwrap import wrap

from ..config.job import load_job
from ..host.toolkit import found
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
    tell_what_is_not_right(args, what_is_not_right(done))


def check(args: argparse.Namespace) -> None:
    """Checks everything of a config that can be known before training."""
    for planned in plan_job(
        load_job(args.config), output_dir=args.output_dir, lora_folders=args.loras, before_training=True, toolkit=found()
    ):
        for plan in planned.plans:
            say(args, plan_text(plan) + "\n")
        if planned.section.wants_pictures:
            from ..preview.grids import preview_plan

            say(args, preview_plan(planned.section, planned.context, planned.plans).text() + "\n")
        for text in planned.advice:
            say(args, "\n".join(wrap(f"advice: {text}", 80, subsequent_indent="  ", break_long_words=False)))
    say(args, "no errors")
