"""Who may ask a studio, and for what."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Mapping
from email.message import Message
from typing import Any, NamedTuple

import pytest

from extensions_built_in.zit_merge.errors import ZitMergeError
from extensions_built_in.zit_merge.studio.server import HEADER, Door

SETTING: Mapping[str, Any] = {"step": "soft", "loras": [{"ratio": 0.5}, None], "method": "sum", "params": {}, "rank": "exact"}


class Answer(NamedTuple):
    status: int
    headers: Message
    body: bytes


def send(live: Any, path: str, body: bytes | None = None, method: str = "POST", **headers: str) -> Answer:
    """Any request; names of headers have _ for -."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(live.url.rstrip("/") + path, body, named, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as found:
            return Answer(found.status, found.headers, found.read())
    except urllib.error.HTTPError as e:
        return Answer(e.code, e.headers, e.read())


def ask(live: Any, verb: str, body: object, **headers: str) -> Answer:
    """A request as the page sends it."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"Content_Type": "application/json", "X_Zit_Merge": live.token} | headers
    return send(live, f"/api/{verb}", content, **sent)


def sentence(answer: Answer) -> str:
    assert answer.status == 400, answer
    return json.loads(answer.body)["error"]


def test_the_page_gets_in(live):
    assert ask(live(), "state", {"seen": 0}).status == 200


@pytest.mark.parametrize("path", ["/api/state", "/api/close", "/api/none", "/", "/merged_cat_soft.safetensors", "/../c.json"])
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "PUT"])
def test_without_the_token_everything_is_the_same_nothing(live, path, method):
    one = live()
    wrong = [{}, {"X_Zit_Merge": ""}, {"X_Zit_Merge": one.token[:-1]}, {"X_Zit_Merge": one.token + "x"}, {"Cookie": one.token}]
    for headers in wrong:
        found = send(one, path, b"{}" if method != "GET" else None, method, Content_Type="application/json", **headers)
        assert found.status in (403, 501) and one.token.encode() not in found.body
        assert method in ("HEAD", "PUT") or found.body == b""
        assert found.headers["Access-Control-Allow-Origin"] is None
    assert ask(one, "state", {"seen": 0}).status == 200, "and nothing was closed"


def test_the_page_is_served_under_its_token_alone(live):
    one = live()
    assert b"application/json" in send(one, f"/open/{one.token}", method="GET").body
    for path in ("/open/", "/open/x", f"/open/{one.token[:-1]}", f"/{one.token[:-1]}"):
        assert send(one, path, method="GET").status == 403


def test_a_form_of_another_site_gets_nowhere(live):
    one = live()
    for kind in ("application/x-www-form-urlencoded", "text/plain", "multipart/form-data"):
        assert send(one, "/api/close", b'{"a":"="}', Content_Type=kind).status == 403
        assert ask(one, "close", {}, Content_Type=kind).status == 415
    assert json.loads(ask(one, "state", {}).body)["closed"] is None


def test_only_the_frame_may_read_answers(live):
    one = live()
    assert ask(one, "state", {}, Origin="null").headers["Access-Control-Allow-Origin"] == "null"
    asked = send(one, "/api/state", method="OPTIONS", Origin="null", Access_Control_Request_Method="POST")
    assert asked.headers["Access-Control-Allow-Origin"] == "null"
    assert asked.headers["Access-Control-Allow-Headers"] == f"Content-Type, {HEADER}"
    for origin in ("https://example.org", "http://localhost:8675", "file://", "NULL"):
        assert ask(one, "state", {}, Origin=origin).headers["Access-Control-Allow-Origin"] is None
        assert send(one, "/api/state", method="OPTIONS", Origin=origin).headers["Access-Control-Allow-Origin"] is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"lora": "/etc/passwd"}, "has no lora"),
        ({"preset": "../../x.yaml"}, "has no preset"),
        ({"base": "x"}, "has no base"),
        ({"ratio": "1"}, "must be numbers"),
        ({"ratio": [1]}, "ratio: must be a number"),
        ({"ratio": True}, "must be numbers"),
        ({"blocks": {"to_q": "/etc/passwd"}}, "must be numbers"),
        ({"layers": [[[[1]]]]}, "must be numbers"),
        ({"ratio": 1, "blocks": {"to_z": 1}}, ""),
    ],
)
def test_strengths_are_numbers(live, change, told):
    one = live()
    answer = ask(one, "measure", {"setting": {**SETTING, "loras": [change, None]}})
    if told:
        assert told in sentence(answer)
    else:  # what it means is looked at when it is planned
        assert "to_z" in measured(one, answer)["error"]


def measured(live: Any, answer: Answer) -> Mapping[str, Any]:
    """The measure that an answer is the number of, when it is over."""
    number = json.loads(answer.body)["id"]
    while True:
        state = json.loads(ask(live, "state", {"seen": 0}).body)
        assert state["measure"]["id"] == number
        if state["measure"]["status"] in ("done", "failed"):
            return state["measure"]


@pytest.mark.parametrize(
    "setting",
    [
        None,
        [],
        {},
        {**SETTING, "step": "other"},
        {**SETTING, "step": 3},
        {**SETTING, "loras": "me.safetensors"},
        {**SETTING, "loras": [None]},
        {**SETTING, "loras": [None] * 3},
        {**SETTING, "method": "eval"},
        {**SETTING, "method": ["sum"]},
        {**SETTING, "params": {"density": "x"}},
        {**SETTING, "params": {"density": {"a": 1}}},
        {**SETTING, "params": []},
        {**SETTING, "rank": "energy"},
        {**SETTING, "rank": True},
        {**SETTING, "rank": {"weigh": "base", "energy": 0.9}},
        {**SETTING, "rank": {"energy": "x"}},
        {**SETTING, "rank": 0},
        {**SETTING, "rank": -(10**400)},
        {**SETTING, "file": "x.safetensors"},
    ],
)
def test_what_is_no_setting_is_a_sentence(live, setting):
    one = live()
    answer = ask(one, "measure", {"setting": setting})
    if answer.status == 200:
        assert measured(one, answer)["status"] == "failed"
    else:
        assert sentence(answer)
    assert measured(one, ask(one, "measure", {"setting": SETTING}))["status"] == "done", "the studio goes on"


DEEP = b'{"setting":' + b"[" * 90_000


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"1", b"\xff\xfe", DEEP, b'{"seen": 1e999}'])
def test_junk_is_a_sentence(live, body):
    one = live()
    answer = ask(one, "measure", body)
    assert answer.status == 400 and sentence(answer)
    for value in ("NaN", "Infinity", "1e999", "1" + "0" * 400):
        text = json.dumps({"setting": SETTING}).replace("0.5", value).encode()
        assert sentence(ask(one, "measure", text))


def test_sizes_are_bounded(live):
    one = live()
    assert ask(one, "measure", b" " * 100_001).status == 413
    with socket.create_connection(("127.0.0.1", one.port), timeout=30) as client:
        client.sendall(f"POST /api/state HTTP/1.1\r\n{HEADER}: {one.token}\r\nContent-Type: application/json\r\n\r\n".encode())
        assert b" 411 " in client.recv(1000)
    for name in ("", "a/b", "..\\x", "a" * 101, "a b", "a\n", "soft", "SOFT", "_studio_", 3, None):
        assert sentence(ask(one, "keep", {"setting": SETTING, "name": name})).startswith("name: ")


def test_pictures_are_numbers_of_a_list(live):
    one = live()
    for asked in ({}, {"look": 1}, {"look": "../x", "row": 0, "column": 0}, {"look": True}):
        assert sentence(ask(one, "picture", {"edge": 512} | asked))
    for edge in (0, 10**9, "512", None):
        assert sentence(ask(one, "picture", {"look": 1, "row": 0, "column": 0, "edge": edge})).startswith("edge: ")


def test_it_listens_on_the_loopback_address_alone(live):
    one = live()
    assert all(server.server_address[0] in ("127.0.0.1", "::1") for server in one.door._servers)


def test_only_so_many_ask_at_a_time(live):
    one = live()
    idle = [socket.create_connection(("127.0.0.1", one.port), timeout=30) for _ in range(32)]
    try:
        with socket.create_connection(("127.0.0.1", one.port), timeout=30) as client:
            assert client.recv(10) == b"", "turned away"
    finally:
        for client in idle:
            client.close()


def test_the_token_dies_with_the_server(live):
    one = live()
    assert ask(one, "close", {}).status == 200
    one.close()
    assert one.token != one.door.token
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", one.port), timeout=5)


def test_a_second_studio_says_who_has_the_port(live):
    one = live()
    with pytest.raises(ZitMergeError, match=rf"port {one.port} of the studio is that of the job cat \(process \d+\): close"):
        Door(one.door.session, "dog", one.port)
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(ZitMergeError, match="taken by another program: stop"):
        Door(one.door.session, "dog", other.getsockname()[1])
