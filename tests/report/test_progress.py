"""Progress: a bar on a real terminal, plain lines in a real file, nothing for what is quick. The clock is ours: nothing waits."""

from __future__ import annotations

import os
import re
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from extensions_built_in.zit_merge.config.job import load_job
from extensions_built_in.zit_merge.merging.runner import run_plans
from extensions_built_in.zit_merge.planning.job import plan_job
from extensions_built_in.zit_merge.report.progress import Bar, passing, watched

pty, fcntl, termios = (pytest.importorskip(name, reason="no terminals on Windows") for name in ("pty", "fcntl", "termios"))

LINE = re.compile(r"([ -~]+): (\d+)/(\d+) modules(?:, (\d+) (s|min) left)?")


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Of our lines, and of tqdm."""
    clock = Clock()
    monkeypatch.setattr("tqdm.std.time", clock)
    return clock


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """A pseudo-terminal as stderr; the function tells what was drawn on it."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    os.set_blocking(master, False)
    drawn = b""

    def read() -> str:
        nonlocal drawn
        stream.flush()
        try:
            while chunk := os.read(master, 1 << 16):
                drawn += chunk
        except BlockingIOError:
            pass
        return drawn.decode("ascii")

    with os.fdopen(slave, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        yield read
    os.close(master)


@contextmanager
def log(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """A file as stderr."""
    path = folder / "log.txt"
    with path.open("w", newline="") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        yield lambda: path.read_bytes().decode("ascii")


def step(name: str = "soft", modules: int = 240) -> SimpleNamespace:
    """As much of a plan as is looked at."""
    return SimpleNamespace(name=name, shapes=dict.fromkeys(range(modules)))


def run_bar(clock: Clock, seconds: float, modules: int = 240, name: str = "soft", quiet: bool = False) -> None:
    """A step whose modules take so long each."""
    with Bar(quiet, clock) as bar:
        bar.tick(step(name, modules), 0)
        for done in range(1, modules + 1):
            clock.now += seconds
            bar.tick(step(name, modules), done)


def run_watched(clock: Clock, seconds: float, modules: int = 240, name: str = "soft", quiet: bool = False) -> None:
    """The same through `watched`."""
    names = [f"layers.{i}" for i in range(modules)]
    seen = []
    for module in watched(name, quiet, clock)(names):
        clock.now += seconds
        seen.append(module)
    assert seen == names


both = pytest.mark.parametrize("run", [run_bar, run_watched])


# --- a log file ----------------------------------------------------------------------------------------------------------------


@both
def test_a_log_gets_few_plain_lines_with_counts_and_time_left(tmp_path, monkeypatch, clock, run):
    with log(tmp_path, monkeypatch) as read:
        run(clock, 0.25)  # a minute
        text = read()
    assert "\r" not in text and "\x1b" not in text and text.endswith("\n")
    found = [LINE.fullmatch(line) for line in text.splitlines()]
    assert all(found) and {m[1] for m in found} == {"soft"} and {m[3] for m in found} == {"240"}
    counts = [int(m[2]) for m in found]
    assert counts[0] == 4  # after a second
    assert [b - a for a, b in zip(counts, counts[1:], strict=False)] == [40] * (len(counts) - 1)  # ten seconds apart
    assert len(counts) == 6
    assert [(int(m[4]), m[5]) for m in found] == [(round(0.25 * (240 - n)), "s") for n in counts]


@both
def test_the_very_line(tmp_path, monkeypatch, clock, run):
    with log(tmp_path, monkeypatch) as read:
        run(clock, 1.0, modules=4)
        assert read().splitlines() == ["soft: 1/4 modules, 3 s left"]


@both
def test_lines_are_a_tenth_of_the_modules_apart_where_these_are_slow(tmp_path, monkeypatch, clock, run):
    with log(tmp_path, monkeypatch) as read:
        run(clock, 30.0)  # two hours
        counts = [int(n) for n in re.findall(r"(\d+)/240 modules", read())]
    assert counts == [1 + 24 * i for i in range(10)]


@both
@pytest.mark.parametrize("seconds", [0.9 / 240, 0.0])
def test_what_takes_under_a_second_has_no_line(tmp_path, monkeypatch, clock, run, seconds):
    with log(tmp_path, monkeypatch) as read:
        run(clock, seconds)
        assert read() == ""


@both
def test_a_last_module_alone_has_no_line(tmp_path, monkeypatch, clock, run):
    with log(tmp_path, monkeypatch) as read:
        run(clock, 5.0, modules=1)
        assert read() == ""


@both
def test_quiet_is_quiet(tmp_path, monkeypatch, clock, run):
    with log(tmp_path, monkeypatch) as read:
        run(clock, 10.0, quiet=True)
        assert read() == ""
    with terminal(monkeypatch) as read:
        run(clock, 10.0, quiet=True)
        assert read() == ""


@both
def test_names_steer_no_log(tmp_path, monkeypatch, clock, run):
    with log(tmp_path, monkeypatch) as read:
        run(clock, 1.0, modules=3, name="a\r\n\x1b[2J" + "貓" * 300)
        (line,) = read().splitlines()
    assert LINE.fullmatch(line) and len(line) < 80


def test_each_step_counts_from_its_own_start(tmp_path, monkeypatch, clock):
    with log(tmp_path, monkeypatch) as read:
        run_bar(clock, 0.1, modules=20, name="first")
        run_bar(clock, 0.04, modules=20, name="quick")
        run_bar(clock, 0.1, modules=20, name="third")
        assert [line.partition(":")[0] for line in read().splitlines()] == ["first", "third"]


def test_what_lies_between_two_steps_is_no_part_of_the_pace(tmp_path, monkeypatch, clock):
    with log(tmp_path, monkeypatch) as read, Bar(clock=clock) as bar:
        for _ in range(2):
            clock.now += 1000.0
            for done in range(1, 11):
                bar.tick(step(modules=10), done)
                clock.now += 1.0
            bar.close()
        assert read() == "soft: 2/10 modules, 8 s left\n" * 2


def test_the_settling_of_ranks_is_no_part_of_the_pace(tmp_path, monkeypatch, clock):
    """`tick(plan, 0)` comes for every module before the first one is written."""
    with log(tmp_path, monkeypatch) as read, Bar(clock=clock) as bar:
        for _ in range(100):
            clock.now += 1.0
            bar.tick(step(), 0)
        for done in range(1, 61):
            clock.now += 0.5
            bar.tick(step(), done)
        first, second, *_ = read().splitlines()
    assert first == "soft: 0/240 modules"
    assert second == "soft: 24/240 modules, 2 min left"


@pytest.mark.parametrize(
    ("seconds", "left"), [(1.0, "9 s"), (1.05, "10 s"), (11.0, "99 s"), (12.0, "2 min"), (600.0, "90 min"), (1000, "2 h 30 min")]
)
def test_time_left_in_words(tmp_path, monkeypatch, clock, seconds, left):
    with log(tmp_path, monkeypatch) as read, Bar(clock=clock) as bar:
        bar.tick(step(modules=10), 0)
        clock.now += seconds
        bar.tick(step(modules=10), 1)
        assert read() == f"soft: 1/10 modules, {left} left\n"


def test_a_process_without_stderr_goes_on(monkeypatch, clock, capsys):
    monkeypatch.setattr(sys, "stderr", None)  # pythonw
    run_bar(clock, 1.0)
    run_watched(clock, 1.0)
    assert capsys.readouterr().out == ""


def test_a_stream_that_does_not_know_whether_it_is_a_terminal_is_a_log(monkeypatch, clock):
    told: list[str] = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=told.append, flush=lambda: None))
    run_bar(clock, 1.0)
    assert told[0].startswith("soft: ") and "\r" not in "".join(told)


# --- a terminal ----------------------------------------------------------------------------------------------------------------


@both
def test_a_terminal_gets_a_bar_with_counts_and_time_left(monkeypatch, clock, run):
    with terminal(monkeypatch) as read:
        run(clock, 0.25)
        drawn = read()
    states = [s for s in drawn.replace("\n", "\r").split("\r") if s.strip()]
    assert drawn.count("\r") > 20 and drawn.count("\n") == 1  # drawn over and over in one line, and left standing
    assert all(s.startswith("soft: ") and s.isascii() for s in states)
    counts = [int(re.search(r" (\d+)/240 ", s)[1]) for s in states]
    assert counts == sorted(counts) and counts[0] >= 4 and counts[-1] == 240
    half = states[len(states) // 2]
    assert re.search(r"\[\d\d:\d\d<\d\d:\d\d, +\d\.\d\dmodule/s\]", half) and "#" in half


@both
def test_a_terminal_sees_nothing_of_what_takes_under_a_second(monkeypatch, clock, run):
    with terminal(monkeypatch) as read:
        run(clock, 0.9 / 240)
        assert read() == ""


def test_an_interrupted_bar_leaves_the_cursor_at_a_new_line(monkeypatch, clock):
    with terminal(monkeypatch) as read:
        with pytest.raises(KeyboardInterrupt), Bar(clock=clock) as bar:
            for done in range(1, 100):
                clock.now += 0.25
                bar.tick(step(), done)
            raise KeyboardInterrupt
        assert read().endswith("\n")


def test_a_pass_before_the_merge_counts_by_itself(tmp_path, monkeypatch, clock):
    with log(tmp_path, monkeypatch) as written:
        for _ in passing(False, clock)(step("soft", 40), "ranks", [str(n) for n in range(40)]):
            clock.now += 1.0
        lines = written().splitlines()
    assert lines[0] == "ranks of soft: 1/40 modules, 39 s left" and len(lines) <= 5
    assert all(line.startswith("ranks of soft: ") for line in lines)


ENERGY, KARCHER = {"rank": {"energy": 0.9}}, {"method": "karcher"}


@pytest.mark.parametrize("how", [ENERGY, KARCHER, KARCHER | ENERGY])
def test_a_merge_tells_its_passes(work, loras, how):
    """What is looked at before a merge goes by under its own name, module by module, before the first module is merged."""
    both = [{"lora": "me.safetensors", "ratio": 1}, {"lora": "style.safetensors", "ratio": 0.5}]
    (planned,), seen = plan_job(load_job(work.job({"name": "a", "loras": both} | how))), []

    def look(plan, what, modules):
        for module in modules:
            yield module
            seen.append(what)

    list(run_plans(planned.plans, planned.device, lambda plan, done: seen.append("merged"), look))
    passes = ["angles"] * ("method" in how) + ["ranks"] * ("rank" in how)
    assert seen == [what for name in passes for what in [name] * 240] + ["merged"] * 240


# --- pictures ------------------------------------------------------------------------------------------------------------------


def render(clock: Clock, quiet: bool = False) -> None:
    """Twelve pictures of ten seconds, the first of which waits for the model for a minute."""
    with Pictures(quiet, clock) as shown:
        clock.now += 60
        for done in range(1, 13):
            clock.now += 10
            shown.tick("soft", done, 12)


def test_pictures_are_counted_at_the_pace_of_rendering(tmp_path, monkeypatch, clock):
    with log(tmp_path, monkeypatch) as read:
        render(clock)
        lines = read().splitlines()
    assert all(re.fullmatch(r"pictures: \d+/12 pictures(, \d+ (s|min) left)?", line) for line in lines)
    (half,) = (line for line in lines if line.startswith("pictures: 6/12"))
    assert half == "pictures: 6/12 pictures, 60 s left", "the model's loading is no part of the pace"
    assert len(lines) <= 12


def test_pictures_on_a_terminal_and_quietly(monkeypatch, clock):
    with terminal(monkeypatch) as read:
        render(clock)
        drawn = read()
    assert "pictures:" in drawn and "12/12" in drawn and "picture" in drawn
    with terminal(monkeypatch) as read:
        render(clock, quiet=True)
        assert read() == ""
