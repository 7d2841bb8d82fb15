"""Parts: ours are recognised and overwritten, whatever else lies in their place stays as it is."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

from extensions_built_in.zit_merge import ZitMergeError, load_lora
from extensions_built_in.zit_merge.files import atomic
from extensions_built_in.zit_merge.files.atomic import (
    check_part,
    hold_part,
    open_exclusively,
    part_path,
    remove_part,
    remove_parts,
    write_whole,
)
from extensions_built_in.zit_merge.report.progress import Bar

OUT = "merged_cat_a.safetensors"
ME = {"lora": "me.safetensors", "ratio": 1.0}
IN_THE_WAY = "is in the way and was not left by zit_merge, which writes there first: move it away"


def left(path: Path, content: bytes = b"what a killed run wrote") -> Path:
    """The part of a file as a killed run leaves it."""
    with open_exclusively(part_path(path)) as part:
        part.write(content)
    return part_path(path)


# --- what lies in the place of a part -------------------------------------------------------------------------------------------


def put(path: Path, kind: str) -> Path:
    """Puts something at the place of a file's part, and beside it the `precious` file that it may lead to."""
    part, precious = part_path(path), path.parent / "precious"
    precious.write_bytes(b"precious" * 1000)
    if kind == "link":
        part.symlink_to(precious)
    elif kind == "link to nothing":
        part.symlink_to(path.parent / "nothing")
    elif kind == "link to a part":
        part.symlink_to(left(path.parent / "other"))
    elif kind == "hard link":
        part.hardlink_to(precious)
    elif kind == "hard link of a part":
        part.hardlink_to(left(path.parent / "other"))
    elif kind == "folder":
        part.mkdir()
    elif kind == "pipe":
        os.mkfifo(part)
    else:
        part.write_bytes(
            {"download": bytes(5000), "LoRA": b'\x80\0\0\0\0\0\0\0{"__metadata__":{"zit_merge.version":'}.get(kind, b"x")
        )
    return part


KINDS = ["link", "link to nothing", "link to a part", "hard link", "hard link of a part", "folder", "pipe"]
KINDS += ["download", "LoRA", "one letter"]
pytestmark = [pytest.mark.usefixtures("few"), pytest.mark.skipif(os.name == "nt", reason="links and pipes of POSIX")]


def facts(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Everything in a folder: what it is, how many names it has, what it holds."""
    return {
        str(path): (path.lstat().st_mode, path.lstat().st_nlink, path.read_bytes() if path.is_file() else b"")
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_ours_is_left_alone(tmp_path, kind):
    path = tmp_path / "a.safetensors"
    part = put(path, kind)
    before = facts(tmp_path)
    for use in (check_part, lambda path: write_whole(path, [b"new"])):
        with pytest.raises(ZitMergeError) as error:
            use(path)
        assert str(error.value) == f"{part}: {IN_THE_WAY}"
    remove_part(path)
    assert facts(tmp_path) == before
    remove_parts(tmp_path)
    if kind != "link to a part":  # that part has no other name
        assert facts(tmp_path) == before
    assert not path.exists()


@pytest.mark.parametrize("kind", ["link", "hard link", "download", "folder"])
@pytest.mark.parametrize(("where", "keep"), [("output", True), ("copy", True), ("output", False)])
def test_the_part_of_an_output_is_looked_at_before_the_training(work, loras, kind, where, keep):
    comfy = work.folder / "comfy"
    for folder in (work.out, comfy):
        folder.mkdir()
    part = put((work.out if where == "output" else comfy) / OUT, kind)
    step = {"name": "a", "loras": [ME], "keep": keep} | ({"copy_to": str(comfy)} if keep else {})
    steps = [step, {"name": "b", "loras": [{"lora": "a", "ratio": 1.0}]}]
    before = facts(work.folder)
    for command, job in (
        ("check", work.config(work.training(), work.section(*steps), name="check.yaml")),
        ("run", work.job(*steps)),
    ):
        assert work.zit(command, job).refused() == f"process[{int(command == 'check')}].steps[0]: {part}: {IN_THE_WAY}"
    after = facts(work.folder)
    assert {k: v for k, v in after.items() if not k.endswith(".yaml")} == before


@pytest.mark.parametrize("kind", ["link", "hard link", "download", "folder"])
def test_the_part_of_a_plot_and_of_a_config(work, loras, kind):
    pytest.importorskip("matplotlib")
    part = put(work.folder / "a.png", kind)
    message = work.zit("inspect", loras[0], "--plot", "a.png").refused()
    assert message == f"--plot: {part.name}: {IN_THE_WAY}"
    config = work.config(work.training())
    put(work.folder / "config.yaml.zit_merge", kind)
    section = work.write(work.section({"name": "a", "loras": [ME]}), "section.yaml")
    before = facts(work.folder)
    assert work.zit("attach", config, "--section", section).refused().endswith(f"config.yaml.zit_merge.part: {IN_THE_WAY}")
    assert facts(work.folder) == before


def test_the_part_of_the_page_costs_the_page_alone(work, loras):
    work.out.mkdir()
    part = put(work.out / "merged_cat.html", "link")
    assert f"no page: {part}: {IN_THE_WAY}" in work.zit("run", work.job({"name": "a", "loras": [ME]})).ok()
    assert (work.out / "precious").read_bytes() == b"precious" * 1000 and load_lora(work.out / OUT)


# --- what is ours ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 100_000])
def test_what_a_killed_run_left_is_overwritten(tmp_path, content):
    path = tmp_path / "a"
    left(path, content)
    check_part(path)
    assert write_whole(path, [b"new"]).read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_between_the_last_byte_and_the_final_name_leaves_a_part_of_ours(tmp_path):
    path = tmp_path / "a"
    if (pid := os.fork()) == 0:
        os.replace = lambda *_: os._exit(7)
        with contextlib.suppress(BaseException):
            write_whole(path, [b"x" * 100])
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert part_path(path).read_bytes() == b"x" * 100
    assert write_whole(path, [b"new"]).read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_an_empty_part_holds_nothing_that_could_be_lost(tmp_path):
    part_path(tmp_path / "a").touch()
    assert write_whole(tmp_path / "a", [b"new"]).read_bytes() == b"new"


def test_content_of_any_size_in_any_pieces_comes_out_as_it_was(tmp_path):
    for size in (*range(40), 100_000):
        content = bytes(i % 251 for i in range(size))
        for piece in (1, 7, 16, 17, 1000, 1_000_000):
            if size < 1000 or piece >= 1000:
                chunks = [content[i : i + piece] for i in range(0, size, piece)]
                assert write_whole(tmp_path / "a", [b"", *chunks]).read_bytes() == content


def test_a_part_is_marked_until_the_rest_of_it_is_on_the_disk(tmp_path, monkeypatch):
    seen, fsync = [], os.fsync

    def look(handle):
        fsync(handle)
        seen.append(part_path(tmp_path / "a").read_bytes() if part_path(tmp_path / "a").exists() else None)

    monkeypatch.setattr(os, "fsync", look)
    write_whole(tmp_path / "a", [b"x" * 100])
    assert seen == [atomic._MARK + b"x" * 84, b"x" * 100, None]


def test_parts_of_steps_that_are_no_more_are_cleared(work, loras):
    comfy = work.folder / "comfy"
    comfy.mkdir()
    work.out.mkdir()
    parts = [left(work.out / "merged_cat_old.safetensors"), left(comfy / "merged_cat_older.safetensors")]
    elsewhere = left(work.folder / "merged_cat_old.safetensors")
    foreign = put(work.out / "merged_cat_mine.safetensors", "download")
    work.zit("run", work.job({"name": "a", "loras": [ME], "copy_to": str(comfy)})).ok()
    assert not any(part.exists() for part in parts)
    assert elsewhere.exists() and foreign.read_bytes() == bytes(5000)


def test_parts_that_another_run_writes_or_has_just_made_are_not_cleared(tmp_path, monkeypatch):
    part_path(tmp_path / "new").touch()
    with open_exclusively(part_path(tmp_path / "a")) as part:
        part.write(b"more")
        part.flush()
        remove_parts(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.part", "new.part"]
    import fcntl

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", no_locks)
        remove_parts(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.part", "new.part"]
    remove_parts(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["new.part"]


def test_a_finished_part_is_held_until_the_last_step_has_read_it(tmp_path):
    part = left(tmp_path / "a")
    with hold_part(part):
        remove_parts(tmp_path)
        remove_part(tmp_path / "a")
        assert part.exists()
        with pytest.raises(ZitMergeError, match="another run is writing this file now"):
            open_exclusively(part)
    assert not part.exists()


def test_a_step_that_is_not_kept_is_a_lora_that_is_known_as_a_part(work, loras, monkeypatch):
    """A run that is killed while a later step reads it leaves it whole; another run beside leaves it alone."""
    seen = []

    def track(bar, items, label, *_):
        for done, item in enumerate(items, 1):
            yield item
            if (label, done) == ("b", 5):
                content = part_path(work.out / OUT).read_bytes()
                seen.append(load_file(part_path(work.out / OUT)))
                remove_parts(work.out)
                (work.folder / "killed").mkdir()
                part_path(work.folder / "killed" / OUT).write_bytes(content)

    monkeypatch.setattr(Bar, "track", track)
    steps = [{"name": "a", "loras": [ME], "keep": False}, {"name": "b", "loras": [{"lora": "a", "ratio": 1.0}]}]
    work.zit("run", work.job(*steps)).ok()
    assert len(seen[0]) > 10 and work.files() == ["merged_cat_b.safetensors"]
    check_part(work.folder / "killed" / OUT)
    remove_parts(work.folder / "killed")
    assert not list((work.folder / "killed").iterdir())
    assert "zit_merge.part" not in load_lora(work.out / "merged_cat_b.safetensors").metadata
