"""A studio that serves in this process, and tabs of a browser that have its page open."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from preview.helpers import FakeRenderer, Loader, planned
from report.page.frame import HEIGHT, Frame
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

    def __init__(self, work: Workspace, *steps: Mapping[str, Any], load: Loader | None, why_not: str = "", **keys: Any):
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


class LiveFrame(Frame):
    """The page of a studio in a frame; what it asks of its studio is no trouble."""

    def __init__(self, tab: Any, live: Live, width: int = 1200, scheme: str = "dark"):
        self.asked: list[str] = []
        self._studio, self.live = live.url, live
        super().__init__(tab, live.html, width, scheme)
        self.page.set_default_timeout(DEADLINE)

    def _note(self, trouble: str) -> None:
        if trouble.startswith("request: ") and self._is_ours(trouble.removeprefix("request: ")):
            self.asked.append(trouble)
        else:
            super()._note(trouble)

    def _is_ours(self, url: str) -> bool:
        return url.startswith((self._studio, self.page.evaluate("document.baseURI") + "proxy-"))

    def shows(self, words: str) -> None:
        """Waits until a text is seen."""
        self.inner.get_by_text(words).filter(visible=True).first.wait_for()

    def does(self, words: str) -> None:
        """Waits until the studio's line says so."""
        self.find(".doing").filter(has_text=words).wait_for()

    def measured(self) -> None:
        """Waits until the numbers are those of what is composed."""
        self.find(".source").filter(has_text="Measured").wait_for()

    def heads(self) -> list[str]:
        """The first line of each column of the strip."""
        return self.find(".strip thead th").evaluate_all("heads => heads.map((h) => h.querySelector('bdi').textContent)")

    def looks(self, count: int) -> None:
        """Waits until every picture of so many looks is in the strip, and nothing else is under way."""
        self.does("Ready.")
        self.find(".strip thead th:has(button)").nth(count - 1).wait_for()
        self.inner.wait_for_function("!document.querySelector('.strip .empty')")


@contextmanager
def proxy(port: int) -> Iterator[str]:
    """A web UI as far as a plugin sees it: a page with a frame, and `/proxy-PORT/*`. Gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._send(200, {"Content-Type": "text/html"}, PARENT.encode())

        def do_OPTIONS(self):
            self._pass()

        def do_POST(self):
            self._pass()

        def _pass(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or None
            path = self.path.removeprefix(f"/proxy-{port}")
            request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, dict(self.headers), method=self.command)
            try:
                with urllib.request.urlopen(request) as answer:
                    self._send(answer.status, dict(answer.headers), answer.read())
            except urllib.error.HTTPError as e:
                self._send(e.code, dict(e.headers), e.read())
            except urllib.error.URLError:
                self._send(500, {"Content-Type": "text/plain"}, b"Internal Server Error")

        def _send(self, status, headers, content):
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "date", "server", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


PARENT = f'<body style="margin:0"><iframe sandbox="allow-scripts" style="width:100%;height:{HEIGHT}px;border:0"></iframe>'


def saved(html: str, path: Path) -> Path:
    """The page as a file."""
    path.write_text(html, encoding="utf-8")
    return path
