"""The strip: pictures of settings beside those of the base and of the inputs, each rendered once for the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

from ..config.schema import SHOWN, Preview, Section
from ..errors import ZitMergeError
from ..files.extent import read_json
from ..files.inputs import read_limited
from ..merging.made import Hashes
from ..merging.readers import StepReaders, delta_reader
from ..planning.context import RunContext
from ..preview.image_store import image_store
from ..preview.pictures import missing_pictures, rendered_pictures
from ..preview.plan import PictureRecords, PreviewPlan, specs_text
from ..preview.rendering import Load
from ..preview.samples import settings_of, specs_of
from ..preview.settings import MULTIPLE, SMALLEST, ImageSpec
from ..progress import Progress
from .entries import DONE, RUNNING, WAITING, Look
from .setting import Setting, read_setting

MOST = 200  # looks in a strip
_QUALITY = 90  # of JPEG


class Strip:
    """The looks of a studio, kept in a file beside the pictures.

    Args:
        section: Whose samples and previews say what is rendered.
        context: Where it runs.
        plan: Plans the pictures of a setting, with these keys of `preview:`.

    Attributes:
        looks: In the order in which they were asked for.
        ready: The names of the pictures that are there.
        specs: Of a look, and of a draft: what its rows are rendered with.

    Raises:
        ZitMergeError: There can be no pictures; the message says why.
    """

    def __init__(self, section: Section, context: RunContext, plan: Callable[[Setting, Mapping[str, Any]], PreviewPlan]):
        settings = settings_of(section, context)
        self._plan, self._store = plan, image_store(context, settings.row)
        asked = section.preview or next((step.preview for step in section.steps if step.preview), None) or Preview()
        self._asked = asked.model_dump(exclude_unset=True) | {"compare": list(SHOWN), "confirm": True}
        specs = specs_of(asked, settings, context, context.at("preview"))
        self.specs: Mapping[bool, Sequence[ImageSpec]] = {False: specs, True: [_draft(spec) for spec in specs]}
        self.looks: list[Look] = []
        self.ready: set[str] = set()
        self._read()

    @property
    def _file(self) -> Path:
        return self._store.folder / "studio.json"

    def _read(self) -> None:
        """The strip of an earlier studio of this job, as far as its pictures are there."""
        try:
            found = read_json(read_limited(self._file).decode())["looks"][-MOST:]
            for told in found:
                digests = [[str(digest) for digest in row] for row in told["digests"]]
                there = {digest for row in digests for digest in row if digest.isalnum() and self._store.has(digest)}
                if not digests or not all(row and row[-1] in there for row in digests):
                    continue
                look = Look(len(self.looks) + 1, read_setting(told["setting"]), DONE)
                look.draft, look.favourite = told["draft"] is True, told["favourite"] is True
                look.columns = [(str(label), str(kind)) for label, kind in told["columns"]]
                look.rows, look.digests = [str(row) for row in told["rows"]], digests
                self.looks.append(look)
                self.ready |= there
        except (OSError, ValueError, KeyError, TypeError, ZitMergeError):
            return  # there is none, or one of another version: the pictures themselves are safe

    def write(self) -> None:
        """Keeps the strip for the next studio of this job.

        Raises:
            ZitMergeError: It can't be written.
        """
        looks = [look.record() for look in self.looks if look.status == DONE]
        self._store.write(self._file.name, json.dumps({"looks": looks}, indent=1).encode())

    def jpeg(self, digest: str, edge: int) -> bytes:
        """A stored picture for the page.

        Args:
            digest: Its name.
            edge: Pixels of its longer side at most.

        Raises:
            ZitMergeError: It can't be read any more.
        """
        found = BytesIO()
        self._store.load(digest, edge).save(found, "JPEG", quality=_QUALITY)
        return found.getvalue()

    def text(self, draft: bool) -> str:
        """`1024 x 1024 pixels, 9 steps`: what a look is rendered with."""
        return ", ".join(specs_text(self.specs[draft]).split(", guidance")[:1])

    @property
    def headings(self) -> list[str]:
        """Prompt and seed of each row."""
        return [f"{spec.prompt} (seed {spec.seed})" for spec in self.specs[False]]

    def add(self, setting: Setting, draft: bool) -> Look:
        """A look that is to be rendered; the one that is there, where it has this very setting.

        Raises:
            ZitMergeError: There are too many.
        """
        for look in self.looks:
            if (look.setting, look.draft) == (setting, draft) and look.status in (WAITING, RUNNING, DONE):
                return look
        if len(self.looks) >= MOST:
            raise ZitMergeError(f"the strip has {MOST} looks: close the studio and move studio.json away to begin a new one")
        self.looks.append(Look(len(self.looks) + 1, setting, draft=draft))
        return self.looks[-1]

    def render(self, look: Look, hashes: Hashes, readers: StepReaders, load: Load, progress: Progress) -> Iterator[None]:
        """Renders what is missing of a look, its own pictures first.

        Args:
            look: Its columns, rows and pictures are filled in.
            hashes: Of every file that the section reads.
            readers: Open inputs and steps, and keep them open.
            load: Loads the model.
            progress: Shows how far it is, and may stop it.

        Yields:
            Each time that something is there to be shown.

        Raises:
            ZitMergeError: It can't be planned or rendered.
        """
        first = self.specs[look.draft][0]
        changes = {"size": [first.width, first.height], "steps": first.steps} if look.draft else {}
        preview = self._plan(look.setting, self._asked | changes)
        (grid,) = preview.grids
        files = {path: stamp for variant in grid.variants for path, stamp in variant.files().items()}
        records = PictureRecords(preview, hashes.of(files))
        wanted = {(picture.variant, picture.spec): digest for picture, digest in records.digests.items()}
        own, before = grid.variants[-1], grid.labels[:-1]
        look.columns = [*((label, "input" if n else "base") for n, label in enumerate(before)), (look.label, "look")]
        look.rows = grid.headings
        look.digests = [[wanted[variant, spec] for variant in grid.variants] for spec in grid.specs]
        pictures = sorted(preview.pictures(), key=lambda picture: picture.variant is not own)
        missing = missing_pictures(pictures, records, self._store)
        self.ready |= set(wanted.values()) - {records.digests[picture] for picture in missing}
        yield
        read = delta_reader(lambda: nullcontext(readers))
        for picture in rendered_pictures(preview, missing, self._store, records, read, load, progress):
            self.ready.add(records.digests[picture])
            yield


def _draft(spec: ImageSpec) -> ImageSpec:
    """Half as large on each side, in half as many steps."""
    width, height = (max(SMALLEST, side // 2 // MULTIPLE * MULTIPLE) for side in (spec.width, spec.height))
    return replace(spec, width=width, height=height, steps=max(1, spec.steps // 2))
