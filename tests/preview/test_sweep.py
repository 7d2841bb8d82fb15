"""Sweeps: which keys may be gone through, what the cells are, and that a cell's section makes what its picture shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from preview.helpers import ME, STYLE, changes, planned, previewed, same, step
from workspace import Workspace

from extensions_built_in.zit_merge.config.job import load_job
from extensions_built_in.zit_merge.errors import ZitMergeError, joined
from extensions_built_in.zit_merge.formats.reader import TensorReader, load_lora
from extensions_built_in.zit_merge.planning.job import plan_job
from extensions_built_in.zit_merge.planning.types import StepPlan
from extensions_built_in.zit_merge.preview import grids
from extensions_built_in.zit_merge.preview.plan import ImageGrid, PreviewPlan
from extensions_built_in.zit_merge.preview.section_yaml import section_yaml

PLACE = "process[0].steps[0].sweep"
ONE = {"prompts": ["a cat"]}
BOTH = (ME, STYLE)


def preview_of(
    work: Workspace, *loras: dict, sweep: dict, before: tuple = (), section: dict | None = None, **keys: Any
) -> PreviewPlan:
    return previewed(work, *before, step(*loras, sweep=sweep, **keys), **{"preview": ONE} | (section or {}))


def swept(work: Workspace, *loras: dict, **keys: Any) -> ImageGrid:
    """The grid of a sweep."""
    (found,) = [e for e in preview_of(work, *loras, **keys).grids if e.kind == "sweep"]
    return found


def refused(work: Workspace, *loras: dict, **keys: Any) -> str:
    with pytest.raises(ZitMergeError) as caught:
        swept(work, *loras, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def settled(plan: StepPlan) -> tuple:
    """The strengths of every LoRA of a step, and what follows from them."""
    return [dict(i.strengths) for i in plan.inputs], plan.ranks, plan.stacked, plan.shapes


# --- keys ----------------------------------------------------------------------------------------------------------------------

Q, Q0 = "layers.3.attention.to_q", "noise_refiner.0.attention.to_q"
KEYS = [  # key, value, the same as it stands in a step
    ("ratio", 0.3, {"ratio": 0.3}),
    ("ratio", 0, {"ratio": 0}),
    ("ratio", -1.5, {"ratio": -1.5}),
    ("blocks.to_v", 0.5, {"blocks": {"to_v": 0.5}}),
    ("blocks.adaLN", 0.5, {"blocks": {"adaLN_modulation": 0.5}}),
    ("blocks.attention", 0.5, {"blocks": {"attention": 0.5}}),
    ("blocks.feed_forward", 0.5, {"blocks": {"feed_forward": 0.5}}),
    ("layers.3", 0.5, {"layers": {"3": 0.5}}),
    ("layers.0-9", [1.0, 0.25], {"layers": {"0-9": [1.0, 0.25]}}),
    ("layers.0-9", [1, 2, 0], {"layers": {"0-9": [1, 2, 0]}}),
    ("layers.noise_refiner", 0.5, {"layers": {"noise_refiner": 0.5}}),
    ("layers.noise_refiner", [0.5, 2], {"layers": {"noise_refiner": [0.5, 2]}}),
    ("layers.other", 0.5, {"layers": {"other": 0.5}}),
    ("layers", [n / 10 for n in range(30)], {"layers": [n / 10 for n in range(30)]}),
    ("effects.detail", 0.5, {"effects": {"detail": 0.5}}),
    ("overrides.3.to_q", 0.5, {"overrides": {"3.to_q": 0.5}}),
    ("overrides.*.w2", 0.5, {"overrides": {"*.w2": 0.5}}),
    ("overrides.20-25.adaLN", 0.5, {"overrides": {"20-25.adaLN_modulation": 0.5}}),
    ("overrides.noise_refiner.0.to_k", 0.5, {"overrides": {"noise_refiner.0.to_k": 0.5}}),
    ("overrides.other.x_embedder", 0.5, {"overrides": {"other.x_embedder": 0.5}}),
]


@pytest.mark.parametrize(("key", "value", "written"), KEYS, ids=str)
def test_every_strength_key_can_be_gone_through(work, loras, key, value, written):
    (cell,) = swept(work, ME, sweep={key: [value]}).cells
    assert settled(cell.plan) == settled(planned(work, step(ME | written)).plans[0])
    (cell,) = swept(work, STYLE, ME, sweep={f"loras[1].{key}": [value]}).cells
    assert settled(cell.plan) == settled(planned(work, step(STYLE, ME | written)).plans[0])


@pytest.mark.parametrize(
    ("own", "key", "value", "written"),
    [
        ({"blocks": {"adaLN": 0.1, "to_q": 0.2}}, "blocks.adaLN_modulation", 0.5, {"blocks": {"adaLN": 0.5, "to_q": 0.2}}),
        ({"blocks": {"adaLN_modulation": 0.1}}, "blocks.adaLN", 0.5, {"blocks": {"adaLN": 0.5}}),
        ({"layers": {"3": 0.1, "0-9": 0.2}}, "layers.3-3", 0.5, {"layers": {"3": 0.5, "0-9": 0.2}}),
        ({"layers": {"0 - 9": 0.1}}, "layers.0-9", 0.5, {"layers": {"0-9": 0.5}}),
        ({"overrides": {"3.adaLN": 0.1}}, "overrides.3-3.adaLN_modulation", 0.5, {"overrides": {"3.adaLN": 0.5}}),
        ({"layers": [0.1] * 30}, "layers", [0.5] * 30, {"layers": [0.5] * 30}),
        ({"layers": {"0-9": 0.2}}, "layers", [0.5] * 30, {"layers": [0.5] * 30}),
        ({"layers": [0.1] * 30}, "blocks.to_q", 0.5, {"layers": [0.1] * 30, "blocks": {"to_q": 0.5}}),
        ({"preset": "attention_only"}, "blocks.to_q", 0.5, {"preset": "attention_only", "blocks": {"to_q": 0.5}}),
        ({"preset": "fade_in", "blocks": {"w1": 2}}, "ratio", 0.5, {"preset": "fade_in", "blocks": {"w1": 2}, "ratio": 0.5}),
        ({"blocks": {"to_q": 0.0}}, "blocks.to_q", 0.5, {"blocks": {"to_q": 0.5}}),
        ({"effects": {"detail": 2.0, "subject": 3}}, "effects.detail", 0.5, {"effects": {"detail": 0.5, "subject": 3}}),
    ],
    ids=str,
)
def test_a_value_takes_the_place_of_the_steps_own_under_whatever_alias(work, loras, own, key, value, written):
    (cell,) = swept(work, ME | own, sweep={key: [value]}).cells
    assert settled(cell.plan) == settled(planned(work, step(ME | written)).plans[0])


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("Ratio", "is not a strength of a LoRA (did you mean ratio?)"),
        ("block.to_v", "is not a strength of a LoRA (did you mean blocks?)"),
        ("loras[0].layer.3", "is not a strength of a LoRA (did you mean layers?)"),
        ("blocks", "is not a strength of a LoRA; write it as ratio, blocks.to_v"),
        ("blocks.", "is not a strength of a LoRA; write it as"),
        ("ratio.x", "is not a strength of a LoRA; write it as"),
        ("loras[0]", "is not a strength of a LoRA; write it as"),
        ("loras[-1].ratio", "is not a strength of a LoRA"),
        ("loras[0].loras[0].ratio", "is not a strength of a LoRA"),
        ("preset", "is not a strength of a LoRA"),
        ("alpha", "is not a strength of a LoRA"),
        ("", "is not a strength of a LoRA"),
        (5, "is not a strength of a LoRA"),
        ("blocks.to_w", "Z-Image has no such component (did you mean to_v?)"),
        ("effects.colour_light", "no such effect group (did you mean color_light?)"),
        ("layers.30", "Z-Image's layers are 0 to 29"),
        ("layers.9-0", "Z-Image's layers are 0 to 29"),
        ("overrides.to_q", "an override is LAYERS.COMPONENT"),
        ("loras[1].ratio", "the step has 1 LoRA, the first is loras[0]: correct the number"),
        ("loras[0].blocks.to_w", "Z-Image has no such component (did you mean to_v?)"),
    ],
)
def test_a_key_that_selects_no_strength(work, loras, key, says):
    assert refused(work, ME, sweep={key: [0.5, 1.0]}).startswith(f"{joined(PLACE, str(key))}: {says}")


def test_with_several_loras_the_key_says_which(work, loras):
    message = refused(work, *BOTH, sweep={"ratio": [1]})
    assert message == f"{PLACE}.ratio: the step has 2 LoRAs: say which one, such as loras[0].ratio"
    assert refused(work, *BOTH, sweep={"loras[2].ratio": [1]}).startswith(f"{PLACE}.loras[2].ratio: the step has 2 LoRAs")


@pytest.mark.parametrize(
    ("key", "values", "says"),
    [
        ("ratio", [0.5, [1, 2]], "takes numbers, a list of numbers is a gradient"),
        ("blocks.to_v", [[1, 2]], "takes numbers, a list of numbers is a gradient"),
        ("overrides.3.to_q", [[1, 2]], "takes numbers, a list of numbers is a gradient"),
        ("layers.3", [[1, 2]], "a gradient is a list of two or more numbers over two or more layers"),
        ("layers.other", [[1, 2]], "a gradient is a list of two or more numbers over two or more layers"),
        ("layers", [0.5], "takes lists of 30 numbers"),
        ("layers", [[1.0] * 29], "a plain list has one number for each of the 30 layers, this one has 29"),
    ],
    ids=str,
)
def test_values_of_the_wrong_form(work, loras, key, values, says):
    assert refused(work, ME, sweep={key: values}).startswith(f"{PLACE}.{key}: {says}")


@pytest.mark.parametrize(
    "sweep",
    [
        {"ratio": [1], "loras[0].ratio": [2]},
        {"blocks.adaLN": [1], "blocks.adaLN_modulation": [2]},
        {"layers.3": [1], "layers.3-3": [2]},
        {"layers": [[1.0] * 30], "layers.3": [2]},
        {"overrides.3.adaLN": [1], "loras[0].overrides.3-3.adaLN_modulation": [2]},
    ],
)
def test_two_keys_of_one_strength(work, loras, sweep):
    assert refused(work, ME, sweep=sweep) == f"{PLACE}: {' and '.join(sweep)} are one strength: keep one of them"


@pytest.mark.parametrize(
    ("lora", "sweep", "says"),
    [
        (ME, {"layers.0-9": [1], "layers.5-14": [2]}, f"{PLACE}.layers: 0-9 and 5-14 overlap"),
        (ME | {"layers": {"0-9": 0.5}}, {"layers.5-14": [2]}, f"{PLACE}.layers: 0-9 and 5-14 overlap"),
        (ME | {"layers": [1.0] * 30}, {"layers.3": [2]}, f"{PLACE}.layers.3: loras[0].layers is a list of 30 numbers"),
        (ME, {"ratio": [1e300], "blocks.to_q": [1e300]}, f"{PLACE}: the strength of "),
    ],
    ids=str,
)
def test_values_that_the_other_keys_dont_allow(work, loras, lora, sweep, says):
    assert refused(work, lora, sweep=sweep).startswith(says)


@pytest.mark.parametrize(
    ("lora", "key"),
    [
        (ME | {"blocks": {"to_q": 1, "to_k": 1, "to_v": 1, "to_out": 1}}, "blocks.attention"),
        (ME | {"overrides": {"*.w2": 0.5}}, "blocks.w2"),
        (ME | {"layers": {"0-1": 1, "2-4": 1}}, "layers.0-4"),
        (ME | {"ratio": 0}, "blocks.to_q"),
    ],
    ids=str,
)
def test_a_strength_that_makes_no_difference(work, loras, lora, key):
    message = refused(work, lora, sweep={key: [0.5, 1.0]})
    assert message.startswith(f"{PLACE}.{key}: has no effect, other keys of loras[0] override it everywhere")
    assert len(swept(work, lora, sweep={key: [0.5]}).cells) == 1, "one value is nothing to go through"


@pytest.mark.parametrize(
    ("method", "sweep", "says"),
    [
        ("slerp", {"loras[0].ratio": [1, -1]}, f"{PLACE}.loras[0].ratio: slerp goes between directions, where -1 has no meaning"),
        ("slerp", {"loras[0].ratio": [0, 1], "loras[1].ratio": [0, 1]}, f"{PLACE}: the ratios sum to 0"),
        ("average", {"loras[0].ratio": [1, -0.5]}, f"{PLACE}: the ratios sum to 0"),
    ],
)
def test_values_that_the_method_cant_have(work, loras, method, sweep, says):
    assert refused(work, *BOTH, method=method, sweep=sweep).startswith(says)


def test_an_average_over_checkpoints_has_no_strengths(work, loras):
    training = work.training(train={"steps": 3}, save={"save_every": 1})
    folder = work.folder / "output" / "cat"
    for name in ("cat", "cat_000000001", "cat_000000002"):
        work.lora(f"output/cat/{name}.safetensors")
    assert len(list(folder.iterdir())) == 3
    ema = {"name": "ema", "checkpoints": {"last": 2}, "sweep": {"ratio": [1]}}
    config = work.config(training, work.section(ema, preview=ONE, model={"name_or_path": "a/b", "arch": "zimage"}))
    message = work.zit("check", config).refused()
    assert message.startswith("process[1].steps[0].sweep: an average over checkpoints has no strengths to vary")


# --- cells ---------------------------------------------------------------------------------------------------------------------


def ratios(grid: ImageGrid) -> list[tuple[float, float]]:
    """(ratio, strength of to_q over it) of each cell."""
    found = [cell.plan.inputs[0].strengths for cell in grid.cells]
    return [(table["layers.3.attention.to_v"], table[Q] / table["layers.3.attention.to_v"]) for table in found]


def test_the_first_axis_varies_fastest_and_is_a_row(work, loras):
    grid = swept(work, ME, sweep={"ratio": [0.25, 0.5, 1.0], "blocks.to_q": [2.0, 4.0]})
    assert ratios(grid) == [(r, q) for q in (2.0, 4.0) for r in (0.25, 0.5, 1.0)] and grid.across == 3
    assert grid.labels == [
        f"{n}: ratio {r}, blocks.to_q {q}" for n, (q, r) in enumerate([(q, r) for q in (2, 4) for r in ("0.25", "0.5", "1")], 1)
    ]
    grid = swept(work, ME, sweep={"blocks.to_q": [2.0, 4.0], "ratio": [0.25, 0.5, 1.0]})
    assert ratios(grid) == [(r, q) for r in (0.25, 0.5, 1.0) for q in (2.0, 4.0)] and grid.across == 2


def test_two_axes_over_two_loras(work, loras):
    grid = swept(work, *BOTH, sweep={"loras[1].ratio": [0.1, 0.2], "loras[0].ratio": [1, 2]})
    assert [tuple(i.spec.ratio for i in cell.plan.inputs) for cell in grid.cells] == [(1, 0.1), (1, 0.2), (2, 0.1), (2, 0.2)]
    assert grid.title == "soft: loras[1].ratio and loras[0].ratio"


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (0.1, "1: layers.0-9 0.1"),
        ([1, 0.5], "1: layers.0-9 1, 0.5"),
        ([1, 2, 3, 4, 5], "1: layers.0-9 1, 2, 3, 4, 5"),
        ([1, 2, 3, 4, 5, 6.5], "1: layers.0-9 1, 2, 3, 4, ..., 6.5"),
    ],
)
def test_labels(work, loras, value, label):
    assert swept(work, ME, sweep={"layers.0-9": [value]}).labels == [label]


def test_every_cell_is_another_picture_but_for_equal_ones(work, loras):
    from preview.helpers import name_of

    names = [name_of(variant) for variant in swept(work, ME, sweep={"ratio": [0.1, 0.2, 0.8, 0.2]}).variants]
    assert len(set(names)) == 3 and names[1] == names[3]
    found = preview_of(work, ME, sweep={"ratio": [0.1, 0.8]}, section={"preview": ONE | {"compare": ["result"]}})
    preview, sweep = found.grids
    assert [e.kind for e in found.grids] == ["preview", "sweep"]
    assert name_of(preview.variants[0]) == name_of(sweep.variants[1]), "0.8 is what the step has"


def test_many_cells_are_refused_before_they_are_planned(work, loras, monkeypatch):
    monkeypatch.setattr(grids, "cells_of", lambda *rest: pytest.fail("planning millions of them takes hours"))
    many = [n / 7 for n in range(3000)]
    message = refused(work, ME, sweep={"ratio": many, "blocks.to_q": many})
    assert message.startswith(f"{PLACE}: these are 9000000 pictures, 9000000 x 1 of them here: set confirm: true in preview")
    assert refused(work, ME, sweep={"ratio": many[:201]}).startswith(f"{PLACE}: these are 201 pictures")


def test_many_cells_may_be_asked_for(work, loras):
    section = {"preview": {"prompts": ["a", "b"], "confirm": True}}
    assert len(swept(work, ME, sweep={"ratio": [n / 7 for n in range(101)]}, section=section).cells) == 101


# --- the section of a cell -----------------------------------------------------------------------------------------------------


def written(path: Path) -> dict[str, Any]:
    lora = load_lora(path)
    with TensorReader(lora) as reader:
        return {module: reader.delta(module)[1].map(lambda t: t.clone()) for module in lora}


def cell_sections(found: PreviewPlan) -> list[tuple[Any, str]]:
    (grid,) = [e for e in found.grids if e.kind == "sweep"]
    plans = [cell.plan for cell in grid.cells]
    assert [variant.plan for variant in grid.variants] == plans
    return [(variant, section_yaml(found.section, variant.plan.spec)) for variant in grid.variants]


def check_cells(work: Workspace, *loras: dict, **keys: Any) -> list[dict]:
    """Every cell's section gives, through the command line, its strengths and its factors. Returns the sections."""
    found, sections = preview_of(work, *loras, **keys), []
    for variant, text in cell_sections(found):
        config = work.write(text, "cell.yaml")
        (plan,) = [p for p in next(iter(plan_job(load_job(config)))).plans if p.name == variant.plan.name]
        assert [dict(i.strengths) for i in plan.inputs] == [dict(i.strengths) for i in variant.plan.inputs]
        computed = changes(variant)
        out = work.folder / "cell"
        work.zit("run", config, "--output-dir", out).ok()
        (path,) = [p for p in out.glob("*.safetensors") if p.stem.endswith(f"_{variant.plan.name}")]
        theirs = written(path)
        assert list(theirs) == list(computed) and all(same(computed[m], theirs[m]) for m in theirs)
        path.unlink()
        sections.append(yaml.safe_load(text))
    return sections


@pytest.mark.parametrize(
    "sweep",
    [
        {"ratio": [0.0, 0.3]},
        {"blocks.adaLN": [0.5], "layers.0-9": [[1.0, 0.5], 2]},
        {"layers": [[n / 30 for n in range(30)]]},
        {"overrides.noise_refiner.0.to_k": [0.5, 1e-3]},
        {"effects.detail": [0.5], "layers.3": [1e-7, 1e20]},
    ],
    ids=str,
)
def test_the_section_of_a_cell_makes_what_its_picture_shows(work, loras, sweep):
    for section in check_cells(work, ME | {"blocks": {"adaLN_modulation": 0.9, "to_q": 0.4}}, sweep=sweep):
        assert set(section) <= {"type", "device", "output_dir", "steps"} and "sweep" not in section["steps"][0]


@pytest.mark.parametrize(
    "keys",
    [
        {"rank": 2},
        {"rank": {"energy": 0.9, "max": 4}},
        {"rank": {"size_mb": 0.3}, "save": {"dtype": "fp16", "uniform": False}},
        {"method": "dare_ties", "params": {"density": 0.4, "seed": 7}},
        {"method": "normalize", "params": {"per": "layer"}},
        {"method": "slerp"},
        {"save": {"dtype": "bf16", "format": "kohya"}},
        {"keep": False},
        {"preview": False},
    ],
    ids=str,
)
def test_the_section_of_a_cell_has_all_that_the_step_has(work, loras, keys):
    """What the step inherits too."""
    check_cells(work, *BOTH, sweep={"loras[1].ratio": [0.3]}, **keys)
    inherited = {key: value for key, value in keys.items() if key not in ("keep", "preview")}
    check_cells(work, *BOTH, sweep={"loras[1].ratio": [0.3]}, section=inherited)


def test_the_section_of_a_cell_brings_the_steps_that_it_uses(work, loras):
    steps = (
        step(ME, name="a", keep=False, rank=2),
        step(STYLE, name="unused"),
        step({"lora": "a", "ratio": 1.0}, STYLE, name="b"),
    )
    sections = check_cells(work, {"lora": "b", "ratio": 0.5}, ME, sweep={"loras[0].ratio": [0.3, 1.0]}, before=steps)
    for section, ratio in zip(sections, (0.3, 1.0), strict=True):
        assert [s["name"] for s in section["steps"]] == ["a", "b", "soft"]
        assert section["steps"][0]["keep"] is False and section["steps"][2]["loras"][0]["ratio"] == ratio


def test_the_section_of_a_cell_with_a_preset(work, loras):
    (section,) = check_cells(work, ME | {"preset": "fade_in", "drop": ["norm"]}, sweep={"blocks.to_q": [0.5]})
    lora = section["steps"][0]["loras"][0]
    assert lora == ME | {"preset": "fade_in", "drop": ["norm"], "blocks": {"to_q": 0.5}}


def test_a_kept_lokr(work):
    work.lora("lokr.safetensors", "ai-toolkit-lokr")
    lora = {"lora": "lokr.safetensors", "ratio": 0.7}
    check_cells(work, lora, sweep={"ratio": [0.3, 1.0], "blocks.to_q": [0.0, 2.0]}, save={"keep_lokr": True})


def test_names_that_yaml_and_the_toolkit_could_mistake(work, loras):
    (work.folder / "me.safetensors").rename(work.folder / "1e3: #[x] 'é 猫'.safetensors")
    check_cells(work, ME | {"lora": "1e3: #[x] 'é 猫'.safetensors"}, sweep={"ratio": [0.5]}, name="1e5")


def test_a_sweep_over_a_recipe(work, loras):
    """A recipe's own table of strengths gives way."""
    made = work.folder / "made"
    work.zit("run", work.job(step(*BOTH), output_dir=str(made))).ok()
    (path,) = made.glob("*.safetensors")
    recipe = yaml.safe_load(work.zit("recipe", path).ok())
    recipe["steps"][0] |= {"sweep": {"loras[0].ratio": [0.3]}, "preview": ONE}
    del recipe["made_by"], recipe["steps"][0]["file"]  # else it is a recipe, which asks for no pictures
    recipe |= {"model": {"name_or_path": "a/b", "arch": "zimage"}, "output_dir": str(work.out)}
    config = work.write(recipe, "recipe.yaml")
    text = work.zit("preview", config, "--yaml", "soft:1").ok()
    out = work.folder / "out2"
    work.zit("run", work.write(text, "cell.yaml"), "--output-dir", out).ok()
    direct = work.folder / "direct"
    work.zit("run", work.job(step(ME | {"ratio": 0.3}, STYLE), output_dir=str(direct))).ok()
    (one,), (two,) = out.glob("*.safetensors"), direct.glob("*.safetensors")
    assert all(same(a, b) for a, b in zip(written(one).values(), written(two).values(), strict=True))


def test_the_section_of_a_cell_has_gradients_as_lists(work, loras):
    preview = preview_of(work, ME, sweep={"ratio": [0.3], "layers.0-9": [[1, 0.5]]})
    made = yaml.safe_load(section_yaml(preview.section, preview.grids[-1].cells[0].plan.spec))
    assert made["steps"][0]["loras"][0]["layers"] == {"0-9": [1.0, 0.5]}
