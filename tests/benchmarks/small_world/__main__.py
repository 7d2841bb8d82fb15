"""A small world in which merges can be judged: its pictures, its measures, its base. See README.md.

    python tests/benchmarks/small_world world [--count 24] [--out FILE.png]
    python tests/benchmarks/small_world base [--steps 1000] [--save-every 50] [--threads 1] [--folder DIR]

`base` goes on from its last checkpoint until --steps steps are done in all, and logs the loss at each save to `log.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from train import Base, Settings, default_folder, train


def base(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    trained = Base(Settings(seed=args.seed), args.folder)
    print(f"{trained.path}: {trained.step} steps done", flush=True)
    log = trained.path.with_name("log.jsonl")

    def saved(now: Base) -> None:
        recent = now.losses[-args.save_every :]
        line = json.dumps({"step": now.step, "loss": round(sum(recent) / len(recent), 4)})
        with log.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    for _ in train(trained, args.steps, args.save_every, saved):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    of = commands.add_parser("base")
    of.add_argument("--steps", type=int, default=1000)
    of.add_argument("--save-every", type=int, default=50)
    of.add_argument("--threads", type=int, default=1)
    of.add_argument("--seed", type=int, default=0)
    of.add_argument("--folder", type=Path, default=default_folder())
    of.set_defaults(run=base)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
