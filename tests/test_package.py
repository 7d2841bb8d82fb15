"""What pip makes of the repository: a wheel with all that the package reads, and the command `zit-merge`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from workspace import FEW, write_lora

from extensions_built_in.zit_merge import __version__

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "extensions_built_in" / "zit_merge"


def pip(*words: object) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *map(str, words)], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built without a network, of a copy: setuptools writes into the folder that it builds."""
    pytest.importorskip("setuptools")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(PACKAGE, source / "extensions_built_in" / "zit_merge", ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", source, "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", out)
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with the wheel alone; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", wheel, "--no-deps", "--no-index", "-q", "--target", folder)
    return folder


def zit_merge(installed: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = shutil.which("zit-merge", path=installed / "bin") or shutil.which("zit-merge", path=installed / "Scripts")
    assert command
    env = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run([command, *words], cwd=cwd, env=env, capture_output=True, text=True, encoding="utf-8")


def test_a_wheel_carries_every_file_of_the_package(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    ours = {p.relative_to(ROOT).as_posix() for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert names == ours
    assert {p.rpartition(".")[2] for p in names} >= {"py", "yaml", "css", "html", "js", "md", "png"}


def test_its_metadata_are_those_of_the_repository(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    needed = [line.removeprefix("Requires-Dist: ") for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert needed == [line for line in lines if line and not line.startswith("#")]
    assert not any("==" in line or "<" in line for line in needed), "ranges: a user's torch is never replaced"
    assert f"\nVersion: {__version__}\n" in metadata


def test_the_command_can_be_typed(installed, tmp_path):
    alone = zit_merge(installed, cwd=tmp_path)
    assert alone.returncode == 2 and alone.stderr.startswith("usage: zit-merge ") and "zit-merge demo" in alone.stderr
    version = zit_merge(installed, "--version", cwd=tmp_path)
    assert (version.returncode, version.stdout) == (0, f"zit_merge {__version__}\n")


def test_the_demo_runs_from_the_wheel(installed, tmp_path):
    done = zit_merge(installed, "demo", cwd=tmp_path)
    assert done.returncode == 0 and " is right: " in done.stdout, done.stderr
    assert (tmp_path / "zit_merge_demo" / "demo_page.html").is_file()


def test_the_wheel_installs_itself_into_a_toolkit(installed, tmp_path):
    (tmp_path / "extensions_built_in").mkdir()
    (tmp_path / "run.py").touch()
    done = zit_merge(installed, "install", ".", "--copy", cwd=tmp_path)
    assert done.returncode == 0 and "    zit-merge attach " in done.stdout, done.stderr
    assert (tmp_path / "extensions_built_in" / "zit_merge" / "report" / "page" / "assets" / "main.js").is_file()


def test_the_command_finds_what_is_in_the_working_directory(installed, tmp_path):
    """As `python -m` does: AI-Toolkit, and metrics of one's own."""
    write_lora(tmp_path, "ai-toolkit", shapes=FEW, stem="me")
    ablate = {"by": "layers", "metrics": ["distances:mine"]}
    step = {"name": "a", "loras": [{"lora": "me.safetensors", "ratio": 1.0}], "preview": {"prompts": ["a"]}, "ablate": ablate}
    model = {"name_or_path": "Tongyi-MAI/Z-Image-Turbo", "arch": "zimage:turbo"}
    section = {"type": "zit_merge", "shapes": "free", "output_dir": "out", "device": "cpu", "model": model, "steps": [step]}
    job = {"job": "extension", "config": {"name": "x", "process": [section]}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    assert "distances" in zit_merge(installed, "check", "job.yaml", cwd=tmp_path).stderr
    (tmp_path / "distances.py").write_text("def mine(a, b): return 0.0\n", encoding="utf-8")
    done = zit_merge(installed, "check", "job.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(importlib.util.find_spec("oyaml") is not None, reason="this is AI-Toolkit's own Python")
def test_a_toolkit_whose_packages_are_elsewhere_is_asked_nothing(installed, tmp_path):
    """In its folder, with the Python of zit_merge: what is missing here says nothing of the training."""
    (tmp_path / "toolkit").mkdir()
    (tmp_path / "toolkit" / "optimizer.py").write_text("import bitsandbytes\n", encoding="utf-8")
    training = {"type": "diffusion_trainer", "training_folder": "output", "network": {"type": "lora", "linear": 2}}
    training |= {"train": {"steps": 10, "optimizer": "adamw8bit"}, "model": {"arch": "zimage:turbo", "name_or_path": "x/y"}}
    section = {"type": "zit_merge", "steps": [{"name": "a", "loras": [{"lora": "trained", "ratio": 1.0}]}]}
    job = {"job": "extension", "config": {"name": "x", "process": [training, section]}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    done = zit_merge(installed, "check", "job.yaml", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
