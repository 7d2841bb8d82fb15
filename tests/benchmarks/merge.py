"""How long a merge of two full-size LoRAs takes, how much memory, how close to the optimum. One run, one table.

    python tests/benchmarks/merge.py [--rank 32] [--device cpu] [--runs 3] [--folder DIR]

Two random LoRAs of Z-Image's real shapes (240 modules, bf16) are merged exactly and truncated to their rank; beside them the same
output bytes are copied and synced. Times start after the imports; the median of the runs is shown. Memory is the highest
anonymous memory of the process above what it had before the merge (Linux only: RssAnon, sampled every 5 ms).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from shared import make_lora, measure, synced_copy

from extensions_built_in.zit_merge import load_lora, merge


def excess(paths: list[Path], out: Path, rank: int) -> tuple[float, str]:
    """max over modules of (error of the file / smallest possible error - 1), in float64 through QR of the stacked factors."""
    loras, merged = [load_lora(p) for p in paths], load_lora(out)
    worst = 0.0, ""
    for module in merged:
        parts = [lora[module] for lora in loras]
        up = torch.cat([p.up.double() for p in parts], 1)
        down = torch.cat([p.down.double() for p in parts], 0)
        best = torch.linalg.svdvals(torch.linalg.qr(up)[1] @ torch.linalg.qr(down.T)[1].T)[rank:].norm()
        got = merged[module]
        both_up, both_down = torch.cat([up, -got.up.double()], 1), torch.cat([down, got.down.double()], 0)
        error = (torch.linalg.qr(both_up)[1] @ torch.linalg.qr(both_down.T)[1].T).norm()
        worst = max(worst, (float(error / best - 1), module))
    return worst


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        paths = [folder / "a.safetensors", folder / "b.safetensors"]
        for seed, path in enumerate(paths):
            make_lora(path, args.rank, seed)
        weighed = [(paths[0], 0.9), (paths[1], {"ratio": 0.6, "blocks": {"attention": 0.8}})]
        exact, cut, precise = folder / "exact.safetensors", folder / "cut.safetensors", folder / "precise.safetensors"
        work = {
            "merged exactly, bf16": lambda: merge(weighed, device=args.device).save(exact),
            "the same bytes copied and synced": lambda: synced_copy(exact, folder / "copy.safetensors"),
            f"truncated to rank {args.rank}, bf16": lambda: merge(weighed, rank=args.rank, device=args.device).save(cut),
        }
        figures = {what: [] for what in work}
        for run in range(args.runs):
            for what, do in work.items():
                figures[what].append(measure(do))
            for made in (exact, cut):
                if run + 1 < args.runs:
                    made.unlink()  # what is there from the same recipe is not made again
        print(
            f"two LoRAs of rank {args.rank}, 240 modules, {paths[0].stat().st_size / 1e6:.0f} MB each; torch {torch.__version__},"
        )
        print(
            f"{torch.get_num_threads()} threads, device {args.device}, {args.runs} runs, output "
            f"{exact.stat().st_size / 1e6:.0f} MB\n"
        )
        print(f"{'':<36}{'seconds (min median max)':>28}{'peak MB':>10}")
        for what, runs in figures.items():
            times = sorted(t for t, _ in runs)
            shown = f"{times[0]:.2f} {statistics.median(times):.2f} {times[-1]:.2f}"
            print(f"{what:<36}{shown:>28}{max(m for _, m in runs) / 1e6:>10.0f}")
        plain = [(paths[0], 1.0), (paths[1], 1.0)]
        merge(plain, rank=args.rank, dtype="fp32", device=args.device).save(precise)
        worst, module = excess(paths, precise, args.rank)
        print(f"\nexcess error over the float64 optimum, worst of 240 modules (fp32 file): {worst:.1e} ({module})")


if __name__ == "__main__":
    main()
