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
from ...files.atomic import os_errors, write_whole
from ...files.inputs import open_regular
from ...files.paths import without_users
from .galleries import PICTURES, Gallery, fit
from .values import NAME, anatomy, text
from .whole_job import whole_job

LIMIT = 5_000_000  # bytes of a page
_SPARE = 10_000  # bytes for what says that something was left out
_INPUTS, _STEPS = 50, 100  # listed whatever else is left out
_SCRIPTS = [
    "base",
    "weights",
    "yaml",
    "maps",
    "summary",
    "overlap",
    "viewer",
    "measures",
    "previews",
    "studio",
    "looks",
    "live",
    "composer_state",
    "composer",
    "main",
]
_GENERATOR = "zit_merge"
# What the UI writes anew into the first process, and what makes a recipe of a section: not for the next merge.
_DROPPED = ("sqlite_db_path", "performance_log_every", "made_by", "job")
_OF_RECIPES = ("strengths", "unmatched")
# A step that was rendered but not merged in this run, and what is left of maps and pictures that are left out.
_ONLY_PICTURES: dict[str, Any] = {"file": None, "notes": [], "triggers": [], "composable": False, "inputs": [], "details": None}
_NO_MAPS: dict[str, Any] = {"details": None, "left_out": ["details"]}
_NO_PICTURES: dict[str, Any] = {"rows": [], "columns": [], "previews": [], "pictures": [], "texts": [], "left_out": True}


@dataclass
class Page:
    """The page of a job: its sections, and the steps of each as they are done.

    Attributes:
        title: The job's name.
        full_paths: The section's paths stand there with the names of users.
        studio: What the page has to know of the studio that answers it; None for a page that asks nobody.
    """

    title: str
    full_paths: bool = False
    studio: Mapping[str, Any] | None = None
    _sections: list[dict[str, Any]] = field(default_factory=list)

    def begin(self, place: str, raw: Mapping[str, Any], *, first: bool = False, alone: Mapping[str, Any] | None = None) -> None:
        """A section starts.

        Args:
            place: `process[1]`; empty for a recipe.
            raw: The section as the config has it, which the composer's YAML repeats.
            first: It is the job's first process, where the UI writes `device: cuda` and means `auto`.
            alone: A job for the section alone, from `whole_job`.
        """
        job = _plain(self._public(alone or whole_job()))
        self._sections.append({"place": place, "raw": _repeatable(self._public(raw), first), "alone": job, "steps": []})

    def add(self, facts: Mapping[str, Any]) -> None:
        """A step of the section, from `step_facts` or `files_facts`."""
        inputs = [{**i, "path": self._public(i.get("path"))} for i in facts["inputs"]]
        self._sections[-1]["steps"].append({**facts, "path": self._public(facts.get("path")), "inputs": inputs, "galleries": []})

    def _public(self, value: Any) -> Any:
        return value if self.full_paths else without_users(value)

    def show(self, place: str, step: str, gallery: Gallery) -> None:
        """Pictures of a step; one that was not added has only its pictures.

        Args:
            place: That of a section that has begun.
            step: The step's name.
            gallery: What is shown below the galleries that are there.

        Raises:
            ZitMergeError: A picture can't be read.
        """
        shown, name = gallery.facts(), text(step, NAME)
        steps = next(section["steps"] for section in reversed(self._sections) if section["place"] == place)
        if not any(s["name"] == name for s in steps):
            steps.append({**_ONLY_PICTURES, "name": name, "galleries": []})
        next(s for s in steps if s["name"] == name)["galleries"].append(shown)

    def html(self) -> str:
        """The whole file, under 5 MB: pictures shrink first; then the largest maps and pictures are left out, which it says."""
        sections = _drawable(self._sections)
        whole = self._html(sections)
        if galleries := _galleries(sections):
            pictures = [told["pictures"] for told in _galleries(self._sections)]
            fit(pictures, galleries, min(PICTURES, LIMIT - _SPARE - len(whole.encode())))
            whole = self._html(sections)
        for shrink in (_largest_first, _fewer_inputs, _no_weights, _no_section, _fewer_steps):
            if (excess := len(whole.encode()) - LIMIT) > 0:
                shrink(sections, excess + _SPARE)
                whole = self._html(sections)
        return whole

    def _html(self, sections: Sequence[Mapping[str, Any]]) -> str:
        return _html(self.title, sections, self.studio)

    def has(self, step: str) -> bool:
        """Whether a step of the last section can be composed here.

        Args:
            step: Its name.
        """
        shown = self._sections[-1]["steps"]
        return any(one["name"] == text(step, NAME) and one["composable"] and one.get("details") for one in shown)

    def replace_raw(self, raw: Mapping[str, Any]) -> None:
        """The last section has other steps now.

        Args:
            raw: The section as a config would have it.
        """
        self._sections[-1]["raw"] = _repeatable(self._public(raw), first=False)

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
        with open_regular(path) as file:
            return f'name="generator" content="{_GENERATOR}'.encode() in file.read(1000)
    except OSError:
        return False


def _steps(sections: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [step for section in sections for step in section["steps"]]


def _galleries(sections: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [gallery for step in _steps(sections) for gallery in step["galleries"]]


def _drawable(sections: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Sections for JSON, to be changed at will, without their pictures."""

    def step(told: Mapping[str, Any]) -> dict[str, Any]:
        return {**told, "galleries": [{**gallery, "pictures": []} for gallery in told["galleries"]], "left_out": []}

    return [{**section, "steps": [step(s) for s in section["steps"]]} for section in sections]


def _largest_first(sections: Sequence[dict[str, Any]], excess: int) -> None:
    """Leaves out maps and pictures, the largest first, until `excess` bytes are saved."""
    steps = _steps(sections)
    parts = [(step["details"], step, _NO_MAPS) for step in steps if step["details"]]
    parts += [([g["pictures"], g["texts"]], g, _NO_PICTURES) for g in _galleries(sections) if g["previews"]]
    sizes = [len(_json(content).encode()) for content, _, _ in parts]
    for size, (_, owner, without) in sorted(zip(sizes, parts, strict=True), key=lambda entry: -entry[0]):
        if excess > 0:
            owner |= without
            excess -= size


def _fewer_inputs(sections: Sequence[dict[str, Any]], excess: int) -> None:
    """The first inputs of each step only."""
    for step in _steps(sections):
        if len(step["inputs"]) > _INPUTS:
            step |= {"inputs": step["inputs"][:_INPUTS], "composable": False, "left_out": [*step["left_out"], "inputs"]}


def _no_weights(sections: Sequence[dict[str, Any]], excess: int) -> None:
    """Inputs as a list of names and numbers, and few words beside them."""
    for step in _steps(sections):
        gone = ["details", *(["galleries"] if step["galleries"] else [])]
        step |= {"details": None, "composable": False, "notes": step["notes"][:3], "triggers": [], "galleries": []}
        step["inputs"] = [{**i, "label": i["label"][:80], "path": None, "weights": None, "triggers": []} for i in step["inputs"]]
        step["left_out"] = [*dict.fromkeys([*step["left_out"], *gone])]


def _no_section(sections: Sequence[dict[str, Any]], excess: int) -> None:
    """Nothing to compose with."""
    for section in sections:
        section |= {"raw": None, "alone": None}


def _fewer_steps(sections: list[dict[str, Any]], excess: int) -> None:
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


def _html(title: str, sections: Sequence[Mapping[str, Any]], studio: Mapping[str, Any] | None) -> str:
    facts = {"title": text(title, NAME), "version": __version__, "sections": sections, **anatomy(), "studio": studio}
    script = '"use strict";\n(() => {\n' + "\n".join(_asset(f"{name}.js") for name in _SCRIPTS) + "})();"
    style = _asset("page.css")
    policy = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; "
    policy += "base-uri 'none'; form-action 'none'"
    if studio:  # whose address only the browser knows; the script allows that one alone
        policy += "; connect-src http: https:"
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
