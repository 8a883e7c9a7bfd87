"""Settings without clicks: shares by hand, and a world whose right setting is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rc_ray.core.calibration import group_shares, popularity_groups, prior_mismatch
from rc_ray.core.metrics import ndcg, rank_targets
from rc_ray.core.ranking import calibrated

NUM_ITEMS, NUM_TASTES, NUM_USERS, NUM_NEGATIVES = 60, 5, 6000, 9


def test_groups_hold_like_popularity_and_part_no_equals() -> None:
    assert popularity_groups(np.array([[0.0, 1.0], [3.0, 2.0]]), 2).tolist() == [[0, 0], [1, 1]]
    # Six candidates in three groups: 1 and 2 share the lowest, the four 5s stay together.
    tied = np.array([[5.0, 5.0, 5.0], [5.0, 1.0, 2.0]])
    assert popularity_groups(tied, 3).tolist() == [[1, 1, 1], [1, 0, 0]]
    assert popularity_groups(np.zeros((2, 3)), 4).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_shares_and_mismatch_worked_by_hand() -> None:
    groups = np.array([[0, 1], [1, 0]])
    scores = np.log(np.array([[0.2, 0.8], [0.5, 0.5]])) + np.array([[7.0], [-900.0]])
    assert group_shares(scores, groups) == pytest.approx([0.35, 0.65])
    expected = np.zeros((2, 2))
    wanted = 0.5 * np.log(0.5 / 0.35) + 0.5 * np.log(0.5 / 0.65)
    assert prior_mismatch(scores, expected, groups) == pytest.approx(wanted)
    assert prior_mismatch(scores + 3.0, scores, groups) == 0.0
    assert np.isfinite(prior_mismatch(np.array([[0.0, -np.inf]] * 2), expected, groups))
    for odd in (np.nan, np.inf):  # what is no prediction is not the log's
        with np.errstate(invalid="ignore"):
            assert prior_mismatch(np.array([[0.0, odd]] * 2), expected, groups) == np.inf


class World:
    """Next items by Bayes: an item by its prior, then the user's taste by the item.

    A model that knows the tastes but has a prior of its own says `own(i) p(taste | i)`. Taking
    its own prior off (alpha 1) and adding the right one (gamma 1) gives the truth.
    """

    def __init__(self, power: float) -> None:
        rng = np.random.default_rng(3)
        self.log_prior = np.log(rng.dirichlet(np.full(NUM_ITEMS, 0.4)) + 1e-4)
        self.log_prior -= np.log(np.exp(self.log_prior).sum())
        self.own = 1.5 * rng.normal(size=NUM_ITEMS)
        tastes = rng.dirichlet(np.full(NUM_TASTES, 0.3), size=NUM_ITEMS)
        draw = np.exp(power * self.log_prior)
        self.items = np.zeros((NUM_USERS, NUM_NEGATIVES + 1), dtype=int)
        taste = np.zeros(NUM_USERS, dtype=int)
        targets = rng.choice(NUM_ITEMS, NUM_USERS, p=np.exp(self.log_prior))
        for user, target in enumerate(targets):
            chances = draw.copy()
            chances[target] = 0.0
            negatives = rng.choice(NUM_ITEMS, NUM_NEGATIVES, False, chances / chances.sum())
            self.items[user] = [target, *negatives]
            taste[user] = rng.choice(NUM_TASTES, p=tastes[target])
        self.likelihood = self.own[self.items] + np.log(tastes[self.items, taste[:, None]] + 1e-6)
        self.power = power

    def score(self, alpha: float, gamma: float) -> np.ndarray:
        return calibrated(
            self.likelihood,
            self.own[self.items],
            self.log_prior[self.items],
            alpha=alpha,
            gamma=gamma,
        )

    def mismatch(self, alpha: float, gamma: float) -> float:
        prior = self.log_prior[self.items]
        score = self.score(alpha, gamma)
        return prior_mismatch(score, (1 - self.power) * prior, popularity_groups(prior))

    def entropy(self, alpha: float, gamma: float, scale: float = 1.0) -> float:
        scores = scale * self.score(alpha, gamma)
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        return float(-(shares * np.log(np.maximum(shares, 1e-300))).sum(axis=1).mean())

    def log_loss(self, alpha: float, gamma: float) -> float:
        """Of the targets, which stand in column 0."""
        scores = self.score(alpha, gamma)
        return float(np.mean(np.log(np.exp(scores - scores[:, :1]).sum(axis=1))))


@pytest.mark.parametrize(("power", "right"), [(0.0, 1.0), (0.75, 0.25)])
def test_the_right_setting_is_found_without_a_click(power: float, right: float) -> None:
    """Also where popular negatives were drawn: what is left of the prior is prior / chance."""
    world = World(power)
    grid = list(itertools.product([0.0, 0.5, 1.0], [0.0, 0.25, 0.5, 1.0, 2.0]))
    values = [world.mismatch(*point) for point in grid]
    assert grid[int(np.argmin(values))] == (1.0, right)
    losses = [world.log_loss(*point) for point in grid]
    assert grid[int(np.argmin(losses))] == (1.0, right)


def test_entropy_alone_would_choose_the_loudest_prior() -> None:
    world = World(0.0)
    gammas = [0.0, 0.5, 1.0, 2.0, 4.0, 8.0]
    entropies = [world.entropy(1.0, gamma) for gamma in gammas]
    mismatches = [world.mismatch(1.0, gamma) for gamma in gammas]
    assert int(np.argmin(entropies)) == len(gammas) - 1
    assert gammas[int(np.argmin(mismatches))] == 1.0
    assert world.log_loss(1.0, 8.0) > 2 * world.log_loss(1.0, 1.0)
    # Any scores, right or wrong, look more certain when they are multiplied.
    scaled = [world.entropy(0.0, 0.0, scale) for scale in (1.0, 2.0, 4.0)]
    assert scaled == sorted(scaled, reverse=True)


def test_a_noisy_likelihood_wants_more_popularity_than_matching_gives() -> None:
    """The limit that docs/method.md tells: the likelihood's scale is not among the settings."""
    world = World(0.0)
    world.likelihood += 2.0 * np.random.default_rng(0).normal(size=world.likelihood.shape)
    gammas = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]
    matched = gammas[int(np.argmin([world.mismatch(1.0, gamma) for gamma in gammas]))]
    targets = np.zeros(NUM_USERS, dtype=int)
    qualities = [
        float(ndcg(rank_targets(world.score(1.0, gamma), targets), 10).mean()) for gamma in gammas
    ]
    assert matched < gammas[int(np.argmax(qualities))]
    assert qualities[gammas.index(matched)] > qualities[0]
