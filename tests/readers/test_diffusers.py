"""diffusers, the newest release and the one of AI-Toolkit's environment, loads what we write."""

import pytest
import torch
from oracles import producers

from extensions_built_in.zit_merge import merge

diffusers = pytest.importorskip("diffusers", reason="no diffusers in this environment")
pytest.importorskip("peft", reason="no peft in this environment")

from host import tiny_zimage  # noqa: E402

# What every release since 0.36 must read; all 276 linears, refiners, fused qkv, missing modules.
MIXES = {
    "two": [("ai-toolkit", 0.9), ("musubi", 0.5)],
    "fused": [("diffusion-pipe", 1.0), ("onetrainer-legacy", -0.7)],
    "bare": [("diffsynth", 0.4)],
    "attention only": [("simpletuner-comfyui", 1.2)],
}


@pytest.fixture(scope="module")
def model():
    return tiny_zimage.transformer(n_layers=3).eval()


def inputs_of(mix, shapes, folder):
    """(file, ratio) of each LoRA, and what diffusers must add to each weight, from the producers' own float64 deltas."""
    inputs, wanted = [], {}
    for seed, (name, ratio) in enumerate(mix):
        made = producers.PRODUCERS[name].make(shapes, 3, seed, torch.float32)
        producers.save(made, folder / f"{name}.safetensors")
        inputs.append((folder / f"{name}.safetensors", ratio))
        for module, delta in made.deltas.items():
            wanted[module] = wanted.get(module, 0) + ratio * delta
    return inputs, wanted


def fused(model, path):
    """Module -> what diffusers adds to its weight when it fuses the file."""
    pipe = diffusers.ZImagePipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        pipe.load_lora_weights(str(path))
        pipe.fuse_lora()
        after = {k.replace(".base_layer", ""): v.clone() for k, v in model.state_dict().items() if "lora_" not in k}
    finally:
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        model.load_state_dict(before)
    return {m: after[f"{m}.weight"].double() - before[f"{m}.weight"].double() for m in tiny_zimage.linear_shapes(model)}


def check(model, path, wanted, rank="exact"):
    got, changed = fused(model, path), 0
    for module, shape in tiny_zimage.linear_shapes(model).items():
        want = wanted.get(module, torch.zeros(shape, dtype=torch.float64))
        if rank != "exact" and want.any():
            left, values, right = torch.linalg.svd(want, full_matrices=False)
            want = left[:, :rank] * values[:rank] @ right[:rank]
        assert (got[module] - want).abs().max() <= 1e-6, module  # float32 weights of size 0.05
        changed += bool(want.any())
    assert changed == len(wanted)


@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("rank", ["exact", 5])
def test_the_fused_weights_differ_by_the_wanted_delta(model, tmp_path, mix, rank):
    inputs, wanted = inputs_of(MIXES[mix], tiny_zimage.linear_shapes(model), tmp_path)
    path = merge(inputs, rank=rank, dtype="fp32", shapes="free").save(tmp_path / "out.safetensors")
    check(model, path, wanted, rank)


@pytest.mark.parametrize(("form", "since"), [("ai-toolkit", (0, 36)), ("diffusers", (0, 36)), ("kohya", (0, 39))], ids=str)
@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "own ranks"])
def test_other_forms_and_ranks_of_their_own(model, tmp_path, form, since, uniform):
    release = tuple(map(int, diffusers.__version__.split(".")[:2]))
    if release < since:
        pytest.skip(f"diffusers reads format {form} from {since[0]}.{since[1]} on")
    if form == "kohya" and not uniform and release < (0, 40):
        pytest.skip("before 0.40 diffusers takes one scale for all modules, unless the metadata name them by its own names")
    mix = [("onetrainer-legacy", 0.9), ("kohya-resized", -0.7)]  # all 276 at rank 3, and other ranks from module to module
    inputs, wanted = inputs_of(mix, tiny_zimage.linear_shapes(model), tmp_path)
    path = merge(inputs, dtype="fp32", shapes="free", format=form, uniform=uniform).save(tmp_path / "out.safetensors")
    check(model, path, wanted)


def test_a_lokr_merged_into_a_lora(model, tmp_path):
    inputs, wanted = inputs_of([("ai-toolkit-lokr", 0.8), ("ai-toolkit", 0.5)], tiny_zimage.linear_shapes(model), tmp_path)
    path = merge(inputs, dtype="fp32", shapes="free").save(tmp_path / "out.safetensors")
    check(model, path, wanted)
