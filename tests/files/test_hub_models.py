"""Models on the hub: found in the cache where they are whole, by their names in a config."""

from __future__ import annotations

import json

import pytest
from checkpoints import INDEX, ONE, model, write_folder
from pairs import lora, write
from workspace import Workspace, empty_hub_cache, put_into_hub_cache

from extensions_built_in.zit_merge.errors import SettingError
from extensions_built_in.zit_merge.files.hub import model_folder

COMMIT = "d" * 40


@pytest.fixture
def cache(work: Workspace, monkeypatch: pytest.MonkeyPatch):
    return empty_hub_cache(work.folder / "hub", monkeypatch)


def test_none_is_there(cache):
    assert model_folder("user/repo", may_download=False) is None


@pytest.mark.parametrize("missing", ["shard", "index", "all"])
def test_a_part_of_a_download_is_no_model(cache, missing):
    put_into_hub_cache(cache, COMMIT, "transformer/config.json", b"{}", "main")
    if missing == "all":
        assert model_folder("user/repo", may_download=False) is None
        return
    names = {"a": "1.safetensors", "b": "2.safetensors"}
    index = b"{" if missing == "index" else json.dumps({"weight_map": names}).encode()
    put_into_hub_cache(cache, COMMIT, f"transformer/{INDEX}", index, "main")
    put_into_hub_cache(cache, COMMIT, "transformer/1.safetensors", b"x", "main")
    assert model_folder("user/repo", may_download=False) is None
    if missing == "shard":
        put_into_hub_cache(cache, COMMIT, "transformer/2.safetensors", b"y", "main")
        assert model_folder("user/repo", may_download=False)


@pytest.mark.parametrize("name", ["user", "user/repo/more", "us er/repo", "user/repo@", "../repo"])
def test_names_that_are_none(cache, name):
    if name == "user/repo@":
        assert model_folder(name, may_download=False) is None
        return
    with pytest.raises(SettingError, match="names no model on the Hugging Face hub"):
        model_folder(name, may_download=False)


@pytest.mark.parametrize("name", ["user/repo", "hf:user/repo", f"user/repo@{COMMIT}"])
def test_a_base_on_the_hub_is_called_by_its_name(work, cache, name):
    folder = write_folder(work.folder / "here", model())
    for file in (ONE, "config.json"):
        put_into_hub_cache(cache, COMMIT, f"transformer/{file}", (folder / file).read_bytes(), "main")
    write(work.folder / "me.safetensors", lora(2, 0, None, {"layers.0.attention.to_q": (128, 128)}))
    work.zit("bake", "me.safetensors", "--ratio", 1, "--base", name, "-o", "out", "--shapes", "free").ok()
    recipe = work.zit("recipe", "out").ok()
    assert f"base: {name}" in recipe and str(work.folder) not in recipe and "snapshots" not in recipe
    assert work.zit("inspect", "out", "--base", name, "--sources", "me.safetensors").ok().count("strength 1.00") == 1


def test_a_path_into_the_cache_gives_no_folder_away(work, cache):
    folder = write_folder(work.folder / "snapshots" / "here", model())
    write(work.folder / "me.safetensors", lora(2, 0, None, {"layers.0.attention.to_q": (128, 128)}))
    work.zit("bake", "me.safetensors", "--ratio", 1, "--base", folder, "-o", "out", "--shapes", "free").ok()
    assert "base: here" in (recipe := work.zit("recipe", "out").ok()) and "snapshots" not in recipe


def test_a_name_that_is_neither_a_folder_nor_on_the_hub(work, cache):
    write(work.folder / "me.safetensors", lora(2, 0, None, {"layers.0.attention.to_q": (128, 128)}))
    said = work.zit("bake", "me.safetensors", "--ratio", 1, "--base", "models/zimage", "-o", "out", "--shapes", "free").refused()
    assert "models/zimage is not there (looked in" in said and "nor on the hub" in said
