"""Steps that are done, and files that need not be made again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    open_keys = {CHECK_KEY, *(OF_RANKS if plan.follows_from_numbers else ())}
    wanted = {key: text for key, text in plan.metadata(hashes.of(plan.hashed)).items() if key not in open_keys}
    try:
        return {key: text for key, text in load_lora(path).metadata.items() if key not in open_keys} == wanted
    except ZitMergeError:
        return False


def found(plan: StepPlan) -> Done:
    """A step whose file is there from the same recipe."""
    lora = load_lora(plan.path)
    return Done(plan.as_found(lora.ranks), plan.path, False, lora.verdict)


def made_before(plan: StepPlan) -> Done | None:
    """A step as `found`; None if its file is not there, or from another recipe."""
    with Hashes(plan.hashed) as hashes:
        return found(plan) if plan.spec.keep and is_made(plan, hashes, plan.path) else None


class Needed(NamedTuple):
    """What is left to do of a section.

    Attributes:
        steps: Names of the steps to make: those whose file is not there, and those that they use and that are not there either.
        copies: Names of the steps whose copy is not there.
    """

    steps: set[str]
    copies: set[str]


def needed(plans: Sequence[StepPlan], hashes: Hashes) -> Needed:
    """What is left to do.

    Args:
        plans: Of one section, in order.
        hashes: Of all their `hashed`.
    """
    missing = {target for plan in plans for target in plan.targets if not is_made(plan, hashes, target)}
    steps: set[str] = set()
    for plan in reversed(plans):
        if plan.name in steps or plan.path in missing:
            fed_by = [i.step for i in plan.inputs if i.step]
            steps |= {plan.name, *(step.name for step in fed_by if not step.spec.keep or step.path in missing)}
    return Needed(steps, {plan.name for plan in plans if missing & set(plan.targets[1:])})
