"""A progress bar for merges, in ASCII."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from tqdm import tqdm

from ..plan import StepPlan


class Bar:
    """`tick` for `run_plans`: one tqdm bar per step, on stderr, shown when it takes over a second."""

    def __init__(self, quiet: bool = False):
        self._quiet = quiet
        self._bar: tqdm | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def tick(self, plan: StepPlan, done: int) -> None:
        """Module `done` of the step is finished."""
        if self._bar is None:
            self._bar = tqdm(
                total=len(plan.shapes), desc=plan.name, unit="module", ascii=True, disable=self._quiet, delay=1, mininterval=0.5
            )
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Ends the step's bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def watched(title: str, quiet: bool) -> Callable[[Collection[str]], Iterable[str]]:
    """Passes modules on and shows a bar when that takes over a second.

    Args:
        title: What the bar is called.
        quiet: Show none.
    """
    return lambda modules: tqdm(modules, desc=title[:30], unit="module", ascii=True, disable=quiet, delay=1, mininterval=0.5)
