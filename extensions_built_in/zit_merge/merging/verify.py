"""Asked against got: what a file holds, compared with what it should, while it is written.

    error      |written - wanted| / |wanted|, of the file and of its worst module
    kept       the share of the wanted energy that is in the file, 1 - error^2
    strengths  the least-squares strengths of the inputs in the file, beside those in what was wanted

For a linear method, what was wanted is the sum of coefficient * factor * change, apart from the code that merges; for any other
method it is the method's answer, before truncation and rounding. A module whose error is more than rounding, or more than the
truncation that was asked for, stops the run.

A module that is written whole is compared by what it does to 16 random inputs (`algebra.probes`): an error of twice what rounding
is allowed in all escapes in one module of a thousand at most, one of four times in one of ten million, one of ten times in 4e-14.
The error itself is an estimate: of rounding random factors of rank 32 and Z-Image's shapes to bfloat16, 3 % off (root mean
square) for equal singular values, 11 % where they fall as 1/k, and 1 and 2 % over 16 modules. Strengths in the file are those in
what was wanted and what the difference adds to them. Energies of the inputs are exact; their cosines are exact up to 128
components in all, beyond that they were 0.003 and 0.007 off (root mean square), 0.04 at most, among eight of the same factors.

A module that was truncated is compared by exact inner products, and by the largest component that was left out.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ..algebra.delta import Delta, gram, norm
from ..algebra.factors import Factors, wide
from ..algebra.least_squares import groups, least_squares
from ..algebra.probes import COUNT, image, probes, shortened
from ..config.schema import RankRule
from ..errors import ZitMergeError
from ..formats.dtypes import DTYPE_NAMES
from ..formats.verdict import PAIRS_UP_TO, Measured, Verdict, judged
from ..planning.types import StepPlan
from .merger import Made, Parts

_SLACK = 2  # times what rounding explains at most: half a unit in the last place of every number is about twice what it does
# Differences of sums in float32 tell |written - wanted| from about 4e-4 of the sizes on (measured): little beside bfloat16.
_SUMS = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float64}
_CANCELS = 0.01  # where less of the inputs' energy than this is left, those sums would tell too little
_PLAIN = 1e3  # coefficients beyond this, or below its inverse: sums in float32 could lose a change that they make large
_FLOOR = {torch.float32: 1e-3, torch.float64: 1e-6}  # the latter: a few roundings of float32, in which the factors are merged
_NOISE = {torch.float32: 1e-5, torch.float64: 1e-6}  # the same of probes: no difference of squares is taken
_NOTHING = 1e-14  # of the inputs' energy: what rounding leaves of changes that cancel in sums in float64
_LARGE = 1 << 24  # bytes of a module beside which no other one is merged
_FAR = 1e-20  # squares of sums below this, or beyond its inverse, are taken again in float64
_FEW, _THIN = 128, 1024  # components, of all changes and of one: between them inner products are taken of shortened factors


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
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> Verifier:
        return self

    def add(self, made: Made) -> None:
        """Hands a module over; waits while one is pending, or for a large one, so that memory stays at three small modules."""
        size = sum(made.written.shape) * made.written.rank * self._dtype.itemsize
        self._pending.append(self._pool.submit(self.check, made))
        while len(self._pending) > (size <= _LARGE):
            self._pending.popleft().result()

    def __exit__(self, kind: type | None, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        for future in () if kind else self._pending:
            future.result()

    def check(self, made: Made) -> None:
        """Checks one module.

        Raises:
            ZitMergeError: What was written is not what was wanted.
        """
        (module, parts, coefficients, merged), written = made.merged, made.written
        if not parts:
            return
        weights = [p.factor * p.scale * (p.ratio if coefficients is None else coefficients[n]) for n, p in parts.items()]
        vectors = [p.stored for p in parts.values()] + ([merged] if coefficients is None and merged else [])
        written = written.map(lambda t: t.to(vectors[0].device))
        asked = weights if coefficients is not None else [0.0] * len(parts) + [1.0]
        scales = torch.tensor([*weights, *asked[len(parts) :]], dtype=torch.float64)
        compare = self._compare_cut if module in self._cut else self._compare
        found, wanted, missed = compare(module, parts, vectors, torch.tensor(asked, dtype=torch.float64), scales, written)
        bare = torch.tensor([*(p.scale for p in parts.values()), *(1.0 for _ in found[len(parts) :])], dtype=torch.float64)
        want = torch.tensor(asked, dtype=torch.float64) / bare[:-1]
        self._sums.add(module, parts, found * torch.outer(bare, bare), want, (wanted, missed, float(found[-1, -1])))

    def _compare(
        self, module: str, parts: Parts, vectors: Sequence[Delta], want: Tensor, scales: Tensor, written: Delta
    ) -> tuple[Tensor, float, float]:
        """(inner products of the vectors and of what was written, energy of what was wanted, of what is missing), by probes."""
        short = _shortened(vectors)
        found, energy = self._products(module, parts, short, want, scales, torch.float32)
        if short is not vectors:
            found = _of_true_length(found, vectors)
            energy = float((found.diagonal() * scales**2).sum())
        wanted = max(float(want @ found @ want), 0.0)
        is_easy = self._dtype != torch.float32 and _is_plain(scales) and wanted >= _CANCELS * energy
        sums = torch.float32 if is_easy else torch.float64
        crossed, (missed, got, asked) = _probed(vectors, want, written, sums)
        noise = _NOISE[sums] * energy**0.5
        if sums == torch.float32 and not missed**0.5 <= _SLACK * (torch.finfo(self._dtype).eps / 2 * got**0.5 + noise):
            crossed, (missed, got, asked) = _probed(vectors, want, written, torch.float64)
            noise = _NOISE[torch.float64] * energy**0.5
        self._check_size(module, got)
        self._judge(module, missed**0.5, asked**0.5, noise, got**0.5, written)
        column = found @ want + crossed
        got = wanted + 2 * float(crossed @ want) + missed
        got = got if got > _NOTHING * energy else 0.0
        corner = torch.tensor([[got]], dtype=torch.float64)
        return torch.cat([torch.cat([found, column[:, None]], 1), torch.cat([column[None], corner], 1)]), wanted, missed

    def _compare_cut(
        self, module: str, parts: Parts, vectors: Sequence[Delta], want: Tensor, scales: Tensor, written: Delta
    ) -> tuple[Tensor, float, float]:
        """The same by inner products alone, which tell what a truncation leaves out to many digits."""
        one, none = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        sums = _SUMS[self._dtype]
        found, energy = self._products(
            module, parts, [*vectors, written], torch.cat([want, none]), torch.cat([scales, one]), sums
        )
        wanted, crossed, got = float(want @ found[:-1, :-1] @ want), float(want @ found[:-1, -1]), float(found[-1, -1])
        wanted, missed = max(wanted, 0.0), max(wanted - 2 * crossed + got, 0.0)
        self._check_size(module, got)
        # what truncation leaves out is orthogonal to what it keeps: <written, wanted - written> is rounding alone
        beyond = abs(crossed - got) / got**0.5 if got > 0 else missed**0.5
        rounding = self._judge(module, beyond, wanted**0.5, _FLOOR[sums] * energy**0.5, 0.0, written)
        kept = [v.times(float(w)) for v, w in zip(vectors, want, strict=True) if w]
        _check_cut(f"{self._file}: {module}", kept, written, rounding)
        return found, wanted, missed

    def verdict(self) -> Verdict:
        """Of the whole file."""
        rule = self._spec.rank_rule or RankRule()
        found = self._sums.verdict(bool(self._cut))
        return judged(found, energy=rule.energy, most=rule.max, averaged=bool(self._spec.checkpoints))

    def _products(
        self, module: str, parts: Parts, vectors: Sequence[Delta], want: Tensor, scales: Tensor, sums: torch.dtype
    ) -> tuple[Tensor, float]:
        """(inner products of some changes, the energy of all of them at their scales)."""
        if not _is_plain(scales) or not all(isinstance(v, Factors) for v in vectors):
            sums = torch.float64
        found = gram(vectors, sums)
        energy = float((found.diagonal() * scales**2).sum())
        is_told = float(want @ found @ want) >= _CANCELS * energy  # False where float32 overflows, too
        if sums == torch.float32 and not is_told:
            found = gram(vectors)
            energy = float((found.diagonal() * scales**2).sum())
        if not torch.isfinite(found).all() or not math.isfinite(energy):
            is_finite = found.diagonal().isfinite().tolist()
            names = [self._inputs[n].label for n, is_one in zip(parts, is_finite, strict=False) if not is_one]
            raise ZitMergeError(
                f"{names[0] if names else self._file}: {module}: the norm of its change is too large for a number: "
                + ("the LoRA is broken, leave it out" if names else "use smaller strengths")
            )
        return found, energy

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


def _shortened(vectors: Sequence[Delta]) -> Sequence[Delta]:
    """Changes of which inner products are taken: as they are, or shortened where they have many components."""
    thin = [v for v in vectors if isinstance(v, Factors) and v.rank <= _THIN]
    is_short = len(thin) < len(vectors) or sum(v.rank for v in thin) <= _FEW
    return vectors if is_short else [shortened(v) for v in thin]


def _of_true_length(found: Tensor, vectors: Sequence[Delta]) -> Tensor:
    """Estimated inner products with the lengths of the changes as they are: one at a time has few components to multiply."""
    energies = torch.cat([gram([v], torch.float32).reshape(1) for v in vectors]).to(found)
    told = found.diagonal()
    ratios = torch.where(told > 0, energies / told, torch.ones_like(told)).sqrt()
    return found * torch.outer(ratios, ratios)


def _probed(vectors: Sequence[Delta], want: Tensor, written: Delta, sums: torch.dtype) -> tuple[Tensor, list[float]]:
    """Inner products of the vectors with the difference, and squared norms of that, of what was written and of what was wanted.

    In float32 where that is safe, as `sums` asks for.
    """
    block = probes(written.shape[1], sums, written.device)
    rows = block.new_empty(len(vectors) + 3, written.shape[0] * COUNT)  # those of the vectors, wanted, written, the difference
    for row, vector in zip(rows, vectors, strict=False):
        row.copy_(image(vector, block).flatten())
    torch.mv(rows[: len(vectors)].T, want.to(rows), out=rows[-3])
    rows[-2] = image(written, block).flatten()
    torch.sub(rows[-2], rows[-3], out=rows[-1])
    products = (rows @ rows.T).double().cpu()
    crossed, sizes = products[-1], products.diagonal()
    if sums == torch.float32 and not ((sizes[:-1] > _FAR) & (sizes[:-1] < 1 / _FAR)).all():
        return _probed(vectors, want, written, torch.float64)
    return crossed[: len(vectors)] / COUNT, (sizes[[-1, -2, -3]] / COUNT).tolist()


def _check_cut(name: str, parts: Sequence[Delta], written: Delta, rounding: float) -> None:
    """Raises if a truncation left out something larger than the smallest component that it kept."""
    left_out = _largest([p.map(wide) for p in (*parts, written.times(-1.0))])
    kept = float(_sizes(written).min())
    if left_out > 1.001 * kept + rounding:
        raise ZitMergeError(
            f"{name}: what was written differs from what was wanted by more than the truncation, which left out a component "
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


def _sizes(written: Delta) -> Tensor:
    """|up_k| |down_k| of each component: the singular values of what `truncate` made."""
    up, down = written.expand()
    ups, downs = (torch.linalg.vector_norm(wide(t), dim=d) for t, d in ((up, 0), (down, 1)))
    return ups * downs


def _largest(parts: Sequence[Delta]) -> float:
    """The largest singular value of a sum of deltas, from below: a few passes of block power iteration."""
    into, device = parts[0].shape[1], parts[0].device
    x = torch.randn(into, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    for _ in range(3):
        image = sum(p @ torch.linalg.qr(x).Q for p in parts)
        x = sum(p.T @ image for p in parts)
    return float(torch.linalg.matrix_norm(image, 2))
