"""What a picture can show: the base model, an input, a result, a part of a result - each of them a change of every module."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..algebra.delta import Delta
from ..merging.runner import Reader, input_reader, reader_of
from ..planning.recipe import recipe_of
from ..planning.types import Input, StepPlan
from .ablation import Group


class ReadContext(NamedTuple):
    """What it takes to read a variant.

    Attributes:
        hashes: Path -> SHA-256 of the tensor data of every file in use.
        device: Where the algebra runs.
        watched: Passes the modules of a pass over all of them on one by one; may raise to stop.
    """

    hashes: Mapping[Path, Future[str]]
    device: torch.device
    watched: Watched = iter


@dataclass(frozen=True, eq=False)
class AdapterVariant:
    """The base model as it is, and what every other variant begins with.

    Attributes:
        label: What stands beside its pictures.
    """

    label: str

    def files(self) -> list[Path]:
        """The files whose hashes its record needs."""
        return []

    def record(self, hashes: Mapping[Path, str]) -> dict[str, Any]:
        """Everything that its change follows from, for JSON; equal for variants that are equal."""
        return {}

    def deltas(self, ctx: ReadContext) -> Iterator[tuple[str, Delta]]:
        """(module, change) for every module that it changes."""
        yield from ()


@dataclass(frozen=True, eq=False)
class InputVariant(AdapterVariant):
    """An input of a step by itself, at strength 1.

    Attributes:
        input: The input.
    """

    input: Input

    def files(self) -> list[Path]:
        return [self.input.lora.path] if self.input.lora else self.input.step.hashed

    def record(self, hashes: Mapping[Path, str]) -> dict[str, Any]:
        i = self.input
        if not i.lora:
            return _steps(i.step, hashes)
        answers = {key: value for key in ("alpha", "qkv", "drop") if (value := getattr(i.spec, key))}
        adapter = {"adapter": i.lora.adapter.record()} if i.lora.adapter else {}
        return {"lora": hashes[i.lora.path], **answers, **adapter}

    def deltas(self, ctx: ReadContext) -> Iterator[tuple[str, Delta]]:
        with ExitStack() as files:
            yield from _read(input_reader(self.input, ctx.hashes, ctx.device, files, ctx.watched), self.input.outline.ranks)


@dataclass(frozen=True, eq=False)
class StepVariant(AdapterVariant):
    """What a step makes.

    Attributes:
        plan: The step, final; it may differ from that of the config in its strengths.
    """

    plan: StepPlan

    def files(self) -> list[Path]:
        return self.plan.hashed

    def record(self, hashes: Mapping[Path, str]) -> dict[str, Any]:
        return _steps(self.plan, hashes)

    def deltas(self, ctx: ReadContext) -> Iterator[tuple[str, Delta]]:
        with ExitStack() as files:
            yield from _read(reader_of(self.plan, ctx.hashes, ctx.device, files, ctx.watched), self.plan.shapes)


@dataclass(frozen=True, eq=False)
class MaskedVariant(AdapterVariant):
    """A variant without a group of modules, or with nothing else.

    Attributes:
        whole: The variant.
        group: The modules.
        only: Nothing but them.
    """

    whole: AdapterVariant
    group: Group
    only: bool

    def files(self) -> list[Path]:
        return self.whole.files()

    def record(self, hashes: Mapping[Path, str]) -> dict[str, Any]:
        return {"only" if self.only else "without": sorted(self.group.modules), "of": self.whole.record(hashes)}

    def deltas(self, ctx: ReadContext) -> Iterator[tuple[str, Delta]]:
        chosen = set(self.group.modules)
        yield from ((module, delta) for module, delta in self.whole.deltas(ctx) if (module in chosen) == self.only)


_NUMBERS = ("method", "params", "rank", "save")  # of a step
_SPELLED = ("lora", "sha256", "blocks", "layers", "effects", "overrides", "unmatched")  # of an input: `strengths` has the sums


def _steps(plan: StepPlan, hashes: Mapping[Path, str]) -> dict[str, Any]:
    """A step's recipe without what has no part in its numbers: the names of files and steps, and how strengths are spelled."""
    steps = recipe_of(plan, hashes)["steps"]
    numbers = {step["name"]: n for n, step in enumerate(steps)}

    def source(lora: Mapping[str, Any]) -> dict[str, Any]:
        known = {key: value for key, value in lora.items() if key not in _SPELLED}
        return {"lora": lora.get("sha256") or numbers[lora["lora"]], **known}

    return {"steps": [{k: s[k] for k in _NUMBERS if k in s} | {"loras": list(map(source, s["loras"]))} for s in steps]}


def _read(reader: Reader, modules: Mapping[str, Any]) -> Iterator[tuple[str, Delta]]:
    for module in modules:
        scale, delta = reader.delta(module)
        yield module, delta.times(scale)


def digest(record: Mapping[str, Any]) -> str:
    """A short name for a record: equal records have equal ones, on every machine."""
    return hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()[:24]
