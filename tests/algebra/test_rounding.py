"""The one rounding at the end against float64: own scale kept, nothing lost that the dtype can hold, powers of two only."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles.dense import product, relative
from sweep import examples

from extensions_built_in.zit_merge.algebra.factors import Factors
from extensions_built_in.zit_merge.algebra.rounding import scaled, to_dtype

# Two factors, each rounded by half a unit in the last place at most.
TOLERANCE = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def draw(out=24, into=20, rank=4, seed=0, up=1.0, down=1.0):
    random = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(out, rank, generator=random) * up, torch.randn(rank, into, generator=random) * down)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_ordinary_factors_are_rounded_to_nearest_and_keep_their_scale(dtype):
    x = draw(up=0.01, down=0.02)
    found = to_dtype(x, dtype)
    assert torch.equal(found.up, x.up.to(dtype))
    assert torch.equal(found.down, x.down.to(dtype))
    assert relative(product(*found), product(*x)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("up", "down"),
    [
        (1e7, 1e-5),  # up overflows float16
        (1e-7, 1e3),  # up is subnormal in float16
        (1e-9, 1e3),  # up would be zero in float16
        (1e6, 1e-8),  # up overflows, down is zero
        (1e-8, 1e6),
        (3e-6, 1.0),  # up keeps a few bits: a loss that no infinity betrays
        (1.0, 3e-6),
        (1e20, 1e-20),
    ],
)
def test_a_lopsided_pair_loses_nothing(dtype, up, down):
    x = draw(up=up, down=down)
    assert relative(product(*to_dtype(x, dtype)), product(*x)) < TOLERANCE[dtype]


def test_plain_rounding_would_have_lost_it():
    # the data of the test above is hard: without balancing it is wrong
    for up, down in ((1e7, 1e-5), (1e-7, 1e3), (1e-9, 1e3), (3e-6, 1.0)):
        x = draw(up=up, down=down)
        naive = product(x.up.half(), x.down.half())
        assert not relative(naive, product(*x)) < 5 * TOLERANCE[torch.float16]


def test_only_the_component_in_need_moves():
    x = draw(up=0.01, down=10.0)  # lopsided, but float16 holds it: the trainer's scale stays
    x.up[:, 2] *= 1e8
    x.down[2] *= 1e-8
    found = to_dtype(x, torch.float16)
    for k in (0, 1, 3):
        assert torch.equal(found.up[:, k], x.up[:, k].half())
        assert torch.equal(found.down[k], x.down[k].half())
    assert relative(product(*found), product(*x)) < TOLERANCE[torch.float16]


@examples(40)
@given(st.floats(-12, 12), st.floats(-4.5, 4.5), st.integers(0, 10**6))
def test_fp16_holds_every_delta_that_balanced_factors_can_hold(lean, size, seed):
    # 10^size is the delta's scale, the square of the balanced factors'; float16 is normal from 6e-5 to 6e4
    x = draw(seed=seed, up=10 ** (size / 2 + lean), down=10 ** (size / 2 - lean))
    found = to_dtype(x, torch.float16)
    assert torch.isfinite(found.up).all()
    assert torch.isfinite(found.down).all()
    assert relative(product(*found), product(*x)) < TOLERANCE[torch.float16]


@examples(40)
@given(st.floats(-12, 12), st.integers(0, 10**6))
def test_components_move_by_powers_of_two_only(lean, seed):
    # Values that float16 holds exactly once balanced: any factor but a power of two would change their digits.
    random = torch.Generator().manual_seed(seed)
    up = torch.randint(1, 1024, (6, 3), generator=random).float() / 1024
    down = torch.randint(1, 1024, (3, 5), generator=random).float() / 1024
    shift = round(lean * 3)
    x = Factors(torch.ldexp(up, torch.tensor(shift)), torch.ldexp(down, torch.tensor(-shift)))
    found = to_dtype(x, torch.float16)
    assert torch.equal(product(*found), product(*x))
    ratio = found.up.double() / x.up.double()
    assert (torch.frexp(ratio).mantissa == 0.5).all()
    assert (ratio == ratio[:1]).all()  # one factor for a whole component
    assert torch.equal(found.down.double() * ratio[0, :, None], x.down.double())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [1e-7, 1.0, 1e4])
def test_values_already_in_the_dtype_never_move(dtype, size):
    # subnormal ones included: they are what the trainer wrote
    x = draw(up=size, down=1e-6)
    stored = Factors(x.up.to(dtype), x.down.to(dtype))
    found = to_dtype(stored, dtype)
    assert found.up.dtype == found.down.dtype == dtype
    assert torch.equal(found.up, stored.up)
    assert torch.equal(found.down, stored.down)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_to_float32_and_back_is_the_identity(dtype):
    x = draw()
    stored = Factors(x.up.to(dtype), x.down.to(dtype))
    there = to_dtype(stored, torch.float32)
    assert torch.equal(there.up, stored.up.float())
    back = to_dtype(there, dtype)
    assert torch.equal(back.up, stored.up)
    assert torch.equal(back.down, stored.down)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_zero_components_stay_zero(dtype):
    x = draw(up=1e9, down=1e-9)
    x.up[:, 1] = 0
    x.down[1] = 0
    found = to_dtype(x, dtype)
    assert not found.up[:, 1].any()
    assert not found.down[1].any()
    assert relative(product(*found), product(*x)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_component_with_a_zero_half_is_no_overflow(dtype):
    # its delta is zero, whatever the other half is: nothing is too large here
    x = draw()
    x.up[:, 1] = 1e9
    x.down[1] = 0
    found = to_dtype(x, dtype)
    assert torch.isfinite(found.up).all()
    assert relative(product(*found), product(*x)) < TOLERANCE[dtype]


def test_a_delta_too_large_for_float16_says_so_by_infinity():
    # the caller refuses to write it; a clamp would be silent
    found = to_dtype(draw(up=1e6, down=1e6), torch.float16)
    assert torch.isinf(found.up).any()


@pytest.mark.parametrize("strength", [1.0, 0.3, -0.8, 1e-12, 3e30, 1e-40, 0.0])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scaling_and_rounding_in_one_go(strength, stored, dtype):
    """Bit for bit as one after the other, faint, large and zero components too."""
    x = draw(up=1.0, down=1.0).map(lambda t: t.to(stored))
    for up in (x.up, x.up * 2.0**-110, x.up * 2.0**90, x.up * torch.tensor([1.0, 0.0, 2.0**-120, 1e20]), x.up * 0):
        one = to_dtype(scaled(Factors(up.to(stored), x.down), strength, dtype), dtype)
        two = to_dtype(Factors(up.to(stored), x.down).times(strength), dtype)
        assert torch.equal(one.up, two.up) and torch.equal(one.down, two.down)
