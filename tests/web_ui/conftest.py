"""AI-Toolkit's UI as set_up.py has built it, a browser, and what the jobs work on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from web_ui import set_up
from web_ui.material import Material

NOT_SET_UP = f"AI-Toolkit's web UI is not built in {set_up.HOME}: python tests/web_ui/set_up.py AI_TOOLKIT_CLONE"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what is not set up by a mark: such are told in one line."""
    if not (set_up.HOME / set_up.READY).is_file():
        for item in items:
            if item.get_closest_marker("web_ui"):
                item.add_marker(pytest.mark.skip(reason=NOT_SET_UP))


@pytest.fixture(scope="session")
def ui(chromium, tmp_path_factory) -> Iterator[object]:
    """The UI with its worker."""
    from web_ui.server import WebUi

    ui = WebUi(set_up.HOME, tmp_path_factory.mktemp("web_ui"))
    yield ui
    ui.stop()


@pytest.fixture(scope="session")
def material(chromium, tmp_path_factory) -> Material:
    """Model, pictures, LoRAs."""
    return Material(tmp_path_factory.mktemp("material"))


@pytest.fixture
def user(chromium, ui) -> Iterator[object]:
    """A tab of the browser."""
    from web_ui.browser import User

    user = User(chromium, ui)
    yield user
    user.close()
