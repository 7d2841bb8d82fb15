"""A whole transformer of Z-Image on disk: a diffusers folder or one file, in either naming, read rows by rows.

A folder is diffusers' (the repository, or its `transformer`: one file, or shards with an index), a file is ComfyUI's (q, k and v
fused, with and without `model.diffusion_model.`) or holds diffusers' names. Weights that are quantized are recognised by their
tensors and refused: most of a LoRA is smaller than their steps.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ZitMergeError, counted
from ..files.extent import read_json
from ..files.paths import NO_PICKLES, PICKLES
from ..model.tensors import TENSORS, ModelTensor, block_of
from ..model.zimage import REAL_SIZES, SECTIONS, infer_sizes
from .names import split_wrappers
from .safetensors_file import Entry, SafetensorsFile, Stamp

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "diffusion_pytorch_model.safetensors.index.json"
CONFIG = "config.json"
FLOATS = ("F64", "F32", "F16", "BF16")
_INSTEAD = "use the model in bf16: Tongyi-MAI/Z-Image-Turbo, or ComfyUI's z_image_turbo_bf16.safetensors"
# What stands beside weights that are quantized, by the end of its key -> what the quantization is called.
_QUANTIZED: Mapping[str, str] = {
    r"scaled_fp8|\.scale_weight|\.weight_scale(_inv|_2)?|\.comfy_quant": "scaled fp8, int8 or fp4",
    r"\.(absmax|quant_map|nested_absmax|quant_state\.\w+)": "NF4 or FP4 of bitsandbytes",
    r"\.(qweight|wscales|qzeros)": "4 bit (SVDQuant, AWQ or GPTQ)",
    r"\.(SCB|weight_format)": "int8 of bitsandbytes",
}
_CHUNK = 1 << 22  # bytes that are hashed at a time


class Place(NamedTuple):
    """Where a tensor is.

    Attributes:
        file: Number of the file.
        key: Of the tensor there.
        rows: (first, last + 1) of it; None is all.
        dtype: As headers name it.
        shape: Of the rows.
    """

    file: int
    key: str
    rows: tuple[int, int] | None
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A transformer on disk, described by its headers.

    Attributes:
        path: As it was named.
        files: Its files with the stamps that they had.
        places: Diffusers' name of a tensor -> where it is, in the model's order.
        extras: Key -> where it is, of every other tensor in these files: text encoders, VAE, parts of other variants.
        native: Whether it has the original checkpoint's names.
        config: Of a diffusers folder: its config.json.
        metadata: Of the first file.
    """

    path: Path
    files: Sequence[tuple[Path, Stamp]]
    places: Mapping[str, Place]
    extras: Mapping[str, Place] = field(default_factory=dict)
    native: bool = False
    config: Mapping[str, Any] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """Module -> (out, in) of its weight."""
        found = {TENSORS[name].module: place.shape for name, place in self.places.items()}
        return {module: (shape[0], shape[1]) for module, shape in found.items() if module}

    @property
    def dtype_name(self) -> str:
        """The commonest dtype of its weights, as headers name it."""
        counts: dict[str, int] = defaultdict(int)
        for module, (out, into) in self.shapes.items():
            counts[self.places[f"{module}.weight"].dtype] += out * into
        return max(counts, key=counts.__getitem__)

    @property
    def stamp(self) -> tuple[Stamp, ...]:
        """Of all its files."""
        return tuple(stamp for _, stamp in self.files)

    def sha256(self) -> str:
        """Hex SHA-256 of the transformer, the same in every form: of the name, dtype, shape and bytes of one tensor after the
        other."""
        return self._sha256(self.places)

    def extras_sha256(self) -> str:
        """The same of every other tensor."""
        return self._sha256(dict(sorted(self.extras.items())))

    def _sha256(self, places: Mapping[str, Place]) -> str:
        with CheckpointReader(self) as reader:
            digest = Digest()
            for name, place in places.items():
                digest.begin(name, place)
                for rows in reader.chunks(place, _CHUNK):
                    digest.update(rows)
            return digest.hexdigest()


Seen = Stamp | Checkpoint | None  # what a file was when it was planned


class Digest:
    """The hash of tensors, one after the other."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def begin(self, name: str, place: Place) -> None:
        """The next tensor.

        Args:
            name: Diffusers' name, or the key of an extra.
            place: Its dtype and shape.
        """
        self._sha256.update(f"{name} {place.dtype} {list(place.shape)}\n".encode())

    def update(self, rows: Tensor) -> None:
        """Its next rows."""
        import torch

        self._sha256.update(rows.reshape(-1).view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        """Of all of them."""
        return self._sha256.hexdigest()


class CheckpointReader:
    """The opened files of a checkpoint, still those that were described."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self._stack = ExitStack()
        with ExitStack() as stack:
            self._files = [stack.enter_context(SafetensorsFile(*file)) for file in checkpoint.files]
            self._stack = stack.pop_all()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.__exit__(*exc)

    def __contains__(self, module: object) -> bool:
        return module in self.checkpoint.shapes

    def weight(self, module: str) -> Tensor:
        """(out, in) of a canonical module, in its stored dtype."""
        return self.rows(self.checkpoint.places[f"{module}.weight"])

    def norm(self, module: str) -> float:
        """Frobenius norm of a weight; 1 of one that is zero, beside which every change is as large."""
        import torch

        place = self.checkpoint.places[f"{module}.weight"]
        squares = (float(torch.linalg.vector_norm(rows.float())) ** 2 for rows in self.chunks(place, _CHUNK))
        return math.sqrt(sum(squares)) or 1.0

    def rows(self, place: Place, first: int = 0, last: int | None = None) -> Tensor:
        """Rows first .. last - 1 of a tensor; all of it by default.

        Args:
            place: Where it is.
            first: The first row.
            last: The row after the last one.
        """
        if not place.shape or (place.rows is None and last is None):
            return self._files[place.file].tensor(place.key)
        start = place.rows[0] if place.rows else 0
        end = place.shape[0] if last is None else last
        return self._files[place.file].tensor(place.key, (start + first, start + end))

    def chunks(self, place: Place, size: int) -> Iterator[Tensor]:
        """A tensor, some rows at a time, of about `size` bytes."""
        if len(place.shape) < 2:
            yield self.rows(place)
            return
        row = max(1, 4 * math.prod(place.shape[1:]))
        step = max(1, size // row)
        for first in range(0, place.shape[0], step):
            yield self.rows(place, first, min(first + step, place.shape[0]))


def open_checkpoint(path: Path, *, shapes: str = "strict", quantized: bool = False) -> Checkpoint:
    """Describes a transformer. Reads headers only.

    Args:
        path: A folder or a file.
        shapes: `strict`, the real Z-Image, or `free`, any one consistent set of sizes and any number of layers.
        quantized: Whether its weights may be, where they are not read.

    Raises:
        ZitMergeError: It is no whole Z-Image transformer, or one that is quantized.
    """
    paths, config = _files(path)
    places: dict[str, Place] = {}
    extras: dict[str, Place] = {}
    files, styles, metadata = [], set[bool](), dict[str, str]()
    index = _index(paths)
    for number, file_path in enumerate(paths):
        with SafetensorsFile(file_path) as file:
            files.append((file_path, file.stamp))
            metadata = metadata or dict(file.metadata)
            _check_index(index, file_path, file.entries)
            for key, entry in file.entries.items():
                if (wanted := index.get(key)) and wanted != file_path.name:
                    raise ZitMergeError(f"{path}: {key} is in {file_path.name}, the index says {wanted}: get the folder again")
                found = _found(key)
                for tensor in found:
                    if tensor.name in places:
                        raise ZitMergeError(f"{path}: {tensor.name} is there twice ({key}): get a whole model")
                    places[tensor.name] = _place(path, number, key, entry, tensor, len(found))
                    styles.add(len(found) > 1)
                if not found:
                    extras[key] = Place(number, key, None, entry.dtype, entry.shape)
    if quantized:
        extras = {key: place for key, place in extras.items() if not _quantization(key)}
    else:
        _check_quantized(path, places, extras)
    ordered = {name: places[name] for name in TENSORS if name in places}
    native = True in styles
    if native and False in {len(_found(places[n].key)) > 1 for n in places if n.endswith(("to_q.weight", "to_k.weight"))}:
        raise ZitMergeError(f"{path}: mixes fused and separate q, k and v: get a whole model")
    checkpoint = Checkpoint(path, tuple(files), ordered, extras, native, config, metadata)
    _check_whole(checkpoint, shapes)
    return checkpoint


def is_checkpoint(path: Path) -> bool:
    """Whether a path is to be read as a whole model: a folder, or a file with weights of Z-Image under their own names."""
    if path.is_dir():
        return path.suffix != ".safetensors"  # a folder of that name is in the way of a file
    try:
        with SafetensorsFile(path) as file:
            return sum(bool(_found(key)) for key in file.entries) > _MANY
    except ZitMergeError:
        return False


_MANY = 20  # weights of the model itself, as no LoRA has them beside its factors


def _files(path: Path) -> tuple[list[Path], Mapping[str, Any] | None]:
    """(files of the weights, config.json)."""
    if not path.exists():
        raise ZitMergeError(f"{path}: is not there: give the folder or the file of a Z-Image model")
    if path.suffix.lower() == ".gguf":
        raise ZitMergeError(f"{path}: is GGUF, whose weights are quantized: {_INSTEAD}")
    if path.suffix.lower() in PICKLES:
        raise ZitMergeError(f"{path} {NO_PICKLES}: save it as .safetensors in a program that you trust it to")
    if not path.is_dir():
        return [path], None
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    config = _read_json(folder / CONFIG) if (folder / CONFIG).is_file() else None
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if not indexes:
        found = sorted(folder.glob("*.safetensors"))
        if len(found) != 1:
            what = "holds no .safetensors file" if not found else f"holds {len(found)} .safetensors files and no index"
            raise ZitMergeError(f"{folder}: {what}: give the folder of a diffusers model, or the one file of a ComfyUI model")
        return found, config
    names = sorted(set(_index_of(indexes[0]).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ZitMergeError(f"{folder}: {missing[0]}{more}, which its index names, is not there: get the whole folder")
    return [folder / name for name in names], config


def _index(paths: Sequence[Path]) -> Mapping[str, str]:
    indexes = sorted(paths[0].parent.glob("*.safetensors.index.json"))
    found = _index_of(indexes[0]) if indexes else {}
    return found if {p.name for p in paths} == set(found.values()) else {}


def _index_of(path: Path) -> Mapping[str, str]:
    """Key -> file name of an index."""
    table = _read_json(path).get("weight_map")
    names = table.values() if isinstance(table, dict) else ()
    if not names or not all(isinstance(name, str) and re.fullmatch(r"[^/\\]+\.safetensors", name) for name in names):
        raise ZitMergeError(f"{path}: names no files of weights: get the folder again")
    return table  # type: ignore[return-value]


def _check_index(index: Mapping[str, str], path: Path, entries: Collection[str]) -> None:
    lost = [key for key, name in index.items() if name == path.name and key not in entries]
    if lost:
        raise ZitMergeError(f"{path}: does not hold {lost[0]}, which the index says it does: get the folder again")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        table = read_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ZitMergeError(f"{path}: can't be read ({e}): get the folder again") from e
    if not isinstance(table, dict):
        raise ZitMergeError(f"{path}: holds no table: get the folder again")
    return table


def _by_key() -> Mapping[str, tuple[ModelTensor, ...]]:
    table: dict[str, tuple[ModelTensor, ...]] = {}
    for tensor in TENSORS.values():
        table[tensor.name] = (tensor,)
        if tensor.native != tensor.name:
            table[tensor.native] = (*table.get(tensor.native, ()), tensor)
    return table


_BY_KEY = _by_key()


def _found(key: str) -> tuple[ModelTensor, ...]:
    """What a key holds: nothing of the transformer, one tensor, or q, k and v."""
    return _BY_KEY.get(split_wrappers(key)[1], ())


def _place(path: Path, number: int, key: str, entry: Entry, tensor: ModelTensor, parts: int) -> Place:
    if parts == 1 or tensor.third is None:
        return Place(number, key, None, entry.dtype, entry.shape)
    if not entry.shape or entry.shape[0] % parts:
        raise ZitMergeError(f"{path}: {key} has shape {list(entry.shape)}, which is no q, k and v: get a whole model")
    rows = entry.shape[0] // parts
    return Place(number, key, (tensor.third * rows, (tensor.third + 1) * rows), entry.dtype, (rows, *entry.shape[1:]))


def _check_quantized(path: Path, places: Mapping[str, Place], extras: Collection[str]) -> None:
    """Raises if weights of the transformer are quantized; those of a text encoder in the same file may be."""
    for key in extras:
        if kind := _quantization(key):
            raise _quantized(path, f"{kind}: {key}")
    for name, place in places.items():
        if place.dtype not in FLOATS:
            raise _quantized(path, f"{name} is {place.dtype}")


def _quantization(key: str) -> str | None:
    """What the transformer's weights are quantized as, if this is the key of something that stands beside such weights."""
    name = split_wrappers(key)[1]
    for pattern, kind in _QUANTIZED.items():
        found = re.search(rf"(?:{pattern})$", name)
        if found and (block_of(name) or name == "scaled_fp8" or _is_of_weight(name[: found.start()])):
            return kind
    return None


def _quantized(path: Path, what: str) -> ZitMergeError:
    return ZitMergeError(f"{path}: is quantized ({what}), most of a LoRA is smaller than its steps: {_INSTEAD}")


def _is_of_weight(stem: str) -> bool:
    return f"{stem.removesuffix('.weight')}.weight" in _BY_KEY


def _check_whole(checkpoint: Checkpoint, shapes: str) -> None:
    """Raises unless it is a whole Z-Image transformer of one set of sizes."""
    path, places = checkpoint.path, checkpoint.places
    if "lora" in " ".join(checkpoint.extras).lower() and len(places) < len(TENSORS) // 2:
        raise ZitMergeError(f"{path}: is a LoRA, no whole model: give the model's folder or file")
    if not places:
        example = next(iter(checkpoint.extras), None)
        what = (
            f"none of its {len(checkpoint.extras)} tensors is one of Z-Image (e.g. {example})" if example else "holds no tensors"
        )
        raise ZitMergeError(f"{path}: is no Z-Image model, {what}: give a Z-Image model")
    blocks = {block_of(name) for name in places if block_of(name)}
    every = set(TENSORS) if shapes == "strict" else {n for n in TENSORS if block_of(n) is None or block_of(n) in blocks}
    missing = [name for name in TENSORS if name in every and name not in places]
    for section, count in SECTIONS.items():
        there = {i for i in range(count) if f"{section}.{i}" in blocks}
        missing += [f"{section}.{i}" for i in range(max(there, default=1)) if i not in there]
    if missing:
        more = f" and {counted(len(missing) - 1, 'more tensor')}" if len(missing) > 1 else ""
        raise ZitMergeError(f"{path}: {missing[0]}{more} of Z-Image is not there: get a whole model")
    for name, place in places.items():
        module = TENSORS[name].module
        if module and len(place.shape) != 2:
            raise ZitMergeError(f"{path}: {name} has shape {list(place.shape)}, a weight has two sides: get a whole model")
    try:
        sizes = infer_sizes(checkpoint.shapes)
    except ValueError as e:
        raise ZitMergeError(f"{path}: is no Z-Image model, {e}: give a Z-Image model") from None
    for name, place in places.items():
        if name.endswith(".bias") and (out := checkpoint.shapes.get(name.removesuffix(".bias"))) and place.shape != out[:1]:
            raise ZitMergeError(f"{path}: {name} has shape {list(place.shape)} beside {out[0]} rows: get a whole model")
    wrong = [key for key, size in REAL_SIZES.items() if sizes.get(key) != size] if shapes == "strict" else []
    if wrong:
        raise ZitMergeError(
            f"{path}: has other sizes than Z-Image ({wrong[0]} {sizes.get(wrong[0])}, not {REAL_SIZES[wrong[0]]}): give a Z-Image"
            " model, or set shapes: free"
        )
