"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import SettingError

PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
NO_PICKLES = "is a pickled checkpoint; pickles can run code when they are opened, so only .safetensors is read"


def user_path(text: str | Path) -> Path:
    """A path as people write it, ~ included.

    Raises:
        SettingError: The system can't have a file of that name.
    """
    try:
        if b"\0" in str(text).encode():  # a name that is no Unicode can't go into a recipe
            raise ValueError("it holds a null byte")
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise SettingError(f"{str(text)[:80]!r} is no path that this system can have ({reason}): correct it") from e
    return path


def file_name(text: str) -> str:
    """A name without folders: `/` in it becomes `_`."""
    return text.replace("/", "_").replace("\\", "_")


def check_writable(folder: Path) -> Path:
    """The nearest folder that exists.

    Raises:
        SettingError: No file can be made in it.
    """
    parent = folder.absolute()
    while not os.path.lexists(parent) and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise SettingError(f"{parent} is not a folder: give another one")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise SettingError(f"{parent} can't be written to: change its permissions or give another folder")
    return parent
