"""hub against caches made by hand, and against a small server that answers as the hub does."""

from __future__ import annotations

import errno
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PureWindowsPath
from urllib.parse import unquote

import pytest
from workspace import empty_hub_cache, put_into_hub_cache

from extensions_built_in.zit_merge import ZitMergeError
from extensions_built_in.zit_merge.errors import located
from extensions_built_in.zit_merge.files import hub
from extensions_built_in.zit_merge.files.hub import HubFile

constants = pytest.importorskip("huggingface_hub.constants")

ROOT = Path(__file__).parents[2]
PLACE = "process[1].steps[0].loras[2].lora"
OLD, NEW = "a" * 40, "0123456789" * 4
FILE = HubFile("user/repo", "style.safetensors")


@dataclass
class Answers:
    """What the server knows, and what it was asked.

    Attributes:
        branches: Branch -> commit.
        files: (commit, path) -> content.
        refusals: The start of a path in a URL -> (status, headers).
        missing: Headers that it leaves out.
        torn: It announces more bytes than it sends.
        hangs_up: It closes the connection when the file itself is asked for.
        asked: (method, path, Authorization) of each question about a file.
    """

    url: str = ""
    branches: dict[str, str] = field(default_factory=lambda: {"main": OLD})
    files: dict[tuple[str, str], bytes] = field(default_factory=lambda: {(OLD, FILE.file): b"old"})
    refusals: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    torn: bool = False
    hangs_up: bool = False
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers, content: https://huggingface.co/docs/hub/api and what huggingface_hub reads from it."""
        for start, (status, headers) in self.refusals.items():
            if unquote(path).startswith(start):
                return status, headers, b""
        listing = path.startswith("/api/models/")
        owner, repo, *rest = (unquote(part) for part in path.removeprefix("/api/models").lstrip("/").split("/"))
        verb, revision, *name = rest or ["revision", "main"]
        assert verb == ("revision" if listing else "resolve")
        if f"{owner}/{repo}" != FILE.repo:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        commit = self.branches.get(revision, revision)
        if not any(known == commit for known, _ in self.files):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if listing:
            names = [{"rfilename": name} for known, name in self.files if known == commit]
            return 200, {}, json.dumps({"id": FILE.repo, "sha": commit, "siblings": names}).encode()
        content = self.files.get((commit, "/".join(name)))
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{sha256(content).hexdigest()}"'}, content


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, a process that was given nothing yet, and nobody logged in."""
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return empty_hub_cache(tmp_path / "hub", monkeypatch)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Answers]:
    """A hub on this machine, with one file in one commit of user/repo."""
    answers = Answers()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            status, headers, content = (404, {}, b"")
            if "/resolve/" in self.path or self.path.startswith("/api/models/"):
                answers.asked.append((self.command, unquote(self.path), self.headers["Authorization"]))
                status, headers, content = answers.answer(self.path)
            if answers.hangs_up and self.command == "GET":
                self.close_connection = True
                return
            self.send_response(status)
            announced = len(content) + (answers.torn and self.command == "HEAD")
            for name, value in (headers | {"Content-Length": str(announced)}).items():
                if name not in answers.missing:
                    self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_GET = do_HEAD

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        answers.url = f"http://127.0.0.1:{http.server_port}"
        online(monkeypatch, answers.url)
        yield answers
        http.shutdown()


def online(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between two tries of huggingface_hub


def keep(cache: Path, commit: str, name: str = FILE.file, content: bytes = b"kept", *, ref: str | None = None) -> Path:
    """Puts a file of user/repo into the cache, by hand."""
    return put_into_hub_cache(cache, commit, name, content, ref)


def refused(file: HubFile = FILE) -> str:
    """The sentence of a download that fails."""
    with pytest.raises(ZitMergeError) as e, located(PLACE):
        hub.download(file)
    text = str(e.value)
    assert text.startswith(f"{PLACE}: ")
    assert "\n" not in text and "Client Error" not in text and "/resolve/" not in text
    return text.removeprefix(f"{PLACE}: ")


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("hf:user/repo/style.safetensors", FILE),
        ("hf:a-b/c_d.e/f.safetensors", HubFile("a-b/c_d.e", "f.safetensors")),
        ("hf:user/repo/deep/er/My Style (v2).safetensors", HubFile("user/repo", "deep/er/My Style (v2).safetensors")),
        ("hf:user/repo/Style.SAFETENSORS", HubFile("user/repo", "Style.SAFETENSORS")),
        ("hf:user/repo/style.safetensors@v1.0", HubFile("user/repo", "style.safetensors", "v1.0")),
        ("hf:user/repo/style.safetensors@refs/pr/1", HubFile("user/repo", "style.safetensors", "refs/pr/1")),
        (f"hf:user/repo/style.safetensors@{OLD}", HubFile("user/repo", "style.safetensors", OLD)),
        ("hf:user/repo/me@home.safetensors", HubFile("user/repo", "me@home.safetensors")),
        ("hf:user/repo/me@home.safetensors@a@b", HubFile("user/repo", "me@home.safetensors", "a@b")),
        ("hf:user/repo/style.safetensors@b.safetensors", HubFile("user/repo", "style.safetensors", "b.safetensors")),
        ("hf:user/repo/style.safetensors@v1.pt", HubFile("user/repo", "style.safetensors", "v1.pt")),
        ("hf:user/repo", HubFile("user/repo", "")),
        ("hf:user/repo@main", HubFile("user/repo", "", "main")),
        (f"hf:a.b-c/d__e@{OLD}", HubFile("a.b-c/d__e", "", OLD)),
        ("hf:user/repo/x.safetensors/y.safetensors", HubFile("user/repo", "x.safetensors/y.safetensors")),
    ],
)
def test_a_source_says_repository_file_and_revision(source: str, file: HubFile):
    assert hub.parse(source) == file
    assert str(file) == source
    assert hub.parse(str(replace(file, revision=NEW))) == HubFile(file.repo, file.file, NEW)


def test_a_file_is_called_by_the_last_part_of_its_path():
    assert hub.parse("hf:user/repo/deep/er/style.safetensors@refs/pr/1").name == "style.safetensors"
    assert FILE.name == "style.safetensors"


@pytest.mark.parametrize(
    "source",
    [
        "hf:",
        "hf:user",
        "hf:user/repo/",
        "hf:user/repo@",
        "hf:user/repo@../x",
        "hf:us er/repo",
        "hf:user/re--po@main",
        "hf:style.safetensors",
        "hf:repo/style.safetensors",
        "hf:repo/style.safetensors@main",
        "hf:user/repo/style",
        "hf:user/repo/.safetensors/",
        "hf:user/repo/style.safetensors@",
        "hf:user/repo@main/style.safetensors",
        "hf://user/repo/style.safetensors",
        "hf:user/repo/style.safetensors.gz",
        "hf:user/repo//style.safetensors",
        "hf:user/repo/../style.safetensors",
        "hf:user/repo/C:\\style.safetensors",
        "hf:user/repo\\style.safetensors",
        "hf:user/repo/deep\\style.safetensors",
        "hf:user/../style.safetensors",
        "hf:us er/repo/style.safetensors",
        "hf:us er/repo/style.safetensors@v1.pt",
        "hf:user/re--po/style.safetensors",
        "hf:user/repo.git/style.safetensors",
        "hf:-user/repo/style.safetensors",
        f"hf:user/{'r' * 97}/style.safetensors",
        "hf:user/repo/style.safetensors@../../../etc/passwd",
        "hf:user/repo/style.safetensors@/etc/passwd",
        "hf:user/repo/style.safetensors@my branch",
        "hf:user/repo/style.safetensors@v1\n",
        "hf:user/repo/sty\nle.safetensors",
        "hf:user/repo/sty\0le.safetensors",
        "hf:user/repo/sty\ud800le.safetensors",
    ],
)
def test_another_form_is_answered_with_the_right_one(source: str):
    with pytest.raises(ZitMergeError) as e, located(PLACE):
        hub.parse(source)
    assert str(e.value).startswith(f"{PLACE}: {source[:120]!r} ")
    assert "write hf:user/repo/file.safetensors, and @revision" in str(e.value)
    assert "\n" not in str(e.value)


def test_what_parse_lets_through_huggingface_hub_takes(cache: Path):
    for source in ("hf:a/b/c.safetensors", f"hf:_a/{'r' * 96}/c d.safetensors@refs/pr/1", "hf:a.b-c/d__e/f.safetensors@x"):
        assert hub.cached(hub.parse(source)) is None  # it validates names before it looks


@pytest.mark.parametrize("source", ["hf:user/a.bin", "hf:user/a.pt@main"])
def test_a_pickle_without_its_repository_is_refused_too(source: str):
    with pytest.raises(ZitMergeError, match="pickles can run code when they are opened"):
        hub.parse(source)


@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.PTH", "deep/a.ckpt", "a.bin@main", "a.pkl@refs/pr/1"])
def test_pickles_are_refused_with_the_reason(name: str):
    with pytest.raises(ZitMergeError, match="pickles can run code when they are opened"):
        hub.parse(f"hf:user/repo/{name}")


def test_reading_a_source_does_not_load_huggingface_hub():
    code = (
        "import sys; from extensions_built_in.zit_merge.files.hub import parse; parse('hf:user/repo/a.safetensors@x'); "
        "sys.exit('huggingface_hub' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


def test_cached_finds_a_branch_a_commit_and_a_pull_request(cache: Path):
    old = keep(cache, OLD, ref="main")
    new = keep(cache, NEW, content=b"new", ref="refs/pr/1")
    assert hub.cached(FILE) == old
    assert hub.cached(HubFile(FILE.repo, FILE.file, "main")) == old
    assert hub.cached(HubFile(FILE.repo, FILE.file, NEW)) == new
    assert hub.cached(HubFile(FILE.repo, FILE.file, "refs/pr/1")) == new
    assert new.read_bytes() == b"new"


def test_cached_finds_a_file_in_a_folder(cache: Path):
    path = keep(cache, OLD, "deep/er/style.safetensors", ref="main")
    assert hub.cached(HubFile(FILE.repo, "deep/er/style.safetensors")) == path
    assert hub.cached(FILE) is None


def test_cached_answers_none_for_what_is_not_there(cache: Path):
    assert hub.cached(FILE) is None  # no cache at all
    path = keep(cache, OLD, ref="main")
    assert hub.cached(HubFile("user/other", FILE.file)) is None
    assert hub.cached(HubFile(FILE.repo, FILE.file, "v2")) is None
    assert hub.cached(HubFile(FILE.repo, FILE.file, NEW)) is None
    path.resolve().unlink()  # a blob that somebody deleted
    assert hub.cached(FILE) is None


def test_cached_answers_none_for_what_is_known_not_to_exist(cache: Path):
    keep(cache, OLD, ref="main")
    gone = cache / "models--user--repo" / ".no_exist" / OLD / "gone.safetensors"
    gone.parent.mkdir(parents=True)
    gone.touch()
    assert hub.cached(HubFile(FILE.repo, "gone.safetensors")) is None


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a\0b"])
def test_cached_answers_none_where_the_cache_is_broken(cache: Path, content: bytes):
    keep(cache, OLD, ref="main")
    (cache / "models--user--repo" / "refs" / "main").write_bytes(content)
    assert hub.cached(FILE) is None


def test_cached_opens_no_socket(cache: Path, server: Answers, monkeypatch: pytest.MonkeyPatch):
    opened = []

    def refuse(*args: object, **_: object) -> None:
        opened.append(args)
        raise OSError(errno.ENETUNREACH, "no sockets in this test")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    path = keep(cache, OLD, ref="main")
    assert hub.cached(FILE) == path
    assert hub.cached(HubFile(FILE.repo, "other.safetensors")) is None
    assert hub.cached(HubFile(FILE.repo, FILE.file, "v2")) is None
    assert not opened and not server.asked
    refused(HubFile(FILE.repo, "other.safetensors"))
    assert opened  # so the trap is one that a download falls into


def test_download_keeps_the_file_under_its_commit(cache: Path, server: Answers):
    path = hub.download(FILE)
    assert path.read_bytes() == b"old"
    assert path.name == FILE.name and path.is_relative_to(cache)
    assert hub.commit_of(path) == OLD
    assert hub.cached(FILE) == path
    assert FILE.at(path) == HubFile(FILE.repo, FILE.file, OLD)
    assert hub.cached(FILE.at(path)) == path


def test_download_asks_for_names_as_they_are_written(server: Answers):
    server.branches["refs/pr/1"] = NEW
    server.files[NEW, "de ep/My #1 (50%).safetensors"] = b"new"
    file = HubFile("user/repo", "de ep/My #1 (50%).safetensors", "refs/pr/1")
    path = hub.download(file)
    assert (path.read_bytes(), hub.commit_of(path)) == (b"new", NEW)
    assert hub.cached(file) == path


def test_download_uses_the_token_of_the_environment(server: Answers, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    hub.download(FILE)
    assert {token for _, _, token in server.asked} == {"Bearer hf_mine"}


def test_download_uses_the_stored_login(server: Answers):
    Path(constants.HF_TOKEN_PATH).write_text("hf_stored\n")
    hub.download(FILE)
    assert {token for _, _, token in server.asked} == {"Bearer hf_stored"}


def test_download_without_a_login_sends_no_token(server: Answers):
    hub.download(FILE)
    assert {token for _, _, token in server.asked} == {None}


def move(server: Answers) -> None:
    """Somebody pushes."""
    server.branches["main"] = NEW
    server.files[NEW, FILE.file] = b"new"


def test_a_branch_that_moves_does_not_change_the_answer(cache: Path, server: Answers):
    first = hub.download(FILE)
    move(server)
    second = hub.download(FILE)
    assert second == first and second.read_bytes() == b"old"
    # not even where another process has fetched the new version meanwhile
    keep(cache, NEW, content=b"new", ref="main")
    assert hub.cached(FILE) == first
    assert hub.download(FILE) == first


def test_the_next_process_sees_the_moved_branch(server: Answers, monkeypatch: pytest.MonkeyPatch):
    hub.download(FILE)
    move(server)
    monkeypatch.setattr(hub, "_pins", {})
    path = hub.download(FILE)
    assert (path.read_bytes(), hub.commit_of(path)) == (b"new", NEW)


def test_a_file_deleted_from_the_cache_comes_back_in_the_same_version(server: Answers):
    path = hub.download(FILE)
    move(server)
    path.resolve().unlink()
    path.unlink()
    assert hub.download(FILE) == path
    assert path.read_bytes() == b"old"


def test_a_failed_download_is_tried_again(server: Answers):
    server.refusals["/user/repo"] = (401, {"X-Error-Code": "RepoNotFound"})
    refused()
    server.refusals.clear()
    assert hub.download(FILE).read_bytes() == b"old"


def test_what_is_in_the_cache_serves_while_the_hub_is_away(cache: Path, server: Answers, monkeypatch: pytest.MonkeyPatch):
    path = keep(cache, OLD, ref="main")
    server.refusals["/"] = (503, {})
    assert hub.download(FILE) == path
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_pins", {})
    assert hub.download(FILE) == path


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [
        (401, {"X-Error-Code": "RepoNotFound"}, ["no repository user/repo, or it is private", "hf auth login or set HF_TOKEN"]),
        (404, {"X-Error-Code": "RepoNotFound"}, ["no repository user/repo, or it is private", "hf auth login or set HF_TOKEN"]),
        (401, {"X-Error-Code": "GatedRepo"}, ["user/repo is gated: accept its licence on", "/user/repo, then", "HF_TOKEN"]),
        (403, {"X-Error-Code": "GatedRepo"}, ["user/repo is gated: accept its licence on", "/user/repo, then", "HF_TOKEN"]),
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, ["not accept the token", "hf auth login"]),
        (403, {"X-Error-Message": "Access to this resource is disabled."}, ["refuses access to user/repo", "disabled"]),
        (403, {}, ["refuses access to user/repo", "use a token that may read it"]),
        (429, {}, ["too many requests (429)", "wait some minutes"]),
        (500, {}, ["HTTP status 500", "run again later"]),
        (503, {}, ["HTTP status 503", "run again later"]),
        (400, {}, ["HTTP status 400"]),
    ],
)
def test_a_refusal_of_the_hub_is_one_sentence(server: Answers, status: int, headers: dict[str, str], words: list[str]):
    server.refusals["/user/repo"] = (status, headers)
    text = refused()
    for word in words:
        assert word in text, text


def test_a_missing_repository_revision_or_file_is_told_apart(server: Answers):
    assert refused(HubFile("user/other", FILE.file)).startswith("the hub has no repository user/other, or it is private")
    assert refused(HubFile("user/repo", FILE.file, "v9")).startswith("user/repo has no revision v9: ")
    page = f"{server.url}/user/repo/tree/main"
    missing = refused(HubFile("user/repo", "deep/other.safetensors"))
    assert missing == f"user/repo has no file deep/other.safetensors in main: check its path on {page}"


def test_a_refusal_half_way_is_one_sentence(server: Answers, monkeypatch: pytest.MonkeyPatch):
    answer = server.answer

    def second_thoughts(path: str) -> tuple[int, dict[str, str], bytes]:
        return (403, {}, b"") if server.asked[-1][0] == "GET" else answer(path)

    monkeypatch.setattr(server, "answer", second_thoughts)
    assert "refuses access to user/repo" in refused()


def test_offline_says_how_to_fetch(cache: Path):
    text = refused()
    assert f"{FILE} is not in the local cache, and HF_HUB_OFFLINE forbids fetching it" in text
    assert text.endswith("hf download user/repo style.safetensors")


def test_no_connection_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as probe:  # a port where nobody listens
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    online(monkeypatch, url)
    assert refused() == (
        f"{FILE} is not in the local cache, and {url} can't be reached: check the network, or give the path of a file"
    )


@pytest.mark.parametrize("header", ["X-Repo-Commit", "ETag"])
def test_a_server_that_is_no_hub_is_named(server: Answers, header: str):
    server.missing.add(header)
    assert refused() == f"{server.url} does not answer as the hub does: check HF_ENDPOINT and the proxy"


def test_a_file_that_arrives_torn_is_not_kept(cache: Path, server: Answers):
    server.torn = True
    assert "could not be fetched (OSError): run again" in refused()
    assert hub.cached(FILE) is None


def test_a_connection_that_breaks_is_one_sentence(cache: Path, server: Answers):
    server.hangs_up = True
    text = refused()
    assert text.startswith(f"the connection to {server.url} broke off (") and text.endswith("check the network and run again")
    assert hub.cached(FILE) is None


def test_an_endpoint_that_is_no_address_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    online(monkeypatch, "http://127.0.0.1:port")
    assert refused()


def test_a_cache_that_can_not_be_written_is_one_sentence(cache: Path, server: Answers):
    cache.write_text("a file where the folder should be")
    text = refused()
    assert f"can't be stored in {cache} (" in text and "set HF_HUB_CACHE to another folder" in text


ONLY = HubFile("user/repo", "")  # whatever its one file is called
BESIDE = ("README.md", "config.json", "model.safetensors.index.json", "deep/other.safetensors", "old.ckpt")


def test_the_only_file_of_a_repository_needs_no_name(cache: Path, server: Answers):
    server.files |= {(OLD, name): b"beside" for name in BESIDE}
    server.files |= {(NEW, name): b"new" for name in ("x.safetensors", "y.safetensors")}
    path = hub.download(ONLY)
    assert path.read_bytes() == b"old" and path.name == FILE.file
    assert ONLY.at(path) == HubFile(FILE.repo, FILE.file, OLD)
    assert hub.cached(ONLY) == hub.cached(FILE) == path
    assert hub.download(replace(ONLY, revision=OLD)) == path


def test_the_only_file_stays_the_same_in_a_process_while_the_repository_grows(server: Answers):
    first = hub.download(ONLY)
    server.branches["main"] = NEW
    server.files |= {(NEW, name): b"new" for name in ("x.safetensors", "y.safetensors")}
    assert hub.download(ONLY) == first
    assert "holds 2 at its top" in refused(replace(ONLY, revision=NEW))


def test_several_files_are_named_with_how_to_write_one(cache: Path, server: Answers):
    server.files[OLD, "B.SafeTensors"] = b"other"
    assert refused(ONLY) == (
        f"hf:user/repo names no .safetensors file, and the repository holds 2 at its top in {server.url}/user/repo "
        "(B.SafeTensors, style.safetensors): name the file, as in hf:user/repo/B.SafeTensors"
    )
    server.files |= {(OLD, f"step_{n}.safetensors"): b"" for n in range(20)}
    text = refused(replace(ONLY, revision="main"))
    assert "holds 22 at its top" in text and "step_14.safetensors and 14 more): " in text
    assert text.endswith("as in hf:user/repo/B.SafeTensors@main")
    assert not cache.exists()


def test_a_repository_without_a_file_at_its_top_is_told_apart(server: Answers):
    server.files = {(OLD, name): b"beside" for name in BESIDE}
    assert refused(ONLY) == (
        f"hf:user/repo names no .safetensors file, and the repository holds none at its top ({server.url}/user/repo): "
        "name the file, as in hf:user/repo/folder/file.safetensors"
    )


def test_the_only_file_of_the_cache_needs_no_network(cache: Path):
    assert hub.cached(ONLY) is None
    for name in BESIDE:
        keep(cache, OLD, name, name.encode(), ref="main")
    assert hub.cached(ONLY) is None
    path = keep(cache, OLD, ref="main")
    keep(cache, NEW, "x.safetensors", b"new")
    assert hub.cached(ONLY) == hub.download(ONLY) == path
    assert hub.cached(replace(ONLY, revision="main")) == path
    assert hub.cached(replace(ONLY, revision="v2")) is None
    keep(cache, OLD, "other.safetensors", b"other", ref="main")
    with pytest.raises(ZitMergeError) as e:
        hub.cached(ONLY)
    assert str(e.value) == (
        "hf:user/repo names no .safetensors file, and the repository holds 2 at its top in the local cache "
        "(other.safetensors, style.safetensors): name the file, as in hf:user/repo/other.safetensors"
    )
    path.resolve().unlink()
    assert hub.cached(ONLY) == path.parent / "other.safetensors"


def test_the_cache_serves_the_only_file_while_the_hub_is_away(cache: Path, server: Answers):
    path = keep(cache, OLD, ref="main")
    server.refusals["/"] = (503, {})
    assert hub.download(ONLY) == path


def test_no_listing_is_one_sentence(cache: Path, server: Answers, monkeypatch: pytest.MonkeyPatch):
    assert refused(HubFile("user/other", "")).startswith("the hub has no repository user/other, or it is private")
    assert refused(HubFile("user/repo", "", "v9")).startswith("user/repo has no revision v9: ")
    server.refusals["/"] = (503, {})
    assert refused(ONLY) == "the hub does not send hf:user/repo now (HTTP status 503): run again later"
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert refused(ONLY) == (
        "hf:user/repo is not in the local cache, and http://127.0.0.1:1 can't be reached: "
        "check the network, or give the path of a file"
    )


def test_offline_says_how_to_fetch_the_repository(cache: Path):
    text = refused(ONLY)
    assert "hf:user/repo is not in the local cache, and HF_HUB_OFFLINE forbids fetching it" in text
    assert text.endswith("hf download user/repo")


def test_without_the_package_the_sentence_names_it(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert refused() == "the package huggingface_hub, which hf: sources need, does not load: pip install huggingface_hub"
    with pytest.raises(ZitMergeError, match="^lora: the package huggingface_hub"), located("lora"):
        hub.cached(FILE)


def test_the_commit_is_read_from_the_path():
    home = Path("/snapshots/x/models--user--repo")
    assert hub.commit_of(home / "snapshots" / OLD / "deep" / FILE.file) == OLD
    windows = PureWindowsPath(r"C:\Users\me\.cache\huggingface\hub\models--user--repo\snapshots", NEW, "style.safetensors")
    assert hub.commit_of(windows) == NEW
    resolved, cut, folder = (
        home / "blobs" / sha256(b"").hexdigest(),
        home / "snapshots" / OLD[:-1] / "a",
        home / "snapshots" / OLD,
    )
    for path in (resolved, cut, folder, Path(FILE.name)):
        with pytest.raises(ZitMergeError, match="is not a snapshot"):
            hub.commit_of(path)


def test_a_cache_without_links_is_read_the_same(cache: Path):
    path = cache / "models--user--repo" / "snapshots" / OLD / FILE.file  # as on Windows: the file itself, no blobs
    path.parent.mkdir(parents=True)
    path.write_bytes(b"kept")
    refs = cache / "models--user--repo" / "refs"
    refs.mkdir()
    (refs / "main").write_text(OLD)
    assert hub.cached(FILE) == path
    assert hub.download(FILE) == path
    assert hub.commit_of(path) == OLD
