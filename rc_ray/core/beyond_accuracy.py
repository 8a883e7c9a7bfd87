"""What accuracy does not tell: how much of a catalogue is shown, how popular, how calibrated.

Letters: N users, K items shown, I items, C candidates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def coverage(top_items: npt.ArrayLike, num_items: int) -> float:
    """Share of the catalogue that anybody is shown (Herlocker et al., TOIS 2004).

    Args:
        top_items: (N, K) item indices, -1 where a list is shorter.
        num_items: I.
    """
    shown = np.unique(np.asarray(top_items, dtype=np.int64))
    return float((shown >= 0).sum() / num_items)


def popularity_percentile(top_items: npt.ArrayLike, num_train: npt.ArrayLike) -> Floats:
    """(N,) mean popularity percentile of what each user is shown, from 0 to 1.

    An item's percentile is the share of items with fewer training interactions plus half the share
    of those with as many (itself included), so that a random list has 0.5 on average.

    Args:
        top_items: (N, K) item indices, -1 where a list is shorter; a user without any gets NaN.
        num_train: (I,) training interactions.
    """
    items = np.asarray(top_items, dtype=np.int64)
    counts = np.asarray(num_train)
    ordered = np.sort(counts)
    below = np.searchsorted(ordered, counts, side="left")
    upto = np.searchsorted(ordered, counts, side="right")
    percentile = (below + upto) / (2.0 * len(counts))  # (I,)
    shown = items >= 0
    total = np.where(shown, percentile[items], 0.0).sum(axis=1)
    num = shown.sum(axis=1)
    mean: Floats = np.divide(total, num, out=np.full(len(items), np.nan), where=num > 0)
    return mean


def category_kl(
    history: Sequence[Sequence[str | None]],
    shown: Sequence[Sequence[str | None]],
    alpha: float = 0.01,
) -> Floats:
    """(N,) KL(p || q~) in nats of the categories a user chose from those that the user is shown.

    `p` and `q` are the shares of categories in the history and in the list, with equal weights, and
    `q~ = (1 - alpha) q + alpha p` keeps it finite (Steck, Calibrated Recommendations, RecSys 2018).
    0 is perfectly calibrated. Items without a category do not count.

    Args:
        history: categories of each user's history.
        shown: categories of each user's list.
        alpha: smoothing, above 0.

    Returns:
        NaN for a user without any known category in the history or in the list.
    """
    found = np.full(len(history), np.nan)
    for place, (chosen, listed) in enumerate(zip(history, shown, strict=True)):
        p = Counter(one for one in chosen if one is not None)
        q = Counter(one for one in listed if one is not None)
        if not p or not q:
            continue
        total_p, total_q = p.total(), q.total()
        found[place] = sum(
            share * np.log(share / ((1 - alpha) * q[name] / total_q + alpha * share))
            for name, share in ((name, num / total_p) for name, num in p.items())
        )
    return found


def expected_calibration_error(
    probabilities: npt.ArrayLike, targets: npt.ArrayLike, num_bins: int = 10
) -> float:
    """Mean gap between the stated probability of the first choice and how often it was right.

    Bins of equal width over the probability, weighted by their users (Guo et al., ICML 2017,
    equation 3). Where candidates share the highest probability the first choice is right with the
    target's share of the tie.

    Args:
        probabilities: (N, C), rows that sum to 1.
        targets: (N,) column of each row's target.
        num_bins: bins from 0 to 1.
    """
    shares = np.asarray(probabilities, dtype=np.float64)
    confidence = shares.max(axis=1)  # (N,)
    tied = shares == confidence[:, None]
    is_first = np.take_along_axis(tied, np.asarray(targets, dtype=np.int64)[:, None], axis=1)[:, 0]
    right = is_first / tied.sum(axis=1)
    bins = np.minimum((confidence * num_bins).astype(np.int64), num_bins - 1)
    gap = np.bincount(bins, confidence - right, minlength=num_bins)
    return float(np.abs(gap).sum() / len(shares))
