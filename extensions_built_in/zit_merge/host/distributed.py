"""The processes of an `accelerate launch` as workers."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from ..preview.runner import Workers
from . import toolkit

_PATIENCE = timedelta(days=1)  # some have more to render or a slower GPU; torch's own, ten minutes, ends the run


class AccelerateWorkers(Workers):
    """Divides work with accelerate's own means, over the processes that the toolkit's accelerator knows.

    Attributes:
        heard: What all processes have been told by one of them.
    """

    def __init__(self):
        self.heard = set[str]()
        toolkit.part("toolkit.accelerator", "get_accelerator")
        from accelerate import Accelerator, InitProcessGroupKwargs

        Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)])  # the toolkit's, made now, shares its processes
        self._accelerator = toolkit.accelerator()

    @property
    def is_main(self) -> bool:
        """Whether this process writes what all of them have made."""
        return self._accelerator.is_main_process

    @property
    def is_alone(self) -> bool:
        """Whether there is no other process to wait for."""
        return self._accelerator.num_processes == 1

    def share(self, count: int) -> int:
        """How much of so much work falls to this process, about."""
        return -(-count // self._accelerator.num_processes)

    def mine(self, work: Sequence[Any]) -> Sequence[Any]:
        """A run of neighbours, so that pictures of one LoRA stay together."""
        with self._accelerator.split_between_processes(list(work)) as part:
            return part

    def gather(self, answers: Sequence[str]) -> list[str]:
        """Waits for all."""
        from accelerate.utils import gather_object

        found = gather_object(list(answers))
        self.heard.update(found)
        return found
