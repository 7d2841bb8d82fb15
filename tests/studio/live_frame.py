"""Tabs of a browser that have the page of a studio open."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from report.page.frame import HEIGHT, Frame
from studio.live import DEADLINE, Live


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

    def until(self, condition: Callable[[], object]) -> None:
        """Waits until something holds."""
        for _ in range(DEADLINE // 50):
            if condition():
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"not within {DEADLINE / 1000} s")

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
        self.find(".strip tbody td:not(:has(img))").first.wait_for(state="detached")


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
