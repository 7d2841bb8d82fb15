"""The real AI-Toolkit, and jobs in it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from host import tiny_zimage
from host.shim import SHIM
from oracles import producers

REPO = Path(__file__).parents[2]


def toolkit_root() -> Path:
    return Path(os.environ.get("AI_TOOLKIT_ROOT") or Path.home() / "ai-toolkit")


@pytest.fixture(scope="session")
def toolkit(tmp_path_factory) -> Path:
    """A folder that is the real AI-Toolkit with this extension in it: links to its files, nothing of it is touched."""
    root = toolkit_root()
    if not (root / "run.py").is_file():
        pytest.skip("no AI-Toolkit at $AI_TOOLKIT_ROOT or ~/ai-toolkit")
    if not importlib.util.find_spec("oyaml") or not importlib.util.find_spec("optimum"):
        pytest.skip("this environment lacks AI-Toolkit's packages")
    view = tmp_path_factory.mktemp("ai-toolkit")
    for entry in root.iterdir():
        if entry.name not in ("extensions_built_in", ".git"):
            (view / entry.name).symlink_to(entry)
    (view / "extensions_built_in").mkdir()
    for entry in (root / "extensions_built_in").iterdir():
        if entry.name != "zit_merge":
            (view / "extensions_built_in" / entry.name).symlink_to(entry)
    (view / "extensions_built_in" / "zit_merge").symlink_to(REPO / "extensions_built_in" / "zit_merge")
    return view


@pytest.fixture(scope="session")
def run_python(toolkit):
    """Runs Python in the toolkit's folder, as a user would: run(*words, cwd=None, VARIABLE=value) -> CompletedProcess."""

    def run(*words, cwd=None, timeout=300, **variables):
        path = [str(toolkit)] + ([] if torch.version.cuda else [str(SHIM)])
        env = (
            os.environ
            | {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
            | variables
        )
        return subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=cwd or toolkit,
            env=env,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def style(toolkit) -> producers.Made:
    """A LoRA of another trainer that fits the tiny model; it changes no adaLN."""
    return producers.PRODUCERS["musubi"].make(tiny_zimage.linear_shapes(tiny_zimage.transformer()), 3, 5, torch.bfloat16)


@pytest.fixture(scope="session")
def place(toolkit, style, tmp_path_factory) -> Path:
    """A folder with the tiny model, its pictures, and style.safetensors; jobs of any name train here."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_zimage.make_model(folder / "model")
    tiny_zimage.make_dataset(folder / "dataset")
    producers.save(style, folder / "style.safetensors")
    return folder
