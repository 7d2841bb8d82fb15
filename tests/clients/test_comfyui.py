"""What ComfyUI makes of the trainers' files and of every form that we write: its own code, and our reading of its rules.

Every test runs on both, so that the rules, which need no ComfyUI, say what its code does. Without a checkout of its source, the
tests of its own code are skipped.
"""

from collections.abc import Iterator

import pytest
import torch
from clients import comfyui, comfyui_source
from oracles import producers
from oracles.dense import relative
from safetensors.torch import load_file
from workspace import FEW, Workspace

SHAPES = producers.small_shapes(n_layers=3)
RANK = 3

WHOLE = (
    *("ai-toolkit", "ai-toolkit-all", "musubi-comfy", "onetrainer-legacy", "onetrainer-diffusers", "onetrainer-original"),
    *("onetrainer-comfy", "simpletuner-comfyui", "simpletuner-lycoris-locon", "diffusers", "diffsynth", "diffusion-pipe"),
    *("none-trainer", "none-converter", "none-converter-fp8", "comfyui-train", "comfyui-extract"),
    *("lora-linear-layer", "lora-ab-bare", "lora-dot", "lora-underscore"),
    *("ai-toolkit-lokr", "ai-toolkit-lokr-fp16", "ai-toolkit-lokr-old", "ai-toolkit-lokr-split", "onetrainer-lokr"),
    *("simpletuner-lycoris-lokr", "lycoris-lokr-both", "diffusion-pipe-lokr", "diffusion-pipe-lokr-split"),
    *("onetrainer-loha", "lycoris-loha", "comfyui-train-loha", "musubi-comfy-lokr"),
    *("comfyui-full-diff", "lycoris-full", "ai-toolkit-all-layers", "comfyui-train-all", "ai-toolkit-full-some"),
)
NOTHING = ("peft", "videox-fun", "musubi-convert-other-old")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# What flat names lose: those of diffusers that differ from the native ones.
FLAT = (*ATTENTION, "all_x_embedder.2-1", "all_final_layer.2-1.linear", "all_final_layer.2-1.adaLN_modulation.1")
LOST = {
    "musubi": FLAT,
    "kohya-resized": FLAT,
    "musubi-lokr": FLAT,
    "musubi-loha": FLAT,
    "onetrainer-kohya": FLAT,
    "none-trainer-old": ("to_q", "to_k", "to_v"),
    "anime-z": ("to_q", "to_k", "to_v"),
}
# Its scale stands in the metadata, which ComfyUI does not read: it takes 1.
SCALES = {"simpletuner-peft": 0.5, "diffusers-alpha": 0.125, "diffusers-rslora": 3.0 / RANK**0.5}


@pytest.fixture(scope="session")
def _process() -> Iterator[comfyui_source.Process]:
    process = comfyui_source.Process()
    yield process
    process.close()


@pytest.fixture(params=["rules", "source"])
def comfy(request):
    """ComfyUI, as an object with `apply` and `key_map`."""
    if request.param == "rules":
        return comfyui
    if comfyui_source.root() is None:
        pytest.skip("no ComfyUI at $COMFYUI_ROOT or ~/ComfyUI: git clone https://github.com/Comfy-Org/ComfyUI ~/ComfyUI")
    return request.getfixturevalue("_process")


def make(name: str) -> producers.Made:
    return producers.PRODUCERS[name].make(SHAPES, RANK, 0, torch.float32)


def agree(found: comfyui.Applied, wanted: dict[str, torch.Tensor], tolerance: float = 1e-9) -> None:
    assert found.deltas.keys() == wanted.keys()
    for module, delta in wanted.items():
        assert relative(found.deltas[module], delta) <= tolerance, module
    assert not found.failed


@pytest.mark.parametrize("name", WHOLE)
def test_files_that_are_read_whole(comfy, name):
    made = make(name)
    found = comfy.apply(made.tensors, SHAPES)
    agree(found, made.deltas)
    assert not found.ignored


@pytest.mark.parametrize("name", NOTHING)
def test_files_of_which_nothing_is_read(comfy, name):
    made = make(name)
    found = comfy.apply(made.tensors, SHAPES)
    assert not found.deltas and set(found.ignored) == set(made.tensors)


@pytest.mark.parametrize("name", LOST)
def test_files_that_are_read_in_part(comfy, name):
    made = make(name)
    found = comfy.apply(made.tensors, SHAPES)
    agree(found, {module: delta for module, delta in made.deltas.items() if not module.endswith(LOST[name])})
    assert found.ignored


def test_of_musubis_files_only_the_feed_forward_is_read(comfy):
    """9 of 21: q, k, v and out are dropped with warnings."""
    found = comfy.apply(make("musubi").tensors, SHAPES)
    assert len(found.deltas) == 9 and all(".feed_forward." in module for module in found.deltas)
    assert len(found.ignored) == 3 * 12


@pytest.mark.parametrize("name", SCALES)
def test_a_scale_in_the_metadata_is_not_read(comfy, name):
    made = make(name)
    agree(comfy.apply(made.tensors, SHAPES), {m: delta / SCALES[name] for m, delta in made.deltas.items()}, 1e-6)


def test_a_magnitude_is_ignored(comfy):
    """AI-Toolkit's DoRA becomes a plain LoRA."""
    found = comfy.apply(make("ai-toolkit-dora").tensors, SHAPES)
    assert len(found.deltas) == 24 and all(key.endswith(".magnitude") for key in found.ignored)


@pytest.mark.parametrize("name", ["onetrainer-dora", "lycoris-dora", "lycoris-oft", "lycoris-boft", "lycoris-glora"])
def test_what_needs_the_base_is_not_guessed(name):
    with pytest.raises(NotImplementedError):
        comfyui.apply(make(name).tensors, SHAPES)


def test_names(comfy):
    """Which names lead to a weight, and which rows of it."""
    names, third = comfy.key_map(SHAPES), comfyui.Target("layers.0.attention.qkv", 1)
    for prefix in ("diffusion_model.", "transformer.", ""):
        assert names[f"{prefix}layers.0.attention.to_k"] == third
        assert names[f"{prefix}all_x_embedder.2-1"] == comfyui.Target("x_embedder")
    assert names["lycoris_layers_0_attention_to_k"] == third
    assert names["diffusion_model.layers.0.attention.qkv"] == comfyui.Target("layers.0.attention.qkv")
    assert names["lora_unet_layers_0_attention_qkv"] == comfyui.Target("layers.0.attention.qkv")
    assert names["lora_unet_layers_0_attention_out"] == comfyui.Target("layers.0.attention.out")
    for unknown in (
        *("lora_unet_layers_0_attention_to_k", "lora_unet_layers_0_attention_to_out_0", "lora_unet_all_x_embedder_2-1"),
        *("lora_unet__layers_0_feed_forward_w1", "base_model.model.layers.0.feed_forward.w1"),
        *("lora_transformer_layers_0_feed_forward_w1", "layers.0.attention.qkv", "transformer.layers.0.attention.qkv"),
    ):
        assert unknown not in names
    assert names == comfyui.key_map(SHAPES)


Q, QKV = "layers.0.attention.to_q", "diffusion_model.layers.0.attention.qkv"


def pair(name: str, out: int = 48, value: float = 1.0, up: str = "lora_B", down: str = "lora_A") -> dict[str, torch.Tensor]:
    return {f"{name}.{up}.weight": torch.full((out, 1), value), f"{name}.{down}.weight": torch.ones(1, 48)}


def test_the_whole_qkv_and_its_third_add_up(comfy):
    found = comfy.apply(pair(QKV, 3 * 48) | pair(f"diffusion_model.{Q}", value=2.0), SHAPES)
    assert [float(found.deltas[f"layers.0.attention.{n}"][0, 0]) for n in comfyui.QKV] == [3.0, 1.0, 1.0]


def test_of_two_names_for_one_weight_the_later_wins(comfy):
    stem = "diffusion_model.layers.0.attention"
    found = comfy.apply(pair(f"{stem}.to_out.0", value=2.0) | pair(f"{stem}.out"), SHAPES)
    assert float(found.deltas["layers.0.attention.to_out.0"][0, 0]) == 2.0 and not found.ignored
    found = comfy.apply(pair(Q, value=2.0) | pair(f"transformer.{Q}"), SHAPES)
    assert float(found.deltas[Q][0, 0]) == 2.0


def test_half_a_pair(comfy):
    whole = pair(f"diffusion_model.{Q}")
    up, down = whole
    assert comfy.apply({down: whole[down]}, SHAPES).ignored == [down]
    with pytest.raises(KeyError, match="lora_A"):
        comfy.apply({up: whole[up]}, SHAPES)


def test_a_change_of_another_size_is_left_out(comfy):
    found = comfy.apply(pair(f"diffusion_model.{Q}", out=40), SHAPES)
    assert not found.deltas and found.failed == ["layers.0.attention.qkv"]


def test_a_negative_alpha_is_a_sign(comfy):
    found = comfy.apply(pair(f"diffusion_model.{Q}") | {f"diffusion_model.{Q}.alpha": torch.tensor(-2.0)}, SHAPES)
    assert float(found.deltas[Q][0, 0]) == -2.0


FORMS = {
    "ai-toolkit": {"format": "ai-toolkit"},
    "diffusers": {"format": "diffusers"},
    "comfyui": {"format": "comfyui"},
    "ai-toolkit, own ranks": {"format": "ai-toolkit", "uniform": False},
    "diffusers, own ranks": {"format": "diffusers", "uniform": False},
    "comfyui, own ranks": {"format": "comfyui", "uniform": False},
}
TRAINERS = {"every module": ("ai-toolkit-all", "kohya-resized"), "layers": ("ai-toolkit", "musubi"), "fused": ("comfyui-train",)}


def merged(work: Workspace, save: dict, *trainers: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The file that our command line writes, and the float64 sum of the inputs' own deltas."""
    work.shapes = FEW
    loras, wanted = [], {}
    for seed, trainer in enumerate(trainers):
        ratio = (0.9, -0.6)[seed]
        work.lora(f"{trainer}.safetensors", trainer, rank=2 + seed, seed=seed)
        loras.append({"lora": f"{trainer}.safetensors", "ratio": ratio})
        made = producers.PRODUCERS[trainer].make(FEW, 2 + seed, seed, torch.bfloat16)
        for module, delta in made.deltas.items():
            wanted[module] = wanted.get(module, 0) + ratio * delta
    done = work.zit("run", work.job({"name": "one", "loras": loras}, save={"dtype": "fp32"} | save))
    assert done.code == 0, done.err
    return load_file(work.out / "merged_cat_one.safetensors"), wanted


@pytest.mark.parametrize("trainers", TRAINERS)
@pytest.mark.parametrize("form", FORMS)
def test_our_forms_are_read_whole(comfy, work, form, trainers):
    tensors, wanted = merged(work, FORMS[form], *TRAINERS[trainers])
    found = comfy.apply(tensors, FEW)
    for module in found.deltas.keys() - wanted.keys():
        assert not found.deltas[module].any(), f"{module} was filled up for other clients and must do nothing"
        del found.deltas[module]
    agree(found, wanted, 1e-6)
    assert not found.ignored and not found.elsewhere


@pytest.mark.parametrize("trainer", ["ai-toolkit-lokr", "onetrainer-lokr", "lycoris-lokr-both", "ai-toolkit-lokr-split"])
def test_a_lokr_that_stays_one_is_read_whole(comfy, work, trainer):
    tensors, wanted = merged(work, {"keep_lokr": True}, trainer)
    found = comfy.apply(tensors, FEW)
    agree(found, wanted, 1e-6)
    assert not found.ignored and any(".lokr_" in key for key in tensors)


@pytest.mark.parametrize("uniform", [True, False])
def test_the_kohya_form_is_not_for_comfyui(comfy, work, uniform):
    """It is musubi's: ComfyUI reads what has one name in both models, and warns of the rest."""
    tensors, wanted = merged(work, {"format": "kohya", "uniform": uniform}, *TRAINERS["every module"])
    found = comfy.apply(tensors, FEW)
    agree(found, {module: delta for module, delta in wanted.items() if not module.endswith(FLAT)}, 1e-6)
    assert len(found.ignored) == 3 * sum(module.endswith(FLAT) for module in wanted)
