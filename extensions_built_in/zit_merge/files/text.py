"""Text files as AI-Toolkit reads them, and YAML for them: 1e-3 is a number. A duplicate key is an error."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import ZitMergeError
from .inputs import read_limited


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
            content = read_limited(path)
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


def _is_json(path: Path) -> bool:
    return path.suffix in (".json", ".jsonc")


def parse(text: str, path: Path) -> Any:
    """What a text holds.

    Args:
        text: YAML or JSON.
        path: Its file, whose ending decides which; for messages too.

    Raises:
        ZitMergeError: It is neither, or has a duplicate key.
    """
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
            raise ValueError(f"duplicate key {key}: keep one of them")
    return dict(pairs)


def _refuse_twins(loader: yaml.SafeLoader, node: yaml.Node | None, seen: set[int]) -> None:
    """A duplicate key in a mapping is an error; YAML would drop the first one silently."""
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
                raise yaml.MarkedYAMLError(problem=f"duplicate key {name}: keep one of them", problem_mark=key.start_mark)
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


def to_yaml(data: Any, *, unicode: bool = False) -> str:
    """Data as YAML that is read back as the same; lists of numbers stay on one line.

    Args:
        data: A section, a recipe, or a part of one.
        unicode: Letters beyond ASCII stay readable. Consoles disagree about them: not for text that is printed.
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
