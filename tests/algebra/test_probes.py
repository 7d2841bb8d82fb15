"""Random inputs and shortened factors beside dense matrices."""

from __future__ import annotations

import pytest
import torch

from extensions_built_in.zit_merge.algebra.factors import Factors, stack
from extensions_built_in.zit_merge.algebra.least_squares import cosines, groups
from extensions_built_in.zit_merge.algebra.probes import COUNT, Probed, image, probes
from extensions_built_in.zit_merge.algebra.products import gram
from extensions_built_in.zit_merge.algebra.sketch import shortened
from extensions_built_in.zit_merge.algebra.truncate import truncate

CPU = torch.device("cpu")


def drawn(out: int, into: int, rank: int, seed: int) -> Factors:
    random = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(out, rank, generator=random), torch.randn(rank, into, generator=random))


def test_the_same_numbers_every_time():
    again = probes.__wrapped__(300, torch.float64, CPU)
    assert torch.equal(probes(300, torch.float64, CPU), again) and torch.equal(again.float(), probes(300, torch.float32, CPU))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 128, 200])
def test_an_image_is_the_product(dtype, rank):
    x, block = drawn(40, 300, rank, 0).map(lambda t: t.to(dtype)), probes(300, torch.float64, CPU)
    torch.testing.assert_close(image(x, block), x.up.double() @ x.down.double() @ block)


@pytest.mark.parametrize(("rank", "spread"), [(1, 0.35), (32, 0.07)])
def test_how_well_a_norm_is_told(rank, spread):
    """As the docstring has it: sqrt(2 / (16 s)), and never under a fourth of it."""
    block = probes(500, torch.float64, CPU)
    told = []
    for seed in range(200):
        x = drawn(60, 500, rank, seed).map(torch.Tensor.double)
        told.append(float(image(x, block).square().sum() / COUNT / (x.up @ x.down).square().sum()))
    told = torch.tensor(told)
    assert float(told.mean()) == pytest.approx(1, abs=4 * spread / 200**0.5 + 0.05)
    assert float(told.std()) < 1.3 * spread + 0.05 and float(told.min()) > 1 / 16


def test_cosines_of_shortened_factors():
    xs = [drawn(3840, 2600, 16, seed) for seed in range(4)]
    exact, short = cosines(gram(xs)), cosines(gram([shortened(x) for x in xs], torch.float32))
    assert float((exact - short).abs().max()) < 0.06
    assert all(shortened(x).shape == (521, 521) for x in xs)


def test_numbers_of_one_sign_do_not_add_up_in_shortened_factors():
    xs = [drawn(3840, 2600, 1, seed).map(torch.abs) for seed in range(4)]
    exact, short = cosines(gram(xs)), cosines(gram([shortened(x) for x in xs], torch.float32))
    assert 0.3 < float(exact[0, 1]) < 0.5 and float((exact - short).abs().max()) < 0.1


@pytest.mark.parametrize(("apart", "alike"), [(0.3, False), (1e-3, True)])
def test_inputs_that_are_alike_stay_so(apart, alike):
    x, noise = drawn(3840, 2600, 16, 0), drawn(3840, 2600, 16, 1)
    near = Factors(x.up + apart * noise.up, x.down)
    assert bool(groups(gram([shortened(x), shortened(near)]))) == alike


def test_short_sides_stay_as_they_are():
    x = drawn(1042, 256, 4, 0)
    assert shortened(x).up is x.up and torch.equal(shortened(x).down, x.down)


@pytest.mark.parametrize("sums", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [8, 64])
def test_several_changes_and_one_that_was_written(sums, rank):
    """Lengths, and products with what was written, are exact; the difference is told by its image."""
    vectors = [drawn(1300, 1200, rank, seed) for seed in range(3)]
    vectors[1] = Factors(3 * vectors[1].up, vectors[1].down)
    want = torch.tensor([0.5, -0.2, 0.0], dtype=torch.float64)
    dense = [v.up.double() @ v.down.double() for v in vectors]
    written = truncate(stack([v.times(float(w)) for v, w in zip(vectors, want, strict=True)]), 5)
    wanted, got = sum(float(w) * d for w, d in zip(want, dense, strict=True)), written.up.double() @ written.down.double()
    probed = Probed.of(vectors, sums)
    exact = gram(vectors)
    assert probed.is_exact == (rank == 8)
    torch.testing.assert_close(probed.inner.diagonal(), exact.diagonal(), rtol=1e-5, atol=0)
    torch.testing.assert_close(cosines(probed.inner), cosines(exact), rtol=0, atol=1e-6 if probed.is_exact else 0.1)
    column, energy = probed.products(written)
    size = float(exact.diagonal().max().sqrt() * got.norm())
    torch.testing.assert_close(column, torch.stack([(d * got).sum() for d in dense]), rtol=0, atol=1e-6 * size)
    assert energy == pytest.approx(float(got.square().sum()), rel=1e-5)
    missing = probed.difference(want, written)
    block = probes(1200, torch.float64, CPU)
    torch.testing.assert_close(missing.image.double(), (got - wanted) @ block, rtol=0, atol=1e-4 * float(wanted.norm()))
    assert missing.energy == pytest.approx(float((got - wanted).square().sum()), rel=0.3)
    assert missing.written == pytest.approx(float(got.square().sum()), rel=0.5)
    largest = float(torch.linalg.matrix_norm(got - wanted, 2))
    assert 0.9 * largest < missing.largest() < largest * (1 + 1e-5)


def test_a_change_of_nothing_stays_nothing():
    nothing = Factors(torch.zeros(1300, 64), torch.zeros(64, 1200))
    probed = Probed.of([drawn(1300, 1200, 96, 0), nothing], torch.float32)
    assert not probed.is_exact and float(probed.inner[0, 0]) > 0
    assert not probed.inner[1].any() and not probed.inner[:, 1].any()
    assert probed.difference(torch.tensor([0.0, 1.0]), nothing).largest() == 0
