"""Safetensors files, written tensor by tensor and moved to their names when they are whole."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..files.atomic import PART_KEY, open_exclusively, os_errors, part_path, publish_file, seal
from .safetensors_file import size_of
from .spec import Layout

if TYPE_CHECKING:
    from torch import Tensor

_STORED = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}  # dtype -> its name in a header
_AHEAD = 1 << 26  # bytes that wait in memory before the disk is told to begin


def file_size(entries: Layout, metadata: Mapping[str, str]) -> int:
    """Bytes of a file.

    Args:
        entries: Its tensors.
        metadata: Of its header.
    """
    data = sum(size_of(_STORED.get(dtype, dtype), shape) for dtype, shape in entries.values())
    return 8 + len(_header(entries, metadata)) + data


def _header(entries: Layout, metadata: Mapping[str, str], size: int = 0) -> bytes:
    """safetensors JSON header, padded with spaces to `size` or at least to a multiple of 8."""
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for key, (dtype, shape) in entries.items():
        name = _STORED.get(dtype, dtype)
        end = offset + size_of(name, shape)
        table[key] = {"dtype": name, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    return text.ljust(max(size, -(-len(text) // 8) * 8))


class SafetensorsWriter:
    """Writes one safetensors file beside its final name and moves it there when it is whole.

    The header comes first in the file but parts of its metadata are known last: room is reserved for it, and `finish` fills it
    in, syncs and renames. Until then, and after any exception, the final name holds what it held before. The part file is
    locked while it is written, so that two runs can't share it; one that a killed run left is taken over.

    Args:
        path: The final name.
        entries: key -> (dtype, shape), in the order in which `write` will be called.
        reserve: Metadata of at least the size that `finish` will get.
        publish: False leaves the file under its part name, for a step that only feeds later ones; it stays marked as a part.
    """

    def __init__(self, path: Path, entries: Layout, reserve: Mapping[str, str], *, publish: bool = True):
        self.path, self._mark = path, {} if publish else {PART_KEY: ""}
        self._part = part_path(path)
        self._entries = entries
        self._header = len(_header(entries, {**self._mark, **reserve}))
        self._pending = iter(entries.items())
        self._disk, self._waiting = ThreadPoolExecutor(max_workers=1), 0
        self._synced: Future[None] = Future()
        self._synced.set_result(None)

    def __enter__(self) -> SafetensorsWriter:
        with os_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = open_exclusively(self._part)
            self._file.seek(8 + self._header)
        return self

    def write(self, key: str, tensor: Tensor) -> None:
        """Appends the next tensor of the layout.

        Args:
            key: Of the tensor.
            tensor: As the layout has it: dtype and shape.
        """
        from .dtypes import DTYPE_NAMES

        expected, (dtype, shape) = next(self._pending)
        if (key, DTYPE_NAMES.get(tensor.dtype), tuple(tensor.shape)) != (expected, dtype, tuple(shape)):
            raise AssertionError(f"{key} {tensor.dtype} {tuple(tensor.shape)} where the layout has {expected} {dtype} {shape}")
        self._append(tensor)

    def write_rows(self, key: str, rows: Iterable[Tensor]) -> None:
        """Appends the next tensor of the layout, some rows at a time.

        Args:
            key: Of the tensor.
            rows: All of them, in the dtype of the layout.
        """
        expected, (dtype, shape) = next(self._pending)
        count = sum(map(self._append, rows))
        if key != expected or count != size_of(_STORED.get(dtype, dtype), shape):
            raise AssertionError(f"{key} of {count} bytes where the layout has {expected} {dtype} {shape}")

    def _append(self, tensor: Tensor) -> int:
        """Writes a tensor, and says how many bytes it has."""
        import torch

        with os_errors(self.path):
            self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            self._start_disk(tensor.nbytes)
        return tensor.nbytes

    def _start_disk(self, count: int) -> None:
        """Has the disk write what is there, in a thread, while more is merged; the system would begin at the end."""
        self._waiting += count
        if self._waiting < _AHEAD or not hasattr(os, "fdatasync") or not self._synced.done():
            return
        self._synced.result()
        self._file.flush()
        self._waiting, self._synced = 0, self._disk.submit(os.fdatasync, self._file.fileno())

    def finish(self, metadata: Mapping[str, str]) -> Path:
        """Fills the header in, syncs, and moves the file to its name.

        Args:
            metadata: Not larger than what was reserved.

        Returns:
            Where the file is.
        """
        if next(self._pending, None) is not None:
            raise AssertionError("finish was called before every tensor was written")
        header = _header(self._entries, {**self._mark, **metadata}, self._header)
        if len(header) != self._header:
            raise AssertionError(f"the metadata took {len(header)} bytes, {self._header} were reserved")
        with os_errors(self.path):
            self._synced.result()
            seal(self._file, len(header).to_bytes(8, "little") + header)
            if self._mark:
                self._file.close()
                return self._part
            publish_file(self._file, self._part, self.path)
        return self.path

    def __exit__(self, kind: type | None, *exc: object) -> None:
        self._disk.shutdown()
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():  # a full disk fails again in the flush of close
            self._file.close()
        if kind is not None:
            self._part.unlink(missing_ok=True)
