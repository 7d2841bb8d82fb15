"""What a studio measures, renders and writes is what a run of the same section does."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import yaml
from preview.helpers import CPU, ME, STYLE, FakeRenderer, Loader, planned, same, step
from studio.test_door import SETTING, ask, sentence

from extensions_built_in.zit_merge.formats.reader import load_lora
from extensions_built_in.zit_merge.merging.made import Hashes
from extensions_built_in.zit_merge.merging.readers import StepReaders
from extensions_built_in.zit_merge.studio.held import HeldReaders

SOFTER = {"ratio": 0.7, "blocks": {"to_q": 0.5}}
TIES = {**SETTING, "loras": [SOFTER, None], "method": "ties", "params": {"density": 0.5}, "rank": 2}


class Slow(FakeRenderer):
    """Takes steps, each when it may."""

    may, began = threading.Semaphore(0), threading.Event()

    @classmethod
    def hold(cls) -> None:
        """No step may be taken from now on."""
        cls.may, cls.began = threading.Semaphore(0), threading.Event()

    def render(self, spec):
        self.began.set()
        for _ in range(spec.steps):
            self.may.acquire()
            self.on_step()
        return super().render(spec)


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
    again = sentence(ask(two, "keep", {"setting": TIES, "name": "mine"}))
    assert again == "name: merged_cat_mine.safetensors is there already: choose another name"
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


def test_other_prompts_are_another_look(live):
    loader = Loader()
    one = live(load=loader)
    ask(one, "look", {"setting": SETTING})
    first = done(one, "looks")
    one.close()
    two = live(load=loader, preview={"prompts": ["a bird"], "size": [128, 128], "steps": 4})
    assert json.loads(ask(two, "look", {"setting": SETTING}).body)["id"] == first["id"] + 1
    assert done(two, "looks")["rows"] == ["a bird (seed 42)"]


def test_a_rank_that_weighs_by_the_base_is_a_rank(live):
    one = live()
    rank = {"energy": 0.9, "weigh": "base"}
    number = json.loads(ask(one, "measure", {"setting": {**SETTING, "rank": rank}}).body)["id"]
    found = until(one, lambda s: s["measure"]["id"] == number and s["measure"]["status"] == "failed")["measure"]
    assert found["error"].startswith("rank.weigh: needs the model"), "there is none here"


def rendering(live: Any) -> tuple[Any, Loader]:
    """A studio in the midst of its first picture, and what renders."""
    Slow.hold()
    loader = Loader(Slow)
    one = live(load=loader)
    ask(one, "look", {"setting": SETTING})
    assert Slow.began.wait(60)
    return one, loader


def test_a_look_can_be_cancelled_and_asked_for_again(live):
    one, loader = rendering(live)
    assert state(one)["looks"][0]["status"] == "running"
    assert ask(one, "cancel", {}).status == 200
    Slow.may.release(1000)
    assert done(one, "looks")["status"] == "cancelled" and loader.pictures == []
    ask(one, "look", {"setting": SETTING})
    assert done(one, "looks")["status"] == "done" and len(loader.pictures) == 8


def test_closing_drops_what_renders_and_keeps_what_was_promised(work, live):
    one, loader = rendering(live)
    ask(one, "keep", {"setting": SETTING, "name": "mine"})
    ask(one, "close", {})
    assert sentence(ask(one, "keep", {"setting": SETTING, "name": "late"})) == "the studio is closed"
    Slow.may.release(1000)
    one.close()
    assert loader.pictures == [] and len(list(work.folder.rglob("merged_cat_mine.safetensors"))) == 1


def test_a_file_and_the_next_look_come_before_base_and_inputs(live):
    one, loader = rendering(live)
    ask(one, "look", {"setting": TIES})
    ask(one, "keep", {"setting": SETTING, "name": "mine"})
    Slow.may.release(4)  # one picture
    assert done(one, "kept")["status"] == "done" and len(loader.pictures) == 1
    Slow.may.release(1000)
    assert done(one, "looks")["ready"] == [[True] * 4] * 2
    until(one, lambda s: s["looks"][0]["status"] == "done")
    order = [adapter for adapter, _ in loader.pictures]
    assert order[0] == order[1] != order[2] == order[3] and len(set(order)) == 5 and len(order) == 10


class Broken(FakeRenderer):
    """Fails as no renderer should."""

    def render(self, spec):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_what_a_library_raises_costs_one_look(live):
    one = live(load=Loader(Broken))
    ask(one, "look", {"setting": SETTING})
    look = done(one, "looks")
    assert look["status"] == "failed" and look["error"].startswith("RuntimeError: CUDA error: an illegal memory access")
    assert kept(one, SETTING, "mine")["status"] == "done"


def test_a_number_of_many_digits_is_no_layer(live):
    one = live()
    for key in ("9" * 5000, f"0-{'9' * 5000}"):
        layers = {**SETTING, "loras": [{"ratio": 1, "layers": {key: 1}}, None]}
        number = json.loads(ask(one, "measure", {"setting": layers}).body)["id"]
        assert (
            "not a layer" in until(one, lambda s, n=number: s["measure"]["id"] == n and s["measure"]["error"])["measure"]["error"]
        )


def test_a_strip_that_can_not_be_written_costs_nothing_else(work, live):
    one = live(load=Loader())
    (work.out / "merged_cat_previews" / "studio.json").mkdir(parents=True)
    ask(one, "look", {"setting": SETTING})
    look = done(one, "looks")
    assert look["status"] == "failed" and "studio.json" in look["error"] and look["ready"] == [[True] * 4] * 2
    assert kept(one, SETTING, "mine")["status"] == "done"


def test_what_can_not_be_shown_of_a_strip_stays_noted(work, live):
    one = live(load=Loader())
    ask(one, "look", {"setting": SETTING})
    done(one, "looks")
    one.close()
    (path,) = work.folder.rglob("studio.json")
    noted = json.loads(path.read_text())["looks"]
    path.write_text(json.dumps({"looks": [{"of": "another version"}, *noted]}))
    two = live(load=Loader())
    assert len(state(two)["looks"]) == 1
    ask(two, "look", {"setting": TIES})
    done(two, "looks")
    two.close()
    assert [look.get("of") for look in json.loads(path.read_text())["looks"]] == ["another version", None, None]
    path.write_text("{")
    live(load=Loader())
    assert (path.parent / "studio_old.json").read_text() == "{"


def test_drafts_have_the_sizes_of_their_rows(live):
    samples = {"samples": [{"prompt": "a cat", "width": 256, "height": 128}, {"prompt": "a dog", "width": 128, "height": 256}]}
    loader = Loader()
    one = live(load=loader, preview=None, sample=samples)
    ask(one, "look", {"setting": SETTING, "draft": True})
    done(one, "looks")
    assert {(spec.width, spec.height) for _, spec in loader.pictures} == {(128, 64), (64, 128)}


def test_a_step_that_is_not_kept_is_a_start(live):
    one = live({**step(ME, STYLE), "keep": False})
    facts = json.loads(one.html.split('id="facts">')[1].split("</script>")[0])
    (shown,) = facts["sections"][0]["steps"]
    assert shown["name"] == "soft" and shown["details"] and [i["ratio"] for i in shown["inputs"]] == [0.8, 0.5]
    assert kept(one, SETTING, "mine")["status"] == "done"


def test_what_was_composed_last_outlives_the_page(live):
    one = live()
    ask(one, "measure", {"setting": SETTING})
    start = {**SETTING, "loras": [None, None]}  # what a page asks for when it is opened
    ask(one, "measure", {"setting": start})
    assert state(one)["last"] == SETTING


def test_a_file_of_kept_steps_is_that_of_one_studio(work, live):
    one, two = live(), live()
    kept(one, SETTING, "mine")
    kept(two, TIES, "yours")
    files = sorted(work.folder.rglob("*_studio*.yaml"))
    names = [[s["name"] for s in yaml.safe_load(path.read_text("utf-8"))[0]["steps"]] for path in files]
    assert names == [["soft", "mine"], ["soft", "yours"]]


def test_factors_are_held_as_far_as_there_is_room(work):
    found = planned(work, step(ME, STYLE))
    plan = found.plans[0]
    with Hashes(plan.hashed) as hashes, StepReaders(hashes, CPU) as plain:
        for budget, is_held in ((0, False), (10**9, True)):
            with HeldReaders(hashes, CPU, budget) as readers:
                for i in plan.inputs:
                    assert readers.of_input(i) is readers.of_input(i), "opened once"
                    for module in i.known.ranks:
                        scale, delta = readers.of_input(i).delta(module)
                        wanted_scale, wanted = plain.of_input(i).delta(module)
                        assert scale == wanted_scale and same(delta, wanted)
                        assert (readers.of_input(i).delta(module)[1] is delta) == is_held
                assert (readers.left < budget) == is_held


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
