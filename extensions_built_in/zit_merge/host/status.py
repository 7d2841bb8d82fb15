"""What AI-Toolkit's UI shows of the job, and how its user stops it.

The UI knows a job by one row of its sqlite database: `status`, `info`, `step`, `total_steps`, `speed_string`; it asks for a stop
through `stop` and `return_to_queue`. Its queue starts the next job on a GPU as soon as no row says `running`. The trainer writes
`completed` when its training ends, while our merge is still to come; so its last word is put off until ours (`TrainerStatus`).
In a job without a trainer we write the row ourselves (`RowStatus`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..execute import Tick
from ..plan import StepPlan

_WAIT = 30.0  # seconds for a locked database, as the toolkit waits
_PAUSE = 0.5  # seconds between two looks at the database
_TRAINER = ("done_hook", "update_status", "maybe_stop", "step_num")  # of DiffusionTrainer


class JobStopped(Exception):
    """The user stopped the job, or its queue; the row says so already. AI-Toolkit's trainers end a job in the same way."""


class Status:
    """A job that no UI has started: nothing to tell, nobody to ask."""

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

    def complete(self) -> None:
        """This section is done."""

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
        self.say("Training finished, merging LoRAs")

    def say(self, info: str) -> None:
        self._trainer.update_status("running", info)

    def progress(self, info: str, done: int, total: int, speed: str) -> None:
        self.say(info)  # `step` stays the training's: a smaller one would make the job look unfinished

    def check(self) -> None:
        self._trainer.maybe_stop()

    def complete(self) -> None:
        if self._is_last:
            self._trainer.zit_merge_done_hook()

    def refuse(self, error: BaseException) -> None:
        # its on_error would also set `step` back to 0
        self._trainer.update_status(*(("stopped", "Job stopped") if _is_stop(error) else ("error", str(error))))


class RowStatus(Status):
    """The row itself, for a job that has no trainer.

    Trouble with the database is printed once and stops no merge.

    Args:
        path: The database.
        job_id: The row's id.
        is_last: No other process follows.
    """

    def __init__(self, path: Path, job_id: str, is_last: bool):
        self._path, self._job_id, self._is_last = path, job_id, is_last
        self._broken = False
        self._write(status="running", info="Starting")

    def say(self, info: str) -> None:
        self._write(status="running", info=info)

    def progress(self, info: str, done: int, total: int, speed: str) -> None:
        self._write(status="running", info=info, step=done, total_steps=total, speed_string=speed)

    def check(self) -> None:
        rows = self._ask("SELECT stop, return_to_queue FROM Job WHERE id = ?", self._job_id)
        stop, queue = rows[0] if rows else (0, 0)
        if stop:
            self._write(status="stopped", info="Job stopped")
            raise JobStopped("Job stopped")
        if queue:
            self._write(status="queued", info="Job queued")
            raise JobStopped("Job returning to queue")

    def complete(self) -> None:
        if self._is_last:
            self._write(status="completed", info="Merge completed")

    def refuse(self, error: BaseException) -> None:
        self.fail(error)

    def fail(self, error: BaseException) -> None:
        if _is_stop(error):
            self._write(status="stopped", info="Job stopped")
        elif not isinstance(error, JobStopped):
            self._write(status="error", info=str(error))

    def _write(self, **values: object) -> None:
        columns = ", ".join(f"{column} = ?" for column in values)
        changed = self._ask(f"UPDATE Job SET {columns} WHERE id = ?", *values.values(), self._job_id)
        if changed == []:
            self._give_up(f"has no job {self._job_id}")

    def _ask(self, sql: str, *values: object) -> list[tuple] | None:
        """The rows of a statement, empty ones for rows that it changed; None where the database does not answer."""
        if self._broken:
            return None
        try:
            with contextlib.closing(sqlite3.connect(f"file:{quote(str(self._path))}?mode=rw", timeout=_WAIT, uri=True)) as db, db:
                cursor = db.execute(sql, values)
                return cursor.fetchall() if cursor.description else [()] * cursor.rowcount
        except sqlite3.Error as e:
            if "locked" in str(e) or "busy" in str(e):  # for longer than we wait: the next write may get through
                print(f"zit_merge: the UI's database {self._path} is locked, it may show an older state", flush=True)
            else:
                self._give_up(f"can't be used ({e})")
            return None

    def _give_up(self, why: str) -> None:
        self._broken = True
        print(f"zit_merge: the UI's database {self._path} {why}: the merge goes on, only the UI does not see it", flush=True)


def _is_stop(error: BaseException) -> bool:
    return isinstance(error, KeyboardInterrupt)


class Watch:
    """`tick` for `run_plans`: the terminal's bar after every module, the UI and its flags about twice a second.

    As a context it holds back Ctrl+C, which is the UI's stop button too, until the module at hand is done: raised in the midst of
    a library or of the toolkit's database code it has been lost there. A second one acts at once.

    Args:
        status: Where it is shown.
        plans: What is run.
        bar: Another tick, called first.
    """

    def __init__(self, status: Status, plans: Sequence[StepPlan], bar: Tick):
        self._status, self._bar = status, bar
        self._before = dict(zip((p.name for p in plans), accumulate((len(p.shapes) for p in plans), initial=0), strict=False))
        self._total = sum(len(p.shapes) for p in plans)
        self._start = self._told = time.monotonic()
        self._interrupted = False

    def __enter__(self) -> Watch:
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, kind: type | None, *exc: object) -> None:
        if hasattr(self, "_handler"):
            signal.signal(signal.SIGINT, self._handler)
        if kind is None and self._interrupted:
            raise KeyboardInterrupt

    def _interrupt(self, number: int, frame: object) -> None:
        self._interrupted = True
        signal.signal(signal.SIGINT, self._handler)

    def tick(self, plan: StepPlan, done: int) -> None:
        """Module `done` of a step is finished.

        Raises:
            KeyboardInterrupt: Ctrl+C.
            JobStopped: In a job without a trainer; a trainer raises its own exception.
        """
        if self._interrupted:
            raise KeyboardInterrupt
        self._bar(plan, done)
        now = time.monotonic()
        if now - self._told < _PAUSE and done < len(plan.shapes):
            return
        self._told = now
        overall = self._before[plan.name] + done
        speed = f"{overall / max(now - self._start, 1e-3):.0f} modules/s"
        self._status.progress(f"Merging {plan.name}: {done}/{len(plan.shapes)}", overall, self._total, speed)
        self._status.check()


def status_of(job, process_id: int, config: Mapping[str, Any]) -> Status:
    """How this section tells the UI what it does.

    Args:
        job: AI-Toolkit's job; the processes before us are built.
        process_id: Ours.
        config: Our section; where we are the first process the UI has written its database into it.
    """
    is_last = process_id == len(job.config["process"]) - 1  # else what follows has the last word
    for process in reversed(job.process):
        if getattr(process, "is_ui_trainer", False) and all(hasattr(process, name) for name in _TRAINER):
            return TrainerStatus(process, is_last)
    first = job.process[0] if job.process else None
    job_id = (os.environ.get("AITK_JOB_ID") or "").strip()
    database = Path((job.config["process"][0] if first else config).get("sqlite_db_path") or "./aitk_db.db")
    return RowStatus(database, job_id, is_last) if job_id and database.is_file() else Status()
