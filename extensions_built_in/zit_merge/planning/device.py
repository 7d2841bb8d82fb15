"""Where the algebra runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import SettingError

if TYPE_CHECKING:
    import torch


def pick_device(name: str) -> torch.device:
    """The device of `device:`. `auto` is the first CUDA GPU, else the CPU.

    Raises:
        SettingError: torch does not see the device that was named.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingError(f"{name}: torch sees {torch.cuda.device_count()} CUDA GPUs here: use auto or cpu", "device")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise SettingError("mps: torch sees no Apple GPU here: use auto or cpu", "device")
    return device
