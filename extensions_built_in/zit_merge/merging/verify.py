"""Asked against got: what a file holds, compared with what it should.

While a module is written, the inner products of its inputs' deltas, of what was wanted and of what was written are taken, and
summed over the file. From them follow

    error      |written - wanted| / |wanted|, of the file and of its worst module
    kept       what share of the wanted energy is in the file, 1 - error^2
    strengths  the least-squares strengths of the inputs in the file, beside those in what was wanted

For a linear method, what was wanted is the sum of strength times delta, apart from the code that merges; for any other method
it is the method's answer, before truncation and rounding. A module whose error is more than rounding, or more than the
truncation that was asked for, stops the run.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..algebra.delta import Delta, gram, norm
from ..algebra.factors import Factors
from ..algebra.least_squares import groups, least_squares
from ..errors import ZitMergeError
from ..formats.metadata import CHECK_KEY, dumps, read_check

_SLACK = 2  # times what rounding explains at most: half a unit in the last place of every number is about twice what it does
# Sums in float32 tell |written - wanted| from about 4e-4 of the sizes on (measured), which is little beside rounding to bfloat16.
_SUMS = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float64}
_CANCELS = 0.01  # where less of the inputs' energy than this is left, those sums would tell too little
_FLOOR = {torch.float32: 1e-3, torch.float64: 1e-6}  # the latter: a few roundings of float32, in which the factors are merged
PAIRS_UP_TO = 64  # inputs whose inner products are kept for each module: their number grows with the square


@dataclass(frozen=True)
class Measured:
    """What was measured in one module, strengths included.

    Attributes:
        inputs: The n inputs that count there, by their numbers.
        energies: (n,), their squared Frobenius norms.
        gram: (n, n), their inner products; None for more than 64 inputs.
        written: Squared norm of what was written.
        error: |written - wanted| / |wanted|.
    """

    inputs: tuple[int, ...]
    energies: Tensor
    gram: Tensor | None
    written: float
    error: float


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes:
        error: |written - wanted| / |wanted| over the file; |written| where nothing was wanted.
        kept: Share of the wanted energy.
        asked: Least-squares strength of each input in what was wanted; None for one without any change.
        got: The same in what was written.
        alike: Groups of inputs, by their numbers, that are too alike for their strengths to be told apart.
        modules: What was measured in each module that an input changes; empty where the verdict was read from a file.
        cut: Whether a module was written with a lower rank than it has.
    """

    error: float
    kept: float
    asked: tuple[float | None, ...]
    got: tuple[float | None, ...]
    alike: Sequence[Sequence[int]] = ()
    modules: Mapping[str, Measured] = field(default_factory=dict)
    cut: bool = False

    @property
    def errors(self) -> dict[str, float]:
        """Module -> |written - wanted| / |wanted|."""
        return {module: measured.error for module, measured in self.modules.items()}

    def metadata(self) -> dict[str, str]:
        """For the file."""
        numbers = {"error": _short(self.error), "kept": _short(self.kept, 6)}
        lists = {key: [None if v is None else _short(v) for v in getattr(self, key)] for key in ("asked", "got")}
        return {CHECK_KEY: dumps(numbers | lists | {"cut": self.cut})}

    @classmethod
    def read(cls, metadata: Mapping[str, str]) -> Verdict | None:
        """What the metadata of a file say; None where they say nothing."""
        found = read_check(metadata)
        if found is None:
            return None
        return cls(found["error"], found["kept"], tuple(found["asked"]), tuple(found["got"]), cut=bool(found.get("cut")))


def placeholder(inputs: int) -> dict[str, str]:
    """Metadata at least as long as those of any verdict."""
    longest = -1.2345e-100
    return Verdict(longest, longest, (longest,) * inputs, (longest,) * inputs).metadata()


def _short(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


@dataclass
class Audit:
    """Sums up the checks of one file.

    Attributes:
        ratios: Of every input; a strength is counted in the delta with its blocks, layers and effects but without its ratio.
        dtype: Of the file.
        cut: The modules that are written with a lower rank than they have.
    """

    ratios: Sequence[float]
    dtype: torch.dtype
    cut: Collection[str]
    _gram: Tensor = field(init=False)
    _with_wanted: Tensor = field(init=False)
    _with_written: Tensor = field(init=False)
    _wanted: float = 0.0
    _missed: float = 0.0
    _modules: dict[str, Measured] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.ratios)
        self._gram = torch.zeros(count, count, dtype=torch.float64)
        self._with_wanted, self._with_written = (torch.zeros(count, dtype=torch.float64) for _ in range(2))

    def add(
        self,
        module: str,
        deltas: Mapping[int, Delta],
        factors: Mapping[int, float] | None,
        merged: Delta | None,
        written: Delta,
    ) -> None:
        """Checks one module.

        Args:
            module: Its name.
            deltas: Input -> its change, strength included.
            factors: Input -> what a linear method multiplies it with; None for any other method.
            merged: The method's answer, before truncation and rounding; None where nothing was wanted.
            written: As the file holds it, in its dtype.

        Raises:
            ZitMergeError: What was written is not what was wanted.
        """
        if merged is None:
            return
        numbers = list(deltas)
        parts = {n: delta.times(factors[n]) for n, delta in deltas.items()} if factors else {-1: merged}
        vectors = [*deltas.values(), *([] if factors else [merged]), written.map(lambda t: t.to(merged.device))]
        want = torch.tensor([factors[n] for n in numbers] if factors else [0.0] * len(numbers) + [1.0], dtype=torch.float64)
        found, noise = self._products(module, vectors, want)
        wanted, crossed, got = float(want @ found[:-1, :-1] @ want), float(want @ found[:-1, -1]), float(found[-1, -1])
        wanted, missed = max(wanted, 0.0), max(wanted - 2 * crossed + got, 0.0)
        # what truncation leaves out is orthogonal to what it keeps: <written, wanted - written> is rounding alone
        is_cut = module in self.cut and got > 0
        rounding = self._judge(module, abs(crossed - got) / got**0.5 if is_cut else missed**0.5, wanted**0.5, noise, written)
        if module in self.cut:
            _check_cut(module, list(parts.values()), vectors[-1], rounding)
        self._wanted += wanted
        self._missed += missed
        at, size = torch.tensor(numbers), len(numbers)
        products = found[:size, :size]
        error = (missed / wanted) ** 0.5 if wanted else 0.0
        pairs = products.clone() if size <= PAIRS_UP_TO else None
        self._modules[module] = Measured(tuple(numbers), products.diagonal().clone(), pairs, got, error)
        ratios = torch.tensor([self.ratios[n] for n in numbers], dtype=torch.float64)
        self._gram[at[:, None], at] += products / torch.outer(ratios, ratios)
        self._with_wanted[at] += (found[:size, :-1] @ want) / ratios
        self._with_written[at] += found[:size, -1] / ratios

    def _products(self, module: str, vectors: Sequence[Delta], want: Tensor) -> tuple[Tensor, float]:
        """(inner products of what `want` combines and of what was written, what sums of their precision can't tell)."""
        sums = _SUMS[self.dtype] if all(isinstance(v, Factors) for v in vectors) else torch.float64
        found = gram(vectors, sums)
        if sums == torch.float32 and float(want @ found[:-1, :-1] @ want) < _CANCELS * float(found.diagonal().sum()):
            sums = torch.float64
            found = gram(vectors)
        if not torch.isfinite(found).all():
            raise ZitMergeError(f"{module}: the norm of a change is too large for a number, the LoRA is broken: leave it out")
        return found, _FLOOR[sums] * float(found.diagonal().sum()) ** 0.5

    def _judge(self, module: str, beyond: float, wanted: float, noise: float, written: Delta) -> float:
        """Raises if `beyond` is more than rounding explains; returns what it explains."""
        for size in (_size, _coherent):  # components that are alike are rounded alike: their errors add up
            rounding = _SLACK * (torch.finfo(self.dtype).eps / 2 * size(written) + noise)
            if beyond <= rounding:
                return rounding
        share = beyond / wanted if wanted else math.inf
        cure = "save it as bf16 or fp32" if self.dtype == torch.float16 else "please report it with the recipe"
        raise ZitMergeError(f"{module}: what was written differs from what was wanted by {share:.1%} of it: {cure}")

    def verdict(self) -> Verdict:
        """Of the whole file."""
        error = (self._missed / self._wanted) ** 0.5 if self._wanted else self._missed**0.5
        asked, got = (least_squares(self._gram, h) for h in (self._with_wanted, self._with_written))
        return Verdict(error, max(1 - error**2, 0.0), asked, got, groups(self._gram), self._modules, bool(self.cut))


def _check_cut(module: str, parts: Sequence[Delta], written: Factors, rounding: float) -> None:
    """Raises if a truncation left out something larger than the smallest component that it kept."""
    left_out = _largest([p.map(lambda t: t.float()) for p in (*parts, written.times(-1.0))])
    kept = float(_sizes(written).min())
    if left_out > 1.001 * kept + rounding:
        raise ZitMergeError(
            f"{module}: what was written differs from what was wanted by more than the truncation, which left out a component "
            f"of size {left_out:.2g} and kept one of {kept:.2g}: please report it with the recipe"
        )


def _size(written: Delta) -> float:
    """What rounding moves a part of: the root of the sum of |up_k|^2 |down_k|^2 over components; of a Kron its norm."""
    return float(_sizes(written).norm()) if isinstance(written, Factors) else norm(written)


def _coherent(written: Delta) -> float:
    """The same where the components are alike: the root of the sum of |<up_k, up_l>| |<down_k, down_l>| over all pairs."""
    if not isinstance(written, Factors):
        return norm(written)
    up, down = written.up.double(), written.down.double()
    return float(((up.T @ up).abs() * (down @ down.T).abs()).sum()) ** 0.5


def _sizes(written: Factors) -> Tensor:
    """|up_k| |down_k| of each component: the singular values of what `truncate` made."""
    ups, downs = (torch.linalg.vector_norm(t, dim=d, dtype=torch.float32) for t, d in ((written.up, 0), (written.down, 1)))
    return ups * downs


def _largest(parts: Sequence[Delta]) -> float:
    """The largest singular value of a sum of deltas, from below: a few passes of block power iteration."""
    into, device = parts[0].shape[1], parts[0].device
    x = torch.randn(into, 4, generator=torch.Generator().manual_seed(0)).to(device)
    for _ in range(3):
        image = sum(p @ torch.linalg.qr(x).Q for p in parts)
        x = sum(p.T @ image for p in parts)
    return float(torch.linalg.matrix_norm(image, 2))
