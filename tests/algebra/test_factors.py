"""Sums, norms and distances of factors against the multiplied-out matrices in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles.dense import product
from sweep import examples

from extensions_built_in.zit_merge.algebra.factors import Factors, pad, stack
from extensions_built_in.zit_merge.algebra.products import distance, inner, norm

HALVES = (torch.bfloat16, torch.float16)


def draw(out, into, rank, seed, dtype=torch.float32, size=1.0):
    random = torch.Generator().manual_seed(seed)
    return Factors(
        (torch.randn(out, rank, generator=random) * size).to(dtype), torch.randn(rank, into, generator=random).to(dtype)
    )


shapes = st.tuples(st.integers(1, 24), st.integers(1, 24))
ranks = st.lists(st.integers(1, 6), min_size=1, max_size=4)
dtypes = st.sampled_from([torch.float32, *HALVES])


@examples(40)
@given(shapes, ranks, st.integers(0, 10**6), st.lists(dtypes, min_size=4, max_size=4))
def test_stack_is_the_sum_of_the_deltas(shape, ranks, seed, kinds):
    parts = [draw(*shape, r, seed + i, dtype) for i, (r, dtype) in enumerate(zip(ranks, kinds, strict=False))]
    stacked = stack(parts)
    assert stacked.rank == sum(ranks)
    # Exactly the same numbers, whichever dtypes are mixed: only the order of float64 additions differs.
    torch.testing.assert_close(product(*stacked), sum(product(*p) for p in parts), rtol=0, atol=1e-12)


def test_stack_leaves_one_part_and_one_dtype_alone():
    one = draw(5, 4, 2, 0, torch.bfloat16)
    assert stack([one]) is one
    two = stack([one, draw(5, 4, 3, 1, torch.bfloat16)])
    assert two.up.dtype == two.down.dtype == torch.bfloat16


def test_stack_of_bf16_and_fp16_loses_neither():
    # bfloat16 has the range, float16 the digits: only float32 holds both
    wide, fine = Factors(torch.full((1, 1), 1e30).bfloat16(), torch.ones(1, 1).bfloat16()), draw(1, 1, 1, 0, torch.float16)
    stacked = stack([wide, fine])
    assert stacked.up.tolist() == [[float(wide.up), float(fine.up)]]
    assert stacked.down.tolist() == [[1.0], [float(fine.down)]]


@examples(40)
@given(shapes, ranks, ranks, st.integers(0, 10**6))
def test_inner_norm_and_distance_are_those_of_the_dense_matrices(shape, ranks_x, ranks_y, seed):
    x, y = draw(*shape, sum(ranks_x), seed), draw(*shape, sum(ranks_y), seed + 1, size=3.0)
    dense_x, dense_y = product(*x), product(*y)
    size = float(dense_x.norm() * dense_y.norm())
    assert inner(x, y) == pytest.approx(float((dense_x * dense_y).sum()), abs=1e-12 * size)
    assert norm(x) == pytest.approx(float(dense_x.norm()), rel=1e-7)
    assert distance(x, y) == pytest.approx(float((dense_x - dense_y).norm()), rel=1e-7, abs=1e-7 * size**0.5)


@pytest.mark.parametrize("size", [1e-18, 1e15])
def test_norm_neither_overflows_nor_sinks(size):
    # squares of these leave float32: the Gram matrices must not be taken in it
    x = draw(8, 6, 2, 0, size=size)
    assert norm(x) == pytest.approx(float(product(*x).norm()), rel=1e-7)


@pytest.mark.parametrize("dtype", HALVES)
def test_norm_of_half_precision_factors_is_not_taken_in_half_precision(dtype):
    x = draw(300, 200, 8, 0, dtype)
    assert norm(x) == pytest.approx(float(product(*x).norm()), rel=1e-7)


def test_a_change_is_at_no_distance_from_itself_in_another_gauge():
    x = draw(20, 16, 4, 0)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    turned = Factors(x.up.double() @ turn, turn.T @ x.down.double())
    assert distance(x, turned) < 1e-7 * norm(x)
    assert distance(x, turned.times(-1)) == pytest.approx(2 * norm(x), rel=1e-6)


def test_norm_of_zero_is_zero():
    zero = Factors(torch.zeros(4, 2), torch.ones(2, 3))
    assert norm(zero) == 0.0
    assert distance(zero, zero) == 0.0


@examples(30)
@given(shapes, st.integers(1, 6), st.floats(-100, 100, allow_nan=False), dtypes)
def test_scale_scales_the_delta(shape, rank, strength, dtype):
    x = draw(*shape, rank, 0, dtype)
    wanted = strength * product(*x)
    torch.testing.assert_close(product(*x.times(strength)), wanted, rtol=0, atol=1e-6 * float(wanted.norm()) + 1e-37)


def test_scale_goes_into_up_and_1_touches_nothing():
    x = draw(5, 4, 2, 0, torch.bfloat16)
    assert x.times(1.0) is x
    half = x.times(-0.3)
    assert half.down is x.down
    # float32, not bfloat16: the one rounding comes at the end
    torch.testing.assert_close(half.up, x.up.float() * -0.3, rtol=0, atol=0)


def test_pad_appends_zero_components_only():
    x = draw(5, 4, 2, 0, torch.bfloat16)
    padded = pad(x, 6)
    assert (padded.up.shape, padded.down.shape) == ((5, 6), (6, 4))
    assert torch.equal(padded.up[:, :2], x.up)
    assert torch.equal(padded.down[:2], x.down)
    assert not padded.up[:, 2:].any()
    assert not padded.down[2:].any()
    assert pad(x, 2) is x
