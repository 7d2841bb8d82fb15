"""What AI-Toolkit's UI shows of the job, and how its user stops it.

The UI knows a job by one row of its sqlite database: `status`, `info`, `step`, `total_steps`, `speed_string`; it asks for a stop
through `stop` and `return_to_queue`. Its queue starts the next job on a GPU as soon as no row says `running`. The trainer writes
`completed` when its training ends, while our merge is still to come; so its last word is put off until ours (`TrainerStatus`).
In a job without a trainer we write the row ourselves (`RowStatus`).
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..wording import shown

_WAIT = 30.0  # seconds for a locked database, as the toolkit waits
_LAST_WAIT = 120.0  # for what no later write repeats; the toolkit gives each of its writes four times _WAIT
_TRY = 1.0  # seconds that sqlite itself may wait: meanwhile Ctrl+C is not heard
_NOTHING: Mapping[str, Any] = {"step": 0, "total_steps": 0, "speed_string": ""}  # without a total the UI draws no bar
_TRAINER = ("done_hook", "update_status", "should_stop", "should_return_to_queue", "step_num")  # of DiffusionTrainer


class JobStopped(SystemExit):
    """The user stopped the job, or its queue.

    The process ends with 0, and `Status.fail` writes the row when all else is written: as soon as the row does not say `running`,
    the queue starts the next job, and may start this one again; an exit code would then mark the new run as an error.

    Args:
        status: For the row: `stopped` or `queued`.
        info: For the row.
    """

    def __init__(self, status: str, info: str):
        super().__init__(0)
        self.row = {"status": status, "info": info}


def _raise_if_asked(stop: object, queue: object) -> None:
    """The words are those of the trainer's `maybe_stop`."""
    if stop:
        raise JobStopped("stopped", "Job stopped")
    if queue:
        raise JobStopped("queued", "Job queued")


class Status:
    """A job that no UI has started: nothing to tell, nobody to ask.

    Whatever shows that the job runs asks first whether it may: the row of a job that was stopped never says `running` again.
    """

    def say(self, info: str) -> None:
        """Shows what is going on; the job runs."""

    def progress(self, info: str, done: int, total: int, speed: str) -> None:
        """Shows how far it is.

        Args:
            info: What is going on.
            done: Modules merged so far in the whole section.
            total: Of all.
            speed: Such as `80 modules/s`.
        """

    def check(self) -> None:
        """Raises if the user wants the job to stop."""

    def complete(self, told: str) -> None:
        """This section is done.

        Args:
            told: What came of it, a few words; shown if nothing follows.
        """

    def refuse(self, error: BaseException) -> None:
        """The config is wrong, or the user has interrupted its check; called before anything runs."""

    def fail(self, error: BaseException) -> None:
        """The run ends with this."""


class TrainerStatus(Status):
    """Through the trainer before us, whose `completed` waits until the last section of the job is done.

    AI-Toolkit calls the trainer's own `on_error` for whatever is raised later, and its database threads live until its
    `done_hook` runs; both are why its methods are used and no second connection is made.

    Args:
        trainer: The nearest DiffusionTrainer before us.
        is_last: No other process follows.
    """

    def __init__(self, trainer, is_last: bool):
        self._trainer, self._is_last = trainer, is_last
        if not hasattr(trainer, "zit_merge_done_hook"):
            trainer.zit_merge_done_hook = trainer.done_hook
            trainer.done_hook = self._training_done

    def _training_done(self) -> None:
        # on_error writes step = last_save_step, which the final save does not set
        self._trainer.last_save_step = self._trainer.step_num
        with contextlib.suppress(JobStopped):  # our own process asks again when it runs
            self.say("Training finished, merging LoRAs")

    def say(self, info: str) -> None:
        self.check()
        self._trainer.update_status("running", info)

    def progress(self, info: str, done: int, total: int, speed: str) -> None:
        self.say(info)  # `step` stays the training's: a smaller one would make the job look unfinished

    def check(self) -> None:
        _raise_if_asked(self._trainer.should_stop(), self._trainer.should_return_to_queue())

    def complete(self, told: str) -> None:
        if not self._is_last:
            return
        update = self._trainer.update_status
        self._trainer.update_status = lambda status, info=None: update(status, ", ".join(filter(None, (info, told))))
        try:
            self._trainer.zit_merge_done_hook()
        finally:
            del self._trainer.update_status  # the class's own is there again

    def refuse(self, error: BaseException) -> None:
        # its on_error would also set `step` back to 0
        self._trainer.update_status(**_outcome(error))

    def fail(self, error: BaseException) -> None:
        if isinstance(error, JobStopped):  # run.py passes everything else to its on_error
            self._trainer.is_stopping = True
            self._trainer.update_status(**error.row)


class RowStatus(Status):
    """The row itself, for a job that has no trainer before us.

    Trouble with the database is printed once and stops no merge.

    Args:
        path: The database.
        job_id: The row's id.
        is_last: No other process follows.
        next_total: The steps of the training that follows. A trainer leaves `total_steps` alone, and the UI looks for a training
            in the first process only.
    """

    def __init__(self, path: Path, job_id: str, is_last: bool, next_total: int | None = None):
        self._path, self._job_id = path, job_id
        # What we have counted is not what the process that follows counts.
        self._handover: dict[str, Any] = {} if is_last else {**_NOTHING, "total_steps": next_total}
        self._broken = False
        with contextlib.suppress(JobStopped):  # our process asks again when it runs
            # a training that follows still needs the steps of its earlier run, should we be refused
            self._running(info="Starting", **({} if self._handover else _NOTHING))

    def say(self, info: str) -> None:
        self.check()
        self._running(info=info)

    def progress(self, info: str, done: int, total: int, speed: str) -> None:
        self.check()
        self._running(info=info, step=done, total_steps=total, speed_string=speed)

    def check(self) -> None:
        rows = self._ask("SELECT stop, return_to_queue FROM Job WHERE id = ?", self._job_id)
        if rows == []:
            self._give_up(f"has no job {self._job_id}")
        _raise_if_asked(*(rows[0] if rows else (0, 0)))

    def complete(self, told: str) -> None:
        if self._handover:
            self._write(wait=_LAST_WAIT, **self._handover)
        else:
            self._end("completed", told, step=0, total_steps=0)  # a job of 1 step or more can be started again

    def refuse(self, error: BaseException) -> None:
        self._end(**_outcome(error))

    def fail(self, error: BaseException) -> None:
        row = error.row if isinstance(error, JobStopped) else _outcome(error)
        self._end(**row, **self._handover)

    def _end(self, status: str, info: str, **numbers: Any) -> None:
        """The job's last write: while the row says `running`, the UI's queue starts nothing else."""
        lost = f"it may show the job as running from now on; it is {status}"
        try:
            self._write(wait=_LAST_WAIT, lost=lost, status=status, info=info, **numbers)
        except KeyboardInterrupt:
            self._warn(lost)
            raise

    def _running(self, **values: Any) -> None:
        """Asks again in the statement that writes: a stop between the two would be overwritten."""
        self._write(unless=("stop", "return_to_queue"), status="running", **values)

    def _write(
        self, *, wait: float | None = None, lost: str = "it may show an older state", unless: Sequence[str] = (), **values: object
    ) -> None:
        columns = ", ".join(f"{column} = ?" for column in values)
        where = " AND ".join(["id = ?", *(f"NOT COALESCE({column}, 0)" for column in unless)])
        changed = self._ask(f"UPDATE Job SET {columns} WHERE {where}", *values.values(), self._job_id, wait=wait, lost=lost)
        if changed == []:
            self.check()

    def _ask(self, sql: str, *values: object, wait: float | None = None, lost: str = "a stop waits") -> list[tuple] | None:
        """The rows of a statement, empty ones for rows that it changed; None where the database does not answer.

        Args:
            sql: The statement.
            values: Of its question marks.
            wait: Seconds for a locked database, `_WAIT` if left out.
            lost: What a lock that outlasts them costs; the next statement may get through again.
        """
        wait = wait or _WAIT
        end = time.monotonic() + wait
        while not self._broken:
            try:
                return self._execute(sql, values, min(wait, _TRY))
            except sqlite3.Error as e:
                if "locked" not in str(e) and "busy" not in str(e):
                    self._give_up(f"can't be used ({e})")
                elif time.monotonic() >= end:
                    self._warn(lost)
                    return None
                else:
                    time.sleep(0.05)  # there are locks that sqlite itself does not wait for
        return None

    def _execute(self, sql: str, values: Sequence[object], wait: float) -> list[tuple]:
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(self._path))}?mode=rw", timeout=wait, uri=True)) as db, db:
            cursor = db.execute(sql, values)
            return cursor.fetchall() if cursor.description else [()] * cursor.rowcount

    def _warn(self, lost: str) -> None:
        print(shown(f"zit_merge: the UI's database {self._path} is locked, {lost}"), flush=True)

    def _give_up(self, why: str) -> None:
        self._broken = True
        told = f"zit_merge: the UI's database {self._path} {why}: the merge goes on, only the UI does not see it"
        print(shown(told), flush=True)


def _outcome(error: BaseException) -> dict[str, str]:
    """`status` and `info` of a job that ends with this, as the trainer's `on_error` writes them."""
    is_stop = isinstance(error, KeyboardInterrupt)
    return {"status": "stopped", "info": "Job stopped"} if is_stop else {"status": "error", "info": shown(str(error))}


def pass_on(error: BaseException, following: Iterable[Any]) -> None:
    """Tells other processes how the job ended, so that a trainer among them says so in its row.

    Args:
        error: Whatever run.py has caught, of any process.
        following: Those after the first, which are not ours.
    """
    # The last one first: a trainer that has not begun writes step = 0, and one that is done has closed its database threads.
    for process in reversed([p for p in following if hasattr(p, "on_error")]):
        process.on_error(error)


def status_of(job, process_id: int, config: Mapping[str, Any]) -> Status:
    """How this section tells the UI what it does.

    Args:
        job: AI-Toolkit's job; the processes before us are built.
        process_id: Ours.
        config: Our section; where we are the first process the UI has written its database into it.
    """
    following = job.config["process"][process_id + 1 :]
    is_last = not following  # else what follows has the last word
    for process in reversed(job.process):
        if getattr(process, "is_ui_trainer", False) and all(hasattr(process, name) for name in _TRAINER):
            return TrainerStatus(process, is_last)
    first = job.process[0] if job.process else None
    job_id = (os.environ.get("AITK_JOB_ID") or "").strip()
    database = Path((job.config["process"][0] if first else config).get("sqlite_db_path") or "./aitk_db.db")
    if not job_id or not database.is_file():
        return Status()
    trainings = [p["train"] for p in following if isinstance(p, Mapping) and isinstance(p.get("train"), Mapping)]
    return RowStatus(database, job_id, is_last, trainings[0].get("steps") if trainings else None)
