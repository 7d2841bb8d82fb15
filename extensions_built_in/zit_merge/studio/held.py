"""Inputs that stay open while the studio is, and on a GPU their factors in its memory."""

from __future__ import annotations

import threading
from typing import Any

import torch

from ..algebra.delta import Delta, nbytes
from ..formats.reading import Reader
from ..merging.made import Hashes
from ..merging.readers import StepReaders
from ..planning.types import Input

BUDGET = 2_000_000_000  # bytes of factors that are held on a GPU at most
_SHARE = 8  # and no more than this part of what is free there


class HeldReaders(StepReaders):
    """Opens every input once.

    Args:
        hashes: Of every file that the steps read.
        device: Where the algebra runs.
        budget: Bytes of factors to hold there; None is what a GPU has room for, and nothing on a CPU, whose files are in memory.
    """

    def __init__(self, hashes: Hashes, device: torch.device, budget: int | None = None):
        super().__init__(hashes, device)
        self._opened: dict[tuple[Any, ...], Reader] = {}
        self.left, self.lock = _room(device) if budget is None else budget, threading.Lock()

    def of_input(self, i: Input) -> Reader:
        """See `StepReaders`."""
        key = (i.step.name if i.step else i.path, i.spec.alpha, i.spec.qkv, tuple(i.spec.drop), *(m.path for m in i.models))
        if key not in self._opened:
            reader = super().of_input(i)
            is_factors = i.step is None and "LoKr" not in i.known.algorithms  # one that stays a LoKr is read part by part
            self._opened[key] = _Held(reader, self) if is_factors and self.left else reader
        return self._opened[key]

    def on_device(self, delta: Delta) -> Delta:
        """A change where the algebra runs.

        Args:
            delta: As it was read.
        """
        return delta.map(lambda t: t.to(self._device))


class _Held:
    """A reader that reads a module once, as far as there is room for what it read.

    Args:
        reader: Reads.
        owner: Knows the device, and how much room is left on it.
    """

    def __init__(self, reader: Reader, owner: HeldReaders):
        self._reader, self._owner = reader, owner
        self._found: dict[str, tuple[float, Delta]] = {}

    def delta(self, module: str) -> tuple[float, Delta]:
        """See `Reader`."""
        if module in self._found:
            return self._found[module]
        scale, delta = self._reader.delta(module)
        size = nbytes(delta)
        with self._owner.lock:
            is_held = size <= self._owner.left
            self._owner.left -= size * is_held
        if is_held:
            self._found[module] = scale, self._owner.on_device(delta)
        return self._found.get(module, (scale, delta))


def _room(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return min(BUDGET, free // _SHARE)
