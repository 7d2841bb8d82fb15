"""Truncation against the dense singular value decomposition: no closer matrix of that rank exists (Eckart-Young, 1936)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles.dense import best_error, product
from sweep import examples

from extensions_built_in.zit_merge.algebra import truncate as module
from extensions_built_in.zit_merge.algebra.delta import Framed
from extensions_built_in.zit_merge.algebra.factors import Factors, pad, stack
from extensions_built_in.zit_merge.algebra.truncate import singular_values, truncate

EXCESS = 1e-6  # of the delta's norm: float32 factors round to 6e-8 each


def draw(out, into, rank, seed=0, decay=1.0, dtype=torch.float32):
    """Random factors whose k-th component is decay^k of the first."""
    random = torch.Generator().manual_seed(seed)
    fall = decay ** torch.arange(rank)
    return Factors(
        (torch.randn(out, rank, generator=random) * fall).to(dtype), torch.randn(rank, into, generator=random).to(dtype)
    )


def turn(rank, seed=0):
    """A random rotation (rank, rank) in float64."""
    return torch.linalg.qr(torch.randn(rank, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q


def rotated(x, seed=0):
    q = turn(x.rank, seed)
    return Factors((x.up.double() @ q).float(), (q.T @ x.down.double()).float())


def lopsided(x, by):
    return Factors(x.up * by, x.down / by)


def excess(x, rank):
    """How much worse than the best matrix of that rank, as a share of the delta's norm."""
    delta, kept = product(*x), truncate(x, rank)
    assert kept.rank <= rank
    return (float((product(*kept) - delta).norm()) - best_error(delta, rank)) / float(delta.norm())


A, B = draw(40, 32, 8, 1), draw(40, 32, 6, 2)
SPREAD = torch.logspace(-1.5, 1.5, 8)
CASES = {
    "two LoRAs": stack([A, B]),
    "tall": draw(120, 8, 6),
    "flat": draw(8, 120, 6),
    "steep spectrum": draw(40, 32, 12, decay=0.3),
    "the same LoRA twice": stack([A, A]),
    "rotated": rotated(stack([A, B])),
    "the same LoRA in two gauges": stack([A, rotated(A)]),
    "lopsided: B times 1e6, A over 1e6": lopsided(stack([A, B]), 1e6),
    "one of two lopsided": stack([lopsided(A, 1e6), B]),
    "lopsided against each other": stack([lopsided(A, 1e6), lopsided(B, 1e-6)]),
    "lopsided, then rotated": stack([rotated(lopsided(A, 1e6)), B]),
    # a gauge that no rescaling of single components undoes
    "lopsided within a rotation": rotated(
        Factors(A.up * torch.logspace(-1.5, 1.5, 8), A.down / torch.logspace(-1.5, 1.5, 8)[:, None])
    ),
    "zero-padded": pad(stack([A, B]), 30),
    "half of a component zero": stack([A, Factors(torch.zeros(40, 2), B.down[:2]), Factors(B.up[:, :2], torch.zeros(2, 32))]),
    "more components than columns": stack([draw(60, 10, 8, i) for i in range(3)]),
    "more components than rows": stack([draw(10, 60, 8, i) for i in range(3)]),
    "more components than both": stack([draw(12, 12, 9, i) for i in range(3)]),
    "one strong, one faint": stack([A, Factors(B.up * 1e-3, B.down)]),
    "tiny": Factors(A.up * 1e-12, A.down * 1e-8),
    "huge": Factors(A.up * 1e12, A.down * 1e8),
    "bfloat16": stack([Factors(A.up.bfloat16(), A.down.bfloat16()), Factors(B.up.bfloat16(), B.down.bfloat16())]),
}


@pytest.mark.parametrize("rank", [1, 3, 8, 13, 64])
@pytest.mark.parametrize("name", CASES)
def test_no_matrix_of_that_rank_is_closer(name, rank):
    assert -EXCESS < excess(CASES[name], rank) < EXCESS


@examples(40)
@given(
    st.tuples(st.integers(2, 40), st.integers(2, 40)),
    st.lists(st.tuples(st.integers(1, 8), st.floats(-2, 2).filter(lambda s: abs(s) > 1e-2)), min_size=1, max_size=4),
    st.integers(1, 20),
    st.integers(0, 10**6),
)
def test_no_matrix_of_that_rank_is_closer_for_any_mix(shape, parts, rank, seed):
    x = stack([Factors(s * f.up, f.down) for i, (r, s) in enumerate(parts) for f in [draw(*shape, r, seed + i)]])
    assert -EXCESS < excess(x, rank) < EXCESS


def test_the_result_is_float32_and_balanced():
    kept = truncate(stack([lopsided(A, 1e6), B]), 5)
    assert kept.up.dtype == kept.down.dtype == torch.float32
    assert (kept.up.shape, kept.down.shape) == ((40, 5), (5, 32))
    torch.testing.assert_close(kept.up.norm(dim=0), kept.down.norm(dim=1), rtol=1e-5, atol=0)
    assert (kept.up.norm(dim=0).diff() <= 0).all()  # largest first


def test_the_same_lora_twice_needs_its_own_rank_only():
    kept = truncate(stack([A, A]), 16)
    assert kept.rank == A.rank
    assert float((product(*kept) - 2 * product(*A)).norm()) < EXCESS * float(product(*A).norm())


@pytest.mark.parametrize("zero", [Factors(torch.zeros(6, 3), torch.zeros(3, 5)), Factors(torch.ones(6, 3), torch.zeros(3, 5))])
def test_zero_stays_zero(zero):
    kept = truncate(zero, 2)
    assert kept.rank == 1
    assert (kept.up.shape, kept.down.shape) == ((6, 1), (1, 5))
    assert not product(*kept).any()
    assert torch.isfinite(kept.up).all()
    assert torch.isfinite(kept.down).all()


def test_an_exact_cancellation_stays_at_rounding_level():
    cancelled = stack([A, Factors(-A.up, A.down)])
    kept = truncate(cancelled, 4)
    assert float(product(*kept).norm()) < EXCESS * float(product(*A).norm())


def test_what_nearly_cancels_is_exact_to_the_rounding_of_its_parts():
    # 0.999 A in float32 is itself rounded: what is left of it can't be asked for relative to the difference
    x, size = stack([A, Factors(-A.up * 0.999, A.down)]), float(product(*A).norm())
    assert excess(x, 8) * float(product(*x).norm()) < 1e-7 * size


def test_the_difference_of_two_checkpoints_is_exact_relative_to_the_difference():
    later = Factors(A.up + 1e-3 * draw(40, 32, 8, 3).up, A.down + 1e-3 * draw(40, 32, 8, 3).down)
    assert -EXCESS < excess(stack([later, Factors(-A.up, A.down)]), 8) < EXCESS


@pytest.mark.parametrize("rank", [3, 9])
def test_the_order_of_the_parts_has_no_meaning(rank):
    one, two = truncate(stack([A, B]), rank), truncate(stack([B, A]), rank)
    assert float((product(*one) - product(*two)).norm()) < EXCESS * float(product(*one).norm())


@pytest.mark.parametrize("rank", [3, 9])
def test_the_gauge_has_no_meaning(rank):
    one, two = truncate(stack([A, B]), rank), truncate(stack([rotated(A), rotated(lopsided(B, 1e4))]), rank)
    assert float((product(*one) - product(*two)).norm()) < EXCESS * float(product(*one).norm())


@pytest.mark.parametrize("name", CASES)
def test_singular_values_are_those_of_the_dense_matrix(name):
    found, wanted = singular_values(CASES[name]), torch.linalg.svdvals(product(*CASES[name]))
    assert found.dtype == torch.float64
    assert len(found) <= len(wanted)
    # Gram matrices square the condition: below 1e-8 of the largest one, float64 has no digit left
    floor = 1e-7 * float(wanted[0])
    torch.testing.assert_close(found, wanted[: len(found)], rtol=0, atol=floor)
    assert (wanted[len(found) :] < floor).all()


def test_singular_values_of_zero():
    assert singular_values(Factors(torch.zeros(4, 2), torch.zeros(2, 3))).tolist() == [0.0]


# --- sums in float32, where a bound allows them ---------------------------------------------------------------------------------


def exact_excess(x, kept, rank):
    """Error of `kept` over the smallest one, less 1, through QR in float64; with what the smallest one is a share of."""

    def spectrum(up, down):
        return torch.linalg.svdvals(torch.linalg.qr(up.double())[1] @ torch.linalg.qr(down.double().T)[1].T)

    sigma = spectrum(*x)
    error = spectrum(torch.cat([x.up.float(), -kept.up], 1), torch.cat([x.down.float(), kept.down])).norm()
    return float(error / sigma[rank:].norm()) - 1, float(sigma[rank:].norm() / sigma.norm())


def alike(out, into, rank, seed, decay, common):
    """Trained factors: sizes fall as a power, the columns of `up` lean towards a common one."""
    random = torch.Generator().manual_seed(seed)
    up = torch.randn(out, rank, generator=random) + common * torch.randn(out, 1, generator=random)
    return Factors((up * torch.arange(1, rank + 1.0) ** -decay).bfloat16(), torch.randn(rank, into, generator=random).bfloat16())


@pytest.mark.parametrize("common", [0, 1, 10, 100])
@pytest.mark.parametrize("decay", [0, 0.5, 1, 2, 3])
@pytest.mark.parametrize(("shape", "count"), [((1500, 1100), 2), ((600, 64), 3), ((700, 800), 8)])
def test_sums_in_float32_are_taken_where_they_are_close_enough(shape, count, decay, common):
    x = stack([alike(*shape, 16, seed, decay, common).times(0.5) for seed in range(count)])
    found, tail = exact_excess(x, truncate(x, 16, torch.float32), 16)
    assert found < 1e-6 or found * tail < 1e-8  # rounding to float32 alone is 1e-7 of the delta


def test_float32_is_not_taken_where_it_is_too_coarse():
    """Five components that all but cancel: what is left has no digit in float32."""
    x = alike(900, 700, 24, 0, 0.5, 1).map(torch.Tensor.float)
    x = stack([x, Factors(-x.up, x.down + 1e-5 * torch.randn(x.down.shape, generator=torch.Generator().manual_seed(1)))])
    sums = []

    def counted(x, rank):
        found = core(x, rank)
        sums.append((x.up.dtype, found is not None))
        return found

    core = module._cholesky_core
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_cholesky_core", counted)
        kept = truncate(x, 8, torch.float32)
    assert sums[0] == (torch.float32, False)
    assert exact_excess(x, kept, 8)[0] < 1e-3


def test_a_change_between_frames():
    """Its core tells all there is; `expand` is the same change."""
    random = torch.Generator().manual_seed(0)
    frames = [torch.linalg.qr(torch.randn(n, 12, generator=random, dtype=torch.float64)).Q for n in (50, 40)]
    core = torch.randn(12, 12, generator=random, dtype=torch.float64)
    mix = [torch.randn(12, 12, generator=random, dtype=torch.float64) for _ in range(2)]
    x = Framed(frames[0] @ mix[0], mix[0].inverse(), core, mix[1].inverse(), mix[1] @ frames[1].T)
    for rank in (1, 2, 7, 12):
        for delta in (x, x.T, x.times(-0.5)):
            assert (
                -EXCESS
                < (
                    float((product(*truncate(delta, rank)) - product(*delta.expand())).norm())
                    - best_error(product(*delta.expand()), rank)
                )
                / float(core.norm())
                < EXCESS
            )
    torch.testing.assert_close(singular_values(x), torch.linalg.svdvals(core))
