"""A section's pictures from beginning to end, with a renderer in the place of a model."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from preview.helpers import CPU, ME, MODEL, STYLE, FakeRenderer, Loader, Told, names, plain, planned, run, step
from workspace import Workspace

from extensions_built_in.zit_merge.errors import ZitMergeError
from extensions_built_in.zit_merge.preview.grids import preview_plan
from extensions_built_in.zit_merge.preview.image_store import ImageStore, image_store
from extensions_built_in.zit_merge.preview.metrics import pixels, tensor_of
from extensions_built_in.zit_merge.preview.plan import Picture, PreviewPlan
from extensions_built_in.zit_merge.preview.rendering import Workers
from extensions_built_in.zit_merge.preview.runner import on_page, render, render_section
from extensions_built_in.zit_merge.preview.variants import digest
from extensions_built_in.zit_merge.progress import SILENT
from extensions_built_in.zit_merge.report.page.run import RunPage, run_page

SAMPLES = {"samples": [{"prompt": "a cat"}, {"prompt": "a dog", "seed": 7}], "width": 64, "height": 64, "sample_steps": 2}
BOTH = (ME, STYLE)
SMALL = {"prompts": ["a cat", "a dog"], "size": 64}


def of(work: Workspace, *steps: dict, job: str = "cat", home: bool = True, **keys: Any) -> PreviewPlan:
    """What a job of one section shows; in a job's own folder unless `home` says otherwise."""
    own = {"training_folder": str(work.folder / "output"), "output_dir": None} if home else {}
    found = planned(work, *steps, job=job, **{"sample": SAMPLES} | own | keys)
    return preview_plan(found.section, found.context, found.plans)


def rendered(preview: PreviewPlan, load: Any = None, page: RunPage | None = None, **how: Any) -> list[str]:
    """Renders a preview and writes its grids. Returns what was told."""
    if page:
        how["on_grid"] = on_page(page, preview)
    return list(render(preview, CPU, load or Loader(), **how))


def store(preview: PreviewPlan) -> ImageStore:
    return image_store(preview.context, preview.settings.row)


def pictures(preview: PreviewPlan) -> list[str]:
    return names(store(preview).folder / "pictures")


def facts(preview: PreviewPlan, name: str) -> dict[str, Any]:
    return json.loads((store(preview).folder / f"{name}.json").read_text())


def everything(preview: PreviewPlan) -> dict[str, bytes]:
    """Every file in our folder, but for the times in the names of samples, and where the folder is."""
    folder = store(preview).folder
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "samples.json"}
    home = str(folder.parent.parent).encode()
    return {name: content if name.endswith(".png") else content.replace(home, b"HOME") for name, content in found.items()}


def samples(preview: PreviewPlan) -> list[Path]:
    return sorted(store(preview).samples.glob("*.png"))


# --- what is rendered ----------------------------------------------------------------------------------------------------------


def test_pictures_are_those_of_the_base_the_inputs_and_the_result(work, loras):
    preview, loader = of(work, step(*BOTH, preview=True)), Loader()
    rendered(preview, loader)
    specs = preview.grids[0].specs
    found = facts(preview, "soft_preview")
    assert [variant["label"] for variant in found["looks"]] == ["base", "me.safetensors", "style.safetensors", "soft"]
    done = run(planned(work, step(*BOTH)))
    files = [None, work.folder / "me.safetensors", work.folder / "style.safetensors", done[0].path]
    for variant, file in zip(found["looks"], files, strict=True):
        renderer = FakeRenderer(preview.settings)
        renderer.set_adapter(_file(file) if file else ())
        for spec, name in zip(specs, variant["pictures"], strict=True):
            ours = Image.open(store(preview).folder / name)
            assert ours.tobytes() == renderer.render(spec).tobytes(), (variant["label"], spec)


def _file(path: Path):
    from extensions_built_in.zit_merge.formats.reader import TensorReader, load_lora

    lora = load_lora(path)
    with TensorReader(lora) as reader:
        for module in lora:
            scale, delta = reader.delta(module)
            yield module, delta.times(scale)


def test_the_model_is_loaded_once_and_every_lora_put_on_it_once(work, loras):
    loader = Loader()
    rendered(of(work, step(*BOTH, preview=True)), loader)
    (renderer,) = loader.loaded
    assert renderer.adapters == 4 and len(renderer.pictures) == 8 and renderer.closed
    adapters = [adapter for adapter, _ in renderer.pictures]
    assert [adapters.index(a) for a in adapters] == [0, 0, 2, 2, 4, 4, 6, 6], "pictures of one LoRA follow each other"


def test_several_grids_load_one_model_and_render_no_picture_twice(work, loras):
    steps = (
        step(ME, preview=True, sweep={"ratio": [0.3, 0.8]}, ablate={"by": "layers", "groups": 2}),
        step(*BOTH, name="both", preview=True),
    )
    preview, loader = of(work, *steps), Loader()
    rendered(preview, loader)
    (renderer,) = loader.loaded
    assert len(set(renderer.pictures)) == len(renderer.pictures) == len(pictures(preview))
    # base, me, soft; 0.3; without either half of the layers; style, both: each on two specs
    assert len(pictures(preview)) == 2 * (3 + 1 + 2 + 2)


def test_a_model_is_not_loaded_where_all_pictures_are_there(work, loras):
    preview, loader = of(work, step(*BOTH, preview=True)), Loader()
    first = rendered(preview, loader)
    again = rendered(of(work, step(*BOTH, preview=True)), loader)
    assert len(loader.loaded) == 1
    assert first[0] == "8 pictures rendered, 0 of 8 reused" and again[0] == "0 pictures rendered, 8 of 8 reused"


@pytest.mark.parametrize("harm", ["deleted", "cut", "emptied", "replaced"])
def test_a_picture_that_is_harmed_is_rendered_again(work, loras, harm):
    preview, loader = of(work, step(*BOTH, preview=True)), Loader()
    rendered(preview)
    before = everything(preview)
    path = store(preview).folder / "pictures" / pictures(preview)[3]
    content = {"cut": path.read_bytes()[:-30], "emptied": b"", "replaced": b"GIF89a"}.get(harm)
    path.unlink() if content is None else path.write_bytes(content)
    assert rendered(preview, loader)[0] == "1 picture rendered, 7 of 8 reused"
    assert len(loader.pictures) == 1 and everything(preview) == before


def test_other_numbers_are_other_pictures_and_the_base_stays(work, loras):
    rendered(of(work, step(*BOTH, preview=True)))
    assert rendered(of(work, step(ME | {"ratio": 0.3}, STYLE, preview=True)))[0].startswith("2 pictures rendered, 6 of 8")
    assert rendered(of(work, step(*BOTH, preview={"seed": 1})))[0].startswith("8 pictures rendered, 0 of 8")
    assert rendered(of(work, step(*BOTH, preview={"prompts": ["a cat", "a fox"]})))[0].startswith("4 pictures rendered, 4 of 8")
    changed = MODEL | {"quantize": True}
    assert rendered(of(work, step(*BOTH, preview=True), model=changed))[0].startswith("8 pictures rendered, 0 of 8")


def test_other_names_are_the_same_pictures(work, loras):
    preview = of(work, step(*BOTH, preview=True), step({"lora": "soft", "ratio": 0.5}, name="b", preview=True))
    rendered(preview)
    (work.folder / "me.safetensors").rename(work.folder / "you.safetensors")
    you = ME | {"lora": "you.safetensors"}
    renamed = of(work, step(you, STYLE, name="c", preview=True), step({"lora": "c", "ratio": 0.5}, name="d", preview=True))
    assert rendered(renamed)[0] == "0 pictures rendered, 8 of 8 reused"


def test_whether_a_file_is_there_makes_no_difference(work, loras):
    steps = (step(*BOTH, rank=2, keep=False), step({"lora": "soft", "ratio": 0.5}, STYLE, name="b", preview=True, rank=3))
    preview = of(work, *steps)
    rendered(preview)
    before = everything(preview)
    for path in (store(preview).folder / "pictures").iterdir():
        path.unlink()
    config = work.folder / "config.json"
    work.zit("run", config).ok()
    rendered(of(work, *steps))
    assert everything(preview) == before


# --- stops and troubles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ZitMergeError])
@pytest.mark.parametrize("after", [1, 3, 8])
def test_a_stop_keeps_what_is_done_and_the_next_run_does_the_rest(work, loras, after, stop):
    preview, loader = of(work, step(*BOTH, preview=True)), Loader()

    def halt(label: str, done: int) -> None:
        if done == after:
            raise stop("stop")

    progress = Told(halt)
    with pytest.raises(stop):
        rendered(preview, loader, progress=progress)
    assert len(pictures(preview)) == after == len(loader.pictures) and loader.loaded[0].closed
    labels = ["base", "base", "me.safetensors", "me.safetensors", "style.safetensors", "style.safetensors", "soft", "soft"]
    assert progress.told == [("pictures", labels[n], n + 1, 8) for n in range(after)]
    assert rendered(preview, loader)[0] == f"{8 - after} picture{'s' * (after != 7)} rendered, {after} of 8 reused"
    assert len(loader.pictures) == 8 == len(set(loader.pictures))


class FailingRenderer(FakeRenderer):
    """Has no room for pictures of a dog."""

    def render(self, spec):
        if "dog" in spec.prompt:
            raise ZitMergeError("out of memory for 64 x 64 pixels: set low_vram: true")
        return super().render(spec)


def test_trouble_with_one_picture_is_told_and_the_others_stay(work, loras):
    preview, loader = of(work, step(*BOTH, preview=True)), Loader(FailingRenderer)
    with pytest.raises(ZitMergeError, match=r"^out of memory for 64 x 64 pixels: set low_vram: true$"):
        rendered(preview, loader)
    assert len(pictures(preview)) == 1 and loader.loaded[0].closed
    assert rendered(preview)[0] == "7 pictures rendered, 1 of 8 reused"


def test_grids_are_written_one_after_the_other(work, loras):
    """What is done can be looked at while the next one is rendered."""
    steps = (step(ME, preview=True), step(STYLE, name="b", preview=SMALL | {"prompts": ["a dog"]}))
    steps[0]["preview"] = SMALL | {"prompts": ["a cat"]}
    preview = of(work, *steps)
    with pytest.raises(ZitMergeError, match="out of memory"):
        rendered(preview, Loader(FailingRenderer))
    assert (store(preview).folder / "soft_preview.png").is_file()
    assert not (store(preview).folder / "b_preview.png").exists()


def test_a_reader_that_stops_stops_the_rendering(work, loras):
    loader = Loader()
    preview = of(work, step(*BOTH, preview=True), step(ME, name="b", preview=True))
    told = render(preview, CPU, loader)
    next(told)
    told.close()
    assert loader.loaded[0].closed and len(loader.pictures) == 8


def test_a_file_that_goes_while_the_pictures_are_rendered(work, loras):
    """Its hash is known, its numbers are not: a sentence."""
    preview = of(work, step(*BOTH, preview=True))

    def delete(label: str, done: int) -> None:
        (work.folder / "style.safetensors").unlink(missing_ok=True)

    with pytest.raises(ZitMergeError, match=r"style\.safetensors: there is no such file"):
        rendered(preview, progress=Told(delete))


def test_passes_over_modules_can_be_stopped(work, loras):
    def halt(label: str, done: int) -> None:
        if label != "pictures":
            raise KeyboardInterrupt

    preview = of(work, step(*BOTH, preview={"compare": ["result"]}, rank={"energy": 0.9}))
    with pytest.raises(KeyboardInterrupt):
        rendered(preview, progress=Told(halt))
    assert pictures(preview) == []
    preview = of(work, step(ME, ablate={"by": "components"}, preview=False))
    with pytest.raises(KeyboardInterrupt):
        rendered(preview, progress=Told(halt))
    assert pictures(preview) and not (store(preview).folder / "soft_ablate.json").exists(), "stopped while it measured"


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


def together(make: Any, loaders: Sequence[Loader], page: RunPage | None = None, **how: Any) -> list[Any]:
    """Runs a preview in as many threads as there are loaders. Returns what each told, or its error."""
    meeting, table = threading.Barrier(len(loaders)), [()] * len(loaders)
    told: list[Any] = [None] * len(loaders)

    def work(rank: int) -> None:
        try:
            workers = Pair(rank, meeting, table, len(loaders))
            told[rank] = rendered(make(), loaders[rank], page if rank == 0 else None, workers=workers, **how)
        except BaseException as e:
            told[rank] = e
            if not isinstance(e, ZitMergeError):
                meeting.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(loaders))]
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
def test_results_dont_depend_on_the_number_of_processes(work, loras, count, tmp_path):
    alone = of(work, *STEPS)
    rendered(alone)
    shared = of(work, *STEPS, training_folder=str(work.folder / "other"))
    loaders = [Loader() for _ in range(count)]
    told = together(lambda: shared, loaders)
    assert everything(shared) == everything(alone)
    assert told[1:] == [[]] * (count - 1), "only the main one tells"
    counts = [len(loader.pictures) for loader in loaders]
    assert sum(counts) == len(pictures(shared)) and max(counts) - min(counts) <= 1
    assert [len(loader.loaded) for loader in loaders] == [1] * count
    assert [p.read_bytes() for p in samples(shared)] == [p.read_bytes() for p in samples(alone)]


def test_more_processes_than_pictures(work, loras):
    preview, loaders = (
        of(work, step(ME, preview=SMALL | {"prompts": ["a"], "compare": ["result"]})),
        [Loader() for _ in range(3)],
    )
    told = together(lambda: preview, loaders)
    assert [len(loader.loaded) for loader in loaders] == [1, 0, 0] and told[0][0] == "1 picture rendered, 0 of 1 reused"
    assert together(lambda: preview, loaders)[0][0] == "0 pictures rendered, 1 of 1 reused"


def test_every_process_tells_how_far_it_is_with_its_own_part(work, loras):
    progress = Told()
    preview = of(work, step(*BOTH, preview=True))
    together(lambda: preview, [Loader(), Loader()], progress=progress)
    assert sorted((done, total) for _, _, done, total in progress.told) == [(n, 4) for n in (1, 1, 2, 2, 3, 3, 4, 4)]


def test_trouble_in_one_process_reaches_all(work, loras):
    preview = of(work, step(*BOTH, preview=True))
    loaders = [Loader(), Loader(FailingRenderer)]
    told = together(lambda: preview, loaders)
    assert [str(e) for e in told] == ["out of memory for 64 x 64 pixels: set low_vram: true"] * 2
    assert all(isinstance(e, ZitMergeError) for e in told)
    assert len(pictures(preview)) == 5, "the main one did its four, the other one"
    assert not (store(preview).folder / "soft_preview.png").exists()
    assert together(lambda: preview, [Loader(), Loader()])[0][0] == "3 pictures rendered, 5 of 8 reused"


# --- where it is shown ---------------------------------------------------------------------------------------------------------


def test_samples_in_full_rows_variant_by_variant(work, loras):
    preview = of(work, step(*BOTH, preview=True))
    rendered(preview)
    shown = samples(preview)
    found = facts(preview, "soft_preview")
    order = [name for variant in found["looks"] for name in variant["pictures"]]
    texts = [Image.open(store(preview).folder / name).text for name in order]
    assert [Image.open(p).text for p in shown] == texts and len({str(t) for t in texts}) == len(texts)
    assert [p.stem.split("__")[1] for p in shown] == [f"{0:09d}_{n % 2}" for n in range(8)]
    rendered(preview)
    assert samples(preview) == shown


def test_other_specs_than_the_samples_fill_rows_with_a_legend(work, loras, monkeypatch):
    from extensions_built_in.zit_merge.preview import sheet as module

    lines: list[str] = []
    monkeypatch.setattr(module, "legend", lambda title, rows, size: lines.extend([title, *rows]) or plain("black", size))
    preview = of(work, step(ME, preview={"prompts": ["a"], "seed": [1, 2, 3], "size": 64, "compare": ["base"]}))
    rendered(preview)
    assert len(samples(preview)) == 4
    assert lines == ["zit_merge: cat", "1. base: a (seed 1)", "2. base: a (seed 2)", "3. base: a (seed 3)"]


def test_pictures_that_are_measured_are_not_in_the_samples(work, loras):
    preview = of(work, step(ME, ablate={"by": "layers", "groups": 1, "preset": "mine"}))
    (text,) = [text for text in rendered(preview) if text.startswith("soft: ablation")]
    assert samples(preview) == []
    folder = store(preview).folder
    assert names(folder) == ["mine.yaml", "pictures", *(f"soft_ablate{end}" for end in (".json", ".png", "_chart.png"))]
    assert all(str(folder / name) in text for name in names(folder) if name != "pictures")
    assert f"to use the preset mine: preset: {folder / 'mine.yaml'}" in text
    measured = facts(preview, "soft_ablate")["ablation"]
    assert [group["name"] for group in measured["groups"]] == ["layers 0-29"]


def test_every_part_is_measured_on_its_own_pictures(work, loras):
    preview = of(work, step(ME, ablate={"by": "components", "metrics": ["pixels"]}))
    rendered(preview)
    found, folder = facts(preview, "soft_ablate"), store(preview).folder
    drawn = {
        variant["label"]: [tensor_of(Image.open(folder / name)) for name in variant["pictures"]] for variant in found["looks"]
    }
    assert len(found["ablation"]["groups"]) == 8
    for group in found["ablation"]["groups"]:
        without = [pixels(a, b) for a, b in zip(drawn[f"without {group['name']}"], drawn["soft"], strict=True)]
        whole = [pixels(a, b) for a, b in zip(drawn["base"], drawn["soft"], strict=True)]
        assert group["metrics"]["pixels"]["share"] == pytest.approx(sum(without) / sum(whole))


@pytest.mark.parametrize("words", [["check"], ["run", "--dry-run"], ["run"], ["preview", "--dry-run"]], ids=str)
def test_no_code_of_a_config_runs_before_pictures_are_rendered(work, loras, monkeypatch, words):
    monkeypatch.syspath_prepend(str(work.folder))
    (work.folder / "spy_package").mkdir()
    (work.folder / "spy_package" / "__init__.py").write_text("import pathlib\npathlib.Path('imported').touch()\n")
    (work.folder / "spy_package" / "metric.py").write_text("def far(p, r):\n    return 1.0\n")
    ablate = {"by": "components", "metrics": ["pixels", "spy_package.metric:far"]}
    command, *flags = words
    config = work.job(step(ME, ablate=ablate), model=MODEL, sample=SAMPLES)
    work.zit(command, config, *flags).ok()
    assert not Path("imported").exists()
    preview = of(work, step(ME, ablate=ablate))
    told = render(preview, CPU, Loader())
    assert next(told) == "importing spy_package.metric for metrics" and not Path("imported").exists()
    list(told)
    assert Path("imported").exists()
    for name in ("spy_package.metric", "spy_package"):
        del sys.modules[name]


def test_a_metric_that_can_not_be_imported_is_told_before_the_model_is_loaded(work, loras):
    loader = Loader()
    with pytest.raises(ZitMergeError, match=r"^process\[0\]\.steps\[0\]\.ablate\.metrics\[0\]: 'json:far': json has no far"):
        rendered(of(work, step(ME, ablate={"by": "components", "metrics": ["json:far"]})), loader)
    assert not loader.loaded and not store(of(work, step(ME, preview=True))).folder.exists()


def test_what_is_told_of_a_grid_says_where_it_lies(work, loras):
    preview = of(work, step(*BOTH, preview=True))
    told = rendered(preview)
    folder = store(preview).folder
    assert told[1] == "\n".join(
        ["soft: previews: 8 pictures", *(f"    {folder / f'soft_preview.{end}'}" for end in ("png", "json"))]
    )


def test_a_table_for_programs(work, loras):
    preview = of(work, step(ME, preview=True, sweep={"ratio": [0.2, 0.4], "blocks.to_q": [0, 1]}))
    rendered(preview)
    found = facts(preview, "soft_sweep")
    assert {key: found[key] for key in ("job", "step", "kind", "title")} == {
        "job": "cat",
        "step": "soft",
        "kind": "sweep",
        "title": "soft: ratio and blocks.to_q",
    }
    assert [spec["prompt"] for spec in found["shots"]] == ["a cat", "a dog"] and [s["seed"] for s in found["shots"]] == [42, 7]
    assert [variant["label"] for variant in found["looks"]][:2] == ["1: ratio 0.2, blocks.to_q 0", "2: ratio 0.4, blocks.to_q 0"]
    for variant in found["looks"]:
        assert all((store(preview).folder / name).is_file() for name in variant["pictures"])
        assert "type: zit_merge" in variant["section"] and variant["follows_from"]["steps"][0]["loras"][0]["strengths"]
    told = json.dumps([found["scene"], [variant["follows_from"] for variant in found["looks"]]])
    assert str(work.folder) not in told and "me.safetensors" not in told


def test_a_picture_knows_all_that_it_follows_from(work, loras):
    preview = of(work, step(ME, preview=True))
    rendered(preview)
    for name in pictures(preview):
        record = json.loads(Image.open(store(preview).folder / "pictures" / name).text["zit_merge"])
        assert set(record) == {"zit_merge", "scene", "look", "shot"} and str(work.folder) not in json.dumps(record)
        assert name == f"{digest(record)}.png"


def test_two_specs_that_differ_in_one_thing_only(work, loras):
    """They have headings of their own, on sheets and on the page."""
    prompts = ["a", "a --n dark", "a --n grey", "a --steps 3", "a --seed 5", "a --w 128"]
    preview = of(work, step(ME, preview={"prompts": prompts, "size": 64, "compare": ["base"]}))
    headings = preview.grids[0].headings
    assert len(set(headings)) == 6 == len(preview.grids[0].specs)
    page = begun(preview)
    rendered(preview, page=page)
    assert len(shown_on(page)["soft"][0]["pictures"]) == 6


def test_inputs_of_one_name(work, loras):
    (work.folder / "deep").mkdir()
    work.lora("deep/me.safetensors", seed=5)
    preview = of(work, step(ME, ME | {"lora": "deep/me.safetensors"}, name="base", preview=True))
    rendered(preview)
    assert [variant["label"] for variant in facts(preview, "base_preview")["looks"]] == [
        *("base", "me.safetensors", "me.safetensors (2)", "base (2)")
    ]


# --- the page ------------------------------------------------------------------------------------------------------------------


def begun(preview: PreviewPlan) -> RunPage:
    page = run_page(preview.context, [])
    page.begin(preview.context, {"type": "zit_merge", "steps": []}, 0)
    return page


def shown_on(page: RunPage) -> dict[str, list[dict[str, Any]]]:
    """Step -> its galleries on the page."""
    assert page.write().startswith("report:\n")
    block = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page.path.read_text(), re.DOTALL)[1]
    return {s["name"]: s["galleries"] for s in json.loads(block)["sections"][0]["steps"]}


def test_the_page_gets_every_grid(work, loras):
    steps = (
        step(*BOTH, preview=True, ablate={"by": "layers", "groups": 1, "preset": "mine"}),
        step(ME, name="b", sweep={"ratio": [0.2, 0.4, 0.6]}),
    )
    preview = of(work, *steps)
    page = begun(preview)
    rendered(preview, page=page)
    galleries = shown_on(page)
    previews, ablation = galleries["soft"]
    (sweep,) = galleries["b"]
    assert [g["title"] for g in (previews, ablation, sweep)] == [e.title for e in preview.grids]
    assert previews["columns"] == ["base", "me.safetensors", "style.safetensors", "soft"]
    assert previews["rows"] == ["a cat (seed 42)", "a dog (seed 7)"] and len(previews["pictures"]) == 8
    assert sweep["columns"] == ["1: ratio 0.2", "2: ratio 0.4", "3: ratio 0.6"]
    assert all("type: zit_merge" in text for text in sweep["texts"]) and len(sweep["texts"]) == 3
    assert [name for name, _ in ablation["measures"]["rows"]] == ["layers 0-29"]
    assert "mine:" in ablation["measures"]["preset"]
    assert "64 x 64 pixels, 2 steps" in previews["note"]


def test_the_page_of_two_processes_is_that_of_one(work, loras):
    alone, shared = of(work, *STEPS), of(work, *STEPS, training_folder=str(work.folder / "other"))
    one, two = begun(alone), begun(shared)
    rendered(alone, page=one)
    together(lambda: shared, [Loader(), Loader()], two)

    def plain_text(page: RunPage) -> str:
        told = json.dumps(shown_on(page))
        return told.replace(str(work.folder / "other"), str(work.folder / "output"))

    assert plain_text(one) == plain_text(two)


def section_rendered(work: Workspace, *steps: dict, load: Loader) -> tuple[list[str], PreviewPlan, RunPage]:
    """What is told of a section, up to what went wrong, which comes last."""
    own = {"training_folder": str(work.folder / "output"), "output_dir": None}
    found = planned(work, *steps, sample=SAMPLES, **own)
    preview = preview_plan(found.section, found.context, found.plans)
    page, told = begun(preview), []
    try:
        render_section(preview, found, page, told.append, SILENT, load)
    except ZitMergeError as e:
        told.append(str(e))
    return told, preview, page


def test_a_section_tells_what_was_rendered_and_then_where_the_page_is(work, loras):
    told, preview, page = section_rendered(work, step(ME, preview=True), step(STYLE, name="b", preview=True), load=Loader())
    assert [text.splitlines()[0] for text in told] == [
        *("6 pictures rendered, 0 of 6 reused", "soft: previews: 6 pictures"),
        *("4 pictures rendered, 2 of 6 reused", "b: previews: 6 pictures"),
        "report:",
    ]
    assert told[-1].endswith(str(page.path)) and page.path.is_file() and page.path.parent == store(preview).folder.parent


def test_a_section_that_fails_has_a_page_of_the_grids_that_are_done(work, loras):
    steps = [step(ME, preview=SMALL | {"prompts": ["a cat"]}), step(STYLE, name="b", preview=SMALL | {"prompts": ["a dog"]})]
    told, _, page = section_rendered(work, *steps, load=Loader(FailingRenderer))
    assert [text.splitlines()[0] for text in told[1:]] == [
        *("soft: previews: 3 pictures", "report:", "out of memory for 64 x 64 pixels: set low_vram: true")
    ]
    assert {name: len(galleries) for name, galleries in shown_on(page).items() if galleries} == {"soft": 1}


def test_a_section_that_fails_before_the_first_grid_leaves_an_older_page_as_it_is(work, loras):
    _, _, page = section_rendered(work, step(ME, preview=SMALL | {"prompts": ["a cat"]}), load=Loader())
    before = page.path.read_bytes()
    told, _, page = section_rendered(work, step(ME, preview=SMALL), load=Loader(FailingRenderer))
    assert told == ["out of memory for 64 x 64 pixels: set low_vram: true"] and page.path.read_bytes() == before


# --- pictures of several grids -------------------------------------------------------------------------------------------------


def test_equal_variants_of_a_sweep_are_rendered_once(work, loras):
    preview, loader = of(work, step(ME, sweep={"ratio": [0.2, 0.4, 0.2]})), Loader()
    told = rendered(preview, loader)
    assert told[0] == "4 pictures rendered, 0 of 4 reused" and len(loader.pictures) == 4
    variants = facts(preview, "soft_sweep")["looks"]
    assert variants[0]["pictures"] == variants[2]["pictures"] != variants[1]["pictures"]


def test_a_picture_is_one_variant_on_one_spec(work, loras):
    grid = of(work, step(*BOTH, preview=True)).grids[0]
    assert list(grid.pictures()) == [Picture(variant, spec) for variant in grid.variants for spec in grid.specs]
