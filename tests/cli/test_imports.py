"""Commands that only look at texts, configs and headers answer without the packages that merge and draw."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from workspace import FEW, Workspace

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(p.name for p in (ROOT / "config/examples").glob("*.yaml") if "type: diffusion_trainer" in p.read_text("utf-8"))
HEAVY = ("torch", "numpy", "safetensors", "PIL", "matplotlib", "huggingface_hub", "diffusers")
SCHEMA = "pydantic"
SCRIPT = f"""\
import sys
from extensions_built_in.zit_merge.cli.main import main

code = main(sys.argv[1:])
print("loaded:", *(name for name in {(*HEAVY, SCHEMA)} if name in sys.modules))
sys.exit(code)
"""


def loaded(*words: object, folder: Path, code: int = 0) -> list[str]:
    """What of HEAVY a command has imported when it is done."""
    return [name for name in all_loaded(*words, folder=folder, code=code) if name != SCHEMA]


def all_loaded(*words: object, folder: Path, code: int = 0) -> list[str]:
    """The same, and the package that knows configs."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, words)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == code, done.stderr
    return done.stdout.splitlines()[-1].removeprefix("loaded:").split()


@pytest.fixture
def work(work: Workspace) -> Workspace:
    work.shapes = FEW
    return work


def alphas_in(dtype: torch.dtype):
    """Stores the alphas of a file in another dtype."""
    return lambda tensors: tensors.update({k: torch.tensor(2.0, dtype=dtype) for k in tensors if k.endswith(".alpha")})


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("--help", 0),
        ("check --help", 0),
        ("inspect --methods", 0),
        ("inspect --methods --json", 0),
        ("inspect --presets", 0),
        ("inspect", 1),
        ("chekc", 2),
        ("check missing.yaml", 1),
    ],
)
def test_help_catalogues_and_mistakes(tmp_path, words, code):
    assert loaded(*words.split(), folder=tmp_path, code=code) == []


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_check_before_a_training(tmp_path, name):
    text = (ROOT / "config/examples" / name).read_text("utf-8")
    cache = ["huggingface_hub"] if "base: trainer" in text else []  # where a model on the hub is looked for
    assert loaded("check", ROOT / "config/examples" / name, folder=tmp_path) == cache


ME = {"lora": "me.safetensors", "ratio": 1.0}
SOFT = {"name": "soft", "loras": [ME]}


def test_a_check_of_files(work):
    """Their alphas are read; so are the metadata of the outputs that are there, and pictures are planned."""
    work.lora("me.safetensors", "musubi")
    work.lora("other.safetensors")
    both = [ME, {"lora": "other.safetensors", "ratio": 0.5}]
    steps = [
        {
            "name": "soft",
            "loras": both,
            "preview": {"prompts": ["a"], "size": 64},
            "ablate": {"by": "layers", "metrics": ["colour"]},
        },
        {"name": "thin", "loras": both, "method": "della", "params": {"density": 0.4, "epsilon": 0.2}, "rank": {"energy": 0.9}},
    ]
    model = {"name_or_path": "Tongyi-MAI/Z-Image-Turbo", "arch": "zimage:turbo"}
    process = [work.training(model=model), work.section(*steps)]
    work.zit("run", work.config(process[1])).ok()
    assert loaded("check", work.config(*process), folder=work.folder) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_check_of_alphas_in_any_usual_dtype(work, dtype):
    work.lora("me.safetensors", "musubi", change=alphas_in(dtype))
    assert loaded("check", work.job(SOFT), folder=work.folder) == []


def test_attach(work):
    work.lora("me.safetensors", "musubi")
    section = work.write(work.section({"name": "soft", "loras": [ME, {"lora": "trained", "ratio": 1.0}]}), "section.yaml")
    assert loaded("attach", work.config(work.training()), "--section", section, folder=work.folder) == []


def test_a_recipe(work):
    work.lora("me.safetensors", "musubi")
    work.zit("run", work.job(SOFT)).ok()
    assert loaded("recipe", work.out / "merged_cat_soft.safetensors", folder=work.folder) == []


def test_a_look_at_a_file_without_a_recipe_needs_no_schema_of_one(work):
    work.lora("me.safetensors")
    assert all_loaded("inspect", "me.safetensors", folder=work.folder) == ["torch", "numpy"]
