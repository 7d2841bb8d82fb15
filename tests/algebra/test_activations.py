"""SSR's algebra against dense least squares and dense decompositions on random activations."""

import pytest
import torch
from algebra.operands import dense, draw

from extensions_built_in.zit_merge.algebra.activations import effects, mixing, orthonormal, truncate_seen
from extensions_built_in.zit_merge.algebra.factors import Factors, pad, stack

F64 = torch.float64
RANKS = (3, 2, 4)


def deltas(seed=0):
    return [draw(30, 24, rank, seed + n) for n, rank in enumerate(RANKS)]


def activations(count=3, tokens=200):
    """X_k (in, tokens) of different covariances."""
    random = torch.Generator().manual_seed(7)
    turns = [torch.randn(24, 24, generator=random, dtype=F64) for _ in range(count)]
    return [turn @ torch.randn(24, tokens, generator=random, dtype=F64) for turn in turns]


def merged(given, inputs, ridge):
    """The whole way: factors U M (out, R), D (R, in), and G."""
    parts = [orthonormal(delta) for delta in given]
    whole = stack(parts)
    products = [(whole.down @ x) @ (whole.down @ x).T for x in inputs]
    mixed = mixing(products, [p.rank for p in parts], ridge)
    return Factors(whole.up @ mixed, whole.down), sum(products)


def oracle(given, inputs, ridge):
    """(out, in) by a dense least-squares solver over all tokens, the ridge as more of them."""
    downs = [torch.linalg.svd(dense(delta), full_matrices=False)[2][: delta.rank] for delta in given]
    ups, down = [dense(delta) @ d.T for delta, d in zip(given, downs, strict=True)], torch.cat(downs)
    rows = torch.cat([(down @ x).T for x in inputs])
    wanted = torch.zeros_like(rows)
    first = 0
    for n, (x, d) in enumerate(zip(inputs, downs, strict=True)):
        wanted[n * x.shape[1] : (n + 1) * x.shape[1], first : first + len(d)] = (d @ x).T
        first += len(d)
    more = (ridge * rows.square().sum() / first) ** 0.5 * torch.eye(first, dtype=F64)
    solution = torch.linalg.lstsq(torch.cat([rows, more]), torch.cat([wanted, torch.zeros_like(more)])).solution
    return torch.cat(ups, 1) @ solution.T @ down


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 1e-1])
def test_it_is_the_least_squares_fit(ridge):
    found, wanted = dense(merged(deltas(), activations(), ridge)[0]), oracle(deltas(), activations(), ridge)
    assert (found - wanted).norm() < 1e-9 * wanted.norm()


def test_the_gauge_and_zero_components_have_no_meaning():
    wanted = dense(merged(deltas(), activations(), 1e-2)[0])
    random = torch.Generator().manual_seed(1)
    others = []
    for delta in deltas():
        turn = torch.randn(delta.rank, delta.rank, generator=random, dtype=F64)
        others.append(pad(Factors(delta.up.double() @ turn, torch.linalg.inv(turn) @ delta.down.double()), 8))
    assert (dense(merged(others, activations(), 1e-2)[0]) - wanted).norm() < 1e-9 * wanted.norm()


def test_activations_that_share_nothing_give_the_sum_and_equal_ones_the_mean():
    given, down = deltas(), torch.cat([orthonormal(d).down for d in deltas()])
    inverse = torch.linalg.pinv(down)  # of Z_k that lie in the rows of LoRA k alone
    apart = [inverse[:, a:b] @ torch.randn(b - a, 50, dtype=F64) for a, b in ((0, 3), (3, 5), (5, 9))]
    total = sum(map(dense, given))
    assert (dense(merged(given, apart, 0.0)[0]) - total).norm() < 1e-9 * total.norm()
    same = activations(1) * 3
    assert (dense(merged(given, same, 0.0)[0]) - total / 3).norm() < 1e-9 * total.norm()


def test_without_activations_nothing_is_left():
    assert not mixing([torch.zeros(5, 5)] * 2, [3, 2], 1e-3).any()


@pytest.mark.parametrize("rank", [None, 3])
def test_effects_are_strengths_on_the_activations(rank):
    parts = [orthonormal(delta) for delta in deltas()]
    whole, inputs, ranks = stack(parts), activations(), [p.rank for p in parts]
    products = [(whole.down @ x) @ (whole.down @ x).T for x in inputs]
    mixed = mixing(products, ranks, 1e-3)
    frame = truncate_seen(Factors(whole.up @ mixed, whole.down), sum(products), rank).up if rank else None
    inner, sizes = effects(whole.up, mixed, products, ranks, frame)
    first = 0
    for j, part in enumerate(parts):
        rows = slice(first, first + part.rank)
        first += part.rank
        for k, x in enumerate(inputs):
            alone, there = dense(part) @ x, part.up @ mixed[rows] @ whole.down @ x
            there = there if frame is None else frame @ (frame.T @ there)
            assert inner[j, k] == pytest.approx(float((alone * there).sum()))
            assert sizes[j, k] == pytest.approx(float(alone.square().sum()))


def test_effects_of_the_plain_sum_are_1_everywhere():
    parts = [orthonormal(delta) for delta in deltas()]
    whole = stack(parts)
    products = [(whole.down @ x) @ (whole.down @ x).T for x in activations()]
    inner, sizes = effects(whole.up, torch.eye(9, dtype=F64), products, [p.rank for p in parts])
    assert torch.allclose(inner, sizes)


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_a_cut_does_the_least_harm_to_the_activations(rank):
    """Against Eckart and Young's optimum for what comes out of the module, and against the cut that looks at the weight."""
    whole, gram = merged(deltas(), activations(), 1e-3)
    seen = torch.cat(activations(), 1)
    cut = truncate_seen(whole, gram, rank)
    assert cut.rank == rank
    out = dense(whole) @ seen
    best = torch.linalg.svdvals(out)[rank:].norm()
    left, sigma, right = torch.linalg.svd(dense(whole), full_matrices=False)
    plain = (left[:, :rank] * sigma[:rank]) @ right[:rank]
    assert (out - dense(cut) @ seen).norm() == pytest.approx(float(best), rel=1e-6)
    assert (out - plain @ seen).norm() > 1.001 * best
