"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from extensions_built_in.zit_merge.errors import SettingError
from extensions_built_in.zit_merge.files.paths import check_writable, file_name, user_path


def test_a_tilde_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert user_path("~/loras/me.safetensors") == tmp_path / "loras" / "me.safetensors"
    assert user_path("loras/~me") == user_path(Path("loras/~me")) == Path("loras/~me")


@pytest.mark.parametrize("text", ["a\0b", "n" * 5000, "\ud800.safetensors"])
def test_what_is_no_path(text):
    with pytest.raises(SettingError, match="^'.* is no path that this system can have") as caught:
        user_path(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_name_has_no_folders():
    assert file_name("merged/b\\c..d") == "merged_b_c..d"


def test_a_folder_is_made_in_the_nearest_one_that_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_writable(tmp_path) == check_writable(tmp_path / "deep" / "er") == check_writable(Path("deep/er")) == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_what_no_folder_can_be_made_in(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name in ("file", "file/deep", "link/deep"):
        with pytest.raises(SettingError, match=f"{name.partition('/')[0]} is not a folder: give another one"):
            check_writable(tmp_path / name)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(SettingError, match=f"^{tmp_path} can't be written to: "):
        check_writable(tmp_path / "deep")
