"""`inspect MODEL`, alone and beside its base: what is in a whole model of any tool."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import SHAPES, model, native, write_all_in_one, write_folder, write_one, write_shards
from pairs import Pair, lora, write
from workspace import Workspace

FEW = {m: SHAPES[m] for m in ("layers.0.attention.to_q", "layers.0.adaLN_modulation.0", "layers.1.feed_forward.w2")}


@pytest.fixture(scope="module")
def base() -> dict[str, torch.Tensor]:
    return model()


@pytest.fixture(scope="module")
def loras() -> list[dict[str, Pair]]:
    return [lora(4, seed, None, FEW) for seed in (1, 2)]


def mixed(base: dict[str, torch.Tensor], loras: list[dict[str, Pair]], strengths: list[float]) -> dict[str, torch.Tensor]:
    """The model with LoRAs in it, added here in float64 and rounded once."""
    made = dict(base)
    for module in FEW:
        change = sum(s * one[module].delta for s, one in zip(strengths, loras, strict=True))
        key = f"{module}.weight"
        made[key] = (base[key].double() + change).to(base[key].dtype)
    return made


def facts(work: Workspace, made: dict[str, torch.Tensor], base: dict[str, torch.Tensor], loras: list[dict[str, Pair]]) -> dict:
    write_one(work.folder / "made.safetensors", native(made))
    write_folder(work.folder / "base", base)
    names = [str(write(work.folder / f"{n}.safetensors", one)) for n, one in enumerate(loras)]
    sources = ["--sources", *names] if names else []
    return json.loads(work.zit("inspect", "made.safetensors", "--base", "base", *sources, "--json").ok())


def text(work: Workspace, *words: object) -> str:
    return " ".join(work.zit("inspect", *words).ok().split())


@pytest.mark.parametrize("strengths", [[1.0, 0.5], [-0.7, 2.0], [0.3, 0.0]], ids=str)
def test_the_strengths_in_a_model_of_any_tool(work, base, loras, strengths):
    found = facts(work, mixed(base, loras, strengths), base, loras)
    assert found["strengths"] == pytest.approx(strengths, abs=0.02)
    assert set(found["modules"]) == set(FEW)
    for each in found["modules"].values():
        assert each == pytest.approx(strengths, abs=0.1)
    assert found["equal"] == len(SHAPES) - len(FEW) and not found["vectors"]
    assert found["rest"] == pytest.approx(found["rounding"], rel=0.15), "rounding to bf16 is all that is left"


def test_each_module_has_its_own_strength(work, base, loras):
    made = dict(base)
    for strength, module in zip((0.25, 1.0, 3.0), FEW, strict=True):
        key = f"{module}.weight"
        made[key] = (base[key].double() + strength * loras[0][module].delta).to(base[key].dtype)
    found = facts(work, made, base, loras[:1])
    assert [found["modules"][module][0] for module in FEW] == pytest.approx([0.25, 1.0, 3.0], rel=0.05)


def test_a_copy_of_the_base_is_called_one(work, base, loras):
    found = facts(work, base, base, loras)
    assert (found["norm"], found["equal"], found["strengths"]) == (0.0, len(SHAPES), [0.0, 0.0])
    said = text(work, "made.safetensors", "--base", "base", "--sources", "0.safetensors")
    assert "every weight is that of the base, bit for bit: no LoRA was baked into this model" in said


def test_what_else_is_in_it_is_told(work, base, loras):
    made = mixed(base, [*loras, lora(4, 9, None, FEW)], [1.0, 0.5, 1.0])
    made["layers.0.attention_norm1.weight"] = made["layers.0.attention_norm1.weight"] + 1
    found = facts(work, made, base, loras)
    assert found["rest"] > 3 * found["rounding"]
    assert found["vectors"] == {"layers.0.attention_norm1.weight": pytest.approx(128**0.5, rel=0.01)}
    said = text(work, "made.safetensors", "--base", "base", "--sources", "0.safetensors", "1.safetensors")
    assert "there is more than the sources in it" in said and "lies in norms, biases and tokens" in said


def test_the_difference_alone(work, base, loras):
    found = facts(work, mixed(base, loras, [1.0, 1.0]), base, [])
    wanted = {m: float((loras[0][m].delta + loras[1][m].delta).norm()) for m in FEW}
    assert {m: n for m, n in found["norms"].items() if n} == pytest.approx(wanted, rel=0.05)
    assert "norm of the difference, per layer and component" in text(work, "made.safetensors", "--base", "base")


@pytest.mark.parametrize("form", ["folder", "shards", "file", "all in one"])
def test_a_model_alone(work, base, form):
    path = work.folder / ("model" if form in ("folder", "shards") else "model.safetensors")
    {"folder": write_folder, "shards": write_shards, "all in one": write_all_in_one}.get(
        form, lambda p, t: write_one(p, native(t))
    )(path, base)
    found = json.loads(work.zit("inspect", path, "--json").ok())
    assert found["form"] == ("diffusers" if form in ("folder", "shards") else "comfyui")
    assert (found["files"], found["tensors"]) == (3 if form == "shards" else 1, len(base))
    assert found["sizes"] == {"dim": 128, "layers": 2} and bool(found["others"]) == (form == "all in one")
    assert (found["recipe"], found["check"]) == (None, None)


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_a_model_that_was_baked(work, base, loras, out):
    write_folder(work.folder / "base", base)
    write(work.folder / "me.safetensors", loras[0])
    work.zit("bake", "me.safetensors", "--ratio", 0.5, "--base", "base", "-o", out, "--shapes", "free").ok()
    said = text(work, out)
    assert "base base" in said and "merged in 0.5 of me.safetensors" in said and "of the change survives" in said
    assert f"recipe {out} prints it" in said
    assert "bake:" in work.zit("recipe", out).ok()
    found = json.loads(work.zit("inspect", out, "--json").ok())
    assert found["check"]["got"] == pytest.approx([0.5], abs=0.01)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model", "--sources", "me.safetensors"], "model is a whole model: name the model it came from too, --base PATH"),
        (["model", "me.safetensors"], "model is a whole model: name it alone, or with --base and --sources"),
        (["model", "me.safetensors", "--base", "model"], "--base: looks into one model, 2 were named"),
        (["model", "--html", "page.html"], "--html: shows LoRA files, model is looked at as a whole model: drop it"),
        (["model", "--base", "model"], "are one model"),
        (["me.safetensors", "--base", "model"], "is a LoRA, no whole model"),
        (["model", "--base", "other"], "the two are not a fine-tune and its base"),
        (["model", "--base", "nowhere"], "nowhere is not there (looked in .): give the folder or the file of a model"),
    ],
    ids=str,
)
def test_what_is_refused(work, base, loras, words, said):
    write_folder(work.folder / "model", base)
    write_folder(work.folder / "other", {n: t for n, t in base.items() if not n.startswith("layers.1.")})
    write(work.folder / "me.safetensors", loras[0])
    assert said in work.zit("inspect", *words).refused()


def test_a_lora_of_another_model_is_no_source(work, base):
    write_folder(work.folder / "base", base)
    write_folder(work.folder / "made", mixed(base, [lora(4, 1, None, FEW)], [1.0]))
    write(work.folder / "other.safetensors", lora(4, 1, None, {"layers.0.attention.to_q": (8, 8)}))
    said = work.zit("inspect", "made", "--base", "base", "--sources", "other.safetensors").refused()
    assert "changes layers.0.attention.to_q as a 8 x 8 matrix, which base does not have" in said


def test_a_source_that_needs_the_base(work, base, loras):
    """A DoRA that was baked is found in the model: its change is told with the base."""
    write_folder(work.folder / "base", base)
    tensors = {}
    for module, pair in loras[0].items():
        tensors[f"diffusion_model.{module}.lora_A.weight"] = pair.down
        tensors[f"diffusion_model.{module}.lora_B.weight"] = pair.up
        tensors[f"diffusion_model.{module}.dora_scale"] = base[f"{module}.weight"].float().norm(dim=1, keepdim=True) * 1.1
    write_one(work.folder / "dora.safetensors", tensors)
    work.zit("bake", "dora.safetensors", "--ratio", 0.5, "--base", "base", "-o", "out", "--shapes", "free").ok()
    found = json.loads(work.zit("inspect", "out", "--base", "base", "--sources", "dora.safetensors", "--json").ok())
    assert found["strengths"] == pytest.approx([0.5], abs=0.01)
