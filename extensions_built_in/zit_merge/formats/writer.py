"""LoRA files in the forms that programs read, written tensor by tensor.

The default, `ai-toolkit`, is the one that every client reads (measured, see the README's table; musubi converts it):

    diffusion_model.<diffusers module>.lora_A.weight   (r, in)
    diffusion_model.<diffusers module>.lora_B.weight   (out, r)
    diffusion_model.<diffusers module>.alpha           float32 scalar = r

One rank r in every module (loaders up to diffusers 0.39 take one module's scale for all), alpha equal to it (some ignore it, some
require it), 2 at least (stable-diffusion.cpp takes the width of the input for a rank of 1 and divides alpha by it), q, k and v
together and w1 with w3 (stable-diffusion.cpp and Nunchaku count them), layers.0.attention.to_k always (AI-Toolkit reads the rank
there). The other forms hold the same modules under other names.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..errors import counted
from ..files.atomic import PART_KEY, open_exclusively, os_errors, part_path, publish_file, seal
from ..model import zimage
from ..model.zimage import MODULES
from .names import native_name

if TYPE_CHECKING:
    from torch import Tensor

    from ..algebra.factors import Factors

_TOGETHER: tuple[tuple[str, ...], ...] = (("to_q", "to_k", "to_v"), ("w1", "w3"))
ALWAYS = "layers.0.attention.to_k"
LEAST = 2  # components beside an alpha key: stable-diffusion.cpp reads the rank as ne[ggml_n_dims - 1] of down, its width for 1
_STORED = {"fp32": ("F32", 4), "bf16": ("BF16", 2), "fp16": ("F16", 2)}  # dtype -> (name in a header, bytes of a number)

_AHEAD = 1 << 26  # bytes that wait in memory before the disk is told to begin

Layout = dict[str, tuple[str, tuple[int, ...]]]  # key -> (dtype as a config has it, shape)


@dataclass(frozen=True)
class Form:
    """How a form names things.

    Attributes:
        prefix: Of every key.
        down, up: Endings of the keys of the factors.
        alpha: Whether the file has alpha keys.
        flat: Dots of module names become underscores.
        native: The original checkpoint's names, q, k and v fused block by block.
    """

    prefix: str
    down: str = ".lora_A.weight"
    up: str = ".lora_B.weight"
    alpha: bool = True
    flat: bool = False
    native: bool = False

    def units(self, modules: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Key stem -> the modules it holds, in the order of the modules."""
        units: dict[str, tuple[str, ...]] = {}
        for module in modules:
            stem = native_name(module) if self.native else module
            stem = self.prefix + (stem.replace(".", "_") if self.flat else stem)
            units[stem] = (*units.get(stem, ()), module)
        return units

    def least_ranks(self, modules: Iterable[str]) -> dict[str, int]:
        """Module -> the lowest rank that it may have, so that no alpha stands beside a rank of 1."""
        units = self.units(modules).values()
        return {m: LEAST if self.alpha and len(unit) < LEAST else 1 for unit in units for m in unit}


FORMS: Mapping[str, Form] = {
    "ai-toolkit": Form("diffusion_model."),
    "diffusers": Form("transformer.", alpha=False),  # with alpha, every diffusers refuses it
    "kohya": Form("lora_unet_", ".lora_down.weight", ".lora_up.weight", flat=True),  # musubi
    "comfyui": Form("diffusion_model.", ".lora_down.weight", ".lora_up.weight", native=True),  # as ComfyUI's SaveLoRA
}


def complete(modules: Iterable[str], sizes: Mapping[str, int]) -> list[str]:
    """These modules and the ones that clients want beside them, in the model's order.

    Args:
        modules: Canonical names.
        sizes: The model's sizes; a module whose shape they do not give is not added.
    """
    wanted = {*modules, *([ALWAYS] if "dim" in sizes else [])}
    for name in list(wanted):
        module = MODULES[name]
        for together in _TOGETHER:
            if module.section != "other" and module.component in together:
                wanted |= {zimage.at(module.section, module.index, c).name for c in together}
    return [name for name in MODULES if name in wanted]


def why_padded(modules: Collection[str]) -> str:
    """Why a file holds these modules, which nothing changes, in a sentence.

    Args:
        modules: Of `complete`, one or more.
    """
    reasons = []
    if ALWAYS in modules:
        reasons.append(f"AI-Toolkit reads the rank at {ALWAYS}")
    if set(modules) - {ALWAYS}:
        reasons.append("programs count q, k and v of a block together, w1 and w3 too")
    return f"{counted(len(modules), 'module')} of zeros {'is' if len(modules) == 1 else 'are'} added: {', and '.join(reasons)}"


def layout(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int], dtype: str, form: Form) -> Layout:
    """key -> (dtype, shape) in the order of the file: alphas first, so that every tensor stays aligned to its size.

    Args:
        shapes: Module -> (out, in).
        ranks: Module -> rank.
        dtype: Of the factors.
        form: One of FORMS.
    """
    units = form.units(shapes)
    entries: Layout = {f"{stem}.alpha": ("fp32", ()) for stem in units} if form.alpha else {}
    for stem, modules in units.items():
        rank = sum(ranks[m] for m in modules)
        entries[stem + form.down] = (dtype, (rank, shapes[modules[0]][1]))
        entries[stem + form.up] = (dtype, (sum(shapes[m][0] for m in modules), rank))
    return entries


def fuse(parts: Sequence[Factors]) -> Factors:
    """The changes of the modules of one unit as one: down stacked (sum r, in), up block-diagonal (sum out, sum r)."""
    if len(parts) == 1:
        return parts[0]
    import torch

    from ..algebra.factors import Factors

    up: Tensor = torch.block_diag(*(p.up for p in parts))
    return Factors(up, torch.cat([p.down for p in parts]))


def file_size(entries: Layout, metadata: Mapping[str, str]) -> int:
    """Bytes of a file.

    Args:
        entries: Its tensors.
        metadata: Of its header.
    """
    data = sum(_STORED[dtype][1] * prod(shape) for dtype, shape in entries.values())
    return 8 + len(_header(entries, metadata)) + data


def _header(entries: Layout, metadata: Mapping[str, str], size: int = 0) -> bytes:
    """safetensors JSON header, padded with spaces to `size` or at least to a multiple of 8."""
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for key, (dtype, shape) in entries.items():
        name, size_of_one = _STORED[dtype]
        end = offset + size_of_one * prod(shape)
        table[key] = {"dtype": name, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    return text.ljust(max(size, -(-len(text) // 8) * 8))


class LoraWriter:
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

    def __enter__(self) -> LoraWriter:
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
        import torch

        from .dtypes import DTYPE_NAMES

        expected, (dtype, shape) = next(self._pending)
        if (key, DTYPE_NAMES.get(tensor.dtype), tuple(tensor.shape)) != (expected, dtype, tuple(shape)):
            raise AssertionError(f"{key} {tensor.dtype} {tuple(tensor.shape)} where the layout has {expected} {dtype} {shape}")
        with os_errors(self.path):
            self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            self._start_disk(tensor.nbytes)

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
