"""Whole files or none: written beside their place under a lock, synced, then renamed.

A reader sees the old file or the new one, never a part. What an interrupted run leaves is recognised and overwritten.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import ZitMergeError


def part_path(path: Path) -> Path:
    """Where a file lies until it is whole."""
    return path.with_name(path.name + ".part")


def remove_part(path: Path) -> None:
    """Removes what a killed run left of a file; a part that another run is writing now stays, and stops this one in its turn."""
    part = part_path(path)
    if part.is_file():
        with contextlib.suppress(ZitMergeError):
            open_exclusively(part).close()
            part.unlink()


def copy_file(source: Path, folder: Path) -> Path:
    """Puts a whole file into another folder under its own name.

    Args:
        source: The file.
        folder: Where the copy goes.
    """
    target = folder / source.name
    with os_errors(target), source.open("rb") as whole:
        return write_whole(target, iter(lambda: whole.read(1 << 22), b""))


def write_whole(path: Path, chunks: Iterable[bytes]) -> Path:
    """Writes a file beside its place, syncs and renames it: an older one is replaced at once or not at all, nothing is left over.

    Args:
        path: The file.
        chunks: Its content.

    Raises:
        ZitMergeError: It can't be written, or another process is writing it now.
    """
    with os_errors(path), open_exclusively(part_path(path)) as part:
        try:
            for chunk in chunks:
                part.write(chunk)
            part.flush()
            os.fsync(part.fileno())
            publish_file(part, part_path(path), path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.close()
            part_path(path).unlink(missing_ok=True)
            raise
    return path


def publish_file(file: BinaryIO, part: Path, path: Path) -> None:
    """Renames a synced part file to its final name and makes the rename durable.

    Args:
        file: The part, open.
        part: Its path.
        path: The final name.
    """
    if os.name == "nt":  # Windows renames no open file
        file.close()
    os.replace(part, path)
    file.close()
    if os.name != "nt":
        folder = os.open(path.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some network disks sync no folders; the file itself is safe
            os.fsync(folder)
        os.close(folder)


def open_exclusively(path: Path) -> BinaryIO:
    """Opens for writing, empty, under a lock that ends with this process; what a dead process left is overwritten.

    Raises:
        ZitMergeError: Another process is writing it now.
    """
    with os_errors(path):
        while True:
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b")
            if not _lock(file):
                file.close()
                raise ZitMergeError(f"{path}: another run is writing this file now: wait for it or stop it")
            if os.name == "nt" or _is_still(file, path):
                file.truncate()
                return file
            file.close()  # it was published under its final name between open and lock: that file is not ours to empty


def _is_still(file: BinaryIO, path: Path) -> bool:
    """Whether the open file is the one that lies at `path`."""
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


def _lock(file: BinaryIO) -> bool:
    """Takes the system's lock on an open file; False if another process has it. A disk without locks lets everybody in."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]  # of Windows
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        return e.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)
    return True


@contextlib.contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """The system's errors as one sentence that says what to do."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            smaller = " or a smaller rank" if path.suffix == ".safetensors" else ""
            raise ZitMergeError(f"{path}: no space left on the disk: free some, or set another output_dir{smaller}") from e
        raise ZitMergeError(f"{path}: can't be written ({e.strerror}): check the folder and its permissions") from e
