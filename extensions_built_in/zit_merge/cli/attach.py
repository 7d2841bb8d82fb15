"""Puts our section into an AI-Toolkit config; the edit itself is in textedit.py.

The new text is parsed again and compared value by value, and looked at as `check` does, before anything is written.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.edit import BREAKS, PROCESSES, Keys, Source, get, put
from ..config.job import RECIPE, Job, fill_environment, fill_name, job_of
from ..config.schema import PROCESS_TYPE, parse_section
from ..errors import ZitMergeError
from ..files.atomic import open_exclusively, os_errors, part_path, publish_file
from ..files.text import TextFile, parse
from ..planning.job import plan_job
from ..planning.preflight import NO_TOOLKIT, Toolkit


@dataclass(frozen=True)
class Attached:
    """What `attach` did.

    Attributes:
        config: The file.
        place: `process[1]`, where the section is now.
        replaced: It took the place of an older one.
        backup: The file as it was; None if it held this very section already.
    """

    config: Path
    place: str
    replaced: bool
    backup: Path | None

    def text(self) -> str:
        """A line for people."""
        if self.backup is None:
            return f"{self.config}: {self.place} is this section already, nothing was changed"
        how = "replaced" if self.replaced else "appended"
        return f"{self.config}: the section is {how} as {self.place}; the file as it was is {self.backup}"


def attach(config: Path, section: Path, *, replace: bool = False, toolkit: Toolkit = NO_TOOLKIT) -> Attached:
    """Appends a section to the processes of an AI-Toolkit config. Comments, order and layout of the file stay.

    Args:
        config: The job, YAML or JSON.
        section: A file with one zit_merge section: bare (a recipe too), as a list of one, or in a whole job; YAML or JSON.
        replace: Put it in the place of the one zit_merge section of the config, if there is one.
        toolkit: What tells of the training before the section.

    Raises:
        ZitMergeError: One of the files is wrong, the section would not pass `check`, or the file can't be written. The config is
            as it was then, and there is no new file.
    """
    try:
        return _attach(Path(config), Path(section), replace, toolkit)
    except RecursionError:
        raise ZitMergeError(f"{config} or {section}: is nested too deeply: mend it") from None


def _attach(config: Path, section: Path, replace: bool, toolkit: Toolkit) -> Attached:
    file, source = TextFile.read(config), _read_source(section)
    job = job_of(file.text, config)
    if job.recipe:
        raise ZitMergeError(
            f"{config}: is a {PROCESS_TYPE} section, not an AI-Toolkit job: name the job first, and this file with --section"
        )
    index = _to_replace(job, config, replace)
    position = len(job.processes) if index is None else index
    _check_section(source, job.name, position)
    text = put(file, len(job.processes), index, source)
    _check_edit(file, text, index, source)
    _check_plan(job_of(text, config), position, config, toolkit)
    backup = None if text == file.text else _write(file, text)
    return Attached(config, f"process[{position}]", index is not None, backup)


def _to_replace(job: Job, config: Path, replace: bool) -> int | None:
    """The index of the section to replace; None to append."""
    ours = _ours(job.processes)
    if len(ours) > 1 and replace:
        places = " and ".join(map(job.place, ours))
        raise ZitMergeError(f"{config}: {places} are {PROCESS_TYPE} sections, --replace takes one: remove the others by hand")
    if ours and not replace:
        raise ZitMergeError(
            f"{config}: {job.place(ours[0])} is a {PROCESS_TYPE} section already: --replace puts the new one in its place"
        )
    return ours[0] if ours else None


def _ours(processes: object) -> list[int]:
    if not isinstance(processes, list | tuple):
        return []
    return [i for i, p in enumerate(processes) if isinstance(p, Mapping) and p.get("type") == PROCESS_TYPE]


def _read_source(path: Path) -> Source:
    """Finds the one section of a file."""
    file = TextFile.read(path)
    recipe = bool(re.search(RECIPE, file.text, re.MULTILINE))
    document = parse(file.text if recipe else fill_environment(file.text, path), path)
    keys = _section_keys(document, path)
    return Source(file, keys, recipe, get(document, keys))


def _section_keys(document: object, path: Path) -> Keys:
    if isinstance(document, Mapping) and document.get("type") == PROCESS_TYPE:
        return ()
    job = document.get("config") if isinstance(document, Mapping) else None
    processes = job.get("process") if isinstance(job, Mapping) else document
    found = _ours(processes)
    if len(found) > 1:
        places = " and ".join(f"process[{i}]" for i in found)
        raise ZitMergeError(f"{path}: {places} are {PROCESS_TYPE} sections: leave the one to attach")
    if not found or (processes is document and len(document) > 1):
        raise ZitMergeError(
            f"{path}: is not one {PROCESS_TYPE} section: give a file with type: {PROCESS_TYPE} and steps:, or a job that has one"
        )
    return (found[0],) if processes is document else (*PROCESSES, found[0])


def _check_section(source: Source, job: str, position: int) -> None:
    """Raises unless the section is valid and means in the job what it means in its file."""
    path = source.file.path
    if source.recipe and (found := re.search(r"\$\{[^}]+\}|\[name\]", repr(source.data))):
        raise ZitMergeError(f"{path}: the recipe names a file with {found[0]} in it, which AI-Toolkit would fill in: rename it")
    try:
        parse_section(fill_name(source.data, job), first=position == 0, folder=path.parent)
    except ZitMergeError as e:
        raise ZitMergeError(f"{path}: {e}") from None


def _check_edit(file: TextFile, text: str, index: int | None, source: Source) -> None:
    """Raises unless the new text holds the old values and the section, and nothing else."""
    wanted = parse(fill_environment(file.text, file.path), file.path)
    processes = wanted["config"]["process"]
    processes[len(processes) if index is None else index : None if index is None else index + 1] = [source.data]
    try:
        found = parse(fill_environment(text, file.path), file.path)
    except ZitMergeError as e:
        raise ZitMergeError(f"{e} (with the section of {source.file.path} in it)") from None
    if _shape(found) != _shape(wanted):
        end = "" if file.text.endswith(tuple(BREAKS)) else ", or end the file with a newline"
        raise ZitMergeError(
            f"{file.path}: the section of {source.file.path} can't be put in without changing another value: write out what "
            f"comes from environment variables and blocks of text (|, >){end}"
        )


def _shape(value: Any) -> str:
    """Values and their order, comparable; keys as text, since JSON has no others."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list) else value

    return repr(plain(value))


def _check_plan(job: Job, position: int, config: Path, toolkit: Toolkit) -> None:
    """What `check` does."""
    for planned in plan_job(job, before_training=True, toolkit=toolkit):
        training = planned.site.training
        if planned.index == position and training and training.claims(config.resolve()):
            raise ZitMergeError(
                f"{config}: lies in the folder of {training.place}, which would take the changed file for its newest "
                "checkpoint: move the config elsewhere"
            )


def _write(file: TextFile, text: str) -> Path:
    """Replaces the file, atomically, and returns its backup. On an error there is neither a change nor a new file."""
    path = file.path.resolve() if file.path.is_symlink() else file.path  # a link stays one
    part = part_path(path.with_name(f"{path.name}.zit_merge"))
    old, new = file.encode(file.text), file.encode(text)
    if not path.is_file() or not all(os.access(p, os.W_OK) for p in (path, path.parent)):
        raise ZitMergeError(f"{path}: can't be written: change the permissions of the file or its folder, or work on a copy")
    backup: Path | None = None
    with os_errors(path), open_exclusively(part) as whole:
        try:
            _copy_owner(path, part)
            whole.write(new)
            whole.flush()
            os.fsync(whole.fileno())
            if path.read_bytes() != old:
                raise ZitMergeError(f"{path}: was changed by another program just now: run the command again")
            backup = _back_up(path, old)
            publish_file(whole, part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                whole.close()
            part.unlink(missing_ok=True)
            if backup and path.read_bytes() == old:
                backup.unlink()
            raise
    return backup


def _copy_owner(source: Path, target: Path) -> None:
    """Owner and mode; a part file must not be more open than the file."""
    facts = source.stat()
    if hasattr(os, "chown"):
        with contextlib.suppress(OSError):
            os.chown(target, facts.st_uid, facts.st_gid)
    target.chmod(stat.S_IMODE(facts.st_mode))


def _back_up(path: Path, content: bytes) -> Path:
    """config.yaml.bak, .bak1, ...: the first name that is free."""
    names = (path.with_name(f"{path.name}.bak{number or ''}") for number in itertools.count())
    file = None
    while file is None:
        with contextlib.suppress(FileExistsError):
            file = (backup := next(names)).open("xb")
    try:
        with file:
            _copy_owner(path, backup)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        backup.unlink()
        raise
    return backup
