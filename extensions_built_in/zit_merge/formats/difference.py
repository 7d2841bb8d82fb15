"""What a fine-tune changed: the difference of two transformers, read module by module like a LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ZitMergeError
from .checkpoint import Checkpoint, CheckpointReader
from .header import DTYPES, common_dtype
from .spec import LoraSpec

if TYPE_CHECKING:
    from torch import Tensor

    from ..algebra.factors import Factors

DIFFERENCE = "difference of two models"


@dataclass(frozen=True)
class Difference:
    """Two transformers of one shape.

    Attributes:
        tuned: What was trained.
        base: What it was trained from.
    """

    tuned: Checkpoint
    base: Checkpoint

    @property
    def path(self) -> Path:
        """Of what was trained."""
        return self.tuned.path

    @property
    def known(self) -> LoraSpec:
        """Every weight, at full rank."""
        dtype = common_dtype(DTYPES[place.dtype] for place in self.tuned.places.values())
        return LoraSpec({m: min(shape) for m, shape in self.tuned.shapes.items()}, self.tuned.shapes, dtype, (DIFFERENCE,))


def difference(tuned: Checkpoint, base: Checkpoint) -> Difference:
    """The difference of two models.

    Raises:
        ZitMergeError: They are not of one shape, or one and the same.
    """
    if tuned.stamp == base.stamp:
        raise ZitMergeError(
            f"{tuned.path} and its base are one model: give the one that was trained, and the one it started from"
        )
    for name in dict.fromkeys((*base.places, *tuned.places)):
        shapes = [c.places[name].shape if name in c.places else None for c in (tuned, base)]
        if shapes[0] != shapes[1]:
            told = ["not there" if s is None else " x ".join(map(str, s)) for s in shapes]
            raise ZitMergeError(
                f"{name} is {told[0]} in {tuned.path.name}, {told[1]} in {base.path.name}: "
                "the two are not a fine-tune and its base"
            )
    return Difference(tuned, base)


class DifferenceReader:
    """The opened files of two transformers, still those that were described."""

    def __init__(self, pair: Difference):
        self._pair, self._stack = pair, ExitStack()
        with ExitStack() as stack:
            self._tuned, self._base = (stack.enter_context(CheckpointReader(c)) for c in (pair.tuned, pair.base))
            self._stack = stack.pop_all()

    def __enter__(self) -> DifferenceReader:
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.__exit__(*exc)

    def delta(self, module: str) -> tuple[float, Factors]:
        """(1.0, tuned - base in float32, (out, in)); a single zero component where the two are equal.

        Raises:
            ZitMergeError: A weight is not finite.
        """
        import torch

        from ..algebra.factors import Factors, whole

        found = self._of(f"{module}.weight")
        if found is None:
            out, into = self._pair.tuned.shapes[module]
            return 1.0, Factors(torch.zeros(out, 1), torch.zeros(1, into))
        return 1.0, whole(found)

    def tuned_weight(self, module: str) -> Tensor:
        """(out, in) of what was trained, as stored."""
        return self._tuned.weight(module)

    def vectors(self) -> Mapping[str, float]:
        """Tensor that is no weight of a linear layer -> squared norm of its difference, where there is one."""
        found = {}
        for name in self._pair.tuned.places:
            module = name.removesuffix(".weight")
            if module not in self._pair.tuned.shapes and (delta := self._of(name)) is not None:
                found[name] = float(delta.double().square().sum())
        return found

    def _of(self, name: str) -> Tensor | None:
        """The difference in float32; None where the two are equal."""
        import torch

        from ..algebra.factors import is_finite

        tuned, base = (r.rows(r.checkpoint.places[name]) for r in (self._tuned, self._base))
        if tuned.dtype == base.dtype and torch.equal(tuned, base):
            return None
        found = tuned.to(torch.float32, copy=True).sub_(base)
        if not is_finite(found):
            raise ZitMergeError(f"{self._pair.path}: {name} holds NaN or infinity, or its base does: get the two models again")
        return found
