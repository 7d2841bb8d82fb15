"""`check` and `attach` in AI-Toolkit's own folder: there its schedulers, optimizers and models are asked."""

import importlib.util
import shutil

import pytest
import yaml
from host.job import job, training

pytestmark = pytest.mark.toolkit

SECTION = {"type": "zit_merge", "steps": [{"name": "a", "loras": [{"lora": "trained", "ratio": 1}]}]}


def config(folder, **train):
    process = training(folder, "cat")
    process["train"] = process["train"] | train
    path = folder / "cat.yaml"
    path.write_text(yaml.safe_dump(job("cat", process, SECTION), sort_keys=False))
    return path


@pytest.fixture
def zit(run_python):
    """Runs a command in the toolkit's folder."""
    return lambda *words, **keys: run_python("-m", "extensions_built_in.zit_merge", *words, **keys)


def test_what_the_toolkit_can_make(zit, tmp_path):
    done = zit("check", config(tmp_path, optimizer="automagic", lr_scheduler="cosine"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("step a: 1 LoRA\n") and done.stdout.endswith("\nno errors\n")


@pytest.mark.parametrize("command", ["check", "attach"])
def test_an_optimizer_whose_package_is_missing(zit, tmp_path, command):
    """A name that the toolkit knows: only its own try can tell."""
    if importlib.util.find_spec("dadaptation"):
        pytest.skip("dadaptation is installed here")
    path, section = config(tmp_path, optimizer="dadaptation"), tmp_path / "section.yaml"
    section.write_text(yaml.safe_dump(SECTION))
    done = zit(command, path, *(("--section", section, "--replace") if command == "attach" else ()))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == (
        "zit_merge: process[0].train.optimizer: dadaptation needs a package that is not installed (No module named "
        "'dadaptation'): install it"
    )


def test_a_scheduler_that_the_toolkit_tries_with_diffusers(zit, tmp_path):
    done = zit("check", config(tmp_path, lr_scheduler="polynomial"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "process[0].train.lr_scheduler: AI-Toolkit can't make polynomial" in done.stderr.splitlines()[-1]


def test_a_toolkit_with_a_broken_package(zit, toolkit, tmp_path):
    """Its diffusers crashes on import: what is known of its schedulers stands in."""
    broken = tmp_path / "packages" / "diffusers"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("print('half way')\nraise RuntimeError('no such operator')\n")
    view = tmp_path / "view"
    shutil.copytree(toolkit, view, symlinks=True)
    variables = {"cwd": view, "PYTHONPATH": str(broken.parent)}
    done = zit("check", config(tmp_path, lr_scheduler="cosine"), **variables)
    assert done.returncode == 0, done.stderr
    assert "half way" not in done.stdout
    done = zit("check", config(tmp_path, lr_scheduler="step"), **variables)
    assert done.returncode == 1 and "can't make step" in done.stderr
