"""The door of a studio: a small HTTP server on the loopback address, behind `/proxy-8866` of AI-Toolkit's UI.

That proxy is not behind the UI's password, so whoever reaches the UI reaches this server. Every request needs a random token that
stands in the merge page alone, in a header that no form of another site can send; it is compared in constant time. No text of a
request is ever a path. What is refused gets the same empty answer, whatever was asked for.
"""

from __future__ import annotations

import base64
import contextlib
import hmac
import json
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

from ..errors import ZitMergeError
from ..files.extent import ExtentError, read_json
from ..files.inputs import read_limited
from ..wording import message
from .session import Session
from .setting import read_setting

PORT = 8866  # ui/next.config.ts of AI-Toolkit forwards /proxy-8866/* there
HEADER = "X-Zit-Merge"
_LONGEST = 100_000  # bytes of a request
_CLIENTS = 32  # requests at a time
_PATIENCE = 10.0  # seconds for the next byte of a request
_LONGEST_WAIT = 20.0  # seconds for all of it
_EDGES = (192, 512, 2048)  # pixels of a picture


class Door:
    """The server, in threads of its own, while it is open.

    Args:
        session: Answers.
        job: Whose studio it is, for the next one that wants the port.
        port: 0 takes any that is free.
        page: Gives the page, which is served under the token too; None serves none.

    Attributes:
        port: The port.
        token: What the page has to send.

    Raises:
        ZitMergeError: The port is taken; the message says by whom.
    """

    def __init__(self, session: Session, job: str, port: int = PORT, page: Callable[[], str] | None = None):
        self.session, self.token, self.page = session, secrets.token_urlsafe(32), page
        handler = type("Bound", (_Handler,), {"door": self})
        self._servers = [_bound(socket.AF_INET, "127.0.0.1", port, handler)]
        self.port = int(self._servers[0].server_address[1])
        with contextlib.suppress(OSError, ZitMergeError):  # `localhost` may be either; there need not be an IPv6
            self._servers.append(_bound(socket.AF_INET6, "::1", self.port, handler))
        self._note = _note_of(self.port)
        with contextlib.suppress(OSError):
            self._note.unlink(missing_ok=True)
            with os.fdopen(os.open(self._note, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="utf-8") as file:
                json.dump({"job": job, "pid": os.getpid()}, file)
        self._threads = [threading.Thread(target=s.serve_forever, args=(0.05,), daemon=True) for s in self._servers]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Door:
        return self

    def __exit__(self, *exc: object) -> None:
        self.token = secrets.token_urlsafe(32)  # the page's is good for nothing from now on
        for server in self._servers:
            server.shutdown()
            server.server_close()
        with contextlib.suppress(OSError):
            self._note.unlink(missing_ok=True)

    def admits(self, token: str | None) -> bool:
        """Whether this is the token; takes the same time for any other."""
        return hmac.compare_digest((token or "").encode(), self.token.encode())


def _bound(family: socket.AddressFamily, host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> _Server:
    try:
        return type("Family", (_Server,), {"address_family": family})((host, port), handler)
    except OSError as e:
        raise ZitMergeError(f"port {port} of the studio {_owner(port)} ({e.strerror})") from None


def _note_of(port: int) -> Path:
    user = os.getuid() if hasattr(os, "getuid") else ""
    return Path(tempfile.gettempdir()) / f"zit_merge_studio_{user}_{port}.json"


def _owner(port: int) -> str:
    """Who has a port, as far as it is one of ours, and what to do."""
    try:
        told = read_json(read_limited(_note_of(port)).decode())
        job, pid = str(told["job"]), int(told["pid"])
        if os.name == "posix":
            os.kill(pid, 0)  # raises where it is gone
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return "is taken by another program: stop that one, and start again"
    return f"is that of the job {message(job)[:80]} (process {pid}): close its studio or stop it, and start again"


class _Server(ThreadingHTTPServer):
    """Answers a bounded number of requests at a time.

    Attributes:
        allow_reuse_address: The port of a studio that was closed a moment ago; on Windows it would let two have one port.
    """

    daemon_threads = True
    allow_reuse_address = os.name != "nt"
    block_on_close = False

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._room = threading.Semaphore(_CLIENTS)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Turns a request away where there are too many."""
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Makes room when a request is done."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is nobody's business."""


class _Handler(BaseHTTPRequestHandler):
    """One request.

    Attributes:
        door: Whose.
    """

    door: ClassVar[Door]
    timeout = _PATIENCE
    server_version, sys_version = "zit_merge", ""

    def handle(self) -> None:
        """One connection, which may not take for ever, byte by byte."""
        limit = threading.Timer(_LONGEST_WAIT, self._cut)
        limit.daemon = True
        limit.start()
        try:
            super().handle()
        finally:
            limit.cancel()

    def _cut(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)

    def do_OPTIONS(self) -> None:  # noqa: N802
        """What a browser asks before it sends our header from the frame, whose origin is `null`."""
        self.send_response(HTTPStatus.NO_CONTENT)
        if self._is_framed():
            self.send_header("Access-Control-Allow-Origin", "null")
            self.send_header("Access-Control-Allow-Methods", "POST")
            self.send_header("Access-Control-Allow-Headers", f"Content-Type, {HEADER}")
            self.send_header("Access-Control-Max-Age", "600")
        self.send_header("Vary", "Origin")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:  # noqa: N802
        """The page itself, where it is served: its address has the token."""
        path, page = self.path.partition("?")[0], self.door.page
        if page and self.door.admits(path.removeprefix("/open/")):
            self._send(HTTPStatus.OK, page().encode(), "text/html; charset=utf-8")
        else:
            self._refuse()

    def do_POST(self) -> None:  # noqa: N802
        """A question of the page."""
        if not self.door.admits(self.headers.get(HEADER)):
            self._refuse()
            return
        if self.headers.get_content_type() != "application/json":
            self._answer(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, {"error": "send application/json"})
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 9:
            self._answer(HTTPStatus.LENGTH_REQUIRED, {"error": "send Content-Length"})
            return
        if int(length) > _LONGEST:
            self._answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"error": f"at most {_LONGEST} bytes are taken"})
            return
        verb = self.path.removeprefix("/api/")
        if verb not in _VERBS or not self.path.startswith("/api/"):
            self._answer(HTTPStatus.NOT_FOUND, {"error": "there is no such request"})
            return
        try:
            asked = read_json(self.rfile.read(int(length)).decode())
            if not isinstance(asked, Mapping):
                raise ZitMergeError("send an object")
            self._answer(HTTPStatus.OK, _VERBS[verb](self.door.session, asked))
        except (ExtentError, ValueError) as e:
            self._answer(HTTPStatus.BAD_REQUEST, {"error": f"this is no JSON: {str(e)[:200]}"})
        except ZitMergeError as e:
            self._answer(HTTPStatus.BAD_REQUEST, {"error": str(e)})

    def _is_framed(self) -> bool:
        return self.headers.get("Origin") == "null"

    def _refuse(self) -> None:
        self._send(HTTPStatus.FORBIDDEN, b"", "text/plain")

    def _answer(self, status: HTTPStatus, found: Mapping[str, Any]) -> None:
        self._send(status, json.dumps(found, allow_nan=False).encode(), "application/json")

    def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if self._is_framed() and status != HTTPStatus.FORBIDDEN:
            self.send_header("Access-Control-Allow-Origin", "null")
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as in the base class
        """Nothing: a log of a job is no log of a server."""


_HEADERS = {
    "Vary": "Origin",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}


def _state(session: Session, asked: Mapping[str, Any]) -> Mapping[str, Any]:
    seen = asked.get("seen")
    return session.state(seen if isinstance(seen, int) else 0)


def _picture(session: Session, asked: Mapping[str, Any]) -> Mapping[str, Any]:
    edge = asked.get("edge")
    if edge not in _EDGES:
        raise ZitMergeError(f"edge: use one of {', '.join(map(str, _EDGES))}")
    content = session.picture(asked.get("look"), asked.get("row"), asked.get("column"), edge)
    return {"image": f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"}


def _cancel(session: Session, asked: Mapping[str, Any]) -> Mapping[str, Any]:
    session.cancel()
    return {}


def _favourite(session: Session, asked: Mapping[str, Any]) -> Mapping[str, Any]:
    session.favourite(asked.get("look"), asked.get("on") is True)
    return {}


def _close(session: Session, asked: Mapping[str, Any]) -> Mapping[str, Any]:
    session.close("it was closed on its page")
    return {}


_VERBS: Mapping[str, Callable[[Session, Mapping[str, Any]], Mapping[str, Any]]] = {
    "state": _state,
    "measure": lambda session, asked: {"id": session.measure(read_setting(asked.get("setting")))},
    "look": lambda session, asked: {"id": session.look(read_setting(asked.get("setting")), asked.get("draft") is True)},
    "keep": lambda session, asked: {"id": session.keep(read_setting(asked.get("setting")), asked.get("name"))},
    "picture": _picture,
    "cancel": _cancel,
    "favourite": _favourite,
    "close": _close,
}
