"""`inspect OUT --sources A B`: what files of any tool really contain, and in which words that is said."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from analysis.test_compare import one_line, plus, times
from pairs import MODULES, Pair, deltas, later_save, lora, rotated, write
from safetensors.torch import load_file, save_file
from screen import fits
from workspace import Workspace, merge_into

from extensions_built_in.zit_merge.algebra.least_squares import groups
from extensions_built_in.zit_merge.analysis.attribute import attribute
from extensions_built_in.zit_merge.analysis.attribution import Attribution
from extensions_built_in.zit_merge.formats.reader import load_lora
from extensions_built_in.zit_merge.report.text.attribution import attribution_text

Q, V, W2 = "layers.0.attention.to_q", "layers.0.attention.to_v", "layers.0.feed_forward.w2"
ONE, TWO, THREE = (lora(8, seed) for seed in range(3))


def of(*parts: tuple[dict[str, Pair], float]) -> dict[str, Pair]:
    """The exact weighted sum: components side by side."""
    first, *others = (times(one, strength) for one, strength in parts)
    for other in others:
        first = plus(first, other)
    return first


def cut(one: dict[str, Pair], rank: int) -> dict[str, Pair]:
    """The best approximation of a rank, by dense singular vectors."""
    found = {}
    for module, pair in one.items():
        left, sigma, right = torch.linalg.svd(pair.delta, full_matrices=False)
        found[module] = Pair((left[:, :rank] * sigma[:rank]).float(), right[:rank].float())
    return found


def attributed(folder: Path, out: dict[str, Pair], *sources: dict[str, Pair]) -> Attribution:
    paths = [write(folder / f"{i}.safetensors", one) for i, one in enumerate((out, *sources))]
    found = attribute(load_lora(paths[0]), [load_lora(p) for p in paths[1:]])
    json.dumps(found.to_json(), allow_nan=False)
    assert fits(attribution_text(found))
    return found


def traced(folder: Path, out: dict[str, Pair], *sources: dict[str, Pair]) -> dict:
    return attributed(folder, out, *sources).to_json()


def verdict(facts: dict) -> str:
    return " ".join(facts["verdict"])


def toolkit_script(folder: Path, paths: list[Path], strengths: list[float]) -> Path:
    """AI-Toolkit's merge_loras.py: every tensor, alpha too, times the strength; what has one key is added, ranks padded."""
    merged: dict[str, torch.Tensor] = {}
    for path, strength in zip(paths, strengths, strict=True):
        for key, tensor in load_file(path).items():
            tensor = tensor.float() * strength
            if key in merged and merged[key].shape != tensor.shape:
                shape = [max(sizes) for sizes in zip(merged[key].shape, tensor.shape, strict=True)]
                merged[key], tensor = (_padded(t, shape) for t in (merged[key], tensor))
            merged[key] = merged[key] + tensor if key in merged else tensor
    out = folder / "toolkit.safetensors"
    save_file({k: t.bfloat16() for k, t in merged.items()}, out)
    return out


def _padded(tensor: torch.Tensor, shape: list[int]) -> torch.Tensor:
    whole = torch.zeros(shape)
    whole[tuple(slice(n) for n in tensor.shape)] = tensor
    return whole


# --- sums ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strengths", [(0.8, 0.4), (1.0, -0.5), (2.0, 0.0), (0.05, 3.0)])
def test_a_right_merge(tmp_path, strengths):
    facts = traced(tmp_path, of((ONE, strengths[0]), (TWO, strengths[1])), ONE, TWO)
    assert facts["kind"] == "strengths"
    assert facts["strengths"] == pytest.approx(list(strengths), abs=1e-5)
    assert facts["rest"] < 1e-5 and facts["explained"] == pytest.approx(1)
    for own in facts["modules"].values():
        assert own == pytest.approx(list(strengths), abs=1e-4)
    assert "rounding explains the rest" in verdict(facts)
    assert facts["unknown"] == facts["missing"] == facts["alike"] == []


def test_least_squares_against_the_dense_deltas(tmp_path):
    # nothing fits exactly: a third LoRA is in it
    out = of((ONE, 0.7), (TWO, 0.2), (THREE, 0.9))
    facts = traced(tmp_path, out, ONE, TWO)
    columns = torch.stack([torch.cat([d.flatten() for d in deltas(one).values()]) for one in (ONE, TWO)], 1)
    target = torch.cat([deltas(out)[m].flatten() for m in ONE])
    wanted = torch.linalg.lstsq(columns, target[:, None]).solution[:, 0]
    assert facts["strengths"] == pytest.approx(wanted.tolist(), abs=1e-6)
    rest = float((target - columns @ wanted).norm() / target.norm())
    assert facts["rest"] == pytest.approx(rest, rel=1e-6)
    assert facts["explained"] == pytest.approx(1 - rest**2, rel=1e-6)


def test_our_own_merge_and_its_recipe(work: Workspace, loras):
    out = merge_into(work.folder, [(loras[0], 0.9), (loras[1], 0.3)], dtype="bf16")
    facts = json.loads(work.zit("inspect", out, "--sources", *loras, "--json", "--quiet").ok())
    assert facts["kind"] == "strengths" and facts["recipe"]
    assert facts["strengths"] == pytest.approx([0.9, 0.3], abs=2e-3)
    assert "`recipe FILE` prints" in verdict(facts)
    text = work.zit("inspect", out, "--sources", *loras, "--quiet").ok()
    assert "strength of source 1 in each module: 0.90 in all 240 modules" in text
    assert fits(text)


@pytest.mark.parametrize("other", ["ai-toolkit-lokr", "musubi-loha", "lycoris-full", "musubi-comfy"])
def test_with_files_of_other_algorithms(work: Workspace, other):
    paths = [work.lora("a.safetensors"), work.lora("b.safetensors", other, seed=1)]
    out = merge_into(work.folder, [(paths[0], 0.5), (paths[1], -0.7)], dtype="fp32")
    facts = json.loads(work.zit("inspect", out, "--sources", *paths, "--json", "--quiet").ok())
    assert facts["kind"] == "strengths"
    assert facts["strengths"] == pytest.approx([0.5, -0.7], abs=1e-4)


@pytest.mark.parametrize("producer", ["ai-toolkit-lokr", "musubi-lokr", "ai-toolkit-lokr-split"])  # two of them with an alpha
def test_a_lokr_in_a_lokr(work: Workspace, producer):
    path = work.lora("b.safetensors", producer, seed=1)
    facts = json.loads(work.zit("inspect", path, "--sources", work.lora("a.safetensors"), path, "--json", "--quiet").ok())
    assert facts["strengths"] == pytest.approx([0, 1], abs=1e-6)
    assert facts["verdict"][0].startswith("the file is 1.00 of source 2:")


def test_weights_by_block(tmp_path):
    out = of((ONE, 1.0), (TWO, 1.0))
    out |= {Q: of((ONE, 0.2), (TWO, 1.0))[Q], W2: of((ONE, -1.5), (TWO, 1.0))[W2]}
    found = attributed(tmp_path, out, ONE, TWO)
    facts = found.to_json()
    assert facts["kind"] == "by module"
    assert facts["rest"] > 0.1 > 1e-4 > facts["rest_by_module"]
    assert facts["modules"][Q] == pytest.approx([0.2, 1], abs=1e-5)
    assert facts["modules"][W2] == pytest.approx([-1.5, 1], abs=1e-5)
    text = attribution_text(found)
    assert re.search(r"^0 +1.00 +0.20 +1.00 +1.00 +1.00 +1.00 +-1.50 +1.00$", text, re.M)
    assert "strength of source 2 in each module: 1.00 in all 8 modules" in text


# --- truncation ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [2, 8, 12])
def test_a_truncated_merge_is_told_with_the_strengths_before_the_cut(tmp_path, rank):
    whole = of((ONE, 1.0), (TWO, 0.5))
    out = cut(whole, rank)
    found = attributed(tmp_path, out, ONE, TWO)
    facts = found.to_json()
    assert facts["kind"] == "truncated"
    assert facts["strengths"][0] < 0.999  # the plain answer is low
    assert facts["before_cut"]["strengths"] == pytest.approx([1, 0.5], abs=1e-4)
    energy = [sum(float(d.square().sum()) for d in deltas(one).values()) for one in (out, whole)]
    assert facts["before_cut"]["kept"] == pytest.approx(energy[0] / energy[1], rel=1e-4)
    assert f"1.00 of source 1 and 0.50 of source 2, truncated to rank {rank}, which kept" in verdict(facts)
    assert "in each module before the cut: 0.50 in all 8 modules" in attribution_text(found) or rank == 2


def test_our_own_truncated_merge_in_bf16(work: Workspace, loras):
    out = merge_into(work.folder, [(loras[0], 0.8), (loras[1], 0.6)], rank=3, dtype="bf16")
    facts = json.loads(work.zit("inspect", out, "--sources", *loras, "--json", "--quiet").ok())
    assert facts["kind"] == "truncated"
    assert facts["before_cut"]["strengths"] == pytest.approx([0.8, 0.6], abs=5e-3)


def test_a_resized_lora(tmp_path):
    facts = traced(tmp_path, cut(ONE, 3), ONE)
    assert facts["kind"] == "truncated" and facts["before_cut"]["strengths"] == pytest.approx([1], abs=1e-5)


def test_weights_by_block_and_truncated(tmp_path):
    whole = of((ONE, 1.0), (TWO, 1.0)) | {Q: of((ONE, 0.3), (TWO, 1.0))[Q], W2: of((ONE, 1.0), (TWO, 2.0))[W2]}
    facts = traced(tmp_path, cut(whole, 8), ONE, TWO)
    assert facts["kind"] == "truncated by module"
    assert facts["modules"][Q] == pytest.approx([0.3, 1], abs=1e-3)
    assert facts["modules"][W2] == pytest.approx([1, 2], abs=1e-3)


def test_a_cut_that_cost_hardly_anything_is_told_beside_modules_that_are_whole(tmp_path):
    # its rank is filled up with zeros to that of the sum
    whole = of((ONE, 1.0), (TWO, 1e-3))
    assert traced(tmp_path, whole, ONE, TWO)["before_cut"] is None
    left = cut({Q: whole[Q]}, 8)[Q]
    padded = Pair(torch.nn.functional.pad(left.up, (0, 8)), torch.nn.functional.pad(left.down, (0, 0, 0, 8)))
    facts = traced(tmp_path, whole | {Q: padded}, ONE, TWO)
    assert facts["kind"] == "strengths" and facts["strengths"][1] < 0.95e-3  # the plain answer is low
    assert facts["before_cut"]["strengths"] == pytest.approx([1, 1e-3], abs=1e-5)
    assert facts["before_cut"]["kept"] == pytest.approx(1, abs=1e-5)


def test_few_numbers_prove_no_truncation(tmp_path):
    # of rank 2 in each module anything is a cut sum with strengths of its own: 4 numbers for 2 unknowns
    facts = traced(tmp_path, lora(2, 9), ONE, TWO)
    assert facts["kind"] == "something else"
    assert "may have been cut by truncation" in verdict(facts)


# --- factors that were added ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "rank"), [(None, 8), (8, 8), (None, 4)])
def test_the_toolkit_s_script_gives_a_quarter_where_half_was_asked(work: Workspace, alpha, rank):
    paths = [write(work.folder / f"{i}.safetensors", lora(r, i, alpha)) for i, r in enumerate((8, rank))]
    out = toolkit_script(work.folder, paths, [0.5, 0.5])
    facts = json.loads(work.zit("inspect", out, "--sources", *paths, "--json", "--quiet").ok())
    assert facts["kind"] == "factors"
    assert facts["strengths"] == pytest.approx([0.25, 0.25], abs=0.02)
    assert facts["explained"] == pytest.approx((8 + rank) / (8 + 3 * rank), abs=0.03)  # pairs of components, own and crossed
    assert facts["factors"]["up"] == pytest.approx([0.5, 0.5], abs=1e-3)
    assert facts["factors"]["down"] == pytest.approx([0.5, 0.5], abs=1e-3)
    assert "factors were added, not products" in verdict(facts)
    assert "the strength was applied twice: its up and its down are each 0.50 of source 1 and 0.50 of" in verdict(facts)
    assert facts["inside"] is None or facts["inside"] > 0.99


def test_the_toolkit_s_script_on_one_lora(work: Workspace):
    path = write(work.folder / "a.safetensors", ONE)
    out = toolkit_script(work.folder, [path], [0.5])
    text = one_line(work.zit("inspect", out, "--sources", path, "--quiet").ok())
    assert "the file is 0.25 of source 1: rounding explains the rest" in text
    assert "the strength was applied twice: its up and its down are each 0.50 of source 1" in text


def test_the_toolkit_s_script_at_full_strength(work: Workspace):
    paths = [write(work.folder / f"{i}.safetensors", one) for i, one in enumerate((ONE, TWO))]
    out = toolkit_script(work.folder, paths, [1.0, 1.0])
    facts = json.loads(work.zit("inspect", out, "--sources", *paths, "--json", "--quiet").ok())
    assert facts["kind"] == "factors" and facts["strengths"] == pytest.approx([1, 1], abs=0.1)
    assert "applied twice" not in verdict(facts)
    assert "its up is 1.00 of source 1 and 1.00 of source 2, its down 1.00 of" in verdict(facts)


def test_added_factors_of_flat_spectra_are_not_taken_for_a_truncation(work: Workspace):
    # orthogonal factors of equal size: their sum's product is a truncation of the sum too, as good as any other of that rank
    modules = {Q: (900, 900), V: (900, 900)}
    paths = [write(work.folder / f"{i}.safetensors", lora(4, i, modules=modules)) for i in range(2)]
    out = toolkit_script(work.folder, paths, [0.5, 0.5])
    facts = json.loads(work.zit("inspect", out, "--sources", *paths, "--json", "--quiet").ok())
    assert facts["kind"] == "factors" and facts["strengths"] == pytest.approx([0.25, 0.25], abs=0.01)


def test_the_toolkit_s_script_on_lokrs(work: Workspace):
    paths = [work.lora(f"{i}.safetensors", "ai-toolkit-lokr", seed=i) for i in range(2)]
    tensors = [load_file(p) for p in paths]
    out = work.folder / "out.safetensors"
    save_file({k: t if k.endswith("alpha") else 0.5 * t + 0.5 * tensors[1][k] for k, t in tensors[0].items()}, out)
    facts = json.loads(work.zit("inspect", out, "--sources", *paths, "--json", "--quiet").ok())
    assert facts["kind"] == "factors" and facts["factors"]["up"] == pytest.approx([0.5, 0.5], abs=0.01)


def test_a_sum_in_kohya_s_way(tmp_path):
    # sd-scripts without --concat: ratio * sqrt(alpha / r) on up, sqrt(alpha / r) on down, then added
    one, two = lora(8, 0, alpha=2), lora(8, 1, alpha=8)
    out = {}
    for module, x in one.items():
        y, roots = two[module], (x.scale**0.5, two[module].scale ** 0.5)
        out[module] = Pair(0.6 * (x.up * roots[0] + y.up * roots[1]), x.down * roots[0] + y.down * roots[1])
    facts = traced(tmp_path, out, one, two)
    assert facts["kind"] == "factors"
    assert facts["strengths"] == pytest.approx([0.6, 0.6], abs=0.1)
    assert facts["factors"]["down"] == pytest.approx([0.5, 1], abs=1e-4)
    assert facts["factors"]["up"] == pytest.approx([1.2, 0.6], abs=1e-4)  # alpha is in the ups


def test_added_factors_of_two_saves_of_one_run_are_as_good_as_a_sum(tmp_path):
    later = later_save(ONE, 0.001)
    out = {m: Pair((p.up + later[m].up) / 2, (p.down + later[m].down) / 2) for m, p in ONE.items()}
    facts = traced(tmp_path, out, ONE, later)
    assert facts["kind"] == "strengths" and facts["alike"] == [[0, 1]]


def test_added_factors_in_another_gauge_are_cross_terms(tmp_path):
    added = {m: Pair(p.up + TWO[m].up, p.down + TWO[m].down) for m, p in ONE.items()}
    facts = traced(tmp_path, rotated(added), ONE, TWO)
    assert facts["kind"] == "cross terms" and facts["inside"] == pytest.approx(1, abs=1e-5)
    assert facts["factors"]["rest"] > 0.1
    assert "cross terms, as adding factors in place of products makes them" in verdict(facts)


# --- something else ------------------------------------------------------------------------------------------------------------


def test_another_lora_is_in_it(tmp_path):
    facts = traced(tmp_path, of((ONE, 1.0), (THREE, 1.0)), ONE, TWO)
    assert facts["kind"] == "something else"
    assert facts["strengths"] == pytest.approx([1, 0], abs=0.05)
    assert facts["inside"] == pytest.approx(0.6, abs=0.12)
    assert re.search(
        r"\d% is explained|\d % of its energy is explained by 1\.0\d? of source 1", verdict(facts).replace("0.99", "1.0")
    )
    assert "lies outside of the directions of the sources: other LoRAs, further training" in verdict(facts)


def test_nothing_of_the_sources(tmp_path):
    facts = traced(tmp_path, THREE, ONE, TWO)
    assert facts["kind"] == "something else" and facts["explained"] < 0.05


@pytest.mark.parametrize("which", ["missing", "unknown", "both"])
def test_modules_that_one_side_lacks(tmp_path, which):
    out, source = of((ONE, 0.5), (TWO, 0.5)), dict(ONE)
    two = dict(TWO)
    whole = sum(float(d.square().sum()) for d in deltas(out).values())
    if which in ("unknown", "both"):
        del source[Q], two[Q]
    if which in ("missing", "both"):
        del out[V]
    facts = traced(tmp_path, out, source, two)
    assert facts["kind"] == "strengths" and facts["strengths"] == pytest.approx([0.5, 0.5], abs=1e-5)
    assert facts["unknown"] == ([Q] if which != "missing" else [])
    assert facts["missing"] == ([V] if which != "unknown" else [])
    assert ("in none of the sources: layers.0.attention.to_q" in verdict(facts)) is (which != "missing")
    assert ("in the sources but not in the file: layers.0.attention.to_v" in verdict(facts)) is (which != "unknown")
    if which == "unknown":
        share = float(deltas(out)[Q].square().sum()) / whole
        assert facts["unknown_energy"] == pytest.approx(share, rel=1e-5)
        assert facts["explained"] == pytest.approx(1 - share, rel=1e-5)


def test_a_source_that_has_some_of_the_modules(tmp_path):
    part = {m: p for m, p in TWO.items() if "attention" in m}
    out = of((ONE, 0.5)) | {m: of((ONE, 0.5), (TWO, 0.7))[m] for m in part}
    found = attributed(tmp_path, out, ONE, part)
    facts = found.to_json()
    assert facts["kind"] == "strengths" and facts["strengths"] == pytest.approx([0.5, 0.7], abs=1e-5)
    assert facts["modules"][W2] == [pytest.approx(0.5, abs=1e-5), None]
    assert "strength of source 2 in each module: 0.70 in all 4 modules" in attribution_text(found)


def test_no_module_in_common_and_zeros(tmp_path):
    parts = [{m: p for m, p in ONE.items() if ("attention" in m) is attention} for attention in (True, False)]
    facts = traced(tmp_path, *parts)
    assert facts["kind"] == "nothing" and facts["strengths"] == [None]
    assert len(facts["unknown"]) == len(facts["missing"]) == 4
    zeros = times(ONE, 0.0)
    assert traced(tmp_path, zeros, ONE)["kind"] == "nothing"
    assert traced(tmp_path, ONE, ONE, zeros)["strengths"] == [pytest.approx(1), None]


# --- too alike -----------------------------------------------------------------------------------------------------------------


def test_of_sources_too_alike_only_the_sum_is_told(tmp_path):
    near = later_save(ONE, 1e-3)
    found = attributed(tmp_path, of((ONE, 0.9), (near, 0.1), (TWO, 0.3)), ONE, near, TWO)
    facts = found.to_json()
    assert facts["alike"] == [[0, 1]]
    text = verdict(facts)
    assert "sources 1 and 2 are too alike (cosine 1.00)" in text or "(cosine 0.9999)" in text
    assert "only what they add up to can be, 1.00 of source 1" in text
    assert all(own[0] is own[1] is None and own[2] == pytest.approx(0.3, abs=1e-3) for own in facts["modules"].values())
    shown = attribution_text(found)
    assert "strength of source 1 in each module: not to be told in all 8 modules" in shown
    assert shown.count("one of many that fit") == 2


def test_the_same_file_twice_among_the_sources(work: Workspace):
    path = write(work.folder / "a.safetensors", ONE)
    facts = json.loads(work.zit("inspect", path, "--sources", path, path, "--json", "--quiet").ok())
    assert facts["strengths"] == pytest.approx([0.5, 0.5]) and facts["alike"] == [[0, 1]]
    assert "1.00 of source 1" in verdict(facts)


def test_a_source_that_is_the_sum_of_two_others(tmp_path):
    facts = traced(tmp_path, of((ONE, 1.0), (TWO, 1.0)), ONE, TWO, of((ONE, 1.0), (TWO, 1.0)))
    assert facts["alike"] == [[0, 1, 2]]
    assert "nearly a sum of the others" in verdict(facts)


def test_groups():
    x, y, z = torch.eye(3, dtype=torch.float64)
    rows = torch.stack([x, y, 2 * x, z, -y, 0 * x])
    assert groups(rows @ rows.T) == [[0, 2], [1, 4]]
    assert groups(torch.ones(20, 20, dtype=torch.float64)) == [list(range(20))]
    assert groups(torch.eye(4, dtype=torch.float64)) == groups(torch.ones(1, 1)) == []


# --- many, hostile, wrong ------------------------------------------------------------------------------------------------------


def test_twenty_sources(work: Workspace):
    modules = {Q: (64, 64), W2: (64, 96)}
    loras = [lora(2, i, modules=modules) for i in range(20)]
    strengths = [round(0.1 * i - 0.5, 1) for i in range(20)]
    out = write(work.folder / "out.safetensors", of(*zip(loras, strengths, strict=True)))
    paths = [write(work.folder / f"{i}.safetensors", one) for i, one in enumerate(loras)]
    text = work.zit("inspect", out, "--sources", *paths, "--quiet").ok()
    assert fits(text)
    assert [float(x) for x in re.findall(r"^ +strength (\S+)$", text, re.M)] == pytest.approx(strengths, abs=1e-3)


@pytest.mark.parametrize("name", ["x" * 200, "\x1b[2J\nsource 9        fake", "\u4e2d\u6587", "%s{0}"])
def test_hostile_names(work: Workspace, name):
    path = write(work.folder / f"{name}.safetensors", ONE)
    text = work.zit("inspect", path, "--sources", path, write(work.folder / "b.safetensors", TWO), "--quiet").ok()
    assert fits(text)
    assert len(re.findall(r"^source \d", text, re.M)) == 2


def test_usage(work: Workspace):
    one, two = write(work.folder / "one.safetensors", ONE), write(work.folder / "two.safetensors", TWO)
    assert "looks into one file, 2 were named" in work.zit("inspect", one, two, "--sources", one).refused()
    assert "name a LoRA file before --sources" in work.zit("inspect", "--sources", one, two).refused()
    assert "there is no such file" in work.zit("inspect", one, "--sources", "none.safetensors").refused()
    other = write(work.folder / "other.safetensors", lora(8, 0, modules=MODULES | {W2: (48, 32)}))
    sentence = work.zit("inspect", one, "--sources", two, other).refused()
    assert all(part in sentence for part in ("one.safetensors", "other.safetensors", W2, "48 x 64", "48 x 32"))
    broken = lora(8, 0)
    broken[W2].up[0, 0] = math.inf
    sentence = work.zit("inspect", one, "--sources", write(work.folder / "b.safetensors", broken)).refused()
    assert "b.safetensors" in sentence and W2 in sentence


def test_json_has_the_documented_keys_and_comes_back(work: Workspace):
    paths = [write(work.folder / f"{i}.safetensors", one) for i, one in enumerate((cut(of((ONE, 1.0), (TWO, 0.5)), 8), ONE, TWO))]
    documented = re.findall(r"^ {8}(\w+): ", Attribution.__doc__, re.M)
    facts = json.loads(work.zit("inspect", paths[0], "--sources", *paths[1:], "--json", "--quiet").ok())
    assert list(facts) == documented
    again = attribute(load_lora(paths[0]), [load_lora(p) for p in paths[1:]])
    assert facts == json.loads(json.dumps(again.to_json(), allow_nan=False))
    assert f"`{facts['kind']}`" in Attribution.__doc__


def test_the_cosine_of_a_source_with_the_file(tmp_path):
    """By dense products over all modules of both, the ones that only one has too."""
    half = {m: pair for m, pair in THREE.items() if m != W2}
    facts = traced(tmp_path, ONE, plus(times(ONE, 0.5), TWO), half)
    for source, found in ((plus(times(ONE, 0.5), TWO), facts["shared"][0]), (half, facts["shared"][1])):
        inner = sum(float((ONE[m].delta * source[m].delta).sum()) for m in source)
        sizes = [math.sqrt(sum(float(p.delta.square().sum()) for p in one.values())) for one in (ONE, source)]
        assert found == pytest.approx(inner / math.prod(sizes), abs=1e-6)


def test_what_chance_gives(tmp_path):
    """Thirty draws: their root mean square is within three times its own spread, 1 / sqrt(2 * 30), of what is said."""
    cosines, chances = [], set()
    for seed in range(30):
        facts = traced(tmp_path, ONE, lora(8, 100 + seed))
        cosines.append(facts["shared"][0])
        chances.add(round(facts["chance"][0], 4))
    said = sum(chances) / len(chances)
    found = math.sqrt(sum(c * c for c in cosines) / len(cosines))
    assert found == pytest.approx(said, rel=3 / math.sqrt(60))


def test_a_source_without_any_change_has_no_cosine(tmp_path):
    facts = traced(tmp_path, ONE, times(TWO, 0.0))
    assert (facts["shared"], facts["chance"]) == ([None], [None])
