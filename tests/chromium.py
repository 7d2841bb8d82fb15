"""The browser of the tests of pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def path() -> str | None:
    """Its program; None where there is none."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


@contextmanager
def launched() -> Iterator[object]:
    """A headless one. A process may have one only: playwright starts a loop of its own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path(), args=["--no-sandbox"])
        yield browser
        browser.close()
