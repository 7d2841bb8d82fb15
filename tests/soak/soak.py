"""Tries for as long as it is given to break what zit_merge promises: kills, full disks, races, inputs that change, mutated files.

    python tests/soak/soak.py [--short] [--minutes 60] [--seed 1] [--only kills,headers] [--case headers:123] [--folder DIR]

A table at the end says what was tried how often, how it ended, and what broke a promise; exit 1 if anything did. A case follows
from the seed, its campaign and its number: `--case` plays it again, though a kill then comes at the same moment by the clock
only. The promises are in extensions_built_in/zit_merge/docs/promises.md. Linux only: signals, fork, small file systems.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import zlib
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import changes
import disks
import kills
import mutants
import races
from world import Campaign, Tally

CAMPAIGNS: dict[str, type[Campaign]] = {
    "kills": kills.Kills,
    "disks": disks.Disks,
    "races": races.Races,
    "changes": changes.Changes,
    "headers": mutants.Headers,
    "bodies": mutants.Bodies,
    "configs": mutants.Configs,
    "recipes": mutants.Recipes,
    "pictures": mutants.Pictures,
}
# campaign -> cases: in full, and in the short form
CASES = {
    "kills": (300, 12),
    "disks": (60, 8),
    "races": (40, 4),
    "changes": (300, 12),
    "headers": (40_000, 400),
    "bodies": (20_000, 200),
    "configs": (20_000, 200),
    "recipes": (10_000, 100),
    "pictures": (10_000, 200),
}


def random_of(seed: int, campaign: str, number: int) -> Random:
    """The random numbers of one case."""
    return Random(zlib.crc32(f"{seed} {campaign} {number}".encode()))


def run(name: str, numbers: range, seed: int, until: float, folder: Path) -> Tally:
    """Cases of one campaign, until they are done or the time is over."""
    tally = Tally(name, len(numbers))
    started = time.monotonic()
    with CAMPAIGNS[name](folder / name) as campaign:
        if campaign.impossible:
            tally.note = campaign.impossible
            return tally
        for batch in range(numbers.start, numbers.stop, campaign.batch):
            if time.monotonic() > until:
                tally.note = "out of time"
                break
            some = range(batch, min(batch + campaign.batch, numbers.stop))
            for number, outcome, broken in campaign.tried(some, lambda n: random_of(seed, name, n)):
                tally.add(number, outcome, broken)
        if end := campaign.at_end():
            tally.add(-1, "at the end", end)
    tally.seconds = time.monotonic() - started
    return tally


def main() -> int:
    """Runs the campaigns and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few cases of each, about two minutes")
    parser.add_argument("--minutes", type=float, default=60, help="stop after these, shared by the campaigns that are left")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default=",".join(CAMPAIGNS), help="campaigns, with commas")
    parser.add_argument("--case", help="one case again: CAMPAIGN:NUMBER")
    parser.add_argument("--folder", type=Path, help="where the files lie; a temporary folder by default")
    args = parser.parse_args()
    names = [args.case.partition(":")[0]] if args.case else args.only.split(",")
    if unknown := set(names) - set(CAMPAIGNS):
        parser.error(f"no campaign {', '.join(sorted(unknown))}: choose from {', '.join(CAMPAIGNS)}")
    tallies = []
    end = time.monotonic() + args.minutes * 60
    with tempfile.TemporaryDirectory(prefix="soak") as temporary:
        folder = args.folder or Path(temporary)
        for i, name in enumerate(names):
            numbers = range(CASES[name][args.short])
            if args.case:
                number = int(args.case.partition(":")[2])
                numbers = range(number, number + 1)
            now = time.monotonic()
            tallies.append(run(name, numbers, args.seed, now + (end - now) / (len(names) - i), folder))
            print(tallies[-1].line(), flush=True)
    return report(tallies, args.seed)


def report(tallies: list[Tally], seed: int) -> int:
    """Prints what broke and the table; 1 if anything broke or was not run."""
    for tally in tallies:
        for number, text in tally.broken[:10]:
            print(f"\n{tally.name}:{number} (seed {seed})\n{text}")
    print(f"\nseed {seed}")
    print(f"{'campaign':10} {'cases':>7} {'broken':>7} {'seconds':>8}  ended")
    for tally in tallies:
        print(tally.line())
    return int(any(tally.broken for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
