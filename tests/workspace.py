"""A folder to work in: small LoRA files, config files, and the command line called in-process."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from oracles import producers

from extensions_built_in.zit_merge import merge
from extensions_built_in.zit_merge.cli.main import main
from extensions_built_in.zit_merge.files import hub

SMALL = producers.small_shapes(dim=8, ffn=16, temb=8, cap=8)


def of_layers(shapes: producers.Shapes, *layers: int) -> producers.Shapes:
    """The modules of these layers, and all that are in none."""
    return {m: shape for m, shape in shapes.items() if not m.startswith("layers.") or int(m.split(".")[1]) in layers}


FEW = of_layers(SMALL, 0, 3, 29)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
REAL = {
    "layers.0.adaLN_modulation.0": (15360, 256),
    "layers.0.attention.to_q": (3840, 3840),
    "layers.0.attention.to_v": (3840, 3840),
}


def lora_bytes(producer: str, rank: int, seed: int, shapes: producers.Shapes) -> bytes:
    """A LoRA file of a trainer."""
    made = producers.PRODUCERS[producer].make(shapes, rank, seed, torch.bfloat16)
    return safetensors.torch.save({k: v.contiguous() for k, v in made.tensors.items()}, made.metadata or None)


@cache
def _small_bytes(producer: str, rank: int, seed: int, shapes: tuple[tuple[str, tuple[int, int]], ...]) -> bytes:
    return lora_bytes(producer, rank, seed, dict(shapes))


def write_lora(
    folder: Path,
    producer: str,
    rank: int = 2,
    seed: int = 0,
    *,
    shapes: producers.Shapes = SMALL,
    dtype: torch.dtype = torch.float32,
    stem: str = "",
) -> tuple[Path, producers.Made]:
    """Writes a trainer's file with what lies beside it. Returns the path, and what is in it."""
    made = producers.PRODUCERS[producer].make(shapes, rank, seed, dtype)
    path = folder / f"{stem or producer}.safetensors"
    producers.save(made, path)
    producers.save_sidecars(made, folder)
    return path, made


def merge_into(folder: Path, loras: Sequence[Any], name: str = "out", **how: Any) -> Path:
    """Merges LoRAs into a file of the folder; those of a small model, in fp32, unless `how` says otherwise."""
    return merge(loras, **{"shapes": "free", "dtype": "fp32", "device": "cpu"} | how).save(folder / f"{name}.safetensors")


def empty_hub_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hugging Face hub, offline, in a process that was given nothing from it yet."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_pins", {})
    return folder


def put_into_hub_cache(cache: Path, commit: str, name: str, content: bytes, ref: str | None = None) -> Path:
    """Puts a file of user/repo there as huggingface_hub lays it out: the snapshot is a link to a blob."""
    home = cache / "models--user--repo"
    blob, path = home / "blobs" / sha256(content).hexdigest(), home / "snapshots" / commit / name
    for folder in (blob.parent, path.parent, (home / "refs" / (ref or "main")).parent):
        folder.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    path.symlink_to(blob)
    if ref:
        (home / "refs" / ref).write_text(commit)
    return path


def without_progress(err: str) -> str:
    """stderr without the lines that a machine of any speed may print: progress is told after a second."""
    return re.sub(r".*: \d+/\d+ (modules|tensors)(, .* left)?\n", "", err)


@dataclass(frozen=True)
class Ran:
    """What a command left: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    def ok(self) -> str:
        """stdout of a command that did what it should."""
        assert (self.code, self.err) == (0, ""), self.err
        return self.out

    def refused(self) -> str:
        """The one sentence of a command that found its input wrong."""
        assert self.code == 1, (self.code, self.out, self.err)
        assert "Traceback" not in self.err
        assert self.err.startswith("zit_merge: ") and self.err.endswith("\n")
        assert self.err.count("\n") == 1, self.err
        return self.err.removeprefix("zit_merge: ").strip()


class Workspace:
    """A folder to work in, with makers of its files.

    Attributes:
        folder: The working directory.
        out: Where jobs write.
        shapes: What LoRAs change; with FEW, a run takes a tenth of the time.
    """

    def __init__(self, folder: Path, read: Callable[[], tuple[str, str]]):
        self.folder, self.out, self.shapes = folder, folder / "out", SMALL
        self._read = read

    def lora(
        self,
        name: str,
        producer: str = "ai-toolkit",
        *,
        rank: int = 2,
        seed: int = 0,
        metadata: Mapping[str, str] | None = None,
        change: Callable[[dict[str, torch.Tensor]], object] | None = None,
    ) -> Path:
        """Writes a LoRA of a trainer for a small model; `change` may edit the tensors."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if metadata is None and change is None:
            path.write_bytes(_small_bytes(producer, rank, seed, tuple(self.shapes.items())))
            return path
        made = producers.PRODUCERS[producer].make(self.shapes, rank, seed, torch.bfloat16)
        if change:
            change(made.tensors)
        producers.save(replace(made, metadata=made.metadata | dict(metadata or {})), path)
        return path

    def put_pair(self, contents: tuple[bytes, bytes]) -> tuple[Path, Path]:
        """Writes me.safetensors and style.safetensors."""
        paths = self.folder / "me.safetensors", self.folder / "style.safetensors"
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)
        return paths

    def write(self, content: str | Mapping[str, Any] | Sequence[Any], name: str = "config.yaml") -> Path:
        """Writes a config file: text as it is, data as YAML or JSON by the name's ending."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, str):
            content = json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content, allow_unicode=True)
        path.write_text(content, encoding="utf-8")
        return path

    def section(self, *steps: Mapping[str, Any], **keys: Any) -> dict[str, Any]:
        """A section for small LoRAs, with its output in `out`."""
        return {
            "type": "zit_merge",
            "device": "cpu",
            "shapes": "free",
            "output_dir": str(self.out),
            "steps": list(steps),
        } | keys

    def training(self, **keys: Any) -> dict[str, Any]:
        """A training process as the toolkit's examples have it."""
        return {
            "type": "diffusion_trainer",
            "training_folder": str(self.folder / "output"),
            "network": {"type": "lora", "linear": 2, "linear_alpha": 2},
            "save": {"dtype": "bf16", "save_every": 250, "max_step_saves_to_keep": 4},
            "train": {"steps": 3000},
        } | keys

    def config(self, *processes: Any, job: str = "cat", name: str = "config.yaml") -> Path:
        """Writes an AI-Toolkit job with these processes."""
        return self.write({"job": "extension", "config": {"name": job, "process": list(processes)}}, name)

    def job(self, *steps: Mapping[str, Any], job: str = "cat", name: str = "config.yaml", **keys: Any) -> Path:
        """Writes a job that is one section."""
        return self.config(self.section(*steps, **keys), job=job, name=name)

    def zit(self, *words: object) -> Ran:
        """Runs a command."""
        self._read()
        code = main([str(w) for w in words])
        out, err = self._read()
        return Ran(code, out, without_progress(err))

    def recipe(self, made: Path, name: str = "recipe.yaml") -> Path:
        """What `recipe FILE` prints, as a file; in the working directory, relative names in it hold as they did."""
        return self.write(self.zit("recipe", made).ok(), name)

    def again(self, recipe: Path, *words: object) -> Path:
        """The one file that a recipe makes."""
        folder = self.folder / "again"
        shutil.rmtree(folder, ignore_errors=True)
        self.zit("run", recipe, "--output-dir", folder, *words).ok()
        (path,) = folder.glob("*.safetensors")
        return path

    def files(self) -> list[str]:
        """Names of what lies in `out`, part files too, but the page."""
        return sorted(p.name for p in self.out.iterdir() if p.suffix != ".html") if self.out.exists() else []
