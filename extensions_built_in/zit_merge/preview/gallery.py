"""Where pictures lie: in a folder of ours under what they follow from, and in the job's samples under names that its UI knows.

merged_<job>_previews/pictures/<digest>.png    every picture once; one that is there is not rendered again
merged_<job>_previews/<step>_<kind>.png        a contact sheet
merged_<job>_previews/<step>_<kind>.json       what is on it, with everything that the pictures follow from
samples/<ms>__<step>_<n>.png                   the same pictures in AI-Toolkit's gallery, in full rows
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, PngImagePlugin

from ..errors import ZitMergeError
from ..formats.writer import os_errors, write_whole
from ..sources import Site
from .sheet import legend

_KEY = "zit_merge"  # of a PNG file's text
_THUMB = 300  # pixels, as GenerateImageConfig._generate_thumbnail makes them


@dataclass(frozen=True)
class Gallery:
    """The folders of a job's pictures.

    Attributes:
        folder: Ours.
        samples: AI-Toolkit's; None for a run that belongs to no job.
        step: The training step that stands in the names of samples.
        row: How many samples stand in a row.
        job: The job's name.
    """

    folder: Path
    samples: Path | None
    step: int
    row: int
    job: str

    def path(self, digest: str) -> Path:
        """Where a picture lies."""
        return self.folder / "pictures" / f"{digest}.png"

    def has(self, digest: str) -> bool:
        """Whether a picture is there, whole."""
        try:
            with Image.open(self.path(digest)) as picture:
                return _KEY in picture.text  # reads to the end
        except (OSError, SyntaxError, ValueError, AttributeError):  # broken, or another format
            return False

    def load(self, digest: str) -> Image.Image:
        """A picture that is there."""
        with Image.open(self.path(digest)) as picture:
            return picture.convert("RGB")

    def save(self, digest: str, picture: Image.Image, record: Mapping[str, Any]) -> Path:
        """Keeps a picture, with everything that it follows from in its text.

        Raises:
            ZitMergeError: It can't be written.
        """
        text = PngImagePlugin.PngInfo()
        text.add_text(_KEY, json.dumps(record, sort_keys=True, default=str))
        return self._write(self.path(digest), _png(picture, text))

    def write(self, name: str, content: bytes) -> Path:
        """Writes a sheet or a table.

        Raises:
            ZitMergeError: It can't be written.
        """
        return self._write(self.folder / name, content)

    def _write(self, path: Path, content: bytes) -> Path:
        with os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return write_whole(path, [content])

    def show(self, digests: Sequence[str], labels: Sequence[str]) -> list[Path]:
        """Puts pictures into the job's samples, in full rows; those that are there already stay where they are.

        Args:
            digests: Of the pictures, in order.
            labels: What each shows, for the tiles of text that fill the last row.

        Returns:
            The new files.

        Raises:
            ZitMergeError: They can't be written.
        """
        if self.samples is None:
            return []
        record = self.folder / "samples.json"
        known = _read(record)
        new = [(d, label) for d, label in zip(digests, labels, strict=True) if not self._is_shown(known.get(d))]
        if not new:
            return []
        start = int(time.time() * 1000)
        size = self.load(new[0][0]).size
        contents = [(d, self.path(d).read_bytes()) for d, _ in new]
        empty = -len(new) % self.row
        tile = _png(legend(f"zit_merge: {self.job}", [f"{n}. {label}" for n, (_, label) in enumerate(new, 1)], size))
        made = []
        for n, (digest, content) in enumerate([*contents, *[("", tile)] * empty]):
            name = f"{start + n}__{self.step:09d}_{n % self.row}.png"
            made.append(self._sample(name, content))
            if digest:
                known[digest] = name
        self.write(record.name, json.dumps(known, indent=1).encode())
        return made

    def _is_shown(self, name: object) -> bool:
        return isinstance(name, str) and bool(re.fullmatch(r"\d+__\d+_\d+\.png", name)) and (self.samples / name).is_file()

    def _sample(self, name: str, content: bytes) -> Path:
        """One sample; its thumbnail comes first, as the toolkit does it, so that the gallery never looks for it in vain."""
        thumb = BytesIO()
        with Image.open(BytesIO(content)) as picture:
            ImageOps.fit(picture.convert("RGB"), (_THUMB, _THUMB), Image.LANCZOS).save(thumb, "JPEG", quality=90)
        self._write(self.samples / ".thumbs" / f"{name}.jpg", thumb.getvalue())
        return self._write(self.samples / name, content)


def gallery_of(site: Site, row: int) -> Gallery:
    """The folders of a section's pictures.

    Args:
        site: Where it runs.
        row: How many samples stand in a row.

    Raises:
        ZitMergeError: AI-Toolkit would take our folder for a checkpoint.
    """
    home = site.home.folder if site.home else None
    job = re.sub(r"[/\\]", "_", site.job)
    folder = (home or site.output_dir) / f"{site.prefix}{job}_previews"
    if any(training.claims(folder) for training in (site.home, site.training) if training):
        raise ZitMergeError(
            f"{site.at('preview')}: AI-Toolkit would take the folder {folder.name} for a checkpoint of {site.job}: give the job "
            "a name without wildcards"
        )
    step = site.training.steps if site.training else 0
    return Gallery(folder, home / "samples" if home else None, step, row, site.job)


def _png(picture: Image.Image, text: PngImagePlugin.PngInfo | None = None) -> bytes:
    content = BytesIO()
    picture.save(content, "PNG", pnginfo=text)
    return content.getvalue()


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
