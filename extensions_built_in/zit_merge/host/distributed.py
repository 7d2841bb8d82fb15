"""The processes of an `accelerate launch` as workers that render pictures."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from ..preview.rendering import Workers
from . import toolkit

_TIMEOUT = timedelta(days=1)  # some have more to render or a slower GPU; torch's default of ten minutes would end the run


class AccelerateWorkers(Workers):
    """Divides work over the processes of the toolkit's accelerator.

    Attributes:
        heard: Every answer that was gathered.
    """

    def __init__(self):
        self.heard = set[str]()
        toolkit.part("toolkit.accelerator", "get_accelerator")
        from accelerate import Accelerator, InitProcessGroupKwargs

        Accelerator(
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_TIMEOUT)]
        )  # the toolkit's, created next, shares its processes
        self._accelerator = toolkit.accelerator()

    @property
    def is_main(self) -> bool:
        """Whether this process writes the outputs."""
        return self._accelerator.is_main_process

    @property
    def is_alone(self) -> bool:
        """Whether there are no other processes."""
        return self._accelerator.num_processes == 1

    def share(self, count: int) -> int:
        """How much of `count` pieces of work this process does, rounded up."""
        return -(-count // self._accelerator.num_processes)

    def mine(self, work: Sequence[Any]) -> Sequence[Any]:
        """A contiguous part, so that pictures of one LoRA stay together."""
        with self._accelerator.split_between_processes(list(work)) as part:
            return part

    def gather(self, answers: Sequence[str]) -> list[str]:
        """The answers of all processes, in each of them; waits for the last one."""
        from accelerate.utils import gather_object

        found = gather_object(list(answers))
        self.heard.update(found)
        return found
