"""What renders: a loaded model, and the processes that share the work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from PIL.Image import Image

from ..algebra.delta import Delta
from .settings import ImageSpec, RenderSettings


class Renderer(Protocol):
    """A loaded model.

    Attributes:
        on_step: Called before each denoising step; may raise to stop the picture.
    """

    on_step: Callable[[], None]

    def set_adapter(self, deltas: Iterable[tuple[str, Delta]]) -> None:
        """Replaces the adapter on the model.

        Args:
            deltas: (module, delta); other modules are those of the base model.
        """

    def render(self, spec: ImageSpec) -> Image:
        """Renders one picture.

        Args:
            spec: What to render.
        """


Load = Callable[[RenderSettings], AbstractContextManager[Renderer]]


class Workers:
    """The processes that share the work; here, this process alone."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the outputs."""
        return True

    @property
    def is_alone(self) -> bool:
        """Whether there are no other processes."""
        return True

    def share(self, count: int) -> int:
        """How much of `count` pieces of work this process does, rounded up."""
        return count

    def mine(self, work: Sequence[Any]) -> Sequence[Any]:
        """The part of the work that this process does."""
        return work

    def gather(self, answers: Sequence[str]) -> list[str]:
        """The answers of all processes, in each of them; waits for the last one."""
        return list(answers)
