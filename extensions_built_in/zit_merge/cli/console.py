"""What commands print."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

from ..errors import ZitMergeError
from ..wording import plain


def say(args: argparse.Namespace, text: str) -> None:
    """Prints a text, unless the command is quiet.

    Args:
        args: Of the command.
        text: One or more lines.
    """
    if not args.quiet:
        print(text, flush=True)


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
