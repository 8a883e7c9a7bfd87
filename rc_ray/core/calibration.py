"""The score's settings without clicks: the predictions' popularity must be the log's.

A list of candidates holds the user's next item among negatives that do not depend on it. With
chances `q(i)` of drawing a negative and `p(i | h)` of the next item,

    P(i is the next one | list, h) = p(i | h) / q(i) / sum over j in the list of p(j | h) / q(j)

as in sampled softmax. Averaged over users, what the next items' popularity says is the same with
the domain's own prior in the place of `p(i | h)`: the training log tells how much of the
probability belongs to popular items and how much to rare ones, and no click is needed. A likelihood
that is tilted towards what a language model likes anyway, or that holds the prior twice, gives
another share. This is the matching of marginals by which label shift is corrected (Saerens et al.
2002; black-box shift estimation, arXiv 1802.03916), with the empty history as the content-free
input that says what a model likes anyway (contextual calibration, arXiv 2102.09690; CapCal, arXiv
2604.10150).

The entropy of the predictions would not do: adding `gamma * log prior` with a larger gamma makes
any prediction more certain in the end, whether it is right or not.

What is assumed: next items are as popular as the training log says, and the lists were drawn as the
settings say. Only the share of popularity is compared, so this finds a tilt along popularity and
nothing else.

Letters: N users, C candidates, I items, G groups of items.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Groups = npt.NDArray[np.int64]

NUM_GROUPS = 10


def popularity_groups(log_prior: npt.ArrayLike, num_groups: int = NUM_GROUPS) -> Groups:
    """Candidates in groups of like popularity, each with about as many candidates.

    Args:
        log_prior: (N, C) of the candidates.
        num_groups: at most so many; equally popular candidates are never parted.

    Returns:
        (N, C) numbers from 0, the least popular first, without gaps.
    """
    values = np.asarray(log_prior, dtype=np.float64)
    levels, level, counts = np.unique(values, return_inverse=True, return_counts=True)
    # A level goes where its middle candidate falls.
    middle = np.cumsum(counts) - counts / 2
    group = np.minimum((middle * num_groups / values.size).astype(np.int64), num_groups - 1)
    return np.unique(group, return_inverse=True)[1][level].reshape(values.shape)


def group_shares(scores: npt.ArrayLike, groups: Groups) -> Floats:
    """Mean share of the probability that each group gets.

    Args:
        scores: (N, C) log-probabilities up to a constant of each list.
        groups: (N, C)

    Returns:
        (G,) shares, which sum to 1.
    """
    values = np.asarray(scores, dtype=np.float64)
    chances = np.exp(values - values.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    return np.bincount(groups.ravel(), chances.ravel()) / len(values)


def prior_mismatch(scores: npt.ArrayLike, expected: npt.ArrayLike, groups: Groups) -> float:
    """How far the predictions' popularity is from the log's.

    Args:
        scores: (N, C) of the candidates under some setting.
        expected: (N, C) `log prior(i) - log q(i)` of the candidates, up to a constant.
        groups: (N, C) as `popularity_groups` gives them.

    Returns:
        Kullback-Leibler divergence of the predicted shares from the expected ones, in nats, >= 0;
        infinite where a score is NaN or plus infinity.
    """
    wanted, found = group_shares(expected, groups), group_shares(scores, groups)
    tiny = np.finfo(np.float64).tiny
    mismatch = float((wanted * np.log(wanted / np.maximum(found, tiny))).sum())
    return math.inf if math.isnan(mismatch) else max(0.0, mismatch)
