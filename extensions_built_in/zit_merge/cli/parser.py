"""The words of the command line: commands and flags."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..files.adapters import ADAPTERS
from ..model.zimage import ALIASES, COMPONENTS, GROUPS
from ..wording import WIDTH, shown

Command = Callable[[argparse.Namespace], None]
WEIGHT_FLAGS = (*COMPONENTS, *ALIASES, *GROUPS)
SCRIPT, MODULE = "zit-merge", "python -m extensions_built_in.zit_merge"
# A command of each kind; the manual has more.
EXAMPLES = {
    "demo": "demo",
    "run": "run config/my_char_v1.yaml --dry-run",
    "preview": "preview config/my_char_v1.yaml --dry-run",
    "studio": "studio me.safetensors style.safetensors --model Tongyi-MAI/Z-Image-Turbo",
    "merge": 'merge me.safetensors style.safetensors -o both.safetensors --ratio 0.9 0.6 --to_q 1.1 --layers "0-9=0.5"',
    "bake": "bake me.safetensors --ratio 0.9 --base Tongyi-MAI/Z-Image-Turbo -o my_model.safetensors",
    "extract": "extract tuned.safetensors --base Tongyi-MAI/Z-Image -o tuned_lora.safetensors --rank 64",
    "check": "check config/my_char_v1.yaml",
    "inspect": "inspect me.safetensors style.safetensors --html page.html",
    "recipe": "recipe both.safetensors",
    "install": "install /path/to/ai-toolkit",
    "attach": "attach config/my_char_v1.yaml --section merge.yaml",
}


def program() -> str:
    """How this program was started, as it is typed."""
    return SCRIPT if Path(sys.argv[0]).stem.removesuffix("-script") == SCRIPT else MODULE


def first_steps() -> str:
    """What somebody types first."""
    name = program()
    return f"""\
Try it, with two small LoRAs that it makes itself (seconds, no downloads):
    {name} demo
Merge two files of your own:
    {name} merge A.safetensors B.safetensors -o both.safetensors --ratio 0.9 0.6
All commands, and the flags of one:
    {name} --help
    {name} merge --help"""


class _Parser(argparse.ArgumentParser):
    """Its messages repeat words of the command line, such as the names that a pattern found."""

    def _print_message(self, message: str, file: Any = None) -> None:
        print(shown(message), end="", file=file or sys.stderr)


def build_parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The parser of all commands. Without a command the `command` of what it returns is None.

    Args:
        commands: Name -> what runs it.
    """
    parser = _Parser(
        prog=program(),
        description="Merge Z-Image Turbo LoRAs, block by block.",
        epilog=first_steps(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"zit_merge {__version__}")
    parser.set_defaults(command=None)
    subparsers = parser.add_subparsers(metavar="COMMAND", title="commands")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(
            name,
            help=text,
            description=textwrap.fill(text, WIDTH),
            epilog=f"example:\n    {parser.prog} {EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in ("merge", "bake"):  # their flags take a page
            sub.usage = f"%(prog)s FILE [FILE ...] -o OUT --ratio R [R ...]{' --base PATH' * (name == 'bake')} [flags]"
        sub.set_defaults(command=commands[name])
        sub.add_argument("--quiet", action="store_true", help="print no progress and no plan")
        return sub

    demo = add("demo", "make two small LoRAs, merge them with block weights, check the result")
    demo.add_argument("--out", type=Path, default=Path("zit_merge_demo"), help="folder for the files (default: %(default)s)")

    run = add("run", "run the zit_merge sections of an AI-Toolkit config, or a recipe")
    _add_config(run)
    run.add_argument("--step", metavar="NAME", help="only this step, and the earlier ones that it uses")
    run.add_argument("--dry-run", action="store_true", help="print what would be done, write nothing")
    _add_strict(run)
    _add_folders(run)

    preview = add("preview", "render the pictures that a config asks for; in AI-Toolkit's folder, or under accelerate launch")
    _add_config(preview)
    preview.add_argument("--step", metavar="NAME", help="only this step")
    _add_folders(preview)
    preview.add_argument("--dry-run", action="store_true", help="print what would be rendered, render nothing")
    preview.add_argument("--yaml", metavar="STEP:NUMBER", help="print the section that makes this picture of a step's sweep")

    _studio_arguments(add("studio", "open the live merge page of LoRA files: weigh, measure, look, keep"))
    _merge_arguments(add("merge", "merge LoRA files: every weight takes one number for all files, or one for each"))
    _bake_arguments(add("bake", "write a whole model with a merge of LoRAs in it"))
    _extract_arguments(add("extract", "make a LoRA of what a fine-tuned model changed"))

    check = add("check", "check a config: everything that can be known before training")
    _add_config(check)
    _add_folders(check)

    _inspect_arguments(add("inspect", "show what is in a LoRA file, or what several have in common"))

    recipe = add("recipe", "print the section that made a file, as YAML that `run` takes")
    recipe.add_argument("file", type=Path, metavar="FILE", help="a LoRA, or a model, that zit_merge wrote")

    install = add("install", "put the extension into an AI-Toolkit folder and check that it loads there")
    install.add_argument("folder", type=Path, metavar="AI_TOOLKIT_DIR", help="the folder that has AI-Toolkit's run.py")
    install.add_argument("--copy", action="store_true", help="copy the files instead of linking to them")
    install.add_argument("--remove", action="store_true", help="take out what install put there; files that you changed are kept")

    attach = add("attach", "append a zit_merge section to an AI-Toolkit config; a backup is kept")
    _add_config(attach)
    attach.add_argument("--section", type=Path, required=True, metavar="FILE", help="YAML or JSON: a section, a recipe, or a job")
    attach.add_argument("--replace", action="store_true", help="put it in the place of the config's own zit_merge section")
    return parser


def _add_config(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("config", type=Path, metavar="CONFIG", help="an AI-Toolkit job as YAML or JSON")


def _add_folders(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--output-dir", metavar="DIR", help="instead of the config's")
    sub.add_argument("--loras", type=Path, nargs="+", default=[], metavar="DIR", help="where a recipe's inputs are found by hash")


def _inspect_arguments(inspect: argparse.ArgumentParser) -> None:
    inspect.add_argument("files", type=Path, nargs="*", metavar="FILE", help="a LoRA, several to compare, or a whole model")
    inspect.add_argument(
        "--sources",
        type=Path,
        nargs="+",
        metavar="FILE",
        help=f"tell how strong each is in the file; {', '.join(ADAPTERS)} too",
    )
    inspect.add_argument("--base", type=Path, metavar="MODEL", help="FILE is a whole model: compare it with the one it came from")
    inspect.add_argument("--json", action="store_true", help="print it for programs")
    inspect.add_argument("--html", type=Path, metavar="OUT", help="also write the report page, with a composer for a merge")
    inspect.add_argument("--full-paths", action="store_true", help="whole paths in --json and --html, with the names of users")
    inspect.add_argument("--plot", type=Path, metavar="OUT", help="also draw it: a .png, .pdf or .svg file")
    inspect.add_argument("--methods", action="store_true", help="list the merge methods")
    inspect.add_argument("--presets", action="store_true", help="list the presets")


def _studio_arguments(studio: argparse.ArgumentParser) -> None:
    add = studio.add_argument
    add("files", type=Path, nargs="+", metavar="FILE", help="LoRAs to compose with")
    add("-o", "--out", type=Path, default=Path("output"), metavar="DIR", help="where LoRAs and pictures go (default: output)")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    minutes, port = _within(float, 0.1, 10_000), _within(int, 0, 65535)
    add("--minutes", type=minutes, default=30, metavar="N", help="close when nobody used it for so long (default: 30)")
    add("--port", type=port, default=8866, help="of the loopback address (default: 8866, which AI-Toolkit's UI forwards)")
    pictures = studio.add_argument_group("pictures", "rendered by AI-Toolkit: run this in its folder").add_argument
    size, steps = _within(int, 64, 4096), _within(int, 1, 200)
    pictures("--model", metavar="PATH", help="Z-Image Turbo: a folder or user/repo")
    pictures("--prompt", nargs="+", metavar="TEXT", help="one or more")
    pictures("--size", type=size, metavar="PIXELS", help="of a side (default: 1024)")
    pictures("--steps", type=steps, metavar="N", help="as AI-Toolkit counts them (default: 9)")
    pictures("--quantize", action="store_true", help="load the model in 8 bits")
    pictures("--low-vram", action="store_true", help="keep the model outside of the GPU's memory between pictures")


def _within(kind: type, low: float, high: float) -> Callable[[str], Any]:
    """The type of a number of a flag, for argparse."""

    def number(word: str) -> Any:
        value = kind(word)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be {low:g} to {high:g}, not {word}")
        return value

    number.__name__ = "number"  # argparse says: invalid number value
    return number


def _merge_arguments(merge: argparse.ArgumentParser) -> None:
    _add_files(merge, "the merged LoRA, a .safetensors file")
    _weight_arguments(merge)
    _file_arguments(merge).add_argument("--keep-lokr", action="store_true", help="a single LoKr stays a LoKr")
    _model_arguments(merge).add_argument("--base", metavar="PATH", help="what DoRA, OFT, BOFT, IA3 and GLoRA were trained on")
    _add_run(merge)


def _bake_arguments(bake: argparse.ArgumentParser) -> None:
    _add_files(bake, "a .safetensors file for ComfyUI, or a folder for diffusers")
    _weight_arguments(bake)
    model = bake.add_argument_group("the model that is written")
    model.add_argument("--base", required=True, metavar="PATH", help="a diffusers folder, ComfyUI's file, or user/repo")
    model.add_argument("--format", metavar="FORM", help="diffusers, a folder, or comfyui, a file (default: what OUT is)")
    model.add_argument("--dtype", metavar="D", help="bf16, fp16, fp32 or fp8 (default: that of the base)")
    model.add_argument("--rounding", metavar="HOW", default="nearest", help="nearest (default) or stochastic, exact in the mean")
    model.add_argument("--seed", metavar="N", type=int, default=0, help="of stochastic rounding (default: 0)")
    _model_arguments(bake)
    _add_run(bake)


def _extract_arguments(extract: argparse.ArgumentParser) -> None:
    extract.add_argument("model", metavar="FINETUNED", help="a diffusers folder, ComfyUI's file, or user/repo")
    extract.add_argument("--base", required=True, metavar="BASE", help="the model that it was trained from")
    extract.add_argument("-o", "--out", type=Path, required=True, metavar="OUT", help="the LoRA, a .safetensors file")
    extract.add_argument("--rank", metavar="R", default="64", help="a number (default: 64), energy=0.99,max=128 or size_mb=300")
    _file_arguments(extract)
    _model_arguments(extract)
    _add_run(extract)


def _file_arguments(sub: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """How a LoRA is stored."""
    stored = sub.add_argument_group("how it is stored")
    stored.add_argument("--dtype", metavar="D", default="bf16", help="bf16 (default), fp16, fp32 or same")
    stored.add_argument(
        "--format", metavar="FORM", default="ai-toolkit", help="ai-toolkit (default), diffusers, kohya or comfyui"
    )
    stored.add_argument("--uniform", choices=("true", "false"), default="true", help="false: each module has a rank of its own")
    stored.add_argument("--confirm-size", action="store_true", help="write a file of over 2 GB")
    return stored


def _model_arguments(sub: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Where the algebra runs, and for which model."""
    runs = sub.add_argument_group("device and model")
    runs.add_argument("--device", metavar="D", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    runs.add_argument("--shapes", metavar="S", default="strict", help="free: any one consistent set of sizes, for pruned models")
    return runs


def _add_files(sub: argparse.ArgumentParser, out: str) -> None:
    sub.add_argument("files", nargs="+", metavar="FILE", help="a .safetensors file, or hf:user/repo/file.safetensors")
    sub.add_argument("-o", "--out", type=Path, required=True, metavar="OUT", help=out)


def _weight_arguments(sub: argparse.ArgumentParser) -> None:
    """What goes in and how strong, with which method and rank."""
    strength = sub.add_argument_group("strengths", "one number for all files, or one for each; what is left out is 1")
    strength.add_argument("--ratio", type=float, nargs="+", required=True, metavar="R", help="of the whole LoRA")
    for flag in WEIGHT_FLAGS:
        strength.add_argument(f"--{flag}", type=float, nargs="+", metavar="W", help=_WEIGHT_HELP.get(flag, _of_group(flag)))
    strength.add_argument("--layers", nargs="+", metavar="SPEC", help='such as "0-9=0.5,10-29=1:0.6"')
    strength.add_argument("--preset", nargs="+", metavar="NAME", help="a shipped set of weights, see inspect --presets")
    how = sub.add_argument_group("rank and method")
    how.add_argument(
        "--rank", metavar="R", default="exact", help="exact (default), same, a number, energy=0.99,max=64 or size_mb=150"
    )
    how.add_argument("--method", metavar="M", default="sum", help="sum (default), see inspect --methods")
    how.add_argument("--params", nargs="+", default=[], metavar="NAME=VALUE", help="of the method, such as density=0.3 seed=1")
    left_open = sub.add_argument_group("what a file leaves open", "a merge asks for these where it needs them")
    left_open.add_argument("--alpha", nargs="+", metavar="A", help="key, metadata, none or a number")
    left_open.add_argument("--qkv", nargs="+", metavar="WHICH", help="split, fused or sum, where a file changes a module twice")
    left_open.add_argument("--drop", nargs="+", default=[], metavar="VECTORS", help="norm, bias: leave out what no LoRA can hold")
    left_open.add_argument("--allow-unmatched", action="store_true", help="merge although a file holds unknown keys")


_WEIGHT_HELP = {
    "adaLN_modulation": "modulation by the time step",
    "adaLN": "short for --adaLN_modulation",
    "to_q": "attention, queries",
    "to_k": "attention, keys",
    "to_v": "attention, values",
    "to_out": "attention, output",
    "w1": "feed-forward, gate",
    "w2": "feed-forward, output",
    "w3": "feed-forward, input",
}


def _of_group(flag: str) -> str:
    """The components of a group, where a flag of its own does not say otherwise."""
    return f"{', '.join(GROUPS.get(flag, ()))}; a smaller group wins"


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dry-run", action="store_true", help="print what would be done, write nothing")
    _add_strict(command)


def _add_strict(command: argparse.ArgumentParser) -> None:
    command.add_argument("--strict", action="store_true", help="exit 1 when a result is off or empty; its file is kept")
