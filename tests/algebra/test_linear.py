"""Methods that are coefficients from a Gram matrix, against the dense vectors they speak of."""

import itertools
import math

import pytest
import torch
from algebra.operands import dense, draw, kron
from algebra.test_core import CASES, error, other_gauges
from hypothesis import given
from hypothesis import strategies as st
from oracles import methods as oracle
from sweep import examples

from extensions_built_in.zit_merge.algebra import linear
from extensions_built_in.zit_merge.algebra.delta import Kron, Sum
from extensions_built_in.zit_merge.algebra.factors import Factors, stack
from extensions_built_in.zit_merge.algebra.methods import METHODS
from extensions_built_in.zit_merge.algebra.products import inner

F64 = torch.float64
LINEAR = [name for name, method in METHODS.items() if method.is_linear]
MEANS = [name for name, method in METHODS.items() if method.is_mean]
SPHERICAL = [name for name, method in METHODS.items() if method.is_spherical]
PAIRS = ["slerp", "nuslerp"]


def tensor(values):
    return torch.tensor(values, dtype=F64)


def gram_of(deltas):
    return tensor([[inner(x, y) for y in deltas] for x in deltas])


def vectors(gram):
    """Vectors with a Gram matrix, (N, N) rows."""
    values, basis = torch.linalg.eigh(gram)
    return basis * values.clamp(min=0).sqrt()


def coefficients(name, gram, ratios, **parameters):
    found = getattr(linear, name)(gram, tensor(ratios), **parameters)
    assert found.dtype == F64
    assert found.shape == (len(ratios),)
    return found


def merge(name, deltas, ratios, **parameters):
    found = coefficients(name, gram_of(deltas), ratios, **parameters)
    return linear.add([d.times(float(c)) for d, c in zip(deltas, found, strict=True)])


def oracle_of(name, wholes, ratios):
    total = sum(ratios)
    return {
        "sum": lambda: oracle.plain_sum([r * w for r, w in zip(ratios, wholes, strict=True)]),
        "average": lambda: oracle.average(wholes, ratios),
        "normalize": lambda: oracle.normalize([r * w for r, w in zip(ratios, wholes, strict=True)]),
        "slerp": lambda: oracle.slerp(*wholes, ratios[1] / total),
        "nuslerp": lambda: oracle.nuslerp(*wholes, ratios[1] / total),
        "karcher": lambda: oracle.karcher(wholes, ratios),
    }[name]()


A, B = draw(40, 30, 4, 1, F64), draw(40, 30, 4, 2, F64)
NOT_ON_THE_SPHERE = ("a zero one", "the same twice", "the same four times and another", "one column", "one row")
ORDINARY = [n for n in CASES if n not in NOT_ON_THE_SPHERE]
UNEVEN = [1.0, 0.6, 1.7, 0.3] * 5


def _dtype(x):
    dtypes = []
    x.map(lambda t: dtypes.append(t.dtype) or t)
    return F64 if set(dtypes) == {F64} else torch.float32


def takes(name, deltas):
    return METHODS[name].takes in (None, len(deltas))


GRID = [(m, c) for m in LINEAR for c in ORDINARY if takes(m, CASES[c])]


# --- add -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_add_is_the_sum_whatever_the_forms(name):
    deltas = CASES[name]
    wanted, size = oracle.plain_sum(map(dense, deltas)), sum(float(dense(d).norm()) for d in deltas)
    found = linear.add(deltas)
    assert found.shape == wanted.shape
    assert found.rank == sum(d.rank for d in deltas)
    assert error(dense(found), wanted, size) < 1e-14
    assert error(dense(linear.add(deltas[::-1])), wanted, size) < 1e-14
    for others in other_gauges(deltas):
        assert error(dense(linear.add(others)), wanted, size) < 1e-11


def test_add_of_one_is_itself():
    for x in (A, kron(4, 5, 10, 6, 2, 2), Sum((kron(4, 5, 10, 6, 2, 2), A))):
        assert linear.add([x]) is x


def test_add_opens_sums_keeps_lokrs_and_stacks_loras():
    k, other = kron(4, 5, 10, 6, 2, 2, 5, F64), kron(5, 3, 8, 10, 1, 1, 7, F64)
    found = linear.add([Sum((k, A)), B, other])
    assert isinstance(found, Sum)
    assert not any(isinstance(p, Sum) for p in found.parts)
    assert sum(p is k or p is other for p in found.parts) == 2
    assert isinstance(linear.add([A, B]), Factors)
    assert isinstance(linear.add([k, other]).parts[0], Kron)
    assert error(dense(found), dense(k) + dense(A) + dense(B) + dense(other), dense(k).norm()) < 1e-14


# --- all of them ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "case"), GRID)
def test_the_dense_definition(name, case):
    deltas = CASES[case]
    ratios = UNEVEN[: len(deltas)]
    wholes = [dense(d) for d in deltas]
    found = dense(merge(name, deltas, ratios))
    rounding = 1e-9 if all(_dtype(d) == F64 for d in deltas) else 1e-6
    tolerance = max(rounding, 1e-6 if name == "karcher" else 0)  # where the quasi-Newton search ends
    assert error(found, oracle_of(name, wholes, ratios), sum(float(w.norm()) for w in wholes)) < tolerance


@pytest.mark.parametrize(("name", "case"), GRID)
def test_gauge_and_order_have_no_meaning(name, case):
    deltas = CASES[case]
    ratios = UNEVEN[: len(deltas)]
    wanted = dense(merge(name, deltas, ratios))
    for others in other_gauges(deltas):
        assert error(dense(merge(name, others, ratios)), wanted, wanted.norm()) < 1e-6  # float32 operands are rounded in a gauge
    order = torch.randperm(len(deltas), generator=torch.Generator().manual_seed(3)).tolist()
    assert len(deltas) > 2 or order == [1, 0] or order == [0, 1]
    for turned in (order, list(range(len(deltas)))[::-1]):
        found = dense(merge(name, [deltas[i] for i in turned], [ratios[i] for i in turned]))
        assert error(found, wanted, wanted.norm()) < 1e-9


@pytest.mark.parametrize("name", LINEAR)
def test_the_size_of_all_deltas_has_no_part_in_the_coefficients(name):
    gram, ratios = gram_of([A, B]), [1.0, 0.4]
    for size in (2.0, 1e-12, 1e12):
        found = coefficients(name, gram * size**2, ratios)
        torch.testing.assert_close(found, coefficients(name, gram, ratios), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", MEANS)
def test_only_the_proportions_of_the_ratios_count_in_a_mean(name):
    gram = gram_of([A, B])
    wanted = coefficients(name, gram, [1.0, 0.4])
    for size in (0.5, 3.0, 1e-6):
        torch.testing.assert_close(coefficients(name, gram, [size, 0.4 * size]), wanted, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["sum", "normalize"])
def test_ratios_are_strengths_elsewhere(name):
    gram = gram_of([A, B])
    torch.testing.assert_close(coefficients(name, gram, [3.0, 1.2]), 3 * coefficients(name, gram, [1.0, 0.4]), rtol=1e-12, atol=0)
    flipped = dense(merge(name, [A, B], [1.0, -0.4]))
    assert error(flipped, oracle_of(name, [dense(A), dense(B)], [1.0, -0.4]), flipped.norm()) < 1e-12


@pytest.mark.parametrize("name", [n for n in LINEAR if METHODS[n].takes is None])
def test_one_alone(name):
    # ratios are strengths in sum and normalize; a mean of one is that one
    wanted = 1.0 if METHODS[name].is_mean else 0.7
    torch.testing.assert_close(coefficients(name, gram_of([A]), [0.7]), tensor([wanted]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", LINEAR)
def test_zero_deltas(name):
    ratios = [1.0, 0.4]
    both = merge(name, [A.times(0.0), B.times(0.0)], ratios)
    assert not dense(both).any()
    for place, deltas in enumerate([[A, B.times(0.0)], [B.times(0.0), A]]):
        found = dense(merge(name, deltas, ratios))
        share = ratios[place] / (sum(ratios) if METHODS[name].is_mean else 1.0)
        assert error(found, share * dense(A), dense(A).norm()) < 1e-12  # what a mean with nothing is


@pytest.mark.parametrize("name", LINEAR)
def test_the_same_twice(name):
    found = dense(merge(name, [A, A], [0.9, 0.4]))
    wanted = {"sum": 1.3, "normalize": 0.9}.get(name, 1.0)
    assert error(found, wanted * dense(A), dense(A).norm()) < 1e-9


@pytest.mark.parametrize("name", SPHERICAL)
@pytest.mark.parametrize("apart", [1e-3, 1e-5, 1e-7, 1e-9, 1e-12])
def test_nearly_parallel(name, apart):
    near = stack([A.times(2.0), B.times(apart)])
    found = dense(merge(name, [A, near], [1.0, 3.0]))
    assert error(found, (dense(A) + 3 * dense(near)) / 4, dense(A).norm()) < max(apart**1.9, 1e-12) + 0.5 * apart


@pytest.mark.parametrize("name", SPHERICAL)
def test_negative_ratios_are_refused(name):
    with pytest.raises(ValueError, match="negative"):
        coefficients(name, gram_of([A, B]), [1.0, -0.1])


@pytest.mark.parametrize("name", MEANS)
def test_ratios_without_a_sum_are_refused(name):
    for ratios in ([0.0, 0.0], [0.3, -0.3], [0.1 + 0.2, -0.3]):
        with pytest.raises(ValueError):
            coefficients(name, gram_of([A, B]), ratios)


@pytest.mark.parametrize("name", LINEAR)
def test_arguments_stay_as_they_were(name):
    gram, ratios = gram_of([A, B]), tensor([1.0, 0.4])
    before = gram.clone(), ratios.clone()
    getattr(linear, name)(gram, ratios)
    assert torch.equal(gram, before[0])
    assert torch.equal(ratios, before[1])


# --- average, normalize --------------------------------------------------------------------------------------------------------


@examples(50)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20))
def test_shares_of_an_average_sum_to_one(ratios):
    found = coefficients("average", torch.eye(len(ratios), dtype=F64), ratios)
    assert float(found.sum()) == pytest.approx(1)
    torch.testing.assert_close(found / found[0], tensor(ratios) / ratios[0], rtol=1e-12, atol=0)


def test_a_negative_ratio_in_an_average_takes_away():
    found = coefficients("average", gram_of([A, B]), [1.5, -0.5])
    torch.testing.assert_close(found, tensor([1.5, -0.5]))


@pytest.mark.parametrize("ratios", [[1.0, 1.0, 1.0], [1.0, -0.2, 0.5], [0.1, 3.0, 0.0]])
def test_normalize_has_the_norm_of_the_largest_and_the_direction_of_the_sum(ratios):
    deltas = CASES["three"]
    parts = [r * dense(d) for r, d in zip(ratios, deltas, strict=True)]
    found = dense(merge("normalize", deltas, ratios))
    assert float(found.norm()) == pytest.approx(max(float(p.norm()) for p in parts))
    assert oracle.angle(found, oracle.plain_sum(parts)) < 1e-7


def test_normalize_also_lifts():
    # the formula has no "at most": two that weaken each other are brought back to the larger one
    found = coefficients("normalize", tensor([[1.0, -0.5], [-0.5, 1.0]]), [1.0, 0.5])
    torch.testing.assert_close(found, tensor([1.0, 0.5]) / 0.75**0.5)


def test_normalize_refuses_what_cancels():
    with pytest.raises(ValueError, match="cancel"):
        merge("normalize", [A, A.times(-1.0)], [1.0, 1.0])
    assert merge("normalize", [A, A.times(-1.0)], [1.0, 0.5]).rank == 8


# --- on the sphere -------------------------------------------------------------------------------------------------------------


def planar(angle, first=1.0, second=1.0):
    """The Gram matrix of two vectors."""
    across = first * second * math.cos(angle)
    return tensor([[first**2, across], [across, second**2]])


@examples(80)
@given(st.floats(0.01, 3.1), st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0, 1))
def test_slerp_in_the_plane(angle, first, second, t):
    x, y = tensor([first, 0]), tensor([second * math.cos(angle), second * math.sin(angle)])
    c = coefficients("slerp", planar(angle, first, second), [1 - t, t])
    wanted = oracle.slerp(x, y, t)
    assert error(c[0] * x + c[1] * y, wanted, first + second) < 1e-7


@examples(80)
@given(st.floats(0.01, 3.1), st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0, 1))
def test_nuslerp_in_the_plane_is_an_angle_and_a_length(angle, first, second, t):
    x, y = tensor([first, 0]), tensor([second * math.cos(angle), second * math.sin(angle)])
    for name in ("nuslerp", "karcher"):
        c = coefficients(name, planar(angle, first, second), [1 - t, t])
        found, length = c[0] * x + c[1] * y, (1 - t) * first + t * second
        if name == "nuslerp" or 1e-6 < t < 1 - 1e-6:
            wanted = tensor([length * math.cos(t * angle), length * math.sin(t * angle)])
            assert error(found, wanted, first + second) < 1e-7


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("at", [0, 1])
def test_the_ends_are_the_loras_themselves(name, at):
    ratios = [[1.0, 0.0], [0.0, 1.0]][at]
    found = dense(merge(name, [A, B], ratios))
    assert error(found, dense([A, B][at]), dense(A).norm()) < 1e-9


@pytest.mark.parametrize("name", SPHERICAL)
def test_orthogonal_loras_of_one_norm_keep_it(name):
    for t in (0.1, 0.5, 0.8):
        c = coefficients(name, torch.eye(2, dtype=F64) * 9, [1 - t, t])
        assert float(c.norm()) == pytest.approx(1)  # the plain mean would be at .71
    n = 20
    if METHODS[name].takes is None:
        c = coefficients(name, torch.eye(n, dtype=F64) * 9, [1.0] * n)
        torch.testing.assert_close(c, torch.full((n,), n**-0.5, dtype=F64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", SPHERICAL)
@pytest.mark.parametrize("angle", [1.7, 2.2, 2.8, 3.1])
def test_no_flip_where_they_point_apart(name, angle):
    # flipped, the way from x to -y is shorter than from x to y
    c = coefficients(name, planar(angle), [0.5, 0.5])
    found = tensor([float(c[0] + c[1] * math.cos(angle)), float(c[1] * math.sin(angle))])
    assert error(found, tensor([math.cos(angle / 2), math.sin(angle / 2)]), 1) < 1e-7
    assert (c > 0).all()


@pytest.mark.parametrize("name", ["nuslerp", "karcher"])
@pytest.mark.parametrize("size", [1.0, 3.0])
@pytest.mark.parametrize("ratios", [[1.0, 1.0], [0.7, 0.3], [0.1, 0.9]])
def test_opposite_directions_have_no_mean(name, size, ratios):
    # every way round is as short: no m has sum_i w_i log_m(u_i) = 0 alone
    with pytest.raises(ValueError, match="opposite"):
        merge(name, [A, A.times(-size)], ratios)


@pytest.mark.parametrize("name", SPHERICAL)
def test_an_opposite_one_without_a_ratio_is_no_obstacle(name):
    found = dense(merge(name, [A, A.times(-3.0)], [0.5, 0.0]))
    assert error(found, dense(A), dense(A).norm()) < 1e-9


def test_slerp_of_opposite_ones_is_their_mean():
    for ratios in ([1.0, 1.0], [0.7, 0.3]):
        found = dense(merge("slerp", [A, A.times(-3.0)], ratios))
        assert error(found, (ratios[0] - 3 * ratios[1]) / sum(ratios) * dense(A), dense(A).norm()) < 1e-9


@examples(60)
@given(st.integers(2, 20), st.integers(0, 10**6), st.floats(-0.4, 3.0))
def test_the_karcher_mean_has_no_gradient(n, seed, common):
    random = torch.Generator().manual_seed(seed)
    points = torch.randn(n, 50, generator=random, dtype=F64) * (0.1 + torch.rand(n, 1, generator=random, dtype=F64))
    points[:, 0] += common * points.norm(dim=1)
    ratios = (0.1 + torch.rand(n, generator=random, dtype=F64)).tolist()
    found = (coefficients("karcher", points @ points.T, ratios)[:, None] * points).sum(0)
    shares, units = [r / sum(ratios) for r in ratios], [p / p.norm() for p in points]
    mean = found / found.norm()
    gradient = oracle.plain_sum([w * oracle.log(mean, u) for w, u in zip(shares, units, strict=True)])
    assert float(gradient.norm()) < 1e-9
    assert float(found.norm()) == pytest.approx(sum(w * float(p.norm()) for w, p in zip(shares, points, strict=True)))
    least = oracle.spread(mean, units, shares)
    for step in (1e-3, 0.1):
        aside = mean + step * torch.randn(50, generator=random, dtype=F64)
        assert oracle.spread(aside / aside.norm(), units, shares) > least


@pytest.mark.parametrize("cosine", [0.9, 0.0, -0.1, -0.3, -0.45])
def test_karcher_of_three_at_one_angle(cosine):
    # even ratios: the mean is the axis of the cone; uneven ones: the gradient tells
    gram = torch.full((3, 3), cosine, dtype=F64).fill_diagonal_(1)
    torch.testing.assert_close(
        coefficients("karcher", gram, [1.0, 1.0, 1.0]), torch.full((3,), (3 + 6 * cosine) ** -0.5, dtype=F64), rtol=1e-9, atol=0
    )
    ratios, points = [0.4, 0.33, 0.27], vectors(gram)
    mean = coefficients("karcher", gram, ratios) @ points
    assert float(mean.norm()) == pytest.approx(1)
    gradient = oracle.plain_sum([w * oracle.log(mean, p) for w, p in zip(ratios, points, strict=True)])
    assert float(gradient.norm()) < 1e-9


@pytest.mark.parametrize("case", [c for c in ORDINARY if len(CASES[c]) == 2])
@pytest.mark.parametrize("ratios", [[1.0, 1.0], [0.2, 0.8]])
def test_karcher_of_two_is_nuslerp(case, ratios):
    gram = gram_of(CASES[case])
    one, two = (coefficients(name, gram, ratios) @ vectors(gram) for name in ("karcher", "nuslerp"))
    assert error(one, two, two.norm()) < 1e-8


def test_karcher_leaves_out_what_has_no_direction_or_no_ratio():
    gram = gram_of([A, B, A.times(0.0)])
    found = coefficients("karcher", gram, [1.0, 1.0, 2.0])
    wanted = coefficients("karcher", gram[:2, :2], [1.0, 1.0]) / 2  # half of the shares have norm zero
    torch.testing.assert_close(found, tensor([*wanted.tolist(), 0.0]))
    found = coefficients("karcher", gram_of([A, B, CASES["three"][2]]), [1.0, 1.0, 0.0])
    torch.testing.assert_close(found, tensor([*coefficients("karcher", gram[:2, :2], [1.0, 1.0]).tolist(), 0.0]))


def test_karcher_steps_until_its_tolerance_and_no_longer():
    gram, ratios = gram_of(CASES["three"]), [1.0, 0.6, 1.7]
    exact = coefficients("karcher", gram, ratios, max_iter=1000, tol=1e-13)
    misses = [float((coefficients("karcher", gram, ratios, max_iter=k, tol=0.0) - exact).norm()) for k in (1, 3, 6)]
    assert misses[0] > 2 * misses[1] > 4 * misses[2]
    rough = coefficients("karcher", gram, ratios, tol=1.0)  # the first step is shorter than this: the start, the plain mean
    start = oracle.average([dense(d) / dense(d).norm() for d in CASES["three"]], ratios)
    found = oracle.plain_sum([c * dense(d) for c, d in zip(rough.tolist(), CASES["three"], strict=True)])
    assert oracle.angle(found, start) < 1e-7


def test_uneven_norms_do_not_turn_nuslerp_or_karcher():
    for name in ("nuslerp", "karcher"):
        one, two = dense(merge(name, [A, B], [1.0, 1.0])), dense(merge(name, [A, B.times(100.0)], [1.0, 1.0]))
        assert oracle.angle(one, two) < 1e-6
    one, two = dense(merge("slerp", [A, B], [1.0, 1.0])), dense(merge("slerp", [A, B.times(100.0)], [1.0, 1.0]))
    assert oracle.angle(one, two) > 0.5


def test_the_oracles_tell_the_methods_apart():
    wholes = [dense(A), 3 * dense(B)]
    found = [oracle_of(name, wholes, [1.0, 0.4]) for name in LINEAR if name != "karcher"]
    assert all(error(x, y, y.norm()) > 0.01 for x, y in itertools.combinations(found, 2))
