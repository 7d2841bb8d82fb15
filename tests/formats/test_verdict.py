"""What a check found: status and reasons from the numbers, and what files say of them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from extensions_built_in.zit_merge.formats.verdict import Measured, Verdict, judged, placeholder

KEY = "zit_merge.check"
WHOLE = Verdict(0.002, 1.0, (1.0, 0.5), (1.0, 0.5))
CUT = replace(WHOLE, kept=0.9, cut=True)


def modules(written: float) -> dict[str, Measured]:
    return {"layers.0.attention.to_q": Measured((0, 1), torch.ones(2), None, written, 0.0)}


@pytest.mark.parametrize(
    ("found", "rule", "status", "reason"),
    [
        (WHOLE, {}, "right", {"kind": "rounding", "error": 0.002}),
        (replace(WHOLE, error=0.05), {}, "right", {"kind": "rounding", "error": 0.05}),
        (CUT, {}, "right", {"kind": "cut", "kept": 0.9}),
        (replace(CUT, error=0.3), {}, "right", {"kind": "cut", "kept": 0.9}),
        (CUT, {"energy": 0.9, "most": 4}, "right", {"kind": "cut", "kept": 0.9}),
        (CUT, {"energy": 0.99, "most": 4}, "right", {"kind": "capped", "kept": 0.9, "asked": 0.99, "max": 4}),
        (CUT, {"energy": 0.9001}, "right", {"kind": "cut", "kept": 0.9}),  # what rounding took, nothing was capped
        (replace(WHOLE, error=0.051), {}, "off", {"kind": "cancelling", "error": 0.051}),
        (replace(CUT, got=(1.0, 0.2)), {}, "off", {"kind": "lost", "inputs": [1], "shares": [0.4], "cut": True}),
        (replace(WHOLE, got=(-1.0, 0.0)), {}, "off", {"kind": "lost", "inputs": [0, 1], "shares": [-1.0, 0.0], "cut": False}),
        (replace(WHOLE, got=(1.0, 1.0)), {}, "off", {"kind": "stronger", "inputs": [1], "shares": [2.0], "cut": False}),
        (replace(WHOLE, asked=(1e-310, 1.0)), {}, "off", {"kind": "stronger", "inputs": [0], "shares": [1e99], "cut": False}),
        (replace(CUT, got=(0.5, 0.75)), {}, "right", {"kind": "cut", "kept": 0.9}),  # the thresholds themselves are right
        (replace(CUT, got=(0.1, 0.5)), {"averaged": True}, "right", {"kind": "cut", "kept": 0.9}),
        (replace(CUT, got=(0.1, 0.0), alike=[[0, 1]]), {}, "right", {"kind": "cut", "kept": 0.9}),  # whose is it?
        (replace(WHOLE, got=(0.0, 0.0), modules=modules(0.0)), {}, "empty", {"kind": "cancelled"}),
        (replace(WHOLE, got=(0.0, 0.0)), {}, "empty", {"kind": "cancelled"}),  # as far as a file tells
        (replace(WHOLE, asked=(None, 0.0), got=(None, 0.0)), {}, "empty", {"kind": "nothing_asked"}),
        (
            replace(WHOLE, asked=(0.0, 0.0), got=(0.0, 0.0), modules=modules(1.0)),
            {},
            "right",
            {"kind": "rounding", "error": 0.002},
        ),
    ],
)
def test_the_status_follows_from_the_numbers(found: Verdict, rule: dict[str, Any], status: str, reason: dict[str, Any]):
    verdict = judged(found, **rule)
    assert (verdict.status, verdict.reasons) == (status, (reason,))
    assert replace(verdict, status=found.status, reasons=found.reasons) == found
    read = Verdict.read(verdict.metadata())
    assert (read.status, read.reasons) == (status, (reason,))


def test_a_check_of_an_older_file_is_judged_by_its_numbers():
    numbers = {"error": 0.3, "kept": 0.91, "asked": [1.0, 0.5, None], "got": [1.0, 0.001, None], "cut": True}
    for more in ({}, {"status": "fine"}, {"status": "right"}, {"status": "right", "reasons": ["x"]}):
        read = Verdict.read({KEY: json.dumps(numbers | more)})
        assert (read.status, [reason["kind"] for reason in read.reasons]) == ("off", ["lost"])
        assert (read.error, read.kept, read.asked, read.cut) == (0.3, 0.91, (1.0, 0.5, None), True)
    del numbers["cut"]  # older still
    assert Verdict.read({KEY: json.dumps(numbers)}).reasons[0]["kind"] == "cancelling"


@pytest.mark.parametrize(
    "check",
    [
        "",
        "[]",
        '{"error": 1}',
        '{"error": 0, "kept": 1, "asked": [1, 1], "got": [1]}',
        '{"error": "0", "kept": 1, "asked": [], "got": []}',
    ],
)
def test_what_is_no_check(check: str):
    assert Verdict.read({KEY: check}) is None and Verdict.read({}) is None


def test_a_strength_that_a_file_leaves_out_is_not_told():
    read = Verdict.read({KEY: '{"error": 0, "kept": 1, "asked": [1, 1], "got": [1, null]}'})
    assert (read.told, read.status) == ([0], "right")


numbers = st.floats(-1e30, 1e30)


@given(st.data(), st.integers(1, 70), st.floats(0, 2), st.floats(0, 1), st.booleans())
def test_a_placeholder_has_room_for_every_verdict(data: st.DataObject, count: int, error: float, kept: float, cut: bool):
    asked, got = (tuple(data.draw(st.lists(numbers, min_size=count, max_size=count))) for _ in range(2))
    rule = data.draw(st.sampled_from([{}, {"energy": 0.999999, "most": 3840}, {"averaged": True}]))
    verdict = judged(Verdict(error, kept, asked, got, cut), **rule)
    assert len(verdict.metadata()[KEY]) <= len(placeholder(count)[KEY])
