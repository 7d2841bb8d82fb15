"""Progress: a bar on a real terminal, plain lines in a real file, nothing for what is quick. The clock is ours: nothing waits."""

from __future__ import annotations

import os
import re
import struct
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import pytest
from screen import fits
from workspace import merge_into

from extensions_built_in.zit_merge import load_lora, merge
from extensions_built_in.zit_merge.config.job import load_job
from extensions_built_in.zit_merge.merging.runner import run_plans
from extensions_built_in.zit_merge.planning.job import plan_job
from extensions_built_in.zit_merge.planning.types import StepPlan
from extensions_built_in.zit_merge.progress import Progress
from extensions_built_in.zit_merge.report.progress import Bar

pty, fcntl, termios = (pytest.importorskip(name, reason="no terminals on Windows") for name in ("pty", "fcntl", "termios"))

T = TypeVar("T")
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
def log(folder: Path, monkeypatch: pytest.MonkeyPatch, encoding: str = "ascii") -> Iterator[Callable[[], str]]:
    """A file as stderr."""
    path = folder / "log.txt"
    with path.open("w", newline="", encoding=encoding) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        yield lambda: path.read_bytes().decode(encoding)


def run(clock: Clock, seconds: float, modules: int = 240, name: str = "soft", quiet: bool = False) -> None:
    """A pass over modules that take so long each."""
    names = [f"layers.{i}" for i in range(modules)]
    seen = []
    for module in Bar(quiet, clock).track(names, name):
        clock.now += seconds
        seen.append(module)
    assert seen == names


# --- a log file ----------------------------------------------------------------------------------------------------------------


def test_a_log_gets_few_plain_lines_with_counts_and_time_left(tmp_path, monkeypatch, clock):
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


def test_the_very_line(tmp_path, monkeypatch, clock):
    with log(tmp_path, monkeypatch) as read:
        run(clock, 1.0, modules=4)
        assert read().splitlines() == ["soft: 1/4 modules, 3 s left"]


def test_lines_are_a_tenth_of_the_modules_apart_where_these_are_slow(tmp_path, monkeypatch, clock):
    with log(tmp_path, monkeypatch) as read:
        run(clock, 30.0)  # two hours
        counts = [int(n) for n in re.findall(r"(\d+)/240 modules", read())]
    assert counts == [1 + 24 * i for i in range(10)]


@pytest.mark.parametrize("seconds", [0.9 / 240, 0.0])
def test_what_takes_under_a_second_has_no_line(tmp_path, monkeypatch, clock, seconds):
    with log(tmp_path, monkeypatch) as read:
        run(clock, seconds)
        assert read() == ""


def test_a_last_module_alone_has_no_line(tmp_path, monkeypatch, clock):
    with log(tmp_path, monkeypatch) as read:
        run(clock, 5.0, modules=1)
        assert read() == ""


def test_quiet_is_quiet(tmp_path, monkeypatch, clock):
    with log(tmp_path, monkeypatch) as read:
        run(clock, 10.0, quiet=True)
        assert read() == ""
    with terminal(monkeypatch) as read:
        run(clock, 10.0, quiet=True)
        assert read() == ""


def test_names_steer_no_log(tmp_path, monkeypatch, clock):
    with log(tmp_path, monkeypatch, "utf-8") as read:
        run(clock, 1.0, modules=3, name="a\r\n\x1b[2J" + "貓" * 300)
        (line,) = read().splitlines()
    assert line.startswith("a \\x1b[2J貓貓") and line.endswith("貓: 1/3 modules, 2 s left") and fits(line, 60)


def test_a_log_gets_the_letters_that_it_has(tmp_path, monkeypatch, clock):
    with log(tmp_path, monkeypatch) as read:
        run(clock, 1.0, modules=3, name="貓")
        assert read().startswith("\\u8c93: 1/3 modules")


def test_each_step_counts_from_its_own_start(tmp_path, monkeypatch, clock):
    with log(tmp_path, monkeypatch) as read:
        run(clock, 0.1, modules=20, name="first")
        run(clock, 0.04, modules=20, name="quick")
        run(clock, 0.1, modules=20, name="third")
        assert [line.partition(":")[0] for line in read().splitlines()] == ["first", "third"]


def test_what_lies_between_two_steps_is_no_part_of_the_pace(tmp_path, monkeypatch, clock):
    bar = Bar(clock=clock)
    with log(tmp_path, monkeypatch) as read:
        for _ in range(2):
            clock.now += 1000.0
            for _ in bar.track(range(10), "soft"):
                clock.now += 1.0
        assert read() == "soft: 1/10 modules, 9 s left\n" * 2


def test_a_pass_before_the_merge_counts_by_itself_and_is_no_part_of_the_pace(tmp_path, monkeypatch, clock):
    bar = Bar(clock=clock)
    with log(tmp_path, monkeypatch) as read:
        for label, count, seconds in (("ranks of soft", 40, 1.0), ("soft", 60, 0.5)):
            for _ in bar.track(range(count), label):
                clock.now += seconds
        lines = read().splitlines()
    ranks = [line for line in lines if line.startswith("ranks of soft: ")]
    assert ranks[0] == "ranks of soft: 1/40 modules, 39 s left" and len(ranks) <= 5
    assert lines[len(ranks) :][0] == "soft: 2/60 modules, 29 s left"


@pytest.mark.parametrize(
    ("seconds", "left"), [(1.0, "9 s"), (1.05, "10 s"), (11.0, "99 s"), (12.0, "2 min"), (600.0, "90 min"), (1000, "2 h 30 min")]
)
def test_time_left_in_words(tmp_path, monkeypatch, clock, seconds, left):
    with log(tmp_path, monkeypatch) as read:
        items = Bar(clock=clock).track(range(10), "soft")
        next(items)
        clock.now += seconds
        next(items)
        assert read() == f"soft: 1/10 modules, {left} left\n"


def test_a_process_without_stderr_goes_on(monkeypatch, clock, capsys):
    monkeypatch.setattr(sys, "stderr", None)  # pythonw
    run(clock, 1.0)
    assert capsys.readouterr().out == ""


def test_a_stream_that_does_not_know_whether_it_is_a_terminal_is_a_log(monkeypatch, clock):
    told: list[str] = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=told.append, flush=lambda: None))
    run(clock, 1.0)
    assert told[0].startswith("soft: ") and "\r" not in "".join(told)


# --- a terminal ----------------------------------------------------------------------------------------------------------------


def test_a_terminal_gets_a_bar_with_counts_and_time_left(monkeypatch, clock):
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


def test_a_terminal_sees_nothing_of_what_takes_under_a_second(monkeypatch, clock):
    with terminal(monkeypatch) as read:
        run(clock, 0.9 / 240)
        assert read() == ""


def test_an_interrupted_bar_leaves_the_cursor_at_a_new_line(monkeypatch, clock):
    def interrupted(bar: Bar) -> None:
        for done in bar.track(range(240), "soft"):
            clock.now += 0.25
            if done == 100:
                raise KeyboardInterrupt

    bar = Bar(clock=clock)
    with terminal(monkeypatch) as read:
        with pytest.raises(KeyboardInterrupt):
            interrupted(bar)
        assert read().endswith("\n") and " 240/240 " not in read()
        run(clock, 0.25, modules=10)
        before = len(read())
        for _ in bar.track(range(10), "next"):
            clock.now += 1.0
        assert "next: " in read()[before:], "the same bar shows what comes after"


# --- the protocol --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("progress", [Progress(), Bar(quiet=True), Bar()], ids=["silent", "quiet", "bar"])
@pytest.mark.parametrize("items", [["b", "a", "c"], ("x",), {"k": 1, "j": 2}, range(4), []], ids=str)
def test_items_are_passed_on_in_order(progress, items):
    assert list(progress.track(items, "soft")) == list(items)
    assert list(progress.track(items, "pictures", "picture", describe=str)) == list(items)


def test_an_item_is_passed_on_before_the_next_is_asked_for(tmp_path, monkeypatch, clock):
    """Nothing is gathered, and an item is done when the next one is asked for."""
    with log(tmp_path, monkeypatch) as read:
        items = Bar(clock=clock).track(range(3), "soft")
        assert next(items) == 0
        clock.now += 5.0
        assert read() == ""
        assert next(items) == 1
        assert read() == "soft: 1/3 modules, 10 s left\n"


def test_a_pass_within_a_pass_is_not_shown(tmp_path, monkeypatch, clock):
    bar, seen = Bar(clock=clock), []
    with log(tmp_path, monkeypatch) as read:
        for outer in bar.track(range(3), "outer"):
            for inner in bar.track("ab", "inner"):
                clock.now += 5.0
                seen.append((outer, inner))
        assert seen == [(outer, inner) for outer in range(3) for inner in "ab"]
        assert read() == "outer: 1/3 modules, 20 s left\nouter: 2/3 modules, 10 s left\n"
        for _ in bar.track(range(3), "after"):
            clock.now += 5.0
        assert "after: 1/3 modules, 10 s left\n" in read()


class Passes(Progress):
    """Notes the label of every item that is done."""

    def __init__(self):
        self.seen: list[str] = []

    def track(
        self, items: Collection[T], label: str, unit: str = "module", describe: Callable[[T], str] | None = None
    ) -> Iterator[T]:
        for item in items:
            yield item
            self.seen.append(label)


ENERGY, KARCHER = {"rank": {"energy": 0.9}}, {"method": "karcher"}


@pytest.mark.parametrize("how", [ENERGY, KARCHER, KARCHER | ENERGY])
def test_a_merge_tells_its_passes(work, loras, how):
    """What is looked at before a merge goes by under its own name, module by module, before the first module is merged."""
    both = [{"lora": "me.safetensors", "ratio": 1}, {"lora": "style.safetensors", "ratio": 0.5}]
    (planned,), passes = plan_job(load_job(work.job({"name": "a", "loras": both} | how))), Passes()
    list(run_plans(planned.plans, planned.device, passes))
    before = ["angles of a"] * ("method" in how) + ["ranks of a"] * ("rank" in how)
    assert passes.seen == [label for name in [*before, "a"] for label in [name] * 240]


@pytest.mark.parametrize(
    "how", [{}, ENERGY, {"rank": {"size_mb": 0.12}, "uniform": False}, {"format": "comfyui"}, {"format": "diffusers"}], ids=str
)
def test_the_tick_of_a_merge_counts_modules(tmp_path, loras, how):
    """With 0 for each module of the passes before; those that a format fuses count too."""
    told: list[tuple[StepPlan, int]] = []
    described = merge([(loras[0], 1.0), (loras[1], 0.5)], shapes="free", device="cpu", **how)
    described.save(tmp_path / "out.safetensors", lambda plan, done: told.append((plan, done)))
    modules = len(load_lora(tmp_path / "out.safetensors"))
    counts = [done for _, done in told]
    assert counts == [0] * (modules if "rank" in how else 0) + list(range(1, modules + 1)) and modules == 240
    assert {plan.path for plan, _ in told} == {tmp_path / "out.safetensors"}


def test_a_tick_that_raises_stops_the_merge_and_nothing_is_left(tmp_path, loras):
    class Enough(Exception):
        pass

    def tick(plan: StepPlan, done: int) -> None:
        if done == 100:
            raise Enough

    out = merge_into(tmp_path, [(loras[0], 0.5)])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(Enough):
        merge([(loras[0], 1.0)], shapes="free", device="cpu").save(out, tick)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


# --- pictures ------------------------------------------------------------------------------------------------------------------


def render(clock: Clock, quiet: bool = False) -> None:
    """Twelve pictures of ten seconds, the first of which waits for the model for a minute."""
    for picture in Bar(quiet, clock).track(range(12), "pictures", "picture"):
        clock.now += 10 if picture else 70


def test_pictures_are_counted_at_the_pace_of_rendering(tmp_path, monkeypatch, clock):
    with log(tmp_path, monkeypatch) as read:
        render(clock)
        lines = read().splitlines()
    assert all(re.fullmatch(r"pictures: \d+/12 pictures(, \d+ (s|min) left)?", line) for line in lines)
    (half,) = (line for line in lines if line.startswith("pictures: 7/12"))
    assert half == "pictures: 7/12 pictures, 50 s left", "the model's loading is no part of the pace"
    assert len(lines) <= 12


def test_pictures_on_a_terminal_and_quietly(monkeypatch, clock):
    with terminal(monkeypatch) as read:
        render(clock)
        drawn = read()
    assert "pictures:" in drawn and "12/12" in drawn and "picture" in drawn
    with terminal(monkeypatch) as read:
        render(clock, quiet=True)
        assert read() == ""
