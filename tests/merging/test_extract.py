"""A LoRA out of a fine-tuned model, against the float64 singular values of the difference."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import SHAPES, WRITERS, model, native, read, write_all_in_one, write_folder, write_one, write_shards
from oracles import producers
from oracles.dense import best_error, read_deltas, read_metadata, relative, weighted_sum
from pairs import deltas, lora, write
from torch import Tensor
from workspace import Workspace

from extensions_built_in.zit_merge import load_lora
from extensions_built_in.zit_merge.formats.metadata import RECIPE_KEY

SOME = {m: s for m, s in SHAPES.items() if m.startswith("layers.")}


def extract(work: Workspace, tuned: Path, base: Path, *words: object, out: str = "out.safetensors"):
    return work.zit("extract", tuned, "--base", base, "-o", out, "--shapes", "free", "--device", "cpu", *words)


def tuned_by(base: Mapping[str, Tensor], size: float, seed: int = 7) -> dict[str, Tensor]:
    """A fine-tune that changes every weight, at full rank."""
    random = torch.Generator().manual_seed(seed)
    return {
        k: (t.float() + size * torch.randn(t.shape, generator=random) if k.removesuffix(".weight") in SHAPES else t.float()).to(
            t.dtype
        )
        for k, t in base.items()
    }


def difference(tuned: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Module -> tuned - base in float64."""
    return {m: tuned[f"{m}.weight"].double() - base[f"{m}.weight"].double() for m in SHAPES}


@pytest.fixture(scope="module")
def base() -> dict[str, Tensor]:
    return model()


@pytest.fixture(scope="module")
def wide() -> dict[str, Tensor]:
    return model(0, torch.float32)


# --- the numbers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["out", "out.safetensors"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_bake_and_back_gives_the_lora(work, base, form, dtype):
    """But for what the rounding of the model took, which is known: it is no part of rank r."""
    one = lora(4, 1, 2.0, SOME)
    write(work.folder / "me.safetensors", one)
    path = WRITERS["comfyui"](work.folder / "base", base)
    words = ["--ratio", 1.0, "--shapes", "free", "--device", "cpu", "--dtype", dtype]
    work.zit("bake", "me.safetensors", "--base", path, "-o", f"baked_{form}", *words).ok()
    extract(work, Path(f"baked_{form}"), path, "--rank", 4, "--dtype", "fp32").ok()
    found, written = read_deltas(work.folder / "out.safetensors"), read(work.folder / f"baked_{form}")
    for module, delta in deltas(one).items():
        noise = written[f"{module}.weight"].double() - base[f"{module}.weight"].double() - delta  # what rounding left
        # the best of rank r is off from delta by what is r-dimensional in the noise (Weyl, Wedin): twice its largest part
        largest = float(torch.linalg.matrix_norm(noise, 2))
        limit = 2 * largest * 4**0.5 * 2**0.5 + 1e-6 * float(delta.norm())
        assert float((found[module] - delta).norm()) <= limit, module
        if dtype == "fp32":
            assert relative(found[module], delta) < 1e-4
        else:
            assert relative(found[module], delta) < 0.05 and float(noise.norm()) > 0
    untouched = [m for m in SHAPES if m not in SOME]
    assert untouched and all(m not in found or not found[m].any() for m in untouched)


@pytest.mark.parametrize("rank", [3, 8, 40])
def test_the_optimum_of_its_rank(work, base, rank):
    """In energy to 1e-6 of the whole difference, module by module, by the float64 SVD."""
    tuned = tuned_by(base, 0.02)
    paths = write_folder(work.folder / "tuned", tuned), write_folder(work.folder / "base", base)
    extract(work, *paths, "--rank", rank, "--dtype", "fp32").ok()
    found = read_deltas(work.folder / "out.safetensors")
    assert found.keys() == SHAPES.keys()
    for module, delta in difference(tuned, base).items():
        missed, least = float((found[module] - delta).square().sum()), best_error(delta, rank) ** 2
        assert missed - least <= 1e-6 * float(delta.square().sum()), module
        assert missed >= least * (1 - 1e-6) - 1e-9 * float(delta.square().sum())


def test_a_rank_that_holds_everything(work, wide):
    tuned = tuned_by(wide, 0.02)
    paths = write_folder(work.folder / "tuned", tuned), write_folder(work.folder / "base", wide)
    extract(work, *paths, "--rank", 10_000, "--dtype", "fp32", "--confirm-size").ok()
    found = read_deltas(work.folder / "out.safetensors")
    assert all(relative(found[m], delta) < 1e-5 for m, delta in difference(tuned, wide).items())


@pytest.mark.parametrize(
    "of_tuned, of_base", [("comfyui", "shards"), ("repository", "prefixed"), ("flat", "folder"), ("prefixed", "comfyui")]
)
def test_the_forms_of_the_two_may_differ(work, base, of_tuned, of_base):
    tuned = tuned_by(base, 0.02)
    paths = WRITERS[of_tuned](work.folder / "tuned", tuned), WRITERS[of_base](work.folder / "base", base)
    extract(work, *paths, "--rank", 6, "--dtype", "fp32").ok()
    found = read_deltas(work.folder / "out.safetensors")
    for module, delta in difference(tuned, base).items():
        assert float((found[module] - delta).norm()) <= best_error(delta, 6) * (1 + 1e-5), module


def test_two_dtypes(work, base):
    """A fine-tune in fp32 of a model in bf16: the difference is taken between the numbers themselves."""
    tuned = tuned_by({k: t.float() for k, t in base.items()}, 1e-4)
    paths = write_folder(work.folder / "tuned", tuned), write_folder(work.folder / "base", base)
    extract(work, *paths, "--rank", 256, "--dtype", "fp32").ok()
    found = read_deltas(work.folder / "out.safetensors")
    assert all(relative(found[m], delta) < 1e-3 for m, delta in difference(tuned, base).items())


def test_the_same_numbers_in_another_dtype_are_no_difference(work, base):
    paths = write_folder(work.folder / "tuned", {k: t.float() for k, t in base.items()}), write_folder(work.folder / "base", base)
    ran = extract(work, *paths)
    assert ran.code == 0
    assert not any(d.any() for d in read_deltas(work.folder / "out.safetensors").values())


def test_identical_tensors_give_zeros(work, base):
    """A fine-tune of two modules; all else is byte for byte what it was."""
    changed = ("layers.0.attention.to_k", "cap_embedder.1")
    tuned = dict(base) | {f"{m}.weight": tuned_by(base, 0.02)[f"{m}.weight"] for m in changed}
    paths = WRITERS["comfyui"](work.folder / "tuned", tuned), write_folder(work.folder / "base", base)
    extract(work, *paths, "--rank", 4, "--dtype", "fp32").ok()
    found = read_deltas(work.folder / "out.safetensors")
    assert {m for m, d in found.items() if d.any()} == set(changed)
    for module in changed:
        delta = difference(tuned, base)[module]
        assert float((found[module] - delta).norm()) <= best_error(delta, 4) * (1 + 1e-5)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_rank_of_an_energy(work, wide, share):
    """The smallest common rank that keeps this share of the squared norm of the whole difference."""
    one, noise = lora(12, 3, None, SHAPES), tuned_by(wide, 1e-3)
    tuned = {
        k: t + one[k.removesuffix(".weight")].delta.float() if k.removesuffix(".weight") in one else t for k, t in noise.items()
    }
    paths = write_folder(work.folder / "tuned", tuned), write_folder(work.folder / "base", wide)
    extract(work, *paths, "--rank", f"energy={share},max=128", "--dtype", "fp32").ok()
    spectra = {m: torch.linalg.svdvals(d).square() for m, d in difference(tuned, wide).items()}
    total = sum(float(s.sum()) for s in spectra.values())
    wanted = next(r for r in range(1, 129) if sum(float(s[:r].sum()) for s in spectra.values()) >= share * total)
    assert max(load_lora(work.folder / "out.safetensors").ranks.values()) == wanted


@pytest.mark.parametrize("size", [0.5, 1.0])
def test_a_rank_of_a_size(work, base, size):
    """The largest rank that has room: the file fits, one of the next rank would not."""
    paths = write_folder(work.folder / "tuned", tuned_by(base, 0.02)), write_folder(work.folder / "base", base)
    extract(work, *paths, "--rank", f"size_mb={size}").ok()
    made = work.folder / "out.safetensors"
    rank = max(load_lora(made).ranks.values())
    more = sum(sum(shape) for shape in SHAPES.values()) * 2
    assert made.stat().st_size <= size * 1e6 < made.stat().st_size + more
    assert rank > 1


def test_every_module_with_a_rank_of_its_own(work, base):
    paths = write_folder(work.folder / "tuned", tuned_by(base, 0.02)), write_folder(work.folder / "base", base)
    extract(work, *paths, "--rank", "energy=0.7", "--uniform", "false", "--dtype", "fp32").ok()
    found, wanted = read_deltas(work.folder / "out.safetensors"), difference(tuned_by(base, 0.02), base)
    kept = 1 - sum(float((found[m] - d).square().sum()) for m, d in wanted.items()) / sum(
        float(d.square().sum()) for d in wanted.values()
    )
    assert 0.7 <= kept + 1e-6 < 0.72
    assert len(set(load_lora(work.folder / "out.safetensors").ranks.values())) > 3


# --- in a step, and recipes ----------------------------------------------------------------------------------------------------


@pytest.fixture
def two(work, base) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A tuned model in ComfyUI's form and its base in diffusers'."""
    tuned = tuned_by(base, 0.01)
    WRITERS["comfyui"](work.folder / "tuned", tuned)
    write_shards(work.folder / "base", base)
    return tuned, base


PAIR = {"extract": "tuned.safetensors", "base": "base"}


def test_a_source_beside_a_lora(work, two):
    one = lora(3, 2, None, SHAPES)
    write(work.folder / "me.safetensors", one)
    loras = [
        {"lora": PAIR, "ratio": 0.5, "blocks": {"to_q": 0.0}, "layers": {1: 2.0}},
        {"lora": "me.safetensors", "ratio": -1.0},
    ]
    work.zit("run", work.job({"name": "a", "loras": loras, "save": {"dtype": "fp32"}, "confirm_size": True})).ok()
    strengths = {m: 0.5 * (0.0 if m.endswith("to_q") else 1.0) * (2.0 if m.startswith("layers.1.") else 1.0) for m in SHAPES}
    wanted = weighted_sum([(difference(*two), strengths), (deltas(one), -1.0)])
    found = read_deltas(work.out / "merged_cat_a.safetensors")
    assert all(relative(found[m], wanted[m]) < 1e-5 for m in SHAPES)


def test_into_a_bake_on_another_base(work, two):
    """What was learned on one model, put into another without a LoRA in between."""
    other = model(5, torch.float32)
    write_folder(work.folder / "other", other)
    step = {"name": "a", "keep": False, "loras": [{"lora": PAIR, "ratio": 0.5}], "bake": {"base": "other"}}
    work.zit("run", work.job(step)).ok()
    found = read(work.out / "merged_cat_a_baked")
    for module, delta in difference(*two).items():
        wanted = other[f"{module}.weight"].double() + 0.5 * delta
        assert torch.allclose(found[f"{module}.weight"].double(), wanted, rtol=0, atol=3e-7)


def test_a_difference_goes_into_the_base_that_it_is_from(work, two):
    """One file with a text encoder beside is both: the recipe has one hash of it."""
    tuned, base = two
    write_all_in_one(work.folder / "all", base)
    pair = {"extract": "tuned.safetensors", "base": "all.safetensors"}
    bake = {"base": "all.safetensors", "format": "comfyui"}
    config = work.job({"name": "a", "keep": False, "loras": [{"lora": pair, "ratio": 1.0}], "bake": bake})
    work.zit("run", config).ok()
    made = work.out / "merged_cat_a_baked.safetensors"
    found = read(made, "model.diffusion_model.")
    assert all(torch.equal(found[f"{m}.weight"], tuned[f"{m}.weight"]) for m in SHAPES)  # base + (tuned - base)
    recipe = json.loads(read_metadata(made)[RECIPE_KEY])
    assert recipe["steps"][0]["loras"][0]["base_sha256"] == recipe["steps"][0]["bake"]["sha256"]
    work.zit("run", work.write(recipe, "recipe.yaml"), "--output-dir", work.folder / "again").ok()
    assert (work.folder / "again" / made.name).read_bytes() == made.read_bytes()


@pytest.mark.parametrize("rank", [8, {"energy": 0.5}])
def test_a_recipe_makes_the_same_bytes(work, two, rank):
    work.zit("run", work.job({"name": "a", "loras": [{"lora": PAIR, "ratio": 1.0}], "rank": rank})).ok()
    made = work.out / "merged_cat_a.safetensors"
    recipe = work.recipe(made, "elsewhere/recipe.yaml")
    assert str(work.folder) not in recipe.read_text()
    attic = work.folder / "attic"
    attic.mkdir()
    for name in ("tuned.safetensors", "base"):
        (work.folder / name).rename(attic / name)
    assert work.again(recipe, "--loras", attic).read_bytes() == made.read_bytes()


@pytest.mark.parametrize("which", ["tuned", "base"])
def test_a_recipe_of_other_models_is_refused(work, two, which):
    work.zit("run", work.job({"name": "a", "loras": [{"lora": PAIR, "ratio": 1.0}], "rank": 8})).ok()
    recipe = work.recipe(work.out / "merged_cat_a.safetensors")
    if which == "tuned":
        write_one(work.folder / "tuned.safetensors", native(model(9)))
    else:
        shutil.rmtree(work.folder / "base")
        write_shards(work.folder / "base", model(9))
    message = work.zit("run", recipe, "--output-dir", work.folder / "again").refused()
    assert "does not hold the tensors of the recipe" in message and which in message


@pytest.mark.parametrize("which", [None, "tuned", "base"])
def test_what_is_there_is_kept_until_a_model_changes(work, two, which, monkeypatch):
    config = work.job({"name": "a", "loras": [{"lora": PAIR, "ratio": 1.0}], "rank": 8})
    work.zit("run", config).ok()
    made = work.out / "merged_cat_a.safetensors"
    before = made.stat().st_mtime_ns
    if which == "tuned":
        write_one(work.folder / "tuned.safetensors", native(tuned_by(two[1], 0.01, 8)))
    elif which == "base":
        write_shards(work.folder / "base", tuned_by(two[1], 0.01, 9))
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))  # what is kept needs no room
    work.zit("run", config).ok()
    assert (made.stat().st_mtime_ns == before) is (which is None)


def test_the_recipe_names_both_models_and_their_hashes(work, two):
    extract(work, work.folder / "tuned.safetensors", work.folder / "base").ok()
    metadata = read_metadata(work.folder / "out.safetensors")
    (recipe,) = (json.loads(v) for v in metadata.values() if v.startswith("{") and '"steps"' in v)
    (entry,) = recipe["steps"][0]["loras"]
    assert entry["lora"] == PAIR
    assert (
        all(re.fullmatch("[0-9a-f]{64}", entry[key]) for key in ("sha256", "base_sha256"))
        and entry["sha256"] != entry["base_sha256"]
    )


# --- what is refused -----------------------------------------------------------------------------------------------------------


def test_the_same_model_twice(work, two):
    for form in (work.folder / "base", "base"):
        message = extract(work, form, work.folder / "base").refused()
        assert "base and its base are one model: give the one that was trained" in message


def test_two_models_of_other_shapes(work, two):
    shapes = producers.small_shapes(dim=128, ffn=344, temb=128, cap=32, n_layers=2)
    write_folder(work.folder / "other", model(1, shapes=shapes))
    message = extract(work, work.folder / "tuned.safetensors", work.folder / "other").refused()
    assert "noise_refiner.0.feed_forward.w1.weight is 341 x 128 in tuned.safetensors, 344 x 128 in other" in message
    more = producers.small_shapes(dim=128, ffn=341, temb=128, cap=32, n_layers=3)
    write_folder(work.folder / "deep", model(1, shapes=more))
    message = extract(work, work.folder / "tuned.safetensors", work.folder / "deep").refused()
    assert "is not there in tuned.safetensors" in message and "the two are not a fine-tune and its base" in message


@pytest.mark.parametrize(
    "one, other, flag, says",
    [
        ("nowhere", "base", "FINETUNED", "is not there (looked in "),
        ("tuned.safetensors", "nowhere", "--base", "is not there (looked in "),
        ("me.safetensors", "base", "", "is a LoRA, no whole model"),
        ("tuned.safetensors", "me.safetensors", "", "is a LoRA, no whole model"),
        ("tuned.safetensors", "trainer", "--base", "trainer needs a training process"),
    ],
)
def test_the_command_names_what_is_wrong(work, two, one, other, flag, says):
    write(work.folder / "me.safetensors", lora(2, 0, None, SHAPES))
    message = extract(work, Path(one), Path(other)).refused()
    assert says in message and message.startswith(flag), message
    assert not (work.folder / "out.safetensors").exists()


@pytest.mark.parametrize("which", ["tuned", "base"])
def test_numbers_that_are_none(work, two, which):
    name = "layers.1.feed_forward.w2.weight"
    spoiled = dict(two[which == "base"])
    spoiled[name] = spoiled[name].clone()
    spoiled[name][3, 4] = float("nan")
    if which == "tuned":
        write_one(work.folder / "tuned.safetensors", native(spoiled))
    else:
        write_shards(work.folder / "base", spoiled)
    message = extract(work, work.folder / "tuned.safetensors", work.folder / "base").refused()
    assert f"{name} holds NaN or infinity" in message and "get the two models again" in message
    assert not [p for p in work.folder.iterdir() if p.name.startswith("out")]


@pytest.mark.parametrize(
    "lora_keys, loc", [({"extract": "tuned.safetensors"}, "base"), ({"base": "base"}, "extract"), (PAIR | {"x": 1}, "x")]
)
def test_locations_in_a_config(work, two, lora_keys, loc):
    message = work.zit("check", work.job({"name": "a", "loras": [{"lora": lora_keys, "ratio": 1.0}]})).refused()
    assert message.startswith(f"process[0].steps[0].loras[0].lora.{loc}: "), message


def test_a_model_that_is_baked_from_a_difference_tells_what_it_lacks(work):
    base = model()
    tuned = dict(base)
    tuned["layers.0.attention_norm1.weight"] = tuned["layers.0.attention_norm1.weight"] + 1
    tuned["layers.0.attention.to_q.weight"] = tuned["layers.0.attention.to_q.weight"] * 1.5
    write_folder(work.folder / "base", base)
    write_folder(work.folder / "tuned", tuned)
    loras = [{"lora": {"extract": "tuned", "base": "base"}, "ratio": 1.0}]
    said = work.zit("run", work.job({"name": "a", "keep": False, "loras": loras, "bake": {"base": "base"}})).ok()
    assert "of what tuned changed lies in norms, biases and tokens, which no LoRA can hold" in " ".join(said.split())


def test_what_each_rank_holds_is_told_of_the_weighed_change(work):
    """With a strength of its own in each part the last rank holds what the check says of the file."""
    base = model()
    torch.manual_seed(0)
    tuned = {n: t + 0.05 * torch.randn_like(t.float()).to(t.dtype) if n.endswith("to_q.weight") else t for n, t in base.items()}
    write_folder(work.folder / "base", base)
    write_folder(work.folder / "tuned", tuned)
    lora = {"lora": {"extract": "tuned", "base": "base"}, "ratio": 0.5, "layers": {"0": 3.0, "1": 0.25}}
    said = " ".join(work.zit("run", work.job({"name": "a", "rank": 24, "loras": [lora]})).ok().split())
    kept = re.search(r"([\d.]+) % of the energy kept", said)
    last = re.search(r"a file of each rank holds: .* 24 ([\d.]+) %", said)
    assert kept and last and float(last[1]) == pytest.approx(float(kept[1]), abs=0.2), said
