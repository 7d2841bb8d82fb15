"""The check of every output: its numbers beside an independent dense computation, and a merge that is spoiled on purpose."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles.dense import Deltas, best_error, read_deltas, read_metadata, weighted_sum
from oracles.producers import small_shapes
from safetensors.torch import load_file, save_file
from sweep import examples
from torch import Tensor
from workspace import DTYPES, merge_into, write_lora

from extensions_built_in.zit_merge import ZitMergeError, load_lora, merge
from extensions_built_in.zit_merge.algebra.components import Components
from extensions_built_in.zit_merge.algebra.delta import Delta
from extensions_built_in.zit_merge.algebra.factors import Factors
from extensions_built_in.zit_merge.algebra.linear import add
from extensions_built_in.zit_merge.algebra.probes import Probed
from extensions_built_in.zit_merge.algebra.rounding import to_dtype
from extensions_built_in.zit_merge.algebra.truncate import truncate
from extensions_built_in.zit_merge.formats.safetensors_file import SafetensorsFile
from extensions_built_in.zit_merge.merging import results, verify
from extensions_built_in.zit_merge.merging.merger import Made, Merged, Merger
from extensions_built_in.zit_merge.merging.runner import run_plans

SHAPES = {
    name: shape
    for name, shape in small_shapes(dim=16, ffn=24, temb=8, cap=12, n_layers=2, n_refiners=1).items()
    if name.startswith(("layers.0.", "layers.1.attention", "context_refiner.0.attention"))
}
NAMES = ("to_q", "to_k", "to_v", "to_out.0")
Pair = tuple[Tensor, Tensor]


def pairs(path: Path, factors: Mapping[str, Pair]) -> tuple[Path, dict[str, Tensor]]:
    """A file in AI-Toolkit's form: module -> (up, down), stored in float32, and its deltas."""
    tensors, deltas = {}, {}
    for module, (up, down) in factors.items():
        tensors[f"diffusion_model.{module}.lora_B.weight"] = up.float().contiguous()
        tensors[f"diffusion_model.{module}.lora_A.weight"] = down.float().contiguous()
        deltas[module] = up.float().double() @ down.float().double()
    save_file(tensors, path)
    return path, deltas


def drawn(rank: int, seed: int, up: float = 1.0, down: float = 1.0, side: int = 12) -> dict[str, Pair]:
    """The attention of a layer."""
    random = torch.Generator().manual_seed(seed)
    sizes = [(torch.randn(side, rank, generator=random) * up, torch.randn(rank, side, generator=random) * down) for _ in NAMES]
    return {f"layers.0.attention.{name}": pair for name, pair in zip(NAMES, sizes, strict=True)}


def verdict(path: Path) -> dict[str, Any]:
    """What the check left in the metadata."""
    return json.loads(read_metadata(path)["zit_merge.check"])


def flat(deltas: Deltas, modules: Sequence[str], shapes: Mapping[str, Any]) -> np.ndarray:
    parts = [deltas[m].flatten() if m in deltas else torch.zeros(shapes[m].numel(), dtype=torch.float64) for m in modules]
    return torch.cat(parts).numpy()


def dense_check(path: Path, wanted: Deltas, inputs: Sequence[Deltas]) -> dict[str, Any]:
    """error, kept, asked and got from whole matrices laid end to end; the inputs without their ratios."""
    written, modules = read_deltas(path), list(wanted)
    whole, found = flat(wanted, modules, wanted), flat(written, modules, wanted)
    basis = np.stack([flat(deltas, modules, wanted) for deltas in inputs], 1)
    error = float(np.linalg.norm(found - whole) / np.linalg.norm(whole))
    asked, got = (np.linalg.lstsq(basis, x, rcond=None)[0].tolist() for x in (whole, found))
    return {"error": error, "kept": 1 - error**2, "asked": asked, "got": got}


def near(found: Mapping[str, Any], want: Mapping[str, Any], error: float = 0.15) -> None:
    """Four digits are stored, six of what is kept; probes tell the error of rounding to about 4 % for the few modules here."""
    assert found["error"] == pytest.approx(want["error"], rel=error, abs=1e-6)
    assert found["kept"] == pytest.approx(want["kept"], rel=1e-5)
    assert found["asked"] == pytest.approx(want["asked"], rel=6e-4, abs=2e-5)
    assert found["got"] == pytest.approx(want["got"], rel=6e-4, abs=2e-5)


def two(folder: Path, rank: int = 4) -> list[tuple[Path, Deltas]]:
    made = [write_lora(folder, name, rank, n, shapes=SHAPES) for n, name in enumerate(("ai-toolkit", "onetrainer-kohya"))]
    return [(path, m.deltas) for path, m in made]


# --- the numbers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", ["exact", 3])
@pytest.mark.parametrize("ratios", [(0.9, 0.6), (1.0, -0.5), (0.4, 0.0)], ids=str)
def test_the_numbers_are_those_of_the_written_file(tmp_path, dtype, rank, ratios):
    loras = two(tmp_path)
    out = merge_into(tmp_path, [(path, r) for (path, _), r in zip(loras, ratios, strict=True)], dtype=dtype, rank=rank)
    wanted = weighted_sum([(deltas, r) for (_, deltas), r in zip(loras, ratios, strict=True) if r])
    alive = [deltas for (_, deltas), r in zip(loras, ratios, strict=True) if r]
    found = verdict(out)
    for key in ("asked", "got"):
        assert [v is None for v in found[key]] == [r == 0 for r in ratios]
        found[key] = [v for v in found[key] if v is not None]
    near(found, dense_check(out, wanted, alive), 0.15 if rank == "exact" else 0.03)
    assert found["asked"] == pytest.approx([r for r in ratios if r], rel=1e-4)
    if rank == "exact":
        assert found["got"] == pytest.approx([r for r in ratios if r], rel=1e-2 if dtype == "bf16" else 1e-3)
        assert found["error"] < {"fp32": 1e-6, "fp16": 1e-3, "bf16": 6e-3}[dtype]


def test_asked_and_got_are_what_the_config_says(tmp_path):
    loras = two(tmp_path)
    out = merge_into(tmp_path, [(loras[0][0], 0.9), (loras[1][0], 0.6)])
    assert verdict(out)["asked"] == verdict(out)["got"] == [0.9, 0.6]


def test_a_ratio_is_found_beside_weights_of_blocks(tmp_path):
    """A strength is counted in the LoRA with its blocks, layers and effects, so it is the ratio that is found."""
    (one, a), (other, b) = two(tmp_path)
    out = merge_into(tmp_path, [(one, {"ratio": 0.9, "blocks": {"to_q": -0.5, "feed_forward": 0.1}}), (other, 0.6)])
    assert verdict(out)["asked"] == verdict(out)["got"] == [0.9, 0.6]
    weighed = {m: d * (-0.5 if m.endswith("to_q") else 0.1 if "feed_forward" in m else 1) for m, d in a.items()}
    near(verdict(out), dense_check(out, weighted_sum([(weighed, 0.9), (b, 0.6)]), [weighed, b]))


@pytest.mark.parametrize("method", ["average", "normalize", "slerp", "karcher"])
def test_what_a_linear_method_asks_for_are_its_coefficients(tmp_path, method):
    loras = two(tmp_path)
    how = {"params": {"per": "file"}} if method != "average" else {}
    out = merge_into(tmp_path, [(loras[0][0], 0.9), (loras[1][0], 0.6)], method=method, **how)
    near(verdict(out), dense_check(out, read_deltas(out), [d for _, d in loras]) | {"error": verdict(out)["error"]})
    assert verdict(out)["error"] < 1e-6
    assert (verdict(out)["asked"] == pytest.approx([0.6, 0.4], rel=1e-3)) == (method == "average")


@pytest.mark.parametrize("method", ["ties", "dare_linear", "tsv", "shared_once", "project"])
def test_another_method_is_compared_with_its_answer(tmp_path, method):
    loras = two(tmp_path)
    weighed = [(loras[0][0], 0.9), (loras[1][0], 0.6)]
    whole = read_deltas(merge_into(tmp_path, weighed, "whole", method=method))
    for rank, dtype in (("exact", "bf16"), (3, "fp32")):
        out = merge_into(tmp_path, weighed, f"{rank}", method=method, rank=rank, dtype=dtype)
        near(verdict(out), dense_check(out, whole, [d for _, d in loras]), 0.15 if rank == "exact" else 0.03)


@pytest.mark.parametrize("rank", [1, 2, 5, 7, "same"])
def test_kept_is_the_share_of_the_energy_that_a_rank_holds(tmp_path, rank):
    (one, a), (other, b) = two(tmp_path)
    found = verdict(merge_into(tmp_path, [(one, 0.9), (other, 0.6)], rank=rank))
    wanted = weighted_sum([(a, 0.9), (b, 0.6)])
    count = 4 if rank == "same" else max(rank, 2)  # the lowest beside an alpha key
    lost = sum(best_error(d, count) ** 2 for d in wanted.values()) / sum(float(d.norm()) ** 2 for d in wanted.values())
    assert found["kept"] == pytest.approx(1 - lost, abs=2e-6)
    assert found["error"] == pytest.approx(lost**0.5, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("form", ["diffusers", "kohya", "comfyui"])
def test_the_check_knows_every_form(tmp_path, form):
    (one, _), (other, _) = two(tmp_path)
    loras = [(one, 0.9), (other, 0.6)]
    plain, out = (merge_into(tmp_path, loras, f"in_{f}", rank=5, format=f) for f in ("ai-toolkit", form))
    assert verdict(out) == verdict(plain)


def test_a_lokr_that_stays_one(tmp_path):
    path, _ = write_lora(tmp_path, "ai-toolkit-lokr", 2, shapes=SHAPES)
    found = verdict(merge_into(tmp_path, [(path, {"ratio": 0.7, "blocks": {"to_q": 0.5}})], keep_lokr=True, dtype="bf16"))
    assert found["asked"] == [0.7] and found["got"] == pytest.approx([0.7], rel=1e-2) and found["error"] < 0.01


def test_a_file_of_zeros(tmp_path):
    (one, _), (other, _) = two(tmp_path)
    assert verdict(merge_into(tmp_path, [(one, 0.0), (other, 0.0)])) == {
        "error": 0.0,
        "kept": 1.0,
        "asked": [None, None],
        "got": [None, None],
        "cut": False,
        "status": "empty",
        "reasons": [{"kind": "nothing_asked"}],
    }


STATUSES: dict[str, tuple[tuple[float, float], dict[str, Any]]] = {
    "right, rounding": ((0.9, 0.6), {}),
    "right, cut": ((0.9, 0.6), {"rank": 6}),
    "right, capped": ((0.9, 0.6), {"rank": {"energy": 0.999, "max": 6}}),
    "off, lost": ((1.0, 0.1), {"rank": 2}),
    "empty, nothing_asked": ((0.0, 0.0), {}),
}


@pytest.mark.parametrize("case", STATUSES)
def test_the_status_and_its_reason(tmp_path, case):
    ratios, how = STATUSES[case]
    out = merge_into(tmp_path, [(path, ratio) for (path, _), ratio in zip(two(tmp_path), ratios, strict=True)], **how)
    stored, read = verdict(out), load_lora(out).verdict
    (reason,) = stored["reasons"]
    assert f"{stored['status']}, {reason['kind']}" == case
    assert (read.status, read.reasons, read.modules) == (stored["status"], (reason,), {})
    numbers = {"rounding": ["error"], "cut": ["kept"], "capped": ["kept"]}.get(reason["kind"], [])
    assert [reason[key] for key in numbers] == pytest.approx([stored[key] for key in numbers], rel=1e-3)
    if reason["kind"] == "capped":
        assert (reason["asked"], reason["max"]) == (0.999, 6) and reason["kept"] < 0.999
    if reason["kind"] == "lost":
        assert (reason["inputs"], reason["cut"]) == ([1], True)
        assert reason["shares"] == pytest.approx([stored["got"][1] / stored["asked"][1]], rel=1e-3) and reason["shares"][0] < 0.5


@pytest.mark.parametrize(("apart", "case"), [(1e-5, "off, cancelling"), (0.0, "empty, cancelled")])
def test_the_status_of_what_cancels(tmp_path, apart, case):
    paths = nearly_alike(tmp_path, apart)
    stored = verdict(merge_into(tmp_path, list(zip(paths, (1.0, -1.0), strict=True)), dtype="bf16"))
    assert f"{stored['status']}, {stored['reasons'][0]['kind']}" == case
    assert apart == 0 or stored["reasons"][0]["error"] == pytest.approx(stored["error"], rel=1e-3)


@pytest.mark.parametrize("case", ["right, rounding", "right, cut", "off, lost", "empty, nothing_asked"])
@pytest.mark.parametrize("gone", [["status", "reasons"], ["reasons"], ["status"]], ids=str)
def test_a_file_whose_check_has_no_status_gets_the_one_that_follows_from_its_numbers(tmp_path, case, gone):
    """As those of versions before it."""
    ratios, how = STATUSES[case]
    out = merge_into(tmp_path, [(path, ratio) for (path, _), ratio in zip(two(tmp_path), ratios, strict=True)], **how)
    older = {key: value for key, value in verdict(out).items() if key not in gone}
    save_file(load_file(out), out, read_metadata(out) | {"zit_merge.check": json.dumps(older)})
    assert load_lora(out).verdict.status == case.split(",")[0]
    assert [reason["kind"] for reason in load_lora(out).verdict.reasons] == [case.split(", ")[1]]


@pytest.mark.parametrize("how", [{}, {"rank": 3}, {"method": "ties"}, {"dtype": "bf16", "rank": {"energy": 0.9}}], ids=str)
def test_the_same_recipe_makes_the_same_bytes_with_the_numbers_of_the_check(tmp_path, how):
    loras = [(path, 0.7) for path, _ in two(tmp_path)]
    made = {merge_into(tmp_path / f"{n}", loras, **how).read_bytes() for n in range(3)}
    assert len(made) == 1 and b"zit_merge.check" in made.pop()


@pytest.mark.parametrize(
    "how",
    [{}, {"rank": 3, "dtype": "bf16"}, {"method": "ties"}, {"format": "comfyui"}, {"format": "kohya", "uniform": False}],
    ids=str,
)
@pytest.mark.parametrize("ratios", [(0.7, 0.5), (1 / 3, -1e-7), (12345.678, 0.0)], ids=str)
def test_the_size_announced_is_the_size_written(tmp_path, how, ratios):
    weighed = [(path, ratio) for (path, _), ratio in zip(two(tmp_path), ratios, strict=True)]
    settled = merge(weighed, **{"shapes": "free", "dtype": "fp32", "device": "cpu"} | how)
    announced = settled.plan(tmp_path / "out.safetensors").bytes
    assert settled.save(tmp_path / "out.safetensors").stat().st_size == announced


# --- what a person reads -------------------------------------------------------------------------------------------------------


def said(work, *words: object) -> str:
    """The report at the end, on one line."""
    text = work.zit("merge", *words, "-o", "out.safetensors", "--shapes", "free", "--device", "cpu").ok()
    return " ".join(text[text.index("out is ") :].split())


def test_the_report_says_asked_and_got(work):
    (one, _), (other, _) = two(work.folder)
    line = said(work, one, other, "--ratio", 0.9, 0.6)
    assert "1 ai-toolkit.safetensors 0.9 0.9 2 onetrainer-kohya.safetensors 0.6 0.6" in line
    assert line.startswith("out is right: as asked, rounding to bf16 changed 0.")
    line = said(work, one, other, "--ratio", 0.9, 0.6, "--rank", 3, "--dtype", "fp32")
    found = verdict(work.folder / "out.safetensors")
    assert f"{int(found['kept'] * 1000) / 10:.1f} % of the energy kept, least in " in line


def test_no_share_is_rounded_up_to_all(work):
    big, small = drawn(2, 0), drawn(2, 1, up=1e-3)
    paths = [pairs(work.folder / f"{n}.safetensors", part)[0] for n, part in enumerate((big, small))]
    line = said(work, *paths, "--ratio", 1, "--rank", 2, "--dtype", "fp32")
    assert "99.9 % of the energy kept" in line and "100 %" not in line


def nearly_alike(folder: Path, apart: float) -> list[Path]:
    """Two LoRAs whose difference is so small a share of them."""
    first, noise = drawn(4, 0), drawn(4, 1)
    second = {m: (up + apart * noise[m][0], down) for m, (up, down) in first.items()}
    return [pairs(folder / f"{n}.safetensors", part)[0] for n, part in enumerate((first, second))]


@pytest.mark.parametrize("apart", [1e-2, 1e-3, 1e-4, 1e-5])
def test_what_nearly_cancels_in_bf16_is_said_and_no_error(work, apart):
    paths = nearly_alike(work.folder, apart)
    line = said(work, *paths, "--ratio", 1, -1, "--dtype", "bf16")
    found = verdict(work.folder / "out.safetensors")
    wanted = read_deltas(merge_into(work.folder, list(zip(paths, (1.0, -1.0), strict=True)), "exact"))
    got = read_deltas(work.folder / "out.safetensors")
    error = (
        sum(float((got[m] - d).norm()) ** 2 for m, d in wanted.items()) / sum(float(d.norm()) ** 2 for d in wanted.values())
    ) ** 0.5
    assert error > 0.05 and found["error"] == pytest.approx(error, rel=0.25)
    assert "the inputs nearly cancel" in line and "save it as fp32" in line
    assert "nearly cancel" not in said(work, *paths, "--ratio", 1, -1, "--dtype", "fp32")


@pytest.mark.parametrize(("apart", "alike"), [(0.5, False), (0.1, False), (0.01, True), (1e-4, True), (0.0, True)])
def test_inputs_too_alike_to_tell_their_strengths_apart_are_said(work, apart, alike):
    line = said(work, *nearly_alike(work.folder, apart), "--ratio", 0.9, 0.6, "--dtype", "fp32")
    assert ("too alike" in line) == alike
    assert ("0.9 0.9 2 " in line and " 0.6 0.6 " in line) == (not alike)
    assert ("0.9 ? 2 " in line and " 0.6 ? " in line) == alike


# --- a merge that is spoiled ---------------------------------------------------------------------------------------------------


DIFFERS = "what was written differs from what was wanted by "


def scaled(x: Factors, factor: float = 0.97) -> Factors:
    return Factors(x.up * factor, x.down)


def without_one(x: Factors) -> Factors:
    return Factors(x.up[:, 1:], x.down[1:])


def turned(x: Factors) -> Factors:
    """The components of one factor in another order than those of the other."""
    return Factors(x.up, x.down.flip(0))


def rolled(x: Factors) -> Factors:
    """The outputs in another order."""
    return Factors(x.up.roll(1, 0), x.down)


def negated(x: Factors) -> Factors:
    return Factors(-x.up, x.down)


SPOILED = {
    "scaled": scaled,
    "without one": without_one,
    "turned": turned,
    "rolled": rolled,
    "negated": negated,
    "nothing": lambda x: scaled(x, 0.0),
}


def spoiled_rounding(spoil: Callable[[Factors], Factors]) -> Callable[..., Factors]:
    return lambda x, dtype: to_dtype(spoil(x), dtype)


def spoiled_truncation(spoil: Callable[[Factors], Factors]) -> Callable[..., Factors]:
    return lambda x, rank, dtype: spoil(truncate(x, rank, dtype))


def refuse(folder: Path, weighed: Sequence[tuple[Path, float]], before: Path | None, says: str = DIFFERS, **how: Any) -> None:
    """The merge is refused, the old file stays as it is and no part of a new one lies there."""
    lay = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ZitMergeError, match=rf"^out\.safetensors: (layers|context_refiner)\.\d\.[\w.]+: {says}"):
        merge_into(folder, weighed, "out", **how)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == lay
    assert before is None or before.name in lay


OTHERS = [("scaled", "bf16", "slerp"), ("scaled", "bf16", "ties"), ("rolled", "fp16", "tsv")]


@pytest.mark.parametrize(("spoil", "dtype", "method"), [*((spoil, d, "sum") for spoil in SPOILED for d in DTYPES), *OTHERS])
def test_spoiled_rounding(tmp_path, monkeypatch, spoil, dtype, method):
    weighed = [(path, 0.8) for path, _ in two(tmp_path)]
    old = merge_into(tmp_path, [(path, 0.7) for path, _ in weighed], "out")
    monkeypatch.setattr(results, "to_dtype", spoiled_rounding(SPOILED[spoil]))
    refuse(tmp_path, weighed, old, dtype=dtype, method=method)


@pytest.mark.parametrize("factor", [0.999, 1.001, 0.9999])
def test_a_little_off_in_fp32(tmp_path, monkeypatch, factor):
    weighed = [(path, 0.8) for path, _ in two(tmp_path)]
    monkeypatch.setattr(results, "to_dtype", spoiled_rounding(lambda x: scaled(x, factor)))
    refuse(tmp_path, weighed, None)


@pytest.mark.parametrize(
    ("spoil", "dtype", "method"),
    [*((spoil, d, "sum") for spoil in ("scaled", "turned", "rolled", "negated") for d in DTYPES), *OTHERS],
)
def test_spoiled_truncation(tmp_path, monkeypatch, spoil, dtype, method):
    weighed = [(path, 0.8) for path, _ in two(tmp_path)]
    old = merge_into(tmp_path, [(path, 0.7) for path, _ in weighed], "out")
    monkeypatch.setattr(results, "truncate", spoiled_truncation(SPOILED[spoil]))
    refuse(tmp_path, weighed, old, dtype=dtype, method=method, rank=4)


def without(x: Factors, k: int) -> Factors:
    return Factors(torch.cat([x.up[:, :k], x.up[:, k + 1 :]], 1), torch.cat([x.down[:k], x.down[k + 1 :]]))


def smallest(x: Any, rank: int, dtype: torch.dtype) -> Factors:
    """The least components in the place of the best ones."""
    whole = truncate(x, x.rank, dtype)
    return Factors(whole.up[:, -rank:], whole.down[-rank:])


WORSE = {
    "without the largest": lambda x, rank, dtype: without_one(truncate(x, rank, dtype)),
    "one too few": lambda x, rank, dtype: truncate(x, rank - 1, dtype),
    "nothing": lambda x, rank, dtype: scaled(truncate(x, rank, dtype), 0.0),
    "the smallest": smallest,
    "the next one in the place of the last": lambda x, rank, dtype: without(truncate(x, rank + 1, dtype), rank - 1),
}


@pytest.mark.parametrize("worse", WORSE)
def test_a_truncation_that_keeps_less_than_the_best(tmp_path, monkeypatch, worse):
    """Each is an orthogonal projection: what is left out is orthogonal to what is written, as in the best one."""
    weighed = [(path, 0.8) for path, _ in two(tmp_path)]
    old = merge_into(tmp_path, [(path, 0.7) for path, _ in weighed], "out")
    monkeypatch.setattr(results, "truncate", WORSE[worse])
    refuse(tmp_path, weighed, old, "", rank=4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_spoiled_strengths(tmp_path, monkeypatch, dtype):
    """The inputs' strengths swapped, or one of them left out, by the code that merges: the check does not go by its sums."""
    weighed = [(path, r) for (path, _), r in zip(two(tmp_path), (0.9, 0.6), strict=True)]
    right = Merger.of
    spoils: dict[str, Callable[[Merged], Delta]] = {
        "scaled": lambda merged: add([part.weighted(0.97 * part.ratio) for part in merged.parts.values()]),
        "swapped": lambda merged: add([part.weighted((0.6, 0.9)[n]) for n, part in merged.parts.items()]),
        "left out": lambda merged: add([part.weighted(part.ratio) for part in list(merged.parts.values())[:1]]),
        "twice": lambda merged: merged.delta.times(2.0),
    }

    def spoiled(self: Merger, module: str) -> Merged:
        merged = right(self, module)
        return merged._replace(delta=spoil(merged))

    monkeypatch.setattr(Merger, "of", spoiled)
    for spoil in spoils.values():  # noqa: B007 - `spoiled` looks at it
        refuse(tmp_path, weighed, None, dtype=dtype)
        refuse(tmp_path, weighed, None, dtype=dtype, rank=7)


def test_one_module_is_enough(tmp_path, monkeypatch):
    """A small module that is wrong stops the run, however little it is in the whole file."""
    parts = drawn(2, 0)
    parts["layers.0.attention.to_v"] = tuple(1e-4 * t for t in parts["layers.0.attention.to_v"])
    path, _ = pairs(tmp_path / "a.safetensors", parts)
    calls = []

    def third(x: Factors, dtype: torch.dtype) -> Factors:
        calls.append(x)
        return to_dtype(scaled(x) if float(x.up.abs().max()) < 1e-2 else x, dtype)

    monkeypatch.setattr(results, "to_dtype", third)
    refuse(tmp_path, [(path, 1.0)], None, dtype="bf16")
    assert calls


def test_a_spoiled_step_leaves_the_steps_before_it(work, monkeypatch):
    (one, _), (other, _) = two(work.folder)
    loras = [{"lora": one.name, "ratio": 0.9}, {"lora": other.name, "ratio": 0.6}]
    steps = [{"name": "a", "loras": loras}, {"name": "b", "loras": loras[::-1], "rank": 3}]
    monkeypatch.setattr(results, "truncate", spoiled_truncation(scaled))
    message = work.zit("run", work.job(*steps)).refused()
    assert "what was written differs from what was wanted by " in message and "please report it with the recipe" in message
    assert work.files() == ["merged_cat_a.safetensors"]


@pytest.mark.parametrize("spoil", SPOILED)
def test_a_spoiled_merge_of_many_components(tmp_path, monkeypatch, spoil):
    """Beyond 128 components the inputs' inner products are estimates; what is refused is the same."""
    weighed = [(pairs(tmp_path / f"{n}.safetensors", drawn(48, n, side=1100))[0], 0.8) for n in range(3)]
    assert verdict(merge_into(tmp_path, weighed, "right", dtype="bf16"))["got"] == pytest.approx([0.8] * 3, rel=2e-3)
    monkeypatch.setattr(results, "to_dtype", spoiled_rounding(SPOILED[spoil]))
    refuse(tmp_path, weighed, None, dtype="bf16")


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_numbers_of_a_cut_merge_of_many_components(tmp_path, dtype):
    """Strengths are exact but for the cosines of the inputs, the energy that is missing is told by probes."""
    made = [pairs(tmp_path / f"{n}.safetensors", drawn(48, n, up=1.0 + n, side=1100)) for n in range(3)]
    ratios = (0.8, 0.5, -0.3)
    out = merge_into(tmp_path, [(path, r) for (path, _), r in zip(made, ratios, strict=True)], dtype=dtype, rank=90)
    wanted = weighted_sum([(deltas, r) for (_, deltas), r in zip(made, ratios, strict=True)])
    found, want = verdict(out), dense_check(out, wanted, [deltas for _, deltas in made])
    assert 1 - found["kept"] == pytest.approx(1 - want["kept"], rel=0.05)
    assert found["error"] == pytest.approx(want["error"], rel=0.03)
    assert found["asked"] == pytest.approx(ratios, rel=1e-3)
    assert found["got"] == pytest.approx(want["got"], rel=0.02, abs=0.01)


def test_the_numbers_of_another_method_of_many_components(tmp_path):
    """What the method made is compared with the inputs through shortened factors, what was written with all of them."""
    made = [pairs(tmp_path / f"{n}.safetensors", drawn(48, n, up=1.0 + n, side=1100)) for n in range(3)]
    weighed = [(path, 0.8) for path, _ in made]
    found = verdict(out := merge_into(tmp_path, weighed, "cut", dtype="bf16", rank=60, method="ties"))
    want = dense_check(
        out, read_deltas(merge_into(tmp_path, weighed, "whole", dtype="fp32", method="ties")), [d for _, d in made]
    )
    assert 1 - found["kept"] == pytest.approx(1 - want["kept"], rel=0.05)
    assert found["got"] == pytest.approx(want["got"], rel=0.05, abs=0.01)
    assert found["asked"] == pytest.approx(want["asked"], rel=0.05, abs=0.01)


def test_an_exact_merge_reads_every_tensor_once_and_decomposes_nothing(tmp_path, monkeypatch):
    weighed = [(path, 0.8) for path, _ in two(tmp_path)]
    reads, read = list[tuple[Path, str]](), SafetensorsFile.tensor

    def counted(self: SafetensorsFile, key: str, rows: tuple[int, int] | None = None) -> Tensor:
        reads.append((self.path, key))
        return read(self, key, rows)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a decomposition")

    monkeypatch.setattr(SafetensorsFile, "tensor", counted)
    for name in ("svd", "svdvals", "qr"):
        monkeypatch.setattr(torch.linalg, name, never)
    merge_into(tmp_path, weighed, dtype="bf16")
    factors = [found for found in reads if not found[1].endswith("alpha")]
    assert factors and len(factors) == len(set(factors))


# --- rounding alone never is an error ------------------------------------------------------------------------------------------

loras = st.tuples(
    st.integers(1, 8), st.floats(-4, 2).map(lambda e: 10**e), st.floats(-3, 3).map(lambda e: 10**e), st.integers(0, 999)
)


@examples(40)
@given(
    st.lists(st.tuples(loras, st.sampled_from([1.0, 0.3, -0.8])), min_size=1, max_size=3),
    st.sampled_from([*DTYPES]),
    st.sampled_from(["exact", 1, 3, {"energy": 0.9}]),
    st.sampled_from(["sum", "average", "normalize", "ties", "tsv"]),
)
def test_rounding_never_stops_a_merge(drawings, dtype, rank, method):
    """Changes from 1e-4 to 1e2, the scale in one factor or spread over both."""
    if method == "average" and abs(sum(ratio for _, ratio in drawings)) < 0.1:
        method = "sum"
    with tempfile.TemporaryDirectory() as name:
        folder, weighed = Path(name), []
        for n, ((components, size, lopsided, seed), ratio) in enumerate(drawings):
            factors = drawn(components, seed, up=size**0.5 * lopsided, down=size**0.5 / lopsided)
            weighed.append((pairs(folder / f"{n}.safetensors", factors)[0], ratio))
        found = verdict(merge_into(folder, weighed, dtype=dtype, rank=rank, method=method))
        if rank == "exact" and method == "sum" and len(drawings) == 1:
            assert found["error"] < {"fp32": 1e-6, "fp16": 2e-3, "bf16": 8e-3}[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [1e-3, 1e3])
def test_components_of_very_different_sizes(tmp_path, dtype, spread):
    parts = {m: (up * spread ** torch.arange(6).div(5), down) for m, (up, down) in drawn(6, 3).items()}
    path, _ = pairs(tmp_path / "a.safetensors", parts)
    for rank in ("exact", 3):
        assert verdict(merge_into(tmp_path, [(path, 1.0)], dtype=dtype, rank=rank))["error"] < 0.6


def mixed(pair: Pair, condition: float, seed: int) -> Pair:
    """The same change in a gauge of this condition number: components that are large and cancel."""
    up, down = (t.double() for t in pair)
    random = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(len(down), len(down), generator=random).double()).Q for _ in range(2))
    sizes = torch.logspace(0, float(np.log10(condition)), len(down), dtype=torch.float64)
    return up @ (left * sizes) @ right, right.T @ (left / sizes).T @ down


@pytest.mark.parametrize(("dtype", "condition"), [("fp32", 1e2), ("bf16", 1e2), ("bf16", 1e4), ("fp16", 1e4), ("bf16", 1e5)])
@pytest.mark.parametrize("rank", [3, "exact"])
@pytest.mark.parametrize("seed", range(0, 12, 2))
def test_components_that_nearly_cancel(tmp_path, dtype, condition, rank, seed):
    """What is measured is right in any gauge. Written whole, the large components are rounded each."""
    weighed, wanted = [], dict[str, Tensor]()
    for n in (seed, seed + 1):
        parts = {m: mixed(pair, condition, n) for m, pair in drawn(6, n, side=80).items()}
        path, deltas = pairs(tmp_path / f"{n}.safetensors", parts)
        weighed.append((path, 0.8))
        wanted = {m: wanted.get(m, 0.0) + 0.8 * delta for m, delta in deltas.items()}
    out = merge_into(tmp_path, weighed, dtype=dtype, rank=rank)
    written, energy = read_deltas(out), sum(float(d.norm()) ** 2 for d in wanted.values())
    error = (sum(float((written[m] - d).norm()) ** 2 for m, d in wanted.items()) / energy) ** 0.5
    assert verdict(out)["error"] == pytest.approx(error, rel=2e-3 if rank == 3 else 0.15)
    if rank == 3:
        best = (sum(best_error(d, 3) ** 2 for d in wanted.values()) / energy) ** 0.5
        assert error == pytest.approx(best, rel=2e-3)


def test_few_components_that_are_cut_take_no_probes(tmp_path, monkeypatch):
    """Gram matrices tell it all; probes decide where these see something too large, and they do."""
    weighed = [(path, 0.8) for path, _ in two(tmp_path)]
    probed, of = list[object](), Probed.of
    monkeypatch.setattr(verify.Probed, "of", lambda vectors, sums: probed.append(sums) or of(vectors, sums))
    plan = merge(weighed, shapes="free", dtype="fp32", rank=4).plan(tmp_path / "right.safetensors")
    changed = [m for m in plan.shapes if any(i.counts(m) for i in plan.inputs)]
    cut = [m for m in changed if m in plan.cut]
    right = verdict(merge_into(tmp_path, weighed, "right", rank=4))
    assert len(cut) > 10 and len(probed) == len(changed) - len(cut)
    monkeypatch.setattr(Components, "largest", lambda self, weights: float("inf"))
    assert verdict(merge_into(tmp_path, weighed, "again", rank=4)) == right
    assert len(probed) == 2 * (len(changed) - len(cut)) + len(cut)


@pytest.mark.parametrize(("large", "most"), [(1 << 25, 1), (0, 0)])
def test_few_modules_wait_for_their_check(tmp_path, monkeypatch, large, most):
    monkeypatch.setattr(verify, "_PENDING", 1)
    monkeypatch.setattr(verify, "_LARGE", large)
    handed, checked, waiting = list[object](), list[object](), list[int]()
    add, check = verify.Verifier.add, verify.Verifier.check

    def counted(self: verify.Verifier, made: Made) -> None:
        handed.append(made)
        add(self, made)
        waiting.append(len(handed) - len(checked))

    def slow(self: verify.Verifier, made: Made) -> None:
        time.sleep(0.02)  # else modules of this size are checked as fast as they are merged, without any bound
        check(self, made)
        checked.append(made)

    monkeypatch.setattr(verify.Verifier, "add", counted)
    monkeypatch.setattr(verify.Verifier, "check", slow)
    merge_into(tmp_path, [(path, 0.8) for path, _ in two(tmp_path)], rank=4)
    assert len(handed) == len(checked) > 10 and max(waiting) <= most


@pytest.mark.parametrize("rank", ["exact", 3])
@pytest.mark.parametrize("method", ["sum", "ties"])
def test_a_lora_whose_alpha_is_zero_counts_for_nothing(tmp_path, method, rank):
    """Alone or beside another one; its strength can't be told."""
    path, _ = pairs(tmp_path / "b.safetensors", drawn(4, 1))
    zero = tmp_path / "zero.safetensors"
    save_file({**load_file(path), **{f"diffusion_model.{m}.alpha": torch.tensor(0.0) for m in drawn(1, 0)}}, zero)
    told = (zero, {"ratio": 0.7, "alpha": "key"})
    assert verdict(merge_into(tmp_path, [told], "alone", method=method, rank=rank))["status"] == "empty"
    other, _ = pairs(tmp_path / "c.safetensors", drawn(4, 2))
    both = verdict(merge_into(tmp_path, [told, (other, 0.9)], "both", method=method, rank=rank))
    assert both["asked"][0] is both["got"][0] is None
    alone = verdict(merge_into(tmp_path, [(other, 0.9)], "other", method=method, rank=rank))
    assert both["got"][1] == pytest.approx(alone["got"][0], rel=1e-3 if method == "sum" else 0.2)


def test_what_is_told_is_what_was_written(tmp_path):
    """All numbers of `up` are rounded down alike, from 0.7 to 0.69921875."""
    parts = {m: (torch.eye(12, 4), down.bfloat16()) for m, (_, down) in drawn(4, 0).items()}
    path, deltas = pairs(tmp_path / "a.safetensors", parts)
    (done,) = run_plans([merge([(path, 0.7)], shapes="free").plan(tmp_path / "out.safetensors")], torch.device("cpu"))
    assert done.verdict and done.verdict.got[0] == pytest.approx(0.69921875, abs=2e-4)
    for module, measured in done.verdict.modules.items():
        wanted = 0.49 * float(deltas[module].square().sum())
        assert measured.written / wanted - 1 == pytest.approx((0.69921875 / 0.7) ** 2 - 1, rel=0.5)


@pytest.mark.parametrize("size", [1e-12, 1e-20, 1e12])
def test_sizes_that_no_training_has(tmp_path, size):
    """What they are is odd; an error of Python's would be worse. bfloat16 holds them all."""
    path, deltas = pairs(tmp_path / "a.safetensors", drawn(2, 0, up=size, down=size if size < 1 else 1e10))
    out = merge_into(tmp_path, [(path, 1.0)], dtype="bf16")
    assert all(float((read_deltas(out)[m] - d).norm()) < 0.01 * float(d.norm()) for m, d in deltas.items())


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_errors_of_copies_add_up_and_are_no_mistake(tmp_path, dtype):
    path, deltas = write_lora(tmp_path, "ai-toolkit", 2, 0, shapes=SHAPES)
    out = merge_into(tmp_path, [(path, 0.05)] * 40, dtype=dtype)
    for module, got in read_deltas(out).items():
        want = 2.0 * deltas.deltas[module]
        assert float((got - want).norm()) < 0.01 * float(want.norm())
