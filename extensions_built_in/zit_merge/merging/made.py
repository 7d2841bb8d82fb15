"""Steps that are done, and files that need not be made again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ..errors import ZitMergeError
from ..formats.metadata import CHECK_KEY, OF_RANKS
from ..formats.reader import load_lora, tensor_hash
from ..formats.verdict import Verdict
from ..planning.types import StepPlan


class Done(NamedTuple):
    """A step that is done.

    Attributes:
        plan: As it was run, its ranks known.
        path: Its file.
        made: Whether it was made now; else it was there already, from the same recipe.
        verdict: What the check of the file found, now or when it was made; None for a file that does not say.
    """

    plan: StepPlan
    path: Path
    made: bool
    verdict: Verdict | None = None


class Hashes:
    """SHA-256 of the tensor data of files, taken in threads while other work goes on. As a context it ends them.

    Args:
        paths: The files, each hashed once.
    """

    def __init__(self, paths: Iterable[Path]):
        self._pool = ThreadPoolExecutor(max_workers=2)
        self._futures: dict[Path, Future[str]] = {p: self._pool.submit(tensor_hash, p) for p in dict.fromkeys(paths)}

    def __enter__(self) -> Hashes:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def of(self, paths: Iterable[Path]) -> dict[Path, str]:
        """Path -> hash of some of the files; waits for them."""
        return {path: self._futures[path].result() for path in paths}


def is_made(plan: StepPlan, hashes: Hashes, path: Path) -> bool:
    """Whether a file is a step's output, whole, and made by this recipe with this version.

    Args:
        plan: The step.
        hashes: Of `plan.hashed`.
        path: The file.
    """
    if not path.is_file():
        return False
    try:
        found = load_lora(path).metadata
    except ZitMergeError:
        return False
    open_keys = {CHECK_KEY, *(OF_RANKS if plan.follows_from_numbers else ())}
    return _without(found, open_keys) == _without(plan.metadata(hashes.of(plan.hashed)), open_keys)


def _without(metadata: Mapping[str, str], keys: set[str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key not in keys}


def made_before(plan: StepPlan) -> Done | None:
    """A step whose file is there from the same recipe; None if it is not."""
    with Hashes(plan.hashed) as hashes:
        if plan.spec.keep and is_made(plan, hashes, plan.path):
            return Done(plan, plan.path, False, load_lora(plan.path).verdict)
    return None


def steps_to_make(plans: Sequence[StepPlan], hashes: Hashes) -> set[str]:
    """The names of the steps to run: those whose file is not there, and those that they use and that are not there either.

    Args:
        plans: Of one section, in order.
        hashes: Of all their `hashed`.
    """
    there = {plan.name for plan in plans if plan.spec.keep and is_made(plan, hashes, plan.path)}
    wanted: set[str] = set()
    for plan in reversed(plans):
        if plan.name in wanted or (plan.spec.keep and plan.name not in there):
            wanted |= {plan.name, *(i.step.name for i in plan.inputs if i.step and i.step.name not in there)}
    return wanted
