"""The only file here that touches the package: when its modules move, nothing else in this folder changes.

Also what every frozen fact needs: small LoRA files that are the same to the bit on any machine, a folder to be in, and texts
without what differs from place to place.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from oracles import producers
from workspace import Workspace, without_progress

import extensions_built_in.zit_merge as package
from extensions_built_in.zit_merge.cli.main import main

torch.set_num_threads(1)  # as tests/conftest.py does, for record.py

_PARTS = ("layers.0.", "layers.3.attention", "layers.29.", "noise_refiner.0.attention", "context_refiner.1.", "all_final_layer")
SHAPES = {  # module -> (out, in): a few modules of every kind, no two sizes alike
    module: shape for module, shape in producers.small_shapes(dim=12, ffn=20, temb=8, cap=16).items() if module.startswith(_PARTS)
}
# Texts are wrapped and helps are laid out for this terminal.
_TERMINAL = {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}


class Ran(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """A folder that is the working directory for a while."""
    before = Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def zit(*words: object) -> Ran:
    """Runs a command in the working directory."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), mock.patch.dict(os.environ, _TERMINAL):
        code = main([str(word) for word in words])
    return Ran(code, out.getvalue(), without_progress(err.getvalue()))


def done(*words: object) -> str:
    """stdout of a command that has to do what it should."""
    ran = zit(*words)
    if ran.code or ran.err:
        raise AssertionError(f"zit_merge {' '.join(map(str, words))}: exit code {ran.code}: {ran.err}")
    return ran.out


def quietly(*words: object) -> dict[str, str]:
    """Step -> status of the results that are off or empty: all that a quiet command says that does what it should."""
    ran = zit(*words, "--quiet")
    told = [re.fullmatch(r"zit_merge: (\S+) is (off|empty)(: | by \S+ %: ).+", line) for line in ran.err.splitlines()]
    if ran.code or ran.out or not all(told):
        raise AssertionError(f"zit_merge {' '.join(map(str, words))} --quiet: exit code {ran.code}: {ran.out}{ran.err}")
    return {line[1]: line[2] for line in told}


def plain(text: str, folder: Path) -> str:
    """A text without the folder that it was made in, and without the version."""
    for spelled in sorted({str(folder), str(folder.resolve())}, key=len, reverse=True):
        text = text.replace(spelled, "FOLDER")
    return text.replace(package.__version__, "VERSION")


def numbers(label: str, count: int) -> torch.Tensor:
    """Odd multiples of 1/4096 between -1/16 and 1/16: they follow from the label alone, and every dtype but fp8 holds them."""
    drawn = torch.tensor(list(hashlib.shake_256(label.encode()).digest(count)), dtype=torch.float64)
    return (2 * drawn - 255) / 4096


def write_lora(path: Path, producer: str, rank: int, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A LoRA as a trainer writes it, with numbers that follow from the file's name: torch's own differ between processors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = producers.PRODUCERS[producer].make(SHAPES, rank, 0, dtype)
    tensors = {
        key: numbers(f"{path.name}/{key}", tensor.numel()).reshape(tensor.shape).to(tensor.dtype) if tensor.ndim > 1 else tensor
        for key, tensor in made.tensors.items()
    }
    producers.save(replace(made, tensors=tensors), path)
    return path


def machine() -> dict[str, str]:
    """What the last bits of an SVD depend on."""
    model = platform.processor()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text(encoding="utf-8"))
        model = found[1] if found else model
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "processor": model,
    }


def python() -> str:
    """Python's minor version: argparse words its messages differently from one to the next."""
    return ".".join(platform.python_version_tuple()[:2])


def show_pictures(folder: Path, steps: list[Mapping[str, Any]]) -> Path:
    """Renders the pictures of a section as `preview` does, with a renderer in the model's place. Returns their folder."""
    from preview import helpers

    from extensions_built_in.zit_merge.preview.grids import preview_plan
    from extensions_built_in.zit_merge.preview.runner import render

    found = helpers.planned(Workspace(folder, lambda: ("", "")), *steps)
    preview = preview_plan(found.section, found.context, found.plans)
    list(render(preview, found.device, helpers.Loader()))
    return next(folder.rglob("pictures")).parent
