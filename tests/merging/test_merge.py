"""merge() end to end: files in, one file out, read back by plain safetensors and compared with the dense sum in float64."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles.dense import best_error, product, read_deltas, read_header, read_metadata, sizes, weighted_sum
from oracles.producers import FAKE_HASH, PRODUCERS, save, small_shapes
from safetensors.torch import load_file, save_file
from sweep import examples

from extensions_built_in.zit_merge import ZitMergeError, load_lora, merge
from extensions_built_in.zit_merge.formats.metadata import trigger_words

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of the inputs' size: half a unit in the last place for each factor; in float32 strength x alpha / rank is rounded too.
ROUNDING = {"fp32": 3e-7, "bf16": 2**-7, "fp16": 2**-10}
# They differ in names, in where alpha stands and what it is, in fused or split attention, in the modules they have, in algorithm.
MIXED = [
    "ai-toolkit",  # layers only, no alpha
    "ai-toolkit-all",  # all 276
    "musubi",  # flat names, alpha 1, no adaLN
    "kohya-resized",  # a rank and an alpha of its own for each module
    "onetrainer-comfy",  # alpha twice the rank
    "diffusion-pipe",  # fused attention, no alpha
    "none-converter",  # fused, rank 3r, block-diagonal
    "none-converter-fp8",
    "lora-linear-layer",  # attention only
    "musubi-convert-other",  # garbled names
    "ai-toolkit-lokr",  # whole Kronecker factors, alpha without meaning
    "musubi-lokr",  # one of them a product
    "musubi-comfy-lokr",  # LoKr, with LoRA on a fused qkv
    "diffusion-pipe-lokr",  # of a fused qkv
    "comfyui-train-loha",  # of a fused qkv
    "lycoris-full",  # whole differences
    "diffusers-rslora",  # alpha / sqrt(rank), in the metadata
]
SHAPES = small_shapes(dim=12, ffn=20, temb=8, cap=12, n_layers=2, n_refiners=1)


def write(folder, name, rank=4, seed=0, dtype=torch.float32, shapes=SHAPES, stem=None):
    """A trainer's file and its float64 deltas."""
    made = PRODUCERS[name].make(shapes, rank, seed, dtype)
    path = Path(folder) / f"{stem or f'{name}_{seed}'}.safetensors"
    save(made, path)
    return path, made.deltas


def write_pairs(path, factors, metadata=None):
    """A file in AI-Toolkit's form: module -> (up, down) or (up, down, alpha)."""
    tensors = {}
    for module, (up, down, *alpha) in factors.items():
        tensors[f"diffusion_model.{module}.lora_B.weight"] = up.clone(memory_format=torch.contiguous_format)
        tensors[f"diffusion_model.{module}.lora_A.weight"] = down.clone(memory_format=torch.contiguous_format)
        if alpha:
            tensors[f"diffusion_model.{module}.alpha"] = torch.tensor(float(alpha[0]))
    save_file(tensors, path, metadata)
    return path


def make(folder, loras, name="out", **how):
    """Merges and gives the path of the output."""
    return merge(loras, **{"shapes": "free", "dtype": "fp32", "device": "cpu"} | how).save(Path(folder) / f"{name}.safetensors")


def errors(found, parts):
    """|found - wanted| of each module as a share of sum_i |strength_i| |delta_i|."""
    wanted, size = weighted_sum(parts), sizes(parts)
    for module in found.keys() - wanted.keys():  # what clients want beside the merged modules
        assert not found[module].any(), module
    assert wanted.keys() <= found.keys()
    return {m: float((found[m] - wanted[m]).norm()) / (size[m] or 1.0) for m in wanted}


def check(found, parts, tolerance):
    assert {m: e for m, e in errors(found, parts).items() if not e < tolerance} == {}


# --- the sum -------------------------------------------------------------------------------------------------------------------


ratios = st.sampled_from([0.5, 1.0, -1.0, 0.0, 1.7])


@examples(12)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(MIXED), st.integers(1, 9), st.sampled_from([0.5, 1.0, -1.0, 0.0, 1.7]), st.sampled_from([*DTYPES])
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([*DTYPES]),
)
def test_any_mix_of_trainers_ranks_and_ratios(parts, dtype):
    with tempfile.TemporaryDirectory() as folder:
        made = [write(folder, name, rank, i, DTYPES[stored]) for i, (name, rank, _, stored) in enumerate(parts)]
        weighed = [(path, deltas, ratio) for (path, deltas), (*_, ratio, _) in zip(made, parts, strict=True)]
        out = make(folder, [(path, ratio) for path, _, ratio in weighed], dtype=dtype)
        check(read_deltas(out), [(deltas, ratio) for _, deltas, ratio in weighed], ROUNDING[dtype])


@pytest.mark.parametrize("other", MIXED)
@pytest.mark.parametrize("ratios", [(1.0, 1.0), (0.0, 0.7), (-0.3, 1.4)])
def test_two_loras(tmp_path, other, ratios):
    one, two = write(tmp_path, "ai-toolkit", 8), write(tmp_path, other, 3, 1)
    out = make(tmp_path, [(one[0], ratios[0]), (two[0], ratios[1])])
    check(read_deltas(out), [(one[1], ratios[0]), (two[1], ratios[1])], ROUNDING["fp32"])


def test_thirty_layers_with_every_kind_of_weight(tmp_path):
    shapes = small_shapes(dim=12, ffn=16, temb=8, cap=8)
    one, two = write(tmp_path, "ai-toolkit-all", 3, shapes=shapes), write(tmp_path, "musubi", 2, 1, shapes=shapes)
    weights = {
        "ratio": 0.8,
        "blocks": {"attention": 0.5, "to_q": 1.5},
        "layers": {"0-9": [0.0, 0.9], "10-29": 2.0, "other": 0.25},
        "effects": {"color_light": 3.0},
        "overrides": {"20-25.to_v": 1.3, "*.w2": -1.0},
    }

    def strength(module):  # by hand, for these weights
        if module.endswith(".w2"):
            return 0.8 * -1.0
        parts = module.split(".")
        if parts[0] not in ("layers", "noise_refiner", "context_refiner"):
            return 0.8 * 0.25
        index = int(parts[1])
        if parts[0] == "layers" and 20 <= index <= 25 and module.endswith("to_v"):
            return 0.8 * 1.3
        factor = 0.8
        if parts[0] == "layers":
            factor *= index * 0.1 if index < 10 else 2.0
        if "attention" in module:
            factor *= 1.5 if module.endswith("to_q") else 0.5
        if module.endswith("to_v") or "adaLN" in module:
            factor *= 3.0
        return factor

    out = make(tmp_path, [(one[0], weights), (two[0], -0.4)])
    check(read_deltas(out), [(one[1], {m: strength(m) for m in one[1]}), (two[1], -0.4)], ROUNDING["fp32"])


def test_alpha_other_than_the_rank(tmp_path):
    random = torch.Generator().manual_seed(0)
    up, down = torch.randn(12, 4, generator=random), torch.randn(4, 12, generator=random)
    module = "layers.0.attention.to_q"
    for alpha in (1.0, 2.0, 16.0, -3.0):
        path = write_pairs(tmp_path / "lora.safetensors", {module: (up, down, alpha)})
        found = read_deltas(make(tmp_path, [(path, 1.0)]))[module]
        torch.testing.assert_close(found, product(up, down) * alpha / 4, rtol=1e-6, atol=1e-6)


def test_a_module_that_only_one_has_keeps_its_strength(tmp_path):
    one, two = write(tmp_path, "ai-toolkit-all"), write(tmp_path, "lora-linear-layer", seed=1)
    assert one[1].keys() > two[1].keys()
    found = read_deltas(make(tmp_path, [(one[0], 0.5), (two[0], 0.5)]))
    for module in one[1].keys() - two[1].keys():  # half, not all of it and not nothing
        torch.testing.assert_close(found[module], 0.5 * one[1][module], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_lora_less_itself_is_nothing(tmp_path, dtype):
    path, deltas = write(tmp_path, "ai-toolkit", dtype=DTYPES[dtype])
    found = read_deltas(make(tmp_path, [(path, 1.0), (path, -1.0)], dtype=dtype))
    for module, delta in deltas.items():
        assert float(found[module].norm()) < 1e-12 * float(delta.norm())


def test_ratio_0_everywhere_writes_zeros(tmp_path):
    path, deltas = write(tmp_path, "musubi")
    found = read_deltas(make(tmp_path, [(path, 0.0)]))
    assert deltas.keys() <= found.keys()
    assert not any(delta.any() for delta in found.values())


def test_a_ratio_of_0_is_as_if_the_lora_were_not_there(tmp_path):
    one, two = write(tmp_path, "ai-toolkit"), write(tmp_path, "musubi", 8, 1)
    alone, beside = make(tmp_path, [(one[0], 0.5)], "alone"), make(tmp_path, [(two[0], 0.0), (one[0], 0.5)], "beside")
    assert load_file(alone).keys() == load_file(beside).keys()
    for key, tensor in load_file(alone).items():
        assert torch.equal(load_file(beside)[key], tensor), key


@examples(6)
@given(st.permutations(range(3)), st.sampled_from(["exact", 3, "same"]))
def test_order_has_no_meaning(order, rank):
    with tempfile.TemporaryDirectory() as folder:
        made = [write(folder, name, 2 + i, i) for i, name in enumerate(["ai-toolkit", "musubi", "diffusion-pipe"])]
        weighed = list(zip([path for path, _ in made], (0.7, -0.4, 1.1), strict=True))
        first = read_deltas(make(folder, weighed, "first", rank=rank))
        second = read_deltas(make(folder, [weighed[i] for i in order], "second", rank=rank))
        for module, delta in first.items():
            assert float((second[module] - delta).norm()) <= 1e-6 * float(delta.norm()), module


@pytest.mark.parametrize("rank", ["exact", 3])
@pytest.mark.parametrize("by", [1.0, 1e4])
def test_the_gauge_of_the_factors_has_no_meaning(tmp_path, rank, by):
    path, _ = write(tmp_path, "ai-toolkit")
    other, _ = write(tmp_path, "musubi", 3, 1)
    turned = {}
    for module, factors in ((m, load_lora(path)[m]) for m in load_lora(path)):
        random = torch.Generator().manual_seed(len(turned))
        q = torch.linalg.qr(torch.randn(4, 4, generator=random, dtype=torch.float64)).Q
        turned[module] = ((factors.up.double() @ q * by).float(), (q.T @ factors.down.double() / by).float())
    same = write_pairs(tmp_path / "turned.safetensors", turned)
    one, two = (read_deltas(make(tmp_path, [(p, 0.6), (other, 0.5)], p.stem + "_out", rank=rank)) for p in (path, same))
    for module, delta in one.items():
        assert float((two[module] - delta).norm()) <= 2e-6 * float(delta.norm()), module


# --- what passes through -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "out"),
    [
        (["bf16", "bf16"], "bf16"),
        (["fp16", "fp16"], "fp16"),
        (["bf16", "fp16"], "fp32"),  # neither holds the other
        (["fp16", "fp32"], "fp32"),
    ],
)
def test_dtype_same_is_one_that_holds_every_input(tmp_path, inputs, out):
    loras = [(write(tmp_path, "ai-toolkit", seed=i, dtype=DTYPES[d])[0], 0.5) for i, d in enumerate(inputs)]
    factors = [t for k, t in load_file(make(tmp_path, loras, dtype="same")).items() if not k.endswith(".alpha")]
    assert {t.dtype for t in factors} == {DTYPES[out]}


def test_dtype_same_of_a_float64_lora(tmp_path):
    # the reader takes such files, the interface knows no fp64 to write: the widest there is, or a sentence, but no KeyError
    random = torch.Generator().manual_seed(0)
    up, down = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in ((12, 2), (2, 12)))
    path = write_pairs(tmp_path / "wide.safetensors", {"layers.0.attention.to_k": (up, down)})
    try:
        out = make(tmp_path, [(path, 1.0)], dtype="same")
    except ZitMergeError as error:
        assert "wide.safetensors" in str(error)
    else:
        assert load_file(out)["diffusion_model.layers.0.attention.to_k.lora_A.weight"].dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("save_as", ["own", "same"])
def test_one_lora_at_ratio_1_comes_back_bit_for_bit(tmp_path, dtype, save_as):
    path, _ = write(tmp_path, "ai-toolkit", dtype=DTYPES[dtype])
    out = load_file(make(tmp_path, [(path, 1.0)], dtype=dtype if save_as == "own" else "same"))
    for key, tensor in load_file(path).items():
        assert out[key].dtype == tensor.dtype
        assert torch.equal(out[key], tensor), key


def test_our_own_output_comes_back_bit_for_bit(tmp_path):
    one, two = write(tmp_path, "ai-toolkit")[0], write(tmp_path, "musubi", seed=1)[0]
    first = make(tmp_path, [(one, 0.4), (two, -0.9)], "first", dtype="bf16")
    second = make(tmp_path, [(first, 1.0)], "second", dtype="bf16")
    for key, tensor in load_file(first).items():
        assert torch.equal(load_file(second)[key], tensor), key


def test_a_merge_of_merges_is_the_merge(tmp_path):
    made = [write(tmp_path, name, 3, i) for i, name in enumerate(["ai-toolkit", "musubi", "diffusion-pipe"])]
    first = make(tmp_path, [(made[0][0], 0.4), (made[1][0], -0.9)], "first")
    out = make(tmp_path, [(first, 0.5), (made[2][0], 0.8)])
    check(read_deltas(out), [(made[0][1], 0.2), (made[1][1], -0.45), (made[2][1], 0.8)], ROUNDING["fp32"])


@pytest.mark.parametrize("rank", ["exact", 2])
def test_fused_and_split_attention_agree(tmp_path, rank):
    fused, deltas = write(tmp_path, "diffusion-pipe")
    stored, split = load_file(fused), {}
    for module in deltas:
        stem = "diffusion_model." + module.replace(".attention.to_out.0", ".attention.out")
        if module.endswith((".to_q", ".to_k", ".to_v")):
            stem, third = stem[: -len("to_q")] + "qkv", "qkv".index(module[-1])
            up = stored[f"{stem}.lora_B.weight"].chunk(3)[third]
        else:
            up = stored[f"{stem}.lora_B.weight"]
        split[module] = (up, stored[f"{stem}.lora_A.weight"])
    apart = write_pairs(tmp_path / "apart.safetensors", split)
    other, _ = write(tmp_path, "ai-toolkit", 3, 1)
    one, two = (load_file(make(tmp_path, [(p, 0.6), (other, 0.5)], p.stem + "_out", rank=rank)) for p in (fused, apart))
    assert one.keys() == two.keys()
    for key in one:
        assert torch.equal(one[key], two[key]), key


# --- rank ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path):
    """Two LoRAs of ranks 6 and 4, and what their sum has to be."""
    one, two = write(tmp_path, "ai-toolkit", 6), write(tmp_path, "musubi", 4, 1)
    return [(one[0], 0.7), (two[0], -0.4)], [(one[1], 0.7), (two[1], -0.4)]


def ranks(path):
    return {t.shape[0] for k, t in load_file(path).items() if k.endswith(".lora_A.weight")}


def test_exact_adds_the_ranks(tmp_path, pair):
    assert ranks(make(tmp_path, pair[0])) == {10}


def test_same_is_the_largest_rank_among_the_inputs(tmp_path, pair):
    assert ranks(make(tmp_path, pair[0], rank="same")) == {6}


@pytest.mark.parametrize("rank", [1, 5, 9])
def test_a_number_is_the_rank(tmp_path, pair, rank):
    assert ranks(make(tmp_path, pair[0], rank=rank)) == {max(rank, 2)}  # 2 is the lowest beside an alpha key


@pytest.mark.parametrize("rank", [10, 11, 64])
def test_a_rank_that_holds_everything_cuts_nothing(tmp_path, pair, rank):
    out = make(tmp_path, pair[0], rank=rank)
    assert ranks(out) == {10}
    check(read_deltas(out), pair[1], ROUNDING["fp32"])


@pytest.mark.parametrize("rank", [1, 3, 7, "same"])
def test_a_cut_file_is_as_close_as_its_rank_allows(tmp_path, pair, rank):
    found, wanted = read_deltas(make(tmp_path, pair[0], rank=rank)), weighted_sum(pair[1])
    kept = 6 if rank == "same" else max(rank, 2)
    for module, delta in wanted.items():
        excess = float((found[module] - delta).norm()) - best_error(delta, kept)
        assert abs(excess) < 1e-6 * float(delta.norm()), module


@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize(
    "names",
    [
        ("ai-toolkit-lokr",),
        ("lycoris-lokr-both",),
        ("diffusion-pipe-lokr",),
        ("ai-toolkit-lokr", "ai-toolkit"),
        ("ai-toolkit-lokr", "musubi-lokr", "musubi-loha"),
        ("lycoris-full", "ai-toolkit-lokr-split"),
        ("comfyui-train-loha",),
    ],
    ids=" + ".join,
)
def test_other_algorithms_are_cut_as_close_as_the_rank_allows(tmp_path, names, rank):
    made, ratios = [write(tmp_path, name, 2, i) for i, name in enumerate(names)], (0.7, -0.4, 1.1)
    out = make(tmp_path, [(path, ratio) for (path, _), ratio in zip(made, ratios, strict=False)], rank=rank)
    rank = max(rank, 2)  # the lowest beside an alpha key
    whole = {"lycoris-lokr-both": 4, "comfyui-train-loha": 4}.get(names[0], rank)  # 2 x 2: there is nothing to cut at 5
    assert ranks(out) == {min(rank, whole)}
    found = read_deltas(out)
    for module, delta in weighted_sum([(deltas, ratio) for (_, deltas), ratio in zip(made, ratios, strict=False)]).items():
        excess = float((found[module] - delta).norm()) - best_error(delta, rank)
        assert abs(excess) < 1e-6 * float(delta.norm()), module


@pytest.mark.parametrize("name", ["ai-toolkit-lokr", "musubi-loha", "lycoris-full"])
def test_rank_same_needs_a_number_where_the_rank_is_no_trainers_choice(tmp_path, name):
    paths = [write(tmp_path, n, seed=i)[0] for i, n in enumerate((name, "ai-toolkit"))]
    with pytest.raises(ZitMergeError, match=rf"rank: same is the rank of LoRAs, {name}_0\.safetensors is a .*rank: 64"):
        make(tmp_path, [(path, 1.0) for path in paths], rank="same")


def test_a_lora_keeps_the_answers_that_it_was_opened_with(tmp_path):
    path, deltas = write(tmp_path, "peft", 4)  # alpha is not in the file
    lora = load_lora(path, alpha=2.0)
    found = read_deltas(make(tmp_path, [(lora, 0.5)]))
    module = "layers.0.attention.to_q"
    torch.testing.assert_close(found[module], deltas[module] / 1.5 * (2.0 / 4) * 0.5, rtol=1e-6, atol=1e-9)
    with pytest.raises(ZitMergeError, match=r"adapter_config\.json"):
        make(tmp_path, [(load_lora(path), 0.5)])
    both, _ = write(tmp_path, "comfyui-train-all")
    assert make(tmp_path, [(load_lora(both, drop=("norm", "bias")), 0.5)]).is_file()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_cut_file_in_half_precision_loses_one_rounding_more(tmp_path, pair, dtype):
    found, wanted = read_deltas(make(tmp_path, pair[0], rank=3, dtype=dtype)), weighted_sum(pair[1])
    for module, delta in wanted.items():
        error, least = float((found[module] - delta).norm()), best_error(delta, 3)
        assert error < least + ROUNDING[dtype] * float(delta.norm()), module


@pytest.mark.parametrize("rank", ["exact", 4])
def test_ranks_above_the_size_of_a_module(tmp_path, rank):
    # adaLN is 8 wide here: 15 stacked components do not fit into it, and need not
    made = [write(tmp_path, "ai-toolkit", 5, i) for i in range(3)]
    out = make(tmp_path, [(path, 0.5) for path, _ in made], rank=rank)
    parts = [(deltas, 0.5) for _, deltas in made]
    if rank == "exact":
        check(read_deltas(out), parts, ROUNDING["fp32"])
    for module, delta in weighted_sum(parts).items():
        error = float((read_deltas(out)[module] - delta).norm())
        assert error <= best_error(delta, 15 if rank == "exact" else 4) + 1e-6 * float(delta.norm()), module


def test_the_same_lora_twice_cut_to_its_own_rank_is_exact(tmp_path):
    path, deltas = write(tmp_path, "ai-toolkit")
    out = make(tmp_path, [(path, 0.5), (path, 0.25)], rank="same")
    assert ranks(out) == {4}
    check(read_deltas(out), [(deltas, 0.75)], 1e-6)


# --- the form that every client reads ------------------------------------------------------------------------------------------


def sparse(path):
    """A LoRA of five modules of different ranks: v and w3 alone, nothing of layers.0.attention.to_k."""
    random = torch.Generator().manual_seed(0)
    wanted = {
        "layers.1.attention.to_v": (12, 12, 3),
        "layers.1.feed_forward.w3": (20, 12, 2),
        "context_refiner.0.attention.to_q": (12, 12, 1),
        "noise_refiner.0.feed_forward.w2": (12, 20, 2),
        "cap_embedder.1": (12, 10, 2),
    }
    return write_pairs(
        path,
        {m: (torch.randn(o, r, generator=random), torch.randn(r, i, generator=random), 0.5) for m, (o, i, r) in wanted.items()},
    )


COMPLETE = {
    *(f"layers.1.attention.to_{c}" for c in "qkv"),
    *(f"context_refiner.0.attention.to_{c}" for c in "qkv"),
    "layers.1.feed_forward.w1",
    "layers.1.feed_forward.w3",
    "noise_refiner.0.feed_forward.w2",
    "cap_embedder.1",
    *(f"layers.0.attention.to_{c}" for c in "qkv"),  # to_k always, and what belongs to it
}


def test_q_k_v_and_w1_w3_come_together_and_layer_0_to_k_always(tmp_path):
    out = make(tmp_path, [(sparse(tmp_path / "sparse.safetensors"), 1.0)])
    assert set(read_deltas(out)) == COMPLETE
    assert {k.rsplit(".lora_")[0].removesuffix(".alpha") for k in load_file(out)} == {f"diffusion_model.{m}" for m in COMPLETE}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", ["exact", 2, 1])
def test_one_rank_and_an_alpha_equal_to_it(tmp_path, dtype, rank):
    parts = [(sparse(tmp_path / "sparse.safetensors"), -0.5), (write(tmp_path, "kohya-resized", 3, shapes=SHAPES)[0], 0.3)]
    out = load_file(make(tmp_path, parts, dtype=dtype, rank=rank))
    downs = {k: t for k, t in out.items() if k.endswith(".lora_A.weight")}
    (common,) = {t.shape[0] for t in downs.values()}
    for key, down in downs.items():
        stem = key.removesuffix(".lora_A.weight")
        up, alpha = out[f"{stem}.lora_B.weight"], out[f"{stem}.alpha"]
        assert up.shape[1] == common
        assert down.dtype == up.dtype == DTYPES[dtype]
        assert (alpha.dtype, alpha.shape, float(alpha)) == (torch.float32, (), common)
        assert torch.isfinite(up).all()
        assert torch.isfinite(down).all()
    assert len(out) == 3 * len(downs)


def test_layer_0_to_k_holds_the_files_rank(tmp_path):
    # AI-Toolkit's loader reads the rank there and cuts every module to it
    out = make(tmp_path, [(sparse(tmp_path / "sparse.safetensors"), 1.0)])
    assert load_file(out)["diffusion_model.layers.0.attention.to_k.lora_A.weight"].shape[0] == 3


def test_the_bytes_are_a_whole_safetensors_file_without_gaps(tmp_path):
    out = make(tmp_path, [(sparse(tmp_path / "sparse.safetensors"), 1.0)], dtype="bf16")
    header, size = read_header(out)
    header.pop("__metadata__")
    spans = sorted(entry["data_offsets"] for entry in header.values())
    assert spans[0][0] == 0
    assert [end for _, end in spans[:-1]] == [start for start, _ in spans[1:]]
    assert spans[-1][1] == size
    for key, entry in header.items():  # safetensors asks for aligned tensors
        assert entry["data_offsets"][0] % {"F32": 4, "BF16": 2}[entry["dtype"]] == 0, key
    assert int.from_bytes(out.read_bytes()[:8], "little") % 8 == 0
    assert merge([(tmp_path / "sparse.safetensors", 1.0)], shapes="free", dtype="bf16").plan(out).bytes == out.stat().st_size


def test_an_embedder_alone_stays_alone_where_the_width_is_not_known(tmp_path):
    random = torch.Generator().manual_seed(0)
    factors = (torch.randn(16, 2, generator=random), torch.randn(2, 8, generator=random))
    path = write_pairs(tmp_path / "t.safetensors", {"t_embedder.mlp.0": factors})
    assert set(read_deltas(make(tmp_path, [(path, 1.0)]))) == {"t_embedder.mlp.0"}


def test_a_delta_too_large_for_float16_is_refused_not_clamped(tmp_path):
    big = torch.full((12, 1), 1e6)
    path = write_pairs(tmp_path / "big.safetensors", {"layers.0.attention.to_k": (big, big.T)})
    with pytest.raises(ZitMergeError, match=r"layers\.0\.attention\.to_k is too large for fp16"):
        make(tmp_path, [(path, 1.0)], dtype="fp16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big.safetensors"]
    assert float(read_deltas(make(tmp_path, [(path, 1.0)], dtype="bf16"))["layers.0.attention.to_k"].max()) > 9e11


def test_a_delta_too_large_for_float32_is_not_advised_to_be_float32(tmp_path):
    path = write_pairs(tmp_path / "big.safetensors", {"layers.0.attention.to_k": (torch.full((12, 1), 1e30), torch.ones(1, 12))})
    with pytest.raises(ZitMergeError) as error:
        make(tmp_path, [(path, 1e10)])
    assert "too large for fp32" in str(error.value)
    assert "save it as" not in str(error.value)  # no dtype is larger: the ratio is what to look at


# --- metadata ------------------------------------------------------------------------------------------------------------------

NEVER = (
    *("sshs_", "modelspec.hash_sha256", "training_info", "lora_adapter_metadata", "ss_network_"),
    *("lycoris_config", "ot_config", "ss_training_started_at"),
)


@pytest.mark.parametrize("name", ["ai-toolkit", "musubi", "onetrainer-comfy", "simpletuner-comfyui", "simpletuner-lycoris-locon"])
@pytest.mark.parametrize("alone", [True, False])
def test_an_inputs_identity_is_not_copied(tmp_path, name, alone):
    path, _ = write(tmp_path, name)
    loras = [(path, 1.0)] if alone else [(path, 1.0), (write(tmp_path, "ai-toolkit", seed=1)[0], 0.5)]
    metadata = read_metadata(make(tmp_path, loras))
    assert [key for key in metadata if key.startswith(NEVER)] == []
    assert [key for key, text in metadata.items() if FAKE_HASH[:8] in text] == []


def test_the_metadata_say_what_the_file_is(tmp_path):
    loras = [(write(tmp_path, "ai-toolkit", stem="me")[0], 0.9), (write(tmp_path, "musubi", seed=1)[0], 0.5)]
    metadata = read_metadata(make(tmp_path, loras, "both"))
    assert metadata["modelspec.architecture"] == "Z-Image/lora"
    assert metadata["modelspec.title"] == metadata["ss_output_name"] == "both"
    assert metadata["modelspec.merged_from"] == "me, musubi"  # the second one has a title of its own
    assert metadata["ss_base_model_version"] == "zimage"
    assert metadata["zit_merge.version"]


def test_tag_frequencies_and_trigger_words_are_merged(tmp_path):
    factors = {"layers.0.attention.to_k": (torch.ones(12, 1), torch.ones(1, 12))}
    texts = [
        {"ss_tag_frequency": json.dumps({"1_zoe": {"zoe": 3}})},
        {"ss_tag_frequency": json.dumps({"1_zoe": {"zoe": 2}, "img": {"ink": 7, "portrait": 1}})},
        {"modelspec.trigger_phrase": "in ink style", "ss_tag_frequency": json.dumps({"img": {"ink": 1}})},
        {"modelspec.trigger_phrase": "unused", "ss_tag_frequency": json.dumps({"img": {"unused": 1}})},
    ]
    loras = [(write_pairs(tmp_path / f"{i}.safetensors", factors, text), 1.0 if i < 3 else 0.0) for i, text in enumerate(texts)]
    metadata = read_metadata(make(tmp_path, loras))
    tags = {"ink": 8, "zoe": 5, "portrait": 1, "in ink style": 1}
    assert folders(metadata) == [("1_out", list(tags.items()))]  # the commonest first
    # what goes in with strength 0 is not in the file, so its trigger word must not be promised
    assert metadata["modelspec.trigger_phrase"] == "zoe, in ink style"
    assert metadata["modelspec.merged_from"] == "0, 1, 2"
    again = read_metadata(make(tmp_path, [(tmp_path / "out.safetensors", 1.0), loras[2]], name="again"))
    assert again["modelspec.trigger_phrase"] == "zoe, in ink style"
    assert folders(again) == [("1_again", [("ink", 9), ("zoe", 5), ("in ink style", 2), ("portrait", 1)])]


def folders(metadata):
    """ss_tag_frequency with its order."""
    return [(name, list(tags.items())) for name, tags in json.loads(metadata["ss_tag_frequency"]).items()]


FOLDERS = {  # ss_tag_frequency, ss_dataset_dirs -> trigger words
    "AI-Toolkit": ({"1_trigger": {"trigger": 1}}, None, ["trigger"]),
    "one tag": ({"10_alice": {"alice woman": 30}}, None, ["alice woman"]),
    "every caption": (
        {"10_alice": {"smile": 12, "alice woman": 30, "1girl": 30}},
        {"10_alice": {"n_repeats": 10, "img_count": 30}},
        ["alice woman", "1girl"],
    ),
    "the folder's name": ({"10_alice woman": {"smile": 12, "alice woman": 9}}, None, ["alice woman"]),
    "captions alone": ({"img": {"a woman at a table": 1, "in the rain": 1}}, None, []),
    "how many pictures is not known": ({"img": {"smile": 40, "rain": 7}}, None, []),
    "one picture": ({"img": {"smile": 1, "rain": 1}}, {"img": {"img_count": 1}}, []),
    "two folders": ({"1_a": {"a": 1}, "1_b": {"b": 1}}, None, ["a", "b"]),
    "another folder": ({"a": {"x": 3, "y": 1}}, {"b": {"img_count": 3}}, []),
    "broken": ({"a": {"x": 3, "y": 1}}, {"a": ["img_count"]}, []),
    "blank": ({"1_": {" ": 1}}, None, []),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_trigger_word_is_what_every_caption_has(case):
    tags, counts, wanted = FOLDERS[case]
    metadata = {"ss_tag_frequency": json.dumps(tags)} | ({"ss_dataset_dirs": json.dumps(counts)} if counts else {})
    assert trigger_words(metadata) == wanted


def test_every_program_finds_the_trigger_words_of_all(tmp_path):
    """As ComfyUI-Lora-Manager (the first folder, by counts) and SwarmUI (the phrase) do it, and after a second merge too."""
    factors = {"layers.0.attention.to_k": (torch.ones(12, 1), torch.ones(1, 12))}
    texts = [
        {"ss_tag_frequency": json.dumps({"10_alice": {"alice woman": 30}})},
        {"ss_tag_frequency": json.dumps({"1_style": {"inkstyle": 50}})},
        {"modelspec.trigger_phrase": "ohwx man, photo"},
    ]
    loras = [(write_pairs(tmp_path / f"{i}.safetensors", factors, text), 1.0) for i, text in enumerate(texts)]
    first = make(tmp_path, loras[:2], "first")
    for out, words in (
        (first, {"inkstyle": 50, "alice woman": 30}),
        (make(tmp_path, [(first, 0.5), loras[2]], "second"), {"inkstyle": 50, "alice woman": 30, "ohwx man": 1, "photo": 1}),
    ):
        metadata = read_metadata(out)
        ((_, tags),) = folders(metadata)
        assert tags == list(words.items())
        assert set(metadata["modelspec.trigger_phrase"].split(", ")) == set(words) == set(trigger_words(metadata))
    alone = read_metadata(make(tmp_path, loras[:1], "alone"))
    assert folders(alone) == [("10_alice", [("alice woman", 30)])]


@pytest.mark.parametrize(
    "text",
    ['{"img": {"a": NaN}}', '{"img": {"a": 1e400}}', "[" * 100_000, '[["a"]]', '{"img": ["a"]}', '{"img": {"a": "x"}}', "null"],
    ids=["NaN", "infinity", "deep", "list", "inner list", "text", "null"],
)
def test_somebody_elses_broken_tags_do_not_stop_a_merge(tmp_path, text):
    factors = {"layers.0.attention.to_k": (torch.ones(12, 1), torch.ones(1, 12))}
    path = write_pairs(tmp_path / "lora.safetensors", factors, {"ss_tag_frequency": text})
    metadata = read_metadata(make(tmp_path, [(path, 1.0)]))
    assert "NaN" not in metadata.get("ss_tag_frequency", "")


def test_the_recipe_names_files_by_hash_and_holds_no_folder(tmp_path):
    path, _ = write(tmp_path, "ai-toolkit", stem="me")
    metadata = read_metadata(make(tmp_path, [(path, {"ratio": 0.9, "blocks": {"to_q": 0.5}})], rank=3))
    recipe = json.loads(metadata["zit_merge.recipe"])
    (step,) = recipe["steps"]
    (entry,) = step["loras"]
    assert (entry["lora"], entry["sha256"]) == ("me.safetensors", load_lora(path).sha256())
    assert (entry["ratio"], entry["blocks"], step["rank"]) == (0.9, {"to_q": 0.5}, 3)
    assert str(tmp_path) not in "".join(metadata.values())


@pytest.mark.parametrize("rank", ["exact", 3])
def test_the_same_merge_gives_the_same_bytes(tmp_path, rank):
    loras = [(write(tmp_path, "ai-toolkit")[0], 0.9), (write(tmp_path, "musubi", seed=1)[0], 0.5)]
    assert make(tmp_path / "a", loras, rank=rank).read_bytes() == make(tmp_path / "b", loras, rank=rank).read_bytes()
