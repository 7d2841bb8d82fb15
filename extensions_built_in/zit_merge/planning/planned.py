"""A section that can run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ..config.schema import Section
from .context import RunContext
from .device import pick_device
from .types import StepPlan

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Planned:
    """A section that can run.

    Attributes:
        index: Which process it is.
        section: Validated.
        context: Where it runs.
        plans: Of its steps, in order.
        placed: The device that was chosen for it; None is what its `device` is here.
        advice: On the training before it, a sentence each.
    """

    index: int
    section: Section
    context: RunContext
    plans: Sequence[StepPlan]
    placed: torch.device | None = None
    advice: Sequence[str] = ()

    @cached_property
    def device(self) -> torch.device:
        """Where the algebra runs."""
        found = self.placed or pick_device(self.section.device)
        if found.type != "mps":
            return found
        import torch

        return torch.device("cpu")  # MPS has no float64
