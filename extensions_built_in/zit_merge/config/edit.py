"""Puts a section into the text of an AI-Toolkit config: what else stands there stays, byte for byte.

Where the list of processes lies comes from the marks of PyYAML's events (from a small scan for JSON).
"""

from __future__ import annotations

import itertools
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import ZitMergeError
from ..files.text import TextFile, _Dumper, parse

_ENVIRONMENT = re.compile(r"\$\{[^}]+\}")
BREAKS = "\n\r\x85\u2028\u2029"  # YAML 1.1
_BREAK = re.compile(f"\r\n|[{BREAKS}]")
_COMMENT = re.compile(rf"(?:(?<=\s)|^)#[^{BREAKS}]*")
PROCESSES = ("config", "process")

Keys = tuple["str | int", ...]


@dataclass(frozen=True)
class Source:
    """The file of the section.

    Attributes:
        file: The file.
        keys: The way to the section in it.
        recipe: Its text is meant as it stands: no ${ENV}, no [name].
        data: The section, ${ENV} filled in.
    """

    file: TextFile
    keys: Keys
    recipe: bool
    data: Mapping[str, Any]

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
            return show(get(parse(_ENVIRONMENT.sub(hide, self.file.text), self.file.path), self.keys))
        except ZitMergeError:
            raise ZitMergeError(
                f"{self.file.path}: an environment variable stands there without quotes: write its value out"
            ) from None


def get(document: Any, keys: Keys) -> Any:
    """What lies there in a parsed document."""
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


def _tree(file: TextFile) -> _Node:
    """Where its values lie."""
    try:
        return _json_tree(file.text) if file.is_json else _yaml_tree(file.text)
    except (yaml.YAMLError, ValueError, StopIteration):  # it was parsed before, with ${X} filled in
        raise ZitMergeError(f"{file.path}: an environment variable holds more than a value: write it out") from None


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
        while row < len(rows) and re.fullmatch(rf" {{0,{max(column, 0)}}}[{BREAKS}]*", text[rows[row - 1] : rows[row]]):
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
    between = re.compile(rf"(?:\s|#[^{BREAKS}]*)*")
    return between.match(text, sequence.children[index - 1].end).end()


def put(file: TextFile, count: int, index: int | None, source: Source) -> str:
    """The text of the config with the section in it."""
    tree = _tree(file)
    key, processes = tree.find(PROCESSES)
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
    whole = file.text[end - 1] in BREAKS  # else the file ends without a newline, and goes on to
    new = ("" if whole or replaced else eol) + eol.join(lines) + (eol if whole else "")
    return file.text[:start] + new + file.text[end:]


def _anchors(node: _Node) -> set[str]:
    return {n.anchor for n in node.walk() if n.anchor}


def _check_anchors(source: Source, config: Path, taken: set[str]) -> None:
    """Raises where the section's text would not stand on its own, or use a name of the config's."""
    text, node = source.file.text, _tree(source.file).find(source.keys)[1]
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


def _block_lines(source: Source, column: int, known: Sequence[str]) -> list[str]:
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
    node = _tree(source.file).find(source.keys)[1]
    above, own, below = _cut(source, node)
    shift = column + 2 - (node.column if node.flow else node.children[0].column)
    first, *rest = _BREAK.split(own)
    body = [*(_shifted(line, shift, 0) for line in rest), *(_shifted(line, shift, column + 2) for line in below)]
    header = [inside + line for line in above] if above != known else []
    if node.flow or _BREAK.search(source.file.text, node.start, node.children[1].end):
        first, *header = [*header, inside + first]
    return [f"- {first.lstrip(' ')}", *header, *body]


def _cut(source: Source, node: _Node) -> tuple[list[str], str, list[str]]:
    """(comments above, own text, comments below) of a section in a YAML file."""
    text = source.file.text
    parent = _tree(source.file).find(source.keys[:-1])[1] if source.keys else None
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
    return _COMMENT.findall(above), text[node.start : end].rstrip("".join(BREAKS)), below[:-1] if below[-1] == "" else below


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


def _block_yaml(data: Any) -> str:
    return yaml.dump(data, Dumper=_Dumper, default_flow_style=None, sort_keys=False, allow_unicode=True, width=120)


def _edit_flow(text: str, tree: _Node, index: int | None, source: Source) -> str:
    """The edit where the list stands in brackets: the section becomes JSON, in the layout of the other processes."""
    processes = tree.find(PROCESSES)[1]
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
    tail = list(re.finditer(rf"#[^{BREAKS}]*|,", text[last.end : processes.end - 1]))
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
