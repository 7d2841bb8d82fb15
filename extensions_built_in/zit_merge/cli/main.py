"""The command line. Needs no AI-Toolkit."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from decimal import Decimal

from ..errors import ZitMergeError
from .parser import build_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: The words after the program's name; None takes the process's own.

    Returns:
        0 done, 1 the input or the config is wrong, 2 usage, 130 interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names in other scripts must not stop a run on a console that can't show them
            stream.reconfigure(errors="backslashreplace")
    try:
        args = build_parser(COMMANDS).parse_args([_plain_number(word) for word in (sys.argv[1:] if argv is None else argv)])
        if args.quiet:
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        args.command(args)
    except SystemExit as e:  # argparse has printed what is wrong
        return int(e.code or 0)
    except ZitMergeError as e:
        print(f"zit_merge: {e}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("zit_merge: interrupted, nothing half-written is left", file=sys.stderr)
        return 130
    return 0


def _plain_number(word: str) -> str:
    """-1e-3 as -0.001: argparse takes a negative number in any other form for a flag."""
    return format(Decimal(word), "f") if re.fullmatch(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", word) else word


# Each command imports what it needs when it runs: help and mistakes in flags answer at once.


def _demo(args: argparse.Namespace) -> None:
    from .merge import demo

    demo(args)


def _run(args: argparse.Namespace) -> None:
    from .run import run

    run(args)


def _preview(args: argparse.Namespace) -> None:
    from .preview import preview

    step, _, number = (args.yaml or "").partition(":")
    if args.yaml is not None and not step:
        raise ZitMergeError("--yaml: which picture? write --yaml STEP:NUMBER, such as both:7")
    job, pages, shown = load_job(args.config), list[RunPage](), False
    for planned in plan_job(
        job, only=args.step or step or None, output_dir=args.output_dir, lora_folders=args.loras, may_download=not args.dry_run
    ):
        if not asks_for_pictures(planned.section):
            continue
        plans = [plan for plan in planned.plans if (args.step or step or plan.name) == plan.name]
        preview, shown = preview_plan(planned.section, planned.site, plans), True
        if args.yaml:
            print(_cell_yaml(preview, step, number), end="")
        elif args.dry_run:
            _say(args, preview.text())
        else:
            pages.append(run_page(planned.site, pages))
            pages[-1].begin(planned.site, job.processes[planned.index], planned.index)
            _render(args, preview, planned, pages[-1])
    if not shown:
        raise ZitMergeError(f"{args.config}: no step asks for pictures: write preview: true, sweep or ablate on one")


def _cell_yaml(preview: Any, step: str, number: str) -> str:
    from ..preview.section_yaml import section_yaml

    cells = {str(cell.number): cell for grid in preview.grids for cell in grid.cells if grid.plan.name == step}
    if not cells:
        raise ZitMergeError(f"--yaml: the step {step} has no sweep, so no picture of it has a number: name one that has")
    if number not in cells:
        raise ZitMergeError(f"--yaml: the pictures of this sweep are numbered 1 to {len(cells)}: write --yaml {step}:1")
    return section_yaml(preview.section, cells[number].plan.spec)


def _render(args: argparse.Namespace, preview: Any, planned: Any, page: Any) -> None:
    """Renders the pictures; the page, of the main process, shows what was merged too, as far as it is there."""
    from ..host.distributed import AccelerateWorkers
    from ..host.render import ToolkitRenderer
    from ..host.status import PictureWatch, Status
    from ..host.toolkit import device_of, silence
    from ..preview.page import on_page
    from ..preview.runner import run_preview
    from ..report.progress import Pictures

    workers = AccelerateWorkers()
    args.quiet = args.quiet or not workers.is_main
    _say(args, preview.text())
    if workers.is_main:
        _add_made(args, planned, page)
    try:
        with Pictures(args.quiet) as bar, PictureWatch(Status(), bar.tick) as watch:
            device = device_of(planned.section.device)
            load = watch.loading(silence()(ToolkitRenderer) if args.quiet else ToolkitRenderer)
            for text in run_preview(
                preview, device, load, watch.tick, on_grid=on_page(page, preview), watched=watch.passing, workers=workers
            ):
                _say(args, text)
    except ZitMergeError as e:
        if workers.is_main or str(e) not in workers.heard:
            raise
        raise SystemExit(1) from None  # the main process says it
    finally:
        if page.has_pictures:  # else an older page, which may have them all, stays
            _say(args, page.write())


def _add_made(args: argparse.Namespace, planned: Any, page: Any) -> None:
    from ..merging.runner import made
    from ..report.progress import watched

    for plan in planned.plans:
        if done := made(plan):
            page.add(done, watched("page", args.quiet))


def _execute(args: argparse.Namespace, plans: Sequence[Any], device: Any, page: Any = None) -> None:
    """Prints the plans, runs them unless it is a dry run, prints what was written and where the page is."""
    from ..merging.runner import run_plans
    from ..report.progress import Bar, passing, watched
    from ..report.tables import done_text, plan_text

    _say(args, "\n\n".join(map(plan_text, plans)) + "\n")
    if args.dry_run:
        return
    with Bar(args.quiet) as bar:
        for done in run_plans(plans, device, bar.tick, passing(args.quiet)):
            bar.close()
            _say(args, done_text(done))
            if page:
                page.add(done, watched("page", args.quiet))
    if page:
        _say(args, page.write())


_MERGE_SETTINGS = ("dtype", "format", "keep_lokr", "device", "method", "shapes", "allow_unmatched", "confirm_size")


def _merge(args: argparse.Namespace) -> None:
    from .merge import merge

    merge(args)


def _check(args: argparse.Namespace) -> None:
    from .run import check

    check(args)


def _inspect(args: argparse.Namespace) -> None:
    from .inspect import inspect

    inspect(args)


def _recipe(args: argparse.Namespace) -> None:
    from .inspect import recipe

    recipe(args)


def _install(args: argparse.Namespace) -> None:
    from ..host.install import install
    from .console import say

    say(args, install(args.folder, copy=args.copy))


def _attach(args: argparse.Namespace) -> None:
    from ..host.toolkit import found
    from .attach import attach
    from .console import say

    say(args, attach(args.config, args.section, replace=args.replace, toolkit=found()).text())


COMMANDS = {
    "demo": _demo,
    "run": _run,
    "preview": _preview,
    "merge": _merge,
    "check": _check,
    "inspect": _inspect,
    "recipe": _recipe,
    "install": _install,
    "attach": _attach,
}
