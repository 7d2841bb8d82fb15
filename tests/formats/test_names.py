"""Names of every program: wrappers, adapters, scales; and what is said of a file whose names do not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles.dense import product
from reading import FUSED, SHAPES, Q, check, clear, dense, normal, question, refusal, store
from sweep import examples

from extensions_built_in.zit_merge import load_lora, merge
from extensions_built_in.zit_merge.errors import ZitMergeError
from extensions_built_in.zit_merge.formats.names import parse_key
from extensions_built_in.zit_merge.model.zimage import MODULES

PAIRS = {m: (normal(out, 2, seed=i), normal(2, into, seed=i + 100)) for i, (m, (out, into)) in enumerate(SHAPES.items())}
DELTAS = {m: product(up, down) for m, (up, down) in PAIRS.items()}
WRAPPERS = ["module", "_orig_mod", "pipe", "dit", "unet", "model", "base_model", "transformer", "diffusion_model", "lora"]


def named(stem, up="lora_B.weight", down="lora_A.weight", alpha=None):
    """The pairs of all modules; `stem` makes the start of a key of a module's name."""
    tensors = {}
    for module, (b, a) in PAIRS.items():
        tensors |= {f"{stem(module)}.{up}": b, f"{stem(module)}.{down}": a}
        if alpha is not None:
            tensors[f"{stem(module)}.alpha"] = torch.tensor(float(alpha))
    return tensors


def flat(name):
    return name.replace(".", "_")


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "pipe.dit.",
        "dit.",
        "unet.",
        "model.",
        "model.diffusion_model.",
        "transformer.diffusion_model.",
        "transformer._orig_mod.",
        "module._orig_mod.diffusion_model.",
        "_fsdp_wrapped_module.transformer.",
        "lora_transformer_",
        "transformer_",
        "lora_dit_",
        "lora_unet__orig_mod_",
        "lycoris__orig_mod_",
        "lora_unet_model_diffusion_model_",
    ],
)
def test_wrappers_of_every_program(tmp_path, prefix):
    is_flat = prefix.endswith("_")
    tensors = named(lambda m: prefix + (flat(m) if is_flat else m), "lora_up.weight", "lora_down.weight", alpha=1)
    check(clear(store(tmp_path, tensors)), {m: delta / 2 for m, delta in DELTAS.items()})


@examples(200)
@given(st.lists(st.tuples(st.sampled_from(WRAPPERS), st.sampled_from("._")), max_size=6), st.sampled_from(sorted(MODULES)))
def test_wrappers_in_any_order_and_number(wrappers, module):
    prefix = "".join(word + separator for word, separator in wrappers)
    for name in (module, flat(module)):
        part = parse_key(f"{prefix}{name}.lora_A.weight")
        assert (part.part, part.modules) == ("down", (module,))
        assert parse_key(f"{prefix}x{name}.lora_A.weight").part == "unknown"
        assert parse_key(f"{prefix}{name}x.lora_A.weight").part == "unknown"
        assert parse_key(f"{prefix}{name}.more.lora_A.weight").part == "unknown"


@pytest.mark.parametrize("inside", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_wrappers_of_single_blocks(tmp_path, inside):
    def stem(module):
        section, _, rest = module.partition(".")
        index, _, path = rest.partition(".")
        return f"transformer.{section}.{index}.{inside}.{path}" if section == "layers" else f"transformer.{module}"

    check(clear(store(tmp_path, named(stem))), DELTAS)


@pytest.mark.parametrize("adapter", ["default", "my_char", "default_0", "1", "角色", "lora_A", "scale", "weights"])
def test_any_name_of_an_adapter(tmp_path, adapter):
    tensors = named(lambda m: f"transformer.{m}", f"lora_B.{adapter}.weight", f"lora_A.{adapter}.weight")
    check(clear(store(tmp_path, tensors)), DELTAS)


def test_an_adapter_of_parameters_without_weight(tmp_path):
    w1, w2 = normal(4, 4), normal(6, 6, seed=1)
    tensors = {f"base_model.model.{Q}.lokr_w1.my_char": w1, f"base_model.model.{Q}.lokr_w2.my_char": w2}
    check(load_lora(store(tmp_path, tensors), alpha="none"), {Q: torch.kron(w1.double(), w2.double())})


def test_two_adapters_in_one_file_are_two_changes(tmp_path):
    one, two = (named(lambda m: f"transformer.{m}", f"lora_B.{name}.weight", f"lora_A.{name}.weight") for name in ("a", "b"))
    two = {key: tensor * 2 if ".lora_B." in key else tensor for key, tensor in two.items()}
    path = store(tmp_path, one | two | {f"transformer.{Q}.alpha": torch.tensor(1.0)})
    assert "twice and differently" in question(path)
    check(clear(path, qkv="sum"), {m: delta * (1.5 if m == Q else 3) for m, delta in DELTAS.items()})


# --- scales --------------------------------------------------------------------------------------------------------------------


SCALES = ("{}.scale_weight", "{}.weight_scale", "{}.weight.scale", "{}.scale", "{}_scale", "{}.weight_scale_inv")


def quantized(tensor, dtype, per=None):
    """(tensor as stored, its scale): for the whole, for each row or for each column."""
    largest = tensor.abs().amax(per, keepdim=True) if per is not None else tensor.abs().max()
    scale = largest / (127 if dtype == torch.int8 else 448)
    stored = tensor / scale
    return (stored.round() if dtype == torch.int8 else stored).to(dtype), scale


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_scales_beside_the_factors_are_applied(tmp_path, name, dtype):
    tensors, deltas = {}, {}
    for module, pair in PAIRS.items():
        read = []
        for factor, tensor in zip(("lora_up", "lora_down"), pair, strict=True):
            stem = f"diffusion_model.{module}.{factor}"
            stored, scale = quantized(tensor / 1000, dtype)
            tensors |= {f"{stem}.weight": stored, name.format(stem): scale}
            read.append(stored.float() * scale)
        deltas[module] = product(*read)
    path = store(tmp_path, tensors)
    lora = clear(path)
    check(lora, deltas)
    assert any("scales" in remark for remark in lora.remarks)
    merge([(lora, 0.5)], shapes="free", dtype="fp32").save(tmp_path / "out.safetensors")
    check(load_lora(tmp_path / "out.safetensors"), {m: delta / 2 for m, delta in deltas.items()}, 1e-5)


@pytest.mark.parametrize("per", [0, 1])
@pytest.mark.parametrize("shaped", [False, True])
def test_a_scale_for_each_row_or_column(tmp_path, per, shaped):
    up, scale = quantized(normal(72, 2), torch.int8, per)  # a fused qkv is read by thirds
    scale = scale.flatten() if shaped and per == 1 else scale
    down = normal(2, 24, seed=1)
    tensors = {f"{FUSED}.lora_up.weight": up, f"{FUSED}.lora_up.scale_weight": scale, f"{FUSED}.lora_down.weight": down}
    path = store(tmp_path, tensors)
    whole = product(up.float() * (scale[:, None] if scale.dim() == 1 else scale), down)
    lora = clear(path)
    for third, module in enumerate(lora):
        assert torch.allclose(dense(lora, module), whole[24 * third : 24 * third + 24], rtol=1e-6)


def test_scales_of_every_algorithm(tmp_path):
    w1, w2 = normal(4, 4), normal(6, 6, seed=1)
    stored, scale = quantized(w2, torch.float8_e4m3fn)
    stem = f"diffusion_model.{Q}"
    path = store(tmp_path, {f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": stored, f"{stem}.lokr_w2.scale_weight": scale})
    check(clear(path), {Q: torch.kron(w1.double(), (stored.float() * scale).double())})


STEM = f"diffusion_model.{Q}"
FLOAT8 = {f"{STEM}.lora_up.weight": normal(24, 2).to(torch.float8_e4m3fn), f"{STEM}.lora_down.weight": normal(2, 24)}


@pytest.mark.parametrize("shape", [(2,), (3,), (24, 2), (1, 24), (1, 1, 1), (2, 1)])
def test_a_scale_of_another_shape_is_refused(tmp_path, shape):
    path = store(tmp_path, FLOAT8 | {f"{STEM}.lora_up.scale_weight": torch.ones(shape)})
    assert f"{STEM}.lora_up.scale_weight has shape {list(shape)}" in refusal(path)


def test_a_scale_without_its_tensor_is_refused(tmp_path):
    path = store(tmp_path, FLOAT8 | {f"{STEM.replace('0', '1')}.lora_up.scale_weight": torch.tensor(1.0)})
    assert "stands alone" in refusal(path)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_found(tmp_path, number):
    lora = clear(store(tmp_path, FLOAT8 | {f"{STEM}.lora_up.scale_weight": torch.tensor(number)}))
    with pytest.raises(ZitMergeError, match=r"lora_up\.weight holds NaN or infinity"):
        lora[Q]


def test_integers_need_a_scale(tmp_path):
    path = store(tmp_path, FLOAT8 | {f"{STEM}.lora_up.weight": torch.ones(24, 2, dtype=torch.int8)})
    assert "I8" in refusal(path)


def test_a_scale_of_activations_changes_no_weight(tmp_path):
    path = store(tmp_path, FLOAT8 | {f"{STEM}.lora_up.scale_input": torch.tensor(3.0), f"{STEM}.input_scale": torch.tensor(3.0)})
    lora = clear(path)
    check(lora, {Q: product(FLOAT8[f"{STEM}.lora_up.weight"].float(), FLOAT8[f"{STEM}.lora_down.weight"])})
    assert len(lora.skipped) == 2


@pytest.mark.parametrize(
    "name",
    [
        "lora_up.zero_point",
        "lora_up.weight_scale_2",
        "lora_mask",
        "mask",
        "lora_up.weight_mask",
        "gate",
        "scale",
        "scalar",
        "lokr_scale",
    ],
)
def test_no_setting_drops_what_may_alter_a_change_that_is_read(tmp_path, name):
    path = store(tmp_path, FLOAT8 | {f"{STEM}.{name}": torch.ones(1)})
    assert f"{STEM}.{name}" in question(path)
    with pytest.raises(ZitMergeError, match="no setting leaves it out"):
        merge([(load_lora(path), 1.0)], shapes="free", allow_unmatched=True).plan(tmp_path / "out.safetensors")


# --- what is said of other files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", ["lora_A", "lora_B", "lora_B.my_char", "lora_up", "lora_down"])
def test_the_bias_of_a_factor_is_a_bias(tmp_path, factor):
    path = store(tmp_path, named(lambda m: f"diffusion_model.{m}") | {f"{STEM}.{factor}.bias": torch.ones(24)})
    assert f"{factor}.bias changes a bias" in question(path)
    check(clear(path, drop=["bias"]), DELTAS)


@pytest.mark.parametrize(
    "prefix",
    [
        "base_model.model.text_encoder.",
        "text_encoders.qwen3_4b.transformer.",
        "text_encoder.",
        "lora_te1_",
        "lora_te_",
        "lora_qwen3-",
        "pipe.text_encoder_2.",
    ],
)
def test_the_text_encoders_part_is_left_out_and_said(tmp_path, prefix):
    other = {f"{prefix}model.layers.0.self_attn.q_proj.lora_{x}.weight": torch.zeros(2, 2) for x in "AB"}
    path = store(tmp_path, named(lambda m: f"diffusion_model.{m}") | other)
    lora = clear(path)
    check(lora, DELTAS)
    assert set(lora.skipped) == set(other)
    plan = merge([(lora, 1.0)], shapes="free").plan(tmp_path / "out.safetensors")
    assert any("2 keys left out: text encoder" in note for note in plan.warnings)
    assert "text encoder" in refusal(store(tmp_path, other, "alone"))


ONE_LAYER = [m for m in MODULES if m.startswith("layers.0.")]


@pytest.mark.parametrize(
    "tensors",
    [
        {f"{m}.weight": torch.zeros(4, 4) for m in ONE_LAYER},
        {f"model.diffusion_model.{m}.weight": torch.zeros(4, 4) for m in ONE_LAYER}
        | {"model.diffusion_model.layers.0.attention_norm1.weight": torch.zeros(4)},
        {"double_blocks.0.img_attn.qkv.weight": torch.zeros(4, 4), "double_blocks.0.img_attn.qkv.bias": torch.zeros(4)},
        {"vae.decoder.conv_in.weight": torch.zeros(4, 4)},
    ],
)
def test_a_models_weights_are_no_lora(tmp_path, tensors):
    message = refusal(store(tmp_path, tensors))
    assert "holds a model's weights" in message
    assert "another model" not in message


def test_a_weight_of_the_model_beside_a_lora(tmp_path):
    key = f"{STEM}.base_layer.weight"
    lora = load_lora(store(tmp_path, named(lambda m: f"diffusion_model.{m}") | {key: torch.zeros(24, 24)}))
    assert lora.unmatched == (key,)
    with pytest.raises(ZitMergeError, match="a weight of the model itself"):
        merge([(lora, 1.0)], shapes="free").plan(tmp_path / "out.safetensors")
    assert merge([(lora, 1.0)], shapes="free", allow_unmatched=True).plan(tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("module", "into", "says"),
    [
        ("layers.0.attention.to_qkv", 3840, "a form that is not known"),  # Nunchaku
        ("layers.0.feed_forward.net.0.proj", 3840, "a form that is not known"),
        ("blk.0.attn_q", 3840, "a form that is not known"),
        ("layers.0.attn.qkv", 2304, "another model"),  # the width of Lumina 2
        ("double_blocks.0.img_attn.qkv", 3840, "another model"),  # a width of Z-Image, a name of Flux
        ("transformer_blocks.0.attn.to_q", 3072, "another model"),
        ("single_transformer_blocks.0.attn.to_q", 3072, "another model"),
        ("blocks.0.self_attn.q", 5120, "another model"),
        ("down_blocks.0.attentions.0.to_q", 320, "another model"),
    ],
)
@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model.", "", "lora_unet_"])
def test_another_model_only_where_names_or_shapes_say_so(tmp_path, module, into, says, prefix):
    stem = prefix + (flat(module) if prefix.endswith("_") else module)
    message = refusal(
        store(tmp_path, {f"{stem}.lora_A.weight": torch.ones(2, into), f"{stem}.lora_B.weight": torch.ones(into, 2)})
    )
    assert says in message
    assert ("another model" in message) == (says == "another model")


def test_a_part_with_names_of_an_unknown_form_names_the_closest_known_one(tmp_path):
    tensors = named(lambda m: f"transformer.{m.replace('attention.to_q', 'attention.to_qkv')}")
    lora = load_lora(store(tmp_path, tensors))
    with pytest.raises(ZitMergeError) as error:
        merge([(lora, 1.0)], shapes="free").plan(tmp_path / "out.safetensors")
    assert "a name of a form that is not known (did you mean transformer." in str(error.value)
