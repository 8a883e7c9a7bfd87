"""Coverage, popularity and calibration against figures worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rc_ray.core.beyond_accuracy import (
    category_kl,
    coverage,
    expected_calibration_error,
    popularity_percentile,
)


def test_coverage_counts_each_item_once_and_no_gaps() -> None:
    assert coverage([[0, 1], [1, -1]], 8) == 0.25
    assert coverage([[-1, -1]], 8) == 0.0


def test_popularity_percentile_by_hand() -> None:
    """Counts 0 5 5 9: percentiles 1/8, (1 + 3)/8, the same, 7/8."""
    found = popularity_percentile([[0, 3], [1, 2], [3, -1], [-1, -1]], [0, 5, 5, 9])
    np.testing.assert_allclose(found[:3], [0.5, 0.5, 7 / 8])
    assert math.isnan(found[3])


def test_a_random_list_has_the_mean_percentile() -> None:
    counts = np.random.default_rng(0).zipf(1.5, 500)
    everything = np.arange(500)[None]
    assert popularity_percentile(everything, counts)[0] == pytest.approx(0.5)


def test_category_kl_by_hand() -> None:
    history = [["war", "war", "love", None], ["war"], [None], ["war"]]
    shown = [["war", "love"], ["love"], ["war"], ["war", "war"]]
    found = category_kl(history, shown, alpha=0.1)
    expected = 2 / 3 * math.log(2 / 3 / (0.9 / 2 + 0.1 * 2 / 3)) + 1 / 3 * math.log(
        1 / 3 / (0.9 / 2 + 0.1 / 3)
    )
    assert found[0] == pytest.approx(expected)
    assert found[1] == pytest.approx(math.log(10))  # nothing of the kind is shown: log 1 / alpha
    assert math.isnan(found[2])
    assert found[3] == pytest.approx(0.0)


def test_expected_calibration_error_by_hand() -> None:
    """Two users at .9, one right: gap .4; two at .6, both right: gap .4; all weigh the same."""
    probabilities = [[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]]
    assert expected_calibration_error(probabilities, [0, 1, 0, 1]) == pytest.approx(0.4)
    # One right of two at .5 in every tie: perfectly calibrated.
    assert expected_calibration_error([[0.5, 0.5]] * 3, [0, 1, 0]) == pytest.approx(0.0)
    # Over- and under-confidence in two bins do not cancel.
    assert expected_calibration_error([[0.8, 0.2], [0.6, 0.4]], [1, 0]) == pytest.approx(0.6)
