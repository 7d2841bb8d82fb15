"""Pictures at the command line, where there is no AI-Toolkit: what would be rendered, and the sections of cells."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml
from preview.helpers import ME, MODEL, STYLE, names, step
from workspace import Workspace

ONE = {"prompts": ["a cat"], "size": 64}
SWEPT = step(ME, sweep={"ratio": [0.1, 0.2], "blocks.to_q": [1, 2]}, preview=ONE)
WITHOUT_TOOLKIT = pytest.mark.skipif(importlib.util.find_spec("toolkit") is not None, reason="there is an AI-Toolkit")


def job(work: Workspace, *steps: dict, **keys: Any) -> Path:
    return work.job(*steps, name="config.json", **{"model": MODEL} | keys)


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_check_tells_which_pictures_there_will_be(work, loras):
    told = work.zit("check", job(work, SWEPT)).ok()
    assert "\npictures      7 with Tongyi-MAI/Z-Image-Turbo\n" in told and told.endswith("no errors\n")
    assert "soft: ratio and blocks.to_q: 4 variants x 1 picture, 64 x 64 pixels" in one_line(told)
    assert all(len(line) < 80 for line in told.split("pictures  ")[1].splitlines())


def test_check_says_nothing_of_pictures_where_there_are_none(work, loras):
    assert "picture" not in work.zit("check", job(work, step(ME))).ok()


@pytest.mark.parametrize(
    ("step_keys", "keys", "says"),
    [
        ({"preview": ONE}, {"model": None}, "process[0].model.name_or_path: is missing, pictures need the base model"),
        ({"preview": ONE}, {"model": MODEL | {"arch": "flux"}}, "process[0].model.arch: flux is not Z-Image"),
        ({"preview": True}, {}, "process[0].steps[0].preview.prompts: is missing"),
        ({"preview": {"prompts": "p.txt"}}, {}, "process[0].steps[0].preview.prompts: p.txt does not exist"),
        ({"preview": ONE | {"size": 100}}, {}, "process[0].steps[0].preview.size: 100 x 100 pixels can't be rendered"),
        ({"preview": {"prompts": ["a"], "seed": list(range(70))}}, {}, "process[0].steps[0].preview: these are 210 pictures"),
        ({"preview": ONE, "sweep": {"rati": [1]}}, {}, "process[0].steps[0].sweep.rati: is not a strength of a LoRA"),
    ],
    ids=str,
)
def test_what_stands_in_the_way_of_pictures_is_told_by_check_and_preview_and_stops_no_merge(work, loras, step_keys, keys, says):
    if "210" in says:
        step_keys["preview"]["prompts"] = ["a"]
        says = says.replace("210", "210")
    config = job(work, step(ME, **step_keys), **keys)
    assert work.zit("check", config).refused().startswith(says)
    assert work.zit("preview", config).refused().startswith(says)
    told = work.zit("run", config).ok()
    assert work.files() == ["merged_cat_soft.safetensors"] and "pictures are rendered by AI-Toolkit" in told


def test_run_says_who_renders_the_pictures(work, loras):
    told = work.zit("run", job(work, SWEPT)).ok()
    assert "pictures are rendered by AI-Toolkit in its job, or by `preview` in its folder" in told
    assert work.files() == ["merged_cat_soft.safetensors"], "no file of a cell, no picture"
    assert "picture" not in work.zit("run", job(work, step(ME))).ok()


@WITHOUT_TOOLKIT
def test_preview_needs_the_toolkit(work, loras):
    message = work.zit("preview", job(work, SWEPT)).refused()
    assert message.startswith("there is no AI-Toolkit here") and "run this in AI-Toolkit's folder" in message
    assert work.files() == [] and not list(work.folder.rglob("*.png"))


def test_a_dry_run_tells_and_writes_nothing(work, loras):
    before = names(work.folder)
    config = job(work, SWEPT, step(STYLE, name="b", preview=ONE), step(STYLE, name="c"))
    told = work.zit("preview", config, "--dry-run").ok()
    assert told.startswith("pictures      9 with Tongyi-MAI/Z-Image-Turbo\n")
    assert "soft: ratio and blocks.to_q" in told and "b: previews" in told
    assert sorted({*before, "config.json"}) == names(work.folder) and work.files() == []
    assert work.zit("preview", config, "--dry-run", "--quiet").ok() == ""


def test_a_dry_run_of_one_step(work, loras):
    config = job(work, SWEPT, step(STYLE, name="b", preview=ONE), step(STYLE, name="c"))
    told = work.zit("preview", config, "--dry-run", "--step", "b").ok()
    assert told.startswith("pictures      3 with") and "soft" not in told
    message = work.zit("preview", config, "--dry-run", "--step", "c").refused()
    assert message.startswith("process[0].steps[2]: asks for no pictures: write preview: true, sweep or ablate there")
    assert "has no such step" in work.zit("preview", config, "--dry-run", "--step", "d").refused()


def test_a_config_without_pictures(work, loras):
    message = work.zit("preview", job(work, step(ME))).refused()
    assert "no step asks for pictures: write preview: true, sweep or ablate on one" in message


@pytest.mark.parametrize(("number", "ratio", "q"), [(1, 0.1, 1), (2, 0.2, 1), (3, 0.1, 2), (4, 0.2, 2)])
def test_the_section_of_a_cell_is_printed_by_its_number(work, loras, number, ratio, q):
    printed = yaml.safe_load(work.zit("preview", job(work, SWEPT), "--yaml", f"soft:{number}").ok())
    (made,) = printed["steps"]
    assert made["loras"] == [ME | {"ratio": ratio, "blocks": {"to_q": q}}] and not {"sweep", "preview", "ablate"} & set(made)
    assert work.files() == []


def test_what_is_printed_runs(work, loras):
    text = work.zit("preview", job(work, SWEPT), "--yaml", "soft:4").ok()
    work.zit("run", work.write(text, "cell.yaml")).ok()
    assert work.files() == ["merged_cell_soft.safetensors"]


def test_what_is_printed_may_stand_in_the_job(work, loras):
    printed = yaml.safe_load(work.zit("preview", job(work, SWEPT), "--yaml", "soft:4").ok())
    work.zit("run", work.config(printed, name="again.yaml")).ok()
    assert work.files() == ["merged_cat_soft.safetensors"]


@pytest.mark.parametrize("number", ["0", "5", "x", "-1", "01"])
def test_a_number_that_no_cell_has(work, loras, number):
    message = work.zit("preview", job(work, SWEPT), "--yaml", f"soft:{number}").refused()
    assert message == "--yaml: the pictures of this sweep are numbered 1 to 4: write --yaml soft:1"


def test_a_picture_that_is_not_named(work, loras):
    config = job(work, SWEPT, step(ME, name="other", preview=ONE))
    assert work.zit("preview", config, "--yaml", ":1").refused().startswith("--yaml: which picture?")
    assert "the step other has no sweep" in work.zit("preview", config, "--yaml", "other:1").refused()


def test_no_warnings_of_libraries_are_printed(work, loras, recwarn):
    config = job(work, step(ME, STYLE, rank={"energy": 0.9}, sweep={"loras[0].ratio": [1]}, preview=ONE))
    work.zit("preview", config, "--yaml", "soft:1").ok()
    assert [str(w.message) for w in recwarn] == []


def test_a_trained_lora_that_is_not_there_yet(work, loras):
    sample = {"samples": [{"prompt": "a"}]}
    steps = [step({"lora": "trained", "ratio": 1.0}, preview=True)]
    config = work.config(work.training(model=MODEL, sample=sample), work.section(*steps))
    assert "finish the training" in work.zit("preview", config, "--dry-run").refused()
    assert "pictures      3 with" in work.zit("check", config).ok()
