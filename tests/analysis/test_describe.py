"""`inspect`: who wrote a file, what is in it, what is missing or odd, for people and as JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from oracles import producers
from oracles.producers import PRODUCERS, Made
from screen import fits
from workspace import FEW, REAL, SMALL, Workspace

from extensions_built_in.zit_merge.analysis.describe import Description, describe
from extensions_built_in.zit_merge.analysis.measure import measure
from extensions_built_in.zit_merge.formats.reader import load_lora
from extensions_built_in.zit_merge.formats.trainers import recognise
from extensions_built_in.zit_merge.report.text.describe import description_text

RANK = 2
TO_COMFY = "musubi-tuner (convert_z_image_lora_to_comfy.py)"
TO_OTHER = "musubi-tuner (convert_lora.py)"
DIFFUSERS = "diffusers' training script or SimpleTuner"
SHARED = {  # what several programs write alike
    "transformer A/B": "diffusers' training script, SimpleTuner or OneTrainer (DIFFUSERS form)",
    "kohya": "musubi-tuner or OneTrainer (KOHYA form)",
    "dm A/B alpha": "OneTrainer (COMFY form), SimpleTuner or zit_merge",
    "dm LoKr": f"AI-Toolkit, OneTrainer (COMFY form) or {TO_OTHER}",
    "lycoris": "SimpleTuner or LyCORIS",
    "lycoris LoKr": "SimpleTuner, LyCORIS or AI-Toolkit (old LoKr keys)",
    "fused kohya": f"{TO_COMFY} or None_Z-image-Turbo_trainer (convert_lora_comfyui.py)",
}

# producer -> (by its metadata, by its keys once the metadata are gone); None: not recognised. From facts/formats.csv.
WRITTEN: dict[str, tuple[str | None, str | None]] = {
    "ai-toolkit": ("AI-Toolkit", "AI-Toolkit"),
    "ai-toolkit-all": ("AI-Toolkit", "AI-Toolkit"),
    "ai-toolkit-all-layers": ("AI-Toolkit", "AI-Toolkit"),
    "ai-toolkit-full-some": ("AI-Toolkit", "AI-Toolkit"),
    "ai-toolkit-fullrank": ("AI-Toolkit", "AI-Toolkit (fullrank)"),
    "ai-toolkit-lokr": ("AI-Toolkit", "AI-Toolkit"),
    "ai-toolkit-lokr-fp16": ("AI-Toolkit", "AI-Toolkit"),
    "ai-toolkit-lokr-old": ("AI-Toolkit (old LoKr keys)", "AI-Toolkit (old LoKr keys)"),
    "ai-toolkit-lokr-split": ("AI-Toolkit", SHARED["dm LoKr"]),
    "musubi": ("musubi-tuner", SHARED["kohya"]),
    "musubi-lokr": ("musubi-tuner", SHARED["kohya"]),
    "musubi-loha": ("musubi-tuner", SHARED["kohya"]),
    "musubi-convert-other": (TO_OTHER, TO_OTHER),
    "musubi-convert-other-old": (TO_OTHER, TO_OTHER),
    "musubi-convert-other-loha": (TO_OTHER, TO_OTHER),
    "musubi-comfy": (TO_COMFY, SHARED["fused kohya"]),
    "musubi-comfy-blocks": (TO_COMFY, SHARED["fused kohya"]),
    "musubi-comfy-lokr": (TO_COMFY, SHARED["fused kohya"]),
    "kohya-resized": ("a resizing or merging tool of kohya's family", SHARED["kohya"]),
    "onetrainer-legacy": ("OneTrainer (LEGACY form)", "OneTrainer (LEGACY form)"),
    "onetrainer-diffusers": ("OneTrainer (DIFFUSERS form)", SHARED["transformer A/B"]),
    "onetrainer-kohya": ("OneTrainer (KOHYA form)", SHARED["kohya"]),
    "onetrainer-original": ("OneTrainer (ORIGINAL form)", "OneTrainer (ORIGINAL form)"),
    "onetrainer-comfy": ("OneTrainer (COMFY form)", SHARED["dm A/B alpha"]),
    "onetrainer-lokr": ("OneTrainer", "OneTrainer"),
    "onetrainer-loha": ("OneTrainer", "OneTrainer"),
    "simpletuner-peft": (DIFFUSERS, SHARED["transformer A/B"]),
    "simpletuner-comfyui": ("SimpleTuner", SHARED["dm A/B alpha"]),
    "simpletuner-lycoris-locon": ("SimpleTuner (LyCORIS)", SHARED["lycoris"]),
    "simpletuner-lycoris-lokr": ("SimpleTuner (LyCORIS)", SHARED["lycoris LoKr"]),
    "diffusers": (DIFFUSERS, SHARED["transformer A/B"]),
    "diffusers-alpha": (DIFFUSERS, SHARED["transformer A/B"]),
    "diffusers-rslora": (DIFFUSERS, SHARED["transformer A/B"]),
    "diffusers-patterns": (DIFFUSERS, SHARED["transformer A/B"]),
    "peft": (None, "PEFT (save_pretrained)"),
    "diffsynth": (None, "DiffSynth-Studio, ModelScope or Z-Image-i2L"),
    "diffusion-pipe": (None, "diffusion-pipe"),
    "diffusion-pipe-lokr": (None, "diffusion-pipe"),
    "diffusion-pipe-lokr-split": (None, "diffusion-pipe"),
    "videox-fun": (None, "VideoX-Fun"),
    "none-trainer": ("None_Z-image-Turbo_trainer", "None_Z-image-Turbo_trainer"),
    "none-trainer-old": ("None_Z-image-Turbo_trainer", "None_Z-image-Turbo_trainer (old)"),
    "none-converter": (None, SHARED["fused kohya"]),
    "none-converter-fp8": (None, SHARED["fused kohya"]),
    "comfyui-train": (None, "ComfyUI (Train LoRA)"),
    "comfyui-train-all": (None, "ComfyUI (Train LoRA)"),
    "comfyui-train-loha": (None, "ComfyUI (Train LoRA)"),
    "comfyui-extract": (None, "ComfyUI (Extract and Save Lora)"),
    "comfyui-extract-all": (None, "ComfyUI (Extract and Save Lora)"),
    "comfyui-full-diff": (None, "ComfyUI (Extract and Save Lora)"),
    "lycoris-lokr-both": ("SimpleTuner (LyCORIS)", SHARED["lycoris LoKr"]),
    "lycoris-loha": ("SimpleTuner (LyCORIS)", SHARED["lycoris"]),
    "lycoris-full": ("SimpleTuner (LyCORIS)", SHARED["lycoris"]),
    "lycoris-norm": ("SimpleTuner (LyCORIS)", SHARED["lycoris"]),
    "anime-z": (None, "Anime-Z"),
    "anime-z-alpha-apart": (None, "Anime-Z"),
    "lora-linear-layer": (None, None),
    "lora-ab-bare": (None, None),
    "lora-dot": (None, None),
    "lora-underscore": (None, None),
}
NEED_BASE = {"dora", "oft", "ia3", "glora"}  # without it they have no norms
READABLE = [name for name, producer in PRODUCERS.items() if producer.kind not in NEED_BASE]

Q, K, V = (f"layers.0.attention.to_{c}" for c in "qkv")


@cache
def _made(name: str, rank: int, is_whole: bool) -> Made:
    return PRODUCERS[name].make(SMALL if is_whole else FEW, rank, 0, torch.bfloat16)


def made_by(name: str, rank: int = RANK, *, is_whole: bool = True) -> Made:
    """A small model's file, of all layers or few, whose table of tensors may be changed."""
    made = _made(name, rank, is_whole)
    return replace(made, tensors=dict(made.tensors))


def write(folder: Path, made: Made, name: str = "f.safetensors") -> Path:
    producers.save(made, folder / name)
    producers.save_sidecars(made, folder)
    return folder / name


def described(folder: Path, made: Made, **answers: str) -> Description:
    return describe(measure([load_lora(write(folder, made), **answers)]))


def facts_of(folder: Path, made: Made) -> dict:
    return described(folder, made).to_json()


def text_of(folder: Path, made: Made) -> str:
    return description_text(described(folder, made))


def pairs(*modules: str, prefix: str = "diffusion_model.", rank: int = RANK, alpha: float | None = None) -> Made:
    """A file of A/B pairs of ones, in the small model's sizes."""
    tensors = {}
    for module in modules:
        out, into = SMALL[module]
        tensors[f"{prefix}{module}.lora_A.weight"] = torch.ones(rank, into)
        tensors[f"{prefix}{module}.lora_B.weight"] = torch.ones(out, rank)
        if alpha is not None:
            tensors[f"{prefix}{module}.alpha"] = torch.tensor(alpha)
    return Made(tensors, {}, {})


def said(sentences: list[str], words: str) -> list[str]:
    return [s for s in sentences if words in s]


def test_every_readable_producer_has_an_expectation():
    assert sorted(WRITTEN) == sorted(READABLE)


@pytest.mark.parametrize("name", READABLE)
def test_the_trainer_of_every_producer(tmp_path, name):
    by_metadata, by_keys = WRITTEN[name]
    made = made_by(name, is_whole=False)
    found = recognise(load_lora(write(tmp_path, made)))
    expected = (by_metadata, "metadata") if by_metadata else (by_keys, "keys")
    assert (found and (found.name, found.by)) == (expected if expected[0] else None)
    bare = recognise(load_lora(write(tmp_path, replace(made, metadata={}))))
    assert (bare and (bare.name, bare.by, bare.version)) == (by_keys and (by_keys, "keys", None))


@pytest.mark.parametrize(("name", "version"), [("ai-toolkit", "0.12.26"), ("onetrainer-comfy", "23df383"), ("musubi", None)])
def test_versions_come_from_the_metadata(tmp_path, name, version):
    assert facts_of(tmp_path, made_by(name))["trainer"]["version"] == version


@pytest.mark.parametrize(
    ("metadata", "name", "version"),
    [
        ({"zit_merge.recipe": "{}", "zit_merge.version": "0.1.0", "software": '{"name": "ai-toolkit"}'}, "zit_merge", "0.1.0"),
        ({"zit_merge.version": "0.2.0"}, "zit_merge", "0.2.0"),
        ({"software": '{"name": "ai-toolkit", "version": "1"}', "training_info": "{}"}, "AI-Toolkit", "1"),
        ({"software": '{"name": "ai-toolkit", "version": "1"}'}, "AI-Toolkit (its merging script)", "1"),
        ({"software": '"name": "ai-toolkit" and no JSON', "training_info": "{}"}, "AI-Toolkit", None),
        ({"software": '["name": "ai-toolkit"', "training_info": "{}"}, "AI-Toolkit", None),
        ({"ot_branch": "master"}, "OneTrainer", None),
        ({"modelspec.architecture": "z-image-turbo-v2/lora"}, "SimpleTuner", None),
        ({"ss_network_module": "networks.lora_zimage"}, TO_OTHER, None),
        ({"ss_network_module": "lycoris.kohya"}, "LyCORIS in a trainer of kohya's family", None),
        ({"ss_network_module": "networks.lora_flux"}, "a trainer of kohya's family", None),
        ({"ss_training_comment": "dimension is resized from 32 to 8; "}, "a resizing tool of kohya's family", None),
        ({"lora_adapter_metadata": '{"transformer.lora_alpha": 2}'}, DIFFUSERS, None),
        ({"source_loras": "a @ 1.0"}, "ComfyUI-LoRA-Optimizer", None),
        ({"refined_by": "x"}, "Realtime-Lora", None),
        ({"modelspec.merged_from": "a, b"}, "a merging tool", None),
    ],
)
def test_marks_in_the_metadata(tmp_path, metadata, name, version):
    found = recognise(load_lora(write(tmp_path, replace(pairs(Q, K, V), metadata=metadata))))
    assert found and (found.name, found.version, found.by) == (name, version, "metadata")


@pytest.mark.parametrize(
    "metadata",
    [
        {"software": '{"name": "my-ai-toolkit-fork"}'},
        {"modelspec.architecture": "Z-Image/lora"},
        {"format": "pt"},
        {"ss_network_dim": "32"},
        {"ss_training_comment": "dimension matters"},
    ],
)
def test_metadata_that_name_nobody(tmp_path, metadata):
    found = recognise(load_lora(write(tmp_path, replace(pairs(Q, K, V), metadata=metadata))))
    assert found and found.by == "keys"


def test_the_core_modules_alone_may_be_of_two_programs(tmp_path):
    found = recognise(load_lora(write(tmp_path, pairs(Q))))
    assert found and found.name == f"AI-Toolkit or {TO_OTHER}"


def test_a_file_of_two_prefixes_has_no_key_style(tmp_path):
    tensors = pairs(Q).tensors | pairs(K, prefix="transformer.").tensors
    assert recognise(load_lora(write(tmp_path, Made(tensors, {}, {})))) is None


@pytest.mark.parametrize("name", READABLE)
def test_norms_against_the_float64_deltas(tmp_path, name):
    made = made_by(name, is_whole=False)
    facts = facts_of(tmp_path, made)
    wanted = {module: float(delta.norm()) for module, delta in made.deltas.items()}
    assert facts["norms"] == pytest.approx(wanted, rel=1e-5)
    assert facts["norm"] == pytest.approx(math.hypot(*wanted.values()), rel=1e-5)
    assert facts["modules"] == len(wanted) == len(facts["ranks"]) == len(facts["scales"])


@pytest.mark.parametrize(
    ("name", "algorithms", "rank"),
    [
        ("ai-toolkit", {"LoRA": 240}, "2"),
        ("musubi-comfy", {"LoRA": 210}, "2-6"),
        ("ai-toolkit-lokr", {"LoKr": 240}, "8 at most"),
        ("musubi-loha", {"LoHa": 210}, "4 at most"),
        ("lycoris-full", {"full difference": 238}, "8 at most"),
        ("musubi-comfy-lokr", {"LoKr": 120, "LoRA": 90}, "4-6 at most"),
    ],
)
def test_algorithm_and_rank(tmp_path, name, algorithms, rank):
    found = described(tmp_path, made_by(name))
    assert found.algorithms == algorithms
    text = description_text(found)
    assert re.search(rf"^rank {{10}}{rank}$", text, re.M)
    assert all(kind in re.search(r"^algorithm .*$", text, re.M)[0] for kind in algorithms)


@pytest.mark.parametrize(
    ("name", "alpha", "scale"),
    [("ai-toolkit", None, 1), ("musubi", 1, 0.5), ("diffusers-alpha", None, 0.125), ("ai-toolkit-lokr-fp16", math.inf, 1)],
)
def test_alpha_as_stored_and_the_scale_that_is_applied(tmp_path, name, alpha, scale):
    found = described(tmp_path, made_by(name))
    stored = set(found.alphas.values())
    assert stored == (set() if alpha is None else {None if alpha == math.inf else alpha})
    assert set(found.scales.values()) == {scale}
    text = description_text(found)
    assert re.search(rf"^alpha/rank {{4}}{scale}$", text, re.M)
    assert f"{'alpha':<14}{'not in the keys' if alpha is None else f'{alpha:g}'}" in text
    assert ("without a meaning" in text) is (alpha == math.inf)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("ai-toolkit", "bf16"), ("comfyui-extract", "fp16"), ("none-converter-fp8", "float8_e4m3fn")],
)
def test_dtype_as_stored(tmp_path, name, dtype):
    assert facts_of(tmp_path, made_by(name))["dtype"] == dtype


def test_changes_that_add_up_at_two_scales_have_no_one_scale(tmp_path):
    fused = {"lora_A.weight": torch.ones(RANK, 8), "lora_B.weight": torch.ones(24, RANK), "alpha": torch.tensor(1.0)}
    made = pairs(Q, K, V, alpha=2.0)
    made.tensors.update({f"diffusion_model.layers.0.attention.qkv.{part}": tensor for part, tensor in fused.items()})
    found = described(tmp_path, made, qkv="sum")
    assert found.scales == {Q: None, K: None, V: None} and found.ranks[Q] == 2 * RANK
    assert found.norms[Q] == pytest.approx(8 * RANK * 1.5)  # ones: the entries are RANK * (1 + 1 / 2)
    assert "alpha/rank    differs in changes that add up\n" in description_text(found)
    text = description_text(replace(found, scales=found.scales | {Q: 0.5}))
    assert "alpha/rank    0.5, differs in changes that add up\n" in text and text.count("mixed") == 2
    assert described(tmp_path, made).norms[Q] == pytest.approx(8 * RANK)


def test_several_dtypes(tmp_path):
    made = pairs(Q, K)
    made.tensors[f"diffusion_model.{K}.lora_A.weight"] = torch.ones(RANK, 8, dtype=torch.float16)
    assert facts_of(tmp_path, made)["dtype"] == "fp32 and fp16"


def test_base_model(tmp_path):
    assert facts_of(tmp_path, made_by("ai-toolkit"))["base_model"] == "zimage"
    assert facts_of(tmp_path, made_by("onetrainer-legacy"))["base_model"] == "Z-Image/lora"
    assert facts_of(tmp_path, made_by("diffsynth"))["base_model"] is None


def without(made: Made, *words: str) -> Made:
    """The file without the keys that a regular expression finds."""
    return replace(made, tensors={k: v for k, v in made.tensors.items() if not any(re.search(w, k) for w in words)})


FULL_SENTENCE = "nothing in noise_refiner, context_refiner and other (embedders and final layer)"


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("ai-toolkit-all", []),
        ("ai-toolkit", [f"{FULL_SENTENCE}, as usual for AI-Toolkit"]),
        ("musubi", ["no adaLN_modulation in layers, as usual for musubi-tuner", f"{FULL_SENTENCE}, as usual for musubi-tuner"]),
        ("none-trainer", ["no adaLN_modulation in layers", FULL_SENTENCE]),
        ("diffusion-pipe", ["nothing in other (embedders and final layer), as usual for diffusion-pipe"]),
        (
            "diffusers",
            [
                f"no adaLN_modulation in layers and noise_refiner, as usual for {DIFFUSERS}",
                f"no w1, w2 and w3 in layers, noise_refiner and context_refiner, as usual for {DIFFUSERS}",
                f"nothing in other (embedders and final layer), as usual for {DIFFUSERS}",
            ],
        ),
    ],
)
def test_missing_of_whole_files(tmp_path, name, missing):
    assert facts_of(tmp_path, made_by(name))["missing"] == missing


@pytest.mark.parametrize(
    ("words", "missing", "lacking"),
    [
        ([r"\.3\.attention\.to_q"], "no to_q in layers 3, though in 29 others", 1),
        ([r"layers\.(3|7|8)\..*(to_q|to_k)"], "no to_q and to_k in layers 3, 7-8, though in 27 others", 6),
        ([r"layers\.(1|2|29)\."], "nothing in layers 1-2, 29", 24),
        ([r"layers\.[0-9]+\.adaLN"], "no adaLN_modulation in layers", 30),
    ],
)
def test_missing_in_some_layers(tmp_path, words, missing, lacking):
    """What AI-Toolkit trains by default is counted beside it; nothing of that is usual."""
    found = facts_of(tmp_path, without(made_by("ai-toolkit"), *words))["missing"]
    assert missing in found
    assert found[-1] == f"{lacking} of the 240 modules that AI-Toolkit trains by default"
    assert len(found) == 3  # and the refiners


def test_missing_in_a_refiner_and_in_other(tmp_path):
    made = without(made_by("ai-toolkit-all"), r"noise_refiner\.1", r"context_refiner\.0.*w1", "t_embedder")
    assert facts_of(tmp_path, made)["missing"] == [
        "nothing in noise_refiner.1",
        "no w1 in context_refiner.0, though in 1 other",
        "no t_embedder.mlp.0 and t_embedder.mlp.2",
    ]


def halves(made: Made, *stems: str) -> Made:
    """The same file with a rank of one in some modules."""
    for key, tensor in made.tensors.items():
        if any(stem in key for stem in stems):
            made.tensors[key] = tensor[:1] if ".lora_A." in key else tensor[:, :1]
    return made


def changed(made: Made, key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Made:
    return replace(made, tensors=made.tensors | {key: change(made.tensors[key])})


def stored_as(made: Made, dtype: torch.dtype) -> Made:
    return replace(made, tensors={k: v.to(dtype) for k, v in made.tensors.items()})


def forgot_alpha(name: str, factor: float = 1 / 3) -> Made:
    """What a converter writes that fuses q, k and v and keeps alpha."""
    made = made_by(name, rank=3)
    return replace(made, tensors={k: v.float() * (factor if k.endswith("qkv.alpha") else 1) for k, v in made.tensors.items()})


A, B = f"diffusion_model.{Q}.lora_A.weight", f"diffusion_model.{Q}.lora_B.weight"
CASES: dict[str, tuple[str, Callable[[], Made], Callable[[], Made]]] = {
    "rank varies": (
        "rank varies (1-2) and there is no lora_adapter_metadata",
        lambda: halves(made_by("ai-toolkit"), "to_q"),
        lambda: replace(halves(made_by("ai-toolkit"), "to_q"), metadata={"lora_adapter_metadata": '{"lora_alpha": 2}'}),
    ),
    "rank varies, kohya": ("rank varies (1-4)", lambda: made_by("kohya-resized"), lambda: made_by("musubi")),
    "rank varies, LoKr": ("rank varies", lambda: made_by("kohya-resized"), lambda: made_by("lycoris-lokr-both")),
    "rank varies, fused": ("rank varies", lambda: made_by("kohya-resized"), lambda: made_by("musubi-comfy")),
    "rank 1 beside alpha": (
        "rank 1 beside an alpha key in 210 modules (e.g. layers.0.attention.to_q): stable-diffusion.cpp divides alpha by",
        lambda: made_by("musubi", rank=1),
        lambda: made_by("ai-toolkit", rank=1),
    ),
    "rank 1 beside alpha, LoKr": (
        "rank 1 beside an alpha key in",
        lambda: made_by("musubi-lokr", rank=1),
        lambda: made_by("ai-toolkit-lokr", rank=1),
    ),
    "alpha ignored": (
        "alpha is not the rank (alpha / rank 2) under lora_A / lora_B names",
        lambda: made_by("onetrainer-comfy"),
        lambda: made_by("onetrainer-legacy"),
    ),
    "rank varies, PEFT": (  # no loader that takes one module's alpha for all reads these names
        "rank varies",
        lambda: halves(pairs(Q, K, V), "to_q"),
        lambda: halves(pairs(Q, K, V, prefix="base_model.model."), "to_q"),
    ),
    "alpha under down / up": (
        "alpha is not the rank",
        lambda: made_by("onetrainer-original"),
        lambda: made_by("onetrainer-legacy"),
    ),
    "alpha is the rank": ("alpha is not the rank", lambda: pairs(Q, alpha=1.0), lambda: pairs(Q, alpha=2.0)),
    "q, k, v": (
        "to_q, to_k and to_v are not complete in layers.0: stable-diffusion.cpp drops what follows the gap, Nunchaku refuses",
        lambda: pairs(Q, V),
        lambda: pairs(Q, K, V),
    ),
    "q, k, v in many": (
        "to_q, to_k and to_v are not complete in 30 blocks (e.g. layers.0)",
        lambda: without(made_by("ai-toolkit"), "to_k"),
        lambda: without(made_by("ai-toolkit"), "to_k", "to_q", "to_v"),
    ),
    "w1 without w3": (
        "w1 and w3 are not complete in noise_refiner.1: Nunchaku refuses",
        lambda: pairs("noise_refiner.1.feed_forward.w1"),
        lambda: pairs("noise_refiner.1.feed_forward.w1", "noise_refiner.1.feed_forward.w3"),
    ),
    "all zeros": (
        f"{Q} changes nothing, all zeros",
        lambda: changed(pairs(Q, K, V), B, torch.zeros_like),
        lambda: changed(pairs(Q, K, V), B, lambda x: x * 1e-30),
    ),
    "many zeros": (
        f"3 modules (e.g. {Q}) change nothing",
        lambda: stored_as(replace(pairs(Q, K, V), tensors={k: v * 0 for k, v in pairs(Q, K, V).tensors.items()}), torch.bfloat16),
        lambda: pairs(Q, K, V),
    ),
    "alpha not tripled": (
        "merge it with blocks: {qk: 3, to_v: 3}",
        lambda: forgot_alpha("none-converter"),
        lambda: forgot_alpha("none-converter", 1.0),
    ),
    "fused at one rank": ("forgot to triple", lambda: forgot_alpha("none-converter"), lambda: made_by("comfyui-train")),
    "a third at the same rank": (
        "forgot to triple",
        lambda: forgot_alpha("none-converter"),
        lambda: forgot_alpha("comfyui-train"),
    ),
    "half, not a third": ("forgot to triple", lambda: forgot_alpha("musubi-comfy"), lambda: forgot_alpha("musubi-comfy", 0.5)),
    "fp8": (
        "300 tensors are float8_e4m3fn: diffusers since 0.38 refuses the file",
        lambda: made_by("none-converter-fp8"),
        lambda: made_by("none-converter"),
    ),
    "NaN": (
        f"{Q} holds NaN or infinity: the LoRA is broken",
        lambda: changed(pairs(Q, K, V), A, lambda x: x * math.nan),
        lambda: pairs(Q, K, V),
    ),
    "infinity": (f"{Q} holds NaN", lambda: changed(pairs(Q, K, V), B, lambda x: x * math.inf), lambda: pairs(Q, K, V)),
    "sizes": (
        f"sizes of another or a pruned model: {Q} is 8x8, Z-Image's is 3840x3840",
        lambda: pairs(Q, K, V),
        lambda: PRODUCERS["ai-toolkit"].make(REAL, 1, 0, torch.bfloat16),
    ),
    "sizes that disagree": (
        f"sizes that do not agree with each other: {Q} needs dim = 8, {K} needs dim = 4",
        lambda: Made(pairs(Q).tensors | {k: v.view(4, 4) for k, v in pairs(K, rank=2).tensors.items()}, {}, {}),
        lambda: pairs(Q, K, V),
    ),
    "A + A": (
        "added A to A and B to B",
        lambda: replace(pairs(Q), metadata={"software": '{"name": "ai-toolkit"}'}),
        lambda: replace(pairs(Q), metadata={"software": '{"name": "ai-toolkit"}', "training_info": "{}"}),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_odd(tmp_path, case):
    words, has, has_not = CASES[case]
    for make, expected in ((has, 1), (has_not, 0)):
        found = described(tmp_path, make())
        assert len(said(found.odd, words)) == expected, found.odd
        assert (" ".join(words.split()) in " ".join(description_text(found).split())) is bool(expected)


W1 = "layers.1.feed_forward.w1"
RANK_THERE, TOGETHER = "AI-Toolkit reads the rank at layers.0.attention.to_k", "programs count q, k and v of a block together"
PADDED = {  # modules of the LoRA -> how many are added, and why
    "one module": ((W1,), 4, (RANK_THERE, TOGETHER)),
    "all but the probe's block": ((Q.replace("layers.0", "layers.3"), W1), 6, (RANK_THERE, TOGETHER)),
    "the probe": ((K,), 2, (TOGETHER,)),
    "what belongs to nothing": ((Q, K, V, "layers.3.feed_forward.w2"), 0, ()),
    "one is added": ((Q, V), 1, (RANK_THERE,)),
    "a refiner": (("noise_refiner.1.attention.to_v",), 5, (RANK_THERE, TOGETHER)),
}


@pytest.mark.parametrize("case", PADDED)
def test_modules_of_zeros_that_we_add_are_explained_and_not_odd(work, case):
    modules, added, reasons = PADDED[case]
    producers.save(pairs(*modules), work.folder / "in.safetensors")
    plan = " ".join(work.zit("merge", "in.safetensors", "-o", "out.safetensors", "--ratio", 1, "--shapes", "free").ok().split())
    count = f"{len(modules) + added} modules" + f" ({added} of zeros)" * bool(added)
    assert f"writes {count}, rank" in plan and f"wrote {count}, rank" in plan
    text = work.zit("inspect", "out.safetensors").ok()
    facts = json.loads(work.zit("inspect", "out.safetensors", "--json").ok())
    assert facts["modules"] == len(modules) + added
    assert [s for s in facts["odd"] if "sizes of another" not in s] == []
    assert len(facts["remarks"]) == bool(added) == ("of zeros" in text) == ("note: " in plan)
    for reason in (RANK_THERE, TOGETHER):
        assert (reason in plan) is (reason in "".join(facts["remarks"])) is (reason in reasons)
    alone = json.loads(work.zit("inspect", "in.safetensors", "--json").ok())
    assert facts["missing"] == alone["missing"]


def test_zeros_that_we_did_not_add_stay_odd(work):
    """By another program, or no module that anything counts."""
    zeros = pairs(Q, K, V, W1)
    zeros.tensors[f"diffusion_model.{V}.lora_B.weight"].zero_()
    producers.save(zeros, work.folder / "in.safetensors")
    work.zit("merge", "in.safetensors", "-o", "out.safetensors", "--ratio", 1, "--shapes", "free", "--layers", "1=0").ok()
    for name, wanted in (("in", f"{V} changes nothing"), ("out", f"2 modules (e.g. {W1}) change nothing")):
        facts = json.loads(work.zit("inspect", f"{name}.safetensors", "--json").ok())
        assert len(said(facts["odd"], f"{wanted}, all zeros")) == len(said(facts["odd"], "all zeros")) == 1


def test_a_whole_file_of_the_real_sizes_has_nothing_odd(tmp_path):
    shapes = {name: shape for name, shape in producers.small_shapes(3840, 10240, 256, 2560).items() if name in (Q, K, V)}
    assert facts_of(tmp_path, PRODUCERS["ai-toolkit"].make(shapes, 1, 0, torch.bfloat16))["odd"] == []


def test_a_file_with_nan_shows_the_rest(work):
    work.lora("me.safetensors", change=lambda tensors: tensors[A].fill_(math.nan))
    facts = json.loads(work.zit("inspect", "me.safetensors", "--json").ok())
    assert facts["norms"].pop(Q) is None and facts["norm"] is None
    assert len(facts["norms"]) == 239 and min(facts["norms"].values()) > 0
    text = work.zit("inspect", "me.safetensors").ok()
    assert "broken" in next(line for line in text.splitlines() if line.startswith("0  "))
    assert "NaN or infinity" in text


def test_a_product_that_overflows_is_no_number_in_json(tmp_path):
    tensors = {key: torch.full_like(value, 1e200, dtype=torch.float64) for key, value in pairs(Q).tensors.items()}
    facts = facts_of(tmp_path, Made(tensors, {}, {}))
    assert facts["norms"] == {Q: None} and said(facts["odd"], "NaN or infinity")


@pytest.mark.parametrize("name", READABLE)
def test_it_fits_a_terminal(tmp_path, name):
    text = text_of(tmp_path, made_by(name))
    assert text.isascii() and max(map(len, text.splitlines())) <= 80
    assert all(c.isprintable() or c == "\n" for c in text)


LABELS = ("file", "made by", "format", "algorithm", "modules", "rank", "alpha", "alpha/rank", "dtype", "norm", "base model")


@pytest.mark.parametrize("name", ["ai-toolkit", "peft", "lora-dot", "comfyui-train-all"])
def test_the_head_has_every_line_in_order(tmp_path, name):
    lines = text_of(tmp_path, made_by(name)).split("\n\n")[0].splitlines()
    found = [line[:14].strip() for line in lines if line[:14].strip()]
    assert found == [*LABELS, "trigger words"]


def test_who_wrote_it_and_how_that_is_known(tmp_path):
    def line(name: str) -> str:
        return re.search(r"^made by +(.*)$", text_of(tmp_path, made_by(name)), re.M)[1]

    assert line("ai-toolkit") == "AI-Toolkit 0.12.26, by its metadata"
    assert line("diffusion-pipe") == "diffusion-pipe, by its key style"
    assert line("lora-dot") == "not recognised"


def table(text: str, title: str) -> list[str]:
    """The rows of a table, without its head."""
    block = next(b for b in text.split("\n\n") if b.splitlines()[0] == title)
    return block.splitlines()[2:]


def test_tables_of_rank_and_scale_where_they_vary(tmp_path):
    made = halves(made_by("ai-toolkit"), "layers.0.attention.to_q", "layers.29.feed_forward.w2")
    made.tensors["diffusion_model.layers.1.feed_forward.w3.alpha"] = torch.tensor(0.5)
    text = text_of(tmp_path, made)
    ranks = [row.split() for row in table(text, "rank")]
    assert ranks == [["0", "2", "1", *"222222"], ["1-28", *"22222222"], ["29", *"222222", "1", "2"]]
    scales = [row.split() for row in table(text, "alpha / rank, as it is applied")]
    assert scales == [["0", *"11111111"], ["1", *"1111111", "0.25"], ["2-29", *"11111111"]]
    assert "rank          1-2\n" in text and "alpha/rank    0.25 to 1\n" in text


@pytest.mark.parametrize("name", ["ai-toolkit", "musubi", "diffusers-alpha"])
def test_no_such_tables_where_they_do_not(tmp_path, name):
    text = text_of(tmp_path, made_by(name))
    assert "\n\nrank" not in text and "as it is applied\n" not in text
    assert len(table(text, "norm of the change, per layer and component")) >= 30


def test_ranks_of_many_letters_still_fit(tmp_path):
    scales = {Q: 1e-9, K: 123456.0, V: None}
    text = description_text(replace(described(tmp_path, pairs(Q, K, V)), ranks={Q: 10**9, K: 65536, V: 1}, scales=scales))
    assert max(map(len, text.splitlines())) <= 80
    assert table(text, "rank")[0].split()[1:5] == ["-", "1e+09", "65536", "1"]
    assert table(text, "alpha / rank, as it is applied")[0].split()[1:5] == ["-", "1e-09", "1e+05", "mixed"]


def test_long_names_and_words_are_cut_with_a_count(tmp_path):
    long = "b" * 300
    metadata = {
        "ss_tag_frequency": json.dumps({f"{i}_x": {f"word{i}": 1} for i in range(5000)}),
        "ss_base_model_version": "z" * 10**6,
        "zit_merge.version": "9" * 10**6,
        "zit_merge.recipe": "{}",
    }
    made = replace(pairs(Q, K, V), metadata=metadata)
    made.tensors.update({f"text_encoder.{long}.{i}": torch.ones(1) for i in range(4)})
    made.tensors.update({f"x.{long}.{i}": torch.ones(1) for i in range(9)})
    text = description_text(replace(described(tmp_path, made), file=f"a{long}c.safetensors"))
    assert len(text.splitlines()) < 70 and fits(text)
    flat = "".join(text.split())
    for part in ("c.safetensors(314letters)", "(5,000inall)", "(1,000,000letters)", "4keysthatnomergetakes", "9keys,e.g.x.bbb"):
        assert part in flat, part
    assert flat.count("b" * 100) == 0


def test_one_trigger_phrase_of_a_megabyte(tmp_path):
    phrase = "word " * 200_000
    text = text_of(tmp_path, replace(pairs(Q), metadata={"modelspec.trigger_phrase": phrase}))
    assert "... (999,999 letters)" in " ".join(text.split())
    assert len(text) < 5000


def test_what_a_file_says_does_not_steer_the_terminal(tmp_path):
    metadata = {"modelspec.trigger_phrase": "\x1b[2J red\x07\r\nfile  fake \u4e2d\u2028x\x7f", "ss_base_model_version": "\x00"}
    text = text_of(tmp_path, replace(pairs(Q), metadata=metadata))
    assert fits(text)
    assert "trigger words \\x1b[2J red\\x07 file fake \u4e2d x\\x7f\n" in text


def test_what_is_open_and_what_was_decided(tmp_path):
    text = " ".join(text_of(tmp_path, made_by("lycoris-norm")).split())
    assert re.search(r"open - lycoris_\S+\.w_norm and 179 more change a norm", text)
    text = " ".join(text_of(tmp_path, made_by("diffusers-alpha")).split())
    assert "noted - alpha stands only in lora_adapter_metadata: alpha / rank = 0.125 is applied" in text


def test_a_merged_file_points_to_its_recipe(work: Workspace, loras):
    work.zit("run", work.job({"name": "b", "loras": [{"lora": str(loras[0]), "ratio": 0.5}]})).ok()
    text = work.zit("inspect", work.out / "merged_cat_b.safetensors").ok()
    assert re.search(r"^made by +zit_merge \S+, by its metadata$", text, re.M)
    assert "recipe        recipe merged_cat_b.safetensors prints it\n" in text


def documented_keys() -> list[str]:
    return re.findall(r"^ {8}(\w+): ", Description.__doc__, re.M)


def test_the_documentation_lists_the_keys():
    assert len(documented_keys()) == 22


@pytest.mark.parametrize("name", READABLE)
def test_json_has_the_documented_keys_and_comes_back(tmp_path, name):
    facts = facts_of(tmp_path, made_by(name, is_whole=False))
    assert list(facts) == documented_keys()
    text = json.dumps(facts, allow_nan=False)
    assert json.loads(text) == facts
    assert json.dumps(facts_of(tmp_path, made_by(name, is_whole=False)), allow_nan=False) == text
    assert set(facts["norms"]) == set(facts["scales"]) == set(facts["ranks"]) >= set(facts["alphas"])


def test_the_command_prints_these_facts(work, loras):
    facts = json.loads(work.zit("inspect", loras[1], "--json").ok())
    assert facts == json.loads(json.dumps(describe(measure([load_lora(loras[1])])).to_json()))
    assert facts["trainer"] == {"name": "musubi-tuner", "version": None, "by": "metadata"}


@pytest.mark.parametrize("name", [name for name, producer in PRODUCERS.items() if producer.kind in NEED_BASE])
def test_what_needs_the_base_model_is_described_without_norms(tmp_path, name):
    made = made_by(name, is_whole=False)
    found = described(tmp_path, made)
    assert found.norm is None and set(found.norms.values()) == {None}
    assert found.questions == [load_lora(write(tmp_path, made)).base_question] and "set base: " in found.questions[0]
    assert not any("NaN" in sentence or "all zeros" in sentence for sentence in found.odd)
    text = description_text(found)
    assert "unknown without the base model" in text and "broken" not in text
