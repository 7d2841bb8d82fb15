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


@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("rank", ["exact", 5])
def test_the_fused_weights_differ_by_the_wanted_delta(model, tmp_path, mix, rank):
    """base + what diffusers makes of our file == base + sum of strength * delta, from the producers' own float64 deltas."""
    shapes = tiny_zimage.linear_shapes(model)
    inputs, wanted = [], {}
    for seed, (name, ratio) in enumerate(MIXES[mix]):
        made = producers.PRODUCERS[name].make(shapes, 3, seed, torch.float32)
        producers.save(made, tmp_path / f"{name}.safetensors")
        inputs.append((tmp_path / f"{name}.safetensors", ratio))
        for module, delta in made.deltas.items():
            wanted[module] = wanted.get(module, 0) + ratio * delta
    path = merge(inputs, rank=rank, dtype="fp32", shapes="free").save(tmp_path / "out.safetensors")
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
    changed = 0
    for module in shapes:
        got = after[f"{module}.weight"].double() - before[f"{module}.weight"].double()
        want = wanted.get(module, torch.zeros(shapes[module], dtype=torch.float64))
        if rank != "exact" and torch.is_tensor(want) and want.any():
            left, values, right = torch.linalg.svd(want, full_matrices=False)
            want = left[:, :rank] * values[:rank] @ right[:rank]
        assert (got - want).abs().max() <= 1e-6, module  # float32 weights of size 0.05
        changed += bool(want.any())
    assert changed == len(wanted)
