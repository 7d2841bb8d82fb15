"""AI-Toolkit's web UI with its worker, on a database and folders of its own, for as long as a test session."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from host.shim import SHIM
from host.ui import DIARY, SCHEMA

REPO = Path(__file__).parents[2]
# ui/prisma/schema.prisma, what host/ui.py has no need of
SETTINGS = """
CREATE TABLE Settings (id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT UNIQUE, value TEXT);
CREATE TABLE Queue (id INTEGER PRIMARY KEY AUTOINCREMENT, gpu_ids TEXT UNIQUE, is_running BOOLEAN DEFAULT 0);
"""
# The UI gives a job to a GPU: this computer need not have one. And it ends older loops of nvidia-smi by their name, anybody's.
PROGRAMS = {
    "nvidia-smi": (
        'line="0, GPU, 0, 40, 0, 0, 24576, 24000, 576, 50, 300, 1000, 1000, 30"\n'
        'case "$*" in *-lms*) while echo "$line"; do sleep 1; done;; *-L*) echo "GPU 0: GPU";; *) echo "$line";; esac\n'
    ),
    "pkill": "exit 1\n",
}


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def link_all(source: Path, target: Path, *but: str) -> None:
    """Makes a folder of links to all that is in another one."""
    target.mkdir(parents=True)
    for entry in source.iterdir():
        if entry.name not in but:
            (target / entry.name).symlink_to(entry)


class WebUi:
    """The UI, started.

    Args:
        built: What set_up.py has made.
        folder: An empty folder for this session: AI-Toolkit as links, its database, the output, programs.

    Attributes:
        url: Where it listens.
        token: What a browser has to know: the UI listens on all addresses.
        output: Where the jobs write.
    """

    def __init__(self, built: Path, folder: Path):
        self.toolkit, self.output = folder / "ai-toolkit", folder / "output"
        self.database = self.toolkit / "aitk_db.db"
        self.log = folder / "web_ui.log"
        self.token = secrets.token_hex()
        self._python = (built / "ready.txt").read_text(encoding="utf-8").strip()
        self._processes: list[subprocess.Popen] = []
        self._lay_out(built)
        self._install()
        self._make_database(folder)
        programs = folder / "bin"
        programs.mkdir()
        for name, text in PROGRAMS.items():
            (programs / name).write_text(f"#!/bin/sh\n{text}", encoding="utf-8")
            (programs / name).chmod(0o755)
        self._path = os.pathsep.join([str(programs), os.environ["PATH"]])
        self.url = f"http://localhost:{self._start()}"

    def _lay_out(self, built: Path) -> None:
        link_all(built, self.toolkit, "extensions_built_in", "ui", "output", ".venv")
        link_all(built / "extensions_built_in", self.toolkit / "extensions_built_in")
        link_all(built / "ui", self.toolkit / "ui")
        python = self.toolkit / ".venv" / "bin" / "python"  # where the UI looks for it
        python.parent.mkdir(parents=True)
        script = f'#!/bin/sh\nexport HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1\n{self._shim()}exec "{self._python}" "$@"\n'
        python.write_text(script, encoding="utf-8")
        python.chmod(0o755)

    def _shim(self) -> str:
        words = [self._python, "-c", "import torch; print(torch.version.cuda)"]
        cuda = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
        return f'export PYTHONPATH="{SHIM}"\n' if cuda == "None" else ""

    def _install(self) -> None:
        words = [sys.executable, "-m", "extensions_built_in.zit_merge", "install", str(self.toolkit)]
        done = subprocess.run(words, cwd=REPO, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def _make_database(self, folder: Path) -> None:
        with contextlib.closing(sqlite3.connect(self.database)) as db:
            db.executescript(SCHEMA + DIARY + SETTINGS)
            for key, name in (("TRAINING_FOLDER", "output"), ("DATASETS_FOLDER", "datasets")):
                (folder / name).mkdir(exist_ok=True)
                db.execute("INSERT INTO Settings (key, value) VALUES (?, ?)", (key, str(folder / name)))
            db.commit()

    def _start(self) -> int:
        port = free_port()
        env = os.environ | {"PATH": self._path, "AI_TOOLKIT_AUTH": self.token, "AI_TOOLKIT_FILE_SERVER_WORKERS": "1"}
        env |= {"NODE_ENV": "production", "NEXT_TELEMETRY_DISABLED": "1"}
        with self.log.open("w", encoding="utf-8") as log:
            for words in (["dist/cron/fileServer.js", "start", "--port", str(port)], ["dist/cron/worker.js"]):
                self._processes.append(
                    subprocess.Popen(
                        ["node", *words],
                        cwd=self.toolkit / "ui",
                        env=env,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                )
        try:
            until(lambda: self._answers(port), 60, lambda: self.log.read_text(encoding="utf-8")[-3000:])
        except BaseException:
            self.stop()
            raise
        return port

    def _answers(self, port: int) -> bool:
        ended = [p.args for p in self._processes if p.poll() is not None]
        assert not ended, f"{ended} ended:\n{self.log.read_text(encoding='utf-8')[-3000:]}"
        try:
            with urllib.request.urlopen(f"http://localhost:{port}/jobs", timeout=30) as answer:
                return answer.status == 200
        except OSError:
            return False

    def stop(self) -> None:
        """Ends the UI, and the jobs that it started, whole groups of processes each."""
        for job in self.rows():
            if self._runs(job["pid"]):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(job["pid"], signal.SIGKILL)
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _runs(self, pid: int | None) -> bool:
        """This process is a job of ours: its number may have gone to another since."""
        with contextlib.suppress(OSError):
            return pid is not None and str(self.toolkit).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
        return False

    def rows(self, where: str = "1", *values: str) -> list[dict]:
        """Jobs as the database has them."""
        with contextlib.closing(sqlite3.connect(self.database, timeout=30)) as db:
            db.row_factory = sqlite3.Row
            return [dict(found) for found in db.execute(f"SELECT * FROM Job WHERE {where}", values)]

    def row(self, name: str) -> dict:
        """The job of this name."""
        (found,) = self.rows("name = ?", name)
        return found

    def config(self, name: str) -> dict:
        """What was saved of the job's config."""
        return json.loads(self.row(name)["job_config"])

    def infos(self, name: str) -> list[str]:
        """All that the row's info ever said, in order, what did not change once."""
        with contextlib.closing(sqlite3.connect(self.database, timeout=30)) as db:
            words = "SELECT info FROM Diary WHERE id = ? ORDER BY rowid"
            told = [info for (info,) in db.execute(words, (self.row(name)["id"],))]
        return [info for n, info in enumerate(told) if n == 0 or told[n - 1] != info]

    def counts(self, name: str) -> list[tuple[int, int]]:
        """(step, total_steps) of every write into the row, in order."""
        with contextlib.closing(sqlite3.connect(self.database, timeout=30)) as db:
            words = "SELECT step, total_steps FROM Diary WHERE id = ? ORDER BY rowid"
            return db.execute(words, (self.row(name)["id"],)).fetchall()

    def save(self, name: str, text: str) -> Path:
        """A file that a user has saved somewhere."""
        path = self.output.parent / name
        path.write_text(text, encoding="utf-8")
        return path

    def job_log(self, name: str) -> str:
        """What the job printed since its last start."""
        path = self.output / name / "log.txt"
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def is_over(self, name: str) -> bool:
        """Its process has ended, and the row does not say that it runs."""
        row = self.row(name)
        return row["status"] not in ("running", "queued", "stopping") and not self._runs(row["pid"])


def until(
    condition: Callable[[], object], seconds: float, told: Callable[[], str], pause: Callable[[float], object] = time.sleep
) -> None:
    """Waits for a condition; if it does not come true, fails with what `told` says then."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s:\n{told()}"
        pause(0.1)
