"""Contact sheets: everything is on them, nothing lies over anything else, whatever texts and pictures there are."""

from __future__ import annotations

import string

import numpy as np
import pytest
from PIL import Image, ImageFont
from preview.helpers import plain

from extensions_built_in.zit_merge.preview import sheet as sheets
from extensions_built_in.zit_merge.preview.sheet import Block, edge_of, labelled, legend, sheet

PALETTE = [(255, 0, 0), (0, 160, 0), (0, 0, 255), (200, 200, 0), (200, 0, 200), (0, 200, 200), (128, 64, 0), (255, 128, 0)]
LONG = "a highly detailed photograph of a ginger cat on a weathered windowsill, golden hour, film grain, 85mm, " * 12
TEXTS = {
    "short": "a cat (seed 42)",
    "long": f"{LONG}(seed 42)",
    "one long word": "x" * 3000,
    "Chinese": "一只猫坐在窗台上晒太阳，" * 60 + " (seed 42)",
    "right to left": "العربية مرحبا بالعالم שלום עולם " * 20,
    "emoji": "🐈🔥👩‍👩‍👧 " * 50,
    "control characters": "\x00\x07\x1b[31mred\x1b[0m\u202eevil\u202c\u2028line\r\n\ttab \ud800 \uffff",
    "nothing": "",
    "spaces": "  \n ",
}


def at(picture: Image.Image | np.ndarray) -> np.ndarray:
    return picture if isinstance(picture, np.ndarray) else np.asarray(picture.convert("RGB")).astype(np.int16)


def ink(picture: Image.Image) -> np.ndarray:
    """Where anything is that is no paper."""
    return (at(picture) < 250).any(2)


def tiles(count: int, size: tuple[int, int] = (256, 256), caption: str = "variant {}") -> list[tuple[str, Image.Image]]:
    return [(caption.format(n), Image.new("RGB", size, PALETTE[n % len(PALETTE)])) for n in range(count)]


def boxes(picture: Image.Image | np.ndarray, colour: tuple[int, int, int]) -> list[tuple[int, int, int, int]]:
    """(left, top, right, bottom) of the areas that have exactly this colour, found by rows and columns that all of them fill."""
    exact = (at(picture) == colour).all(2)
    found = []
    for top, bottom in runs(exact.any(1)):
        for left, right in runs(exact[top:bottom].any(0)):
            assert exact[top:bottom, left:right].all(), "something lies over a picture"
            found.append((left, top, right, bottom))
    return found


def runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """(first, end) of the runs of true ones."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(int), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


@pytest.mark.parametrize(("count", "across"), [(1, 1), (2, 2), (3, 3), (5, 3), (8, 8), (8, 4)])
def test_every_picture_is_whole_and_in_its_place(count, across):
    whole = sheet("a title", [Block("a cat", tiles(count))], across, "a footer")
    places = [boxes(whole, PALETTE[n])[0] for n in range(count)]
    assert len({(right - left, bottom - top) for left, top, right, bottom in places}) == 1
    for n, (left, top, _, _) in enumerate(places):
        assert left == places[n % across][0] and top == places[n // across * across][1], "in rows and columns"
    assert [p[0] for p in places[:across]] == sorted(p[0] for p in places[:across])
    assert [p[1] for p in places[::across]] == sorted(p[1] for p in places[::across])


def test_every_picture_has_its_caption_right_above_it_and_nothing_else():
    whole = sheet("", [Block("", tiles(4))], 2)
    marks = ink(whole)
    for n in range(4):
        left, top, right, _ = boxes(whole, PALETTE[n])[0]
        assert marks[top - 20 : top, left : left + 60].any(), "there is a caption"
        assert not marks[top - 2 : top, left:right].any(), "its letters end above the picture"
        assert not marks[top - 40 : top - 22, left:right].any() or n > 1
    blank = sheet("", [Block("", tiles(4, caption=""))], 2)
    assert not ink(blank)[: boxes(blank, PALETTE[0])[0][1]].any()


@pytest.mark.parametrize("name", TEXTS)
def test_no_text_reaches_a_picture_or_the_edge(name):
    text = TEXTS[name]
    whole = sheet(text, [Block(text, [(text, p) for _, p in tiles(3, (96, 64))]), Block(text, tiles(2))], 3, text)
    marks = ink(whole)
    margin = 8
    assert not marks[:, :margin].any() and not marks[:, -margin:].any() and not marks[-4:].any() and not marks[:2].any()
    for n in range(3):
        for left, top, right, bottom in boxes(whole, PALETTE[n]):
            frame = marks[top - 2 : bottom + 2, left - 2 : right + 2].copy()
            frame[2:-2, 2:-2] = False
            assert not frame.any(), "a line of paper around every picture"


def test_captions_side_by_side_dont_run_into_each_other():
    caption = string.ascii_letters * 3
    whole = sheet("", [Block("", [(caption, p) for _, p in tiles(6, (64, 64))])], 6)
    marks, lefts = ink(whole), sorted(boxes(whole, PALETTE[n])[0][0] for n in range(6))
    for left in lefts[1:]:
        assert not marks[:, left - 8 : left].any(), "a gap between columns, of pictures and of letters"


def test_portraits_stand_close_together():
    whole = sheet("a", [Block("a", tiles(5, (384, 768)))], 5)
    places = [boxes(whole, PALETTE[n])[0] for n in range(5)]
    assert all(b[0] - a[2] <= 12 for a, b in zip(places, places[1:], strict=False))
    assert whole.width < places[-1][2] + 24


def test_pictures_of_several_sizes_keep_their_proportions():
    sizes = [(64, 64), (128, 64), (64, 256)]
    mixed = [(str(n), Image.new("RGB", size, PALETTE[n])) for n, size in enumerate(sizes)]
    whole = sheet("a", [Block("a", mixed), Block("b", [("x", Image.new("RGB", (96, 48), PALETTE[3]))])], 3)
    for n, (width, height) in enumerate([*sizes, (96, 48)]):
        left, top, right, bottom = boxes(whole, PALETTE[n])[0]
        assert (right - left) * height == pytest.approx((bottom - top) * width, rel=0.02)


@pytest.mark.parametrize(("count", "across"), [(1, 1), (4, 4), (30, 5), (200, 3), (200, 8), (1000, 1), (1000, 50), (5000, 3)])
def test_a_sheet_never_gets_too_large(count, across):
    edge = edge_of(count, across)
    assert 96 <= edge <= 512 and (count > 400 or edge >= 192)
    assert count * edge * edge <= max(24e6, count * 96 * 96)


def test_many_specs_are_in_columns():
    blocks = [Block(f"prompt {n}", tiles(2, (64, 64))) for n in range(30)]
    whole = sheet("many", blocks, 2)
    assert whole.height < 6 * whole.width
    places = boxes(whole, PALETTE[0])
    assert len(places) == 30 and len({left for left, *_ in places}) > 1
    one = sheet("few", blocks[:3], 2)
    assert len({left for left, *_ in boxes(one, PALETTE[0])}) == 1


def test_columns_are_read_downwards():
    blocks = [Block(f"prompt {n}", [("x", Image.new("RGB", (64, 64), (n * 9, 255 - n * 9, 77)))]) for n in range(10)]
    whole = at(sheet("many", blocks, 1))
    found = [boxes(whole, (n * 9, 255 - n * 9, 77))[0][:2] for n in range(10)]
    assert len({left for left, _ in found}) > 1
    assert found == sorted(found)


def test_a_picture_is_not_resampled_where_it_has_the_size():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 200, (edge_of(2, 2),) * 2 + (3,), dtype=np.uint8))
    whole = at(sheet("a", [Block("a", [("x", noise), ("y", noise)])], 2))
    side = noise.width
    assert any((whole[top : top + side, 12 : 12 + side] == at(noise)).all() for top in range(len(whole) - side))


# --- text ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [100, 333, 1000])
@pytest.mark.parametrize("name", TEXTS)
def test_lines_fit_and_say_what_the_text_says(name, width):
    lines = sheets._wrapped(TEXTS[name], width, 50)
    assert all(sheets._length(line) <= width for line in lines)
    plain_text = sheets._plain(TEXTS[name])
    joined = "".join(lines).replace(" ", "")
    assert joined == plain_text.replace(" ", "") or lines[-1].endswith(("...", "(seed 42)"))


def test_of_a_long_prompt_the_seed_stays():
    for most in (1, 2, 3):
        lines = sheets._wrapped(f"{LONG}(seed 42)", 400, most)
        assert len(lines) == most and lines[-1].endswith("... (seed 42)") and all(sheets._length(line) <= 400 for line in lines)
    assert sheets._cut("a very long file name that goes on and on.safetensors (2)", 200).endswith("... (2)")
    assert sheets._cut("x (" + "y" * 400 + ")", 200).endswith("...")


def test_the_two_strengths_of_a_caption_are_not_broken():
    lines = sheets._wrapped("6: loras[0].blocks.to_v 0, loras[1].ratio 0.2", 300, 2)
    assert lines == ["6: loras[0].blocks.to_v 0,", "loras[1].ratio 0.2"]


def test_the_lines_of_a_caption_follow_each_other(monkeypatch):
    drawn: dict[str, float] = {}
    monkeypatch.setattr(sheets.ImageDraw.ImageDraw, "text", lambda self, xy, text, *rest, **keys: drawn.update({text: xy[1]}))
    sheet("", [Block("", [("one two three, four five six seven", plain("red", (64, 512)))])], 1)
    assert drawn["one two three,"] < drawn["four five six seven"]


def test_what_is_not_printable_is_no_part_of_a_line():
    text = sheets._plain(TEXTS["control characters"])
    assert text.isprintable() and "evil" in text and "\u202e" not in text and "\n" not in text


@pytest.mark.parametrize("text", ["猫", "a 猫", "こんにちは", "안녕", "，"])
def test_eastern_letters_have_a_font_of_their_own_where_there_is_one(text, monkeypatch):
    assert sheets._is_eastern(text)
    asked, truetype = [], ImageFont.truetype
    monkeypatch.setattr(ImageFont, "truetype", lambda name, size: asked.append(name) or truetype(name, size))
    monkeypatch.setattr(sheets, "_EASTERN", ("none-of-this-name.ttf", "DejaVuSerif.ttf"))
    serif = sheets._font.__wrapped__(15, True)
    assert asked[:2] == ["none-of-this-name.ttf", "DejaVuSerif.ttf"]
    assert len(asked) == 3 or serif.getname()[0] == "DejaVu Serif"


@pytest.mark.parametrize("text", ["a cat", "é ß", "Кот", "γάτα", "קול", "العربية", "🐈", ""])
def test_other_letters_have_the_usual_font(text):
    assert not sheets._is_eastern(text)


# --- legends -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (1024, 1024), (512, 768), (1024, 256), (256, 1024)])
def test_a_legend_fits_into_its_tile(size):
    tile = legend("zit_merge: my_char_v1", [f"{n}. {text}" for n, text in enumerate(TEXTS.values(), 1)] * 5, size)
    assert tile.size == size
    marks = (at(tile) != at(tile)[0, 0]).any(2)
    assert marks.any() and not marks[:, -3:].any() and not marks[-2:].any() and not marks[:2].any()


def test_a_legend_says_how_many_lines_it_has_no_room_for(monkeypatch):
    drawn: list[str] = []
    monkeypatch.setattr(sheets.ImageDraw.ImageDraw, "text", lambda self, xy, text, *rest, **keys: drawn.append(text))
    legend("title", [f"line {n}" for n in range(100)], (512, 512))
    shown = [line for line in drawn if line.startswith("line")]
    assert (
        drawn[0] == "title"
        and drawn[-1] == f"... and {100 - len(shown)} more"
        and shown == [f"line {n}" for n in range(len(shown))]
    )
    drawn.clear()
    legend("title", ["one", "two"], (512, 512))
    assert drawn == ["title", "", "one", "two"]


def test_an_empty_legend_is_an_empty_tile():
    assert len(legend("", [], (64, 64)).getcolors()) == 1


def test_a_sheet_of_one_small_picture_is_not_wider_than_its_words_need():
    assert sheet("a", [Block("a", [("x", plain("red", (64, 64)))])], 1).width <= 540


# --- labels --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("size", [(64, 64), (1024, 1024), (512, 768), (1024, 256), (256, 1024), (300, 300), (16, 16)])
def test_a_label_stays_in_its_band_and_above_it_the_picture_is_untouched(name, size):
    before = Image.new("RGB", size, (200, 30, 30))
    after = labelled(before, TEXTS[name])
    assert after.size == size and before.getcolors() == [(size[0] * size[1], (200, 30, 30))]
    changed = (at(after) != at(before)).any(2).any(1)
    top = int(changed.argmax())
    assert changed[top:].all() and not changed[:top].any()
    letters = max(12, min(size) // 28)
    assert size[1] - top <= 4 * letters
    assert not (at(after)[:, -2:] > 220).all(2).any(), "no letter at the edge"
