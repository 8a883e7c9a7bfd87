"""Recommenders that need no language model: popularity, and what all baselines share.

Every baseline has `scores(histories) -> (N, I)`, higher is better; histories are not masked. An
item without any training interaction, where a baseline knows nothing else of it, ties with all such
items below every other.

Letters: N users, I items.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from rc_ray.core.metrics import ndcg, rank_targets

Scores = npt.NDArray[np.float32]
Case = tuple[Sequence[int], int]
"""A history and the item that came next."""

SCORES_PER_BLOCK = 20_000_000
"""Users times items that are ranked at a time."""


class Recommender(Protocol):
    """What every baseline can do."""

    def scores(self, histories: Sequence[Sequence[int]]) -> Scores:
        """(N, I), higher is better."""


class Popularity:
    """The same list for everybody, by training interactions.

    Args:
        num_train: (I,) training interactions of each item.
    """

    def __init__(self, num_train: npt.NDArray[np.int64]) -> None:
        self._row = log_popularity(num_train).astype(np.float32)

    def scores(self, histories: Sequence[Sequence[int]]) -> Scores:
        """(N, I) log of the smoothed popularity; no training interaction is the lowest."""
        return np.tile(self._row, (len(histories), 1))


def log_popularity(num_train: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Log of add-one smoothed popularity, `log((n_i + 1) / (sum_j n_j + I))`; sums to 1.

    Args:
        num_train: (I,) training interactions of each item, or weighted clicks.

    Returns:
        (I,) nats; a cold item gets the smallest value, never minus infinity.
    """
    smoothed = np.asarray(num_train, dtype=np.float64) + 1.0
    shares: npt.NDArray[np.float64] = np.log(smoothed) - np.log(smoothed.sum())
    return shares


def catalogue_ndcg(
    scores: Callable[[Sequence[Sequence[int]]], Scores],
    cases: Sequence[Case],
    num_items: int,
    k: int = 10,
) -> float:
    """Mean NDCG@k of the next items among the whole catalogue, the history left out.

    Args:
        scores: histories -> (n, I).
        cases: N histories with their next items, N >= 1.
        num_items: I.
        k: cut-off.
    """
    size = max(1, SCORES_PER_BLOCK // num_items)
    values = []
    for start in range(0, len(cases), size):
        block = cases[start : start + size]
        table = scores([history for history, _ in block])
        excluded = np.zeros(table.shape, dtype=bool)
        for row, (history, target) in enumerate(block):
            excluded[row, list(history)] = True
            excluded[row, target] = False
        values.append(ndcg(rank_targets(table, [target for _, target in block], excluded), k))
    return float(np.concatenate(values).mean())


def valid_sample(cases: Sequence[Case], num: int, seed: int = 0) -> list[Case]:
    """At most `num` of the cases, a seeded sample in their order."""
    if num >= len(cases):
        return list(cases)
    chosen = np.random.default_rng(seed).choice(len(cases), num, replace=False)
    return [cases[i] for i in np.sort(chosen)]
