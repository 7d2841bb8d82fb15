"""`check`."""

from __future__ import annotations

import argparse
from textwrap import wrap

from ..config.job import load_job
from ..host.toolkit import found
from ..planning.job import plan_job
from ..report.text.plan import plan_text
from .console import say


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
