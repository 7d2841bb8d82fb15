"""The command line: what each command does, prints and returns."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from workspace import SMALL, Ran, Workspace, without_progress

from extensions_built_in.zit_merge import load_lora
from extensions_built_in.zit_merge.algebra.methods import METHODS
from extensions_built_in.zit_merge.report.progress import Bar

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
ME = {"lora": "me.safetensors", "ratio": 1.0}
STYLE = {"lora": "style.safetensors", "ratio": 0.5}
pytestmark = pytest.mark.usefixtures("few")


def delta(path: Path, module: str) -> torch.Tensor:
    """The first 64 rows of up @ down of one module in float64, alpha folded in."""
    factors = load_lora(path)[module]
    return factors.up[:64].double() @ factors.down.double()


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal within bfloat16 factors; a wrong strength of 1 % is not."""
    return bool((found - wanted).norm() <= 5e-3 * wanted.norm())


def three_steps(work: Workspace, **keys) -> Path:
    """`b` uses `a`; `c` stands alone."""
    return work.job(
        {"name": "a", "loras": [ME]},
        {"name": "b", "loras": [{"lora": "a", "ratio": 1.0}, STYLE]},
        {"name": "c", "loras": [STYLE]},
        **keys,
    )


def test_run_writes_every_step_and_says_so(work, loras):
    text = work.zit("run", three_steps(work)).ok()
    assert work.files() == ["merged_cat_a.safetensors", "merged_cat_b.safetensors", "merged_cat_c.safetensors"]
    for name in work.files():
        assert f"\n    {work.out / name}\n" in text.split("is right: ", 1)[1]
    assert text.count("\n  wrote 2") == 3 and "\n  wrote 21 modules, rank 3, bf16, 0.0 MB\n" in text
    wanted = delta(loras[0], "layers.3.attention.to_q") + 0.5 * delta(loras[1], "layers.3.attention.to_q")
    assert close(delta(work.out / "merged_cat_b.safetensors", "layers.3.attention.to_q"), wanted)


def test_a_dry_run_prints_the_table_and_writes_nothing(work, loras):
    weights = {"blocks": {"to_q": 1.25}, "layers": {"0-9": 0.5}}
    before = sorted(work.folder.iterdir())
    text = work.zit("run", work.job({"name": "a", "loras": [ME | weights, STYLE]}), "--dry-run").ok()
    assert sorted(p for p in work.folder.iterdir() if p.suffix != ".yaml") == before
    rows = [line.split() for line in text.splitlines()]
    assert ["layer", "adaLN", "to_q", "to_k", "to_v", "to_out", "w1", "w2", "w3"] in rows
    assert ["0-9", "0.5", "0.625", *["0.5"] * 6] in rows
    assert ["10-29", "1", "1.25", *["1"] * 6] in rows
    assert "  strength of LoRA 2 (style.safetensors): everywhere 0.5\n" in text
    assert [str(work.out / "merged_cat_a.safetensors")] in rows and "rank 5" in text


def test_one_step_runs_with_those_it_depends_on(work, loras):
    work.zit("run", three_steps(work), "--step", "b").ok()
    assert work.files() == ["merged_cat_a.safetensors", "merged_cat_b.safetensors"]


def test_one_step_that_depends_on_nothing_runs_alone(work, loras):
    work.zit("run", three_steps(work), "--step", "c").ok()
    assert work.files() == ["merged_cat_c.safetensors"]


def test_one_step_does_not_need_the_files_of_the_others(work, loras):
    config = work.job({"name": "a", "loras": [ME]}, {"name": "b", "loras": [{"lora": "gone.safetensors", "ratio": 1.0}]})
    work.zit("run", config, "--step", "a").ok()
    assert work.files() == ["merged_cat_a.safetensors"]


def test_a_step_that_is_not_there_is_answered_with_those_that_are(work, loras):
    message = work.zit("run", three_steps(work), "--step", "bb").refused()
    assert "--step bb" in message and "a, b, c" in message
    assert work.files() == []


def test_a_step_of_the_second_section(work, loras):
    sections = [work.section({"name": name, "loras": [ME]}) for name in ("a", "b")]
    work.zit("run", work.config(*sections), "--step", "b").ok()
    assert work.files() == ["merged_cat_b.safetensors"]


def test_every_section_runs(work, loras):
    sections = [work.section({"name": name, "loras": [ME]}) for name in ("a", "b")]
    work.zit("run", work.config(*sections)).ok()
    assert work.files() == ["merged_cat_a.safetensors", "merged_cat_b.safetensors"]


def test_output_dir_on_the_command_line_wins(work, loras):
    work.zit("run", three_steps(work), "--step", "a", "--output-dir", work.folder / "deep" / "else").ok()
    assert work.files() == []
    assert [p.name for p in (work.folder / "deep" / "else").glob("*.safetensors")] == ["merged_cat_a.safetensors"]


def test_loras_are_looked_for_in_the_named_folders(work):
    work.lora("here/style.safetensors")
    work.lora("there/me.safetensors")
    config = work.job({"name": "a", "loras": [ME, STYLE]})
    assert "me.safetensors is not there" in work.zit("run", config).refused()
    work.zit("run", config, "--loras", "here", "there").ok()
    assert work.files() == ["merged_cat_a.safetensors"]


def test_relative_paths_start_at_the_config_and_then_at_the_working_directory(work, monkeypatch):
    beside = work.lora("configs/me.safetensors", seed=1)
    elsewhere = work.lora("me.safetensors", seed=2)
    config = work.job({"name": "a", "loras": [ME]}, name="configs/config.yaml")
    out = work.out / "merged_cat_a.safetensors"
    for source in (beside, elsewhere):
        wanted = delta(source, "layers.0.attention.to_k")
        work.zit("run", config).ok()
        assert close(delta(out, "layers.0.attention.to_k"), wanted)
        source.unlink()


def test_quiet_prints_nothing(work, loras):
    assert work.zit("run", three_steps(work), "--quiet").ok() == ""
    assert work.zit("check", three_steps(work), "--quiet").ok() == ""
    assert len(work.files()) == 3


# What is not right: style is cut away at rank 1, nothing is asked for at ratio 0.
OFF, EMPTY = {"loras": [ME, STYLE | {"ratio": 0.05}], "rank": 1}, {"loras": [ME | {"ratio": 0}]}
SAID = {
    "off": "is off: style is mostly cut away, a larger rank keeps it",
    "empty": "is empty: nothing was asked for, zeros were written",
}
JOBS: dict[str, list[dict[str, Any]]] = {
    "right": [{"name": "a", "loras": [ME, STYLE]}],
    "off": [{"name": "a"} | OFF],
    "empty": [{"name": "a"} | EMPTY],
    "several": [{"name": "a"} | OFF, {"name": "b", "loras": [ME]}, {"name": "c"} | EMPTY],
}


def statuses(job: str) -> list[str]:
    """`a is off: ...` of each step that is not right."""
    found = {"several": ["a off", "c empty"], "right": []}.get(job, [f"a {job}"])
    return [f"{step} {SAID[status]}" for step, status in map(str.split, found)]


@pytest.mark.parametrize("job", JOBS)
def test_quiet_says_one_line_for_what_is_not_right(work, loras, job):
    ran = work.zit("run", work.job(*JOBS[job]), "--quiet")
    assert (ran.code, ran.out) == (0, "")
    assert ran.err.splitlines() == [f"zit_merge: {line}" for line in statuses(job)]
    assert len(work.files()) == len(JOBS[job])


@pytest.mark.parametrize("quiet", [[], ["--quiet"]], ids=["", "quiet"])
@pytest.mark.parametrize("job", JOBS)
def test_strict_fails_for_what_is_not_right_and_keeps_its_file(work, loras, job, quiet):
    ran = work.zit("run", work.job(*JOBS[job]), "--strict", *quiet)
    if wanted := statuses(job):
        assert ran.refused() == f"{'; '.join(wanted)} (--strict; the file is kept)"
    assert ran.code == bool(wanted) and (ran.out == "") == bool(quiet)
    assert work.files() == [f"merged_cat_{step['name']}.safetensors" for step in JOBS[job]], "later steps are merged too"


def test_strict_looks_at_what_was_made_before_too(work, loras):
    config = work.job(*JOBS["off"])
    work.zit("run", config).ok()
    before = (work.out / "merged_cat_a.safetensors").read_bytes()
    assert work.zit("run", config, "--strict").refused().startswith("a is off: ")
    assert (work.out / "merged_cat_a.safetensors").read_bytes() == before
    assert work.zit("run", config, "--strict", "--dry-run").ok()


def test_without_strict_and_quiet_stderr_is_silent(work, loras):
    text = work.zit("run", work.job(*JOBS["several"])).ok()
    assert all(line in " ".join(text.split()) for line in statuses("several"))


@pytest.mark.parametrize("status", ["right", "off", "empty"])
def test_merge_is_strict_and_quiet_too(work, loras, status):
    flags = {"right": [1, 0.5], "off": [1, 0.05, "--rank", 1], "empty": [0]}[status]
    words = ("merge", *loras, "-o", "out.safetensors", "--shapes", "free", "--device", "cpu", "--quiet", "--ratio", *flags)
    ran = work.zit(*words)
    lines = [f"out {SAID[status]}"] if status in SAID else []
    assert (ran.code, ran.out, ran.err.splitlines()) == (0, "", [f"zit_merge: {line}" for line in lines])
    kept = Path("out.safetensors").read_bytes()
    Path("out.safetensors").unlink()
    ran = work.zit(*words, "--strict")
    if lines:
        assert ran.refused() == f"{lines[0]} (--strict; the file is kept)"
    assert ran.code == bool(lines) and Path("out.safetensors").read_bytes() == kept


REASONS = {"right": "rounding", "off": "lost", "empty": "nothing_asked"}


@pytest.mark.parametrize("status", REASONS)
def test_the_status_is_in_the_file_in_json_and_in_python(work, loras, status):
    work.zit("run", work.job(*JOBS[status]), "--quiet")
    path = work.out / "merged_cat_a.safetensors"
    with safe_open(path, framework="pt") as file:
        stored = json.loads(file.metadata()["zit_merge.check"])
    assert json.loads(work.zit("inspect", path, "--json").ok())["check"] == stored
    (reason,) = stored["reasons"]
    assert (stored["status"], reason["kind"]) == (status, REASONS[status])
    verdict = load_lora(path).verdict
    assert (verdict.status, verdict.reasons, list(verdict.got)) == (status, (reason,), stored["got"])
    if status == "off":
        assert reason["inputs"] == [1] and reason["cut"] is True
        assert reason["shares"] == [pytest.approx(stored["got"][1] / stored["asked"][1], rel=1e-3)] and reason["shares"][0] < 0.5
    assert load_lora(loras[0]).verdict is None and json.loads(work.zit("inspect", loras[0], "--json").ok())["check"] is None


ADALN, TO_Q, TO_V = (f"layers.0.{m}" for m in ("adaLN_modulation.0", "attention.to_q", "attention.to_v"))


def test_merge_with_one_value_for_all_and_one_for_each(work, real_loras):
    flags = ["--ratio", 0.5, "--to_q", 2, -1, "--attention", 0.25, "--adaLN", 0, 3, "--w2", 1.5]
    text = work.zit("merge", *real_loras, "-o", "out.safetensors", *flags, "--dtype", "fp32").ok()
    assert "wrote " in text
    for module, (me, style) in {TO_Q: (1.0, -0.5), TO_V: (0.125, 0.125), ADALN: (0.0, 1.5)}.items():
        wanted = me * delta(real_loras[0], module) + style * delta(real_loras[1], module)
        assert close(delta(Path("out.safetensors"), module), wanted), module


def test_merge_with_a_ratio_for_each_and_negative_numbers(work, real_loras):
    work.zit("merge", *real_loras, "-o", "out.safetensors", "--ratio", -1, 0.5, "--rank", 4).ok()
    wanted = 0.5 * delta(real_loras[1], TO_Q) - delta(real_loras[0], TO_Q)
    assert close(delta(Path("out.safetensors"), TO_Q), wanted)


@pytest.mark.parametrize("number", ["-1e-3", "-.5", "-2."])
def test_merge_takes_negative_numbers_as_people_write_them(work, real_loras, number):
    text = work.zit("merge", real_loras[0], "-o", "out.safetensors", "--ratio", number, "--dry-run").ok()
    assert f"  strength: everywhere {float(number):g}\n" in text


@pytest.mark.parametrize(
    ("spec", "strength"),
    [("0-9=0.5,10-29=1:0.6", 0.5), ("0=-0.25", -0.25), ("0-1=0.5:1", 0.5), ("0-9=0.5, 3=2", 0.5)],
)
def test_merge_with_a_layer_spec(work, real_loras, spec, strength):
    work.zit("merge", real_loras[0], "-o", "out.safetensors", "--ratio", 1, "--layers", spec).ok()
    assert close(delta(Path("out.safetensors"), TO_Q), strength * delta(real_loras[0], TO_Q))


def test_merge_with_a_layer_spec_for_each(work, real_loras):
    work.zit("merge", *real_loras, "-o", "out.safetensors", "--ratio", 1, "--layers", "0-9=0.5", "0-9=2").ok()
    wanted = 0.5 * delta(real_loras[0], TO_Q) + 2 * delta(real_loras[1], TO_Q)
    assert close(delta(Path("out.safetensors"), TO_Q), wanted)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--ratio", 1, 2, 3], "--ratio: got 3 values for 2 files"),
        (["--ratio", 1, "--to_q", 1, 2, 3], "--to_q: got 3 values for 2 files"),
        (["--ratio", 1, "--layers", "0-9=1", "0-9=1", "0-9=1"], "--layers: got 3 values for 2 files"),
        (["--ratio", 1, "--layers", "0-9"], "--layers 0-9: '0-9' is not LAYERS=WEIGHT"),
        (["--ratio", 1, "--layers", "0-9=x"], "--layers 0-9=x: '0-9=x' is not LAYERS=WEIGHT"),
        (["--ratio", 1, "--layers", "=1"], "--layers =1: '=1' is not LAYERS=WEIGHT"),
        (["--ratio", 1, "--layers", "0-9=1,0-9=2"], "--layers 0-9=1,0-9=2: duplicate 0-9"),
        (["--ratio", 1, "--layers", "0-40=1"], "--layers 0-40 (file 1): Z-Image's layers are 0 to 29"),
        (["--ratio", 1, "--layers", "0-9=1", "0-40=1"], "--layers 0-40 (file 2): Z-Image's layers are 0 to 29"),
        (["--ratio", 1, "--adaLN", 1, "--adaLN_modulation", 1], "file 1: adaLN_modulation and adaLN overlap"),
        (["--ratio", "nan"], "--ratio (file 1): must be a finite number"),
        (["--ratio", 1, "nan"], "--ratio (file 2): must be a finite number"),
        (["--ratio", 1, "--to_q", "inf"], "--to_q (file 1): must be a finite number"),
        (["--ratio", 1, "--to_q", 1, "inf"], "--to_q (file 2): must be a finite number"),
        (["--ratio", 1, "-1", "--method", "slerp"], "--ratio (file 2): slerp goes between directions"),
        (["--ratio", 1, "--preset", "adaln_only", "late"], "--preset (file 2): no such preset: 'late'"),
        (["--ratio", 1, "--alpha", "keys"], "--alpha (file 1): must be key, metadata, none"),
        (["--ratio", 1, "--qkv", "split", "both"], "--qkv (file 2): "),
        (["--ratio", 1, "--drop", "norms"], "--drop: no such drop: 'norms'"),
        (["--ratio", 1, "--rank", "0"], "--rank: must be exact, same, a whole number from 1"),
        (["--ratio", 1, "--rank", "foo"], "--rank: must be exact, same, a whole number from 1"),
        (["--ratio", 1, "--rank", "energy=2"], "--rank: takes energy as a share from 0 to 1"),
        (["--ratio", 1, "--rank", "energy="], "--rank: 'energy=' is not NAME=VALUE"),
        (["--ratio", 1, "--rank", "size_mb=0.001"], "--rank: a file of rank 2 takes "),
        (["--ratio", 1, "--method", "blend"], "--method: no such method: 'blend'"),
        (["--ratio", 1, "--params", "density=1"], "--params density: the method sum has no such parameter"),
        (["--ratio", 1, "--params", "density"], "--params: 'density' is not NAME=VALUE"),
        (["--ratio", 1, "--dtype", "int8"], "--dtype: no such dtype: 'int8'"),
        (["--ratio", 1, "--format", "webui"], "--format: no such format: 'webui'"),
        (["--ratio", 1, "--keep-lokr"], "--keep-lokr: only one LoKr"),
        (["--ratio", 1, "--shapes", "any"], "--shapes: must be 'strict' or 'free'"),
        (["--ratio", 1, "--device", "gpu"], "--device: has a form that is not allowed: 'gpu'"),
    ],
)
def test_merge_refuses_in_one_sentence_that_names_the_flag(work, real_loras, flags, says):
    assert work.zit("merge", *real_loras, "-o", "out.safetensors", *flags).refused().startswith(says)
    assert not Path("out.safetensors").exists()


def test_merge_makes_a_dry_run(work, real_loras):
    text = work.zit("merge", *real_loras, "-o", "out.safetensors", "--ratio", 1, "--dry-run").ok()
    assert "strength of LoRAs 1 and 2: everywhere 1\n" in text
    assert not Path("out.safetensors").exists()


def test_merge_writes_again_what_it_wrote_and_nothing_else(work, real_loras):
    words = ("merge", *real_loras, "-o", "out.safetensors", "--ratio")
    work.zit(*words, 1).ok()
    first = Path("out.safetensors").read_bytes()
    work.zit(*words, 0.5).ok()
    assert Path("out.safetensors").read_bytes() != first
    before = real_loras[1].read_bytes()
    assert "style.safetensors" in work.zit("merge", real_loras[0], "-o", real_loras[1], "--ratio", 1).refused()
    assert real_loras[1].read_bytes() == before


def test_merge_into_a_folder_that_is_not_there_yet(work, real_loras):
    work.zit("merge", real_loras[0], "-o", "new/folder/out.safetensors", "--ratio", 1).ok()
    assert load_file("new/folder/out.safetensors")


@pytest.mark.parametrize("name", ["trained.safetensors", "me and style (v2).safetensors", "über.safetensors", "-x.safetensors"])
def test_merge_lets_people_name_the_file(work, real_loras, name):
    work.zit("merge", real_loras[0], f"--out={name}", "--ratio", 1).ok()
    assert load_file(name)


def test_merge_wants_a_safetensors_name(work, real_loras):
    message = work.zit("merge", real_loras[0], "-o", "out.pt", "--ratio", 1).refused()
    assert message == "--out: out.pt is not a .safetensors file: give it that ending"
    assert not Path("out.pt").exists()


def test_merge_names_the_flag_of_one_file_without_its_number(work, real_loras):
    words = ("merge", real_loras[0], "-o", "out.safetensors", "--ratio", 1)
    assert work.zit(*words, "--to_q", "inf").refused().startswith("--to_q: must be a finite number")
    assert work.zit(*words, "--to_q", 1, 2).refused().startswith("--to_q: got 2 values for 1 file: ")


def test_merge_names_the_file_that_is_not_there_and_the_folder_that_can_not_be(work, real_loras):
    words = ("merge", real_loras[0], "gone.safetensors", "--ratio", 1, "-o")
    assert work.zit(*words, "out.safetensors").refused().startswith(f"file 2: {Path('gone.safetensors').absolute()} is not there")
    inside = real_loras[1] / "out.safetensors"
    message = work.zit("merge", real_loras[0], "--ratio", 1, "-o", inside).refused()
    assert message.startswith(f"--out: {real_loras[1]} is not a folder")


def test_what_a_merge_finds_on_its_way_has_no_location_of_a_config(work, real_loras):
    same = ("merge", real_loras[0], real_loras[0], "-o", "out.safetensors", "--ratio", 1, "-1")
    message = work.zit(*same, "--method", "normalize").refused()
    assert message.startswith("out: normalize, the whole: the LoRAs cancel each other")
    assert not Path("out.safetensors").exists()


def trained_job(work: Workspace, lora: str = "trained", training: dict | None = None, **keys) -> Path:
    section = work.section({"name": "a", "loras": [{"lora": lora, "ratio": 0.9}]}, **keys)
    del section["output_dir"]
    return work.config(work.training(**(training or {})), section)


def test_check_before_the_training_needs_no_trained_file(work):
    text = work.zit("check", trained_job(work, training={"network": {"type": "lora", "linear": 16}})).ok()
    assert "cat.safetensors" in text and "rank 16" in text and "still to be trained" in text
    assert text.endswith("no errors\n")
    assert not (work.folder / "output").exists()


def test_run_needs_the_trained_file_and_names_what_is_there(work):
    config = trained_job(work)
    assert "cat.safetensors is not there, the folder holds no .safetensors file" in work.zit("run", config).refused()
    work.lora("output/cat/cat_000000250.safetensors")
    assert "the folder holds cat_000000250.safetensors" in work.zit("run", config).refused()


@pytest.mark.parametrize(("source", "name"), [("trained", "cat"), ("trained@3000", "cat"), ("trained@2500", "cat_000002500")])
def test_run_takes_the_file_that_the_training_saved(work, source, name):
    for i, stem in enumerate(("cat", "cat_000002500", "cat_000002750")):
        work.lora(f"output/cat/{stem}.safetensors", seed=i)
    work.zit("run", trained_job(work, source)).ok()
    wanted = 0.9 * delta(work.folder / f"output/cat/{name}.safetensors", "layers.0.attention.to_k")
    assert close(delta(work.folder / "output/cat/merged_cat_a.safetensors", "layers.0.attention.to_k"), wanted)


def test_check_finds_a_typo_before_the_training(work):
    config = work.config(work.training(), work.section({"name": "a", "loras": [{"lora": "trained", "ratio": 1, "block": {}}]}))
    assert (
        work.zit("check", config).refused().startswith("process[1].steps[0].loras[0].block: unknown key (did you mean blocks?)")
    )


def test_check_finds_before_the_training_that_another_lora_is_not_there(work):
    both = [{"lora": "trained", "ratio": 1.0}, {"lora": "gone.safetensors", "ratio": 1.0}]
    message = work.zit("check", work.config(work.training(), work.section({"name": "a", "loras": both}))).refused()
    assert message.startswith("process[1].steps[0].loras[1].lora: gone.safetensors is not there")


def test_check_names_the_lora_that_an_earlier_section_will_write(work, loras):
    first = work.section({"name": "a", "loras": [{"lora": "me.safetensors", "ratio": 1.0}]})
    mine = {"name": "b", "loras": [{"lora": "me.safetensors", "ratio": 1.0}]}
    theirs = {"name": "c", "loras": [{"lora": "b", "ratio": 1.0}, {"lora": "out/merged_cat_a.safetensors", "ratio": 1.0}]}
    message = work.zit("check", work.config(first, work.section(mine, theirs))).refused()
    assert message.startswith("process[1].steps[1].loras[1].lora: process[0].steps[0] writes out/merged_cat_a.safetensors")


def test_check_finds_before_the_training_that_another_lora_is_of_another_model(work, loras):
    both = [{"lora": "trained", "ratio": 1.0}, ME]
    message = work.zit(
        "check", work.config(work.training(), work.section({"name": "a", "loras": both}, shapes="strict"))
    ).refused()
    assert message.startswith("process[1].steps[0]: me.safetensors changes ") and "32 x 8" in message and "15360 x 256" in message


@pytest.mark.parametrize("step", [2000, 2250, 2500, 2750, 3000])
def test_checkpoints_that_the_training_will_keep(work, step):
    work.zit("check", trained_job(work, f"trained@{step}")).ok()


@pytest.mark.parametrize("step", [1, 250, 1750, 2600, 3250])
def test_checkpoints_that_the_training_will_not_keep(work, step):
    message = work.zit("check", trained_job(work, f"trained@{step}")).refused()
    assert message.startswith("process[1].steps[0].loras[0].lora: process[0] will not keep a checkpoint")
    assert f"step {step}" in message and "2000, 2250, 2500, 2750, 3000" in message


@pytest.mark.parametrize("source", ["trained", "trained@250"])
def test_trained_needs_a_training_before_it(work, source):
    step = {"name": "a", "loras": [{"lora": source, "ratio": 1.0}]}
    for config in (work.job(step), work.config(work.section(step), work.training())):
        message = work.zit("check", config).refused()
        assert message.startswith("process[0].steps[0].loras[0].lora: ") and "needs a training process before" in message


def test_the_nearest_training_counts(work):
    near = work.training(training_folder=str(work.folder / "near"), network={"type": "lora", "linear": 7})
    section = work.section({"name": "a", "loras": [{"lora": "trained", "ratio": 1.0}]})
    assert "rank 7" in work.zit("check", work.config(work.training(), near, section)).ok()


@pytest.mark.parametrize(
    ("training", "place", "says"),
    [
        ({"network": None}, "", "trains no LoRA"),
        ({"network": {"type": "dora", "linear": 16}}, ".network", "DoRA"),
        ({"network": {"type": "DoRA", "linear": 16}}, ".network", "DoRA"),
        ({"network": {"type": "lora", "linear": 16, "network_kwargs": {"dora": True}}}, ".network", "DoRA"),
        ({"network": {"type": "oft", "linear": 16}}, ".network.type", "merging a trained oft is not available yet"),
        ({"model": {"arch": "flux"}}, ".model.arch", "not Z-Image"),
        ({"network": {"type": "lora", "linear": 16, "all_layers": True}}, ".network.all_layers", "drop: [norm, bias]"),
        (
            {"network": {"type": "lora", "linear": 16, "network_kwargs": {"full_if_contains": ["adaLN"]}}},
            ".network.full_if_contains",
            "drop: [norm, bias]",
        ),
    ],
    ids=str,
)
def test_trainings_that_leave_no_lora_to_merge(work, training, place, says):
    message = work.zit("check", trained_job(work, training=training)).refused()
    assert message.startswith(f"process[0]{place}: ")
    assert says in message


@pytest.mark.parametrize("kwargs", [{"all_layers": True}, {"network_kwargs": {"full_if_contains": "adaLN_modulation"}}], ids=str)
def test_norms_and_biases_of_a_training_are_dropped_by_name(work, kwargs):
    network = {"type": "lora", "linear": 16} | kwargs

    def check(drop):
        step = {"name": "a", "rank": 16, "loras": [{"lora": "trained", "ratio": 0.9, "drop": drop}]}
        return work.zit("check", work.config(work.training(network=network), work.section(step, shapes="strict")))

    assert "drop: [bias]" in check(["norm"]).refused()
    assert check(["norm", "bias"]).ok().endswith("no errors\n")


def lokr_job(work: Workspace, network: dict | None = None, shapes: str = "strict", **step) -> Path:
    """A LoKr training and a step that uses it; the sizes are those of the real model where nothing else is said."""
    network = {"type": "lokr", "linear": 32} | (network or {})
    step = {"name": "a", "loras": [{"lora": "trained", "ratio": 0.9}]} | step
    return work.config(work.training(network=network), work.section(step, shapes=shapes))


@pytest.mark.parametrize("shapes", ["strict", "free"])
def test_a_trained_lokr_needs_a_rank_before_the_training(work, shapes):
    message = work.zit("check", lokr_job(work, shapes=shapes)).refused()
    assert message.startswith("process[1].steps[0]") and "rank: 64" in message
    assert "save: {keep_lokr: true}" in message and "confirm_size: true" in message
    assert "21.8" not in message
    if shapes == "strict":  # 30 layers x (4 attention, 3 feed-forward, adaLN) x 3840 x 2 bytes: no rank is higher
        assert f"{30 * (4 * 7680 + 3 * 14080 + 15616) * 3840 * 2 / 1e9:.2f} GB" in message
    text = work.zit("check", lokr_job(work, shapes=shapes, rank=64)).ok()
    assert "LoKr of rank" in text and "240 modules, rank 64, bf16" in text and text.endswith("no errors\n")
    text = work.zit("check", lokr_job(work, shapes=shapes, save={"keep_lokr": True})).ok()
    assert "a LoKr as before" in text and "ComfyUI" in text and text.endswith("no errors\n")


@pytest.mark.parametrize("shapes", ["strict", "free"])
def test_keep_lokr_is_not_advised_where_it_does_not_apply(work, loras, real_loras, shapes):
    both = [{"lora": "trained", "ratio": 0.9}, ME if shapes == "strict" else {"lora": "small.safetensors", "ratio": 1.0}]
    work.lora("small.safetensors")
    message = work.zit("check", lokr_job(work, shapes=shapes, loras=both)).refused()
    assert "rank: 64" in message and "keep_lokr" not in message
    assert "no errors" in work.zit("check", lokr_job(work, shapes=shapes, loras=both, rank=64)).ok()


@pytest.mark.parametrize("shapes", ["strict", "free"])
def test_rank_same_of_a_lokr_needs_a_number(work, shapes):
    message = work.zit("check", lokr_job(work, shapes=shapes, rank="same")).refused()
    assert message.startswith("process[1].steps[0].rank: ") and "LoKr" in message and "rank: 64" in message


def test_confirm_size_lets_a_huge_one_pass(work, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**13))
    for shapes in ("strict", "free"):
        assert "no errors" in work.zit("check", lokr_job(work, shapes=shapes, confirm_size=True)).ok()


# toolkit/models/lokr.py: a side is split at the divisor nearest to its root, or as lokr_factor says; both factors are whole
# unless lokr_full_rank is false and the rank is small. rank(L kron R) = rank(L) rank(R).
@pytest.mark.parametrize(
    ("network", "span"),
    [
        ({}, "256-3840"),  # adaLN: (120 x 16) kron (128 x 16); attention: (60 x 60) kron (64 x 64)
        ({"lokr_full_rank": False, "linear": 4}, "64-240"),  # 16 times 4, 60 times 4
        ({"lokr_full_rank": False, "linear": 1}, "16-60"),
        ({"lokr_full_rank": False, "linear": 10000}, "256-3840"),
        ({"lokr_factor": 4}, "256-3840"),  # (4 x 4) kron (3840 x 64), (4 x 4) kron (960 x 960)
        ({"lokr_factor": 4, "lokr_full_rank": False, "linear": 2}, "8"),
    ],
    ids=str,
)
def test_the_rank_of_a_trained_lokr_is_told(work, network, span):
    text = work.zit("check", lokr_job(work, network, rank=64)).ok()
    line = next(line for line in text.splitlines() if "cat.safetensors" in line and "LoKr" in line)
    assert f"LoKr of rank {span} at most" in line


def test_a_full_rank_training(work):
    network = {"type": "fullrank", "linear": 16}
    message = work.zit("check", trained_job(work, training={"network": network}, shapes="strict")).refused()
    assert "rank: 64" in message and "keep_lokr" not in message
    section = work.section({"name": "a", "rank": 64, "loras": [{"lora": "trained", "ratio": 0.9}]}, shapes="strict")
    text = work.zit("check", work.config(work.training(network=network), section)).ok()
    assert "full difference" in text and "rank 64" in text


@pytest.mark.parametrize("factor", ["four", 1.5, True])
def test_a_lokr_factor_is_a_whole_number(work, factor):
    message = work.zit("check", lokr_job(work, {"lokr_factor": factor}, rank=64)).refused()
    assert message.startswith("process[0].network.lokr_factor: must be a whole number")


@pytest.mark.parametrize(
    "training",
    [
        {"network": {"type": "lora", "linear": "sixteen"}},
        {"network": {"type": "lora", "linear": [16]}},
        {"network": {"type": ["lora"], "linear": 16}},
        {"network": {"type": "lora", "linear": -4}},
        {"train": {"steps": "many"}},
        {"save": {"save_every": "often"}},
        {"save": {"save_every": -1}},
        {"training_folder": 7},
        {"training_folder": ["output"]},
        {"name": 7},
    ],
    ids=str,
)
def test_mistakes_in_the_training_section_get_a_sentence_too(work, training):
    message = work.zit("check", trained_job(work, "trained@2750", training=training)).refused()
    assert message.startswith("process[")


def test_check_of_a_whole_folder_of_outputs_that_are_ours(work, loras):
    config = three_steps(work)
    work.zit("run", config).ok()
    assert work.zit("check", config).ok().endswith("no errors\n")


def test_inspect_json(work, loras):
    facts = json.loads(work.zit("inspect", loras[1], "--json").ok())
    assert (facts["file"], facts["modules"], facts["dtype"], facts["recipe"]) == ("style.safetensors", 21, "bf16", None)
    assert set(facts["ranks"].values()) == {3} and set(facts["alphas"].values()) == {1.0}
    wanted = float(delta(loras[1], "layers.3.attention.to_v").norm())
    assert facts["norms"]["layers.3.attention.to_v"] == pytest.approx(wanted, rel=1e-5)
    assert facts["norm"] == pytest.approx(sum(n * n for n in facts["norms"].values()) ** 0.5)


def test_inspect_for_people(work):
    work.shapes = SMALL
    text = work.zit("inspect", work.lora("me.safetensors")).ok()
    for part in ("me.safetensors", "240", "rank", "diffusion_model.* .lora_A.weight", "trg_ai_toolkit", "zimage"):
        assert part in text
    assert len([line for line in text.splitlines() if line.split()[:1] and line.split()[0].isdecimal()]) == 30
    assert text.isascii() and max(map(len, text.splitlines())) <= 80


def test_inspect_of_our_own_file_shows_its_recipe(work, loras):
    work.zit("run", three_steps(work)).ok()
    out = work.out / "merged_cat_b.safetensors"
    assert "recipe merged_cat_b.safetensors" in work.zit("inspect", out).ok()
    recipe = json.loads(work.zit("inspect", out, "--json").ok())["recipe"]
    assert (recipe["type"], recipe["job"], [s["name"] for s in recipe["steps"]]) == ("zit_merge", "cat", ["a", "b"])


def test_inspect_lists_the_methods(work):
    text = work.zit("inspect", "--methods").ok()
    assert text.startswith("sum: ") and all(f"\n{name}: " in f"\n{text}" for name in METHODS)
    assert "density: 0.2, above 0 and at most 1." in text and max(map(len, text.splitlines())) <= 80


def test_inspect_wants_a_file(work, loras):
    assert "name a LoRA file" in work.zit("inspect").refused()


def test_recipe_of_a_file_that_is_not_ours(work, loras):
    assert "has no recipe" in work.zit("recipe", loras[0]).refused()


@pytest.mark.parametrize("command", ["inspect", "recipe"])
def test_files_that_are_not_there(work, command):
    assert "gone.safetensors: there is no such file" in work.zit(command, "gone.safetensors").refused()


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["marge"],
        ["run"],
        ["run", "config.yaml", "--dryrun"],
        ["merge", "me.safetensors", "-o", "out.safetensors"],
        ["merge", "me.safetensors", "--ratio", "1"],
        ["merge", "me.safetensors", "-o", "out.safetensors", "--ratio", "much"],
        ["merge", "me.safetensors", "-o", "out.safetensors", "--ratio", "1", "--to_w", "1"],
        ["check"],
        ["recipe"],
        ["install"],
    ],
    ids=" ".join,
)
def test_usage_errors_are_2(work, loras, words):
    ran = work.zit(*words)
    assert ran.code == 2 and ran.out == "" and "usage: " in ran.err and "Traceback" not in ran.err
    assert not Path("out.safetensors").exists()


def test_a_missing_ratio_is_named(work, loras):
    assert "--ratio" in work.zit("merge", "me.safetensors", "-o", "out.safetensors").err.splitlines()[-1]


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["merge", "--help"], ["run", "--help"]], ids=" ".join)
def test_help_is_0(work, words):
    text = work.zit(*words).ok()
    assert "zit_merge" in text and text.isascii()


def test_an_interruption_is_130(work, loras, monkeypatch):
    def track(bar: Bar, items: Collection[T], label: str, *how: object) -> Iterator[T]:
        for done, item in enumerate(items, 1):
            yield item
            if done == 10:
                raise KeyboardInterrupt

    monkeypatch.setattr(Bar, "track", track)
    ran = work.zit("run", three_steps(work), "--quiet")
    assert (ran.code, ran.out, ran.err) == (130, "", "zit_merge: interrupted, nothing half-written is left\n")
    assert work.files() == []


def program(*words: object, folder: Path, **environment: str) -> Ran:
    """`python -m extensions_built_in.zit_merge`, from another folder than the repository."""
    done = subprocess.run(
        [sys.executable, "-m", "extensions_built_in.zit_merge", *map(str, words)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    return Ran(done.returncode, done.stdout, without_progress(done.stderr))


def test_the_program_runs_a_job_and_prints_ascii(work, loras):
    text = program("run", three_steps(work), folder=work.folder, PYTHONIOENCODING="ascii").ok()
    assert len(work.files()) == 3 and text.isascii() and text.count(" is right: ") == 3


def test_the_program_refuses_in_one_line(work):
    done = program("run", "gone.yaml", folder=work.folder)
    assert done.refused().startswith("gone.yaml: can't be read") and done.out == ""


def test_names_in_other_scripts_on_a_console_that_has_only_ascii(work):
    work.lora("風格.safetensors", metadata={"ss_tag_frequency": '{"1_貓":{"貓":1}}'})
    config = work.job({"name": "a", "loras": [{"lora": "風格.safetensors", "ratio": 1.0}]}, job="貓")
    program("run", config, folder=work.folder, PYTHONIOENCODING="ascii").ok()
    assert work.files() == ["merged_貓_a.safetensors"]
    with safe_open(work.out / "merged_貓_a.safetensors", framework="pt") as file:
        assert file.metadata()["modelspec.trigger_phrase"] == "貓"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to oneself")
def test_ctrl_c_ends_the_program_with_130(work, loras):
    script = (
        "import os, signal, sys\n"
        "from extensions_built_in.zit_merge.cli.main import main\n"
        "from extensions_built_in.zit_merge.report.progress import Bar\n"
        "def track(bar, items, *how):\n"
        "    for done, item in enumerate(items, 1):\n"
        "        yield item\n"
        f"        os.kill(os.getpid(), {int(signal.SIGINT)}) if done == 10 else None\n"
        "Bar.track = track\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "run", str(three_steps(work)), "--quiet"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "zit_merge: interrupted, nothing half-written is left\n"
    assert work.files() == []


@pytest.mark.parametrize(
    "words", [["inspect", "me.safetensors"], ["inspect", "me.safetensors", "--json"], ["--help"]], ids=" ".join
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_seen_enough_ends_the_command_quietly(work, loras, words, unbuffered):
    """inspect FILE | head -1, whether Python writes at once or when it ends."""
    command = [sys.executable, "-m", "extensions_built_in.zit_merge", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(
        command, cwd=work.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert (without_progress(process.stderr.read()), process.wait()) == ("", 0)
