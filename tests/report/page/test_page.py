"""The merge page in a real Chromium, inside a sandboxed frame."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from oracles import producers
from oracles.dense import read_deltas
from safetensors.torch import load_file, save_file
from sweep import few, sweep
from workspace import SMALL, Workspace, lora_bytes, of_layers

from extensions_built_in.zit_merge import load_lora
from extensions_built_in.zit_merge.analysis.measure import measure
from extensions_built_in.zit_merge.config.parse import parse_section
from extensions_built_in.zit_merge.config.schema import Lora
from extensions_built_in.zit_merge.model.strengths import Weights, factors, strengths
from extensions_built_in.zit_merge.model.zimage import COMPONENTS, MODULES, at
from extensions_built_in.zit_merge.report.page.facts import files_facts
from extensions_built_in.zit_merge.report.page.files import section_of
from extensions_built_in.zit_merge.report.page.render import Page
from extensions_built_in.zit_merge.wording import size_text

FACE = {"lora": "me.safetensors", "ratio": 0.9, "blocks": {"attention": 0.9, "to_q": 1.1}, "layers": {"0-9": [0.5, 1.0]}}
STYLE = {"lora": "style.safetensors", "ratio": 0.6, "effects": {"composition": 0.2}, "overrides": {"20-25.to_v": -1.3}}
ONE_LAYER = of_layers(SMALL, 3)
HOSTILE = "</script><script>document.title='pwned';alert(1)</script><img src=x onerror=alert(2)>"


def run(work: Workspace, *steps, **keys) -> Path:
    """Runs a job of one section; its page."""
    work.zit("run", work.job(*steps, **keys)).ok()
    (page,) = work.out.glob("*.html")
    return page


_laid: dict[tuple[bytes, ...], dict[Path, bytes]] = {}


def two(work: Workspace) -> Path:
    """A page of two steps, the second of which is cut and uses the first; what the run left is laid down again from then on."""
    given = tuple(path.read_bytes() for path in sorted(work.folder.glob("*.safetensors")))
    if given not in _laid:
        soft = {"name": "soft", "loras": [FACE, STYLE]}
        small = {"name": "small", "rank": 2, "loras": [{"lora": "soft", "ratio": 1}, {**STYLE, "ratio": -0.5}]}
        run(work, soft, small, save={"dtype": "fp32"}, output_dir="out")  # no folder's name stands in the page
        _laid[given] = {path: path.read_bytes() for path in (Path("config.yaml"), *Path("out").iterdir())}
    work.out.mkdir(exist_ok=True)
    for path, content in _laid[given].items():
        path.write_bytes(content)
    (page,) = work.out.glob("*.html")
    return page


def wanted(lora: dict, name: str) -> dict[str, float]:
    """Module -> strength by our config code, of the modules that the file has."""
    section = parse_section({"type": "zit_merge", "steps": [{"name": "x", "loras": [lora]}]})
    return strengths_of(section.steps[0].loras[0], name)


def strengths_of(lora: Lora, name: str) -> dict[str, float]:
    """Module -> strength of an entry, of the modules that the file has."""
    table = strengths(lora.ratio, factors(Weights(**lora.tables)))
    return {m: table[m] for m in load_lora(name)}


def shown(table: dict[str, float | None]) -> dict[str, float]:
    return {m: v for m, v in table.items() if v is not None}


def on_map(table: dict) -> dict:
    """Without the modules outside of the blocks, which have no cell."""
    return {m: v for m, v in table.items() if MODULES[m].section != "other"}


def whole(path: Path) -> Path:
    """A LoRA of rank 1 of all 276 modules, in the same small sizes, about as strong as `me.safetensors`."""
    sizes = {"dim": 8, "ffn": 16, "adaln": 8, "caption": 8, "patch": 8, "t_hidden": 8, "t_frequency": 8}
    random_, tensors = torch.Generator().manual_seed(7), {}
    for m in MODULES.values():
        out, into = m.shape(sizes)
        tensors[f"diffusion_model.{m.name}.lora_A.weight"] = torch.randn(1, into, generator=random_)
        tensors[f"diffusion_model.{m.name}.lora_B.weight"] = 3e-4 * torch.randn(out, 1, generator=random_)
    save_file(tensors, path)
    return path


def energies(deltas: dict) -> dict[str, float]:
    return {m: float(d.square().sum()) for m, d in deltas.items()}


def shares(values: dict[str, float]) -> dict[str, float]:
    total = sum(values.values())
    return {m: v / total for m, v in values.items()}


def test_every_step_at_a_glance(work, loras, show):
    frame = show(two(work))
    soft, small = (frame.find("article").nth(n).inner_text() for n in (0, 1))
    size = (work.out / "merged_cat_soft.safetensors").stat().st_size / 1e6
    for words in (
        "Right: as asked",
        "240 modules",
        "rank 5",
        "method sum",
        f"{size:.1f} MB",
        "me.safetensors",
        "0.9",
        "trg_ai_toolkit",
    ):
        assert words in soft
    assert "of the energy is kept" in small and "rank 2" in small and "rank 8 holds everything" in small  # the note


@pytest.mark.parametrize(
    ("count", "told"),
    [
        (51_234, "0.1 MB"),
        (42_612_345, "42.6 MB"),
        (999_949_999, "999.9 MB"),
        (999_950_000, "1.00 GB"),
        (1_361_000_000, "1.36 GB"),
    ],
)
def test_sizes_are_spelled_as_on_the_terminal(work, loras, show, count, told):
    html = re.sub(r'"bytes":\d+', f'"bytes":{count}', two(work).read_text("utf-8"))
    page = work.folder / "sized.html"
    page.write_text(html, "utf-8")
    assert f", {told}" in show(page).find("article").first.inner_text() and size_text(count) == told


@sweep("width, scheme", [800, 1200, 1920], ["light", "dark"])
def test_quiet_accessible_and_wide_enough(work, loras, show, width, scheme):
    frame = show(two(work), width)
    frame.colour(scheme)
    assert frame.violations() == []
    assert frame.overflow() == 0
    frame.choose("Step in detail:", "1")
    frame.energy()
    assert frame.violations() == []


DARK, LIGHT = "rgb(20, 23, 28)", "rgb(255, 255, 255)"


def ground(page) -> str:
    return page.locator("body").evaluate("node => getComputedStyle(node).backgroundColor")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_frame_it_is_dark_at_first_as_the_ui_around_it(work, loras, show, scheme):
    frame = show(two(work), scheme=scheme)
    assert ground(frame.inner) == DARK
    frame.press("Light colours")
    assert ground(frame.inner) == LIGHT
    assert frame.violations() == []
    frame.press("Dark colours")
    assert ground(frame.inner) == DARK


def test_by_itself_it_has_the_systems_colours_until_others_are_chosen(work, loras, chromium):
    page, tab = two(work), chromium.new_context().new_page()
    for scheme, colour in (("light", LIGHT), ("dark", DARK)):
        tab.emulate_media(color_scheme=scheme)
        tab.goto(page.as_uri())
        assert ground(tab) == colour
    tab.get_by_role("button", name="Light colours").click()
    tab.reload()
    assert ground(tab) == LIGHT, "the choice is remembered"
    tab.context.close()


def test_maps_show_the_strengths_of_the_plan(work, loras, show):
    frame = show(two(work))
    for label, lora in (("strength and energy of LoRA 1", FACE), ("strength and energy of LoRA 2", STYLE)):
        assert shown(frame.map(label)) == on_map(wanted(lora, lora["lora"]))
    frame.choose("Step in detail:", "1")
    assert set(shown(frame.map("strength and energy of LoRA 1")).values()) == {1.0}


def test_maps_show_energies_and_the_result(work, loras, show):
    frame = show(two(work))
    files = {"soft": work.out / "merged_cat_soft.safetensors", "small": work.out / "merged_cat_small.safetensors"}
    deltas = {name: read_deltas(path) for name, path in files.items()}
    face, style = (producers.PRODUCERS[p].make(SMALL, r, s, torch.bfloat16).deltas for p, r, s in MADE)
    raw = {m: sum(float(d[m].square().sum()) for d in (face, style) if m in d) for m in deltas["soft"]}
    size = {m: (e / raw[m]) ** 0.5 for m, e in energies(deltas["soft"]).items()}
    assert shown(frame.map("size and energy of the result")) == pytest.approx(on_map(size), rel=1e-3)
    frame.energy()
    assert shown(frame.map("size and energy of the result")) == pytest.approx(on_map(shares(energies(deltas["soft"]))), rel=1e-3)
    weighed = {m: (wanted(FACE, "me.safetensors")[m] * face[m]) for m in face}
    assert shown(frame.map("strength and energy of LoRA 1")) == pytest.approx(on_map(shares(energies(weighed))), rel=1e-3)
    frame.choose("Step in detail:", "1")
    frame.energy()
    assert shown(frame.map("size and energy of the result")) == pytest.approx(on_map(shares(energies(deltas["small"]))), rel=1e-3)


MADE = (("ai-toolkit", 2, 0), ("musubi", 3, 1))  # what the fixture `loras` writes


def test_a_cell_tells_its_numbers_on_hover_and_focus(work, loras, show):
    frame = show(two(work))
    cell = frame.cell("strength and energy of LoRA 1", "layers.3.attention.to_q")
    strength = wanted(FACE, "me.safetensors")["layers.3.attention.to_q"]
    cell.hover()
    readout = cell.evaluate("cell => cell.closest('.map-box').querySelector('.readout').textContent")
    assert readout.startswith(f"layer 3, to_q: strength {strength:.4g}, ")
    cell.focus()
    frame.page.keyboard.press("ArrowRight")
    frame.page.keyboard.press("ArrowDown")
    focused = frame.inner.evaluate("document.activeElement.dataset.module")
    assert focused == "layers.4.attention.to_k"
    assert frame.inner.evaluate("document.activeElement.getAttribute('aria-label')").startswith("layer 4, to_k: strength ")
    frame.page.keyboard.press("End")
    frame.page.keyboard.press("PageUp")
    assert frame.inner.evaluate("document.activeElement.dataset.module") == "layers.29.adaLN_modulation.0"


def test_untouched_weights_keep_their_own_keys(work, loras, show):
    frame = show(two(work))
    section = frame.section()
    original = yaml.safe_load((work.folder / "config.yaml").read_text())["config"]["process"][0]
    assert section == original
    frame.type("1. me.safetensors", 0.7)
    assert frame.section()["steps"][0]["loras"] == [{**section["steps"][0]["loras"][0], "ratio": 0.7} | COMPOSED, STYLE]
    assert frame.section()["steps"][1] == original["steps"][1]


COMPOSED = {"blocks": {"to_q": 1.1, "to_k": 0.9, "to_v": 0.9, "to_out": 0.9}}


def check_composed(work: Workspace, frame) -> None:
    """The YAML passes `check`, and means what the page shows, for every LoRA of the step."""
    name = work.write("job: extension\nconfig:\n  name: next\n  process:\n" + frame.text(), "next.yaml")
    work.zit("check", name).ok()
    section = parse_section(frame.section())
    for i, lora in enumerate(section.steps[0].loras):
        if len(section.steps[0].loras) > 1:
            frame.choose("Weigh the blocks of", str(i))
        there = on_map(strengths_of(lora, lora.lora))
        assert shown(frame.map(f"strengths of LoRA {i + 1}, paintable")) == pytest.approx(there, rel=1e-12, abs=1e-15)


def test_every_tool_changes_the_yaml_and_it_means_what_is_shown(work, loras, show):
    frame = show(two(work))
    frame.type("2. style.safetensors", -0.35)
    frame.type("adaLN", 0.25)
    frame.find("input[aria-label='to_v, slider']").focus()
    frame.page.keyboard.press("ArrowRight")
    assert frame.section()["steps"][0]["loras"][0]["blocks"]["to_v"] == 0.95
    frame.find("circle[aria-label='layer 12']").focus()
    frame.page.keyboard.press("ArrowUp")
    frame.page.keyboard.press("ArrowRight")
    frame.page.keyboard.press("PageDown")
    assert frame.section()["steps"][0]["loras"][0]["layers"] == {"0-9": [0.5, 1], 12: 1.05, 13: 0.75}
    frame.type("Layers", 20)
    frame.type("to layer", 29)
    frame.type("factor", 1.5)
    frame.type("to factor", 0.25)
    frame.press("Set layers")
    assert frame.section()["steps"][0]["loras"][0]["layers"]["20-29"] == [1.5, 0.25]
    frame.type("with the factor", 0.4)
    frame.cell("strengths of LoRA 1", "layers.7.feed_forward.w2").click()
    frame.cell("strengths of LoRA 1", "layers.8.feed_forward.w2").focus()
    frame.page.keyboard.press("Enter")
    assert frame.section()["steps"][0]["loras"][0]["overrides"] == {"7-8.w2": 0.4}
    frame.page.keyboard.press("Delete")
    assert frame.section()["steps"][0]["loras"][0]["overrides"] == {"7.w2": 0.4}
    check_composed(work, frame)


def test_the_curve_and_the_map_are_drawn_with_the_pointer(work, loras, show):
    frame = show(two(work))
    svg = frame.find("svg.curve")
    svg.scroll_into_view_if_needed()
    box = svg.bounding_box()
    frame.page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.5)
    frame.page.mouse.down()
    frame.page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.2, steps=3)
    frame.page.mouse.up()
    drawn = frame.section()["steps"][0]["loras"][0]["layers"]
    assert drawn != FACE["layers"]
    frame.type("with the factor", 1.75)
    first = frame.cell("strengths of LoRA 1", "layers.4.attention.to_v")
    first.scroll_into_view_if_needed()
    a, b = (frame.cell("strengths of LoRA 1", f"layers.{n}.attention.to_v").bounding_box() for n in (4, 9))
    frame.page.mouse.move(a["x"] + 3, a["y"] + 3)
    frame.page.mouse.down()
    frame.page.mouse.move(b["x"] + 3, b["y"] + 3, steps=2)  # fast
    frame.page.mouse.up()
    assert frame.section()["steps"][0]["loras"][0]["overrides"] == {"4-9.to_v": 1.75}
    check_composed(work, frame)
    frame.choose("Weigh the blocks of", "0")
    frame.press("Undo")  # the whole stroke
    assert "overrides" not in frame.section()["steps"][0]["loras"][0]
    assert frame.section()["steps"][0]["loras"][0]["layers"] == drawn
    frame.press("Undo")
    assert frame.section()["steps"][0]["loras"][0] == FACE
    assert frame.inner.get_by_role("button", name="Undo").get_attribute("aria-disabled") == "true"
    frame.press("Redo")
    frame.press("Redo")
    assert frame.section()["steps"][0]["loras"][0]["overrides"] == {"4-9.to_v": 1.75}
    frame.press("Reset this step")
    assert frame.section()["steps"][0]["loras"] == [FACE, STYLE]
    frame.find("h2").first.click()
    frame.page.keyboard.press("Control+z")
    assert frame.section()["steps"][0]["loras"][0]["overrides"] == {"4-9.to_v": 1.75}


def overrides(frame, lora: int = 0) -> dict:
    return frame.section()["steps"][0]["loras"][lora].get("overrides", {})


def drag(frame, start, end, steps: int = 2) -> None:
    """From one element to another, with the pointer."""
    start.scroll_into_view_if_needed()
    a, b = start.bounding_box(), end.bounding_box()
    frame.page.mouse.move(a["x"] + 3, a["y"] + 3)
    frame.page.mouse.down()
    frame.page.mouse.move(b["x"] + 3, b["y"] + 3, steps=steps)
    frame.page.mouse.up()


def of(frame, layer: int, path: str = "attention.to_v"):
    return frame.cell("strengths of LoRA 1", f"layers.{layer}.{path}")


def test_a_stroke_is_one_edit_wherever_it_begins(work, loras, show):
    frame = show(two(work))
    frame.type("with the factor", 0.4)
    of(frame, 4).click()
    drag(frame, of(frame, 4), of(frame, 9))  # its first cell has the factor already
    assert overrides(frame) == {"4-9.to_v": 0.4}
    frame.press("Undo")
    assert overrides(frame) == {"4.to_v": 0.4}
    frame.press("Redo")
    frame.inner.get_by_role("radio", name="erase").check()
    drag(frame, of(frame, 2), of(frame, 7))  # begins where nothing is painted
    assert overrides(frame) == {"8-9.to_v": 0.4}
    frame.press("Undo")
    assert overrides(frame) == {"4-9.to_v": 0.4}
    frame.press("Undo")
    frame.inner.get_by_role("radio", name="paint").check()
    drag(frame, of(frame, 4), of(frame, 5))
    redo = frame.inner.get_by_role("button", name="Redo")
    assert redo.get_attribute("aria-disabled") == "true", "nothing is ahead of a new edit"
    redo.click(force=True)
    assert overrides(frame) == {"4-5.to_v": 0.4}


def test_a_drag_that_begins_elsewhere_paints_nothing(work, loras, show):
    frame = show(two(work))
    drag(frame, frame.find("h4:text-is('Single cells')"), of(frame, 6), steps=20)
    assert overrides(frame) == {}


def test_the_readout_follows_what_is_painted(work, loras, show):
    frame = show(two(work))
    of(frame, 3).focus()
    frame.listen()
    frame.page.keyboard.press("Enter")
    readout = of(frame, 3).evaluate("cell => cell.closest('.map-box').querySelector('.readout').textContent")
    assert readout == frame.heard()[0] == "layer 3, to_v: strength 0, painted"


def test_numbers_as_people_type_them(work, loras, show):
    frame = show(two(work))
    for typed, meant in (("0,5", 0.5), ("-0.25", -0.25), ("1e-3", 1e-3), ("−1", -1), (" .5 ", 0.5), ("2.", 2)):
        frame.number("1. me.safetensors").fill(typed)
        frame.number("1. me.safetensors").press("Enter")
        assert frame.section()["steps"][0]["loras"][0]["ratio"] == meant, typed


def test_what_is_no_number_is_refused_and_said(work, loras, show):
    frame = show(two(work))
    field = frame.number("1. me.safetensors")
    for typed in ("", "abc", "0x10", "1 000", "1,000.5", "1e400", "--1", "Infinity", "1,2,3"):
        field.fill(typed)
        field.press("Tab")
        said = f'"{typed}"' if typed else "an empty field"
        assert f"{said} is not a number" in frame.find(".notice").inner_text()
        assert field.get_attribute("aria-invalid") == "true" and frame.section()["steps"][0]["loras"][0] == FACE, typed
    field.fill("0.5")
    field.press("ArrowUp")
    assert field.get_attribute("aria-invalid") is None and frame.section()["steps"][0]["loras"][0]["ratio"] == 0.55


def test_a_range_of_layers(work, loras, show):
    frame = show(run(work, {"name": "soft", "loras": [{"lora": "me.safetensors", "ratio": 1}]}))
    whole, numbers, one = "layers are whole numbers", "two layers and two factors", "one layer has one factor"
    for values, layers, says in (  # what is refused first: after an edit the notice tells the energy a moment later
        ((0, 30, 0, 1), None, whole),
        (("", 9, 0, 1), None, numbers),
        ((0.5, 9, 0, 1), None, whole),
        ((0, 9, "", 1), None, numbers),
        ((3, 3, 0.5, 1), None, one),
        ((3, 3, 0.5, 0.5), {3: 0.5}, None),
        ((9, 0, 0, 1), {"0-9": [1, 0]}, None),  # from the first layer named to the other
    ):
        for label, value in zip(("Layers", "to layer", "factor", "to factor"), values, strict=True):
            frame.number(label).fill(str(value))
        frame.press("Set layers")
        (lora,) = frame.section()["steps"][0]["loras"]
        assert lora.get("layers") == layers, values
        notice = frame.find(".notice").inner_text()
        assert says in notice if says else not any(words in notice for words in (whole, numbers, one)), values
        if layers:
            frame.press("Reset this step")


def test_undo_shows_the_step_that_it_takes_back(work, loras, show):
    frame = show(two(work))
    frame.type("1. me.safetensors", 0.1)
    frame.choose("Step in detail:", "1")
    frame.type("1. soft", 0.2)
    frame.choose("Step in detail:", "0")
    assert [step["loras"][0]["ratio"] for step in frame.section()["steps"]] == [0.1, 0.2]
    frame.listen()
    frame.press("Undo")
    assert frame.number("Step in detail:").input_value() == "1" and any("small" in text for text in frame.heard())
    assert [step["loras"][0]["ratio"] for step in frame.section()["steps"]] == [0.1, 1]
    frame.press("Undo")
    assert frame.number("Step in detail:").input_value() == "0"
    assert [step["loras"][0]["ratio"] for step in frame.section()["steps"]] == [0.9, 1]


def test_a_second_finger_and_a_cancelled_one_draw_nothing_more(work, loras, show):
    """Pointer events as a touch screen sends them."""
    frame = show(run(work, {"name": "soft", "loras": [{"lora": "me.safetensors", "ratio": 1}]}))
    send = """(svg, [kind, id, x, y]) => { const box = svg.getBoundingClientRect(); svg.setPointerCapture = () => {};
        svg.dispatchEvent(new PointerEvent(kind, {bubbles: true, cancelable: true, pointerId: id, buttons: 1,
            clientX: box.left + x * box.width, clientY: box.top + y * box.height})); }"""
    events = [
        ("pointerdown", 1, 0.3, 0.2),
        ("pointerdown", 2, 0.9, 0.8),
        ("pointermove", 2, 0.8, 0.8),
        ("pointercancel", 1, 0, 0),
    ]
    for event in events:
        frame.find("svg.curve").evaluate(send, list(event))
    (key,) = frame.section()["steps"][0]["loras"][0]["layers"]
    assert isinstance(key, int)
    frame.find("svg.curve").evaluate(send, ["pointerdown", 3, 0.9, 0.5])
    assert len(frame.section()["steps"][0]["loras"][0]["layers"]) == 2


@pytest.mark.parametrize(
    "method, ratios, words",
    [
        ("slerp", (0.5, -0.5), "no ratio may be below 0"),
        ("average", (1, -1), "divides by the sum"),
        ("sum", (1e300, 1), "too large"),
    ],
)
def test_what_check_would_refuse_is_said_beside_the_yaml(work, loras, show, method, ratios, words):
    frame = show(run(work, {"name": "soft", "method": method, "loras": [{**FACE, "ratio": 1}, {**STYLE, "ratio": 1}]}))
    assert frame.find(".notes.warn li").count() == 0
    for name, ratio in zip(("1. me.safetensors", "2. style.safetensors"), ratios, strict=True):
        frame.type(name, ratio)
    if method == "sum":
        frame.type("to_q", 1e200)
    assert words in frame.find(".notes.warn").inner_text()
    name = work.write("job: extension\nconfig:\n  name: next\n  process:\n" + frame.text(), "next.yaml")
    work.zit("check", name).refused()


def test_twenty_copies_of_two_and_a_difference_that_nearly_cancels(work, show):
    """The prediction is right where LoRAs overlap much, and silent where it can't be."""
    work.put_pair((lora_bytes("ai-toolkit", 2, 0, ONE_LAYER), lora_bytes("musubi", 3, 1, ONE_LAYER)))
    names = ["me.safetensors", "style.safetensors"] * 10
    frame = show(run(work, {"name": "many", "rank": 4, "loras": [{"lora": n, "ratio": 0.1} for n in names]}))
    assert re.search(r"gains 9\d\d %", frame.find(".energy").inner_text())
    work.lora("me.safetensors")
    work.lora("near.safetensors", change=lambda t: [v.mul_(1.001) for k, v in t.items() if "lora_B" in k])
    frame = show(
        run(work, {"name": "less", "loras": [{"lora": "me.safetensors", "ratio": 1}, {"lora": "near.safetensors", "ratio": 1}]})
    )
    frame.type("2. near.safetensors", -1)
    assert "too little to be predicted" in frame.find(".energy").inner_text()


def test_printing_and_forced_colours_keep_the_maps(work, loras, show):
    frame = show(two(work))
    colour = "cell => getComputedStyle(cell).backgroundColor"
    strong = frame.cell("strength and energy of LoRA 1", "layers.20.attention.to_q")
    before = strong.evaluate(colour)
    frame.page.emulate_media(forced_colors="active")
    assert strong.evaluate(colour) == before
    frame.page.emulate_media(forced_colors="none", media="print")
    assert strong.evaluate("cell => getComputedStyle(cell).printColorAdjust") == "exact"
    assert frame.find("pre.printed").inner_text().strip() == frame.text().strip()


@pytest.mark.parametrize("preset", ["early_0_9", "all"])
def test_presets_mean_what_the_config_makes_of_them(work, loras, show, preset):
    frame = show(two(work))
    names = frame.find("label:text-is('Preset') + select").evaluate("node => [...node.options].map((o) => o.value)")
    for name in names if preset == "all" else [preset]:
        frame.choose("Preset", name)
        frame.press("Apply")
        own = {"lora": "me.safetensors", "ratio": 0.9, "preset": name}
        assert shown(frame.map("strengths of LoRA 1, paintable")) == pytest.approx(
            on_map(wanted(own, "me.safetensors")), abs=1e-15
        )
        composed = frame.section()["steps"][0]["loras"][0]
        assert wanted(composed, "me.safetensors") == pytest.approx(wanted(own, "me.safetensors"), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("seed", few(2, range(6)))
def test_random_edits_mean_what_is_shown_and_predict_the_merge(work, loras, show, seed):
    """Wherever hands go, the YAML, the page and a real merge agree."""
    whole(work.folder / "style.safetensors")
    frame, rng = show(two(work)), random.Random(seed)
    for _ in range(12):
        frame.choose("Weigh the blocks of", str(rng.randrange(2)))
        value = rng.choice([0, 1, -0.75, 0.333, 1e-7, 2.5, round(rng.uniform(-1, 2), 3)])
        kind = rng.randrange(5)
        if kind == 0:
            frame.type(rng.choice(["1. me.safetensors", "2. style.safetensors"]), value)
        elif kind == 1:
            frame.choose("Weigh the blocks of", "1")  # the one with refiners
            frame.type(rng.choice(["adaLN", "to_q", "to_k", "w1", "noise_refiner", "context_refiner", "other"]), value)
        elif kind == 2:
            first, last = sorted(rng.sample(range(30), 2))
            frame.type("Layers", first)
            frame.type("to layer", last)
            frame.type("factor", value)
            frame.type("to factor", rng.uniform(-1, 2))
            frame.press("Set layers")
        elif kind == 3:
            frame.type("with the factor", value)
            module = at("layers", rng.randrange(30), rng.choice(COMPONENTS)).name
            frame.find(f'table.paintable td[data-module="{module}"]').click()
        else:
            button = frame.inner.get_by_role("button", name=rng.choice(["Undo", "Redo"]))
            button.click(force=True)  # does nothing where there is nothing to take back
    check_composed(work, frame)
    section = frame.section()
    section["steps"] = [{**section["steps"][0], "name": "again"}]
    section["save"] = {"dtype": "fp32"}
    work.zit("run", work.config(section, job="next", name="made.yaml")).ok()
    found = energies(read_deltas(work.out / "merged_next_again.safetensors"))
    assert sum(found.values()) > 0, "another seed: this one leaves nothing to compare"
    assert shown(frame.map("predicted energy")) == pytest.approx(on_map(shares(found)), rel=2e-2, abs=1e-6)


def test_what_files_say_is_text_and_nothing_else(work, show):
    work.lora("a.safetensors", metadata={"modelspec.trigger_phrase": HOSTILE, "ss_base_model_version": HOSTILE})
    work.lora("<b onclick=alert(3)> & \"'.safetensors", seed=1, metadata={"modelspec.trigger_phrase": "\u202egnorw \u0000\u2028"})
    loras = [{"lora": "a.safetensors", "ratio": 1}, {"lora": "<b onclick=alert(3)> & \"'.safetensors", "ratio": 1}]
    path = run(work, {"name": "soft", "loras": loras}, job="job </title><script>alert(4)</script>")
    html = path.read_text(encoding="utf-8")
    assert html.count("<script") == 2 and html.count("</script>") == 2 and "<img" not in html
    frame = show(path)
    assert HOSTILE in frame.find("article").first.inner_text()
    assert "<b onclick=alert(3)> & \"'.safetensors" in frame.find("article").first.inner_text()
    assert frame.inner.evaluate("document.querySelectorAll('script').length") == 2
    assert frame.section()["steps"][0]["loras"] == loras
    assert frame.violations() == []


@pytest.fixture
def heard() -> Iterator[tuple[str, list[str]]]:
    """A server on this machine: its address, and what was asked of it."""
    asked: list[str] = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_a_script_that_gets_in_does_not_run(work, loras, show, heard):
    """The second wall: the page's policy knows its own script only, and lets nothing out."""
    address, asked = heard
    path = two(work)
    html = path.read_text(encoding="utf-8")
    bad = f"<script>document.title='pwned';fetch('{address}/a')</script><img src='{address}/b'><noscript>"
    path.write_text(html.replace("<noscript>", bad))
    frame = show(path)
    frame.page.wait_for_timeout(300)
    assert frame.inner.evaluate("document.title") != "pwned" and asked == []
    assert sum("Content Security Policy" in t for t in frame.troubles) == 2
    frame.troubles.clear()


def test_hundreds_of_loras_with_long_names_and_a_megabyte_of_words(work, show):
    names = [f"{'ありがとう_' * 7}{'x' * 100}_{n}.safetensors" if n % 2 else f"שלום_עולם_{n}.safetensors" for n in range(200)]
    small = [lora_bytes("ai-toolkit", 2, seed, ONE_LAYER) for seed in range(3)]
    for n, name in enumerate(names):
        (work.folder / name).write_bytes(small[n % 3])
    for n, name in enumerate(names[:3]):
        work.lora(name, seed=n, metadata={"modelspec.trigger_phrase": f"{n} " + "word " * 200_000})
    path = run(work, {"name": "many", "rank": 4, "loras": [{"lora": name, "ratio": 0.1} for name in names]})
    assert path.stat().st_size < 5_000_000
    frame = show(path, 800)
    assert frame.overflow() == 0
    assert frame.find("article tbody tr").count() == 200
    assert len(frame.section()["steps"][0]["loras"]) == 200
    assert frame.violations() == []
    frame.choose("Another LoRA:", "150")
    assert shown(frame.map("strength and energy of LoRA 151"))


def test_no_metadata_one_module_and_zeros(work, show):
    work.lora("one.safetensors", change=lambda t: [t.pop(k) for k in list(t) if ".layers.7.attention.to_q." not in k])
    work.lora("zero.safetensors", change=lambda t: [v.zero_() for v in t.values()])
    loras = [load_lora(work.folder / name) for name in ("one.safetensors", "zero.safetensors")]
    page = Page("files")
    page.begin("", section_of(loras))
    page.add(files_facts(measure(loras)))
    page.write(work.folder / "page.html")
    frame = show(work.folder / "page.html")
    assert len(shown(frame.map("strength and energy of LoRA 1"))) == 1
    assert frame.violations() == []


def test_overlap_of_a_pair(work, loras, show):
    frame = show(two(work))
    face, style = (producers.PRODUCERS[p].make(SMALL, r, s, torch.bfloat16).deltas for p, r, s in MADE)
    cosines = {m: float((face[m] * style[m]).sum() / face[m].norm() / style[m].norm()) for m in face if m in style}
    assert shown(frame.map("cosines of LoRA 1 and LoRA 2")) == pytest.approx(on_map(cosines), abs=1e-3)


def test_the_copy_button_leaves_the_yaml_copied_or_selected(work, loras, show):
    frame = show(two(work))
    frame.press("Copy")
    frame.find("text=/Copied|Selected/").wait_for()
    area = frame.find(".yaml textarea")
    assert area.evaluate("area => area.value.slice(area.selectionStart, area.selectionEnd)") == frame.text()


def test_inspect_writes_a_page_whose_yaml_runs(work, loras, show):
    assert work.zit("inspect", *loras, "--html", "page.html").ok().endswith("\nwrote page.html\n")
    frame = show(work.folder / "page.html")
    frame.type("1. me.safetensors", 0.25)
    work.write(frame.text(), "merge.yaml")
    work.zit("run", "merge.yaml", "--output-dir", work.out).ok()
    frame.inner.get_by_role("radio", name="a whole job").check()
    work.zit("run", work.write(frame.text(), "job.yaml")).ok()
    (made,) = work.out.glob("*.safetensors")
    assert (work.folder / "output" / "files_merge" / "merged_files_merge_merged.safetensors").is_file()
    found = json.loads(work.zit("inspect", made, "--sources", *loras, "--json").ok())
    assert re.search(r"0\.25", json.dumps(found))


# --- a job of its own -----------------------------------------------------------------------------------------------------------


def after_training(work: Workspace, *steps: dict, **keys) -> Path:
    """The page of a job whose training is done."""
    for name in ("cat", "cat_000001000", "cat_000002000"):
        work.lora(f"output/cat/{name}.safetensors")
    section = work.section(*steps, **keys)
    del section["output_dir"]
    training = work.training(
        model={"name_or_path": "/models/zit", "arch": "zimage:turbo", "assistant_lora_path": "x/y/z.safetensors"},
        sample={"prompts": ["a cat", "a dog"], "seed": 7},
        trigger_word="cat",
    )
    work.zit("run", work.config(training, section)).ok()
    return work.folder / "output" / "cat" / "plugin.html"


def test_a_whole_job_names_files_by_their_paths_and_runs_without_the_training(work, loras, show):
    soft = {"name": "soft", "loras": [{"lora": "trained", "ratio": 0.9}, {"lora": "trained@1000", "ratio": 0.1}, STYLE]}
    ema = {"name": "ema", "checkpoints": {"last": 2}}
    both = {"name": "both", "loras": [{"lora": "soft", "ratio": 1}, {"lora": "ema", "ratio": 0.5}]}
    frame = show(after_training(work, soft, ema, both, rank="exact"))
    section = frame.text()
    frame.inner.get_by_role("radio", name="a whole job").check()
    assert frame.inner.get_by_label("A job that only merges").input_value() == frame.text() != section
    assert "MERGE button, above the files in Checkpoints, applies each strength twice" in frame.find("body").inner_text()
    frame.type("1. cat.safetensors", 0.25)
    (work.folder / "elsewhere").mkdir()
    job = work.write(frame.text(), "elsewhere/again.yaml")
    assert not frame.find(".yaml .warn li").count()
    config = yaml.safe_load(job.read_text())["config"]
    (process,) = config["process"]
    folder = work.folder / "output" / "cat"
    assert config["name"] == "cat_merge" and process["training_folder"] == str(work.folder / "output")
    assert process["model"] == {"name_or_path": "/models/zit", "arch": "zimage:turbo"} and process["trigger_word"] == "cat"
    assert process["sample"] == {"seed": 7, "samples": [{"prompt": "a cat"}, {"prompt": "a dog"}]}
    assert (process["datasets"], process["train"]) == ([], {"steps": 1}), "the UI's pages break without these"
    assert [[lora["lora"] for lora in step["loras"]] for step in process["steps"]] == [
        [str(folder / "cat.safetensors"), str(folder / "cat_000001000.safetensors"), str(work.folder / "style.safetensors")],
        ["soft", str(folder / "merged_cat_ema.safetensors")],
    ]
    assert process["steps"][0]["loras"][0]["ratio"] == 0.25
    work.zit("run", job).ok()
    frame.inner.get_by_role("radio", name="the section").check()
    assert frame.section() == yaml.safe_load(section)[0] | {"steps": frame.section()["steps"]}
    old = yaml.safe_load((work.folder / "config.yaml").read_text())["config"]["process"]
    work.zit("run", work.config(old[0], frame.section(), name="old.yaml")).ok()
    for step in ("soft", "both"):
        made = load_file(work.folder / "output" / "cat_merge" / f"merged_cat_merge_{step}.safetensors")
        as_before = load_file(folder / f"merged_cat_{step}.safetensors")
        assert made.keys() == as_before.keys() and all(made[key].equal(as_before[key]) for key in made)


def test_a_whole_job_says_which_files_it_can_not_name(work, loras, show):
    page = run(work, {"name": "soft", "loras": [FACE, STYLE], "preview": {"prompts": "prompts.txt"}})
    hidden = page.read_text("utf-8").replace(str(work.folder / "style.safetensors"), "style.safetensors")
    page.write_text(hidden, "utf-8")
    frame = show(page)
    assert not frame.find(".yaml .warn li").count()
    frame.inner.get_by_role("radio", name="a whole job").check()
    assert frame.find(".yaml .warn li").all_inner_texts() == [
        f"this page does not know where {name} is: write its whole path" for name in ("prompts.txt", "style.safetensors")
    ]
    frame.inner.get_by_role("radio", name="the section").check()
    assert frame.section()["steps"][0]["loras"][1]["lora"] == "style.safetensors"


@pytest.mark.parametrize(("status", "kind"), [("right", "good"), ("off", "warn"), ("empty", "warn")])
def test_the_colour_of_a_step_is_that_of_its_status(work, loras, show, status, kind):
    """Whatever the first word of the sentence is."""
    html = two(work).read_text(encoding="utf-8")
    assert html.count('"status":"right","judgement":"right:') == 2
    page = work.folder / "told.html"
    page.write_text(html.replace('"status":"right","judgement":"right:', f'"status":"{status}","judgement":"so:'), "utf-8")
    verdict = show(page).find("article").first.locator(".verdict")
    assert verdict.get_attribute("class") == f"verdict {kind}"
    assert verdict.inner_text() == status.capitalize() and "so:" in verdict.locator("xpath=..").inner_text()


def test_steps_that_are_off_or_empty_do_not_look_right(work, loras, show):
    me = {"lora": "me.safetensors", "ratio": 1}
    off = {"name": "off", "rank": 1, "loras": [me, {"lora": "style.safetensors", "ratio": 0.05}]}
    frame = show(run(work, {"name": "right", "loras": [me]}, off, {"name": "empty", "loras": [{**me, "ratio": 0}]}))
    verdicts = frame.find("article .verdict")
    assert verdicts.all_inner_texts() == ["Right", "Off", "Empty"]
    assert [verdicts.nth(n).get_attribute("class") for n in range(3)] == ["verdict good", "verdict warn", "verdict warn"]


def test_a_step_whose_file_says_nothing_of_its_check_has_no_verdict(work, loras, show):
    html, told = two(work).read_text(encoding="utf-8"), re.compile(r'"status":"right","judgement":"[^"]*"')
    page = work.folder / "untold.html"
    page.write_text(told.sub('"status":null,"judgement":null', html), "utf-8")
    frame = show(page)
    assert len(told.findall(html)) == frame.find("article").count() == 2
    assert frame.find(".verdict").count() == 0 and frame.find("article dl").count() == 2
