"""The strip: pictures of settings beside those of the base and of the inputs, each rendered once for the same weights."""

from __future__ import annotations

import contextlib
import itertools
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
from ..preview.variants import digest
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
        self._shots = {draft: digest({"shots": [spec.record() for spec in own]}) for draft, own in self.specs.items()}
        self.looks: list[Look] = []
        self.ready: set[str] = set()
        self._unread: list[Any] = []
        self._read()

    @property
    def _file(self) -> Path:
        return self._store.folder / "studio.json"

    def _read(self) -> None:
        """The strip of an earlier studio of this job; what can't be shown, such as a look without its pictures, stays noted."""
        try:
            found = list(read_json(read_limited(self._file).decode())["looks"])
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError):
            self._move_aside()
            return
        there: dict[str, bool] = {}
        for told in found:
            try:
                look = _look(told)
            except (ValueError, KeyError, TypeError, ZitMergeError):
                self._unread.append(told)
                continue
            for name in {name for row in look.digests for name in row} - there.keys():
                there[name] = name.isalnum() and self._store.path(name).is_file()
            if not look.digests or not all(row and there[row[-1]] for row in look.digests) or len(self.looks) >= MOST:
                self._unread.append(told)
                continue
            self.looks.append(replace(look, id=len(self.looks) + 1))
            self.ready |= {name for row in look.digests for name in row if there[name]}

    def _move_aside(self) -> None:
        """A file that is no strip is nobody's to lose."""
        aside = (self._file.with_name(f"studio_old{number or ''}.json") for number in itertools.count())
        with contextlib.suppress(OSError):
            self._file.rename(next(path for path in aside if not path.exists()))

    def write(self, done: Look | None = None) -> None:
        """Keeps the strip for the next studio of this job.

        Args:
            done: A look that has just been rendered; those that are told as done are kept anyway.

        Raises:
            ZitMergeError: It can't be written.
        """
        looks = [*self._unread, *(look.record() for look in self.looks if look.status == DONE or look is done)]
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

    def add(self, setting: Setting, draft: bool, label: str) -> Look:
        """A look that is to be rendered; the one that is there, where it has this very setting.

        Args:
            setting: What was composed.
            draft: Smaller and in fewer steps.
            label: What it shows, a few words.

        Raises:
            ZitMergeError: There are too many.
        """
        for look in self.looks:
            if (look.setting, look.draft, look.shots) == (setting, draft, self._shots[draft]) and look.status in (
                WAITING,
                RUNNING,
                DONE,
            ):
                return look
        if len([look for look in self.looks if look.status == DONE]) >= MOST:
            raise ZitMergeError(f"the strip has {MOST} looks: close the studio and move {self._file} away to begin a new one")
        self.looks.append(
            Look(len(self.looks) + 1, setting, label=label + ", draft" * draft, draft=draft, shots=self._shots[draft])
        )
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
        preview = self._plan(look.setting, self._asked)
        grid = replace(preview.grids[0], specs=self.specs[look.draft])
        preview = replace(preview, grids=[grid])
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


def _look(told: Mapping[str, Any]) -> Look:
    """A look as it was noted."""
    return Look(
        0,
        read_setting(told["setting"]),
        DONE,
        label=str(told["label"]),
        draft=told["draft"] is True,
        favourite=told["favourite"] is True,
        columns=[(str(label), str(kind)) for label, kind in told["columns"]],
        rows=[str(row) for row in told["rows"]],
        shots=str(told["shots"]),
        digests=[[str(digest) for digest in row] for row in told["digests"]],
    )


def _draft(spec: ImageSpec) -> ImageSpec:
    """Half as large on each side, in half as many steps."""
    width, height = (max(SMALLEST, side // 2 // MULTIPLE * MULTIPLE) for side in (spec.width, spec.height))
    return replace(spec, width=width, height=height, steps=max(1, spec.steps // 2))
