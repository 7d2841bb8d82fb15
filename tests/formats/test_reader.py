"""Every trainer's file against the float64 delta of its format's own definition, and every file that must be refused."""

import hashlib
import json
import re

import pytest
import torch
from oracles.dense import product, relative
from oracles.producers import PRODUCERS, save, small_shapes
from safetensors.torch import save_file

from extensions_built_in.zit_merge import ZitMergeError, load_lora, merge

SHAPES = small_shapes(dim=24, ffn=40, temb=16, cap=20, n_layers=2, n_refiners=2)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Counting the changes of such a file once needs to know that they are the same ones.
DOUBLED = {"anime-z", "anime-z-alpha-apart"}
# The scale stands in the metadata or beside the file, and is not 1.
ELSEWHERE = {n for n, p in PRODUCERS.items() if p.kind == "lora" and p.alpha in ("metadata", "sidecar")} - {"diffusers"}
READABLE = [n for n, p in PRODUCERS.items() if p.kind == "lora" and n not in DOUBLED | ELSEWHERE]
# kind -> what the sentence calls it
ALGORITHMS = {
    "lokr": "LoKr",
    "loha": "LoHa",
    "lora+lokr": "LoKr",
    "dora": "DoRA",
    "oft": "OFT",
    "ia3": "IA3",
    "glora": "GLoRA",
    "full": "full weight",
    "full-mixed": "full weight",
    "norm": "norm",
}


def write(folder, name, dtype=torch.float32, rank=4, seed=0):
    made = PRODUCERS[name].make(SHAPES, rank, seed, dtype)
    path = folder / f"{name}.safetensors"
    save(made, path)
    return path, made


def refusal(path):
    """The one sentence with which a file is refused, less the path: a folder's name must not satisfy a test."""
    with pytest.raises(ZitMergeError) as error:
        load_lora(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.fixture
def good(tmp_path):
    """A LoRA as AI-Toolkit writes it, and its tensors."""
    path, made = write(tmp_path, "ai-toolkit")
    return path, dict(made.tensors)


# --- what is read --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", READABLE)
def test_every_trainers_file_is_read_as_its_deltas(tmp_path, name, dtype):
    path, made = write(tmp_path, name, DTYPES[dtype])
    lora = load_lora(path)
    assert set(lora) == set(made.deltas)
    assert len(lora) == len(made.deltas)
    assert lora.unmatched == ()
    assert lora.skipped == ()
    assert lora.shapes == {module: tuple(delta.shape) for module, delta in made.deltas.items()}
    off = {m: relative(product(*lora[m]), delta) for m, delta in made.deltas.items()}
    assert {m: e for m, e in off.items() if not e < 1e-6} == {}


@pytest.mark.parametrize("name", ["ai-toolkit", "diffusion-pipe", "musubi", "onetrainer-kohya", "musubi-convert-other"])
def test_all_thirty_layers_are_read(tmp_path, name):
    # layers.1 and layers.10 to 19 begin alike
    shapes = small_shapes(dim=16, ffn=24, temb=8, cap=8)
    made = PRODUCERS[name].make(shapes, 2, 0, torch.float32)
    save(made, tmp_path / "lora.safetensors")
    lora = load_lora(tmp_path / "lora.safetensors")
    assert set(lora) == set(made.deltas)
    for module, delta in made.deltas.items():
        assert float((product(*lora[module]) - delta).norm()) <= 1e-6 * float(delta.norm()), module


def test_the_rank_is_each_modules_own(tmp_path):
    path, made = write(tmp_path, "kohya-resized")
    lora = load_lora(path)
    stored = {k.removesuffix(".lora_down.weight"): t.shape[0] for k, t in made.tensors.items() if k.endswith("lora_down.weight")}
    assert {pair.up.removesuffix(".lora_up.weight"): pair.rank for pair in lora.pairs.values()} == stored
    assert len(set(stored.values())) > 1
    assert lora.rank == max(stored.values())


def test_factors_without_alpha_come_as_they_are_stored(good):
    path, stored = good
    lora = load_lora(path)
    for module in lora:
        factors = lora[module]
        assert torch.equal(factors.up, stored[f"diffusion_model.{module}.lora_B.weight"])
        assert torch.equal(factors.down, stored[f"diffusion_model.{module}.lora_A.weight"])


def test_a_fused_qkv_is_split_by_rows_without_looking_at_its_blocks(tmp_path):
    # up is dense here, not block-diagonal: thirds of the rank would be wrong, thirds of the rows are right
    path, made = write(tmp_path, "diffusion-pipe")
    up, down = (made.tensors[f"diffusion_model.layers.0.attention.qkv.lora_{f}.weight"] for f in "BA")
    lora = load_lora(path)
    for i, c in enumerate("qkv"):
        delta = product(up, down)[24 * i : 24 * (i + 1)]
        torch.testing.assert_close(product(*lora[f"layers.0.attention.to_{c}"]), delta, rtol=0, atol=1e-12)


def test_a_negative_alpha_keeps_its_sign(tmp_path):
    path, made = write(tmp_path, "musubi")
    stored = dict(made.tensors)
    key = "lora_unet_layers_0_attention_to_q.alpha"
    stored[key] = -stored[key]
    save_file(stored, path)
    delta = product(*load_lora(path)["layers.0.attention.to_q"])
    torch.testing.assert_close(delta, -made.deltas["layers.0.attention.to_q"], rtol=0, atol=1e-9)


def test_alpha_of_one_element_may_have_a_shape(tmp_path):
    path, made = write(tmp_path, "musubi")
    save_file({k: t.reshape(1) if k.endswith(".alpha") else t for k, t in made.tensors.items()}, path)
    module = "layers.0.attention.to_q"
    torch.testing.assert_close(product(*load_lora(path)[module]), made.deltas[module], rtol=0, atol=1e-9)


def test_metadata_and_dtype(tmp_path):
    path, made = write(tmp_path, "ai-toolkit", torch.bfloat16)
    lora = load_lora(path)
    assert lora.metadata == made.metadata
    assert lora.dtype == torch.bfloat16


def test_metadata_that_are_no_json_are_nobodys_business(good):
    path, stored = good
    save_file(stored, path, {"ss_tag_frequency": "{broken", "training_info": "{", "zit_merge.recipe": "[]"})
    assert set(load_lora(path).shapes)


def test_the_hash_is_that_of_the_tensor_data(good):
    path, stored = good
    data = path.read_bytes()
    wanted = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert load_lora(path).sha256() == wanted
    save_file(stored, path, {"title": "another header, the same tensors"})
    assert load_lora(path).sha256() == wanted


# --- what is left alone --------------------------------------------------------------------------------------------------------


def test_text_encoder_and_auxiliary_keys_are_skipped_and_listed(good):
    path, stored = good
    extra = [
        "lora_te_model_layers_0_self_attn_q_proj.lora_down.weight",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
        "text_encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "text_encoders.qwen3_4b.layers.0.mlp.up_proj.lora_B.weight",
        "layers.0.attention.to_q_aux.lora_A.weight",
    ]
    save_file(stored | {key: torch.ones(2, 2) for key in extra}, path)
    lora = load_lora(path)
    assert lora.skipped == tuple(sorted(extra))
    assert lora.unmatched == ()
    assert set(lora) == {m for m in SHAPES if m.startswith("layers.")}


def test_unknown_keys_are_listed_and_refused_by_a_merge(good, tmp_path):
    path, stored = good
    unknown = ["diffusion_model.layers.0.attention.to_w.lora_A.weight", "diffusion_model.layers.0.attention.to_w.lora_B.weight"]
    save_file(stored | {key: torch.ones(4, 24) for key in unknown}, path)
    lora = load_lora(path)
    assert lora.unmatched == tuple(unknown)
    with pytest.raises(ZitMergeError) as error:
        merge([(lora, 1.0)], shapes="free").save(tmp_path / "out.safetensors")
    message = str(error.value)
    assert unknown[0] in message
    assert "did you mean diffusion_model.layers.0.attention.to_" in message
    assert "allow_unmatched" in message
    assert not (tmp_path / "out.safetensors").exists()
    out = merge([(lora, 1.0)], shapes="free", allow_unmatched=True).save(tmp_path / "out.safetensors")
    assert set(load_lora(out)) == set(lora)


def test_a_misspelled_module_is_never_taken_for_another(good, tmp_path):
    path, stored = good
    key = "diffusion_model.layers.1.attention.to_q.lora_A.weight"
    save_file({k.replace("layers.1.", "layers.1.extra."): t for k, t in stored.items()}, path)
    lora = load_lora(path)
    assert {m for m in lora if m.startswith("layers.1.")} == set()
    assert key.replace("layers.1.", "layers.1.extra.") in lora.unmatched


# --- what is refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, p in PRODUCERS.items() if p.kind != "lora"])
def test_another_algorithm_is_refused_by_its_name(tmp_path, name):
    message = refusal(write(tmp_path, name)[0])
    assert ALGORITHMS[PRODUCERS[name].kind] in message
    assert "not available yet" in message


@pytest.mark.parametrize("name", sorted(DOUBLED))
def test_a_change_that_stands_there_twice_is_not_counted_twice(tmp_path, name):
    message = refusal(write(tmp_path, name)[0])
    assert "not available yet" in message
    assert "twice" in message


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_an_alpha_outside_of_the_tensors_is_not_read_as_1(tmp_path, name):
    message = refusal(write(tmp_path, name)[0])
    assert "not available yet" in message
    assert "alpha" in message


@pytest.mark.parametrize(
    "text",
    [
        "{broken",
        "[]",
        json.dumps({"transformer.r": 4}),
        json.dumps({"transformer.lora_alpha": 4}),
        json.dumps({"transformer.r": "4", "transformer.lora_alpha": "4"}),  # texts, where numbers belong
        json.dumps(
            {"transformer.r": 4, "transformer.lora_alpha": 4, "transformer.alpha_pattern": {"layers.0.attention.to_q": 2}}
        ),
    ],
)
def test_adapter_metadata_that_can_not_be_read_are_not_read_as_1(tmp_path, text):
    path, made = write(tmp_path, "diffusers")
    save_file(dict(made.tensors), path, {"lora_adapter_metadata": text})
    assert "lora_adapter_metadata" in refusal(path)


def test_one_alpha_key_does_not_make_1_of_the_scales_that_stand_in_the_metadata(tmp_path):
    # 1/8 by the metadata for all modules but the one that has a key
    path, made = write(tmp_path, "diffusers-alpha")
    save_file(dict(made.tensors) | {"transformer.layers.0.attention.to_q.alpha": torch.tensor(0.5)}, path, made.metadata)
    try:
        lora = load_lora(path)
    except ZitMergeError as error:
        assert "lora_adapter_metadata" in str(error)
        return
    for module, delta in made.deltas.items():
        assert relative(product(*lora[module]), delta) < 1e-6, module


def test_an_alpha_key_is_not_applied_twice_beside_the_metadata(tmp_path):
    # simpletuner-comfyui says the same scale in both places
    path, made = write(tmp_path, "simpletuner-comfyui")
    assert "lora_adapter_metadata" in made.metadata
    module = "layers.0.attention.to_q"
    torch.testing.assert_close(product(*load_lora(path)[module]), made.deltas[module], rtol=0, atol=1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_broken_number_is_found_when_its_module_is_read(good, tmp_path, value, factor):
    path, stored = good
    key = f"diffusion_model.layers.1.feed_forward.w2.{factor}.weight"
    broken = stored[key].clone()
    broken[1, 2] = value
    save_file(stored | {key: broken}, path)
    lora = load_lora(path)
    lora["layers.0.feed_forward.w2"]
    with pytest.raises(ZitMergeError, match=re.escape(key)):
        lora["layers.1.feed_forward.w2"]
    with pytest.raises(ZitMergeError, match=re.escape(key)):
        merge([(lora, 1.0)], shapes="free").save(tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == [path]  # no output and no part of one


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_half_a_pair(good, factor):
    path, stored = good
    gone = f"diffusion_model.layers.1.attention.to_v.{factor}.weight"
    save_file({k: t for k, t in stored.items() if k != gone}, path)
    message = refusal(path)
    assert "diffusion_model.layers.1.attention.to_v" in message
    assert "half of the pair" in message


def test_an_alpha_without_its_pair(tmp_path):
    path, made = write(tmp_path, "musubi")
    stem = "lora_unet_layers_0_attention_to_q"
    save_file({k: t for k, t in made.tensors.items() if not k.startswith(f"{stem}.lora")}, path)
    assert f"{stem}.alpha" in refusal(path)


@pytest.mark.parametrize("alpha", [float("inf"), float("nan")])
def test_an_alpha_that_is_no_number(tmp_path, alpha):
    path, made = write(tmp_path, "musubi")
    key = "lora_unet_layers_1_feed_forward_w3.alpha"
    save_file(dict(made.tensors) | {key: torch.tensor(alpha)}, path)
    assert key in refusal(path)


def test_an_alpha_of_0_is_not_guessed(tmp_path):
    path, made = write(tmp_path, "musubi")
    key = "lora_unet_layers_1_feed_forward_w3.alpha"
    save_file(dict(made.tensors) | {key: torch.tensor(0.0)}, path)
    assert key in refusal(path)


def test_an_alpha_of_two_numbers(tmp_path):
    path, made = write(tmp_path, "musubi")
    key = "lora_unet_layers_1_feed_forward_w3.alpha"
    save_file(dict(made.tensors) | {key: torch.tensor([1.0, 2.0])}, path)
    assert key in refusal(path)


@pytest.mark.parametrize(("up", "down"), [((24, 4), (3, 24)), ((24, 4, 1), (4, 24)), ((24,), (4, 24)), ((24, 0), (0, 24))])
def test_factors_that_are_no_pair(good, up, down):
    path, stored = good
    stem = "diffusion_model.layers.0.attention.to_q"
    save_file(stored | {f"{stem}.lora_B.weight": torch.ones(up), f"{stem}.lora_A.weight": torch.ones(down)}, path)
    assert stem in refusal(path)


def test_integers_are_no_factors(good):
    path, stored = good
    key = "diffusion_model.layers.0.attention.to_q.lora_A.weight"
    save_file(stored | {key: stored[key].to(torch.int8)}, path)
    assert "I8" in refusal(path)


def test_one_module_under_two_names(good):
    path, stored = good
    twin = {k.replace("diffusion_model.", "transformer."): t.clone() for k, t in stored.items() if ".0.attention.to_q" in k}
    save_file(stored | twin, path)
    message = refusal(path)
    assert "layers.0.attention.to_q" in message
    assert "twice" in message


def test_fused_and_split_q_in_one_file(tmp_path):
    path, made = write(tmp_path, "diffusion-pipe")
    stem = "diffusion_model.layers.0.attention.to_q"
    pair = {f"{stem}.lora_A.weight": torch.ones(4, 24), f"{stem}.lora_B.weight": torch.ones(24, 4)}
    save_file(dict(made.tensors) | pair, path)
    assert "twice" in refusal(path)


def test_a_fused_qkv_of_unequal_parts(tmp_path):
    # what grouped-query attention would look like: k and v narrower than q
    path, made = write(tmp_path, "diffusion-pipe")
    key = "diffusion_model.layers.0.attention.qkv.lora_B.weight"
    save_file(dict(made.tensors) | {key: torch.ones(24 + 8 + 8, 4)}, path)
    message = refusal(path)
    assert key in message
    assert "40 rows" in message


def test_another_models_lora(tmp_path):
    path = tmp_path / "flux.safetensors"
    stem = "diffusion_model.double_blocks.0.img_attn.qkv"
    save_file({f"{stem}.lora_A.weight": torch.ones(4, 24), f"{stem}.lora_B.weight": torch.ones(72, 4)}, path)
    message = refusal(path)
    assert stem in message
    assert "another model" in message


def test_another_size_of_the_same_architecture_names_the_shapes(tmp_path):
    # Lumina 2 has Z-Image's names at a width of 2304
    path = tmp_path / "lumina.safetensors"
    stem = "diffusion_model.layers.0.attention.to_q"
    save_file({f"{stem}.lora_A.weight": torch.ones(4, 2304), f"{stem}.lora_B.weight": torch.ones(2304, 4)}, path)
    with pytest.raises(ZitMergeError) as error:
        merge([(load_lora(path), 1.0)]).plan(tmp_path / "out.safetensors")
    message = str(error.value)
    words = ["lumina.safetensors", "layers.0.attention.to_q", "2304 x 2304", "3840 x 3840", "another model"]
    assert [w for w in words if w not in message] == []


@pytest.mark.parametrize("mode", ["strict", "free"])
def test_a_fused_qkv_whose_rows_divide_by_3_but_fit_no_z_image(tmp_path, mode):
    # q 3840, k and v 960 each: 5760 rows split evenly into three matrices of the wrong height
    path = tmp_path / "gqa.safetensors"
    stem = "diffusion_model.layers.0.attention.qkv"
    save_file({f"{stem}.lora_A.weight": torch.ones(4, 3840), f"{stem}.lora_B.weight": torch.ones(5760, 4)}, path)
    with pytest.raises(ZitMergeError, match="layers.0.attention.to_q"):
        merge([(load_lora(path), 1.0)], shapes=mode).plan(tmp_path / "out.safetensors")


def test_loras_of_two_sizes_belong_to_no_one_model(tmp_path):
    small, _ = write(tmp_path, "ai-toolkit")
    made = PRODUCERS["musubi"].make(small_shapes(dim=32, ffn=40, temb=16, cap=20, n_layers=2), 4, 0, torch.float32)
    save(made, tmp_path / "large.safetensors")
    with pytest.raises(ZitMergeError) as error:
        merge([(small, 1.0), (tmp_path / "large.safetensors", 1.0)], shapes="free").plan(tmp_path / "out.safetensors")
    assert "24 x 24" in str(error.value)
    assert "32 x 32" in str(error.value)


# --- files that are none -------------------------------------------------------------------------------------------------------


def test_a_missing_file(tmp_path):
    assert "no such file" in refusal(tmp_path / "gone.safetensors")


def test_a_folder(tmp_path):
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    assert "folder" in refusal(folder)


def test_an_empty_file(tmp_path):
    path = tmp_path / "empty.safetensors"
    path.touch()
    assert "not a whole" in refusal(path)


def test_a_file_of_metadata_only(tmp_path):
    path = tmp_path / "bare.safetensors"
    save_file({}, path, {"title": "nothing"})
    assert "no tensors" in refusal(path)


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.999])
def test_a_truncated_file(good, share):
    path, _ = good
    data = path.read_bytes()
    path.write_bytes(data[: max(4, int(len(data) * share))])
    assert "not a whole" in refusal(path)


def test_a_file_that_lies_about_its_header(good):
    path, _ = good
    data = path.read_bytes()
    path.write_bytes((2**60).to_bytes(8, "little") + data[8:])
    assert "not a whole" in refusal(path)


@pytest.mark.parametrize("name", ["lora.safetensors", "lora.pt"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickled_file_is_refused_and_not_opened(tmp_path, name, zipped, protocol):
    path = tmp_path / name
    torch.save(
        {"layers.0.attention.to_q.lora_A.weight": torch.ones(4, 24)},
        path,
        _use_new_zipfile_serialization=zipped,
        pickle_protocol=protocol,
    )
    assert "pickles can run code" in refusal(path)
