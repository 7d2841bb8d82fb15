"""What the readers share: a tiny Z-Image whose linears are zero, so that after the LoRA their weights are its delta.

Imported before diffusers: it makes CUDA builds of torchvision importable beside a CPU-only torch.
"""

import argparse
import traceback
from collections.abc import Callable
from pathlib import Path

import host.shim  # noqa: F401
import torch
from host import tiny_zimage

Deltas = dict[str, torch.Tensor]


def zero_model() -> torch.nn.Module:
    """Diffusers' Z-Image, 30 layers of width 48; every nn.Linear is zero."""
    model = tiny_zimage.transformer().eval()
    zero_linears(model)
    return model


def zero_linears(model: torch.nn.Module) -> None:
    """Sets weights and biases to 0."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.zeros_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)


def weights(model: torch.nn.Module) -> Deltas:
    """The weight of every nn.Linear, by its name."""
    return {n: m.weight.detach().float().clone() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def main(name: str, version: str, read: Callable[[Path], Deltas], *words: str) -> None:
    """Reads every file that is named and writes `OUT/<stem>.pt` with the deltas, or `OUT/<stem>.txt` with the refusal.

    Args:
        name: Of the client.
        version: Of the client, left in `OUT/version`.
        read: Path of a LoRA -> diffusers module -> delta; may raise.
        words: The arguments; those of the command line if there are none.
    """
    parser = argparse.ArgumentParser(description=f"{name} reads LoRAs")
    parser.add_argument("out", type=Path)
    parser.add_argument("lora", type=Path, nargs="+")
    args = parser.parse_args(words or None)
    (args.out / "version").write_text(version, encoding="utf-8")
    for path in args.lora:
        try:
            torch.save(read(path), args.out / f"{path.stem}.part")
            (args.out / f"{path.stem}.part").rename(args.out / f"{path.stem}.pt")
        except Exception as e:  # a client may refuse a file in any way
            traceback.print_exc()
            (args.out / f"{path.stem}.txt").write_text(f"{type(e).__name__}: {e}", encoding="utf-8")
