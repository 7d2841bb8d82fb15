"""`save: {keep_lokr: true}`: a LoKr that is only weighed stays one, read back by its definition in float64."""

import json
from pathlib import Path

import pytest
import torch
from oracles.dense import read_metadata
from oracles.producers import FAKE_HASH, small_shapes
from safetensors.torch import load_file, save_file
from workspace import DTYPES, FEW, Workspace, merge_into, of_layers, write_lora

from extensions_built_in.zit_merge import ZitMergeError, load_lora

# a fused qkv has 36 rows, 6 x 6: a third is two rows of the left factor
SHAPES = of_layers(small_shapes(dim=12, ffn=20, temb=8, cap=12), 0, 4, 9, 12, 22, 29)
UNALIGNED = of_layers(small_shapes(dim=8, ffn=16, temb=8, cap=8), 0, 4)  # 24 rows, 4 x 6: a third ends inside of a block
ROUNDING = {"fp32": 5e-7, "bf16": 3 * 2**-8, "fp16": 3 * 2**-11}  # up to three or four factors
PRODUCED = {  # name -> parts of a module's change as they are expected in the output
    "ai-toolkit-lokr": {"w1", "w2"},
    "ai-toolkit-lokr-fp16": {"w1", "w2"},
    "ai-toolkit-lokr-old": {"w1", "w2"},
    "ai-toolkit-lokr-split": {"w1", "w2_a", "w2_b"},
    "musubi-lokr": {"w1", "w2_a", "w2_b"},
    "simpletuner-lycoris-lokr": {"w1", "w2"},
    "lycoris-lokr-both": {"w1_a", "w1_b", "w2_a", "w2_b"},
    "diffusion-pipe-lokr": {"w1", "w2"},
    "diffusion-pipe-lokr-split": {"w1", "w2_a", "w2_b"},
}
WEIGHTS = {
    "ratio": 0.8,
    "blocks": {"attention": 0.5, "to_q": -1.5, "w2": 0.0},
    "layers": {"0-9": 0.5, "10-29": 2.0},
    "overrides": {"20-25.to_v": 1.3},
}


def strength(module):
    """WEIGHTS by hand."""
    section, index, *_ = module.split(".")
    if section == "layers" and 20 <= int(index) <= 25 and module.endswith("to_v"):
        return 0.8 * 1.3
    factor = 0.8
    if section == "layers":
        factor *= 0.5 if int(index) < 10 else 2.0
    if ".attention." in module:
        factor *= -1.5 if module.endswith("to_q") else 0.5
    return factor * (0.0 if module.endswith("w2") else 1.0)


def write(folder, name, rank=2, seed=0, dtype=torch.float32, shapes=SHAPES, stem=""):
    return write_lora(folder, name, rank, seed, shapes=shapes, dtype=dtype, stem=stem)


def keep(folder, loras, name="out", **how):
    return merge_into(folder, loras, name, **{"keep_lokr": True} | how)


def modules_of(path):
    """Module -> part -> tensor of a file in AI-Toolkit's form."""
    found = {}
    for key, tensor in load_file(path).items():
        assert key.startswith("diffusion_model.")
        for ending in (
            ".alpha",
            ".lora_A.weight",
            ".lora_B.weight",
            *(f".lokr_{w}{s}" for w in ("w1", "w2") for s in ("", "_a", "_b")),
        ):
            if key.endswith(ending):
                found.setdefault(key[len("diffusion_model.") : -len(ending)], {})[ending.removeprefix(".lokr_")] = tensor
                break
        else:
            raise AssertionError(f"{key} is no part of a LoKr or LoRA")
    return found


def delta(parts):
    """kron(w1, w2) * alpha / r, or B @ A * alpha / r; where both factors are whole alpha has no meaning."""
    wide = {name: tensor.double() for name, tensor in parts.items()}
    if ".lora_A.weight" in wide:
        return wide[".lora_B.weight"] @ wide[".lora_A.weight"] * wide[".alpha"] / wide[".lora_A.weight"].shape[0]
    factors, ranks = [], []
    for w in ("w1", "w2"):
        if w not in wide:
            ranks.append(wide[f"{w}_b"].shape[0])
        factors.append(wide[w] if w in wide else wide[f"{w}_a"] @ wide[f"{w}_b"])
    if ranks:
        assert len(set(ranks)) == 1
        return torch.kron(*factors) * wide[".alpha"] / ranks[0]
    assert parts[".alpha"] == 1  # lycoris-lora wants the key; whoever takes it for a scale reads the same
    return torch.kron(*factors)


def check(path, wanted, tolerance):
    found = modules_of(path)
    assert found.keys() == wanted.keys()
    for module, parts in found.items():
        got = delta(parts)
        assert float((got - wanted[module]).norm()) <= tolerance * float(wanted[module].norm()), module
        assert (parts[".alpha"].dtype, parts[".alpha"].shape) == (torch.float32, ())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PRODUCED)
def test_a_weighed_lokr_stays_one_and_is_what_it_has_to_be(tmp_path, name, dtype):
    path, made = write(tmp_path, name)
    before = path.read_bytes(), path.stat().st_mtime_ns
    out = keep(tmp_path, [(path, WEIGHTS)], dtype=dtype)
    check(out, {m: strength(m) * d for m, d in made.deltas.items()}, ROUNDING[dtype])
    for module, parts in modules_of(out).items():
        assert parts.keys() - {".alpha"} == PRODUCED[name], module
        assert {t.dtype for p, t in parts.items() if p != ".alpha"} == {DTYPES[dtype]}
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert out.stat().st_size < 2 * len(before[0]) * DTYPES[dtype].itemsize / 2 + 60_000  # no expansion: the header is the rest


@pytest.mark.parametrize("name", PRODUCED)
def test_no_alpha_stands_beside_a_product_of_rank_1(tmp_path, name):
    """stable-diffusion.cpp takes the width of w1_b, w2_b or lora_A for such a rank, too."""
    path, made = write(tmp_path, name, rank=1)
    out = keep(tmp_path, [(path, 0.8)])
    check(out, {m: 0.8 * d for m, d in made.deltas.items()}, ROUNDING["fp32"])
    for module, parts in modules_of(out).items():
        downs = [t for part, t in parts.items() if part in ("w1_b", "w2_b", ".lora_A.weight")]
        assert all(t.shape[0] == parts[".alpha"] == 2 for t in downs), module
    again = keep(tmp_path, [(out, 1.0)], "again")
    check(again, {m: 0.8 * d for m, d in made.deltas.items()}, ROUNDING["fp32"])


@pytest.mark.parametrize("ratio", [1.0, -1.0, 0.0, -0.3, 2.5])
def test_any_ratio(tmp_path, ratio):
    path, made = write(tmp_path, "ai-toolkit-lokr-split")
    check(keep(tmp_path, [(path, ratio)]), {m: ratio * d for m, d in made.deltas.items()}, 5e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["ai-toolkit-lokr", "simpletuner-lycoris-lokr"])
def test_ratio_1_of_whole_factors_passes_through_bit_for_bit(tmp_path, name, dtype):
    path, made = write(tmp_path, name, dtype=DTYPES[dtype])
    out = modules_of(keep(tmp_path, [(path, 1.0)], dtype="same"))
    stored = {key.rsplit(".lokr_")[0]: key for key in made.tensors if key.endswith(".lokr_w1")}
    assert len(stored) == len(out)
    for key in stored:
        module = next(m for m in out if key in (f"diffusion_model.{m}", "lycoris_" + m.replace(".", "_")))
        for part in ("w1", "w2"):
            assert torch.equal(out[module][part], made.tensors[f"{key}.lokr_{part}"]), module


def test_an_aligned_fused_qkv_becomes_three_lokrs(tmp_path):
    path, made = write(tmp_path, "diffusion-pipe-lokr")
    stored = load_file(path)
    out = modules_of(keep(tmp_path, [(path, 1.0)]))
    for i, c in enumerate("qkv"):
        parts = out[f"layers.4.attention.to_{c}"]
        fused = {w: stored[f"diffusion_model.layers.4.attention.qkv.lokr_{w}"] for w in ("w1", "w2")}
        assert torch.equal(parts["w1"], fused["w1"][2 * i : 2 * i + 2])
        assert torch.equal(parts["w2"], fused["w2"])
    check(tmp_path / "out.safetensors", made.deltas, 1e-12)


@pytest.mark.parametrize("name", ["diffusion-pipe-lokr", "diffusion-pipe-lokr-split"])
def test_an_unaligned_fused_qkv_is_refused_with_the_reason(tmp_path, name):
    path, made = write(tmp_path, name, shapes=UNALIGNED)
    with pytest.raises(ZitMergeError) as error:
        keep(tmp_path, [(path, 1.0)])
    message = str(error.value)
    assert "save.keep_lokr" in message and "fuses q, k and v" in message and "Kronecker" in message and path.name in message
    assert not (tmp_path / "out.safetensors").exists()
    out = keep(tmp_path, [(path, 0.5)], keep_lokr=False)  # as a LoRA it can be written
    q = "layers.4.attention.to_q"
    found = load_lora(out)[q]
    assert float((found.up.double() @ found.down.double() - 0.5 * made.deltas[q]).norm()) < 1e-6 * float(made.deltas[q].norm())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_musubis_mixed_file_keeps_its_pairs(tmp_path, dtype):
    path, made = write(tmp_path, "musubi-comfy-lokr")
    out = keep(tmp_path, [(path, WEIGHTS)], dtype=dtype)
    check(out, {m: strength(m) * d for m, d in made.deltas.items()}, ROUNDING[dtype])
    for module, parts in modules_of(out).items():
        if module.endswith(("to_q", "to_k", "to_v")):
            assert parts.keys() == {".lora_A.weight", ".lora_B.weight", ".alpha"}
            assert parts[".lora_B.weight"].shape == (12, 6)  # rank 3r, its own third of the rows
            assert float(parts[".alpha"]) == 6
        else:
            assert parts.keys() == {"w1", "w2_a", "w2_b", ".alpha"}
            assert float(parts[".alpha"]) == 2


def test_the_rule_of_onetrainer(tmp_path):
    # some modules have a whole w2, some a product: alpha counts only in these
    path, made = write(tmp_path, "onetrainer-lokr", 2)
    out = keep(tmp_path, [(path, 0.7)])
    kinds = {frozenset(parts) for parts in modules_of(out).values()}
    assert kinds == {frozenset({"w1", "w2", ".alpha"}), frozenset({"w1", "w2_a", "w2_b", ".alpha"})}
    check(out, {m: 0.7 * d for m, d in made.deltas.items()}, 5e-7)


@pytest.mark.parametrize("name", [*PRODUCED, "musubi-comfy-lokr", "onetrainer-lokr"])
def test_our_own_reader_reads_it_back(tmp_path, name):
    path, made = write(tmp_path, name)
    lora = load_lora(keep(tmp_path, [(path, 0.7)]))
    assert (lora.unmatched, lora.questions) == ((), ())
    assert set(lora) == set(made.deltas)
    for module, wanted in list(made.deltas.items())[::19]:
        full = lora[module].expand()
        assert float((full.up.double() @ full.down.double() - 0.7 * wanted).norm()) <= 1e-6 * float(wanted.norm()), module


def test_a_kept_lokr_may_be_kept_again(tmp_path):
    path, made = write(tmp_path, "ai-toolkit-lokr-split")
    first = keep(tmp_path, [(path, 0.5)], "first")
    check(keep(tmp_path, [(first, -3.0)]), {m: -1.5 * d for m, d in made.deltas.items()}, 1e-6)


def test_metadata_of_an_input_are_not_copied(tmp_path):
    path, _ = write(tmp_path, "musubi-lokr")
    metadata = read_metadata(keep(tmp_path, [(path, 0.5)]))
    assert [k for k in metadata if k.startswith(("sshs_", "ss_network", "lycoris", "lora_adapter", "ss_training"))] == []
    assert [k for k, v in metadata.items() if FAKE_HASH[:8] in v] == []
    assert metadata["modelspec.architecture"] == "Z-Image/lora"


# --- what is refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [{"rank": 8}, {"rank": "same"}, {"format": "kohya"}, {"format": "diffusers"}, {"format": "comfyui"}, {"uniform": False}],
    ids=str,
)
def test_settings_that_have_no_meaning_beside_it(tmp_path, how):
    path, _ = write(tmp_path, "ai-toolkit-lokr")
    with pytest.raises(ZitMergeError, match=r"save\.keep_lokr: only one LoKr .* drop them, or keep_lokr"):
        keep(tmp_path, [(path, 1.0)], **how)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("second", ["ai-toolkit-lokr", "ai-toolkit"])
def test_two_loras_do_not_stay_a_lokr(tmp_path, second):
    paths = [write(tmp_path, name, seed=i, stem=f"{i}")[0] for i, name in enumerate(("ai-toolkit-lokr", second))]
    with pytest.raises(ZitMergeError, match=r"save\.keep_lokr: only one LoKr"):
        keep(tmp_path, [(path, 1.0) for path in paths])


@pytest.mark.parametrize(
    ("name", "says"), [("ai-toolkit", "holds no LoKr"), ("musubi-loha", "holds no LoKr"), ("lycoris-full", "holds no")]
)
def test_what_is_no_lokr_cannot_stay_one(tmp_path, name, says):
    path, _ = write(tmp_path, name)
    with pytest.raises(ZitMergeError, match=rf"save\.keep_lokr: {path.name} {says}"):
        keep(tmp_path, [(path, 1.0)])


@pytest.mark.parametrize("other", ["LoHa", "full difference"])
def test_another_algorithm_inside_is_refused(tmp_path, other):
    path, made = write(tmp_path, "ai-toolkit-lokr")
    stem = "diffusion_model.layers.9.attention.to_v"
    tensors = {k: t for k, t in made.tensors.items() if not k.startswith(stem)}
    if other == "LoHa":
        tensors |= {f"{stem}.hada_{w}_{ab}": torch.ones((12, 2) if ab == "a" else (2, 12)) for w in ("w1", "w2") for ab in "ab"}
    else:
        tensors[f"{stem}.diff"] = torch.ones(12, 12)
    save_file({k: t.contiguous() for k, t in tensors.items()}, path)
    with pytest.raises(ZitMergeError, match=rf"save\.keep_lokr: .* changes layers\.9\.attention\.to_v as a {other}"):
        keep(tmp_path, [(path, 1.0)])


def test_a_result_too_large_for_fp16_is_refused(tmp_path):
    path, _ = write(tmp_path, "ai-toolkit-lokr")
    with pytest.raises(ZitMergeError, match="too large for fp16"):
        keep(tmp_path, [(path, 1e14)], dtype="fp16")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("producer", ["ai-toolkit-lokr", "musubi-lokr"])
def test_factors_that_fp16_would_lose_are_levelled(tmp_path, producer):
    """w1 of thousands beside w2 of billionths: each alone leaves the range, their product does not."""
    path, made = write(tmp_path, producer)
    stored = load_file(path)
    changed = {
        k: t * (2.0**14 if ".lokr_w1" in k else 2.0**-22 if k.endswith((".lokr_w2", ".lokr_w2_a")) else 1)
        for k, t in stored.items()
    }
    save_file(changed, path)
    out = load_lora(keep(tmp_path, [(path, 1.0)], dtype="fp16"))
    for module, delta in made.deltas.items():
        got = out[module].map(torch.Tensor.double).expand()
        wanted = delta * 2.0**-8
        assert float((got.up @ got.down - wanted).norm()) <= 2e-3 * float(wanted.norm()), module


# --- through the command line --------------------------------------------------------------------------------------------------

KEPT = {
    "name": "kept",
    "loras": [{"lora": "lokr.safetensors", "ratio": 0.8, "blocks": {"to_q": -0.5}}],
    "save": {"keep_lokr": True},
}


@pytest.fixture
def lokr(work: Workspace) -> Path:
    """A small LoKr of few layers in the working directory."""
    work.shapes = FEW
    return work.lora("lokr.safetensors", "ai-toolkit-lokr-split")


@pytest.mark.parametrize("dtype", ["bf16", "same"])
def test_the_recipe_makes_the_same_bytes(work, lokr, dtype):
    text = work.zit("run", work.job(KEPT | {"save": {"keep_lokr": True, "dtype": dtype}})).ok()
    made = work.out / "merged_cat_kept.safetensors"
    assert "a LoKr as before" in text and "ComfyUI" in text
    assert text.count(f"{made.stat().st_size / 1e6:,.1f} MB") == 2
    (step,) = json.loads(read_metadata(made)["zit_merge.recipe"])["steps"]
    assert step["save"]["keep_lokr"] is True
    folder = work.folder / "attic"
    folder.mkdir()
    lokr.rename(folder / "other.safetensors")
    assert work.again(work.recipe(made), "--loras", folder).read_bytes() == made.read_bytes()


@pytest.mark.parametrize("rank", [1, 2])
def test_a_later_step_uses_it(work, lokr, rank):
    work.lora("lokr.safetensors", "ai-toolkit-lokr-split", rank=rank)
    work.lora("me.safetensors")
    steps = [
        KEPT,
        {
            "name": "both",
            "rank": 6,
            "save": {"dtype": "fp32"},
            "loras": [{"lora": "kept", "ratio": 1.0}, {"lora": "me.safetensors", "ratio": 0.5}],
        },
        {"name": "lora", "save": {"dtype": "fp32"}, "loras": [{"lora": "kept", "ratio": 1.0}]},
    ]
    work.zit("run", work.job(*steps)).ok()
    source = modules_of(work.out / "merged_cat_kept.safetensors")
    lora = load_lora(work.out / "merged_cat_lora.safetensors")
    assert lora.algorithms == {"LoRA": 24}
    for module in ("layers.0.attention.to_q", "layers.3.feed_forward.w2", "layers.29.adaLN_modulation.0"):
        wanted = delta(source[module])
        assert float((lora[module].up.double() @ lora[module].down.double() - wanted).norm()) <= 1e-6 * float(wanted.norm())
    for name in ("both", "lora"):
        made = work.out / f"merged_cat_{name}.safetensors"
        assert work.again(work.recipe(made)).read_bytes() == made.read_bytes()


@pytest.mark.parametrize("keep_first", [True, False])
def test_a_later_step_does_not_keep_what_an_earlier_one_kept(work, lokr, keep_first):
    """It is not written as a LoRA in silence."""
    steps = [
        KEPT | {"keep": keep_first},
        {"name": "twice", "loras": [{"lora": "kept", "ratio": -2.0}], "save": {"keep_lokr": True, "dtype": "fp32"}},
    ]
    message = work.zit("run", work.job(*steps)).refused()
    assert message.startswith("process[0].steps[1].save.keep_lokr: kept is an earlier step: give the LoKr's own file")
    assert work.files() == []


def test_the_refusal_names_its_place(work, lokr):
    message = work.zit("check", work.job(KEPT | {"rank": 4})).refused()
    assert message.startswith("process[0].steps[0].save.keep_lokr: only one LoKr")


def test_merge_of_the_command_line(work):
    module = "layers.0.attention.to_q"
    random = torch.Generator().manual_seed(0)
    w1, w2 = torch.randn(60, 60, generator=random), torch.randn(64, 64, generator=random)
    save_file({f"diffusion_model.{module}.lokr_w1": w1, f"diffusion_model.{module}.lokr_w2": w2}, "lokr.safetensors")
    work.zit(
        "merge", "lokr.safetensors", "-o", "o.safetensors", "--ratio", -0.5, "--keep-lokr", "--dtype", "fp32", "--device", "cpu"
    ).ok()
    (parts,) = modules_of(Path("o.safetensors")).values()
    assert torch.equal(parts["w1"], -0.5 * w1)
    assert torch.equal(parts["w2"], w2)
    assert (
        "keep_lokr" in work.zit("merge", *["lokr.safetensors"] * 2, "-o", "x.safetensors", "--ratio", 1, "--keep-lokr").refused()
    )


# --- the sizes of the real model -----------------------------------------------------------------------------------------------


def real_lokr(path: Path) -> Path:
    """All 240 modules as AI-Toolkit's `type: lokr` with whole factors: 5 MB that hold changes of full rank."""
    sides = {3840: (60, 64), 10240: (80, 128), 15360: (120, 128), 256: (16, 16)}
    shapes = {m: (sides[o], sides[i]) for m, (o, i) in small_shapes(3840, 10240, 256, 2560).items() if m.startswith("layers.")}
    tensors = {}
    for module, ((p, s), (q, t)) in shapes.items():
        tensors[f"diffusion_model.{module}.lokr_w1"] = torch.ones(p, q).bfloat16()
        tensors[f"diffusion_model.{module}.lokr_w2"] = torch.ones(s, t).bfloat16()
        tensors[f"diffusion_model.{module}.alpha"] = torch.tensor(9999999999.0).bfloat16()
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("command", ["check", "run"])
def test_exact_of_a_whole_lokr_is_refused_before_anything_is_written(work, command):
    real_lokr(work.folder / "lokr.safetensors")
    step = {"name": "a", "loras": [{"lora": "lokr.safetensors", "ratio": 0.8}]}
    message = work.zit(command, work.job(step, shapes="strict")).refused()
    assert message.startswith("process[0].steps[0]: merged_cat_a.safetensors would take 20.41 GB at rank 3840: ")
    assert "rank: 64" in message and "save: {keep_lokr: true}" in message and "confirm_size: true" in message
    assert work.files() == []
    two = step | {"loras": [*step["loras"], {"lora": "lokr.safetensors", "ratio": 0.1}]}
    message = work.zit(command, work.job(two, shapes="strict")).refused()
    assert "rank: 64" in message and "keep_lokr" not in message  # that is for one alone
    message = work.zit(command, work.job(step | {"rank": 2000}, shapes="strict")).refused()
    assert "GB at rank 2000" in message and "keep_lokr" not in message  # beside a rank it has no meaning
    for fine in ({"rank": 64}, {"save": {"keep_lokr": True}}):
        assert work.zit("run", work.job(step | fine, shapes="strict"), "--dry-run").ok()
    assert "rank: 64" in work.zit("check", work.job(step | {"rank": "same"}, shapes="strict")).refused()


def test_a_real_sized_lokr_is_kept(work):
    path = real_lokr(work.folder / "lokr.safetensors")
    step = {"name": "a", "loras": [{"lora": "lokr.safetensors", "ratio": 0.5}], "save": {"keep_lokr": True}}
    work.zit("run", work.job(step, shapes="strict")).ok()
    made = work.out / "merged_cat_a.safetensors"
    assert made.stat().st_size < path.stat().st_size + 100_000
    for parts in modules_of(made).values():
        assert (parts["w1"] == 0.5).all()
        assert (parts["w2"] == 1).all()
