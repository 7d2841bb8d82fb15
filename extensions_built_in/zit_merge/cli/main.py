"""The command line. Needs no AI-Toolkit."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial

from ..errors import ZitMergeError
from ..wording import forget
from .parser import build_parser, first_steps, program


def script() -> int:
    """The console script `zit-merge`: as `python -m`, it finds AI-Toolkit and metrics of one's own in the working directory.

    Returns:
        As `main`.
    """
    if not getattr(sys.flags, "safe_path", False):
        sys.path.insert(0, "")
    return main()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: The words after the program's name; None takes the process's own.

    Returns:
        0 done, 1 the input or the config is wrong, 2 usage, 130 interrupted.
    """
    forget()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names in other scripts must not stop a run on a console that can't show them
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _answer(argv)
        print(end="", flush=True)  # what a closed pipe does not take shows here, not when Python ends
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _answer(argv: Sequence[str] | None) -> int:
    def run() -> int:
        parser = build_parser(COMMANDS)
        args = parser.parse_args([_plain_number(word) for word in (sys.argv[1:] if argv is None else argv)])
        if args.command is None:
            parser.print_usage(sys.stderr)
            print(f"\n{first_steps()}", file=sys.stderr)
            return 2
        if args.quiet:
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        args.command(args)
        return 0

    return ended(run)


def ended(run: Callable[[], int]) -> int:
    """The exit code of what was typed; what went wrong is told in one sentence.

    Args:
        run: Gives the code where nothing goes wrong.
    """
    try:
        return run()
    except SystemExit as e:  # argparse has printed what is wrong
        return int(e.code or 0)
    except ZitMergeError as e:
        print(f"zit_merge: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("zit_merge: interrupted, nothing half-written is left", file=sys.stderr)
        return 130


def _plain_number(word: str) -> str:
    """-1e-3 as -0.001: argparse takes a negative number in any other form for a flag."""
    return format(Decimal(word), "f") if re.fullmatch(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", word) else word


# Each command imports what it needs when it runs: help and mistakes in flags answer at once.


def _demo(args: argparse.Namespace) -> None:
    from ..demo import run_demo
    from ..report.progress import Bar
    from .console import say

    run_demo(args.out, partial(say, args), Bar(args.quiet))


def _run(args: argparse.Namespace) -> None:
    from .run import run

    run(args)


def _preview(args: argparse.Namespace) -> None:
    from .preview import preview

    preview(args)


def _studio(args: argparse.Namespace) -> None:
    from .studio import studio

    studio(args)


def _merge(args: argparse.Namespace) -> None:
    from .merge import merge

    merge(args)


def _bake(args: argparse.Namespace) -> None:
    from .merge import bake

    bake(args)


def _extract(args: argparse.Namespace) -> None:
    from .merge import extract

    extract(args)


def _check(args: argparse.Namespace) -> None:
    from .check import check

    check(args)


def _inspect(args: argparse.Namespace) -> None:
    from .inspect import inspect

    inspect(args)


def _recipe(args: argparse.Namespace) -> None:
    from .inspect import recipe

    recipe(args)


_AFTER_INSTALL = """
next: append a section to the config of a training, and start the job as usual
    {program} attach CONFIG.yaml --section SECTION.yaml
    python run.py CONFIG.yaml
sections to start from: {manual}/section.md"""


def _install(args: argparse.Namespace) -> None:
    from ..host.install import install, remove
    from .console import say

    if args.remove:
        if args.copy:
            raise ZitMergeError("install --remove: takes no --copy: leave one of the two out")
        say(args, remove(args.folder))
        return
    say(args, install(args.folder, copy=args.copy))
    say(args, _AFTER_INSTALL.format(program=program(), manual=args.folder / "extensions_built_in" / "zit_merge" / "docs"))


def _attach(args: argparse.Namespace) -> None:
    from ..config.edit import CannotEdit
    from ..host.toolkit import found
    from .attach import attach
    from .console import say, show

    try:
        say(args, attach(args.config, args.section, replace=args.replace, toolkit=found()).text())
    except CannotEdit as e:
        show(e.paste.rstrip("\n"))
        raise


COMMANDS = {
    "demo": _demo,
    "run": _run,
    "preview": _preview,
    "studio": _studio,
    "merge": _merge,
    "bake": _bake,
    "extract": _extract,
    "check": _check,
    "inspect": _inspect,
    "recipe": _recipe,
    "install": _install,
    "attach": _attach,
}
