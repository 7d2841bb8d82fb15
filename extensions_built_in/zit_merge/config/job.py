"""Config files, read by AI-Toolkit's rules: ${ENV}, [name], 1e-3 as a number. Duplicate keys are errors."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import SettingError, ZitMergeError, located, nearest
from ..files.text import TextFile, parse, reading
from ..wording import hide
from .parse import parse_section
from .recipe import check_recipe
from .schema import PROCESS_TYPE, Section


@dataclass(frozen=True)
class Job:
    """A config file: an AI-Toolkit job, or a recipe, which is one bare section.

    Attributes:
        name: `config.name`.
        processes: The raw process sections, in order.
        folder: Where the config lies; relative LoRA paths start there.
        recipe: It is a bare section.
    """

    name: str
    processes: Sequence[Mapping[str, Any]]
    folder: Path
    recipe: bool = False

    def loc(self, index: int) -> str:
        """How messages call a process."""
        return "" if self.recipe else f"process[{index}]"

    def sections(self) -> Sequence[tuple[int, Section]]:
        """(index, section) of every zit_merge process, validated."""
        return self._sections

    @cached_property
    def _sections(self) -> Sequence[tuple[int, Section]]:
        found = []
        for i, raw in enumerate(self.processes):
            if isinstance(raw, Mapping) and raw.get("type") == PROCESS_TYPE:
                with located(self.loc(i)):
                    found.append((i, parse_section(raw, first=i == 0 and not self.recipe, folder=self.folder)))
        if not found:
            types = [str(raw.get("type")) for raw in self.processes if isinstance(raw, Mapping)]
            meant = next((kind for kind in types if nearest(kind, [PROCESS_TYPE])), "")
            cure = f"correct {meant}" if meant else "append one"
            raise SettingError(f"there is no process of type {PROCESS_TYPE}: {cure}", "config.process")
        return tuple(found)


VARIABLE = r"\$\{([^}]+)\}"
RECIPE = r"^made_by: zit_merge"  # file names in a recipe are meant as they stand: no ${ENV}, no [name]


def load_job(path: str | Path) -> Job:
    """Reads an AI-Toolkit config (YAML, JSON) or a recipe, the way the toolkit reads it: ${ENV}, [name], 1e-3 as a number.

    Raises:
        ZitMergeError: The file can't be read, has a key twice, or is neither.
    """
    file = TextFile.read(Path(path))
    return job_of(file.text, file.path)


def job_of(text: str, path: Path) -> Job:
    """The job, or the recipe, that a config's text holds.

    Args:
        text: The text.
        path: Its file, for messages; its ending tells JSON from YAML.
    """
    raw = parse(text if re.search(RECIPE, text, re.MULTILINE) else fill_environment(text, path), path)
    if isinstance(raw, list) and len(raw) == 1:  # a section as a list of one, as under process:
        raw = raw[0]
    if isinstance(raw, Mapping) and raw.get("type") == PROCESS_TYPE:
        check_recipe(raw)
        return Job(str(raw.get("job") or path.stem), [raw], path.parent, recipe=True)
    if not isinstance(raw, Mapping) or not isinstance(raw.get("config"), Mapping):
        raise ZitMergeError(
            f"{path}: is neither an AI-Toolkit job (job:, config:, process:) nor a zit_merge recipe (type: {PROCESS_TYPE})"
        )
    if raw.get("job") != "extension":
        raise ZitMergeError(f"{path}: job is {raw.get('job')!r}; a {PROCESS_TYPE} section needs job: extension")
    name = raw["config"].get("name")
    if not isinstance(name, str) or not name:
        told = reading(name) or ": a job needs a name"
        raise ZitMergeError(f"{path}: config.name must be text, not {name if reading(name) else repr(name)}{told}")
    processes = raw["config"].get("process")
    if not isinstance(processes, list):
        raise ZitMergeError(f"{path}: config.process must be a list of processes")
    return Job(name, [fill_name(p, name) for p in processes], path.parent)


def fill_environment(text: str, path: Path) -> str:
    """The text with the values of `${NAME}`.

    Args:
        text: Of a config.
        path: Its file, for messages.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ZitMergeError(f"{path}: the environment variable {match[1]} is not set: set it or write the path out")
        hide(os.environ[match[1]], match[1])
        return os.environ[match[1]]

    return re.sub(VARIABLE, value, text)  # comments included, as toolkit/config.py does


def hide_environment(text: str) -> None:
    """Keeps what a text says by `${NAME}` out of messages, where another program has read it."""
    for name in re.findall(VARIABLE, text):
        if name in os.environ:
            hide(os.environ[name], name)


def fill_name(value: Any, name: str) -> Any:
    """The parsed value with the job's name in place of `[name]`.

    Args:
        value: Anything that YAML holds.
        name: Of the job.
    """
    if isinstance(value, str):
        return value.replace("[name]", name)
    if isinstance(value, Mapping):
        return {fill_name(k, name): fill_name(v, name) for k, v in value.items()}
    return [fill_name(v, name) for v in value] if isinstance(value, list) else value
