"""Known adapters and files of the hub as sources of `inspect`; they are fetched only when asked for."""

from __future__ import annotations

import pytest
from workspace import empty_hub_cache, put_into_hub_cache

from extensions_built_in.zit_merge.cli import inspect
from extensions_built_in.zit_merge.files import hub
from extensions_built_in.zit_merge.files.adapters import ADAPTERS

COMMIT = "c" * 40


@pytest.mark.parametrize("name", ADAPTERS)
def test_each_names_a_file_on_the_hub(name):
    assert hub.parse(ADAPTERS[name]).name.endswith(".safetensors")


def test_a_source_on_the_hub_is_read_from_the_cache(work, monkeypatch):
    cache = empty_hub_cache(work.folder / "hub", monkeypatch)
    content = work.lora("me.safetensors").read_bytes()
    put_into_hub_cache(cache, COMMIT, "adapter.safetensors", content, "main")
    assert "strength 1.00" in work.zit("inspect", "me.safetensors", "--sources", "hf:user/repo/adapter.safetensors").ok()
    monkeypatch.setattr(inspect, "ADAPTERS", {"known": "hf:user/repo/adapter.safetensors"})
    said = " ".join(work.zit("inspect", "me.safetensors", "--sources", "known").ok().split())
    assert "strength 1.00" in said and "nobody has measured what pictures make of it" in said
    assert '- {lora: "hf:user/repo/adapter.safetensors", ratio: -0.5}' in said


def test_a_file_of_that_name_comes_first(work, monkeypatch):
    empty_hub_cache(work.folder / "hub", monkeypatch)
    work.lora("me.safetensors")
    work.lora("ostris_v2")
    assert "strength 1.00" in work.zit("inspect", "me.safetensors", "--sources", "ostris_v2").ok()


def test_without_a_network_it_says_how_to_get_it(work, monkeypatch):
    empty_hub_cache(work.folder / "hub", monkeypatch)
    work.lora("me.safetensors")
    said = work.zit("inspect", "me.safetensors", "--sources", "ostris_v2").refused()
    assert "zimage_turbo_training_adapter_v2.safetensors is not in the local cache" in said and "hf download" in said
