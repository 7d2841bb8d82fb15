"""What lies on the disk before, during and after a run."""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from workspace import SMALL, Workspace

from extensions_built_in.zit_merge import load_lora
from extensions_built_in.zit_merge.files import atomic
from extensions_built_in.zit_merge.formats import safetensors_writer
from extensions_built_in.zit_merge.report.progress import Bar
from extensions_built_in.zit_merge.wording import size_text

ROOT = Path(__file__).parents[2]
OUT = "merged_cat_a.safetensors"
ME = {"lora": "me.safetensors", "ratio": 1.0}
STYLE = {"lora": "style.safetensors", "ratio": 0.5}
STEP = {"name": "a", "loras": [ME]}
posix = pytest.mark.skipif(os.name == "nt", reason="not on Windows")
pytestmark = pytest.mark.usefixtures("few")


def broken(work: Workspace, name: str = "broken.safetensors") -> dict:
    """A LoRA with NaN in its last layer: it passes every check of its header."""

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["diffusion_model.layers.29.feed_forward.w3.lora_B.weight"][0, 0] = float("nan")

    work.lora(name, change=spoil)
    return {"lora": name, "ratio": 1.0}


def everything(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_later_steps_read_the_files_of_earlier_ones(work, loras):
    chain = [
        {"name": "a", "loras": [ME], "save": {"dtype": "fp32"}},
        {"name": "b", "loras": [{"lora": "a", "ratio": 0.5}], "save": {"dtype": "fp32"}},
        {"name": "c", "loras": [{"lora": "b", "ratio": -2.0}, {"lora": "a", "ratio": 3.0}], "save": {"dtype": "fp32"}},
    ]
    work.zit("run", work.job(*chain)).ok()
    source, made = (load_lora(p)["layers.3.attention.to_v"] for p in (loras[0], work.out / "merged_cat_c.safetensors"))
    wanted = 2.0 * source.up.double() @ source.down.double()
    assert torch.allclose(made.up.double() @ made.down.double(), wanted, rtol=1e-6, atol=1e-9)


def test_a_step_that_is_not_kept_feeds_later_ones_and_leaves_no_file(work, loras):
    steps = [{"name": "a", "loras": [ME], "keep": False}, {"name": "b", "loras": [{"lora": "a", "ratio": 0.5}, STYLE]}]
    work.zit("run", work.job(*steps)).ok()
    assert work.files() == ["merged_cat_b.safetensors"]
    without = load_file(work.out / "merged_cat_b.safetensors")
    work.zit("run", work.job(STEP, steps[1])).ok()
    with_file = load_file(work.out / "merged_cat_b.safetensors")
    assert without.keys() == with_file.keys() and all(torch.equal(without[k], with_file[k]) for k in without)


def test_a_step_that_is_not_kept_leaves_the_file_of_its_name_alone(work, loras):
    work.out.mkdir()
    (work.out / OUT).write_text("mine")
    work.zit("run", work.job(STEP | {"keep": False}, {"name": "b", "loras": [{"lora": "a", "ratio": 1.0}]})).ok()
    assert work.files() == [OUT, "merged_cat_b.safetensors"]
    assert (work.out / OUT).read_text() == "mine"


def test_a_step_that_is_not_kept_is_gone_when_a_later_one_fails(work, loras):
    steps = [STEP | {"keep": False}, {"name": "b", "loras": [{"lora": "a", "ratio": 1.0}, broken(work)]}]
    assert "NaN" in work.zit("run", work.job(*steps)).refused()
    assert work.files() == []


def test_copy_to(work, loras):
    comfy = work.folder / "comfy"
    comfy.mkdir()
    for ratio in (1.0, 0.5):  # the second run replaces the copy of the first
        work.zit("run", work.job({"name": "a", "loras": [ME | {"ratio": ratio}], "copy_to": str(comfy)})).ok()
        assert everything(comfy) == [OUT]
        assert (comfy / OUT).read_bytes() == (work.out / OUT).read_bytes()


def test_copy_to_the_folder_of_the_output_itself(work, loras):
    work.out.mkdir()
    work.zit("run", work.job(STEP | {"copy_to": str(work.out)})).ok()
    assert work.files() == [OUT] and load_lora(work.out / OUT)


@pytest.mark.parametrize("there", ["nothing", "file"])
def test_copy_to_a_folder_that_is_none_is_found_before_the_training(work, loras, there):
    if there == "file":
        (work.folder / "comfy").write_text("x")
    section = work.section(STEP | {"copy_to": str(work.folder / "comfy")})
    message = work.zit("check", work.config(work.training(), section)).refused()
    assert message.startswith("process[1].steps[0].copy_to: ") and "is not a folder" in message


def test_a_foreign_file_where_the_copy_would_go(work, loras):
    comfy = work.folder / "comfy"
    comfy.mkdir()
    (comfy / OUT).write_text("mine")
    message = work.zit("run", work.job(STEP | {"copy_to": str(comfy)})).refused()
    assert str(comfy / OUT) in message and "was not written by this step of this job" in message
    assert (comfy / OUT).read_text() == "mine" and work.files() == []


def test_a_file_of_the_same_job_and_step_is_replaced(work, loras):
    work.zit("run", work.job(STEP)).ok()
    first = (work.out / OUT).read_bytes()
    work.zit("run", work.job({"name": "a", "loras": [STYLE]})).ok()
    assert work.files() == [OUT] and (work.out / OUT).read_bytes() != first


def _foreign(work: Workspace, kind: str) -> bytes | None:
    """Something at the output's place that this step of this job did not write; its bytes, if it is a file."""
    work.out.mkdir()
    path = work.out / OUT
    if kind == "lora":
        work.lora(f"out/{OUT}")
    elif kind == "text":
        path.write_text("mine")
    elif kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to(work.out / "gone")
    else:
        other_job, other_step = {"other job": ("dog", "a"), "other step": ("cat", "b")}[kind]
        work.zit("run", work.job({"name": other_step, "loras": [ME]}, job=other_job)).ok()
        (work.out / f"merged_{other_job}_{other_step}.safetensors").rename(path)
    return path.read_bytes() if path.is_file() else None


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize(
    "kind",
    ["lora", "text", "empty", "folder", pytest.param("dangling link", marks=posix), "other job", "other step"],
)
def test_any_other_file_is_an_error_at_check_time_and_stays(work, loras, kind, command):
    before = _foreign(work, kind)
    section = work.section(STEP)
    config = work.config(work.training(), section) if command == "check" else work.config(section)
    message = work.zit(command, config).refused()
    assert f"{work.out / OUT} exists and was not written by this step of this job" in message
    assert work.files() == [OUT]
    assert before is None or (work.out / OUT).read_bytes() == before


def test_two_sections_do_not_write_one_file(work, loras):
    config = work.config(work.section(STEP), work.section({"name": "a", "loras": [STYLE]}))
    assert "process[1].steps[0]" in work.zit("check", config).refused()


@pytest.mark.parametrize("source", ["me.safetensors", OUT, f"./deep/../{OUT}"])
def test_an_output_that_is_also_an_input(work, source):
    (work.folder / "deep").mkdir()
    path = work.lora("me.safetensors")
    work.zit("run", work.job(STEP, output_dir=str(work.folder))).ok()
    if source == "me.safetensors":
        os.link(path, work.folder / "other_name.safetensors")
        (work.folder / OUT).unlink()
        os.link(path, work.folder / OUT)
    before = (work.folder / OUT).read_bytes()
    config = work.job({"name": "a", "loras": [{"lora": source, "ratio": 1.0}]}, output_dir=str(work.folder))
    message = work.zit("check", config).refused()
    assert message.startswith("process[0].steps[0]: ") and "both an input and the output" in message
    assert (work.folder / OUT).read_bytes() == before


def test_merge_onto_its_own_input(work, real_loras):
    before = real_loras[0].read_bytes()
    message = work.zit("merge", *real_loras, "-o", real_loras[0], "--ratio", 1).refused()
    assert "both an input and the output" in message
    assert real_loras[0].read_bytes() == before


def watch(monkeypatch: pytest.MonkeyPatch, see: Callable[[str, int], None]) -> None:
    """Calls `see` with the step and the number of its modules that are done, after each of them."""

    def track(bar: Bar, items: Collection, label: str, *_: object) -> Iterator:
        for done, item in enumerate(items, 1):
            yield item
            see(label, done)

    monkeypatch.setattr(Bar, "track", track)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: str, module: int, error: BaseException) -> None:
    """Stops the run when so many modules of a step are done."""

    def see(label: str, done: int) -> None:
        if (label, done) == (step, module):
            raise error

    watch(monkeypatch, see)


@pytest.mark.parametrize("module", [1, 10, 24])
def test_an_interrupted_run_leaves_the_old_file_and_no_litter(work, loras, monkeypatch, module):
    work.zit("run", work.job(STEP)).ok()
    old = (work.out / OUT).read_bytes()
    interrupt_at(monkeypatch, "a", module, KeyboardInterrupt())
    assert work.zit("run", work.job({"name": "a", "loras": [STYLE, ME]})).code == 130
    assert work.files() == [OUT] and (work.out / OUT).read_bytes() == old


def test_an_interruption_in_a_later_step_keeps_what_was_whole(work, loras, monkeypatch):
    interrupt_at(monkeypatch, "c", 5, KeyboardInterrupt())
    steps = [STEP, STEP | {"name": "b", "keep": False}, {"name": "c", "loras": [{"lora": "b", "ratio": 1.0}]}]
    assert work.zit("run", work.job(*steps)).code == 130
    assert work.files() == [OUT] and load_lora(work.out / OUT)


def test_an_unexpected_error_leaves_no_litter_either(work, loras, monkeypatch):
    interrupt_at(monkeypatch, "a", 10, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        work.zit("run", work.job(STEP | {"keep": False}, {"name": "b", "loras": [{"lora": "a", "ratio": 1.0}]}))
    assert work.files() == []


def test_an_interruption_of_the_copy(work, loras, monkeypatch):
    comfy = work.folder / "comfy"
    comfy.mkdir()
    config = work.job(STEP | {"copy_to": str(comfy)})
    work.zit("run", config).ok()
    old = (comfy / OUT).read_bytes()
    monkeypatch.setattr(atomic.os, "fsync", _raise_in(comfy, atomic.os.fsync))
    assert work.zit("run", work.job({"name": "a", "loras": [STYLE], "copy_to": str(comfy)})).code == 130
    assert everything(comfy) == [OUT] and (comfy / OUT).read_bytes() == old


def _raise_in(folder: Path, fsync: Callable[[int], None]) -> Callable[[int], None]:
    """An fsync that is interrupted at the part file of this folder."""

    def interrupted(handle: int) -> None:
        if any(p.suffix == ".part" and os.path.samestat(os.fstat(handle), p.stat()) for p in folder.iterdir()):
            raise KeyboardInterrupt
        fsync(handle)

    return interrupted


@posix
@pytest.mark.parametrize("keep", [True, False])
def test_a_killed_run_leaves_the_old_file_and_the_next_run_clears_up(work, loras, keep):
    def config(ratio: float) -> Path:
        return work.job(STEP | {"keep": keep}, {"name": "b", "loras": [{"lora": "a", "ratio": ratio}, STYLE]})

    work.zit("run", config(1.0)).ok()
    old = {name: (work.out / name).read_bytes() for name in work.files()}
    changed = config(0.5)  # a file that the same recipe made would be left as it is
    script = (
        "import os, sys\n"
        "from extensions_built_in.zit_merge.cli.main import main\n"
        "from extensions_built_in.zit_merge.report.progress import Bar\n"
        "def track(bar, items, label, *_):\n"
        "    for done, item in enumerate(items):\n"
        "        if (label, done) == ('b', 10):\n"
        f"            os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
        "        yield item\n"
        "Bar.track = track\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", script, "run", changed, "--quiet"], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert {name: (work.out / name).read_bytes() for name in old} == old
    assert f"{'merged_cat_b.safetensors'}.part" in work.files()
    work.zit("run", changed).ok()
    assert work.files() == sorted(old)
    assert (work.out / "merged_cat_b.safetensors").read_bytes() != old["merged_cat_b.safetensors"]
    work.zit("run", config(1.0)).ok()
    assert {name: (work.out / name).read_bytes() for name in old} == old


def test_the_second_of_two_runs_gets_a_sentence_and_disturbs_nothing(work, loras):
    work.out.mkdir()
    part = atomic.part_path(work.out / OUT)
    with atomic.open_exclusively(part) as first:
        first.write(b"what the first run has written")
        first.flush()
        message = work.zit("run", work.job(STEP)).refused()
        assert "another run is writing this file now" in message and str(part) in message
        assert part.read_bytes().endswith(b"what the first run has written")
    work.zit("run", work.job(STEP)).ok()
    assert work.files() == [OUT]


@posix
def test_a_run_that_finishes_while_another_waits_for_its_lock_is_not_spoilt(tmp_path, monkeypatch):
    import fcntl

    path = tmp_path / OUT
    part = atomic.part_path(path)
    part.write_bytes(b"the whole file of the first run")
    flock = fcntl.flock

    def publish_first(file: object, how: int) -> None:
        if not path.exists():
            part.replace(path)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", publish_first)
    atomic.open_exclusively(part).close()
    assert path.read_bytes() == b"the whole file of the first run"


def test_something_else_at_the_place_of_the_part_file(work, loras):
    atomic.part_path(work.out / OUT).mkdir(parents=True)
    assert f"{OUT}" in work.zit("run", work.job(STEP)).refused()


HOSTILE = [
    *(
        "cat",
        "m",
        "M",
        "merged",
        "MERGED",
        "merged_",
        "merged_merged",
        "mer",
        "plugin",
        "zit_merge",
        "z",
        "blend_",
        "out",
        "0",
        "x",
    ),
    *("Katze mit Hut", "貓_v1", "ÄÖ", "İstanbul", "ﬁ", "ß", "my.char", "+", "-", "_", "~", "a/b", "merged/b", "m/erged", "a\\b"),
]
GLOBS = ["[mz]", "[m", "m?r", "me[r]ged", "[a-z]", "{a,b}", "cat*", "[!a]", "[!q]?", "m*", "[M]"]


def taken_for_checkpoints(job: str, folder: Path) -> set[str]:
    """What the toolkit's own globs find in a folder (get_latest_save_path, clean_up_saves), case-insensitive systems included."""
    patterns = [f"{job}*", f"{job}*.safetensors", f"{job}*.pt", f"{job}_*"]
    found = {Path(p).name for pattern in patterns for p in glob.glob(os.path.join(folder, pattern))}
    names = [p.name for p in folder.iterdir()]
    folded = [n for n in names for p in patterns if fnmatch.fnmatchcase(n.casefold(), p.casefold())]
    return found | set(folded) | {n for n in names for p in patterns if fnmatch.fnmatchcase(n.upper(), p.upper())}


def run_beside_the_trainer(work: Workspace, monkeypatch: pytest.MonkeyPatch, job: str, **keys: object) -> tuple[set[str], Path]:
    """Runs a job whose output goes into the trainer's folder; every name that was ever there, and the folder."""
    seen: set[str] = set()
    folder = work.folder / "output" / job

    def look(label: str, done: int) -> None:
        if (label, done) == ("a", 10):
            seen.update(taken_for_checkpoints(job, folder), ["looked"])
            assert any(p.name.endswith(".part") for p in folder.iterdir())

    watch(monkeypatch, look)
    section = work.section({"name": "a", "loras": [ME]}, **keys)
    if not keys:
        del section["output_dir"]
    work.zit("run", work.config(work.training(), section, job=job)).ok()
    assert "looked" in seen
    return seen - {"looked"} | taken_for_checkpoints(job, folder), folder


@pytest.mark.parametrize("job", [*HOSTILE, *GLOBS])
def test_the_toolkit_takes_no_file_of_ours_for_a_checkpoint(work, loras, monkeypatch, job):
    if os.name == "nt" and set(job) & set('*?\\"<>|:'):
        pytest.skip("Windows has no such file names")
    taken, folder = run_beside_the_trainer(work, monkeypatch, job)
    assert taken == set()
    (made,) = folder.glob("*.safetensors")
    assert made.name.endswith("_a.safetensors") and "/" not in made.name


@pytest.mark.parametrize("job", ["*", "?", "**", "*merged", "?" * 30])
def test_a_name_that_takes_every_file_for_a_checkpoint_is_refused_before_the_training(work, loras, job):
    section = work.section({"name": "a", "loras": [ME]})
    del section["output_dir"]
    message = work.zit("check", work.config(work.training(), section, job=job)).refused()
    assert message.startswith("process[1].output_dir: ") and repr(job) in message
    section["output_dir"] = str(work.out)
    work.zit("check", work.config(work.training(), section, job=job)).ok()


@pytest.mark.parametrize("job", ["m", "merged"])
def test_another_prefix_is_said(work, loras, job):
    section = work.section({"name": "a", "loras": [ME]})
    del section["output_dir"]
    text = " ".join(work.zit("run", work.config(work.training(), section, job=job)).ok().split())
    (made,) = (work.folder / "output" / job).glob("*.safetensors")
    assert not made.name.startswith("m") and f"the file is called {made.name.removesuffix(f'{job}_a.safetensors')}" in text


def test_merged_is_the_prefix_where_nothing_speaks_against_it(work, loras, monkeypatch):
    _, folder = run_beside_the_trainer(work, monkeypatch, "cat")
    assert everything(folder) == [OUT, "plugin.html"]


def test_an_embeddings_trigger_is_a_job_name_to_the_toolkit_too(work, loras):
    section = work.section({"name": "a", "loras": [ME]})
    del section["output_dir"]
    work.zit("run", work.config(work.training(embedding={"trigger": "merged"}), section)).ok()
    (made,) = (work.folder / "output" / "cat").glob("*.safetensors")
    assert not made.name.startswith("merged_")


@pytest.mark.parametrize("where", ["cat_merged", "CAT", "cat.out/deep"])
def test_a_folder_in_the_trainers_folder_is_not_taken_for_a_checkpoint(work, loras, where):
    folder = work.folder / "output" / "cat"
    section = work.section({"name": "a", "loras": [ME]}, output_dir=str(folder / where))
    message = work.zit("run", work.config(work.training(), section)).refused()
    assert message.startswith(f"process[1].output_dir: AI-Toolkit would take any file in {folder / where} for a checkpoint")
    assert not folder.exists()


def test_a_folder_of_another_name_in_the_trainers_folder_is_fine(work, loras):
    folder = work.folder / "output" / "cat"
    section = work.section({"name": "a", "loras": [ME]}, output_dir=str(folder / "merged"))
    work.zit("run", work.config(work.training(), section)).ok()
    assert taken_for_checkpoints("cat", folder) == set()


def test_a_copy_in_the_trainers_folder_is_not_taken_for_a_checkpoint(work, loras):
    folder = work.folder / "output" / "m"
    folder.mkdir(parents=True)
    section = work.section({"name": "a", "loras": [ME], "copy_to": str(folder)})
    message = work.zit("run", work.config(work.training(), section, job="m")).refused()
    assert message.startswith("process[1].steps[0].copy_to: AI-Toolkit would take the copy for a checkpoint of m")
    assert list(folder.iterdir()) == []


def test_checkpoints_of_the_trainer_are_never_touched(work, loras):
    saves = [work.lora(f"output/cat/cat{step}.safetensors") for step in ("", "_000002500", "_000002750")]
    before = [(p.stat().st_ctime_ns, p.read_bytes()) for p in saves]
    section = work.section({"name": "a", "loras": [{"lora": "trained", "ratio": 1.0}, {"lora": "trained@2500", "ratio": 0.5}]})
    del section["output_dir"]
    work.zit("run", work.config(work.training(), section)).ok()
    assert [(p.stat().st_ctime_ns, p.read_bytes()) for p in saves] == before


@pytest.mark.parametrize("below", ["", "deep/er"])
def test_an_output_dir_that_is_a_file(work, loras, below):
    work.out.write_text("mine")
    message = work.zit("check", work.job(STEP, output_dir=str(work.out / below))).refused()
    assert message.startswith("process[0].output_dir: ") and f"{work.out} is not a folder" in message
    assert work.out.read_text() == "mine"


@pytest.mark.parametrize("key", ["output_dir", "copy_to"])
def test_a_folder_that_cannot_be_written(work, loras, key):
    locked = work.folder / "locked"
    locked.mkdir(mode=0o555)
    if os.access(locked, os.W_OK):
        pytest.skip("this user may write everywhere")
    config = work.job(STEP, output_dir=str(locked)) if key == "output_dir" else work.job(STEP | {"copy_to": str(locked)})
    message = work.zit("check", config).refused()
    assert key in message and "can't be written to" in message


def test_a_folder_that_the_system_says_cannot_be_written(work, loras, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    message = work.zit("check", work.job(STEP)).refused()
    assert message.startswith("process[0].output_dir: ") and "can't be written to" in message


def big_job(work: Workspace, **keys: object) -> Path:
    section = work.section({"name": "a", "loras": [{"lora": "trained", "ratio": 1.0}]} | keys, shapes="strict")
    return work.config(work.training(network={"type": "lora", "linear": 4096}), section)


def test_over_2_gb_needs_confirmation_before_the_training(work, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**13))
    message = work.zit("check", big_job(work)).refused()
    assert message.startswith("process[1].steps[0]: ") and "rank: 64" in message and "confirm_size: true" in message
    # 30 layers x (4 attention 3840 + 3840, 3 feed-forward 10240 + 3840, adaLN 15360 + 256) x 3840 x 2 bytes: no change of a
    # matrix of 3840 rows has a rank of 4096
    size = 30 * (4 * 7680 + 3 * 14080 + 15616) * 3840 * 2 / 1e9
    assert f"{size:.2f} GB" in message
    assert "no errors" in work.zit("check", big_job(work, confirm_size=True)).ok()
    assert "no errors" in work.zit("check", big_job(work, rank=64)).ok()


def test_the_size_that_is_announced_is_the_size_that_is_written(work, loras):
    text = work.zit("run", work.job({"name": "a", "loras": [ME, STYLE]}, rank=64)).ok()
    size = (work.out / OUT).stat().st_size
    assert text.count(size_text(size)) == 2


@pytest.mark.parametrize("command", ["check", "run"])
def test_no_space_is_found_before_anything_is_written(work, loras, monkeypatch, command):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    message = work.zit(command, work.job(STEP)).refused()
    assert message.startswith("process[0].output_dir: the outputs need ") and "free some" in message
    assert work.files() == []


def least_free(work, monkeypatch, config: Path) -> int:
    """The fewest free bytes with which a job passes its check."""
    low, high = 0, 10**7
    while low < high:
        free = (low + high) // 2
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        passes = work.zit("check", config).code == 0
        low, high = (low, free) if passes else (free + 1, high)
    return low


def test_room_is_counted_beside_what_is_replaced(work, loras, monkeypatch):
    """A new file is whole before the old one goes: the peak counts, not the difference."""
    comfy, later = work.folder / "comfy", {"name": "b", "loras": [{"lora": "a", "ratio": 0.5}]}
    comfy.mkdir()
    copied, hidden = STEP | {"copy_to": str(comfy)}, STEP | {"keep": False}

    def change(*steps: dict) -> Path:
        """The same steps with another ratio in the first."""
        return work.job(steps[0] | {"loras": [ME | {"ratio": 0.25}]}, *steps[1:])

    need = partial(least_free, work, monkeypatch)
    alone = need(work.job(STEP))
    both = need(work.job(STEP, later))
    assert alone < both < 2.2 * alone and need(work.job(copied)) == 2 * alone
    assert need(work.job(hidden, later)) == both  # it is there until the section is done
    monkeypatch.undo()
    work.zit("run", work.job(copied, later)).ok()
    assert (work.out / OUT).stat().st_size <= alone
    assert need(work.job(copied, later)) == 0  # nothing is made again
    first = need(change(STEP))
    assert abs(first - alone) < 100
    assert abs(need(change(copied, later)) - first) < 3000  # each replaces a file of its size
    (comfy / OUT).unlink()
    assert abs(need(work.job(copied, later)) - first) < 100  # the copy alone
    assert abs(need(change(copied, later)) - 2 * first) < 3000
    (comfy / "other").hardlink_to(work.out / OUT)  # what has another name stays on the disk
    assert abs(need(change(STEP, later)) - both) < 3000


def test_room_that_a_killed_run_took_is_given_back(work, loras, monkeypatch):
    work.out.mkdir()
    alone = least_free(work, monkeypatch, work.job(STEP))
    for keep, name in ((True, OUT), (False, OUT)):
        with atomic.open_exclusively(atomic.part_path(work.out / name)) as part:
            part.write(bytes(alone // 2))
        steps = [STEP | {"keep": keep}, *([] if keep else [{"name": "b", "loras": [{"lora": "a", "ratio": 0.5}]}])]
        part_size = atomic.part_path(work.out / name).stat().st_size
        with_part = least_free(work, monkeypatch, work.job(*steps))
        atomic.part_path(work.out / name).unlink()
        assert with_part == least_free(work, monkeypatch, work.job(*steps)) - part_size


class FullDisk:
    """A file on a disk that takes no more bytes after the first 2000."""

    def __init__(self, file):
        self._file, self._left = file, 2000

    def write(self, content) -> int:
        self._left -= memoryview(content).nbytes
        if self._left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(content)

    def __getattr__(self, name: str):
        return getattr(self._file, name)


def test_a_disk_that_fills_up_while_writing(work, loras, monkeypatch):
    work.zit("run", work.job(STEP)).ok()
    old = (work.out / OUT).read_bytes()
    opened = atomic.open_exclusively
    monkeypatch.setattr(safetensors_writer, "open_exclusively", lambda path: FullDisk(opened(path)))
    message = work.zit("run", work.job({"name": "a", "loras": [STYLE]})).refused()
    assert f"{work.out / OUT}: no space left on the disk" in message
    assert work.files() == [OUT] and (work.out / OUT).read_bytes() == old


@posix
def test_the_systems_own_refusal_to_write_more(work):
    """A limit on the file size fails as a full disk does: first in write, then again when the buffer is flushed by close."""
    work.shapes = SMALL  # more than the buffer holds
    work.lora("me.safetensors")
    work.lora("style.safetensors", "musubi", rank=3, seed=1)
    script = (
        "import resource, sys\n"
        "from extensions_built_in.zit_merge.cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", script, "run", work.job({"name": "a", "loras": [ME, STYLE]}), "--quiet"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"zit_merge: {work.out / OUT}: can't be written") and done.stderr.count("\n") == 1
    assert work.files() == []


@posix
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_the_files_mode_follows_the_umask(work, loras, umask, mode):
    comfy = work.folder / "comfy"
    comfy.mkdir()
    config = work.job(STEP | {"copy_to": str(comfy)})
    before = os.umask(umask)
    try:
        work.zit("run", config).ok()
    finally:
        os.umask(before)
    assert [stat.S_IMODE((folder / OUT).stat().st_mode) for folder in (work.out, comfy)] == [mode, mode]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists a process's maps")
@pytest.mark.parametrize("end", ["whole", "interrupted", "NaN"])
def test_no_input_stays_mapped_or_open(work, loras, monkeypatch, end):
    lora = broken(work) if end == "NaN" else ME
    if end == "interrupted":
        interrupt_at(monkeypatch, "a", 10, KeyboardInterrupt())
    ran = work.zit("run", work.job({"name": "a", "loras": [lora, STYLE]}, {"name": "b", "loras": [{"lora": "a", "ratio": 1.0}]}))
    assert ran.code == {"whole": 0, "interrupted": 130, "NaN": 1}[end]
    maps = Path("/proc/self/maps").read_text()
    held = [str(Path(f"/proc/self/fd/{fd}").resolve()) for fd in os.listdir("/proc/self/fd")]
    assert str(work.folder) not in maps
    assert not [path for path in held if path.startswith(str(work.folder)) and path.endswith((".safetensors", ".part"))]


def test_the_output_is_what_safetensors_itself_can_read(work, loras):
    work.zit("run", work.job({"name": "a", "loras": [ME, STYLE]})).ok()
    with safe_open(work.out / OUT, framework="pt") as file:
        assert len(list(file.keys())) == 3 * 24
        assert file.get_tensor("diffusion_model.layers.29.attention.to_out.0.lora_B.weight").shape == (8, 5)
        assert file.get_tensor("diffusion_model.layers.29.attention.to_out.0.alpha").item() == 5.0


def test_a_stale_copy_is_made_again(work, loras):
    """The step's own file is there from this recipe, the copy is from an older one."""
    (work.folder / "copies").mkdir()
    step = {"name": "a", "loras": [{"lora": "me.safetensors", "ratio": 1.0}]}
    copied = step | {"copy_to": str(work.folder / "copies")}
    work.zit("run", work.job(copied)).ok()
    half = {"loras": [{"lora": "me.safetensors", "ratio": 0.5}]}
    work.zit("run", work.job(step | half)).ok()
    assert "kept " in work.zit("run", work.job(copied | half)).ok()
    name = "merged_cat_a.safetensors"
    assert (work.folder / "copies" / name).read_bytes() == (work.out / name).read_bytes()


def test_answers_have_no_place_on_a_step(work, loras):
    steps = [
        {"name": "a", "loras": [{"lora": "me.safetensors", "ratio": 1.0}]},
        {"name": "b", "loras": [{"lora": "a", "ratio": 1.0, "alpha": 64}]},
    ]
    assert "steps[1].loras[0].alpha: the file of the step a leaves nothing open" in work.zit("check", work.job(*steps)).refused()


def test_a_section_does_not_read_what_an_earlier_one_writes(work, loras):
    first = work.section({"name": "a", "loras": [{"lora": "me.safetensors", "ratio": 1.0}]})
    second = work.section({"name": "b", "loras": [{"lora": "out/merged_cat_a.safetensors", "ratio": 1.0}]})
    message = work.zit("check", work.config(first, second)).refused()
    assert message.startswith("process[1].steps[0].loras[0].lora: process[0].steps[0] writes out/merged_cat_a.safetensors")


def test_a_fused_file_that_feeds_a_step_has_its_true_rank(work, loras):
    steps = [
        {"name": "a", "save": {"format": "comfyui"}, "loras": [{"lora": "me.safetensors", "ratio": 1.0}]},
        {"name": "b", "loras": [{"lora": "a", "ratio": 1.0}]},
    ]
    assert "rank 6" in work.zit("run", work.job(*steps), "--dry-run").ok()
