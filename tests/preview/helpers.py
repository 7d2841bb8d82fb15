"""What tests of pictures share: sections as they are planned, and a renderer whose pictures follow from all that it is given."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from workspace import Workspace

from extensions_built_in.zit_merge.algebra.delta import Delta
from extensions_built_in.zit_merge.config.job import load_job
from extensions_built_in.zit_merge.config.schema import Section
from extensions_built_in.zit_merge.formats.reader import tensor_hash
from extensions_built_in.zit_merge.merging.made import Done, Hashes
from extensions_built_in.zit_merge.merging.readers import StepReaders, delta_reader
from extensions_built_in.zit_merge.merging.runner import run_plans
from extensions_built_in.zit_merge.planning.context import RunContext
from extensions_built_in.zit_merge.planning.job import make_context, plan_job
from extensions_built_in.zit_merge.planning.planned import Planned
from extensions_built_in.zit_merge.preview.grids import preview_plan
from extensions_built_in.zit_merge.preview.plan import PreviewPlan
from extensions_built_in.zit_merge.preview.settings import ImageSpec, RenderSettings
from extensions_built_in.zit_merge.preview.variants import AdapterVariant, digest
from extensions_built_in.zit_merge.progress import SILENT, Progress

T = TypeVar("T")

CPU = torch.device("cpu")
MODEL = {"name_or_path": "Tongyi-MAI/Z-Image-Turbo", "arch": "zimage:turbo"}
ME = {"lora": "me.safetensors", "ratio": 0.8}
STYLE = {"lora": "style.safetensors", "ratio": 0.5}


def step(*loras: Mapping[str, Any], name: str = "soft", **keys: Any) -> dict[str, Any]:
    """A step of these LoRAs; of me.safetensors if none is named. In fp32, so that rounding hides nothing."""
    return {"name": name, "loras": [dict(lora) for lora in loras or (ME,)], "save": {"dtype": "fp32"}} | keys


def settled(work: Workspace, *processes: Mapping[str, Any], job: str = "cat", **how: Any) -> tuple[Section, RunContext]:
    """The last section of a job, and where it runs."""
    whole = load_job(work.config(*processes, job=job))
    index, section = whole.sections()[-1]
    return section, make_context(whole, index, section, **how)


def planned(work: Workspace, *steps: Mapping[str, Any], job: str = "cat", **keys: Any) -> Planned:
    """A job of one section, planned with its files at hand."""
    config = work.job(*steps, job=job, name="config.json", **{"model": MODEL} | keys)  # JSON keeps the order of keys
    (found,) = plan_job(load_job(config))
    return found


def previewed(work: Workspace, *steps: Mapping[str, Any], **keys: Any) -> PreviewPlan:
    """Which pictures a job of one section asks for."""
    found = planned(work, *steps, **keys)
    return preview_plan(found.section, found.context, found.plans)


def run(found: Planned) -> list[Done]:
    """Writes the files of a section."""
    return list(run_plans(found.plans, CPU))


def changes(variant: AdapterVariant, progress: Progress = SILENT) -> dict[str, Delta]:
    """Module -> change of a variant, read as for its pictures."""
    with Hashes(variant.files()) as hashes:
        return dict(variant.deltas(delta_reader(lambda: StepReaders(hashes, CPU, progress))))


class Told(Progress):
    """Remembers how far everything is, and calls something after each item.

    Attributes:
        told: (label, description of the item, how many are done, how many there are) of every item that is done.
    """

    def __init__(self, after: Callable[[str, int], object] = lambda label, done: None):
        self.told: list[tuple[str, str, int, int]] = []
        self._after = after

    def track(
        self, items: Collection[T], label: str, unit: str = "module", describe: Callable[[T], str] | None = None
    ) -> Iterator[T]:
        for done, item in enumerate(items, 1):
            yield item
            self.told.append((label, (describe or str)(item), done, len(items)))
            self._after(label, done)


def name_of(variant: AdapterVariant) -> str:
    """The digest of a variant's record."""
    return digest(variant.record({path: tensor_hash(path) for path in variant.files()}))


def same(ours: Delta, theirs: Delta) -> bool:
    """Whether two changes are the same factors, bit for bit, but for rows and columns of zeros that pad them."""
    a, b = _stripped(ours), _stripped(theirs)
    return ours.shape == theirs.shape and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _stripped(delta: Delta) -> tuple[torch.Tensor, torch.Tensor]:
    factors = delta.expand()
    used = factors.up.any(0) & factors.down.any(1)
    return factors.up[:, used].double(), factors.down[used].double()


class FakeRenderer:
    """A model that renders a plain picture, whose colours follow from its adapter and from the spec.

    Attributes:
        adapters: How many adapters it was given.
        pictures: (adapter, spec) of every picture, in order.
        closed: Whether it was closed.
    """

    def __init__(self, settings: RenderSettings):
        self.settings, self.adapters, self.closed = settings, 0, False
        self.pictures: list[tuple[str, ImageSpec]] = []
        self._adapter = ""

    def __enter__(self) -> FakeRenderer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.closed = True

    def set_adapter(self, deltas: Iterable[tuple[str, Delta]]) -> None:
        """Remembers the LoRA by its bits."""
        self.adapters += 1
        found = hashlib.sha256()
        for module, delta in deltas:
            factors = delta.expand()
            if factors.up.any():
                found.update(module.encode() + factors.up.float().numpy().tobytes() + factors.down.float().numpy().tobytes())
        self._adapter = found.hexdigest()

    def render(self, spec: ImageSpec) -> Image.Image:
        """Four quarters in colours of their own, so that a picture upside down is another one."""
        self.pictures.append((self._adapter, spec))
        colours = hashlib.sha256(f"{self._adapter} {spec}".encode()).digest()
        small = Image.frombytes("RGB", (2, 2), colours[:12])
        return small.resize((spec.width, spec.height), Image.Resampling.NEAREST)


class Loader:
    """Loads renderers, and keeps them for assertions on what they did."""

    def __init__(self, renderer: type[FakeRenderer] = FakeRenderer):
        self._renderer = renderer
        self.loaded: list[FakeRenderer] = []

    def __call__(self, settings: RenderSettings) -> FakeRenderer:
        self.loaded.append(self._renderer(settings))
        return self.loaded[-1]

    @property
    def pictures(self) -> Sequence[tuple[str, ImageSpec]]:
        """Of all of them."""
        return [picture for renderer in self.loaded for picture in renderer.pictures]


def plain(colour: str, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A picture of one colour."""
    return Image.new("RGB", size, colour)


def names(folder: Path) -> list[str]:
    """What lies in a folder, in order."""
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []
