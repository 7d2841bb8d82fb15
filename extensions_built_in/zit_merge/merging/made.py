"""Steps that are done, and files that need not be made again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ..errors import ZitMergeError
from ..formats.checkpoint import Checkpoint, Seen
from ..formats.reader import LoraFile, load_lora, tensor_hash
from ..formats.verdict import Verdict
from ..planning.types import StepPlan, steps_to_make


class Baked(NamedTuple):
    """A whole model that is written.

    Attributes:
        path: A folder or a file.
        made: Whether it was made now; else it was there already, from the same recipe.
        verdict: What was measured while it was written, now or then.
        shares: Module -> share of its change that survives rounding; empty where it was there already.
        remarks: What a person should hear of.
    """

    path: Path
    made: bool
    verdict: Verdict
    shares: Mapping[str, float] = {}
    remarks: tuple[str, ...] = ()


class Done(NamedTuple):
    """A step that is done.

    Attributes:
        plan: As it was run, its ranks known.
        path: Its file.
        made: Whether it was made now; else it was there already, from the same recipe.
        verdict: What the check of the file found, now or when it was made; None for a file that does not say.
        baked: The whole model that the step writes too, or alone: then `path` is that.
        remarks: What happened meanwhile that a person should hear of.
    """

    plan: StepPlan
    path: Path
    made: bool
    verdict: Verdict | None = None
    baked: Baked | None = None
    remarks: tuple[str, ...] = ()

    @property
    def is_lora(self) -> bool:
        """Whether a LoRA was written, not the whole model alone."""
        return self.baked is None or self.path != self.baked.path


def _hash(path: Path, known: Seen) -> str:
    return known.sha256() if isinstance(known, Checkpoint) else tensor_hash(path, known)


class Hashes:
    """SHA-256 of the tensor data of files, taken in threads while other work goes on. As a context it ends them.

    Args:
        files: The files, with the stamps that they had when they were planned, where they were.
    """

    def __init__(self, files: Mapping[Path, Seen]):
        self._pool = ThreadPoolExecutor(max_workers=2)
        self._futures: dict[Path, Future[str]] = {p: self._pool.submit(_hash, p, known) for p, known in files.items()}

    def __enter__(self) -> Hashes:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def of(self, paths: Iterable[Path]) -> dict[Path, str]:
        """Path -> hash of some of the files; waits for them.

        Raises:
            ZitMergeError: One can't be read, or is no longer the planned one.
        """
        return {path: self._futures[path].result() for path in paths}


def made_file(plan: StepPlan, hashes: Hashes, path: Path) -> LoraFile | None:
    """A file that is a step's output, whole, and made by this recipe with this version; None for any other.

    Args:
        plan: The step.
        hashes: Of `plan.hashed`.
        path: The file.
    """
    if not path.is_file():
        return None
    wanted = hashes.of(plan.hashed)
    try:
        lora = load_lora(path)
    except ZitMergeError:
        return None
    return lora if plan.made(lora.metadata, wanted) else None


def made_before(plan: StepPlan) -> Done | None:
    """A step whose file is there from the same recipe; None where it is not."""
    if not plan.spec.keep:
        return None
    with Hashes(plan.hashed) as hashes:
        lora = made_file(plan, hashes, plan.path)
    return Done(plan.as_found(lora), plan.path, False, lora.verdict) if lora else None


class Inventory(NamedTuple):
    """What is there of a section, and what is left to do.

    Attributes:
        there: Output, or copy -> the file that is there from the same recipe.
        steps: Names of the steps to make: those whose output is not there, and those that they use and that are not there either.
    """

    there: dict[Path, LoraFile]
    steps: set[str]


def take_inventory(plans: Sequence[StepPlan], hashes: Hashes, models: Collection[Path]) -> Inventory:
    """Looks at the outputs of a section.

    Args:
        plans: Of its steps, in order.
        hashes: Of all their `hashed`.
        models: The whole models that are there from the same recipe.
    """
    there = {path: lora for plan in plans for path in plan.targets if (lora := made_file(plan, hashes, path))}
    return Inventory(there, steps_to_make(plans, {*there, *models}))
