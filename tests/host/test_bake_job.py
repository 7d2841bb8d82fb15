"""A training, its merge baked into the model it was trained on, and a training on that: the real AI-Toolkit, from its run.py."""

from pathlib import Path

import pytest
import torch
import yaml
from host.job import job, training
from safetensors import safe_open
from safetensors.torch import load_file

pytestmark = pytest.mark.toolkit


def run(run_python, folder: Path, name: str, *processes: dict):
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(job(name, *processes), sort_keys=False))
    done = run_python("run.py", path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def products(path: Path) -> dict[str, torch.Tensor]:
    """Module -> float64 delta of a file in AI-Toolkit's form."""
    tensors, found = load_file(path), {}
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            alpha = float(tensors.get(f"{module}.alpha", torch.tensor(down.shape[0])))
            up = tensors[f"{module}.lora_B.weight"]
            found[module.removeprefix("diffusion_model.")] = up.double() @ down.double() * alpha / down.shape[0]
    return found


@pytest.fixture(scope="module")
def baked(place, run_python) -> Path:
    """One config: a training, a merge of its LoRA with another, and the model that it was trained on with both in it."""
    section = {
        "type": "zit_merge",
        "shapes": "free",
        "steps": [
            {
                "name": "both",
                "save": {"dtype": "fp32"},
                "loras": [{"lora": "trained", "ratio": 1.0}, {"lora": "style.safetensors", "ratio": 0.5}],
                "bake": {"base": "trainer"},
            }
        ],
    }
    done = run(run_python, place, "bake_v1", training(place, "bake_v1"), section)
    assert "wrote the whole model" in done.stdout
    return place / "output" / "bake_v1" / "merged_bake_v1_both_baked"


def test_the_model_that_was_trained_on_has_the_merge_in_it(place, baked, style):
    from diffusers import ZImageTransformer2DModel

    old = ZImageTransformer2DModel.from_pretrained(place / "model" / "transformer").state_dict()
    new = ZImageTransformer2DModel.from_pretrained(baked).state_dict()
    trained = products(baked.parent / "bake_v1.safetensors")
    assert new.keys() == old.keys() and any(delta.any() for delta in trained.values())
    for name, tensor in old.items():
        module = name.removesuffix(".weight")
        wanted = tensor.double() + trained.get(module, 0) + 0.5 * style.deltas.get(module, torch.zeros(()))
        changes = module in trained or module in style.deltas
        assert torch.allclose(new[name].double(), wanted, rtol=0, atol=1e-6) if changes else torch.equal(new[name], tensor), name
    beside = products(baked.parent / "merged_bake_v1_both.safetensors")
    assert all(torch.allclose(beside[m], d + 0.5 * style.deltas.get(m, torch.zeros(())), atol=1e-6) for m, d in trained.items())
    assert not [p for p in baked.parent.rglob("*") if ".part" in p.name]


def test_the_next_training_begins_with_it(place, baked, run_python):
    """`name_or_path` is the folder; text encoder, tokenizer and VAE come from where they were."""
    files = {p: p.read_bytes() for p in baked.iterdir()}
    model = {"name_or_path": str(baked), "extras_name_or_path": str(place / "model"), "arch": "zimage:turbo", "quantize": False}
    following = training(place, "bake_v2", model=model)
    following["train"] = following["train"] | {"steps": 1}
    run(run_python, place, "bake_v2", following)
    saved = products(place / "output" / "bake_v2" / "bake_v2.safetensors")
    assert any(delta.any() for delta in saved.values())
    with safe_open(place / "output" / "bake_v2" / "bake_v2.safetensors", framework="pt") as file:
        assert file.metadata()
    assert {p: p.read_bytes() for p in baked.iterdir()} == files
