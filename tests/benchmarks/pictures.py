"""What pictures cost beside their rendering: the hook on a layer, the sheet, the measures, the page. One run, one table.

    python tests/benchmarks/pictures.py [--runs 5] [--pictures 24] [--device cpu]

The hook: one linear layer of Z-Image (3840 x 3840, bf16) on 4608 tokens, as of a picture of 1024 x 1024 pixels with a prompt of
512, without and with a LoRA of rank 32 and 128. The rest: random pictures of 1024 x 1024 pixels, smoothed so that they pack as
photographs do. Least, median and largest.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from extensions_built_in.zit_merge.algebra.factors import Factors
from extensions_built_in.zit_merge.host.render import adding
from extensions_built_in.zit_merge.model.zimage import MODULES
from extensions_built_in.zit_merge.preview.ablation import measure
from extensions_built_in.zit_merge.preview.groups import module_groups
from extensions_built_in.zit_merge.preview.settings import ImageSpec
from extensions_built_in.zit_merge.preview.sheet import Block, sheet
from extensions_built_in.zit_merge.report.page.galleries import Gallery, Preview
from extensions_built_in.zit_merge.report.page.render import Page

DIM, TOKENS = 3840, 4608


def timed(what: str, runs: int, work: Callable[[], object], device: torch.device) -> None:
    """Prints a row, in milliseconds."""
    found = []
    work()
    for _ in range(runs):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(1e3 * (time.perf_counter() - start))
    print(f"{what:<52}{min(found):10.1f}{statistics.median(found):10.1f}{max(found):10.1f} ms")


def time_hook(runs: int, device: torch.device) -> None:
    """A layer alone, and with LoRAs of two ranks."""
    torch.manual_seed(0)
    linear = nn.Linear(DIM, DIM, bias=False, dtype=torch.bfloat16, device=device)
    x = torch.randn(1, TOKENS, DIM, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        timed("layer", runs, lambda: linear(x), device)
        for rank in (32, 128):
            factors = Factors(*(torch.randn(shape, dtype=torch.bfloat16) * 0.01 for shape in ((DIM, rank), (rank, DIM))))
            hook = linear.register_forward_hook(adding(factors, device))
            timed(f"layer with a LoRA of rank {rank}", runs, lambda: linear(x), device)
            hook.remove()


def picture(seed: int) -> Image.Image:
    """1024 x 1024 random pixels at several scales."""
    torch.manual_seed(seed)
    layers = [nn.functional.interpolate(torch.rand(1, 3, s, s), size=1024, mode="bicubic") for s in (8, 32, 128, 512)]
    whole = (sum(layers) / len(layers)).clamp(0, 1)[0].permute(1, 2, 0).mul(255).byte()
    return Image.fromarray(whole.numpy())


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    time_hook(args.runs, device)
    count = args.pictures
    pictures = [picture(seed) for seed in range(count)]
    parts = module_groups("layers", count - 2, list(MODULES))[: count - 2]
    shares = dict(zip((part.name for part in parts), ([p] for p in pictures[2:]), strict=False))
    asked = {"groups": parts, "by": "layers", "mode": "leave_out", "lora": "x", "specs": [ImageSpec("a cat", 1)]}
    cpu = torch.device("cpu")
    timed(f"measures of {len(shares)} parts", args.runs, lambda: measure(shares, pictures[:1], pictures[1:2], **asked), cpu)
    tiles = [(f"part {n}", p) for n, p in enumerate(pictures)]
    timed(f"sheet of {count} pictures", args.runs, lambda: sheet("parts", [Block("a cat", tiles)], 8), cpu)
    with tempfile.TemporaryDirectory() as name:
        paths = [Path(name) / f"{n}.png" for n in range(count)]
        for path, p in zip(paths, pictures, strict=True):
            p.save(path)

        def page() -> None:
            whole = Page("benchmark")
            whole.begin("", {"type": "zit_merge", "steps": []})
            whole.show("", "x", Gallery("parts", "", [Preview("a cat", f"part {n}", p) for n, p in enumerate(paths)]))
            whole.write(Path(name) / "page.html")

        timed(f"page with {count} pictures", args.runs, page, cpu)
        print(f"{'size of the page':<52}{(Path(name) / 'page.html').stat().st_size / 1e3:10.0f} kB")


if __name__ == "__main__":
    main()
