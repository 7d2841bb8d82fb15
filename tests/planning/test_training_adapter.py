"""`lora: training_adapter`: the LoRA that the job's training is done over, by its place in the training's own section."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from oracles import producers
from oracles.dense import read_deltas, relative, weighted_sum
from workspace import Workspace, empty_hub_cache

TRAINED, ADAPTER = {"lora": "trained", "ratio": 1.0}, {"lora": "training_adapter", "ratio": -0.5}


def section(work: Workspace, adapter: object) -> Path:
    model = {"name_or_path": "Tongyi-MAI/Z-Image-Turbo", "arch": "zimage:turbo", "assistant_lora_path": adapter}
    return work.config(work.training(model=model), work.section({"name": "a", "loras": [TRAINED, ADAPTER]}))


def test_it_is_a_file(work):
    work.lora("output/cat/cat.safetensors")
    work.lora("adapters/v2.safetensors", "musubi", seed=1)
    work.zit("run", section(work, "adapters/v2.safetensors")).ok()
    trained, adapter = (
        producers.PRODUCERS[p].make(work.shapes, 2, n, torch.bfloat16) for n, p in enumerate(("ai-toolkit", "musubi"))
    )
    wanted = weighted_sum([(trained.deltas, 1.0), (adapter.deltas, -0.5)])
    found = read_deltas(work.out / "merged_cat_a.safetensors")
    for module, delta in wanted.items():
        assert relative(found[module], delta) < 0.01, module
    assert "lora: v2.safetensors" in work.zit("recipe", work.out / "merged_cat_a.safetensors").ok()


def test_it_is_on_the_hub(work, monkeypatch):
    """As AI-Toolkit names it, without hf: before it; nothing is fetched by a dry run."""
    empty_hub_cache(work.folder / "hub", monkeypatch)
    work.lora("output/cat/cat.safetensors")
    text = work.zit("run", section(work, "ostris/adapter/v2.safetensors"), "--dry-run").ok()
    assert "v2.safetensors is not in the local cache: it is fetched from the hub when the merge runs" in " ".join(text.split())


@pytest.mark.parametrize("adapter", [None, "", 3])
def test_there_is_none(work, adapter):
    work.lora("output/cat/cat.safetensors")
    said = work.zit("run", section(work, adapter)).refused()
    assert "loras[1].lora: training_adapter: process[0].model.assistant_lora_path names no adapter" in said


def test_there_is_no_training(work):
    work.lora("a.safetensors")
    loras = [{"lora": "a.safetensors", "ratio": 1.0}, ADAPTER]
    said = work.zit("run", work.config(work.section({"name": "a", "loras": loras}, output_dir="out"))).refused()
    assert "training_adapter needs a training process before this section" in said


def test_a_file_that_is_gone(work):
    work.lora("output/cat/cat.safetensors")
    shutil.rmtree(work.folder / "adapters", ignore_errors=True)
    assert "adapters/v2.safetensors is not there" in work.zit("run", section(work, "adapters/v2.safetensors")).refused()
