"""`inspect` of several files: cosines, shared directions, what a plain sum does, and the advice, for people and as JSON."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from oracles import methods as oracle
from oracles.producers import PRODUCERS
from pairs import MODULES, Pair, deltas, lora, write
from safetensors.torch import load_file, save_file
from screen import fits
from workspace import FEW, Workspace

from extensions_built_in.zit_merge import ZitMergeError
from extensions_built_in.zit_merge.algebra import overlap as algebra
from extensions_built_in.zit_merge.analysis.compare import Comparison, compare
from extensions_built_in.zit_merge.analysis.measure import measure
from extensions_built_in.zit_merge.formats.reader import load_lora
from extensions_built_in.zit_merge.report.text.compare import comparison_text

Q, W2 = "layers.0.attention.to_q", "layers.0.feed_forward.w2"
BIG = {"layers.0.attention.to_q": (300, 300), "layers.0.attention.to_v": (300, 300), "layers.7.attention.to_q": (300, 300)}


def files(folder: Path, *loras: dict[str, Pair]) -> list[Path]:
    return [write(folder / f"{i}.safetensors", one) for i, one in enumerate(loras)]


def compared(folder: Path, *loras: dict[str, Pair]) -> Comparison:
    return compare(measure([load_lora(p) for p in files(folder, *loras)]))


def facts_of(folder: Path, *loras: dict[str, Pair]) -> dict:
    return compared(folder, *loras).to_json()


def times(one: dict[str, Pair], strength: float) -> dict[str, Pair]:
    return {m: Pair(p.up * strength, p.down, p.alpha) for m, p in one.items()}


def plus(one: dict[str, Pair], other: dict[str, Pair]) -> dict[str, Pair]:
    """The exact sum: components side by side."""
    return {m: Pair(torch.cat([p.up, other[m].up], 1), torch.cat([p.down, other[m].down])) for m, p in one.items()}


def kinds(facts: dict) -> list[str]:
    return [a["kind"] for a in facts["advice"]]


def said(facts: dict, kind: str) -> str:
    (text,) = (a["text"] for a in facts["advice"] if a["kind"] == kind)
    return text


def flat(one: dict[str, torch.Tensor], modules=MODULES) -> torch.Tensor:
    return torch.cat([one[m].flatten() if m in one else torch.zeros(o * i).double() for m, (o, i) in modules.items()])


def cosine(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(x @ y / x.norm() / y.norm())


def one_line(text: str) -> str:
    return " ".join(text.split())


# --- numbers -------------------------------------------------------------------------------------------------------------------


def test_cosines_and_norms_against_the_dense_deltas(tmp_path):
    loras = [lora(8, 0), lora(4, 1, alpha=1), plus(lora(8, 0), lora(8, 2))]
    facts = facts_of(tmp_path, *loras)
    wholes = [deltas(one) for one in loras]
    flats = [flat(w) for w in wholes]
    assert [f["norm"] for f in facts["files"]] == pytest.approx([float(f.norm()) for f in flats], rel=1e-6)
    for i in range(3):
        assert facts["cosines"][i] == pytest.approx([cosine(flats[i], f) for f in flats], abs=1e-6)
    assert facts["sum"]["norm"] == pytest.approx(float(sum(flats).norm()), rel=1e-6)
    assert facts["sum"]["unrelated"] == pytest.approx(math.hypot(*(float(f.norm()) for f in flats)), rel=1e-6)
    assert facts["sum"]["strongest"] == pytest.approx(float(flats[2].norm()), rel=1e-6)
    assert set(facts["modules"]) == set(MODULES)
    for module, found in facts["modules"].items():
        own = [w[module].flatten() for w in wholes]
        assert found["files"] == [0, 1, 2]
        assert found["norms"] == pytest.approx([float(o.norm()) for o in own], rel=1e-6)
        for i in range(3):
            assert found["cosines"][i] == pytest.approx([cosine(own[i], o) for o in own], abs=1e-6)


@pytest.mark.parametrize("other", ["musubi", "ai-toolkit-lokr", "musubi-loha", "lycoris-full", "musubi-comfy"])
def test_files_of_other_trainers_and_algorithms(work: Workspace, other):
    work.shapes = FEW
    paths = [work.lora("a.safetensors"), work.lora("b.safetensors", other, seed=1)]
    made = [PRODUCERS[p].make(FEW, 2, s, torch.bfloat16).deltas for s, p in enumerate(("ai-toolkit", other))]
    flats = [flat(one, FEW) for one in made]
    ran = work.zit("inspect", *paths, "--json", "--quiet")
    facts = json.loads(ran.ok())
    assert facts["cosines"][0][1] == pytest.approx(cosine(*flats), abs=1e-5)
    assert facts["sum"]["norm"] == pytest.approx(float(sum(flats).norm()), rel=1e-5)
    assert facts["files"][1]["modules"] == len(made[1])
    assert {m for m, f in facts["modules"].items() if f["files"] == [0, 1]} == set(made[0]) & set(made[1])
    assert fits(work.zit("inspect", *paths, "--quiet").ok())


def drift(count: int, same: int = 4, own: int = 4, strength: float = 1.0) -> list[dict[str, Pair]]:
    common = times(lora(same, 100, modules=BIG), strength)
    return [plus(common, lora(own, 10 + i, modules=BIG)) for i in range(count)]


@pytest.mark.parametrize("count", [2, 3])
def test_directions_that_all_share(tmp_path, count):
    facts = facts_of(tmp_path, *drift(count))
    for found in facts["modules"].values():
        for side in ("columns", "rows"):
            assert found["directions"][side]["shared"] == {str(count): 4}
            assert (found["directions"][side]["common"], found["directions"][side]["of"]) == (4, 4 + 4 * count)
            values = found["directions"][side]["values"]
            assert len(values) == found["directions"][side]["of"] and values == sorted(values, reverse=True)
            assert values[:4] == pytest.approx([count] * 4, rel=0.1) and sum(values) == pytest.approx(8 * count, rel=1e-3)
            assert found["directions"][side]["told"] and 1 < found["directions"][side]["chance"] < 1.7
        assert found["directions"]["energy"]["both"] == pytest.approx([0.5] * count, abs=0.1)
    assert facts["shared"]["columns"] == {str(count): 4.0}
    assert facts["shared"]["energy"]["both"] == pytest.approx([0.5] * count, abs=0.1)


def test_shares_of_energy_against_dense_projections(tmp_path):
    loras = drift(3, strength=0.6)
    facts = facts_of(tmp_path, *loras)
    wholes = [deltas(one) for one in loras]
    energy = torch.zeros(3)
    for module in BIG:
        sides = []
        for stacked in ([w[module] for w in wholes], [w[module].T for w in wholes]):
            bases = [oracle.triplets(s)[0] for s in stacked]
            values, vectors = torch.linalg.eigh(sum(b @ b.T for b in bases))
            sides.append(vectors[:, values > 2])
        energy += torch.tensor([float((sides[0].T @ w[module] @ sides[1]).square().sum()) for w in wholes])
    whole = torch.tensor([float(flat(w, BIG).square().sum()) for w in wholes])
    assert facts["shared"]["energy"]["both"] == pytest.approx((energy / whole).tolist(), rel=1e-4)


def test_what_only_some_share_is_counted_by_how_many(tmp_path):
    common = lora(3, 100, modules=BIG)
    loras = [plus(common, lora(4, 10 + i, modules=BIG)) for i in range(2)] + [lora(4, 20 + i, modules=BIG) for i in range(3)]
    facts = facts_of(tmp_path, *loras)
    assert facts["shared"]["columns"] == facts["shared"]["rows"] == {"2": 3.0}
    assert all(f["directions"]["columns"]["common"] == 0 for f in facts["modules"].values())  # three of five would be common


def test_a_short_side_that_is_full_tells_nothing(tmp_path):
    wide = {"layers.0.adaLN_modulation.0": (64, 16)}
    found = compared(tmp_path, lora(16, 0, modules=wide), lora(16, 1, modules=wide))
    rows = found.to_json()["modules"]["layers.0.adaLN_modulation.0"]["directions"]["rows"]
    assert (rows["told"], rows["common"], rows["shared"]) == (False, 0, {})
    assert "nothing can be told in 1 module" in one_line(comparison_text(found))


def test_of_a_change_of_high_rank_the_leading_directions(tmp_path, monkeypatch):
    monkeypatch.setattr(algebra, "THIN", 6)
    monkeypatch.setattr(algebra, "LEADING", 4)
    found = compared(tmp_path, lora(8, 0), lora(4, 1))
    assert found.measured.leading == list(found.measured.modules)
    assert {common.columns.of for common in found.measured.common.values()} == {8}
    assert "8 modules (e.g. layers.0.adaLN_modulation.0) a change has a rank above" in one_line(comparison_text(found))
    monkeypatch.undo()
    assert facts_of(tmp_path, lora(8, 0), lora(4, 1))["leading"] == []


# --- advice --------------------------------------------------------------------------------------------------------------------


def test_unrelated_ones_are_summed(tmp_path):
    found = compared(tmp_path, lora(8, 0), lora(8, 1))
    facts = found.to_json()
    assert kinds(facts) == ["unrelated"]
    growth = facts["sum"]["norm"] / facts["sum"]["strongest"]
    assert f"to {growth:.2f} times the strongest one; where pictures suffer, smaller ratios, about {1 / growth:.2f}" in said(
        facts, "unrelated"
    )
    text = one_line(comparison_text(found))
    assert f"plain sum at a ratio of 1 each {growth:.2f} times as strong as the strongest one" in text


def test_the_same_lora_twice_also_as_one_path(work: Workspace):
    path = write(work.folder / "a.safetensors", lora(8, 0))
    facts = json.loads(work.zit("inspect", path, path, "--json", "--quiet").ok())
    assert kinds(facts) == ["same"]
    assert facts["cosines"] == [[pytest.approx(1)] * 2] * 2
    assert facts["sum"]["norm"] == pytest.approx(2 * facts["files"][0]["norm"])
    assert "LoRAs 1 and 2 (cosine 1.00): as good as the same change" in said(facts, "same")


@pytest.mark.parametrize(("strength", "cosine_"), [(1.0, 0.5), (0.8, 0.61), (0.3, 0.92)])
def test_alike_ones_are_averaged(tmp_path, strength, cosine_):
    base = lora(8, 0, modules=BIG)
    loras = [plus(base, times(lora(8, 1 + i, modules=BIG), strength)) for i in range(2)]
    facts = facts_of(tmp_path, *loras)
    found = facts["cosines"][0][1]
    assert found == pytest.approx(1 / (1 + strength**2), abs=0.02) == pytest.approx(cosine_, abs=0.03)
    assert kinds(facts) in (["alike"], ["related", "common"])[: 1 if found > 0.5 else 2]
    if found > 0.5:
        assert "method: average or slerp" in said(facts, "alike") and f"(cosine {found:.2f})" in said(facts, "alike")


def test_opposed_ones_cancel(tmp_path):
    one = lora(8, 0)
    facts = facts_of(tmp_path, one, times(plus(one, times(lora(8, 1), 0.5)), -1.0))
    assert kinds(facts) == ["opposed"]
    assert "LoRAs 1 and 2 (cosine -0.8" in said(facts, "opposed")
    found = compared(tmp_path, one, times(one, -1.0))
    assert found.sum_norm == pytest.approx(0, abs=1e-6) and "opposed" in kinds(found.to_json())
    assert fits(comparison_text(found))


def test_common_directions_of_ones_that_are_otherwise_unrelated(tmp_path):
    # the drift is in each with a sign of its own: the cosines say nothing of it, the directions do
    common = lora(4, 100, modules=BIG)
    turned = {m: Pair(p.up.flip(1), p.down) for m, p in common.items()}  # the same columns and rows, paired differently
    loras = [plus(c, lora(6, 10 + i, modules=BIG)) for i, c in enumerate((common, turned))]
    found = compared(tmp_path, *loras)
    facts = found.to_json()
    assert kinds(facts) == ["unrelated", "common"]
    text = said(facts, "common")
    assert "on average 4.0 of 16 columns and 4.0 of 16 rows" in text and "tsv, or shared_once (experimental)" in text
    table = comparison_text(found).split("common directions of each module, columns/rows\n")[1]
    assert re.search(r"^0 +- +4/4 +- +4/4 ", table, re.M) and re.search(r"^7 +- +4/4 +- +- ", table, re.M)


def test_common_on_one_side_is_told_apart(tmp_path):
    one, other = lora(4, 0, modules=BIG), lora(4, 1, modules=BIG)
    facts = facts_of(tmp_path, one, {m: Pair(other[m].up, one[m].down) for m in one})  # as trainings from one seed begin
    assert kinds(facts) == ["unrelated", "common"]
    assert "the same seed" in said(facts, "common") and "0.0 of 8 columns and 4.0 of 4 rows" in said(facts, "common")
    facts = facts_of(tmp_path, one, {m: Pair(one[m].up, other[m].down) for m in one})
    assert "on one side alone" in said(facts, "common") and "4.0 of 4 columns and 0.0 of 8 rows" in said(facts, "common")


def test_one_that_outweighs_the_other(tmp_path):
    facts = facts_of(tmp_path, times(lora(8, 0), 4.0), lora(8, 1))
    assert kinds(facts) == ["unrelated", "unequal"]
    text = said(facts, "unequal")
    assert re.search(r"LoRA 1 is [34]\.\d times as strong as LoRA 2", text) and "nuslerp" in text
    assert "normalize" not in said(facts, "unrelated")  # the sum is hardly stronger than the stronger one


def test_a_lora_of_zeros(tmp_path):
    facts = facts_of(tmp_path, lora(8, 0), times(lora(8, 1), 0.0))
    assert kinds(facts) == ["empty"] and said(facts, "empty").startswith("LoRA 2 changes nothing")
    json.dumps(facts, allow_nan=False)
    both = compared(tmp_path, *[times(lora(8, i), 0.0) for i in range(2)])
    assert kinds(both.to_json()) == ["empty"] and "all of them are zero" in comparison_text(both)


def test_three_of_which_two_are_alike(tmp_path):
    one = lora(8, 0)
    facts = facts_of(tmp_path, one, lora(8, 1), plus(one, times(lora(8, 2), 0.2)))
    assert kinds(facts) == ["alike", "unrelated"]
    assert said(facts, "alike").startswith("LoRAs 1 and 3 (cosine 0.9") and "karcher" in said(facts, "alike")
    assert said(facts, "unrelated").startswith("all other pairs are unrelated")


# --- files that differ ---------------------------------------------------------------------------------------------------------


def test_modules_that_one_lacks(tmp_path):
    one, other = lora(8, 0), lora(8, 1)
    del other[Q]
    found = compared(tmp_path, one, other)
    facts = found.to_json()
    assert facts["modules"][Q]["files"] == [0] and facts["modules"][Q]["directions"] is None
    assert facts["cosines"][0][1] == pytest.approx(cosine(flat(deltas(one)), flat(deltas(other))), abs=1e-6)
    text = comparison_text(found)
    assert "together in   7 of 8 modules" in text
    assert re.search(r"^0 +-?0\.\d\d +- +-?0\.\d\d", text, re.M)


def test_no_module_in_common(tmp_path):
    one = lora(8, 0)
    parts = [{m: p for m, p in one.items() if ("attention" in m) is attention} for attention in (True, False)]
    found = compared(tmp_path, *parts)
    assert kinds(found.to_json()) == ["apart"] and found.cosines[0][1] == 0
    assert "no module is changed by both" in comparison_text(found)


def test_shapes_that_differ_name_both_files_and_the_module(work: Workspace):
    one = write(work.folder / "one.safetensors", lora(8, 0))
    two = write(work.folder / "two.safetensors", lora(8, 0, modules=MODULES | {W2: (48, 32)}))
    sentence = work.zit("inspect", one, two).refused()
    assert all(part in sentence for part in ("one.safetensors", "two.safetensors", W2, "48 x 64", "48 x 32"))


def test_a_missing_file_and_nan_are_one_sentence(work: Workspace):
    one = write(work.folder / "one.safetensors", lora(8, 0))
    assert "there is no such file" in work.zit("inspect", one, "none.safetensors").refused()
    broken = lora(8, 0)
    broken[W2].up[0, 0] = math.nan
    sentence = work.zit("inspect", one, write(work.folder / "b.safetensors", broken)).refused()
    assert "b.safetensors" in sentence and W2 in sentence and "NaN" in sentence


def test_a_change_too_large_for_a_number(tmp_path):
    paths = files(tmp_path, lora(8, 0), lora(8, 1))
    tensors = {k: t.double() * 1e200 for k, t in load_file(paths[1]).items()}
    save_file(tensors, paths[1])
    with pytest.raises(ZitMergeError, match=r"1\.safetensors: layers\.0\.\S+: the norm of its change is too large"):
        measure([load_lora(p) for p in paths])


def test_a_file_that_leaves_something_open_is_compared_by_what_is_known(work: Workspace):
    paths = [work.lora("a.safetensors"), work.lora("b.safetensors", "lycoris-norm", seed=1)]
    text = work.zit("inspect", *paths, "--quiet").ok()
    assert "- compared by what is known, it leaves open: lycoris_" in one_line(text)
    assert fits(text)


# --- many, and hostile ---------------------------------------------------------------------------------------------------------


def test_twenty_loras(work: Workspace):
    modules = {Q: (64, 64), W2: (64, 96)}
    loras = [lora(2, i, modules=modules) for i in range(20)]
    loras[13] = plus(loras[4], times(loras[13], 0.1))
    paths = files(work.folder, *loras)
    text = work.zit("inspect", *paths, "--quiet").ok()
    assert fits(text)
    assert "LoRAs 5 and 14 (cosine 0.9953): alike" in one_line(text)
    head, first, second = text.split("cosine of the whole files")[1].split("\nLoRA ")
    assert first.split("\n")[0].split() == [str(i) for i in range(1, 12)]
    assert second.split("\n")[0].split() == [str(i) for i in range(12, 20)]
    row = next(line.split() for line in first.splitlines() if line.startswith("14 "))
    flats = [flat(deltas(one), modules) for one in loras]
    assert row[1:] == [f"{cosine(flats[13], flats[j]):.2f}".replace("-0.00", "0.00") for j in range(11)]
    assert text.count("per layer and component") == 1 and "cosine of LoRA 5 and 14, per layer and component" in text
    facts = json.loads(work.zit("inspect", *paths, "--quiet", "--json").ok())
    assert len(facts["cosines"]) == 20 == len(facts["cosines"][0])


@pytest.mark.parametrize("count", [2, 3, 4])
def test_tables_of_pairs(tmp_path, count):
    text = comparison_text(compared(tmp_path, *[lora(4, i) for i in range(count)]))
    assert text.count("per layer and component") == {2: 1, 3: 3, 4: 1}[count]
    assert ("cosine of the whole files" in text) is (count > 3)
    assert fits(text)


def test_where_a_pair_is_most_alike(tmp_path):
    one, other = lora(8, 0), lora(8, 1)
    other[W2] = one[W2]
    text = comparison_text(compared(tmp_path, one, other))
    assert "most alike in w2 (1.00), least in " in text


@pytest.mark.parametrize("name", ["x" * 200, "\x1b[2J\nLoRA 9        fake", "\u4e2d\u6587 caf\u00e9", "a  b\u2028c", "%s{0}"])
def test_hostile_names(work: Workspace, name):
    path = write(work.folder / f"{name}.safetensors", lora(4, 0))
    other = write(work.folder / "b.safetensors", lora(4, 1))
    text = work.zit("inspect", path, other, "--quiet").ok()
    assert fits(text)
    assert len(re.findall(r"^LoRA \d", text, re.M)) == 2
    assert len(text) < 5000


# --- JSON ----------------------------------------------------------------------------------------------------------------------


def test_json_has_the_documented_keys_and_comes_back(work: Workspace):
    paths = files(work.folder, lora(8, 0), lora(4, 1))
    named = Comparison.to_json.__doc__
    documented = re.findall(r"^ {12}(\w+): ", named, re.M)
    facts = json.loads(work.zit("inspect", *paths, "--json", "--quiet").ok())
    assert list(facts) == documented
    assert facts == json.loads(json.dumps(compare(measure([load_lora(p) for p in paths])).to_json(), allow_nan=False))
    for found in (
        facts["files"][0],
        facts["modules"][Q],
        facts["modules"][Q]["directions"]["columns"],
        facts["sum"],
        facts["shared"],
    ):
        assert all(re.search(rf"\b{key}\b", named) for key in found)
    assert {a["kind"] for a in facts["advice"]} <= set(re.findall(r"\w+", named))
