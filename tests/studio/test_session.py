"""What a studio measures, renders and writes is what a run of the same section does."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import yaml
from preview.helpers import ME, STYLE, FakeRenderer, Loader, step
from studio.test_door import SETTING, ask, sentence

from extensions_built_in.zit_merge.formats.reader import load_lora

SOFTER = {"ratio": 0.7, "blocks": {"to_q": 0.5}}
TIES = {**SETTING, "loras": [SOFTER, None], "method": "ties", "params": {"density": 0.5}, "rank": 2}


def state(live: Any) -> Mapping[str, Any]:
    return json.loads(ask(live, "state", {"seen": 0}).body)


def until(live: Any, is_so: Callable[[Mapping[str, Any]], bool]) -> Mapping[str, Any]:
    """The first state of which this is so."""
    while not is_so(found := state(live)):
        pass
    return found


def done(live: Any, what: str) -> Mapping[str, Any]:
    """The last look or kept step, when it is over."""
    return until(live, lambda s: s[what] and s[what][-1]["status"] not in ("waiting", "running"))[what][-1]


def kept(live: Any, setting: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    assert ask(live, "keep", {"setting": setting, "name": name}).status == 200
    return done(live, "kept")


@pytest.mark.parametrize("setting", [SETTING, TIES, {**TIES, "method": "tsv", "params": {}, "rank": {"energy": 0.9}}])
def test_a_kept_file_is_what_a_run_of_the_shown_section_makes(work, live, setting):
    one = live()
    made = kept(one, setting, "mine")
    assert (made["status"], made["error"], made["file"]) == ("done", "", "merged_cat_mine.safetensors")
    path = work.folder / "out" / made["file"]
    if not path.exists():
        (path,) = work.folder.rglob(made["file"])
    content = path.read_bytes()
    measure = json.loads(ask(one, "measure", {"setting": setting}).body)["id"]
    found = until(one, lambda s: s["measure"]["id"] == measure and s["measure"]["found"])["measure"]["found"]
    verdict = load_lora(path).verdict
    assert found["got"] == pytest.approx(verdict.got, abs=1e-4), "measured is what was written, in four digits"
    assert found["status"] == verdict.status == made["verdict"]
    one.close()
    (kept_file,) = path.parent.glob("*_studio.yaml")
    (section,) = yaml.safe_load(kept_file.read_text("utf-8"))
    assert [s["name"] for s in section["steps"]] == ["soft", "mine"]
    config = work.config(section, job="cat", name="again.json")
    assert "kept merged_cat_mine.safetensors" in work.zit("run", config).ok().replace("\n", " ")
    path.unlink()
    work.zit("run", config).ok()
    assert path.read_bytes() == content


def test_what_was_kept_is_never_replaced(work, live):
    one = live()
    first = kept(one, SETTING, "mine")
    assert sentence(ask(one, "keep", {"setting": TIES, "name": "Mine"})).startswith("name: there is a step Mine already")
    one.close()
    (path,) = work.folder.rglob(first["file"])
    content = path.read_bytes()
    two = live()
    again = kept(two, TIES, "mine")
    assert again["status"] == "failed" and again["error"].startswith("name: merged_cat_mine.safetensors is there already")
    other = kept(two, TIES, "other")
    assert other["status"] == "done" and path.read_bytes() == content
    assert sorted(p.name for p in path.parent.glob("*_studio*.yaml")) == ["merged_cat_studio.yaml", "merged_cat_studio_2.yaml"]


def test_an_older_measure_is_dropped(live):
    one = live()
    last = 0
    for n in range(20):
        last = json.loads(ask(one, "measure", {"setting": {**SETTING, "loras": [{"ratio": n / 10}, None]}}).body)["id"]
    found = until(one, lambda s: s["measure"]["status"] == "done")
    assert found["measure"]["id"] == last and found["last"]["loras"][0] == {"ratio": 1.9}
    assert round(found["measure"]["found"]["asked"][0], 4) == 1.9


def test_a_look_is_rendered_once_for_the_same_weights(work, live):
    loader = Loader()
    one = live(load=loader)
    first = json.loads(ask(one, "look", {"setting": SETTING}).body)["id"]
    look = done(one, "looks")
    assert [c["kind"] for c in look["columns"]] == ["base", "input", "input", "look"] and look["status"] == "done"
    assert look["ready"] == [[True] * 4] * 2 and len(loader.pictures) == 8
    assert json.loads(ask(one, "look", {"setting": SETTING}).body)["id"] == first
    spelled = {**SETTING, "loras": [{"ratio": 0.5, "blocks": {"to_q": 1}}, {"ratio": 0.5}]}  # the same weights
    assert json.loads(ask(one, "look", {"setting": spelled}).body)["id"] == first + 1
    assert done(one, "looks")["status"] == "done" and len(loader.pictures) == 8
    ask(one, "look", {"setting": TIES})
    assert done(one, "looks")["status"] == "done" and len(loader.pictures) == 10, "its own two alone"
    ask(one, "look", {"setting": TIES, "draft": True})
    draft = done(one, "looks")
    assert draft["label"].endswith(", draft") and {(s.width, s.steps) for _, s in loader.pictures[-8:]} == {(64, 2)}
    assert len(loader.loaded) == 1, "the model stays"
    picture = json.loads(ask(one, "picture", {"look": first, "row": 1, "column": 3, "edge": 192}).body)["image"]
    assert picture.startswith("data:image/jpeg;base64,")
    one.close()
    assert loader.loaded[0].closed


def test_the_strip_is_there_after_a_restart(live):
    loader = Loader()
    one = live(load=loader)
    ask(one, "look", {"setting": SETTING})
    look = done(one, "looks")
    assert ask(one, "favourite", {"look": look["id"], "on": True}).status == 200
    one.close()
    two = live(load=loader)
    (again,) = state(two)["looks"]
    assert again == look | {"favourite": True}
    assert json.loads(ask(two, "look", {"setting": SETTING}).body)["id"] == look["id"] and len(loader.loaded) == 1


class Slow(FakeRenderer):
    """Takes steps, each when it may."""

    may, began = threading.Semaphore(0), threading.Event()

    def render(self, spec):
        self.began.set()
        for _ in range(spec.steps):
            self.may.acquire()
            self.on_step()
        return super().render(spec)


def test_a_look_can_be_cancelled_and_asked_for_again(live):
    loader = Loader(Slow)
    one = live(load=loader)
    ask(one, "look", {"setting": SETTING})
    assert Slow.began.wait(60)
    assert state(one)["looks"][0]["status"] == "running"
    assert ask(one, "cancel", {}).status == 200
    Slow.may.release(1000)
    assert done(one, "looks")["status"] == "cancelled" and loader.pictures == []
    ask(one, "look", {"setting": SETTING})
    assert done(one, "looks")["status"] == "done" and len(loader.pictures) == 8


def test_without_pictures_the_rest_works(live):
    one = live(why_not="there is no model")
    assert sentence(ask(one, "look", {"setting": SETTING})) == "there is no model"
    assert kept(one, SETTING, "mine")["status"] == "done"


def test_a_step_of_an_earlier_step(work, live):
    soft = step(ME, STYLE)
    both = step({"lora": "soft", "ratio": 0.5}, STYLE, name="both")
    one = live(soft, both)
    setting = {**SETTING, "step": "both", "loras": [{"ratio": 2}, {"ratio": 1}]}
    assert kept(one, setting, "more")["status"] == "done"
    hidden = {**soft, "keep": False}
    one.close()
    two = live(hidden, both | {"name": "two"})
    assert kept(two, {**setting, "step": "two"}, "much")["status"] == "done"


def test_a_changed_input_is_told(work, live):
    one = live()
    work.lora("me.safetensors", seed=9)
    made = kept(one, SETTING, "mine")
    assert made["status"] == "failed" and "me.safetensors: was changed since the studio opened" in made["error"]
    assert not list(work.folder.rglob("*mine*"))
