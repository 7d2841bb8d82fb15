"""LoRAs of a few layers, since most of what is tested here looks at all of them many times."""

from __future__ import annotations

import pytest
from workspace import FEW, Workspace


@pytest.fixture
def work(work: Workspace) -> Workspace:
    """With LoRAs of the layers 0, 3 and 29 only."""
    work.shapes = FEW
    return work
