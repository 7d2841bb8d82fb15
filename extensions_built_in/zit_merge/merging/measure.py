"""What a step's file would hold, without writing it."""

from __future__ import annotations

import torch

from ..algebra.precision import full_precision
from ..formats.verdict import Verdict
from ..planning.types import StepPlan
from ..progress import Progress
from .fallback import else_on_cpu
from .readers import StepReaders
from .verify import Verifier
from .write import threads_for


def measure_step(plan: StepPlan, readers: StepReaders, device: torch.device, progress: Progress) -> tuple[StepPlan, Verdict]:
    """What a step's file would hold: the same numbers and the same check, and no file.

    Args:
        plan: Final.
        readers: Open its inputs, and keep them open.
        device: Where the algebra runs.
        progress: Shows how far it is, and may stop it.

    Returns:
        The plan with the ranks that follow from the numbers, and what the check of the file would find.

    Raises:
        ZitMergeError: The step can't be made.
    """

    def measured(on: torch.device) -> tuple[StepPlan, Verdict]:
        with threads_for(plan, on) as workers, full_precision():
            result = readers.result(plan, on, progress, workers)
            with Verifier(result.plan) as verifier:
                for _, made in result.units(progress):
                    for one in made:
                        verifier.add(one)
            return result.plan, verifier.verdict()

    return else_on_cpu(measured, device)[0]
