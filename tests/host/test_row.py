"""The row of a merge-only job in a database that somebody else holds."""

import sqlite3

import pytest
from host.ui import make_database, row

from extensions_built_in.zit_merge.host import status


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
    shown.complete()
    assert (row(database)["status"], row(database)["info"]) == ("completed", "Merge completed")
    other.execute("UPDATE Job SET stop = 1")
    with pytest.raises(status.JobStopped):  # and a stop is seen again
        shown.check()
    assert row(database)["status"] == "stopped"
    assert capsys.readouterr().out == ""
    other.close()
