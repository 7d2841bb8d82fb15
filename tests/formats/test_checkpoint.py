"""Whole transformers: one model in every form, ComfyUI's and diffusers' own names, and what is no such model."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import (
    BESIDE,
    INDEX,
    ONE,
    SHAPES,
    WRITERS,
    model,
    native,
    sizes,
    write_all_in_one,
    write_folder,
    write_one,
    write_shards,
)
from clients import comfyui_source
from oracles import producers
from oracles.inventory import LINEARS

from extensions_built_in.zit_merge.errors import ZitMergeError
from extensions_built_in.zit_merge.formats.checkpoint import Checkpoint, CheckpointReader, open_checkpoint
from extensions_built_in.zit_merge.formats.checkpoint_writer import config_of
from extensions_built_in.zit_merge.model.tensors import TENSORS

Q = "layers.0.attention.to_q.weight"


def opened(path: Path) -> Checkpoint:
    return open_checkpoint(path, shapes="free")


def contents(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    with CheckpointReader(checkpoint) as reader:
        return {name: reader.rows(place) for name, place in checkpoint.places.items()}


def equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    """The same names, and the same bytes under each."""
    same = all(found[k].dtype == t.dtype and torch.equal(found[k], t) for k, t in wanted.items() if k in found)
    return found.keys() == wanted.keys() and same


def written(folder: Path, form: str, tensors: dict[str, torch.Tensor]) -> Path:
    return {**WRITERS, "all in one": write_all_in_one}[form](folder / "model", tensors)


def refusal(path: Path, shapes: str = "free") -> str:
    """The one sentence, with what to do at its end."""
    with pytest.raises(ZitMergeError) as caught:
        open_checkpoint(path, shapes=shapes)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(str(path)) and ": " in text.removeprefix(str(path))[2:], text
    return text


# --- one model in every form ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return model()


def hashed(tensors: dict[str, torch.Tensor], order: list[str]) -> str:
    digest, names = hashlib.sha256(), {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16"}
    for name in order:
        tensor = tensors[name]
        digest.update(f"{name} {names[tensor.dtype]} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("form", [*WRITERS, "all in one"])
def test_every_form_is_the_same_model(tmp_path, tensors, form):
    found = opened(written(tmp_path, form, tensors))
    assert equal(contents(found), tensors)
    assert found.shapes == SHAPES
    assert found.dtype_name == "BF16"
    assert found.native is (form in ("comfyui", "prefixed", "all in one"))
    assert found.sha256() == hashed(tensors, [name for name in TENSORS if name in tensors])
    assert set(found.extras) == (set(BESIDE) if form == "all in one" else set())


def test_what_stands_beside_has_a_hash_of_its_own(tmp_path, tensors):
    path = write_all_in_one(tmp_path / "a", tensors)
    plain, beside = opened(path).sha256(), opened(path).extras_sha256()
    write_one(path, native(tensors, "model.diffusion_model.") | BESIDE | {"vae.steps": torch.tensor(8)})
    assert opened(path).sha256() == plain != beside != opened(path).extras_sha256()


@pytest.mark.parametrize("change", ["number", "dtype", "order of q and k"])
def test_the_hash_is_of_names_dtypes_and_numbers(tmp_path, tensors, change):
    other = dict(tensors)
    if change == "number":
        other[Q] = other[Q].clone()
        other[Q][-1, -1] += 1
    elif change == "dtype":
        other[Q] = other[Q].view(torch.float16)
    else:
        k = Q.replace("to_q", "to_k")
        other[Q], other[k] = other[k], other[Q]
    write = WRITERS["comfyui" if change == "number" else "folder"]
    before, after = (opened(write(tmp_path / name, t)) for name, t in (("a", tensors), ("b", other)))
    assert before.sha256() != after.sha256()


@pytest.mark.parametrize("form", ["shards", "prefixed"])
def test_rows_and_chunks(tmp_path, tensors, form):
    found = opened(written(tmp_path, form, tensors))
    with CheckpointReader(found) as reader:
        for name in ("layers.1.attention.to_k.weight", "layers.1.attention.to_v.weight", "layers.0.feed_forward.w2.weight"):
            place = found.places[name]
            assert torch.equal(reader.rows(place, 5, 17), tensors[name][5:17])
            pieces = list(reader.chunks(place, 10_000))
            assert len(pieces) > 1 and torch.equal(torch.cat(pieces), tensors[name])
            assert torch.equal(reader.weight(name.removesuffix(".weight")), tensors[name])
        bias = "t_embedder.mlp.0.bias"
        assert torch.equal(torch.cat(list(reader.chunks(found.places[bias], 16))), tensors[bias])
        assert "layers.1.attention.to_k" in reader and "layers.2.attention.to_k" not in reader


def test_tensors_of_several_dtypes_keep_theirs(tmp_path, tensors):
    mixed = {k: t.float() if k.endswith("norm1.weight") else t for k, t in tensors.items()}
    assert equal(contents(opened(write_folder(tmp_path / "a", mixed))), mixed)
    assert equal(contents(opened(WRITERS["comfyui"](tmp_path / "b", mixed))), mixed)


def test_the_config_and_the_metadata_are_read(tmp_path, tensors):
    folder = write_folder(tmp_path / "a", tensors)
    assert opened(folder).config["mine"] == "kept"
    assert opened(folder / ONE).config is None
    path = write_one(tmp_path / "b.safetensors", native(tensors), {"modelspec.title": "mine"})
    assert dict(opened(path).metadata) == {"modelspec.title": "mine"}


def test_one_file_of_a_folder_with_an_index_of_others(tmp_path, tensors):
    """The index is of the files that it names, and of no other that lies there."""
    write_shards(tmp_path, tensors)
    assert equal(contents(opened(write_one(tmp_path / "other.safetensors", native(tensors)))), tensors)


def test_a_file_that_is_changed_after_it_was_described(tmp_path, tensors):
    path = WRITERS["comfyui"](tmp_path / "a", tensors)
    found = opened(path)
    os.utime(path, (1, 1))
    with pytest.raises(ZitMergeError, match="was changed while it was used"):
        CheckpointReader(found)


# --- the names and the config that diffusers and ComfyUI have -----------------------------------------------------------------


def test_the_inventory_is_diffusers_own():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        real = diffusers.ZImageTransformer2DModel(n_layers=30)  # its defaults are Z-Image's
    found = {name: tuple(tensor.shape) for name, tensor in real.state_dict().items()}
    assert set(TENSORS) == set(found)
    assert {t.module: found[t.name] for t in TENSORS.values() if t.module} == LINEARS


def test_the_small_model_is_diffusers_own(tmp_path, tensors):
    """And so is the config that is drawn from the sizes of a single file."""
    diffusers = pytest.importorskip("diffusers")
    found = opened(WRITERS["comfyui"](tmp_path / "a", tensors))
    real = diffusers.ZImageTransformer2DModel.from_config(dict(config_of(found)))
    assert {name: tuple(t.shape) for name, t in real.state_dict().items()} == sizes()


def test_the_config_of_the_real_size_is_that_of_the_real_model(tmp_path):
    """The config.json of Tongyi-MAI/Z-Image-Turbo, but for the version that wrote it."""
    path = write_empty(tmp_path / "a.safetensors", sizes(LINEARS) | {"layers.0.attention.norm_q.weight": (128,)})
    assert config_of(open_checkpoint(path)) == {
        "_class_name": "ZImageTransformer2DModel",
        "all_f_patch_size": [1],
        "all_patch_size": [2],
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
        "cap_feat_dim": 2560,
        "dim": 3840,
        "in_channels": 16,
        "n_heads": 30,
        "n_kv_heads": 30,
        "n_layers": 30,
        "n_refiner_layers": 2,
        "norm_eps": 1e-05,
        "qk_norm": True,
        "rope_theta": 256.0,
        "t_scale": 1000.0,
    }


def write_empty(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A file of zeros that takes no room on the disk."""
    table, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        table[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(table).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return path


def test_a_single_file_whose_heads_have_another_width_makes_no_folder(tmp_path):
    shapes = producers.small_shapes(n_layers=1)
    found = opened(WRITERS["comfyui"](tmp_path / "a", model(shapes=shapes)))
    with pytest.raises(ZitMergeError, match="48 wide.*give the diffusers folder as the base, or set format: comfyui"):
        config_of(found)


OF_COMFYUI = """
import json, sys
sys.path[:0] = [sys.argv[1]]
from clients.comfyui_source import comfy
code = comfy()
import comfy.utils, comfy.model_detection, torch
shapes = json.loads(sys.stdin.read())
keys = comfy.utils.z_image_to_diffusers({"n_layers": 30, "dim": 3840}, "")
told = {name: to if isinstance(to, str) else [to[0], *to[1]] for name, to in keys.items()}
state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
config = comfy.model_detection.detect_unet_config(state, "")
from comfy.ldm.lumina.model import NextDiT
import comfy.ops
with torch.device("meta"):
    parameters = {k: v for k, v in config.items() if k not in ("image_model", "allow_fp16")}
    model = NextDiT(**parameters, operations=comfy.ops.disable_weight_init, device="meta", dtype=torch.bfloat16)
own = {name: list(t.shape) for name, t in model.state_dict().items()}
print("ANSWER" + json.dumps([told, {k: v for k, v in config.items() if isinstance(v, (int, str, bool, list))}, own]))
"""


@pytest.fixture(scope="module")
def of_comfyui() -> tuple[dict, dict, dict]:
    """z_image_to_diffusers, detect_unet_config and the tensors of the network for a file of the real sizes."""
    if comfyui_source.root() is None:
        pytest.skip("no ComfyUI at $COMFYUI_ROOT or ~/ComfyUI")
    meta = {name: torch.empty(shape, device="meta") for name, shape in real_sizes().items()}
    shapes = {key: list(tensor.shape) for key, tensor in native(meta).items()}
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
    words = [sys.executable, "-c", OF_COMFYUI, str(comfyui_source.TESTS)]
    done = subprocess.run(words, input=json.dumps(shapes), env=env, capture_output=True, text=True, check=False)
    assert "ANSWER" in done.stdout, done.stderr[-2000:]
    return tuple(json.loads(done.stdout.partition("ANSWER")[2]))


def real_sizes() -> dict[str, tuple[int, ...]]:
    """Z-Image's own: a norm of q or k has the width of a head."""
    return {name: (128,) if ".norm_" in name else shape for name, shape in sizes(LINEARS).items()}


def test_comfyuis_map_of_names_is_ours(of_comfyui):
    told, _, _ = of_comfyui
    ends = tuple(f".attention.{part}.bias" for part in ("to_q", "to_k", "to_v", "to_out.0"))
    allowed = {name for name in told if name.endswith(ends) or ("context_refiner" in name and "adaLN" in name)}
    assert set(told) - allowed == set(TENSORS)  # the original has none of those, its map allows for them
    for name, tensor in TENSORS.items():
        key, *rows = [told[name]] if isinstance(told[name], str) else [told[name][0], *told[name][1:]]
        assert key == tensor.native
        assert tensor.third == (rows[1] // 3840 if rows else None)


def test_comfyui_takes_our_keys_for_z_image(of_comfyui):
    _, config, own = of_comfyui
    assert (config["image_model"], config["dim"], config["n_layers"], config["cap_feat_dim"]) == ("lumina2", 3840, 30, 2560)
    assert config["z_image_modulation"] is True and config["pad_tokens_multiple"] == 32
    meta = {name: torch.empty(shape, device="meta") for name, shape in real_sizes().items()}
    by_ours: dict[str, list[int]] = {}
    for name, tensor in TENSORS.items():
        shape = list(meta[name].shape)
        rows = by_ours[tensor.native][0] if tensor.native in by_ours else 0
        by_ours[tensor.native] = [rows + shape[0], *shape[1:]]
    assert by_ours == own


# --- what is no such model -----------------------------------------------------------------------------------------------------


QUANTIZED = {
    "fp8": lambda t: {k: v.to(torch.float8_e4m3fn) if k == Q else v for k, v in t.items()},
    "fp8 of the other kind": lambda t: {k: v.to(torch.float8_e5m2) if v.ndim == 2 else v for k, v in t.items()},
    "weight_scale": lambda t: t | {"layers.0.attention.to_q.weight_scale": torch.ones(())},
    "scale_weight": lambda t: t | {"layers.0.feed_forward.w1.scale_weight": torch.ones(())},
    "scale_weight of an embedder": lambda t: t | {"cap_embedder.1.scale_weight": torch.ones(())},
    "weight_scale_inv": lambda t: t | {"layers.0.feed_forward.w1.weight_scale_inv": torch.ones(())},
    "scaled_fp8": lambda t: t | {"scaled_fp8": torch.zeros(2)},
    "comfy_quant": lambda t: t | {"layers.1.attention.to_out.0.comfy_quant": torch.zeros(2, dtype=torch.uint8)},
    "int8": lambda t: {k: v.to(torch.int8) if v.ndim == 2 else v for k, v in t.items()},
    "NF4": lambda t: (
        {k: torch.zeros(v.numel() // 2, 1, dtype=torch.uint8) if v.ndim == 2 and ".attention." in k else v for k, v in t.items()}
        | {f"{Q}.absmax": torch.ones(8), f"{Q}.quant_map": torch.ones(16), f"{Q}.quant_state.bitsandbytes__nf4": torch.ones(4)}
    ),
    "int8 of bitsandbytes": lambda t: t | {"layers.0.attention.to_q.SCB": torch.ones(4)},
    "SVDQuant": lambda t: (
        {k: v for k, v in t.items() if k != Q} | {"layers.0.attention.to_q.qweight": torch.zeros(4, 4, dtype=torch.int8)}
    ),
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantized_model(tmp_path, tensors, kind, prefix):
    path = write_one(tmp_path / "a.safetensors", {prefix + k: t for k, t in QUANTIZED[kind](tensors).items()})
    text = refusal(path)
    assert "is quantized" in text and "use the model in bf16" in text and "z_image_turbo_bf16.safetensors" in text


def test_comfyuis_own_scaled_fp8(tmp_path, tensors):
    fused = native(tensors)
    for key in [k for k, t in fused.items() if t.ndim == 2 and k.startswith("layers.")]:
        fused[key] = fused[key].to(torch.float8_e4m3fn)
        fused[key.replace(".weight", ".scale_weight")] = torch.ones(())
    text = refusal(write_one(tmp_path / "a.safetensors", fused | {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}))
    assert "is quantized (scaled fp8" in text


def test_a_text_encoder_beside_may_be_quantized(tmp_path, tensors):
    assert set(opened(write_all_in_one(tmp_path / "a", tensors)).extras) == set(BESIDE)


@pytest.mark.parametrize("name, says", [("a.gguf", "is GGUF"), ("a.GGUF", "is GGUF"), ("a.ckpt", "pickle"), ("a.pt", "pickle")])
def test_files_of_other_kinds_by_their_ending(tmp_path, name, says):
    path = tmp_path / name
    path.write_bytes(b"GGUF")
    assert says in refusal(path)


def test_a_pickle_that_is_called_safetensors(tmp_path, tensors):
    torch.save(tensors, tmp_path / "a.safetensors")
    assert "is a pickled checkpoint" in refusal(tmp_path / "a.safetensors")


def test_nothing_is_there(tmp_path):
    assert "is not there: give the folder or the file" in refusal(tmp_path / "a")


@pytest.mark.parametrize("producer", ["ai-toolkit", "musubi", "onetrainer-kohya"])
def test_a_lora_in_the_place_of_a_model(tmp_path, producer):
    made = producers.PRODUCERS[producer].make(SHAPES, 2, 0, torch.bfloat16)
    producers.save(made, tmp_path / "a.safetensors")
    assert "is a LoRA, no whole model: give the model's folder or file" in refusal(tmp_path / "a.safetensors")


OTHERS = {
    "SDXL": ["conditioner.embedders.0.transformer.text_model.ln.weight", "model.diffusion_model.input_blocks.0.0.weight"],
    "Flux": ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight", "img_in.weight"],
    "Qwen-Image": ["img_in.weight", "transformer_blocks.0.attn.to_q.weight"],
}


@pytest.mark.parametrize("model_name", OTHERS)
def test_the_file_of_another_model(tmp_path, model_name):
    path = write_one(tmp_path / "a.safetensors", {key: torch.zeros(4, 4) for key in OTHERS[model_name]})
    count, first = len(OTHERS[model_name]), OTHERS[model_name][0]
    assert f"is no Z-Image model, none of its {count} tensors is one of Z-Image (e.g. {first}): give a" in refusal(path)


def test_lumina_2_shares_most_names_and_is_not_taken(tmp_path, tensors):
    """Z-Image's ancestor has the blocks and embedders, but no pad tokens."""
    path = write_one(tmp_path / "a.safetensors", {k: t for k, t in native(tensors).items() if "pad_token" not in k})
    assert "x_pad_token and 1 more tensor of Z-Image is not there" in refusal(path)


def test_a_file_without_tensors(tmp_path):
    assert "holds no tensors" in refusal(write_one(tmp_path / "a.safetensors", {}))


@pytest.mark.parametrize("without", ["layers.1.feed_forward.w2.weight", "cap_embedder.0.weight", "t_embedder.mlp.2.bias"])
def test_a_missing_tensor(tmp_path, tensors, without):
    path = write_one(tmp_path / "a.safetensors", {k: t for k, t in tensors.items() if k != without})
    text = refusal(path)
    assert f"{without} of Z-Image is not there: get a whole model" in text


@pytest.mark.parametrize("block, says", [("layers.0.", "layers.0"), ("noise_refiner.0.", "noise_refiner.0")])
def test_a_missing_block(tmp_path, tensors, block, says):
    path = write_one(tmp_path / "a.safetensors", {k: t for k, t in tensors.items() if not k.startswith(block)})
    assert f"{says} of Z-Image is not there" in refusal(path)


@pytest.mark.parametrize("section", ["layers", "noise_refiner", "context_refiner"])
def test_a_section_without_any_block(tmp_path, tensors, section):
    path = write_one(tmp_path / "a.safetensors", {k: t for k, t in tensors.items() if not k.startswith(section)})
    assert f"{section}.0 of Z-Image is not there: get a whole model" in refusal(path)


def test_q_k_and_v_of_one_block_fused_and_of_another_apart(tmp_path, tensors):
    mixed = {k: t for k, t in tensors.items() if k.startswith("layers.1.")}
    mixed |= native({k: t for k, t in tensors.items() if not k.startswith("layers.1.")})
    assert "mixes fused and separate q, k and v" in refusal(write_one(tmp_path / "a.safetensors", mixed))


def test_one_tensor_under_two_names(tmp_path, tensors):
    double = native(tensors) | {"model.diffusion_model.x_pad_token": tensors["x_pad_token"].clone()}
    assert "x_pad_token is there twice" in refusal(write_one(tmp_path / "a.safetensors", double))


def test_a_fused_weight_that_is_no_three_thirds(tmp_path, tensors):
    fused = native(tensors) | {"layers.0.attention.qkv.weight": torch.zeros(3 * 128 + 1, 128, dtype=torch.bfloat16)}
    assert "which is no q, k and v" in refusal(write_one(tmp_path / "a.safetensors", fused))


def test_other_sizes_than_the_real_ones(tmp_path, tensors):
    path = write_one(tmp_path / "a.safetensors", tensors)
    missing = refusal(path, "strict")
    assert "layers.2." in missing and "is not there" in missing
    whole = model(shapes=producers.small_shapes(dim=8, ffn=16, temb=8, cap=8), std=1)
    text = refusal(write_one(tmp_path / "b.safetensors", whole), "strict")
    assert "has other sizes than Z-Image (dim 8, not 3840): give a Z-Image model, or set shapes: free" in text


@pytest.mark.parametrize(
    "name, shape",
    [
        ("layers.1.feed_forward.w1.weight", (340, 128)),
        ("layers.1.attention.to_q.weight", (128, 120)),
        ("layers.0.adaLN_modulation.0.weight", (511, 128)),
    ],
)
def test_sizes_that_contradict_each_other(tmp_path, tensors, name, shape):
    path = write_one(tmp_path / "a.safetensors", tensors | {name: torch.zeros(shape, dtype=torch.bfloat16)})
    text = refusal(path)
    assert "is no Z-Image model" in text and name.removesuffix(".weight") in text


@pytest.mark.parametrize("shape", [(100,), (1, 512), ()])
def test_a_bias_of_the_wrong_length(tmp_path, tensors, shape):
    name = "layers.0.adaLN_modulation.0.bias"
    path = write_one(tmp_path / "a.safetensors", tensors | {name: torch.zeros(shape, dtype=torch.bfloat16)})
    assert f"{name} has shape {list(shape)} beside 512 rows" in refusal(path)


@pytest.mark.parametrize("shape", [(128,), (128, 128, 1)])
def test_a_weight_that_is_no_matrix(tmp_path, tensors, shape):
    path = write_one(tmp_path / "a.safetensors", tensors | {Q: torch.zeros(shape, dtype=torch.bfloat16)})
    assert f"{Q} has shape {list(shape)}, a weight has two sides" in refusal(path)


def test_a_file_that_is_cut_short(tmp_path, tensors):
    path = WRITERS["comfyui"](tmp_path / "a", tensors)
    path.write_bytes(path.read_bytes()[:-1000])
    assert "is not a whole .safetensors file" in refusal(path)


# --- folders and their indexes -------------------------------------------------------------------------------------------------


def test_an_empty_folder(tmp_path):
    assert "holds no .safetensors file: give the folder of a diffusers model" in refusal(tmp_path)


def test_two_files_and_no_index(tmp_path, tensors):
    write_shards(tmp_path, tensors, 2)
    (tmp_path / INDEX).unlink()
    assert "holds 2 .safetensors files and no index" in refusal(tmp_path)


def test_a_shard_that_is_missing(tmp_path, tensors):
    write_shards(tmp_path, tensors)
    (tmp_path / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    text = refusal(tmp_path)
    assert "diffusion_pytorch_model-00002-of-00003.safetensors, which its index names, is not there: get the whole folder" in text
    (tmp_path / "diffusion_pytorch_model-00003-of-00003.safetensors").unlink()
    assert "00002-of-00003.safetensors and 1 more" in refusal(tmp_path)


def lie(folder: Path, change: dict[str, object]) -> Path:
    """Changes the index."""
    table = json.loads((folder / INDEX).read_text())
    table["weight_map"] |= change
    (folder / INDEX).write_text(json.dumps(table))
    return folder


def test_an_index_that_names_another_file_for_a_tensor(tmp_path, tensors):
    write_shards(tmp_path, tensors)
    table = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    other = next(name for name in table.values() if name != table[Q])
    text = refusal(lie(tmp_path, {Q: other}))
    assert Q in text and "get the folder again" in text


def test_an_index_that_names_a_tensor_that_is_nowhere(tmp_path, tensors):
    write_shards(tmp_path, tensors)
    text = refusal(lie(tmp_path, {"layers.7.attention.to_q.weight": "diffusion_pytorch_model-00001-of-00003.safetensors"}))
    assert "does not hold layers.7.attention.to_q.weight, which the index says it does" in text


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/a.safetensors", "b\\a.safetensors", "a.bin", 7, None, ""])
def test_an_index_that_names_what_is_no_file_of_the_folder(tmp_path, tensors, name):
    write_shards(tmp_path / "model", tensors)
    write_one(tmp_path / "a.safetensors", tensors)
    assert "names no files of weights" in refusal(lie(tmp_path / "model", {Q: name}))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": 1}', "{}", "\udcff"]
)
def test_an_index_that_is_none(tmp_path, tensors, text):
    write_shards(tmp_path, tensors)
    (tmp_path / INDEX).write_bytes(text.encode(errors="surrogateescape"))
    assert "get the folder again" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "nonsense"])
def test_a_config_that_is_none(tmp_path, tensors, text):
    write_folder(tmp_path, tensors)
    (tmp_path / "config.json").write_text(text)
    assert "config.json" in refusal(tmp_path)
