"""TSV, projection and shared directions against singular vectors and projectors of the dense deltas."""

import itertools

import pytest
import torch
from algebra.operands import dense, draw, kron, sizes, wholes
from algebra.test_core import CASES, error, other_gauges
from oracles import methods as oracle

from extensions_built_in.zit_merge.algebra import subspace
from extensions_built_in.zit_merge.algebra.delta import Kron, Sum
from extensions_built_in.zit_merge.algebra.factors import Factors, stack, whole
from extensions_built_in.zit_merge.algebra.truncate import singular_values

F64 = torch.float64
METHODS = {"tsv": subspace.tsv, "project": subspace.project, "shared_once": subspace.shared_once}
methods = pytest.mark.parametrize("method", METHODS)
cases = pytest.mark.parametrize("case", CASES)
A, B, C = CASES["three"]


def polar(x):
    return subspace._polar(x)


def merge(method, deltas, **parameters):
    return dense(METHODS[method](deltas, **parameters))


def fitting(method):
    """The cases with as many deltas as it takes."""
    return [c for c in CASES if method != "project" or len(CASES[c]) == 2]


GRID = [(m, c) for m in METHODS for c in fitting(m)]


def apart(count, rank=4, seed=1):
    """Deltas (40, 30) without a common row or column direction."""
    up, down = oracle.rotation(40, seed), oracle.rotation(30, seed + 1)
    sigma = torch.linspace(1, 3, count * rank, dtype=F64)
    parts = [slice(i * rank, (i + 1) * rank) for i in range(count)]
    return [Factors(up[:, part] * sigma[part], down[part]) for part in parts]


# --- invariances ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "case"), GRID)
def test_the_gauge_has_no_meaning(method, case):
    deltas = CASES[case]
    wanted = merge(method, deltas)
    for others in other_gauges(deltas):
        assert error(merge(method, others), wanted, sizes(deltas)) < 1e-6


@pytest.mark.parametrize("seed", range(10))
@methods
def test_nor_has_one_that_is_lopsided_within_a_rotation(method, seed):
    # what rounding leaves of a direction that is not there must not count as one
    deltas = [draw(40, 30, 4, 300 + seed, F64), draw(40, 30, 4, 400 + seed, F64)]
    wanted = merge(method, deltas)
    *_, others = other_gauges(deltas)
    assert error(merge(method, others), wanted, sizes(deltas)) < 1e-8


@pytest.mark.parametrize(("method", "case"), [g for g in GRID if g[0] != "project"])
def test_the_order_has_no_meaning(method, case):
    deltas = CASES[case]
    wanted = merge(method, deltas)
    shuffled = torch.randperm(len(deltas), generator=torch.Generator().manual_seed(4)).tolist()
    for order in (shuffled, list(range(len(deltas)))[::-1]):
        assert error(merge(method, [deltas[i] for i in order]), wanted, sizes(deltas)) < 1e-8


@methods
def test_the_model_s_own_axes_have_no_meaning(method):
    left, right = oracle.rotation(40, 1), oracle.rotation(30, 2)
    wanted = merge(method, [A, B])
    found = merge(method, [Factors(left @ d.up, d.down @ right) for d in (A, B)])
    assert error(found, left @ wanted @ right, wanted.norm()) < 1e-9


@methods
@pytest.mark.parametrize("size", [-1.0, 1e-6, 1e6])
def test_a_strength_for_all_goes_through(method, size):
    wanted = merge(method, [A, B])
    assert error(merge(method, [d.times(size) for d in (A, B)]) / size, wanted, wanted.norm()) < 1e-9


@pytest.mark.parametrize("method", ["tsv", "shared_once"])
def test_rows_and_columns_are_treated_alike(method):
    wanted = merge(method, [A, B, C])
    assert error(merge(method, [d.T for d in (A, B, C)]).T, wanted, wanted.norm()) < 1e-9


@methods
def test_one_alone_stays_bit_for_bit(method):
    for case in ("LoKr and LoRA", "a Sum among them", "bfloat16 and float32"):
        alone = CASES[case][0]
        assert METHODS[method]([alone]) is alone


@methods
def test_a_zero_lora_beside_another_changes_nothing(method):
    zero = Factors(torch.zeros(40, 3, dtype=F64), C.down[:3])
    for deltas in ([A, zero], [zero, A], [A, A.times(0.0)]):
        assert error(merge(method, deltas), dense(A), dense(A).norm()) < 1e-12
    both = METHODS[method]([zero, A.times(0.0)])
    assert both.shape == (40, 30)
    assert dense(both).eq(0).all()


@methods
def test_loras_without_a_common_direction_are_summed(method):
    for count in (2,) if method == "project" else (2, 3, 7):
        deltas = apart(count)
        wanted = oracle.plain_sum(wholes(deltas))
        assert error(merge(method, deltas), wanted, wanted.norm()) < 1e-12


ONE_DELTA_TWO_WAYS = {
    "down repeated": (Factors(torch.cat([B.up, C.up], 1), torch.cat([B.down, B.down])), Factors(B.up + C.up, B.down)),
    "a part cancels": (stack([C, B, C.times(-1.0)]), B),
    "a part cancels in a Sum": (
        Sum((kron(4, 5, 10, 6, 1, 2, 7, F64), stack([B, kron(4, 5, 10, 6, 1, 2, 7, F64).times(-1.0).expand()]))),
        B,
    ),
}


@pytest.mark.parametrize("written", ONE_DELTA_TWO_WAYS)
@methods
def test_components_that_add_nothing_have_no_meaning(method, written):
    one, two = ONE_DELTA_TWO_WAYS[written]
    assert error(dense(one), dense(two), dense(two).norm()) < 1e-12
    for deltas, others in (([A, one], [A, two]), ([one, A], [two, A])):
        wanted = merge(method, others)
        assert error(merge(method, deltas), wanted, wanted.norm()) < 1e-6


# --- tsv -----------------------------------------------------------------------------------------------------------------------


@cases
def test_tsv(case):
    deltas = CASES[case]
    assert error(merge("tsv", deltas), oracle.tsv(wholes(deltas)), sizes(deltas)) < 1e-7


def test_tsv_is_not_the_sum():
    # of random ones: close to it, as merging notes 4.1 have it, but another matrix
    total = oracle.plain_sum(wholes([A, B]))
    assert 0.02 < error(merge("tsv", [A, B]), total, total.norm()) < 0.5


@pytest.mark.parametrize("count", [2, 3, 10, 20])
def test_tsv_counts_copies_once(count):
    copies = [A, *[next(oracle.gauges(A, i)) for i in range(count - 1)]]
    assert error(merge("tsv", copies), dense(A), dense(A).norm()) < 1e-9


def test_tsv_counts_a_common_component_once_and_the_others_whole():
    x, y, z = apart(3)
    common = wholes([z])[0]
    found = merge("tsv", [stack([x, z]), stack([y, z])])
    assert error(found, dense(x) + dense(y) + common, common.norm()) < 1e-9
    found = merge("tsv", [stack([x, z.times(3.0)]), stack([y, z])])
    assert error(found, dense(x) + dense(y) + 2 * common, common.norm()) < 1e-9  # the mean of what is common


def test_tsv_has_as_many_components_as_the_loras_together():
    found = subspace.tsv([A, B, C])
    assert found.rank == 12
    assert int(torch.linalg.matrix_rank(dense(found))) == 12


# --- polar ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(30, 8), (8, 30), (9, 9), (30, 1), (1, 30)])
def test_polar(shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    before = x.clone()
    found = polar(x)
    assert error(found, oracle.polar(x), 1) < 1e-9
    short = found.T @ found if shape[0] >= shape[1] else found @ found.T
    assert error(short, torch.eye(min(shape)), 1) < 1e-9
    assert torch.equal(x, before)
    for seed in range(5):  # no matrix with orthonormal columns is nearer
        turned = oracle.rotation(max(shape), seed)[: shape[0], : shape[1]]
        if shape[0] >= shape[1]:
            assert float((x - oracle.polar(turned)).norm()) > float((x - found).norm())


def test_polar_leaves_directions_empty_that_the_columns_do_not_span():
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(2), dtype=F64)[:, [0, 1, 1, 2]]
    found = polar(x)
    assert error(found, oracle.polar(x), 1) < 1e-9
    sigma = torch.linalg.svdvals(found)
    torch.testing.assert_close(sigma, torch.tensor([1.0, 1, 1, 0], dtype=F64), rtol=0, atol=1e-9)
    assert not polar(torch.zeros(5, 3, dtype=F64)).any()


# --- project -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", fitting("project"))
@pytest.mark.parametrize("mu", [0.0, 0.5, 20.0, 1e12])
@pytest.mark.parametrize("components", [0, 1, 2, 100])
def test_project(case, mu, components):
    x, y = CASES[case]
    first, second = dense(x), dense(y)
    gives, takes = oracle.gives_way(first, second, mu, components), oracle.gives_way(second, first, mu, components)
    for yields, wanted in {"first": gives + second, "second": first + takes, "both": gives + takes}.items():
        found = merge("project", [x, y], mu=mu, yields=yields, components=components)
        assert error(found, wanted, sizes([x, y])) < 1e-7
        swapped = {"first": "second", "second": "first"}.get(yields, yields)
        found = merge("project", [y, x], mu=mu, yields=swapped, components=components)
        assert error(found, wanted, sizes([x, y])) < 1e-7


def test_project_has_the_defaults_of_the_node():
    wanted = oracle.gives_way(dense(A), dense(B), 0.5) + dense(B)
    assert error(merge("project", [A, B]), wanted, wanted.norm()) < 1e-9
    hard = oracle.gives_way(dense(A), dense(B), 1e12)
    assert error(hard, dense(A), dense(A).norm()) > 0.1  # they overlap: there is something to give way in


def test_project_of_no_strength_is_the_sum():
    for yields in ("first", "second", "both"):
        wanted = dense(A) + dense(B)
        assert error(merge("project", [A, B], mu=0, yields=yields), wanted, wanted.norm()) < 1e-12


def test_a_hard_projection_leaves_nothing_in_the_other_s_rows():
    _, _, right = oracle.triplets(dense(B))
    first = merge("project", [A, B], mu=1e12) - dense(B)
    assert float((first @ right).norm()) < 1e-9 * float(dense(A).norm())
    inputs = dense(B) @ right  # what the second does to its own inputs, undisturbed
    assert error(merge("project", [A, B], mu=1e12) @ right, inputs, inputs.norm()) < 1e-9


def test_only_rows_give_way_columns_do_not():
    same_columns = Factors(A.up, oracle.rotation(30, 5)[:4])
    apart_rows = Factors(A.up, oracle.rotation(30, 5)[4:8])
    wanted = dense(same_columns) + dense(apart_rows)
    assert error(merge("project", [same_columns, apart_rows], mu=1e12), wanted, wanted.norm()) < 1e-9


def test_project_protects_the_largest_directions_of_a_wide_one():
    # past the size that is decomposed whole
    up, down = oracle.rotation(560, 1)[:, :530], oracle.rotation(530, 2)
    wide = whole(up * (0.9 ** torch.arange(530, dtype=F64)) @ down)
    thin = draw(560, 530, 3, 3, F64)
    found = merge("project", [thin, wide], mu=1e9, components=2)
    wanted = dense(thin) - dense(thin) @ down[:2].T @ down[:2] + dense(wide)
    assert error(found, wanted, dense(thin).norm()) < 1e-6


def test_a_lokr_that_yields_or_does_not_is_not_multiplied_out():
    k = CASES["LoKr and LoRA"][0]
    for yields in ("first", "second", "both"):
        found = subspace.project([k, A], yields=yields)
        assert any(isinstance(p, Kron) for p in found.parts)


def test_the_thin_one_that_yields_keeps_its_rank():
    assert subspace.project([A, B]).rank == 8
    assert subspace.project([A, B], yields="both").rank == 8


# --- shared_once ---------------------------------------------------------------------------------------------------------------


@cases
@pytest.mark.parametrize("tau", [0.1, 0.3, 0.5, 0.7])
def test_shared_once(case, tau):
    deltas = CASES[case]
    assert error(merge("shared_once", deltas, tau=tau), oracle.shared_once(wholes(deltas), tau), sizes(deltas)) < 1e-7


def test_the_oracle_of_shared_once_is_not_the_sum():
    for case in ("two", "three", "pointing apart", "a full LoKr and LoRA", "a Sum among them", "more components than either"):
        total = oracle.plain_sum(wholes(CASES[case]))
        assert error(oracle.shared_once(wholes(CASES[case]), 0.3), total, total.norm()) > 0.01


@pytest.mark.parametrize("count", [2, 3, 10, 20])
def test_shared_once_counts_copies_once(count):
    copies = [A, *[next(oracle.gauges(A, i)) for i in range(count - 1)]]
    assert error(merge("shared_once", copies), dense(A), dense(A).norm()) < 1e-9


def test_what_is_common_is_weighed_by_its_size():
    x, y, z = apart(3)
    found = merge("shared_once", [stack([x, z.times(3.0)]), stack([y, z])])
    wanted = dense(x) + dense(y) + (3 * 3 + 1) / 4 * dense(z)
    assert error(found, wanted, wanted.norm()) < 1e-9


@pytest.mark.parametrize("tau", [0.0, 1e-6, 0.5, 0.99])
def test_shared_once_of_random_ones_far_apart_and_of_orthogonal_ones_is_the_sum(tau):
    for seed in range(10):
        deltas = apart(3, seed=seed)
        wanted = oracle.plain_sum(wholes(deltas))
        assert error(merge("shared_once", deltas, tau=tau), wanted, wanted.norm()) < 1e-12
    if tau >= 0.5:
        deltas = [draw(300, 250, 8, s, F64) for s in (1, 2)]
        wanted = oracle.plain_sum(wholes(deltas))
        assert error(merge("shared_once", deltas, tau=tau), wanted, wanted.norm()) < 1e-12


@pytest.mark.parametrize("seed", range(10))
def test_nothing_is_held_by_more_than_all(seed):
    # tau 1: an eigenvalue above N, which there is not
    copies = [draw(40, 30, 4, seed, F64)] * 3
    wanted = oracle.plain_sum(wholes(copies))
    assert error(merge("shared_once", copies, tau=1.0), wanted, wanted.norm()) < 1e-9


@pytest.mark.parametrize("tau", [0.1, 0.4, 0.6, 0.9])
def test_tau_is_the_share_of_the_others_that_hold_a_direction(tau):
    # z is in two of three: one of the two others
    x, y, z = apart(3)
    deltas = [stack([x, z]), stack([y, z]), Factors(oracle.rotation(40, 1)[:, 20:24], oracle.rotation(30, 2)[20:24])]
    wanted = dense(x) + dense(y) + dense(deltas[2]) + (1 if tau < 0.5 else 2) * dense(z)
    assert error(merge("shared_once", deltas, tau=tau), wanted, wanted.norm()) < 1e-9


def test_both_sides_must_be_common():
    # two that write to the same columns from different rows have no common part
    rows = oracle.rotation(30, 5)
    deltas = [Factors(A.up, rows[:4]), Factors(A.up, rows[4:8])]
    wanted = oracle.plain_sum(wholes(deltas))
    assert error(merge("shared_once", deltas), wanted, wanted.norm()) < 1e-9


def drifted(count, noise, shape=(900, 800), rank=32, drift=6):
    """The synthetic LoRAs of merging notes 4.4: one drift of rank 6 in all, each a little different, and own parts."""
    common = draw(*shape, drift, 1, F64)
    own = [draw(*shape, rank - drift, 10 + i, F64) for i in range(count)]
    loras = []
    for i, part in enumerate(own):
        other = draw(*shape, drift, 50 + i, F64)
        loras.append(stack([Factors(common.up + noise * other.up, common.down + noise * other.down), part]))
    return common, own, loras


def share(found, part):
    """How often a part is in the merge."""
    return float((found * part).sum() / (part * part).sum())


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_a_common_drift_counts_once_and_own_parts_stay(count, noise):
    common, own, loras = drifted(count, noise)
    drift, found = dense(common), merge("shared_once", loras)
    assert share(oracle.plain_sum(wholes(loras)), drift) == pytest.approx(count, rel=0.1)
    assert share(found, drift) == pytest.approx(1, abs=0.15)
    for part in own:
        assert 0.9 < share(found, dense(part)) < 1.05


@pytest.mark.parametrize("count", [2, 3, 4])
def test_counts_find_the_six_directions_of_the_drift(count):
    common, _, loras = drifted(count, 0.2)
    bases = [oracle.triplets(x.up)[0] for x in loras]
    values, vectors = subspace.counts(bases)
    assert values.shape == (900,)
    assert vectors.shape == (900, 900)
    assert (values.diff() <= 1e-12).all()
    assert float(values.min()) > -1e-9
    assert float(values.max()) < count + 1e-9
    assert int((values > 1 + 0.5 * (count - 1)).sum()) == 6
    held = oracle.triplets(common.up)[0]
    assert float((vectors[:, :6].T @ held).square().sum()) > 0.9 * 6


def test_counts_of_subspaces_that_share_some_axes():
    eye = torch.eye(6, dtype=F64)
    values, vectors = subspace.counts([eye[:, [0, 1]], eye[:, [1, 2]], eye[:, [1, 2, 3]]])
    torch.testing.assert_close(values, torch.tensor([3.0, 2, 1, 1, 0, 0], dtype=F64))
    torch.testing.assert_close(vectors[:, :2].abs(), eye[:, [1, 2]])


# --- all together --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [1e-3, 0.03])
def test_what_copies_have_in_common_counts_once(noise):
    # two checkpoints of one training: along the one the merge is about as strong as it
    near = Factors(A.up + noise * B.up, A.down + noise * B.down)
    for method in ("tsv", "shared_once"):
        assert share(merge(method, [A, near]), dense(A)) == pytest.approx(1, abs=3 * noise)
    found = merge("project", [A, near], mu=1e9)  # the first one gives way to its own likeness
    assert share(found, dense(A)) == pytest.approx(1, abs=3 * noise)


def test_the_oracles_tell_the_methods_apart():
    x, y = wholes([A, B])
    found = [
        oracle.tsv([x, y]),
        oracle.gives_way(x, y, 0.5) + y,
        oracle.gives_way(x, y, 0.5, 2) + y,
        oracle.shared_once([x, y], 0.3),
    ]
    assert all(error(one, two, two.norm()) > 0.01 for one, two in itertools.combinations(found, 2))


@pytest.mark.parametrize("method", ["tsv", "project", "shared_once"])
def test_two_zero_ones_are_a_zero_with_a_spectrum(method):
    zero = Factors(torch.zeros(6, 2), torch.ones(2, 5))
    merged = getattr(subspace, method)([zero, zero])
    assert not dense(merged).any() and not (singular_values(merged) > 0).any()
