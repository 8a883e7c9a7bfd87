"""Calibration chooses on validation users alone; tables hold hand-worked numbers."""

from __future__ import annotations

import numpy as np
import pytest

from rc_ray.comparison import calibrate
from rc_ray.core.domains import RankingCase
from rc_ray.evaluate_config import EvaluateConfig
from rc_ray.score_settings import best_point, grid_values
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


def tilted() -> dict[str, np.ndarray]:
    """The model finds every item alike: without the prior each candidate gets one half."""
    return {
        "empty": np.zeros((1, 2, 4)),
        "valid": np.zeros((2, 2, 2)),
        "warm": np.zeros((2, 2, 2)),
        "cold": np.zeros((0, 2, 1)),
    }


def test_without_labels_the_share_of_popular_items_decides() -> None:
    """The lists hold items 0 and 3, of priors 0.4 and 0.1, and 2 and 1, of 0.2 and 0.3.

    Each item is a group of its own. Shares expected of items 0 to 3: 0.8, 0.6, 0.4 and 0.2, halved.
    Gamma 1 gives just these, gamma 0 a quarter each.
    """
    settings = config(
        alphas=[0.0],
        gammas=[0.0, 1.0],
        prior_in_trie=[False],
        calibration={"chosen_by": "unlabeled"},
    )
    values = grid_values(tilted(), CASES, LOG_PRIOR, settings)
    shares = np.array([0.4, 0.3, 0.2, 0.1])
    assert values == pytest.approx([-float((shares * np.log(shares / 0.25)).sum()), 0.0])
    chosen = calibrate(tilted(), CASES, LOG_PRIOR, settings, TRAINED)
    assert chosen.calibration == Calibration(0.0, 1.0, False)
    assert chosen.chosen["chosen_by"] == "unlabeled"
    assert chosen.chosen["prior_mismatch"] == pytest.approx(0.0)
    # Clicks say the opposite: item 3 of (0, 3) and item 2 of (2, 1) were chosen.
    clicks = config(alphas=[0.0], gammas=[0.0, 1.0], prior_in_trie=[False])
    by_clicks = calibrate(tilted(), CASES, LOG_PRIOR, clicks, TRAINED)
    assert by_clicks.calibration == Calibration(0.0, 0.0, False)
    assert by_clicks.chosen == {"chosen_by": "clicks", "scope": "domain"}


def test_without_labels_popular_negatives_are_reckoned_with() -> None:
    """Of a prior and a chance of prior ** 0.75 a quarter of the prior is left."""
    settings = config(
        alphas=[0.0],
        gammas=[1.0, 0.25],
        prior_in_trie=[False],
        calibration={"chosen_by": "unlabeled"},
    )
    for negatives, gamma in (("uniform", 1.0), ("popularity", 0.25)):
        chosen = calibrate(tilted(), CASES, LOG_PRIOR, settings, TRAINED, negatives=negatives)  # type: ignore[arg-type]
        assert chosen.calibration == Calibration(0.0, gamma, False)


def test_without_labels_no_target_is_looked_at() -> None:
    rng = np.random.default_rng(1)
    settings = config(calibration={"chosen_by": "unlabeled"})
    swapped = {
        **CASES,
        "valid": [
            RankingCase(
                case.user_id, case.history, sum(case.candidates) - case.target, case.candidates
            )
            for case in CASES["valid"]
        ],
    }
    by_clicks = set()
    for _ in range(20):
        scores = {
            **tilted(),
            "empty": rng.normal(size=(1, 2, 4)),
            "valid": rng.normal(size=(2, 2, 2)),
        }
        first = calibrate(scores, CASES, LOG_PRIOR, settings, TRAINED)
        second = calibrate(scores, swapped, LOG_PRIOR, settings, TRAINED)
        assert first.calibration == second.calibration
        assert first.valid_ndcg is not None
        by_clicks |= {
            calibrate(scores, cases, LOG_PRIOR, config(), TRAINED).calibration != first.calibration
            for cases in (CASES, swapped)
        }
    assert True in by_clicks


def test_a_fixed_setting_is_taken_with_and_without_validation_users() -> None:
    settings = config(
        calibration={"chosen_by": "fixed", "alpha": 0.3, "gamma": 0.7, "prior_in_trie": True}
    )
    for cases in (CASES, {**CASES, "valid": []}):
        found = calibrate(tilted(), cases, LOG_PRIOR, settings, TRAINED)
        assert found.calibration == Calibration(0.3, 0.7, True)
        assert found.chosen["chosen_by"] == "fixed"
    assert found.valid_ndcg is None


def test_one_setting_for_all_domains_is_the_best_on_average() -> None:
    """Domain one: .9, .8, .1; domain two: .1, .8, .9. Neither's own best is the best of both."""
    settings = config(alphas=[0.0], gammas=[0.0, 1.0, 2.0], prior_in_trie=[False])
    one, two = [0.9, 0.8, 0.1], [0.1, 0.8, 0.9]
    assert best_point(settings, one) == (0.0, 0.0, False)
    assert best_point(settings, two) == (0.0, 2.0, False)
    assert best_point(settings, one, two) == (0.0, 1.0, False)
    assert best_point(settings, [0.5, 0.5, 0.2]) == (0.0, 0.0, False)  # the first of a tie
    shared = (0.0, 1.0, False)
    found = calibrate(tilted(), CASES, LOG_PRIOR, settings, TRAINED, shared=shared)
    assert found.calibration == Calibration(*shared)
    # Item 3 is last of (0, 3) and item 2 last of (1, 2) under the prior.
    assert found.valid_ndcg == pytest.approx(1 / np.log2(3))
