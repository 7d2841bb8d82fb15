"""What commands print."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

from ..errors import ZitMergeError
from ..files.text import to_yaml
from ..wording import plain, shown


def say(args: argparse.Namespace, text: str) -> None:
    """Prints a text, unless the command is quiet.

    Args:
        args: Of the command.
        text: One or more lines.
    """
    if not args.quiet:
        show(text)


def show(text: str) -> None:
    """Prints what a command was asked for, quiet or not."""
    print(shown(text), flush=True)


def show_yaml(data: Any) -> None:
    """Prints YAML, with escapes where the terminal can't show a letter of it."""
    text = to_yaml(data, unicode=True)
    show((text if shown(text) == text else to_yaml(data)).rstrip("\n"))


def show_json(found: Any) -> None:
    """Prints an object for programs. JSON escapes all letters beyond ASCII, and of the control characters all but one."""
    print(json.dumps(found, indent=1).replace("\x7f", "\\u007f"), flush=True)


def tell_what_is_not_right(args: argparse.Namespace, found: Mapping[str, str]) -> None:
    """Says which results are off or empty where a quiet command has not said it; with --strict the command fails.

    Args:
        args: Of the command.
        found: Step -> why its result is not right.

    Raises:
        ZitMergeError: There is one, and --strict was given.
    """
    lines = [plain(f"{step} is {why}") for step, why in found.items()]
    if lines and args.strict:
        raise ZitMergeError(f"{'; '.join(lines)} (--strict; the file is kept)")
    if args.quiet:
        for line in lines:
            print(f"zit_merge: {line}", file=sys.stderr, flush=True)
