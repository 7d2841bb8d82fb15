"""Changes that need the base model's weights, against float64 formulas and against the libraries that make such files."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from oracles import based
from oracles.dense import product, relative
from oracles.producers import PRODUCERS
from reading import DTYPES, FUSED, NEEDS_BASE, QKV, SHAPES, Q, normal, refusal, store, write
from sweep import sweep

from extensions_built_in.zit_merge import ZitMergeError, load_lora
from extensions_built_in.zit_merge.formats.metadata import dumps, read_adapter
from extensions_built_in.zit_merge.formats.reader import TensorReader

BASED = [name for name, producer in PRODUCERS.items() if producer.kind in NEEDS_BASE]
NAMES = {"dora": "DoRA", "ia3": "IA3", "glora": "GLoRA"}
DM = "diffusion_model."
W1 = "layers.0.feed_forward.w1"
CLOSE = 2e-6  # a delta in float32


class Weights(dict):
    """A base model: module -> weight."""

    def weight(self, module):
        return self[module]


def base_of(shapes=SHAPES, dtype=torch.float32, seed=7) -> Weights:
    return Weights({name: normal(*shape, seed=seed + i, size=0.2).to(dtype) for i, (name, shape) in enumerate(shapes.items())})


BASE = base_of()


def read(path, base=BASE, **answers) -> dict[str, torch.Tensor]:
    """Module -> delta as read with a base, in float64; a scale of 1, since a strength multiplies W' - W."""
    lora = load_lora(path, **answers)
    assert lora.questions == () and lora.unmatched == ()
    found = {}
    with TensorReader(lora, base) as tensors:
        for module in lora:
            scale, delta = tensors.delta(module)
            assert scale == 1.0 and delta.shape == lora.shapes[module] and delta.up.dtype == torch.float32
            assert delta.rank == lora.ranks[module], "the bound that is told is that of the factors"
            found[module] = product(*delta)
    return found


def same(found, wanted, tolerance=CLOSE) -> None:
    assert set(found) == set(wanted)
    off = {module: relative(found[module], wanted[module]) for module in wanted}
    assert {module: error for module, error in off.items() if not error < tolerance} == {}


def parts_of(tensors, module: str, flat="") -> dict[str, torch.Tensor]:
    """Suffix -> tensor of one module, by the end of its name in the keys."""
    stems = (module, module.replace(".", "_"))
    found = {}
    for key, tensor in tensors.items():
        for stem in stems:
            if (at := key.find(stem + ".")) >= 0 and (at == 0 or key[at - 1] in "._"):
                found[key[at + len(stem) :]] = tensor
    return found


def low_rank(parts) -> torch.Tensor:
    """B A alpha / r."""
    down = next(t for s, t in parts.items() if "lora_A" in s or "down" in s)
    up = next(t for s, t in parts.items() if "lora_B" in s or "up" in s)
    return up.double() @ down.double() * (float(parts[".alpha"]) / len(down) if ".alpha" in parts else 1.0)


def changed(name: str, parts, weight) -> torch.Tensor:
    """W' of a producer's file."""
    kind = PRODUCERS[name].kind
    if kind == "dora":
        return based.dora(parts, weight, low_rank(parts))
    if kind == "ia3":
        return based.ia3(parts, weight)
    if kind == "glora":
        return based.glora(parts, weight, float(parts[".alpha"]) / parts[".a1.weight"].shape[1])
    if name == "onetrainer-oft":
        return based.oft_of_inputs(parts[".oft_R.weight"], weight, 5)
    return (based.boft_of_outputs if name == "lycoris-boft" else based.oft_of_outputs)(parts, weight)


# --- every producer against its formula ----------------------------------------------------------------------------------------


@sweep("name, dtype", BASED, DTYPES)
def test_every_producers_file_is_read_as_its_formula_says(tmp_path, name, dtype):
    path, made = write(tmp_path, name, DTYPES[dtype])
    lora = load_lora(path)
    wanted = {m: changed(name, parts_of(made.tensors, m), BASE[m]) - BASE[m].double() for m in lora}
    assert len(lora) > 10
    same(read(path), wanted)


@pytest.mark.parametrize("name", BASED)
def test_the_file_is_described_without_a_base(tmp_path, name):
    lora = load_lora(write(tmp_path, name)[0])
    told = NAMES.get(PRODUCERS[name].kind, "BOFT" if name == "lycoris-boft" else "OFT")
    assert lora.needs_base == (told,) and list(lora.algorithms) == [told]
    assert lora.shapes == {module: SHAPES[module] for module in lora}
    assert lora.ranks == {module: 8 if told == "GLoRA" else min(SHAPES[module]) for module in lora}
    assert told in lora.base_question and "set base:" in lora.base_question


@pytest.mark.parametrize("name", BASED)
def test_without_a_base_its_numbers_are_refused_in_one_sentence(tmp_path, name):
    lora = load_lora(write(tmp_path, name)[0])
    with pytest.raises(ZitMergeError, match="depends on the base model's weights: set base: ") as error:
        lora[next(iter(lora))]
    assert str(error.value).startswith(f"{lora.path}: ") and "\n" not in str(error.value)


def test_what_needs_no_base_says_so_and_is_read_as_ever(tmp_path):
    lora = load_lora(write(tmp_path, "ai-toolkit")[0])
    assert lora.needs_base == () and lora.base_question == ""
    with TensorReader(lora, Weights()) as tensors:
        assert torch.equal(tensors.delta(Q)[1].up, lora[Q].up)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_the_base_counts_as_it_is_stored(tmp_path, dtype):
    path, made = write(tmp_path, "ai-toolkit-dora")
    base = base_of(dtype=dtype)
    weights = {module: weight.double() for module, weight in base.items()}
    wanted = {m: changed("ai-toolkit-dora", parts_of(made.tensors, m), weights[m]) - weights[m] for m in load_lora(path)}
    same(read(path, base), wanted)


def test_a_small_change_of_a_large_weight_keeps_its_digits(tmp_path):
    weight = BASE[Q].double() * 1000
    for key, blocks in ((".oft_blocks", normal(4, 6, 6, size=1e-6)), (".oft_blocks", normal(2, 4, 6, 6, size=1e-6))):
        path = store(tmp_path, {f"{DM}{Q}{key}": blocks})
        make = based.oft_of_outputs if blocks.ndim == 3 else based.boft_of_outputs
        same(read(path, Weights({Q: weight})), {Q: make({key: blocks}, weight) - weight}, 1e-5)


# --- forms beside the common ones ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["loha", "lokr", "lokr whole"])
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_a_magnitude_beside_loha_and_lokr(tmp_path, form, axis):
    out, into = SHAPES[W1]
    if form == "loha":
        pairs = [(normal(out, 2, seed=i), normal(2, into, seed=i + 5)) for i in (1, 2)]
        parts = {f".hada_w{i}_{n}": t for i, pair in enumerate(pairs, 1) for n, t in zip("ab", pair, strict=True)}
        delta = product(*pairs[0]) * product(*pairs[1]) * 3 / 2
        parts[".alpha"] = torch.tensor(3.0)
    else:
        one, (a, b) = normal(5, 4, seed=1), (normal(8, 2, seed=2), normal(2, 6, seed=3))
        parts = {".lokr_w1": one, ".lokr_w2_a": a, ".lokr_w2_b": b, ".alpha": torch.tensor(3.0)}
        delta = torch.kron(one.double(), product(a, b)) * 3 / 2
        if form == "lokr whole":
            parts = {".lokr_w1": one, ".lokr_w2": (a @ b), ".alpha": torch.tensor(3.0)}
            delta = torch.kron(one.double(), (a @ b).double())
    parts[".dora_scale"] = normal(out, 1, seed=9).abs() + 1 if axis == "rows" else normal(1, into, seed=9).abs() + 1
    path = store(tmp_path, {DM + W1 + suffix: tensor for suffix, tensor in parts.items()})
    assert load_lora(path).algorithms == {"DoRA": 1}
    same(read(path), {W1: based.dora(parts, BASE[W1], delta) - BASE[W1].double()})


@pytest.mark.parametrize("adapter", ["", ".default", ".mine"])
def test_a_magnitude_under_the_names_of_peft(tmp_path, adapter):
    up, down, magnitude = normal(24, 4, seed=1), normal(4, 24, seed=2), normal(24, seed=3) + 3
    for ending in (".weight", ""):
        tensors = {f".lora_A{adapter}.weight": down, f".lora_B{adapter}.weight": up}
        tensors[f".lora_magnitude_vector{adapter}{ending}"] = magnitude
        path = store(tmp_path, {f"transformer.{Q}{key}": tensor for key, tensor in tensors.items()})
        same(read(path), {Q: based.dora(tensors, BASE[Q], product(up, down)) - BASE[Q].double()})


def test_alpha_of_a_dora_is_asked_and_answered_as_of_a_lora(tmp_path):
    up, down, magnitude = normal(24, 4, seed=1), normal(4, 24, seed=2), normal(24, seed=3) + 3
    tensors = {".lora_A.weight": down, ".lora_B.weight": up, ".magnitude": magnitude, ".alpha": torch.tensor(0.0)}
    path = store(tmp_path, {DM + Q + key: tensor for key, tensor in tensors.items()})
    assert "alpha" in load_lora(path).questions[0]
    same(read(path, alpha=8), {Q: based.dora(tensors, BASE[Q], 2 * product(up, down)) - BASE[Q].double()})


def test_glora_as_lycoris_named_its_factors_first(tmp_path):
    parts = {
        ".a1": normal(40, 3, seed=1),
        ".a2": normal(3, 40, seed=2),
        ".b1": normal(24, 3, seed=3),
        ".b2": normal(3, 40, seed=4),
    }
    swap = {".a1": ".a2", ".a2": ".a1", ".b1": ".b2", ".b2": ".b1"}
    name = "layers.0.feed_forward.w2"
    stored = {DM + name + swap[key] + ".weight": tensor for key, tensor in parts.items()}
    path = store(tmp_path, stored | {f"{DM}{name}.alpha": torch.tensor(6.0)})
    wanted = based.glora({f"{key}.weight": tensor for key, tensor in parts.items()}, BASE[name], 2.0)
    same(read(path), {name: wanted - BASE[name].double()})


def test_a_replaced_weight(tmp_path):
    new = normal(*SHAPES[W1], seed=3)
    path = store(tmp_path, {f"{DM}{W1}.set_weight": new})
    assert load_lora(path).algorithms == {"replaced weight": 1}
    assert "is a replaced weight;" in load_lora(path).base_question
    same(read(path), {W1: new.double() - BASE[W1].double()})


def test_a_replaced_norm_is_asked_for(tmp_path):
    tensors = {f"{DM}{W1}.set_weight": normal(*SHAPES[W1]), f"{DM}layers.0.attention_norm1.set_weight": normal(24)}
    (asked,) = load_lora(store(tmp_path, tensors)).questions
    assert "drop: [norm]" in asked


@pytest.mark.parametrize(("suffix", "asks"), [("out", True), ("in", False)])
def test_pefts_ia3_of_rows_multiplies_a_bias_too(tmp_path, suffix, asks):
    name = "layers.0.adaLN_modulation.0"
    scale = normal(96, 1) if suffix == "out" else normal(1, 16)
    other = {"diffusion_model.layers.1.adaLN_modulation.0.diff": torch.zeros(96, 16)}  # tells both sides
    path = store(tmp_path, {f"base_model.model.{name}.ia3_l": scale} | other)
    asked = load_lora(path).questions
    assert [question.partition(" ")[0] for question in asked] == [f"base_model.model.{name}.ia3_l"] * asks
    assert all("changes a bias" in question and "drop: [bias]" in question for question in asked)
    assert load_lora(path, drop=["bias"]).skipped == ()
    weight = BASE[name].double()
    assert relative(read(path, drop=["bias"])[name], weight * scale.double() - weight) < CLOSE


def test_one_block_that_all_share_and_onetrainers_scaled_ones(tmp_path):
    packed, other = normal(1, 15, size=0.1), normal(4, 15, size=0.1)  # 4 blocks of 6
    tensors = {f"transformer.{Q}.oft_R.weight": packed, f"transformer.{QKV[1]}.oft_R.weight": other}
    wanted = {m: based.oft_of_inputs(t, BASE[m], 5) - BASE[m].double() for m, t in zip(QKV, (packed, other), strict=False)}
    same(read(store(tmp_path, tensors, metadata={"ot_branch": "master"})), wanted)
    scaled = {f"transformer.{m}.oft_R.scaled_oft": torch.tensor(1) for m in QKV[:2]}
    wanted = {m: based.oft_of_inputs(t / math.sqrt(15), BASE[m], 5) for m, t in zip(QKV, (packed, other), strict=False)}
    same(read(store(tmp_path, tensors | scaled)), {m: w - BASE[m].double() for m, w in wanted.items()})


def test_onetrainers_constraint_is_known_where_its_config_is_in_the_file(tmp_path):
    packed = normal(4, 15)
    config = json.dumps({"oft_coft": True, "coft_eps": 0.05})
    path = store(tmp_path, {f"transformer.{Q}.oft_R.weight": packed}, metadata={"ot_config": config})
    norms = math.sqrt(2) * packed.double().norm(dim=1, keepdim=True)
    wanted = based.oft_of_inputs(packed.double() * (0.05 / 2 / norms), BASE[Q], 5)
    same(read(path), {Q: wanted - BASE[Q].double()})


@pytest.mark.parametrize("bound", [None, 0.0, -1.0, 0.001, 1.0])
def test_lycoris_constraint(tmp_path, bound):
    parts = {".oft_blocks": normal(4, 6, 6, size=0.3), ".rescale": normal(24, 1, seed=4) + 2}
    parts |= {} if bound is None else {".alpha": torch.tensor(bound)}
    path = store(tmp_path, {f"lycoris_{Q.replace('.', '_')}{key}": tensor for key, tensor in parts.items()})
    same(read(path), {Q: based.oft_of_outputs(parts, BASE[Q]) - BASE[Q].double()})


# --- q, k and v in one ---------------------------------------------------------------------------------------------------------


def _fused() -> dict[str, dict[str, torch.Tensor]]:
    pair = {".lora_A.weight": normal(4, 24, seed=1), ".lora_B.weight": normal(72, 4, seed=2)}
    return {
        "dora of rows": pair | {".dora_scale": normal(72, 1, seed=3).abs() + 1},
        "dora of AI-Toolkit": pair | {".magnitude": normal(72, seed=3).abs() + 1},
        "dora of columns": pair | {".dora_scale": normal(1, 24, seed=3).abs() + 1},
        "oft": {".oft_blocks": normal(9, 8, 8, size=0.2), ".rescale": normal(72, 1, seed=3)},  # blocks of q and k, k and v
        "boft": {".oft_blocks": normal(2, 12, 6, 6, size=0.2), ".alpha": torch.tensor(0.01)},
        "packed": {".oft_R.weight": normal(4, 15, size=0.1), ".oft_R.scaled_oft": torch.tensor(1)},
        "boft of PEFT": {".boft_R": normal(2, 4, 6, 6, size=0.2), ".boft_s": normal(72, 1, seed=3)},
        "ia3 out": {".weight": normal(72), ".on_input": torch.tensor(0)},
        "ia3 in": {".weight": normal(24), ".on_input": torch.tensor(1)},
        "ia3 of PEFT": {".ia3_l": normal(72, 1)},
        "glora": {f".{n}.weight": normal(*s) for n, s in (("a1", (24, 2)), ("a2", (2, 24)), ("b1", (72, 2)), ("b2", (2, 24)))},
        "replaced": {".set_weight": normal(72, 24)},
    }


def _fused_change(name: str, parts, weight) -> torch.Tensor:
    if name.startswith("dora"):
        return based.dora(parts, weight, low_rank(parts))
    if name.startswith("ia3"):
        return based.ia3(parts, weight)
    if name == "packed":
        return based.oft_of_inputs(parts[".oft_R.weight"] / math.sqrt(15), weight, 5)
    if name == "glora":
        return based.glora(parts, weight, 1.0)
    if name == "replaced":
        return parts[".set_weight"].double()
    return {"oft": based.oft_of_outputs, "boft": based.boft_of_outputs, "boft of PEFT": based.boft_of_inputs}[name](parts, weight)


@pytest.mark.parametrize("name", _fused())
def test_a_fused_change_is_that_of_the_stacked_weight(tmp_path, name):
    parts = _fused()[name]
    path = store(tmp_path, {FUSED + suffix: tensor for suffix, tensor in parts.items()})
    weight = torch.cat([BASE[module] for module in QKV])
    delta = _fused_change(name, parts, weight) - weight.double()
    same(read(path), dict(zip(QKV, delta.split(24), strict=True)))


def test_a_fused_change_that_mixes_rows_needs_all_three(tmp_path):
    parts = _fused()["dora of columns"]
    path = store(tmp_path, {FUSED + suffix: tensor for suffix, tensor in parts.items()})
    with pytest.raises(ZitMergeError, match=rf"{QKV[2]}, which the base model does not have"):
        read(path, Weights({module: BASE[module] for module in QKV[:2]}))


@pytest.mark.parametrize(("answer", "wanted"), [("split", "split"), ("fused", "fused"), (None, None), ("sum", None)])
def test_two_such_changes_of_one_module_are_never_added(tmp_path, answer, wanted):
    parts = _fused()["ia3 of PEFT"]
    tensors = {FUSED + suffix: tensor for suffix, tensor in parts.items()} | {f"{DM}{Q}.set_weight": normal(24, 24)}
    path = store(tmp_path, tensors)
    (asked,) = load_lora(path, qkv=answer).questions or ("",)
    assert bool(asked) is (wanted is None)
    if wanted is None:
        assert asked.endswith("set qkv: split or fused")
    else:
        assert set(read(path, qkv=answer)) == set(QKV)
        assert load_lora(path, qkv=answer).changes[Q][0].native is (answer == "fused")


# --- the sides of a weight that a change does not show -------------------------------------------------------------------------


def test_one_side_is_told_by_the_rest_of_the_file(tmp_path):
    tensors = {f"transformer.{W1}.ia3_l": normal(40, 1), f"transformer.{Q}.ia3_l": normal(24, 1)}
    assert load_lora(store(tmp_path, tensors)).shapes == {Q: (24, 24), W1: (40, 24)}


def test_one_side_of_the_real_model_tells_the_other(tmp_path):
    path = store(tmp_path, {f"transformer.{W1}.ia3_l": torch.ones(10240, 1)})
    assert load_lora(path).shapes == {W1: (10240, 3840)}


def test_a_side_that_nothing_tells(tmp_path):
    message = refusal(store(tmp_path, {f"transformer.{W1}.ia3_l": torch.ones(40, 1)}))
    assert "shows one side of its weight" in message and message.endswith("it was trained for another model")


# --- what can't be read --------------------------------------------------------------------------------------------------------

PAIR = {".lora_A.weight": (4, 24), ".lora_B.weight": (24, 4)}
BROKEN = {
    "magnitude of columns": (PAIR | {".magnitude": (1, 24)}, "the magnitude of a 24 x 24 weight has [24]"),
    "1-D dora_scale": (PAIR | {".dora_scale": (24,)}, "the magnitude of a 24 x 24 weight has [24, 1] or [1, 24]"),
    "short magnitude": (PAIR | {".magnitude": (23,)}, "has shape [23]"),
    "two magnitudes": (PAIR | {".magnitude": (24,), ".dora_scale": (24, 1)}, "are both magnitudes of one DoRA: keep one"),
    "flag of a scaled OFT alone": ({".oft_R.scaled_oft": ()}, "stands alone"),
    "magnitude alone": ({".dora_scale": (24, 1)}, "is DoRA and stands alone, what it scales is missing: get a whole file"),
    "magnitude beside a difference": ({".dora_scale": (24, 1), ".diff": (24, 24)}, "is DoRA beside full difference"),
    "half of a pair": ({".lora_A.weight": (4, 24), ".magnitude": (24,)}, "half of the pair is missing: get a whole file"),
    "2-D blocks": ({".oft_blocks": (4, 6)}, "an OFT's blocks are (n, b, b), a BOFT's (m, n, b, b)"),
    "oblong blocks": ({".oft_blocks": (4, 6, 5)}, "has shape [4, 6, 5]"),
    "short rescale": ({".oft_blocks": (4, 6, 6), ".rescale": (23, 1)}, "the scale of 24 rows is [24, 1]"),
    "rescale alone": ({".rescale": (24, 1)}, "stands alone, what it scales is missing: get a whole file"),
    "odd butterfly": ({".oft_blocks": (2, 8, 3, 3)}, "has 2 stages, into which 8 blocks of 3 can't be paired"),
    "no triangle": ({".oft_R.weight": (4, 14)}, "the triangles of an OFT's blocks are (n, b (b - 1) / 2)"),
    "boft scale": ({".boft_R": (1, 4, 6, 6), ".boft_s": (24,)}, "the scale of a BOFT's rows is (out, 1)"),
    "boft scale alone": ({".boft_s": (24, 1)}, "stands alone"),
    "ia3 matrix": ({".ia3_l": (24, 24)}, "the scale of an IA3 is (out, 1) or (1, in)"),
    "flag alone": ({".on_input": ()}, "stands alone, the scale of its module is missing: get a whole file"),
    "flag of no meaning": ({".on_input": (), ".weight": (24,)}, "is 7, an IA3 is on the input (1) or not (0)"),
    "ia3 of two dimensions": ({".on_input": (), ".weight": (24, 1)}, "is 7"),
    "glora without b2": ({f".{n}.weight": (24, 24) for n in ("a1", "a2", "b1")}, "has no b2.weight beside it"),
    "glora shapes": (
        {f".{n}.weight": s for n, s in (("a1", (24, 2)), ("a2", (2, 24)), ("b1", (24, 3)), ("b2", (3, 24)))},
        "which make no W a1 a2 + b1 b2",
    ),
    "set_weight of one dimension": ({".set_weight": (24,)}, "a weight is a matrix"),
    "nothing": ({".oft_blocks": (0, 6, 6)}, "has shape [0, 6, 6]"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_tensors_that_do_not_fit(tmp_path, broken):
    shapes, says = BROKEN[broken]
    path = store(tmp_path, {f"{DM}{Q}{suffix}": torch.full(shape, 7.0) for suffix, shape in shapes.items()})
    message = refusal(path)
    assert says in message, message
    assert re.search(r"[:;,] (get|keep) ", message), message


def test_a_constraint_that_is_no_number(tmp_path):
    tensors = {f"{DM}{Q}.oft_blocks": normal(4, 6, 6), f"{DM}{Q}.alpha": torch.tensor(math.nan)}
    assert "its OFT has no defined constraint: get a whole file" in refusal(store(tmp_path, tensors))


def _reading(path, base) -> str:
    lora = load_lora(path)
    with pytest.raises(ZitMergeError) as error, TensorReader(lora, base) as tensors:
        tensors.delta(next(iter(lora)))
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_a_base_that_is_another_model(tmp_path):
    path = store(tmp_path, {f"{DM}{Q}{suffix}": normal(*shape) for suffix, shape in (PAIR | {".magnitude": (24,)}).items()})
    assert f"is DoRA of {Q}, which the base model does not have: set base: " in _reading(path, Weights())
    wrong = _reading(path, Weights({Q: normal(48, 24)}))
    assert f"is DoRA of a 24 x 24 weight, {Q} of the base model is 48 x 24: set base: " in wrong
    broken = BASE[Q].clone()
    broken[3, 4] = math.inf
    assert f"{Q} of the base model holds NaN or infinity" in _reading(path, Weights({Q: broken}))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("suffix", [".lora_A.weight", ".magnitude"])
def test_a_number_that_is_none(tmp_path, value, suffix):
    tensors = {f"{DM}{Q}{key}": normal(*shape) for key, shape in (PAIR | {".magnitude": (24,)}).items()}
    tensors[f"{DM}{Q}{suffix}"].view(-1)[0] = value
    assert f"{suffix} holds NaN or infinity" in _reading(store(tmp_path, tensors), BASE)


def test_a_row_of_zeros_has_no_direction(tmp_path):
    up = normal(24, 4)
    up[5] = 0
    weight = BASE[Q].clone()
    weight[5] = 0
    tensors = {".lora_A.weight": normal(4, 24, seed=2), ".lora_B.weight": up, ".magnitude": torch.ones(24)}
    path = store(tmp_path, {DM + Q + key: tensor for key, tensor in tensors.items()})
    message = _reading(path, Weights({Q: weight}))
    assert "is DoRA, but row 5 of the weight with its change is zero, which has no direction: set base: " in message
    tensors[".magnitude"][5] = 0  # a length of 0 needs none
    found = read(store(tmp_path, {DM + Q + key: t for key, t in tensors.items()}), Weights({Q: weight}))[Q]
    assert torch.isfinite(found).all() and not found[5].any()
    tensors[".dora_scale"] = torch.ones(24, 1)  # LyCORIS adds a little to every norm
    del tensors[".magnitude"]
    assert not read(store(tmp_path, {DM + Q + key: t for key, t in tensors.items()}), Weights({Q: weight}))[Q][5].any()


def test_blocks_that_do_not_divide_the_weight(tmp_path):
    tensors = {f"transformer.{QKV[1]}.ia3_l": normal(24, 1), f"transformer.{Q}.oft_R.weight": normal(1, 10)}
    lora = load_lora(store(tmp_path, tensors, metadata={"ot_branch": "master"}))
    with pytest.raises(ZitMergeError, match="blocks of 5 do not divide 24 columns"), TensorReader(lora, BASE) as opened:
        opened.delta(Q)


# --- the form of an OFT, which is outside of the tensors -----------------------------------------------------------------------

CONFIG = {"peft_type": "OFT", "use_cayley_neumann": True, "num_cayley_neumann_terms": 5, "coft": False, "eps": 6e-5, "r": 0}


def _packed(folder, config=None, **metadata):
    path = store(folder, {f"base_model.model.{Q}.oft_R.weight": normal(4, 15, size=0.1)}, "adapter_model", metadata or None)
    beside = folder / "adapter_config.json"
    beside.unlink(missing_ok=True)
    if config is not None:
        beside.write_text(json.dumps(config))
    return path


def test_an_oft_of_which_nothing_tells_how_it_rotates(tmp_path):
    (asked,) = load_lora(_packed(tmp_path)).questions
    assert "whether its rotations are exact or cut off" in asked and "put the adapter_config.json" in asked
    for wrong in ({"peft_type": "LORA", "lora_alpha": 4}, CONFIG | {"num_cayley_neumann_terms": "five"}, []):
        (asked,) = load_lora(_packed(tmp_path, wrong)).questions
        assert "is OFT, whose form is outside of the tensors, but " in asked and "put the adapter_config.json" in asked


@pytest.mark.parametrize(
    ("config", "terms", "is_old"),
    [
        (CONFIG, 5, True),
        (CONFIG | {"peft_version": "0.18.1"}, 5, False),
        (CONFIG | {"use_cayley_neumann": False}, None, False),
    ],
)
def test_the_config_tells_how_it_rotates(tmp_path, config, terms, is_old):
    path = _packed(tmp_path, config)
    wanted = based.oft_of_inputs(normal(4, 15, size=0.1), BASE[Q], terms, is_old=is_old) - BASE[Q].double()
    same(read(path), {Q: wanted})
    adapter = load_lora(path).adapter
    again = read_adapter(dumps(adapter.record()), "the recipe")
    assert again.rotation == adapter.rotation
    (tmp_path / "adapter_config.json").unlink()
    same(read(path, adapter=again), {Q: wanted})


def test_the_config_of_an_oft_says_nothing_of_a_lora(tmp_path):
    tensors = {f"base_model.model.{Q}{suffix}": normal(*shape) for suffix, shape in PAIR.items()}
    path = store(tmp_path, tensors, "adapter_model")
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    (asked,) = load_lora(path).questions
    assert "is of OFT, which is another form" in asked and "set alpha:" in asked
