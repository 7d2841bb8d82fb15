"""Groups, shares and presets of an ablation against slow, obvious readings of what they say they are."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from preview.helpers import Told
from screen import fits
from workspace import Workspace

from extensions_built_in.zit_merge import ZitMergeError
from extensions_built_in.zit_merge.config.presets import find_preset
from extensions_built_in.zit_merge.config.schema import Lora
from extensions_built_in.zit_merge.model.strengths import TABLES, Weights, factors
from extensions_built_in.zit_merge.model.zimage import MODULES
from extensions_built_in.zit_merge.planning.factors import lora_factors
from extensions_built_in.zit_merge.preview import metrics
from extensions_built_in.zit_merge.preview.ablation import Ablation, measure, number
from extensions_built_in.zit_merge.preview.ablation_text import ablation_text
from extensions_built_in.zit_merge.preview.groups import ModuleGroup, module_groups
from extensions_built_in.zit_merge.preview.settings import ImageSpec

INVENTORY = Path(__file__).parents[1] / "data" / "z_image_linears.json"
NAMES = [entry["name"] for entry in json.loads(INVENTORY.read_text(encoding="utf-8"))]
COMPONENTS = ["adaLN", "to_q", "to_k", "to_v", "to_out", "w1", "w2", "w3"]


def layer(name: str) -> int:
    match = re.match(r"layers\.(\d+)\.", name)
    return int(match[1]) if match else -1


def section(name: str) -> str:
    return next((s for s in ("noise_refiner", "context_refiner", "layers") if name.startswith(f"{s}.")), "other")


def component(name: str) -> str:
    return next(c for c in COMPONENTS if c in name.split(".", 2)[2])


# --- groups --------------------------------------------------------------------------------------------------------------------


def slow_group(name: str, by: str, runs: Sequence[range]) -> str:
    """How the group of a module is called."""
    if section(name) == "other":
        return "other"
    if by == "components":
        return component(name)
    if section(name) != "layers":
        return section(name)
    run = next(r for r in runs if layer(name) in r)
    words = str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}"
    return f"{words}.{component(name)}" if by == "cells" else f"layer{'s' * (len(run) > 1)} {words}"


RUNS = {
    1: [range(30)],
    3: [range(0, 10), range(10, 20), range(20, 30)],
    4: [range(0, 7), range(7, 15), range(15, 22), range(22, 30)],
    10: [range(k, k + 3) for k in range(0, 30, 3)],
    30: [range(k, k + 1) for k in range(30)],
}
PRESENT = {
    "all": NAMES,
    "layers only": [n for n in NAMES if section(n) == "layers"],
    "attention": [n for n in NAMES if ".attention." in n],
    "a few": ["cap_embedder.1", "layers.29.feed_forward.w2", "layers.0.attention.to_q", "context_refiner.1.attention.to_v"],
    "nothing": [],
}


@pytest.mark.parametrize("count", RUNS)
@pytest.mark.parametrize("by", ["layers", "components", "cells"])
@pytest.mark.parametrize("present", PRESENT.values(), ids=PRESENT)
def test_every_module_is_in_the_one_group_that_its_name_says(by, count, present):
    found = module_groups(by, count, present)
    members = [(module, group.name) for group in found for module in group.modules]
    assert sorted(members) == sorted((name, slow_group(name, by, RUNS[count])) for name in present)
    assert len({g.name for g in found}) == len(found) and all(g.modules for g in found)
    for group in found:
        assert list(group.modules) == sorted(group.modules, key=[*MODULES].index)


@pytest.mark.parametrize("count", range(1, 31))
def test_runs_are_even_and_in_order(count):
    sizes = [len({layer(m) for m in g.modules}) for g in module_groups("layers", count, NAMES)[:-3]]
    assert len(sizes) == count and sum(sizes) == 30 and max(sizes) - min(sizes) <= 1
    order = [layer(g.modules[0]) for g in module_groups("layers", count, NAMES)[:-3]]
    assert order == sorted(order)


def test_names_and_order():
    assert [g.name for g in module_groups("layers", 2, NAMES)] == [
        *("layers 0-14", "layers 15-29", "noise_refiner", "context_refiner", "other"),
    ]
    assert [g.name for g in module_groups("components", 10, NAMES)] == [*COMPONENTS, "other"]
    cells = module_groups("cells", 10, NAMES)
    assert len(cells) == 83 and cells[0].name == "0-2.adaLN" and cells[0].key == "0-2.adaLN_modulation"
    assert [g.name for g in cells[-3:]] == ["noise_refiner", "context_refiner", "other"]


@pytest.mark.parametrize(("by", "count"), [("layers", 0), ("layers", 31), ("cells", -1), ("rows", 3)])
def test_divisions_that_are_not_there(by, count):
    with pytest.raises(ValueError, match=f"{by} in {count} runs: there are layers, components and cells, in 1 to 30 runs"):
        module_groups(by, count, NAMES)


# --- pictures whose distances are known ----------------------------------------------------------------------------------------


def grey(level: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    """pixels() between two of these is their difference / 255."""
    return Image.new("RGB", size, (level,) * 3)


PARTS = (
    ModuleGroup("a", ("layers.0.attention.to_q",), "layers", "0-9"),
    ModuleGroup("b", ("cap_embedder.1",), "layers", "other"),
)
BASE, FULL = (50, 50, 50), (150, 70, 50)  # the LoRA moves the first picture by 100, the second by 20, the third not at all
SHOWN = {"a": (140, 60, 50), "b": (150, 70, 60)}


def measured(
    shown: Mapping[str, Sequence[int]] = SHOWN,
    full: Sequence[int] = FULL,
    base: Sequence[int] = BASE,
    *,
    mode: str = "leave_out",
    by: str = "layers",
    parts: Sequence[ModuleGroup] = PARTS,
    names: Sequence[str] = ("pixels",),
    **how: object,
) -> Ablation:
    return measure(
        {name: [*map(grey, levels)] for name, levels in shown.items()},
        [*map(grey, full)],
        [*map(grey, base)],
        groups=parts,
        by=by,
        mode=mode,
        metrics=names,
        **{"lora": "me.safetensors", "specs": [ImageSpec(f"prompt {k // 2}", 42 + k % 2) for k in range(len(full))]} | how,
    )


def test_left_out_shares_are_sums_of_distances_from_the_full_picture_over_those_of_the_base():
    found = measured()
    assert found.share("pixels", "a") == pytest.approx((10 + 10 + 0) / (100 + 20 + 0))
    assert found.share("pixels", "b") == pytest.approx((0 + 0 + 10) / 120)
    assert found.share("pixels", "a") != pytest.approx((10 / 100 + 10 / 20) / 2)  # the mean of ratios would be 0.3
    assert found.whole("pixels") == pytest.approx(120 / 3 / 255)


def test_shares_of_a_part_alone_are_sums_of_distances_from_the_base_over_those_of_the_full_picture():
    found = measured(mode="only")
    assert found.share("pixels", "a") == pytest.approx((90 + 10 + 0) / (100 + 20 + 0))
    assert found.share("pixels", "b") == pytest.approx((100 + 20 + 10) / 120)


@pytest.mark.parametrize(("mode", "a", "b"), [("leave_out", (0.1, 0.5), (0, 0)), ("only", (0.9, 0.5), (1, 1))])
def test_shares_of_single_pictures_but_for_those_that_the_lora_does_not_change(mode, a, b):
    found = measured(mode=mode)
    assert found.shares("pixels", "a") == (pytest.approx(a[0]), pytest.approx(a[1]), None)
    assert found.shares("pixels", "b") == (pytest.approx(b[0]), pytest.approx(b[1]), None)
    assert found.is_changed == (True, True, False)
    assert "The LoRA changes nothing in picture 3 of 3." in found.notes()


def test_the_distances_are_those_of_the_metric(tmp_path, monkeypatch):
    (tmp_path / "one_way.py").write_text("def darker(p, r):\n    return max(float(r.mean() - p.mean()), 0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    name = "one_way:darker"  # so that the order of picture and reference is seen
    found = measured(names=("pixels", name)).distances[name]
    assert found.full_to_base == (0, 0, 0)
    assert found.base_to_full == pytest.approx([100 / 255, 20 / 255, 0], rel=1e-5)
    assert found.to_full["a"] == pytest.approx([10 / 255, 10 / 255, 0], rel=1e-5)
    assert found.to_base["a"] == (0, 0, 0)
    assert measured(names=(name,)).share(name, "a") == pytest.approx(20 / 120, rel=1e-5)
    assert measured(names=(name,), mode="only").share(name, "a") is None


def test_a_metric_that_hardly_sees_a_picture_has_no_ratio_for_it(tmp_path, monkeypatch):
    (tmp_path / "very_light.py").write_text("def light(p, r):\n    return abs(float(r.mean() ** 20 - p.mean() ** 20))\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    name = "very_light:light"
    found = measured({"a": (200, 40)}, (250, 60), (0, 20), parts=PARTS[:1], names=("pixels", name))
    assert found.shares("pixels", "a") == (pytest.approx(0.2), pytest.approx(0.5))
    assert found.shares(name, "a")[0] == pytest.approx(1 - 0.8**20) and found.shares(name, "a")[1] is None


@pytest.mark.parametrize("mode", ["leave_out", "only"])
def test_a_lora_that_changes_nothing_has_no_shares(mode):
    found = measured(full=BASE, mode=mode, names=tuple(metrics.METRICS))
    for m in metrics.METRICS:
        assert found.share(m, "a") is None and found.shares(m, "a") == (None, None, None) and found.ranked(m) == []
    assert "The LoRA changes none of the pictures, so there is no share to tell." in found.notes()
    assert "no change" in ablation_text(found) and "nan" not in ablation_text(found).lower()
    json.dumps(found.facts(), allow_nan=False)
    with pytest.raises(ZitMergeError, match="by the metric pixels no part of me.safetensors changes these pictures"):
        found.preset("pixels")


def test_rounding_is_no_change():
    noisy = np.random.default_rng(0).integers(0, 2, (16, 16, 3), np.uint8)
    base = np.full((16, 16, 3), 100, np.uint8)

    def changed(full: np.ndarray) -> bool:
        one = {"mode": "only", "by": "layers", "lora": "x", "specs": [ImageSpec("", 0)], "groups": ()}
        return measure({}, [Image.fromarray(full)], [Image.fromarray(base)], **one).is_changed[0]

    assert not changed(base + noisy * (np.arange(16)[:, None, None] < 6)) and changed(base + noisy)


@pytest.mark.parametrize("mode", ["leave_out", "only"])
def test_what_is_only_rounding_has_no_shares(mode):
    faint = grey(50)
    for x in range(8):
        faint.putpixel((x, 3), (51, 51, 51))  # 8 of 256 pixels by one level: more than 1 % of a change by 10 levels
    how = {"groups": PARTS, "by": "layers", "mode": mode, "lora": "x", "metrics": ("pixels",)}
    shown = {"a": [grey(55), grey(52)], "b": [grey(60), grey(51)]}
    found = measure(shown, [grey(60), faint], [grey(50)] * 2, specs=[ImageSpec("", 0), ImageSpec("", 1)], **how)
    assert found.is_changed == (True, False) and found.shares("pixels", "a") == (pytest.approx(0.5), None)
    found = measure({name: row[1:] for name, row in shown.items()}, [faint], [grey(50)], specs=[ImageSpec("", 1)], **how)
    assert found.share("pixels", "a") is None and found.shares("pixels", "a") == (None,)


def test_ends_can_be_measured_before_the_parts_are_there():
    found = measured({}, names=tuple(metrics.METRICS))
    assert found.groups == () and found.distances["pixels"].full_to_base == pytest.approx([100 / 255, 20 / 255, 0])
    ablation_text(found), found.facts()


def test_groups_are_watched_in_order():
    progress = Told()
    assert [g.name for g in measured(progress=progress).groups] == ["a", "b"]
    assert progress.told == [("distances", "a", 1, 2), ("distances", "b", 2, 2)]


def test_wrong_pictures_and_metrics():
    with pytest.raises(ZitMergeError, match="^no such metric: 'pixel' .did you mean pixels"):
        measured(names=("pixel",))
    with pytest.raises(ZitMergeError, match="picture 1 of a is 8 x 16, that of the whole LoRA 16 x 16: render them anew"):
        one = {"groups": PARTS, "by": "layers", "mode": "only", "lora": "x", "specs": [ImageSpec("", 0)]}
        measure({"a": [grey(3, (8, 16))]}, [grey(1)], [grey(2)], **one)
    with pytest.raises(ValueError, match="zip"):
        measured({"a": (1, 2)})
    with pytest.raises(ValueError, match="zip"):
        measured(specs=[ImageSpec("", 0)])


# --- what is told --------------------------------------------------------------------------------------------------------------


def test_facts_are_finite_json_with_everything_that_was_measured():
    found = measured(names=("pixels", "colour"))
    facts = json.loads(json.dumps(found.facts(), allow_nan=False))
    assert facts["caveat"] == found.caveat and "me.safetensors" in facts["caveat"] and "nothing else" in facts["caveat"]
    assert facts["lora"] == "me.safetensors" and facts["by"] == "layers" and facts["mode"] == "leave_out"
    assert facts["shots"][2] == {"prompt": "prompt 1", "seed": 42, "changed": False}
    assert facts["metrics"]["colour"]["what"].startswith("How much of which colours") and facts["metrics"]["colour"]["formula"]
    assert facts["metrics"]["pixels"]["full_to_base"] == pytest.approx([100 / 255, 20 / 255, 0])
    (a, _) = facts["groups"]
    assert (a["name"], a["table"], a["key"], a["modules"]) == ("a", "layers", "0-9", ["layers.0.attention.to_q"])
    assert a["metrics"]["pixels"]["share"] == pytest.approx(1 / 6) and a["metrics"]["pixels"]["shares"][2] is None
    assert a["metrics"]["pixels"]["to_base"] == pytest.approx([90 / 255, 10 / 255, 0])


def many(
    by: str, count: int, *, mode: str = "leave_out", specs: int = 4, present: Sequence[str] = NAMES, **how: object
) -> Ablation:
    """An ablation whose part k has the share (k + 1) / (number of parts + 1) in all pictures but the last, there the reverse."""
    parts = module_groups(by, count, present)
    share = [(k + 1) / (len(parts) + 1) for k in range(len(parts))]
    levels = {g.name: [round(240 * s)] * (specs - 1) + [round(240 * (1 - s))] for g, s in zip(parts, share, strict=True)}
    if mode == "leave_out":
        levels = {name: [240 - level for level in row] for name, row in levels.items()}
    return measured(levels, [240] * specs, [0] * specs, mode=mode, by=by, parts=parts, **how)


CASES = [("layers", 1), ("layers", 10), ("layers", 30), ("components", 10), ("cells", 1), ("cells", 10), ("cells", 30)]


@pytest.mark.parametrize(("by", "count"), CASES)
@pytest.mark.parametrize("mode", ["leave_out", "only"])
def test_the_text_fits_80_columns_and_says_what_it_is_worth(by, count, mode):
    found = many(by, count, mode=mode, names=tuple(metrics.METRICS), lora="قطة_" * 60 + ".safetensors")
    text = ablation_text(found)
    assert fits(text, 79) and not re.search(r" $", text, re.MULTILINE)
    said = " ".join(text.split())
    assert "2 prompts and 2 seeds (4 pictures of each part)" in said and "and nothing else" in said and "are few" in said
    for group in found.groups:
        row = group.key.partition(".")[0] if group.table == "overrides" else group.name
        assert re.search(rf"(^|, )\s*{re.escape(row)}\s", text, re.MULTILINE), row


def test_the_table_has_share_and_spread():
    text = ablation_text(many("layers", 3, names=("pixels", "structure")))
    assert re.search(r"^  part             pixels         structure$", text, re.MULTILINE)
    first = many("layers", 3).share("pixels", "layers 0-9")
    assert number(first) == "32" == number((3 * 34 + 206) / 960)
    assert re.search(r"^  layers 0-9 +32 \(14-86\)", text, re.MULTILINE)
    assert re.search(r"^  pixels +100 % is 0.941, strongest other \(68 %; first in 3 of 4 pictures\),", text, re.MULTILINE)


def test_the_map_of_cells_has_each_share_at_its_place():
    text = ablation_text(many("cells", 10, specs=2, present=[n for n in NAMES if "to_k" not in n]))
    found = many("cells", 10, specs=2, present=[n for n in NAMES if "to_k" not in n])
    (row,) = re.findall(r"^ +3-5 +(.*)$", text, re.MULTILINE)
    heads = ("adaLN", "to_q", "to_v", "to_out", "w1", "w2", "w3")
    assert row.split() == [number(found.share("pixels", f"3-5.{c}")) for c in heads]
    assert f"noise_refiner {number(found.share('pixels', 'noise_refiner'))}, context_refiner" in text


def test_numbers():
    assert [number(x) for x in (None, 0, 0.0004, 0.0994, 0.0996, 0.5, 1.25, 9.99, 10, 1e9)] == [
        *("-", "0.0", "0.0", "9.9", "10", "50", "125", "999", ">999", ">999"),
    ]


def test_few_pictures_are_said_to_be_few():
    assert any("One picture of each part says little" in note for note in many("layers", 2, specs=1).notes())
    assert any("15 pictures of each part are few" in note for note in many("layers", 2, specs=15).notes())
    assert not any("few" in note or "little" in note for note in many("layers", 2, specs=16).notes())


def test_what_a_file_is_called_does_not_steer_the_terminal():
    text = ablation_text(many("layers", 2, lora="a\x1b[2J\nb$x$.safetensors", names=("pixels",)))
    assert fits(text)


# --- presets -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("by", "count"), CASES)
@pytest.mark.parametrize("mode", ["leave_out", "only"])
@pytest.mark.parametrize("present", [PRESENT["all"], PRESENT["attention"]], ids=["all", "attention"])
def test_a_preset_gives_every_module_the_proportion_of_its_group(by, count, mode, present):
    found = many(by, count, mode=mode, present=present)
    table = factors(Weights(**found.preset("pixels")))
    most = max(found.share("pixels", g.name) for g in found.groups)
    for group in found.groups:
        wanted = round(found.share("pixels", group.name) / most, 2)
        assert {table[m] for m in group.modules} == {wanted}, group.name
    assert max(table.values()) == 1.0


@pytest.mark.parametrize(("by", "count"), CASES)
def test_a_preset_comes_back_from_its_file(tmp_path, by, count):
    found = many(by, count, lora="gütig: #1.safetensors")
    path = tmp_path / "mine.yaml"
    path.write_text(found.preset_yaml("1e3", "pixels"), encoding="ascii")
    preset = find_preset(str(path))
    assert {key: table for key in TABLES if (table := getattr(preset, key))} == found.preset("pixels")
    ((name, entry),) = yaml.safe_load(path.read_text()).items()
    assert name == "1e3" and "\n" not in entry["idea"] and "nothing else" in entry["idea"]
    assert "g\xfctig: #1.safetensors" in entry["idea"] and f"{len(found.groups)} parts by {by}, metric pixels" in entry["idea"]
    assert "2 prompts and 2 seeds (4 pictures of each part)" in entry["idea"]
    lora = Lora(lora="x.safetensors", ratio=0.5, preset=str(path))
    lora.keep_preset(preset)
    assert lora_factors(lora) == factors(Weights(**found.preset("pixels")))


def test_a_job_with_a_measured_preset_merges_what_it_says(work: Workspace, loras):
    found = many("layers", 3)
    work.write(found.preset_yaml("measured", "pixels"), "measured.yaml")
    step = {"name": "s", "loras": [{"lora": "me.safetensors", "ratio": 0.5, "preset": str(work.folder / "measured.yaml")}]}
    said = work.zit("run", work.job(step), "--dry-run").ok()
    first, last = (0.5 * found.preset("pixels")["layers"][key] for key in ("0-9", "other"))
    assert math.isclose(last, 0.5) and re.search(rf"^ +0-9 +{first:g} ", said, re.MULTILINE)


def test_a_preset_by_a_metric_that_was_not_measured():
    with pytest.raises(ZitMergeError, match="no ablation by 'pixel' .did you mean pixels..; measured were pixels"):
        many("layers", 2).preset("pixel")
