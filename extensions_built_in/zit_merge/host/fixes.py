"""`train_fixes`: what the user asks us to put right in the training of this one job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..planning.preflight import RESTARTS, restart_period
from ..planning.training import Training


class _Kept(dict):
    """Scheduler parameters in which the trainer can't put its number of steps: it writes total_iters in place before it makes
    the scheduler, and there total_iters would become the period."""

    def __setitem__(self, key: str, value: Any) -> None:
        """Everything but total_iters."""
        if key != "total_iters":
            super().__setitem__(key, value)


def apply(fixes: Sequence[str], trainer: Any, training: Training, loc: str) -> list[str]:
    """Prepares the trainer before it runs. Nothing of the toolkit itself is changed, so other jobs are not affected.

    Args:
        fixes: The section's train_fixes.
        trainer: The process before us.
        training: Its config.
        loc: Of train_fixes, for messages.

    Returns:
        What was done, a sentence each.

    Raises:
        ZitMergeError: The training's config has nothing to fix.
    """
    if RESTARTS not in fixes:
        return []
    period, parameters = restart_period(training, loc)
    trainer.train_config.lr_scheduler_params = _Kept(parameters, T_0=period)
    growth = parameters.get("T_mult", 1)
    longer = f", each cosine {growth} times as long as the one before" if growth != 1 else ""
    return [f"train_fixes: lr restarts after {period} steps{longer}; AI-Toolkit alone would never restart it"]
