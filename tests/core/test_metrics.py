from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from rc_ray.core.metrics import (
    TargetRanks,
    expected_ranks,
    hit_rate,
    metric_names,
    metric_values,
    ndcg,
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
        values: dict[str, list[float]] = {name: [] for name in metric_names((1, 3))}
        for order in itertools.permutations(range(5)):
            if any(scores[a] < scores[b] for a, b in itertools.pairwise(order)):
                continue  # not sorted by score
            rank = order.index(target) + 1
            values["HR@1"].append(float(rank <= 1))
            values["HR@3"].append(float(rank <= 3))
            values["NDCG@3"].append(1 / math.log2(rank + 1) if rank <= 3 else 0.0)
            values["MRR@3"].append(1 / rank if rank <= 3 else 0.0)
        found = metric_values(rank_targets(scores[None], [target]), (1, 3))
        assert list(found) == ["HR@1", "HR@3", "NDCG@3", "MRR@3"]
        for name, expected in values.items():
            assert found[name][0] == pytest.approx(np.mean(expected))


def test_excluded_items_are_no_rivals() -> None:
    """The history, columns 0 and 1, would be better and tied; it is not ranked at all."""
    excluded = [[True, True, False, False]]
    ranks = rank_targets([[9.0, 5.0, 5.0, 1.0]], [2], excluded)
    assert (ranks.num_better.tolist(), ranks.num_tied.tolist()) == ([0], [0])
    assert expected_ranks([[9.0, 5.0, 5.0, 1.0]], [2]).tolist() == [2.5]
    with pytest.raises(ValueError, match="excluded from its own ranking"):
        rank_targets([[9.0, 5.0]], [0], [[True, False]])


def test_metrics_agree_with_scikit_learn() -> None:
    """Its NDCG averages over ties as ours does; without ties its top-k accuracy is the hit rate and
    its ranking average precision the reciprocal rank."""
    rng = np.random.default_rng(1)
    tied = rng.integers(0, 6, (200, 20)).astype(float)
    smooth = rng.normal(size=(200, 20))
    targets = rng.integers(0, 20, 200)
    truth = np.eye(20)[targets]
    for k in (1, 3, 10, 19):
        for scores in (tied, smooth):
            expected = sklearn_metrics.ndcg_score(truth, scores, k=k)
            assert ndcg(rank_targets(scores, targets), k).mean() == pytest.approx(expected)
        accuracy = sklearn_metrics.top_k_accuracy_score(targets, smooth, k=k, labels=np.arange(20))
        assert hit_rate(rank_targets(smooth, targets), k).mean() == pytest.approx(accuracy)
    precision = sklearn_metrics.label_ranking_average_precision_score(truth, smooth)
    assert reciprocal_rank(rank_targets(smooth, targets)).mean() == pytest.approx(precision)


def test_broken_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="not a number"):
        rank_targets([[math.nan, 1.0]], [0])
    with pytest.raises(ValueError, match="do not fit"):
        rank_targets([[1.0, 2.0]], [0, 1])


def test_no_users_is_no_crash() -> None:
    empty = TargetRanks(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    assert all(len(values) == 0 for values in metric_values(empty, (1, 5)).values())
