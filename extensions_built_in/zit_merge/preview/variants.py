"""What a picture shows: the base model, an input, the result of a step, or a part of one, each as a delta of every module."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..formats.checkpoint import Seen
from ..planning.types import Input, StepPlan, with_hashes
from .groups import ModuleGroup

if TYPE_CHECKING:
    from ..algebra.delta import Delta

ReadDeltas = Callable[[Input | StepPlan], Iterable[tuple[str, "Delta"]]]  # (module, delta) of an input at strength 1 or a step


@dataclass(frozen=True, eq=False)
class AdapterVariant:
    """The base model without an adapter; the other variants derive from it.

    Attributes:
        label: The caption of its pictures.
    """

    label: str

    def files(self) -> Mapping[Path, Seen]:
        """The files whose hashes its record needs, as they were when they were planned."""
        return {}

    def record(self, hashes: Mapping[Path, str]) -> dict[str, Any]:
        """Everything that determines its deltas, for JSON; the same for equal variants.

        Args:
            hashes: Path -> SHA-256 of the tensor data, of `files`.
        """
        return {}

    def deltas(self, read: ReadDeltas) -> Iterator[tuple[str, Delta]]:
        """(module, delta) of every module that it changes.

        Args:
            read: Reads inputs and steps.
        """
        yield from ()


@dataclass(frozen=True, eq=False)
class InputVariant(AdapterVariant):
    """One input of a step at strength 1.

    Attributes:
        input: The input.
    """

    input: Input

    def files(self) -> Mapping[Path, Seen]:
        i = self.input
        models: dict[Path, Seen] = {model.path: model for model in i.models}
        return models | dict(i.step.hashed if i.step else {} if i.pair else {i.path: i.lora.stamp if i.lora else None})

    def record(self, hashes: Mapping[Path, str]) -> dict[str, Any]:
        i = self.input
        if i.step:
            return _numbers(i.step, hashes)
        if i.pair:
            return {"extract": hashes[i.pair.tuned.path], "base": hashes[i.pair.base.path]}
        answers = {key: value for key in ("alpha", "qkv", "drop") if (value := getattr(i.spec, key))}
        adapter = {"adapter": i.lora.adapter.record()} if i.lora and i.lora.adapter else {}
        base = {"base": hashes[i.model.path]} if i.model else {}
        return {"lora": hashes[i.path], **answers, **adapter, **base}

    def deltas(self, read: ReadDeltas) -> Iterator[tuple[str, Delta]]:
        yield from read(self.input)


@dataclass(frozen=True, eq=False)
class StepVariant(AdapterVariant):
    """The result of a step.

    Attributes:
        plan: The step, final; its strengths may differ from those of the config.
    """

    plan: StepPlan

    def files(self) -> Mapping[Path, Seen]:
        return self.plan.hashed

    def record(self, hashes: Mapping[Path, str]) -> dict[str, Any]:
        return _numbers(self.plan, hashes)

    def deltas(self, read: ReadDeltas) -> Iterator[tuple[str, Delta]]:
        yield from read(self.plan)


@dataclass(frozen=True, eq=False)
class MaskedVariant(AdapterVariant):
    """A variant without a group of modules, or with nothing else.

    Attributes:
        whole: The variant.
        group: The modules.
        only: Keeps the group instead of leaving it out.
    """

    whole: AdapterVariant
    group: ModuleGroup
    only: bool

    def files(self) -> Mapping[Path, Seen]:
        return self.whole.files()

    def record(self, hashes: Mapping[Path, str]) -> dict[str, Any]:
        return {"only" if self.only else "without": sorted(self.group.modules), "of": self.whole.record(hashes)}

    def deltas(self, read: ReadDeltas) -> Iterator[tuple[str, Delta]]:
        chosen = set(self.group.modules)
        yield from ((module, delta) for module, delta in self.whole.deltas(read) if (module in chosen) == self.only)


_STEP_KEYS = ("method", "params", "rank", "save", "base_sha256")
_SPELLING = ("lora", "sha256", "blocks", "layers", "effects", "overrides", "unmatched")  # `strengths` has what they lead to


def _numbers(plan: StepPlan, hashes: Mapping[Path, str]) -> dict[str, Any]:
    """A step's recipe as far as it affects the numbers: without the names of files and steps and the spelling of strengths."""
    steps = with_hashes(plan.recipe, hashes)["steps"]
    index = {step["name"]: n for n, step in enumerate(steps)}

    def lora_numbers(lora: Mapping[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in lora.items() if key not in _SPELLING}
        return {"lora": lora.get("sha256") or index[lora["lora"]], **kept}

    return {"steps": [{k: s[k] for k in _STEP_KEYS if k in s} | {"loras": list(map(lora_numbers, s["loras"]))} for s in steps]}


def digest(record: Mapping[str, Any]) -> str:
    """A short name of a record: the same for equal records, on every machine."""
    return hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()[:24]
