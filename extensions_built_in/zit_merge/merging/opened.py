"""Opens the inputs of steps."""

from __future__ import annotations

from contextlib import ExitStack

from ..formats.checkpoint import CheckpointReader
from ..formats.difference import DifferenceReader
from ..formats.reader import LoraFile, TensorReader, load_lora
from ..formats.reading import Reader
from ..planning.types import Input


def open_input(i: Input, files: ExitStack, lora: LoraFile | None = None) -> Reader:
    """The reader of an input.

    Args:
        i: The input.
        files: Closes it.
        lora: The file of an earlier step, where that is known.

    Raises:
        ZitMergeError: It can't be read, or is no longer what was planned.
    """
    if i.pair:
        return files.enter_context(DifferenceReader(i.pair))
    base = files.enter_context(CheckpointReader(i.model)) if i.model else None
    return files.enter_context(TensorReader(i.lora or lora or load_lora(i.path), base))
