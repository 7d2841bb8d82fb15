"""What all campaigns share: a folder with LoRAs and a config, and the command line in processes of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import TracebackType

import pairs
import torch
import yaml

from extensions_built_in.zit_merge.cli.main import main

torch.set_num_threads(1)  # a process that forks must not have threads of its own
_PATIENCE = 60.0  # seconds; the slowest case takes a few


@dataclass
class Tally:
    """What came of a campaign.

    Attributes:
        name: Of the campaign.
        planned: Cases.
        outcomes: How they ended -> how often.
        broken: (number of the case, what broke).
        note: Why cases are missing.
    """

    name: str
    planned: int
    outcomes: Counter[str] = field(default_factory=Counter)
    broken: list[tuple[int, str]] = field(default_factory=list)
    seconds: float = 0.0
    note: str = ""

    def add(self, number: int, outcome: str, broken: str) -> None:
        """Counts a case; `broken` is empty where every promise held."""
        if number >= 0:
            self.outcomes[outcome] += 1
        if broken:
            self.broken.append((number, broken))

    def line(self) -> str:
        """A row of the table."""
        ended = ", ".join(f"{count} {outcome}" for outcome, count in self.outcomes.most_common())
        missing = f"; {self.planned - self.outcomes.total()} not run: {self.note}" if self.note else ""
        return f"{self.name:10} {self.outcomes.total():7} {len(self.broken):7} {self.seconds:8.0f}  {ended}{missing}"


Case = tuple[int, str, str]  # number, how it ended, what broke


class Campaign:
    """One way of trying to break a promise.

    Attributes:
        batch: Cases that are handed over at once.
        impossible: Why this machine can't run it, or nothing.
    """

    batch = 1
    impossible = ""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True)

    def __enter__(self) -> Campaign:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def tried(self, numbers: range, random: Callable[[int], Random]) -> Iterator[Case]:
        """The cases, each as it ended."""
        for number in numbers:
            yield (number, *self.case(random(number)))

    def case(self, random: Random) -> tuple[str, str]:
        """(how it ended, what broke or nothing)."""
        raise NotImplementedError

    def at_end(self) -> str:
        """What is broken after all cases, or nothing."""
        return ""


@dataclass(frozen=True)
class Ended:
    """A process that has ended.

    Attributes:
        code: Its exit code; negative: the signal.
        err: stderr.
    """

    code: int
    err: str

    @property
    def how(self) -> str:
        """In a word or two, for the table."""
        return {0: "done", 1: "refused", -signal.SIGKILL: "killed"}.get(self.code, f"exit {self.code}")

    def broken(self) -> str:
        """What is wrong with how it ended, or nothing: done in silence, or one sentence that begins with the program's name."""
        last = self.err.strip().splitlines()[-1:] or [""]
        if "Traceback" in self.err or self.code not in (0, 1) or (self.code == 1 and not last[0].startswith("zit_merge: ")):
            return f"exit {self.code}\n{self.err[-2000:]}"
        return ""


class Process:
    """The command line in a process of its own, forked from this one so that it starts at once."""

    def __init__(self, words: Sequence[str], folder: Path):
        self._err = folder / f"err{time.monotonic_ns()}"
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            with contextlib.suppress(BaseException):
                os.setsid()
                os.chdir(folder)
                err = os.open(self._err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(err, 2)
                try:
                    code = main(words)
                except BaseException:
                    import traceback

                    traceback.print_exc()
                    code = 98
            os._exit(code)

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def end(self) -> Ended:
        """Waits for it; a process that hangs is killed after a minute, which shows as exit -9."""
        patience = time.monotonic() + _PATIENCE
        while not (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.monotonic() > patience:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.002)
        err = self._err.read_text(errors="replace") if self._err.exists() else ""
        self._err.unlink(missing_ok=True)
        return Ended(os.waitstatus_to_exitcode(found[1]), err)


def zit_merge(folder: Path, *words: str) -> Ended:
    """A command from start to end."""
    return Process(words, folder).end()


MODULES = {  # a few modules large enough that a merge takes some tenths of a second
    f"layers.{layer}.{path}": (4 * out, 4 * into) for layer in range(6) for path, (out, into) in pairs.BLOCK.items()
}


def lora(path: Path, seed: int, rank: int = 8) -> Path:
    """Writes a random LoRA."""
    return pairs.write(path, pairs.lora(rank, seed, alpha=4, modules=MODULES))


def config(path: Path, ratio: float = 1.0, copy_to: str = "") -> Path:
    """A config of three steps over a.safetensors and b.safetensors beside it: a sum, one that only feeds, one that cuts."""
    inputs = [{"lora": "a.safetensors", "ratio": ratio}, {"lora": "b.safetensors", "ratio": 0.5}]
    copied = {"copy_to": copy_to} if copy_to else {}
    steps: list[dict[str, object]] = [
        {"name": "sum", "loras": inputs, **copied},
        {"name": "feeds", "keep": False, "loras": [{"lora": "sum", "ratio": 2.0}]},
        {"name": "cut", "rank": 4, "loras": [{"lora": "feeds", "ratio": 0.5}, inputs[1]], **copied},
    ]
    process = {"type": "zit_merge", "device": "cpu", "output_dir": "out", "shapes": "free", "steps": steps}
    job = {"job": "extension", "config": {"name": "job", "process": [process]}}
    path.write_text(yaml.safe_dump(job, sort_keys=False), encoding="utf-8")
    return path


OUTPUTS = ("merged_job_sum.safetensors", "merged_job_cut.safetensors")


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of every file in a folder; empty where there is none."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()} if folder.is_dir() else {}


def strangers(folder: Path, allowed: Sequence[str]) -> list[str]:
    """Names in a folder that nobody should have left there."""
    return sorted(set(os.listdir(folder)) - set(allowed)) if folder.is_dir() else []
