"""Ranking metrics under ties.

Letters: N users, C candidates. A target that ties with t other candidates
behind b better ones has its rank uniform on {b + 1, ..., b + t + 1}; every metric here is the
expectation over that draw, so a system gains nothing by giving equal scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


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


def rank_targets(
    scores: npt.ArrayLike, target_positions: npt.ArrayLike, excluded: npt.ArrayLike | None = None
) -> TargetRanks:
    """Rank each target among its candidates.

    Args:
        scores: (N, C), higher is better; minus infinity is allowed.
        target_positions: (N,) column of each row's target.
        excluded: (N, C) bool, columns that are no candidates of the row, e.g. its history in a
            ranking of the whole catalogue; never the target's.

    Raises:
        ValueError: a score is not a number, a target is excluded, or shapes do not fit.
    """
    table = np.asarray(scores, dtype=np.float64)
    positions = np.asarray(target_positions, dtype=np.int64)
    if table.ndim != 2 or positions.shape != table.shape[:1]:
        raise ValueError(f"scores {table.shape} and target positions {positions.shape} do not fit")
    # A comparison with NaN is false, so a broken model would rank every target first.
    if np.isnan(table).any():
        raise ValueError("a score is not a number")
    target = np.take_along_axis(table, positions[:, None], axis=1)  # (N, 1)
    better, tied = table > target, table == target
    if excluded is not None:
        free = ~np.asarray(excluded, dtype=bool)
        if not np.take_along_axis(free, positions[:, None], axis=1).all():
            raise ValueError("a target is excluded from its own ranking")
        better, tied = better & free, tied & free
    return TargetRanks(num_better=better.sum(axis=1), num_tied=tied.sum(axis=1) - 1)


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


def reciprocal_rank(ranks: TargetRanks, k: int | None = None) -> Floats:
    """(N,) E[1 / rank if rank <= k else 0]; its mean is MRR@k (Voorhees, TREC-8 1999).

    Without `k` every rank counts.
    """
    deepest = int((ranks.num_better + ranks.num_tied).max(initial=0)) + 1
    return _expectation(1.0 / np.arange(1, (deepest if k is None else k) + 1), ranks)


def metric_names(ks: Sequence[int]) -> tuple[str, ...]:
    """Metrics at these cut-offs, in the order of reports; at 1 all of them are the hit rate."""
    return tuple(
        f"{metric}@{k}" for k in ks for metric in (("HR",) if k == 1 else ("HR", "NDCG", "MRR"))
    )


def metric_values(ranks: TargetRanks, ks: Sequence[int]) -> dict[str, Floats]:
    """Metric name -> (N,) value of each user, for `metric_names`; the mean is what is reported."""
    functions = {"HR": hit_rate, "NDCG": ndcg, "MRR": reciprocal_rank}
    found = {}
    for name in metric_names(ks):
        metric, _, k = name.partition("@")
        found[name] = functions[metric](ranks, int(k))
    return found


def _expectation(gains: Floats, ranks: TargetRanks) -> Floats:
    """(N,) mean of `gains[rank - 1]` (zero beyond its end) over the ranks of the tie."""
    total = np.concatenate(([0.0], np.cumsum(gains)))
    first = np.minimum(ranks.num_better, len(gains))
    last = np.minimum(ranks.num_better + ranks.num_tied + 1, len(gains))
    mean: Floats = (total[last] - total[first]) / (ranks.num_tied + 1)
    return mean
