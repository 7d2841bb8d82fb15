"""A studio that serves in this process."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

from preview.helpers import FakeRenderer, Loader, planned
from workspace import Workspace

from extensions_built_in.zit_merge.merging.made import Done
from extensions_built_in.zit_merge.planning.planned import Planned
from extensions_built_in.zit_merge.progress import SILENT, Progress
from extensions_built_in.zit_merge.report.page.run import RunPage
from extensions_built_in.zit_merge.section import run_section
from extensions_built_in.zit_merge.studio.bench import Bench
from extensions_built_in.zit_merge.studio.run import serve_studio

PREVIEW = {"prompts": ["a cat", "a dog"], "size": [128, 128], "steps": 4}
DEADLINE = 60_000  # milliseconds that a page may take for what it should show


class Gate(FakeRenderer):
    """Renders a picture only when it may."""

    open = threading.Event()

    def render(self, spec):
        assert self.open.wait(DEADLINE / 1000)
        return super().render(spec)


class Live:
    """A studio on a port of its own, and what its page is.

    Attributes:
        html: The page.
        port: Where the studio listens.
        loader: What renders.
    """

    def __init__(
        self,
        work: Workspace,
        *steps: Mapping[str, Any],
        load: Loader | None,
        why_not: str = "",
        grace: float = 0.0,
        **keys: Any,
    ):
        self._grace = grace
        self.loader, self.html, self.port, self.token = load, "", 0, ""
        found = planned(work, *steps, **{"preview": PREVIEW} | keys)
        (raw,) = json.loads((work.folder / "config.json").read_text("utf-8"))["config"]["process"]
        self._page = RunPage(found.context)
        self._page.begin(found.context, raw, 0)
        list(run_section(found, self._page, lambda text: None, SILENT))
        self._is_open, self._trouble = threading.Event(), []
        self._thread = threading.Thread(target=self._serve, args=(Bench(found, raw), load, why_not), daemon=True)
        self._thread.start()
        assert self._is_open.wait(60) and not self._trouble, self._trouble

    def _serve(self, bench: Bench, load: Loader | None, why_not: str) -> None:
        try:
            serve_studio(
                bench,
                self._page,
                lambda text: None,
                SILENT,
                keep=_keep,
                load=load,
                why_not=why_not,
                port=0,
                is_served=True,
                grace=self._grace,
                on_open=self._open,
            )
        except BaseException as e:
            self._trouble.append(e)
            raise
        finally:
            self._is_open.set()

    def _open(self, door: Any) -> None:
        self.door, self.port, self.token, self.html = door, door.port, door.token, self._page.html()
        self._is_open.set()

    @property
    def url(self) -> str:
        """Of the studio."""
        return f"http://127.0.0.1:{self.port}/"

    def close(self) -> None:
        """Ends it, and waits until it is gone."""
        self.door.session.close("the test is over")
        self._thread.join(60)
        assert not self._thread.is_alive()


def _keep(found: Planned, progress: Progress) -> list[Done]:
    return list(run_section(found, None, lambda text: None, progress))
