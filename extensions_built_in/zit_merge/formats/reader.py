"""A LoRA file as a table of low-rank changes: module -> Factors.

The header is read when the file is opened; tensors are read one module at a time. A scale, alpha / rank, belongs to each module;
it is kept beside the factors so that factors which need no scaling pass through untouched.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..algebra.factors import Factors, is_finite, scale
from ..errors import ZitMergeError, not_available_yet
from ..zimage import MODULES
from .metadata import adapter_scales
from .names import Part, nearest_key, parse_key

_ORDER = {name: i for i, name in enumerate(MODULES)}
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Pair:
    """Where the change of one module is found in a file.

    Attributes:
        up, down: Keys of the factors.
        scale: alpha / rank; 1 where the file has no alpha.
        rank: Number of components.
        shape: (out, in) of the change.
        dtype: Of the factors; the wider one where they differ.
        third: Which third of the rows of `up` this module owns in a fused qkv, else None.
    """

    up: str
    down: str
    scale: float
    rank: int
    shape: tuple[int, int]
    dtype: torch.dtype
    third: int | None = None


@dataclass(frozen=True)
class LoraFile:
    """A LoRA on disk. `lora[module]` reads the change of one module, its alpha folded in.

    Attributes:
        path: The file.
        pairs: Canonical module name -> where its factors are, in the model's order.
        metadata: The file's own.
        styles: The key styles found, the commonest first: `diffusion_model.* .lora_A.weight`.
        skipped: Keys that are known and not merged (text encoder, auxiliary tensors).
        unmatched: Keys that no rule explains.
        alphas: Canonical module name -> alpha as stored, where there is one.
    """

    path: Path
    pairs: Mapping[str, Pair]
    metadata: Mapping[str, str]
    styles: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()
    alphas: Mapping[str, float] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(p.rank for p in self.pairs.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that holds every factor."""
        return common_dtype(p.dtype for p in self.pairs.values())

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module -> (out, in)."""
        return {name: pair.shape for name, pair in self.pairs.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __contains__(self, module: object) -> bool:
        return module in self.pairs

    def __getitem__(self, module: str) -> Factors:
        """The change of one module: up (out, r) with alpha / r folded in, down (r, in).

        Raises:
            KeyError: The file does not change this module.
            ZitMergeError: A factor is not finite, or the file can't be read.
        """
        with TensorReader(self) as tensors:
            return scale(tensors.factors(module), self.pairs[module].scale)

    def sha256(self) -> str:
        """Hex SHA-256 of the tensor data, header left out: what CivitAI calls AutoV3 and kohya `sshs_model_hash`."""
        digest = hashlib.sha256()
        try:
            with self.path.open("rb") as file:
                header = int.from_bytes(file.read(8), "little")
                if 8 + header > self.path.stat().st_size:
                    raise ZitMergeError(f"{self.path}: is not a whole .safetensors file: copy or download it again")
                file.seek(8 + header)
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
        except OSError as e:
            raise ZitMergeError(f"{self.path}: can't be read ({e.strerror}): check the disk and the file's permissions") from e
        return digest.hexdigest()


class TensorReader:
    """An open LoRA file; close it before its file is replaced (Windows keeps mapped files)."""

    def __init__(self, lora: LoraFile):
        self._lora = lora
        self._file = _open(lora.path)

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.__exit__(None, None, None)

    def factors(self, module: str) -> Factors:
        """up (out, r) and down (r, in) as stored: no alpha, the file's dtype (float8 as float32).

        Raises:
            ZitMergeError: A factor is not finite.
        """
        pair = self._lora.pairs[module]
        up, down = self._tensor(pair.up, pair.third), self._tensor(pair.down)
        return Factors(up, down)

    def _tensor(self, key: str, third: int | None = None) -> Tensor:
        if third is None:
            tensor = self._file.get_tensor(key)
        else:
            rows = self._file.get_slice(key).get_shape()[0] // 3
            tensor = self._file.get_slice(key)[third * rows : (third + 1) * rows]
        if tensor.dtype.itemsize == 1:
            tensor = tensor.float()
        if not is_finite(tensor):
            raise ZitMergeError(
                f"{self._lora.path.name}: {key} holds NaN or infinity, the LoRA is broken: use an earlier checkpoint of it"
            )
        return tensor


def load_lora(path: str | Path) -> LoraFile:
    """Opens a Z-Image LoRA of any trainer that stores pairs of factors. Reads the header and the alphas, not the factors.

    Args:
        path: A `.safetensors` file.

    Returns:
        The file as a table module -> Factors; keys that no rule explains are listed in `unmatched`, not refused.

    Raises:
        ZitMergeError: The file can't be read, is pickled, holds another algorithm, or is no Z-Image LoRA.
    """
    path = Path(path)
    with _open(path) as file:
        parts = {key: parse_key(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no dict
        _refuse_foreign(path, parts)
        groups = _group(path, parts)
        pairs, alphas = {}, {}
        for modules, keys in sorted(groups.items(), key=lambda item: _ORDER[item[0][0]]):
            for name, pair, alpha in _pairs(path, file, modules, keys):
                pairs[name] = pair
                if alpha is not None:
                    alphas[name] = alpha
        metadata = dict(file.metadata() or {})
    unmatched = tuple(sorted(k for k, p in parts.items() if p.part == "unknown"))
    if not pairs:
        raise ZitMergeError(_not_zimage(path, unmatched, len(parts)))
    if len(alphas) < len(pairs):
        _refuse_alpha_elsewhere(path, metadata, parts)
    styles = Counter(p.style for p in parts.values() if p.part == "down")
    return LoraFile(
        path=path,
        pairs=pairs,
        metadata=metadata,
        styles=tuple(style for style, _ in styles.most_common()),
        skipped=tuple(sorted(k for k, p in parts.items() if p.part == "skip")),
        unmatched=unmatched,
        alphas=alphas,
    )


def unmatched_error(lora: LoraFile, place: str) -> ZitMergeError:
    """The error for keys that no rule explains."""
    key, more = lora.unmatched[0], len(lora.unmatched) - 1
    return ZitMergeError(
        f"{place}: {lora.path.name} holds {key}, which is no part of Z-Image{nearest_key(key)}"
        + (f", and {more} more such keys" if more else "")
        + ": set allow_unmatched: true to merge the rest without it"
    )


def common_dtype(dtypes: Iterator[torch.dtype]) -> torch.dtype:
    """The narrowest dtype that files have and that holds all of them; float32 for bfloat16 with float16, float8 and float64."""
    distinct = {d if d in (torch.bfloat16, torch.float16) else torch.float32 for d in dtypes}
    return distinct.pop() if len(distinct) == 1 else torch.float32


def _open(path: Path):
    """safe_open with one sentence for each way in which it can fail."""
    if not path.exists():
        raise ZitMergeError(f"{path}: there is no such file")
    if path.is_dir():
        raise ZitMergeError(f"{path}: is a folder, a .safetensors file is needed")
    try:
        path.open("rb").close()  # safetensors says "not found" where the permission is missing
        return safe_open(path, framework="pt")
    except SafetensorError as e:
        if _is_pickle(path):
            raise ZitMergeError(
                f"{path}: is a pickled checkpoint; pickles can run code when they are opened, so only .safetensors is read: "
                "save it as .safetensors in a program that you trust it to"
            ) from None
        raise ZitMergeError(f"{path}: is not a whole .safetensors file ({e}): copy or download it again") from e
    except OSError as e:
        raise ZitMergeError(f"{path}: can't be read ({e.strerror or e}): check the file and its permissions") from e


def _is_pickle(path: Path) -> bool:
    """A pickle of protocol 2 to 5, bare or in the zip archive of torch.save."""
    with path.open("rb") as file:
        head = file.read(2)
    return (len(head) == 2 and head[0] == 0x80 and 2 <= head[1] <= 5) or zipfile.is_zipfile(path)


def _refuse_foreign(path: Path, parts: Mapping[str, Part]) -> None:
    for key, part in parts.items():
        if part.part == "foreign":
            raise not_available_yet(f"{path}: reading {part.note} ({key})", "only LoRA pairs are merged so far")


def _group(path: Path, parts: Mapping[str, Part]) -> dict[tuple[str, ...], dict[str, str]]:
    """modules -> {up, down, alpha: key}; two sources for one module are an error."""
    groups: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    owner: dict[tuple[str, str], str] = {}
    for key, part in parts.items():
        for module in part.modules:
            other = owner.setdefault((module, part.part), key)
            if other != key:
                raise not_available_yet(f"{path}: a file that changes {module} twice ({other} and {key})")
        if part.modules:
            groups[part.modules][part.part] = key
    return groups


def _pairs(
    path: Path, file: safe_open, modules: tuple[str, ...], keys: Mapping[str, str]
) -> Iterator[tuple[str, Pair, float | None]]:
    """The Pair and alpha of each module of one group: one module, or the three of a fused qkv."""
    if "up" not in keys or "down" not in keys:
        raise _half_a_pair(path, keys)
    up, down = file.get_slice(keys["up"]), file.get_slice(keys["down"])
    dtypes = [_dtype(path, k, s.get_dtype()) for k, s in ((keys["up"], up), (keys["down"], down))]
    shape_up, shape_down = up.get_shape(), down.get_shape()
    if len(shape_up) != 2 or len(shape_down) != 2 or shape_up[1] != shape_down[0] or not shape_down[0]:
        raise ZitMergeError(
            f"{path}: {keys['up']} {shape_up} and {keys['down']} {shape_down} are not a pair (out, rank), (rank, in)"
        )
    rank, out = shape_down[0], shape_up[0]
    if out % len(modules):
        raise ZitMergeError(f"{path}: {keys['up']} has {out} rows, which can't be split into q, k and v of one size")
    alpha = _alpha(path, file, keys["alpha"]) if "alpha" in keys else None
    for i, name in enumerate(modules):
        pair = Pair(
            up=keys["up"],
            down=keys["down"],
            scale=1.0 if alpha is None else alpha / rank,
            rank=rank,
            shape=(out // len(modules), shape_down[1]),
            dtype=common_dtype(iter(dtypes)),
            third=i if len(modules) == 3 else None,
        )
        yield name, pair, alpha


def _half_a_pair(path: Path, keys: Mapping[str, str]) -> ZitMergeError:
    if "down" in keys:
        return ZitMergeError(
            f"{path}: {keys['down']} has no up factor beside it: half of the pair is missing, get a whole file; or these are the "
            "full weight differences of AI-Toolkit's type: fullrank, reading them is not available yet"
        )
    there = keys.get("up") or keys["alpha"]
    return ZitMergeError(f"{path}: {there} has no down factor beside it, half of the pair is missing: get a whole file")


def _dtype(path: Path, key: str, name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ZitMergeError(f"{path}: {key} is stored as {name}, a LoRA's factors are floating point")
    return DTYPES[name]


def _alpha(path: Path, file: safe_open, key: str) -> float:
    tensor = file.get_tensor(key)
    if tensor.numel() != 1:
        raise ZitMergeError(f"{path}: {key} has shape {list(tensor.shape)}, alpha is one number")
    alpha = float(tensor)
    if not math.isfinite(alpha):
        raise ZitMergeError(f"{path}: {key} is {alpha}, so the LoRA has no defined strength: get a whole file")
    if alpha == 0:
        raise not_available_yet(f"{path}: {key} is 0, which trainers take for 'rank' and programs for 'nothing'; choosing one")
    return alpha


def _refuse_alpha_elsewhere(path: Path, metadata: Mapping[str, str], parts: Mapping[str, Part]) -> None:
    """A scale that stands outside of the tensors must not be read as 1 in silence."""
    if "lora_adapter_metadata" in metadata and adapter_scales(metadata) != {1.0}:
        raise not_available_yet(f"{path}: alpha that stands only in the metadata (lora_adapter_metadata); using it")
    if any(p.style.startswith("base_model.model.") for p in parts.values()):
        raise not_available_yet(f"{path}: a PEFT adapter whose alpha stands in adapter_config.json; using it")


def _not_zimage(path: Path, unmatched: tuple[str, ...], n_keys: int) -> str:
    if not n_keys:
        return f"{path}: holds no tensors"
    example = unmatched[0] if unmatched else "text-encoder keys only"
    return (
        f"{path}: is no Z-Image LoRA, none of its {n_keys} keys names a part of Z-Image (e.g. {example}): "
        "it was trained for another model"
    )
