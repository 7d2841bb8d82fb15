"""A real Chromium, and the page inside the kind of frame that AI-Toolkit's UI shows it in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from frame import Frame, new_tab


@pytest.fixture(scope="session")
def _tabs() -> list[object]:
    """Those that no test has open: a new one takes longer than all that most tests do in it."""
    return []


@pytest.fixture
def show(chromium, _tabs) -> Iterator[object]:
    """Opens a page file in a sandboxed frame; at the end nothing may have been logged or asked for."""
    pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
    frames: list[Frame] = []

    def open_(path: Path, width: int = 1200, scheme: str = "light") -> Frame:
        tab = _tabs.pop() if _tabs else new_tab(chromium)
        frames.append(Frame(tab, path.read_text(encoding="utf-8"), width, scheme))
        return frames[-1]

    yield open_
    for frame in frames:
        frame.close()
        _tabs.append(frame.page) if frame.is_quiet else frame.page.context.close()
    for frame in frames:
        assert frame.troubles == []
