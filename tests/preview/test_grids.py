"""Which pictures a section asks for, what they are called, and what stands in their way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from preview.helpers import ME, MODEL, STYLE, planned, previewed, step
from screen import fits
from workspace import SMALL, Workspace

from extensions_built_in.zit_merge.errors import ZitMergeError
from extensions_built_in.zit_merge.preview.grids import preview_plan
from extensions_built_in.zit_merge.preview.plan import PreviewPlan, _distinct, specs_text
from extensions_built_in.zit_merge.preview.settings import ImageSpec

EXAMPLE = Path(__file__).parents[2] / "config" / "examples" / "ui_merge_job.yaml"
ONE, BOTH = {"prompts": ["a cat"]}, (ME, STYLE)


def variants(preview: PreviewPlan) -> list[tuple[str, list[str]]]:
    return [(e.kind, e.labels) for e in preview.grids]


def refused(work: Workspace, *steps: dict, **keys: Any) -> str:
    with pytest.raises(ZitMergeError) as caught:
        previewed(work, *steps, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_uis_example_fills_its_gallery_with_a_row_for_each_variant(work, loras):
    (raw,) = yaml.safe_load(EXAMPLE.read_text())["config"]["process"]
    for lora in (lora for asked in raw["steps"] for lora in asked["loras"]):
        lora["lora"] = Path(lora["lora"]).name
    found = previewed(
        work, *raw["steps"], **{k: v for k, v in raw.items() if k not in ("type", "steps", "device")}, shapes="free", preview=True
    )
    assert {len(grid.specs) for grid in found.grids} == {found.settings.row} == {3}


# --- variants -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compare", "labels"),
    [
        (None, ["base", "me.safetensors", "style.safetensors", "soft"]),
        (["base", "inputs", "result"], ["base", "me.safetensors", "style.safetensors", "soft"]),
        (["result"], ["soft"]),
        (["base"], ["base"]),
        (["result", "base", "result"], ["soft", "base"]),
        (["inputs"], ["me.safetensors", "style.safetensors"]),
    ],
    ids=str,
)
def test_what_is_compared(work, loras, compare, labels):
    asked = ONE | ({"compare": compare} if compare else {})
    assert variants(previewed(work, step(*BOTH, preview=asked))) == [("preview", labels)]


def test_an_input_that_stands_there_twice_is_shown_once(work, loras):
    assert variants(previewed(work, step(ME, ME | {"ratio": 0.1}, STYLE, preview=ONE)))[0][1] == [
        *("base", "me.safetensors", "style.safetensors", "soft")
    ]
    twice = previewed(work, step(STYLE, STYLE | {"alpha": 2}, preview=ONE))
    assert variants(twice)[0][1] == ["base", "style.safetensors", "style.safetensors (2)", "soft"], "read in another way"


def test_inputs_that_are_steps(work, loras):
    found = previewed(work, step(*BOTH, name="a"), step({"lora": "a", "ratio": 1.0}, ME, name="b", preview=ONE))
    assert variants(found) == [("preview", ["base", "a", "me.safetensors", "b"])]


def test_equal_pictures_of_several_steps_are_counted_once(work, loras):
    found = previewed(work, step(*BOTH, name="a"), step(STYLE, ME, name="b"), preview=ONE)
    assert len(found.pictures()) == 3 + 2 and [len(list(e.pictures())) for e in found.grids] == [4, 4]


def test_grids_in_the_order_of_steps(work, loras):
    steps = (
        step(ME, name="a", sweep={"ratio": [0.1, 0.2]}, ablate={"by": "components"}, preview=ONE),
        step(STYLE, name="b", preview=ONE),
    )
    found = previewed(work, *steps)
    assert [(e.plan.name, e.kind) for e in found.grids] == [
        ("a", "preview"),
        ("a", "sweep"),
        ("a", "ablate"),
        ("b", "preview"),
    ]
    assert [e.name for e in found.grids] == ["a_preview", "a_sweep", "a_ablate", "b_preview"]
    titles = ["a: previews", "a: ratio", "a: ablation by components, each part left out in turn", "b: previews"]
    assert [e.title for e in found.grids] == titles


def test_an_ablation_begins_with_the_base_and_the_whole(work, loras):
    (found,) = previewed(work, step(ME, ablate={"by": "layers", "groups": 2, "mode": "only"}, preview=False), preview=ONE).grids
    assert found.labels == ["base", "soft", "only layers 0-14", "only layers 15-29"]
    assert [g.name for g in found.groups] == ["layers 0-14", "layers 15-29"] and found.ablate.by == "layers"


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"by": "components", "groups": 3}, "ablate.groups: are runs of layers, by: components has none: drop groups"),
        ({"by": "layers", "metrics": ["pixels", "pixelz"]}, "ablate.metrics[1]: no such metric: 'pixelz' (did you mean pixels?)"),
    ],
)
def test_an_ablation_that_cant_be(work, loras, asked, says):
    assert refused(work, step(ME, ablate=asked), preview=ONE).startswith(f"process[0].steps[0].{says}")


@pytest.mark.parametrize(("count", "across"), [(1, 1), (3, 3), (8, 8), (9, 5), (10, 5), (17, 6), (30, 8)])
def test_variants_are_in_rows_of_about_one_length(work, loras, count, across):
    found = previewed(work, step(ME, sweep={"ratio": [n / 100 for n in range(count)]}, preview=False), preview=ONE)
    assert found.grids[0].across == across


def test_an_ablation_of_nothing(work, loras):
    message = refused(work, step(ME | {"ratio": 0}, ablate={"by": "layers"}), preview=ONE)
    assert message == "process[0].steps[0].ablate: every strength of the step is 0, so no part has an effect: drop ablate"


def test_two_ablations_of_one_preset(work, loras):
    one, two = {"by": "layers", "groups": 2, "preset": "mine"}, {"by": "layers", "groups": 3, "preset": "Mine"}
    message = refused(work, step(ME, name="a", ablate=one), step(ME, name="b", ablate=two), preview=ONE)
    assert message.startswith("process[0].steps[1].ablate.preset: Mine is also the name at process[0].steps[0].ablate.preset")


# --- what the section says ------------------------------------------------------------------------------------------------------


def test_a_section_shows_every_step_that_is_kept(work, loras):
    steps = (step(ME, name="a", keep=False), step({"lora": "a", "ratio": 1.0}, name="b"), step(STYLE, name="c", preview=False))
    assert [e.plan.name for e in previewed(work, *steps, preview=ONE).grids] == ["b"]
    steps[0]["preview"] = True
    assert [e.plan.name for e in previewed(work, *steps, preview=ONE).grids] == ["a", "b"]


@pytest.mark.parametrize("own", [{"preview": False}, {"keep": False}, {}], ids=str)
def test_what_the_section_says_of_pictures_holds_for_sweeps_and_ablations(work, loras, own):
    """Also on a step that is not to be compared."""
    asked = {"prompts": ["x"], "seed": [3, 4], "size": 64}
    sample = {"samples": [{"prompt": "of the training"}]}
    keys = {"sweep": {"ratio": [0.1, 0.2]}, "ablate": {"by": "layers", "groups": 1}}
    found = previewed(work, step(ME, **keys, **own), preview=asked, sample=sample)
    assert {e.kind for e in found.grids} == {"sweep", "ablate"} | ({"preview"} if not own else set())
    for grid in found.grids:
        assert grid.specs == (ImageSpec("x", 3, 64, 64), ImageSpec("x", 4, 64, 64))


def test_an_ablation_may_have_prompts_of_its_own(work, loras):
    own = {"by": "layers", "groups": 1, "prompts": ["y"]}
    preview, ablation = previewed(work, step(ME, ablate=own), preview={"prompts": ["x"], "size": 64, "seed": 5}).grids
    assert preview.specs == (ImageSpec("x", 5, 64, 64),) and ablation.specs == (ImageSpec("y", 5, 64, 64),)


@pytest.mark.parametrize(
    ("section", "own", "place"),
    [
        ({"preview": ONE | {"size": 100}}, {}, "process[0].preview.size: 100 x 100"),
        ({"preview": ONE}, {"preview": {"size": 100}}, "process[0].steps[0].preview.size: 100 x 100"),
        ({}, {"preview": ONE | {"size": 100}}, "process[0].steps[0].preview.size: 100 x 100"),
        ({}, {"preview": True}, "process[0].steps[0].preview.prompts: is missing"),
        ({"preview": True}, {}, "process[0].preview.prompts: is missing"),
        ({}, {"sweep": {"ratio": [1]}}, "process[0].steps[0].preview.prompts: is missing"),
        ({}, {"ablate": {"by": "layers"}}, "process[0].steps[0].preview.prompts: is missing"),
        ({"preview": {"size": 100}}, {"ablate": {"by": "layers", "prompts": ["x"]}, "preview": False}, "process[0].preview.size"),
        (
            {"preview": ONE},
            {"ablate": {"by": "layers", "prompts": "p.txt"}},
            "process[0].steps[0].ablate.prompts: p.txt does not",
        ),
        ({"preview": {"prompts": "p.txt"}}, {}, "process[0].preview.prompts: p.txt does not exist"),
        ({"preview": {"prompts": ["a --w x"]}}, {}, "process[0].preview.prompts: --w in the prompt"),
        ({}, {"ablate": {"by": "layers", "prompts": ["a --w x"]}}, "process[0].steps[0].ablate.prompts: --w in the prompt"),
    ],
    ids=str,
)
def test_trouble_is_told_where_it_was_written(work, loras, section, own, place):
    assert refused(work, step(ME, **own), **section).startswith(place)


# --- how many -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def whole(work: Workspace) -> Path:
    """me.safetensors with all layers."""
    work.shapes = SMALL
    return work.lora("me.safetensors")


def test_200_pictures_are_not_too_many(work, loras):
    prompts = [f"prompt {n}" for n in range(100)]
    assert len(previewed(work, step(ME, preview={"prompts": prompts, "compare": ["base", "result"]})).pictures()) == 200


@pytest.mark.parametrize(
    ("steps", "place"),
    [
        (
            [step(ME, preview={"prompts": [f"{n}" for n in range(67)]})],
            "process[0].steps[0].preview: these are 201 pictures, 3 x 67",
        ),
        (
            [
                step(ME, name="a", preview=ONE),
                step(ME, name="b", ablate={"by": "cells", "groups": 30}, preview=ONE),
            ],
            "process[0].steps[1].ablate: these are 244 pictures, 242 x 1 of them here",
        ),
    ],
)
def test_more_are_asked_about(work, whole, steps, place):
    message = refused(work, *steps)
    assert message.startswith(place) and "set confirm: true in preview if you want them all, or use fewer prompts" in message


@pytest.mark.parametrize(
    ("section", "own"),
    [({"confirm": True}, {}), ({}, {"preview": {"confirm": True}}), ({"confirm": True}, {"preview": False})],
    ids=str,
)
def test_whoever_confirms_gets_them_all(work, whole, section, own):
    prompts = {"prompts": [f"prompt {n}" for n in range(101)]}
    found = previewed(work, step(ME, sweep={"ratio": [0.1, 0.2]}, **own), preview=prompts | {"compare": ["base"]} | section)
    assert len(found.pictures()) >= 202
    found = previewed(work, step(ME, ablate={"by": "cells", "groups": 30, "confirm": True}), preview=ONE)
    assert len(found.pictures()) == 243


def test_steps_that_ask_for_none(work, loras):
    found = planned(work, step(ME))
    assert not found.section.wants_pictures
    with pytest.raises(
        ZitMergeError, match=r"^process\[0\]\.steps\[0\]: asks for no pictures: write preview: true, sweep or abl"
    ):
        preview_plan(found.section, found.context, found.plans)


@pytest.mark.parametrize(
    "own", [{"preview": ONE}, {"sweep": {"ratio": [1]}}, {"ablate": {"by": "layers"}}], ids=lambda own: next(iter(own))
)
def test_steps_that_ask_for_some(work, loras, own):
    assert planned(work, step(ME, name="a"), step(ME, **own)).section.wants_pictures


# --- words ----------------------------------------------------------------------------------------------------------------------


def test_the_plan_that_is_printed(work, loras):
    asked = {"prompts": ["a", "b"], "seed": [1, 2], "size": [64, 128], "steps": 3}
    found = previewed(work, step(*BOTH, preview=asked), step(ME, name="one", preview=ONE | {"compare": ["base"]}))
    assert found.text().splitlines() == [
        "pictures      17 with Tongyi-MAI/Z-Image-Turbo",
        "  soft: previews: 4 variants x 4 pictures, 64 x 128 pixels, 3 steps, guidance",
        "    1, seed 1, 2",
        "  one: previews: 1 variant x 1 picture, 1024 x 1024 pixels, 9 steps, guidance",
        "    1, seed 42",
    ]


def test_the_plan_fits_into_80_columns_whatever_names_there_are(work, loras, tmp_path):
    folder = tmp_path / ("猫" * 60)
    folder.mkdir()
    seeds = {"prompts": ["a"], "seed": list(range(150))}
    found = previewed(
        work, step(ME, name="n" * 150, preview=seeds | {"compare": ["base"]}), model=MODEL | {"name_or_path": str(folder)}
    )
    assert fits(found.text(), 79) and len(found.text().splitlines()) < 20
    assert "seed 0, 1, 2, 3, 4, ..., 149" in " ".join(found.text().split())


def test_settings_in_words():
    assert specs_text([ImageSpec("a")]) == "1024 x 1024 pixels, 9 steps, guidance 1, seed 42"
    specs = [ImageSpec("a", 1, 64, 128, 4, 2.5), ImageSpec("b", 2, 64, 64, 4, 1.0), ImageSpec("c", 1, 64, 64, 8, 1.0)]
    assert specs_text(specs) == "64 x 128, 64 x 64 pixels, 4, 8 steps, guidance 2.5, 1, seed 1, 2"


@pytest.mark.parametrize(
    ("prompts", "headings"),
    [
        (["a", "b"], ["a (seed 42)", "b (seed 42)"]),
        (["a", "a --seed 1"], ["a (seed 42)", "a (seed 1)"]),
        (
            ["a", "a --steps 3"],
            [f"a (1024 x 1024 pixels, {n} steps, guidance 1, seed 42)" for n in (9, 3)],
        ),
        (
            ["a", "a --n dark"],
            ["a (1024 x 1024 pixels, 9 steps, guidance 1, seed 42)", "a (1024 x 1024 pixels, 9 steps, guidance 1, seed 42) (2)"],
        ),
    ],
    ids=str,
)
def test_headings_tell_specs_apart(work, loras, prompts, headings):
    assert previewed(work, step(ME, preview={"prompts": prompts})).grids[0].headings == headings


def test_numbers_behind_names_are_no_names_of_others():
    assert _distinct(["a", "a", "a (2)", "b", "a"]) == ["a", "a (3)", "a (2)", "b", "a (4)"]


def test_before_a_training_the_pictures_are_counted(work, loras):
    """Of a LoRA that is not there yet, and of checkpoints to come."""
    trained = {"lora": "trained", "ratio": 0.9}
    steps = (
        step(trained, STYLE, preview=True, ablate={"by": "components"}, sweep={"loras[0].blocks.to_q": [0, 1]}),
        {"name": "ema", "checkpoints": {"last": 2}, "preview": True},
    )
    sample = {"samples": [{"prompt": "a"}, {"prompt": "b"}]}
    config = work.config(work.training(model=MODEL, sample=sample), work.section(*steps))
    told = " ".join(work.zit("check", config).ok().split())
    assert "soft: previews: 4 variants x 2 pictures" in told and "ema: previews: 4 variants x 2 pictures" in told
    assert "soft: ablation by components, each part left out in turn: 10 variants x 2 pictures" in told
    assert "soft: loras[0].blocks.to_q: 2 variants x 2 pictures" in told


def test_one_step_is_one():
    assert specs_text([ImageSpec("x", 3, 64, 64, 1)]) == "64 x 64 pixels, 1 step, guidance 1, seed 3"
