"""Config files, read by AI-Toolkit's rules: ${ENV}, [name], 1e-3 as a number. A key that stands twice is an error."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from .config import PROCESS_TYPE, Section, parse_section
from .errors import ZitMergeError


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

    def place(self, index: int) -> str:
        """How messages call a process."""
        return "" if self.recipe else f"process[{index}]"

    def sections(self) -> Sequence[tuple[int, Section]]:
        """(index, section) of every zit_merge process, validated."""
        return self._sections

    @cached_property
    def _sections(self) -> Sequence[tuple[int, Section]]:
        found = tuple(
            (i, parse_section(raw, self.place(i), first=i == 0 and not self.recipe, folder=self.folder))
            for i, raw in enumerate(self.processes)
            if isinstance(raw, Mapping) and raw.get("type") == PROCESS_TYPE
        )
        if not found:
            raise ZitMergeError(f"config.process: there is no process of type {PROCESS_TYPE}: append one")
        return found


@dataclass(frozen=True)
class TextFile:
    """A text file and how it was stored.

    Attributes:
        path: The file.
        start: Its byte order mark, or nothing.
        codec: Of the rest.
        text: What it says.
    """

    path: Path
    start: bytes
    codec: str
    text: str

    @classmethod
    def read(cls, path: Path) -> TextFile:
        """UTF-8, or UTF-16 with a mark, as PowerShell's > writes it.

        Raises:
            ZitMergeError: It can't be read, or is no text.
        """
        marks = {b"\xef\xbb\xbf": "utf-8", b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}
        try:
            content = path.read_bytes()
            start = next(filter(content.startswith, marks), b"")
            codec = marks.get(start, "utf-8")
            return cls(path, start, codec, content[len(start) :].decode(codec))
        except UnicodeDecodeError as e:
            raise ZitMergeError(f"{path}: is not a text file: give a YAML or JSON config") from e
        except OSError as e:
            raise ZitMergeError(f"{path}: can't be read ({e.strerror}): give the path of a YAML or JSON config") from e

    def encode(self, text: str) -> bytes:
        """A text as this file stores it."""
        return self.start + text.encode(self.codec)

    @property
    def is_json(self) -> bool:
        """As the toolkit decides it."""
        return _is_json(self.path)


RECIPE = r"^made_by: zit_merge"  # file names in a recipe are meant as they stand: no ${ENV}, no [name]


def load_job(path: str | Path) -> Job:
    """Reads an AI-Toolkit config (YAML, JSON) or a recipe, the way the toolkit reads it: ${ENV}, [name], 1e-3 as a number.

    Raises:
        ZitMergeError: The file can't be read, has a key twice, or is neither.
    """
    file = TextFile.read(Path(path))
    try:
        return job_of(file.text, file.path)
    except RecursionError:
        raise ZitMergeError(f"{path}: is nested too deeply, or contains itself") from None


def job_of(text: str, path: Path) -> Job:
    if re.search(RECIPE, text, re.MULTILINE):
        raw = parse(text, path)
        return Job(str(raw.get("job") or path.stem), [raw], path.parent, recipe=True)
    raw = parse(fill_environment(text, path), path)
    if isinstance(raw, list) and len(raw) == 1:  # a section as it stands under process:
        raw = raw[0]
    if isinstance(raw, Mapping) and raw.get("type") == PROCESS_TYPE:
        return Job(str(raw.get("job") or path.stem), [raw], path.parent, recipe=True)
    if not isinstance(raw, Mapping) or not isinstance(raw.get("config"), Mapping):
        raise ZitMergeError(
            f"{path}: is neither an AI-Toolkit job (job:, config:, process:) nor a zit_merge recipe (type: {PROCESS_TYPE})"
        )
    if raw.get("job") != "extension":
        raise ZitMergeError(f"{path}: job is {raw.get('job')!r}; a {PROCESS_TYPE} section needs job: extension")
    name = raw["config"].get("name")
    if not isinstance(name, str) or not name:
        raise ZitMergeError(f"{path}: config.name must be text, not {name!r}: a job needs a name, in quotes if it is a number")
    processes = raw["config"].get("process")
    if not isinstance(processes, list):
        raise ZitMergeError(f"{path}: config.process must be a list of processes")
    return Job(name, [fill_name(p, name) for p in processes], path.parent)


def fill_environment(text: str, path: Path) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ZitMergeError(f"{path}: the environment variable {match[1]} is not set: set it or write the path out")
        return os.environ[match[1]]

    return re.sub(r"\$\{([^}]+)\}", value, text)  # comments included, as toolkit/config.py does


def fill_name(value: Any, name: str) -> Any:
    if isinstance(value, str):
        return value.replace("[name]", name)
    if isinstance(value, Mapping):
        return {fill_name(k, name): fill_name(v, name) for k, v in value.items()}
    return [fill_name(v, name) for v in value] if isinstance(value, list) else value


def _is_json(path: Path) -> bool:
    return path.suffix in (".json", ".jsonc")


def parse(text: str, path: Path) -> Any:
    if _is_json(path):
        try:
            return json.loads(text, object_pairs_hook=_no_twins)
        except ValueError as e:
            raise ZitMergeError(f"{path}: is not valid JSON: {e}") from e
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        _refuse_twins(loader, node, set())
        return loader.construct_document(node) if node else None
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        raise ZitMergeError(f"{path}: line {mark.line + 1 if mark else '?'}: {e.problem or e.context}") from e
    except (yaml.YAMLError, ValueError, KeyError, AttributeError) as e:  # the last two: tags that YAML itself can't build
        raise ZitMergeError(f"{path}: is not valid YAML: {' '.join(str(e).split())}") from e


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [k for k, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"the key {key} stands there twice: keep one of them")
    return dict(pairs)


def _refuse_twins(loader: yaml.Loader, node: yaml.Node | None, seen: set[int]) -> None:
    """A key that stands twice in a mapping is an error; YAML would drop the first one in silence."""
    if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
        return
    seen.add(id(node))
    keys: set[Any] = set()
    for child in node.value:
        if not isinstance(node, yaml.MappingNode):
            _refuse_twins(loader, child, seen)
            continue
        key, value = child
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            name = loader.construct_object(key)
            if name in keys:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {name} stands there twice: keep one of them", problem_mark=key.start_mark
                )
            keys.add(name)
        _refuse_twins(loader, value, seen)


class Loader(yaml.SafeLoader):
    """YAML with AI-Toolkit's idea of a number."""


# toolkit/config.py:55: PyYAML alone takes 1e-3 for text, since YAML 1.1 wants a dot.
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9_]+(?:[eE][-+][0-9]+)?
        |[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+\.[0-9_]*|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)
