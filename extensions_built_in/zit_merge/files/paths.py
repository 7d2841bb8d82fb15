"""Paths as users write them."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from ..errors import SettingError
from ..wording import masked

USUAL_PREFIX = "merged_"  # of outputs' names
PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
NO_PICKLES = "is a pickled checkpoint; pickles can run code when they are opened, so only .safetensors is read"


def user_path(text: str | Path) -> Path:
    """A path as people write it: with ~, and with the quotes and blanks that came along when it was copied.

    Raises:
        SettingError: The system can't have a file of that name, or the path is not there and was most likely meant otherwise.
    """
    path, bare = system_path(text), unquoted(str(text))
    path = path if os.path.lexists(path) else system_path(bare)
    if os.path.lexists(path):
        return path
    if bare != str(text):
        raise SettingError(f"{str(text)!r} is not there, nor is it without the quotes or blanks around it: correct the path")
    if found := re.search(r"[\a-\r]", bare):
        raise SettingError(
            f"{bare!r} has a {found[0]!r}, which is how YAML reads a backslash in double quotes: use single quotes, or forward "
            "slashes"
        )
    return path


def unquoted(text: str) -> str:
    """A path without quotes and blanks around it, as Windows' "Copy as path" and hasty typing leave them."""
    return text.strip().strip("\"'\u201c\u201d").strip() or text


def system_path(text: str | Path) -> Path:
    """A path with ~, as it stands.

    Raises:
        SettingError: The system can't have a file of that name.
    """
    try:
        if b"\0" in str(text).encode():  # a name that is no Unicode can't go into a recipe
            raise ValueError("it holds a null byte")
        path = Path(text).expanduser()
        for part in (str(path), *path.parts):  # of a folder that is not there the system does not look at the rest
            Path(part).exists()
    except (OSError, RuntimeError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise SettingError(f"{str(text)[:80]!r} is no path that this system can have ({reason}): correct it") from e
    return path


def without_users(value: Any) -> Any:
    """Data for others to see: without the names of a machine's users in paths, without what the environment said.

    A path below the own home folder begins with ~, which is read again here; of one in a user's folder elsewhere only the last
    part is left.

    Args:
        value: Anything that JSON holds.
    """
    if isinstance(value, Mapping):
        return {key: without_users(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_users(entry) for entry in value]
    if not isinstance(value, str):
        return value
    text = masked(value)
    path = PureWindowsPath(text) if re.match(r"[A-Za-z]:[\\/]|\\\\", text) else PurePath(text)
    if not path.is_absolute():
        return text
    with contextlib.suppress(RuntimeError):  # there is no home
        if path.is_relative_to(Path.home()):
            return f"~/{path.relative_to(Path.home()).as_posix()}"
        if Path.home().name in path.parts:
            return path.name
    return path.name if {"home", "users"} & {part.lower() for part in path.parts[:-1]} else text


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
