"""Shared fixtures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import chromium as browsers
import pytest
import torch
from hypothesis import settings
from workspace import FEW, REAL, Workspace, lora_bytes

torch.set_num_threads(1)  # the matrices are small: a second thread only waits for the first, worse so beside other workers


def pytest_configure(config: pytest.Config) -> None:
    """How many of a hundred examples of a property are looked at: all where the thorough cases run too."""
    settings.register_profile("part", max_examples=30)
    settings.register_profile("whole", max_examples=100)
    settings.load_profile("part" if "not thorough" in config.option.markexpr else "whole")


@pytest.fixture(scope="session")
def chromium() -> Iterator[object]:
    """A headless browser; without one, or without playwright, the tests are skipped."""
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -r requirements-dev.txt")
    if browsers.path() is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with browsers.launched() as browser:
        yield browser


@pytest.fixture
def work(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """An empty folder that is the working directory."""
    monkeypatch.chdir(tmp_path)
    return Workspace(tmp_path, capsys.readouterr)


@pytest.fixture
def few(work: Workspace) -> None:
    """Its LoRAs have few layers: for tests of what is the same for all of them."""
    work.shapes = FEW


@pytest.fixture
def loras(work: Workspace) -> tuple[Path, Path]:
    """Two LoRAs of one small model by two trainers: me.safetensors (rank 2) and style.safetensors (rank 3, alpha 1, no adaLN)."""
    return work.lora("me.safetensors"), work.lora("style.safetensors", "musubi", rank=3, seed=1)


@pytest.fixture(scope="session")
def _real_bytes() -> tuple[bytes, bytes]:
    return lora_bytes("ai-toolkit", 2, 0, REAL), lora_bytes("onetrainer-kohya", 2, 1, REAL)


@pytest.fixture
def real_loras(work: Workspace, _real_bytes: tuple[bytes, bytes]) -> tuple[Path, Path]:
    """The same two names in Z-Image's own sizes: adaLN, to_q and to_v of layer 0; the second has alpha = rank / 2."""
    return work.put_pair(_real_bytes)
