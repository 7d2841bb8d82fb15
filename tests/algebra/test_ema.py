"""Profiles of averages over checkpoints against their definition by roots and by integration (Karras et al. 2024, section 3)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sweep import examples

from extensions_built_in.zit_merge.algebra.ema import UNIFORM, gamma_of, profile


def width(gamma, cells=200_000):
    """Standard deviation of the density ~ t^gamma on 0..1, as a midpoint sum."""
    times = (np.arange(cells) + 0.5) / cells
    weights = times**gamma
    weights /= weights.sum()
    mean = (weights * times).sum()
    return float((weights * (times - mean) ** 2).sum() ** 0.5)


def cubic(sigma_rel):
    """The exponent by the paper's appendix: the largest root of a cubic."""
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


@examples(100)
@given(st.floats(0.005, 0.288))
def test_gamma_is_the_root_of_the_cubic(sigma_rel):
    assert gamma_of(sigma_rel) == pytest.approx(cubic(sigma_rel), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.15, 0.25, 0.28])
def test_the_profile_of_gamma_is_as_wide_as_asked_for(sigma_rel):
    assert width(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-4)


def test_the_paper_s_examples():
    # section 3.1: sigma_rel 0.05 and 0.10 are gamma 16.97 and 6.94
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)


def test_the_widest_is_the_plain_mean():
    assert pytest.approx(width(0.0), rel=1e-6) == UNIFORM
    for sigma_rel in (UNIFORM, 0.2887, 0.28868, UNIFORM + 5e-5):
        assert 0 <= gamma_of(sigma_rel) < 0.01
    assert profile([10, 20, 30, 40], gamma_of(0.2887)) == pytest.approx([0.25] * 4)


@examples(50)
@given(st.floats(0.005, 0.28), st.floats(1.001, 1.03))
def test_a_wider_profile_has_a_smaller_exponent(sigma_rel, factor):
    assert gamma_of(sigma_rel) > gamma_of(sigma_rel * factor)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.29, 0.5, 1.0, float("nan"), float("inf"), -float("inf")])
def test_widths_that_no_power_has_are_refused(sigma_rel):
    with pytest.raises(ValueError, match=r"to 0\.2887"):
        gamma_of(sigma_rel)


@examples(100)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=30, unique=True), st.floats(0, 60))
def test_a_profile_sums_to_one_and_follows_the_power(steps, gamma):
    found = profile(steps, gamma)
    assert len(found) == len(steps)
    assert sum(found) == pytest.approx(1)
    assert all(0 <= w <= 1 for w in found)
    last = steps.index(max(steps))
    assert found[last] == max(found)
    for step, weight in zip(steps, found, strict=True):
        assert weight == pytest.approx(found[last] * (step / max(steps)) ** gamma, rel=1e-9, abs=1e-300)


def test_a_profile_by_hand():
    assert profile([250, 500, 1000], 1.0) == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert profile([1000, 500, 250], 2.0) == pytest.approx([16 / 21, 4 / 21, 1 / 21])
    assert profile([3000], 6.94) == [1.0]
    assert profile([1, 2], 0.0) == [0.5, 0.5]


def test_a_narrow_profile_of_a_long_training_neither_overflows_nor_divides_by_zero():
    found = profile([1, 500_000, 1_000_000], gamma_of(0.001))
    assert found == pytest.approx([0, 0, 1])


def test_many_checkpoints_are_as_wide_as_the_density():
    steps = list(range(1, 2001))
    for sigma_rel in (0.05, 0.15, 0.25):
        weights, times = np.array(profile(steps, gamma_of(sigma_rel))), np.array(steps) / 2000
        mean = (weights * times).sum()
        assert float((weights * (times - mean) ** 2).sum() ** 0.5) == pytest.approx(sigma_rel, rel=0.01)
