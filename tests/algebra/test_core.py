"""The core space against the singular vectors of the dense deltas beside and above each other."""

import pytest
import torch
from algebra.operands import dense, draw, kron
from oracles import methods as oracle

from extensions_built_in.zit_merge.algebra.core import condensed, core_space
from extensions_built_in.zit_merge.algebra.delta import Kron, Sum
from extensions_built_in.zit_merge.algebra.factors import Factors, hadamard, pad, stack, whole

F64 = torch.float64


def lora(rank, seed, shape=(40, 30)):
    return draw(*shape, rank, seed, F64)


A, B, C = lora(4, 1), lora(4, 2), lora(4, 3)
CASES = {
    "two": [A, B],
    "three": [A, B, C],
    "different ranks": [lora(2, 4), lora(7, 5), lora(1, 6)],
    "float32": [draw(40, 30, 4, 7), draw(40, 30, 3, 8)],
    "bfloat16 and float32": [draw(40, 30, 4, 9, torch.bfloat16), draw(40, 30, 3, 10)],
    "nearly parallel": [A, stack([A, B.times(1e-3)])],
    "pointing apart": [A, stack([A.times(-0.5), B.times(0.5)])],
    "one faint": [A, B.times(1e-3)],
    "rank one": [lora(1, 11), lora(1, 12)],
    "repeated columns": [Factors(A.up[:, [0, 1, 1, 2]], A.down[[0, 1, 1, 2]]), B],
    "zero components": [pad(A, 9), B],
    "the same twice": [A, A],
    "the same four times and another": [A, A, A, A, B],
    "shared columns": [A, Factors(A.up, C.down), B],
    "a zero one": [A, A.times(0.0), B],
    "twenty": [lora(1 + i % 3, 20 + i) for i in range(20)],
    "more components than columns": [lora(5, 50 + i, (40, 12)) for i in range(3)],
    "more components than rows": [lora(5, 50 + i, (12, 40)) for i in range(3)],
    "more components than either": [lora(8, 50 + i, (12, 10)) for i in range(3)],
    "one column": [lora(1, 60, (12, 1)), lora(1, 61, (12, 1))],
    "one row": [lora(1, 60, (1, 12)), lora(1, 61, (1, 12))],
    "LoKr and LoRA": [kron(4, 5, 10, 6, 2, 2, 70, F64), A],
    "two LoKrs": [kron(4, 5, 10, 6, 2, 1, 70, F64), kron(5, 3, 8, 10, 1, 2, 72, F64)],
    "a full LoKr and LoRA": [kron(4, 5, 10, 6, 4, 6, 74, F64), A],
    "a Sum among them": [Sum((kron(4, 5, 10, 6, 1, 2, 76, F64), B)), A, C],
    "LoHa and LoRA": [hadamard(lora(2, 80), lora(3, 81)), A],
    "a dense difference": [whole(torch.randn(40, 30, generator=torch.Generator().manual_seed(82), dtype=F64)), A],
}
cases = pytest.mark.parametrize("name", CASES)


def other_gauges(deltas):
    """The same deltas in other factors, one list for each gauge."""
    return zip(*(_gauges(d, 90 + 2 * i) for i, d in enumerate(deltas)), strict=True)


def _gauges(x, seed):
    if isinstance(x, Sum):
        return [Sum(parts) for parts in zip(*(_gauges(p, seed) for p in x.parts), strict=True)]
    if isinstance(x, Kron):
        turned = next(oracle.gauges(x.right, seed + 1))  # a lopsided one on both sides would square the condition
        return [Kron(left, turned) for left in oracle.gauges(x.left, seed)]
    return list(oracle.gauges(x, seed))


def error(found, wanted, size):
    return float((found - wanted).norm()) / float(size)


def test_the_other_gauges_are_other_factors_of_the_same_delta():
    # the tests of gauges below would hold for nothing if they compared a thing with itself
    for deltas in (CASES["two"], CASES["LoKr and LoRA"], CASES["a Sum among them"]):
        found = list(other_gauges(deltas))
        assert len(found) == 4
        for others in found:
            for x, y in zip(deltas, others, strict=True):
                assert error(dense(y), dense(x), dense(x).norm()) < 1e-12
    ups = [x.up for x, _ in other_gauges(CASES["two"])]
    assert all(float((up - A.up).norm()) > 0.1 * float(A.up.norm()) for up in ups)
    assert float(ups[1].norm()) > 1e5 * float(A.up.norm())


@cases
def test_nothing_is_lost(name):
    deltas = CASES[name]
    space = core_space(deltas)
    assert space.left.dtype == space.right.dtype == space.cores.dtype == F64
    assert space.cores.shape == (len(deltas), space.left.shape[1], space.right.shape[0])
    wholes = [dense(d) for d in deltas]
    size = max(float(w.norm()) for w in wholes)
    for core, wanted in zip(space.cores, wholes, strict=True):
        assert error(space.left @ core @ space.right, wanted, size) < 1e-12
        assert error(dense(space.back(core)), wanted, size) < 1e-12
        assert space.back(core).shape == wanted.shape
        assert space.back(core).rank == min(core.shape)


@cases
def test_the_bases_are_orthonormal_and_inner_products_stay(name):
    deltas = CASES[name]
    space = core_space(deltas)
    for basis in (space.left, space.right.T):
        assert basis.shape[1] <= min(basis.shape[0], sum(d.rank for d in deltas))
        assert error(basis.T @ basis, torch.eye(basis.shape[1]), 1) < 1e-8
    vectors = torch.stack([dense(d).flatten() for d in deltas])
    gram = vectors @ vectors.T
    assert error(space.cores.flatten(1) @ space.cores.flatten(1).T, gram, gram.norm()) < 1e-12


@cases
def test_the_axes_are_the_principal_ones_largest_first(name):
    deltas = CASES[name]
    wholes = [whole / whole.norm() for d in deltas if float((whole := dense(d)).norm())]
    space = core_space(deltas)
    for found, side in ((space.left, torch.cat(wholes, 1)), (space.right.T, torch.cat(wholes, 0).T)):
        vectors, sigma, _ = torch.linalg.svd(side, full_matrices=False)
        rank = oracle.alive(sigma)
        assert found.shape[1] >= rank
        agreement = (found[:, :rank] * vectors[:, :rank]).sum(0).abs()  # up to sign
        torch.testing.assert_close(agreement, torch.ones(rank, dtype=F64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("one column", "one row")])
def test_there_are_as_many_axes_as_directions_in_the_deltas(name):
    deltas = CASES[name]
    left, right = oracle.axes([dense(d) for d in deltas])
    space = core_space(deltas)
    assert (space.left.shape[1], space.right.shape[0]) == (left.shape[1], right.shape[1])


@pytest.mark.parametrize(
    "deltas",
    [
        [Factors(torch.cat([A.up, C.up], 1), torch.cat([A.down, A.down])), B],  # (A.up + C.up) A.down, written with 8 components
        [stack([A, C, C.times(-1.0)]), B],  # A
        [A] * 10,  # 40 components in 40 x 30, four directions
    ],
    ids=["down repeated", "a part cancels", "ten times the same"],
)
def test_directions_that_no_delta_has_are_no_axes(deltas):
    # a rule that keeps a share of the entries would count their zeros
    wholes = [dense(d) for d in deltas]
    left, right = oracle.axes(wholes)
    space = core_space(deltas)
    assert (space.left.shape[1], space.right.shape[0]) == (left.shape[1], right.shape[1])


@cases
def test_axes_do_not_depend_on_gauge_or_order(name):
    # axes have a sign and, where all deltas are zero, no meaning: compared by the sizes of the cores' entries
    deltas = CASES[name]
    sizes = core_space(deltas).cores.abs()
    for others in other_gauges(deltas):
        assert error(core_space(others).cores.abs(), sizes, sizes.norm()) < 1e-6
    assert error(core_space(deltas[::-1]).cores.flip(0).abs(), sizes, sizes.norm()) < 1e-6


def test_axes_turn_with_the_weight():
    # the model's own rows and columns have no part in it
    left, right = oracle.rotation(40, 1), oracle.rotation(30, 2)
    turned = [Factors(left @ d.up, d.down @ right) for d in (A, B, C)]
    one, two = core_space([A, B, C]), core_space(turned)
    assert error(two.cores.abs(), one.cores.abs(), one.cores.norm()) < 1e-9
    assert error((two.left.T @ left @ one.left).abs(), torch.eye(12), 1) < 1e-9
    assert error((two.right @ right.T @ one.right.T).abs(), torch.eye(12), 1) < 1e-9


def test_a_transposed_problem_has_the_transposed_cores():
    one, two = core_space([A, B, C]), core_space([d.T for d in (A, B, C)])
    assert error(two.cores.mT.abs(), one.cores.abs(), one.cores.norm()) < 1e-9


@pytest.mark.parametrize("deltas", [[A.times(0.0)], [A.times(0.0), Factors(torch.zeros(40, 2), torch.ones(2, 30))]])
def test_zero_deltas_have_zero_cores(deltas):
    space = core_space(deltas)
    assert not space.cores.any()
    assert torch.isfinite(space.left).all()
    assert torch.isfinite(space.right).all()
    assert dense(space.back(space.cores[0])).shape == (40, 30)


def test_loras_that_are_lopsided_against_each_other_do_not_drown():
    # stacked as they are, the columns of the one are 1e12 times those of the other
    deltas = [Factors(A.up * 1e6, A.down / 1e6), Factors(B.up / 1e6, B.down * 1e6)]
    space = core_space(deltas)
    assert space.cores.shape == (2, 8, 8)
    for core, delta in zip(space.cores, (A, B), strict=True):
        assert error(space.left @ core @ space.right, dense(delta), dense(delta).norm()) < 1e-9


def test_a_faint_lora_keeps_its_own_precision():
    faint = B.times(1e-9)
    space = core_space([A, faint])
    assert error(space.left @ space.cores[1] @ space.right, dense(faint), dense(faint).norm()) < 1e-6


@pytest.mark.parametrize(
    ("x", "is_full"),
    [
        (A, True),
        (Factors(A.up * 1e6, A.down / 1e6), True),
        (A.times(1e-9), True),
        (pad(A, 9), False),
        (Factors(A.up[:, [0, 1, 1, 2]], A.down[[0, 1, 1, 2]]), False),
        (Factors(A.up * torch.tensor([1, 1, 1, 1e-8], dtype=F64), A.down), False),
        (A.times(0.0), False),
        (lora(35, 5), False),
    ],
    ids=["drawn", "lopsided", "small", "padded", "repeated", "one faint", "zero", "more components than columns"],
)
def test_a_change_is_full_where_it_surely_has_as_many_directions_as_components(x, is_full):
    for deltas, place in ([x], 0), ([x, B], 0), ([B, x], 1):
        found = condensed(deltas, exactly=True)
        assert found and found.is_full(place) is is_full


def test_small_changes_have_the_inner_products_of_the_long_ones_in_float64():
    deltas = [draw(400, 300, 50, seed, torch.bfloat16) for seed in range(3)]
    deltas.append(stack(deltas))  # depends on the others
    found = condensed(deltas, exactly=True)
    rows = torch.stack([dense(d).flatten() for d in deltas])
    assert found
    short = torch.stack([dense(d).flatten() for d in found.deltas])
    for small in (found.inner, short @ short.T):
        torch.testing.assert_close(small, rows @ rows.T, rtol=1e-9, atol=1e-9 * float(rows.norm()) ** 2)
