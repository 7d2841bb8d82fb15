"""What programs hold on to is what it was: keys of JSON, names in Python."""

from __future__ import annotations

import pytest
from frozen import cases, facts

KEYS, NAMES = facts.recorded("keys")["facts"], facts.recorded("names")["facts"]


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return facts.keys(tmp_path_factory.mktemp("keys"))


def test_all_was_recorded():
    assert KEYS.keys() == {*cases.JSON, *cases.PAGES, *cases.PICTURES, "recipe"}
    assert NAMES["signatures"] and all(len(schema) > 5 for schema in KEYS.values())


@pytest.mark.parametrize("name", KEYS)
def test_json_has_the_keys_that_it_had(keys, name):
    assert facts.differences(KEYS[name], keys[name]) == []


def test_python_has_the_names_that_it_had(tmp_path):
    assert facts.differences(NAMES, facts.names(tmp_path)) == []
