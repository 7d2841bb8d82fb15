"""Pictures on the page: tables and grids of them, one large, what was measured on them, and that they always fit."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from page_pictures import noisy, plain, png
from PIL import Image
from sweep import sweep
from workspace import Workspace

from extensions_built_in.zit_merge import load_lora
from extensions_built_in.zit_merge.analysis.measure import measure
from extensions_built_in.zit_merge.errors import ZitMergeError
from extensions_built_in.zit_merge.planning.sources import RunContext
from extensions_built_in.zit_merge.report.page.facts import files_facts
from extensions_built_in.zit_merge.report.page.files import section_of
from extensions_built_in.zit_merge.report.page.galleries import PICTURES, Gallery, Measures, Preview
from extensions_built_in.zit_merge.report.page.render import LIMIT, Page
from extensions_built_in.zit_merge.report.page.run import RunPage

HOSTILE = "</script><script>document.title='pwned';alert(1)</script><img src=x onerror=alert(2)>"
CAT, DOG = "a cat, seed 1", "a dog, seed 1"
YAML = "    - type: zit_merge\n      steps:\n        - name: soft # \"'<>&\n          loras: [{lora: me.safetensors, ratio: %s}]"
COMPARED = Gallery("what each does", "9 steps", [Preview(r, c, plain(c)) for r in (CAT, DOG) for c in ("red", "green", "blue")])
SWEEP = Gallery(
    "ratio of me",
    "9 steps",
    [Preview(CAT, "base", plain("black")), *(Preview(CAT, f"ratio {r}", plain("red"), YAML % r) for r in (0.5, 1))],
)
SHARES = [
    ("layers 0-9, to_q", [0.25, None]),
    ("<b>10-19", [0.5, -0.02]),
    ("layers 20-29, w1", [0.0001, 0.75]),
    ("other", [0, 1.5]),
]
CELLS = [f"without layers {n}, adaLN" for n in range(30)]
ABLATION = Gallery(
    "parts",
    "9 steps",
    [Preview(r, c, plain(f"hsl({9 * n}, 50%, 50%)")) for r in (CAT, DOG, "a fox") for n, c in enumerate(["base", *CELLS])],
    Measures(["picture", "prompt"], SHARES, "blocks: {to_q: 0.5}\nlayers: {0-9: 1}\n"),
)

PARTS = replace(ABLATION, title="parts by layer", previews=[Preview(CAT, f"layer {n}", plain("red")) for n in range(8)])


def page_of(work: Workspace, loras, *galleries: Gallery, step: str = "merged") -> Page:
    """A page of one section with one step."""
    found = [load_lora(p) for p in loras]
    page = Page("files")
    page.begin("", section_of(found))
    page.add(files_facts(measure(found)))
    for gallery in galleries:
        page.show("", step, gallery)
    return page


def write(work: Workspace, page: Page) -> Path:
    path = work.folder / "page.html"
    page.write(path)
    assert path.stat().st_size < LIMIT
    return path


def sections(html: str) -> list[dict]:
    (block,) = re.findall(r'<script type="application/json" id="facts">(.*?)</script>', html)
    return json.loads(block)["sections"]


def galleries(page: Page) -> list[dict]:
    return [gallery for section in sections(page.html()) for step in section["steps"] for gallery in step["galleries"]]


def images(gallery: dict) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(p))) for p in gallery["pictures"]]


def alone(*previews: Preview) -> Page:
    """A page of nothing but pictures."""
    page = Page("pictures")
    page.begin("", {})
    page.show("", "soft", Gallery("title", "note", previews))
    return page


def large(frame) -> str:
    return frame.find("dialog img").get_attribute("alt")


def test_pictures_stand_side_by_side_and_open_large(work, loras, show):
    frame = show(write(work, page_of(work, loras, COMPARED)), 800)
    assert frame.find(".previews tbody tr").count() == 2 and frame.find(".previews tbody img").count() == 6
    assert frame.find(".previews tbody img").first.evaluate("image => image.decode().then(() => image.naturalWidth)") == 64
    assert frame.overflow() == 0
    frame.find(".thumb").nth(1).click()
    assert large(frame) == f"green: {CAT}"
    assert frame.violations() == []
    frame.page.keyboard.press("Escape")
    frame.closed()
    assert frame.find("dialog").count() == 0


def test_keys_go_to_every_picture_and_back_to_the_last(work, loras, show):
    frame = show(write(work, page_of(work, loras, COMPARED)))
    frame.find(".thumb").nth(1).click()
    for key, shown in (
        ("ArrowRight", f"blue: {CAT}"),
        ("ArrowRight", f"red: {DOG}"),
        ("ArrowDown", f"red: {CAT}"),  # round
        ("ArrowUp", f"red: {DOG}"),
        ("ArrowLeft", f"blue: {CAT}"),
        ("ArrowDown", f"blue: {DOG}"),
        ("ArrowRight", f"red: {CAT}"),
    ):
        frame.page.keyboard.press(key)
        assert large(frame) == shown
    for name, shown in (("Next", "green"), ("Row below", "green"), ("Previous", "red")):
        frame.press(name)
        assert large(frame).startswith(shown)
    frame.press("Close")
    frame.closed()
    focused = frame.inner.evaluate("document.activeElement.querySelector('img')?.alt")
    assert focused == f"red: {DOG}"


def test_the_first_of_the_row_is_a_key_away(work, loras, show):
    frame = show(write(work, page_of(work, loras, COMPARED)))
    frame.find(".thumb").nth(5).click()
    compare = frame.inner.get_by_role("button", name="Compare with red")
    frame.page.keyboard.down("b")
    assert large(frame) == f"red: {DOG}" and compare.get_attribute("aria-pressed") == "true"
    assert "red in the place of blue" in frame.find("dialog .caption").inner_text()
    assert frame.violations() == []
    frame.page.keyboard.up("b")
    assert large(frame) == f"blue: {DOG}" and compare.get_attribute("aria-pressed") == "false"
    compare.click()
    assert large(frame) == f"red: {DOG}"
    compare.click()
    assert large(frame) == f"blue: {DOG}"
    compare.click()
    frame.page.keyboard.press("ArrowLeft")  # another picture is shown as it is
    assert large(frame) == f"green: {DOG}"
    frame.page.keyboard.press("ArrowLeft")
    assert compare.get_attribute("aria-disabled") == "true"
    frame.page.keyboard.press("b")
    assert large(frame) == f"red: {DOG}"


def test_a_picture_can_be_zoomed_and_scrolled_with_the_keys(work, loras, show):
    frame = show(write(work, page_of(work, loras, COMPARED)))
    frame.find(".thumb").first.click()
    stage, width = frame.find(".stage"), "stage => stage.scrollWidth > stage.clientWidth"
    assert not stage.evaluate(width)
    frame.press("Zoom")
    assert stage.evaluate(width) and frame.violations() == []
    assert stage.evaluate("stage => stage.scrollLeft > 0 && stage.scrollTop > 0"), "its middle is shown"
    stage.focus()
    frame.page.keyboard.press("ArrowRight")
    assert large(frame) == f"red: {CAT}", "the key scrolls"
    frame.find("dialog img").click()
    assert not stage.evaluate(width)


def test_a_sweep_shows_and_copies_the_section_of_a_picture(work, loras, show):
    frame = show(write(work, page_of(work, loras, SWEEP)))
    frame.find(".thumb").first.click()
    area = frame.find("dialog textarea")
    assert not area.is_visible(), "the base has none"
    frame.page.keyboard.press("ArrowRight")
    assert area.input_value() == YAML % 0.5
    frame.page.keyboard.press("ArrowRight")
    assert area.input_value() == YAML % 1
    assert frame.violations() == []
    frame.find("dialog").get_by_role("button", name="Copy").click()
    frame.find("dialog >> text=/Copied|Selected/").wait_for()
    assert area.evaluate("area => area.value.slice(area.selectionStart, area.selectionEnd)") == YAML % 1
    area.press("ArrowLeft")
    area.press("b")
    assert large(frame) == f"ratio 1: {CAT}", "in the text the keys move the cursor"
    assert frame.find(".yaml textarea").input_value() != YAML % 1, "the composer's own stays"


def test_many_columns_wrap_and_are_walked_with_the_arrow_keys(work, loras, show):
    frame = show(write(work, page_of(work, loras, ABLATION)), 800)
    assert frame.overflow() == 0 and frame.find(".wrapped img").count() == 93
    assert frame.find(".gallery details[open]").count() == 1
    first = frame.find(".thumb").first
    first.focus()
    name = "document.activeElement.querySelector('img')?.alt.split(':')[0]"
    frame.page.keyboard.press("ArrowRight")
    assert frame.inner.evaluate(name) == CELLS[0]
    frame.page.keyboard.press("ArrowDown")
    below = frame.inner.evaluate(name)
    assert CELLS.index(below) > 1
    frame.page.keyboard.press("ArrowUp")
    assert frame.inner.evaluate(name) == CELLS[0]
    frame.page.keyboard.press("End")
    assert frame.inner.evaluate(name) == CELLS[-1]
    frame.page.keyboard.press("Tab")
    assert frame.inner.evaluate("document.activeElement.tagName") == "SUMMARY", "one stop for all of them"
    frame.page.keyboard.press("Shift+Tab")
    assert frame.inner.evaluate(name) == CELLS[-1]
    frame.page.keyboard.press("Enter")
    frame.page.keyboard.press("ArrowDown")
    assert large(frame) == f"{CELLS[-1]}: {DOG}"
    frame.page.keyboard.press("Escape")
    frame.closed()
    assert frame.inner.evaluate("document.activeElement.querySelector('img')?.alt") == f"{CELLS[-1]}: {DOG}"
    assert frame.find(".gallery details[open]").count() == 2


def test_measures_are_sorted_by_any_of_them(work, loras, show):
    frame = show(write(work, page_of(work, loras, ABLATION)))

    def column(n: int) -> list[str]:
        return [text.strip() for text in frame.find(f".measures tbody tr > :nth-child({n})").all_inner_texts()]

    assert column(1) == [name for name, _ in SHARES]
    assert column(2) == ["25.0 %", "50.0 %", "under 0.1 %", "0.0 %"] and column(3) == ["–", "−2.0 %", "75.0 %", "150.0 %"]
    bars = frame.find(".measures td:nth-child(2) .bar")
    widths = bars.evaluate_all("bars => bars.map((bar) => bar.firstChild.getBoundingClientRect().width / bar.clientWidth)")
    assert widths == pytest.approx([0.5, 1, 0.0002, 0], abs=0.01)
    frame.press("prompt")
    assert column(3) == ["150.0 %", "75.0 %", "−2.0 %", "–"]
    assert frame.find(".measures th[aria-sort=descending]").inner_text().startswith("prompt")
    frame.press("prompt")
    assert column(3) == ["−2.0 %", "75.0 %", "150.0 %", "–"], "what has no number is last either way"
    frame.press("picture")
    assert column(2)[0] == "50.0 %" and frame.violations() == []
    frame.press("part of the LoRA")
    assert column(1) == [name for name, _ in SHARES]


def test_the_preset_of_the_measures_can_be_copied(work, loras, show):
    frame = show(write(work, page_of(work, loras, ABLATION)))
    area = frame.number("The preset that these shares suggest")
    assert area.input_value() == "blocks: {to_q: 0.5}\nlayers: {0-9: 1}\n"
    frame.find(".gallery").get_by_role("button", name="Copy").click()
    frame.find("text=/Copied|Selected/").wait_for()
    assert area.evaluate("area => area.value.slice(area.selectionStart, area.selectionEnd)") == area.input_value()


@sweep("width, scheme", [800, 1200, 1920], ["light", "dark"])
def test_quiet_accessible_and_wide_enough(work, loras, show, width, scheme):
    frame = show(write(work, page_of(work, loras, COMPARED, SWEEP, ABLATION, PARTS)), width)
    frame.colour(scheme)
    assert frame.find(".gallery h3").all_inner_texts() == ["what each does", "ratio of me", "parts", "parts by layer"]
    assert frame.violations() == [] and frame.overflow() == 0
    frame.find(".gallery").nth(1).locator(".thumb").nth(2).click()
    assert frame.violations() == []
    box = frame.find("dialog").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width


def test_hostile_words_are_text(work, loras, show):
    names = [HOSTILE, "\u202etxet", "<b onclick=alert(3)> & \"'", "x" * 10_000]
    previews = [Preview(r, c, plain("red"), f"{HOSTILE}\n${{HOME}}\u2028\ud800") for r in names for c in names]
    measures = Measures(names, [(name, [0.5, float("nan"), float("inf"), -1.0]) for name in names], HOSTILE)
    path = write(work, page_of(work, loras, Gallery(HOSTILE, HOSTILE * 20, previews, measures)))
    html = path.read_text(encoding="utf-8")
    assert html.count("<script") == 2 and html.count("</script>") == 2 and "<img" not in html
    frame = show(path, 800)
    assert frame.overflow() == 0 and frame.violations() == []
    frame.find(".thumb").nth(3).click()
    assert large(frame).endswith(f": {HOSTILE}")
    assert frame.find("dialog textarea").input_value().startswith(HOSTILE)
    assert frame.inner.evaluate("document.querySelectorAll('script').length") == 2
    assert frame.violations() == []


def test_prompts_that_differ_only_in_their_seed_are_rows_of_their_own():
    prompt = "word " * 2000
    page = alone(*(Preview(f"{prompt}, seed {seed}", c, plain("red")) for seed in (1, 2) for c in ("base", "soft")))
    (gallery,) = galleries(page)
    assert len(gallery["rows"]) == 2 and [(p["row"], p["column"]) for p in gallery["previews"]] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]


def test_rows_may_have_holes_and_pictures_may_come_in_any_order(work, show):
    previews = [Preview(r, c, plain(c)) for r, c in ((DOG, "red"), (CAT, "green"), (CAT, "red"))]
    frame = show(write(work, alone(*previews)))
    assert [cell.count() for cell in (frame.find("tbody td"), frame.find("tbody td .thumb"))] == [4, 3]
    frame.find(".thumb").first.click()
    frame.page.keyboard.press("ArrowRight")
    assert large(frame) == f"red: {CAT}"


def test_a_step_that_was_not_merged_has_only_its_pictures(work, show):
    path = write(work, alone(Preview(CAT, "base", plain("red")), Preview(CAT, "soft", plain("green"))))
    (section,) = sections(path.read_text(encoding="utf-8"))
    assert [step["name"] for step in section["steps"]] == ["soft"]
    frame = show(path)
    text = frame.find("main").inner_text()
    assert "Not merged in this run" in text and "Layer by layer" not in text and "Compose" not in text
    assert frame.find(".thumb").count() == 2 and frame.violations() == []


def test_sections_with_steps_of_one_name_keep_their_pictures_apart(work, loras):
    site = RunContext("cat", "process[0]", work.folder)
    page, found = RunPage(site), files_facts(measure([load_lora(p) for p in loras]))
    places = ["process[0]", "process[1]"]
    for index, place in enumerate(places):
        page.begin(RunContext("cat", place, work.folder), {"steps": []}, index)
        page._page.add({**found, "name": "soft"})
    page.write()
    for place in places:
        page.show(RunContext("cat", place, work.folder), "soft", Gallery(place, "", [Preview(CAT, "base", plain("red"))]))
    page.show(site, "other", COMPARED)
    assert page.write().startswith("report:\n")
    shown = [
        {step["name"]: [gallery["title"] for gallery in step["galleries"]] for step in section["steps"]}
        for section in sections(page.path.read_text(encoding="utf-8"))
    ]
    assert shown == [{"soft": [places[0]], "other": ["what each does"]}, {"soft": [places[1]]}]


def test_where_there_is_no_page_pictures_stop_nothing(work):
    (work.folder / "merged_cat.html").write_text("somebody else's")
    site = RunContext("cat", "process[0]", work.folder)
    page = RunPage(site)
    page.show(site, "soft", COMPARED)
    assert "so it stays" in page.write()


@pytest.mark.parametrize(
    "size, wanted", [((1024, 512), (512, 256)), ((300, 1200), (128, 512)), ((64, 48), (64, 48)), ((1024, 1), (512, 1))]
)
def test_copies_keep_the_proportions(size, wanted):
    ((image,),) = map(images, galleries(alone(Preview(CAT, "base", plain("red", *size)))))
    assert image.size == wanted


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "I;16", "1"])
def test_pictures_of_any_kind(mode):
    ((image,),) = map(images, galleries(alone(Preview(CAT, "base", png(Image.new(mode, (32, 32)))))))
    assert image.mode == "RGB"


def test_a_picture_may_be_a_file(work):
    path = work.folder / "a.png"
    path.write_bytes(noisy(0, 700, 350))
    ((image,),) = map(images, galleries(alone(Preview(CAT, "base", path))))
    assert image.size == (512, 256)


@pytest.mark.parametrize("broken", [b"", b"\x89PNG", b"no picture", noisy(0, 64)[:5000], Path("no.png")])
def test_what_is_no_picture_is_named(broken):
    with pytest.raises(ZitMergeError, match=f"the picture base of {CAT} can't be read"):
        alone(Preview(CAT, "base", broken))


def test_three_hundred_pictures_fit_and_a_few_beside_them_stay_larger(work, loras):
    noise = [noisy(seed, 512, 256) for seed in range(3)]
    many = Gallery("many", "", [Preview(str(n), "base", noise[n % 3]) for n in range(300)])
    few = Gallery("few", "", [Preview(str(n), "base", noise[n]) for n in range(3)])
    page = page_of(work, loras, many, few)
    html = page.html()
    first, second = sections(html)[0]["steps"][0]["galleries"]
    assert len(html.encode()) < LIMIT and not first["left_out"] and len(first["pictures"]) == 300
    assert 0.6 * PICTURES < sum(map(len, first["pictures"] + second["pictures"])) < PICTURES
    assert {image.size for image in images(first)} == {(first["edge"], first["edge"] // 2)}
    assert 96 < first["edge"] < 200 and second["edge"] > 400


def test_what_does_not_fit_however_small_is_left_out_and_said(work, loras, show):
    noise = noisy(0, 96)
    many = Gallery("many", "", [Preview(str(n), "base", noise, YAML % n) for n in range(1200)], ABLATION.measures)
    path = write(work, page_of(work, loras, many, COMPARED))
    frame = show(path)
    assert "The pictures are left out" in frame.find(".gallery").first.inner_text()
    assert frame.find(".gallery").first.locator(".measures tbody tr").count() == 4
    assert frame.find(".gallery").nth(1).locator(".thumb").count() == 6
    assert frame.violations() == []
    assert frame.map("strength and energy of LoRA 1")


def test_a_page_that_is_written_again_has_all_of_it(work, loras, show):
    page = page_of(work, loras)
    write(work, page)
    page.show("", "merged", COMPARED)
    first = page.html()
    assert first == page.html()
    page.show("", "merged", SWEEP)
    frame = show(write(work, page))
    assert frame.find(".thumb").count() == 9


def test_printed_pictures_and_measures_are_there(work, loras, show):
    frame = show(write(work, page_of(work, loras, COMPARED, PARTS, ABLATION)), 700)
    frame.page.emulate_media(media="print")
    assert frame.find(".previews").nth(1).evaluate("table => table.offsetWidth <= table.parentNode.clientWidth")
    assert frame.find(".previews .thumb").first.is_visible() and frame.find(".sort").first.is_visible()
    assert frame.find(".wrapped").nth(2).bounding_box()["height"] > 100, "rows that are closed are printed"
    assert not frame.inner.get_by_role("button", name="Copy").first.is_visible()
    frame.page.emulate_media(media="screen", forced_colors="active")
    colour = frame.find(".measures .bar i").first.evaluate("bar => getComputedStyle(bar).backgroundColor")
    assert colour != frame.find(".measures .bar").first.evaluate("bar => getComputedStyle(bar).backgroundColor")
