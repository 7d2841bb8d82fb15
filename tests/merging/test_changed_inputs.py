"""Inputs that are replaced, rewritten or cut short after they were planned: nothing is written, and a sentence says why."""

import os
import shutil

import pytest
from safetensors.torch import load_file, save_file
from workspace import FEW

from extensions_built_in.zit_merge import ZitMergeError, load_lora
from extensions_built_in.zit_merge.formats.reader import TensorReader
from extensions_built_in.zit_merge.formats.safetensors_file import SafetensorsFile
from extensions_built_in.zit_merge.merging.made import Hashes
from extensions_built_in.zit_merge.report.progress import Bar

ME, STYLE = {"lora": "me.safetensors", "ratio": 1.0}, {"lora": "style.safetensors", "ratio": 0.5}
OUT = "merged_cat_a.safetensors"
CHANGED = "style.safetensors: was changed while it was used: wait until it is complete, then start again"


def replaced(path):
    """By another LoRA of the same size."""
    shutil.copy(path.with_name("other.safetensors"), path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def rewritten(path):
    path.write_bytes(path.with_name("other.safetensors").read_bytes())


def shrunk(path):
    os.truncate(path, path.stat().st_size // 3)


def emptied(path):
    path.write_bytes(b"")


def another_alpha(path):
    """The tensors as they are, alpha 8 times as large."""
    save_file({k: t * 8 if k.endswith(".alpha") else t for k, t in load_file(path).items()}, path)


CHANGES = [replaced, rewritten, shrunk, emptied, another_alpha]


@pytest.fixture
def job(work, loras):
    """A job of a step that another one uses; `other` is the second LoRA with other numbers."""
    work.shapes = FEW
    for name, seed in (("style.safetensors", 1), ("other.safetensors", 2)):
        work.lora(name, "musubi", rank=3, seed=seed)
    return work.job({"name": "a", "loras": [ME, STYLE]}, {"name": "b", "loras": [{"lora": "a", "ratio": 0.5}, ME]})


def change_at(monkeypatch, label, module, change, path):
    """Changes a file when so many modules of a pass are done."""

    def track(bar, items, what, *_):
        for done, item in enumerate(items, 1):
            yield item
            if (what, done) == (label, module):
                change(path)

    monkeypatch.setattr(Bar, "track", track)


@pytest.mark.parametrize("module", [1, 20])
@pytest.mark.parametrize("change", CHANGES)
def test_during_the_merge(work, job, monkeypatch, change, module):
    change_at(monkeypatch, "a", module, change, work.folder / "style.safetensors")
    assert work.zit("run", job).refused().endswith(CHANGED)
    assert work.files() == []


@pytest.mark.parametrize("change", CHANGES)
def test_the_old_output_stays(work, job, monkeypatch, change):
    work.zit("run", job).ok()
    old = {name: (work.out / name).read_bytes() for name in work.files()}
    half = work.job({"name": "a", "loras": [ME, STYLE | {"ratio": 0.25}]})
    change_at(monkeypatch, "a", 5, change, work.folder / "style.safetensors")
    assert work.zit("run", half).refused().endswith(CHANGED)
    assert {name: (work.out / name).read_bytes() for name in work.files()} == old


@pytest.mark.parametrize("change", CHANGES)
def test_between_the_plan_and_the_merge(work, job, monkeypatch, change):
    """The plan has the alphas, the merge reads the tensors: both must be of one file."""
    begin = Hashes.__init__

    def changed_first(hashes, files):
        change(work.folder / "style.safetensors")
        begin(hashes, files)

    monkeypatch.setattr(Hashes, "__init__", changed_first)
    assert "style.safetensors: " in (message := work.zit("run", job).refused())
    assert message.endswith(CHANGED)
    assert work.files() == []


@pytest.mark.parametrize("change", CHANGES)
def test_between_the_hash_and_the_tensors(work, job, monkeypatch, change):
    """The hash that goes into the recipe is that of the tensors that were merged."""
    opened = TensorReader.__init__

    def hashed_first(reader, lora, *base):
        if lora.path.name == "style.safetensors":
            change(lora.path)
        opened(reader, lora, *base)

    monkeypatch.setattr(TensorReader, "__init__", hashed_first)
    monkeypatch.setattr(Hashes, "__init__", _waited(Hashes.__init__))
    assert work.zit("run", job).refused().endswith(CHANGED)
    assert work.files() == []


def _waited(begin):
    def wait(hashes, files):
        begin(hashes, files)
        hashes.of(files)

    return wait


@pytest.mark.parametrize("change", [rewritten, shrunk])
def test_the_output_of_an_earlier_step(work, job, monkeypatch, change):
    """It was made by this run, or found: another program's file must not feed the next step."""
    for _ in range(2):
        work.lora("other.safetensors", rank=5, seed=3)
        with monkeypatch.context() as patch:
            change_at(patch, "b", 3, lambda path: change_like(path, change), work.out / OUT)
            message = work.zit("run", job).refused()
        assert message == f"{work.out / OUT}: was changed while it was used: wait until it is complete, then start again"
        assert work.files() == [OUT]
        (work.out / OUT).unlink()
        work.zit("run", job).ok()
        (work.out / "merged_cat_b.safetensors").unlink()


def change_like(path, change):
    shutil.copy(path.parent.parent / "other.safetensors", path.with_name("other.safetensors"))
    change(path)
    path.with_name("other.safetensors").unlink()


@pytest.mark.parametrize("change", CHANGES)
def test_a_lora_that_was_opened_in_python(work, loras, change):
    work.lora("other.safetensors", "musubi", rank=3, seed=2)
    lora = load_lora(loras[1])
    change(loras[1])
    for read in (lambda: lora["layers.0.attention.to_q"], lora.sha256):
        with pytest.raises(ZitMergeError, match=r"style\.safetensors: "):
            read()


def test_an_input_is_opened_once_for_its_tensors_and_once_for_its_hash(work, job, monkeypatch):
    """A step's input: its header at planning, its tensors, its hash."""
    opened, begin = [], SafetensorsFile.__init__

    def count(file, path, expected=None):
        opened.append(path.name)
        begin(file, path, expected)

    monkeypatch.setattr(SafetensorsFile, "__init__", count)
    work.zit("run", work.job({"name": "a", "loras": [ME, STYLE]})).ok()
    assert opened.count("me.safetensors") == opened.count("style.safetensors") == 3
