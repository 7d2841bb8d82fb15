"""Asked against got: what a file holds, compared with what it should, while it is written.

    error      |written - wanted| / |wanted|, of the file and of its worst module
    kept       the share of the wanted energy that is in the file, 1 - error^2
    strengths  the least-squares strengths of the inputs in the file, beside those in what was wanted

For a linear method, what was wanted is the sum of coefficient * factor * change, apart from the code that merges; for any other
method it is the method's answer, before truncation and rounding. A module whose error is more than rounding, or more than the
truncation that was asked for, stops the run.

What is written whole is compared by what it does to 16 random inputs (`algebra.probes`). An error of twice what rounding is
allowed in all escapes in one module of a thousand at most, one of four times in one of ten million, one of ten times in 4e-14.
The error itself is an estimate: of rounding random factors of rank 32 and Z-Image's shapes to bfloat16, 3 % off (root mean
square) for equal singular values, 11 % where they fall as 1/k, and 1 and 2 % over 16 modules.

Of a truncated module three things are asked, each of which a wrong sum or a worse truncation breaks: what was written is
orthogonal to what is missing (by exact inner products with each input), nothing larger is missing than what was kept (by power
iteration, which tells the largest component of the difference from below, in float64 before it stops a run), and the energy that
is missing, from which `kept` follows: exact up to 128 components in all (`algebra.components`), beyond that an estimate that
rests on the same probes.

Strengths in the file are those in what was wanted and what the difference adds to them; of a truncated module they are exact.
Energies of the inputs are exact; their cosines are exact up to 128 components in all (those of the inputs, and for a method that
is not linear those of its answer), beyond that they were 0.003 and 0.007 off (root mean square), 0.04 at most, among eight of the
same factors.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ..algebra.delta import Delta, nbytes
from ..algebra.factors import Factors
from ..algebra.least_squares import groups, least_squares
from ..algebra.probes import Probed, Truncation, sizes_of
from ..algebra.products import norm
from ..config.schema import RankRule
from ..errors import ZitMergeError
from ..formats.dtypes import DTYPE_NAMES
from ..formats.verdict import PAIRS_UP_TO, Measured, Verdict, judged
from ..planning.types import StepPlan
from .merger import Made, Parts

_SLACK = 2  # times what rounding explains at most: half a unit in the last place of every number is about twice what it does
_CANCELS = 0.01  # where less of the inputs' energy than this is left, those sums would tell too little
_REMAINS = 1e-4  # of the components' energies in the changes: less, too
_PLAIN = 1e3  # coefficients beyond this, or below its inverse: sums in float32 could lose a change that they make large
_FLOOR = {torch.float32: 1e-3, torch.float64: 1e-6}  # the latter: a few roundings of float32, in which the factors are merged
_NOISE = {torch.float32: 1e-5, torch.float64: 1e-6}  # the same of probes: no difference of squares is taken
_NOTHING = 1e-14  # of the inputs' energy: what rounding leaves of changes that cancel in sums in float64
_PENDING = 1 << 24  # bytes of modules, with all that belongs to them, up to which more than one waits for its check
_LARGE = 1 << 25  # of one that is checked before the next one is handed over
_FAR = 1e-20  # squares of sums below this, or beyond its inverse, are taken again in float64


class Sums:
    """What a check adds up over the modules of a file.

    Args:
        count: How many inputs the step has.

    Attributes:
        modules: What was measured in each module.
    """

    def __init__(self, count: int):
        self._gram = torch.zeros(count, count, dtype=torch.float64)
        self._with_wanted, self._with_written = (torch.zeros(count, dtype=torch.float64) for _ in range(2))
        self._wanted = self._missed = 0.0
        self.modules: dict[str, Measured] = {}

    def add(self, module: str, parts: Parts, found: Tensor, want: Tensor, energies: tuple[float, float, float]) -> None:
        """Adds a module.

        Args:
            module: Its name.
            parts: Input -> its part.
            found: (n + k, n + k) inner products: of the n bare changes, of what else was wanted, of what was written.
            want: (n + k - 1,) what the first n + k - 1 were wanted with.
            energies: Squared norms of what was wanted, of what of it is missing, of what was written.
        """
        wanted, missed, written = energies
        numbers, size = list(parts), len(parts)
        self._wanted += wanted
        self._missed += missed
        bare = found[:size, :size]
        error = (missed / wanted) ** 0.5 if wanted else 0.0
        pairs = bare.clone() if size <= PAIRS_UP_TO else None
        self.modules[module] = Measured(tuple(numbers), bare.diagonal().clone(), pairs, written, error)
        at, factors = torch.tensor(numbers), torch.tensor([p.factor for p in parts.values()], dtype=torch.float64)
        self._gram[at[:, None], at] += bare * torch.outer(factors, factors)
        self._with_wanted[at] += factors * (found[:size, :-1] @ want)
        self._with_written[at] += factors * found[:size, -1]

    def verdict(self, cut: bool) -> Verdict:
        """The numbers of the whole file, not yet judged."""
        error = (self._missed / self._wanted) ** 0.5 if self._wanted else self._missed**0.5
        asked, got = (least_squares(self._gram, h) for h in (self._with_wanted, self._with_written))
        return Verdict(error, max(1 - error**2, 0.0), asked, got, cut, groups(self._gram), self.modules)


class Verifier:
    """Checks the modules of one file in a thread of its own, while the next ones are merged and written.

    Args:
        plan: The step.
    """

    def __init__(self, plan: StepPlan):
        self._dtype, self._cut, self._sums = plan.dtype, plan.cut, Sums(len(plan.inputs))
        self._spec, self._inputs, self._file = plan.spec, plan.inputs, plan.path.name
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._pending: deque[tuple[int, Future[None]]] = deque()

    def __enter__(self) -> Verifier:
        return self

    def add(self, made: Made) -> None:
        """Hands a module over; waits while many or large ones are not checked yet."""
        (_, parts, _, delta), written = made.merged, made.written
        size = sum(map(nbytes, [written, *(p.stored for p in parts.values()), *([] if delta is None else [delta])]))
        while self._pending and self._pending[0][1].done():
            self._pending.popleft()[1].result()
        self._pending.append((size, self._pool.submit(self.check, made)))
        while sum(size for size, _ in self._pending) > (_LARGE if len(self._pending) == 1 else _PENDING):
            self._pending.popleft()[1].result()

    def __exit__(self, kind: type | None, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        for _, future in () if kind else self._pending:
            future.result()

    def check(self, made: Made) -> None:
        """Checks one module.

        Raises:
            ZitMergeError: What was written is not what was wanted.
        """
        (module, parts, coefficients, merged), written = made.merged, made.written
        if not parts:
            return
        strengths = [p.factor * (p.ratio if coefficients is None else coefficients[n]) for n, p in parts.items()]
        bare = [p.scale for p in parts.values()]  # what makes a stored change a bare one
        weights = [strength * scale for strength, scale in zip(strengths, bare, strict=True)]
        vectors, asked = [p.stored for p in parts.values()], weights
        if coefficients is None and merged:
            vectors, bare, weights = [*vectors, merged], [*bare, 1.0], [*weights, 1.0]
            strengths = asked = [0.0] * len(parts) + [1.0]
        written = written.map(lambda t: t.to(vectors[0].device))
        scales, want = torch.tensor(weights, dtype=torch.float64), torch.tensor(asked, dtype=torch.float64)
        compare = self._compare_cut if module in self._cut else self._compare
        found, wanted, missed = compare(module, parts, vectors, want, scales, written)
        sizes = torch.tensor([*bare, 1.0], dtype=torch.float64)
        found, want = found * torch.outer(sizes, sizes), torch.tensor(strengths, dtype=torch.float64)
        self._sums.add(module, parts, found, want, (wanted, missed, float(found[-1, -1])))

    def _compare(
        self, module: str, parts: Parts, vectors: Sequence[Delta], want: Tensor, scales: Tensor, written: Delta
    ) -> tuple[Tensor, float, float]:
        """(inner products of the vectors and of what was written, energy of what was wanted, of what is missing), by probes."""
        for sums in self._precisions(module, scales):
            probed = Probed.of(vectors, sums)
            energy, wanted = _energies(probed.inner, want, scales)
            missing = probed.difference(want, written)
            noise = _NOISE[sums] * energy**0.5
            is_right = missing.energy**0.5 <= _SLACK * (torch.finfo(self._dtype).eps / 2 * missing.written**0.5 + noise)
            if is_right and _is_told(probed, wanted, energy):
                break
        self._check_finite(module, parts, probed.inner, energy)
        self._check_size(module, missing.written)
        self._judge(module, missing.energy**0.5, missing.wanted**0.5, noise, missing.written**0.5, written)
        got = wanted + 2 * float(missing.crossed @ want) + missing.energy
        got = got if got > _NOTHING * energy else 0.0
        return _bordered(probed.inner, probed.inner @ want + missing.crossed, got), wanted, missing.energy

    def _compare_cut(
        self, module: str, parts: Parts, vectors: Sequence[Delta], want: Tensor, scales: Tensor, written: Delta
    ) -> tuple[Tensor, float, float]:
        """The same of what was truncated: what it left out is orthogonal to what it kept, and has no component as large."""
        kept = written.expand()
        for sums in self._precisions(module, scales):
            seen = Truncation.of(vectors, want, kept, sums)
            energy, wanted = _energies(seen.inner, want, scales)
            crossed, got = float(want @ seen.column), seen.got
            if seen.missed is None:
                missed = max(wanted - 2 * crossed + got, 0.0)
            else:
                missed, wanted = seen.missed, max(2 * crossed - got + seen.missed, 0.0)
            # <written, wanted - written> is rounding alone
            beyond = abs(crossed - got) / got**0.5 if got > 0 else missed**0.5
            noise = _FLOOR[sums] * energy**0.5
            is_right = beyond <= _SLACK * (torch.finfo(self._dtype).eps / 2 * got**0.5 + noise)
            if is_right and _is_told(seen, wanted, energy):
                break
        self._check_finite(module, parts, seen.inner, energy)
        self._check_size(module, got)
        rounding = self._judge(module, beyond, wanted**0.5, noise, float(seen.sizes.norm()), written)
        smallest = float(seen.sizes.min())
        limit = 1.001 * smallest + rounding
        if not seen.largest() <= limit:  # probes in float64 are surer, and take longer
            left_out = Probed.of(vectors, torch.float64).difference(want, written).largest()
            if not left_out <= limit:
                raise ZitMergeError(
                    f"{self._file}: {module}: what was written differs from what was wanted by more than the truncation, "
                    f"which left out a component of size {left_out:.2g} and kept one of {smallest:.2g}: "
                    "please report it with the recipe"
                )
        return _bordered(seen.inner, seen.column, got), wanted, missed

    def _precisions(self, module: str, scales: Tensor) -> tuple[torch.dtype, ...]:
        """Dtypes to take long sums in, until one tells enough."""
        coarse = (torch.bfloat16,) if module in self._cut else (torch.bfloat16, torch.float16)
        is_easy = self._dtype in coarse and _is_plain(scales)
        return (torch.float32, torch.float64) if is_easy else (torch.float64,)

    def verdict(self) -> Verdict:
        """Of the whole file."""
        rule = self._spec.rank_rule or RankRule()
        found = self._sums.verdict(bool(self._cut))
        return judged(found, energy=rule.energy, most=rule.max, averaged=bool(self._spec.checkpoints))

    def _check_finite(self, module: str, parts: Parts, found: Tensor, energy: float) -> None:
        """Raises if an inner product is too large for a number."""
        if torch.isfinite(found).all() and math.isfinite(energy):
            return
        is_finite = found.diagonal().isfinite().tolist()
        names = [self._inputs[n].label for n, is_one in zip(parts, is_finite, strict=False) if not is_one]
        raise ZitMergeError(
            f"{names[0] if names else self._file}: {module}: the norm of its change is too large for a number: "
            + ("the LoRA is broken, leave it out" if names else "use smaller strengths")
        )

    def _check_size(self, module: str, got: float) -> None:
        """Raises if the factors hold what programs that multiply them out do not."""
        if got > torch.finfo(torch.float32).max ** 2:
            raise ZitMergeError(f"{self._file}: {module} is too large for {DTYPE_NAMES[self._dtype]}: use smaller strengths")

    def _judge(self, module: str, beyond: float, wanted: float, noise: float, got: float, written: Delta) -> float:
        """Raises if `beyond` is more than rounding explains; returns what it explains.

        `got`, which is never larger than the last of the sizes, is one that costs nothing; 0 where it is not known.
        """
        # components that are alike are rounded alike: their errors add up
        for size in (lambda _: got, _size, _coherent) if got else (_size, _coherent):
            rounding = _SLACK * (torch.finfo(self._dtype).eps / 2 * size(written) + noise)
            if beyond <= rounding:
                return rounding
        share = beyond / wanted if wanted else math.inf
        cure = "please report it with the recipe"
        if self._dtype == torch.float16:
            cure = "save it as bf16 or fp32"
        elif wanted < torch.finfo(torch.float32).tiny:
            cure = f"it is too small for {DTYPE_NAMES[self._dtype]}, use larger strengths"
        raise ZitMergeError(f"{self._file}: {module}: what was written differs from what was wanted by {share:.1%} of it: {cure}")


def _is_plain(scales: Tensor) -> bool:
    return bool(((scales.abs() <= _PLAIN) & (scales.abs() >= 1 / _PLAIN)).all())


def _energies(found: Tensor, want: Tensor, scales: Tensor) -> tuple[float, float]:
    """Of all changes at their scales, and of what was wanted."""
    return max(float((found.diagonal() * scales**2).sum()), 0.0), max(float(want @ found @ want), 0.0)


def _is_told(seen: Probed | Truncation, wanted: float, energy: float) -> bool:
    """Whether sums in float32 tell enough: little cancels in them, and their squares are well within its range."""
    sizes = seen.inner.diagonal()
    is_tame = bool(((sizes > _FAR) & (sizes < 1 / _FAR)).all())
    return wanted >= _CANCELS * energy and seen.remains >= _REMAINS and is_tame


def _bordered(found: Tensor, column: Tensor, corner: float) -> Tensor:
    """A Gram matrix with one more row and column."""
    row = torch.cat([column, column.new_tensor([corner])])
    return torch.cat([torch.cat([found, column[:, None]], 1), row[None]])


def _size(written: Delta) -> float:
    """What rounding moves a part of: the root of the sum of |up_k|^2 |down_k|^2 over components; of a Kron its norm."""
    return float(sizes_of(written).norm()) if isinstance(written, Factors) else norm(written)


def _coherent(written: Delta) -> float:
    """The same where the components are alike: the root of the sum of |<up_k, up_l>| |<down_k, down_l>| over all pairs."""
    if not isinstance(written, Factors):
        return norm(written)
    up, down = written.up.double(), written.down.double()
    return float(((up.T @ up).abs() * (down @ down.T).abs()).sum()) ** 0.5
