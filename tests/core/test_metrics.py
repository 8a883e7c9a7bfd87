from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from rc_ray.core.metrics import (
    METRICS,
    TargetRanks,
    bootstrap_interval,
    expected_ranks,
    hit_rate,
    metric_values,
    ndcg,
    paired_bootstrap,
    rank_targets,
    reciprocal_rank,
)

SCORES = [
    [0.9, 0.5, 0.1, 0.0],  # target 0: first
    [0.9, 0.5, 0.1, 0.0],  # target 2: third
    [0.5, 0.5, 0.5, 0.1],  # target 1: ties for places 1 to 3
    [0.9, 0.2, 0.2, -math.inf],  # target 1: ties for places 2 and 3
    [1.0, 1.0, 1.0, 1.0],  # target 3: all alike
]
TARGETS = [0, 2, 1, 1, 3]


def test_ranks_by_hand() -> None:
    assert expected_ranks(SCORES, TARGETS).tolist() == [1.0, 3.0, 2.0, 2.5, 2.5]


def test_metrics_by_hand() -> None:
    ranks = rank_targets(SCORES, TARGETS)
    np.testing.assert_allclose(hit_rate(ranks, 1), [1, 0, 1 / 3, 0, 1 / 4])
    np.testing.assert_allclose(hit_rate(ranks, 2), [1, 0, 2 / 3, 1 / 2, 1 / 2])
    second = 1 / math.log2(3)
    np.testing.assert_allclose(
        ndcg(ranks, 2), [1, 0, (1 + second) / 3, second / 2, (1 + second) / 4]
    )
    np.testing.assert_allclose(
        reciprocal_rank(ranks), [1, 1 / 3, 11 / 18, 5 / 12, (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4]
    )


def test_ties_equal_the_mean_over_all_orders() -> None:
    """Every way to break the ties, one by one, against the closed form."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = rng.integers(0, 3, size=5).astype(float)
        target = int(rng.integers(5))
        values: dict[str, list[float]] = {name: [] for name in METRICS}
        for order in itertools.permutations(range(5)):
            if any(scores[a] < scores[b] for a, b in itertools.pairwise(order)):
                continue  # not sorted by score
            rank = order.index(target) + 1
            values["HR@1"].append(float(rank <= 1))
            values["HR@5"].append(float(rank <= 5))
            values["NDCG@5"].append(1 / math.log2(rank + 1))
            values["MRR"].append(1 / rank)
        found = metric_values(rank_targets(scores[None], [target]))
        assert list(found) == list(METRICS)
        for name, expected in values.items():
            assert found[name][0] == pytest.approx(np.mean(expected))


def test_broken_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="not a number"):
        rank_targets([[math.nan, 1.0]], [0])
    with pytest.raises(ValueError, match="do not fit"):
        rank_targets([[1.0, 2.0]], [0, 1])


def test_no_users_is_no_crash() -> None:
    empty = TargetRanks(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    assert all(len(values) == 0 for values in metric_values(empty).values())


def test_interval_has_the_width_of_the_central_limit() -> None:
    values = np.random.default_rng(1).normal(0.3, 1.0, size=3000)
    low, high = bootstrap_interval(values, 2000, seed=0)
    error = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + error, abs=0.1 * error)
    assert bootstrap_interval(values, 2000, seed=0) == (low, high)
    assert bootstrap_interval([0.25], 10, seed=0) == (0.25, 0.25)


def test_large_samples_are_resampled_in_blocks() -> None:
    values = np.arange(3_000_000) % 2
    low, high = bootstrap_interval(values, 3, seed=0)
    assert 0.499 < low <= high < 0.501


def test_paired_bootstrap() -> None:
    rng = np.random.default_rng(2)
    hard = rng.normal(size=400)
    a, b = hard + 0.1 + 0.2 * rng.normal(size=400), hard + 0.2 * rng.normal(size=400)
    difference, low, high, p_value = paired_bootstrap(a, b, 2000, seed=0)
    assert difference == pytest.approx((a - b).mean())
    assert 0 < low < difference < high
    assert p_value == pytest.approx(1 / 2001)
    backwards = paired_bootstrap(b, a, 2000, seed=0)
    np.testing.assert_allclose(backwards, (-difference, -high, -low, p_value), rtol=1e-9)


def test_equal_systems_do_not_differ() -> None:
    assert paired_bootstrap([1, 0, 1], [1, 0, 1], 100, seed=0) == (0.0, 0.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_bootstrap([1, 0], [1], 100, seed=0)


def test_p_values_are_uniform_without_a_difference() -> None:
    rng = np.random.default_rng(3)
    p_values = [
        paired_bootstrap(rng.normal(size=100), rng.normal(size=100), 400, seed=run)[3]
        for run in range(300)
    ]
    # 5 % of 300 is 15, standard deviation 3.8.
    assert 4 <= np.sum(np.array(p_values) < 0.05) <= 28
    assert 0.42 < np.mean(p_values) < 0.58
