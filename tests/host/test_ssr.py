"""The experiment `ssr` in the real AI-Toolkit, on the tiny Z-Image, plain and quantized, against dense least squares."""

import json
from pathlib import Path

import pytest
import torch
from host import tiny_zimage
from oracles import producers
from safetensors import safe_open
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("ssr_in_toolkit.py")
PROMPTS = ["a photo of a cat", "a drawing of a dog"]
RIDGE, RATIOS = 1e-3, (0.8, 1.0)
pytestmark = pytest.mark.toolkit


def change(tensors, module):
    """A file's change of a module, dense, in float64."""
    down, up = (tensors[f"diffusion_model.{module}.lora_{part}.weight"].double() for part in "AB")
    return up @ down * (float(tensors.get(f"diffusion_model.{module}.alpha", len(down))) / len(down))


@pytest.fixture(scope="module", params=["plain", "quantized"])
def made(request, place, run_python, tmp_path_factory):
    """(folder, config, inputs of each LoRA): two LoRAs merged by the experiment."""
    folder = tmp_path_factory.mktemp("ssr")
    shapes = tiny_zimage.linear_shapes(tiny_zimage.transformer())
    for seed, name in enumerate(("zoe", "gleb")):
        torch.manual_seed(seed)
        lora = producers.PRODUCERS["ai-toolkit"].make(shapes, 4, 4, torch.bfloat16)
        producers.save(lora, folder / f"{name}.safetensors")
    quantized = {"quantize": True, "qtype": "float8"} if request.param == "quantized" else {}
    step = {
        "name": "both",
        "save": {"dtype": "fp32"},
        "loras": [{"lora": str(folder / f"{n}.safetensors"), "ratio": r} for n, r in zip(("zoe", "gleb"), RATIOS, strict=True)],
        "preview": {"size": 64, "steps": 2},
    }
    section = {
        "type": "zit_merge",
        "output_dir": str(folder),
        "shapes": "free",
        "device": "cpu",
        "model": {"name_or_path": str(place / "model"), "arch": "zimage:turbo", **quantized},
        "steps": [step],
    }
    config = folder / "job.json"
    config.write_text(json.dumps({"job": "extension", "config": {"name": "ssr", "process": [section]}}))
    words = [config, "--step", "both", "--ridge", RIDGE, "--seeds", 3, 4, "--prompts", *PROMPTS]
    done = run_python(SCRIPT, folder / "inputs.pt", *words, "-o", folder / "ssr.safetensors")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return folder, done.stdout, torch.load(folder / "inputs.pt"), words


def test_it_is_the_least_squares_fit(made):
    folder, _, inputs, _ = made
    loras, found = [load_file(folder / f"{n}.safetensors") for n in ("zoe", "gleb")], load_file(folder / "ssr.safetensors")
    assert set(inputs[0]) == set(inputs[1]) != set()
    for module in inputs[0]:
        deltas = [change(lora, module) * ratio for lora, ratio in zip(loras, RATIOS, strict=True)]
        downs = [torch.linalg.svd(delta)[2][:4] for delta in deltas]
        up, down = torch.cat([d @ v.T for d, v in zip(deltas, downs, strict=True)], 1), torch.cat(downs)
        seen = [one[module] @ down.T for one in inputs]
        wanted = [torch.zeros_like(z) for z in seen]
        wanted[0][:, :4], wanted[1][:, 4:] = seen[0][:, :4], seen[1][:, 4:]
        rows, ridge = torch.cat(seen), (RIDGE * torch.cat(seen).square().sum() / 8) ** 0.5 * torch.eye(8).double()
        targets = torch.cat([*wanted, torch.zeros_like(ridge)])
        expected = up @ torch.linalg.lstsq(torch.cat([rows, ridge]), targets).solution.T @ down
        assert (change(found, module) - expected).norm() < 1e-4 * expected.norm(), module
        assert (change(found, module) - sum(deltas)).norm() > 1e-2 * expected.norm(), f"{module} is no sum"


def test_what_it_was_made_from_stands_in_the_file(made):
    folder, told, _, _ = made
    with safe_open(folder / "ssr.safetensors", "pt") as file:
        metadata = file.metadata()
    record = json.loads(metadata["zit_merge.experiment"])
    assert [[(p["prompt"], p["seed"]) for p in of_lora] for of_lora in record["pictures"]] == [
        [(prompt, seed) for seed in (3, 4)] for prompt in PROMPTS
    ]
    assert (record["method"], record["ridge"]) == ("ssr", RIDGE)
    assert record["model"]["files"]
    (step,) = record["of"]["steps"]
    assert [(lora["ratio"], len(lora["sha256"])) for lora in step["loras"]] == [(ratio, 64) for ratio in RATIOS]
    assert "zit_merge.recipe" not in metadata, "no recipe of a sum: it would make another file"
    assert "LoRA 1: at" in told
    assert "LoRA 2: at" in told


def test_its_file_is_read_and_not_replaced(made, run_python):
    folder, _, _, words = made
    before = (folder / "ssr.safetensors").read_bytes()
    again = run_python(SCRIPT, folder / "other.pt", *words, "-o", folder / "ssr.safetensors")
    assert again.returncode == 1
    assert "--out" in again.stderr
    assert (folder / "ssr.safetensors").read_bytes() == before
    shown = run_python("-m", "extensions_built_in.zit_merge", "inspect", folder / "ssr.safetensors")
    assert shown.returncode == 0, shown.stderr


def test_equal_prompts_are_called_an_average(made, run_python):
    folder, _, _, words = made
    same = [PROMPTS[0] if word == PROMPTS[1] else word for word in words]
    done = run_python(SCRIPT, folder / "other.pt", *same, "-o", folder / "same.safetensors")
    assert done.returncode == 0, done.stderr
    assert "close to an average" in done.stdout


def test_one_prompt_for_each_lora(made, run_python):
    folder, _, _, words = made
    done = run_python(SCRIPT, folder / "other.pt", *words[:-1], "-o", folder / "other.safetensors")
    assert done.returncode == 1
    assert "--prompts: got 1 prompt for 2 LoRAs" in done.stderr
    assert not (folder / "other.safetensors").exists()
