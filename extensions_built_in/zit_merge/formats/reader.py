"""A LoRA file as a table of low-rank changes: module -> change.

The header is read when the file is opened, without torch; tensors are read one module at a time. A scale, alpha / rank, belongs
to each change; it is kept beside the tensors so that those which need no scaling pass through untouched.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SettingError, ZitMergeError, counted
from ..model.zimage import MODULES, REAL_SIZES
from . import based
from .algorithms import BASED, FULL, told
from .base import BaseWeights, no_base
from .changes import Change
from .header import Header, common_dtype
from .metadata import Adapter
from .names import SUFFIXES, is_of_another_model, nearest_key, parse_key
from .reading import Reading
from .safetensors_file import SafetensorsFile, Stamp
from .scales import Scales
from .verdict import Verdict

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..algebra.delta import Delta, Kron
    from ..algebra.factors import Factors

_ORDER = {name: i for i, name in enumerate(MODULES)}


@dataclass(frozen=True)
class LoraFile:
    """A LoRA on disk. `lora[module]` reads the change of one module, its alpha folded in.

    Attributes:
        path: The file.
        changes: Canonical module name -> where its change is, in the model's order; more than one where they add up.
        metadata: The file's own.
        reading: The answers it was opened with.
        adapter: The PEFT config that gave the scale, if one did.
        styles: The key styles found, the commonest first: `diffusion_model.* .lora_A.weight`.
        skipped: Keys that are known and not merged (text encoder, auxiliary tensors, dropped vectors).
        unmatched: Keys that no rule explains.
        questions: What the file leaves open, a sentence each; a merge refuses it until they are answered.
        remarks: What was decided for the user, a sentence each.
        scales: Key of a tensor -> key of what it is multiplied with when it is read.
        stamp: Of the file; one that has another is no longer the file that is described here.
    """

    path: Path
    changes: Mapping[str, tuple[Change, ...]]
    metadata: Mapping[str, str]
    reading: Reading = Reading()
    adapter: Adapter | None = None
    styles: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    scales: Mapping[str, str] = field(default_factory=dict)
    stamp: Stamp | None = None

    @property
    def ranks(self) -> dict[str, int]:
        """Module -> rank of a LoRA's factors; for other algorithms the rank that a LoRA of the same change has at most."""
        return {name: sum(c.rank for c in changes) for name, changes in self.changes.items()}

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(self.ranks.values())

    @property
    def algorithms(self) -> dict[str, int]:
        """Algorithm -> how many modules it changes, the commonest first."""
        return dict(Counter(c.algorithm for changes in self.changes.values() for c in changes).most_common())

    @property
    def needs_base(self) -> tuple[str, ...]:
        """The algorithms of its changes that can be told with the base model's weights only, the commonest first."""
        return tuple(name for name in self.algorithms if name in BASED)

    @property
    def base_question(self) -> str:
        """That the base model is needed, in a sentence with what to do; empty where it is not."""
        based_on = [change for changes in self.changes.values() for change in changes if change.needs_base]
        if not based_on:
            return ""
        first = based_on[0]
        return no_base(_a_key(first), first.algorithm, sum(c.algorithm == first.algorithm for c in based_on))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that holds every tensor."""
        from .dtypes import TORCH_DTYPES

        return TORCH_DTYPES[dtype_name(self)]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module -> (out, in)."""
        return {name: changes[0].shape for name, changes in self.changes.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self.changes)

    def __len__(self) -> int:
        return len(self.changes)

    def __contains__(self, module: object) -> bool:
        return module in self.changes

    def __getitem__(self, module: str) -> Delta:
        """The change of one module, alpha / rank folded in: Factors up (out, r), down (r, in), or a Kron where it is a LoKr.

        Raises:
            KeyError: The file does not change this module.
            ZitMergeError: The file leaves something open, the change needs the base model (`TensorReader` takes it), a tensor is
                not finite, or the file can't be read.
        """
        if self.questions:
            raise ZitMergeError(f"{self.path}: {self.questions[0]}")
        with TensorReader(self) as tensors:
            scale, delta = tensors.delta(module)
            return delta.times(scale)

    @property
    def verdict(self) -> Verdict | None:
        """What zit_merge found when it wrote the file; None where another program wrote it."""
        return Verdict.read(self.metadata)

    def sha256(self) -> str:
        """Hex SHA-256 of the tensor data, header left out: what CivitAI calls AutoV3 and kohya `sshs_model_hash`."""
        return tensor_hash(self.path, self.stamp)


def dtype_name(lora: LoraFile) -> str:
    """`LoraFile.dtype` as a config has it."""
    return common_dtype(c.dtype_name for changes in lora.changes.values() for c in changes)


def tensor_hash(path: Path, stamp: Stamp | None = None) -> str:
    """`LoraFile.sha256` of a file that need not be a LoRA.

    Args:
        path: The file.
        stamp: What it must have, if it has been read before.

    Raises:
        ZitMergeError: It can't be read, or was changed.
    """
    with SafetensorsFile(path, stamp) as file:
        return file.sha256()


class TensorReader:
    """An open LoRA file, still the one that was described; close it before it is replaced (Windows keeps open files).

    Args:
        lora: The file.
        base: The base model, for changes that need it (`LoraFile.needs_base`).
    """

    def __init__(self, lora: LoraFile, base: BaseWeights | None = None):
        self._lora, self._base = lora, base
        self._file = SafetensorsFile(lora.path, lora.stamp)

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *exc: Any) -> None:
        self._file.__exit__(*exc)

    def delta(self, module: str) -> tuple[float, Delta]:
        """(alpha / rank, change as stored, float8 as float32); (1, W' - W in float32) of a change that needs the base model.

        Raises:
            ZitMergeError: A tensor is not finite, or the base model is needed and not there, or not the one that is needed.
        """
        from ..algebra.linear import add

        changes = self._lora.changes[module]
        if changes[0].needs_base:
            return 1.0, self._changed(module, changes[0])
        if len(changes) == 1:
            return changes[0].scale, self.change(changes[0])
        return 1.0, add([self.change(c).times(c.scale) for c in changes])

    def _changed(self, module: str, change: Change) -> Factors:
        """W' - W of one module, with W from the base model."""
        import torch

        from ..algebra.factors import Factors, whole

        path, key = self._lora.path, _a_key(change)
        if self._base is None:
            raise ZitMergeError(f"{path}: {no_base(key, change.algorithm)}")
        is_whole = change.third is not None and based.mixes_rows(change)
        stored = replace(change, third=None, shape=(3 * change.shape[0], change.shape[1])) if is_whole else change
        weight = self._weight(change, change.modules if is_whole else (module,))
        inner = None
        if change.inner:
            inner = self.change(replace(stored, algorithm=change.inner)).times(change.scale).expand()
        try:
            found = based.delta(change, weight, self.tensor, inner)
        except ValueError as e:
            raise ZitMergeError(
                f"{path}: {key} is {told(change.algorithm)}, but {e}: set base: to the model that it was trained on, or use an "
                "earlier checkpoint of it"
            ) from None
        if isinstance(found, Factors):
            return found.map(torch.Tensor.float)
        if is_whole:
            found = found.unflatten(0, (3, -1))[change.third or 0]
        return whole(found.float())

    def _weight(self, change: Change, modules: Sequence[str]) -> Tensor:
        """The weights of the base model, one above the other.

        Raises:
            ZitMergeError: It lacks one, or has one of another size, or one that is not finite.
        """
        import torch

        from ..algebra.factors import is_finite, wide

        found, path = [], self._lora.path
        for module in modules:
            if self._base is None or module not in self._base:
                raise ZitMergeError(
                    f"{path}: {_a_key(change)} is {told(change.algorithm)} of {module}, which the base model does not have: "
                    "set base: to the model that the LoRA was trained on"
                )
            weight = wide(self._base.weight(module))
            if tuple(weight.shape) != change.shape:
                one, other = (" x ".join(map(str, shape)) for shape in (change.shape, weight.shape))
                raise ZitMergeError(
                    f"{path}: {_a_key(change)} is {told(change.algorithm)} of a {one} weight, {module} of the base model is "
                    f"{other}: set base: to the model that the LoRA was trained on"
                )
            if not is_finite(weight):
                raise ZitMergeError(
                    f"{path}: {module} of the base model holds NaN or infinity, which {_a_key(change)} changes: "
                    "set base: to a whole copy of the model"
                )
            found.append(weight)
        return torch.cat(found) if len(found) > 1 else found[0]

    def change(self, change: Change) -> Factors | Kron:
        """One change as stored, without its scale; not of one that needs the base model."""
        from ..algebra.delta import Kron
        from ..algebra.factors import Factors, hadamard, whole

        get, keys, (out, _) = self.tensor, change.keys, change.shape
        rows = None if change.third is None else (change.third * out, (change.third + 1) * out)
        if change.algorithm == "LoRA":
            return Factors(get(keys["up"], rows), get(keys["down"]))
        if change.algorithm == FULL:
            return whole(get(keys["diff"], rows))
        if change.algorithm == "LoHa":
            return hadamard(*(Factors(get(keys[f"w{i}_a"], rows), get(keys[f"w{i}_b"])) for i in (1, 2)))
        left, right = (
            whole(get(keys[w])) if w in keys else Factors(get(keys[f"{w}_a"]), get(keys[f"{w}_b"])) for w in ("w1", "w2")
        )
        return Kron(left, right).rows(*rows) if rows else Kron(left, right)

    def tensor(self, key: str, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor, or some of its rows.

        Args:
            key: Its key.
            rows: (first, last + 1); None is all.
        """
        from ..algebra.factors import is_finite

        tensor = self._file.tensor(key, rows)
        if tensor.dtype.itemsize == 1:
            tensor = tensor.float()
        if key in self._lora.scales:
            tensor = tensor.float() * self._scale(self._lora.scales[key], rows)
        if not is_finite(tensor):
            raise ZitMergeError(
                f"{self._lora.path}: {key} holds NaN or infinity, the LoRA is broken: use an earlier checkpoint of it"
            )
        return tensor

    def _scale(self, key: str, rows: tuple[int, int] | None) -> Tensor:
        """One number, or (rows, 1) or (1, columns): what a tensor, or some of its rows, is multiplied with."""
        scale = self._file.tensor(key).float()
        if scale.numel() == 1:
            return scale.reshape(())
        if scale.dim() == 1:
            scale = scale[:, None]
        return scale[rows[0] : rows[1]] if rows and scale.shape[1] == 1 else scale


def load_lora(
    path: str | Path,
    *,
    alpha: str | float | None = None,
    qkv: str | None = None,
    drop: Sequence[str] = (),
    adapter: Adapter | None = None,
) -> LoraFile:
    """Opens a Z-Image LoRA of any trainer: pairs of factors, LoKr, LoHa, full differences, and what needs the base model to be
    told: DoRA, OFT, BOFT, IA3, GLoRA, replaced weights (`LoraFile.needs_base`).

    Reads the header and the alphas; other tensors only where a module is changed twice.

    Args:
        path: A `.safetensors` file.
        alpha: `key`, `metadata`, `none` or a number, where the file leaves it open (see `Reading`).
        qkv: `split`, `fused` or `sum`, where a module is changed twice.
        drop: `norm`, `bias`: changes of vectors to leave out.
        adapter: The adapter's config from a recipe.

    Returns:
        The file as a table module -> change; keys that no rule explains are listed in `unmatched`, what has to be decided in
        `questions`.

    Raises:
        ZitMergeError: The file can't be read, is pickled, has a form that no LoRA can hold, or is no Z-Image LoRA.
    """
    reading = Reading(alpha, qkv, tuple(drop), adapter)
    with SafetensorsFile(Path(path)) as file:
        lora = replace(_read(Header(file), reading), stamp=file.stamp)
    return _settle_twins(lora)


def _read(header: Header, reading: Reading) -> LoraFile:
    for key, part in header.parts.items():
        if part.part == "foreign":
            raise header.error(
                f"{key} is {part.algorithm}; {part.note}: train without it, or extract a plain LoRA from the trained model"
            )
    groups = header.groups()
    if not groups:
        raise header.error(_not_zimage(header))
    scales = Scales(header, groups, reading)
    changes: dict[str, list[Change]] = defaultdict(list)
    for group in groups:
        for name, change in header.changes(group, scales, scales.rotation):
            changes[name].append(change)
    scales.conclude()
    vectors = {kind: header.keys(kind) for kind in ("norm", "bias")}
    changed = vectors | {"bias": (*vectors["bias"], *_scaled_biases(changes))}
    open_vectors = [_vectors_left_open(kind, keys) for kind, keys in changed.items() if keys and kind not in reading.drop]
    remarks = scales.remarks
    if header.scales:
        remarks.append(f"{counted(len(header.scales), 'tensor')} of float8 or int8 read with the scales that stand beside them")
    beside = [key for key in header.keys("unknown") if set(header.parts[key].modules) & set(changes)]
    styles = Counter(p.style for p in header.parts.values() if p.algorithm)
    return LoraFile(
        path=header.path,
        changes={name: tuple(changes[name]) for name in sorted(changes, key=_ORDER.__getitem__)},
        metadata=header.metadata,
        reading=reading,
        adapter=scales.adapter,
        styles=tuple(style for style, _ in styles.most_common()),
        skipped=tuple(sorted((*header.keys("skip"), *(k for kind in reading.drop for k in vectors.get(kind, ()))))),
        unmatched=tuple(sorted((*header.keys("unknown"), *header.keys("weight")))),
        questions=(*scales.questions, *open_vectors, *map(_unknown_part, beside[:1])),
        remarks=tuple(remarks),
        scales=header.scales,
    )


def _unknown_part(key: str) -> str:
    return (
        f"{key} may alter the change that it stands beside, in a way that is not known, so that no setting leaves it out: "
        "save the LoRA without it in the program that made it"
    )


def _scaled_biases(changes: Mapping[str, Sequence[Change]]) -> list[str]:
    """The keys by which PEFT's IA3 multiplies a bias along with the rows of its weight."""
    found = ((MODULES[name], change) for name, several in changes.items() for change in several if "ia3_l" in change.keys)
    return [change.keys["ia3_l"] for module, change in found if module.has_bias and change.sizes["ia3_l"][1] == 1]


def _vectors_left_open(kind: str, keys: Sequence[str]) -> str:
    more = f" and {len(keys) - 1} more change" if len(keys) > 1 else " changes"
    return f"{keys[0]}{more} a {kind}, for which a LoRA file has no place: set drop: [{kind}] to merge the rest without it"


def _settle_twins(lora: LoraFile) -> LoraFile:
    """The file with one change for each module: of two equal ones one counts, of two different ones the user decides."""
    twins = {name: changes for name, changes in lora.changes.items() if len(changes) > 1}
    if not twins:
        return lora
    settled, equal, differ, no_sum = dict(lora.changes), 0, {}, False
    with TensorReader(lora) as tensors:
        for name, changes in twins.items():
            split, fused = ([c for c in changes if c.native is native] for native in (False, True))
            chosen = {"split": split, "fused": fused}.get(lora.reading.qkv or "") or list(changes)
            if len({c.shape for c in chosen}) > 1:
                shapes = " and ".join(f"a {c.shape[0]} x {c.shape[1]} matrix ({_a_key(c)})" for c in chosen[:2])
                raise ZitMergeError(f"{lora.path}: changes {name} as {shapes}, which belong to no one model: get a whole file")
            needs_base = any(c.needs_base for c in chosen)
            if (lora.reading.qkv != "sum" or needs_base) and len(chosen) > 1:
                if not needs_base and all(_equal(tensors, chosen[0], c) for c in chosen[1:]):
                    equal += 1
                else:
                    differ[name] = (chosen, split and fused)
                    no_sum = no_sum or needs_base
                chosen = (split or chosen)[:1]
            settled[name] = tuple(chosen)
    questions, remarks = lora.questions, lora.remarks
    if differ:
        name, (chosen, two_namings) = next(iter(differ.items()))
        more = f", and {len(differ) - 1} more modules" if len(differ) > 1 else ""
        answer = "set qkv: split, fused or sum" if two_namings else "set qkv: sum to add them, or remove one of the two"
        if no_sum:  # W' - W of one is not that of the other's W'
            answer = "set qkv: split or fused" if two_namings else "remove one of the two"
        keys = " and by ".join(_a_key(c) for c in chosen[:2])
        questions = (*questions, f"changes {name} twice and differently, by {keys}{more}: {answer}")
    if equal:
        remarks = (*remarks, f"equal changes stand there twice for {counted(equal, 'module')} and count once")
    return replace(lora, changes=settled, questions=questions, remarks=remarks)


def _a_key(change: Change) -> str:
    return next(iter(change.keys.values()))


def _equal(tensors: TensorReader, a: Change, b: Change) -> bool:
    """Whether two changes are one, to the rounding of their dtype."""
    import torch

    from ..algebra.products import distance, norm

    if a.shape != b.shape:
        return False
    x, y = (tensors.change(c).times(c.scale) for c in (a, b))
    return distance(x, y) <= max(1e-5, *(torch.finfo(d).eps for d in (a.dtype, b.dtype))) * norm(x)


def unmatched_error(lora: LoraFile) -> SettingError:
    """The error for keys that no rule explains."""
    key, more = lora.unmatched[0], len(lora.unmatched) - 1
    return SettingError(
        f"{lora.path.name} holds {key}, which is {_stranger(key)}"
        + (f", and {more} more such keys" if more else "")
        + ": set allow_unmatched: true to merge the rest without it",
        "lora",
    )


def _stranger(key: str) -> str:
    if parse_key(key).part == "weight":
        return "a weight of the model itself"
    return "no part of Z-Image" if is_of_another_model(key) else f"a name of a form that is not known{nearest_key(key)}"


def _not_zimage(header: Header) -> str:
    """Why a file without any change of a module of Z-Image is no LoRA of it."""
    if not header.parts:
        return "holds no tensors: get a whole file"
    unknown, weights, skipped = (header.keys(part) for part in ("unknown", "weight", "skip"))
    vectors = (*header.keys("norm"), *header.keys("bias"))
    if not unknown and not weights:
        if vectors:
            return (
                f"changes norms and biases only ({vectors[0]} ...), for which a LoRA file has no place: there is nothing to merge"
            )
        return f"changes nothing but the text encoder ({skipped[0]} ...), which Z-Image's LoRAs leave alone: give another file"
    factors = [key for key in unknown if _ADAPTED.search(key)]
    if not factors and (weights or all(key.endswith((".weight", ".bias")) for key in unknown)):
        return f"holds a model's weights ({next(iter(weights or unknown))} ...), it is no LoRA: give the LoRA's file"
    example = next(iter(factors or unknown or weights))
    start = f"is no Z-Image LoRA, none of its {len(header.parts)} keys changes a part of Z-Image (e.g. {example})"
    if any(map(is_of_another_model, unknown)) or not all(_could_be_zimage(header, key) for key in factors):
        return f"{start}: it was trained for another model"
    return (
        f"names its parts in a form that is not known ({example}{nearest_key(example)}): save it in the form of ComfyUI or "
        "diffusers with the program that made it"
    )


# A name that a tensor of an adapter has, in any form.
_ADAPTED = re.compile(r"(?:^|[._])(?:lora|lokr|hada|loha|b?oft|ia3)(?:[._]|$)|\.(?:diff|alpha)$")
_SIDES = {n * size for size in REAL_SIZES.values() for n in (1, 3, 4)}  # q, k and v together are 3, adaLN is 4 times dim


def _could_be_zimage(header: Header, key: str) -> bool:
    """Whether a factor has the width of some layer of Z-Image; so has whatever is no pair's factor."""
    part = next((part for suffix, (_, part) in SUFFIXES.items() if key.endswith(suffix)), "")
    shape = header.shape(key)
    return part not in ("down", "up") or len(shape) != 2 or shape[part == "down"] in _SIDES
