"""The work of planning grows with the number of steps, not with its square; counted, since time says little."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from workspace import FEW, Workspace

from extensions_built_in.zit_merge.config.job import load_job
from extensions_built_in.zit_merge.formats import safetensors_file
from extensions_built_in.zit_merge.formats.safetensors_file import SafetensorsFile
from extensions_built_in.zit_merge.planning import build, recipe, sources
from extensions_built_in.zit_merge.planning.job import plan_job


@pytest.fixture
def counted(work: Workspace, loras: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Callable[[int, bool], Counter]:
    """How often what costs time is done while steps are planned, each on the file or each on the step before."""
    work.shapes = FEW
    work.lora("me.safetensors")

    def plan(count: int, chained: bool) -> Counter:
        steps = [
            {"name": f"s{i}", "loras": [{"lora": f"s{i - 1}" if chained and i else "me.safetensors", "ratio": 0.5}]}
            for i in range(count)
        ]
        job, done = load_job(work.job(*steps)), Counter()
        with monkeypatch.context() as patch:
            _count(patch, Path, "resolve", done)
            _count(patch, SafetensorsFile, "__init__", done)
            _count(patch, safetensors_file, "_parse", done)
            _count(patch, build, "resolve", done)
            _count(patch, sources, "tensor_hash", done)
            _count(patch, recipe, "_input", done)
            (planned,) = plan_job(job)
        assert [plan.name for plan in planned.plans] == [step["name"] for step in steps]
        return done

    return plan


def _count(patch: pytest.MonkeyPatch, place: object, name: str, done: Counter) -> None:
    call = getattr(place, name)

    def counting(*args, **kwargs):
        done[name] += 1
        return call(*args, **kwargs)

    patch.setattr(place, name, counting)


@pytest.mark.parametrize("chained", [False, True])
def test_twice_the_steps_are_twice_the_work(counted, chained):
    once, twice, thrice = (counted(count, chained) for count in (20, 40, 60))
    assert {name: twice[name] - once[name] for name in once} == {name: thrice[name] - twice[name] for name in once}
    assert once["_input"] == 20 and once["resolve"] < 100


def test_a_file_is_found_and_read_once(counted):
    done = counted(30, False)
    assert done["__init__"] == done["_parse"] == 1


def test_a_file_is_hashed_once_for_all_steps_of_a_recipe(work, loras, monkeypatch):
    steps = [{"name": f"s{i}", "loras": [{"lora": "me.safetensors", "ratio": 0.5}]} for i in range(4)]
    last = {"name": "last", "loras": [{"lora": f"s{i}", "ratio": 1.0} for i in range(4)]}
    work.zit("run", work.job(*steps, last)).ok()
    recipe_file, done = work.recipe(work.out / "merged_cat_last.safetensors"), Counter()
    assert recipe_file.read_text().count("sha256:") == 4
    _count(monkeypatch, sources, "tensor_hash", done)
    (planned,) = plan_job(load_job(recipe_file), output_dir="again", lora_folders=[work.folder])
    assert done["tensor_hash"] == 1 and len(planned.plans) == 5


def test_a_long_chain_of_steps_is_planned(counted):
    counted(350, True)


def test_two_answers_about_a_file_are_two_readings(work):
    """What one step drops from a file, another one does not."""
    work.lora("norm.safetensors", "ai-toolkit-all-layers")
    dropped, kept = {"lora": "norm.safetensors", "ratio": 1.0, "drop": ["norm"]}, {"lora": "norm.safetensors", "ratio": 1.0}
    message = work.zit("check", work.job({"name": "a", "loras": [dropped]}, {"name": "b", "loras": [kept]})).refused()
    assert message.startswith("process[0].steps[1].loras[0]: norm.safetensors: ") and "drop: [norm]" in message
