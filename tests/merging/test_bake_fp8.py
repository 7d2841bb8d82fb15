"""Models in ComfyUI's scaled fp8: which tensors are in it, their numbers, and what ComfyUI's own code makes of the file."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from checkpoints import SHAPES, from_native, model, native, write_folder, write_one
from clients import comfyui_source
from pairs import lora, write
from safetensors.torch import load_file
from workspace import Workspace

SCALED = re.compile(r"(layers|noise_refiner|context_refiner)\.\d+\.(attention\.(qkv|out)|feed_forward\.w\d)\.weight")


@pytest.fixture(scope="module")
def base() -> dict[str, torch.Tensor]:
    return model()


@pytest.fixture
def files(work: Workspace, base: dict[str, torch.Tensor]) -> Workspace:
    write_folder(work.folder / "base", base)
    write(work.folder / "me.safetensors", lora(4, 1, None, SHAPES))
    return work


def baked(work: Workspace, *words: object, base: str = "base") -> dict[str, torch.Tensor]:
    flags = ("--ratio", 1, "--shapes", "free", "--device", "cpu", "--dtype", "fp8", "--rounding", "stochastic", *words)
    work.zit("bake", "me.safetensors", "--base", base, "-o", "out.safetensors", *flags).ok()
    return load_file(work.folder / "out.safetensors")


def wanted(base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What ComfyUI should have, by its names, in float64."""
    made = {name: tensor.double() for name, tensor in base.items()}
    for module, pair in lora(4, 1, None, SHAPES).items():
        made[f"{module}.weight"] = made[f"{module}.weight"] + pair.delta
    return native(made)


def test_weights_of_blocks_are_scaled_and_all_else_is_bf16(files, base):
    found, exact = baked(files), wanted(base)
    for key, value in exact.items():
        if not SCALED.fullmatch(key):
            assert found[key].dtype == torch.bfloat16
            assert (found[key].double() - value).abs().max() <= 2**-7 * value.abs().max(), key
            continue
        scale = found[key.removesuffix(".weight") + ".scale_weight"]
        assert (found[key].dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.float32, ())
        assert float(scale) == pytest.approx(float(value.abs().max()) / 448, rel=1e-5)
        step = torch.maximum(value.abs() / 8, scale.double() * 2**-9)  # between neighbours: 1/8 of a number at most
        assert ((found[key].double() * scale.double() - value).abs() <= step * 1.0001).all(), key
    others = {k for k in found if k not in exact}
    assert others == {k.removesuffix(".weight") + ".scale_weight" for k in exact if SCALED.fullmatch(k)} | {"scaled_fp8"}
    assert (found["scaled_fp8"].dtype, found["scaled_fp8"].shape) == (torch.float8_e4m3fn, (2,))


def test_all_of_the_change_survives_in_the_mean(files, base):
    """Of many draws the mean is exact; of one, each number is one of the two neighbours."""
    key, sums = "layers.0.feed_forward.w1.weight", 0
    for seed in range(24):
        found = baked(files, "--seed", seed)
        sums = sums + found[key].double() * found["layers.0.feed_forward.w1.scale_weight"].double()
    exact = wanted(base)[key]
    error = (sums / 24 - exact).abs().mean() / exact.abs().mean()
    assert error < 0.03 / 24**0.5 * 2, "a single draw is 3 % off (u / sqrt(6) with u about 1/12 of a number)"


def test_a_second_run_keeps_it_and_inspect_and_recipe_read_it(files):
    baked(files)
    content = (files.folder / "out.safetensors").read_bytes()
    assert (files.folder / "out.safetensors").read_bytes() == content
    found = json.loads(files.zit("inspect", "out.safetensors", "--json").ok())
    assert set(found["dtypes"]) == {"bf16", "float8_e4m3fn"} and found["check"]["status"] == "right"
    assert files.again(files.recipe(files.folder / "out.safetensors")).read_bytes() == content
    words = ("--base", "out.safetensors", "-o", "more.safetensors", "--ratio", 1, "--shapes", "free")
    assert "out.safetensors: is quantized" in files.zit("bake", "me.safetensors", *words).refused()


def test_the_prefix_of_the_base_stays(files, base):
    write_one(files.folder / "prefixed.safetensors", native(base, "model.diffusion_model."))
    found = baked(files, base="prefixed.safetensors")
    assert "model.diffusion_model.scaled_fp8" in found
    assert "model.diffusion_model.layers.0.attention.qkv.scale_weight" in found


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-o", "out", "--rounding", "stochastic"], "--dtype: fp8 is a form of ComfyUI's: set --format comfyui"),
        (["-o", "out.safetensors"], "--dtype: fp8 rounds most of a LoRA away to the nearest number: set --rounding stochastic"),
    ],
)
def test_what_is_refused(files, words, said):
    flags = ("--base", "base", "--ratio", 1, "--shapes", "free", "--dtype", "fp8", *words)
    assert said in files.zit("bake", "me.safetensors", *flags).refused()


LOAD = """
import sys
sys.path[:0] = [sys.argv[1]]
import torch
from clients import comfyui_source
from safetensors.torch import load_file
comfy = comfyui_source.comfy()
import comfy.utils
sd, _ = comfy.utils.convert_old_quants(load_file(sys.argv[2]), "")
quantized = sorted(k.removesuffix(".comfy_quant") for k in sd if k.endswith(".comfy_quant"))
print(len(quantized), all(f"{k}.weight_scale" in sd and sd[f"{k}.weight"].dtype == torch.float8_e4m3fn for k in quantized))
"""


def test_comfyui_takes_the_scales(files, base, tmp_path):
    """Its own conversion of the form finds every scaled weight and leaves no key over."""
    if not comfyui_source.root():
        pytest.skip("no ComfyUI at $COMFYUI_ROOT or ~/ComfyUI")
    found = baked(files)
    count = sum(bool(SCALED.fullmatch(k)) for k in found)
    words = [
        sys.executable,
        "-c",
        LOAD,
        str(comfyui_source.TESTS),
        str(files.folder / "out.safetensors"),
    ]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ran.stdout.split() == [str(count), "True"], ran.stderr[-2000:]
    assert from_native({k: t for k, t in found.items() if "scale" not in k}).keys() == base.keys()
