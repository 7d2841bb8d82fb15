"""The words of the command line: commands and flags."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..files.adapters import ADAPTERS
from ..model.zimage import ALIASES, COMPONENTS, GROUPS
from ..wording import shown

Command = Callable[[argparse.Namespace], None]
WEIGHT_FLAGS = (*COMPONENTS, *ALIASES, *GROUPS)


class _Parser(argparse.ArgumentParser):
    """Its messages repeat words of the command line, such as the names that a pattern found."""

    def _print_message(self, message: str, file: Any = None) -> None:
        print(shown(message), end="", file=file or sys.stderr)


def build_parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The parser of all commands.

    Args:
        commands: Name -> what runs it.
    """
    parser = _Parser(prog="zit_merge", description="Merge Z-Image Turbo LoRAs, block by block.")
    parser.add_argument("--version", action="version", version=f"zit_merge {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=text, description=text)
        sub.set_defaults(command=commands[name])
        sub.add_argument("--quiet", action="store_true", help="print no progress and no plan")
        return sub

    demo = add("demo", "make two small LoRAs, merge them with block weights, check the result")
    demo.add_argument("--out", type=Path, default=Path("zit_merge_demo"), help="folder for the files (default: %(default)s)")

    run = add("run", "run the zit_merge sections of an AI-Toolkit config, or a recipe")
    run.add_argument("config", type=Path)
    run.add_argument("--step", help="only this step, and the earlier ones that it uses")
    run.add_argument("--dry-run", action="store_true", help="print what would be done, write nothing")
    _add_strict(run)
    _add_folders(run)

    preview = add("preview", "render the pictures that a config asks for; in AI-Toolkit's folder, or under accelerate launch")
    preview.add_argument("config", type=Path)
    preview.add_argument("--step", help="only this step")
    _add_folders(preview)
    preview.add_argument("--dry-run", action="store_true", help="print what would be rendered, render nothing")
    preview.add_argument("--yaml", metavar="STEP:NUMBER", help="print the section that makes this picture of a step's sweep")

    _studio_arguments(add("studio", "open the live merge page of LoRA files: weigh, measure, look, keep"))
    _merge_arguments(add("merge", "merge LoRA files: every weight takes one number for all files, or one for each"))
    _bake_arguments(add("bake", "write a whole model with a merge of LoRAs in it"))
    _extract_arguments(add("extract", "make a LoRA of what a fine-tuned model changed"))

    check = add("check", "check a config: everything that can be known before training")
    check.add_argument("config", type=Path)
    _add_folders(check)

    _inspect_arguments(add("inspect", "show what is in a LoRA file, or what several have in common"))

    recipe = add("recipe", "print the section that made a file, as YAML that `run` takes")
    recipe.add_argument("file", type=Path)

    install = add("install", "put the extension into an AI-Toolkit folder and check that it loads there")
    install.add_argument("folder", type=Path, metavar="AI_TOOLKIT_DIR")
    install.add_argument("--copy", action="store_true", help="copy the files instead of linking to them")

    attach = add("attach", "append a zit_merge section to an AI-Toolkit config; a backup is kept")
    attach.add_argument("config", type=Path)
    attach.add_argument("--section", type=Path, required=True, metavar="FILE", help="YAML or JSON: a section, a recipe, or a job")
    attach.add_argument("--replace", action="store_true", help="put it in the place of the config's own zit_merge section")
    return parser


def _add_folders(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--output-dir", help="instead of the config's")
    sub.add_argument("--loras", type=Path, nargs="+", default=[], metavar="DIR", help="where a recipe's inputs are found by hash")


def _inspect_arguments(inspect: argparse.ArgumentParser) -> None:
    inspect.add_argument("files", type=Path, nargs="*", metavar="FILE")
    inspect.add_argument(
        "--sources",
        type=Path,
        nargs="+",
        metavar="FILE",
        help=f"tell how strong each is in the file; {', '.join(ADAPTERS)} too",
    )
    inspect.add_argument("--base", type=Path, metavar="MODEL", help="FILE is a whole model: compare it with the one it came from")
    inspect.add_argument("--json", action="store_true")
    inspect.add_argument(
        "--html", type=Path, metavar="OUT", help="also write a page to look at, with a composer for a merge of the files"
    )
    inspect.add_argument("--full-paths", action="store_true", help="whole paths in --json and --html, with the names of users")
    inspect.add_argument("--plot", type=Path, metavar="OUT", help="draw it too: a .png, .pdf or .svg file")
    inspect.add_argument("--methods", action="store_true", help="list the merge methods")
    inspect.add_argument("--presets", action="store_true", help="list the presets")


def _studio_arguments(studio: argparse.ArgumentParser) -> None:
    studio.add_argument("files", type=Path, nargs="+", metavar="FILE", help="LoRAs to compose with")
    studio.add_argument(
        "-o", "--out", type=Path, default=Path("output"), metavar="DIR", help="where LoRAs and pictures go (default: output)"
    )
    studio.add_argument("--model", metavar="PATH", help="Z-Image Turbo, for pictures: a folder or user/repo; needs AI-Toolkit")
    studio.add_argument("--prompt", nargs="+", metavar="TEXT", help="of the pictures, one or more")
    studio.add_argument("--size", type=int, metavar="PIXELS", help="of a side (default: 1024)")
    studio.add_argument("--steps", type=int, metavar="N", help="of a picture, as AI-Toolkit counts them (default: 9)")
    studio.add_argument("--quantize", action="store_true", help="load the model in 8 bits")
    studio.add_argument("--low-vram", action="store_true", help="keep the model outside of the GPU's memory between pictures")
    studio.add_argument(
        "--minutes", type=float, default=30, metavar="N", help="close when nobody used it for so long (default: 30)"
    )
    studio.add_argument(
        "--port", type=int, default=8866, help="of the loopback address (default: 8866, which AI-Toolkit's UI forwards)"
    )
    studio.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")


def _merge_arguments(merge: argparse.ArgumentParser) -> None:
    _weight_arguments(merge)
    _file_arguments(merge)
    merge.add_argument("--base", metavar="PATH", help="the model whose weights DoRA, OFT, BOFT, IA3 and GLoRA need")
    merge.add_argument("--keep-lokr", action="store_true", help="a single LoKr stays a LoKr")
    _add_run(merge)


def _bake_arguments(bake: argparse.ArgumentParser) -> None:
    _weight_arguments(bake)
    bake.add_argument("--base", required=True, metavar="PATH", help="the model: a diffusers folder, ComfyUI's file, or user/repo")
    bake.add_argument("--format", help="diffusers, a folder, or comfyui, a file (default: what OUT is)")
    bake.add_argument("--dtype", help="bf16, fp16, fp32 or fp8 (default: that of the base)")
    bake.add_argument("--rounding", default="nearest", help="nearest (default) or stochastic, exact in the mean")
    bake.add_argument("--seed", type=int, default=0, help="of stochastic rounding (default: 0)")
    _add_run(bake)


def _extract_arguments(extract: argparse.ArgumentParser) -> None:
    extract.add_argument("model", metavar="FINETUNED", help="a diffusers folder, ComfyUI's file, or user/repo")
    extract.add_argument("--base", required=True, metavar="BASE", help="the model that it was trained from")
    extract.add_argument("-o", "--out", type=Path, required=True, metavar="OUT")
    extract.add_argument("--rank", default="64", help="a number (default: 64), energy=0.99,max=128 or size_mb=300")
    _file_arguments(extract)
    _model_arguments(extract)
    _add_run(extract)


def _file_arguments(sub: argparse.ArgumentParser) -> None:
    """How a LoRA is stored."""
    sub.add_argument("--uniform", choices=("true", "false"), default="true", help="false: each module has a rank of its own")
    sub.add_argument("--dtype", default="bf16", help="bf16 (default), fp16, fp32 or same")
    sub.add_argument("--format", default="ai-toolkit", help="ai-toolkit (default), diffusers, kohya or comfyui")
    sub.add_argument("--confirm-size", action="store_true", help="write a file of over 2 GB")


def _model_arguments(sub: argparse.ArgumentParser) -> None:
    """Where the algebra runs, and for which model."""
    sub.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    sub.add_argument("--shapes", default="strict", help="free: any one consistent set of sizes, for pruned models")


def _weight_arguments(sub: argparse.ArgumentParser) -> None:
    """What goes in and how strong, with which method and rank."""
    sub.add_argument("files", nargs="+", metavar="FILE", help="a .safetensors file, or hf:user/repo/file.safetensors")
    sub.add_argument("-o", "--out", type=Path, required=True, metavar="OUT")
    sub.add_argument("--ratio", type=float, nargs="+", required=True, metavar="R")
    for flag in WEIGHT_FLAGS:
        sub.add_argument(f"--{flag}", type=float, nargs="+", metavar="W")
    sub.add_argument("--layers", nargs="+", metavar="SPEC", help='such as "0-9=0.5,10-29=1:0.6"')
    sub.add_argument("--preset", nargs="+", metavar="NAME", help="a shipped set of weights, see inspect --presets")
    sub.add_argument("--alpha", nargs="+", metavar="A", help="key, metadata, none or a number, where a file leaves it open")
    sub.add_argument("--qkv", nargs="+", metavar="WHICH", help="split, fused or sum, where a file changes a module twice")
    sub.add_argument("--drop", nargs="+", default=[], metavar="VECTORS", help="norm, bias: leave out what no LoRA can hold")
    sub.add_argument("--rank", default="exact", help="exact (default), same, a number, energy=0.99,max=64 or size_mb=150")
    sub.add_argument("--method", default="sum", help="sum (default), see inspect --methods")
    sub.add_argument("--params", nargs="+", default=[], metavar="NAME=VALUE", help="of the method, such as density=0.3 seed=1")
    _model_arguments(sub)
    sub.add_argument("--allow-unmatched", action="store_true", help="merge although a file holds unknown keys")


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dry-run", action="store_true", help="print what would be done, write nothing")
    _add_strict(command)


def _add_strict(command: argparse.ArgumentParser) -> None:
    command.add_argument("--strict", action="store_true", help="exit 1 when a result is off or empty; its file is kept")
