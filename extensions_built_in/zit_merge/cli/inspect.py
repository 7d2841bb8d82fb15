"""`inspect` and `recipe`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ZitMergeError
from ..files import hub
from ..files.adapters import ADAPTERS
from ..formats.checkpoint import is_checkpoint, open_checkpoint
from ..formats.metadata import EXPERIMENT_KEY, read_recipe
from ..formats.reader import load_lora
from ..report.progress import Bar
from ..wording import message
from .console import say, show, show_json, show_yaml


def inspect(args: argparse.Namespace) -> None:
    """Shows what is in a file, what several have in common, or which sources a file holds."""
    _check_drawn(args)
    if args.methods or args.presets:
        _show_catalogue(args)
        return
    if not args.files:
        raise ZitMergeError("inspect: name a LoRA file" + (" before --sources" if args.sources else ""))
    if args.sources and len(args.files) > 1:
        raise ZitMergeError(f"inspect --sources: looks into one file, {len(args.files)} were named before it")
    models = [path for path in args.files if is_checkpoint(path)]
    if args.base or (models and len(args.files) == 1):
        _look_at_model(args)
    elif models:
        raise ZitMergeError(f"inspect: {models[0]} is a whole model: name it alone, or with --base and --sources")
    elif args.sources:
        _look_at_sources(args)
    else:
        _look_at_files(args)


def _show_catalogue(args: argparse.Namespace) -> None:
    """The methods, the presets, or both."""
    from ..report.text.catalogue import methods_facts, methods_text, presets_text

    if args.json and args.presets:
        raise ZitMergeError("inspect --presets: prints no JSON: leave one of the two out")
    if args.json:
        show_json(methods_facts())
        return
    show("\n\n".join([*([methods_text()] if args.methods else []), *([presets_text()] if args.presets else [])]))


def _check_drawn(args: argparse.Namespace) -> None:
    """Whether there can be a picture or a page, before anything else is done."""
    for drawn in ("plot", "html"):
        for flag in ("methods", "presets", "sources"):
            if getattr(args, drawn) and getattr(args, flag):
                raise ZitMergeError(f"inspect --{drawn}: shows what is in LoRA files, not --{flag}: leave one of the two out")
    if args.plot:
        from ..report.plots.write import target

        args.plot = target(args.plot, args.files)
    if args.html:
        from ..report.page.files import check_target

        check_target(args.html)


def _look_at_model(args: argparse.Namespace) -> None:
    """A whole model, alone or beside its base, with the LoRAs in it."""
    from ..analysis.model import describe_model, sources_in_model
    from ..planning.context import RunContext
    from ..planning.models import find_model
    from ..report.text.model import model_text, sources_text

    for drawn in ("plot", "html"):
        if getattr(args, drawn):
            raise ZitMergeError(f"inspect --{drawn}: shows LoRA files, {args.files[0]} is looked at as a whole model: drop it")
    if args.sources and not args.base:
        raise ZitMergeError(f"inspect: {args.files[0]} is a whole model: name the model it came from too, --base PATH")
    if len(args.files) > 1:
        raise ZitMergeError(f"inspect --base: looks into one model, {len(args.files)} were named")
    model = open_checkpoint(args.files[0], shapes="free", quantized=not args.base)
    if not args.base:
        _print_found(args, describe_model(model), model_text)
        return
    sources = [load_lora(_fetched(path)) for path in args.sources or ()]
    base = open_checkpoint(find_model(str(args.base), RunContext("", "", Path(), may_download=True)) or args.base, shapes="free")
    _print_found(args, sources_in_model(model, base, sources, Bar(args.quiet)), sources_text)


_EXPERIMENT = """
{name} in a step takes a share of it away, or adds it: an experiment, nobody has measured what pictures make of it
    - {{lora: "{source}", ratio: -0.5}}"""


def _fetched(name: Path) -> Path:
    """A source: a path, or a known adapter or a file of the hub, which is fetched where it is not in the cache."""
    source = ADAPTERS.get(str(name), name.as_posix())
    return name if name.exists() or not source.startswith(hub.HUB_PREFIX) else hub.download(hub.parse(source))


def _look_at_sources(args: argparse.Namespace) -> None:
    """A file with its sources."""
    from ..analysis.attribute import attribute
    from ..report.text.attribution import attribution_text

    lora, *sources = (load_lora(path) for path in (args.files[0], *map(_fetched, args.sources)))
    _print_found(args, attribute(lora, sources, Bar(args.quiet)), attribution_text)
    if known := [str(name) for name in args.sources if str(name) in ADAPTERS and not args.json]:
        show(_EXPERIMENT.format(name=known[0], source=ADAPTERS[known[0]]))


def _look_at_files(args: argparse.Namespace) -> None:
    """One file or several, with the picture and the page that were asked for; their modules are read once."""
    from ..analysis.compare import compare
    from ..analysis.describe import describe
    from ..analysis.measure import measure
    from ..report.plots.data import SHOWN
    from ..report.text.compare import comparison_text
    from ..report.text.describe import description_text

    measured = measure([load_lora(path) for path in args.files], SHOWN if args.plot else 0, Bar(args.quiet))
    if len(args.files) > 1:
        _print_found(args, compare(measured), comparison_text)
    else:
        _print_found(args, describe(measured), description_text)
    if args.plot:
        from ..report.plots.write import write_plot

        write_plot(measured, args.plot)
        _say_written(args, args.plot)
    if args.html:
        from ..report.page.files import write_page

        write_page(measured, args.html, full_paths=args.full_paths)
        _say_written(args, args.html)


def _say_written(args: argparse.Namespace, path: Path) -> None:
    if not args.json:  # stdout is one object
        say(args, f"wrote {path}")


def _print_found(args: argparse.Namespace, found: Any, text: Callable[[Any], str]) -> None:
    if args.json:
        paths = [str(path.absolute()) for path in (*args.files, *(args.sources or ()))]
        show_json(found.to_json() | ({"paths": paths} if args.full_paths else {}))
    else:
        show(text(found))


def recipe(args: argparse.Namespace) -> None:
    """Prints the section that made a file: whoever wrote the file, nothing but a recipe."""
    from ..config.recipe import only_recipe

    source = open_checkpoint(args.file, shapes="free", quantized=True) if is_checkpoint(args.file) else load_lora(args.file)
    found = read_recipe(source.metadata)
    if found is None:
        is_ours = EXPERIMENT_KEY in source.metadata
        told = f"an experiment made it, see {EXPERIMENT_KEY} in its metadata" if is_ours else "zit_merge did not make it"
        raise ZitMergeError(f"{args.file}: has no recipe, {told}")
    kept, others = only_recipe(found)
    show_yaml(kept)
    if others:
        print(message(f"zit_merge: left out, no recipe has these keys: {', '.join(others)}"), file=sys.stderr)
