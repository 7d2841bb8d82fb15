"""An AI-Toolkit older than its fix of EMA: there the averages of `ema_config` are never made, which is worth a word."""

import importlib
import sys

import pytest
from host.job import job, training
from host.test_job import write

from extensions_built_in.zit_merge.host.toolkit import has_broken_ema
from extensions_built_in.zit_merge.planning.preflight import advice
from extensions_built_in.zit_merge.planning.training import Training

SAYS = "ema_config has no effect in this AI-Toolkit, which is older than 0.10.5"


@pytest.mark.parametrize(
    ("ema", "old", "warned"),
    [
        ({"use_ema": True, "ema_decay": 0.99}, True, True),
        ({"use_ema": True, "ema_decay": 0.99}, False, False),
        ({"use_ema": False}, True, False),
        ({}, True, False),
        (None, True, False),
    ],
)
def test_ema_is_advised_on_where_it_does_nothing(tmp_path, ema, old, warned):
    process = training(tmp_path, "cat")
    process["train"]["ema_config"] = ema
    found = [text for text in advice(Training("process[0]", "cat", process), old_ema=old) if "ema" in text]
    assert [text.startswith(f"process[0]: {SAYS}") for text in found] == [True] * warned


def test_a_toolkit_that_tells_no_version_gets_no_advice(monkeypatch):
    monkeypatch.setitem(sys.modules, "version", None)  # importing it fails
    assert not has_broken_ema()


@pytest.mark.toolkit
@pytest.mark.parametrize(
    ("version", "broken"),
    [
        ("0.7.6", True),
        ("0.9.26", True),
        ("0.10.4", True),
        ("0.10.5", False),
        ("0.10.10", False),
        ("0.12.26", False),
        ("1.0.0", False),
        ("unknown", False),
        (None, False),
    ],
)
def test_the_toolkits_version_tells_it(toolkit, monkeypatch, version, broken):
    monkeypatch.syspath_prepend(toolkit)
    module = importlib.import_module("version")
    assert module.__file__ == str(toolkit / "version.py")
    monkeypatch.setattr(module, "VERSION", version)
    assert has_broken_ema() == broken


OLD = """
import sys
import version
version.VERSION = sys.argv[2]
sys.argv = ["run.py", sys.argv[1]]
from toolkit.job import get_job
get_job(sys.argv[1], None)
"""


@pytest.mark.toolkit
@pytest.mark.parametrize(("version", "warned"), [("0.10.4", 1), ("0.10.5", 0)])
def test_a_job_gives_the_advice_by_the_version_of_its_toolkit(place, run_python, version, warned):
    process = training(place, "old")
    process["train"]["ema_config"] = {"use_ema": True, "ema_decay": 0.99}
    section = {"type": "zit_merge", "shapes": "free", "steps": [{"name": "a", "loras": [{"lora": "trained", "ratio": 1}]}]}
    done = run_python("-c", OLD, write(place, "old", job("old", process, section)), version)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count(f"advice: process[0]: {SAYS}") == warned
