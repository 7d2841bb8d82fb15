"""Changes multiplied out some rows at a time, and the rounding of weights."""

import math

import pytest
import torch
from algebra.operands import dense, draw, kron
from hypothesis import given
from hypothesis import strategies as st

from extensions_built_in.zit_merge.algebra.delta import Framed, Sum
from extensions_built_in.zit_merge.algebra.dense import dense_rows, rounded
from extensions_built_in.zit_merge.algebra.factors import Factors, whole

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
NARROW = [BF16, FP16, FP8]


def framed(out, into, seed=0):
    """A small matrix between frames of two LoRAs."""
    x, y = draw(out, into, 5, seed), draw(out, into, 7, seed + 1)
    random = torch.Generator().manual_seed(seed)
    left, core, right = (torch.randn(s, generator=random) for s in ((5, 4), (4, 3), (3, 7)))
    return Framed(x.up, left, core, right, y.down)


CHANGES = {
    "factors": draw(24, 18, 4),
    "factors of rank 1": draw(24, 18, 1),
    "factors of more components than rows": draw(24, 18, 50),
    "kron": kron(4, 3, 6, 6, 2, 3),
    "kron of a column": kron(24, 3, 1, 6, 2, 1),
    "kron of a row": kron(1, 3, 24, 6, 1, 4),
    "framed": framed(24, 18),
    "whole, wide": whole(dense(draw(24, 36, 24)).float()),
    "whole, tall": whole(dense(draw(24, 18, 9)).float()),
    "whole, square": whole(dense(draw(24, 24, 9)).float()),
    "sum": Sum((draw(24, 18, 4), kron(4, 3, 6, 6, 2, 3), framed(24, 18), whole(dense(draw(24, 18, 9)).float()))),
    "sum of one": Sum((draw(24, 18, 4),)),
}


@pytest.mark.parametrize("first, last", [(0, 24), (0, 1), (5, 17), (6, 12), (23, 24), (7, 7)])
@pytest.mark.parametrize("form", CHANGES)
def test_rows_of_a_change_are_those_of_its_definition(form, first, last):
    change = CHANGES[form]
    found = dense_rows(change, first, last)
    assert found.dtype == torch.float32 and found.shape == (last - first, change.shape[1])
    wanted = dense(change)
    # the magnitudes of what is added up bound the error of a float32 sum
    bound = 64 * 2**-24 * float(wanted.abs().max() + 30)
    assert torch.allclose(found.double(), wanted[first:last], rtol=0, atol=bound)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.data())
def test_rows_of_any_kron(p, q, s, t, data):
    change = kron(p, q, s, t, min(p, q), min(s, t), seed=p * 125 + q * 25 + s * 5 + t)
    first = data.draw(st.integers(0, p * s))
    last = data.draw(st.integers(first, p * s))
    assert torch.allclose(dense_rows(change, first, last).double(), dense(change)[first:last], rtol=1e-5, atol=1e-4)


def test_rows_are_independent_of_where_the_chunks_end():
    for form, change in CHANGES.items():
        pieces = torch.cat([dense_rows(change, first, min(first + 5, 24)) for first in range(0, 24, 5)])
        assert torch.allclose(pieces, dense_rows(change, 0, 24), rtol=1e-5, atol=1e-5), form


# --- rounding ------------------------------------------------------------------------------------------------------------------


def values(dtype):
    """All finite numbers of a dtype, ascending, as float64; -0.0 is left out."""
    bits, kind = {BF16: (16, torch.int16), FP16: (16, torch.int16), FP8: (8, torch.int8)}[dtype]
    numbers = torch.arange(-(1 << (bits - 1)), 1 << (bits - 1)).to(kind).view(dtype).double()
    return numbers[numbers.isfinite()].unique()


def neighbours(x, dtype):
    """(the largest number of the dtype up to x, the smallest from x on), by looking into the list of all."""
    table = values(dtype)
    below = torch.searchsorted(table, x.double(), right=True) - 1
    above = torch.searchsorted(table, x.double())
    return table[below.clamp(min=0)], table[above.clamp(max=len(table) - 1)]


def drawn(x, dtype, seed=0):
    return rounded(x, dtype, torch.Generator().manual_seed(seed))


def sample(dtype, count=4000, seed=0):
    """Numbers of every size that the dtype has, both signs, subnormal ones too; none over its largest."""
    largest, smallest = float(values(dtype).max()), float(values(dtype)[values(dtype) > 0].min())
    random = torch.Generator().manual_seed(seed)
    low, high = math.log2(max(smallest, 2**-120)) - 3, math.log2(largest) - 1
    sizes = torch.exp2(torch.rand(count, generator=random, dtype=torch.float64) * (high - low) + low)
    return (sizes * torch.where(torch.rand(count, generator=random) < 0.5, -1.0, 1.0)).float()


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32, torch.float64])
def test_nearest_is_torchs_own(dtype):
    x = torch.cat([sample(BF16), torch.tensor([0.0, -0.0, float("inf"), 1e-45, 3e38])])
    x = x if dtype != FP8 else sample(FP8)
    found = rounded(x, dtype)
    assert found.dtype == dtype and torch.equal(found.double().nan_to_num(7), x.to(dtype).double().nan_to_num(7))


@pytest.mark.parametrize("dtype", NARROW)
def test_nearest_is_the_nearest(dtype):
    x = sample(dtype)
    below, above = neighbours(x, dtype)
    found = rounded(x, dtype).double()
    assert torch.equal((found - x.double()).abs(), torch.minimum(x.double() - below, above - x.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_numbers_have_nothing_to_choose_from(dtype):
    x = sample(BF16)
    assert torch.equal(drawn(x, dtype).double(), x.double())


@pytest.mark.parametrize("dtype", NARROW)
def test_draws_take_the_two_neighbours_alone(dtype):
    x = sample(dtype)
    below, above = neighbours(x, dtype)
    found = [drawn(x, dtype, seed).double() for seed in range(20)]
    assert all(((f == below) | (f == above)).all() for f in found)
    taken = torch.stack(found)
    between = (above > below) & ((x.double() - below) / (above - below) > 0.2) & ((above - x.double()) / (above - below) > 0.2)
    both = (taken == below).any(0) & (taken == above).any(0)
    assert both[between].double().mean() > 0.95  # each is taken with a probability of 0.2 at least: 0.8^20 = 1 %
    assert between.sum() > 1000


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("share", [1 / 64, 0.25, 0.5, 0.8125])
@pytest.mark.parametrize("sign", [1, -1])
def test_draws_are_exact_in_the_mean(dtype, share, sign):
    """How often the upper neighbour is taken is binomial: within 5 standard deviations, one run in 1.7 million is not."""
    count = 20_000
    table = values(dtype)
    positive = table[table > 0]
    chosen = positive[[0, 1, len(positive) // 4, len(positive) // 2, -3]]  # two subnormals first
    for n, low in enumerate(chosen):
        high = positive[positive > low][0]
        x = sign * torch.full((count,), float(low + share * (high - low)))
        if abs(float(x[0].double()) - sign * float(low + share * (high - low))) > 1e-12 * float(high):
            continue  # float32 itself has no such number
        found = drawn(x, dtype, seed=n).double()
        ups = int((found == sign * high).sum())
        assert ups + int((found == sign * low).sum()) == count
        assert abs(ups - share * count) < 5 * math.sqrt(count * share * (1 - share)), (float(low), ups)


@pytest.mark.parametrize("dtype", NARROW)
def test_draws_below_the_smallest_number(dtype):
    """Between zero and the smallest subnormal too, and the sign stays."""
    smallest = float(values(dtype)[values(dtype) > 0].min())
    if smallest / 4 < 2**-149:
        pytest.skip("float32 has nothing there")
    for sign in (1, -1):
        x = torch.full((20_000,), sign * smallest / 4)
        found = drawn(x, dtype, seed=3).double()
        ups = int((found == sign * smallest).sum())
        assert ups + int((found == 0).sum()) == len(x)
        assert abs(ups - len(x) / 4) < 5 * math.sqrt(len(x) * 3 / 16)


@pytest.mark.parametrize("dtype", NARROW)
def test_numbers_of_the_dtype_never_move(dtype):
    table = values(dtype)
    x = table.float()
    assert torch.equal(x.double(), table)  # float32 holds them all
    for seed in range(3):
        assert torch.equal(drawn(x, dtype, seed).double(), table)


@pytest.mark.parametrize("dtype", NARROW)
def test_zeros_stay_with_their_sign(dtype):
    x = torch.tensor([0.0, -0.0] * 500)
    found = drawn(x, dtype).float()
    assert torch.equal(found, x) and torch.equal(found.signbit(), x.signbit())


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_what_is_no_finite_number_stays(dtype):
    x = torch.tensor([float("inf"), float("-inf"), float("nan")] * 100)
    for seed in range(3):
        found = drawn(x, dtype, seed).float()
        assert torch.equal(found.nan_to_num(nan=7.0, posinf=8.0, neginf=9.0), x.nan_to_num(nan=7.0, posinf=8.0, neginf=9.0))


@pytest.mark.parametrize("x", [float("nan"), float("inf"), -float("inf"), 1e6, -1e6])
def test_fp8_has_no_infinity_and_says_so(x):
    """What overflows is NaN or the largest number, as torch has it, and with draws no other."""
    wide = torch.full((100,), x)
    assert torch.equal(drawn(wide, FP8).float().nan_to_num(7), rounded(wide, FP8).float().nan_to_num(7))


@pytest.mark.parametrize("sign", [1, -1])
def test_fp16_beyond_its_largest_number(sign):
    near, far = torch.full((1000,), sign * 65510.0), torch.full((1000,), sign * 65520.0)
    assert (drawn(near, FP16).float() == sign * 65504).all()  # there is no neighbour above
    assert (drawn(far, FP16).float() == sign * math.inf).all()
    assert (rounded(far, FP16).float() == sign * math.inf).all()


def test_bf16_beyond_its_largest_number():
    largest, end = float(values(BF16).max()), torch.finfo(torch.float32).max
    found = drawn(torch.full((1000,), end), BF16).double()
    assert ((found == largest) | (found == math.inf)).all()
    assert (drawn(torch.full((1000,), largest), BF16).double() == largest).all()


@pytest.mark.parametrize("dtype", NARROW)
def test_draws_follow_from_the_seed(dtype):
    x = sample(dtype)
    assert torch.equal(drawn(x, dtype, 5).double(), drawn(x, dtype, 5).double())
    assert not torch.equal(drawn(x, dtype, 5).double(), drawn(x, dtype, 6).double())


@pytest.mark.parametrize("dtype", NARROW)
def test_draws_in_pieces_are_those_of_the_generator(dtype):
    """A weight is rounded some rows at a time with one generator: no two pieces share their draws."""
    x = torch.full((4096,), 1 + float((values(dtype) - 1)[values(dtype) > 1].min()) / 2)
    generator = torch.Generator().manual_seed(0)
    one, other = (rounded(x, dtype, generator).float() for _ in range(2))
    assert 0.4 < (one == other).double().mean() < 0.6


def test_the_operand_is_left_alone():
    x = sample(BF16)
    before = x.clone()
    for dtype in NARROW:
        drawn(x, dtype)
        rounded(x, dtype)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", NARROW)
def test_any_shape(dtype):
    x = sample(dtype, 24)
    for shape in ((24,), (4, 6), (2, 3, 4), (0,), (0, 5)):
        part = x[: math.prod(shape)].view(shape)
        assert drawn(part, dtype).shape == shape
    assert drawn(x[0], dtype).shape == ()
    turned = x.view(4, 6).T  # not contiguous
    assert (
        (drawn(turned, dtype).double() - turned.double()).abs()
        <= turned.double().abs() / 8 + float(values(dtype).abs()[values(dtype) > 0].min())
    ).all()


def test_single_components_of_any_factors():
    up, down = torch.tensor([[2.0], [3.0]]), torch.tensor([[5.0, 7.0]])
    assert dense_rows(Factors(up, down), 1, 2).tolist() == [[15.0, 21.0]]
