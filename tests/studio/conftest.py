"""LoRAs of a few layers, and studios that are closed when a test ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from preview.helpers import ME, STYLE, Loader, step
from studio.live import Live
from workspace import FEW, Workspace


@pytest.fixture
def work(work: Workspace) -> Workspace:
    """With two LoRAs of the layers 0, 3 and 29 only."""
    work.shapes = FEW
    work.lora("me.safetensors", seed=1)
    work.lora("style.safetensors", seed=2, rank=3)
    return work


@pytest.fixture
def live(work: Workspace) -> Iterator[Any]:
    """Opens studios on a step of both."""
    opened: list[Live] = []

    def open_(*steps: Any, load: Loader | None = None, **keys: Any) -> Live:
        opened.append(Live(work, *(steps or (step(ME, STYLE),)), load=load, **keys))
        return opened[-1]

    yield open_
    for one in opened:
        one.close()
