"""A .safetensors file, read through one descriptor and never mapped: a file that shrinks must not kill the process.

The header is checked as the safetensors library checks it (safetensors/src/tensor.rs): every byte of the data belongs to exactly
one tensor, each of the size that its dtype and shape take.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import threading
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from ..errors import ZitMergeError
from ..files.inputs import open_regular

if TYPE_CHECKING:
    from torch import Tensor

_HEADER_LIMIT = 100_000_000  # bytes, as in the library
_CHUNK = 1 << 22

# Name in the header -> (bits of one element, torch's name; "" where a tensor of it has no use here)
_STORED: Mapping[str, tuple[int, str]] = {
    **{"BOOL": (8, "bool"), "U8": (8, "uint8"), "I8": (8, "int8"), "I16": (16, "int16"), "U16": (16, "uint16")},
    **{"I32": (32, "int32"), "U32": (32, "uint32"), "I64": (64, "int64"), "U64": (64, "uint64")},
    **{"F16": (16, "float16"), "BF16": (16, "bfloat16"), "F32": (32, "float32"), "F64": (64, "float64")},
    **{"F8_E4M3": (8, "float8_e4m3fn"), "F8_E5M2": (8, "float8_e5m2"), "F8_E8M0": (8, "")},
    **{"F8_E4M3FNUZ": (8, "float8_e4m3fnuz"), "F8_E5M2FNUZ": (8, "float8_e5m2fnuz")},
    **{"C64": (64, ""), "F4": (4, ""), "F6_E2M3": (6, ""), "F6_E3M2": (6, "")},
}


class Stamp(NamedTuple):
    """What changes when a file is replaced, rewritten, cut short or appended to."""

    device: int
    inode: int
    size: int
    mtime_ns: int


class Entry(NamedTuple):
    """A tensor of the header.

    Attributes:
        dtype: As the header names it.
        shape: Of the tensor.
        start: Of its bytes, counted from the first tensor's.
        end: Of its bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """An open file; as a context it closes it, and raises if the file was changed in the meantime.

    Reads may come from several threads.

    Args:
        path: The file.
        expected: The stamp that it had when something else was learned from it.

    Attributes:
        path: As given.
        stamp: Of the file when it was opened.
        metadata: `__metadata__` of the header.
        entries: Key -> its tensor, sorted by key as in the library.

    Raises:
        ZitMergeError: It can't be read, is not whole, is pickled, or is no longer what it was.
    """

    def __init__(self, path: Path, expected: Stamp | None = None):
        self.path = path
        try:
            self._file = open_regular(path)
        except FileNotFoundError:
            raise ZitMergeError(f"{path}: there is no such file") from None
        except OSError as e:
            raise ZitMergeError(_unreadable(path, e)) from e
        self._lock = threading.Lock()
        try:
            self.stamp = self._stamp()
            if expected not in (None, self.stamp):
                raise self._changed()
            self.metadata, self.entries, self._data = self._read_header()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            if kind is None or issubclass(kind, ZitMergeError):  # what looks like a broken file may be a changed one
                self.check()
        finally:
            self.close()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def check(self) -> None:
        """Raises if the file is no longer what was opened, or another one lies at its path; it may be gone from there."""
        if self._file.closed:
            return
        now = {self._stamp()}
        with contextlib.suppress(OSError):
            now.add(_stamp(os.stat(self.path)))
        if now != {self.stamp}:
            raise self._changed()

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self.entries[key].shape

    def tensor(self, key: str, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor, or some of its rows.

        Args:
            key: Its key.
            rows: (first, last + 1); None is all.

        Raises:
            ZitMergeError: torch has no such dtype, or the file was changed or can't be read.
        """
        import torch

        name, shape, start, end = self.entries[key]
        dtype = getattr(torch, _STORED[name][1] or "-", None)
        if dtype is None:
            raise ZitMergeError(f"{self.path}: {key} is stored as {name}, which can't be read here: use another file")
        if rows:
            row = (end - start) // shape[0]
            start, end, shape = start + rows[0] * row, start + rows[1] * row, (rows[1] - rows[0], *shape[1:])
        content = torch.empty(end - start, dtype=torch.uint8)
        self._read_into(content.numpy().data, self._data + start)
        return content.view(dtype).view(shape)

    def content(self, key: str) -> bytes:
        """The bytes of a tensor.

        Raises:
            ZitMergeError: The file was changed or can't be read.
        """
        *_, start, end = self.entries[key]
        found = bytearray(end - start)
        self._read_into(memoryview(found), self._data + start)
        return bytes(found)

    def sha256(self) -> str:
        """Hex SHA-256 of the tensor data, header left out."""
        digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
        for start in range(self._data, self.stamp.size, _CHUNK):
            chunk = buffer[: self.stamp.size - start]
            self._read_into(chunk, start)
            digest.update(chunk)
        return digest.hexdigest()

    def _stamp(self) -> Stamp:
        return _stamp(os.fstat(self._file.fileno()))

    def _changed(self) -> ZitMergeError:
        return ZitMergeError(f"{self.path}: was changed while it was used: wait until it is complete, then start again")

    def _read_into(self, buffer: memoryview, start: int) -> None:
        """Fills a buffer with the bytes from `start` on."""
        try:
            while buffer:
                if hasattr(os, "preadv"):
                    count = os.preadv(self._file.fileno(), [buffer], start)
                else:  # Windows
                    with self._lock:
                        self._file.seek(start)
                        count = self._file.readinto(buffer)  # type: ignore[attr-defined]
                if not count:
                    raise self._changed()
                buffer, start = buffer[count:], start + count
        except OSError as e:
            raise ZitMergeError(_unreadable(self.path, e)) from e

    def _read_header(self) -> tuple[Mapping[str, str], Mapping[str, Entry], int]:
        """(metadata, entries, where the data starts)."""
        try:
            if self.stamp.size < 8:
                raise ValueError("it is shorter than a header")
            length = bytearray(8)
            self._read_into(memoryview(length), 0)
            size = int.from_bytes(length, "little")
            if size > min(_HEADER_LIMIT, self.stamp.size - 8):
                raise ValueError("its header is longer than the file" if size > self.stamp.size - 8 else "its header is too long")
            header = bytearray(size)
            self._read_into(memoryview(header), 8)
            metadata, entries = _parse(header.decode(), self.stamp.size - 8 - size)
        except (ValueError, RecursionError) as e:
            if self._is_pickle():
                raise ZitMergeError(
                    f"{self.path}: is a pickled checkpoint; pickles can run code when they are opened, so only .safetensors is "
                    "read: save it as .safetensors in a program that you trust it to"
                ) from None
            why = str(e).partition(":")[0] if isinstance(e, UnicodeDecodeError | json.JSONDecodeError) else str(e)
            raise ZitMergeError(f"{self.path}: is not a whole .safetensors file ({why}): copy or download it again") from e
        return metadata, entries, 8 + size

    def _is_pickle(self) -> bool:
        """A pickle of protocol 2 to 5, bare or in the zip archive of torch.save."""
        self._file.seek(0)
        head = self._file.read(2)
        return (len(head) == 2 and head[0] == 0x80 and 2 <= head[1] <= 5) or zipfile.is_zipfile(self._file)


def size_of(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor.

    Args:
        dtype: As headers name it.
        shape: Of the tensor.
    """
    return math.prod(shape) * _STORED[dtype][0] // 8


def _stamp(facts: os.stat_result) -> Stamp:
    return Stamp(facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)


def _unreadable(path: Path, error: OSError) -> str:
    return f"{path}: can't be read ({error.strerror or error}): check the file and its permissions"


def _parse(text: str, size: int) -> tuple[Mapping[str, str], Mapping[str, Entry]]:
    """Metadata and tensors of a header.

    Args:
        text: Its JSON.
        size: Bytes that follow.

    Raises:
        ValueError: It is no header, or not that of these bytes.
    """
    table = json.loads(text, object_pairs_hook=_no_twins, parse_constant=_finite, parse_float=_finite, parse_int=_whole)
    if not isinstance(table, dict):
        raise ValueError("its header is no table")
    metadata = table.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not all text")
    for word in (*table, *metadata, *metadata.values()):
        word.encode()  # UnicodeEncodeError, a ValueError: half of a surrogate pair is no text
    entries = {key: _entry(key, table[key]) for key in sorted(table)}
    end = 0
    for key, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.start != end:
            raise ValueError(f"{key} does not begin where the tensor before it ends")
        end = entry.end
    if end != size:
        raise ValueError(f"its tensors take {end} bytes, it has {size}")
    return metadata, entries


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("its header has a key twice")
    return table


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"its header has {number[:20]}, which is no number of JSON")
    return value


def _whole(number: str) -> int:
    _finite(number)
    return int(number)


def _entry(key: str, told: Any) -> Entry:
    """A tensor's entry of the header, checked by itself."""
    dtype, shape, place = map(told.get, ("dtype", "shape", "data_offsets")) if isinstance(told, dict) else (None, None, None)
    if not isinstance(dtype, str) or dtype not in _STORED or not _are_sizes(shape) or not _are_sizes(place) or len(place) != 2:
        raise ValueError(f"{key} has no dtype, shape and place that can be read")
    if 8 * (place[1] - place[0]) != math.prod(shape) * _STORED[dtype][0]:
        raise ValueError(f"{key} does not have the bytes that its shape takes")
    return Entry(dtype, tuple(shape), *place)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) <= 64 and all(type(n) is int and 0 <= n < 1 << 64 for n in value)
