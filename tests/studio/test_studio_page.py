"""The page of a live studio in a real Chromium, against the real server."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

import pytest
import yaml
from oracles.dense import read_deltas
from preview.helpers import ME, STYLE, Loader, step
from report.page.frame import new_tab
from safetensors.torch import load_file
from studio.live import DEADLINE, PREVIEW, Gate, Live
from studio.live_frame import LiveFrame, proxy, saved
from sweep import sweep
from workspace import Workspace

from extensions_built_in.zit_merge.config.parse import parse_section
from extensions_built_in.zit_merge.wording import size_text

SOFT = step(ME, STYLE)
SMALL = step({"lora": "soft", "ratio": 1}, {**STYLE, "ratio": -0.5}, name="small", rank=2)


@pytest.fixture
def opened(work: Workspace, loras) -> Iterator[Callable[..., Live]]:
    """Opens a studio on steps; `soft` alone if none are given."""
    lives: list[Live] = []
    Gate.open.set()

    def open_(*steps, load: Loader | None = None, no_pictures: str = "", **keys) -> Live:
        lives.append(
            Live(work, *(steps or (SOFT,)), load=None if no_pictures else load or Loader(Gate), why_not=no_pictures, **keys)
        )
        return lives[-1]

    yield open_
    Gate.open.set()
    for live in lives:
        live.close()


@pytest.fixture
def tab(chromium) -> Iterator[Callable[..., LiveFrame]]:
    """Opens the page of a studio in a frame; at the end nothing may have been logged, or asked of anybody else."""
    frames: list[LiveFrame] = []

    def open_(live: Live, width: int = 1200, scheme: str = "dark", parent: str = "") -> LiveFrame:
        page = new_tab(chromium)
        if parent:
            page.goto(parent)
        frames.append(LiveFrame(page, live, width, scheme))
        frames[-1].find(".doing").filter(has_text=re.compile("Ready|Computing|Rendering|Waiting|Loading")).wait_for()
        return frames[-1]

    yield open_
    for frame in frames:
        frame.page.context.close()
    for frame in frames:
        assert frame.troubles == []


def squares(path) -> dict[str, float]:
    return {m: float(d.square().sum()) for m, d in read_deltas(path).items()}


def facts_of(frame: LiveFrame) -> dict[str, str]:
    """What was measured, by name."""
    names, values = (frame.find(f".measured {tag}").all_inner_texts() for tag in ("dt", "dd"))
    return dict(zip(names, values, strict=True))


def strengths(frame: LiveFrame, column: int) -> list[float]:
    """Asked (2) or got (3) of every LoRA."""
    rows = frame.find(".measured tbody tr")
    return [float(rows.nth(n).locator("> *").nth(column).inner_text().replace("−", "-")) for n in range(rows.count())]


def keep(frame: LiveFrame, name: str) -> None:
    frame.number("Name").fill(name)
    frame.press("Keep as a LoRA")
    frame.find(
        ".kept li",
    ).filter(has_text=f"{name}.safetensors").wait_for()


# --- numbers and files ---------------------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_file_that_is_kept(work, opened, tab):
    frame = tab(opened())
    frame.measured()
    assert (strengths(frame, 2), strengths(frame, 3)) == ([0.8, 0.5], [0.8, 0.5])
    assert facts_of(frame)["energy kept"] == "all: nothing is cut"
    frame.choose("Method", "ties")
    frame.type("density", 0.4)
    frame.choose("Rank", "number")
    frame.type("rank", 2)
    frame.type("2. style.safetensors", 0.7)
    frame.measured()
    keep(frame, "mine")
    path = work.out / "merged_cat_mine.safetensors"
    found, shown = squares(path), facts_of(frame)
    on_map = {m: v for m, v in frame.map("measured energy").items() if v is not None}
    assert on_map == pytest.approx({m: v / sum(found.values()) for m, v in found.items() if m in on_map}, rel=1e-3)
    assert float(shown["norm"]) == pytest.approx(sum(found.values()) ** 0.5, rel=1e-3)
    assert shown["rank"] == "2" and shown["file"] == size_text(path.stat().st_size)
    assert 0 < float(shown["energy kept"].removesuffix(" %")) < 100
    told = "Off: style is mostly cut away, a larger rank keeps it."
    assert frame.find(".kept li").inner_text().split("\n\n") == ["mine merged_cat_mine.safetensors", told]
    assert frame.find(".measured p").first.inner_text() == told


def test_the_section_that_is_shown_makes_the_same_file(work, opened, tab):
    frame = tab(opened(SOFT, SMALL))
    frame.type("to_q", 0.25)
    frame.choose("Method", "dare_ties")
    frame.type("seed", 7)
    frame.choose("Rank", "energy")
    frame.type("share of the energy", 0.9)
    frame.type("at most rank", 3)
    frame.measured()
    frame.number("Name").fill("mine")
    section = frame.section()
    assert section["steps"][:2] == [SOFT, SMALL]
    assert section["steps"][2] == {
        **SOFT,
        "name": "mine",
        "method": "dare_ties",
        "params": {"seed": 7},
        "rank": {"energy": 0.9, "max": 3},
        "loras": [{**ME, "blocks": {"to_q": 0.25}}, STYLE],
    }
    frame.press("Keep as a LoRA")
    frame.shows("merged_cat_mine.safetensors")
    path = work.out / "merged_cat_mine.safetensors"
    ours = path.read_bytes()
    path.unlink()
    work.zit("run", work.config(section, name="again.yaml")).ok()
    assert path.read_bytes() == ours


def test_a_name_that_can_not_be_is_refused_with_the_reason(opened, tab):
    frame = tab(opened())
    trouble = frame.find(".trouble")
    for name, words in (
        ("a b", "letters, digits, _ . and - only"),
        ("../a", "letters, digits"),
        ("soft", "There is a step soft already"),
        ("", "Give it a name"),
    ):
        frame.number("Name").fill(name)
        assert words in trouble.inner_text() and frame.number("Name").get_attribute("aria-invalid") == "true"
        frame.press("Keep as a LoRA")
    frame.number("Name").fill("bélier_2.0-x")
    assert trouble.inner_text() == "" and frame.number("Name").get_attribute("aria-invalid") is None
    assert frame.find(".kept li").count() == 0


def test_what_can_not_be_merged_is_said_and_old_numbers_are_grey(opened, tab):
    frame = tab(opened())
    frame.measured()
    frame.choose("Method", "della")
    frame.type("density", 0.01)
    frame.find(".source.warn").filter(has_text="This can't be merged: ").wait_for()
    assert "density 0.01 with epsilon" in frame.find(".source").inner_text()
    assert "A plain sum, predicted" in frame.find(".energy").inner_text()
    frame.number("density").fill("1.5")
    frame.number("density").press("Tab")
    assert '"1.5" is above 1' in frame.find(".notice").inner_text()
    frame.press("Undo")
    frame.press("Undo")
    frame.measured()
    assert frame.number("Method").input_value() == "sum" and strengths(frame, 3) == [0.8, 0.5]


def test_undo_goes_across_weights_method_parameters_rank_and_looks(opened, tab):
    frame = tab(opened())
    settings = [frame.section()["steps"][-1]]

    def done() -> None:
        settings.append(frame.section()["steps"][-1])
        assert settings[-1] != settings[-2]

    frame.press("Look")
    frame.looks(1)
    for change in (
        lambda: frame.type("1. me.safetensors", 0.3),
        lambda: frame.choose("Method", "ties"),
        lambda: frame.type("density", 0.5),
        lambda: frame.choose("Rank", "size"),
        lambda: frame.type("MB", 0.05),
        lambda: frame.press("Use these weights 1. sum, 0.8 + 0.5"),
    ):
        change()
        done()
    assert settings[-1] == settings[0]
    for before in reversed(settings[:-1]):
        frame.press("Undo")
        assert frame.section()["steps"][-1] == before
    for after in settings[1:]:
        frame.press("Redo")
        assert frame.section()["steps"][-1] == after


def test_the_weights_of_a_look_come_back_as_they_were(opened, tab):
    frame = tab(opened(no_rank_needed := step(ME, STYLE)))
    assert no_rank_needed == SOFT
    frame.type("to_q", 0.25)
    frame.type("Layers", 0)
    frame.type("to layer", 29)
    frame.type("factor", 0.1)
    frame.type("to factor", 1.3)
    frame.press("Set layers")
    frame.type("with the factor", -0.5)
    frame.cell("strengths of LoRA 1, paintable", "layers.3.attention.to_v").click()
    composed = frame.section()["steps"][-1]
    shown = frame.map("strengths of LoRA 1, paintable")
    frame.press("Look")
    frame.looks(1)
    frame.press("Reset this step")
    assert frame.section()["steps"][-1] == {**SOFT, "name": "soft_2"}
    other = tab_of(frame)
    for one in (frame, other):
        one.find(".strip button").filter(has_text="Use these weights").click()
        assert one.section()["steps"][-1] == composed
        assert one.map("strengths of LoRA 1, paintable") == shown
    other.page.context.close()


def tab_of(frame: LiveFrame) -> LiveFrame:
    """A second tab of the same page."""
    tab = new_tab(frame.page.context.browser)
    second = LiveFrame(tab, frame.live)
    second.looks(1)
    return second


def test_what_was_composed_last_is_a_button_away_when_the_page_is_opened_again(opened, tab):
    live = opened()
    frame = tab(live)
    frame.measured()
    assert frame.inner.get_by_role("button", name="Go on with what was composed last").count() == 0
    frame.type("1. me.safetensors", 0.25)
    frame.choose("Method", "ties")
    frame.measured()
    composed = frame.section()
    again = tab(live)
    assert again.section()["steps"][-1] == {**SOFT, "name": "soft_2"}
    again.press("Go on with what was composed last")
    assert again.section() == composed
    again.press("Undo")
    assert again.section()["steps"][-1] == {**SOFT, "name": "soft_2"}


# --- pictures ------------------------------------------------------------------------------------------------------------------


def test_looks_are_rendered_once_and_stay_in_the_strip(opened, tab):
    live = opened()
    frame = tab(live)
    frame.shows("No look yet.")
    frame.inner.get_by_role("button", name="Keep as a LoRA").focus()
    frame.page.keyboard.press("l")
    frame.looks(1)
    assert frame.heads() == ["base", "me.safetensors", "style.safetensors", "1. sum, 0.8 + 0.5"]
    assert frame.find(".strip tbody tr").count() == 2 and frame.find(".strip img").count() == 8
    assert len(live.loader.pictures) == 8
    frame.page.keyboard.press("l")
    frame.shows("Look 1 shows these weights already.")
    frame.type("1. me.safetensors", 0.25)
    frame.inner.get_by_role("button", name="Keep as a LoRA").focus()
    frame.page.keyboard.press("l")
    frame.looks(2)
    assert frame.heads()[3:] == ["1. sum, 0.8 + 0.5", "2. sum, 0.25 + 0.5"]
    frame.page.keyboard.press("d")
    frame.looks(3)
    assert "draft" in frame.heads()[-1]
    sizes = [(spec.width, spec.steps) for _, spec in live.loader.pictures]
    assert sizes[:8] == [(128, 4)] * 8 and set(sizes[8:]) == {(128, 4), (64, 2)}
    assert len(live.loader.loaded) == 1


def test_keys_ask_for_no_look_while_somebody_types(opened, tab):
    frame = tab(opened())
    frame.number("Name").press("l")
    frame.number("1. me.safetensors").press("d")
    frame.number("Method").press("d")
    frame.page.keyboard.press("Escape")
    frame.find("h2").first.click()
    frame.page.keyboard.press("l")  # with the focus nowhere
    frame.measured()
    assert frame.find(".strip img, .strip .empty").count() == 0 and not any("/look" in asked for asked in frame.asked)


def test_progress_is_told_and_a_cancelled_look_ends(opened, tab):
    frame = tab(opened())
    frame.press("Look")
    frame.looks(1)
    Gate.open.clear()
    frame.type("1. me.safetensors", 0.25)
    frame.press("Look")
    frame.does("Rendering picture 1 of 2: 2. sum, 0.25 + 0.5")  # base and inputs are there
    frame.type("1. me.safetensors", 0.5)
    frame.press("Look")
    frame.find(".strip .told").filter(has_text="waiting").wait_for()
    assert frame.violations() == []
    frame.press("Cancel")
    Gate.open.set()
    frame.does("Ready.")
    assert frame.find(".strip .told").all_inner_texts() == ["", "cancelled", "cancelled"]
    frame.press("Look")
    frame.does("Ready.")
    frame.find(".strip td img[alt^='4. sum, 0.5 + 0.5']").nth(1).wait_for()


def test_two_looks_are_compared_large(opened, tab):
    frame = tab(opened())
    frame.press("Look")
    frame.looks(1)
    frame.type("1. me.safetensors", 0.25)
    frame.press("Look")
    frame.looks(2)
    first, second = frame.heads()[3:]
    frame.find(".strip tbody tr").first.locator("td").last.locator("button").click()
    picture = frame.find("dialog img:not(.over)")
    assert picture.get_attribute("alt").startswith(f"{second}: a cat")
    frame.until(lambda: picture.evaluate("image => image.naturalWidth") == 128)
    frame.page.keyboard.down("b")
    assert picture.get_attribute("alt").startswith("base: a cat")
    frame.page.keyboard.up("b")
    frame.choose("Compared with", "3")
    frame.page.keyboard.down("b")
    assert picture.get_attribute("alt").startswith(f"{first}: a cat")
    frame.page.keyboard.up("b")
    frame.press("Slider")
    slider = frame.find("dialog input[type=range]")
    slider.focus()
    for _ in range(10):
        frame.page.keyboard.press("ArrowLeft")
    assert slider.get_attribute("aria-valuetext") == f"40 % {first}, then {second}"
    over = frame.find("dialog img.over")
    assert over.get_attribute("alt").startswith(f"{first}: a cat")
    assert over.evaluate("image => getComputedStyle(image).clipPath") == "inset(0px 60% 0px 0px)"
    boxes = [frame.find(f"dialog img{which}").bounding_box() for which in (".over", ":not(.over)")]
    assert boxes[0] == boxes[1]
    assert frame.violations() == []
    frame.page.keyboard.press("End")
    frame.page.keyboard.press("Escape")
    frame.closed()
    assert frame.inner.evaluate("document.activeElement.querySelector('img').alt").startswith(f"{second}: a cat")


def test_favourites_are_marked_filtered_and_seen_in_the_other_tab(opened, tab):
    live = opened()
    frame, other = tab(live), tab(live)
    for ratio in (0.25, 0.5):
        frame.type("1. me.safetensors", ratio)
        frame.press("Look")
    frame.looks(2)
    frame.find(".strip tbody tr").first.locator("td").last.locator("button").click()
    frame.page.keyboard.press("f")
    button = frame.find("dialog button").filter(has_text="Favourite")
    frame.find("dialog button[aria-pressed=true]").filter(has_text="Favourite").wait_for()
    frame.page.keyboard.press("ArrowLeft")
    assert button.get_attribute("aria-pressed") == "false" and button.get_attribute("aria-disabled") == "false"
    frame.choose("Compared with", "1")
    frame.press("Close")
    frame.closed()
    frame.press("Favourites only")
    assert frame.heads()[3:] == ["2. sum, 0.5 + 0.5"]
    other.looks(2)
    mark = other.inner.get_by_role("button", name="Favourite 2. sum, 0.5 + 0.5")
    other.find(".strip thead button[aria-pressed=true]").wait_for()
    mark.click()
    frame.shows("No look is a favourite yet.")
    assert other.number("1. me.safetensors").input_value() == "0.8"


def test_two_tabs_measure_each_its_own_and_see_what_the_other_keeps(opened, tab):
    live = opened()
    frame, other = tab(live), tab(live)
    for one, ratio in ((frame, 0.25), (other, -0.5)):
        one.type("1. me.safetensors", ratio)
    for one, ratio in ((frame, 0.25), (other, -0.5)):
        one.measured()
        assert strengths(one, 3) == [ratio, 0.5]
    keep(frame, "mine")
    other.find(".kept li").filter(has_text="mine merged_cat_mine.safetensors").wait_for()
    frame.find(".kept li").first.wait_for()
    for one in (frame, other):
        one.number("Name").fill("Mine")
        assert one.find(".trouble").inner_text() == "There is a step Mine already: give another name."


NAME_OF_FOCUSED = """(() => { const node = document.activeElement;
    return node.getAttribute("aria-label") ?? (node.labels?.[0] ?? node).textContent; })()"""


def test_by_keyboard_alone(opened, tab):
    """From the first tab stop to a picture that is large, a favourite and a file."""
    frame = tab(opened(step(ME, STYLE)))
    keys = frame.page.keyboard

    def tab_to(name: str) -> None:
        for _ in range(60):
            keys.press("Tab")
            if (frame.inner.evaluate(NAME_OF_FOCUSED) or "").startswith(name):
                return
        raise AssertionError(f"no tab stop {name}")

    frame.find("h1").click()
    tab_to("Look")
    keys.press("Enter")
    frame.looks(1)
    tab_to("looks")
    keys.press("Tab")
    for _ in range(9):  # two buttons of the look, then pictures
        keys.press("ArrowRight")
    keys.press("Enter")
    frame.find("dialog").wait_for()
    keys.press("f")
    keys.press("Escape")
    frame.closed()
    frame.find(".strip thead button[aria-pressed=true]").wait_for()
    tab_to("Name")
    keys.press("Control+a")
    keys.type("by_hand")
    keys.press("Enter")
    frame.find(".kept li").filter(has_text="merged_cat_by_hand.safetensors").wait_for()


def test_without_pictures_there_are_numbers_and_files(work, opened, tab):
    frame = tab(opened(no_pictures="no model is named: add model: to the section"))
    frame.shows("There are no pictures: no model is named: add model: to the section")
    assert frame.inner.get_by_role("button", name="Look").count() == 0
    frame.inner.get_by_role("button", name="Keep as a LoRA").focus()
    frame.page.keyboard.press("l")
    assert "There are no pictures" in frame.find(".notice").inner_text()
    frame.measured()
    keep(frame, "mine")
    ours, theirs = (load_file(work.out / f"merged_cat_{name}.safetensors") for name in ("mine", "soft"))
    assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)


# --- where it is, and when it is not -------------------------------------------------------------------------------------------


def test_behind_the_proxy_of_the_ui(opened, tab):
    live = opened()
    with proxy(live.port) as parent:
        frame = tab(live, parent=parent)
        frame.measured()
        frame.press("Draft")
        frame.looks(1)
        assert all(asked.startswith(f"request: {parent}proxy-{live.port}/api/") for asked in frame.asked)
        frame.page.context.close()


@pytest.mark.parametrize("place", ["served", "file"])
def test_without_a_frame(work, opened, chromium, place):
    live = opened()
    page = chromium.new_context().new_page()
    page.set_default_timeout(DEADLINE)
    said: list[str] = []
    page.on("console", lambda m: said.append(m.text))
    page.goto(f"{live.url}open/{live.token}" if place == "served" else saved(live.html, work.folder / "page.html").as_uri())
    page.locator(".source").filter(has_text="Measured").wait_for()
    assert said == []
    blocked = page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'blocked')")
    assert blocked == "blocked" and f'"connect-src {live.url.rstrip("/")}"' in said[0]
    page.context.close()


def test_a_studio_that_is_gone_leaves_the_page_as_it_is_without_one(opened, tab):
    live = opened()
    frame = tab(live)
    frame.measured()
    frame.type("1. me.safetensors", 0.25)
    frame.measured()
    live.close()
    frame.does("The page below works without it.")
    assert frame.inner.get_by_role("button", name="Look").count() == 0
    assert frame.inner.get_by_label("Method").filter(visible=True).count() == 0
    assert "predicted energy" in frame.find(".outcome table").get_attribute("aria-label")
    assert frame.section()["steps"] == [{**SOFT, "loras": [{**ME, "ratio": 0.25}, STYLE]}]
    frame.press("Undo")
    assert frame.section()["steps"] == [SOFT]
    assert frame.violations() == []
    frame.page.context.close()
    frame.troubles[:] = [t for t in frame.troubles if "ERR_CONNECTION_REFUSED" not in t and "ERR_CONNECTION_RESET" not in t]


def test_it_is_closed_after_one_more_question(opened, tab):
    live = opened()
    frame = tab(live)
    frame.press("Close the studio")
    assert frame.inner.evaluate("document.activeElement.textContent") == "Leave it open"
    assert frame.violations() == []
    frame.page.keyboard.press("Escape")
    assert frame.inner.evaluate("document.activeElement.textContent") == "Close the studio"
    frame.press("Close the studio")
    frame.press("Close it")
    frame.does("The studio is closed. The page below works without it.")
    assert live.door.session.closed == "it was closed on its page"


@sweep("width, scheme", [360, 1200], ["light", "dark"])
def test_accessible_and_wide_enough(opened, tab, width, scheme):
    frame = tab(opened(SOFT, SMALL), width, scheme)
    frame.colour(scheme)
    frame.choose("Method", "ties")
    frame.choose("Rank", "energy")
    frame.press("Draft")
    frame.type("2. style.safetensors", 0.1)
    frame.press("Draft")
    frame.looks(2)
    keep(frame, "mine")
    assert frame.violations() == []
    assert frame.overflow() == 0
    frame.find(".strip .thumb").last.click()
    frame.press("Slider")
    assert frame.violations() == []
    box = frame.find("dialog").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width


def test_eight_loras_of_two_steps(work, opened, tab):
    for n in range(6):
        work.lora(f"lora_{n}.safetensors", seed=n + 2)
    many = step(ME, STYLE, *({"lora": f"lora_{n}.safetensors", "ratio": 0.1} for n in range(6)), name="many")
    frame = tab(opened(SOFT, many), 360)
    frame.choose("Step in detail:", "1")
    assert frame.find("option[value=slerp]").is_disabled()
    frame.press("Draft")
    frame.looks(1)
    assert len(frame.heads()) == 10
    frame.measured()
    assert len(strengths(frame, 3)) == 8 and frame.overflow() == 0
    frame.choose("Step in detail:", "0")
    assert not frame.find("option[value=slerp]").is_disabled()
    frame.find(".strip button").filter(has_text="Use these weights").click()
    assert frame.number("Step in detail:").input_value() == "1"


def test_the_section_of_a_studio_parses(opened, tab):
    frame = tab(opened())
    frame.choose("Method", "project")
    frame.choose("yields", "both")
    section = parse_section(frame.section())
    assert section.steps[-1].params == {"yields": "both"} and section.preview.prompts == PREVIEW["prompts"]
    assert yaml.safe_load(frame.text()) == [json.loads(json.dumps(frame.section()))]


def test_looks_of_an_earlier_studio_keep_their_own_prompts(opened, tab):
    first = opened()
    frame = tab(first)
    frame.press("Draft")
    frame.looks(1)
    first.close()
    frame.page.context.close()
    frame.troubles.clear()
    frame = tab(opened(preview={**PREVIEW, "prompts": ["a dog", "a fox"]}))
    frame.type("1. me.safetensors", 0.25)
    frame.press("Draft")
    frame.find(".strip thead th:has(button)").nth(1).wait_for()
    frame.does("Ready.")
    frame.find(".strip tbody td:empty").first.wait_for(state="detached")
    rows = {
        row.locator("th").inner_text(): [cell.locator("img").count() or cell.inner_text() for cell in row.locator("td").all()]
        for row in frame.find(".strip tbody tr").all()
    }
    assert rows == {
        "a dog (seed 42)": [1] * 5,
        "a fox (seed 42)": [1, 1, 1, "not there", 1],
        "a cat (seed 42)": ["not there", "not there", "not there", 1, "not there"],
    }
    assert frame.violations() == []
