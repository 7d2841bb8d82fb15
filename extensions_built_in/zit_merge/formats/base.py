"""The base model as far as a LoRA file needs it, and how the want of it is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from .algorithms import told

if TYPE_CHECKING:
    from torch import Tensor


class BaseWeights(Protocol):
    """The weights of the base model's linear layers."""

    def weight(self, module: str) -> Tensor:
        """The weight (out, in) of a module as it is stored; of a quantised one what it stands for.

        Args:
            module: Canonical name, which is in it.
        """

    def __contains__(self, module: object) -> bool:
        """Whether the model has this module."""


def no_base(key: str, algorithm: str, modules: int = 1) -> str:
    """That a change can't be told without the base model, and what to do.

    Args:
        key: Of the file, an example.
        algorithm: What it is.
        modules: In how many modules.
    """
    more = f" in {modules} modules" if modules > 1 else ""
    return (
        f"{key} is {told(algorithm)}{more}; its change depends on the base model's weights: set base: to the model that it was "
        "trained on, or train without it, or extract a plain LoRA from the trained model"
    )
