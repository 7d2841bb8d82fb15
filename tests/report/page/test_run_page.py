"""Where a run's page lies, what it is told, and that nothing of it stops or spoils a merge."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from oracles import producers
from oracles.dense import read_deltas
from page_pictures import noisy
from workspace import FEW, SMALL, Workspace

from extensions_built_in.zit_merge import load_lora
from extensions_built_in.zit_merge.analysis.measure import measure
from extensions_built_in.zit_merge.files import atomic
from extensions_built_in.zit_merge.formats.reader import LoraFile
from extensions_built_in.zit_merge.model.zimage import MODULES
from extensions_built_in.zit_merge.report.page import render
from extensions_built_in.zit_merge.report.page.facts import files_facts
from extensions_built_in.zit_merge.report.page.files import section_of
from extensions_built_in.zit_merge.report.page.galleries import Gallery, Preview
from extensions_built_in.zit_merge.report.page.render import LIMIT, Page

ME, STYLE = {"lora": "me.safetensors", "ratio": 0.9}, {"lora": "style.safetensors", "ratio": 0.6}
BOTH = {"name": "soft", "loras": [ME, STYLE]}
pytestmark = pytest.mark.usefixtures("few")


def facts(path: Path) -> dict:
    """The JSON of a page."""
    (block,) = re.findall(r'<script type="application/json" id="facts">(.*?)</script>', path.read_text(encoding="utf-8"))
    return json.loads(block)


def steps(path: Path) -> list[dict]:
    return [step for section in facts(path)["sections"] for step in section["steps"]]


def trained(work: Workspace, **keys) -> Path:
    """The folder of a training that is done."""
    folder = work.folder / "output" / "cat"
    folder.mkdir(parents=True)
    work.lora("output/cat/cat.safetensors")
    return folder


def test_beside_the_output_of_a_job_without_training(work, loras):
    text = work.zit("run", work.job(BOTH)).ok()
    assert text.splitlines()[-2:] == ["report:", f"    {work.out / 'merged_cat.html'}"]
    assert [s["name"] for s in steps(work.out / "merged_cat.html")] == ["soft"]
    assert not list(work.out.glob("*.part"))


def test_in_the_folder_of_the_training_where_the_ui_looks(work, loras):
    folder = trained(work)
    section = work.section({"name": "soft", "loras": [{"lora": "trained", "ratio": 0.9}, STYLE]})
    section.pop("output_dir")
    work.zit("run", work.config(work.training(), section)).ok()
    assert sorted(p.name for p in folder.iterdir()) == ["cat.safetensors", "merged_cat_soft.safetensors", "plugin.html"]
    assert facts(folder / "plugin.html")["sections"][0]["place"] == "process[1]"


def test_with_an_output_dir_of_its_own_it_still_lies_where_the_ui_looks(work, loras):
    folder = trained(work)
    work.zit("run", work.config(work.training(), work.section(BOTH))).ok()
    assert (folder / "plugin.html").is_file() and not list(work.out.glob("*.html"))


def test_with_another_output_dir_on_the_command_line_it_goes_there(work, loras):
    folder = trained(work)
    work.zit("run", work.config(work.training(), work.section(BOTH)), "--output-dir", work.folder / "else").ok()
    assert (work.folder / "else" / "merged_cat.html").is_file() and not (folder / "plugin.html").exists()


def test_a_merge_only_job_of_the_ui_has_it_in_its_own_folder(work, loras):
    folder = work.folder / "output" / "cat"
    section = work.section(BOTH, training_folder=str(work.folder / "output"), sqlite_db_path="./aitk_db.db", device="cuda")
    section.pop("output_dir")
    work.zit("run", work.config(section)).ok()
    raw = facts(folder / "plugin.html")["sections"][0]["raw"]
    assert "sqlite_db_path" not in raw and "device" not in raw
    assert raw["training_folder"] == str(work.folder / "output")


def test_sections_of_one_job_share_a_page(work, loras):
    other = work.section({"name": "hard", "loras": [{**ME, "ratio": 2}]})
    work.zit("run", work.config(work.section(BOTH), other)).ok()
    sections = facts(work.out / "merged_cat.html")["sections"]
    assert [(s["place"], [step["name"] for step in s["steps"]]) for s in sections] == [
        ("process[0]", ["soft"]),
        ("process[1]", ["hard"]),
    ]


@pytest.mark.parametrize("job", ["plugin", "p*", "[p]lugin", "PLUGIN.html"])
def test_no_page_where_the_toolkit_would_take_it_for_a_checkpoint(work, loras, job):
    folder = work.folder / "output" / job
    folder.mkdir(parents=True)
    text = work.zit("run", work.config(work.training(), work.section(BOTH), job=job)).ok()
    assert f"no page: AI-Toolkit would take plugin.html for a checkpoint of {job}" in text
    assert list(folder.iterdir()) == [] and len(list(work.out.glob("*.safetensors"))) == 1


@pytest.mark.parametrize("content", ["", "<html>somebody else's, about zit_merge</html>", "zit_merge"])
def test_a_file_that_is_not_ours_stays(work, loras, content):
    folder = trained(work)
    (folder / "plugin.html").write_text(content)
    text = work.zit("run", work.config(work.training(), work.section(BOTH))).ok()
    assert "is not a page of zit_merge, so it stays" in text
    assert (folder / "plugin.html").read_text() == content


def test_an_older_page_is_replaced(work, loras):
    work.zit("run", work.job(BOTH)).ok()
    before = (work.out / "merged_cat.html").read_text()
    work.zit("run", work.job({**BOTH, "loras": [{**ME, "ratio": 0.2}]})).ok()
    assert (work.out / "merged_cat.html").read_text() != before
    assert steps(work.out / "merged_cat.html")[0]["inputs"][0]["ratio"] == 0.2


def test_trouble_with_the_page_stops_no_merge(work, loras, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(render.Page, "html", full)
    text = work.zit("run", work.job(BOTH)).ok()
    assert "no page: " in text and "no space left on the disk" in text
    assert work.files() == ["merged_cat_soft.safetensors"]


def test_a_page_that_fails_leaves_the_old_one_and_no_part(work, loras, monkeypatch):
    work.zit("run", work.job(BOTH)).ok()
    before = (work.out / "merged_cat.html").read_bytes()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "publish_file", stop)
    page = Page("cat")
    with pytest.raises(KeyboardInterrupt):
        page.write(work.out / "merged_cat.html")
    assert (work.out / "merged_cat.html").read_bytes() == before and not list(work.out.glob("*.part"))


def test_a_dry_run_and_merge_write_none(work, loras):
    work.zit("run", work.job(BOTH), "--dry-run").ok()
    work.zit("merge", *loras, "-o", "out.safetensors", "--ratio", 1, "--shapes", "free").ok()
    assert not list(work.folder.rglob("*.html"))


def test_what_a_kept_step_shows_is_what_a_made_one_showed(work, loras):
    """The second run reads again what the first had measured."""
    many = [BOTH, {"name": "cut", "rank": 1, "loras": [{"lora": "soft", "ratio": 0.5}, {**STYLE, "layers": {"0-4": 0}}]}]
    work.zit("run", work.job(*many)).ok()
    first = steps(work.out / "merged_cat.html")
    work.zit("run", work.job(*many)).ok()
    second = steps(work.out / "merged_cat.html")
    assert [s["made"] for s in first + second] == [True, True, False, False]
    for a, b in zip(first, second, strict=True):
        assert close(a["kept"], b["kept"]) and a["judgement"] == b["judgement"]
        for x, y in zip(a["inputs"], b["inputs"], strict=True):
            assert (x["asked"], x["got"]) == pytest.approx((y["asked"], y["got"]), rel=1e-3)
        assert close(a["details"]["energies"], b["details"]["energies"]) and close(a["details"]["result"], b["details"]["result"])
        assert [p[:2] for p in a["details"]["pairs"]] == [p[:2] for p in b["details"]["pairs"]]


def close(a, b) -> bool:
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == b if a is None or b is None else a == pytest.approx(b, rel=5e-3, abs=1e-12)


def test_inputs_that_are_weighed_to_nothing_still_have_their_energy(work, loras):
    """The composer can bring back what the run left out."""
    work.zit("run", work.job({"name": "soft", "loras": [ME, {**STYLE, "blocks": {"to_q": 0}}]})).ok()
    deltas = producers.PRODUCERS["musubi"].make(FEW, 3, 1, torch.bfloat16).deltas
    energies = dict(zip(MODULES, steps(work.out / "merged_cat.html")[0]["details"]["energies"][1], strict=True))
    wanted = {m: float(d.square().sum()) for m, d in deltas.items()}
    assert {m: e for m, e in energies.items() if e is not None} == pytest.approx(wanted, rel=1e-3)


def test_steps_that_are_not_kept_are_shown_while_they_are_there(work, loras):
    hidden = {"name": "base", "keep": False, "loras": [ME]}
    work.zit("run", work.job(hidden, {"name": "top", "loras": [{"lora": "base", "ratio": 1, "blocks": {"w1": 0}}, STYLE]})).ok()
    first, second = steps(work.out / "merged_cat.html")
    assert first["file"] is None and first["details"]["result"]
    assert second["details"]["energies"][0].count(None) == len(MODULES) - 24


def test_an_average_of_checkpoints_has_maps_but_no_weights_to_compose(work):
    folder = trained(work)
    for step in (1000, 2000):
        work.lora(f"output/cat/cat_{step:09d}.safetensors", seed=step)
    section = work.section({"name": "ema", "checkpoints": {"last": 3}})
    work.zit("run", work.config(work.training(), section)).ok()
    (step,) = steps(folder / "plugin.html")
    assert not step["composable"] and len(step["details"]["energies"]) == 3


def test_the_page_of_a_recipe_offers_a_section_that_is_none(work, loras):
    work.zit("run", work.job(BOTH)).ok()
    recipe = work.recipe(work.out / "merged_cat_soft.safetensors")
    work.zit("run", recipe, "--output-dir", work.folder / "again").ok()
    (page,) = (work.folder / "again").glob("*.html")
    raw = facts(page)["sections"][0]["raw"]
    assert not {"made_by", "job"} & set(raw) and "file" not in raw["steps"][0]
    assert not {"strengths", "unmatched"} & set(raw["steps"][0]["loras"][0])


def test_the_energies_of_files_at_hand(work, loras):
    found = files_facts(measure([load_lora(p) for p in loras]))
    for made, energies in zip((("ai-toolkit", 2, 0), ("musubi", 3, 1)), found["details"]["energies"], strict=True):
        deltas = producers.PRODUCERS[made[0]].make(FEW, *made[1:], torch.bfloat16).deltas
        wanted = {m: float(d.square().sum()) for m, d in deltas.items()}
        assert {m: e for m, e in zip(MODULES, energies, strict=True) if e is not None} == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(
    ("out", "words"), [("page.txt", "give it that ending"), ("mine.html", "is no page of zit_merge"), ("no/page.html", "")]
)
def test_where_inspect_writes_its_page(work, loras, out, words):
    (work.folder / "mine.html").write_text("mine")
    ran = work.zit("inspect", *loras, "--html", out)
    if words:
        assert words in ran.refused()
    else:
        assert ran.code == 0 and (work.folder / out).is_file()
    assert (work.folder / "mine.html").read_text() == "mine"


def test_inspect_html_and_sources_do_not_go_together(work, loras):
    assert "leave one of the two out" in work.zit("inspect", loras[0], "--sources", loras[1], "--html", "x.html").refused()


def test_the_policy_names_the_script_and_the_style_that_are_there(work, loras):
    work.zit("run", work.job(BOTH)).ok()
    html = (work.out / "merged_cat.html").read_text(encoding="utf-8")
    script, style = (re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL) for tag in ("script", "style"))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1].replace("&#x27;", "'")
    for inline in script + style:
        assert f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'" in policy
    assert len(script) == len(style) == 1 and "default-src 'none'" in policy and "unsafe" not in policy


def many(work: Workspace, count: int) -> list[LoraFile]:
    work.shapes = SMALL
    work.lora("one.safetensors")
    return [load_lora(work.folder / "one.safetensors")] * count


def test_a_page_stays_under_its_size_whatever_it_is_given(work):
    loras = many(work, 3)
    step = files_facts(measure(loras))
    noise = noisy(1, 96)
    page = Page("x" * 10_000)
    page.begin("", section_of(loras))
    for n in range(300):
        page.add({**step, "name": f"step {n}", "notes": ["note " * 100] * 30})
        previews = [Preview(str(row), "column", noise) for row in range(90 if n < 20 else 1)]
        page.show("", f"step {n}", Gallery("title", "note", previews))
    html = page.html()
    assert len(html.encode()) < LIMIT
    (block,) = re.findall(r'id="facts">(.*?)</script>', html)
    shown = json.loads(block)["sections"][0]["steps"]
    assert len(shown) == 300
    for step in shown:
        assert ("details" in step["left_out"]) == (step["details"] is None)
        assert step["galleries"] or "galleries" in step["left_out"]
        assert all(gallery["left_out"] == (gallery["pictures"] == []) for gallery in step["galleries"])


def test_large_steps_sections_and_words_stay_under_the_size_too(work):
    loras = many(work, 49)
    step = files_facts(measure(loras)) | {"details": files_facts(measure(loras[:3]))["details"]}  # left out first, however large
    wordy = [
        {**i, "triggers": ["\U0001f600" * 500] * 12, "weights": {**i["weights"], "overrides": [[m, 0.5] for m in range(276)]}}
        for i in step["inputs"]
    ]
    for raw, count, inputs in (
        (section_of(loras), 400, step["inputs"]),
        (section_of(loras), 8, wordy),
        ({**section_of(loras), "model": {"x": "\u4e00" * 2_000_000}}, 2, step["inputs"]),
    ):
        page = Page("x")
        page.begin("", raw)
        for n in range(count):
            page.add({**step, "name": f"step {n}", "inputs": inputs})
        html = page.html()
        assert len(html.encode()) < LIMIT
        (block,) = re.findall(r'id="facts">(.*?)</script>', html)
        assert json.loads(block)["sections"][0]["steps"]


def test_host_keys_that_are_no_json_stop_nothing(work, loras):
    text = work.zit(
        "run", work.job(BOTH, train={"lr": float("inf"), "wd": float("nan"), "seed": 10**30}, model={"day": "2026-01-01"})
    ).ok()
    assert "\nreport:\n" in text
    raw = facts(work.out / "merged_cat.html")["sections"][0]["raw"]
    assert raw["train"] == {"lr": "inf", "wd": "nan", "seed": str(10**30)}


def test_a_folder_that_only_the_command_line_named_is_in_the_section(work, loras):
    section = work.section(BOTH)
    del section["output_dir"]
    work.zit("run", work.config(section), "--output-dir", work.folder / "here").ok()
    assert facts(work.folder / "here" / "merged_cat.html")["sections"][0]["raw"]["output_dir"] == str(work.folder / "here")


def test_thousands_of_inputs_are_listed_as_far_as_there_is_room(work):
    loras = many(work, 70)
    step = files_facts(measure(loras))
    assert step["details"]["cosines"] is None and step["details"]["pairs"] == []
    page = Page("x")
    page.begin("", section_of(loras))
    page.add({**step, "inputs": [{**step["inputs"][0], "label": "y" * 300}] * 8000})
    assert len(page.html().encode()) < LIMIT


def test_the_result_of_a_run_is_the_file(work, loras):
    work.zit("run", work.job(BOTH, save={"dtype": "fp32"})).ok()
    (step,) = steps(work.out / "merged_cat.html")
    deltas = read_deltas(work.out / "merged_cat_soft.safetensors")
    found = {m: e for m, e in zip(MODULES, step["details"]["result"], strict=True) if e is not None}
    assert found == pytest.approx({m: float(d.square().sum()) for m, d in deltas.items()}, rel=1e-4)
    assert step["judgement"].startswith("right: ") and [i["got"] for i in step["inputs"]] == pytest.approx([0.9, 0.6], rel=1e-4)
