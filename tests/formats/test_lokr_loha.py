"""LoKr, LoHa and whole differences, against LyCORIS and PEFT themselves, and where they are cut, scaled or broken.

LyCORIS' `get_diff_weight` applies alpha / rank twice (formats.md section 5); what it trains with is its `forward`, and that and
its functional forms are right.
"""

import json
import math

import pytest
import torch
from oracles.dense import product, read_deltas, relative
from oracles.producers import PRODUCERS
from reading import DTYPES, FUSED, QKV, SHAPES, Q, check, clear, dense, normal, question, refusal, store, write
from workspace import FEW

from extensions_built_in.zit_merge import ZitMergeError, load_lora, merge
from extensions_built_in.zit_merge.algebra.delta import Kron
from extensions_built_in.zit_merge.algebra.factors import Factors

STEM = f"diffusion_model.{Q}"
BLOCKS = {name: shape for name, shape in SHAPES.items() if name.startswith(("layers", "noise_refiner", "context_refiner"))}


def model():
    """Z-Image's blocks in small: linears under their real names, all zero."""
    root = torch.nn.Module()
    for name, (out, into) in BLOCKS.items():
        at = root
        *path, leaf = name.split(".")
        for part in path:
            if part not in at._modules:
                at.add_module(part, torch.nn.Module())
            at = at._modules[part]
        at.add_module(leaf, torch.nn.Linear(into, out, bias=False))
        torch.nn.init.zeros_(at._modules[leaf].weight)
    return root


def answers(root, names):
    """What the linears answer to the unit vectors: their weights with all that was put upon them."""
    linears = dict(root.named_modules())
    with torch.no_grad():
        return {name: linears[name](torch.eye(BLOCKS[name][1])).T.double() for name in names}


def fill(parameters, size=0.2):
    """Normal numbers into every parameter."""
    for seed, parameter in enumerate(parameters):
        parameter.data = normal(*parameter.shape, seed=seed, size=size)


def lokr(folder, tensors, alpha=None, stem=STEM, name="lokr"):
    """A file of one LoKr."""
    scale = {} if alpha is None else {f"{stem}.alpha": torch.as_tensor(alpha)}
    return store(folder, {f"{stem}.lokr_{part}": tensor for part, tensor in tensors.items()} | scale, name)


# --- LyCORIS -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algo", "how"),
    [
        ("LoRA", {"algo": "lora"}),
        ("LoRA", {"algo": "lora", "rs_lora": True}),
        ("LoRA", {"algo": "lora", "use_scalar": True}),
        ("LoHa", {"algo": "loha"}),
        ("LoHa", {"algo": "loha", "rs_lora": True}),
        ("LoHa", {"algo": "loha", "use_scalar": True}),
        ("LoKr", {"algo": "lokr"}),
        ("LoKr", {"algo": "lokr", "factor": 2}),
        ("LoKr", {"algo": "lokr", "factor": 3, "unbalanced_factorization": True}),
        ("LoKr", {"algo": "lokr", "full_matrix": True}),
        ("LoKr", {"algo": "lokr", "factor": 12, "decompose_both": True}),
        ("LoKr", {"algo": "lokr", "factor": 2, "rs_lora": True}),
        ("LoKr", {"algo": "lokr", "use_scalar": True}),
        ("full difference", {"algo": "full"}),
    ],
    ids=str,
)
def test_what_lycoris_trains_and_saves(tmp_path, algo, how):
    lycoris = pytest.importorskip("lycoris")
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Linear"], "target_name": [".*"], "lora_prefix": "lycoris"})
    root = model()
    network = lycoris.create_lycoris(root, 1.0, linear_dim=3, linear_alpha=2.0, **how)
    network.apply_to()
    fill(network.parameters())
    network.eval()
    network.save_weights(str(tmp_path / "lora.safetensors"), torch.float32, {})
    lora = clear(tmp_path / "lora.safetensors")
    assert lora.algorithms == {algo: len(BLOCKS)}
    check(lora, answers(root, BLOCKS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [None, 1.0, 2.5, -3.0])
@pytest.mark.parametrize("parts", [("w1", "w2"), ("w1", "w2_a"), ("w1_a", "w2"), ("w1_a", "w2_a")], ids="-".join)
def test_lokr_against_lycoris_functional_form(tmp_path, parts, alpha, dtype):
    functional = pytest.importorskip("lycoris.functional.lokr")
    p, q, s, t, rank = 4, 3, 6, 8, 2
    shapes = {"w1": (p, q), "w1_a": (p, rank), "w1_b": (rank, q), "w2": (s, t), "w2_a": (s, rank), "w2_b": (rank, t)}
    names = [name for part in parts for name in ((part, f"{part[:-1]}b") if part.endswith("_a") else (part,))]
    tensors = {name: normal(*shapes[name], seed=i).to(DTYPES[dtype]) for i, name in enumerate(names)}
    lora = clear(lokr(tmp_path, tensors, alpha))
    given = [tensors[name].double() if name in tensors else None for name in shapes]
    gamma = rank if alpha is None else alpha  # this one divides by the rank itself
    wanted = functional.diff_weight(*given, None, gamma=float(gamma))
    check(lora, {Q: wanted})
    assert isinstance(lora[Q], Kron)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [None, 1.0, 2.5, -3.0])
@pytest.mark.parametrize("algo", ["loha", "locon"])
def test_loha_and_locon_against_lycoris_functional_forms(tmp_path, algo, alpha, dtype):
    functional = pytest.importorskip(f"lycoris.functional.{algo}")
    rank = 3
    down, up = (rank, 20), (24, rank)
    layout = {
        "loha": {"hada_w1_b": down, "hada_w1_a": up, "hada_w2_b": down, "hada_w2_a": up},
        "locon": {"lora_down.weight": down, "lora_up.weight": up},
    }[algo]
    tensors = {name: normal(*shape, seed=i).to(DTYPES[dtype]) for i, (name, shape) in enumerate(layout.items())}
    scale = {} if alpha is None else {f"{STEM}.alpha": torch.tensor(alpha)}
    lora = clear(store(tmp_path, {f"{STEM}.{name}": tensor for name, tensor in tensors.items()} | scale))
    given = [tensor.double() for tensor in tensors.values()]
    gamma = 1.0 if alpha is None else alpha / rank
    empty = [None, None] if algo == "loha" else [None]
    check(lora, {Q: functional.diff_weight(*given, *empty, gamma=gamma)})


# --- PEFT ----------------------------------------------------------------------------------------------------------------------


def peft_adapter(folder, config):
    """What PEFT saves, its LoraFile's path and what PEFT itself adds to the weights."""
    peft = pytest.importorskip("peft")
    root = model()
    adapted = peft.get_peft_model(root, config(peft))
    fill(parameter for parameter in adapted.parameters() if parameter.requires_grad)
    adapted.save_pretrained(folder)
    wanted = {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default").detach().double()
        for name, layer in adapted.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    return folder / "adapter_model.safetensors", wanted


TARGETS = ["to_q", "to_v", "to_out.0", "w1", "w2"]


@pytest.mark.parametrize(
    "how",
    [
        {"lora_alpha": 6},
        {"lora_alpha": 4},
        {"lora_alpha": 6, "use_rslora": True, "rank_pattern": {"w1": 5}},
        {
            "lora_alpha": 6,
            "rank_pattern": {"layers.0.attention.to_q": 2, "w1": 5},
            "alpha_pattern": {"^noise_refiner.0.attention.to_q": 1, "to_v": 3, "1.feed_forward.w1": 7},
        },
    ],
    ids=str,
)
def test_what_peft_saves_of_a_lora(tmp_path, how):
    path, wanted = peft_adapter(tmp_path, lambda peft: peft.LoraConfig(r=4, target_modules=TARGETS, **how))
    check(clear(path), wanted)


def test_what_peft_saves_of_a_loha(tmp_path):
    # its config calls alpha `alpha`: read, or asked for
    path, wanted = peft_adapter(tmp_path, lambda peft: peft.LoHaConfig(r=4, alpha=2, target_modules=TARGETS))
    if load_lora(path).questions:
        assert "adapter_config.json" in question(path)
        check(clear(path, alpha=2), wanted)
    else:
        check(clear(path), wanted)


@pytest.mark.parametrize("rank", [2, 16], ids=["products", "whole factors"])
def test_what_peft_saves_of_a_lokr(tmp_path, rank):
    # PEFT scales whole factors too, LyCORIS does not: a reading at twice the strength must not pass in silence
    path, wanted = peft_adapter(
        tmp_path,
        lambda peft: peft.LoKrConfig(r=rank, alpha=rank / 2, target_modules=TARGETS, decompose_both=True, decompose_factor=2),
    )
    if load_lora(path).questions:
        assert "adapter_config.json" in question(path)
    else:
        check(clear(path), wanted)


# --- names ---------------------------------------------------------------------------------------------------------------------


def test_names_of_old_ai_toolkit_lokr_files(tmp_path):
    # as in an issue of comfyUI-Realtime-Lora
    tensors = {
        "lycoris_layers_25_adaLN_modulation_0.alpha": torch.tensor(9999999999.0),
        "lycoris_layers_25_adaLN_modulation_0.lokr_w1": normal(8, 4),
        "lycoris_layers_25_adaLN_modulation_0.lokr_w2": normal(12, 4, seed=1),
        "lycoris_layers_2_attention_to_out_0.lokr_w1": normal(4, 4, seed=2),
        "lycoris_layers_2_attention_to_out_0.lokr_w2": normal(6, 6, seed=3),
    }
    lora = clear(store(tmp_path, tensors))
    factors = [tensor.double() for key, tensor in tensors.items() if "lokr" in key]
    wanted = {
        "layers.25.adaLN_modulation.0": torch.kron(*factors[:2]),
        "layers.2.attention.to_out.0": torch.kron(*factors[2:]),
    }
    check(lora, wanted)
    assert list(lora) == ["layers.2.attention.to_out.0", "layers.25.adaLN_modulation.0"]  # the model's order


def test_a_mixed_file_says_what_it_is_made_of(tmp_path):
    # q, k and v of a LoKr were turned into a LoRA by musubi's converter, the rest stayed
    path, made = write(tmp_path, "musubi-comfy-lokr", rank=2)
    lora = clear(path)
    core = [name for name in SHAPES if name.startswith("layers.") and "adaLN" not in name]
    assert lora.algorithms == {"LoKr": len(core) - 6, "LoRA": 6}
    assert {lora.ranks[f"layers.{i}.attention.to_{c}"] for i in (0, 1) for c in "qkv"} == {6}
    assert {type(lora[module]) for module in core} == {Factors, Kron}
    assert lora.styles[0].startswith("lora_unet_* ")
    out = merge([(path, 0.5)], shapes="free", dtype="fp32").save(tmp_path / "out.safetensors")
    found = read_deltas(out)
    for module, delta in made.deltas.items():
        assert relative(found[module], 0.5 * delta) < 1e-6, module


# --- alpha of a LoKr -----------------------------------------------------------------------------------------------------------

WHOLE = {"w1": normal(4, 4), "w2": normal(6, 6, seed=1)}
IGNORED = "stands beside whole LoKr factors or differences, where it has no meaning, and is ignored as in every program"


def test_the_plan_says_once_that_such_an_alpha_is_ignored(work):
    """LyCORIS trainers name a rank and an alpha for whole factors too; every program applies 1."""
    work.shapes = FEW
    work.lora("a.safetensors", "simpletuner-lycoris-lokr", rank=2, metadata={"ss_network_dim": "32"})
    work.lora("b.safetensors", "ai-toolkit-lokr-fp16")
    step = {"loras": [{"lora": "a.safetensors", "ratio": 1.0}, {"lora": "b.safetensors", "ratio": 1.0}], "rank": 4}
    plan = " ".join(work.zit("run", work.job({"name": "both"} | step), "--dry-run").ok().split())
    assert plan.count(f"note: a.safetensors: alpha (2) {IGNORED}") == plan.count("where it has no meaning") == 1
    assert IGNORED in " ".join(work.zit("inspect", "a.safetensors").ok().split())
    kept = {"name": "kept", "loras": step["loras"][:1], "save": {"keep_lokr": True}}
    work.zit("run", work.job(kept)).ok()  # ours has such an alpha too, for lycoris-lora, and it is no news
    assert IGNORED not in " ".join(work.zit("inspect", work.out / "merged_cat_kept.safetensors").ok().split())


PRODUCT = {"w1": normal(4, 4), "w2_a": normal(6, 2, seed=1), "w2_b": normal(2, 6, seed=2)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [math.inf, -math.inf, math.nan, 1e10, 9999999999.0, 0.0, -3.0, 16.0])
def test_the_alpha_of_whole_factors_has_no_meaning(tmp_path, alpha, dtype):
    path = lokr(tmp_path, WHOLE, torch.tensor(alpha).to(DTYPES[dtype]))
    wanted = torch.kron(WHOLE["w1"].double(), WHOLE["w2"].double())
    for reading in ({}, {"alpha": "none"}, {"alpha": 2.0}):
        lora = clear(path, **reading)
        said = [f"alpha ({alpha:g}) stands beside whole LoKr factors"] if abs(alpha) < 1e9 else []  # else AI-Toolkit's own habit
        assert [remark.split(" or differences")[0] for remark in lora.remarks] == said
        check(lora, {Q: wanted})


@pytest.mark.parametrize("alpha", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("split", ["w1", "w2", "both"])
def test_an_alpha_without_end_of_a_product_is_refused(tmp_path, split, alpha):
    left = {"w1_a": normal(4, 2), "w1_b": normal(2, 4, seed=1)} if split != "w2" else {"w1": normal(4, 4)}
    right = {"w2_a": normal(6, 2), "w2_b": normal(2, 6, seed=3)} if split != "w1" else {"w2": normal(6, 6)}
    path = lokr(tmp_path, left | right, alpha)
    message = refusal(path)
    assert f"{STEM}.alpha is {alpha}" in message
    assert "alpha: none" in message
    factors = [product(*t.values()) if len(t) == 2 else next(iter(t.values())).double() for t in (left, right)]
    check(clear(path, alpha="none"), {Q: torch.kron(*factors)})
    check(clear(path, alpha=5), {Q: torch.kron(*factors) * 2.5})


def test_a_huge_alpha_of_a_product_counts(tmp_path):
    # finite: nothing says that it was not meant, and a merge that it makes too large says so
    wanted = torch.kron(PRODUCT["w1"].double(), product(PRODUCT["w2_a"], PRODUCT["w2_b"])) * 1e6 / 2
    check(clear(lokr(tmp_path, PRODUCT, 1e6)), {Q: wanted})


def test_two_products_of_different_ranks_have_no_scale(tmp_path):
    tensors = {
        "w1_a": normal(4, 2),
        "w1_b": normal(2, 4, seed=1),
        "w2_a": normal(6, 3, seed=2),
        "w2_b": normal(3, 6, seed=3),
    }
    message = refusal(lokr(tmp_path, tensors, 1.0))
    assert f"{STEM}.lokr_w1_a has rank 2" in message
    assert f"{STEM}.lokr_w2_a has rank 3" in message
    assert "get a whole file" in message or "alpha: none" in message  # what to do


# --- fused q, k, v -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["whole", "product"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [1, 2, 3, 4, 6, 8, 9, 12, 18, 24, 36, 72])
def test_a_fused_lokr_is_cut_by_rows_wherever_the_rows_of_its_factors_end(tmp_path, p, dtype, kind):
    s, q = 72 // p, 3
    tensors = {"w1": normal(p, q), "w2": normal(s, 8, seed=1)}
    if kind == "product":
        tensors = {"w1_a": normal(p, 2), "w1_b": normal(2, q, seed=2), "w2_a": normal(s, 2, seed=3), "w2_b": normal(2, 8, seed=4)}
    tensors = {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
    lora = clear(lokr(tmp_path, tensors, 3.0, FUSED))
    left, right = (
        tensors[w].double() if w in tensors else product(tensors[f"{w}_a"], tensors[f"{w}_b"]) * (1.5 if w == "w1" else 1.0)
        for w in ("w1", "w2")
    )
    check(lora, dict(zip(QKV, torch.kron(left, right).chunk(3), strict=True)))
    aligned = p % 3 == 0  # thirds of the rows are whole rows of w1
    assert {type(lora[module]) for module in QKV} == {Kron if aligned else Factors}


@pytest.mark.parametrize("p", [3, 8])
@pytest.mark.parametrize("rank", ["exact", 3])
def test_a_fused_lokr_is_merged_as_its_three_parts(tmp_path, p, rank):
    tensors = {"w1": normal(p, 3), "w2": normal(72 // p, 8, seed=1)}
    fused = lokr(tmp_path, tensors, None, FUSED)
    thirds = dict(zip(QKV, torch.kron(*(t.double() for t in tensors.values())).chunk(3), strict=True))
    apart = store(tmp_path, {f"diffusion_model.{m}.diff": delta.float() for m, delta in thirds.items()}, "apart")
    one, two = (
        read_deltas(merge([(p, 0.7)], rank=rank, shapes="free", dtype="fp32").save(tmp_path / f"{p.stem}_out.safetensors"))
        for p in (fused, apart)
    )
    for module, delta in thirds.items():
        assert relative(one[module], two[module]) < 1e-5, module
        if rank == "exact":
            assert relative(one[module], 0.7 * delta) < 1e-6, module


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fused_loha_and_a_fused_difference(tmp_path, dtype):
    random = {f"hada_w{i}_{x}": normal(*shape, seed=i) for i in (1, 2) for x, shape in (("a", (72, 3)), ("b", (3, 20)))}
    tensors = {f"{FUSED}.{name}": tensor.to(DTYPES[dtype]) for name, tensor in random.items()}
    lora = clear(store(tmp_path, tensors | {f"{FUSED}.alpha": torch.tensor(1.5)}))
    w1_a, w1_b, w2_a, w2_b = (tensor.double() for tensor in tensors.values())
    check(lora, dict(zip(QKV, (0.5 * (w1_a @ w1_b) * (w2_a @ w2_b)).chunk(3), strict=True)))
    assert set(lora.ranks.values()) == {9}
    diff = normal(72, 20).to(DTYPES[dtype])
    lora = clear(store(tmp_path, {f"{FUSED}.diff": diff}))
    for module, third in zip(QKV, diff.chunk(3), strict=True):
        assert torch.equal(dense(lora, module), third.double())  # nothing is rounded on the way


@pytest.mark.parametrize(
    ("tensors", "rows"),
    [
        ({"lokr_w1": (5, 4), "lokr_w2": (8, 6)}, 40),
        ({"lokr_w1": (5, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 6)}, 40),
        ({"hada_w1_a": (40, 2), "hada_w1_b": (2, 24), "hada_w2_a": (40, 2), "hada_w2_b": (2, 24)}, 40),
        ({"diff": (40, 24)}, 40),
    ],
    ids=["lokr", "lokr product", "loha", "diff"],
)
def test_rows_that_are_not_three_times_anything(tmp_path, tensors, rows):
    message = refusal(store(tmp_path, {f"{FUSED}.{name}": normal(*shape) for name, shape in tensors.items()}))
    assert FUSED in message
    assert f"{rows} rows" in message


# --- whole differences and halves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_whole_difference_is_not_rounded(tmp_path, dtype):
    for name, suffix in (("ai-toolkit-fullrank", ".lora_A.weight"), ("lycoris-full", ".diff")):
        path, made = write(tmp_path, name, DTYPES[dtype])
        lora = clear(path)
        assert set(lora.algorithms) == {"full difference"}
        assert lora.dtype == DTYPES[dtype]
        stored = {key.removesuffix(suffix): tensor for key, tensor in made.tensors.items()}
        for module in lora:
            stem = f"diffusion_model.{module}" if suffix != ".diff" else "lycoris_" + module.replace(".", "_")
            assert torch.equal(dense(lora, module), stored[stem].double())


@pytest.mark.parametrize("name", ["ai-toolkit", "ai-toolkit-all", "diffsynth", "onetrainer-original", "diffusion-pipe", "musubi"])
@pytest.mark.parametrize("lost", ["up", "down"])
def test_a_file_that_lost_half_of_every_pair_is_no_whole_difference(tmp_path, name, lost):
    made = PRODUCERS[name].make(SHAPES, 4, 0, torch.float32)
    ends = {"up": (".lora_B.weight", ".lora_B.default.weight", ".lora_up.weight")}
    ends["down"] = tuple(end.replace("_B", "_A").replace("_up", "_down") for end in ends["up"])
    path = store(tmp_path, {key: tensor for key, tensor in made.tensors.items() if not key.endswith(ends[lost])})
    message = refusal(path)
    assert "half of the pair is missing" in message
    assert message.split()[0] in made.tensors


def test_a_lost_half_of_a_fused_qkv_alone_is_no_whole_difference(tmp_path):
    # (r, in) where (3 in, in) would be due: the only shape in the file, and it tells
    path = store(tmp_path, {f"{FUSED}.lora_A.weight": normal(6, 24)})
    assert "half of the pair is missing" in refusal(path)


def test_one_lone_down_beside_whole_pairs_is_half_a_pair_though_it_is_square(tmp_path):
    tensors = {f"{STEM}.lora_A.weight": normal(24, 24)}
    other = "diffusion_model.layers.1.attention.to_q"
    tensors |= {f"{other}.lora_A.weight": normal(2, 24), f"{other}.lora_B.weight": normal(24, 2)}
    assert f"{STEM}.lora_A.weight has no up factor" in refusal(store(tmp_path, tensors))


@pytest.mark.parametrize("suffix", ["lora_down.weight", "lora.down.weight", "lora_linear_layer.down.weight"])
def test_only_ai_toolkits_own_spelling_is_a_whole_difference(tmp_path, suffix):
    # a pair of rank 24 on a width of 24 that lost its other half: square, and its alpha would be forgotten
    path = store(tmp_path, {f"{STEM}.{suffix}": normal(24, 24), f"{STEM}.alpha": torch.tensor(1.0)})
    assert "half of the pair is missing" in refusal(path)


@pytest.mark.parametrize("lost", ["w1", "w2", "w2_a", "w2_b"])
def test_a_lokr_with_a_part_lost(tmp_path, lost):
    tensors = WHOLE if lost in WHOLE else PRODUCT
    path = lokr(tmp_path, {name: tensor for name, tensor in tensors.items() if name != lost})
    message = refusal(path)
    assert STEM in message
    assert lost in message
    assert "missing" in message


@pytest.mark.parametrize("lost", ["w1_a", "w1_b", "w2_a", "w2_b"])
def test_a_loha_with_a_part_lost(tmp_path, lost):
    shapes = {"w1_a": (24, 2), "w1_b": (2, 24), "w2_a": (24, 2), "w2_b": (2, 24)}
    path = store(tmp_path, {f"{STEM}.hada_{name}": normal(*shape) for name, shape in shapes.items() if name != lost})
    message = refusal(path)
    assert f"no {lost} " in message
    assert "missing" in message


@pytest.mark.parametrize(
    "tensors",
    [
        {"hada_w1_a": (24, 2), "hada_w1_b": (2, 24), "hada_w2_a": (24, 2), "hada_w2_b": (2, 20)},
        {"hada_w1_a": (24, 2), "hada_w1_b": (3, 24), "hada_w2_a": (24, 2), "hada_w2_b": (2, 24)},
        {"hada_w1_a": (24, 2), "hada_w1_b": (2, 24), "hada_w2_a": (20, 2), "hada_w2_b": (2, 24)},
        {"lokr_w1": (4, 4), "lokr_w2_a": (6, 2), "lokr_w2_b": (3, 6)},
        {"lokr_w1": (4, 4, 1), "lokr_w2": (6, 6)},
        {"lokr_w1": (4, 4), "lokr_w2": (36,)},
        {"lokr_w1": (4, 4), "lokr_w2": (6, 6, 1, 1)},
        {"lokr_w1": (0, 4), "lokr_w2": (6, 6)},
        {"lokr_w1": (4, 4), "lokr_w2": (0, 6)},
        {"diff": (24,)},
        {"diff": (24, 24, 1)},
        {"diff": (0, 24)},
        {"diff": (0, 0)},
    ],
    ids=str,
)
@pytest.mark.parametrize("stem", [STEM, FUSED], ids=["to_q", "qkv"])
def test_tensors_that_make_no_matrix(tmp_path, tensors, stem):
    path = store(tmp_path, {f"{stem}.{name}": normal(*shape) for name, shape in tensors.items()})
    assert stem in refusal(path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "name", ["ai-toolkit-lokr", "ai-toolkit-lokr-split", "musubi-loha", "lycoris-full", "diffusion-pipe-lokr"]
)
def test_a_broken_number_is_found_in_every_part(tmp_path, name, value):
    made = PRODUCERS[name].make({module: SHAPES[module] for module in QKV}, 2, 0, torch.float32)
    for key, tensor in made.tensors.items():
        if tensor.ndim:
            broken = tensor.clone()
            broken[-1, -1] = value
            lora = load_lora(store(tmp_path, made.tensors | {key: broken}))
            found = set()
            for module in lora:
                try:
                    lora[module]
                except ZitMergeError as error:
                    assert key in str(error)
                    found.add(module)
            assert found, key
            with pytest.raises(ZitMergeError, match=key):
                merge([(lora.path, 1.0)], shapes="free").save(tmp_path / "out.safetensors")
            assert not (tmp_path / "out.safetensors").exists()


def test_integers_are_no_factors_of_a_lokr(tmp_path):
    path = lokr(tmp_path, WHOLE | {"w2": WHOLE["w2"].to(torch.int8)})
    assert f"{STEM}.lokr_w2 is stored as I8" in refusal(path)


# --- too large to be exact -----------------------------------------------------------------------------------------------------


def test_a_real_lokr_at_full_rank_stops_and_says_what_to_set(tmp_path):
    w1, w2 = torch.zeros(60, 60, dtype=torch.bfloat16), torch.zeros(64, 64, dtype=torch.bfloat16)
    tensors = {
        f"diffusion_model.layers.{i}.attention.to_{c}.lokr_{w}": t
        for i in range(30)
        for c in "qk"
        for w, t in (("w1", w1), ("w2", w2))
    }
    path = store(tmp_path, tensors)
    lora = clear(path)
    assert lora.rank == 3840
    with pytest.raises(ZitMergeError) as error:
        merge([(path, 1.0)]).plan(tmp_path / "out.safetensors")
    message = str(error.value)
    assert message.startswith("out.safetensors would take ") and "\n" not in message
    for word in ("GB", "rank: 64", "confirm_size: true"):
        assert word in message
    assert merge([(path, 1.0)], rank=64).plan(tmp_path / "out.safetensors").rank == 64
    with pytest.raises(ZitMergeError, match=r"same is the rank of LoRAs, lora.safetensors is a LoKr: give a number"):
        merge([(path, 1.0)], rank="same").plan(tmp_path / "out.safetensors")


def test_metadata_of_lycoris_are_nobodys_business(tmp_path):
    path = store(tmp_path, {f"{STEM}.lokr_{name}": tensor for name, tensor in WHOLE.items()}, metadata={"lycoris_config": "{"})
    check(clear(path), {Q: torch.kron(WHOLE["w1"].double(), WHOLE["w2"].double())})
    # an adapter's config that says a scale for LoRAs says none for whole factors
    config = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 1})
    path = store(tmp_path, {f"{STEM}.lokr_{n}": t for n, t in WHOLE.items()}, metadata={"lora_adapter_metadata": config})
    check(clear(path), {Q: torch.kron(WHOLE["w1"].double(), WHOLE["w2"].double())})
