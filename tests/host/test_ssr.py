"""The experiment `ssr` in the real AI-Toolkit, on the tiny Z-Image, plain and quantized, against dense least squares."""

import json
import re
from pathlib import Path

import pytest
import torch
from host import tiny_zimage
from oracles import producers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from extensions_built_in.zit_merge.formats.reader import TensorReader, load_lora

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
    module = "layers.7.adaLN_modulation.0"
    total = sum(change(lora, module) * ratio for lora, ratio in zip(loras, RATIOS, strict=True))
    assert (change(found, module) - total).norm() < 1e-5 * total.norm(), "what sees the time alone is summed"


def test_what_it_was_made_from_stands_in_the_file(made):
    folder, told, _, _ = made
    with safe_open(folder / "ssr.safetensors", "pt") as file:
        metadata = file.metadata()
    record = json.loads(metadata["zit_merge.experiment"])
    assert [[(p["prompt"], p["seed"]) for p in of_lora] for of_lora in record["pictures"]] == [
        [(prompt, seed) for seed in (3, 4)] for prompt in PROMPTS
    ]
    assert (record["method"], record["ridge"]) == ("ssr", RIDGE)
    assert record["model"]["name"] == "model", "no path of this machine"
    (step,) = record["of"]["steps"]
    assert [(lora["ratio"], len(lora["sha256"])) for lora in step["loras"]] == [(ratio, 64) for ratio in RATIOS]
    assert "zit_merge.recipe" not in metadata, "no recipe of a sum: it would make another file"
    own = [float(number) for number in re.findall(r"LoRA [12]: at (\d\.\d\d) of its strength on its own prompt", told)]
    assert len(own) == 2
    assert all(0.4 < number < 1 for number in own)


def test_its_file_is_read_and_not_replaced(made, run_python):
    folder, _, _, words = made
    before = (folder / "ssr.safetensors").read_bytes()
    again = run_python(SCRIPT, folder / "other.pt", *words, "-o", folder / "ssr.safetensors")
    assert again.returncode == 1
    assert "--out" in again.stderr
    assert (folder / "ssr.safetensors").read_bytes() == before
    shown = run_python("-m", "extensions_built_in.zit_merge", "inspect", folder / "ssr.safetensors")
    assert shown.returncode == 0, shown.stderr
    assert "the experiment ssr" in shown.stdout


def test_a_cut_in_another_form_and_a_lora_that_shares_nothing(made, run_python):
    """Less strong than exact, and the third LoRA whole: it alone changes the refiner."""
    folder, told, _, words = made
    alone = {"diffusion_model.noise_refiner.0.attention.to_q.lora_A.weight": torch.randn(3, tiny_zimage.DIM)}
    alone["diffusion_model.noise_refiner.0.attention.to_q.lora_B.weight"] = torch.randn(tiny_zimage.DIM, 3)
    save_file(alone, folder / "alone.safetensors")
    job = json.loads((folder / "job.json").read_text())
    (step,) = job["config"]["process"][0]["steps"]
    step["loras"].append({"lora": str(folder / "alone.safetensors"), "ratio": -0.5})
    step |= {"rank": 3, "save": {"dtype": "bf16", "format": "comfyui"}}
    (folder / "cut.json").write_text(json.dumps(job))
    words = [folder / "cut.json", *words[1:], "a third"]
    done = run_python(SCRIPT, folder / "other.pt", *words, "-o", folder / "cut.safetensors")
    assert done.returncode == 0, done.stderr
    assert "LoRA 3: as in a sum" in done.stdout
    exact, cut = (sum(float(x) for x in re.findall(r"at (\d\.\d+) of its", text)) for text in (told, done.stdout))
    assert 0 < cut < exact, "the strengths are those of the file"
    found = load_lora(folder / "cut.safetensors")
    with TensorReader(found) as reader:
        scale, delta = reader.delta("noise_refiner.0.attention.to_q")
    assert found.ranks["layers.0.attention.to_out.0"] == 3
    wanted = -0.5 * change(alone, "noise_refiner.0.attention.to_q")
    expanded = delta.expand()
    assert (scale * expanded.up.double() @ expanded.down.double() - wanted).norm() < 0.01 * wanted.norm()


def test_an_input_that_changes_meanwhile_leaves_no_file(made, run_python):
    folder, _, _, words = made
    out, zoe = folder / "changed.safetensors", folder / "zoe.safetensors"
    done = run_python(SCRIPT, folder / "other.pt", *words, "-o", out, TOUCHED=str(zoe))
    assert done.returncode == 1
    assert "was changed while it was used" in done.stderr
    assert not list(folder.glob("changed*"))
