"""A whole model with the merge in it, tensor by tensor: base + change in float32, rounded once, and measured after that.

Memory stays at one module's change and a few rows of its weight, whatever the size of the model. A tensor that nothing changes is
copied byte for byte, unless another dtype was asked for. With g = written - base and d the change that was wanted, of each
module and of the file:

    survives   <g, d> / <d, d>    the strength that is left of the change
    error      |g - d| / |d|      rounding, which is no part of the change
    got        the least-squares strengths of the inputs in g

Sums of squares are taken in float32 over a million numbers at most, and added up in float64.
"""

from __future__ import annotations

import contextlib
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ..algebra.dense import rounded
from ..algebra.factors import is_finite, peak
from ..algebra.precision import full_precision
from ..errors import ZitMergeError, other_tensors
from ..formats.checkpoint import Checkpoint, CheckpointReader, Digest, Place, open_checkpoint
from ..formats.checkpoint_writer import SCALED, CheckpointWriter, Written, checkpoint_layout, left_out
from ..formats.dtypes import STORED_DTYPES
from ..formats.metadata import CHECK_KEY, read_recipe
from ..formats.reader import LoraFile
from ..formats.reading import Reader
from ..formats.verdict import Verdict, judged_bake, placeholder
from ..model.tensors import TENSORS
from ..planning.metadata import bake_metadata
from ..planning.recipe import bake_recipe
from ..planning.types import BakeTarget, StepPlan
from ..progress import Progress
from .added import AddedChange
from .extraction import beyond_loras, extraction_remarks
from .fallback import else_on_cpu
from .made import Baked, Hashes
from .opened import open_input
from .results import Result
from .verify import Sums

_CHUNK = {"cpu": 1 << 21, "cuda": 1 << 27}  # bytes of a weight in float32 that are changed at a time
_PENDING = 8  # chunks that wait to be hashed


def bake(plan: StepPlan, steps: Mapping[Path, LoraFile], hashes: Hashes, device: torch.device, progress: Progress) -> Baked:
    """Writes the whole model of a step; on the CPU from the start again where a GPU runs out of memory.

    Args:
        plan: Final; it bakes.
        steps: Path -> file of the steps that are done; those that it uses are among them.
        hashes: Of `plan.hashed`.
        device: Where the algebra runs.
        progress: Shows how far it is, and may stop it.

    Raises:
        ZitMergeError: With no part of the model left behind.
    """
    baked, remarks = else_on_cpu(lambda on: _bake(plan, steps, hashes, on, progress), device)
    return baked._replace(remarks=(*remarks, *baked.remarks))


def _bake(plan: StepPlan, steps: Mapping[Path, LoraFile], hashes: Hashes, device: torch.device, progress: Progress) -> Baked:
    target, base = _target(plan)
    recipe = bake_recipe(plan)
    reserve = bake_metadata(plan, recipe) | placeholder(len(plan.inputs))
    tensors = checkpoint_layout(base, target.spec.format, target.spec.dtype)
    with full_precision(), contextlib.ExitStack() as files:
        readers = [open_input(i, files, steps.get(i.path)) for i in plan.inputs]
        result = Result(_in_float32(_settled(plan, readers, device, progress)), readers, device, progress)
        with CheckpointWriter(target.path, base, tensors, target.spec.format, reserve) as out:
            with _Hasher() as hasher:
                baker = files.enter_context(_Baker(target, result, files.enter_context(CheckpointReader(base)), hasher, device))
                for tensor in progress.track(tensors, f"baking {plan.name}", "tensor"):
                    out.write(tensor, baker.rows(tensor))
            beyond = beyond_loras(readers)
            files.close()  # raises if an input was changed
            read, wanted = hasher.hexdigest(), target.spec.sha256
            if wanted and read != wanted:  # known only now: to know it before would take one more reading of the whole base
                raise other_tensors(base.path, wanted)
            verdict = baker.verdict()
            found = {**hashes.of(plan.hashed), base.path: read}
            out.finish(bake_metadata(plan, recipe, found) | verdict.metadata())
    return Baked(target.path, True, verdict, baker.shares, extraction_remarks(plan, verdict, beyond))


def baked_before(plan: StepPlan, hashes: Hashes) -> Baked | None:
    """The whole model of a step, if it is there from the same recipe and base.

    Args:
        plan: Final; it bakes.
        hashes: Of `plan.hashed`.
    """
    target, base = _target(plan)
    if not target.path.exists():
        return None
    try:
        written = open_checkpoint(target.path, shapes=plan.spec.shapes, quantized=True)
    except ZitMergeError:
        return None
    metadata = written.metadata
    verdict = Verdict.read(metadata)
    said = read_recipe(metadata) or {}
    told = said["steps"][-1].get("bake", {}).get("sha256") if said.get("steps") else None
    found = {**hashes.of(plan.hashed), base.path: told or ""}
    wanted = bake_metadata(plan, bake_recipe(plan), found)
    if verdict is None or {k: v for k, v in metadata.items() if k != CHECK_KEY} != wanted or told != base.sha256():
        return None
    extras = {} if left_out(base, target.spec.format) else base.extras
    if written.extras.keys() != extras.keys() or (extras and written.extras_sha256() != base.extras_sha256()):
        return None
    return Baked(target.path, False, verdict)


def _target(plan: StepPlan) -> tuple[BakeTarget, Checkpoint]:
    assert plan.bake, "the step bakes"
    if plan.bake.base is None:
        raise ZitMergeError(f"{plan.bake.label}: the base is still on the hub: run the job again when it is there")
    return plan.bake, plan.bake.base


def _settled(plan: StepPlan, readers: Sequence[Reader], device: torch.device, progress: Progress) -> StepPlan:
    """The plan with the ranks of the LoRA file that the step writes, or would write: they may follow from its dtype."""
    return Result(plan, readers, device, progress).plan if plan.is_open else plan


def _in_float32(plan: StepPlan) -> StepPlan:
    """The plan of the same change before its factors are rounded.

    Args:
        plan: Its ranks are known.
    """
    save = plan.spec.save.model_copy(update={"dtype": "fp32", "keep_lokr": False})
    if not plan.spec.rank_rule:
        return plan.revised(dtype_name="fp32", spec=plan.spec.model_copy(update={"save": save}))
    return plan.revised(plan.ranks, dtype_name="fp32", spec=plan.spec.model_copy(update={"save": save, "rank": "exact"}))


class _Hasher:
    """The hash of the base, taken in a thread while its tensors are changed and written."""

    def __init__(self) -> None:
        self._digest, self._pool, self._pending = Digest(), ThreadPoolExecutor(max_workers=1), deque[Future[None]]()

    def __enter__(self) -> _Hasher:
        return self

    def __exit__(self, kind: type | None, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        for pending in () if kind else self._pending:
            pending.result()

    def begin(self, name: str, place: Place) -> None:
        """See `Digest`."""
        self._pending.append(self._pool.submit(self._digest.begin, name, place))

    def update(self, rows: Tensor) -> None:
        """See `Digest`; waits where many are pending."""
        self._pending.append(self._pool.submit(self._digest.update, rows))
        while len(self._pending) > _PENDING:
            self._pending.popleft().result()

    def hexdigest(self) -> str:
        """Of the whole base, once the context has ended."""
        return self._digest.hexdigest()


class _Baker:
    """The tensors of the model, rows by rows, and the sums over what changed.

    Args:
        target: What is written.
        result: What the step makes, in float32.
        base: Opened.
        hasher: Of the base.
        device: Where the algebra runs.

    Attributes:
        shares: Module -> share of its change that survives, of those that are done.
    """

    def __init__(self, target: BakeTarget, result: Result, base: CheckpointReader, hasher: _Hasher, device: torch.device):
        self._target, self._result, self._base, self._hasher, self._device = target, result, base, hasher, device
        self._sums, self._crossed, self._wanted = Sums(len(result.plan.inputs)), 0.0, 0.0
        self.shares: dict[str, float] = {}
        self._scales: dict[str, float] = {}  # key of a tensor in float8 -> what its numbers are multiplied with
        self._threads = torch.get_num_threads()
        self._workers = self._threads if device.type == "cpu" else 1
        self._pool = ThreadPoolExecutor(self._workers, initializer=torch.set_num_threads, initargs=(1,))

    def __enter__(self) -> _Baker:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)

    def rows(self, tensor: Written) -> Iterator[Tensor]:
        """All rows of a tensor of the model.

        Raises:
            ZitMergeError: It is too large for its dtype, or the base is broken.
        """
        if not tensor.parts:  # a scale, or the mark of a file that has them
            yield torch.tensor(self._scales[tensor.scale_of]) if tensor.scale_of else torch.zeros(2).to(STORED_DTYPES[SCALED])
            return
        dtype, changes = STORED_DTYPES.get(tensor.dtype), [self._change(name) for name, _ in tensor.parts]
        scale = self._scale(tensor, changes) if tensor.dtype == SCALED else 1.0
        for (name, place), change in zip(tensor.parts, changes, strict=True):
            is_hashed, pending = name in TENSORS, deque[Future[Tensor]]()
            if is_hashed:
                self._hasher.begin(name, place)
            for first, rows in self._chunks(place):
                if is_hashed:
                    self._hasher.update(rows)
                pending.append(self._pool.submit(self._changed, change, rows, first, dtype or rows.dtype, scale, name))
                while len(pending) > self._workers:
                    yield pending.popleft().result()
            yield from (one.result() for one in pending)
            if change:
                self._add(change)

    def _chunks(self, place: Place) -> Iterator[tuple[int, Tensor]]:
        """(number of the first row, some rows) of a tensor of the base."""
        first = 0
        for rows in self._base.chunks(place, _CHUNK.get(self._device.type, _CHUNK["cpu"])):
            yield first, rows
            first += len(rows) if rows.dim() else 0

    def _scale(self, tensor: Written, changes: Sequence[AddedChange | None]) -> float:
        """What the numbers of a tensor in float8 are multiplied with: its largest one is the largest that float8 has."""
        largest = 0.0
        for (_, place), change in zip(tensor.parts, changes, strict=True):
            for first, rows in self._chunks(place):
                rows = rows.to(self._device)
                changed = change.sum(rows, first)[1] if change else rows.float()
                largest = max(largest, peak(changed))
        self._scales[tensor.key] = largest / torch.finfo(STORED_DTYPES[SCALED]).max or 1.0
        return self._scales[tensor.key]

    def _changed(
        self, change: AddedChange | None, rows: Tensor, first: int, dtype: torch.dtype, scale: float, name: str
    ) -> Tensor:
        """Some rows of the output, on the CPU."""
        if change is None and dtype == rows.dtype:
            return rows
        rows, generator = rows.to(self._device), self._generator(f"{name} {first}")
        if change:
            found, is_whole = change.added(rows, first, dtype, scale, generator)
        else:
            found = rounded(rows.float() / scale, dtype, generator)
            is_whole = is_finite(found if found.dtype.itemsize > 1 else found.float())
        if not is_whole:
            cure = (
                "set dtype: bf16 or fp32" if dtype == torch.float16 else "the base or a LoRA holds NaN or infinity: get it again"
            )
            raise ZitMergeError(f"{self._target.path.name}: {name} is too large for a number: {cure}")
        return found.cpu()

    def verdict(self) -> Verdict:
        """Of the whole model."""
        share = self._crossed / self._wanted if self._wanted else None
        plan = self._result.plan
        return judged_bake(self._sums.verdict(bool(plan.cut)), share, averaged=bool(plan.spec.checkpoints))

    def _generator(self, place: str) -> torch.Generator | None:
        """Other draws in every place."""
        if self._target.spec.rounding == "nearest":
            return None
        return torch.Generator(self._device).manual_seed(zlib.crc32(f"{self._target.spec.seed} {place}".encode()))

    def _change(self, name: str) -> AddedChange | None:
        module = TENSORS[name].module if name in TENSORS else None
        if module is None or module not in self._result.plan.shapes:
            return None
        merged = self._result.answer(module)
        return AddedChange(merged, module in self._result.plan.cut) if merged.delta is not None else None

    def _add(self, change: AddedChange) -> None:
        crossed, size, energies = change.sums()
        if size:
            self.shares[change.module] = crossed / size
        self._crossed += crossed
        self._wanted += size
        self._sums.add(change.module, change.parts, change.products(energies[2]), change.want, energies)
