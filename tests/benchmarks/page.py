"""How long the page of a run takes beside its merge, and how large it is. One run, one table.

    python tests/benchmarks/page.py [--rank 32] [--runs 5]

Two random LoRAs of Z-Image's real shapes (240 modules, bf16), one of them with a component at 0, are merged exactly; the page is
made from what the check measured, and again for the step that is kept, whose files are read anew. Seconds after the imports:
least, median and largest.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from shared import make_lora

from extensions_built_in.zit_merge import merge
from extensions_built_in.zit_merge.merging.runner import run_plans
from extensions_built_in.zit_merge.report.page.facts import step_facts
from extensions_built_in.zit_merge.report.page.render import Page


def measure(folder: Path, seconds: dict[str, list[float]]) -> int:
    """A merge, its page, and the page of the step when it is kept; bytes of the page."""
    settled = merge([(folder / "0.safetensors", 0.9), (folder / "1.safetensors", {"ratio": 0.6, "blocks": {"to_q": 0}})])
    plan = settled.plan(folder / "out.safetensors")
    for name in ("page", "page of a kept step"):
        start = time.perf_counter()
        (done,) = run_plans([plan], torch.device("cpu"))
        merged = time.perf_counter()
        page = Page("benchmark")
        page.begin("", {**settled.section, "steps": [{**settled.section["steps"][0], "name": plan.name}]})
        page.add(step_facts(done))
        page.write(folder / "page.html")
        seconds[name].append(time.perf_counter() - merged)
        if done.made:
            seconds["merge"].append(merged - start)
    plan.path.unlink()
    return (folder / "page.html").stat().st_size


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {"merge": [], "page": [], "page of a kept step": []}
    with tempfile.TemporaryDirectory() as name:
        for seed in range(2):
            make_lora(Path(name) / f"{seed}.safetensors", args.rank, seed)
        size = [measure(Path(name), seconds) for _ in range(args.runs)][-1]
    for what, found in seconds.items():
        print(f"{what:<22}{min(found):6.2f}{statistics.median(found):6.2f}{max(found):6.2f} s")
    print(f"{'size':<22}{size / 1e3:6.0f} kB")


if __name__ == "__main__":
    main()
