"""What the command line tells about itself: the first steps, every flag, examples that its own parser takes."""

from __future__ import annotations

import argparse
import shlex
import sys

import pytest

from extensions_built_in.zit_merge.cli import parser as cli
from extensions_built_in.zit_merge.cli.main import COMMANDS, main


def subparsers() -> dict[str, argparse.ArgumentParser]:
    (found,) = (a for a in cli.build_parser(COMMANDS)._actions if isinstance(a, argparse._SubParsersAction))
    return found.choices


def commands_in(text: str) -> list[list[str]]:
    """The words of each line that calls this program, without its name."""
    lines = [line.strip() for line in text.splitlines() if line.startswith(f"    {cli.program()} ")]
    return [shlex.split(line.removeprefix(cli.program())) for line in lines]


@pytest.fixture(params=["/usr/local/bin/zit-merge", "/x/zit-merge.exe", "C:/x/zit-merge-script.py", "/x/zit_merge/__main__.py"])
def started_as(request, monkeypatch) -> str:
    """How the program is called in what it prints."""
    monkeypatch.setattr(sys, "argv", [request.param])
    return cli.MODULE if "__main__" in request.param else "zit-merge"


def test_without_a_command_it_says_what_to_type_first(started_as, capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"usage: {started_as} ")
    assert ["demo"] in commands_in(err) and [words for words in commands_in(err) if words[0] == "merge" and "--ratio" in words]


def test_usage_and_examples_name_the_program_as_it_was_started(started_as, capsys):
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"usage: {started_as} {command} ") and f"\nexample:\n    {started_as} {command}" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_word_of_a_command_has_a_text(command):
    assert [action.dest for action in subparsers()[command]._actions if not action.help] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_a_command_is_one(command):
    (words,) = commands_in(subparsers()[command].epilog)
    assert cli.build_parser(COMMANDS).parse_args(words).command is COMMANDS[command]


def test_first_steps_are_commands():
    for words in commands_in(cli.first_steps()):
        if "--help" not in words:
            assert cli.build_parser(COMMANDS).parse_args(words).command in COMMANDS.values()


def test_the_flags_of_merge_stand_in_groups():
    groups = [group for group in subparsers()["merge"]._action_groups if group._group_actions]
    assert [group.title for group in groups][2:] == [
        "strengths",
        "rank and method",
        "what a file leaves open",
        "how it is stored",
        "device and model",
    ]
    assert all(len(group._group_actions) < 20 for group in groups)
