"""Ranking metrics under ties, and bootstrap intervals.

Letters: N users, C candidates, B bootstrap samples. A target that ties with t other candidates
behind b better ones has its rank uniform on {b + 1, ..., b + t + 1}; every metric here is the
expectation over that draw, so a system gains nothing by giving equal scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

METRICS = ("HR@1", "HR@5", "NDCG@5", "MRR")
"""The metrics of every report, in its order."""


@dataclass(frozen=True)
class TargetRanks:
    """Where the targets of N cases stand."""

    num_better: npt.NDArray[np.int64]
    """(N,) candidates with a higher score than the target."""
    num_tied: npt.NDArray[np.int64]
    """(N,) other candidates with the target's score."""

    @property
    def expected(self) -> Floats:
        """(N,) expected rank `1 + b + t / 2`; 1 is best."""
        return 1.0 + self.num_better + self.num_tied / 2.0


def rank_targets(scores: npt.ArrayLike, target_positions: npt.ArrayLike) -> TargetRanks:
    """Rank each target among its candidates.

    Args:
        scores: (N, C), higher is better; minus infinity is allowed.
        target_positions: (N,) column of each row's target.

    Raises:
        ValueError: a score is not a number, or shapes do not fit.
    """
    table = np.asarray(scores, dtype=np.float64)
    positions = np.asarray(target_positions, dtype=np.int64)
    if table.ndim != 2 or positions.shape != table.shape[:1]:
        raise ValueError(f"scores {table.shape} and target positions {positions.shape} do not fit")
    # A comparison with NaN is false, so a broken model would rank every target first.
    if np.isnan(table).any():
        raise ValueError("a score is not a number")
    target = np.take_along_axis(table, positions[:, None], axis=1)  # (N, 1)
    return TargetRanks(
        num_better=(table > target).sum(axis=1),
        num_tied=(table == target).sum(axis=1) - 1,
    )


def expected_ranks(scores: npt.ArrayLike, target_positions: npt.ArrayLike) -> Floats:
    """(N,) expected rank of each target under random tie-breaking; see `rank_targets`."""
    return rank_targets(scores, target_positions).expected


def hit_rate(ranks: TargetRanks, k: int) -> Floats:
    """(N,) P(rank <= k), the recall of the single target; its mean is HR@k.

    Ties: McSherry and Najork, Computing Information Retrieval Performance Measures Efficiently in
    the Presence of Tied Scores, ECIR 2008.
    """
    return _expectation(np.ones(k), ranks)


def ndcg(ranks: TargetRanks, k: int) -> Floats:
    """(N,) E[1 / log2(rank + 1) if rank <= k else 0]; its mean is NDCG@k.

    With one relevant item the ideal DCG is 1 (Jarvelin and Kekalainen, TOIS 2002).
    """
    return _expectation(1.0 / np.log2(np.arange(1, k + 1) + 1.0), ranks)


def reciprocal_rank(ranks: TargetRanks) -> Floats:
    """(N,) E[1 / rank]; its mean is MRR (Voorhees, TREC-8 1999)."""
    deepest = int((ranks.num_better + ranks.num_tied).max(initial=0)) + 1
    return _expectation(1.0 / np.arange(1, deepest + 1), ranks)


def metric_values(ranks: TargetRanks) -> dict[str, Floats]:
    """Metric name -> (N,) value of each user, for `METRICS`; the mean is the reported value."""
    return {
        "HR@1": hit_rate(ranks, 1),
        "HR@5": hit_rate(ranks, 5),
        "NDCG@5": ndcg(ranks, 5),
        "MRR": reciprocal_rank(ranks),
    }


def bootstrap_interval(
    values: npt.ArrayLike, num_samples: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean over users (Efron and Tibshirani 1993, chapter 13).

    Args:
        values: (N,) one value per user, N >= 1.
        num_samples: B.
        seed: makes the interval repeatable.
        level: covered share.

    Returns:
        Low and high end.
    """
    low, high = _ends(_resampled_means(_per_user(values), num_samples, seed), level)
    return low, high


def paired_bootstrap(
    a: npt.ArrayLike, b: npt.ArrayLike, num_samples: int, seed: int, level: float = 0.95
) -> tuple[float, float, float, float]:
    """Difference of the means of two systems over the same users.

    Users are resampled, so what makes a user hard for both systems cancels. The p-value is
    two-sided, of the resampled means shifted to a zero difference:
    `(1 + #{|d* - d| >= |d|}) / (B + 1)` (Efron and Tibshirani 1993, chapter 16; for retrieval:
    Sakai, SIGIR 2006).

    Args:
        a: (N,) values of system a.
        b: (N,) values of system b, the same users in the same order.
        num_samples: B.
        seed: makes the result repeatable.
        level: covered share of the percentile interval.

    Returns:
        `(mean(a - b), low, high, p_value)`.
    """
    first, second = _per_user(a), _per_user(b)
    if first.shape != second.shape:
        raise ValueError(f"{len(first)} and {len(second)} users cannot be paired")
    differences = first - second
    difference = float(differences.mean())
    means = _resampled_means(differences, num_samples, seed)
    low, high = _ends(means, level)
    # Sums in another order differ in their last bits: a hair of slack keeps equal values equal.
    extreme = np.abs(means - difference) >= abs(difference) - 1e-12
    return difference, low, high, float((1 + extreme.sum()) / (num_samples + 1))


def _expectation(gains: Floats, ranks: TargetRanks) -> Floats:
    """(N,) mean of `gains[rank - 1]` (zero beyond its end) over the ranks of the tie."""
    total = np.concatenate(([0.0], np.cumsum(gains)))
    first = np.minimum(ranks.num_better, len(gains))
    last = np.minimum(ranks.num_better + ranks.num_tied + 1, len(gains))
    mean: Floats = (total[last] - total[first]) / (ranks.num_tied + 1)
    return mean


def _per_user(values: npt.ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"expected one value per user, got the shape {array.shape}")
    return array


def _resampled_means(values: Floats, num_samples: int, seed: int) -> Floats:
    """(B,) means of resampled users, in blocks that bound the memory."""
    generator = np.random.default_rng(seed)
    block = max(1, 4_000_000 // len(values))
    means = [
        values[generator.integers(0, len(values), (min(block, num_samples - start), len(values)))]
        .mean(axis=1)
        for start in range(0, num_samples, block)
    ]  # fmt: skip
    return np.concatenate(means)


def _ends(means: Floats, level: float) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
