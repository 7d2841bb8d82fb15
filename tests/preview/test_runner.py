"""A section's pictures from beginning to end, with a painter in the place of a model."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from preview.staging import CPU, ME, MODEL, STYLE, Easel, Painter, names, plain, planned, run, step
from workspace import Workspace

from extensions_built_in.zit_merge.errors import ZitMergeError
from extensions_built_in.zit_merge.preview.grids import Picture, PreviewPlan, preview_plan
from extensions_built_in.zit_merge.preview.image_store import ImageStore, image_store
from extensions_built_in.zit_merge.preview.metrics import pixels, tensor_of
from extensions_built_in.zit_merge.preview.runner import PreviewRunner, Workers
from extensions_built_in.zit_merge.preview.show import show
from extensions_built_in.zit_merge.report.page.run import RunPage, run_page

SAMPLES = {"samples": [{"prompt": "a cat"}, {"prompt": "a dog", "seed": 7}], "width": 64, "height": 64, "sample_steps": 2}
BOTH = (ME, STYLE)
SMALL = {"prompts": ["a cat", "a dog"], "size": 64}


def of(work: Workspace, *steps: dict, job: str = "cat", home: bool = True, **keys: Any) -> PreviewPlan:
    """What a job of one section shows; in a job's own folder unless `home` says otherwise."""
    own = {"training_folder": str(work.folder / "output"), "output_dir": None} if home else {}
    found = planned(work, *steps, job=job, **{"sample": SAMPLES} | own | keys)
    return preview_plan(found.section, found.site, found.plans)


def rendered(exhibition: PreviewPlan, load: Any = None, page: RunPage | None = None, **how: Any) -> list[str]:
    """Shows an exhibition. Returns what was told."""
    return list(show(exhibition, CPU, load or Easel(), page, **{"tick": lambda *told: None} | how))


def gallery(exhibition: PreviewPlan) -> ImageStore:
    return image_store(exhibition.site, exhibition.scene.row)


def pictures(exhibition: PreviewPlan) -> list[str]:
    return names(gallery(exhibition).folder / "pictures")


def facts(exhibition: PreviewPlan, name: str) -> dict[str, Any]:
    return json.loads((gallery(exhibition).folder / f"{name}.json").read_text())


def everything(exhibition: PreviewPlan) -> dict[str, bytes]:
    """Every file in our folder, but for the times in the names of samples, and where the folder is."""
    folder = gallery(exhibition).folder
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "samples.json"}
    home = str(folder.parent.parent).encode()
    return {name: content if name.endswith(".png") else content.replace(home, b"HOME") for name, content in found.items()}


def samples(exhibition: PreviewPlan) -> list[Path]:
    return sorted(gallery(exhibition).samples.glob("*.png"))


# --- what is rendered ----------------------------------------------------------------------------------------------------------


def test_pictures_are_those_of_the_base_the_inputs_and_the_result(work, pair):
    exhibition, easel = of(work, step(*BOTH, preview=True)), Easel()
    rendered(exhibition, easel)
    shots = exhibition.exhibits[0].shots
    found = facts(exhibition, "soft_preview")
    assert [look["label"] for look in found["looks"]] == ["base", "me.safetensors", "style.safetensors", "soft"]
    done = run(planned(work, step(*BOTH)))
    files = [None, work.folder / "me.safetensors", work.folder / "style.safetensors", done[0].path]
    for look, file in zip(found["looks"], files, strict=True):
        painter = Painter(exhibition.scene)
        painter.set_adapter(_file(file) if file else ())
        for shot, name in zip(shots, look["pictures"], strict=True):
            ours = Image.open(gallery(exhibition).folder / name)
            assert ours.tobytes() == painter.render(shot).tobytes(), (look["label"], shot)


def _file(path: Path):
    from extensions_built_in.zit_merge.formats.reader import TensorReader, load_lora

    lora = load_lora(path)
    with TensorReader(lora) as reader:
        for module in lora:
            scale, delta = reader.delta(module)
            yield module, delta.times(scale)


def test_the_model_is_loaded_once_and_every_lora_put_on_it_once(work, pair):
    easel = Easel()
    rendered(of(work, step(*BOTH, preview=True)), easel)
    (painter,) = easel.loaded
    assert painter.worn == 4 and len(painter.painted) == 8 and painter.closed
    worn = [look for look, _ in painter.painted]
    assert [worn.index(look) for look in worn] == [0, 0, 2, 2, 4, 4, 6, 6], "pictures of one LoRA follow each other"


def test_several_exhibits_load_one_model_and_render_no_picture_twice(work, pair):
    steps = (
        step(ME, preview=True, sweep={"ratio": [0.3, 0.8]}, ablate={"by": "layers", "groups": 2}),
        step(*BOTH, name="both", preview=True),
    )
    exhibition, easel = of(work, *steps), Easel()
    rendered(exhibition, easel)
    (painter,) = easel.loaded
    assert len(set(painter.painted)) == len(painter.painted) == len(pictures(exhibition))
    # base, me, soft; 0.3; without either half of the layers; style, both: each on two shots
    assert len(pictures(exhibition)) == 2 * (3 + 1 + 2 + 2)


def test_a_model_is_not_loaded_where_all_pictures_are_there(work, pair):
    exhibition, easel = of(work, step(*BOTH, preview=True)), Easel()
    first = rendered(exhibition, easel)
    again = rendered(of(work, step(*BOTH, preview=True)), easel)
    assert len(easel.loaded) == 1
    assert first[0] == "8 pictures rendered, 0 of 8 were there" and again[0] == "0 pictures rendered, 8 of 8 were there"


@pytest.mark.parametrize("harm", ["deleted", "cut", "emptied", "replaced"])
def test_a_picture_that_is_harmed_is_rendered_again(work, pair, harm):
    exhibition, easel = of(work, step(*BOTH, preview=True)), Easel()
    rendered(exhibition)
    before = everything(exhibition)
    path = gallery(exhibition).folder / "pictures" / pictures(exhibition)[3]
    content = {"cut": path.read_bytes()[:-30], "emptied": b"", "replaced": b"GIF89a"}.get(harm)
    path.unlink() if content is None else path.write_bytes(content)
    assert rendered(exhibition, easel)[0] == "1 picture rendered, 7 of 8 were there"
    assert len(easel.painted) == 1 and everything(exhibition) == before


def test_other_numbers_are_other_pictures_and_the_base_stays(work, pair):
    rendered(of(work, step(*BOTH, preview=True)))
    assert rendered(of(work, step(ME | {"ratio": 0.3}, STYLE, preview=True)))[0].startswith("2 pictures rendered, 6 of 8")
    assert rendered(of(work, step(*BOTH, preview={"seed": 1})))[0].startswith("8 pictures rendered, 0 of 8")
    assert rendered(of(work, step(*BOTH, preview={"prompts": ["a cat", "a fox"]})))[0].startswith("4 pictures rendered, 4 of 8")
    changed = MODEL | {"quantize": True}
    assert rendered(of(work, step(*BOTH, preview=True), model=changed))[0].startswith("8 pictures rendered, 0 of 8")


def test_other_names_are_the_same_pictures(work, pair):
    exhibition = of(work, step(*BOTH, preview=True), step({"lora": "soft", "ratio": 0.5}, name="b", preview=True))
    rendered(exhibition)
    (work.folder / "me.safetensors").rename(work.folder / "you.safetensors")
    you = ME | {"lora": "you.safetensors"}
    renamed = of(work, step(you, STYLE, name="c", preview=True), step({"lora": "c", "ratio": 0.5}, name="d", preview=True))
    assert rendered(renamed)[0] == "0 pictures rendered, 8 of 8 were there"


def test_whether_a_file_is_there_makes_no_difference(work, pair):
    steps = (step(*BOTH, rank=2, keep=False), step({"lora": "soft", "ratio": 0.5}, STYLE, name="b", preview=True, rank=3))
    exhibition = of(work, *steps)
    rendered(exhibition)
    before = everything(exhibition)
    for path in (gallery(exhibition).folder / "pictures").iterdir():
        path.unlink()
    config = work.folder / "config.json"
    work.zit("run", config).ok()
    rendered(of(work, *steps))
    assert everything(exhibition) == before


# --- stops and troubles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ZitMergeError])
@pytest.mark.parametrize("after", [1, 3, 8])
def test_a_stop_keeps_what_is_done_and_the_next_run_does_the_rest(work, pair, after, stop):
    exhibition, easel, told = of(work, step(*BOTH, preview=True)), Easel(), []

    def tick(what: str, done: int, total: int) -> None:
        told.append((what, done, total))
        if done == after:
            raise stop("stop")

    with pytest.raises(stop):
        rendered(exhibition, easel, tick=tick)
    assert len(pictures(exhibition)) == after == len(easel.painted) and easel.loaded[0].closed
    labels = ["base", "base", "me.safetensors", "me.safetensors", "style.safetensors", "style.safetensors", "soft", "soft"]
    assert told == [(labels[n], n + 1, 8) for n in range(after)]
    assert rendered(exhibition, easel)[0] == f"{8 - after} picture{'s' * (after != 7)} rendered, {after} of 8 were there"
    assert len(easel.painted) == 8 == len(set(easel.painted))


class Clumsy(Painter):
    """Has no room for pictures of a dog."""

    def render(self, shot):
        if "dog" in shot.prompt:
            raise ZitMergeError("out of memory for 64 x 64 pixels: set low_vram: true")
        return super().render(shot)


def test_trouble_with_one_picture_is_told_and_the_others_stay(work, pair):
    exhibition, easel = of(work, step(*BOTH, preview=True)), Easel(Clumsy)
    with pytest.raises(ZitMergeError, match=r"^out of memory for 64 x 64 pixels: set low_vram: true$"):
        rendered(exhibition, easel)
    assert len(pictures(exhibition)) == 1 and easel.loaded[0].closed
    assert rendered(exhibition)[0] == "7 pictures rendered, 1 of 8 were there"


def test_exhibits_are_hung_one_after_the_other(work, pair):
    """What is done can be looked at while the next one is rendered."""
    steps = (step(ME, preview=True), step(STYLE, name="b", preview=SMALL | {"prompts": ["a dog"]}))
    steps[0]["preview"] = SMALL | {"prompts": ["a cat"]}
    exhibition = of(work, *steps)
    with pytest.raises(ZitMergeError, match="out of memory"):
        rendered(exhibition, Easel(Clumsy))
    assert (gallery(exhibition).folder / "soft_preview.png").is_file()
    assert not (gallery(exhibition).folder / "b_preview.png").exists()


def test_a_reader_that_stops_stops_the_rendering(work, pair):
    easel = Easel()
    told = show(of(work, step(*BOTH, preview=True), step(ME, name="b", preview=True)), CPU, easel, None, lambda *told: None)
    next(told)
    told.close()
    assert easel.loaded[0].closed and len(easel.painted) == 8


def test_a_file_that_goes_while_the_pictures_are_rendered(work, pair):
    """Its hash is known, its numbers are not: a sentence."""
    exhibition = of(work, step(*BOTH, preview=True))

    def tick(what: str, done: int, total: int) -> None:
        (work.folder / "style.safetensors").unlink(missing_ok=True)

    with pytest.raises(ZitMergeError, match=r"style\.safetensors: there is no such file"):
        rendered(exhibition, tick=tick)


def test_passes_over_modules_can_be_stopped(work, pair):
    def watched(modules):
        for module in modules:
            yield module
            raise KeyboardInterrupt

    exhibition = of(work, step(*BOTH, preview={"compare": ["result"]}, rank={"energy": 0.9}))
    with pytest.raises(KeyboardInterrupt):
        rendered(exhibition, watched=watched)
    exhibition = of(work, step(ME, ablate={"by": "components"}, preview=False))
    with pytest.raises(KeyboardInterrupt):
        rendered(exhibition, watched=watched)
    assert pictures(exhibition) and not (gallery(exhibition).folder / "soft_ablate.json").exists(), "stopped while it measured"


# --- several processes ---------------------------------------------------------------------------------------------------------


class Pair(Workers):
    """One of two threads that share the work as accelerate's processes do."""

    def __init__(self, rank: int, meeting: threading.Barrier, table: list[Sequence[str]], count: int = 2):
        self._rank, self._meeting, self._table, self._count = rank, meeting, table, count

    @property
    def is_main(self) -> bool:
        return self._rank == 0

    @property
    def is_alone(self) -> bool:
        return False

    def share(self, count: int) -> int:
        return -(-count // self._count)

    def mine(self, work: Sequence[Any]) -> Sequence[Any]:
        each, more = divmod(len(work), self._count)
        start = self._rank * each + min(self._rank, more)
        return work[start : start + each + (self._rank < more)]

    def gather(self, answers: Sequence[str]) -> list[str]:
        self._table[self._rank] = list(answers)
        self._meeting.wait(60)
        found = [answer for own in self._table for answer in own]
        self._meeting.wait(60)
        return found


def together(make: Any, easels: Sequence[Easel], page: RunPage | None = None, **how: Any) -> list[Any]:
    """Shows an exhibition in as many threads as there are easels. Returns what each told, or its error."""
    meeting, table = threading.Barrier(len(easels)), [()] * len(easels)
    told: list[Any] = [None] * len(easels)

    def work(rank: int) -> None:
        try:
            team = Pair(rank, meeting, table, len(easels))
            told[rank] = rendered(make(), easels[rank], page if rank == 0 else None, team=team, **how)
        except BaseException as e:
            told[rank] = e
            if not isinstance(e, ZitMergeError):
                meeting.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(easels))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


STEPS = (
    step(*BOTH, preview=True, rank={"energy": 0.9}),
    step({"lora": "soft", "ratio": 0.5}, STYLE, name="b", preview=True, sweep={"loras[0].ratio": [0.1, 0.5]}),
    step(ME, name="c", ablate={"by": "layers", "groups": 1, "preset": "mine"}, sweep={"ratio": [0.2]}),
)


@pytest.mark.parametrize("count", [2, 3])
def test_results_dont_depend_on_the_number_of_processes(work, pair, count, tmp_path):
    alone = of(work, *STEPS)
    rendered(alone)
    shared = of(work, *STEPS, training_folder=str(work.folder / "other"))
    easels = [Easel() for _ in range(count)]
    told = together(lambda: shared, easels)
    assert everything(shared) == everything(alone)
    assert told[1:] == [[]] * (count - 1), "only the main one tells"
    painted = [len(easel.painted) for easel in easels]
    assert sum(painted) == len(pictures(shared)) and max(painted) - min(painted) <= 1
    assert [len(easel.loaded) for easel in easels] == [1] * count
    assert [p.read_bytes() for p in samples(shared)] == [p.read_bytes() for p in samples(alone)]


def test_more_processes_than_pictures(work, pair):
    exhibition, easels = (
        of(work, step(ME, preview=SMALL | {"prompts": ["a"], "compare": ["result"]})),
        [Easel() for _ in range(3)],
    )
    told = together(lambda: exhibition, easels)
    assert [len(easel.loaded) for easel in easels] == [1, 0, 0] and told[0][0] == "1 picture rendered, 0 of 1 were there"
    assert together(lambda: exhibition, easels)[0][0] == "0 pictures rendered, 1 of 1 were there"


def test_every_process_tells_how_far_it_is_with_its_own_part(work, pair):
    told: list[tuple[int, int]] = []
    exhibition = of(work, step(*BOTH, preview=True))
    together(lambda: exhibition, [Easel(), Easel()], tick=lambda what, done, total: told.append((done, total)))
    assert sorted(told) == [(n, 4) for n in (1, 1, 2, 2, 3, 3, 4, 4)]


def test_trouble_in_one_process_reaches_all(work, pair):
    exhibition = of(work, step(*BOTH, preview=True))
    easels = [Easel(), Easel(Clumsy)]
    told = together(lambda: exhibition, easels)
    assert [str(e) for e in told] == ["out of memory for 64 x 64 pixels: set low_vram: true"] * 2
    assert all(isinstance(e, ZitMergeError) for e in told)
    assert len(pictures(exhibition)) == 5, "the main one did its four, the other one"
    assert not (gallery(exhibition).folder / "soft_preview.png").exists()
    assert together(lambda: exhibition, [Easel(), Easel()])[0][0] == "3 pictures rendered, 5 of 8 were there"


# --- where it is shown ---------------------------------------------------------------------------------------------------------


def test_samples_in_full_rows_look_by_look(work, pair):
    exhibition = of(work, step(*BOTH, preview=True))
    rendered(exhibition)
    shown = samples(exhibition)
    found = facts(exhibition, "soft_preview")
    order = [name for look in found["looks"] for name in look["pictures"]]
    assert [p.read_bytes() for p in shown] == [(gallery(exhibition).folder / name).read_bytes() for name in order]
    assert [p.stem.split("__")[1] for p in shown] == [f"{0:09d}_{n % 2}" for n in range(8)]
    rendered(exhibition)
    assert samples(exhibition) == shown


def test_other_shots_than_the_samples_fill_rows_with_a_legend(work, pair, monkeypatch):
    from extensions_built_in.zit_merge.preview import image_store as module

    lines: list[str] = []
    monkeypatch.setattr(module, "legend", lambda title, rows, size: lines.extend([title, *rows]) or plain("black", size))
    exhibition = of(work, step(ME, preview={"prompts": ["a"], "seed": [1, 2, 3], "size": 64, "compare": ["base"]}))
    rendered(exhibition)
    assert len(samples(exhibition)) == 4
    assert lines == ["zit_merge: cat", "1. base: a (seed 1)", "2. base: a (seed 2)", "3. base: a (seed 3)"]


def test_pictures_that_are_measured_are_not_in_the_samples(work, pair):
    exhibition = of(work, step(ME, ablate={"by": "layers", "groups": 1, "preset": "mine"}))
    (text,) = [text for text in rendered(exhibition) if text.startswith("soft: ablation")]
    assert samples(exhibition) == []
    folder = gallery(exhibition).folder
    assert names(folder) == ["mine.yaml", "pictures", *(f"soft_ablate{end}" for end in (".json", ".png", "_chart.png"))]
    assert all(str(folder / name) in text for name in names(folder) if name != "pictures")
    assert f"to use the preset mine: preset: {folder / 'mine.yaml'}" in text
    measured = facts(exhibition, "soft_ablate")["ablation"]
    assert [group["name"] for group in measured["groups"]] == ["layers 0-29"]


def test_every_part_is_measured_on_its_own_pictures(work, pair):
    exhibition = of(work, step(ME, ablate={"by": "components", "metrics": ["pixels"]}))
    rendered(exhibition)
    found, folder = facts(exhibition, "soft_ablate"), gallery(exhibition).folder
    drawn = {look["label"]: [tensor_of(Image.open(folder / name)) for name in look["pictures"]] for look in found["looks"]}
    assert len(found["ablation"]["groups"]) == 8
    for group in found["ablation"]["groups"]:
        without = [pixels(a, b) for a, b in zip(drawn[f"without {group['name']}"], drawn["soft"], strict=True)]
        whole = [pixels(a, b) for a, b in zip(drawn["base"], drawn["soft"], strict=True)]
        assert group["metrics"]["pixels"]["share"] == pytest.approx(sum(without) / sum(whole))


def test_what_is_told_of_an_exhibit_says_where_it_lies(work, pair):
    exhibition = of(work, step(*BOTH, preview=True))
    told = rendered(exhibition)
    folder = gallery(exhibition).folder
    assert told[1] == "\n".join(
        ["soft: previews: 8 pictures", *(f"    {folder / f'soft_preview.{end}'}" for end in ("png", "json"))]
    )


def test_a_table_for_programs(work, pair):
    exhibition = of(work, step(ME, preview=True, sweep={"ratio": [0.2, 0.4], "blocks.to_q": [0, 1]}))
    rendered(exhibition)
    found = facts(exhibition, "soft_sweep")
    assert {key: found[key] for key in ("job", "step", "kind", "title")} == {
        "job": "cat",
        "step": "soft",
        "kind": "sweep",
        "title": "soft: ratio and blocks.to_q",
    }
    assert [shot["prompt"] for shot in found["shots"]] == ["a cat", "a dog"] and [s["seed"] for s in found["shots"]] == [42, 7]
    assert [look["label"] for look in found["looks"]][:2] == ["1: ratio 0.2, blocks.to_q 0", "2: ratio 0.4, blocks.to_q 0"]
    for look in found["looks"]:
        assert all((gallery(exhibition).folder / name).is_file() for name in look["pictures"])
        assert "type: zit_merge" in look["section"] and look["follows_from"]["steps"][0]["loras"][0]["strengths"]
    told = json.dumps([found["scene"], [look["follows_from"] for look in found["looks"]]])
    assert str(work.folder) not in told and "me.safetensors" not in told


def test_a_picture_knows_all_that_it_follows_from(work, pair):
    exhibition = of(work, step(ME, preview=True))
    rendered(exhibition)
    for name in pictures(exhibition):
        record = json.loads(Image.open(gallery(exhibition).folder / "pictures" / name).text["zit_merge"])
        assert set(record) == {"zit_merge", "scene", "look", "shot"} and str(work.folder) not in json.dumps(record)


def test_two_shots_that_differ_in_one_thing_only(work, pair):
    """They have headings of their own, on sheets and on the page."""
    prompts = ["a", "a --n dark", "a --n grey", "a --steps 3", "a --seed 5", "a --w 128"]
    exhibition = of(work, step(ME, preview={"prompts": prompts, "size": 64, "compare": ["base"]}))
    headings = exhibition.exhibits[0].headings
    assert len(set(headings)) == 6 == len(exhibition.exhibits[0].shots)
    page = begun(exhibition)
    rendered(exhibition, page=page)
    assert len(shown_on(page)["soft"][0]["pictures"]) == 6


def test_inputs_of_one_name(work, loras):
    (work.folder / "deep").mkdir()
    work.lora("deep/me.safetensors", seed=5)
    exhibition = of(work, step(ME, ME | {"lora": "deep/me.safetensors"}, name="base", preview=True))
    rendered(exhibition)
    assert [look["label"] for look in facts(exhibition, "base_preview")["looks"]] == [
        *("base", "me.safetensors", "me.safetensors (2)", "base (2)")
    ]


# --- the page ------------------------------------------------------------------------------------------------------------------


def begun(exhibition: PreviewPlan) -> RunPage:
    page = run_page(exhibition.site, [])
    page.begin(exhibition.site, {"type": "zit_merge", "steps": []}, 0)
    return page


def shown_on(page: RunPage) -> dict[str, list[dict[str, Any]]]:
    """Step -> its galleries on the page."""
    assert page.write().startswith("page to look at")
    block = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page.path.read_text(), re.DOTALL)[1]
    return {s["name"]: s["galleries"] for s in json.loads(block)["sections"][0]["steps"]}


def test_the_page_gets_every_exhibit(work, pair):
    steps = (
        step(*BOTH, preview=True, ablate={"by": "layers", "groups": 1, "preset": "mine"}),
        step(ME, name="b", sweep={"ratio": [0.2, 0.4, 0.6]}),
    )
    exhibition = of(work, *steps)
    page = begun(exhibition)
    rendered(exhibition, page=page)
    galleries = shown_on(page)
    previews, ablation = galleries["soft"]
    (sweep,) = galleries["b"]
    assert [g["title"] for g in (previews, ablation, sweep)] == [e.title for e in exhibition.exhibits]
    assert previews["columns"] == ["base", "me.safetensors", "style.safetensors", "soft"]
    assert previews["rows"] == ["a cat (seed 42)", "a dog (seed 7)"] and len(previews["pictures"]) == 8
    assert sweep["columns"] == ["1: ratio 0.2", "2: ratio 0.4", "3: ratio 0.6"]
    assert all("type: zit_merge" in text for text in sweep["texts"]) and len(sweep["texts"]) == 3
    assert [name for name, _ in ablation["measures"]["rows"]] == ["layers 0-29"]
    assert "mine:" in ablation["measures"]["preset"]
    assert "64 x 64 pixels, 2 steps" in previews["note"]


def test_the_page_of_two_processes_is_that_of_one(work, pair):
    alone, shared = of(work, *STEPS), of(work, *STEPS, training_folder=str(work.folder / "other"))
    one, two = begun(alone), begun(shared)
    rendered(alone, page=one)
    together(lambda: shared, [Easel(), Easel()], two)

    def plain_text(page: RunPage) -> str:
        told = json.dumps(shown_on(page))
        return told.replace(str(work.folder / "other"), str(work.folder / "output"))

    assert plain_text(one) == plain_text(two)


# --- the studio ----------------------------------------------------------------------------------------------------------------


def test_a_studio_asks_the_gallery_before_it_renders(work, pair):
    exhibition, easel = of(work, step(*BOTH, preview=True)), Easel()
    with PreviewRunner(exhibition, gallery(exhibition), CPU, easel, lambda *told: None) as studio:
        every = exhibition.pictures()
        assert studio.missing([*every, *every]) == every
        assert studio.render(every[:3]) == 3 and studio.render(every[:3]) == 0
        assert studio.missing(every) == every[3:] and not easel.loaded[0].closed
        assert {studio.digests[p] for p in every[:3]} == {name.removesuffix(".png") for name in pictures(exhibition)}
    assert easel.loaded[0].closed


def test_equal_looks_of_a_sweep_are_rendered_once(work, pair):
    exhibition, easel = of(work, step(ME, sweep={"ratio": [0.2, 0.4, 0.2]})), Easel()
    told = rendered(exhibition, easel)
    assert told[0] == "4 pictures rendered, 0 of 4 were there" and len(easel.painted) == 4
    looks = facts(exhibition, "soft_sweep")["looks"]
    assert looks[0]["pictures"] == looks[2]["pictures"] != looks[1]["pictures"]


def test_a_picture_is_one_look_on_one_shot(work, pair):
    exhibit = of(work, step(*BOTH, preview=True)).exhibits[0]
    assert list(exhibit.pictures()) == [Picture(look, shot) for look in exhibit.looks for shot in exhibit.shots]
