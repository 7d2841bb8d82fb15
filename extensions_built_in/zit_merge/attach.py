"""Puts our section into an AI-Toolkit config as an edit of its text: what else stands there stays, byte for byte.

Where the list of processes lies comes from the marks of PyYAML's events (from a small scan for JSON). The new text is parsed
again and compared value by value, and planned as `check` does, before anything is written.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import stat
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .config import PROCESS_TYPE, parse_section
from .errors import ZitMergeError
from .formats.writer import open_exclusively, os_errors, part_path, publish_file
from .jobfile import RECIPE, Job, Loader, fill_environment, fill_name, job_of, parse
from .planning import plan_job
from .preflight import NO_TOOLKIT, Toolkit

_ENVIRONMENT = re.compile(r"\$\{[^}]+\}")
_BREAKS = "\n\r\x85\u2028\u2029"  # YAML 1.1
_BREAK = re.compile(f"\r\n|[{_BREAKS}]")
_COMMENT = re.compile(rf"(?:(?<=\s)|^)#[^{_BREAKS}]*")
_PROCESSES = ("config", "process")

Keys = tuple["str | int", ...]


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
    file, source = _File.read(config), _Source.read(section)
    job = job_of(file.text, config)
    if job.recipe:
        raise ZitMergeError(
            f"{config}: is a {PROCESS_TYPE} section, not an AI-Toolkit job: name the job first, and this file with --section"
        )
    index = _to_replace(job, config, replace)
    position = len(job.processes) if index is None else index
    _check_section(source, job.name, position)
    text = _edit(file, len(job.processes), index, source)
    _check_edit(file, text, index, source)
    _check_plan(job_of(text, config), position, config, toolkit)
    backup = None if text == file.text else _write(file, text)
    return Attached(config, f"process[{position}]", index is not None, backup)


@dataclass(frozen=True)
class _File:
    """A text file and how it was stored: `start` is a byte order mark or nothing."""

    path: Path
    start: bytes
    codec: str
    text: str

    @classmethod
    def read(cls, path: Path) -> _File:
        """The file as `load_job` takes it: UTF-8, or UTF-16 with a mark."""
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
        return self.path.suffix in (".json", ".jsonc")

    def tree(self) -> _Node:
        """Where its values lie."""
        try:
            return _json_tree(self.text) if self.is_json else _yaml_tree(self.text)
        except (yaml.YAMLError, ValueError, StopIteration):  # it was parsed before, with ${X} filled in
            raise ZitMergeError(f"{self.path}: an environment variable holds more than a value: write it out") from None


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


@dataclass(frozen=True)
class _Source:
    """The file of the section.

    Attributes:
        file: The file.
        keys: The way to the section in it.
        recipe: Its text is meant as it stands: no ${ENV}, no [name].
        data: The section, ${ENV} filled in.
    """

    file: _File
    keys: Keys
    recipe: bool
    data: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> _Source:
        """Finds the one section of a file."""
        file = _File.read(path)
        recipe = bool(re.search(RECIPE, file.text, re.MULTILINE))
        document = parse(file.text if recipe else fill_environment(file.text, path), path)
        keys = _section_keys(document, path)
        return cls(file, keys, recipe, _get(document, keys))

    def unfilled(self) -> Any:
        """The section with ${ENV} as text."""
        names: list[str] = []

        def hide(match: re.Match[str]) -> str:
            names.append(match[0])
            return f"zitEnv{len(names) - 1}zit"  # ${X} may stand where YAML allows no braces

        def show(value: Any) -> Any:
            if isinstance(value, str):
                return re.sub(r"zitEnv(\d+)zit", lambda m: names[int(m[1])], value)
            if isinstance(value, Mapping):
                return {show(k): show(v) for k, v in value.items()}
            return [show(v) for v in value] if isinstance(value, list) else value

        try:
            return show(_get(parse(_ENVIRONMENT.sub(hide, self.file.text), self.file.path), self.keys))
        except ZitMergeError:
            raise ZitMergeError(
                f"{self.file.path}: an environment variable stands there without quotes: write its value out"
            ) from None


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
    return (found[0],) if processes is document else (*_PROCESSES, found[0])


def _get(document: Any, keys: Keys) -> Any:
    for key in keys:
        document = document[key]
    return document


@dataclass
class _Node:
    """A value and its text. In block style it ends with its last leaf, before comments.

    Attributes:
        kind: mapping, sequence, scalar or alias.
        start, end: Of the text.
        column: Of the start.
        flow: It stands in brackets.
        children: Items, or keys and values by turns.
        value: Of a scalar; the name that an alias refers to.
        style: Of a scalar: | and > are blocks of text.
        anchor: Its name for aliases.
        entry: In a block sequence, at the first dash or behind it.
    """

    kind: str
    start: int
    end: int
    column: int = 0
    flow: bool = False
    children: list[_Node] = field(default_factory=list)
    value: str | None = None
    style: str | None = None
    anchor: str | None = None
    entry: int = 0

    def at(self, key: str | int) -> tuple[_Node | None, _Node | None]:
        """(key, value) as they stand in the text; None for what does not."""
        if isinstance(key, int):
            return None, self.children[key] if self.kind == "sequence" and key < len(self.children) else None
        pairs = zip(self.children[::2], self.children[1::2], strict=True) if self.kind == "mapping" else ()
        return next(((k, v) for k, v in pairs if k.value == key and k.kind == "scalar"), (None, None))

    def find(self, keys: Keys) -> tuple[_Node | None, _Node | None]:
        """(the last key, its value)."""
        key: _Node | None = None
        node: _Node | None = self
        for step in keys:
            key, node = node.at(step) if node else (None, None)
        return key, node

    def walk(self) -> Iterator[_Node]:
        """Itself and everything in it."""
        yield self
        for child in self.children:
            yield from child.walk()


def _yaml_tree(text: str) -> _Node:
    # ${X} is no YAML within brackets; digits of the same length are, anywhere.
    events = yaml.parse(_ENVIRONMENT.sub(lambda m: "1" * len(m[0]), text), Loader=yaml.SafeLoader)
    first = next(e for e in events if isinstance(e, yaml.NodeEvent))
    return _yaml_node(first, events)


def _yaml_node(event: yaml.NodeEvent, events: Iterator[yaml.Event]) -> _Node:
    at = (event.start_mark.index, event.end_mark.index, event.start_mark.column)
    if isinstance(event, yaml.AliasEvent):
        return _Node("alias", *at, value=event.anchor)
    if isinstance(event, yaml.ScalarEvent):
        return _Node("scalar", *at, value=event.value, style=event.style, anchor=event.anchor)
    kind = "mapping" if isinstance(event, yaml.MappingStartEvent) else "sequence"
    node = _Node(kind, *at, flow=bool(event.flow_style), anchor=event.anchor, entry=event.end_mark.index)
    while not isinstance(child := next(events), yaml.CollectionEndEvent):
        node.children.append(_yaml_node(child, events))
    node.end = child.end_mark.index if node.flow or not node.children else node.children[-1].end
    return node


def _json_tree(text: str) -> _Node:
    text = _ENVIRONMENT.sub(lambda m: "1" * len(m[0]), text)
    tokens = re.finditer(r'"(?:[^"\\]|\\.)*"|[\[\]{}]|[^\s\[\]{},:"]+', text)
    return _json_node(next(tokens), tokens)


def _json_node(token: re.Match[str], tokens: Iterator[re.Match[str]]) -> _Node:
    if token[0] not in ("[", "{"):
        value = json.loads(token[0], strict=False) if token[0].startswith('"') else token[0]
        return _Node("scalar", token.start(), token.end(), value=value)
    node = _Node("sequence" if token[0] == "[" else "mapping", token.start(), token.end(), flow=True)
    while (child := next(tokens))[0] not in ("]", "}"):
        node.children.append(_json_node(child, tokens))
    node.end = child.end()
    return node


def _rows(text: str) -> list[int]:
    """Where lines start."""
    return [0, *(m.end() for m in _BREAK.finditer(text))]


def _row_start(text: str, position: int) -> int:
    rows = _rows(text)
    return rows[bisect_right(rows, position) - 1]


def _indent(text: str, position: int) -> str:
    """The white space that opens the line of a position."""
    return re.compile(r"[ \t]*").match(text, _row_start(text, position))[0]


def _end_of_line(text: str) -> str:
    found = re.search("\r\n|\n|\r", text)
    return found[0] if found else "\n"


def _own_end(text: str, item: _Node, column: int) -> int:
    """Where the lines of an item end, the comment behind its last word included.

    Args:
        text: The file's.
        item: Of a block sequence, or the whole document.
        column: Of the dash; what stands right of it can be the item's content.
    """
    rows = _rows(text)
    while item.children and not item.flow:
        item = item.children[-1]
    row = bisect_left(rows, item.end)  # of the next line
    if item.style and item.style in "|>" and not re.search(r"(^|\n)\n\Z", item.value):
        # Empty lines below a block of text are not its own, unless it keeps them.
        while row < len(rows) and re.fullmatch(rf" {{0,{max(column, 0)}}}[{_BREAKS}]*", text[rows[row - 1] : rows[row]]):
            row -= 1
    return rows[row] if row < len(rows) else len(text)


def _comments_end(text: str, end: int, column: int) -> int:
    """Where the comments below an item end, those that stand right of a column.

    A `#` further left counts too where its words are far from it: so do editors comment lines out.

    Args:
        text: The file's.
        end: Of the item's own lines.
        column: Of the dash.
    """
    rows = [row for row in _rows(text) if row >= end]
    for start, stop in itertools.pairwise((*rows, len(text))):
        line = text[start:stop]
        if not line.strip():
            continue
        comment = re.match(r" *#( *)", line)
        if not comment or max(line.index("#"), comment.end() - 2) <= column:
            break
        end = stop
    return end


def _dash(text: str, sequence: _Node, index: int) -> int:
    """Where the dash of an item of a block sequence is."""
    if index == 0:
        return sequence.entry - (text[sequence.entry] != "-")  # PyYAML marks the end of it where the list is not indented
    between = re.compile(rf"(?:\s|#[^{_BREAKS}]*)*")
    return between.match(text, sequence.children[index - 1].end).end()


def _edit(file: _File, count: int, index: int | None, source: _Source) -> str:
    """The text of the config with the section in it."""
    tree = file.tree()
    key, processes = tree.find(_PROCESSES)
    if processes is None or processes.kind != "sequence" or len(processes.children) != count:
        raise ZitMergeError(
            f"{file.path}: config.process comes from an alias, a merge key or an environment variable: write the list out"
        )
    if processes.flow:
        return _edit_flow(file.text, tree, index, source)
    dash = _dash(file.text, processes, index or 0)
    column = dash - _row_start(file.text, dash)
    replaced = processes.children[index] if index is not None else None
    if not source.file.is_json:
        _check_anchors(source, file.path, _anchors(tree) - (_anchors(replaced) if replaced else set()))
    above = _COMMENT.findall(file.text[_comments_start(file.text, dash) : dash])
    lines = _block_lines(source, column, above if replaced else [])
    if replaced:
        start, end = dash, _comments_end(file.text, _own_end(file.text, replaced, column), column)
    else:
        end = _own_end(file.text, processes.children[-1], column)
        start = end = _comments_end(file.text, end, key.column)
        lines[0] = " " * column + lines[0]
    eol = _end_of_line(file.text)
    whole = file.text[end - 1] in _BREAKS  # else the file ends without a newline, and goes on to
    new = ("" if whole or replaced else eol) + eol.join(lines) + (eol if whole else "")
    return file.text[:start] + new + file.text[end:]


def _anchors(node: _Node) -> set[str]:
    return {n.anchor for n in node.walk() if n.anchor}


def _check_anchors(source: _Source, config: Path, taken: set[str]) -> None:
    """Raises where the section's text would not stand on its own, or use a name of the config's."""
    text, node = source.file.text, source.file.tree().find(source.keys)[1]
    if node is None:
        raise ZitMergeError(f"{source.file.path}: the section comes from a merge key or a variable: write it out")
    own = _anchors(node)
    for alias in node.walk():
        if alias.kind == "alias" and alias.value not in own:
            line = bisect_right(_rows(text), alias.start)
            raise ZitMergeError(
                f"{source.file.path}: line {line}: *{alias.value} is defined outside of the section: write its value out"
            )
    for name in sorted(own & taken):
        raise ZitMergeError(f"{source.file.path}: the anchor &{name} is in {config} too: rename it in the section")


def _block_lines(source: _Source, column: int, known: Sequence[str]) -> list[str]:
    """The section as an item of a block sequence, dash first; every line but the first is indented.

    Comments above the section come below its first line: within the item, so that it is clear whose they are.

    Args:
        source: The section.
        column: Of the dash.
        known: Comments that stand above the dash already.
    """
    inside = " " * (column + 2)
    if source.file.is_json:
        first, *rest = _block_yaml(source.unfilled()).splitlines()
        return [f"- {first}", *(inside + line for line in rest)]
    node = source.file.tree().find(source.keys)[1]
    above, own, below = _cut(source, node)
    shift = column + 2 - (node.column if node.flow else node.children[0].column)
    first, *rest = _BREAK.split(own)
    body = [*(_shifted(line, shift, 0) for line in rest), *(_shifted(line, shift, column + 2) for line in below)]
    header = [inside + line for line in above] if above != known else []
    if node.flow or _BREAK.search(source.file.text, node.start, node.children[1].end):
        first, *header = [*header, inside + first]
    return [f"- {first.lstrip(' ')}", *header, *body]


def _cut(source: _Source, node: _Node) -> tuple[list[str], str, list[str]]:
    """(comments above, own text, comments below) of a section in a YAML file."""
    text = source.file.text
    parent = source.file.tree().find(source.keys[:-1])[1] if source.keys else None
    if parent and parent.flow:
        return [], text[node.start : node.end], []
    column, above = -1, text[: node.start]  # the file is only this section: all its comments are
    if parent:
        dash = _dash(text, parent, source.keys[-1])
        if len(source.keys) > 1:
            column = dash - _row_start(text, dash)
            above = text[_comments_start(text, dash) : node.start]
    end = _own_end(text, node, column)
    below = _BREAK.split(text[end : _comments_end(text, end, column)])
    return _COMMENT.findall(above), text[node.start : end].rstrip("".join(_BREAKS)), below[:-1] if below[-1] == "" else below


def _comments_start(text: str, dash: int) -> int:
    """Where the comments begin that stand directly above a dash, in its column."""
    start = _row_start(text, dash)
    prefix = text[start:dash] + "#"
    while start and text.startswith(prefix, above := _row_start(text, start - 1)):
        start = above
    return start


def _shifted(line: str, by: int, least: int) -> str:
    """A line, its indentation changed by so many columns, to no fewer than `least`."""
    spaces = len(line) - len(line.lstrip(" "))
    return " " * max(spaces + by, least) + line[spaces:] if line else line


class _Dumper(yaml.SafeDumper):
    """Quotes the words that AI-Toolkit would take for numbers."""

    yaml_implicit_resolvers = Loader.yaml_implicit_resolvers


def _block_yaml(data: Any) -> str:
    return yaml.dump(data, Dumper=_Dumper, default_flow_style=None, sort_keys=False, allow_unicode=True, width=120)


def _edit_flow(text: str, tree: _Node, index: int | None, source: _Source) -> str:
    """The edit where the list stands in brackets: the section becomes JSON, in the layout of the other processes."""
    processes = tree.find(_PROCESSES)[1]
    items = processes.children
    last = items[-1 if index is None else index] if items else None
    bracket = text.index("[", processes.start)
    base = _indent(text, last.end - 1 if last else bracket)
    unit = found[1] if (found := re.search(r"^([ \t]+)\S", text, re.MULTILINE)) else "  "
    many = bool(_BREAK.search(text, last.start, last.end) if last else _BREAK.search(text))
    tight = not re.search(r"\s", text[tree.children[0].end : tree.children[1].start])  # "job":"extension"
    eol = _end_of_line(text)
    try:
        new = _flow_json(source.unfilled(), unit if many else None, tight)
    except (TypeError, ValueError) as e:
        raise ZitMergeError(
            f"{source.file.path}: has a value that JSON does not know ({e}): write it as text or as a number"
        ) from None
    new = new.replace("\n", eol + base + ("" if last else unit))
    if last is None:
        new = f"{eol}{base}{unit}{new}{eol}{base}" if many else new
        return text[: bracket + 1] + new + text[bracket + 1 :]
    if index is not None:
        return text[: last.start] + new + text[last.end :]
    tail = list(re.finditer(rf"#[^{_BREAKS}]*|,", text[last.end : processes.end - 1]))
    at = last.end + (tail[-1].end() if tail else 0)
    comma = "" if any(m[0] == "," for m in tail) else ","
    before = (items[-2].end if len(items) > 1 else bracket, last.start)
    rows = bool(_BREAK.search(text, *before)) or any(m[0] != "," for m in tail)
    gap = eol + _indent(text, last.start) if rows else "" if tight else " "
    return text[: last.end] + comma + text[last.end : at] + gap + new + text[at:]


def _flow_json(data: Any, unit: str | None, tight: bool) -> str:
    """JSON that is YAML too: what YAML would fold or refuse is escaped."""
    colon = ":" if tight else ": "
    text = json.dumps(data, ensure_ascii=False, indent=unit, separators=("," if unit or tight else ", ", colon))
    return re.sub(r"[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]", lambda m: f"\\u{ord(m[0]):04x}", text)


def _check_section(source: _Source, job: str, position: int) -> None:
    """Raises unless the section is valid and means in the job what it means in its file."""
    path = source.file.path
    if source.recipe and (found := re.search(r"\$\{[^}]+\}|\[name\]", repr(source.data))):
        raise ZitMergeError(f"{path}: the recipe names a file with {found[0]} in it, which AI-Toolkit would fill in: rename it")
    try:
        parse_section(fill_name(source.data, job), first=position == 0)
    except ZitMergeError as e:
        raise ZitMergeError(f"{path}: {e}") from None


def _check_edit(file: _File, text: str, index: int | None, source: _Source) -> None:
    """Raises unless the new text holds the old values and the section, and nothing else."""
    wanted = parse(fill_environment(file.text, file.path), file.path)
    processes = wanted["config"]["process"]
    processes[len(processes) if index is None else index : None if index is None else index + 1] = [source.data]
    try:
        found = parse(fill_environment(text, file.path), file.path)
    except ZitMergeError as e:
        raise ZitMergeError(f"{e} (with the section of {source.file.path} in it)") from None
    if _shape(found) != _shape(wanted):
        end = "" if file.text.endswith(tuple(_BREAKS)) else ", or end the file with a newline"
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


def _write(file: _File, text: str) -> Path:
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
