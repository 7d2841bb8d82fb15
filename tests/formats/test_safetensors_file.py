"""The reader of .safetensors files against the library: the same headers are taken, the same tensors come out."""

import contextlib
import hashlib
import json
import os
import random
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from extensions_built_in.zit_merge import ZitMergeError
from extensions_built_in.zit_merge.formats import safetensors_file
from extensions_built_in.zit_merge.formats.safetensors_file import SafetensorsFile

BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6} | dict.fromkeys(("I16", "U16", "F16", "BF16"), 16)
BITS |= dict.fromkeys(("I32", "U32", "F32"), 32) | dict.fromkeys(("I64", "U64", "F64", "C64"), 64)
BITS |= dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)


def entry(start=0, end=4, dtype="F32", shape=(1,), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end], **more}


# header, bytes of data behind it
HEADERS = {
    "one": ({"a": entry()}, 4),
    "none": ({}, 0),
    "metadata": ({"__metadata__": {"a": "b", "é": "貓"}, "a": entry()}, 4),
    "metadata null": ({"__metadata__": None, "a": entry()}, 4),
    "metadata with a number": ({"__metadata__": {"a": 1}, "a": entry()}, 4),
    "metadata a list": ({"__metadata__": ["a"], "a": entry()}, 4),
    "another order": ({"b": entry(4, 8), "a": entry()}, 8),
    "empty tensors": ({"z": entry(4, 4, shape=[0, 3]), "a": entry(), "b": entry(0, 0, shape=[0])}, 4),
    "scalar": ({"a": entry(shape=[])}, 4),
    "more than is known": ({"a": entry(more=[1])}, 4),
    "data too short": ({"a": entry()}, 3),
    "data too long": ({"a": entry()}, 5),
    "overlap": ({"a": entry(0, 8, shape=[2]), "b": entry(4, 12, shape=[2])}, 12),
    "the same place": ({"a": entry(), "b": entry()}, 4),
    "hole": ({"a": entry(), "b": entry(8, 12)}, 12),
    "hole at the start": ({"a": entry(4, 8)}, 8),
    "backwards": ({"a": entry(4, 0)}, 4),
    "negative": ({"a": entry(-4, 0)}, 4),
    "bytes too few": ({"a": entry(shape=[2])}, 4),
    "bytes too many": ({"a": entry(0, 8)}, 8),
    "negative shape": ({"a": entry(shape=[-1, -1])}, 4),
    "float shape": ({"a": entry(shape=[1.0])}, 4),
    "true shape": ({"a": entry(shape=[True])}, 4),
    "shape that overflows": ({"a": entry(shape=[2**62, 8])}, 4),
    "huge number": ({"a": entry(shape=[10**30])}, 4),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, 4),
    "three offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, 4),
    "unknown dtype": ({"a": entry(dtype="F33")}, 4),
    "dtype a list": ({"a": entry(dtype=["F32"])}, 4),
    "text entry": ({"a": "F32"}, 4),
    "half a byte": ({"a": entry(0, 1, "F4", [1])}, 1),
    "list": ([], 0),
    "text": ("a", 0),
    "spaces before and behind": (b"  " + json.dumps({"a": entry()}).encode() + b"\n ", 4),
    "more behind": (json.dumps({"a": entry()}).encode() + b"{}", 4),
    "zero behind": (json.dumps({"a": entry()}).encode() + b"\0", 4),
    "no UTF-8": (b'{"\xff":' + json.dumps(entry()).encode() + b"}", 4),
    "half a surrogate pair": (b'{"\\ud800":' + json.dumps(entry()).encode() + b"}", 4),
    "nested": (b"[" * 100_000, 4),
    **{f"metadata {value!r}": ({"__metadata__": value, "a": entry()}, 4) for value in ("", 0, False, [], {"a": None})},
    "empty": (b"", 0),
    **{
        f"{word} where nobody reads it": (json.dumps({"a": entry() | {"more": 0}}).replace(": 0}", f": {word}}}").encode(), 4)
        for word in ("NaN", "Infinity", "-Infinity", "1e999", "1" * 400, "true")
    },
    **{f"{bits} bits of {dtype}": ({"a": entry(0, bits, dtype, [8])}, bits) for dtype in BITS for bits in (4, 6, 8, 16, 32, 64)},
}


def put(folder, header, size):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(content)) + content + bytes(size))
    return path


def found(path):
    """What the library finds: (metadata, shapes, dtypes); None where it refuses the file."""
    with contextlib.suppress(SafetensorError), safe_open(path, framework="pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - no dict
        return file.metadata() or {}, [(key, tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()]
    return None


def found_here(path):
    with contextlib.suppress(ZitMergeError), SafetensorsFile(path) as file:
        return file.metadata, [(key, file.shape(key), entry.dtype) for key, entry in file.entries.items()]
    return None


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_is_taken_where_the_library_takes_it(tmp_path, name):
    path = put(tmp_path, *HEADERS[name])
    assert found_here(path) == found(path)


def test_the_list_of_headers_has_both_kinds(tmp_path):
    taken = [name for name, header in HEADERS.items() if found(put(tmp_path, *header))]
    assert len(BITS) + 10 == len(taken) < len(HEADERS) - 20


def test_a_key_that_is_there_twice_is_refused_where_the_library_takes_the_last(tmp_path):
    one = json.dumps({"a": entry()})[1:-1]
    path = put(tmp_path, f"{{{one},{one}}}".encode(), 4)
    with pytest.raises(ZitMergeError, match="a key twice"):
        SafetensorsFile(path)


def test_any_byte_of_a_header_may_be_wrong(tmp_path):
    draw = random.Random(0)
    whole = json.dumps({"__metadata__": {"a": "b"}, "a": entry(), "b": entry(4, 8, shape=[2, 1], dtype="F16")}).encode()
    taken = 0
    for _ in range(600):
        header = bytearray(whole)
        header[draw.randrange(len(header))] = draw.choice(b'0123456789{}[]",: abFI\x00\xff')
        path = put(tmp_path, bytes(header), 8)
        assert found_here(path) == found(path), bytes(header)
        taken += found(path) is not None
    assert 20 < taken < 500


DTYPES = ["bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float16", "bfloat16", "float32"]
DTYPES += ["float64", "float8_e4m3fn", "float8_e5m2"]


def same(x, y):
    return (
        x.dtype == y.dtype
        and x.shape == y.shape
        and x.contiguous().view(-1).view(torch.uint8).equal(y.view(-1).view(torch.uint8))
    )


@pytest.fixture
def file(tmp_path):
    """A file of tensors of every dtype, and of every number of dimensions."""
    stored = {name: torch.arange(24).to(getattr(torch, name)).reshape(6, 4) for name in DTYPES}
    stored |= {"scalar": torch.tensor(3.5), "vector": torch.ones(3), "cube": torch.rand(2, 3, 4), "empty": torch.ones(0, 4)}
    path = tmp_path / "a.safetensors"
    save_file(stored, path, {"who": "me"})
    return path, stored


def test_tensors_and_rows_come_out_as_they_were_stored(file):
    path, stored = file
    with SafetensorsFile(path) as opened:
        assert opened.metadata == {"who": "me"} and list(opened.entries) == sorted(stored)
        assert all(same(opened.tensor(key), tensor) for key, tensor in stored.items())
        for key in (*DTYPES, "vector", "cube"):
            assert all(same(opened.tensor(key, rows), stored[key][slice(*rows)]) for rows in ((0, 1), (1, 2), (0, 2), (1, 1)))


def test_what_torch_has_no_dtype_for_is_refused_by_its_name(tmp_path):
    path = put(tmp_path, {"a": entry(0, 4, "F4", [8])}, 4)
    with SafetensorsFile(path) as opened, pytest.raises(ZitMergeError, match="a is stored as F4"):
        opened.tensor("a")


def test_a_tensor_is_one_read_of_its_own_bytes(file, monkeypatch):
    path, stored = file
    with SafetensorsFile(path) as opened:
        sizes, preadv = [], os.preadv
        monkeypatch.setattr(os, "preadv", lambda *args: sizes.append(preadv(*args)) or sizes[-1])
        opened.tensor("cube")
        opened.tensor("float64", (2, 4))
    assert sizes == [2 * 3 * 4 * 4, 2 * 4 * 8]


@pytest.mark.parametrize("has_pread", [True, False])
def test_threads_share_an_open_file(file, monkeypatch, has_pread):
    path, stored = file
    if not has_pread:  # as on Windows
        monkeypatch.delattr(os, "preadv")
    wanted = hashlib.sha256(path.read_bytes()[8 + int.from_bytes(path.read_bytes()[:8], "little") :]).hexdigest()
    monkeypatch.setattr(safetensors_file, "_CHUNK", 100)
    with SafetensorsFile(path) as opened, ThreadPoolExecutor(4) as pool:
        tensors = [(key, pool.submit(opened.tensor, key)) for _ in range(20) for key in stored]
        hashes = [pool.submit(opened.sha256) for _ in range(5)]
        assert all(same(future.result(), stored[key]) for key, future in tensors)
        assert {future.result() for future in hashes} == {wanted}


def test_parts_of_a_read_that_the_system_cuts_short_are_put_together(file, monkeypatch):
    path, stored = file
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda handle, buffers, start: preadv(handle, [buffers[0][:7]], start))
    with SafetensorsFile(path) as opened:
        assert same(opened.tensor("cube"), stored["cube"])


def shrink(path):
    os.truncate(path, path.stat().st_size // 2)


def rewrite(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    with path.open("r+b") as file:
        file.write(content)


def grow(path):
    with path.open("ab") as file:
        file.write(b"more")


def replace(path):
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


CHANGES = [shrink, rewrite, grow, replace]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_while_a_file_is_open_is_found_at_its_end(file, change):
    with pytest.raises(ZitMergeError, match=r"a\.safetensors: was changed while it was used"), SafetensorsFile(file[0]) as opened:
        change(file[0])
        with contextlib.suppress(ZitMergeError):
            opened.tensor("cube")


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_was_changed_is_not_the_one_that_was_read(file, change):
    with SafetensorsFile(file[0]) as opened:
        stamp = opened.stamp
    SafetensorsFile(file[0], stamp).close()
    change(file[0])
    with pytest.raises(ZitMergeError, match=r"a\.safetensors: (was changed while it was used|is not a whole)"):
        SafetensorsFile(file[0], stamp)


def test_a_read_behind_the_new_end_is_a_sentence(file):
    with SafetensorsFile(file[0]) as opened:
        os.truncate(file[0], 8)
        with pytest.raises(ZitMergeError, match="was changed while it was used"):
            opened.tensor("cube")
        with pytest.raises(ZitMergeError, match="was changed while it was used"):
            opened.sha256()
        opened.close()


def test_a_file_that_is_gone_can_be_read_to_its_end(file):
    with SafetensorsFile(file[0]) as opened:
        file[0].unlink()
        assert same(opened.tensor("cube"), file[1]["cube"])


def test_another_error_is_not_hidden_by_a_change(file):
    with pytest.raises(KeyError), SafetensorsFile(file[0]) as opened:
        grow(file[0])
        opened.tensor("none")
