"""Records the frozen facts anew: `python tests/frozen/record.py [files keys helps exits names texts]`, all of them by default.

Look at `git diff tests/frozen` afterwards: every line of it is a change that somebody sees.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # as pyproject.toml has it for pytest

from frozen import door, facts  # noqa: E402

_DEPTHS = {"files": 5, "keys": 3, "exits": 2}  # down to which level an entry has a line of its own; 3 where none is named


def laid_out(value: Any, depth: int) -> str:
    """JSON whose upper levels have a line for each entry and whose lower ones stand on one line."""
    if not depth or not value or not isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    pairs = isinstance(value, dict)
    lines = [
        f"{json.dumps(entry, ensure_ascii=False)}: {laid_out(value[entry], depth - 1)}" if pairs else laid_out(entry, depth - 1)
        for entry in value
    ]
    inner = ",\n".join(lines).replace("\n", "\n ")
    return f"{'{' if pairs else '['}\n {inner}\n{'}' if pairs else ']'}"


def main(topics: list[str]) -> None:
    """Writes the record of each topic."""
    for topic in topics or facts.TOPICS:
        with tempfile.TemporaryDirectory() as folder:
            found = facts.TOPICS[topic](Path(folder))
        record = {"machine": door.machine(), "python": door.python(), "facts": found}
        (facts.HERE / f"{topic}.json").write_text(laid_out(record, _DEPTHS.get(topic, 3)) + "\n", encoding="utf-8")
        print(f"{topic}.json: {len(found)} facts")


if __name__ == "__main__":
    main(sys.argv[1:])
