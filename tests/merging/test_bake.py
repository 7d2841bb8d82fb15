"""Whole models with a merge in them, against base + delta in float64."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import (
    BESIDE,
    CONFIG,
    INDEX,
    ONE,
    SHAPES,
    WRITERS,
    model,
    native,
    read,
    write_all_in_one,
    write_folder,
    write_one,
    write_shards,
)
from clients import comfyui_source
from oracles import methods, producers
from oracles.dense import best_error, read_deltas, read_metadata, weighted_sum
from pairs import Lora, Pair, deltas, lora, write
from safetensors.torch import load_file
from torch import Tensor
from workspace import Workspace

from extensions_built_in.zit_merge import merge
from extensions_built_in.zit_merge.cli.main import main
from extensions_built_in.zit_merge.errors import ZitMergeError
from extensions_built_in.zit_merge.files import atomic
from extensions_built_in.zit_merge.formats import checkpoint_writer, safetensors_writer
from extensions_built_in.zit_merge.formats.checkpoint import open_checkpoint
from extensions_built_in.zit_merge.formats.metadata import RECIPE_KEY
from extensions_built_in.zit_merge.merging.runner import run_plans
from extensions_built_in.zit_merge.planning import outputs

ROOT = Path(__file__).parents[2]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16}
SOME = {m: s for m, s in SHAPES.items() if m.startswith("layers.") or m in ("cap_embedder.1", "context_refiner.1.attention.to_q")}
OUT = "merged_cat_a_baked"
ME = {"lora": "me.safetensors", "ratio": 1.0}
posix = pytest.mark.skipif(os.name == "nt", reason="not on Windows")

FORMS = {"diffusers": "", "comfyui": ".safetensors"}  # format -> ending of its output


@pytest.fixture(scope="module")
def base() -> dict[str, Tensor]:
    return model()


@pytest.fixture(scope="module")
def me() -> Lora:
    return lora(4, 1, 2.0, SOME)


@pytest.fixture(scope="module")
def style() -> Lora:
    return lora(3, 2, None, SHAPES)


def places(tensors: Tensor) -> Tensor:
    """The numbers of a 16 bit dtype as integers that count in units of the last place."""
    bits = tensors.view(INTEGERS[tensors.dtype]).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def check(
    found: Mapping[str, Tensor], base: Mapping[str, Tensor], change: Mapping[str, Tensor], dtype: torch.dtype | None = None
):
    """Every tensor is round(base + change): a number of 10 000 may be one unit off, for the sum is taken in float32."""
    assert found.keys() == base.keys()
    off = count = 0
    for name, old in base.items():
        new, delta = found[name], change.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        wanted_dtype = dtype or old.dtype
        assert new.dtype == wanted_dtype and new.shape == old.shape, name
        if delta is None and wanted_dtype == old.dtype:
            assert torch.equal(new.view(torch.uint8), old.contiguous().view(torch.uint8)), name
            continue
        exact = old.double() if delta is None else old.double() + delta
        if wanted_dtype == torch.float32:
            limit = 8 * 2.0**-24 * (old.double().abs() + (0 if delta is None else float(delta.abs().max())))
            assert ((new.double() - exact).abs() <= limit).all(), name
        else:
            distance = (places(new) - places(exact.to(wanted_dtype))).abs()
            tiny = 2.0**-22 * (old.double().abs() + (0 if delta is None else float(delta.abs().max())))
            assert ((distance <= 1) | ((new.double() - exact).abs() <= tiny)).all(), name  # where the two nearly cancel
            off, count = off + int((distance > 0).sum()), count + distance.numel()
    assert off <= 1e-4 * count, (off, count)


def bake(work: Workspace, *loras: str, base: Path, out: str, ratio: object = 1.0, **flags: object):
    ratios = ratio if isinstance(ratio, list) else [ratio]
    words = [f"--{key.replace('_', '-')}={value}" for key, value in flags.items()]
    return work.zit("bake", *loras, "--base", base, "-o", out, "--ratio", *ratios, "--shapes", "free", "--device", "cpu", *words)


def everything(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix != ".html")


def content(path: Path) -> dict[str, bytes]:
    """File -> bytes, of a folder or a file."""
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return {p.name: p.read_bytes() for p in files}


# --- the numbers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("of_base", [*WRITERS, "all in one"])
def test_every_form_into_every_form(work, base, me, of_base, form):
    """And diffusers' and ComfyUI's names are those that the base had where it had them."""
    path = {**WRITERS, "all in one": write_all_in_one}[of_base](work.folder / "base", base)
    write(work.folder / "me.safetensors", me)
    bake(work, "me.safetensors", base=path, out=f"out{FORMS[form]}", ratio=0.7).ok()
    made = work.folder / f"out{FORMS[form]}"
    prefix = "model.diffusion_model." if of_base in ("prefixed", "all in one") and form == "comfyui" else ""
    check(read(made, prefix), base, weighted_sum([(deltas(me), 0.7)]))
    if form == "comfyui":
        found = load_file(made)
        beside = {k: t for k, t in found.items() if k in BESIDE}
        assert found.keys() - BESIDE.keys() == native(base, prefix).keys()
        assert beside.keys() == (BESIDE.keys() if of_base == "all in one" else set())
        assert all(torch.equal(t, BESIDE[k]) and t.dtype == BESIDE[k].dtype for k, t in beside.items())
    else:
        config = json.loads((made / "config.json").read_text())
        has_one = of_base in ("folder", "shards", "repository")
        assert config == (CONFIG if has_one else {k: v for k, v in CONFIG.items() if k != "mine"})
        assert everything(made) == ["config.json", ONE]
    assert not [p for p in work.folder.rglob("*") if ".part" in p.name]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of_base", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_every_dtype_into_every_dtype(work, me, of_base, dtype, form):
    old = model(3, DTYPES[of_base])
    path = WRITERS["comfyui"](work.folder / "base", old)
    write(work.folder / "me.safetensors", me)
    bake(work, "me.safetensors", base=path, out=f"out{FORMS[form]}", ratio=-1.3, dtype=dtype).ok()
    check(read(work.folder / f"out{FORMS[form]}"), old, weighted_sum([(deltas(me), -1.3)]), DTYPES[dtype])


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_tensors_keep_their_own_dtypes(work, me, rounding):
    """A base of several; float64 too, to which a sum in float32 is added."""
    old = model(4, torch.float32)
    kinds = {"norm": torch.float32, "attention": torch.float16, "adaLN": torch.float64}
    old = {k: t.to(next((d for part, d in kinds.items() if part in k), torch.bfloat16)) for k, t in old.items()}
    write(work.folder / "me.safetensors", me)
    bake(work, "me.safetensors", base=write_folder(work.folder / "base", old), out="out", rounding=rounding).ok()
    found = read(work.folder / "out")
    assert {k: t.dtype for k, t in found.items()} == {k: t.dtype for k, t in old.items()}
    for name, delta in deltas(me).items():
        key = f"{name}.weight"
        step = {torch.float16: 2**-11, torch.bfloat16: 2**-8}.get(old[key].dtype, 2**-22) * (1 + (rounding == "stochastic"))
        wanted = old[key].double() + delta
        assert ((found[key].double() - wanted).abs() <= step * wanted.abs() + 2**-22).all(), key


def test_q_k_and_v_of_several_dtypes_become_the_widest(work, base, me):
    old = base | {k: t.float() for k, t in base.items() if k.endswith("to_k.weight")}
    write(work.folder / "me.safetensors", me)
    bake(work, "me.safetensors", base=write_folder(work.folder / "base", old), out="out.safetensors").ok()
    qkv = load_file(work.folder / "out.safetensors")["layers.0.attention.qkv.weight"]
    assert qkv.dtype == torch.float32
    wanted = torch.cat(
        [old[f"layers.0.attention.to_{x}.weight"].double() + me[f"layers.0.attention.to_{x}"].delta for x in "qkv"]
    )
    assert torch.allclose(qkv.double(), wanted, rtol=1e-6, atol=1e-7)


def test_several_loras_with_weights_of_blocks_and_layers(work, base, me, style):
    path = WRITERS["prefixed"](work.folder / "base", base)
    write(work.folder / "me.safetensors", me)
    write(work.folder / "style.safetensors", style)
    words = ["me.safetensors", "style.safetensors", "--base", path, "-o", "out", "--ratio", 1.0, -0.5, "--to_q", 2.0, 0.0]
    work.zit("bake", *words, "--layers", "0=1,1-29=0.25", "--shapes", "free", "--device", "cpu").ok()

    def weights(ratio: float, to_q: float) -> dict[str, float]:
        layers = {m: 0.25 if m.startswith("layers.1.") else 1.0 for m in SHAPES}
        return {m: ratio * layers[m] * (to_q if m.endswith("to_q") else 1.0) for m in SHAPES}

    check(read(work.folder / "out"), base, weighted_sum([(deltas(me), weights(1.0, 2.0)), (deltas(style), weights(-0.5, 0.0))]))


@pytest.mark.parametrize(
    "producer",
    [
        "ai-toolkit-lokr",
        "ai-toolkit-lokr-split",
        "lycoris-lokr-both",
        "lycoris-full",
        "lycoris-loha",
        "musubi-convert-other",
    ],
)
def test_inputs_of_other_kinds(work, base, producer):
    made = producers.PRODUCERS[producer].make(SHAPES, 4, 0, torch.float32)
    producers.save(made, work.folder / "me.safetensors")
    bake(
        work, "me.safetensors", base=write_folder(work.folder / "base", base), out="out.safetensors", ratio=0.5, drop="bias"
    ).ok()
    check(read(work.folder / "out.safetensors"), base, weighted_sum([(made.deltas, 0.5)]))


def test_a_method_that_is_not_linear(work, base):
    """ties, by the definition on dense matrices."""
    few = {m: SHAPES[m] for m in ("layers.0.attention.to_q", "layers.1.feed_forward.w2")}
    one, other = lora(6, 1, None, few), lora(6, 2, None, few)
    write(work.folder / "me.safetensors", one)
    write(work.folder / "style.safetensors", other)
    path = write_folder(work.folder / "base", base)
    flags = {"method": "ties", "params": "density=0.6"}
    bake(work, "me.safetensors", "style.safetensors", base=path, out="out", ratio=[1.0, 0.5], **flags).ok()
    wanted = {m: methods.ties([one[m].delta, 0.5 * other[m].delta], 0.6) for m in few}
    check(read(work.folder / "out"), base, wanted)


def test_a_rank_cut_is_the_best_of_its_rank(work, base, me, style):
    write(work.folder / "me.safetensors", me)
    write(work.folder / "style.safetensors", style)
    old = {k: t.float() for k, t in base.items()}
    path = write_folder(work.folder / "base", old)
    bake(work, "me.safetensors", "style.safetensors", base=path, out="out", ratio=[1.0, 1.0], rank=3).ok()
    found, whole = read(work.folder / "out"), weighted_sum([(deltas(me), 1.0), (deltas(style), 1.0)])
    for module, delta in whole.items():
        got = found[f"{module}.weight"].double() - old[f"{module}.weight"].double()
        least = best_error(delta, 3)
        assert float((got - delta).norm()) <= least * 1.001 + 1e-5 * float(delta.norm()), module
        assert float(torch.linalg.svdvals(got)[3]) < 1e-4 * float(delta.norm())


@pytest.mark.parametrize("rank", [{"energy": 0.8}, {"size_mb": 0.2}, {"size_mb": 0.2, "uniform": False}], ids=str)
@pytest.mark.parametrize("keep", [True, False])
def test_a_rank_that_follows_from_numbers_is_that_of_the_lora(work, base, me, style, rank, keep):
    """The model holds what the LoRA of the step holds, whatever the size of a number in its file."""
    write(work.folder / "me.safetensors", me)
    write(work.folder / "style.safetensors", style)
    old = {k: t.float() for k, t in base.items()}
    path = write_folder(work.folder / "base", old)
    rule = {k: v for k, v in rank.items() if k != "uniform"}
    step = {"name": "a", "loras": [ME, {"lora": "style.safetensors", "ratio": 1.0}], "rank": rule}
    step["save"] = {"dtype": "bf16", "uniform": rank.get("uniform", True)}
    work.zit("run", work.job(step, name="lora.yaml")).ok()
    of_file = {m: torch.linalg.matrix_rank(d, rtol=1e-9) for m, d in read_deltas(work.out / "merged_cat_a.safetensors").items()}
    shutil.rmtree(work.out)
    work.zit("run", work.job(step | {"keep": keep, "bake": {"base": str(path)}})).ok()
    found = read(work.out / OUT)
    for module, wanted in of_file.items():
        got = found[f"{module}.weight"].double() - old[f"{module}.weight"].double()
        sigma = torch.linalg.svdvals(got)
        assert int((sigma > 1e-4 * sigma[0]).sum()) == int(wanted), module


@pytest.mark.parametrize("keep", [True, False])
def test_an_earlier_step_goes_in(work, base, me, style, keep):
    write(work.folder / "me.safetensors", me)
    write(work.folder / "style.safetensors", style)
    path = write_folder(work.folder / "base", base)
    first = {"name": "first", "loras": [ME | {"ratio": 0.5}], "keep": keep, "save": {"dtype": "fp32"}}
    second = {"name": "a", "keep": False, "loras": [{"lora": "first", "ratio": 2.0}, {"lora": "style.safetensors", "ratio": 0.3}]}
    config = work.job(first, second | {"bake": {"base": str(path)}})
    work.zit("run", config).ok()
    check(read(work.out / OUT), base, weighted_sum([(deltas(me), 1.0), (deltas(style), 0.3)]))
    assert work.files() == sorted([OUT, *(["merged_cat_first.safetensors"] if keep else [])])
    before = content(work.out / OUT)
    assert f"kept {OUT} (made before by the same recipe)" in work.zit("run", config).ok()
    write(work.folder / "style.safetensors", lora(3, 9, None, SHAPES))
    work.zit("run", config).ok()
    assert content(work.out / OUT) != before


def test_an_earlier_step_whose_lora_is_up_to_date_but_not_its_model(work, base, me, style):
    """The step that feeds it is not kept: it has to be made again for the model alone."""
    write(work.folder / "me.safetensors", me)
    path = write_folder(work.folder / "base", base)
    first = {"name": "first", "loras": [ME], "keep": False}
    second = {"name": "a", "loras": [{"lora": "first", "ratio": 1.0}], "bake": {"base": str(path)}}
    work.zit("run", work.job(first, second)).ok()
    lora_before = (work.out / "merged_cat_a.safetensors").stat()
    write_folder(path, model(8))
    work.zit("run", work.job(first, second)).ok()
    check(read(work.out / OUT), model(8), weighted_sum([(read_deltas(work.out / "merged_cat_a.safetensors"), 1.0)]))
    assert (work.out / "merged_cat_a.safetensors").stat().st_mtime_ns == lora_before.st_mtime_ns


def test_a_lora_that_changes_nothing_copies_the_model(work, base, me):
    write(work.folder / "me.safetensors", me)
    path = write_folder(work.folder / "base", base)
    ran = bake(work, "me.safetensors", base=path, out="out", ratio=0.0)
    assert ran.code == 0
    check(read(work.folder / "out"), base, {})


def test_rounding_of_several_seeds(work, base, me):
    write(work.folder / "me.safetensors", me)
    path = WRITERS["comfyui"](work.folder / "base", base)
    for name, form, seed in (("a", "", 0), ("b", "", 0), ("c", ".safetensors", 0), ("d", "", 1)):
        bake(work, "me.safetensors", base=path, out=f"{name}{form}", rounding="stochastic", seed=seed).ok()
    a, b, c, d = (read(work.folder / n) for n in ("a", "b", "c.safetensors", "d"))
    assert all(torch.equal(a[k], b[k]) and torch.equal(a[k], c[k]) for k in a)  # the draws of a tensor are the same in every form
    assert any(not torch.equal(a[k], d[k]) for k in a)
    for module, delta in deltas(me).items():
        exact = base[f"{module}.weight"].double() + delta
        got = a[f"{module}.weight"].double()
        assert ((got - exact).abs() <= 2**-7 * exact.abs() + 1e-30).all()  # a neighbour


def test_every_tensor_has_draws_of_its_own(work, me):
    """Equal numbers in two tensors are rounded independently: else the error of one would be that of the other."""
    old = model(3, torch.float32)
    q, k = (f"layers.0.attention.to_{x}.weight" for x in "qk")
    old[k] = old[q].clone()
    write(work.folder / "me.safetensors", me)
    flags = {"rounding": "stochastic", "dtype": "bf16"}
    assert bake(work, "me.safetensors", base=write_folder(work.folder / "base", old), out="out", ratio=0.0, **flags).code == 0
    found = read(work.folder / "out")
    ups = {name: found[name].double() > old[name].double() for name in (q, k)}
    # both go up or both down with p^2 + (1 - p)^2, whose mean over p from 0 to 1 is 2/3; 8 standard deviations
    assert float((ups[q] == ups[k]).double().mean()) == pytest.approx(2 / 3, abs=0.03)
    assert not torch.equal(found[q], found[k])


# --- what is measured ----------------------------------------------------------------------------------------------------------


def run_bake(folder: Path, loras: list, path: Path, out: str, rounding: str = "nearest"):
    """The verdict of a bake."""
    described = merge(loras, shapes="free", device="cpu")
    form = "comfyui" if out.endswith(".safetensors") else "diffusers"
    planned = described.planned_model(folder / out, {"base": str(path), "format": form, "rounding": rounding})
    (done,) = run_plans(planned.plans, planned.device)
    return done.baked.verdict


def survived(found: Mapping[str, Tensor], base: Mapping[str, Tensor], change: Mapping[str, Tensor]) -> tuple[float, float]:
    """(<written - base, change> / <change, change>, |written - base - change| / |change|) in float64."""
    crossed = wanted = missed = 0.0
    for module, delta in change.items():
        got = found[f"{module}.weight"].double() - base[f"{module}.weight"].double()
        crossed, wanted = crossed + float((got * delta).sum()), wanted + float(delta.square().sum())
        missed += float((got - delta).square().sum())
    return crossed / wanted, math.sqrt(missed / wanted)


@pytest.mark.parametrize(
    "size, rounding", [(1e-1, "nearest"), (2e-3, "nearest"), (3e-4, "nearest"), (3e-4, "stochastic"), (2e-3, "stochastic")]
)
def test_what_survives_is_measured(tmp_path, base, size, rounding):
    weak = lora(4, 1, None, SOME, up=size)
    write(tmp_path / "me.safetensors", weak)
    path = write_folder(tmp_path / "base", base)
    verdict = run_bake(tmp_path, [(tmp_path / "me.safetensors", 1.0)], path, "out", rounding)
    share, error = survived(read(tmp_path / "out"), base, deltas(weak))
    (reason,) = verdict.reasons
    assert reason["share"] == pytest.approx(share, rel=1e-3)
    assert verdict.error == pytest.approx(error, rel=1e-3)
    assert verdict.got[0] == pytest.approx(share, rel=1e-3)  # one LoRA: its strength is the share
    if rounding == "stochastic":
        assert share == pytest.approx(1, abs=0.1) and verdict.status == "right"
    else:
        assert verdict.status == ("off" if size < 1e-3 else "right")
        assert (share < 0.9) is (size < 1e-3)


def test_the_strengths_of_several_are_those_of_least_squares(tmp_path, base, me, style):
    write(tmp_path / "me.safetensors", me)
    write(tmp_path / "style.safetensors", style)
    path = write_folder(tmp_path / "base", base)
    loras = [(tmp_path / "me.safetensors", 0.8), (tmp_path / "style.safetensors", -0.4)]
    verdict = run_bake(tmp_path, loras, path, "out.safetensors")
    found = read(tmp_path / "out.safetensors")
    got = torch.cat([(found[f"{m}.weight"].double() - base[f"{m}.weight"].double()).flatten() for m in SHAPES])
    columns = [
        torch.cat([d[m].flatten() if m in d else torch.zeros(SHAPES[m][0] * SHAPES[m][1]).double() for m in SHAPES])
        for d in (deltas(me), deltas(style))
    ]
    wanted = torch.linalg.lstsq(torch.stack(columns, 1), got).solution
    assert verdict.got == pytest.approx(wanted.tolist(), rel=1e-3)
    assert verdict.asked == pytest.approx([0.8, -0.4])


def test_nothing_is_asked(tmp_path, base, me):
    write(tmp_path / "me.safetensors", me)
    verdict = run_bake(tmp_path, [(tmp_path / "me.safetensors", 0.0)], write_folder(tmp_path / "base", base), "out")
    assert verdict.status == "empty"


def test_the_command_tells_what_rounding_took(work, base):
    weak = lora(4, 1, None, SOME, up=3e-4)
    write(work.folder / "me.safetensors", weak)
    ran = bake(work, "me.safetensors", base=write_folder(work.folder / "base", base), out="out")
    share, _ = survived(read(work.folder / "out"), base, deltas(weak))
    assert f"{100 * share:.1f} %" in " ".join((ran.out + ran.err).split())
    assert "stochastic" in ran.out + ran.err  # the remedy


# --- recipes, and what is there already ----------------------------------------------------------------------------------------


@pytest.fixture
def job(work, base, me, style):
    """A base in a folder and two LoRAs; config(**bake) makes a job that bakes them, beside the LoRA or alone."""
    write_shards(work.folder / "base", base)
    write(work.folder / "me.safetensors", me)
    write(work.folder / "style.safetensors", style)

    def config(keep: bool = False, base: str = "base", **keys: object) -> Path:
        loras = [ME | {"ratio": 0.7}, {"lora": "style.safetensors", "ratio": 0.2, "blocks": {"to_q": 0.5}}]
        return work.job({"name": "a", "keep": keep, "loras": loras, "bake": {"base": base, **keys}})

    return config


def made_by(work: Workspace, form: str) -> Path:
    return work.out / f"{OUT}{FORMS[form]}"


def recipe_of(work: Workspace, made: Path, name: str = "recipe.yaml") -> Path:
    """The recipe in the metadata of a model, as a file."""
    file = next(iter(sorted(made.glob("*.safetensors")))) if made.is_dir() else made
    return work.write(json.loads(read_metadata(file)[RECIPE_KEY]), name)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("form", FORMS)
def test_a_recipe_makes_the_same_bytes(work, job, form, rounding):
    work.zit("run", job(format=form, rounding=rounding, seed=7, dtype="fp16")).ok()
    made = made_by(work, form)
    recipe = recipe_of(work, made, "elsewhere/recipe.yaml")
    again = work.folder / "again"
    attic = work.folder / "attic"
    attic.mkdir()
    for name in ("me.safetensors", "style.safetensors", "base"):
        (work.folder / name).rename(attic / name)
    work.zit("run", recipe, "--output-dir", again, "--loras", attic).ok()
    assert everything(again) == sorted(str(p.relative_to(work.out)) for p in [made, *(made.rglob("*") if made.is_dir() else ())])
    assert content(again / made.name) == content(made)


def test_a_recipe_takes_the_base_in_any_form(work, job, base):
    """The hash is of the tensors: the same model as one file makes the same bytes."""
    work.zit("run", job(format="comfyui")).ok()
    recipe = recipe_of(work, made_by(work, "comfyui"))
    shutil.rmtree(work.folder / "base")
    WRITERS["comfyui"](work.folder / "base", base).rename(work.folder / "base")
    work.zit("run", recipe, "--output-dir", work.folder / "again").ok()
    assert content(work.folder / "again" / f"{OUT}.safetensors") == content(made_by(work, "comfyui"))


@pytest.mark.parametrize("form", FORMS)
def test_another_base_than_the_recipes_is_refused(work, job, form):
    work.zit("run", job(format=form)).ok()
    recipe = recipe_of(work, made_by(work, form))
    shutil.rmtree(work.folder / "base")
    write_shards(work.folder / "base", model(1))
    message = work.zit("run", recipe, "--output-dir", work.folder / "again").refused()
    assert "base does not hold the tensors of the recipe (sha256 " in message
    assert not (work.folder / "again").exists() or everything(work.folder / "again") == []


@pytest.mark.parametrize("form", FORMS)
def test_the_metadata(work, job, form):
    work.zit("run", job(format=form)).ok()
    made = made_by(work, form)
    metadata = read_metadata(made / ONE if form == "diffusers" else made)
    assert metadata["modelspec.architecture"] == "Z-Image"
    assert metadata["modelspec.merged_from"].startswith("base, me")
    assert not [key for key in metadata if key.startswith("ss_")]
    (step,) = json.loads(metadata[RECIPE_KEY])["steps"]
    assert step["keep"] is False
    assert step["bake"]["sha256"] == open_checkpoint(work.folder / "base", shapes="free").sha256()
    assert str(work.folder) not in json.dumps(metadata)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keep", [True, False])
def test_what_is_there_is_kept(work, job, form, keep):
    config = job(keep, format=form)
    work.zit("run", config).ok()
    names = sorted([made_by(work, form).name, *(["merged_cat_a.safetensors"] if keep else [])])
    assert work.files() == names
    before = {p: p.stat().st_mtime_ns for p in work.out.rglob("*.safetensors")}
    work.zit("run", config).ok()
    assert {p: p.stat().st_mtime_ns for p in work.out.rglob("*.safetensors")} == before
    assert work.files() == names


CHANGES = {
    "the base": lambda work, job: write_shards(work.folder / "base", model(1)),
    "one number of the base": lambda work, job: write_shards(
        work.folder / "base", (t := model()) | {"x_pad_token": t["x_pad_token"] + 1}
    ),
    "a LoRA": lambda work, job: write(work.folder / "style.safetensors", lora(3, 99, None, SHAPES)),
    "rounding": lambda work, job: {"rounding": "stochastic"},
    "dtype": lambda work, job: {"dtype": "fp32"},
    "a shard that is gone": lambda work, job: (made_by(work, "diffusers") / ONE).unlink(),
    "a file cut short": lambda work, job: os.truncate(made_by(work, "diffusers") / ONE, 100_000),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_baked_again(work, job, change):
    work.zit("run", job()).ok()
    made = made_by(work, "diffusers")
    before = made.stat().st_ino
    keys = CHANGES[change](work, job)
    if change in ("a shard that is gone", "a file cut short"):  # it can't be told whose it is
        assert "was not written by this step of this job: move it away" in work.zit("run", job()).refused()
        return
    work.zit("run", job(**(keys if isinstance(keys, dict) else {}))).ok()
    assert made.stat().st_ino != before
    assert everything(work.out) == [OUT, f"{OUT}/config.json", f"{OUT}/{ONE}"]


def test_an_all_in_one_base_is_up_to_date_in_the_form_that_drops_what_stands_beside(work, job, base):
    write_all_in_one(work.folder / "all", base)
    for form in FORMS:
        config = job(base="all.safetensors", format=form)
        work.zit("run", config).ok()
        before = made_by(work, form).stat().st_ino
        work.zit("run", config).ok()
        assert made_by(work, form).stat().st_ino == before
    write_one(work.folder / "all.safetensors", native(base, "model.diffusion_model.") | BESIDE | {"vae.steps": torch.tensor(8)})
    for form in FORMS:  # only the file that holds it is made again
        before = made_by(work, form).stat().st_ino
        work.zit("run", job(base="all.safetensors", format=form)).ok()
        assert (made_by(work, form).stat().st_ino == before) is (form == "diffusers")


# --- shards --------------------------------------------------------------------------------------------------------------------


def test_shards_and_their_index(work, base, me, monkeypatch):
    limit = 600_000
    shards = checkpoint_writer._shards
    monkeypatch.setattr(checkpoint_writer, "_shards", lambda tensors, _: shards(tensors, limit))
    write(work.folder / "me.safetensors", me)
    bake(work, "me.safetensors", base=WRITERS["comfyui"](work.folder / "base", base), out="out").ok()
    made = work.folder / "out"
    check(read(made), base, deltas(me))
    files = sorted(p.name for p in made.glob("*.safetensors"))
    count = len(files)
    assert count > 3 and files == [f"diffusion_pytorch_model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    held = [sum(t.nbytes for t in load_file(made / name).values()) for name in files]
    largest = max(t.nbytes for t in base.values())
    assert max(held) <= max(limit, largest) and all(a + largest > limit for a in held[:-1])
    index = json.loads((made / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(held) and index["weight_map"].keys() == base.keys()
    before = made.stat().st_ino
    bake(work, "me.safetensors", base=work.folder / "base.safetensors", out="out").ok()  # each shard tells the recipe
    assert made.stat().st_ino == before


# --- what is refused -----------------------------------------------------------------------------------------------------------


def test_the_command_names_its_flags(work, job, base):
    job()
    for words, flag, says in (
        ({"base": "nowhere"}, "--base", "is not there (looked in "),
        ({"base": "me.safetensors"}, "--base", "is a LoRA"),
        ({"out": "a.safetensors", "format": "diffusers"}, "--out", "diffusers is a folder"),
        ({"out": "a", "format": "comfyui"}, "--out", "comfyui is one .safetensors file"),
        ({"format": "kohya"}, "--format", "diffusers, comfyui"),
        ({"dtype": "int8"}, "--dtype", "bf16"),
        ({"rounding": "up"}, "--rounding", "nearest, stochastic"),
        ({"seed": -1}, "--seed", ""),
        ({"rank": "foo"}, "--rank", ""),
        ({"out": "base/in"}, "--out", "is in the folder of the base"),
        ({"out": "base"}, "--out", "is the base, or holds it"),
    ):
        asked = {"base": work.folder / "base", "out": "out"} | words
        message = bake(work, "me.safetensors", **asked).refused()
        assert (message.startswith(f"{flag}: ") or flag == "--base") and says in message, (words, message)
    assert not (work.folder / "out").exists()


def test_section_and_step_may_name_the_base(work, job, base, me):
    step = {"name": "a", "loras": [ME], "keep": False, "bake": True}
    work.zit("run", work.job(step, base="base")).ok() if job() else None
    check(read(work.out / OUT), base, deltas(me))
    message = work.zit("check", work.job(step)).refused()
    assert message.startswith("process[0].steps[0].bake.base: is missing")


@pytest.mark.parametrize(
    "bake_keys, loc",
    [
        ({"base": "nowhere"}, "bake.base"),
        ({"format": "kohya"}, "bake.format"),
        ({"dtype": "same"}, "bake.dtype"),
        ({"rounding": 1}, "bake.rounding"),
        ({"seed": -1}, "bake.seed"),
        ({"speed": 1}, "bake.speed"),
        ({"base": "trainer"}, "bake.base"),
    ],
)
def test_locations_in_a_config(work, job, bake_keys, loc):
    message = work.zit("check", job(**bake_keys)).refused()
    assert message.startswith(f"process[0].steps[0].{loc}: "), message


def test_two_outputs_of_one_name(work, job):
    """A recipe names its file: no step may write over what another one, or its own LoRA, is."""
    job()
    twice = [{"name": n, "keep": False, "loras": [ME], "bake": {"base": "base", "file": "x"}} for n in "ab"]
    made = {"made_by": "zit_merge 0.4.0"}
    message = work.zit("check", work.job(*twice, **made)).refused()
    assert message.startswith("process[0].steps[1].name: process[0].steps[0] writes x too: give one of them another name")
    own = {"base": "base", "format": "comfyui", "file": "merged_cat_a.safetensors"}
    message = work.zit("check", work.job({"name": "a", "loras": [ME], "bake": own}, **made)).refused()
    assert "merged_cat_a.safetensors is what the step a writes" in message
    message = work.zit("check", work.job(*twice)).refused()
    assert message.startswith("process[0].steps[0].bake.file: unknown key")


def test_two_sections_write_no_one_model(work, job):
    job()
    first = {"name": "a", "keep": False, "loras": [ME], "bake": {"base": "base", "format": "comfyui"}}
    config = work.config(work.section(first), work.section({"name": "a_baked", "loras": [ME]}))
    assert "writes merged_cat_a_baked.safetensors too" in work.zit("check", config).refused()


def test_a_step_that_is_asked_for_by_name_writes_its_model_alone(work, job):
    config = job(keep=False)
    work.zit("run", config, "--step", "a").ok()
    assert not [p for p in everything(work.out) if p.startswith("merged_cat_a.safetensors")] and (work.out / OUT).exists()


def test_a_model_is_no_output_of_what_it_is_made_from(work, job, base):
    """An earlier version of the step made it, so that its metadata say the right names."""
    work.zit("run", job(keep=False)).ok()
    pair = {"lora": {"extract": str(work.out / OUT), "base": "base"}, "ratio": 1.0}
    config = work.job({"name": "a", "keep": False, "loras": [pair], "bake": {"base": "base"}})
    assert f"is {OUT}, which the step reads, or holds it" in work.zit("check", config).refused()


def test_a_cut_tells_what_it_took_from_each_lora(work, base):
    """As the LoRA file of the same step would: the second one is a tenth of the first, and the rank holds one."""
    few = {m: SHAPES[m] for m in ("layers.0.attention.to_q", "layers.1.attention.to_q")}
    strong, weak = lora(4, 1, None, few), lora(4, 2, None, few)
    write(work.folder / "strong.safetensors", strong)
    write(work.folder / "weak.safetensors", {m: Pair(p.up * 0.1, p.down) for m, p in weak.items()})
    path = write_folder(work.folder / "base", base)
    said = bake(work, "strong.safetensors", "weak.safetensors", base=path, out="out", ratio=[1.0, 1.0], rank=4).ok()
    assert "is off: weak is mostly cut away" in " ".join(said.split())
    rows = {line.split()[1]: line.split()[-2:] for line in said.splitlines() if line.strip().startswith(("1  ", "2  "))}
    asked, got = map(float, rows["weak.safetensors"])
    assert asked == 1 and got < 0.5


def test_an_interrupted_bake_leaves_room_for_the_next_one(work, job, monkeypatch):
    """What a killed run left of a folder is given back first."""
    config = job(keep=False)
    work.zit("run", config).ok()
    size = sum(p.stat().st_size for p in (work.out / OUT).rglob("*") if p.is_file())
    left = work.out / f"{OUT}.parts"
    shutil.copytree(work.out / OUT, left / "new")
    shutil.copytree(work.out / OUT, left / "old")
    shutil.rmtree(work.out / OUT)
    (work.out / f"{OUT}.part").write_bytes(b"zit_merge.part\n\n")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size // 10))
    work.zit("run", job(keep=False, seed=1)).ok()
    assert not [p for p in everything(work.out) if ".part" in p]


@pytest.mark.parametrize("name", [".", "..", "a/b", "a\\b", ""])
def test_a_name_that_is_none(work, job, name):
    config = work.job({"name": "a", "loras": [ME], "bake": {"base": "base", "file": name}}, made_by="zit_merge 0.4.0")
    message = work.zit("check", config).refused()
    assert message.startswith("process[0].steps[0].bake.file: has a form that is not allowed")


def test_the_model_of_the_training(work, job, base, me):
    """`trainer` is what its section names, in any form."""
    job()
    step = {"name": "a", "keep": False, "loras": [ME], "bake": {"base": "trainer"}}
    training = work.training(model={"name_or_path": str(work.folder / "base"), "arch": "zimage:turbo"})
    work.zit("run", work.config(training, work.section(step))).ok()
    check(read(work.out / OUT), base, deltas(me))
    message = work.zit("check", work.config(work.training(), work.section(step))).refused()
    assert "bake.base: trainer: process[0].model.name_or_path names no model" in message


def test_loras_of_another_model(work, job):
    other = {"layers.0.attention.to_q": (64, 64)}
    write(work.folder / "me.safetensors", lora(2, 0, None, other))
    config = work.job({"name": "a", "keep": False, "loras": [ME], "bake": {"base": "base"}})
    message = work.zit("check", config).refused()
    assert "layers.0.attention.to_q is 128 x 128 in base, 64 x 64 in the LoRAs: give their own model" in message


def test_loras_of_a_model_with_more_layers(work, job):
    write(work.folder / "me.safetensors", lora(2, 0, None, {"layers.7.attention.to_q": (128, 128)}))
    config = work.job({"name": "a", "keep": False, "loras": [ME], "bake": {"base": "base"}})
    assert "layers.7.attention.to_q is not there in base, 128 x 128 in the LoRAs" in work.zit("check", config).refused()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["file", "empty folder", "folder", "a model of another", "link", "part", "parts"])
def test_what_lies_in_the_place_stays(work, job, base, form, kind):
    work.out.mkdir()
    path = made_by(work, form)
    if kind == "file":
        path.write_text("mine")
    elif kind == "empty folder":
        path.mkdir()
    elif kind == "folder":
        path.mkdir()
        (path / "mine.txt").write_text("mine")
    elif kind == "a model of another":
        WRITERS["comfyui" if form == "comfyui" else "folder"](work.out / OUT, base)
    elif kind == "link":
        path.symlink_to(work.folder / "nowhere")
    elif kind == "part":
        path.with_name(f"{path.name}.part").write_text("mine")
    else:
        path.with_name(f"{path.name}.parts").mkdir()
        (path.with_name(f"{path.name}.parts") / "mine.txt").write_text("mine")
    if kind == "parts" and form == "comfyui":
        work.zit("run", job(format=form)).ok()  # a file needs no such folder
        assert (work.out / f"{path.name}.parts" / "mine.txt").read_text() == "mine"
        return
    before = {str(p): p.read_bytes() if p.is_file() else b"" for p in work.out.rglob("*")}
    assert "move it away" in work.zit("run", job(format=form)).refused()
    assert {str(p): p.read_bytes() if p.is_file() else b"" for p in work.out.rglob("*")} == before


def test_a_file_of_a_person_in_our_folder_stays(work, job):
    """The folder is replaced as a whole: what else was put into it would go with the old one."""
    work.zit("run", job()).ok()
    (work.out / OUT / "notes.txt").write_text("mine")
    message = work.zit("run", job(rounding="stochastic")).refused()
    assert "notes.txt, which zit_merge did not write: move it away" in message
    assert (work.out / OUT / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("command", ["check", "run"])
def test_no_room_is_found_before_anything_is_read(work, job, monkeypatch, command):
    size = sum(t.nbytes for t in model().values())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size - 1))
    message = work.zit(command, job()).refused()
    assert message.startswith("process[0].output_dir: the outputs need ") and "free some" in message
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size + 1_000_000))
    work.zit(command, job()).ok()
    work.zit("run", job()).ok()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    work.zit(command, job()).ok()  # it is there, and is not written again
    assert "the outputs need" in work.zit(command, job(seed=1)).refused()


# --- what is left when something goes wrong ------------------------------------------------------------------------------------


class FullDisk:
    """A file on a disk that takes no more bytes after the first million."""

    def __init__(self, file):
        self._file, self._left = file, 1_000_000

    def write(self, data) -> int:
        self._left -= memoryview(data).nbytes
        if self._left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(data)

    def __getattr__(self, name: str):
        return getattr(self._file, name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("older", [True, False])
def test_a_disk_that_fills_up(work, job, monkeypatch, form, older):
    if older:
        work.zit("run", job(format=form)).ok()
    before = content(work.out) if older else {}
    opened = atomic.open_exclusively
    monkeypatch.setattr(safetensors_writer, "open_exclusively", lambda path: FullDisk(opened(path)))
    message = work.zit("run", job(format=form, dtype="fp32")).refused()
    assert "no space left on the disk: free some" in message
    assert content(work.out) == before and not [p for p in everything(work.out) if ".part" in p]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("older", [True, False])
def test_a_lora_with_nan(work, job, me, form, older):
    if older:
        work.zit("run", job(format=form)).ok()
    before = content(work.out) if older else {}
    last = list(me)[-1]
    up = me[last].up.clone()
    up[0, 0] = float("nan")
    write(work.folder / "me.safetensors", me | {last: replace(me[last], up=up)})
    message = work.zit("run", job(format=form)).refused()
    assert last in message
    assert content(work.out) == before and not [p for p in everything(work.out) if ".part" in p]


def test_a_number_that_fp16_can_not_hold(work, job):
    loras = [ME | {"ratio": 1e8}]
    config = work.job({"name": "a", "keep": False, "loras": loras, "bake": {"base": "base", "dtype": "fp16"}}) if job() else None
    message = work.zit("run", config).refused()
    assert "is too large for" in message and "bf16 or fp32" in message and work.files() == []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("which", ["base/diffusion_pytorch_model-00002-of-00003.safetensors", "me.safetensors"])
def test_an_input_that_changes_meanwhile(work, job, monkeypatch, form, which):
    config = job(format=form)
    write_tensor, count = checkpoint_writer.CheckpointWriter.write, iter(range(10_000))

    def write_and_touch(self, *words):
        write_tensor(self, *words)
        if next(count) == 40:
            os.utime(work.folder / which, (1, 1))

    monkeypatch.setattr(checkpoint_writer.CheckpointWriter, "write", write_and_touch)
    assert "was changed while it was used" in work.zit("run", config).refused()
    assert everything(work.out) == []


@pytest.mark.parametrize("form", FORMS)
def test_an_interrupt(work, job, monkeypatch, form):
    work.zit("run", job(format=form)).ok()
    before = content(work.out)
    write_tensor, count = checkpoint_writer.CheckpointWriter.write, iter(range(10_000))

    def write_and_stop(self, *words):
        write_tensor(self, *words)
        if next(count) == 40:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_writer.CheckpointWriter, "write", write_and_stop)
    assert work.zit("run", job(format=form, dtype="fp32")).code == 130
    assert content(work.out) == before and not [p for p in everything(work.out) if ".part" in p]


def killed(work: Workspace, config: Path, *, touch: int = 0, tensor: int = 0) -> int:
    """Runs a job in a process that kills itself where it opens, renames or removes something in `out` for the n-th time.

    Args:
        work: Where it runs.
        config: The job.
        touch: That n; 0 never.
        tensor: It is killed after so many tensors are written instead.

    Returns:
        How often it touched the folder, 0 if it was killed.
    """
    told, tells = os.pipe()
    if not (pid := os.fork()):
        code = 1
        try:
            calls = 0

            def count(event: str, words: tuple) -> None:
                nonlocal calls
                if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir") and any(
                    str(work.out) in str(w) for w in words
                ):
                    calls += 1
                    if calls == touch:
                        os.kill(os.getpid(), signal.SIGKILL)

            def write_and_die(self, *words) -> None:
                write_tensor(self, *words)
                if next(written) == tensor:
                    os.kill(os.getpid(), signal.SIGKILL)

            if tensor:
                write_tensor, written = checkpoint_writer.CheckpointWriter.write, iter(range(1, 10_000))
                checkpoint_writer.CheckpointWriter.write = write_and_die
            sys.addaudithook(count)
            code = main(["run", str(config), "--quiet"])
            os.write(tells, str(calls).encode())
        finally:
            os._exit(code)
    os.close(tells)
    status = os.waitpid(pid, 0)[1]
    with os.fdopen(told) as pipe:
        calls = pipe.read()
    assert os.waitstatus_to_exitcode(status) == (-signal.SIGKILL if touch or tensor else 0)
    return int(calls or 0)


@posix
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("older", [True, False])
def test_a_run_that_is_killed_leaves_the_old_model_or_the_new_one(work, job, form, older):
    """Killed wherever it touches the folder, and while it writes: the next run ends with the model, and nothing else is left."""
    path, saved = made_by(work, form), work.folder / "saved"
    work.zit("run", job(format=form, dtype="fp32")).ok()
    wanted = content(path)
    shutil.rmtree(work.out)
    if older:
        work.zit("run", job(format=form)).ok()
        first = content(path)
        work.out.rename(saved)

    def restore() -> None:
        shutil.rmtree(work.out, ignore_errors=True)
        if older:
            shutil.copytree(saved, work.out)

    new = job(format=form, dtype="fp32")
    restore()
    total = killed(work, new)
    assert content(path) == wanted and total >= 4
    for point in [*({"touch": n} for n in range(1, total + 1)), {"tensor": 1}, {"tensor": 45}]:
        restore()
        killed(work, new, **point)
        if path.exists():
            assert content(path) in ([first, wanted] if older else [wanted]), point
        elif older:  # between two renames it lies beside its place, whole
            assert content(work.out / f"{OUT}.parts" / "old") == first, point
        work.zit("run", new).ok()
        assert content(path) == wanted, point
        assert everything(work.out) == sorted([path.name, *([f"{OUT}/{n}" for n in wanted] if path.is_dir() else [])]), point


@posix
def test_an_older_model_comes_back_before_it_is_looked_at(work, job):
    """A run was killed between two renames: the next one finds what it replaced, and that it is what is wanted."""
    config = job()
    work.zit("run", config).ok()
    inode = (work.out / OUT).stat().st_ino
    parts = work.out / f"{OUT}.parts"
    parts.mkdir()
    with atomic.open_exclusively(atomic.part_path(work.out / OUT)):
        (work.out / OUT).rename(parts / "old")
    work.zit("run", config).ok()
    assert (work.out / OUT).stat().st_ino == inode
    assert everything(work.out) == [OUT, f"{OUT}/config.json", f"{OUT}/{ONE}"]


@posix
@pytest.mark.parametrize("form", FORMS)
def test_two_runs_at_once(work, job, form):
    """The second is told, and neither breaks the other."""
    config = job(format=form)
    path = made_by(work, form)
    work.out.mkdir()
    with atomic.open_exclusively(atomic.part_path(path)):
        assert "another run is writing this file now: wait for it or stop it" in work.zit("run", config).refused()
        assert everything(work.out) == [f"{path.name}.part"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-B", "-m", "extensions_built_in.zit_merge", "run", str(config), "--quiet"]
    both = [subprocess.Popen(words, cwd=work.folder, env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate()[1] for p in both]
    codes = [p.returncode for p in both]
    assert 0 in codes
    assert all(code == 0 or "another run is writing this file now" in text for code, text in zip(codes, said, strict=True)), said
    again = work.zit("run", config)
    assert again.code == 0
    assert everything(work.out) == sorted([path.name, *([f"{OUT}/config.json", f"{OUT}/{ONE}"] if path.is_dir() else [])])


@posix
@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_another_run_replaces_the_model_while_it_is_looked_at(work, job, form, held, monkeypatch):
    """It is away between two renames: nobody takes it for somebody else's."""
    config, path = job(format=form), made_by(work, form)
    work.zit("run", config).ok()
    away, part, looks = work.folder / "away", atomic.part_path(path), []

    def read(file, **options):
        looks.append(file)
        with contextlib.ExitStack() as other:
            if len(looks) == 1:
                path.rename(away)
                other.callback(away.rename, path)
            return open_checkpoint(file, **options)

    with atomic.open_exclusively(part) if held else contextlib.nullcontext():
        monkeypatch.setattr(outputs, "open_checkpoint", read)
        run = work.zit("run", config)
        if held:
            assert "another run is writing this file now: wait for it or stop it" in run.refused()
            part.unlink()
        else:
            run.ok()
            assert len(looks) == 2
    assert everything(work.out) == sorted([path.name, *([f"{OUT}/config.json", f"{OUT}/{ONE}"] if path.is_dir() else [])])


# --- the readers ---------------------------------------------------------------------------------------------------------------


def test_diffusers_loads_the_folder(work, base, me, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    limit = 600_000
    shards = checkpoint_writer._shards
    monkeypatch.setattr(checkpoint_writer, "_shards", lambda tensors, _: shards(tensors, limit))
    write(work.folder / "me.safetensors", me)
    bake(work, "me.safetensors", base=WRITERS["comfyui"](work.folder / "base", base), out="out", ratio=0.7).ok()
    loaded = diffusers.ZImageTransformer2DModel.from_pretrained(work.folder / "out", torch_dtype=torch.bfloat16)
    check(dict(loaded.state_dict()), base, weighted_sum([(deltas(me), 0.7)]))


OF_COMFYUI = """
import sys
sys.path[:0] = [sys.argv[1]]
from clients.comfyui_source import comfy
comfy()
import comfy.model_detection, comfy.ops, comfy.utils, torch
from comfy.ldm.lumina.model import NextDiT
from safetensors.torch import save_file
weights = comfy.utils.load_torch_file(sys.argv[2])
prefix = comfy.model_detection.unet_prefix_from_state_dict(weights)  # as comfy.sd.load_diffusion_model_state_dict does it
weights = comfy.utils.state_dict_prefix_replace(weights, {prefix: ""}, filter_keys=True) or weights
config = comfy.model_detection.detect_unet_config(weights, "")
assert config["image_model"] == "lumina2" and config["n_layers"] == 1 and config["cap_feat_dim"] == 32, config
config |= {"n_heads": 9, "n_kv_heads": 9, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0}
config |= {"ffn_dim_multiplier": 8 / 3, "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32}
parameters = {k: v for k, v in config.items() if k not in ("image_model", "allow_fp16")}  # what it has for dim 3840
model = NextDiT(**parameters, operations=comfy.ops.disable_weight_init, dtype=torch.bfloat16)
model.load_state_dict(weights, strict=True)
save_file({k: t.clone() for k, t in model.state_dict().items()}, sys.argv[3])
"""


@pytest.mark.parametrize("of_base", ["folder", "prefixed"])
def test_comfyui_loads_the_file(work, of_base):
    """At the smallest size that it has: widths from 1024 on, feed-forward layers of a multiple of 256."""
    if comfyui_source.root() is None:
        pytest.skip("no ComfyUI at $COMFYUI_ROOT or ~/ComfyUI")
    shapes = producers.small_shapes(dim=1152, ffn=3072, temb=256, cap=32, n_layers=1)
    base, me = model(shapes=shapes), lora(2, 1, None, {m: s for m, s in shapes.items() if "adaLN" in m or "to_" in m})
    base = {k: t[:128].clone() if ".norm_" in k else t for k, t in base.items()}
    write(work.folder / "me.safetensors", me)
    bake(work, "me.safetensors", base=WRITERS[of_base](work.folder / "base", base), out="out.safetensors", ratio=0.7).ok()
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
    words = [sys.executable, "-c", OF_COMFYUI, str(comfyui_source.TESTS), "out.safetensors", "loaded.safetensors"]
    done = subprocess.run(words, cwd=work.folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    check(read(work.folder / "loaded.safetensors"), base, weighted_sum([(deltas(me), 0.7)]))


def test_python_bakes_too(tmp_path, base, me):
    write(tmp_path / "me.safetensors", me)
    path = write_folder(tmp_path / "base", base)
    described = merge([(tmp_path / "me.safetensors", 0.7)], shapes="free", device="cpu")
    made = described.bake(path, tmp_path / "out.safetensors", format="comfyui", dtype="fp16")
    assert made == tmp_path / "out.safetensors"
    check(read(made), base, weighted_sum([(deltas(me), 0.7)]), torch.float16)
    with pytest.raises(ZitMergeError, match="comfyui is one .safetensors file"):
        described.bake(path, tmp_path / "other", format="comfyui")


def test_what_survives_in_each_module_is_shown_where_it_is_little(work, base):
    """By a float64 oracle: <written - base, change> / <change, change>, in the cells of the report."""
    weak, strong = "layers.0.attention.to_q", "layers.1.attention.to_q"
    few = {m: SHAPES[m] for m in (weak, strong)}
    one = lora(4, 1, None, few)
    one[weak] = Pair(one[weak].up * 3e-4, one[weak].down)
    write(work.folder / "me.safetensors", one)
    said = bake(work, "me.safetensors", base=write_folder(work.folder / "base", base), out="out").ok()
    _, table = said.split("share of the change that survives, in percent")
    rows = {line.split()[0]: line.split()[2] for line in table.strip().splitlines()[1:]}
    found = read(work.folder / "out")
    for module, cell in ((weak, rows["0"]), (strong, rows["1"])):
        got = found[f"{module}.weight"].double() - base[f"{module}.weight"].double()
        delta = one[module].delta
        assert float(cell) == pytest.approx(100 * float((got * delta).sum() / delta.square().sum()), abs=0.11), module
    assert float(rows["0"]) < 60 < 98 < float(rows["1"])
