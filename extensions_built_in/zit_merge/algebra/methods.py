"""The merge methods by the names they have in a config. A method's keyword arguments are its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from . import linear
from .delta import Delta

METHODS: Mapping[str, Callable[..., Delta]] = {"sum": linear.sum}
