"""Calibration chooses on validation users alone; tables hold hand-worked numbers."""

from __future__ import annotations

import numpy as np
import pytest

from rc_ray.comparison import calibrate
from rc_ray.config import EvaluateConfig
from rc_ray.core.domains import RankingCase
from rc_ray.shards import Calibration

TRAINED = (0.0, 0.0, False)
LOG_PRIOR = np.log(np.array([0.4, 0.3, 0.2, 0.1]))
CASES = {
    "valid": [
        RankingCase("u1", (0,), target=3, candidates=(0, 3)),
        RankingCase("u2", (0,), target=2, candidates=(2, 1)),
    ],
    "warm": [
        RankingCase("u1", (0,), target=1, candidates=(2, 1)),
        RankingCase("u2", (0,), target=3, candidates=(3, 0)),
    ],
    "cold": [],
}


def both(plain: list[list[float]], inside: list[list[float]]) -> np.ndarray:
    """(N, 2, C) from the likelihoods without and with the prior in the trie."""
    return np.stack([np.array(plain), np.array(inside)], axis=1)


def config(**settings: object) -> EvaluateConfig:
    return EvaluateConfig.model_validate({"num_bootstrap": 50, **settings})


def test_alpha_is_chosen_where_the_empty_history_misleads() -> None:
    """Items 0 and 1 are likely whatever the history: only alpha 1 ranks the clicks first."""
    empty = both([[-1.0, -1.0, -9.0, -9.0]], [[0.0] * 4])
    scores = {
        "empty": empty,
        "valid": both([[-2.0, -4.0], [-4.0, -2.0]], [[0.0, 0.0], [0.0, 0.0]]),
        "warm": both([[-9.0, -2.0], [-4.0, -2.0]], [[0.0, 0.0], [0.0, 0.0]]),
        "cold": np.zeros((0, 2, 1)),
    }
    chosen = calibrate(scores, CASES, LOG_PRIOR, config(alphas=[0.0, 1.0], gammas=[0.0]), TRAINED)
    assert chosen.calibration == Calibration(1.0, 0.0, False)
    assert chosen.valid_ndcg == pytest.approx(1.0)
    # warm u1: -9 + 9 = 0 against -2 + 1 = -1, missed; u2: -4 + 9 = 5 against -2 + 1, found.
    assert chosen.ranks["warm", "main"][0].expected.tolist() == [2.0, 1.0]
    assert chosen.raw_ranks["warm"].expected.tolist() == [1.0, 2.0]
    assert ("cold", "main") not in chosen.ranks


def test_the_prior_inside_the_trie_is_a_choice_like_the_others() -> None:
    scores = {
        "empty": np.zeros((1, 2, 4)),
        "valid": both([[-1.0, -2.0], [-2.0, -1.0]], [[-2.0, -1.0], [-1.0, -2.0]]),
        "warm": both([[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]),
        "cold": np.zeros((0, 2, 1)),
    }
    chosen = calibrate(scores, CASES, LOG_PRIOR, config(alphas=[0.0], gammas=[0.0]), TRAINED)
    assert chosen.calibration is not None
    assert chosen.calibration.prior_in_trie
    assert chosen.ranks["warm", "main"][0].expected.tolist() == [2.0, 2.0]
    assert chosen.raw_ranks["warm"].expected.tolist() == [1.0, 1.0]  # raw has no prior at all


def test_test_users_cannot_influence_the_choice() -> None:
    rng = np.random.default_rng(0)
    scores = {
        "empty": rng.normal(size=(1, 2, 4)),
        "valid": rng.normal(size=(2, 2, 2)),
        "warm": rng.normal(size=(2, 2, 2)),
        "cold": np.zeros((0, 2, 1)),
    }
    first = calibrate(scores, CASES, LOG_PRIOR, config(), TRAINED)
    for _ in range(20):
        other = calibrate(
            {**scores, "warm": rng.normal(size=(2, 2, 2))}, CASES, LOG_PRIOR, config(), TRAINED
        )
        assert other.calibration == first.calibration


@pytest.mark.parametrize("inside", [True, False])
def test_without_validation_users_the_likelihood_is_as_trained(inside: bool) -> None:
    scores = {
        "empty": np.zeros((1, 2, 4)),
        "valid": np.zeros((0, 2, 1)),
        "warm": both([[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]),
    }
    cases = {"valid": [], "warm": CASES["warm"]}
    settings = config(alphas=[0.5, 1.0], gammas=[2.0], prior_in_trie=[not inside])
    chosen = calibrate(scores, cases, LOG_PRIOR, settings, (0.0, 0.0, inside))
    assert chosen.calibration == Calibration(0.0, 0.0, inside)
    assert chosen.valid_ndcg is None
    assert chosen.ranks["warm", "main"][0].expected.tolist() == (
        [2.0, 2.0] if inside else [1.0, 1.0]
    )


def test_lists_are_ranked_apart_and_the_main_one_chooses() -> None:
    """The further list stands behind the main one in the scores and takes no part in the choice."""
    cases = {
        "valid": [RankingCase("u1", (0,), 3, (0, 3), {"more": (3, 1)})],
        "warm": [RankingCase("u1", (0,), 1, (2, 1), {"more": (1, 3, 0)})],
    }
    scores = {
        "empty": np.zeros((1, 2, 4)),
        # Without the prior the main list ranks the target first, the further list last.
        "valid": both([[-2.0, -1.0, -9.0, -1.0]], [[-1.0, -2.0, -1.0, -9.0]]),
        "warm": both([[-1.0, -2.0, -5.0, -4.0, -6.0]], [[0.0] * 5]),
    }
    found = calibrate(scores, cases, LOG_PRIOR, config(alphas=[0.0], gammas=[0.0]), TRAINED)
    assert found.calibration == Calibration(0.0, 0.0, False)
    assert found.ranks["warm", "main"][0].expected.tolist() == [2.0]
    assert found.ranks["warm", "more"][0].expected.tolist() == [2.0]
    assert found.final["warm"][0].shape == (1, 5)


def test_masked_titles_take_the_empty_scores_of_their_own_names() -> None:
    cases = {"warm": CASES["warm"], "masked_titles": CASES["warm"][:1]}
    scores = {
        "empty": both([[0.0, 0.0, 0.0, 0.0]], [[0.0] * 4]),
        "empty_masked": both([[0.0, -3.0, -1.0, 0.0]], [[0.0] * 4]),
        "warm": both([[-1.0, -2.0], [-1.0, -2.0]], [[0.0, 0.0], [0.0, 0.0]]),
        "masked_titles": both([[-1.0, -2.0]], [[0.0, 0.0]]),
    }
    found = calibrate(scores, cases, LOG_PRIOR, config(), (1.0, 0.0, False))
    # Items 2 and 1: -1 + 1 = 0 and -2 + 3 = 1 under their made-up names.
    assert found.final["masked_titles"][0].tolist() == [[0.0, 1.0]]
    assert ("masked_titles", "main") not in found.ranks
