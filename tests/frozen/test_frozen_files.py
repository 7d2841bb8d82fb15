"""The files that recipes make are what they were: bytes where the machine is the same, numbers everywhere."""

from __future__ import annotations

import json
from typing import Any

import pytest
from frozen import cases, door, facts

RECORD = facts.recorded("files")
WAS = RECORD["facts"]
SAME_MACHINE = RECORD["machine"] == door.machine()
EXACT = {name for name, case in cases.CASES.items() if case.exact}


def compare(name: str, now: dict[str, Any]) -> None:
    """Raises unless the files of a case are those that were recorded."""
    assert WAS[name], "nothing was recorded"
    now = json.loads(json.dumps(now))
    assert list(now) == list(WAS[name]), "other files"
    for file, was in WAS[name].items():
        found = now[file]
        assert (found["keys"], found["count"]) == (was["keys"], was["count"]), f"{file}: other keys, dtypes or shapes"
        assert was["metadata"] and was["check"]
        assert facts.differences(was["metadata"], found["metadata"], 1e-12) == []
        # four digits are kept, and processors of one name differ in the last one
        assert facts.differences(was["check"], found["check"], 1e-3 if SAME_MACHINE else 0.02) == []
        assert list(found["probes"]) == list(was["probes"]) and len(was["probes"]) == 4
        for module, numbers in was["probes"].items():  # the norm first, which the others are measured by
            assert found["probes"][module] == pytest.approx(numbers, rel=0, abs=1e-3 * numbers[0]), f"{file}: {module}"
        if SAME_MACHINE or name in EXACT:
            assert found["tensors"] == was["tensors"], f"{file}: other bytes"


def test_every_case_was_recorded_and_no_other():
    assert WAS.keys() == {*cases.CASES, facts.COMMAND}
    assert EXACT and all(any(probe[0] for f in WAS[n].values() for probe in f["probes"].values()) for n in {*WAS} - {"only zero"})


def test_the_cases_know_every_method_format_and_dtype():
    steps = [step | {"keys": case.keys} for case in cases.CASES.values() for step in case.steps]
    saves = [step.get("save", {}) for step in steps]
    methods = json.loads(door.done("inspect", "--methods", "--json"))
    assert {step.get("method", "sum") for step in steps} == methods.keys()
    assert {save.get("format", "ai-toolkit") for save in saves} == {"ai-toolkit", "diffusers", "kohya", "comfyui"}
    assert {save.get("dtype", "bf16") for save in saves} == {"bf16", "fp16", "fp32", "same"}


@pytest.mark.parametrize("name", cases.CASES)
def test_a_job_makes_what_it_made(tmp_path, name):
    compare(name, facts.made(cases.CASES[name], tmp_path))


def test_the_command_makes_what_it_made(tmp_path):
    compare(facts.COMMAND, facts.made_by_command(tmp_path))


def test_python_makes_what_the_command_made(tmp_path):
    facts.lay_out(tmp_path)
    loras = [(tmp_path / name, weights) for name, weights in cases.CLI_AS_PYTHON]
    settled = door.package.merge(loras, shapes="free", device="cpu", dtype="fp32")
    path = settled.save(tmp_path / cases.CLI_FILE)
    compare(facts.COMMAND, {path.name: facts.describe(path)})
