"""The page of promises names tests and campaigns that exist."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "extensions_built_in/zit_merge/docs/promises.md").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform == "win32", reason="the soak script forks")
def test_its_campaigns_are_those_of_the_soak_script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "soak")
    import soak

    column = [line.split("|")[2] for line in PAGE.splitlines() if line.startswith("| ")]
    assert set(re.findall(r"`(\w+)`", " ".join(column))) == set(soak.CAMPAIGNS)


def test_its_tests_exist():
    named = set(re.findall(r"tests/[\w/]+\.py", PAGE))
    assert len(named) > 10
    assert [path for path in sorted(named) if not (ROOT / path).is_file()] == []
