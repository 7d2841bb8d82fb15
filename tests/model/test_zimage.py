"""The anatomy against the list that the real model gave (tests/data/z_image_linears.json)."""

import re

import pytest
from oracles.inventory import EFFECTS, GROUPS, LINEARS

from extensions_built_in.zit_merge.formats.names import parse_key
from extensions_built_in.zit_merge.model import zimage


def flat(name):
    return re.sub(r"[._-]", "", name).lower()


def aliases():
    """(spelling, modules it must mean): diffusers' names, ComfyUI's names, and what trainers make of `to_out.0` and `adaLN`."""
    for name in LINEARS:
        yield name, (name,)
        if name.endswith(".attention.to_out.0"):
            block = name.removesuffix(".to_out.0")
            yield from ((f"{block}.{out}", (name,)) for out in ("to_out", "out", "out.0"))
        if name.endswith(".adaLN_modulation.0"):
            yield name.removesuffix(".0"), (name,)
        if name.endswith(".attention.to_q"):
            block = name.removesuffix(".to_q")
            yield f"{block}.qkv", tuple(f"{block}.to_{c}" for c in "qkv")
        native = name.replace("all_x_embedder.2-1", "x_embedder").replace("all_final_layer.2-1", "final_layer")
        if native != name:
            yield native, (name,)


def test_the_276_modules_are_those_of_the_real_model():
    assert len(LINEARS) == 276
    assert {name: module.shape() for name, module in zimage.MODULES.items()} == LINEARS


@pytest.mark.parametrize("name", ["layers.29.adaLN_modulation.0", "context_refiner.1.feed_forward.w2", "t_embedder.mlp.2"])
def test_a_module_knows_its_place(name):
    module = zimage.MODULES[name]
    assert zimage.at(module.section, module.index, module.component) is module


def test_every_place_is_one_module():
    places = {(m.section, m.index, m.component) for m in zimage.MODULES.values()}
    assert len(places) == 276
    # 30 layers and 2 noise refiners of 8, 2 context refiners of 7 (no adaLN there), 6 others
    assert {s: sum(p[0] == s for p in places) for s in ("layers", "noise_refiner", "context_refiner", "other")} == {
        "layers": 240,
        "noise_refiner": 16,
        "context_refiner": 14,
        "other": 6,
    }


def test_no_two_spellings_mean_different_modules():
    meant = {}
    for spelling, modules in aliases():
        assert meant.setdefault(flat(spelling), modules) == modules, spelling
    assert len(meant) >= 414


@pytest.mark.parametrize(
    "prefix", ["diffusion_model.", "transformer.", "lora_unet_", "lora_unet__", "lycoris_", "base_model.model.", ""]
)
def test_every_spelling_is_read_as_its_module(prefix):
    for spelling, modules in aliases():
        for name in {spelling, spelling.replace(".", "_").replace("-", "_"), spelling.replace("_", ".")}:
            part = parse_key(f"{prefix}{name}.lora_down.weight")
            assert (part.part, part.modules) == ("down", modules), name


@pytest.mark.parametrize(
    "key",
    [
        "diffusion_model.layers.30.attention.to_q.lora_A.weight",  # one layer too many
        "diffusion_model.layers.1.attention.to_q.extra.lora_A.weight",
        "diffusion_model.layers.attention.to_q.lora_A.weight",
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",  # Flux
        "context_refiner.0.adaLN_modulation.0.lora_A.weight",  # that refiner has no adaLN
        "diffusion_model.layers.1.attention.to_q.lora_C.weight",
        "my.layers.1.attention.to_q.lora_A.weight",
    ],
)
def test_nothing_is_matched_by_a_part_of_it(key):
    assert parse_key(key).part == "unknown"


def test_groups_and_effects_are_those_of_the_interface():
    assert set(zimage.COMPONENTS) == {"adaLN_modulation"} | GROUPS["attention"] | GROUPS["feed_forward"]
    assert dict(zimage.ALIASES) == {"adaLN": "adaLN_modulation"}
    assert {key: set(members) for key, members in zimage.GROUPS.items()} == GROUPS
    assert {key: set(members) for key, members in zimage.EFFECTS.items()} == EFFECTS
    for members in [*zimage.GROUPS.values(), *zimage.EFFECTS.values()]:
        assert len(set(members)) == len(members)  # a component named twice would count twice


def test_infer_sizes_gives_back_the_real_sizes():
    assert zimage.infer_sizes(LINEARS) == dict(zimage.REAL_SIZES)


def test_infer_sizes_of_a_small_model():
    shapes = {"layers.0.adaLN_modulation.0": (48, 8), "layers.3.feed_forward.w2": (12, 32)}
    assert zimage.infer_sizes(shapes) == {"dim": 12, "adaln": 8, "ffn": 32}


def test_infer_sizes_tells_only_what_it_saw():
    assert zimage.infer_sizes({"layers.0.feed_forward.w1": (32, 12)}) == {"ffn": 32, "dim": 12}
    assert zimage.infer_sizes({}) == {}


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"layers.0.attention.to_q": (12, 13)}, ["layers.0.attention.to_q", "12", "13"]),
        (
            {"layers.0.attention.to_q": (12, 12), "layers.7.feed_forward.w1": (32, 16)},
            ["layers.0.attention.to_q", "layers.7.feed_forward.w1", "12", "16"],
        ),
        ({"layers.0.adaLN_modulation.0": (49, 8)}, ["layers.0.adaLN_modulation.0", "49", "four times"]),
    ],
)
def test_infer_sizes_names_the_modules_that_disagree(shapes, words):
    with pytest.raises(ValueError) as error:
        zimage.infer_sizes(shapes)
    assert [word for word in words if word not in str(error.value)] == []
