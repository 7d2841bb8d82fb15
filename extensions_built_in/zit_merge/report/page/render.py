"""From facts to one HTML file that needs nothing else: no network, no storage, no origin.

AI-Toolkit's UI shows it in an iframe with `sandbox="allow-scripts"`. Everything that comes from files, prompts and metadata is in
one block of JSON, which the page's own script puts into text nodes; a content security policy that knows the script and the style
by their hashes is the second wall.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from ... import __version__
from ...formats.writer import os_errors, write_whole
from .facts import NAME, anatomy, text

LIMIT = 5_000_000  # bytes of a page
_SPARE = 10_000  # bytes for what says that something was left out
_INPUTS, _STEPS = 50, 100  # listed whatever else is left out
_SCRIPTS = ("base", "weights", "yaml", "maps", "glance", "overlap", "previews", "desk", "composer", "main")
_GENERATOR = "zit_merge"
# What the UI writes anew into the first process, and what makes a recipe of a section: not for the next merge.
_DROPPED = ("sqlite_db_path", "performance_log_every", "made_by", "job")
_OF_RECIPES = ("strengths", "unmatched")


@dataclass(frozen=True)
class Preview:
    """A picture on the page.

    Attributes:
        row: What the pictures of a row have in common: a prompt and its seed.
        column: What it shows: `base`, an input, `result`.
        picture: A PNG, JPEG or WebP file's bytes.
    """

    row: str
    column: str
    picture: bytes

    def facts(self) -> dict[str, str]:
        """For JSON, the picture as a data URI."""
        kinds = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp"}
        kind = next(kind for start, kind in kinds.items() if self.picture.startswith(start))
        data = base64.b64encode(self.picture).decode()
        return {"row": text(self.row), "column": text(self.column), "uri": f"data:image/{kind};base64,{data}"}


@dataclass
class Page:
    """The page of a job: its sections, and the steps of each as they are done.

    Attributes:
        title: The job's name.
    """

    title: str
    _sections: list[dict[str, Any]] = field(default_factory=list)

    def begin(self, place: str, raw: Mapping[str, Any], *, first: bool = False) -> None:
        """A section starts.

        Args:
            place: `process[1]`; empty for a recipe.
            raw: The section as the config has it, which the composer's YAML repeats.
            first: It is the job's first process, where the UI writes `device: cuda` and means `auto`.
        """
        self._sections.append({"place": place, "raw": _repeatable(raw, first), "steps": []})

    def add(self, facts: Mapping[str, Any], previews: Sequence[Preview] = ()) -> None:
        """A step of the section, from `step_facts` or `files_facts`, with its pictures."""
        self._sections[-1]["steps"].append({**facts, "previews": [p.facts() for p in previews]})

    def html(self) -> str:
        """The whole file, under 5 MB; beyond that the largest maps and pictures are left out first, and the page says so."""
        sections = [{**s, "steps": [{**step, "left_out": []} for step in s["steps"]]} for s in self._sections]
        whole = _html(self.title, sections)
        for shrink in (_largest_first, _fewer_inputs, _no_weights, _no_section, _fewer_steps):
            if (excess := len(whole.encode()) - LIMIT) > 0:
                shrink(sections, excess + _SPARE)
                whole = _html(self.title, sections)
        return whole

    def write(self, path: Path) -> None:
        """Writes the file; an older page is replaced at once or not at all.

        Raises:
            ZitMergeError: It can't be written.
        """
        with os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, [self.html().encode()])


def is_ours(path: Path) -> bool:
    """Whether a file is a page that zit_merge wrote, so that it may be replaced."""
    try:
        with path.open("rb") as file:
            return f'name="generator" content="{_GENERATOR}'.encode() in file.read(1000)
    except OSError:
        return False


def _steps(sections: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [step for section in sections for step in section["steps"]]


def _largest_first(sections: Sequence[dict[str, Any]], excess: int) -> None:
    """Leaves out maps and pictures, the largest first, until `excess` bytes are saved."""
    steps = _steps(sections)
    sizes = ((len(_json(step[key]).encode()), n, key) for n, step in enumerate(steps) for key in ("details", "previews"))
    for size, n, key in sorted(sizes, reverse=True):
        if excess > 0 and size > 10:
            steps[n] |= {key: None if key == "details" else [], "left_out": [*steps[n]["left_out"], key]}
            excess -= size


def _fewer_inputs(sections: Sequence[dict[str, Any]], excess: int) -> None:
    """The first inputs of each step only."""
    for step in _steps(sections):
        if len(step["inputs"]) > _INPUTS:
            step |= {"inputs": step["inputs"][:_INPUTS], "composable": False, "left_out": [*step["left_out"], "inputs"]}


def _no_weights(sections: Sequence[dict[str, Any]], excess: int) -> None:
    """Inputs as a list of names and numbers, and few words beside them."""
    for step in _steps(sections):
        step |= {"details": None, "composable": False, "notes": step["notes"][:3], "triggers": []}
        step["inputs"] = [{**i, "label": i["label"][:80], "weights": None, "triggers": []} for i in step["inputs"]]
        step["left_out"] = [*dict.fromkeys([*step["left_out"], "details"])]


def _no_section(sections: Sequence[dict[str, Any]], excess: int) -> None:
    """Nothing to compose with."""
    for section in sections:
        section["raw"] = None


def _fewer_steps(sections: Sequence[dict[str, Any]], excess: int) -> None:
    """The first steps of each section, with their first inputs."""
    for section in sections[:_STEPS]:
        section["steps"] = [{**step, "inputs": step["inputs"][:5]} for step in section["steps"][:_STEPS]]
    del sections[_STEPS:]


def _repeatable(raw: Mapping[str, Any], first: bool) -> dict[str, Any]:
    """A section without what only belongs to the run before."""
    kept = {key: _plain(value) for key, value in raw.items() if key not in _DROPPED}
    if first and kept.get("device") == "cuda":
        del kept["device"]
    if "made_by" in raw:
        kept["steps"] = [
            {key: value for key, value in step.items() if key != "file"}
            | {"loras": [{k: v for k, v in lora.items() if k not in _OF_RECIPES} for lora in step["loras"]]}
            for step in kept["steps"]
        ]
    return kept


def _plain(value: Any) -> Any:
    """As JSON and JavaScript can hold it: AI-Toolkit's own keys may have dates, infinities and large numbers for values."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, bool | str | None):
        return value
    is_number = isinstance(value, int | float) and abs(value) < 2**53
    return value if is_number else str(value)


def _html(title: str, sections: Sequence[Mapping[str, Any]]) -> str:
    facts = {"title": text(title, NAME), "version": __version__, "sections": sections, **anatomy()}
    script = '"use strict";\n(() => {\n' + "\n".join(_asset(f"{name}.js") for name in _SCRIPTS) + "})();"
    style = _asset("page.css")
    policy = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; "
    policy += "base-uri 'none'; form-action 'none'"
    fields = {
        "POLICY": escape(policy),
        "GENERATOR": f"{_GENERATOR} {__version__}",
        "TITLE": escape(text(title, NAME)),
        "STYLE": style,
        "FACTS": _json(facts),
        "SCRIPT": script,
    }
    return re.sub(r"@([A-Z]+)@", lambda match: fields[match[1]], _asset("page.html"))


def _hash(inline: str) -> str:
    """How a content security policy names an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'"


def _json(facts: object) -> str:
    """JSON that no HTML parser takes for anything else, whatever the texts in it, and that UTF-8 can hold."""
    dumped = json.dumps(facts, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", dumped)


@cache
def _asset(name: str) -> str:
    return (Path(__file__).parent / "assets" / name).read_text(encoding="utf-8")
