"""Intervals, paired differences and their correction against figures worked by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rc_ray.core.bootstrap import bootstrap_interval, compare_systems, holm, paired_bootstrap


def test_holm_worked_by_hand() -> None:
    """Sorted .005 .01 .03 .04, times 4 3 2 1: .02 .03 .06 .04; the last may not fall below .06."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_means_and_differences_of_two_users_against_every_resample() -> None:
    """Of two users there are four resamples, each a quarter: 00 01 10 11."""
    a, b = np.array([1.0, 0.0]), np.array([0.0, 0.0])
    found = compare_systems({"HR": {"a": a, "b": b}}, 20_000, seed=1)["HR"]
    assert found.means["a"].value == 0.5
    assert (found.means["a"].low, found.means["a"].high) == (0.0, 1.0)
    assert (found.means["b"].low, found.means["b"].high) == (0.0, 0.0)
    (pair,) = found.pairs
    assert (pair.a, pair.b, pair.difference) == ("a", "b", 0.5)
    # Differences of the four resamples are 1, .5, .5, 0: as far from .5 as .5 is from 0 in half.
    every = [np.mean([(a - b)[i], (a - b)[j]]) for i, j in itertools.product((0, 1), repeat=2)]
    share = np.mean([abs(one - 0.5) >= 0.5 for one in every])
    assert pair.p_value == pytest.approx(share, abs=0.02)


def test_an_interval_has_the_width_of_the_standard_error() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = bootstrap_interval(values, 4000, seed=2)
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_what_is_hard_for_both_systems_cancels() -> None:
    """The users differ by far more than the systems, which the paired test does not see."""
    rng = np.random.default_rng(3)
    hardness = rng.normal(0, 10, 200)
    gain = rng.normal(0.2, 0.5, 200)
    difference, low, high, p = paired_bootstrap(hardness + gain, hardness, 2000, seed=4)
    assert difference == pytest.approx(gain.mean())
    assert 0 < low < difference < high
    assert p < 0.01


def test_equal_systems_show_no_difference() -> None:
    values = np.random.default_rng(5).random(50)
    assert paired_bootstrap(values, values.copy(), 100, seed=6) == (0.0, 0.0, 0.0, 1.0)


def test_correction_holds_within_a_metric() -> None:
    rng = np.random.default_rng(7)
    values = {
        metric: {name: rng.random(60) + 0.05 * place for place, name in enumerate("abcd")}
        for metric in ("HR", "NDCG")
    }
    for metric, found in compare_systems(values, 500, seed=8).items():
        assert [(pair.a, pair.b) for pair in found.pairs] == list(itertools.combinations("abcd", 2))
        raw = [pair.p_value for pair in found.pairs]
        assert [pair.p_adjusted for pair in found.pairs] == holm(raw)
        for pair in found.pairs:
            alone = paired_bootstrap(values[metric][pair.a], values[metric][pair.b], 500, seed=8)
            assert alone == pytest.approx((pair.difference, pair.low, pair.high, pair.p_value))


@pytest.mark.parametrize("values", [[], [[1.0]]])
def test_users_must_be_there_and_one_value_each(values: list[float]) -> None:
    with pytest.raises(ValueError, match="one value per user"):
        bootstrap_interval(values, 10, seed=0)
    with pytest.raises(ValueError, match="3 and 2 users cannot be paired"):
        paired_bootstrap([1.0, 2.0, 3.0], [1.0, 2.0], 10, seed=0)


def test_p_values_are_uniform_without_a_difference() -> None:
    rng = np.random.default_rng(3)
    p_values = [
        paired_bootstrap(rng.normal(size=100), rng.normal(size=100), 400, seed=run)[3]
        for run in range(300)
    ]
    # 5 % of 300 is 15, standard deviation 3.8.
    assert 4 <= np.sum(np.array(p_values) < 0.05) <= 28
    assert 0.42 < np.mean(p_values) < 0.58


def test_large_samples_are_resampled_in_blocks() -> None:
    values = np.arange(9_000_000) % 2
    low, high = bootstrap_interval(values, 3, seed=0)
    assert 0.499 < low <= high < 0.501
