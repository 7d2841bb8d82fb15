"""Puts a section into the list of processes of an AI-Toolkit config.

In block YAML the other lines stay as they are. JSON, which has no comments, is written anew with its own indentation. A config of
any other layout is not edited: `CannotEdit` carries the text to paste.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from textwrap import indent
from typing import Any, NamedTuple

import yaml

from ..errors import ZitMergeError
from ..files.text import TextFile, parse, to_yaml
from .job import fill_environment


class CannotEdit(ZitMergeError):
    """A config that is not edited. `paste` is the section as text, below a line that says where it belongs."""

    def __init__(self, message: str, paste: str):
        super().__init__(message)
        self.paste = paste


def put(file: TextFile, section: Mapping[str, Any], index: int | None, own_text: str = "") -> str:
    """The text of a config with a section in it; its old text if it holds the section already.

    Args:
        file: The config.
        section: What goes in, ${ENV} filled in.
        index: The process to replace; None to append.
        own_text: Of a file that is nothing but the section. In YAML its comments and ${ENV} are kept.

    Raises:
        CannotEdit: The layout is not edited, or another value would change.
    """
    texts = _json_texts(file.text, section, index) if file.is_json else _yaml_texts(file.text, section, index, own_text)
    wanted = parse(fill_environment(file.text, file.path), file.path)
    _insert(section, wanted, index)
    for text in (file.text, *texts):
        if _holds(file, text, wanted):
            return text
    raise _by_hand(file, section, index)


def _json_texts(old: str, section: Mapping[str, Any], index: int | None) -> Iterator[str]:
    """The document with the section in it; nothing if it is JSON only when its variables are filled in."""
    try:
        document = json.loads(old)
        _insert(_plain(section), document, index)
    except (ValueError, LookupError, TypeError):
        return
    spaces = re.search(r"\n([ \t]+)", old)
    new = json.dumps(document, indent=spaces and spaces[1], ensure_ascii=old.isascii(), default=str)
    yield new.replace("\n", "\r\n" if "\r\n" in old else "\n") + old[len(old.rstrip()) :]


def _yaml_texts(old: str, section: Mapping[str, Any], index: int | None, own_text: str) -> Iterator[str]:
    """The text with the section as it was written, then with the section dumped."""
    if not (place := _find(old, index)):
        return
    lines, eol = old.splitlines(keepends=True), "\r\n" if "\r\n" in old else "\n"
    above, below = "".join(lines[: place.start]), "".join(lines[place.stop :])
    items = [to_yaml([section], unicode=True)]
    own_text = re.sub(r"\A([ \t]*(#.*)?\r?\n)*", "", own_text)  # without the comments above the section
    if own_text.lstrip()[:1] not in ("", "{"):
        items.insert(0, "-" + indent(own_text, "  ")[1:])
    for item in items:
        rows = indent(item, " " * place.column).rstrip().splitlines()
        new = above + ("" if above.endswith(("\n", "\r")) else eol) + eol.join(rows) + eol + below
        yield new if old.endswith(("\n", "\r")) else new.removesuffix(eol)


class _Place(NamedTuple):
    """Where an item of a block list goes: it replaces the lines from `start` to before `stop`; its dash is in `column`."""

    start: int
    stop: int
    column: int


def _find(text: str, index: int | None) -> _Place | None:
    """The place of an item; None unless the list is a block sequence whose items begin with dashes in one column."""
    node = _processes(text)
    if not isinstance(node, yaml.SequenceNode) or node.flow_style:
        return None
    lines, column, mark = text.splitlines(), node.start_mark.column, node.end_mark
    end = mark.line if mark.index < len(text) else len(lines)
    dashes = [n for n in range(node.start_mark.line, end) if re.match(rf" {{{column}}}-(?!\S)", lines[n])]
    if len(dashes) != len(node.value):
        return None
    start, stop = [*dashes, end][-2:] if index is None else [*dashes, end][index : index + 2]
    while re.match(rf" {{0,{column}}}#|\s*$", lines[stop - 1]):  # blank lines and comments of what follows
        stop -= 1
    return _Place(stop if index is None else start, stop, column)


def _processes(text: str) -> yaml.Node | None:
    """config.process as it is written there; None if it comes from an alias, a merge key or a variable."""
    try:  # ${X} is no YAML within brackets; digits are, anywhere
        node = yaml.compose(re.sub(r"\$\{[^}]+\}", lambda match: "1" * len(match[0]), text), Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return None
    for name in ("config", "process"):
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        # An alias has the marks of its anchor, which lies above the key.
        node = next((v for k, v in pairs if k.value == name and v.start_mark.index > k.start_mark.index), None)
    return node


def _insert(section: Mapping[str, Any], document: Any, index: int | None) -> None:
    processes = document["config"]["process"]
    at = len(processes) if index is None else index
    processes[at : at + 1] = [section]


def _holds(file: TextFile, text: str, wanted: Any) -> bool:
    """Whether a file can store a text that has these values in this order, and no others."""
    try:
        file.encode(text)
        return repr(_plain(parse(fill_environment(text, file.path), file.path))) == repr(_plain(wanted))
    except (ZitMergeError, UnicodeEncodeError):
        return False


def _plain(value: Any) -> Any:
    """Keys as text: JSON has no others."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def _by_hand(file: TextFile, section: Mapping[str, Any], index: int | None) -> CannotEdit:
    """Why the config is not edited, and the section as it must be pasted."""
    place, where = None if file.is_json else _find(file.text, index), ""
    text = indent(to_yaml([section]), " " * (place.column if place else 4))
    if place:
        why = "another value would change with it (an environment variable, an anchor, a block of text)"
        where = f" (after line {place.start})"
    elif file.is_json or getattr(_processes(file.text), "flow_style", False):
        why = "it or the section has a value that is not JSON" if file.is_json else "config.process is in brackets"
        text = json.dumps(_plain(section), indent=2, default=str) + "\n"
    else:
        why = "config.process has an anchor or a tag, or comes from an alias, a merge key or an environment variable"
    what = "append it to config.process" if index is None else f"put it in the place of config.process[{index}]"
    return CannotEdit(
        f"{file.path}: can't be edited automatically, since {why}: paste the printed section by hand",
        f"# {what}{where} of {file.path}:\n{text}",
    )
