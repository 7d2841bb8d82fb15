"""Putting the extension into an AI-Toolkit folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from ..errors import ZitMergeError
from ..files.atomic import os_errors

_PROBE = (
    "import sys; sys.path.insert(0, '.'); import extensions_built_in.zit_merge as z; "
    "print(z.__file__); print(z.AI_TOOLKIT_EXTENSIONS[0].get_process().__name__)"
)

# What tells a copy of ours from anything else: before 0.4 the first lay at the top.
_OURS = ("zimage.py", "model/zimage.py")


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
    if not (folder / "run.py").is_file() or not (folder / "extensions_built_in").is_dir():
        raise ZitMergeError(f"{folder}: is no AI-Toolkit folder (no run.py with extensions_built_in beside it)")
    source = Path(__file__).resolve().parents[1]
    target = folder.absolute() / "extensions_built_in" / "zit_merge"
    if target.resolve() == source and not (copy and target.is_symlink()):
        done = f"{target} is already in place"
    else:
        with os_errors(target):
            _clear(target)
        done = _place(source, target, copy)
    return f"{done}\n{_probe(folder)}"


def _place(source: Path, target: Path, copy: bool) -> str:
    try:
        if copy:
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            return f"copied to {target}"
        target.symlink_to(source, target_is_directory=True)
    except OSError as e:
        raise ZitMergeError(
            f"{target}: can't be made ({e.strerror}): " + ("check the folder" if copy else "try again with --copy")
        ) from e
    return f"linked {target} to {source}"


def _clear(target: Path) -> None:
    """Removes an older link or copy of ours; anything else stays."""
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        if not any((target / name).is_file() for name in _OURS):
            raise ZitMergeError(f"{target}: exists and is not zit_merge: move it away")
        shutil.rmtree(target)


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
