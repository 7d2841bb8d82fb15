"""The merge methods by the names they have in a config: what they take and say is known without torch, which they run with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from typing import Any

from .declared import declared
from .parameters import PER, Parameter, check_della, parameters_of


@dataclass(frozen=True)
class Method:
    """One way to merge.

    Attributes:
        module: The file of this folder that has its function.
        name: Of the function.
        is_linear: Which of the two kinds of `function` it is.
        per: Of a linear method: over what its Gram matrix is taken unless the parameter `per` says otherwise; empty where the
            ratios are all that it needs.
        is_mean: Only the proportions of the ratios count.
        is_spherical: A mean that takes no negative ratios.
        takes: How many LoRAs it takes; None is any number.
        fit: Raises ValueError where its parameters, each in its range, don't fit together.
    """

    module: str
    name: str
    is_linear: bool = True
    per: str = ""
    is_mean: bool = False
    is_spherical: bool = False
    takes: int | None = None
    fit: Callable[..., None] | None = None

    @cached_property
    def function(self) -> Callable[..., Any]:
        """(gram, weights, **parameters) -> coefficients of a linear method, (deltas, **parameters) -> delta of any other."""
        function: Callable[..., Any] = getattr(import_module(f".{self.module}", __package__), self.name)
        return function

    @property
    def doc(self) -> str:
        """The function's docstring."""
        return declared(self.module)[self.name].__doc__ or ""

    @cached_property
    def parameters(self) -> Mapping[str, Parameter]:
        """By name, from the signature."""
        per = {PER.name: replace(PER, default=self.per)} if self.per else {}
        return per | parameters_of(declared(self.module)[self.name])

    def check(self, params: Mapping[str, Any]) -> None:
        """Raises ValueError where parameters don't fit together.

        Args:
            params: Those that are given, each in its range.
        """
        if self.fit:
            self.fit(**{name: params.get(name, p.default) for name, p in self.parameters.items()})


METHODS: Mapping[str, Method] = {
    "sum": Method("linear", "sum"),
    "average": Method("linear", "average", is_mean=True),
    "normalize": Method("linear", "normalize", per="file"),
    "slerp": Method("linear", "slerp", per="module", is_mean=True, is_spherical=True, takes=2),
    "nuslerp": Method("linear", "nuslerp", per="module", is_mean=True, is_spherical=True, takes=2),
    "karcher": Method("linear", "karcher", per="module", is_mean=True, is_spherical=True),
    "ties": Method("sparse", "ties", is_linear=False),
    "dare_linear": Method("sparse", "dare_linear", is_linear=False),
    "dare_ties": Method("sparse", "dare_ties", is_linear=False),
    "della": Method("sparse", "della", is_linear=False, fit=check_della),
    "tsv": Method("subspace", "tsv", is_linear=False),
    "project": Method("subspace", "project", is_linear=False, takes=2),
    "shared_once": Method("subspace", "shared_once", is_linear=False),
}
