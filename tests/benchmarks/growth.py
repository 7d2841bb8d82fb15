"""How the cost of a merge grows: over the number of LoRAs, over their rank, and beside other programs. One run, a few tables.

    python tests/benchmarks/growth.py [--counts 1 2 4 8 16 32] [--ranks 4 16 64 256] [--methods ...] [--runs 1]
        [--peers kohya qr peft-cat peft-svd peft-ties_svd] [--peer-counts 2] [--peer-modules 3] [--peer-python PYTHON]
        [--time-limit 1800] [--folder DIR] [--out FILE.json] [--plot FILE.png]
    python tests/benchmarks/growth.py --from FILE.json [--plot FILE.png]

Random LoRAs of Z-Image's real shapes (240 modules, bf16) are merged: any number of rank 32, and two of any rank; exactly, cut to
the rank of one, and by any other --methods. Beside each the same output bytes are copied and synced. Peers run with --peer-counts
LoRAs of rank 32; what they are, and which of them run on a few modules and are multiplied up, is told in growth_cases.py.

Every case has a process of its own. Seconds start after the imports; CPU seconds are those of all cores; memory is the highest
anonymous memory of the process above what it had before (Linux only: RssAnon, sampled every 5 ms). A case that is over the time
limit or is killed ends its line: larger ones are skipped, and the table says so. With --runs the run of median seconds is shown.
The default sizes need 20 GB on the disk. The JSON is written after every case.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from growth_cases import PEERS, SUMS, Job
from shared import make_lora

from extensions_built_in.zit_merge.model.zimage import N_LAYERS

RANK, PAIR = 32, 2  # of the cases over the number of LoRAs; of those over the rank


@dataclass(frozen=True)
class Case:
    """A point of a line: who merges, how many LoRAs, of which rank."""

    line: str
    count: int
    rank: int


# --- measuring -----------------------------------------------------------------------------------------------------------------


def cases(args: argparse.Namespace) -> list[Case]:
    """All of them, smaller ones first.

    Args:
        args: The command line.
    """
    points = {(count, RANK) for count in args.counts} | {(PAIR, rank) for rank in args.ranks}
    found = [Case(line, *point) for point in sorted(points) for line in (*SUMS, *args.methods)]
    return found + [Case(line, count, RANK) for count in sorted(args.peer_counts) for line in args.peers]


def lora_paths(case: Case, folder: Path, layers: int) -> list[str]:
    """The LoRAs of a case; those that are not there yet are made.

    Args:
        case: What is merged.
        folder: Where they are.
        layers: How many layers they have.
    """
    paths = [folder / f"rank{case.rank}_{seed}.safetensors" for seed in range(case.count)]
    for seed, path in enumerate(paths):
        if not path.exists():
            make_lora(path, case.rank, seed, layers)
    return [str(path) for path in paths]


def run_once(case: Case, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What one process has measured, or why it has not: `over`, `killed`, `failed` or `missing`.

    Args:
        case: What is merged.
        args: The command line.
        folder: With the LoRAs.
    """
    paths = lora_paths(case, folder, args.layers)
    python = args.peer_python if case.line in PEERS else sys.executable
    with tempfile.TemporaryDirectory(dir=folder) as place:
        job = Job(case.line, paths, place, case.rank, args.layers, args.peer_modules, args.device)
        command = [python, str(Path(__file__).with_name("growth_cases.py")), json.dumps(asdict(job))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=args.time_limit)
        except subprocess.TimeoutExpired:
            return {"over": args.time_limit}
    if done.returncode < 0:
        return {"killed": -done.returncode}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def run(case: Case, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The run of median seconds, with the seconds of all.

    Args:
        case: What is merged.
        args: The command line.
        folder: With the LoRAs.
    """
    found: list[dict[str, Any]] = []
    for _ in range(args.runs):
        figures = run_once(case, args, folder)
        if "seconds" not in figures:
            return figures
        found.append(figures)
    found.sort(key=lambda f: f["seconds"])
    return found[len(found) // 2] | {"all_seconds": [f["seconds"] for f in found]}


def measured(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Every case, once it is done or skipped.

    Args:
        args: The command line.
        folder: For all files.
    """
    ended: list[Case] = []
    for case in cases(args):
        if any(case.line == e.line and case.count >= e.count and case.rank >= e.rank for e in ended):
            yield asdict(case) | {"skipped": True}
            continue
        figures = run(case, args, folder)
        if figures.keys() & {"over", "killed"}:
            ended.append(case)
        yield asdict(case) | figures


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on.

    Args:
        args: The command line.
    """
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": args.device,
        "layers": args.layers,
        "runs": args.runs,
    }


# --- the tables ----------------------------------------------------------------------------------------------------------------


def title(line: str) -> str:
    """A line as people read it.

    Args:
        line: Its key.
    """
    return PEERS[line].title if line in PEERS else SUMS.get(line, f"{line}, cut to the rank")


def seconds(value: float | None) -> str:
    """With as many digits as make sense.

    Args:
        value: Nothing where there is none.
    """
    return "–" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def megabytes(value: float | None) -> str:
    """Whole ones.

    Args:
        value: In bytes; nothing where there is none.
    """
    return "–" if value is None else f"{value / 1e6:.0f}"


def remark(result: dict[str, Any]) -> str:
    """What must be known about a row.

    Args:
        result: Of one case.
    """
    said = []
    if "over" in result:
        said.append("over the time limit")
    if "killed" in result:
        said.append(f"killed by signal {result['killed']}")
    if "skipped" in result:
        said.append("skipped: a smaller one of this line was over the limit or killed")
    if "failed" in result:
        said.append(f"failed: {result['failed']}")
    if "missing" in result:
        said.append(f"not run: {result['missing']} is not installed")
    if result.get("modules", 0) < result.get("of", 0):
        said.append(f"extrapolated from {result['modules']} modules to {result['of']}")
        said.append("memory: measured on one module + computed, what is held of the others")
    if "version" in result:
        said.append(result["version"])
    return "; ".join(said)


def row(result: dict[str, Any]) -> str:
    """One case in Markdown.

    Args:
        result: Of the case.
    """
    peak = megabytes(result.get("peak")) + (f" + {megabytes(result['held'])}" if "held" in result else "")
    cells = [
        title(result["line"]),
        str(result["count"]),
        str(result["rank"]),
        f"> {result['over']:g}" if "over" in result else seconds(result.get("seconds")),
        seconds(result.get("cpu")),
        peak,
        megabytes(result.get("output")),
        seconds(result.get("copy")),
        remark(result),
    ]
    return f"| {' | '.join(cells)} |"


def table(heading: str, results: Sequence[dict[str, Any]], lines: Sequence[str]) -> None:
    """Prints one table, a line's rows together; nothing where there are no rows.

    Args:
        heading: Above it.
        results: Those that belong into it, smaller ones first.
        lines: The order of the lines.
    """
    rows = [row(r) for line in lines for r in results if r["line"] == line]
    if rows:
        print(f"\n{heading}\n")
        print("| | LoRAs | rank | seconds | CPU seconds | peak MB | output MB | its bytes copied and synced, s | |")
        print("|---|---|---|---|---|---|---|---|---|")
        print("\n".join(rows))


def show(data: dict[str, Any], plot: Path | None) -> None:
    """Prints the tables and draws the figure.

    Args:
        data: As in the JSON.
        plot: The figure's file, if one is wanted.
    """
    where, results = data["machine"], data["results"]
    modules = 8 * where["layers"]
    print(
        f"{modules} modules, bf16; {where['processor']}, {where['cores']} cores, {where['threads']} threads, "
        f"torch {where['torch']}, device {where['device']}, runs: {where['runs']}"
    )
    lines = list(dict.fromkeys(r["line"] for r in results))
    mine = [r for r in results if r["line"] not in PEERS]
    table(f"Over the number of LoRAs, rank {RANK}", [r for r in mine if r["rank"] == RANK], lines)
    table(f"Over the rank, {PAIR} LoRAs", [r for r in mine if r["count"] == PAIR], lines)
    table("Other ways", [r for r in results if r["line"] in PEERS], lines)
    if plot:
        from growth_figure import draw

        draw(results, RANK, PAIR, plot)


# --- the command line ----------------------------------------------------------------------------------------------------------


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32], help=f"numbers of LoRAs of rank {RANK}")
    parser.add_argument("--ranks", type=int, nargs="*", default=[4, 16, 64, 256], help=f"ranks of {PAIR} LoRAs")
    parser.add_argument("--methods", nargs="*", default=[], help="further methods, cut to the rank")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument(
        "--peer-counts", type=int, nargs="*", default=[PAIR], help=f"numbers of LoRAs of rank {RANK} for the peers"
    )
    parser.add_argument("--peer-modules", type=int, choices=(3, 4), default=3, help="that are measured where it is extrapolated")
    parser.add_argument("--peer-python", default=sys.executable, help="with torch, safetensors and peft")
    parser.add_argument("--time-limit", type=float, default=1800, help="seconds for the process of one case")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--layers", type=int, default=N_LAYERS, help="of the model; fewer to try the benchmark itself")
    parser.add_argument("--device", default="cpu", help="where our merges run; memory is the host's")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: a temporary folder")
    parser.add_argument("--out", type=Path, help="a JSON file for all figures")
    parser.add_argument("--plot", type=Path, help="a picture of them")
    parser.add_argument("--from", dest="source", type=Path, help="measure nothing: show this JSON file")
    return parser.parse_args()


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    """Runs everything, tells on stderr what is done, and writes the JSON.

    Args:
        args: The command line.
    """
    data: dict[str, Any] = {"machine": machine(args), "results": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        for result in measured(args, Path(name)):
            data["results"].append(result)
            print(row(result), file=sys.stderr, flush=True)
            if args.out:
                args.out.write_text(json.dumps(data, indent=1) + "\n")
    return data


def main() -> None:
    """Measures or reads, then prints and draws."""
    args = parsed()
    show(json.loads(args.source.read_text()) if args.source else measure_all(args), args.plot)


if __name__ == "__main__":
    main()
