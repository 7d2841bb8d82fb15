"""The header of a LoRA file: which keys belong together, and what change of which module they are."""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod

from ..errors import ZitMergeError
from ..model.zimage import MODULES, REAL_SIZES, infer_sizes
from .algorithms import BASED, BOFT, DORA, FULL, GLORA, IA3, OFT, Rotation
from .changes import Change, Group
from .names import Part, parse_key, scaled_keys
from .safetensors_file import SafetensorsFile
from .sides import PARTS, Sides, check_magnitude, sides

# Name in a header -> name as a config has it, or torch.
DTYPES: Mapping[str, str] = {
    "F64": "float64",
    "F32": "fp32",
    "F16": "fp16",
    "BF16": "bf16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",  # with a scale only
}
_PACKED = {  # as `struct` has them; BF16 is the upper half of F32
    **{"F64": "<d", "F32": "<f", "F16": "<e", "BF16": "<f"},
    **{"I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U8": "<B", "BOOL": "<?"},
}
Scale = Callable[[Group, str, int], tuple[float, "float | None"]]  # group, module, rank -> alpha / rank, alpha as stored


def common_dtype(dtypes: Iterator[str]) -> str:
    """The narrowest dtype that files have and that holds all of them; fp32 for bf16 with fp16, float8 and float64."""
    distinct = {d if d in ("bf16", "fp16") else "fp32" for d in dtypes}
    return distinct.pop() if len(distinct) == 1 else "fp32"


class Header:
    """The header of an open file.

    Attributes:
        path: Of the file.
        metadata: The file's own.
        parts: Key -> what it is.
        scales: Key of a tensor -> key of what it is multiplied with.
    """

    def __init__(self, file: SafetensorsFile):
        self.path, self._file = file.path, file
        self.metadata = dict(file.metadata)
        self.parts: dict[str, Part] = {key: parse_key(key) for key in file.entries}
        self.parts |= self._weights_of_ia3()
        self._sizes: dict[str, int] = {}
        self.scales = dict(self._scales())

    def keys(self, part: str) -> tuple[str, ...]:
        """The keys that are this, in order."""
        return tuple(sorted(k for k, p in self.parts.items() if p.part == part))

    def error(self, text: str) -> ZitMergeError:
        """An error of this file."""
        return ZitMergeError(f"{self.path}: {text}")

    def broken(self, text: str) -> ZitMergeError:
        """An error of a file that holds no changes in this way."""
        return self.error(
            f"{text}; the file is damaged or made by a tool that is not known: get a whole file, or use another one"
        )

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self._file.shape(key)

    def dtype(self, key: str) -> str:
        """Of a tensor, one of the names in DTYPES; integers without a scale are refused."""
        name = self._file.entries[key].dtype
        if name not in DTYPES or (name == "I8" and key not in self.scales):
            raise self.broken(f"{key} is stored as {name}, a LoRA's tensors are floating point")
        return DTYPES[name]

    def _scales(self) -> Iterator[tuple[str, str]]:
        """(key of a tensor, key of its scale): one number, one for each row, or one for each column."""
        for key in self.keys("scale"):
            of = next((of for of in scaled_keys(key) if of in self.parts), None)
            if of is None:
                raise self.error(f"{key} stands alone, what it scales is missing: get a whole file")
            shape, (rows, columns) = self.shape(key), (*self.shape(of), 0, 0)[:2]
            if shape not in ((), (1,), (1, 1), (rows,), (rows, 1), (1, columns)):
                raise self.broken(f"{key} has shape {list(shape)}, which is no scale of {of} with shape {list(self.shape(of))}")
            yield of, key

    def _weights_of_ia3(self) -> dict[str, Part]:
        """LyCORIS' IA3 has `.weight` for a name: what stands beside an `.on_input` is no weight of the model."""
        pairs = ((key, key.removesuffix("on_input") + "weight") for key in self.keys("on_input"))
        return {weight: replace(self.parts[key], part="scaling") for key, weight in pairs if weight in self.parts}

    def alpha(self, key: str) -> float:
        """An alpha, or another number that stands alone, as stored, finite or not."""
        if prod(shape := self.shape(key)) != 1:
            raise self.broken(f"{key} has shape {list(shape)}, alpha is one number")
        name = self._file.entries[key].dtype
        if name not in _PACKED:
            return float(self._file.tensor(key))
        stored = self._file.content(key)
        return float(struct.unpack(_PACKED[name], bytes(2) + stored if name == "BF16" else stored)[0])

    def groups(self) -> list[Group]:
        """The changes of the file, each with its keys.

        Raises:
            ZitMergeError: Parts of a change are missing, or are there twice under one name.
        """
        buckets: dict[tuple[tuple[str, ...], bool, str], dict[tuple[str, str, str], str]] = defaultdict(dict)
        for key, part in self.parts.items():
            if part.is_of_change:
                bucket = buckets[part.modules, part.native, part.prefix]
                other = bucket.setdefault((part.algorithm, part.adapter, part.part), key)
                if other != key:
                    raise self.error(f"{part.modules[0]} has two {part.part} ({other} and {key}): keep one of them")
        groups = []
        for (modules, native, prefix), keys in buckets.items():
            alpha = keys.pop(("", "", "alpha"), None)
            if not keys:
                raise self.error(f"{alpha} stands alone, what it scales is missing: get a whole file")
            forms: dict[tuple[str, str], dict[str, str]] = {(a, n): {} for a, n, _ in keys}
            for (algorithm, adapter, name), key in keys.items():
                forms[algorithm, adapter][name] = key
            groups += [Group(a, modules, native, prefix, alpha, own, inner) for a, own, inner in self._forms(forms)]
        self._find_whole_differences(groups)
        self._sizes = self._find_sizes(groups)
        return groups

    def _forms(self, forms: Mapping[tuple[str, str], dict[str, str]]) -> Iterator[tuple[str, dict[str, str], str]]:
        """(algorithm, part -> key, what is inside) of the changes of one module, each with the magnitude that belongs to it."""
        for (algorithm, adapter), own in forms.items():
            magnitude = forms.get((DORA, adapter), {})
            if algorithm == DORA:
                inside = [a for a, n in forms if n == adapter and a != DORA]
                key = next(iter(own.values()))
                if not inside:
                    raise self.error(f"{key} is DoRA and stands alone, what it scales is missing: get a whole file")
                if len(inside) > 1 or inside[0] not in ("LoRA", "LoHa", "LoKr"):
                    raise self.broken(f"{key} is DoRA beside {' and '.join(inside)}, which has no known meaning")
            elif magnitude:
                yield DORA, magnitude | own, algorithm
            elif algorithm == IA3:
                yield IA3, self._ia3(own), ""
            elif {"packed", "is_scaled"} <= set(own):
                yield OFT, {("scaled" if part == "packed" else part): key for part, key in own.items() if part != "is_scaled"}, ""
            else:
                is_boft = algorithm == OFT and "blocks" in own and len(self.shape(own["blocks"])) == 4
                yield BOFT if is_boft else algorithm, own, ""

    def _ia3(self, keys: dict[str, str]) -> dict[str, str]:
        """The parts of an IA3, where its flag has become the name of its other part."""
        if "on_input" not in keys:
            return keys
        flag = keys["on_input"]
        if "scaling" not in keys:
            raise self.error(f"{flag} is of an IA3 and stands alone, the scale of its module is missing: get a whole file")
        if (value := self.alpha(flag)) not in (0, 1):
            raise self.broken(f"{flag} is {value:g}, an IA3 is on the input (1) or not (0)")
        return {"on_input" if value else "on_output": keys["scaling"]}

    def _find_sizes(self, groups: Sequence[Group]) -> dict[str, int]:
        """The sizes of the model, in the names of REAL_SIZES, for changes that show one side of their weight only."""
        if not any(g.algorithm in (OFT, BOFT, IA3) for g in groups):
            return {}
        found: dict[str, int] = {}
        for group in groups:
            extent = self._extent(group)
            for module in group.modules:
                rows = extent.out and extent.out // len(group.modules)
                for dim, size in zip(MODULES[module].dims, (rows, extent.into), strict=True):
                    if size:
                        found.setdefault("dim" if dim == "4dim" else dim, size // 4 if dim == "4dim" else size)
        is_real = all(REAL_SIZES[dim] == size for dim, size in found.items())
        return {**REAL_SIZES, **found} if is_real else found

    def _extent(self, group: Group) -> Sides:
        """What the tensors of a change tell of its weight."""
        form = group.inner or group.algorithm
        if form in BASED:
            return sides(self, form, group.keys)
        own = {part: key for part, key in group.keys.items() if part not in PARTS[DORA]}
        extent = Sides(*{"LoRA": self._lora, "LoKr": self._lokr, "LoHa": self._loha, FULL: self._full}[form](own))
        if group.inner:
            assert extent.out and extent.into, "these tell both sides"
            check_magnitude(self, group.keys, extent.out, extent.into)
        return extent

    def _completed(self, group: Group, extent: Sides) -> tuple[int, int]:
        """(out, in) of a change, of which the rest of the file tells what its own tensors leave open.

        Raises:
            ZitMergeError: It does not.
        """
        try:
            shapes = [MODULES[module].shape(self._sizes) for module in group.modules] if None in extent[:2] else []
        except KeyError:
            key = next(iter(group.keys.values()))
            raise self.error(
                f"{key} is {group.algorithm}, which shows one side of its weight, and no other layer of the file tells the other "
                "one: it was trained for another model"
            ) from None
        return extent.out or sum(out for out, _ in shapes), extent.into or shapes[0][1]

    def _find_whole_differences(self, groups: Sequence[Group]) -> None:
        """AI-Toolkit's `type: fullrank` stores the whole difference as lora_A, without any lora_B in the file."""
        downs = [g for g in groups if g.algorithm == "LoRA"]
        shapes: dict[str, tuple[int, int]] = {}
        for g in downs:
            key = g.keys.get("down", "")
            shape = self.shape(key) if key else ()
            if "up" in g.keys or g.alpha or not key.endswith((".lora_A.weight", ".lora_A")) or len(shape) != 2:
                return
            shapes |= {module: (shape[0] // len(g.modules), shape[1]) for module in g.modules}
        try:
            infer_sizes(shapes)
        except ValueError:
            return  # thin ones: pairs without their other halves
        for g in downs:
            g.algorithm, g.keys = FULL, {"diff": g.keys["down"]}

    def changes(self, group: Group, scale: Scale, rotation: Rotation | None = None) -> Iterator[tuple[str, Change]]:
        """(module, change) for the modules of a group.

        Args:
            group: From `groups`.
            scale: (group, module, rank) -> (alpha / rank, alpha as stored).
            rotation: Of an OFT that is stored as triangles.

        Raises:
            ZitMergeError: The tensors do not fit each other.
        """
        extent = self._extent(group)
        out, into = self._completed(group, extent)
        most = extent.rank if extent.rank and not group.inner else min(out, into)
        if out % len(group.modules):
            first = next(group.keys[part] for part in ("up", "diff", "w1", "w1_a", *group.keys) if part in group.keys)
            raise self.broken(f"{first} makes {out} rows, which can't be split into q, k and v of one size")
        rows = out // len(group.modules)
        for third, module in enumerate(group.modules):
            factor, alpha = scale(group, module, extent.inner)
            yield (
                module,
                Change(
                    algorithm=group.algorithm,
                    keys=group.keys,
                    sizes={part: self.shape(key) for part, key in group.keys.items()},
                    scale=factor,
                    rank=most if group.algorithm in ("LoRA", GLORA) else min(most, rows, into),
                    shape=(rows, into),
                    dtype_name=common_dtype(map(self.dtype, group.keys.values())),
                    alpha=alpha,
                    third=third if len(group.modules) > 1 else None,
                    native=group.native,
                    inner=group.inner,
                    modules=group.modules,
                    rotation=rotation if {"packed", "scaled"} & set(group.keys) else None,
                ),
            )

    # Each of these gives (out, in, rank of the change at most, the r of alpha / r).

    def _lora(self, keys: Mapping[str, str]) -> tuple[int, int, int, int]:
        out, rank, into = self._pair(keys, "up", "down")
        return out, into, rank, rank

    def _loha(self, keys: Mapping[str, str]) -> tuple[int, int, int, int]:
        (out, r1, into), (out2, r2, into2) = (self._pair(keys, f"w{i}_a", f"w{i}_b") for i in (1, 2))
        if (out, into) != (out2, into2):
            raise self.error(
                f"{keys['w1_a']} is for a {out} x {into} matrix, {keys['w2_a']} for {out2} x {into2}: get a whole file"
            )
        return out, into, r1 * r2, r1

    def _lokr(self, keys: Mapping[str, str]) -> tuple[int, int, int, int]:
        (p, a, q), (s, b, t) = (self._matrix(keys, w) for w in ("w1", "w2"))
        split = {w: r for w, r in (("w1", a), ("w2", b)) if w not in keys}
        if len(set(split.values())) > 1:
            raise self.broken(f"{keys['w1_a']} has rank {a}, {keys['w2_a']} has rank {b}, so alpha / rank has no meaning")
        return p * s, q * t, a * b, next(iter(split.values()), 1)

    def _full(self, keys: Mapping[str, str]) -> tuple[int, int, int, int]:
        shape = self.shape(keys["diff"])
        if len(shape) != 2 or 0 in shape:
            raise self.broken(f"{keys['diff']} has shape {list(shape)}, the difference of a weight is a matrix")
        return *shape, min(shape), 1

    def _matrix(self, keys: Mapping[str, str], name: str) -> tuple[int, int, int]:
        """(rows, rank, columns) of a Kronecker factor, whole or as a product."""
        if name not in keys:
            return self._pair(keys, f"{name}_a", f"{name}_b")
        shape = self.shape(keys[name])
        if len(shape) != 2 or 0 in shape or f"{name}_a" in keys or f"{name}_b" in keys:
            also = " and stands beside a product" if len(shape) == 2 and 0 not in shape else ""
            raise self.broken(f"{keys[name]} has shape {list(shape)}{also}, a Kronecker factor of a linear layer is one matrix")
        return shape[0], min(shape), shape[1]

    def _pair(self, keys: Mapping[str, str], up: str, down: str) -> tuple[int, int, int]:
        """(out, rank, in) of two factors."""
        for here, missing in ((up, down), (down, up)):
            if missing not in keys:
                there = keys.get(here) or next(iter(keys.values()))
                raise self.error(f"{there} has no {missing} factor beside it, half of the pair is missing: get a whole file")
        a, b = self.shape(keys[up]), self.shape(keys[down])
        if len(a) != 2 or len(b) != 2 or a[1] != b[0] or 0 in (*a, *b):
            raise self.broken(f"{keys[up]} {list(a)} and {keys[down]} {list(b)} are not a pair (out, rank), (rank, in)")
        return a[0], a[1], b[1]
