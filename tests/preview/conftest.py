"""LoRAs of a few layers, since most of what is tested here looks at all of them many times."""

from __future__ import annotations

from pathlib import Path

import pytest
from preview.helpers import FEW
from workspace import Workspace, lora_bytes


@pytest.fixture(scope="session")
def _few_bytes() -> tuple[bytes, bytes]:
    return lora_bytes("ai-toolkit", 2, 0, FEW), lora_bytes("musubi", 3, 1, FEW)


@pytest.fixture
def pair(work: Workspace, _few_bytes: tuple[bytes, bytes]) -> tuple[Path, Path]:
    """me.safetensors and style.safetensors as in `loras`, with the layers 0, 3 and 29 only."""
    return work.put_pair(_few_bytes)
