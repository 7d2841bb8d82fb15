"""What Gram matrices of all components tell, beside dense matrices."""

from __future__ import annotations

import pytest
import torch
from operands import dense, draw

from extensions_built_in.zit_merge.algebra.components import Components
from extensions_built_in.zit_merge.algebra.factors import Factors
from extensions_built_in.zit_merge.algebra.truncate import truncate

SUMS = {torch.float32: 1e-5, torch.float64: 1e-12}  # dtype of the sums -> relative error of what is told
F32, F64 = SUMS


def decaying(rank: int, power: float, seed: int) -> Factors:
    """Singular values that fall as 1/k^power."""
    x = draw(300, 200, rank, seed)
    up, down = torch.linalg.qr(x.up).Q, torch.linalg.qr(x.down.T).Q.T
    return Factors(up * torch.arange(1.0, rank + 1) ** -power, down)


def regauged(x: Factors, condition: float, seed: int = 9) -> Factors:
    """The same delta, its components mixed by a matrix of this condition number, in float64."""
    random = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(x.rank, x.rank, generator=random).double()).Q for _ in range(2))
    mixing = left * torch.logspace(0, torch.tensor(condition).log10().item(), x.rank, dtype=torch.float64)
    return Factors(x.up.double() @ mixing @ right, right.T @ torch.linalg.inv(mixing) @ x.down.double())


@pytest.mark.parametrize("sums", SUMS)
def test_inner_products_and_sizes(sums):
    xs = [draw(90, 70, rank, seed, dtype) for seed, (rank, dtype) in enumerate([(3, torch.bfloat16), (1, F32), (5, F64)])]
    seen, wholes = Components.of(xs, sums), torch.stack([dense(x).flatten() for x in xs])
    gram = wholes @ wholes.T
    assert float((seen.inner - gram).abs().max()) < SUMS[sums] * float(gram.max())
    sizes = torch.cat([x.up.double().norm(dim=0) * x.down.double().norm(dim=1) for x in xs])
    torch.testing.assert_close(seen.sizes, sizes, rtol=SUMS[sums], atol=0)


def test_changes_without_components():
    x = draw(90, 70, 2)
    none = Factors(x.up[:, :0], x.down[:0])
    assert Components.of([x, none], F64).inner.tolist() == [[pytest.approx(float(dense(x).square().sum())), 0.0], [0.0, 0.0]]
    assert Components.of([none], F64).inner.tolist() == [[0.0]]


@pytest.mark.parametrize("size", [1e-18, 1e18])
def test_sizes_whose_squares_float32_has_not(size):
    xs = [draw(90, 70, 2, 0, size=size), draw(90, 70, 2, 1, size=1 / size)]
    seen = Components.of(xs, F32)
    assert seen.inner.diagonal().tolist() == pytest.approx([float(dense(x).square().sum()) for x in xs], rel=1e-5)


@pytest.mark.parametrize("sums", SUMS)
@pytest.mark.parametrize("power", [0, 1, 2])
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_the_largest_component_that_a_truncation_leaves_out(sums, power, rank):
    xs, weights = [decaying(8, power, 0), decaying(8, power, 1)], torch.tensor([0.9, -0.6], dtype=F64)
    wanted = dense(xs[0]) * 0.9 - dense(xs[1]) * 0.6
    kept = truncate(Factors(torch.cat([xs[0].up * 0.9, xs[1].up * -0.6], 1), torch.cat([xs[0].down, xs[1].down])), rank)
    right = float(torch.linalg.svdvals(wanted - dense(kept))[0])
    told = Components.of([*xs, kept], sums).largest(torch.cat([weights, -torch.ones(1)]))
    assert 0.85 * right < told < 1.001 * right + SUMS[sums] * float(wanted.norm()) * 10


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e5])
@pytest.mark.parametrize("which", ["mixed", "lopsided"])
def test_the_largest_component_does_not_depend_on_the_gauge(condition, which):
    x = decaying(16, 1, 0)
    scales = torch.logspace(0, torch.tensor(condition).log10().item(), 16, dtype=F64)
    other = regauged(x, condition) if which == "mixed" else Factors(x.up * scales, x.down / scales[:, None])
    kept = truncate(x, 4)
    right = float(torch.linalg.svdvals(dense(x) - dense(kept))[0])
    told = Components.of([other, kept], F64).largest(torch.tensor([1.0, -1.0]).double())
    assert told == pytest.approx(right, rel=0.1)


@pytest.mark.parametrize("sums", SUMS)
def test_how_much_remains_of_components_that_cancel(sums):
    x = decaying(8, 0, 0)
    assert Components.of([x], sums).remains == pytest.approx(1)
    mixed = regauged(x, 1e3)
    sizes = mixed.up.norm(dim=0) * mixed.down.norm(dim=1)
    right = float(dense(x).square().sum() / sizes.square().sum())
    assert right < 1e-4 and Components.of([mixed], sums).remains == pytest.approx(right, abs=SUMS[sums])
    assert not Components.of([x.times(0.0)], sums).remains >= 0, "NaN"


def test_nothing_is_missing_of_what_is_whole():
    """But for rounding, of which the root is told: how much it is depends on the processor."""
    x = draw(300, 200, 8)
    half = Factors(x.up * 0.5, x.down * 2)
    assert Components.of([x, half], F64).largest(torch.tensor([1.0, -1.0]).double()) < 1e-4 * float(dense(x).norm())
    assert Components.of([x, x.times(0.0)], F64).largest(torch.tensor([0.0, 1.0]).double()) == 0.0
