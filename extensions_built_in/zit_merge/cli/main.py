"""The command line. Needs no AI-Toolkit."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from textwrap import wrap
from typing import Any

from .. import __version__
from ..errors import ZitMergeError
from ..model.zimage import ALIASES, COMPONENTS, GROUPS

_WEIGHT_FLAGS = (*COMPONENTS, *ALIASES, *GROUPS)


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
        args = _parser().parse_args([_plain_number(word) for word in (sys.argv[1:] if argv is None else argv)])
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="zit_merge", description="Merge Z-Image Turbo LoRAs, block by block.")
    parser.add_argument("--version", action="version", version=f"zit_merge {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, command: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        sub.add_argument("--quiet", action="store_true", help="print no progress and no plan")
        return sub

    demo = add("demo", _demo, "make two small LoRAs, merge them with block weights, check the result")
    demo.add_argument("--out", type=Path, default=Path("zit_merge_demo"), help="folder for the files (default: %(default)s)")

    run = add("run", _run, "run the zit_merge sections of an AI-Toolkit config, or a recipe")
    run.add_argument("config", type=Path)
    run.add_argument("--step", help="only this step, and the earlier ones that it uses")
    run.add_argument("--dry-run", action="store_true", help="print what would be done, write nothing")
    run.add_argument("--output-dir", help="instead of the config's")
    run.add_argument("--loras", type=Path, nargs="+", default=[], metavar="DIR", help="where a recipe's inputs are found by hash")

    preview = add(
        "preview", _preview, "render the pictures that a config asks for; in AI-Toolkit's folder, or under accelerate launch"
    )
    preview.add_argument("config", type=Path)
    preview.add_argument("--step", help="only this step")
    preview.add_argument("--output-dir", help="instead of the config's")
    preview.add_argument(
        "--loras", type=Path, nargs="+", default=[], metavar="DIR", help="where a recipe's inputs are found by hash"
    )
    preview.add_argument("--dry-run", action="store_true", help="print what would be rendered, render nothing")
    preview.add_argument("--yaml", metavar="STEP:NUMBER", help="print the section that makes this picture of a step's sweep")

    _merge_arguments(add("merge", _merge, "merge LoRA files: every weight takes one number for all files, or one for each"))

    check = add("check", _check, "check a config: everything that can be known before training")
    check.add_argument("config", type=Path)
    check.add_argument("--output-dir", help="instead of the config's")
    check.add_argument(
        "--loras", type=Path, nargs="+", default=[], metavar="DIR", help="where a recipe's inputs are found by hash"
    )

    inspect = add("inspect", _inspect, "show what is in a LoRA file, or what several have in common")
    inspect.add_argument("files", type=Path, nargs="*", metavar="FILE")
    inspect.add_argument("--sources", type=Path, nargs="+", metavar="FILE", help="tell how strong each of these is in the file")
    inspect.add_argument("--json", action="store_true")
    inspect.add_argument(
        "--html", type=Path, metavar="OUT", help="also write a page to look at, with a composer for a merge of the files"
    )
    inspect.add_argument("--plot", type=Path, metavar="OUT", help="draw it too: a .png, .pdf or .svg file")
    inspect.add_argument("--methods", action="store_true", help="list the merge methods")
    inspect.add_argument("--presets", action="store_true", help="list the presets")

    recipe = add("recipe", _recipe, "print the section that made a file, as YAML that `run` takes")
    recipe.add_argument("file", type=Path)

    install = add("install", _install, "put the extension into an AI-Toolkit folder and check that it loads there")
    install.add_argument("folder", type=Path, metavar="AI_TOOLKIT_DIR")
    install.add_argument("--copy", action="store_true", help="copy the files instead of linking to them")

    attach = add("attach", _attach, "append a zit_merge section to an AI-Toolkit config; a backup is kept")
    attach.add_argument("config", type=Path)
    attach.add_argument("--section", type=Path, required=True, metavar="FILE", help="YAML or JSON: a section, a recipe, or a job")
    attach.add_argument("--replace", action="store_true", help="put it in the place of the config's own zit_merge section")
    return parser


def _merge_arguments(merge: argparse.ArgumentParser) -> None:
    merge.add_argument("files", nargs="+", metavar="FILE", help="a .safetensors file, or hf:user/repo/file.safetensors")
    merge.add_argument("-o", "--out", type=Path, required=True, metavar="OUT")
    merge.add_argument("--ratio", type=float, nargs="+", required=True, metavar="R")
    for flag in _WEIGHT_FLAGS:
        merge.add_argument(f"--{flag}", type=float, nargs="+", metavar="W")
    merge.add_argument("--layers", nargs="+", metavar="SPEC", help='such as "0-9=0.5,10-29=1:0.6"')
    merge.add_argument("--preset", nargs="+", metavar="NAME", help="a shipped set of weights, see inspect --presets")
    merge.add_argument("--alpha", nargs="+", metavar="A", help="key, metadata, none or a number, where a file leaves it open")
    merge.add_argument("--qkv", nargs="+", metavar="WHICH", help="split, fused or sum, where a file changes a module twice")
    merge.add_argument("--drop", nargs="+", default=[], metavar="VECTORS", help="norm, bias: leave out what no LoRA can hold")
    merge.add_argument("--rank", default="exact", help="exact (default), same, a number, energy=0.99,max=64 or size_mb=150")
    merge.add_argument("--method", default="sum", help="sum (default), see inspect --methods")
    merge.add_argument("--params", nargs="+", default=[], metavar="NAME=VALUE", help="of the method, such as density=0.3 seed=1")
    merge.add_argument("--uniform", choices=("true", "false"), default="true", help="false: each module has a rank of its own")
    merge.add_argument("--dtype", default="bf16", help="bf16 (default), fp16, fp32 or same")
    merge.add_argument("--format", default="ai-toolkit", help="ai-toolkit (default), diffusers, kohya or comfyui")
    merge.add_argument("--keep-lokr", action="store_true", help="a single LoKr stays a LoKr")
    merge.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    merge.add_argument("--shapes", default="strict", help="free: any one consistent set of sizes, for pruned models")
    merge.add_argument("--allow-unmatched", action="store_true", help="merge although a file holds unknown keys")
    merge.add_argument("--confirm-size", action="store_true", help="write a file of over 2 GB")
    merge.add_argument("--dry-run", action="store_true", help="print what would be done, write nothing")


def _say(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(text, flush=True)


def _demo(args: argparse.Namespace) -> None:
    from ..demo import run_demo
    from ..report.progress import Bar

    with Bar(args.quiet) as bar:
        run_demo(args.out, lambda text: _say(args, text), bar.tick)


def _run(args: argparse.Namespace) -> None:
    from ..config.job import load_job
    from ..planning.job import plan_job
    from ..preview.grids import asks_for_pictures
    from ..report.page.run import RunPage, run_page

    job, pages = load_job(args.config), list[RunPage]()
    for planned in plan_job(
        job,
        only=args.step,
        output_dir=args.output_dir,
        lora_folders=args.loras,
        may_download=not args.dry_run,
    ):
        pages.append(run_page(planned.site, pages))
        pages[-1].begin(planned.site, job.processes[planned.index], planned.index)
        _execute(args, planned.plans, planned.device, pages[-1])
        if asks_for_pictures(planned.section):
            _say(args, "pictures are rendered by AI-Toolkit in its job, or by `preview` in its folder")


def _preview(args: argparse.Namespace) -> None:
    from ..config.job import load_job
    from ..planning.job import plan_job
    from ..preview.grids import asks_for_pictures, preview_plan
    from ..report.page.run import RunPage, run_page

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
        exhibition, shown = preview_plan(planned.section, planned.site, plans), True
        if args.yaml:
            print(_cell_yaml(exhibition, step, number), end="")
        elif args.dry_run:
            _say(args, exhibition.text())
        else:
            pages.append(run_page(planned.site, pages))
            pages[-1].begin(planned.site, job.processes[planned.index], planned.index)
            _render(args, exhibition, planned, pages[-1])
    if not shown:
        raise ZitMergeError(f"{args.config}: no step asks for pictures: write preview: true, sweep or ablate on one")


def _cell_yaml(exhibition: Any, step: str, number: str) -> str:
    from ..preview.outputs import plain_step, section_yaml

    cells = {str(cell.number): cell for e in exhibition.exhibits for cell in e.cells if e.plan.name == step}
    if not cells:
        raise ZitMergeError(f"--yaml: the step {step} has no sweep, so no picture of it has a number: name one that has")
    if number not in cells:
        raise ZitMergeError(f"--yaml: the pictures of this sweep are numbered 1 to {len(cells)}: write --yaml {step}:1")
    return section_yaml(exhibition.section, plain_step(cells[number].plan.spec))


def _render(args: argparse.Namespace, exhibition: Any, planned: Any, page: Any) -> None:
    """Renders and hangs; the page, of the main process, shows what was merged too, as far as it is there."""
    from ..host.distributed import AccelerateWorkers
    from ..host.render import Renderer
    from ..host.status import PictureWatch, Status
    from ..host.toolkit import device_of, silence
    from ..preview.show import show
    from ..report.progress import Pictures

    team = AccelerateWorkers()
    args.quiet = args.quiet or not team.is_main
    _say(args, exhibition.text())
    if team.is_main:
        _add_made(args, planned, page)
    try:
        with Pictures(args.quiet) as bar, PictureWatch(Status(), bar.tick) as watch:
            device = device_of(planned.section.device)
            load = watch.loading(silence()(Renderer) if args.quiet else Renderer)
            for text in show(exhibition, device, load, page, watch.tick, watched=watch.passing, team=team):
                _say(args, text)
    except ZitMergeError as e:
        if team.is_main or str(e) not in team.heard:
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
    from ..api import merge
    from ..merging.runner import pick_device

    weights = _merge_weights(args)
    settings = {key: getattr(args, key) for key in _MERGE_SETTINGS}
    settings |= {"rank": _rank(args.rank), "params": _pairs(args.params, "--params"), "uniform": args.uniform == "true"}
    settled = merge(list(zip(args.files, weights, strict=True)), **settings)
    _execute(args, [settled.plan(args.out, may_download=not args.dry_run)], pick_device(args.device))


def _merge_weights(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The weights of each file, from flags with one value for all or one for each."""
    count = len(args.files)

    def each(flag: str, values: Sequence[Any]) -> Sequence[Any]:
        if len(values) not in (1, count):
            raise ZitMergeError(f"--{flag}: {len(values)} values for {count} files: give one for all, or one for each")
        return values if len(values) == count else list(values) * count

    weights = [{"ratio": ratio, "blocks": {}} for ratio in each("ratio", args.ratio)]
    for flag in _WEIGHT_FLAGS:
        if (values := getattr(args, flag)) is not None:
            for weight, value in zip(weights, each(flag, values), strict=True):
                weight["blocks"][flag] = value
    for flag in ("preset", "alpha", "qkv"):
        if (values := getattr(args, flag)) is not None:
            for weight, value in zip(weights, each(flag, values), strict=True):
                weight[flag] = _number_or_word(value)
    for weight in weights:
        weight["drop"] = args.drop
    if args.layers is not None:
        for weight, spec in zip(weights, each("layers", args.layers), strict=True):
            weight["layers"] = _layer_spec(spec)
    return weights


def _rank(text: str) -> int | str | dict[str, float | str]:
    """`32`, `same`, or `energy=0.99,max=64` as a mapping."""
    return _pairs(text.split(","), "--rank") if "=" in text else int(text) if text.isdecimal() else text


def _pairs(words: Sequence[str], flag: str) -> dict[str, float | str]:
    """NAME=VALUE words as a mapping; numbers as the config would read them."""
    found: dict[str, float | str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise ZitMergeError(f"{flag}: {word!r} is not NAME=VALUE, such as density=0.3")
        if name.strip() in found:
            raise ZitMergeError(f"{flag}: {name.strip()} stands there twice")
        number = _number_or_word(value.strip())
        found[name.strip()] = int(value) if value.strip().isdecimal() else number
    return found


def _number_or_word(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _layer_spec(spec: str) -> dict[str, float | list[float]]:
    """`0-9=0.5,10-29=1:0.6` -> {"0-9": 0.5, "10-29": [1.0, 0.6]}."""
    layers: dict[str, float | list[float]] = {}
    for part in spec.split(","):
        key, equals, values = part.strip().partition("=")
        try:
            numbers = [float(v) for v in values.split(":")]
        except ValueError:
            numbers = []
        if not equals or not key or not numbers:
            raise ZitMergeError(
                f'--layers {spec}: {part!r} is not LAYERS=WEIGHT or LAYERS=FROM:TO, such as "0-9=0.5,10-29=1:0.6"'
            )
        if key in layers:
            raise ZitMergeError(f"--layers {spec}: {key} stands there twice")
        layers[key] = numbers[0] if len(numbers) == 1 else numbers
    return layers


def _check(args: argparse.Namespace) -> None:
    from ..config.job import load_job
    from ..host.toolkit import at_hand
    from ..planning.job import plan_job
    from ..preview.grids import asks_for_pictures, preview_plan
    from ..report.tables import plan_text

    for planned in plan_job(
        load_job(args.config), output_dir=args.output_dir, lora_folders=args.loras, before_training=True, toolkit=at_hand()
    ):
        for plan in planned.plans:
            _say(args, plan_text(plan) + "\n")
        if asks_for_pictures(planned.section):
            _say(args, preview_plan(planned.section, planned.site, planned.plans).text() + "\n")
        for text in planned.advice:
            _say(args, "\n".join(wrap(f"advice: {text}", 80, subsequent_indent="  ", break_long_words=False)))
    _say(args, "no errors")


def _inspect(args: argparse.Namespace) -> None:
    from ..report.tables import methods_facts, methods_text, presets_text

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
    from ..formats.reader import load_lora
    from ..report.page import files
    from ..report.plots import survey as plot
    from ..report.progress import watched

    for drawn, write in (("plot", plot.plot), ("html", files.write_page)):
        if path := getattr(args, drawn):
            write([load_lora(file) for file in args.files], path, watched(drawn, args.quiet))
            if not args.json:  # stdout is one object
                _say(args, f"wrote {path}")


def _look(args: argparse.Namespace) -> tuple[dict[str, Any], Callable[[dict[str, Any]], str]]:
    """What `inspect` finds, and how it is shown: a file with its sources, several files, or one."""
    from ..analysis import attribution as sources
    from ..analysis import compare as overlap
    from ..analysis import describe as inspect
    from ..formats.reader import load_lora
    from ..report.progress import watched

    loras = [load_lora(path) for path in args.files]
    if args.sources:
        return sources.trace(
            loras[0], [load_lora(path) for path in args.sources], watched("sources", args.quiet)
        ), sources.trace_text
    if len(loras) > 1:
        return overlap.compare(loras, watched("compare", args.quiet)), overlap.compare_text
    return inspect.describe(loras[0], watched(loras[0].path.name, args.quiet)), inspect.inspect_text


def _recipe(args: argparse.Namespace) -> None:
    from ..formats.metadata import read_recipe
    from ..formats.reader import load_lora
    from ..planning.recipe import to_yaml

    recipe = read_recipe(load_lora(args.file).metadata)
    if recipe is None:
        raise ZitMergeError(f"{args.file}: has no recipe, zit_merge did not make it")
    print(to_yaml(recipe), end="")


def _install(args: argparse.Namespace) -> None:
    from ..host.install import install

    _say(args, install(args.folder, copy=args.copy))


def _attach(args: argparse.Namespace) -> None:
    from ..host.toolkit import at_hand
    from .attach import attach

    _say(args, attach(args.config, args.section, replace=args.replace, toolkit=at_hand()).text())
