"""A GPU that runs out of memory: the work is done again on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def else_on_cpu(work: Callable[[torch.device], T], device: torch.device) -> tuple[T, tuple[str, ...]]:
    """(what the work gives, what a person should hear of).

    Args:
        work: Leaves nothing behind where it fails; called with the device, and with the CPU if there is not enough memory.
        device: Where it is done.
    """
    try:
        return work(device), ()
    except RuntimeError as e:
        is_full = isinstance(e, torch.cuda.OutOfMemoryError) or "ALLOC_FAILED" in str(e)  # cuBLAS and cuSOLVER say the latter
        if device.type == "cpu" or not is_full:
            raise
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return work(torch.device("cpu")), (f"{device} ran out of memory, it was merged on the CPU",)
