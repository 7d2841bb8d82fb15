"""What is known before the training: outputs that the disk has no room for stop the job while nothing is lost."""

import shutil
from types import SimpleNamespace

import pytest
from host.job import job, training
from host.test_job import write

from extensions_built_in.zit_merge import ZitMergeError
from extensions_built_in.zit_merge.config.job import Job
from extensions_built_in.zit_merge.config.parse import parse_section
from extensions_built_in.zit_merge.planning.build import plan_section
from extensions_built_in.zit_merge.planning.job import make_context

RANK = 16
# 30 layers x (4 attention 3840 + 3840, 3 feed-forward 10240 + 3840, adaLN 15360 + 256) x rank x 2 bytes
TENSORS = 30 * (4 * 7680 + 3 * 14080 + 15616) * RANK * 2
HEADER = 500_000  # bytes that a header with its metadata stays under
STEP = {"name": "a", "loras": [{"lora": "trained", "ratio": 1.0}]}
LATER = {"name": "b", "loras": [{"lora": "a", "ratio": 0.5}]}


def forecast(work, *steps):
    """The plans of a section in the real model's sizes, whose training is still to come."""
    raw = work.section(*steps, shapes="strict")
    processes = [work.training(network={"type": "lora", "linear": RANK, "linear_alpha": RANK}), raw]
    section = parse_section(raw)
    return plan_section(section, make_context(Job("cat", processes, work.folder), 1, section), before_training=True)


@pytest.mark.parametrize(
    ("steps", "files"),
    [
        ([STEP], 1),
        ([STEP, LATER], 2),
        ([STEP | {"keep": False}, LATER], 2),  # it lies there until the other is written
        ([STEP | {"copy_to": "comfy"}], 2),
    ],
    ids=["one step", "two steps", "one for the other", "a copy"],
)
def test_the_outputs_of_a_training_to_come_have_to_fit(work, monkeypatch, steps, files):
    (work.folder / "comfy").mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=files * (TENSORS + HEADER)))
    assert len(forecast(work, *steps)) == len(steps)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=files * TENSORS))
    with pytest.raises(ZitMergeError, match=r"process\[1\]\.output_dir: the outputs need .* free some"):
        forecast(work, *steps)
    assert work.files() == []


NO_ROOM = """
import runpy, shutil, sys
from types import SimpleNamespace
shutil.disk_usage = lambda path: SimpleNamespace(total=10**6, used=10**6 - 1000, free=1000)
sys.argv = ["run.py", sys.argv[1]]
runpy.run_path("run.py", run_name="__main__")
"""


@pytest.mark.toolkit
def test_a_job_without_room_for_its_outputs_stops_before_the_training(place, run_python):
    section = {"type": "zit_merge", "steps": [STEP]}
    done = run_python("-c", NO_ROOM, write(place, "room", job("room", training(place, "room"), section)))
    assert done.returncode != 0
    message = next(line for line in done.stdout.splitlines() if line.startswith("Error running job: "))
    assert ": the outputs need" in message and "free some" in message and message.endswith("(process[1].output_dir)")
    assert "Running  2 processes" not in done.stdout
    assert not list((place / "output" / "room").glob("*.safetensors"))
