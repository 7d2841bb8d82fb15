"""Where pictures are stored: in a folder of ours by digest, and among the job's samples by names that AI-Toolkit's UI knows.

merged_<job>_previews/pictures/<digest>.png    every picture once; existing ones are not rendered again
merged_<job>_previews/<step>_<kind>.png        a contact sheet
merged_<job>_previews/<step>_<kind>.json       its content, with everything that the pictures are made from
samples/<ms>__<step>_<n>.png                   the same pictures, labelled, in AI-Toolkit's gallery, in full rows
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ZitMergeError
from ..files.atomic import os_errors, write_whole
from ..files.extent import read_json
from ..files.inputs import PICTURE_LIMIT, read_limited
from ..files.paths import without_users
from ..planning.context import PREFIXES, RunContext
from .samples import LARGEST

if TYPE_CHECKING:
    from PIL import Image, PngImagePlugin

_KEY = "zit_merge"  # of a PNG file's text
_END = b"IEND\xae\x42\x60\x82"  # of every PNG file
_THUMB = 300  # pixels, as GenerateImageConfig._generate_thumbnail makes them
_SAMPLE = re.compile(r"(\d+)__(\d+)_(\d+)\.png")


@dataclass(frozen=True)
class ImageStore:
    """The folders of a job's pictures.

    Attributes:
        folder: Ours.
        samples: AI-Toolkit's; None for a run outside a job's folder.
        step: The training step in the names of samples.
        row: How many samples are in a row of AI-Toolkit's gallery.
        job: The job's name.
    """

    folder: Path
    samples: Path | None
    step: int
    row: int
    job: str

    def path(self, digest: str) -> Path:
        """The file of a picture."""
        return self.folder / "pictures" / f"{digest}.png"

    def has(self, digest: str) -> bool:
        """Whether a complete picture is stored."""
        try:
            content = self._content(digest)
            return content.endswith(_END) and _KEY in self._opened(digest, content).text
        except ZitMergeError:  # broken, or another format: it is rendered again
            return False

    def load(self, digest: str, edge: int | None = None) -> Image.Image:
        """A stored picture.

        Args:
            digest: Its name.
            edge: Pixels of its longest side at most; None keeps its size.

        Raises:
            ZitMergeError: It can't be read any more.
        """
        from PIL import Image

        found = self._opened(digest, self._content(digest)).convert("RGB")
        if edge:
            found.thumbnail((edge, edge), Image.Resampling.LANCZOS)
        return found

    def save(self, digest: str, picture: Image.Image, record: Mapping[str, Any]) -> Path:
        """Stores a picture.

        Args:
            digest: Its name.
            picture: The pixels.
            record: What it was made from, for the text of the PNG.

        Raises:
            ZitMergeError: It can't be written.
        """
        text = json.dumps(without_users(record), sort_keys=True, default=str)
        return self._write(self.path(digest), _png(picture, text))

    def write(self, name: str, content: bytes) -> Path:
        """Writes a file beside the pictures.

        Args:
            name: Of the file.
            content: Its bytes.

        Raises:
            ZitMergeError: It can't be written.
        """
        return self._write(self.folder / name, content)

    def _write(self, path: Path, content: bytes) -> Path:
        with os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return write_whole(path, [content])

    def add_samples(self, digests: Sequence[str], labels: Sequence[str], headings: Sequence[str]) -> list[Path]:
        """Copies pictures into the job's samples, in full rows; those already there keep their places.

        Args:
            digests: Of the pictures, in order.
            labels: What each is of, which is drawn into the copy.
            headings: Prompt and seed of each, for the legend that fills the last row too.

        Returns:
            The new files.

        Raises:
            ZitMergeError: They can't be written.
        """
        if self.samples is None:
            return []
        record = self.folder / "samples.json"
        known = {digest: name for digest, name in _read(record).items() if isinstance(name, str) and _SAMPLE.fullmatch(name)}
        label_of = dict(zip(digests, labels, strict=True))
        told = {d: f"{label_of[d]}: {heading}" for d, heading in zip(digests, headings, strict=True)}
        missing = [d for d in digests if not self._exists(known.get(d))]
        gaps = [d for d in missing if self._is_gap(known.get(d))]
        new = [d for d in missing if d not in gaps]
        first = max(int(time.time() * 1000), 1 + max(map(_time_of, _names(self.samples)), default=0))
        known |= {digest: self._name(first, n) for n, digest in enumerate(new)}
        if new:  # before the pictures: what an interruption leaves out is a gap then
            self.write(record.name, json.dumps(known, indent=1).encode())
        filling = -len(new) % self.row
        tiles = [self._legend(new[0], [told[d] for d in new] if n == 0 else []) for n in range(filling)]
        added = [self._sample(self._name(first, n), tile) for n, tile in enumerate(tiles, len(new))]
        return [self._copy(d, known[d], label_of[d]) for d in (*gaps, *new)] + added

    def _name(self, first: int, number: int) -> str:
        """Of picture `number` of a batch: milliseconds, training step, position in the row."""
        return f"{first + number}__{self.step:09d}_{number % self.row}.png"

    def _legend(self, like: str, told: Sequence[str]) -> Image.Image:
        """A tile of the last row, in the size of a picture: what the new ones are, or nothing."""
        from .sheet import legend

        lines = [f"{k}. {label}" for k, label in enumerate(told, 1)]
        return legend(f"zit_merge: {self.job}" if lines else "", lines, self.load(like).size)

    def _copy(self, digest: str, name: str, label: str) -> Path:
        """A picture as a sample of this name, with what it was made from."""
        opened = self._opened(digest, self._content(digest))
        return self._sample(name, opened.convert("RGB"), label, opened.text[_KEY])

    def _content(self, digest: str) -> bytes:
        try:
            return read_limited(self.path(digest), PICTURE_LIMIT)
        except OSError as e:
            raise self._gone(digest) from e

    def _opened(self, digest: str, content: bytes) -> PngImagePlugin.PngImageFile:
        """A picture, read to its end.

        Raises:
            ZitMergeError: It is broken.
        """
        from PIL import PngImagePlugin

        try:
            picture = PngImagePlugin.PngImageFile(BytesIO(content))
            if max(picture.size) > LARGEST:  # before its pixels are unpacked
                raise ValueError(f"{picture.size} pixels")
            picture.load()
        except Exception as e:  # Pillow has no class for broken files; zlib's and Python's own errors come through
            raise self._gone(digest) from e
        return picture

    def _gone(self, digest: str) -> ZitMergeError:
        return ZitMergeError(f"{self.path(digest)}: can't be read any more: run `preview` to render it again")

    def _exists(self, name: str | None) -> bool:
        return self.samples is not None and name is not None and (self.samples / name).is_file()

    def _is_gap(self, name: str | None) -> bool:
        """Whether a sample is missing from a row that still has others."""
        if name is None:
            return False
        time, step, number = map(int, _SAMPLE.findall(name)[0])
        row = (f"{time - number + n}__{step:09d}_{n}.png" for n in range(max(self.row, number)))
        return any(map(self._exists, row))

    def _sample(self, name: str, picture: Image.Image, label: str = "", text: str = "") -> Path:
        """Writes one sample, its thumbnail first as in the toolkit, so that the gallery always finds one."""
        from PIL import Image, ImageOps

        from .sheet import labelled

        assert self.samples, "only a job's folder has samples"
        thumb, small = BytesIO(), ImageOps.fit(picture, (_THUMB, _THUMB), Image.Resampling.LANCZOS)
        whole = labelled(picture, label) if label else picture
        (labelled(small, label) if label else small).save(thumb, "JPEG", quality=90)
        self._write(self.samples / ".thumbs" / f"{name}.jpg", thumb.getvalue())
        return self._write(self.samples / name, _png(whole, text))


def image_store(context: RunContext, row: int) -> ImageStore:
    """The folders of a section's pictures.

    Args:
        context: Where it runs.
        row: How many samples are in a row.

    Raises:
        ZitMergeError: AI-Toolkit would take our folder for a checkpoint.
    """
    home = context.home.folder if context.home else None
    job = re.sub(r"[/\\]", "_", context.job)
    names = [f"{prefix}{job}_previews" for prefix in dict.fromkeys((context.prefix, *PREFIXES))]  # outputs may be elsewhere
    trainings = [training for training in (context.home, context.training) if training]
    for folder in ((home or context.output_dir) / name for name in names):
        if not any(training.claims(folder) for training in trainings):
            step = context.training.steps if context.training else 0
            return ImageStore(folder, home / "samples" if home else None, step, row, context.job)
    raise ZitMergeError(
        f"{context.at('preview')}: AI-Toolkit would take the folder {names[0]} for a checkpoint of {context.job}: give the job a "
        "name without wildcards"
    )


def _png(picture: Image.Image, text: str) -> bytes:
    """As PNG, with what it was made from."""
    from PIL import PngImagePlugin

    content, info = BytesIO(), PngImagePlugin.PngInfo()
    if text:
        info.add_text(_KEY, text)
    picture.save(content, "PNG", pnginfo=info)
    return content.getvalue()


def _names(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir()] if folder.is_dir() else []


def _time_of(name: str) -> int:
    """The milliseconds at the beginning of a sample's name; 0 for any other file."""
    found = re.fullmatch(r"(\d{13})__\d+_\d+\.\w+", name)
    return int(found[1]) if found else 0


def _read(path: Path) -> dict[str, Any]:
    try:
        found = read_json(read_limited(path).decode())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
