"""The command line takes what it took: helps, exit codes, the first lines of what is told."""

from __future__ import annotations

import pytest
from frozen import cases, door, facts

HELPS, EXITS = facts.recorded("helps"), facts.recorded("exits")
SAME_PYTHON = HELPS["python"] == EXITS["python"] == door.python()
USAGE = 2  # the exit code where argparse is the one who speaks


@pytest.fixture(scope="module")
def helps(tmp_path_factory):
    return facts.helps(tmp_path_factory.mktemp("helps"))


@pytest.fixture(scope="module")
def exits(tmp_path_factory):
    return facts.exits(tmp_path_factory.mktemp("exits"))


def test_all_was_recorded():
    assert HELPS["facts"].keys() == {"", *cases.COMMANDS} and EXITS["facts"].keys() == cases.CALLS.keys()
    assert {call["code"] for call in EXITS["facts"].values()} == {0, 1, USAGE}


@pytest.mark.parametrize("command", HELPS["facts"])
def test_a_command_has_the_help_that_it_had(helps, command):
    was, now = HELPS["facts"][command], helps[command]
    assert facts.words_of(now) == facts.words_of(was) != []
    if SAME_PYTHON:
        assert now == was


@pytest.mark.parametrize("call", cases.CALLS)
def test_a_call_ends_as_it_ended(exits, call):
    was, now = EXITS["facts"][call], exits[call]
    assert now["code"] == was["code"]
    if SAME_PYTHON or was["code"] != USAGE:
        assert now == was
    else:
        assert now["err"].split()[:2] == was["err"].split()[:2] == ["usage:", "python"]
