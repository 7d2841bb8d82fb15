"""The row of a merge-only job in a database that somebody else holds."""

import signal
import sqlite3
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from host.ui import make_database, row

from extensions_built_in.zit_merge.host import status, watch
from extensions_built_in.zit_merge.progress import SILENT


@pytest.mark.parametrize("journal", ["wal", "delete"])  # under the first one the row can be read while it can't be written
def test_a_lock_that_outlasts_our_wait_costs_that_one_write(tmp_path, monkeypatch, capsys, journal):
    monkeypatch.setattr(status, "_WAIT", 0.05)
    database = make_database(tmp_path / "aitk_db.db")
    other = sqlite3.connect(database, isolation_level=None)
    assert other.execute(f"PRAGMA journal_mode={journal}").fetchone() == (journal,)
    shown = status.RowStatus(database, "j1", is_last=True)
    other.execute("BEGIN EXCLUSIVE")
    shown.progress("Merging a: 1/2", 1, 2, "1 modules/s")
    shown.check()
    other.execute("COMMIT")
    assert row(database)["info"] == "Starting"
    assert "is locked, it may show an older state" in capsys.readouterr().out
    shown.progress("Merging a: 2/2", 2, 2, "1 modules/s")
    assert (row(database)["status"], row(database)["info"], row(database)["step"]) == ("running", "Merging a: 2/2", 2)
    shown.complete("2 merged")
    assert (row(database)["status"], row(database)["info"]) == ("completed", "2 merged")
    other.execute("UPDATE Job SET stop = 1")
    with pytest.raises(status.JobStopped) as stop:  # and a stop is seen again
        shown.check()
    assert row(database)["status"] == "completed", "the stop is written when all else is"
    shown.fail(stop.value)
    assert row(database)["status"] == "stopped"
    assert capsys.readouterr().out == ""
    other.close()


@pytest.fixture
def locked(tmp_path):
    """A database that somebody holds, and the connection that does."""
    database = make_database(tmp_path / "aitk_db.db")
    other = sqlite3.connect(database, isolation_level=None, check_same_thread=False)
    yield database, other
    other.close()


@pytest.mark.parametrize(
    "end, told",
    [
        (lambda shown: shown.complete("2 merged"), ("completed", "2 merged")),
        (lambda shown: shown.fail(ValueError("no room")), ("error", "no room")),
        (lambda shown: shown.fail(KeyboardInterrupt()), ("stopped", "Job stopped")),
    ],
)
def test_the_last_write_waits_longer_than_the_others(locked, monkeypatch, capsys, end, told):
    monkeypatch.setattr(status, "_WAIT", 0.05)
    monkeypatch.setattr(status, "_TRY", 0.05)
    database, other = locked
    shown = status.RowStatus(database, "j1", is_last=True)
    other.execute("BEGIN EXCLUSIVE")
    release = threading.Timer(1, other.execute, ["COMMIT"])
    release.start()
    end(shown)
    release.join()
    assert (row(database)["status"], row(database)["info"]) == told
    assert capsys.readouterr().out == ""


def test_a_last_write_that_never_gets_through_is_said_once(locked, monkeypatch, capsys):
    monkeypatch.setattr(status, "_LAST_WAIT", 0.3)
    monkeypatch.setattr(status, "_TRY", 0.05)
    database, other = locked
    shown = status.RowStatus(database, "j1", is_last=True)
    other.execute("BEGIN EXCLUSIVE")
    shown.complete("2 merged")
    (line,) = capsys.readouterr().out.splitlines()
    assert "is locked" in line and "may show the job as running from now on; it is completed" in line


def test_the_last_write_can_be_interrupted(locked, capsys):
    database, other = locked
    shown = status.RowStatus(database, "j1", is_last=True)
    other.execute("BEGIN EXCLUSIVE")
    start = time.monotonic()
    threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        shown.complete("2 merged")
    assert time.monotonic() - start < 10
    (line,) = capsys.readouterr().out.splitlines()
    assert "it is completed" in line


@pytest.mark.parametrize("column, end", [("stop", "stopped"), ("return_to_queue", "queued")])
@pytest.mark.parametrize(
    "show",
    [lambda shown: shown.say("Loading the model for pictures"), lambda shown: shown.progress("Merging a: 1/2", 1, 2, "1/s")],
)
def test_a_stop_just_before_a_write_is_not_overwritten(tmp_path, monkeypatch, column, end, show):
    database = make_database(tmp_path / "aitk_db.db")
    shown = status.RowStatus(database, "j1", is_last=True)
    execute = shown._execute

    def pressed_before(sql, *rest):
        if sql.startswith("UPDATE"):
            with sqlite3.connect(database) as ui:
                ui.execute(f"UPDATE Job SET {column} = 1, status = 'stopping'")
            ui.close()
        return execute(sql, *rest)

    monkeypatch.setattr(shown, "_execute", pressed_before)
    with pytest.raises(status.JobStopped) as stop:
        show(shown)
    assert (row(database)["status"], row(database)["info"]) == ("stopping", "Starting")
    shown.fail(stop.value)
    assert row(database)["status"] == end


def test_a_stop_is_seen_while_somebody_writes(locked):
    database, other = locked
    shown = status.RowStatus(database, "j1", is_last=True)
    other.execute("UPDATE Job SET stop = 1")
    other.execute("BEGIN IMMEDIATE")
    start = time.monotonic()
    with pytest.raises(status.JobStopped):
        shown.say("Merging a")
    assert time.monotonic() - start < status._WAIT / 2


def test_a_stop_while_the_job_is_set_up_is_not_overwritten(tmp_path):
    database = make_database(tmp_path / "aitk_db.db")
    with sqlite3.connect(database) as db:
        db.execute("UPDATE Job SET stop = 1, status = 'stopped', info = 'Job stopped'")
    db.close()
    shown = status.RowStatus(database, "j1", is_last=True)
    assert row(database)["status"] == "stopped"
    with pytest.raises(status.JobStopped):
        shown.say("Merging a")


def numbers(database):
    return tuple(row(database)[key] for key in ("step", "total_steps", "speed_string"))


@pytest.mark.parametrize("next_total", [400, None])
def test_what_follows_does_not_inherit_our_count(tmp_path, next_total):
    database = make_database(tmp_path / "aitk_db.db")
    for end in (lambda s: s.complete("2 merged"), lambda s: s.fail(ValueError("x")), lambda s: s.fail(KeyboardInterrupt())):
        shown = status.RowStatus(database, "j1", is_last=False, next_total=next_total)
        shown.progress("Merging a: 7/210", 7, 210, "1 modules/s")
        assert numbers(database) == (7, 210, "1 modules/s")
        end(shown)
        assert numbers(database) == (0, next_total, "")


def test_a_section_that_is_refused_leaves_the_steps_of_an_earlier_run(tmp_path):
    database = make_database(tmp_path / "aitk_db.db")
    with sqlite3.connect(database) as db:
        db.execute("UPDATE Job SET step = 100")
    db.close()
    status.RowStatus(database, "j1", is_last=False, next_total=400).refuse(ValueError("no such file"))
    assert (row(database)["status"], row(database)["step"]) == ("error", 100)


class Trainer:
    """A trainer whose training is done, as AI-Toolkit's ends it."""

    step_num = 3

    def __init__(self, trouble=None):
        self.told, self.trouble = [], trouble

    def update_status(self, status, info=None):
        self.told.append((status, info))

    def should_stop(self):
        return False

    should_return_to_queue = should_stop

    def done_hook(self):
        self.update_status("completed", "Training completed")
        if self.trouble:
            raise self.trouble


@pytest.mark.parametrize("trouble", [None, ValueError("the database")])
def test_the_trainers_last_words_end_with_what_came_of_the_merges(trouble):
    trainer = Trainer(trouble)
    first, last = (status.TrainerStatus(trainer, is_last=is_last) for is_last in (False, True))
    trainer.done_hook()
    assert trainer.told == [("running", "Training finished, merging LoRAs")]
    first.complete("1 merged")
    assert len(trainer.told) == 1, "the last section tells"
    with pytest.raises(ValueError) if trouble else nullcontext():
        last.complete("2 merged, soft is off: see the Plugin tab")
    assert trainer.told[1:] == [("completed", "Training completed, 2 merged, soft is off: see the Plugin tab")]
    trainer.update_status("error", "x")  # what it says afterwards is its own again
    assert trainer.told[2:] == [("error", "x")]


class Noted(status.Status):
    """A status that notes how far the job is."""

    def __init__(self):
        self.told = []

    def progress(self, info, done, total, speed):
        self.told.append((info, done, total, speed))


def test_the_pace_of_pictures_leaves_out_the_loading_of_the_model(monkeypatch):
    clock, noted = SimpleNamespace(now=100.0), Noted()
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock.now)
    with watch.JobProgress(noted, SILENT) as progress:
        for seconds in progress.track([600, 10, 20], "pictures", "picture", describe=lambda n: f"shot {n}"):
            clock.now += seconds
    assert noted.told == [
        ("Picture 1/3: shot 600", 0, 3, ""),
        ("Picture 2/3: shot 10", 1, 3, ""),
        ("Picture 3/3: shot 20", 2, 3, "10.0 s/picture"),
        ("3 pictures rendered", 3, 3, "15.0 s/picture"),
    ]


def test_the_tensors_of_a_model_count_in_the_row(monkeypatch):
    """About twice a second, and at the end; the pace is of this model alone."""
    clock, noted = SimpleNamespace(now=100.0), Noted()
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock.now)
    with watch.JobProgress(noted, SILENT) as progress:
        for _ in progress.track(range(4), "baking soft", "tensor"):
            clock.now += 0.3
    assert [told[:3] for told in noted.told] == [("Baking soft: 2/4", 2, 4), ("Baking soft: 4/4", 4, 4)]
    assert noted.told[-1][3] == "3 tensors/s"


@pytest.mark.parametrize("unit, told", [("picture", ["Picture 1/2: a"]), ("module", [])])
def test_a_stop_acts_once_the_item_is_done_and_a_picture_is_told(unit, told):
    """A module is not: its file will be gone."""
    noted, passed = Noted(), []
    with pytest.raises(KeyboardInterrupt), watch.JobProgress(noted, SILENT) as progress:
        for item in progress.track(["a", "b"], "soft", unit, describe=str):
            signal.raise_signal(signal.SIGINT)
            passed.append(item)
    assert passed == ["a"]
    assert [info for info, *_ in noted.told] == told


class Told:
    """A process that notes what it is told."""

    def __init__(self, name, told):
        self.name, self.told = name, told

    def on_error(self, error):
        self.told.append((self.name, error))


def test_an_error_is_passed_on_the_last_process_first():
    told, error = [], ValueError("x")
    status.pass_on(error, [Told("a", told), object(), Told("b", told)])
    assert told == [("b", error), ("a", error)]
