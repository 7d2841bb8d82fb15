"""Every trainer's file against the float64 delta of its format's own definition, and every file that must be refused."""

import hashlib
import math
import re
import struct

import pytest
import torch
from oracles.dense import product
from oracles.producers import PRODUCERS, save, small_shapes
from reading import DTYPES, NEEDS_BASE, READABLE, SHAPES, VECTORS, check, clear, dense, normal, refusal, store, write
from safetensors.torch import save_file
from sweep import sweep

from extensions_built_in.zit_merge import ZitMergeError, load_lora, merge
from extensions_built_in.zit_merge.formats.header import Header
from extensions_built_in.zit_merge.formats.reader import TensorReader
from extensions_built_in.zit_merge.formats.safetensors_file import SafetensorsFile

# kind -> what the sentence calls it
ALGORITHMS = {"dora": "DoRA", "oft": "OFT", "ia3": "IA3", "glora": "GLoRA"}


@pytest.fixture
def good(tmp_path):
    """A LoRA as AI-Toolkit writes it, and its tensors."""
    path, made = write(tmp_path, "ai-toolkit")
    return path, dict(made.tensors)


# --- what is read --------------------------------------------------------------------------------------------------------------


@sweep("name, dtype", READABLE, DTYPES)
def test_every_trainers_file_is_read_as_its_deltas(tmp_path, name, dtype):
    path, made = write(tmp_path, name, DTYPES[dtype])
    lora = clear(path, drop=VECTORS.get(name, ()))
    assert lora.skipped == tuple(sorted(key for key, tensor in made.tensors.items() if tensor.ndim == 1))  # the vectors
    assert len(lora) == len(made.deltas)
    check(lora, made.deltas)


def test_every_form_is_called_by_its_name(tmp_path):
    names = {"lora": ["LoRA"], "lokr": ["LoKr"], "loha": ["LoHa"], "lora+lokr": ["LoRA", "LoKr"], "full": ["full difference"]}
    names |= {"norm": ["LoRA"], "full-mixed": ["LoRA", "full difference"]}
    for name in READABLE:
        lora = load_lora(write(tmp_path, name)[0])
        wanted = names[PRODUCERS[name].kind]
        assert set(lora.algorithms) <= set(wanted), name
        assert wanted[0] in lora.algorithms, name
        assert list(lora.algorithms.values()) == sorted(lora.algorithms.values(), reverse=True), name
        assert sum(lora.algorithms.values()) == len(lora), name


@pytest.mark.parametrize("name", ["ai-toolkit", "diffusion-pipe", "musubi", "musubi-comfy-lokr", "musubi-convert-other-loha"])
def test_all_thirty_layers_are_read(tmp_path, name):
    # layers.1 and layers.10 to 19 begin alike
    shapes = small_shapes(dim=16, ffn=24, temb=8, cap=8)
    path, made = write(tmp_path, name, rank=2, shapes=shapes)
    check(clear(path), made.deltas)


def test_the_rank_is_each_modules_own(tmp_path):
    path, made = write(tmp_path, "kohya-resized")
    lora = load_lora(path)
    stored = {k.removesuffix(".lora_down.weight"): t.shape[0] for k, t in made.tensors.items() if k.endswith("lora_down.weight")}
    assert {"lora_unet_" + module.replace(".", "_"): rank for module, rank in lora.ranks.items()} == stored
    assert len(set(stored.values())) > 1
    assert lora.rank == max(stored.values())


@pytest.mark.parametrize("name", READABLE)
def test_no_change_has_a_higher_rank_than_it_says(tmp_path, name):
    path, made = write(tmp_path, name, rank=6)
    lora = load_lora(path, drop=VECTORS.get(name, ()))
    for module, delta in made.deltas.items():
        assert int(torch.linalg.matrix_rank(delta, rtol=1e-9)) <= lora.ranks[module] <= min(delta.shape), module
        assert lora[module].rank >= lora.ranks[module], module


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
    torch.testing.assert_close(dense(load_lora(path), module), made.deltas[module], rtol=0, atol=1e-9)


def test_metadata_and_dtype(tmp_path):
    path, made = write(tmp_path, "ai-toolkit", torch.bfloat16)
    lora = load_lora(path)
    assert lora.metadata == made.metadata
    assert lora.dtype == torch.bfloat16


def test_a_file_of_two_dtypes_has_one_that_holds_both(tmp_path):
    half, single = (torch.bfloat16, torch.float16)
    for dtypes, wanted in [((half, half), half), ((half, single), torch.float32), ((single, torch.float64), torch.float32)]:
        pairs = {
            f"transformer.layers.{i}.attention.to_q.lora_{f}.weight": normal(*shape).to(dtype)
            for i, dtype in enumerate(dtypes)
            for f, shape in (("A", (2, 24)), ("B", (24, 2)))
        }
        assert load_lora(store(tmp_path, pairs)).dtype == wanted


def test_metadata_that_are_no_json_are_nobodys_business(good):
    path, stored = good
    save_file(stored, path, {"ss_tag_frequency": "{broken", "training_info": "{", "zit_merge.recipe": "[]"})
    assert set(clear(path).shapes)


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


@pytest.mark.parametrize("name", [n for n, p in PRODUCERS.items() if p.kind in NEEDS_BASE])
def test_what_needs_the_base_model_is_refused_by_its_name_before_anything_is_read(tmp_path, name, monkeypatch):
    path, made = write(tmp_path, name)
    monkeypatch.setattr(TensorReader, "tensor", lambda *_: pytest.fail("a tensor was read"))
    told = []
    for answers in ({}, {"alpha": "none", "qkv": "sum", "drop": ["norm", "bias"]}):  # no answer helps
        with pytest.raises(ZitMergeError) as error:
            merge([(load_lora(path, **answers), 1.0)], shapes="free").plan(tmp_path / "out.safetensors")
        told.append(str(error.value))
    message = told[0].partition(f"{path.name}: ")[2]
    assert told[0] == told[1]
    assert ALGORITHMS[PRODUCERS[name].kind] in message
    assert message.split()[0] in made.tensors  # an example of what was found
    assert "base model's weights" in message and "set base: " in message
    assert "train without it, or extract a plain LoRA" in message


@pytest.mark.parametrize(
    ("suffix", "name"),
    [
        (".oft_diag", "OFT"),
        (".oft_r.default", "OFT"),
        (".lambda_layer", "T-LoRA"),
        (".bias_indices", "sparse residual"),
        (".bias_values", "sparse residual"),
        (".bias_size", "sparse residual"),
        (".lora_mid.weight", "Tucker"),
        (".lokr_t2", "Tucker"),
        (".hada_t1", "Tucker"),
        (".hada_t2", "Tucker"),
        (".bm.weight", "Tucker"),
    ],
)
def test_one_such_key_beside_a_whole_lora_is_enough(good, suffix, name):
    path, stored = good
    key = f"diffusion_model.layers.0.attention.to_q{suffix}"
    save_file(stored | {key: torch.ones(4, 4)}, path)
    message = refusal(path)
    assert message.startswith(f"{key} is ")
    assert name in message
    assert "train without it, or extract a plain LoRA" in message


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


@pytest.mark.parametrize("suffix", ["lora_down.weight", "lora.down.weight", "lora_A"])
def test_two_spellings_of_one_factor(good, suffix):
    path, stored = good
    key, twin = (f"diffusion_model.layers.0.attention.to_q.{s}" for s in ("lora_A.weight", suffix))
    save_file(stored | {twin: stored[key].clone()}, path)
    message = refusal(path)
    assert key in message
    assert twin in message
    assert "keep one of them" in message


def test_integers_are_no_factors(good):
    path, stored = good
    key = "diffusion_model.layers.0.attention.to_q.lora_A.weight"
    save_file(stored | {key: stored[key].to(torch.int8)}, path)
    assert "I8" in refusal(path)


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
@pytest.mark.parametrize("value", [0.0, -0.0, 16.0, 0.1, -3.5, 1e-7, 1e-40, 70000.0, math.inf, -math.inf, math.nan])
def test_an_alpha_is_read_as_torch_reads_it(tmp_path, dtype, value):
    if dtype == torch.int64 and not math.isfinite(value):
        value = 9.0
    stored = torch.tensor(value, dtype=dtype)
    save_file({"layers.0.attention.to_q.alpha": stored}, tmp_path / "a.safetensors")
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        found = Header(file).alpha("layers.0.attention.to_q.alpha")
    assert struct.pack("d", found) == struct.pack("d", float(stored))  # signs of zeros too


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
