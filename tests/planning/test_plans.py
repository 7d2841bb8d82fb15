"""A plan is complete when it is made, and never changed: what is known later gives a second one."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.dense import read_metadata
from workspace import write_lora

from extensions_built_in.zit_merge import load_lora, merge
from extensions_built_in.zit_merge.errors import SettingError
from extensions_built_in.zit_merge.formats.reader import tensor_hash
from extensions_built_in.zit_merge.merging.runner import run_plans
from extensions_built_in.zit_merge.planning.types import StepPlan

TO_Q, TO_K = "layers.3.attention.to_q", "layers.0.attention.to_k"  # the latter has the largest rank, where AI-Toolkit looks


def planned(folder: Path, rank: Any, **save: Any) -> StepPlan:
    """Two LoRAs of rank 2 and 3."""
    loras = [write_lora(folder, "ai-toolkit", rank, seed=rank, stem=f"in{rank}")[0] for rank in (2, 3)]
    described = merge([(path, 0.5) for path in loras], rank=rank, shapes="free", device="cpu", dtype="fp32", **save)
    return described.plan(folder / "out.safetensors")


def everything(plan: StepPlan) -> str:
    """All fields, as text."""
    return json.dumps({f.name: getattr(plan, f.name) for f in fields(plan)}, default=repr)


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("rank", ["exact", 2, {"size_mb": 0.25}, {"energy": 0.9}], ids=str)
def test_a_run_writes_what_the_plan_says_and_leaves_it_as_it_was(tmp_path, rank, uniform):
    plan = planned(tmp_path, rank, uniform=uniform)
    before = everything(plan)
    (done,) = run_plans([plan], torch.device("cpu"))
    assert everything(plan) == before
    assert done.plan == plan if not plan.is_open else (done.plan != plan and not done.plan.is_open)
    hashes = {path: tensor_hash(path) for path in done.plan.hashed}
    assert len(hashes) == 2
    assert read_metadata(done.path) == done.plan.metadata(hashes) | done.verdict.metadata()
    assert done.path.stat().st_size == done.plan.bytes
    assert load_lora(done.path).ranks == done.plan.ranks == done.plan.result.ranks


@pytest.mark.parametrize("rank", ["exact", 2, {"energy": 0.9}], ids=str)
def test_a_plan_revised_without_changes_is_the_same(tmp_path, rank):
    plan = planned(tmp_path, rank)
    assert plan.revised() == plan and plan.revised() is not plan


def test_ranks_that_were_chosen_give_a_second_plan(tmp_path):
    plan = planned(tmp_path, {"energy": 0.9}, uniform=False)
    before = everything(plan)
    second = plan.revised(dict.fromkeys(plan.ranks, 2) | {TO_Q: 4})
    assert everything(plan) == before and plan.is_open and set(plan.ranks.values()) == {5}
    assert not second.is_open and second.ranks == dict.fromkeys(plan.ranks, 2) | {TO_Q: 4, TO_K: 4}
    assert second.layout[f"diffusion_model.{TO_Q}.lora_A.weight"][1] == (4, 8)
    assert second.bytes < plan.bytes and second.recipe == plan.recipe
    assert json.loads(second.draft["lora_adapter_metadata"]) != json.loads(plan.draft["lora_adapter_metadata"])
    assert not any("the rank follows from" in sentence for sentence in second.warnings)


@pytest.mark.parametrize("kind", ["ai-toolkit", "comfyui"])
@pytest.mark.parametrize(("rank", "uniform"), [({"energy": 0.9}, True), ({"energy": 0.9}, False), (2, True)], ids=str)
def test_the_file_of_a_plan_gives_the_plan_as_it_was_run(tmp_path, kind, rank, uniform):
    plan = planned(tmp_path, rank, uniform=uniform, format=kind)
    (done,) = run_plans([plan], torch.device("cpu"))
    file = load_lora(done.path)
    assert plan.as_found(file) == done.plan
    assert file.ranks == done.plan.result.ranks


@pytest.mark.parametrize("kind", ["ai-toolkit", "comfyui"])
@pytest.mark.parametrize("uniform", [True, False])
def test_a_step_over_a_file_that_is_there_is_the_step_over_one_just_made(work, loras, kind, uniform):
    """Fused modules have the sum of their ranks, which differ with `uniform: false`."""
    entries = [{"lora": str(path), "ratio": 0.5} for path in loras]
    first = {"name": "a", "loras": entries, "rank": {"energy": 0.8}, "save": {"format": kind, "uniform": uniform}}
    config = work.job(first, {"name": "b", "loras": [{"lora": "a", "ratio": 1.0}], "save": {"uniform": uniform}})
    work.zit("run", config).ok()
    a, b = (work.out / f"merged_cat_{name}.safetensors" for name in "ab")
    before, ranks, held = b.read_bytes(), load_lora(b).ranks, load_lora(a).ranks
    if uniform:
        assert set(ranks.values()) == {max(held.values())}
    else:
        assert {m: n for m, n in ranks.items() if m != TO_K} == {m: n for m, n in held.items() if m != TO_K}
    b.unlink()
    work.zit("run", config).ok()
    assert b.read_bytes() == before


def test_other_inputs_give_a_second_plan(tmp_path):
    plan = planned(tmp_path, "exact")
    before = everything(plan)
    second = plan.revised(inputs=plan.inputs[:1])
    assert everything(plan) == before and plan.rank == 5
    assert second.rank == 2 and len(second.hashed) == 1 and len(second.recipe["steps"][0]["loras"]) == 1
    with pytest.raises(SettingError, match=r"^save\.keep_lokr: "):
        kept = plan.spec.save.model_copy(update={"keep_lokr": True})
        plan.revised(spec=plan.spec.model_copy(update={"save": kept}))


def test_a_recipe_has_paths_until_the_hashes_are_known(tmp_path):
    plan = planned(tmp_path, "exact")
    (step,) = plan.recipe["steps"]
    assert [lora["sha256"] for lora in step["loras"]] == list(plan.hashed) == [i.path for i in plan.inputs]
    hashes = {path: f"{n}" * 64 for n, path in enumerate(plan.hashed)}
    written = json.loads(plan.metadata(hashes)["zit_merge.recipe"])
    assert [lora.pop("sha256") for lora in written["steps"][0]["loras"]] == list(hashes.values())
    for lora in step["loras"]:
        assert isinstance(lora["sha256"], Path)
    with pytest.raises(KeyError):
        plan.metadata({})
    draft = {key: len(text) for key, text in plan.draft.items() if key != "zit_merge.check"}
    assert draft == {key: len(text) for key, text in plan.metadata(hashes).items()}
