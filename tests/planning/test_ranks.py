"""Ranks that follow from the numbers: by energy and by size, in algebra against brute force and in files against dense SVDs."""

from __future__ import annotations

import itertools
import json
import re
import zlib
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles.dense import best_error, read_deltas, read_metadata, relative, weighted_sum
from oracles.producers import small_shapes
from safetensors.torch import load_file, save_file
from sweep import examples
from torch import Tensor
from workspace import Workspace, merge_into, write_lora

from extensions_built_in.zit_merge import ZitMergeError, load_lora, merge
from extensions_built_in.zit_merge.algebra import ranks
from extensions_built_in.zit_merge.config.parse import parse_section
from extensions_built_in.zit_merge.config.schema import RankRule
from extensions_built_in.zit_merge.errors import located

F64 = torch.float64
TO_K = "layers.0.attention.to_k"  # AI-Toolkit reads the rank there, so it has the largest
_PARTS = ("layers.0.", "layers.1.attention", "context_refiner.0.attention")
SHAPES = {
    name: shape
    for name, shape in small_shapes(dim=48, ffn=96, temb=32, cap=8, n_layers=2, n_refiners=1).items()
    if name.startswith(_PARTS)
}


# --- algebra -------------------------------------------------------------------------------------------------------------------

spectrum = st.lists(st.integers(0, 12), min_size=1, max_size=4).map(
    lambda values: torch.tensor(sorted(values, reverse=True), dtype=F64)
)
spectra = st.lists(spectrum, min_size=1, max_size=4).map(lambda found: {f"m{i}": sigma for i, sigma in enumerate(found)})
energies = st.sampled_from([0.1, 0.3, 0.5, 0.8, 0.9, 0.99, 1.0])


def energy(found: Mapping[str, Tensor], kept: Mapping[str, int]) -> float:
    return sum(float((sigma[: kept[m]] ** 2).sum()) for m, sigma in found.items())


def choices(found: Mapping[str, Tensor]) -> Iterator[dict[str, int]]:
    """Every choice of ranks from 1."""
    for counts in itertools.product(*(range(1, len(sigma) + 1) for sigma in found.values())):
        yield dict(zip(found, counts, strict=True))


def everything(found: Mapping[str, Tensor]) -> dict[str, int]:
    return {m: len(sigma) for m, sigma in found.items()}


def size(kept: Mapping[str, int], costs: Mapping[str, int]) -> int:
    return sum(n * costs[m] for m, n in kept.items())


def enough(found: Mapping[str, Tensor], kept: Mapping[str, int], share: float) -> bool:
    return energy(found, kept) >= share * energy(found, everything(found)) * (1 - 1e-9)


@examples(100)
@given(spectra, energies)
def test_the_common_rank_is_the_smallest_that_reaches_the_energy(found, share):
    longest = max(map(len, found.values()))
    want = next(r for r in range(1, longest + 1) if enough(found, dict.fromkeys(found, r), share))
    assert ranks.common_rank(found, share) == want


@examples(100)
@given(spectra, energies, st.lists(st.integers(1, 9), min_size=4, max_size=4))
def test_ranks_of_energy_reach_it_and_no_file_of_that_size_holds_more(found, share, prices):
    costs = dict(zip(found, prices, strict=False))
    kept = ranks.ranks_of_energy(found, costs, share)
    assert enough(found, kept, share)
    best = max(energy(found, other) for other in choices(found) if size(other, costs) <= size(kept, costs))
    assert energy(found, kept) == pytest.approx(best)


@examples(100)
@given(spectra, energies)
def test_ranks_of_energy_make_the_smallest_file_where_all_components_take_the_same(found, share):
    costs = dict.fromkeys(found, 1)
    least = min(size(other, costs) for other in choices(found) if enough(found, other, share))
    assert size(ranks.ranks_of_energy(found, costs, share), costs) == least


@examples(100)
@given(spectra, st.lists(st.integers(1, 9), min_size=4, max_size=4), st.integers(0, 60))
def test_ranks_that_fit_hold_the_most_energy_of_their_size(found, prices, room):
    costs = dict(zip(found, prices, strict=False))
    limit = size(dict.fromkeys(found, 1), costs) + room
    kept = ranks.ranks_that_fit(found, costs, lambda chosen: size(chosen, costs) <= limit)
    assert size(kept, costs) <= limit
    best = max(energy(found, other) for other in choices(found) if size(other, costs) <= size(kept, costs))
    assert energy(found, kept) == pytest.approx(best)
    if limit >= size(everything(found), costs):
        assert energy(found, kept) == energy(found, everything(found))


@examples(100)
@given(spectra, st.integers(0, 20))
def test_ranks_that_fit_are_optimal_where_all_components_take_the_same(found, room):
    costs = dict.fromkeys(found, 1)
    limit = len(found) + room
    kept = ranks.ranks_that_fit(found, costs, lambda chosen: size(chosen, costs) <= limit)
    assert energy(found, kept) == pytest.approx(max(energy(found, o) for o in choices(found) if size(o, costs) <= limit))


def test_what_every_module_holds_anyway_counts():
    """Three modules hold 100 + 1 + 1 of 183 at rank 1: that is 0.55, and nothing else is needed."""
    found = {"a": torch.tensor([10.0, 9.0], dtype=F64), "b": torch.ones(1, dtype=F64), "c": torch.ones(1, dtype=F64)}
    assert ranks.ranks_of_energy(found, dict.fromkeys(found, 1), 0.555) == {"a": 1, "b": 1, "c": 1}


def test_components_that_a_file_holds_in_any_case_come_first():
    """Two of `a` take the room that one would: its 1 comes before the 2 of b, which is worth more."""
    found = {"a": torch.tensor([3.0, 1.0], dtype=F64), "b": torch.tensor([3.0, 2.0], dtype=F64)}
    costs = dict.fromkeys(found, 1)
    assert ranks.ranks_of_energy(found, costs, 19 / 23) == {"a": 1, "b": 2}
    assert ranks.ranks_of_energy(found, costs, 19 / 23, least={"a": 2}) == {"a": 2, "b": 1}
    fits = lambda chosen: max(2, chosen["a"]) + chosen["b"] <= 3  # noqa: E731
    assert ranks.ranks_that_fit(found, costs, fits, {"a": 2}) == {"a": 2, "b": 1}


def test_ranks_of_nothing():
    found = {m: torch.zeros(1, dtype=F64) for m in "ab"}
    assert ranks.common_rank(found, 0.5) == 1
    assert ranks.ranks_of_energy(found, {"a": 1, "b": 2}, 0.5) == {"a": 1, "b": 1}


def test_a_total_that_the_spectra_do_not_reach():
    found = {m: torch.tensor([2.0, 1.0], dtype=F64) for m in "ab"}
    assert ranks.common_rank(found, 0.8) == 1
    assert ranks.common_rank(found, 0.8, 12.0) == 2
    assert ranks.common_rank(found, 0.8, 100.0) == 2
    assert ranks.ranks_of_energy(found, {"a": 1, "b": 1}, 0.8, 100.0) == {"a": 2, "b": 2}


# --- files ---------------------------------------------------------------------------------------------------------------------


def shaped(path: Path, rank: int, seed: int, shapes: Mapping[str, tuple[int, int]] = SHAPES) -> tuple[Path, dict[str, Tensor]]:
    """A LoRA whose modules differ in size by up to 30, each with singular values that fall by its own factor."""
    tensors, deltas = {}, {}
    for module, (out, into) in shapes.items():
        draw = zlib.crc32(f"{module} {seed}".encode())
        random = torch.Generator().manual_seed(draw)
        falls = (0.3 + draw % 7 / 10) ** torch.arange(rank) * 30 ** (draw % 11 / 10 - 1)
        up, down = torch.randn(out, rank, generator=random) * falls, torch.randn(rank, into, generator=random)
        tensors |= {f"diffusion_model.{module}.lora_A.weight": down, f"diffusion_model.{module}.lora_B.weight": up}
        deltas[module] = up.double() @ down.double()
    save_file(tensors, path)
    return path, deltas


@pytest.fixture
def given_loras(work) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Two LoRAs of rank 5 and 4 as a step has them, and their dense sum."""
    (one, first), (two, second) = shaped(work.folder / "one.safetensors", 5, 0), shaped(work.folder / "two.safetensors", 4, 1)
    return [{"lora": one.name, "ratio": 0.9}, {"lora": two.name, "ratio": -0.6}], weighted_sum([(first, 0.9), (second, -0.6)])


def file_ranks(path: Path) -> dict[str, int]:
    found = load_file(path)
    return {
        re.sub(r"^diffusion_model\.|\.lora_A\.weight$", "", k): len(t) for k, t in found.items() if k.endswith("lora_A.weight")
    }


def run(work: Workspace, loras: Sequence[Mapping[str, Any]], rank: object, **save: Any) -> Path:
    save = {"dtype": "fp32"} | save
    work.zit("run", work.job({"name": "a", "loras": loras, "rank": rank, "save": save})).ok()
    return work.out / "merged_cat_a.safetensors"


def common(wanted: Mapping[str, Tensor], share: float) -> int:
    """The smallest rank from 2, the lowest beside alpha keys, that keeps the share, from dense SVDs."""
    sigmas = [torch.linalg.svdvals(d) for d in wanted.values()]
    total = sum(float((s**2).sum()) for s in sigmas)
    return next(r for r in range(2, 100) if sum(float((s[:r] ** 2).sum()) for s in sigmas) >= share * total * (1 - 1e-9))


def kept(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The share of the energy that a file keeps."""
    return 1 - sum(float((found[m] - d).norm()) ** 2 for m, d in wanted.items()) / sum(
        float(d.norm()) ** 2 for d in wanted.values()
    )


@pytest.mark.parametrize("share", [0.3, 0.9, 0.99, 0.9999])
def test_the_smallest_common_rank_that_reaches_the_energy(work, given_loras, share):
    loras, wanted = given_loras
    made = run(work, loras, {"energy": share})
    rank, found = common(wanted, share), read_deltas(made)
    assert set(file_ranks(made).values()) == {rank}
    assert kept(found, wanted) >= share
    for module, delta in wanted.items():
        error = float((found[module] - delta).norm())
        assert error == pytest.approx(best_error(delta, rank), rel=1e-4, abs=1e-6 * float(delta.norm()))


def test_the_energies_above_ask_for_different_ranks(given_loras):
    assert len({common(given_loras[1], share) for share in (0.3, 0.9, 0.99, 0.9999)}) == 4


def test_energy_1_keeps_everything(work, given_loras):
    loras, wanted = given_loras
    made = run(work, loras, {"energy": 1})
    assert set(file_ranks(made).values()) == {9}
    assert all(relative(read_deltas(made)[m], d) < 1e-6 for m, d in wanted.items())


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("most", [1, 2, 50])
def test_max_caps_the_rank(work, given_loras, most, uniform):
    loras, wanted = given_loras
    free = file_ranks(run(work, loras, {"energy": 0.99}, uniform=uniform))
    made = file_ranks(run(work, loras, {"energy": 0.99, "max": most}, uniform=uniform))
    lowest = dict.fromkeys(free, 2)  # 1 and 2 do not reach it: nothing else is left out
    assert made == (free if most == 50 else lowest)
    assert common(wanted, 0.99) > 2


def test_what_max_cuts_off_is_made_up_for_elsewhere(work, given_loras):
    loras, wanted = given_loras
    free = file_ranks(run(work, loras, {"energy": 0.84}, uniform=False))
    made = run(work, loras, {"energy": 0.84, "max": 3}, uniform=False)
    capped = file_ranks(made)
    assert max(capped.values()) == 3 < max(free.values())
    assert kept(read_deltas(made), wanted) >= 0.84
    assert any(n > free[m] for m, n in capped.items())


def test_a_method_with_a_rank_by_energy(work):
    one, two = (write_lora(work.folder, "ai-toolkit", 4, n, shapes=SHAPES, stem=f"{n}")[0] for n in range(2))
    loras = [{"lora": one.name, "ratio": 1.0}, {"lora": two.name, "ratio": 0.5}]
    section = {"method": "ties", "params": {"density": 0.4}}
    work.zit("run", work.job({"name": "whole", "loras": loras} | section, save={"dtype": "fp32"})).ok()
    wanted = read_deltas(work.out / "merged_cat_whole.safetensors")
    work.zit("run", work.job({"name": "a", "loras": loras, "rank": {"energy": 0.9}} | section, save={"dtype": "fp32"})).ok()
    found = work.out / "merged_cat_a.safetensors"
    assert set(file_ranks(found).values()) == {common(wanted, 0.9)}
    assert kept(read_deltas(found), wanted) >= 0.9


def test_all_strengths_zero(work, given_loras):
    loras = [lora | {"ratio": 0.0} for lora in given_loras[0]]
    for rank in ({"energy": 0.9}, {"size_mb": 1}):
        made = run(work, loras, rank)
        assert set(file_ranks(made).values()) == {2} and not any(d.any() for d in read_deltas(made).values())


# --- ranks of their own --------------------------------------------------------------------------------------------------------


def of_their_own(wanted: Mapping[str, Tensor], share: float) -> dict[str, int]:
    """Two components for every module, then the best ones for the numbers that they take, until the share is reached."""
    parts = [(float(s) ** 2, sum(d.shape), k, m) for m, d in wanted.items() for k, s in enumerate(torch.linalg.svdvals(d))]
    found = dict.fromkeys(wanted, 2)
    reached = sum(energy for energy, _, k, _ in parts if k < 2)
    total = sum(energy for energy, *_ in parts)
    for energy, _, _, module in sorted((p for p in parts if p[2] > 1), key=lambda p: -p[0] / p[1]):
        if reached >= share * total:
            break
        found[module] += 1
        reached += energy
    return found


@pytest.mark.parametrize("share", [0.8, 0.9, 0.99])
def test_components_are_chosen_over_the_whole_file(work, given_loras, share):
    loras, wanted = given_loras
    made = run(work, loras, {"energy": share}, uniform=False)
    found, want = file_ranks(made), of_their_own(wanted, share)
    assert found == want | {TO_K: max(want.values())}
    assert len(set(found.values())) > 1
    assert kept(read_deltas(made), wanted) >= share
    for module, delta in wanted.items():
        error = float((read_deltas(made)[module] - delta).norm())
        assert error == pytest.approx(best_error(delta, found[module]), rel=1e-4, abs=1e-6 * float(delta.norm()))
    assert made.stat().st_size < run(work, loras, {"energy": share}).stat().st_size


def test_our_reader_and_the_metadata_know_the_ranks(work, given_loras):
    made = run(work, given_loras[0], {"energy": 0.9}, uniform=False)
    found, lora = file_ranks(made), load_lora(made)
    assert lora.ranks == found and not lora.questions
    adapter = json.loads(read_metadata(made)["lora_adapter_metadata"])
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = adapter[f"transformer.{key}"]
        for module, rank in found.items():
            named = [value for name, value in pattern.items() if re.match(name, module)]
            assert (named or [adapter["transformer.r"]]) == [rank]
    assert adapter["transformer.r"] == adapter["transformer.lora_alpha"] == max(found.values())
    assert set(adapter["transformer.target_modules"]) == set(found)
    alphas = {
        k.removeprefix("diffusion_model.").removesuffix(".alpha"): float(t) for k, t in load_file(made).items() if "alpha" in k
    }
    assert alphas == found


def test_the_ranks_of_every_module_are_shown(work, given_loras):
    job = work.job({"name": "a", "loras": given_loras[0], "rank": {"energy": 0.9}, "save": {"uniform": False}})
    text = work.zit("run", job).ok()
    ranks_found = file_ranks(work.out / "merged_cat_a.safetensors")
    row = next(line for line in text.split("  rank\n")[1].splitlines() if line.strip().startswith("0 "))
    names = ("adaLN_modulation.0", *(f"attention.{c}" for c in ("to_q", "to_k", "to_v", "to_out.0")))
    assert row.split()[1:6] == [str(ranks_found[f"layers.0.{name}"]) for name in names]


def test_diffusers_reads_ranks_of_their_own(tmp_path):
    reader = pytest.importorskip("readers.test_diffusers")
    model = reader.tiny_zimage.transformer(n_layers=2).eval()
    shapes = {m: s for m, s in reader.tiny_zimage.linear_shapes(model).items() if m.startswith("layers.")}
    loras = [(shaped(tmp_path / f"{n}.safetensors", 4, n, shapes)[0], 0.002) for n in range(2)]
    for rule in ({"energy": 0.9}, {"size_mb": 0.06}):
        out = merge_into(tmp_path, loras, rank=rule, uniform=False)
        assert len(set(file_ranks(out).values())) > 1
        got = reader.fused(model, out)
        for module, delta in read_deltas(out).items():
            assert (got[module] - delta).abs().max() <= 1e-6, module


# --- sizes ---------------------------------------------------------------------------------------------------------------------


def planned(folder: Path, loras: Sequence[tuple[Path, float]], limit: int, **how: Any) -> tuple[int, int]:
    """(rank, bytes) for so many bytes at most; the limit takes six decimals in the recipe."""
    plan = merge(loras, rank={"size_mb": limit / 1e6}, shapes="free", device="cpu", **how).plan(folder / "out.safetensors")
    return plan.rank, plan.bytes


@pytest.mark.parametrize("how", [{"dtype": "fp32"}, {"format": "comfyui"}], ids=str)
def test_a_file_has_at_most_that_size_and_one_rank_more_would_be_over(tmp_path, how):
    loras = [(shaped(tmp_path / f"{n}.safetensors", 4 + n, n)[0], 0.5) for n in range(2)]
    _, whole = planned(tmp_path, loras, 10_000_001, **how)
    least = bisect_left(range(whole), True, key=lambda limit: fits(tmp_path, loras, limit, **how))
    limits = range(least, whole + 5_000, (whole - least) // 16)
    found = {limit: planned(tmp_path, loras, limit, **how) for limit in limits}
    assert all(announced <= limit for limit, (_, announced) in found.items())
    sizes = dict(found.values())
    assert set(sizes) == set(range(2, 10))
    digits = 20  # a limit of fewer digits makes a shorter recipe
    for rank, size in sizes.items():
        assert planned(tmp_path, loras, size + digits, **how)[0] == rank
    for rank in range(3, 10):
        assert planned(tmp_path, loras, sizes[rank] - digits, **how)[0] == rank - 1
    assert not fits(tmp_path, loras, sizes[2] - digits, **how)
    for limit in list(limits)[:: len(limits) // 2]:
        rule = {"size_mb": limit / 1e6}
        made = merge(loras, rank=rule, shapes="free", device="cpu", **how).save(tmp_path / str(limit) / "out.safetensors")
        assert made.stat().st_size <= limit
        assert load_lora(made).ranks[TO_K] == found[limit][0] * (3 if how.get("format") == "comfyui" else 1)


def fits(folder: Path, loras: Sequence[tuple[Path, float]], limit: int, **how: Any) -> bool:
    """Whether the lowest rank does; 0 is no size."""
    try:
        return bool(limit and planned(folder, loras, limit, **how))
    except ZitMergeError as e:
        assert "a file of rank 2 takes " in str(e)
        return False


@pytest.mark.parametrize("limit", [0.15, 0.2, 0.3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ranks_of_their_own_hold_more_in_the_same_size(work, given_loras, limit, dtype):
    loras, wanted = given_loras
    uniform = run(work, loras, {"size_mb": limit}, dtype=dtype)
    rank, held, taken = load_lora(uniform).rank, kept(read_deltas(uniform), wanted), uniform.stat().st_size
    assert taken <= limit * 1e6
    own = run(work, loras, {"size_mb": limit}, dtype=dtype, uniform=False)
    assert own.stat().st_size <= limit * 1e6
    assert len(set(file_ranks(own).values())) > 1 or rank == 9
    assert kept(read_deltas(own), wanted) >= held - 1e-4


def test_size_that_holds_everything_cuts_nothing(work, given_loras):
    loras, wanted = given_loras
    for uniform in (True, False):
        made = run(work, loras, {"size_mb": 5}, uniform=uniform)
        assert set(file_ranks(made).values()) == {9}
        assert all(relative(read_deltas(made)[m], d) < 1e-6 for m, d in wanted.items())


@pytest.mark.parametrize("uniform", [True, False])
def test_a_size_below_that_of_the_lowest_rank(work, given_loras, uniform):
    job = work.job({"name": "a", "loras": given_loras[0], "rank": {"size_mb": 0.001}, "save": {"uniform": uniform}})
    for command in ("check", "run"):
        message = work.zit(command, job).refused()
        assert re.fullmatch(
            r"process\[0\]\.steps\[0\]\.rank: a file of rank 2 takes 0\.0\d* MB: set size_mb to that or more", message
        )
    assert work.files() == []


def test_the_size_that_is_advised_is_enough(work, given_loras):
    step = {"name": "a", "loras": given_loras[0]}
    message = work.zit("check", work.job(step | {"rank": {"size_mb": 0.001}})).refused()
    advised = float(re.search(r"takes ([\d.]+) MB", message)[1])
    work.zit("run", work.job(step | {"rank": {"size_mb": advised}})).ok()


# --- what is said, what later steps see ----------------------------------------------------------------------------------------


def test_the_dry_run_says_at_most(work, given_loras):
    loras = given_loras[0]
    cases = [
        ({"energy": 0.99}, True, "note: the rank follows from the singular values, for 0.99 of the energy: 9 at most"),
        ({"energy": 0.99, "max": 4}, True, "for 0.99 of the energy: 4 at most"),
        ({"energy": 0.5}, False, "for 0.5 of the energy: 9 at most"),
        ({"size_mb": 0.03}, False, "note: the rank follows from the singular values, for 0.03 MB: 9 at most"),
    ]
    for rank, uniform, text in cases:
        job = work.job({"name": "a", "loras": loras, "rank": rank, "save": {"uniform": uniform}})
        for command in (("run", job, "--dry-run"), ("check", job)):
            assert text in " ".join(work.zit(*command).ok().split())
    text = work.zit("run", work.job({"name": "a", "loras": loras, "rank": {"size_mb": 0.03}}), "--dry-run").ok()
    assert re.search(r"note: rank \d is what 0\.03 MB hold, rank 9 would hold\s+everything", text)
    assert work.files() == []


@pytest.mark.parametrize(
    ("rank", "save", "inputs", "said"),
    [
        ("exact", {}, 1, True),
        (1, {}, 5, True),
        ({"energy": 0.9, "max": 1}, {}, 5, True),
        ("same", {"format": "kohya"}, 1, True),
        (1, {"format": "diffusers"}, 5, False),  # has no alpha keys
        (2, {}, 5, False),
    ],
    ids=str,
)
def test_why_rank_1_becomes_2(work, rank, save, inputs, said):
    path, _ = shaped(work.folder / "one.safetensors", inputs, 0)
    job = work.job({"name": "a", "loras": [{"lora": path.name, "ratio": 1.0}], "rank": rank, "save": save})
    text = work.zit("run", job).ok()
    assert ("note: rank 2 is written where 1 would do: beside an alpha key" in " ".join(text.split())) is said
    written = 1 if save.get("format") == "diffusers" else 2
    assert f"rank {written}, bf16" in text and load_lora(work.out / "merged_cat_a.safetensors").rank == written


def test_the_run_says_the_rank_that_was_found(work, given_loras):
    loras, wanted = given_loras
    text = work.zit("run", work.job({"name": "a", "loras": loras, "rank": {"energy": 0.9}})).ok()
    rank = common(wanted, 0.9)
    made = work.out / "merged_cat_a.safetensors"
    assert f"  wrote {len(SHAPES)} modules, rank {rank}, bf16, {made.stat().st_size / 1e6:,.1f} MB\n    {made}\n" in text


@pytest.mark.parametrize(("keep", "uniform"), [(True, False), (False, True)])
def test_a_later_step_has_the_rank_that_came_out(work, given_loras, keep, uniform):
    loras, wanted = given_loras
    small = {"energy": 0.9} if uniform else {"size_mb": 0.2}
    steps = [
        {"name": "small", "loras": loras, "rank": small, "keep": keep, "save": {"uniform": uniform}},
        {"name": "exact", "loras": [{"lora": "small", "ratio": 2.0}]},
        {"name": "same", "loras": [{"lora": "small", "ratio": 1.0}, loras[0]], "rank": "same"},
        {"name": "twice", "loras": [{"lora": "exact", "ratio": 1.0}, {"lora": "small", "ratio": 1.0}]},
    ]
    config = work.job(*steps, save={"dtype": "fp32"})
    text = work.zit("run", config).ok()
    ranks_of = {name: file_ranks(work.out / f"merged_cat_{name}.safetensors") for name in ("exact", "same", "twice")}
    (rank,) = set(ranks_of["exact"].values())
    if uniform:
        assert rank == common(wanted, 0.9)
    assert keep is ((work.out / "merged_cat_small.safetensors").exists())
    if keep:
        assert rank == max(file_ranks(work.out / "merged_cat_small.safetensors").values())
    assert set(ranks_of["same"].values()) == {max(rank, 5)}
    assert set(ranks_of["twice"].values()) == {2 * rank}
    assert text.count("  wrote ") == 3 + keep
    before = {name: (work.out / name).stat().st_mtime_ns for name in work.files()}
    text = work.zit("run", config).ok()
    assert "  wrote " not in text and text.count("kept ") == 3 + keep
    assert {name: (work.out / name).stat().st_mtime_ns for name in work.files()} == before
    (work.out / "merged_cat_twice.safetensors").unlink()
    text = work.zit("run", config).ok()
    assert text.count("kept ") == 2 + keep and text.count("  wrote ") == 1
    assert file_ranks(work.out / "merged_cat_twice.safetensors") == ranks_of["twice"]


def test_a_file_of_another_rule_is_made_again(work, given_loras):
    for rank, said in ((0.9, "  wrote "), (0.9, "kept "), (0.9000001, "  wrote ")):
        assert said in work.zit("run", work.job({"name": "a", "loras": given_loras[0], "rank": {"energy": rank}})).ok()


@pytest.mark.parametrize("rank", [{"energy": 0.9}, {"energy": 0.99, "max": 3}, {"size_mb": 0.2}], ids=str)
@pytest.mark.parametrize("uniform", [True, False])
def test_a_recipe_makes_the_same_bytes(work, given_loras, rank, uniform):
    made = run(work, given_loras[0], rank, uniform=uniform, dtype="bf16")
    recipe = json.loads(read_metadata(made)["zit_merge.recipe"])
    assert recipe["steps"][0]["rank"] == rank
    assert work.again(work.recipe(made)).read_bytes() == made.read_bytes()


def test_the_size_announced_is_the_size_written(tmp_path):
    loras = [(shaped(tmp_path / f"{n}.safetensors", 4, n)[0], 0.5) for n in range(2)]
    for n, rank in enumerate(({"size_mb": 0.25}, {"size_mb": 0.1234}, 3, "exact")):
        settled = merge(loras, rank=rank, shapes="free", device="cpu")
        assert settled.plan(tmp_path / f"x{n}.safetensors").bytes == settled.save(tmp_path / f"x{n}.safetensors").stat().st_size
    at_most = merge(loras, rank={"energy": 0.9}, shapes="free", device="cpu")
    assert at_most.plan(tmp_path / "y.safetensors").bytes > at_most.save(tmp_path / "y.safetensors").stat().st_size


RULES = {"energy=0.9": {"energy": 0.9}, "energy=0.99,max=3": {"energy": 0.99, "max": 3}, "size_mb=1": {"size_mb": 1}}


@pytest.mark.parametrize("words", RULES)
def test_rules_on_the_command_line(work, given_loras, words):
    common = ["--ratio", 1, "--shapes", "free", "--device", "cpu", "--rank", words]
    work.zit("merge", "one.safetensors", "two.safetensors", "-o", "x.safetensors", *common).ok()
    recipe = json.loads(read_metadata(work.folder / "x.safetensors")["zit_merge.recipe"])
    assert recipe["steps"][0]["rank"] == RULES[words]


def test_a_rule_on_the_command_line_that_means_nothing(work, given_loras):
    for words, says in (("energy=x", "needs a number above 0 for energy, not 'x'"), ("energy", "must be exact, same, a whole")):
        common = ["--ratio", 1, "--shapes", "free", "--rank", words]
        assert says in work.zit("merge", "one.safetensors", "-o", "x.safetensors", *common).refused()


def test_a_lokr_by_energy(tmp_path):
    few = {m: s for m, s in SHAPES.items() if m.startswith("layers.1")}
    path, made = write_lora(tmp_path, "ai-toolkit-lokr", 2, shapes=few)
    other = shaped(tmp_path / "other.safetensors", 3, 5, few)
    both = weighted_sum([(made.deltas, 1.0), (other[1], 0.001)])
    for loras, wanted in (([(path, 1.0)], made.deltas), ([(path, 1.0), (other[0], 0.001)], both)):
        out = merge_into(tmp_path, loras, rank={"energy": 0.8})
        assert set(file_ranks(out).values()) == {common(wanted, 0.8)}
        assert kept(read_deltas(out), wanted) >= 0.8


# --- what is refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "says"),
    [
        ({"energy": 0}, "needs a number above 0 for energy, not 0"),
        ({"energy": -0.5}, "needs a number above 0 for energy, not -0.5"),
        ({"energy": 1.5}, "takes energy as a share from 0 to 1, not 1.5: 0.99 keeps 99 %"),
        ({"energy": 99}, "takes energy as a share from 0 to 1, not 99"),
        ({"energy": "x"}, "needs a number above 0 for energy, not 'x'"),
        ({"energy": True}, "needs a number above 0 for energy, not True"),
        ({"energy": float("nan")}, "needs a number above 0 for energy"),
        ({"energy": float("inf")}, "needs a number above 0 for energy"),
        ({"energy": [0.9]}, "needs a number above 0 for energy"),
        ({"energy": 0.9, "size_mb": 5}, "needs either energy, such as {energy: 0.99, max: 64}, or size_mb"),
        ({}, "needs either energy"),
        ({"max": 8}, "needs either energy"),
        ({"energie": 0.9}, "has no energie (did you mean energy?); there are energy, max, size_mb"),
        ({"energy": 0.9, "maxx": 4}, "has no maxx (did you mean max?)"),
        ({"size": 100}, "has no size (did you mean size_mb?)"),
        ({"energy": 0.9, "max": 0}, "needs a number above 0 for max, not 0"),
        ({"energy": 0.9, "max": 4.5}, "needs a whole number for max, not 4.5"),
        ({"energy": 0.9, "max": "4"}, "needs a number above 0 for max, not '4'"),
        ({"size_mb": 100, "max": 4}, "takes max beside energy only"),
        ({"size_mb": 0}, "needs a number above 0 for size_mb, not 0"),
        ({"size_mb": "1GB"}, "needs a number above 0 for size_mb, not '1GB'"),
        ([0.9], "must be exact, same, a whole number from 1, {energy: 0.99} or {size_mb: 150}, not [0.9]"),
        (0.9, "must be exact, same, a whole number from 1, {energy: 0.99} or {size_mb: 150}, not 0.9"),
    ],
    ids=str,
)
@pytest.mark.parametrize("level", ["step", "section"])
def test_rules_that_mean_nothing(rank, says, level):
    step = {"name": "a", "loras": [{"lora": "me.safetensors", "ratio": 1}]}
    keys = {"rank": rank}
    raw = {"type": "zit_merge", "steps": [step | keys if level == "step" else step]} | (keys if level == "section" else {})
    with pytest.raises(ZitMergeError) as error, located("process[1]"):
        parse_section(raw)
    place = "process[1].steps[0].rank" if level == "step" else "process[1].rank"
    assert str(error.value).startswith(f"{place}: {says}") and "\n" not in str(error.value)


def test_rules_that_mean_something():
    for rank in ({"energy": 1}, {"energy": 1e-9}, {"energy": 0.5, "max": 1}, {"size_mb": 150}, {"size_mb": 0.5}):
        raw = {"type": "zit_merge", "rank": rank, "steps": [{"name": "a", "loras": [{"lora": "x", "ratio": 1}]}]}
        (step,) = parse_section(raw).steps
        assert step.rank == RankRule(**rank) and step.rank.record() == rank


def test_a_rule_for_a_lokr_that_stays_one(work):
    work.lora("me.safetensors", "ai-toolkit-lokr")
    step = {"name": "a", "loras": [{"lora": "me.safetensors", "ratio": 1}], "save": {"keep_lokr": True}, "rank": {"energy": 0.9}}
    message = work.zit("check", work.job(step)).refused()
    assert message.startswith("process[0].steps[0].save.keep_lokr: only one LoKr that is scaled can stay a LoKr")
