"""Putting the extension into an AI-Toolkit folder, and taking it out again.

A copy has a list of the files that were put there, with their SHA-256: what somebody changed or added is told apart by it, stays,
and is named.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from ..errors import ZitMergeError
from ..files.atomic import os_errors

_PROBE = (
    "import sys; sys.path.insert(0, '.'); import extensions_built_in.zit_merge as z; "
    "print(z.__file__); print(z.AI_TOOLKIT_EXTENSIONS[0].get_process().__name__)"
)

# What tells a copy of ours from anything else: before 0.4 the first lay at the top.
_OURS = ("zimage.py", "model/zimage.py")


_LIST = "installed.json"
_YOURS = ".yours"  # ending of a file of ours that somebody changed: it is kept, and no longer loaded


def install(folder: Path, *, copy: bool = False) -> str:
    """Links, or copies, this package into `extensions_built_in` of a checkout and has it loaded there.

    Args:
        folder: The AI-Toolkit checkout.
        copy: Copy instead of linking; an older copy or link is replaced.

    Returns:
        What was done, for people.

    Raises:
        ZitMergeError: The folder is no AI-Toolkit, something else is in the way, or the extension does not load.
    """
    source, target = _source(), _target(folder)
    if target.resolve() == source and not (copy and target.is_symlink()):
        done = f"{target} is already in place"
    else:
        with os_errors(target):
            kept = _clear(target, _listed(target), only_if_all=not copy)
        done = "\n".join([_place(source, target, copy), *_named(kept)])
    return f"{done}\n{_probe(folder)}"


def remove(folder: Path) -> str:
    """Takes out what `install` put into a checkout: the link, or the files of a copy that are as they were put there.

    Args:
        folder: The AI-Toolkit checkout.

    Returns:
        What was done, for people; files that were changed or added stay, and are named.

    Raises:
        ZitMergeError: The folder is no AI-Toolkit, there is nothing of ours, or it is a checkout that this command runs in.
    """
    source, target = _source(), _target(folder)
    if not target.is_symlink() and not target.exists():
        raise ZitMergeError(f"{target}: is not there: nothing to remove")
    listed = _listed(target)
    if listed is None and not target.is_symlink() and target.resolve() == source:
        raise ZitMergeError(f"{target}: is not what install put there, but where this command runs: delete the folder by hand")
    with os_errors(target):
        kept = _clear(target, _hashes(source) if listed is None else listed)
    return "\n".join([f"removed {target}", *_named(kept)])


def _source() -> Path:
    return Path(__file__).resolve().parents[1]


def _target(folder: Path) -> Path:
    if not (folder / "run.py").is_file() or not (folder / "extensions_built_in").is_dir():
        raise ZitMergeError(f"{folder}: is no AI-Toolkit folder (no run.py with extensions_built_in beside it)")
    return folder.absolute() / "extensions_built_in" / "zit_merge"


def _place(source: Path, target: Path, copy: bool) -> str:
    try:
        if not copy:
            target.symlink_to(source, target_is_directory=True)
            return f"linked {target} to {source}"
        hashes = _hashes(source)
        for name in hashes:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target / name)
        (target / _LIST).write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")
    except OSError as e:
        raise ZitMergeError(
            f"{target}: can't be made ({e.strerror}): " + ("check the folder" if copy else "try again with --copy")
        ) from e
    return f"copied to {target}"


def _clear(target: Path, listed: Mapping[str, str] | None, *, only_if_all: bool = False) -> list[Path]:
    """Removes an older link or copy of ours. Returns the files of a copy that somebody changed or added, which stay.

    Args:
        target: The link or the copy.
        listed: What was put there. None: a copy of an older version, which had no list; all of it goes.
        only_if_all: Remove nothing where something would stay.
    """
    if not target.is_symlink() and not target.exists():
        return []
    if target.exists() and not any((target / name).is_file() for name in (*_OURS, _LIST)):
        raise ZitMergeError(f"{target}: exists and is not zit_merge: move it away")
    if target.is_symlink():
        target.unlink()
        return []
    if listed is None:
        shutil.rmtree(target)
        return []
    found = _hashes(target)
    stay = {target / name: name in listed for name, sha256 in found.items() if listed.get(name) != sha256}
    if stay and only_if_all:
        raise ZitMergeError(f"{target}: is a copy that somebody changed ({next(iter(stay))} ...): install with --copy keeps it")
    for name in found:
        if target / name not in stay:
            (target / name).unlink()
    (target / _LIST).unlink(missing_ok=True)
    for cache in list(target.rglob("__pycache__")):
        shutil.rmtree(cache)
    folders = [path for path in (target, *target.rglob("*")) if path.is_dir() and not path.is_symlink()]
    for path in sorted(folders, reverse=True):
        if not any(path.iterdir()):
            path.rmdir()
    return [_set_aside(path) if was_ours else path for path, was_ours in stay.items()]


def _set_aside(path: Path) -> Path:
    names = (path.with_name(f"{path.name}{_YOURS}{number or ''}") for number in itertools.count())
    return path.rename(next(name for name in names if not name.exists()))


def _hashes(folder: Path) -> dict[str, str]:
    """File -> SHA-256 of all in a folder, without the list and what Python has compiled."""
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    return {
        name.as_posix(): hashlib.sha256((folder / name).read_bytes()).hexdigest() if (folder / name).is_file() else ""
        for name in names
        if "__pycache__" not in name.parts and name != Path(_LIST)
    }


def _listed(target: Path) -> Mapping[str, str] | None:
    """File -> SHA-256 as it was put there; None without a list, or with one that can't be read."""
    try:
        listed = json.loads((target / _LIST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return listed if isinstance(listed, dict) else None


def _named(kept: list[Path]) -> list[str]:
    return ["kept, because you changed or added it:", *(f"    {path}" for path in sorted(kept))] if kept else []


def _probe(folder: Path) -> str:
    """Loads the process class the way AI-Toolkit does, with AI-Toolkit's own Python where it has one."""
    pythons = [folder / name / sub for name in ("venv", ".venv") for sub in ("bin/python", "Scripts/python.exe")]
    python = next((p.absolute() for p in pythons if p.is_file()), Path(sys.executable))
    words = [str(python), "-c", _PROBE]
    try:
        probe = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise ZitMergeError(f"{folder}: the extension is in place, but {python} did not load it ({e}): try it with run.py") from e
    if probe.returncode == 0:
        return "it loads there: process type zit_merge is ready"
    reason = probe.stderr.strip().splitlines()[-1] if probe.stderr.strip() else f"exit code {probe.returncode}"
    if reason.startswith(("ModuleNotFoundError", "ImportError")) and "zit_merge" not in reason:
        return (
            f"it is in place, but {python} can't load AI-Toolkit itself ({reason}): "
            "run install again with the Python that AI-Toolkit runs with to see it load"
        )
    raise ZitMergeError(f"{folder}: the extension is in place but does not load: {reason}")
