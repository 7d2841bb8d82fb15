"""AI-Toolkit's UI as far as a job can tell: its database, and somebody who watches a row and presses stop."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from host.shim import SHIM

# ui/prisma/schema.prisma
SCHEMA = """
CREATE TABLE Job (id TEXT PRIMARY KEY, name TEXT UNIQUE, gpu_ids TEXT, job_config TEXT,
 created_at DATETIME DEFAULT CURRENT_TIMESTAMP, updated_at DATETIME, status TEXT DEFAULT 'stopped', stop BOOLEAN DEFAULT 0,
 return_to_queue BOOLEAN DEFAULT 0, step INTEGER DEFAULT 0, total_steps INTEGER, info TEXT DEFAULT '',
 speed_string TEXT DEFAULT '', queue_position INTEGER DEFAULT 0, pid INTEGER, job_type TEXT DEFAULT 'train', job_ref TEXT,
 save_now BOOLEAN DEFAULT 0, sample_now BOOLEAN DEFAULT 0);
"""
# Ours: whatever was ever written into a row, in order.
DIARY = """
CREATE TABLE Diary (id TEXT, status TEXT, info TEXT, step INTEGER, total_steps INTEGER);
CREATE TRIGGER Told AFTER UPDATE ON Job BEGIN
 INSERT INTO Diary VALUES (NEW.id, NEW.status, NEW.info, NEW.step, NEW.total_steps); END;
"""


def make_database(path: Path, job_id: str = "j1") -> Path:
    """A database with one job that was just started."""
    with sqlite3.connect(path) as db:
        db.executescript(SCHEMA + DIARY)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("INSERT INTO Job (id, name, status, info) VALUES (?, ?, 'running', 'Starting job...')", (job_id, job_id))
    db.close()
    return path


def row(path: Path, job_id: str = "j1") -> dict:
    """The job's row."""
    db = sqlite3.connect(path)
    db.row_factory = sqlite3.Row
    found = dict(db.execute("SELECT * FROM Job WHERE id = ?", (job_id,)).fetchone())
    db.close()
    return found


class Launched:
    """A job started as the UI starts it, with its row watched.

    Args:
        toolkit: The toolkit's folder.
        config: The job's config file.
        database: The UI's database.
        when: (start of an info text, what to do then): called once with this object, in the watching thread.
    """

    def __init__(self, toolkit: Path, config: Path, database: Path, when=None, job_id: str = "j1"):
        path = [str(toolkit)] + ([] if torch.version.cuda else [str(SHIM)])
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(path),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "AITK_JOB_ID": job_id,
        }
        self.database, self.job_id = database, job_id
        self._before = len(self._diary())
        self.process = subprocess.Popen(
            [sys.executable, "run.py", str(config)],
            cwd=toolkit,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        watcher = threading.Thread(target=self._watch, args=(when,), daemon=True)
        watcher.start()
        try:
            self.log, _ = self.process.communicate(timeout=300)
        finally:
            self.process.kill()
        watcher.join()
        self.code = self.process.returncode

    def _watch(self, when) -> None:
        while True:
            ended = self.process.poll() is not None
            now = row(self.database, self.job_id)
            if when and now["info"].startswith(when[0]):
                act, when = when[1], None
                act(self)
            if ended:
                return
            time.sleep(0.02)

    def interrupt(self) -> None:
        """The UI's stop button on Linux and macOS."""
        self.process.send_signal(signal.SIGINT)

    def set(self, **columns) -> None:
        """Writes into the row, as the UI does."""
        with sqlite3.connect(self.database, timeout=30) as db:
            names = ", ".join(f"{c} = ?" for c in columns)
            db.execute(f"UPDATE Job SET {names} WHERE id = ?", (*columns.values(), self.job_id))
        db.close()

    def _diary(self) -> list[tuple]:
        db = sqlite3.connect(self.database)
        rows = db.execute("SELECT status, info, step, total_steps FROM Diary WHERE id = ? ORDER BY rowid", (self.job_id,))
        found = rows.fetchall()
        db.close()
        return found

    @property
    def seen(self) -> list[tuple[str, str]]:
        """(status, info) of every write since the start, in order."""
        return [(status, info) for status, info, *_ in self._diary()[self._before :]]

    @property
    def counts(self) -> list[tuple[int, int | None]]:
        """(step, total_steps) of every write since the start, in order."""
        return [(step, total) for _, _, step, total in self._diary()[self._before :]]

    @property
    def statuses(self) -> list[str]:
        """The statuses in order, each once."""
        seen = self.seen
        return [s for i, (s, _) in enumerate(seen) if i == 0 or seen[i - 1][0] != s]

    @property
    def infos(self) -> list[str]:
        """The infos in order."""
        return [info for _, info in self.seen]
