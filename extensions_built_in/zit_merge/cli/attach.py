"""Puts a section into an AI-Toolkit config, after the same checks as `check`; the edit itself is in config/edit.py."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..config.edit import put
from ..config.job import RECIPE, VARIABLE, Job, fill_environment, fill_name, job_of
from ..config.parse import parse_section
from ..config.recipe import check_recipe
from ..config.schema import PROCESS_TYPE
from ..errors import ZitMergeError
from ..files.atomic import open_exclusively, os_errors, part_path, publish_file, seal
from ..files.text import TextFile, parse
from ..planning.job import plan_job
from ..planning.preflight import NO_TOOLKIT, Toolkit


@dataclass(frozen=True)
class Attached:
    """What `attach` did.

    Attributes:
        config: The file.
        loc: `process[1]`, where the section is now.
        replaced: It took the place of an older one.
        backup: The file as it was; None if it held this very section already.
    """

    config: Path
    loc: str
    replaced: bool
    backup: Path | None

    def text(self) -> str:
        """A line for people."""
        if self.backup is None:
            return f"{self.config}: {self.loc} is this section already, nothing was changed"
        how = "replaced" if self.replaced else "appended"
        return f"{self.config}: the section is {how} as {self.loc}; the file as it was is {self.backup}"


def attach(config: Path, section: Path, *, replace: bool = False, toolkit: Toolkit = NO_TOOLKIT) -> Attached:
    """Puts a section into the list of processes of an AI-Toolkit config; a backup of the old file is kept.

    Args:
        config: The job, YAML or JSON.
        section: A file with one zit_merge section: bare (a recipe too), as a list of one, or in a whole job; YAML or JSON.
        replace: Put it in the place of the zit_merge section of the config, if there is one.
        toolkit: What can check the training before the section.

    Raises:
        CannotEdit: The layout of the config is not edited; the exception has the section to paste.
        ZitMergeError: One of the files is wrong, the section would not pass `check`, or the file can't be written. The config is
            as it was then, and there is no new file.
    """
    file = TextFile.read(Path(config))
    job = job_of(file.text, file.path)
    if job.recipe:
        raise ZitMergeError(f"{config}: is a {PROCESS_TYPE} section, not an AI-Toolkit job: name the job first")
    new, own_text = _read_section(TextFile.read(Path(section)))
    index = _to_replace(job, file.path, replace)
    position = len(job.processes) if index is None else index
    _check(fill_name(new, job.name), Path(section), job, position, file.path, toolkit)
    text = put(file, new, index, own_text)
    backup = None if text == file.text else _write(file, text)
    return Attached(file.path, job.loc(position), index is not None, backup)


def _to_replace(job: Job, config: Path, replace: bool) -> int | None:
    """The index of the section to replace; None to append."""
    ours = _ours(job.processes)
    if len(ours) > replace:
        places = " and ".join(map(job.loc, ours))
        what = "leave one for --replace" if replace else "--replace puts the new one in the place of the old"
        raise ZitMergeError(f"{config}: has a {PROCESS_TYPE} section already ({places}): {what}")
    return ours[0] if ours else None


def _ours(processes: object) -> list[int]:
    found = enumerate(processes if isinstance(processes, list) else ())
    return [i for i, p in found if isinstance(p, Mapping) and p.get("type") == PROCESS_TYPE]


def _read_section(file: TextFile) -> tuple[Mapping[str, Any], str]:
    """(the one section of a file, the file's text if it is nothing else)."""
    recipe = re.search(RECIPE, file.text, re.MULTILINE)
    document = parse(file.text if recipe else fill_environment(file.text, file.path), file.path)
    section = _one_section(document, file.path)
    if recipe and (found := re.search(rf"{VARIABLE}|\[name\]", repr(section))):
        raise ZitMergeError(f"{file.path}: the recipe has {found[0]}, which AI-Toolkit would fill in: rename that file")
    if section in (document, [document]):
        try:
            check_recipe(section)
        except ZitMergeError as e:
            raise ZitMergeError(f"{file.path}: {e}") from None
    return section, file.text if section is document else ""


def _one_section(document: Any, path: Path) -> Mapping[str, Any]:
    job = document.get("config") if isinstance(document, Mapping) else None
    processes: Any = job.get("process") if isinstance(job, Mapping) else document if isinstance(document, list) else [document]
    found = _ours(processes)
    if len(found) != 1:
        raise ZitMergeError(f"{path}: has {len(found)} {PROCESS_TYPE} sections: give a file with one, alone or in a job")
    return processes[found[0]]


def _check(section: Mapping[str, Any], path: Path, job: Job, position: int, config: Path, toolkit: Toolkit) -> None:
    """What `check` does with the job that has the section."""
    try:
        parse_section(section, first=position == 0, folder=path.parent)
    except ZitMergeError as e:
        raise ZitMergeError(f"{path}: {e}") from None
    new = Job(job.name, [*job.processes[:position], section, *job.processes[position + 1 :]], job.folder)
    for planned in plan_job(new, before_training=True, toolkit=toolkit):
        training = planned.context.training
        if planned.index == position and training and training.claims(config.resolve()):
            raise ZitMergeError(
                f"{config}: lies in the folder of {training.loc}, which would take the changed file for its newest "
                "checkpoint: move the config elsewhere"
            )


def _write(file: TextFile, text: str) -> Path:
    """Replaces the file, atomically, and returns its backup. On an error there is neither a change nor a new file."""
    path = file.path.resolve() if file.path.is_symlink() else file.path  # a link stays one
    part, old, new = part_path(path.with_name(f"{path.name}.zit_merge")), file.encode(file.text), file.encode(text)
    if not path.is_file() or not all(os.access(p, os.W_OK) for p in (path, path.parent)):
        raise ZitMergeError(f"{path}: can't be written: change the permissions of the file or its folder, or work on a copy")
    with os_errors(path), open_exclusively(part) as whole, contextlib.ExitStack() as undo:
        undo.callback(part.unlink, missing_ok=True)
        undo.callback(whole.close)
        _fill(whole, part, new[(head := whole.tell()) :], path)
        if path.read_bytes() != old:
            raise ZitMergeError(f"{path}: was changed by another program just now: run the command again")
        backups = (path.with_name(f"{path.name}.bak{number or ''}") for number in itertools.count())
        backup = next(path for path in backups if not os.path.lexists(path))
        with backup.open("xb") as copy:
            undo.callback(lambda: backup.unlink() if path.read_bytes() == old else None)
            _fill(copy, backup, old, path)
        seal(whole, new[:head])
        publish_file(whole, part, path)
        undo.pop_all()
    return backup


def _fill(file: BinaryIO, path: Path, content: bytes, like: Path) -> None:
    """Writes an open file that gets the owner and the mode of another one: it must not be more open to others."""
    facts = like.stat()
    with contextlib.suppress(OSError, AttributeError):  # Windows has no chown
        os.chown(path, facts.st_uid, facts.st_gid)
    path.chmod(stat.S_IMODE(facts.st_mode))
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
