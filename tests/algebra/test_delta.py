"""LoKr, LoHa, whole differences and sums of them against the multiplied-out matrices in float64."""

import itertools

import pytest
import torch
from algebra.operands import dense, draw, kron
from hypothesis import given
from hypothesis import strategies as st
from sweep import examples

from extensions_built_in.zit_merge.algebra import linear
from extensions_built_in.zit_merge.algebra.delta import Kron, Sum, applied
from extensions_built_in.zit_merge.algebra.factors import Factors, hadamard, whole
from extensions_built_in.zit_merge.algebra.products import distance, energy, inner, norm


def close(found, wanted, tolerance=1e-6):
    assert found.shape == wanted.shape
    assert float((found.double() - wanted).norm()) <= tolerance * float(wanted.norm())


small = st.integers(1, 5)
krons = st.builds(kron, small, small, small, small, small, small, st.integers(0, 10**6))


# --- Kron ----------------------------------------------------------------------------------------------------------------------


@examples(60)
@given(krons, st.integers(1, 4), st.sampled_from([0.0, 1.0, -1.0, 0.3, -7.25, 100.0]))
def test_a_kron_is_torchs_kron(x, columns, strength):
    wanted = dense(x)
    assert x.shape == tuple(wanted.shape)
    assert x.rank == x.left.rank * x.right.rank
    thin = torch.randn(x.shape[1], columns, generator=torch.Generator().manual_seed(0))
    size = float(thin.norm())  # what rounding is relative to: factors and columns may cancel
    for factor in (*x.left, *x.right):
        size *= float(factor.norm())
    assert float((x @ thin - wanted @ thin.double()).norm()) <= 1e-6 * size
    assert float((x.map(torch.Tensor.double) @ thin.double() - wanted @ thin.double()).norm()) <= 1e-14 * size
    assert float((dense(x.T) - wanted.T).norm()) <= 1e-14 * size
    assert x.T.shape == x.shape[::-1]
    assert float((dense(x.times(strength)) - strength * wanted).norm()) <= 1e-6 * abs(strength) * size / float(thin.norm())
    assert torch.equal(dense(x.times(-1.0)), -wanted)
    full = x.expand()
    assert full.rank == x.rank
    assert full.shape == x.shape
    assert float((dense(full) - wanted).norm()) <= 1e-6 * size / float(thin.norm())


@examples(60)
@given(krons, st.data())
def test_rows_of_a_kron(x, data):
    first = data.draw(st.integers(0, x.shape[0] - 1))
    last = data.draw(st.integers(first + 1, x.shape[0]))
    part, s = x.rows(first, last), x.right.shape[0]
    size = float(x.left.up.norm() * x.left.down.norm() * x.right.up.norm() * x.right.down.norm())
    assert float((dense(part) - dense(x)[first:last]).norm()) <= 1e-6 * size
    assert isinstance(part, Kron) == (first % s == 0 and last % s == 0)


def test_the_thirds_of_an_aligned_fused_qkv_stay_krons_of_the_same_factors():
    x = kron(6, 4, 5, 3, 2, 3)
    thirds = [x.rows(i * 10, (i + 1) * 10) for i in range(3)]
    assert all(isinstance(t, Kron) for t in thirds)
    for i, third in enumerate(thirds):
        assert third.right is x.right  # shared, not copied
        assert third.left.shape == (2, 4)
        close(dense(third), dense(x)[i * 10 : (i + 1) * 10], 1e-12)


def test_unaligned_thirds_are_exact_too():
    x = kron(4, 4, 3, 3, 2, 2)  # 12 rows, four blocks of 3: a third ends inside of a block
    for i in range(3):
        part = x.rows(i * 4, (i + 1) * 4)
        assert isinstance(part, Factors)
        close(dense(part), dense(x)[i * 4 : (i + 1) * 4])


def test_order_matters_in_a_kron():
    # the data of these tests tell left kron right from right kron left
    x = kron(2, 3, 4, 5, 2, 2)
    swapped = torch.kron(dense(x.right), dense(x.left))
    assert float((dense(x.expand()) - swapped).norm()) > 0.5 * float(swapped.norm())


def test_times_1_of_a_kron_touches_nothing_and_others_touch_left_only():
    x = kron(2, 3, 4, 5, 2, 2, dtype=torch.bfloat16)
    assert x.times(1.0) is x
    assert x.times(0.3).right is x.right


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_krons_are_not_multiplied_in_half_precision(dtype):
    x = kron(4, 5, 6, 7, 3, 2, dtype=dtype)
    close(dense(x.expand()), dense(x), 3e-7)
    close(dense(x.times(0.3)), 0.3 * dense(x), 1e-6)
    close(dense(x.rows(5, 20)), dense(x)[5:20], 3e-7)


def test_map_reaches_every_tensor():
    x = Sum((kron(2, 3, 4, 5, 2, 2), draw(8, 15, 3))).map(torch.Tensor.double)
    assert {t.dtype for t in (*x.parts[0].left, *x.parts[0].right, *x.parts[1])} == {torch.float64}


# --- LoHa, whole differences ---------------------------------------------------------------------------------------------------


@examples(60)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6))
def test_hadamard_is_the_elementwise_product(out, into, r, other, seed):
    x, y = draw(out, into, r, seed), draw(out, into, other, seed + 1)
    found = hadamard(x, y)
    assert found.rank == r * other
    wanted = dense(x) * dense(y)
    size = float((dense(x).abs() * dense(y).abs()).norm()) + float(x.up.norm() * x.down.norm() * y.up.norm() * y.down.norm())
    assert float((dense(found) - wanted).norm()) <= 1e-6 * size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hadamard_of_half_precision_is_exact(dtype):
    # 8 or 11 digits times as many fit into float32
    x, y = draw(9, 7, 3, 0, dtype), draw(9, 7, 2, 1, dtype)
    found = hadamard(x, y)
    assert found.up.dtype == found.down.dtype == torch.float32
    close(dense(found), dense(x) * dense(y), 1e-14)


@pytest.mark.parametrize(("out", "into"), [(5, 3), (3, 5), (4, 4), (1, 7), (7, 1)])
def test_a_whole_difference_is_itself(out, into):
    delta = torch.randn(out, into, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = whole(delta)
    assert found.rank == min(out, into)
    assert torch.equal(dense(found), delta.double())
    assert found.up.dtype == found.down.dtype == torch.bfloat16


# --- sums ----------------------------------------------------------------------------------------------------------------------

# One delta of shape (24, 30) in every form that a file has; the two layouts of Kronecker products do not fit each other.
FORMS = {
    "factors": draw(24, 30, 5, 1),
    "wide factors": draw(24, 30, 40, 2),
    "whole": whole(draw(24, 30, 24, 3).up @ draw(24, 30, 24, 4).down),
    "LoHa": hadamard(draw(24, 30, 3, 5), draw(24, 30, 3, 6)),
    "kron 4x5 6x6": kron(4, 5, 6, 6, 2, 3, 7),
    "kron 4x5 6x6, other ranks": kron(4, 5, 6, 6, 4, 1, 9),
    "kron 2x3 12x10": kron(2, 3, 12, 10, 1, 4, 11),
    "kron 6x5 4x6": kron(6, 5, 4, 6, 3, 3, 13),
    "kron 24x1 1x30": kron(24, 1, 1, 30, 1, 1, 15),
    "kron in bf16": kron(4, 5, 6, 6, 2, 3, 17, torch.bfloat16),
    "sum": Sum((kron(6, 5, 4, 6, 2, 2, 19), draw(24, 30, 3, 21))),
    "sum of krons": Sum((kron(6, 5, 4, 6, 2, 2, 23), kron(2, 3, 12, 10, 1, 2, 25))),
}


@pytest.mark.parametrize(("one", "other"), itertools.product(FORMS, FORMS))
def test_inner_norm_and_distance_of_any_two_forms(one, other):
    x, y = FORMS[one], FORMS[other]
    wanted, size = float((dense(x) * dense(y)).sum()), float(dense(x).norm() * dense(y).norm())
    assert inner(x, y) == pytest.approx(wanted, abs=1e-12 * size)
    assert inner(x, y) == pytest.approx(inner(y, x), abs=1e-13 * size)
    gap = float((dense(x) - dense(y)).norm())
    assert distance(x, y) == pytest.approx(gap, rel=1e-7, abs=1e-7 * size**0.5)


@pytest.mark.parametrize("name", FORMS)
def test_norm_and_the_distance_to_itself_in_other_forms(name):
    x = FORMS[name]
    size = float(dense(x).norm())
    assert norm(x) == pytest.approx(size, rel=1e-12)
    same = whole(dense(x))
    assert distance(x, same) <= 1e-7 * size
    assert distance(same, x.times(-1.0)) == pytest.approx(2 * size, rel=1e-6)
    assert distance(x, whole(dense(x) * 1.001)) == pytest.approx(1e-3 * size, rel=1e-4)


@pytest.mark.parametrize("size", [1e-18, 1e15])
def test_norms_of_krons_neither_overflow_nor_sink(size):
    x = Kron(draw(4, 5, 2, 0, size=size), draw(6, 3, 2, 1, size=size))
    assert norm(x) == pytest.approx(float(dense(x).norm()), rel=1e-7)


@pytest.mark.parametrize("names", itertools.combinations(FORMS, 2))
def test_the_sum_of_any_two_forms(names):
    parts = [FORMS[n] for n in names]
    wanted = dense(parts[0]) + dense(parts[1])
    size = sum(float(dense(p).norm()) for p in parts)
    if any(isinstance(p, Sum) for p in parts):
        found = Sum(tuple(q for p in parts for q in (p.parts if isinstance(p, Sum) else (p,))))
    else:
        found = linear.add(parts)
    assert found.shape == (24, 30)
    assert found.rank == sum(p.rank for p in parts)
    assert float((dense(found) - wanted).norm()) <= 1e-12 * size
    assert float((dense(found.expand()) - wanted).norm()) <= 1e-6 * size
    assert float((dense(found.T) - wanted.T).norm()) <= 1e-12 * size
    thin = torch.randn(30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = found.map(torch.Tensor.double)
    assert float((exact @ thin - wanted @ thin).norm()) <= 1e-11 * size
    assert float((dense(found.times(-0.5)) + 0.5 * wanted).norm()) <= 1e-6 * size


def test_a_lokr_alone_stays_a_lokr_in_a_sum_and_loras_are_stacked_beside_it():
    x = FORMS["kron 4x5 6x6"]
    assert linear.add([x]) is x
    both = linear.add([FORMS["factors"], x, FORMS["LoHa"]])
    assert isinstance(both, Sum)
    assert sorted(type(p).__name__ for p in both.parts) == ["Factors", "Kron"]
    assert isinstance(linear.add([FORMS["factors"], FORMS["LoHa"]]), Factors)


@pytest.mark.parametrize("name", FORMS)
def test_the_transposed_written_out(name):
    # torch.kron refuses some transposed views
    x = FORMS[name].T
    close(dense(x.expand()), dense(FORMS[name]).T)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_what_a_change_adds_to_its_layer(batch):
    factors, lokr = draw(8, 6, 2, seed=1), kron(2, 3, 4, 2, 2, 2, 3)
    x = torch.randn(*batch, 6, generator=torch.Generator().manual_seed(0))
    for delta in (factors, lokr, Sum((factors, lokr))):
        wanted = x.double() @ dense(delta).T
        found = applied(delta, x)
        assert found.dtype == torch.float32
        close(found, wanted, 1e-5)


@pytest.mark.parametrize("apart", [1.0, 1e-2, 1e-5])
def test_the_energy_of_16_bits_is_that_of_float64(apart):
    """Components that cancel are summed in float64."""
    random = torch.Generator().manual_seed(0)
    up, down = torch.randn(300, 4, generator=random), torch.randn(4, 200, generator=random)
    other = up + apart * torch.randn(300, 4, generator=random)
    x = Factors(torch.cat([up, -other], 1).bfloat16(), torch.cat([down, down]).bfloat16())
    dense = x.up.double() @ x.down.double()
    assert energy(x) == pytest.approx(float(dense.square().sum()), rel=2e-5)
