"""TIES, DARE and DELLA entry by entry in the principal axes of the dense deltas, and against PEFT on the same matrices."""

import itertools

import pytest
import torch
from algebra.operands import dense, draw, sizes, wholes
from algebra.test_core import CASES, error, other_gauges
from oracles import methods as oracle
from sweep import sweep

from extensions_built_in.zit_merge.algebra import sparse
from extensions_built_in.zit_merge.algebra.factors import Factors

F64 = torch.float64
METHODS = {
    "ties": sparse.ties,
    "dare_linear": sparse.dare_linear,
    "dare_ties": sparse.dare_ties,
    "della": sparse.della,
}
RANDOM = [name for name in METHODS if name != "ties"]
# where only rounding tells two deltas apart in size, and with it which draws are whose
SAME_SIZE = ("the same twice", "the same four times and another")
methods = pytest.mark.parametrize("method", METHODS)
randoms = pytest.mark.parametrize("method", RANDOM)

A, B, C = CASES["three"]
BOTH = A, B


def merge(method, deltas, **parameters):
    return dense(METHODS[method](deltas, **parameters))


@pytest.fixture(scope="module")
def peft():
    """PEFT's merge functions; where the environment can't import PEFT, as AI-Toolkit's without a GPU, these tests are skipped."""
    return pytest.importorskip("peft.utils.merge_utils", reason="PEFT can't be imported here", exc_type=ImportError)


def draws_of(deltas, seed):
    """The uniform numbers of a seed, (p, q) for each delta: first the one with the most energy, early axes counting more."""
    left, right = oracle.axes(wholes(deltas))
    shape = len(deltas), left.shape[1], right.shape[1]
    numbers = iter(torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=F64))
    places = 1 + torch.arange(shape[1])[:, None] + 2**0.5 * torch.arange(shape[2])
    energies = [float((core**2 / places).sum()) for core in oracle.cores(wholes(deltas))]
    order = sorted(range(len(deltas)), key=lambda i: -energies[i])
    drawn = {i: next(numbers) for i in order}
    return [drawn[i] for i in range(len(deltas))]


# --- the definitions -----------------------------------------------------------------------------------------------------------


@sweep("case, density", CASES, [0.01, 0.2, 0.5, 1.0])
def test_ties(case, density):
    deltas = CASES[case]
    found = merge("ties", deltas, density=density)
    assert error(found, oracle.ties(wholes(deltas), density), sizes(deltas)) < 1e-7


@sweep("case, density", CASES, [0.1, 0.5, 1.0])
def test_dare(case, density):
    deltas, seed = CASES[case], 5
    draws = draws_of(deltas, seed)
    found = merge("dare_linear", deltas, density=density, seed=seed)
    assert error(found, oracle.dare_linear(wholes(deltas), density, draws), sizes(deltas)) < 1e-7
    found = merge("dare_ties", deltas, density=density, seed=seed)
    assert error(found, oracle.dare_ties(wholes(deltas), density, draws), sizes(deltas)) < 1e-7


@sweep("case, parameters", CASES, [(0.5, 0.15), (0.3, 0.5), (0.9, 0.2), (0.6, 0.0)])
def test_della(case, parameters):
    density, epsilon = parameters
    deltas, seed = CASES[case], 6
    found = merge("della", deltas, density=density, epsilon=epsilon, seed=seed)
    assert error(found, oracle.della(wholes(deltas), density, epsilon, draws_of(deltas, seed)), sizes(deltas)) < 1e-7


@pytest.mark.parametrize(
    "case", ["two", "three", "pointing apart", "different ranks", "LoKr and LoRA", "more components than either"]
)
@pytest.mark.parametrize("density", [0.1, 0.2, 0.5, 0.9])
def test_ties_is_pefts(peft, case, density):
    # with weights of 1: PEFT elects the sign before it looks at its weights
    deltas = CASES[case]
    left, right = oracle.axes(wholes(deltas))
    merged = peft.ties(oracle.cores(wholes(deltas)), torch.ones(len(deltas), dtype=F64), density)
    assert error(merge("ties", deltas, density=density), left @ merged @ right.T, sizes(deltas)) < 1e-7


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("case", ["two", "three", "pointing apart", "LoKr and LoRA"])
def test_dare_is_pefts_with_the_same_masks(peft, method, case, monkeypatch):
    deltas, density = CASES[case], 0.6
    draws = iter(draws_of(deltas, 7))
    monkeypatch.setattr(torch, "bernoulli", lambda keep: (next(draws) < keep).to(keep.dtype))
    merged = getattr(peft, method)(oracle.cores(wholes(deltas)), torch.ones(len(deltas), dtype=F64), density)
    left, right = oracle.axes(wholes(deltas))
    assert next(draws, None) is None  # PEFT has drawn for each of them
    found = merge(method, deltas, density=density, seed=7)
    assert error(found, left @ merged @ right.T, sizes(deltas)) < 1e-7


def test_the_parameters_do_something():
    # and the oracles see it: each of these is another matrix
    found = [
        oracle.ties(wholes(BOTH), 0.2),
        oracle.ties(wholes(BOTH), 0.3),
        oracle.dare_linear(wholes(BOTH), 0.5, draws_of(BOTH, 1)),
        oracle.dare_linear(wholes(BOTH), 0.5, draws_of(BOTH, 2)),
        oracle.dare_linear(wholes(BOTH), 0.5, draws_of(BOTH, 1)[::-1]),
        oracle.dare_ties(wholes(BOTH), 0.5, draws_of(BOTH, 1)),
        oracle.della(wholes(BOTH), 0.5, 0.5, draws_of(BOTH, 1)),
        oracle.della(wholes(BOTH), 0.5, 0.4, draws_of(BOTH, 1)),
    ]
    assert all(error(x, y, y.norm()) > 1e-3 for x, y in itertools.combinations(found, 2))


def test_the_defaults_are_the_papers():
    for method, parameters in {
        "ties": {"density": 0.2},
        "dare_linear": {"density": 0.5, "seed": 0},
        "dare_ties": {"density": 0.5, "seed": 0},
        "della": {"density": 0.5, "epsilon": 0.15, "seed": 0},
    }.items():
        assert torch.equal(merge(method, BOTH), merge(method, BOTH, **parameters))


def test_ties_of_one_by_one_matrices_by_hand():
    def number(x):
        return Factors(torch.tensor([[x]], dtype=F64), torch.ones(1, 1, dtype=F64))

    def ties(*numbers):
        return float(merge("ties", [number(x) for x in numbers], density=1.0))

    assert ties(3.0, 1.0) == pytest.approx(2)
    assert ties(3.0, -1.0) == pytest.approx(3)
    assert ties(-3.0, 1.0, 1.0) == pytest.approx(-3)
    assert ties(-3.0, 2.0, 2.0) == pytest.approx(2)  # two against one, and together the larger
    assert ties(3.0, 0.0, 1.0) == pytest.approx(2)  # what is zero has no vote and no share in the mean


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della"])
def test_nobody_wins_a_draw(method):
    for deltas in ([A, A.times(-1.0)], [A.times(-1.0), A]):
        parameters = {"density": 1.0} | ({"epsilon": 0.0} if method == "della" else {})
        assert float(merge(method, deltas, **parameters).norm()) < 1e-9 * float(dense(A).norm())


# --- invariances ---------------------------------------------------------------------------------------------------------------


@methods
@pytest.mark.parametrize("case", [c for c in CASES if c not in SAME_SIZE])
def test_gauge_and_order_have_no_meaning(method, case):
    deltas = CASES[case]
    wanted = merge(method, deltas)
    for others in other_gauges(deltas):
        assert error(merge(method, others), wanted, sizes(deltas)) < 1e-6
    shuffled = torch.randperm(len(deltas), generator=torch.Generator().manual_seed(4)).tolist()
    for order in (shuffled, list(range(len(deltas)))[::-1]):
        assert error(merge(method, [deltas[i] for i in order]), wanted, sizes(deltas)) < 1e-8


@methods
def test_the_gauge_has_no_meaning_where_two_are_of_one_size(method):
    deltas = [A.times(1 / float(dense(A).norm())), B.times(1 / float(dense(B).norm()))]
    wanted = merge(method, deltas)
    for seed in range(12):
        turned = next(oracle.gauges(deltas[0], seed))
        assert error(merge(method, [turned, deltas[1]]), wanted, 2) < 1e-6


@methods
def test_the_model_s_own_axes_have_no_meaning(method):
    left, right = oracle.rotation(40, 1), oracle.rotation(30, 2)
    turned = [Factors(left @ d.up, d.down @ right) for d in (A, B, C)]
    wanted = merge(method, [A, B, C])
    assert error(merge(method, turned), left @ wanted @ right, wanted.norm()) < 1e-8


@methods
@pytest.mark.parametrize("size", [-1.0, 1e-6, 1e6])
def test_a_strength_for_all_goes_through(method, size):
    wanted = merge(method, [A, B, C])
    assert error(merge(method, [d.times(size) for d in (A, B, C)]) / size, wanted, wanted.norm()) < 1e-9


def test_ties_and_dare_without_draws_know_no_rows_and_columns():
    wanted = merge("ties", [A, B, C])
    assert error(merge("ties", [d.T for d in (A, B, C)]).T, wanted, wanted.norm()) < 1e-9


@methods
def test_one_alone_stays_bit_for_bit(method):
    for case in ("LoKr and LoRA", "a Sum among them", "bfloat16 and float32"):
        alone = CASES[case][0]
        assert METHODS[method]([alone]) is alone


@methods
def test_a_zero_lora_changes_nothing(method):
    # the smallest one is dealt its draws last
    wanted = merge(method, [A, B])
    zero = Factors(torch.zeros(40, 3, dtype=F64), C.down[:3])
    for deltas in ([A, B, zero], [zero, A, B], [A, zero, B, zero]):
        assert error(merge(method, deltas), wanted, sizes(deltas)) < 1e-9


@pytest.mark.parametrize("count", [2, 5])
def test_loras_without_a_common_direction_do_not_weaken_each_other(count):
    # by the definition: what is zero in all but one of the cores has no other sign and no other share in the mean
    up, down = oracle.rotation(40, 8), oracle.rotation(30, 9)
    sigma = torch.linspace(1, 2, 4 * count, dtype=F64)
    parts = [slice(4 * i, 4 * i + 4) for i in range(count)]
    deltas = [Factors(up[:, part] * sigma[part], down[part]) for part in parts]
    whole = oracle.plain_sum(wholes(deltas))
    assert error(merge("ties", deltas, density=1.0), whole, whole.norm()) < 1e-9
    assert error(merge("dare_ties", deltas, density=1.0), whole, whole.norm()) < 1e-9


@methods
def test_zeros_stay_zero(method):
    found = METHODS[method]([A.times(0.0), B.times(0.0)])
    assert found.shape == (40, 30)
    assert dense(found).eq(0).all()


@methods
def test_the_result_is_as_thin_as_the_inputs_together(method):
    assert METHODS[method]([A, B, C]).rank == 12
    assert METHODS[method](CASES["more components than columns"]).rank == 12


# --- trimming ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.01, 0.2, 0.37, 0.9, 1.0])
def test_the_share_of_entries_that_ties_keeps(density):
    # beside a zero one there is no election and no mean: what is left is the trimmed core
    found = merge("ties", [A, A.times(0.0)], density=density)
    u, _, v = oracle.triplets(dense(A))
    core = u.T @ found @ v
    # the axes are A's own, its core is diagonal: of 16 entries 4 are not zero
    kept = int((core.abs() > 1e-9 * core.abs().max()).sum())
    assert kept == min(4, max(1, int(density * 16)))
    assert float(core.abs().max()) == pytest.approx(float(torch.linalg.matrix_norm(dense(A), 2)))


@pytest.mark.parametrize(
    "pairs",
    [
        ([Factors(torch.cat([A.up, C.up], 1), torch.cat([A.down, A.down])), B], [Factors(A.up + C.up, A.down), B]),
        (
            [Factors(A.up[:, [0, 1, 1, 2]], A.down), B],
            [Factors(A.up[:, :3], torch.stack([A.down[0], A.down[1] + A.down[2], A.down[3]])), B],
        ),
        (
            [Factors(torch.cat([A.up, C.up, -C.up], 1), torch.cat([A.down, C.down, C.down])), B],
            [A, B],
        ),
    ],
    ids=["down repeated", "up repeated", "a part cancels"],
)
@methods
def test_how_many_components_a_delta_is_written_with_has_no_meaning(method, pairs):
    one, two = (merge(method, deltas) for deltas in pairs)
    assert error(one, two, two.norm()) < 1e-6


@pytest.mark.parametrize("count", [2, 5, 7, 8, 10, 20])
def test_ties_of_copies_is_the_trimmed_one_however_many(count):
    wanted = oracle.ties([dense(A)], 0.2)
    assert float(wanted.norm()) < 0.99 * float(dense(A).norm())
    assert error(merge("ties", [A] * count), wanted, dense(A).norm()) < 1e-9


# --- randomness ----------------------------------------------------------------------------------------------------------------


@randoms
def test_a_seed_reproduces_and_another_differs(method):
    before = torch.get_rng_state()
    first = merge(method, BOTH, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        assert torch.equal(merge(method, BOTH, seed=1), first)
    found = [merge(method, BOTH, seed=s) for s in (0, 1, 2, 2**32 - 1)]
    assert all(error(x, y, y.norm()) > 0.1 for x, y in itertools.combinations(found, 2))


def test_dare_is_the_plain_sum_in_the_mean_with_the_noise_of_independent_masks():
    # two that have much in common: one mask for both would double the noise of what they share
    small = [draw(12, 10, 3, 1, F64), draw(12, 10, 3, 2, F64)]
    small[1] = Factors(small[0].up + 0.3 * small[1].up, small[0].down)
    wanted, density, seeds = oracle.plain_sum(wholes(small)), 0.4, 600
    found = torch.stack([merge("dare_linear", small, density=density, seed=s) for s in range(seeds)])
    noise = float((found - wanted).square().sum((1, 2)).mean())
    expected = (1 - density) / density * sum(float(w.square().sum()) for w in wholes(small))
    assert noise == pytest.approx(expected, rel=0.15)
    assert float((found.mean(0) - wanted).norm()) < 1.5 * (expected / seeds) ** 0.5
    assert float((found.mean(0) - wanted).norm()) > 0.3 * (expected / seeds) ** 0.5


def test_della_keeps_large_entries_more_often():
    # beside a zero one, two rows of A's core have one entry each that is not zero: the largest of its row
    deltas, density, epsilon, seeds = [A, A.times(0.0)], 0.5, 0.6, 300
    u, sigma, v = oracle.triplets(dense(A))
    kept = torch.zeros(4, dtype=F64)
    for seed in range(seeds):
        core = u.T @ merge("della", deltas, density=density, epsilon=epsilon, seed=seed) @ v
        diagonal = core.diagonal() / sigma
        alive = diagonal.abs() > 1e-9
        torch.testing.assert_close(diagonal[alive], torch.full_like(diagonal[alive], 1 / (density + epsilon / 2)))
        kept += alive
    assert float(kept.mean()) / seeds == pytest.approx(density + epsilon / 2, abs=0.04)


def test_della_without_a_spread_is_dare_ties():
    for density in (0.3, 0.7, 1.0):
        wanted = merge("dare_ties", BOTH, density=density)
        assert error(merge("della", BOTH, density=density, epsilon=0.0), wanted, wanted.norm()) < 1e-12


def test_density_one_keeps_everything():
    whole = oracle.plain_sum(wholes(BOTH))
    assert error(merge("dare_linear", BOTH, density=1.0), whole, whole.norm()) < 1e-12
    assert error(merge("dare_ties", BOTH, density=1.0), merge("ties", BOTH, density=1.0), whole.norm()) < 1e-12


@pytest.mark.parametrize(("density", "epsilon"), [(0.05, 0.15), (0.075, 0.15), (0.95, 0.15), (1.0, 0.1), (0.4, 1.0)])
def test_della_refuses_what_is_no_probability(density, epsilon):
    with pytest.raises(ValueError, match="0 to 1"):
        merge("della", BOTH, density=density, epsilon=epsilon)


@pytest.mark.parametrize(("density", "epsilon"), [(0.08, 0.15), (0.925, 0.15), (1.0, 0.0), (0.5, 0.99)])
def test_della_takes_what_is_one(density, epsilon):
    assert torch.isfinite(merge("della", BOTH, density=density, epsilon=epsilon)).all()
