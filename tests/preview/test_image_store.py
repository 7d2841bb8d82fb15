"""Where pictures lie: kept whole or not at all, and in AI-Toolkit's gallery in full rows."""

from __future__ import annotations

import glob
import json
import random
import re
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from preview.helpers import MODEL, names, plain, planned, settled, step

from extensions_built_in.zit_merge.errors import ZitMergeError
from extensions_built_in.zit_merge.files.atomic import open_exclusively, part_path
from extensions_built_in.zit_merge.preview.grids import preview_plan
from extensions_built_in.zit_merge.preview.image_store import ImageStore, image_store

COLOURS = ["red", "green", "blue", "yellow", "white", "gray", "black"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A job's folder after a training that made three samples at a time."""
    folder = tmp_path / "output" / "cat"
    for step_number, ms in ((0, 1763563000000), (3000, 1763563999000)):
        for n in range(3):
            put(folder / "samples" / f"{ms + n}__{step_number:09d}_{n}.jpg")
    return folder


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    plain("gray").save(path)


def store(home: Path, row: int = 3, step_number: int = 3000) -> ImageStore:
    return ImageStore(home / "merged_cat_previews", home / "samples", step_number, row, "cat")


def add_samples(found: ImageStore, *colours: str, size: tuple[int, int] = (64, 64)) -> list[str]:
    """Stores pictures of these colours and adds them to the samples. Returns the names of the new samples, by name."""
    for colour in colours:
        found.save(colour, plain(colour, size), {"colour": colour})
    return sorted(path.name for path in found.add_samples(colours, colours, [f"a {colour} picture" for colour in colours]))


def colours(folder: Path, shown: list[str]) -> list[str]:
    """Which colours samples have."""
    by_rgb = {plain(colour).getpixel((0, 0)): colour for colour in COLOURS}
    return [by_rgb.get(Image.open(folder / name).convert("RGB").getpixel((1, 1)), "text") for name in shown]


def viewer(name: str) -> tuple[int, int]:
    """(training step, number of the prompt) as SampleImageViewer.tsx reads them."""
    parts = [part for part in name.split(".")[0].split("_") if part]
    assert len(parts) == 3
    return int(parts[1]), int(parts[2])


# --- a picture -----------------------------------------------------------------------------------------------------------------


def test_a_picture_is_kept_as_it_is_with_what_it_follows_from(home):
    found, noise = store(home), np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    record = {"shot": {"prompt": "a köttbullar 猫\n\u2028 \x00"}, "n": [1, 2.5, None]}
    path = found.save("abc", Image.fromarray(noise), record)
    assert path == home / "merged_cat_previews" / "pictures" / "abc.png" and found.has("abc")
    assert (np.asarray(found.load("abc")) == noise).all()
    assert json.loads(Image.open(path).text["zit_merge"]) == record
    assert names(path.parent) == ["abc.png"]
    assert found.load("abc", 40).size == (40, 24) and found.load("abc", 400).size == (80, 48)


def test_the_same_picture_is_the_same_file(home):
    found = store(home)
    first = found.save("a", plain("red"), {"b": 1, "a": 2}).read_bytes()
    assert found.save("a", plain("red"), {"a": 2, "b": 1}).read_bytes() == first


def test_a_picture_that_is_not_whole_is_none(home):
    found = store(home)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path = found.save("a", picture, {"x": 1})
    whole, draw = path.read_bytes(), random.Random(0)
    for length in (0, 1, 8, 40, len(whole) // 2, len(whole) - 20, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert not found.has("a"), length
    for _ in range(60):
        broken, at = bytearray(whole), draw.randrange(len(whole))
        broken[at] ^= 1 << draw.randrange(8)
        path.write_bytes(broken)
        assert not found.has("a") or found.load("a").tobytes() == picture.tobytes(), at
    path.unlink()
    assert not found.has("a")
    path.mkdir()
    assert not found.has("a")


def chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def traps() -> dict[str, bytes]:
    """PNG files that end as ours do."""

    def png(width: int, height: int, pixels: bytes, *further: bytes) -> bytes:
        size = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
        text = chunk(b"tEXt", b"zit_merge\0{}")
        chunks = [chunk(b"IHDR", size), text, *further, chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)

    whole = zlib.compress(bytes(64 * (1 + 3 * 64)))
    return {
        "a bomb of pixels": png(100_000, 100_000, zlib.compress(b"")),
        "a bomb that Pillow only warns of": png(12_000, 12_000, zlib.compress(b"")),
        "a bomb of text": png(64, 64, whole, chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(10**8)))),
        "no zlib": png(64, 64, b"no zlib"),
        "too few pixels": png(64, 64, zlib.compress(bytes(100))),
        "no size": png(0, 0, whole),
        "a negative size": png(2**31, 64, whole),
        "broken profile": png(64, 64, whole, chunk(b"iCCP", b"x")),
        "broken pHYs": png(64, 64, whole, chunk(b"pHYs", b"x")),
        "broken header": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"") + chunk(b"IEND", b""),
        "a chunk longer than the file": png(64, 64, whole)[:-20] + b"\xff\xff\xff\xfftEXtx" + chunk(b"IEND", b""),
    }


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("trap", traps())
def test_a_picture_that_breaks_its_reader_is_rendered_again(home, trap):
    found = store(home)
    found.path("a").parent.mkdir(parents=True)
    found.path("a").write_bytes(traps()[trap])
    if trap not in ("broken profile", "broken pHYs", "a bomb of text") or not found.has("a"):
        assert not found.has("a")
        with pytest.raises(ZitMergeError, match=r"a\.png: can't be read any more: run `preview` to render it again"):
            found.load("a")
    found.save("a", plain("red"), {})
    assert found.has("a") and found.load("a").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_picture_of_somebody_else_is_none(home, kind):
    found = store(home)
    found.path("a").parent.mkdir(parents=True)
    plain("red").save(found.path("a"), kind)
    assert not found.has("a")


def test_a_picture_that_is_gone_when_it_is_looked_at(home):
    found = store(home)
    for what in (lambda: found.load("a"), lambda: found.add_samples(["a"], ["a"], ["x"])):
        with pytest.raises(ZitMergeError, match=r"a\.png: can't be read any more: run `preview` to render it again"):
            what()


# --- samples -------------------------------------------------------------------------------------------------------------------


def test_samples_have_names_that_the_viewer_splits_in_the_order_in_which_they_are_shown(home):
    before = names(home / "samples")
    shown = add_samples(store(home), *COLOURS[:6])
    assert [viewer(name) for name in shown] == [(3000, n % 3) for n in range(6)]
    after = [name for name in names(home / "samples") if name.endswith((".png", ".jpg"))]
    assert after == before + shown, "ours come last"
    assert colours(home / "samples", shown) == COLOURS[:6]
    assert shown[0].split("_")[0] <= str(int(time.time() * 1000) + 1000)


@pytest.mark.parametrize("size", [(640, 320), (320, 640)])
def test_the_copies_are_labelled_and_have_thumbnails_as_the_toolkit_makes_them(home, size):
    found = store(home, row=1)
    picture = Image.linear_gradient("L").resize(size).convert("RGB")
    found.save("a", picture, {"seed": 42})
    (path,) = found.add_samples(["a"], ["ratio 0.4"], ["a cat (seed 42)"])
    copy, thumb = Image.open(path), Image.open(home / "samples" / ".thumbs" / f"{path.name}.jpg")
    assert copy.size == size and copy.text == Image.open(found.path("a")).text, "what it was made from goes with it"
    assert (thumb.size, thumb.format) == ((300, 300), "JPEG")
    theirs = ImageOps.fit(picture, (300, 300), Image.Resampling.LANCZOS)
    for shown, plain_one, exact in ((copy, picture, 0), (thumb, theirs, 1)):
        apart = np.abs(np.asarray(shown.convert("RGB")).astype(int) - np.asarray(plain_one).astype(int))
        band = max(12, min(shown.size) // 28) * 2
        assert apart[: -band - 2].mean() <= exact, "above the label it is the picture"
        assert (np.asarray(shown.convert("L"))[-band:] > 240).any() and apart[-band:].mean() > 20, "white letters on a dark band"
    other = store(home, row=1)
    other.save("b", picture, {})
    (unlike,) = other.add_samples(["b"], ["ratio 0.8"], ["a cat (seed 42)"])
    assert Image.open(unlike).tobytes() != copy.tobytes(), "the label is what was given"


@pytest.mark.parametrize("row", [1, 2, 3, 4, 5, 7, 10])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_rows_are_full_with_a_legend_and_empty_tiles(home, row, count):
    shown = add_samples(store(home, row), *COLOURS[:count], size=(96, 64))
    assert len(shown) % row == 0 and len(shown) - count < row
    assert [viewer(name)[1] for name in shown] == [n % row for n in range(len(shown))]
    assert colours(home / "samples", shown[:count]) == COLOURS[:count]
    tiles = [Image.open(home / "samples" / name) for name in shown[count:]]
    assert all(tile.size == (96, 64) for tile in tiles)
    written = [len(tile.getcolors(100_000)) > 1 for tile in tiles]
    assert written == [n == 0 for n in range(len(tiles))], "one tile says what is above, the others are empty"
    assert all((home / "samples" / ".thumbs" / f"{name}.jpg").is_file() for name in shown)


def test_what_is_there_is_not_shown_again(home):
    found = store(home)
    first = add_samples(found, "red", "green")
    assert add_samples(found, "red", "green") == [] and add_samples(store(home), "green") == []
    more = add_samples(found, "red", "blue", "green")
    assert len(more) == 3 and colours(home / "samples", more[:1]) == ["blue"]
    assert max(first) < min(more)


def test_another_training_step_is_another_row_but_no_other_picture(home):
    add_samples(store(home), "red")
    assert add_samples(store(home, step_number=6000), "red") == []
    assert {viewer(name)[0] for name in add_samples(store(home, step_number=6000), "green")} == {6000}


def test_a_sample_that_was_deleted_comes_back_to_its_place(home):
    found = store(home)
    shown = add_samples(found, *COLOURS[:6])
    before = names(home / "samples")
    for name in (shown[1], shown[2], shown[5]):
        (home / "samples" / name).unlink()
    assert add_samples(found, *COLOURS[:6]) == [shown[1], shown[2], shown[5]]
    assert names(home / "samples") == before and colours(home / "samples", shown) == COLOURS[:6]


def test_samples_that_were_deleted_in_whole_rows_come_last_again(home):
    found = store(home)
    shown = add_samples(found, *COLOURS[:6])
    for name in shown[:3]:
        (home / "samples" / name).unlink()
    put(home / "samples" / f"{int(time.time() * 1000) + 5000}__000006000_0.jpg")
    again = add_samples(found, *COLOURS[:6])
    assert colours(home / "samples", again) == COLOURS[:3] and min(again) > max(set(names(home / "samples")) - set(again))
    for name in names(home / "samples")[1:]:
        (home / "samples" / name).unlink()
    assert len(add_samples(found, *COLOURS[:6])) == 6


def test_interrupted_samples_are_completed_by_the_next_run(home, monkeypatch):
    found = store(home)
    for colour in COLOURS[:5]:
        found.save(colour, plain(colour), {})
    write, count = ImageStore._sample, [0]

    def killed(self, name, *what):
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        return write(self, name, *what)

    monkeypatch.setattr(ImageStore, "_sample", killed)
    with pytest.raises(KeyboardInterrupt):
        found.add_samples(COLOURS[:5], COLOURS[:5], COLOURS[:5])
    monkeypatch.undo()
    found.add_samples(COLOURS[:5], COLOURS[:5], COLOURS[:5])
    ours = [name for name in names(home / "samples") if name.endswith(".png")]
    assert [viewer(name)[1] for name in ours] == [0, 1, 2, 0, 1, 2]
    assert colours(home / "samples", ours)[:5] == COLOURS[:5]


def test_names_never_collide_nor_go_back_in_time(home, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1763563000.0)  # a clock that stands still, and was put back
    found = store(home)
    first = add_samples(found, *COLOURS[:3])
    second = add_samples(found, *COLOURS[3:6])
    every = [name for name in names(home / "samples") if name.endswith((".png", ".jpg"))]
    assert every[-6:] == first + second and len(set(every)) == 12


@pytest.mark.parametrize("name", ["notes.txt", "99999999999999999999__x.png", "x__000_0.png", "folder"])
def test_other_files_among_the_samples_mean_nothing(home, name):
    if name == "folder":
        (home / "samples" / "9999999999999__").mkdir(parents=True)
    else:
        (home / "samples" / name).write_text("x")
    (first, *_) = add_samples(store(home), "red")
    assert re.match(r"\d{13}__000003000_0\.png$", first)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"red": 5}', '{"red": "../../x.png"}', '{"red": "1__2.png"}', "\ud800"])
def test_a_broken_record_of_samples_is_as_none(home, content):
    found = store(home)
    found.folder.mkdir(parents=True)
    (found.folder / "samples.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    assert len(add_samples(found, "red")) == 3


def test_a_run_that_is_no_jobs_shows_nothing(tmp_path):
    found = ImageStore(tmp_path / "merged_x_previews", None, 0, 3, "x")
    assert add_samples(found, "red") == [] and names(tmp_path) == ["merged_x_previews"]


def test_two_runs_at_once_leave_whole_pictures_and_full_rows(home):
    troubles: list[BaseException] = []

    def one():
        try:
            for _ in range(3):
                add_samples(store(home), *COLOURS[:4])
        except ZitMergeError as e:  # the other one is writing this very file
            troubles.append(e)

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("another" in str(e) for e in troubles) and len(troubles) < 3
    add_samples(store(home), *COLOURS[:4])
    found = store(home)
    assert all(found.has(colour) for colour in COLOURS[:4]) and not list(home.rglob("*.part"))
    for path in (home / "samples").glob("*.png"):
        Image.open(path).load()


def test_a_file_that_another_run_is_writing(home):
    found = store(home)
    found.save("a", plain("red"), {})
    with open_exclusively(part_path(found.path("a"))), pytest.raises(ZitMergeError, match="another"):
        found.save("a", plain("red"), {})
    assert found.has("a")


@pytest.mark.parametrize("blocked", ["merged_cat_previews", "merged_cat_previews/pictures"])
def test_a_folder_that_cant_be_written(home, blocked):
    (home / blocked).parent.mkdir(exist_ok=True)
    (home / blocked).write_text("a file")
    with pytest.raises(ZitMergeError, match=r"can't be written \(.*\): check the folder and its permissions"):
        store(home).save("a", plain("red"), {})


def test_samples_that_cant_be_written(tmp_path):
    (tmp_path / "samples").write_text("a file")
    with pytest.raises(ZitMergeError, match="can't be written"):
        add_samples(store(tmp_path), "red")


# --- where they lie ------------------------------------------------------------------------------------------------------------


def of_job(work, job: str = "cat", *, trained: bool = True, section: dict | None = None, **how: Any) -> ImageStore:
    processes = [work.training()] if trained else []
    _, context = settled(work, *processes, work.section(step(), **section or {}), job=job, **how)
    return image_store(context, 4)


def test_in_the_folder_of_the_job(work):
    found = of_job(work)
    home = work.folder / "output" / "cat"
    assert found == ImageStore(home / "merged_cat_previews", home / "samples", 3000, 4, "cat")


def test_of_a_job_without_a_training(work):
    own = {"training_folder": str(work.folder / "output")}
    home = work.folder / "output" / "cat"
    assert of_job(work, trained=False, section=own) == ImageStore(home / "merged_cat_previews", home / "samples", 0, 4, "cat")
    assert of_job(work, trained=False) == ImageStore(work.out / "merged_cat_previews", None, 0, 4, "cat")


def test_in_a_folder_that_the_command_line_names(work):
    other = work.folder / "other"
    assert of_job(work, output_dir=str(other)) == ImageStore(other / "merged_cat_previews", None, 3000, 4, "cat")


NAMES = [
    "a/b",
    "a\\b",
    "merged",
    "m*",
    "[abc]x",
    "猫 é",
    "a b",
    "merged_cat",
    "MERGED",
    "zit_merge_merged_",
    "x" * 150,
    "%s",
    "[m-z]*",
]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("job", NAMES)
def test_whatever_a_job_is_called_the_toolkit_takes_nothing_of_ours_for_a_checkpoint(work, job, own):
    """Its globs are tried on the real files, whether the LoRAs lie beside the pictures or elsewhere."""
    section = {} if own else {"output_dir": None}
    found = of_job(work, job, section=section)
    add_samples(found, "red")
    home = found.samples.parent
    for pattern in (f"{job}*.safetensors", f"{job}*.pt", f"{job}*", f"{job}_*", f"CRITIC_{job}_*"):
        claimed = glob.glob(str(glob.escape(str(home))) + f"/{pattern}")  # the name unescaped, as the toolkit does it
        assert not any(Path(path).name == found.folder.name for path in claimed)
    assert "/" not in found.folder.name and found.folder.parent == home


@pytest.mark.parametrize("job", ["?", "*", "*.previews"])
def test_a_job_whose_name_claims_whatever_there_is(work, job):
    with pytest.raises(
        ZitMergeError, match=r"^process\[1\]\.preview: AI-Toolkit would take the folder merged_.*without wildcards"
    ):
        of_job(work, job)


def test_a_job_whose_name_claims_the_folder_is_told_before_anything_is_done(work, loras):
    """The outputs' names escape the glob of this job, the folder's does not."""
    config = work.config(work.training(model=MODEL), work.section(step(preview={"prompts": ["a"]})), job="*[e]ws")
    message = work.zit("check", config).refused()
    assert message.startswith(
        "process[1].preview: AI-Toolkit would take the folder merged_*[e]ws_previews for a checkpoint of *[e]ws"
    )
    section, context = settled(work, work.training(model=MODEL), work.section(step(preview={"prompts": ["a"]})), job="*[e]ws")
    with pytest.raises(ZitMergeError, match="without wildcards"):
        preview_plan(section, context, planned(work, step()).plans)
