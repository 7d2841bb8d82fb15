"""The job section: what is accepted, and the sentence for everything that is not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from extensions_built_in.zit_merge.config.job import load_job
from extensions_built_in.zit_merge.config.parse import parse_section
from extensions_built_in.zit_merge.config.schema import Section
from extensions_built_in.zit_merge.errors import ZitMergeError, located

LORA = {"lora": "me.safetensors", "ratio": 1.0}
STEP = {"name": "a", "loras": [LORA]}


def section(lora: dict | None = None, step: dict | None = None, **keys) -> dict:
    """A section of one step with one LoRA; what is given is added at its level."""
    return {"type": "zit_merge", "steps": [STEP | {"loras": [LORA | (lora or {})]} | (step or {})]} | keys


def settled(raw: object, *, first: bool = False) -> Section:
    with located("process[1]"):
        return parse_section(raw, first=first)


def refusal(raw: object) -> str:
    with pytest.raises(ZitMergeError) as caught:
        settled(raw)
    message = str(caught.value)
    assert "\n" not in message and "pydantic" not in message
    return message


@pytest.mark.parametrize(
    ("raw", "place", "meant"),
    [
        (section(stepz=1), "process[1].stepz", "steps"),
        (section(outputdir="x"), "process[1].outputdir", "output_dir"),
        (section(step={"copyto": "x"}), "process[1].steps[0].copyto", "copy_to"),
        (section({"ration": 1.0}), "process[1].steps[0].loras[0].ration", "ratio"),
        (section({"block": {}}), "process[1].steps[0].loras[0].block", "blocks"),
        (section(step={"save": {"formt": "x"}}), "process[1].steps[0].save.formt", "format"),
        (section(step={"Name": "x"}), "process[1].steps[0].Name", "name"),
    ],
)
def test_an_unknown_key_is_named_with_its_place_and_the_nearest_one(raw, place, meant):
    message = refusal(raw)
    assert message.startswith(f"{place}: unknown key (did you mean {meant}?)")


@pytest.mark.parametrize(
    ("weights", "place", "meant"),
    [
        ({"blocks": {"to_w": 0.5}}, "blocks.to_w", "to_q|to_k|to_v"),
        ({"blocks": {"adaln": 0.5}}, "blocks.adaln", "adaLN"),
        ({"blocks": {"feedforward": 0.5}}, "blocks.feedforward", "feed_forward"),
        ({"effects": {"colour_light": 0.5}}, "effects.colour_light", "color_light"),
        ({"layers": {"noise_refiners": 0.5}}, "layers.noise_refiners", "noise_refiner"),
        ({"layers": {30: 0.5}}, "layers.30", ""),
        ({"layers": {"9-0": 0.5}}, "layers.9-0", ""),
        ({"overrides": {"3.to_w": 0.5}}, "overrides.3.to_w", "to_q|to_k|to_v"),
        ({"overrides": {"to_q": 0.5}}, "overrides.to_q", ""),
        ({"overrides": {"other.x_embed": 0.5}}, "overrides.other.x_embed", "x_embedder"),
    ],
)
def test_a_weight_that_selects_nothing_is_named_through_the_command_line(work, loras, weights, place, meant):
    config = work.config({"type": "other"}, work.section(STEP | {"loras": [LORA | weights]}))
    message = work.zit("check", config).refused()
    assert message.startswith(f"process[1].steps[0].loras[0].{place}: ")
    assert not meant or any(f"did you mean {word}?" in message for word in meant.split("|"))


@pytest.mark.parametrize(
    ("raw", "start"),
    [
        ({"type": "zit_merge"}, "process[1].steps: is missing"),
        (section(step={"name": None}), "process[1].steps[0].name: is missing"),
        ({"type": "zit_merge", "steps": [{"name": "a"}]}, "process[1].steps[0].loras: is missing"),
        ({"type": "zit_merge", "steps": [{"name": "a", "loras": [{"ratio": 1}]}]}, "process[1].steps[0].loras[0].lora: is miss"),
        ({"type": "zit_merge", "steps": [{"name": "a", "loras": [{"lora": "x"}]}]}, "process[1].steps[0].loras[0].ratio: is mi"),
        (section({"ratio": None}), "process[1].steps[0].loras[0].ratio: "),
        (section(steps=[]), "process[1].steps: must have at least one entry"),
        (section(step={"loras": []}), "process[1].steps[0].loras: must have at least one entry"),
        (section(steps={"name": "a"}), "process[1].steps: must be a list"),
        (section(steps="a"), "process[1].steps: must be a list"),
        (section(steps=["a"]), "process[1].steps[0]: must be a mapping"),
        (section(step={"loras": "me.safetensors"}), "process[1].steps[0].loras: must be a list"),
        (section(step={"loras": ["me.safetensors"]}), "process[1].steps[0].loras[0]: must be a mapping"),
        (section({"blocks": [1, 2]}), "process[1].steps[0].loras[0].blocks: must be a mapping"),
        (section(step={"save": "bf16"}), "process[1].steps[0].save: must be a mapping"),
        (section(step={"keep": "yes"}), "process[1].steps[0].keep: must be true or false, not 'yes'"),
        (section(step={"shapes": "loose"}), "process[1].steps[0].shapes: must be 'strict' or 'free', not 'loose'"),
        (section(device="gpu"), "process[1].device: "),
        (section(output_dir=7), "process[1].output_dir: must be text, not 7"),
        (["a", "b"], "process[1]: must be a mapping"),
    ],
)
def test_what_is_missing_or_of_the_wrong_kind(raw, start):
    assert refusal(raw).startswith(start)


@pytest.mark.parametrize(
    ("keys", "place"),
    [
        ({"save": "bf16"}, "save"),
        ({"save": {"dtyp": "bf16"}}, "save.dtyp"),
        ({"save": {"dtype": "bf1"}}, "save.dtype"),
        ({"save": {"format": "kohja"}}, "save.format"),
        ({"save": {"uniform": "no"}}, "save.uniform"),
        ({"save": {"keep_lokr": 1}}, "save.keep_lokr"),
        ({"allow_unmatched": "yes"}, "allow_unmatched"),
        ({"shapes": "loose"}, "shapes"),
        ({"rank": 0}, "rank"),
        ({"method": "blend"}, "method"),
        ({"params": {"density": 0.5}}, "params.density"),
    ],
)
def test_a_setting_of_the_section_is_named_where_it_stands_not_in_the_steps_that_inherit_it(keys, place):
    assert refusal(section(**keys)).startswith(f"process[1].{place}")


def test_an_unknown_key_is_named_before_the_missing_one_that_it_was_meant_to_be():
    raw = {"type": "zit_merge", "steps": [{"name": "a", "loras": [{"lora": "x", "ratoi": 1.0}]}]}
    assert refusal(raw).startswith("process[1].steps[0].loras[0].ratoi: unknown key (did you mean ratio?)")


NOT_NUMBERS = ["0.9", "", True, math.nan, math.inf, -math.inf, [0.5], {"a": 1}, 10**400]


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=lambda v: repr(v)[:12])
@pytest.mark.parametrize("key", ["ratio", "blocks", "layers", "effects", "overrides"])
def test_only_finite_numbers_are_strengths(key, value):
    inner = {"blocks": "to_q", "layers": "0-9", "effects": "detail", "overrides": "3.to_q"}.get(key)
    if key == "layers" and value == [0.5]:
        value = [0.5, "1"]
    message = refusal(section({key: {inner: value} if inner else value}))
    assert message.startswith(f"process[1].steps[0].loras[0].{key}")
    assert "number" in message


@pytest.mark.parametrize("gradient", [[0.5, math.nan], [math.inf, 1], ["1", 2], [True, 1.0]], ids=repr)
def test_only_finite_numbers_stand_in_gradients(gradient):
    message = refusal(section({"layers": {"0-9": gradient}}))
    assert message.startswith("process[1].steps[0].loras[0].layers") and "number" in message


@pytest.mark.parametrize("value", [0, -1, -0.5, 0.0, 1e-3, 7])
def test_zero_and_negative_numbers_are_strengths(value):
    assert settled(section({"ratio": value})).steps[0].loras[0].ratio == value


@pytest.mark.parametrize("value", [0, -1, 1.5, 2.0, "32", True, "exakt", [4]])
def test_a_rank_is_exact_same_or_a_whole_number(value):
    assert refusal(section(rank=value)).startswith("process[1].")


@pytest.mark.parametrize("value", ["exact", "same", 1, 64])
def test_ranks(value):
    assert settled(section(rank=value)).steps[0].rank == value


def test_strengths_whose_product_is_not_finite(work, loras):
    config = work.job(STEP | {"loras": [LORA | {"ratio": 1e200, "blocks": {"to_q": 1e200}}]})
    assert work.zit("check", config).refused().startswith("process[0].steps[0]")


def test_layer_keys_may_be_integers_or_strings():
    numbers, texts = ({"layers": {k: 0.5, "4-9": [1.0, 0.6]}} for k in (3, "3"))
    assert settled(section(numbers)).steps[0].loras[0].layers == settled(section(texts)).steps[0].loras[0].layers


@pytest.mark.parametrize("key", ["layers", "overrides", "blocks"])
def test_an_integer_and_a_string_key_are_one_key(key):
    message = refusal(section({key: {3: 0.5, "3": 0.6}}))
    assert message == f"process[1].steps[0].loras[0].{key}: duplicate key 3: keep one of them"


def test_the_order_of_keys_has_no_meaning(work, loras):
    one = {"layers": {"0-9": 0.5, 3: 0.1, "noise_refiner": 0.2}, "blocks": {"attention": 0.5, "to_q": 2.0}}
    other = {"layers": {3: 0.1, "noise_refiner": 0.2, "0-9": 0.5}, "blocks": {"to_q": 2.0, "attention": 0.5}}
    tables = [work.zit("check", work.job(STEP | {"loras": [LORA | weights]})).ok() for weights in (one, other)]
    assert tables[0] == tables[1] and " 2 " in tables[0]


def test_an_alias_beside_its_component_is_a_duplicate(work, loras):
    config = work.job(STEP | {"loras": [LORA | {"blocks": {"adaLN": 0.5, "adaLN_modulation": 0.5}}]})
    message = work.zit("check", config).refused()
    assert message.startswith("process[0].steps[0].loras[0].blocks") and "adaLN and adaLN_modulation" in message


@pytest.mark.parametrize(
    ("overrides", "named"),
    [({"3.adaLN": 1, "3.adaLN_modulation": 1}, "3.adaLN_modulation"), ({"0-9.to_q": 1, "5-14.to_q": 2}, "5-14.to_q")],
)
def test_overrides_that_overlap_and_are_equally_wide(work, loras, overrides, named):
    config = work.job(STEP | {"loras": [LORA | {"overrides": overrides}]})
    message = work.zit("check", config).refused()
    assert message.startswith("process[0].steps[0].loras[0].overrides") and named in message


TWICE = """\
job: extension
config:
  name: cat
  process:
    - type: zit_merge
      steps:
        - name: a
          loras:
            - lora: me.safetensors
              ratio: 1.0
              blocks: {to_q: 0.5, to_k: 0.7, to_q: 0.6}
"""


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        (TWICE, 11, "to_q"),
        (TWICE.replace("blocks: {to_q: 0.5, to_k: 0.7, to_q: 0.6}", "ratio: 2.0"), 11, "ratio"),
        (TWICE.replace("blocks: {to_q: 0.5, to_k: 0.7, to_q: 0.6}", "layers: {3: 0.5, 0x3: 0.6}"), 11, "3"),
        (TWICE.replace("to_k: 0.7, to_q: 0.6", "to_k: 0.7") + "job: extension\n", 12, "job"),
    ],
)
def test_a_key_that_is_twice_in_yaml_is_named_with_its_line(work, loras, text, line, key):
    message = work.zit("check", work.write(text)).refused()
    assert message.endswith(f"config.yaml: line {line}: duplicate key {key}: keep one of them")


def test_a_key_that_is_twice_in_json_is_named(work, loras):
    text = '{"job": "extension", "config": {"name": "cat", "process": [\n{"type": "zit_merge", "steps": [], "steps": []}]}}'
    assert "duplicate key steps: keep one of them" in work.zit("check", work.write(text, "config.json")).refused()


def test_a_yaml_merge_key_may_be_overridden(work, loras):
    text = f"""\
job: extension
config:
  name: cat
  process:
    - &shared {{type: zit_merge, device: cpu, shapes: free, output_dir: {work.out}, steps: [{{name: a, loras: [&l {{
        lora: me.safetensors, ratio: 0.25}}, {{<<: *l, ratio: 0.75}}]}}]}}
"""
    table = work.zit("check", work.write(text)).ok()
    assert "ratio 0.25" in table and "ratio 0.75" in table


def test_1e_minus_3_is_a_number_as_in_the_toolkit(work, loras):
    config = work.write(TWICE.replace("ratio: 1.0", "ratio: 1e-3").replace(", to_q: 0.6", ""))
    assert load_job(config).sections()[0][1].steps[0].loras[0].ratio == 0.001


def test_the_job_name_is_filled_in(work, loras):
    config = work.config(work.section(STEP, output_dir=str(work.folder / "[name]_out")), job="cat")
    work.zit("run", config).ok()
    assert (work.folder / "cat_out" / "merged_cat_a.safetensors").is_file()


def test_environment_variables_are_filled_in(work, loras, monkeypatch):
    monkeypatch.setenv("ZIT_TEST_OUT", str(work.folder / "from_env"))
    config = work.job(STEP, output_dir="${ZIT_TEST_OUT}")
    work.zit("run", config).ok()
    assert (work.folder / "from_env" / "merged_cat_a.safetensors").is_file()


def test_an_environment_variable_that_is_not_set_is_named(work, loras, monkeypatch):
    monkeypatch.delenv("ZIT_TEST_OUT", raising=False)
    message = work.zit("check", work.job(STEP, copy_to="${ZIT_TEST_OUT}/loras")).refused()
    assert "ZIT_TEST_OUT is not set" in message


def test_json_configs_read_like_yaml(work, loras):
    keys = {"layers": {"3": 0.5, "0-9": [1.0, 0.6]}}
    tables = [
        work.zit("check", work.job(STEP | {"loras": [LORA | keys]}, name=f"config.{kind}")).ok() for kind in ("yaml", "json")
    ]
    assert tables[0] == tables[1]


def test_steps_inherit_the_section_and_win():
    plain = {"loras": [LORA]}
    raw = section(
        rank=8,
        shapes="free",
        allow_unmatched=True,
        confirm_size=True,
        save={"dtype": "fp16", "format": "ai-toolkit"},
        steps=[
            plain | {"name": "a"},
            plain | {"name": "b", "rank": "same", "shapes": "strict", "allow_unmatched": False, "save": {"dtype": "fp32"}},
            plain | {"name": "c", "save": {}, "rank": None},
        ],
    )
    a, b, c = settled(raw).steps
    assert (a.rank, a.shapes, a.allow_unmatched, a.confirm_size, a.save.dtype) == (8, "free", True, True, "fp16")
    assert (b.rank, b.shapes, b.allow_unmatched, b.confirm_size, b.save.dtype) == ("same", "strict", False, True, "fp32")
    assert (c.rank, c.save.dtype, c.save.format) == (8, "fp16", "ai-toolkit")


def test_save_is_merged_key_by_key():
    step = settled(section(step={"save": {"format": "ai-toolkit"}}, save={"dtype": "fp32"})).steps[0]
    assert (step.save.dtype, step.save.format) == ("fp32", "ai-toolkit")


def test_defaults():
    step = settled(section()).steps[0]
    assert (step.rank, step.shapes, step.method, step.save.dtype, step.save.format) == (
        *("exact", "strict", "sum", "bf16", "ai-toolkit"),
    )
    assert step.keep and step.copy_to is None and not step.allow_unmatched and not step.confirm_size


@pytest.mark.parametrize(
    "raw",
    [
        section(output_dir=None, rank=None, save=None, device=None, preview=None, made_up=None),
        section(step={"rank": None, "copy_to": None, "save": None, "checkpoints": None}),
        section({"blocks": None}),
        section({"layers": None, "effects": None, "overrides": None, "preset": None}),
        section(save={"dtype": None}),
        section(save={"dtype": "bf16"}, step={"save": {"dtype": None}}),
        section({"sha256": None}),
    ],
)
def test_a_null_is_absent_as_in_the_toolkit(raw):
    assert settled(raw) == settled(section())


@pytest.mark.parametrize("name", ["a b", "a/b", "..\\b", "", "a\n", "ä!", "*", "a:b"])
def test_a_step_name_is_letters_digits_dot_dash_underscore(name):
    assert refusal(section(step={"name": name})).startswith("process[1].steps[0].name: has a form that is not allowed")


@pytest.mark.parametrize("name", ["a", "1", "v1.2-final_x", "soft"])
def test_step_names(name):
    assert settled(section(step={"name": name})).steps[0].name == name


@pytest.mark.parametrize("name", ["trained", "Trained", "TRAINED"])
def test_trained_is_reserved(name):
    message = refusal(section(step={"name": name}))
    assert message.startswith("process[1].steps[0].name: ") and "what the training saved" in message


def test_training_adapter_is_reserved():
    message = refusal(section(step={"name": "training_adapter"}))
    assert message.startswith("process[1].steps[0].name: ") and "the adapter of the training" in message


@pytest.mark.parametrize("names", [("soft", "soft"), ("soft", "SOFT")])
def test_step_names_are_unique_without_regard_to_case(names):
    message = refusal(section(steps=[STEP | {"name": n} for n in names]))
    assert message.startswith("process[1].steps[1].name: ") and "also the name of steps[0]" in message


def test_bake_belongs_to_a_step():
    assert refusal(section(bake={"base": "model"})).startswith("process[1].bake: belongs to a step")


@pytest.mark.parametrize(
    "asked", [{"base": "trainer", "format": "comfyui", "dtype": "fp16", "rounding": "stochastic", "seed": 3}, True]
)
def test_a_step_may_bake(asked):
    bake = settled(section(step={"bake": asked, "base": "model"})).steps[0].bake
    assert bake and bake.model_dump(exclude_defaults=True) == (asked if isinstance(asked, dict) else {})


@pytest.mark.parametrize(
    ("bake", "said"),
    [
        ({"anything": 1}, "bake.anything: unknown key; known here: base, format, dtype, rounding, seed"),
        ({"format": "gguf"}, "bake.format: no such format: 'gguf'; there are diffusers, comfyui"),
        ({"dtype": "int8"}, "bake.dtype: no such dtype: 'int8'; there are bf16, fp16, fp32, fp8"),
        ({"rounding": "up"}, "bake.rounding: no such rounding: 'up'; there are nearest, stochastic"),
        ({"seed": -1}, "bake.seed: must be at least 0, not -1"),
        ({"base": ""}, "bake.base: has a form that is not allowed"),
        (1, "bake: must be true, false or a mapping, such as {base: trainer}, not 1"),
    ],
)
def test_what_bake_refuses(bake, said):
    assert refusal(section(step={"bake": bake})).startswith(f"process[1].steps[0].{said}")


def test_a_lora_may_be_the_difference_of_two_models():
    lora = settled(section({"lora": {"extract": "tuned", "base": "model"}})).steps[0].loras[0]
    assert (lora.source, lora.lora.base) == ("tuned", "model")
    assert refusal(section({"lora": {"extract": "tuned"}})) == "process[1].steps[0].loras[0].lora.base: is missing"
    assert "lora.bse: unknown key (did you mean base?)" in refusal(section({"lora": {"extract": "a", "bse": "b"}}))
    assert refusal(section({"lora": 3})).startswith("process[1].steps[0].loras[0].lora: must be")


def test_what_a_training_leaves_open_may_be_answered():
    lora = settled(section({"preset": "fade_in", "alpha": "metadata", "qkv": "sum", "drop": ["norm", "bias"]})).steps[0].loras[0]
    assert (lora.preset, lora.alpha, lora.qkv, lora.drop) == ("fade_in", "metadata", "sum", ["norm", "bias"])
    for alpha in ("key", "none", 16, 0.5, -1):
        assert settled(section({"alpha": alpha})).steps[0].loras[0].alpha == alpha
    for qkv in ("split", "fused"):
        assert settled(section({"qkv": qkv})).steps[0].loras[0].qkv == qkv


@pytest.mark.parametrize(
    ("lora", "place", "named"),
    [
        ({"alpha": "keys"}, "alpha", ("key", "metadata", "none", "'keys'")),
        ({"alpha": "16"}, "alpha", ("key", "metadata", "none", "'16'")),
        ({"alpha": 0}, "alpha", ("number", "0")),
        ({"alpha": True}, "alpha", ("number", "True")),
        ({"alpha": [16]}, "alpha", ("number", "[16]")),
        ({"alpha": math.nan}, "alpha", ("number", "nan")),
        ({"alpha": -math.inf}, "alpha", ("number", "inf")),
        ({"qkv": "fuse"}, "qkv", ("split", "fused", "sum", "did you mean fused?")),
        ({"qkv": 3}, "qkv", ("split", "fused", "sum")),
        ({"qkv": ["split"]}, "qkv", ("split", "fused", "sum")),
        ({"drop": ["norms"]}, "drop[0]", ("norm", "bias", "did you mean norm?")),
        ({"drop": ["norm", "weights"]}, "drop[1]", ("norm", "bias")),
        ({"drop": "norm"}, "drop", ("list",)),
        ({"drop": {"norm": True}}, "drop", ("list",)),
        ({"preset": 7}, "preset", ("text",)),
        ({"preset": ["fade_in"]}, "preset", ("text",)),
    ],
    ids=str,
)
def test_wrong_answers_are_one_sentence_with_the_choices(lora, place, named):
    message = refusal(section(lora))
    assert message.startswith(f"process[1].steps[0].loras[0].{place}: ")
    for word in named:
        assert word in message


@pytest.mark.parametrize("value", [1, "yes", [], "false"])
@pytest.mark.parametrize("key", ["uniform", "keep_lokr"])
def test_uniform_and_keep_lokr_are_true_or_false(key, value):
    assert refusal(section(step={"save": {key: value}})).startswith(f"process[1].steps[0].save.{key}: must be true or false")


@pytest.mark.parametrize("kind", ["ai-toolkit", "diffusers", "kohya", "comfyui"])
def test_formats(kind):
    assert settled(section(save={"format": kind})).steps[0].save.format == kind


def cells(text: str) -> list[list[str]]:
    """The rows of the table that says where it comes from: layer, then one word for each component."""
    lines = iter(text.splitlines())
    next(line for line in lines if "where it comes from" in line)
    assert next(lines).split()[0] == "layer"
    rows = []
    for line in lines:
        if not line.strip() or line.strip().startswith("other:"):
            break
        rows.append(line.split())
    return rows


def test_a_preset_in_a_config_is_what_it_says_written_out(work, loras):
    """late_20_29: the other layers, the refiners and `other` are 0; what the user writes stands on top."""
    mine = {"layers": {"0-9": 0.25}, "blocks": {"to_q": -0.5}, "overrides": {"3.to_v": 2.0}}
    out = {"layers": {"0-9": 0.25, "10-19": 0, "noise_refiner": 0, "context_refiner": 0, "other": 0}}
    steps = [
        {"name": "preset", "loras": [LORA | {"ratio": 0.8, "preset": "late_20_29"} | mine]},
        {"name": "out", "loras": [LORA | {"ratio": 0.8} | mine | out]},
        {"name": "none", "loras": [LORA | {"ratio": 0.8} | mine]},
    ]
    work.zit("run", work.job(*steps)).ok()
    preset, written, none = (load_file(work.out / f"merged_cat_{s['name']}.safetensors") for s in steps)
    assert all(torch.equal(preset[key], written[key]) for key in written)
    assert not all(torch.equal(none[key], written[key]) for key in written)
    key = "diffusion_model.layers.{}.attention.to_k.lora_B.weight"
    assert preset[key.format(25)].any() and preset[key.format(5)].any() and not preset[key.format(15)].any()


def test_the_dry_run_shows_where_each_cell_comes_from(work, loras):
    lora = LORA | {"preset": "late_20_29", "layers": {"5": 0.25}, "blocks": {"to_q": -0.5}}
    text = work.zit("run", work.job({"name": "a", "loras": [lora]}), "--dry-run").ok()
    table = {row[0]: row[1:] for row in cells(text)}
    # to_q of every layer is the user's; 0-19 are the preset's zeros; of 5 the narrower entry wins
    assert table["0-4"] == ["preset", "both", *["preset"] * 6]
    assert table["5"] == ["own"] * 8
    assert table["6-19"] == table["0-4"]
    assert table["20-29"] == [".", "own", *["."] * 6]
    assert "preset late_20_29" in text
    assert "where each cell" not in work.zit("check", work.job({"name": "a", "loras": [LORA]})).ok()


def test_the_sentence_about_a_preset_names_its_place_and_the_nearest(work, loras):
    message = work.zit("check", work.job(STEP | {"loras": [LORA | {"preset": "fade_inn"}]})).refused()
    assert message.startswith("process[0].steps[0].loras[0].preset: no such preset: 'fade_inn' (did you mean fade_in?)")


@pytest.mark.parametrize(
    ("raw", "place", "meant"),
    [
        (section(step={"method": "sums"}), "method", "sum"),
        (section(step={"method": "tie"}), "method", "ties"),
        (section(step={"save": {"dtype": "bf1"}}), "save.dtype", "bf16"),
        (section(step={"save": {"format": "ai_toolkit"}}), "save.format", "ai-toolkit"),
        (section(step={"save": {"format": "diffuser"}}), "save.format", "diffusers"),
        (section(step={"save": {"format": "comfy"}}), "save.format", "comfyui"),
    ],
)
def test_an_unknown_choice_gets_the_nearest_one(raw, place, meant):
    message = refusal(raw)
    assert message.startswith(f"process[1].steps[0].{place}: ") and f"did you mean {meant}?" in message


def test_the_sum_has_no_parameters():
    assert refusal(section(step={"params": {"density": 0.5}})).startswith("process[1].steps[0].params.density: ")


HOST = {
    "sqlite_db_path": "./aitk_db.db",
    "training_folder": "output",
    "device": "cuda",
    "performance_log_every": 10,
    "model": {"name_or_path": "Tongyi-MAI/Z-Image-Turbo"},
    "datasets": [],
    "sample": {"samples": []},
    "train": {"steps": 0},
}


def test_the_keys_that_the_ui_writes_are_accepted_and_cuda_means_auto_there():
    assert settled(section(**HOST), first=True).device == "auto"
    assert settled(section(**HOST)).device == "cuda"


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda:1", "mps"])
def test_other_devices_are_kept_in_the_first_process(device):
    assert settled(section(device=device), first=True).device == device


def test_the_first_process_of_a_job_runs_where_the_ui_wrote_cuda(work, loras, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    host = HOST | {"training_folder": str(work.folder / "output")}
    first = {k: v for k, v in (work.section(STEP) | host).items() if k != "output_dir"}
    work.zit("run", work.config(first)).ok()
    assert (work.folder / "output" / "cat" / "merged_cat_a.safetensors").is_file()
    message = work.zit("check", work.config({"type": "other"}, work.section(STEP, device="cuda"))).refused()
    assert message.startswith("device: cuda: ")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "neither an AI-Toolkit job"),
        ("just text", "neither an AI-Toolkit job"),
        ([1, 2], "neither an AI-Toolkit job"),
        ({"job": "extension"}, "neither an AI-Toolkit job"),
        ({"job": "extension", "config": []}, "neither an AI-Toolkit job"),
        ({"job": "train", "config": {"name": "cat", "process": [section()]}}, "needs job: extension"),
        ({"config": {"name": "cat", "process": [section()]}}, "needs job: extension"),
        ({"job": "extension", "config": {"process": [section()]}}, "config.name"),
        ({"job": "extension", "config": {"name": "", "process": [section()]}}, "config.name"),
        ({"job": "extension", "config": {"name": "cat"}}, "config.process"),
        ({"job": "extension", "config": {"name": "cat", "process": section()}}, "config.process"),
        ({"job": "extension", "config": {"name": "cat", "process": []}}, "no process of type zit_merge"),
        (
            {"job": "extension", "config": {"name": "cat", "process": [{"type": "zit_marge"}]}},
            "no process of type zit_merge: correct zit_marge",
        ),
        ("a: [1, 2", "line"),
        ("a: *nowhere", "line"),
        ("a:\n\t- b", "line 2"),
        ("a: !!python/object:os.system x", "line 1"),
        ("job: extension\x07", "line 1: the character U+0007"),
    ],
)
def test_files_that_hold_no_job(work, content, says):
    path = work.write(content)
    message = work.zit("check", path).refused()
    assert message.startswith((str(path), "config.process")) and says in message


def test_broken_json(work):
    path = work.write('{"job": "extension",\n', "config.json")
    message = work.zit("check", path).refused()
    assert message.startswith(f"{path}: is not valid JSON") and "line" in message


def test_configs_that_cannot_be_read(work):
    assert work.zit("check", "nowhere.yaml").refused().startswith("nowhere.yaml: can't be read")
    assert work.zit("check", work.folder).refused().startswith(f"{work.folder}: can't be read")
    Path("binary.yaml").write_bytes(b"\x80\x81\x00\xff")
    assert "is not a text file" in work.zit("check", "binary.yaml").refused()


def test_keys_that_are_no_text(work, loras):
    for key in (True, 1.5, 7):
        message = work.zit("check", work.config(work.section(STEP) | {key: 1})).refused()
        assert message.startswith("process[0]") and str(key) in message


def test_a_missing_output_dir_is_named(work, loras):
    raw = {k: v for k, v in work.section(STEP).items() if k != "output_dir"}
    assert work.zit("check", work.config(raw)).refused().startswith("process[0].output_dir: is missing")


def test_the_output_dir_defaults_to_the_trainings_folder(work, loras):
    raw = {k: v for k, v in work.section(STEP).items() if k != "output_dir"}
    work.zit("run", work.config(work.training(), raw)).ok()
    assert (work.folder / "output" / "cat" / "merged_cat_a.safetensors").is_file()


def test_a_training_process_with_a_name_of_its_own(work, loras):
    raw = {k: v for k, v in work.section(STEP).items() if k != "output_dir"}
    work.zit("run", work.config(work.training(name="other"), raw)).ok()
    assert (work.folder / "output" / "other" / "merged_cat_a.safetensors").is_file()
