"""Truncation of LoKr, LoHa, whole differences and their sums, by all its roads, against the dense SVD in float64.

The measure is the squared error beyond the least possible one (Eckart-Young), as a share of that least one.
"""

import pytest
import torch
from algebra.operands import dense, draw, kron
from hypothesis import given
from hypothesis import strategies as st
from sweep import examples

from extensions_built_in.zit_merge.algebra import truncate as module
from extensions_built_in.zit_merge.algebra.delta import Kron, Sum
from extensions_built_in.zit_merge.algebra.factors import Factors, hadamard, stack, whole
from extensions_built_in.zit_merge.algebra.krylov import leading
from extensions_built_in.zit_merge.algebra.truncate import singular_values, truncate

EXCESS = 1e-9  # of the least squared error
ROUNDING = 1e-14  # of the squared norm: what Gram matrices in float64 leave where nothing has to be cut


def frame(size, count, seed):
    """Orthonormal columns (size, count)."""
    random = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, count, generator=random, dtype=torch.float64)).Q


def spectrum(out, into, values, seed=0):
    """A dense (out, in) with these singular values."""
    values = torch.as_tensor(values, dtype=torch.float64)
    return (frame(out, len(values), seed) * values) @ frame(into, len(values), seed + 1).T


def check_triplets(x, rank, triplets, excess=EXCESS):
    """The closest matrix of this rank, by orthonormal vectors and descending values."""
    left, sigma, right = triplets
    delta = dense(x)
    values = torch.linalg.svdvals(delta)
    norm2, least2 = float(values.square().sum()), float(values[rank:].square().sum())
    count = len(sigma)
    assert left.dtype == sigma.dtype == right.dtype == torch.float64
    assert (left.shape, right.shape) == ((delta.shape[0], count), (count, delta.shape[1]))
    assert 1 <= count <= rank
    error2 = float((delta - (left * sigma) @ right).square().sum())
    assert error2 - least2 <= excess * least2 + ROUNDING * norm2
    assert error2 - least2 >= -1e-12 * norm2  # nothing can be closer: the oracle is right
    assert (sigma >= 0).all()
    assert (sigma.diff() <= 1e-14 * values[0]).all()
    strong = sigma > 1e-4 * values[0]  # Gram matrices lose the angles of what is far weaker, as they should
    for vectors in (left[:, strong].T, right[strong]):
        torch.testing.assert_close(vectors @ vectors.T, torch.eye(len(vectors), dtype=torch.float64), rtol=0, atol=1e-6)


def check(x, rank):
    """By the road that truncate takes, by Krylov, and what truncate itself gives in float32."""
    check_triplets(x, rank, module.svd(x.map(torch.Tensor.double), rank))
    check_triplets(x, rank, leading(x.map(torch.Tensor.double), rank))
    kept, delta = truncate(x, rank), dense(x)
    assert kept.up.dtype == kept.down.dtype == torch.float32
    assert 1 <= kept.rank <= rank
    torch.testing.assert_close(kept.up.norm(dim=0), kept.down.norm(dim=1), rtol=1e-3, atol=1e-30)
    least = float(torch.linalg.svdvals(delta)[rank:].square().sum().sqrt())
    error = float((dense(kept) - delta).norm())
    assert abs(error - least) <= 3e-7 * float(delta.norm())  # two factors, each rounded to float32 once


def lopsided(x, by=1e6):
    return Factors(x.up * by, x.down / by)


A, B = draw(24, 30, 5, 1), draw(24, 30, 7, 2)
K, OTHER, APART = kron(4, 5, 6, 6, 4, 6, 3), kron(4, 5, 6, 6, 2, 1, 5), kron(6, 5, 4, 6, 2, 3, 7)
WEAK = Kron(Factors(K.left.up * 1e-3, K.left.down), K.right)
FORMS = {
    "kron": K,
    "kron of whole factors": Kron(whole(dense(K.left).float()), whole(dense(K.right).float())),
    "kron of rank 1 factors": kron(4, 5, 6, 6, 1, 1),
    "kron with equal singular values": Kron(whole(torch.eye(4, 5)), whole(torch.eye(6))),
    "kron of thin factors": kron(8, 9, 8, 7, 2, 3),
    "kron tall": kron(12, 2, 5, 3, 2, 3),
    "kron wide": kron(2, 12, 3, 5, 2, 3),
    "kron of a column and a row": kron(24, 1, 1, 30, 1, 1),
    "kron lopsided": Kron(lopsided(K.left), lopsided(K.right, 1e-6)),
    "kron lopsided between its factors": Kron(K.left.times(1e6), K.right.times(1e-6)),
    "kron, rank-deficient": Kron(stack([OTHER.left, OTHER.left]), stack([OTHER.right, OTHER.right.times(-0.5)])),
    "kron and factors": Sum((K, A)),
    "kron and lopsided factors": Sum((K, lopsided(A))),
    "lopsided kron and factors": Sum((Kron(lopsided(K.left), lopsided(K.right, 1e-6)), A)),
    "weak kron and factors": Sum((WEAK, A)),
    "two krons": Sum((K, OTHER)),
    "two krons of different layouts": Sum((K, APART)),
    "a kron and itself": Sum((K, K.times(0.5))),
    "a kron and itself written out": Sum((K, whole(dense(K).float()))),
    "two krons and factors": Sum((K, APART, B)),
    "whole": whole(dense(stack([A, B])).float()),
    "whole, tall": whole(spectrum(60, 9, torch.linspace(1, 0.1, 9)).float()),
    "whole, wide": whole(spectrum(9, 60, torch.linspace(1, 0.1, 9)).float()),
    "wide factors": draw(24, 30, 70, 9),
    "wide factors, lopsided": stack([lopsided(draw(24, 30, 35, 9)), lopsided(draw(24, 30, 35, 10), 1e-6)]),
    "LoHa": hadamard(A, B),
    "LoHa and whole": stack([hadamard(A, B), whole(spectrum(24, 30, torch.ones(24)).float())]),
    "steep": whole(spectrum(24, 30, 10.0 ** -torch.arange(24) / 1.0).float()),
    "flat": whole(spectrum(24, 30, torch.ones(24)).float()),
    "repeated values": whole(spectrum(24, 30, [3.0] * 5 + [2.0] * 7 + [1.0] * 12).float()),
    "one far above a flat rest": whole(spectrum(24, 30, [1e3] + [1.0] * 23).float()),
    "identity": whole(torch.eye(24, 30)),
    "one element": whole(torch.zeros(24, 30).index_put((torch.tensor([3]), torch.tensor([4])), torch.tensor(2.0))),
    "tiny": Sum((Kron(K.left.times(1e-15), K.right.times(1e-15)), A.times(1e-30))),
    "huge": Sum((Kron(K.left.times(1e12), K.right), A.times(1e12))),
}


@pytest.mark.parametrize("rank", [1, 4, 11, 24])
@pytest.mark.parametrize("name", FORMS)
def test_no_matrix_of_that_rank_is_closer(name, rank):
    check(FORMS[name], rank)


@pytest.mark.parametrize("rank", [1, 4, 11, 24])
@pytest.mark.parametrize("name", FORMS)
def test_by_krylov_where_its_basis_starts_small(name, rank, monkeypatch):
    # as in the sizes of the real model, where it holds a small part of the space at first
    monkeypatch.setattr("extensions_built_in.zit_merge.algebra.krylov._EXTRA", 2)
    # within a cluster of values that float32 has split by 1e-8, any vector is as good to that much
    check_triplets(FORMS[name], rank, leading(FORMS[name].map(torch.Tensor.double), rank), 1e-8)


@examples(30)
@given(
    st.tuples(*[st.integers(1, 6)] * 4),
    st.lists(
        st.tuples(st.sampled_from(["kron", "factors", "wide"]), st.integers(1, 6), st.sampled_from([1.0, -0.3, 20.0])),
        min_size=1,
        max_size=3,
    ),
    st.integers(1, 36),
    st.integers(0, 10**6),
)
def test_any_mix_of_forms_and_ranks(sides, parts, rank, seed):
    p, q, s, t = sides
    made = []
    for i, (kind, r, strength) in enumerate(parts):
        made.append(
            {
                "kron": lambda r=r, i=i: kron(p, q, s, t, r, r, seed + 2 * i),
                "factors": lambda r=r, i=i: draw(p * s, q * t, r, seed + 2 * i),
                "wide": lambda r=r, i=i: draw(p * s, q * t, 40 + r, seed + 2 * i),
            }[kind]().times(strength)
        )
    check(made[0] if len(made) == 1 else Sum(tuple(made)), rank)


@pytest.mark.parametrize("name", FORMS)
def test_transposing_changes_nothing(name):
    x = FORMS[name]
    # against the best one, since equal singular values leave a choice of vectors
    check_triplets(x.T, 3, module.svd(x.T.map(torch.Tensor.double), 3))
    one, two = truncate(x, 3), truncate(x.T, 3)
    assert one.rank == two.rank
    delta = dense(x)
    errors = [float((dense(kept) - wanted).norm()) for kept, wanted in ((one, delta), (two, delta.T))]
    assert errors[0] == pytest.approx(errors[1], abs=3e-7 * float(delta.norm()))


# --- the numbers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_singular_values(name):
    x = FORMS[name]
    found, wanted = singular_values(x), torch.linalg.svdvals(dense(x))
    assert found.dtype == torch.float64
    count = min(len(found), len(wanted))
    torch.testing.assert_close(found[:count], wanted[:count], rtol=0, atol=1e-7 * float(wanted[0]))
    assert not (wanted[count:] > 1e-7 * wanted[0]).any()
    assert not (found[count:] > 1e-7 * wanted[0]).any()


def test_singular_values_of_a_kron_of_large_sides_are_products():
    # (10 240, 9 600) dense would be 800 MB
    left, right = spectrum(80, 60, [3.0, 2.0, 0.5]), spectrum(128, 160, [7.0, 1.0])
    found = singular_values(Kron(whole(left), whole(right)))
    torch.testing.assert_close(found[:6], torch.tensor([21.0, 14.0, 3.5, 3.0, 2.0, 0.5], dtype=torch.float64))
    assert not (found[6:] > 1e-6).any()


@pytest.mark.parametrize(
    "zero",
    [
        Kron(draw(4, 5, 2).times(0.0), draw(6, 6, 2)),
        Kron(whole(torch.zeros(4, 5)), whole(torch.zeros(6, 6))),
        Sum((Kron(draw(4, 5, 2).times(0.0), draw(6, 6, 2)), draw(24, 30, 3).times(0.0))),
        whole(torch.zeros(24, 30)),
    ],
    ids=["kron", "whole kron", "sum", "whole"],
)
@pytest.mark.parametrize("road", [truncate, lambda x, r: leading(x.map(torch.Tensor.double), r)], ids=["truncate", "krylov"])
def test_zero_stays_zero(zero, road):
    kept = road(zero, 3)
    tensors = kept if isinstance(kept, tuple) else tuple(kept)
    assert all(torch.isfinite(t).all() for t in tensors)
    if isinstance(kept, Factors):
        assert (kept.up.shape, kept.down.shape) == ((24, 1), (1, 30))
        assert not dense(kept).any()
    else:
        assert not (kept[0] * kept[1] @ kept[2]).any()
    assert not (singular_values(zero) > 0).any()


@pytest.mark.parametrize(("count", "rank"), [(1, 8), (3, 8), (7, 8), (8, 8)])
def test_a_rank_smaller_than_asked_is_what_comes(count, rank):
    for values in ([1.0] * count, [2.0**-k for k in range(count)]):
        x = whole(spectrum(80, 60, values))
        left, sigma, right = leading(x, rank)
        assert len(sigma) == count
        torch.testing.assert_close(sigma, torch.tensor(values, dtype=torch.float64), rtol=1e-12, atol=0)
        torch.testing.assert_close((left * sigma) @ right, dense(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["kron and factors", "repeated values", "flat", "identity", "wide factors", "kron"])
def test_the_bytes_never_change(name, monkeypatch):
    monkeypatch.setattr(module, "_SMALL", 4)
    monkeypatch.setattr(module, "_THIN", 1)
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)  # nobody's generator has an influence
        kept = truncate(FORMS[name].map(torch.clone), 5)
        made.append((kept.up.numpy().tobytes(), kept.down.numpy().tobytes()))
        state = torch.random.get_rng_state()
        truncate(FORMS[name], 5)
        assert torch.equal(torch.random.get_rng_state(), state)  # and it draws from nobody's
    assert made[0] == made[1]


# --- sizes just above a border between the core and Krylov ---------------------------------------------------------------------


@pytest.fixture
def called(monkeypatch):
    """The ranks for which truncate went to Krylov, with the border at 512 components and four times what is kept."""
    ranks = []
    monkeypatch.setattr(module, "_SMALL", 512)
    monkeypatch.setattr(module, "_THIN", 4)
    monkeypatch.setattr(module, "leading", lambda x, rank: ranks.append(rank) or leading(x, rank))
    return ranks


SPECTRA = {
    "noise": lambda n, into: torch.randn(n, into, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    "linear": lambda n, into: spectrum(n, into, torch.linspace(1, 0.5, min(n, into))),
    "1/k": lambda n, into: spectrum(n, into, 1 / torch.arange(1, min(n, into) + 1)),
    "flat": lambda n, into: spectrum(n, into, torch.ones(min(n, into))),
    "repeated": lambda n, into: spectrum(n, into, torch.cat([torch.full((70,), 2.0), torch.ones(min(n, into) - 70)])),
    "one far above": lambda n, into: spectrum(n, into, [300.0, *torch.linspace(1, 0.5, min(n, into) - 1)]),
}


@pytest.mark.parametrize("rank", [64, 128])
@pytest.mark.parametrize("name", SPECTRA)
def test_spectra_without_a_gap(name, rank, called):
    """128 is the largest rank that goes to Krylov at this size: three blocks fill the whole space."""
    x = whole(SPECTRA[name](513, 520))
    triplets = module.svd(x, rank)
    assert called == [rank]
    check_triplets(x, rank, triplets)


@pytest.mark.parametrize(("out", "into"), [((20, 26), (20, 27)), ((20, 33), (20, 26))])
def test_a_lokr_with_a_lora_at_the_size_where_krylov_begins(out, into, called):
    x = Sum((kron(out[0], into[0], out[1], into[1], 20, 26, 0), draw(out[0] * out[1], into[0] * into[1], 16, 2, size=3.0)))
    triplets = module.svd(x.map(torch.Tensor.double), 32)
    assert called == [32]
    check_triplets(x, 32, triplets)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_products_in_float32_find_the_optimum_too(shape, power):
    """Of a dense matrix, by the error of the approximation beside the smallest one there is."""
    torch.manual_seed(3)
    size = min(shape)
    left, right = (torch.linalg.qr(torch.randn(side, size, dtype=torch.float64)).Q for side in shape)
    values = (torch.arange(1, size + 1, dtype=torch.float64)) ** -power
    x = ((left * values) @ right.T).float()
    up, sigma, down = leading(x, 12, torch.float32)
    assert {t.dtype for t in (up, sigma, down)} == {torch.float64}
    smallest = torch.linalg.svdvals(x.double())[12:].square().sum()
    error = (x.double() - (up * sigma) @ down).square().sum()
    assert error <= smallest * (1 + 1e-6)
