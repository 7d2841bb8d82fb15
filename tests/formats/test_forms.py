"""The forms of a merged file: keys, shapes, alphas and metadata by tables of their own, numbers in float64."""

import json
from itertools import product

import pytest
import torch
from oracles.dense import read_metadata, sizes, weighted_sum
from oracles.producers import small_shapes
from safetensors.torch import load_file
from sweep import sweep
from workspace import DTYPES, SMALL, merge_into, of_layers, write_lora

from extensions_built_in.zit_merge import load_lora

ROUNDING = {"fp32": 3e-7, "bf16": 2**-7, "fp16": 2**-10}
AB, DOWN_UP = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")
# form -> (endings of the two factors, whether it has alpha): interface.md section 3, formats.md 3.1 to 3.5
ENDINGS = {"ai-toolkit": (AB, True), "diffusers": (AB, False), "kohya": (DOWN_UP, True), "comfyui": (DOWN_UP, True)}
# The original checkpoint's names where they are not those of diffusers (formats.md 3.2).
NATIVE = {
    "all_x_embedder.2-1": "x_embedder",
    "all_final_layer.2-1.linear": "final_layer.linear",
    "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
}
FEW = of_layers(small_shapes(dim=8, ffn=16, temb=8, cap=8, n_layers=8, n_refiners=1), 0, 3, 5, 7)
INPUTS = {"all 276": ("ai-toolkit-all", 276), "layers": ("ai-toolkit", 240)}


def stem(form, module):
    """The key of a module without its ending."""
    if form == "ai-toolkit":
        return f"diffusion_model.{module}"
    if form == "diffusers":
        return f"transformer.{module}"
    if form == "kohya":
        return "lora_unet_" + module.replace(".", "_")
    if module in NATIVE:
        return f"diffusion_model.{NATIVE[module]}"
    if module.endswith(("attention.to_q", "attention.to_k", "attention.to_v")):
        return f"diffusion_model.{module[: -len('to_q')]}qkv"
    return f"diffusion_model.{module.removesuffix('to_out.0')}out" if module.endswith("to_out.0") else f"diffusion_model.{module}"


def table(form, shapes, ranks):
    """key -> shape of the whole file: ranks is a number, or module -> rank."""
    (down, up), has_alpha = ENDINGS[form]
    units = {}
    for module, (out, into) in shapes.items():
        rank = ranks if isinstance(ranks, int) else ranks[module]
        rows, columns, total = units.get(stem(form, module), (0, into, 0))
        assert columns == into
        units[stem(form, module)] = rows + out, into, total + rank
    expected = {}
    for key, (out, into, rank) in units.items():
        expected |= {key + down: (rank, into), key + up: (out, rank)} | ({key + ".alpha": ()} if has_alpha else {})
    return expected


def read(path, form, modules):
    """Module -> delta in float64, as a client of this form reads it: up @ down * alpha / rank, rows of a qkv in thirds."""
    (down, up), has_alpha = ENDINGS[form]
    tensors, deltas = load_file(path), {}
    for module in modules:
        key = stem(form, module)
        a, b = tensors[key + down].double(), tensors[key + up].double()
        delta = b @ a * (float(tensors[key + ".alpha"]) / len(a) if has_alpha else 1.0)
        if key.endswith("qkv"):
            delta = delta.chunk(3)["qkv".index(module[-1])]
        deltas[module] = delta
    return deltas


def write(folder, name, rank=3, seed=0, shapes=SMALL):
    path, made = write_lora(folder, name, rank, seed, shapes=shapes, stem=f"{name}_{seed}")
    return path, made.deltas


def mixed(folder, name, shapes):
    """Inputs with their ratios, the wanted deltas, what rounding is relative to, the shapes."""
    one, two = write(folder, name, shapes=shapes), write(folder, "musubi", 2, 1, shapes)
    parts = [(one[1], 0.9), (two[1], -0.4)]
    return [(one[0], 0.9), (two[0], -0.4)], weighted_sum(parts), sizes(parts), {module: shapes[module] for module in one[1]}


@pytest.fixture
def mix(tmp_path):
    """`mixed` with a few layers, refiners and embedders included."""
    return mixed(tmp_path, "ai-toolkit-all", FEW)


@sweep("case, dtype", product(ENDINGS, INPUTS), DTYPES)
def test_keys_shapes_alphas_and_numbers(tmp_path, case, dtype):
    """Of every module of Z-Image, or of its layers."""
    form, (name, count) = case[0], INPUTS[case[1]]
    loras, wanted, size, shapes = mixed(tmp_path, name, SMALL)
    assert len(shapes) == count
    out = merge_into(tmp_path, loras, format=form, dtype=dtype)
    tensors, expected = load_file(out), table(form, shapes, 5)
    assert {key: tuple(t.shape) for key, t in tensors.items()} == expected
    for key, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if key.endswith(".alpha") else DTYPES[dtype]), key
        if key.endswith(".alpha"):
            assert float(tensor) == (15 if "qkv" in key else 5), key
    found = read(out, form, shapes)
    assert {m for m in shapes if not float((found[m] - wanted[m]).norm()) < ROUNDING[dtype] * size[m]} == set()
    assert min(float(d.norm()) for d in wanted.values()) > 0


@pytest.mark.parametrize("form", ENDINGS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_our_own_reader_reads_the_same(tmp_path, mix, form, dtype):
    loras, wanted, size, shapes = mix
    lora = load_lora(merge_into(tmp_path, loras, format=form, dtype=dtype))
    assert set(lora) == set(shapes)
    assert (lora.unmatched, lora.questions, lora.skipped) == ((), (), ())
    for module in shapes:
        factors = lora[module]
        delta = factors.up.double() @ factors.down.double()
        assert float((delta - wanted[module]).norm()) < ROUNDING[dtype] * size[module], module


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("form", ENDINGS)
def test_no_alpha_stands_beside_a_rank_of_1(tmp_path, form, uniform):
    """stable-diffusion.cpp takes the width of the input for such a rank (src/lora.hpp: ne[ggml_n_dims - 1] of down)."""
    path, deltas = write(tmp_path, "ai-toolkit-all", rank=1, shapes=FEW)
    out = merge_into(tmp_path, [(path, 0.9)], format=form, uniform=uniform)
    least = 2 if ENDINGS[form][1] else 1
    thirds = () if uniform or form != "comfyui" else ("to_q", "to_k", "to_v")  # three of rank 1 are a rank of 3
    ranks = {m: 1 if m.endswith(thirds) else least for m in FEW} | {"layers.0.attention.to_k": least}
    tensors, found = load_file(out), read(out, form, FEW)
    assert {key: tuple(t.shape) for key, t in tensors.items()} == table(form, FEW, ranks)
    assert all(float(t) == len(tensors[key[:-6] + ENDINGS[form][0][0]]) for key, t in tensors.items() if key.endswith(".alpha"))
    assert {m for m in FEW if not float((found[m] - 0.9 * deltas[m]).norm()) <= 3e-7 * float(deltas[m].norm())} == set()
    metadata = read_metadata(out)
    assert metadata.get("ss_network_dim", "2") == metadata.get("ss_network_alpha", "2") == "2"
    if not uniform:
        assert json.loads(metadata["lora_adapter_metadata"])["transformer.r"] == least


@pytest.mark.parametrize("rank", ["exact", 2, "same"])
def test_every_form_holds_the_same_factors_bit_for_bit(tmp_path, mix, rank):
    loras, _, _, shapes = mix
    made = {form: load_file(merge_into(tmp_path, loras, form, format=form, dtype="bf16", rank=rank)) for form in ENDINGS}
    kept = {"exact": 5, 2: 2, "same": 3}[rank]
    for module, (out, _) in shapes.items():
        a, b = (made["ai-toolkit"][stem("ai-toolkit", module) + end] for end in AB)
        assert a.shape[0] == b.shape[1] == kept
        for form, ends in (("diffusers", AB), ("kohya", DOWN_UP), ("comfyui", DOWN_UP)):
            down, up = (made[form][stem(form, module) + end] for end in ends)
            if stem(form, module).endswith("qkv"):
                i = "qkv".index(module[-1])
                assert not torch.cat(
                    [up[i * out : (i + 1) * out, : i * kept], up[i * out : (i + 1) * out, (i + 1) * kept :]], 1
                ).any()
                down, up = down[i * kept : (i + 1) * kept], up[i * out : (i + 1) * out, i * kept : (i + 1) * kept]
            assert torch.equal(down, a), (form, module)
            assert torch.equal(up, b), (form, module)


def test_the_sum_of_all_forms_is_their_sum(tmp_path, mix):
    loras, wanted, size, shapes = mix
    files = [(merge_into(tmp_path, loras, form, format=form), 0.25) for form in ENDINGS]
    for form in ENDINGS:
        found = read(merge_into(tmp_path, files, f"sum_{form}", format=form), form, shapes)
        assert {m for m in shapes if not float((found[m] - wanted[m]).norm()) < 2 * ROUNDING["fp32"] * size[m]} == set()


@pytest.mark.parametrize("form", ENDINGS)
def test_what_clients_want_beside_the_merged_modules_is_in_every_form(tmp_path, form):
    shapes = {m: SMALL[m] for m in ("layers.3.attention.to_v", "layers.7.feed_forward.w3")}
    path, deltas = write(tmp_path, "ai-toolkit", shapes=shapes)
    out = merge_into(tmp_path, [(path, 1.0)], format=form)
    modules = [f"layers.{i}.attention.to_{c}" for i in (0, 3) for c in "qkv"] + [f"layers.7.feed_forward.w{i}" for i in (1, 3)]
    found = {k: tuple(t.shape) for k, t in load_file(out).items()}
    assert found == table(form, {m: SMALL[m] for m in modules}, 3)
    assert set(load_lora(out)) == set(modules)
    got = read(out, form, modules)
    for module in modules:
        wanted = deltas.get(module, torch.zeros(SMALL[module], dtype=torch.float64))
        assert float((got[module] - wanted).norm()) <= 1e-6 * float(wanted.norm()), module


def test_real_sizes_in_comfyuis_form(tmp_path, real_loras):
    """me.safetensors holds adaLN, to_q and to_v of layer 0 at rank 2; at ratio 1 nothing is rounded."""
    stored = load_file(real_loras[0])
    out = load_file(merge_into(tmp_path, [(real_loras[0], 1.0)], format="comfyui", shapes="strict", dtype="bf16"))
    key = "diffusion_model.layers.0.attention"
    up, down = out.pop(f"{key}.qkv.lora_up.weight"), out.pop(f"{key}.qkv.lora_down.weight")
    assert (up.shape, down.shape, float(out.pop(f"{key}.qkv.alpha"))) == ((11520, 6), (6, 3840), 6.0)
    for i, c in enumerate("qkv"):
        rows = up[3840 * i : 3840 * (i + 1)]
        wanted = torch.zeros(3840, 6).bfloat16()
        if c != "k":
            wanted[:, 2 * i : 2 * i + 2] = stored[f"{key}.to_{c}.lora_B.weight"]
            assert torch.equal(down[2 * i : 2 * i + 2], stored[f"{key}.to_{c}.lora_A.weight"])
        assert torch.equal(rows, wanted), c
    adaln = "diffusion_model.layers.0.adaLN_modulation.0"
    assert out.keys() == {f"{adaln}.lora_up.weight", f"{adaln}.lora_down.weight", f"{adaln}.alpha"}
    assert torch.equal(out[f"{adaln}.lora_up.weight"], stored[f"{adaln}.lora_B.weight"])


# --- lora by lora of other algorithms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["ai-toolkit-lokr", "musubi-lokr", "diffusion-pipe-lokr", "comfyui-train-loha", "comfyui-full-diff"]
)
@pytest.mark.parametrize("form", ENDINGS)
def test_other_algorithms_become_loras_of_every_form(tmp_path, name, form):
    one, two = write(tmp_path, name, 2, shapes=FEW), write(tmp_path, "ai-toolkit", 3, 1, FEW)
    drop = {"drop": ["norm", "bias"]}
    out = merge_into(tmp_path, [(one[0], {"ratio": 0.7} | drop), (two[0], 0.5)], format=form)
    parts = [(one[1], 0.7), (two[1], 0.5)]
    wanted, size = weighted_sum(parts), sizes(parts)
    assert {k: v for k, v in load_file(out).items() if not k.endswith((*AB, *DOWN_UP, ".alpha"))} == {}
    found = read(out, form, wanted)
    assert {m for m in wanted if not float((found[m] - wanted[m]).norm()) < 1e-6 * size[m]} == set()


# --- each module at its own rank -----------------------------------------------------------------------------------------------


def own_ranks(path):
    """Module -> rank of a file of musubi's names, read from its keys and shapes."""
    flat = {m.replace(".", "_"): m for m in SMALL}
    tensors = load_file(path)
    return {
        flat[k.removeprefix("lora_unet_").removesuffix(DOWN_UP[0])]: len(t) for k, t in tensors.items() if k.endswith(DOWN_UP[0])
    }


def written_ranks(path, form, modules):
    tensors, (down, _) = load_file(path), ENDINGS[form][0]
    return {m: len(tensors[stem(form, m) + down]) for m in modules}


@pytest.mark.parametrize("rank", ["exact", 4])
@pytest.mark.parametrize("form", ["ai-toolkit", "diffusers", "kohya"])
def test_each_module_at_its_own_rank(tmp_path, form, rank):
    one, two = write(tmp_path, "kohya-resized", 3, shapes=FEW), write(tmp_path, "musubi", 1, 1, FEW)
    out = merge_into(tmp_path, [(one[0], 0.7), (two[0], 0.5)], format=form, uniform=False, rank=rank)
    resized, wanted = own_ranks(one[0]), weighted_sum([(one[1], 0.7), (two[1], 0.5)])
    most = 8 if rank == "exact" else 4  # no matrix of the small model has more than 8
    expected = {m: min(resized[m] + 1, most) for m in resized}
    largest = max(expected.values())
    expected["layers.0.attention.to_k"] = largest  # AI-Toolkit reads the file's rank there
    assert len(set(expected.values())) > 2
    assert written_ranks(out, form, wanted) == expected
    assert {k: tuple(t.shape) for k, t in load_file(out).items()} == table(form, {m: SMALL[m] for m in wanted}, expected)
    if ENDINGS[form][1]:
        alphas = {m: float(load_file(out)[stem(form, m) + ".alpha"]) for m in wanted}
        assert alphas == expected
    found = read(out, form, wanted)
    for module, delta in wanted.items():
        values = torch.linalg.svdvals(delta)
        least = float(values[expected[module] :].square().sum().sqrt())
        assert abs(float((found[module] - delta).norm()) - least) < 1e-6 * float(delta.norm()), module
    lora = load_lora(out)
    assert lora.questions == ()
    for module in list(wanted)[::5]:
        delta = lora[module].up.double() @ lora[module].down.double()
        assert float((delta - found[module]).norm()) <= 1e-7 * float(delta.norm()), module


def test_a_fused_qkv_of_three_ranks(tmp_path):
    path, deltas = write(tmp_path, "kohya-resized", 3, shapes=FEW)
    out = merge_into(tmp_path, [(path, 0.7)], format="comfyui", uniform=False)
    ranks = own_ranks(path)
    ranks["layers.0.attention.to_k"] = max(min(r, 8) for r in ranks.values())
    fused = ("to_q", "to_k", "to_v")
    ranks = {m: min(r if m.endswith(fused) else max(r, 2), 8) for m, r in ranks.items()}
    assert {k: tuple(t.shape) for k, t in load_file(out).items()} == table("comfyui", {m: SMALL[m] for m in deltas}, ranks)
    key = "diffusion_model.layers.5.attention.qkv"
    three = [ranks[f"layers.5.attention.to_{c}"] for c in "qkv"]
    tensors = load_file(out)
    assert float(tensors[f"{key}.alpha"]) == sum(three)
    up, seen = tensors[f"{key}.lora_up.weight"], 0
    for i, rank in enumerate(three):  # block-diagonal, q then k then v
        rows = up[8 * i : 8 * (i + 1)]
        assert rows[:, seen : seen + rank].any()
        assert not torch.cat([rows[:, :seen], rows[:, seen + rank :]], 1).any()
        seen += rank
    found = read(out, "comfyui", deltas)
    for module, delta in deltas.items():
        assert float((found[module] - 0.7 * delta).norm()) < 1e-6 * float(delta.norm()), module


def test_a_module_that_is_written_as_zeros_has_the_lowest_rank(tmp_path):
    modules = ("layers.3.attention.to_v", "layers.7.feed_forward.w3")
    path, _ = write(tmp_path, "ai-toolkit", shapes={m: SMALL[m] for m in modules})
    out = merge_into(tmp_path, [(path, {"ratio": 1.0, "overrides": {"7.w3": 0.0}})], uniform=False)
    zeros = {
        "layers.3.attention.to_q": 2,
        "layers.3.attention.to_k": 2,
        "layers.7.feed_forward.w1": 2,
        "layers.7.feed_forward.w3": 2,
    }
    expected = zeros | {"layers.3.attention.to_v": 3, "layers.0.attention.to_k": 3}
    assert written_ranks(out, "ai-toolkit", expected) == expected


def adapter(path):
    """lora_adapter_metadata as diffusers hands it to PEFT: the component's prefix taken off."""
    return {
        key.removeprefix("transformer."): value for key, value in json.loads(read_metadata(path)["lora_adapter_metadata"]).items()
    }


@pytest.mark.parametrize("rank", ["exact", 4])
@pytest.mark.parametrize("form", ["ai-toolkit", "diffusers"])
def test_the_metadata_give_every_module_its_own_rank_and_scale_1(tmp_path, form, rank):
    """By PEFT's own rules, which diffusers applies to it."""
    peft = pytest.importorskip("peft")
    pattern_key = pytest.importorskip("peft.utils.other").get_pattern_key
    one, two = write(tmp_path, "kohya-resized", 3, shapes=FEW), write(tmp_path, "ai-toolkit-all", 1, 1, FEW)
    out = merge_into(tmp_path, [(one[0], 0.7), (two[0], 0.5)], format=form, uniform=False, rank=rank)
    raw = json.loads(read_metadata(out)["lora_adapter_metadata"])
    assert all(key.startswith("transformer.") for key in raw)
    config = peft.LoraConfig(**adapter(out))
    assert not config.use_rslora
    ranks = written_ranks(out, form, FEW)
    assert len(set(ranks.values())) > 2
    for module, own in ranks.items():
        assert config.rank_pattern.get(pattern_key(config.rank_pattern, module), config.r) == own, module
        assert config.alpha_pattern.get(pattern_key(config.alpha_pattern, module), config.lora_alpha) == own, module
    assert set(config.target_modules) == set(ranks)
    assert config.r == ranks["layers.0.attention.to_k"]


@pytest.mark.parametrize("form", ENDINGS)
def test_a_uniform_file_has_no_adapter_metadata(tmp_path, form):
    out = merge_into(tmp_path, [(write(tmp_path, "kohya-resized", shapes=FEW)[0], 1.0)], format=form)
    assert "lora_adapter_metadata" not in read_metadata(out)


@pytest.mark.parametrize(("uniform", "dim"), [(True, "6"), (False, "Dynamic")])
def test_kohyas_metadata(tmp_path, uniform, dim):
    path, _ = write(tmp_path, "kohya-resized", shapes=FEW)
    metadata = read_metadata(merge_into(tmp_path, [(path, 1.0)], format="kohya", uniform=uniform))
    assert {k: v for k, v in metadata.items() if k.startswith("ss_network")} == {
        "ss_network_module": "networks.lora_zimage",
        "ss_network_dim": dim,
        "ss_network_alpha": dim,
    }
    assert metadata["ss_v2"] == "False"
    assert max(own_ranks(path).values()) == 6


@pytest.mark.parametrize("form", ["ai-toolkit", "diffusers", "comfyui"])
def test_other_forms_claim_no_network_of_kohyas(tmp_path, form):
    metadata = read_metadata(merge_into(tmp_path, [(write(tmp_path, "musubi", shapes=FEW)[0], 1.0)], format=form))
    assert [k for k in metadata if k.startswith("ss_network") or k == "ss_v2"] == []
    assert metadata["modelspec.architecture"] == "Z-Image/lora"


# --- through the command line --------------------------------------------------------------------------------------------------


@pytest.fixture
def work(work):
    """With LoRAs of few layers."""
    work.shapes = of_layers(SMALL, 0, 3, 29)
    return work


BOTH = [{"lora": "me.safetensors", "ratio": 0.9}, {"lora": "style.safetensors", "ratio": 0.5}]


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("form", ENDINGS)
def test_a_recipe_of_every_form_makes_the_same_bytes(work, loras, form, uniform):
    step = {"name": "a", "loras": BOTH, "rank": 2, "save": {"format": form, "uniform": uniform}}
    text = work.zit("run", work.job(step)).ok()
    made = work.out / "merged_cat_a.safetensors"
    assert work.again(work.recipe(made)).read_bytes() == made.read_bytes()
    assert text.count(f"{made.stat().st_size / 1e6:,.1f} MB") == 2
    (recipe,) = json.loads(read_metadata(made)["zit_merge.recipe"])["steps"]
    assert recipe["save"]["format"] == form
    assert recipe["save"].get("uniform", True) == uniform


@pytest.mark.parametrize("form", ["diffusers", "kohya", "comfyui"])
def test_the_plan_says_who_reads_another_form(work, loras, form):
    text = work.zit("run", work.job({"name": "a", "loras": BOTH, "save": {"format": form}}), "--dry-run").ok()
    assert f"format {form}" in text
    said = " ".join(text.split())
    assert "ai-toolkit is read by all" in said
    assert ("DiffSynth, LightX2V and Forge Neo load nothing of it" in said) is (form == "diffusers")
    assert ("ComfyUI drops q, k, v and out of it" in said) is (form == "kohya")
    assert "note: format" not in work.zit("run", work.job({"name": "a", "loras": BOTH}), "--dry-run").ok()


def test_the_plan_warns_of_ranks_that_vary(work, loras):
    text = work.zit("check", work.job({"name": "a", "loras": BOTH, "save": {"uniform": False}})).ok()
    assert "each module has its own rank" in " ".join(text.split())
    assert "rank 2-5" in text  # style has no adaLN


@pytest.mark.parametrize("form", ["diffusers", "kohya", "comfyui"])
def test_a_later_step_reads_an_earlier_one_of_any_form(work, loras, form):
    steps = [
        {"name": "a", "loras": BOTH, "save": {"format": form, "dtype": "fp32"}},
        {"name": "b", "loras": [{"lora": "a", "ratio": 1.0}], "save": {"dtype": "fp32"}},
        {"name": "direct", "loras": BOTH, "save": {"dtype": "fp32"}},
    ]
    work.zit("run", work.job(*steps)).ok()
    one, two = (load_file(work.out / f"merged_cat_{name}.safetensors") for name in ("b", "direct"))
    assert one.keys() == two.keys()
    for module in (m for m in work.shapes if m.startswith("layers.")):
        a, b = (
            t[stem("ai-toolkit", module) + AB[1]].double() @ t[stem("ai-toolkit", module) + AB[0]].double() for t in (one, two)
        )
        assert float((a - b).norm()) <= 1e-6 * float(b.norm()), module
    made = work.out / "merged_cat_b.safetensors"
    assert work.again(work.recipe(made)).read_bytes() == made.read_bytes()


def test_merge_of_the_command_line_takes_a_form(work, real_loras):
    work.zit("merge", *real_loras, "-o", "out.safetensors", "--ratio", 0.9, 0.5, "--format", "comfyui", "--device", "cpu").ok()
    assert "diffusion_model.layers.0.attention.qkv.lora_up.weight" in load_file("out.safetensors")
    message = work.zit("merge", real_loras[0], "-o", "x.safetensors", "--ratio", 1, "--format", "comfi").refused()
    assert "format" in message and "did you mean comfyui?" in message
