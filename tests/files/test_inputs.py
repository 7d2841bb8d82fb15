"""What lies where a file should: pipes, devices, sockets, folders and gigabytes get a sentence, and nothing of them is read."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from extensions_built_in.zit_merge import load_lora
from extensions_built_in.zit_merge.files.inputs import open_regular, read_limited
from extensions_built_in.zit_merge.preview.image_store import ImageStore
from extensions_built_in.zit_merge.report.page.render import is_ours

pytestmark = [pytest.mark.usefixtures("few"), pytest.mark.skipif(os.name == "nt", reason="Windows has none of them in folders")]
KINDS = {
    "pipe": "it is a pipe, not a file",
    "device": "it is a device, not a file",
    "socket": "it is a socket, not a file",
    "folder": "it is a folder",
}


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    """A test that waits for a pipe fails in the place of all that follow."""

    def stop(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def put(path: Path, kind: str) -> Path:
    """Puts such a thing there, or a link to it."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:  # its name stays; a path of over 100 letters it can't have
            here = Path.cwd()
            os.chdir(path.parent)
            server.bind(path.name)
            os.chdir(here)
    else:
        path.mkdir()
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_regular_file_is_opened(tmp_path, kind):
    path = put(tmp_path / "a", kind)
    link = tmp_path / "link"
    link.symlink_to(path)
    for name in (path, link):
        for read in (open_regular, read_limited):
            with pytest.raises(OSError, match=KINDS[kind]):
                read(name)


def test_no_more_than_the_limit_is_read(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"12345678")
    assert read_limited(path, 8) == b"12345678"
    with pytest.raises(OSError, match="more than"):
        read_limited(path, 7)
    assert read_limited(Path("/proc/self/status"), 1 << 20)  # it says that it has 0 bytes
    with pytest.raises(OSError, match="more than"):
        read_limited(Path("/proc/self/status"), 7)


def test_what_is_opened_is_closed_by_an_exec(tmp_path):
    (tmp_path / "a").touch()
    with open_regular(tmp_path / "a") as file:
        assert not os.get_inheritable(file.fileno())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", ["run", "check", "inspect", "merge", "recipe"])
def test_a_lora(work, kind, command):
    put(work.folder / "me.safetensors", kind)
    job = work.job({"name": "a", "loras": [{"lora": "me.safetensors", "ratio": 1.0}]})
    words = {"merge": ("me.safetensors", "--ratio", 1, "-o", "out.safetensors"), "run": (job,), "check": (job,)}
    message = work.zit(command, *words.get(command, ("me.safetensors",))).refused()
    assert f"me.safetensors: can't be read ({KINDS[kind]}): check the file" in message
    assert work.files() == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", ["run", "check", "attach", "section"])
@pytest.mark.parametrize("name", ["config.yaml", "config.json"])
def test_a_config_and_a_section(work, loras, kind, command, name):
    other = work.job({"name": "a", "loras": [{"lora": "me.safetensors", "ratio": 1.0}]}, name="other.yaml")
    path = put(work.folder / name, kind)
    words = {"attach": ("attach", path, "--section", other), "section": ("attach", other, "--section", path)}
    message = work.zit(*words.get(command, (command, path))).refused()
    assert message.startswith(f"{path}: can't be read ({KINDS[kind]}): give the path of a YAML or JSON config")


@pytest.mark.parametrize("kind", KINDS)
def test_the_config_of_a_peft_adapter(work, kind):
    path = work.lora("adapter_model.safetensors", "peft")
    put(work.folder / "adapter_config.json", kind)
    (question,) = load_lora(path).questions
    assert f"adapter_config.json can't be read ({KINDS[kind]})" in question and "set alpha: none" in question


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_and_a_picture(work, kind):
    store = ImageStore(work.folder, None, 0, 4, "cat")
    (work.folder / "pictures").mkdir()
    assert not is_ours(put(work.folder / "plugin.html", kind))
    put(store.path("0" * 8), kind)
    assert not store.has("0" * 8)


def test_a_picture_that_would_take_gigabytes(work):
    store = ImageStore(work.folder, None, 0, 4, "cat")
    store.path("0" * 8).parent.mkdir()
    Image.new("1", (60_000, 60_000)).save(store.path("0" * 8))
    assert not store.has("0" * 8)


@pytest.mark.parametrize("name", ["config.yaml", "config.json", "adapter_config.json"])
def test_a_text_of_gigabytes_is_not_read(work, name):
    path = work.folder / name
    path.touch()
    os.truncate(path, 8 << 30)  # no block of it is on the disk
    if name == "adapter_config.json":
        (message,) = load_lora(work.lora("adapter_model.safetensors", "peft")).questions
    else:
        message = work.zit("run", path).refused()
    assert "it has 8.59 GB, more than 16.0 MB" in message


@pytest.mark.parametrize("length", [100_000_001, 2**31, 2**62, 2**64 - 1])
def test_a_header_of_gigabytes_is_not_read(work, loras, length):
    with loras[0].open("r+b") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(8 << 30)
    message = work.zit("inspect", loras[0]).refused()
    assert "is not a whole .safetensors file (its header is" in message


def test_a_file_of_zeros(work):
    path = work.folder / "me.safetensors"
    path.touch()
    os.truncate(path, 8 << 30)
    assert "is not a whole .safetensors file" in work.zit("inspect", path).refused()
