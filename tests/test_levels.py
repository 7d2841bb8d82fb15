"""The house: few rooms at the top, imports run down only, no circle, no long chain. Lazy imports and those for types count."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "extensions_built_in" / "zit_merge"
# From the ground up. What shares a line may import each other's neighbours below, never each other.
LEVELS = (
    ("__init__", "wording", "progress"),
    ("errors",),
    ("algebra", "model", "files"),
    ("formats",),
    ("config",),
    ("planning",),
    ("merging",),
    ("analysis",),
    ("report",),
    ("preview",),
    ("section",),
    ("api",),
    ("studio",),
    ("demo",),
    ("host",),
    ("cli",),
    ("experiments",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
LONGEST = 14


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py")}


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of the package that a module imports, anywhere in its text."""
    path, found = MODULES[module], set()
    here = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*here[: len(here) - node.level + 1], *(node.module.split(".") if node.module else [])]
            for name in node.names:
                found.add(next(m for m in (".".join([*base, name.name]), ".".join(base) or "__init__") if m in MODULES))
    return frozenset(found - {module})


@cache
def chain(module: str) -> tuple[str, ...]:
    """The longest way down from a module; never ends in a circle, which has a test of its own."""
    return (module, *max(map(chain, imports(module)), key=len, default=()))


def room(module: str) -> str:
    return module.partition(".")[0]


def test_few_rooms_at_the_top():
    top = [path.name for path in PACKAGE.glob("*.py")]
    assert len(top) <= 9, top
    assert {room(m) for m in MODULES} == set(LEVEL)


def test_imports_run_down_only():
    wrong = [
        f"{module} imports {other}"
        for module in MODULES
        for other in imports(module)
        if room(module) != room(other) and LEVEL[room(module)] <= LEVEL[room(other)]
    ]
    assert not wrong, "\n".join(sorted(wrong))


def test_no_circle():
    order: list[str] = []
    left = dict.fromkeys(MODULES)
    while ready := [m for m in left if imports(m) <= set(order)]:
        order += ready
        for module in ready:
            del left[module]
    assert not left, f"these import each other in a circle: {', '.join(left)}"


def test_no_long_chain():
    longest = max(map(chain, MODULES), key=len)
    assert len(longest) <= LONGEST, " -> ".join(longest)


def test_only_host_knows_the_toolkit():
    for module, path in MODULES.items():
        names = {
            (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name) or ""
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level)
        }
        if room(module) != "host":
            assert not {name.partition(".")[0] for name in names} & {"toolkit", "jobs"}, module
