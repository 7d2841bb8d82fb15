"""Text files as AI-Toolkit reads them, and YAML for them: 1e-3 is a number. A duplicate key is an error."""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from ..errors import SettingError, ZitMergeError, located
from .extent import TOO_DEEP, ExtentError, check_extent
from .inputs import read_limited

# Blanks that YAML and JSON take for letters, or that nobody sees.
_ODD = "\t\xa0\xad\u1680\u2000-\u200f\u202f\u205f\u2060\u3000\ufeff"
_ODD_START = re.compile(rf" *(?:- +)*(?:[\w.-]+:|-)?([{_ODD}])")  # of a line, or behind its first key or dash
_ODD_VALUE = re.compile(rf"[{_ODD}]+(?:-|[\w.-]+:)|(?:[\w.-]+:|-)([{_ODD}])")  # what was meant as a list or a mapping


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
            ZitMergeError: It can't be read, is no text, or is stored in another way.
        """
        content, marks = b"", {b"\xef\xbb\xbf": "utf-8", b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}
        try:
            content = read_limited(path)
            start = next(filter(content.startswith, marks), b"")
            codec = marks.get(start, "utf-8")
            return cls(path, start, codec, content[len(start) :].decode(codec))
        except UnicodeDecodeError as e:
            if re.search(rb"[\0-\x08\x0e-\x1a]", content):
                raise ZitMergeError(f"{path}: is not a text file: give a YAML or JSON config") from e
            line = content.count(b"\n", 0, len(start) + e.start) + 1
            raise ZitMergeError(f"{path}: is not UTF-8 (line {line}): save it as UTF-8") from e
        except OSError as e:
            raise ZitMergeError(f"{path}: can't be read ({e.strerror}): give the path of a YAML or JSON config") from e

    def encode(self, text: str) -> bytes:
        """A text as this file stores it."""
        return self.start + text.encode(self.codec)

    @property
    def is_json(self) -> bool:
        """As the toolkit decides it."""
        return _is_json(self.path)


def _is_json(path: Path) -> bool:
    return path.suffix in (".json", ".jsonc")


def parse(text: str, path: Path) -> Any:
    """What a text holds.

    Args:
        text: YAML or JSON.
        path: Its file, whose ending decides which; for messages too.

    Raises:
        ZitMergeError: It is neither, has a duplicate key, or would be too large with its aliases written out.
    """
    with located(str(path)):
        try:
            return _parse_json(text) if _is_json(path) else _parse_yaml(text)
        except (ExtentError, RecursionError) as e:
            raise SettingError(str(e) if isinstance(e, ExtentError) else TOO_DEEP) from None


def _parse_json(text: str) -> Any:
    try:
        found = json.loads(text, object_pairs_hook=_no_twins)
    except json.JSONDecodeError as e:
        at, hint = text[e.pos : e.pos + 1], ""
        if at and re.match(rf"[{_ODD}]", at):
            hint = f": there is a {_name(at)}, replace it with a blank"
        elif e.msg.startswith("Invalid \\escape"):
            hint = ": a backslash needs another one, or use forward slashes"
        raise SettingError(f"is not valid JSON: {e}{hint}") from e
    except ValueError as e:
        raise SettingError(f"is not valid JSON: {e}") from e
    check_extent(found)
    return found


def _parse_yaml(text: str) -> Any:
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        check_extent(node)  # before merge keys are filled in, which multiply too
        _check_keys(loader, node, set())
        return loader.construct_document(node) if node else None
    except ExtentError:
        raise
    except yaml.reader.ReaderError as e:
        line = text.count("\n", 0, e.position) + 1
        raise SettingError(f"line {line}: the character U+{ord(text[e.position]):04X} can't stand in YAML: remove it") from e
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        raise SettingError(f"line {mark.line + 1 if mark else '?'}: {_trouble(e, text)}") from e
    except (yaml.YAMLError, ValueError, KeyError, AttributeError) as e:  # the last two: tags that YAML itself can't build
        raise SettingError(f"is not valid YAML: {' '.join(str(e).split())}") from e


def _trouble(error: yaml.MarkedYAMLError, text: str) -> str:
    """What YAML complains of, or what most likely led to it."""
    problem, lines, mark = str(error.problem or error.context), text.splitlines(), error.problem_mark
    if error.context == "while scanning a double-quoted scalar" and "escape" in problem:
        return f"in double quotes a backslash needs another one ({problem}): use single quotes, or forward slashes"
    is_form = isinstance(error, yaml.scanner.ScannerError | yaml.parser.ParserError)
    for n in range(mark.line, max(mark.line - 3, -1), -1) if mark and is_form else ():
        if n < len(lines) and (found := _ODD_START.match(lines[n])):
            return f"there is a {_name(found[1])} in line {n + 1}, which is no blank to YAML: replace it with one"
    return problem


def _name(letter: str) -> str:
    """`no-break space (U+00A0)`."""
    return f"{unicodedata.name(letter, 'tab').lower()} (U+{ord(letter):04X})"


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"duplicate key {key}: keep one of them")
        if odd := re.search(rf"^[{_ODD}]|[{_ODD}]$", key):
            raise ValueError(f"the key {key!r} has a {_name(odd[0])} at its end: remove it")
        found[key] = value
    return found


def _check_keys(loader: yaml.SafeLoader, node: yaml.Node | None, seen: set[int]) -> None:
    """A duplicate key in a mapping is an error; YAML would drop the first one silently. So is a blank that is none to YAML."""
    if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
        if isinstance(node, yaml.ScalarNode) and node.style is None:
            _check_blanks(node, _ODD_VALUE.match(node.value))
        return
    seen.add(id(node))
    keys: set[Any] = set()
    for child in node.value:
        if not isinstance(node, yaml.MappingNode):
            _check_keys(loader, child, seen)
            continue
        key, value = child
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            _check_blanks(key, re.search(rf"[{_ODD}]", key.value) if key.style is None else None)
            name = loader.construct_object(key)
            if name in keys:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {name}: keep one of them", problem_mark=key.start_mark)
            keys.add(name)
        _check_keys(loader, value, seen)


def _check_blanks(node: yaml.ScalarNode, found: re.Match[str] | None) -> None:
    if found:
        odd = next(letter for letter in found[0] if re.match(rf"[{_ODD}]", letter))
        raise yaml.MarkedYAMLError(
            problem=f"there is a {_name(odd)} in {node.value[:40]!r}, which is no blank to YAML: replace it with one",
            problem_mark=node.start_mark,
        )


def reading(value: object) -> str:
    """What YAML made of a word where text is needed, and what to do; empty where it was no such word.

    Args:
        value: As parsed.
    """
    if isinstance(value, bool):
        what = str(value).lower()
    elif isinstance(value, int | float):
        what = f"the number {value}"
    elif isinstance(value, date):
        what = "a date"
    else:
        return ""
    return f": YAML reads this as {what}, put it in quotes"


class Loader(yaml.SafeLoader):
    """YAML with AI-Toolkit's idea of a number."""

    def construct_yaml_timestamp(self, node: yaml.ScalarNode) -> Any:
        """A date."""
        try:
            return super().construct_yaml_timestamp(node)
        except ValueError as e:
            trouble = f"{node.value} is a date to YAML, but there is none like it: put it in quotes if it is no date"
            raise yaml.MarkedYAMLError(problem=trouble, problem_mark=node.start_mark) from e


Loader.add_constructor("tag:yaml.org,2002:timestamp", Loader.construct_yaml_timestamp)

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


def to_yaml(data: Any, *, unicode: bool = False) -> str:
    """Data as YAML that is read back as the same; lists of numbers stay on one line.

    Args:
        data: A section, a recipe, or a part of one.
        unicode: Letters beyond ASCII stay readable.
    """
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=unicode)


class _Dumper(yaml.SafeDumper):
    """Lists of numbers in flow style, no aliases; words that the toolkit reads as numbers, such as 1e3, in quotes."""

    yaml_implicit_resolvers = Loader.yaml_implicit_resolvers

    def ignore_aliases(self, data: object) -> bool:
        """Equal tables are written out."""
        return True


def _list(dumper: _Dumper, data: list[Any]) -> yaml.Node:
    flow = all(isinstance(v, int | float) for v in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)


_Dumper.add_representer(list, _list)
