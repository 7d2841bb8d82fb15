"""Files that are read: regular ones only, and no more of them than is meant."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from ..wording import size_text

TEXT_LIMIT = 16_000_000  # bytes of a config, a recipe or an adapter's config: a thousand times what they take
PICTURE_LIMIT = 500_000_000

_KINDS = {
    stat.S_IFDIR: "it is a folder",
    stat.S_IFIFO: "it is a pipe, not a file",
    stat.S_IFSOCK: "it is a socket, not a file",
    stat.S_IFCHR: "it is a device, not a file",
    stat.S_IFBLK: "it is a device, not a file",
}


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file to read, without a buffer. It neither waits for a pipe's writer nor touches a device.

    Raises:
        OSError: It can't be opened, or is no regular file; strerror says which.
    """
    _check_regular(path.stat())  # opening alone can move a device
    flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    file = os.fdopen(os.open(path, os.O_RDONLY | flags), "rb", buffering=0)
    try:
        _check_regular(os.fstat(file.fileno()))
    except OSError:
        file.close()
        raise
    return file


def _check_regular(facts: os.stat_result) -> None:
    if not stat.S_ISREG(facts.st_mode):
        raise OSError(errno.EINVAL, _KINDS.get(stat.S_IFMT(facts.st_mode), "it is no regular file"))


def read_limited(path: Path, limit: int = TEXT_LIMIT) -> bytes:
    """The content of a regular file.

    Args:
        path: The file.
        limit: Its bytes at most.

    Raises:
        OSError: It can't be read, is no regular file, or is larger.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"it has {size_text(size)}, more than {size_text(limit)}")
        content = bytearray()
        while chunk := file.read(limit + 1 - len(content)):
            content += chunk
    if len(content) > limit:  # a file of /proc says 0, and one that grows says less
        raise OSError(errno.EFBIG, f"it has more than {size_text(limit)}")
    return bytes(content)
