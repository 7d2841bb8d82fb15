"""`inspect` and `recipe`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

from ..errors import ZitMergeError
from ..formats.metadata import read_recipe
from ..formats.reader import load_lora
from ..report.progress import Bar
from ..report.text.catalogue import methods_facts, methods_text, presets_text
from .console import say


def inspect(args: argparse.Namespace) -> None:
    """Shows what is in a file, what several have in common, or which sources a file holds."""
    _check_drawn(args)
    if args.methods and args.json and not args.presets:
        print(json.dumps(methods_facts(), indent=1))
        return
    if args.methods or args.presets:
        if args.json:
            raise ZitMergeError("inspect --presets: prints no JSON: leave one of the two out")
        print("\n\n".join([*([methods_text()] if args.methods else []), *([presets_text()] if args.presets else [])]))
        return
    if not args.files:
        raise ZitMergeError("inspect: name a LoRA file" + (" before --sources" if args.sources else ""))
    if args.sources and len(args.files) > 1:
        raise ZitMergeError(f"inspect --sources: looks into one file, {len(args.files)} were named before it")
    facts, text = _look(args)
    print(json.dumps(facts, indent=1) if args.json else text(facts))
    _draw(args)


def _check_drawn(args: argparse.Namespace) -> None:
    """Whether there can be a picture or a page, before anything else is done."""
    from ..report.page import files
    from ..report.plots import survey as plot

    for drawn in ("plot", "html"):
        for flag in ("methods", "presets", "sources"):
            if getattr(args, drawn) and getattr(args, flag):
                raise ZitMergeError(f"inspect --{drawn}: shows what is in LoRA files, not --{flag}: leave one of the two out")
    if args.plot:
        args.plot = plot.target(args.plot, args.files)
    if args.html:
        files.check_target(args.html)


def _draw(args: argparse.Namespace) -> None:
    """The picture and the page that were asked for."""
    from ..report.page import files
    from ..report.plots import survey as plot

    for drawn, write in (("plot", plot.plot), ("html", files.write_page)):
        if path := getattr(args, drawn):
            write([load_lora(file) for file in args.files], path, _track(args, drawn))
            if not args.json:  # stdout is one object
                say(args, f"wrote {path}")


def _look(args: argparse.Namespace) -> tuple[dict[str, Any], Callable[[dict[str, Any]], str]]:
    """What `inspect` finds, and how it is shown: a file with its sources, several files, or one."""
    from ..analysis import attribution as sources
    from ..analysis import compare as overlap
    from ..analysis import describe as inspect

    loras = [load_lora(path) for path in args.files]
    if args.sources:
        return sources.trace(loras[0], [load_lora(path) for path in args.sources], _track(args, "sources")), sources.trace_text
    if len(loras) > 1:
        return overlap.compare(loras, _track(args, "compare")), overlap.compare_text
    return inspect.describe(loras[0], _track(args, loras[0].path.name)), inspect.inspect_text


def _track(args: argparse.Namespace, label: str) -> Callable[[Any], Any]:
    return partial(Bar(args.quiet).track, label=label)


def recipe(args: argparse.Namespace) -> None:
    """Prints the section that made a file."""
    from ..files.text import to_yaml

    found = read_recipe(load_lora(args.file).metadata)
    if found is None:
        raise ZitMergeError(f"{args.file}: has no recipe, zit_merge did not make it")
    print(to_yaml(found), end="")
