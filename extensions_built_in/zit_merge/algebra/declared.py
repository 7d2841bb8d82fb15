"""What the functions of a module take and say of themselves, read from its text: to know that, nothing it needs is imported."""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from .parameters import Within


@cache
def declared(module: str) -> dict[str, Callable[..., Any]]:
    """The functions of a module by name, with their docstrings and keyword-only arguments and nothing else; not to be called.

    Args:
        module: A file of this folder, such as `linear`. Its types may use Annotated, Literal, Within and names of its own.
    """
    tree = ast.parse(Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    for function in functions:
        function.args.args, function.args.defaults, function.returns = [], [], None
        function.body = function.body[:1]  # the docstring
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.Assign)]
    names: dict[str, Any] = {"Annotated": Annotated, "Literal": Literal, "Within": Within}
    exec(compile(tree, f"{module}.py", "exec"), names)
    return {function.name: names[function.name] for function in functions}
