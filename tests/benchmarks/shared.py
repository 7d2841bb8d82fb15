"""What the benchmarks share: random LoRAs, the plain copy beside a merge, seconds and memory of a piece of work."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from extensions_built_in.zit_merge.model.zimage import MODULES, N_LAYERS, Module


def layer_modules(layers: int = N_LAYERS) -> list[Module]:
    """The eight modules of each of the first layers; 240 of the whole model.

    Args:
        layers: How many.
    """
    return [m for m in MODULES.values() if m.section == "layers" and m.index < layers]


def make_lora(path: Path, rank: int, seed: int, layers: int = N_LAYERS) -> None:
    """A random LoRA as AI-Toolkit writes it.

    Args:
        path: The file.
        rank: Of every module.
        seed: Of the random numbers.
        layers: How many of the first layers it changes.
    """
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in layer_modules(layers):
        out, into = module.shape()
        tensors[f"diffusion_model.{module.name}.lora_A.weight"] = (torch.randn(rank, into, generator=random) * 0.02).bfloat16()
        tensors[f"diffusion_model.{module.name}.lora_B.weight"] = (torch.randn(out, rank, generator=random) * 0.02).bfloat16()
    save_file(tensors, path)


def synced_copy(source: Path, target: Path) -> None:
    """The plain way to get these bytes onto the disk.

    Args:
        source: What to copy.
        target: The copy; replaced if it is there.
    """
    with source.open("rb") as read, target.open("wb") as written:
        while chunk := read.read(1 << 22):
            written.write(chunk)
        written.flush()
        os.fsync(written.fileno())


def anonymous() -> int:
    """Anonymous memory of this process in bytes; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def measure(work: Callable[[], object]) -> tuple[float, int]:
    """(seconds, peak anonymous bytes above the start).

    Args:
        work: What is measured; called once.
    """
    start_memory, peak, done = anonymous(), [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous() - start_memory)

    thread = threading.Thread(target=sample)
    thread.start()
    start = time.perf_counter()
    try:
        work()
        seconds = time.perf_counter() - start
    finally:
        done.set()
        thread.join()
    return seconds, peak[0]
