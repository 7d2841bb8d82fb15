"""What people see is what they saw. Where it was changed on purpose: `python tests/frozen/record.py texts`."""

from __future__ import annotations

import pytest
from frozen import cases, facts

WAS = facts.recorded("texts")["facts"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return facts.texts(tmp_path_factory.mktemp("texts"))


def test_all_was_recorded():
    assert WAS.keys() == cases.TEXTS.keys() and all(WAS.values())


@pytest.mark.parametrize("name", cases.TEXTS)
def test_a_text_is_what_it_was(texts, name):
    assert texts[name] == WAS[name]
