"""Writes a transformer in the form of diffusers, a folder of shards, or of ComfyUI, one file."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ZitMergeError
from ..files.atomic import write_folder, write_whole
from ..model.tensors import TENSORS, block_of
from ..model.zimage import MODULES, SECTIONS, infer_sizes
from .checkpoint import CONFIG, FLOATS, INDEX, Checkpoint, Place
from .names import split_wrappers
from .safetensors_file import size_of
from .safetensors_writer import SafetensorsWriter
from .spec import FP8, Layout

if TYPE_CHECKING:
    from torch import Tensor

_SHARD = 5_000_000_000  # bytes, as diffusers' max_shard_size
_HEAD = 128  # dim / n_heads of Z-Image, and the sum of its axes_dims
_HEADERS = {"bf16": "BF16", "fp16": "F16", "fp32": "F32", FP8: "BF16"}
SCALED = "F8_E4M3"


class Written(NamedTuple):
    """One tensor of the output.

    Attributes:
        key: There.
        dtype: As headers name it.
        shape: There.
        parts: (diffusers' name, or the key of an extra; where it is in the base), rows after rows.
        scale_of: The key whose numbers are multiplied with this one, if that is what it is.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[tuple[str, Place], ...]
    scale_of: str = ""


def checkpoint_layout(base: Checkpoint, form: str, dtype: str | None) -> list[Written]:
    """The tensors of the output in order.

    Args:
        base: What is written again.
        form: One of CHECKPOINT_FORMATS.
        dtype: Of every tensor of the transformer, as a config has it; None leaves each its own. In fp8 adaLN, embedders, norms
            and the final layer stay bf16, every other weight has a scale beside it (ComfyUI comfy/utils.py, convert_old_quants).
    """
    units: dict[str, list[tuple[str, Place]]] = {}
    for name, place in base.places.items():
        other = place.key if base.native else TENSORS[name].native
        key = name if form == "diffusers" else other
        units.setdefault(key, []).append((name, place))
    found = []
    for key, parts in units.items():
        places = [place for _, place in parts]
        shape = (sum(p.shape[0] for p in places), *places[0].shape[1:]) if len(places) > 1 else places[0].shape
        is_scaled = dtype == FP8 and _is_scaled(parts[0][0])
        stored = SCALED if is_scaled else _HEADERS[dtype] if dtype else _widest(p.dtype for p in places)
        found.append(Written(key, stored, shape, tuple(parts)))
        if is_scaled:
            found.append(Written(f"{key.removesuffix('.weight')}.scale_weight", "F32", (), (), key))
    if dtype == FP8:
        found.append(Written(f"{_prefix(base)}scaled_fp8", SCALED, (2,), ()))  # two numbers: products in the full precision
    if not left_out(base, form):
        found += [Written(key, p.dtype, p.shape, ((key, p),)) for key, p in sorted(base.extras.items())]
    return found


def _is_scaled(name: str) -> bool:
    module = TENSORS[name].module
    return bool(module and block_of(name) and MODULES[module].component != "adaLN_modulation")


def _prefix(base: Checkpoint) -> str:
    """What stands before the names in the output."""
    key = next(iter(base.places.values())).key
    return split_wrappers(key)[0] if base.native else ""


def left_out(base: Checkpoint, form: str) -> tuple[str, ...]:
    """The keys of tensors that the other form has no place for: text encoders, VAE, parts of other variants."""
    return tuple(sorted(base.extras)) if base.native != (form == "comfyui") else ()


def _widest(dtypes: Iterable[str]) -> str:
    return min(dtypes, key=FLOATS.index)


class CheckpointWriter:
    """Writes a transformer beside its final name and moves it there when it is whole.

    Args:
        path: A folder for diffusers, else a file.
        base: Whose config.json a folder gets.
        tensors: In the order in which `write` will be called.
        form: One of CHECKPOINT_FORMATS.
        reserve: Metadata of at least the size that `finish` will get.
        limit: Bytes of a shard.
    """

    def __init__(
        self,
        path: Path,
        base: Checkpoint,
        tensors: Sequence[Written],
        form: str,
        reserve: Mapping[str, str],
        limit: int = _SHARD,
    ):
        self._path, self._form, self._reserve = path, form, reserve
        self._config = config_of(base) if form == "diffusers" else None
        self._shards = _shards(tensors, limit) if form == "diffusers" else {path.name: list(tensors)}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> CheckpointWriter:
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(write_folder(self._path)) if self._config is not None else self._path.parent
            self._folder = folder
            self._writers = {
                name: stack.enter_context(SafetensorsWriter(folder / name, _layout(tensors), self._reserve))
                for name, tensors in self._shards.items()
            }
            self._stack = stack.pop_all()
        self._owners = {t.key: self._writers[name] for name, tensors in self._shards.items() for t in tensors}
        return self

    def write(self, tensor: Written, rows: Iterable[Tensor]) -> None:
        """Appends the next tensor.

        Args:
            tensor: Of the layout.
            rows: All of them, in its dtype.
        """
        self._owners[tensor.key].write_rows(tensor.key, rows)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Fills the headers in and syncs; the folder or file has its name when the context ends.

        Args:
            metadata: Not larger than what was reserved.
        """
        for writer in self._writers.values():
            writer.finish(metadata)
        if self._config is None:
            return
        write_whole(self._folder / CONFIG, [json.dumps(self._config, indent=2).encode() + b"\n"])
        if len(self._shards) > 1:
            size = sum(size_of(t.dtype, t.shape) for tensors in self._shards.values() for t in tensors)
            table = {t.key: name for name, tensors in self._shards.items() for t in tensors}
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(table.items()))}
            write_whole(self._folder / INDEX, [json.dumps(index, indent=2).encode() + b"\n"])

    def __exit__(self, *exc: object) -> None:
        self._stack.__exit__(*exc)  # type: ignore[arg-type]


def _layout(tensors: Iterable[Written]) -> Layout:
    return {t.key: (t.dtype, t.shape) for t in tensors}


def _shards(tensors: Sequence[Written], limit: int) -> dict[str, list[Written]]:
    """File name -> its tensors: as few files as the limit allows, filled in order."""
    groups: list[list[Written]] = [[]]
    taken = 0
    for tensor in tensors:
        size = size_of(tensor.dtype, tensor.shape)
        if groups[-1] and taken + size > limit:
            groups.append([])
            taken = 0
        groups[-1].append(tensor)
        taken += size
    if len(groups) == 1:
        return {"diffusion_pytorch_model.safetensors": groups[0]}
    return {f"diffusion_pytorch_model-{n:05d}-of-{len(groups):05d}.safetensors": g for n, g in enumerate(groups, 1)}


def is_checkpoint_file(name: str) -> bool:
    """Whether a file of this name in a folder is one that `CheckpointWriter` writes."""
    return name in (CONFIG, INDEX) or bool(re.fullmatch(r"diffusion_pytorch_model(-\d{5}-of-\d{5})?\.safetensors", name))


def config_of(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The config.json of a diffusers folder of it: its own, else what follows from its sizes.

    Raises:
        ZitMergeError: It follows from them for heads of the real width only.
    """
    if checkpoint.config is not None:
        return checkpoint.config
    head = checkpoint.places["layers.0.attention.norm_q.weight"].shape[0]
    sizes = infer_sizes(checkpoint.shapes)
    if head != _HEAD:
        raise ZitMergeError(
            f"{checkpoint.path}: its heads are {head} wide, and how such a model places tokens no file of its weights says: give "
            "the diffusers folder as the base, or set format: comfyui"
        )
    counts = {s: sum(f"{s}.{i}.attention.to_q" in checkpoint.shapes for i in range(n)) for s, n in SECTIONS.items()}
    return {
        "_class_name": "ZImageTransformer2DModel",
        "all_patch_size": [2],
        "all_f_patch_size": [1],
        "in_channels": sizes["patch"] // 4,
        "dim": sizes["dim"],
        "n_layers": counts["layers"],
        "n_refiner_layers": counts["noise_refiner"],
        "n_heads": sizes["dim"] // head,
        "n_kv_heads": sizes["dim"] // head,
        "norm_eps": 1e-05,
        "qk_norm": True,
        "cap_feat_dim": sizes["caption"],
        "rope_theta": 256.0,
        "t_scale": 1000.0,
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
    }
