"""`merge`, `bake` and `extract`: the one-liners."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from ..api import OUTPUT
from ..api import merge as describe
from ..errors import SettingError, ZitMergeError, counted
from ..planning.planned import Planned
from ..report.progress import Bar
from ..report.text.plan import plan_text
from ..section import run_section, what_is_not_right
from .console import say, tell_what_is_not_right
from .parser import WEIGHT_FLAGS

_SETTINGS = ("dtype", "format", "keep_lokr", "device", "method", "shapes", "allow_unmatched", "confirm_size", "base")
_OF_BAKE = ("base", "format", "dtype", "rounding", "seed")


def merge(args: argparse.Namespace) -> None:
    """Merges files with the weights of the flags."""
    with _as_flags(len(args.files)):
        settings = _settings(args, _SETTINGS) | {"params": _pairs(args.params, "--params"), "uniform": args.uniform == "true"}
        described = describe(list(zip(args.files, _weights(args), strict=True)), **settings)
        _run(args, described.planned(args.out, may_download=not args.dry_run))


def bake(args: argparse.Namespace) -> None:
    """Writes a model with the merge of files in it."""
    with _as_flags(len(args.files)):
        settings = _settings(args, ("device", "method", "shapes", "allow_unmatched", "base")) | {
            "params": _pairs(args.params, "--params")
        }
        described = describe(list(zip(args.files, _weights(args), strict=True)), **settings)
        asked = {key: getattr(args, key) for key in _OF_BAKE}
        asked["format"] = args.format or ("comfyui" if args.out.suffix == ".safetensors" else "diffusers")
        _run(args, described.planned_model(args.out, asked, may_download=not args.dry_run))


def extract(args: argparse.Namespace) -> None:
    """Makes a LoRA of the difference of two models."""
    with _as_flags(1):
        keys = ("dtype", "format", "device", "shapes", "confirm_size")
        settings = _settings(args, keys) | {"uniform": args.uniform == "true"}
        described = describe([({"extract": args.model, "base": args.base}, 1.0)], **settings)
        _run(args, described.planned(args.out, may_download=not args.dry_run))


def _settings(args: argparse.Namespace, keys: Sequence[str]) -> dict[str, Any]:
    return {"rank": _rank(args.rank)} | {key: getattr(args, key) for key in keys}


def _run(args: argparse.Namespace, planned: Planned) -> None:
    say(args, "\n\n".join(map(plan_text, planned.plans)) + "\n")
    if not args.dry_run:
        done = list(run_section(planned, None, partial(say, args), Bar(args.quiet)))
        tell_what_is_not_right(args, what_is_not_right(done))


@contextmanager
def _as_flags(count: int) -> Iterator[None]:
    """Errors in the words of the command line: `loras[1].blocks.to_q` as --to_q (file 2), `set rank: 64` as --rank 64."""
    try:
        yield
    except SettingError as e:
        e.loc, e.message = _flag(e.loc, count), _advice(e.message)
        raise
    except ZitMergeError as e:
        e.args = (_advice(e.args[0]),)
        raise


# What messages advise, `key: value` as in a config, and the same as flags. Only values that they advise: paths may hold anything.
_KEYS = re.compile(
    r"\b(?:(?P<bare>allow_unmatched|confirm_size|keep_lokr): true|drop: \[(?P<drop>(?:norm|bias|, )+)\]"
    r"|(?P<key>alpha|base|dtype|format|method|qkv|rank|rounding|shapes|uniform): "
    r"(?P<value>none|key|metadata|to|bf16|fp16|fp32|comfyui|diffusers|sum|average|split|fused|\d+|stochastic|free|false))(?![\w/\\.-])"
)
_RULE = re.compile(r"(?:\brank: )?\{(?P<rule>(?:energy|size_mb|weigh|max)[^}]*)\}")


def _advice(text: str) -> str:
    """A sentence with flags in the place of keys and values: `set drop: [norm, bias]` as `set --drop norm bias`."""

    def flag(found: re.Match[str]) -> str:
        if found["bare"]:
            return f"--{found['bare'].replace('_', '-')}"
        return f"--drop {found['drop'].replace(',', '')}" if found["drop"] else f"--{found['key']} {found['value']}"

    def rule(found: re.Match[str]) -> str:
        return "--rank " * found[0].startswith("rank") + found["rule"].replace(": ", "=").replace(", ", ",")

    return _KEYS.sub(flag, _RULE.sub(rule, re.sub(r"\bsave: \{(\w+: \w+)\}", r"\1", text)))


def _flag(loc: str, count: int) -> str:
    of_lora = re.fullmatch(r"loras\[(\d+)\]\.?(.*)", loc)
    if loc == "bake":  # the form of its name, and whether it may be written
        return "--out"
    if not of_lora:
        first, _, rest = loc.removeprefix("bake.").partition(".")
        if first not in ("rank", "params", "save", *_SETTINGS, *_OF_BAKE):
            return "--out" if loc == OUTPUT else loc
        flag, rest = (rest, "") if first == "save" else (first, rest)
        return " ".join(filter(None, [f"--{flag.replace('_', '-')}", rest]))
    number, (table, _, entry) = int(of_lora[1]) + 1, of_lora[2].partition(".")
    if table.startswith("drop"):  # one list for all files
        return "--drop"
    if table == "lora" and entry in ("extract", "base"):
        return "--base" if entry == "base" else "FINETUNED"
    if table in ("", "lora") or (table == "blocks" and not entry):
        return f"file {number}"
    flag = entry if table == "blocks" else table
    return f"--{flag}{f' {entry}' * (table == 'layers' and bool(entry))}" + (f" (file {number})" if count > 1 else "")


def _weights(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The weights of each file, from flags with one value for all or one for each."""
    count = len(args.files)

    def each(flag: str, values: Sequence[Any]) -> Sequence[Any]:
        if len(values) not in (1, count):
            got = f"got {counted(len(values), 'value')} for {counted(count, 'file')}"
            raise SettingError(f"{got}: give one for all, or one for each", f"--{flag}")
        return values if len(values) == count else list(values) * count

    weights = [{"ratio": ratio, "blocks": {}} for ratio in each("ratio", args.ratio)]
    for flag in WEIGHT_FLAGS:
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
            raise SettingError(f"{word!r} is not NAME=VALUE, such as density=0.3", flag)
        if name.strip() in found:
            raise SettingError(f"duplicate {name.strip()}: keep one of them", flag)
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
            raise SettingError(
                f'{part!r} is not LAYERS=WEIGHT or LAYERS=FROM:TO, such as "0-9=0.5,10-29=1:0.6"', f"--layers {spec}"
            )
        if key in layers:
            raise SettingError(f"duplicate {key}: keep one of them", f"--layers {spec}")
        layers[key] = numbers[0] if len(numbers) == 1 else numbers
    return layers
