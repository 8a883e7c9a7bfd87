"""Calibration chooses on validation users alone; tables hold hand-worked numbers."""

from __future__ import annotations

import numpy as np
import pytest

from rc_ray.comparison import DomainScores, calibration, compare, popularity
from rc_ray.config import EvaluateConfig
from rc_ray.core.domains import RankingCase

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
    chosen = calibration(scores, CASES, LOG_PRIOR, config(alphas=[0.0, 1.0], gammas=[0.0]), TRAINED)
    assert (chosen.alpha, chosen.gamma, chosen.prior_in_trie) == (1.0, 0.0, False)
    assert chosen.valid_ndcg == pytest.approx(1.0)
    # warm u1: -9 + 9 = 0 against -2 + 1 = -1, missed; u2: -4 + 9 = 5 against -2 + 1, found.
    assert chosen.ranks["warm"].expected.tolist() == [2.0, 1.0]
    assert chosen.raw_ranks["warm"].expected.tolist() == [1.0, 2.0]
    assert "cold" not in chosen.ranks


def test_the_prior_inside_the_trie_is_a_choice_like_the_others() -> None:
    scores = {
        "empty": np.zeros((1, 2, 4)),
        "valid": both([[-1.0, -2.0], [-2.0, -1.0]], [[-2.0, -1.0], [-1.0, -2.0]]),
        "warm": both([[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]),
        "cold": np.zeros((0, 2, 1)),
    }
    chosen = calibration(scores, CASES, LOG_PRIOR, config(alphas=[0.0], gammas=[0.0]), TRAINED)
    assert chosen.prior_in_trie
    assert chosen.ranks["warm"].expected.tolist() == [2.0, 2.0]
    assert chosen.raw_ranks["warm"].expected.tolist() == [1.0, 1.0]  # raw has no prior at all


def test_test_users_cannot_influence_the_choice() -> None:
    rng = np.random.default_rng(0)
    scores = {
        "empty": rng.normal(size=(1, 2, 4)),
        "valid": rng.normal(size=(2, 2, 2)),
        "warm": rng.normal(size=(2, 2, 2)),
        "cold": np.zeros((0, 2, 1)),
    }
    first = calibration(scores, CASES, LOG_PRIOR, config(), TRAINED)
    for _ in range(20):
        other = calibration(
            {**scores, "warm": rng.normal(size=(2, 2, 2))}, CASES, LOG_PRIOR, config(), TRAINED
        )
        assert (other.alpha, other.gamma, other.prior_in_trie) == (
            first.alpha,
            first.gamma,
            first.prior_in_trie,
        )


@pytest.mark.parametrize("inside", [True, False])
def test_without_validation_users_the_likelihood_is_as_trained(inside: bool) -> None:
    scores = {
        "empty": np.zeros((1, 2, 4)),
        "valid": np.zeros((0, 2, 1)),
        "warm": both([[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]),
    }
    cases = {"valid": [], "warm": CASES["warm"]}
    settings = config(alphas=[0.5, 1.0], gammas=[2.0], prior_in_trie=[not inside])
    chosen = calibration(scores, cases, LOG_PRIOR, settings, (0.0, 0.0, inside))
    assert (chosen.alpha, chosen.gamma, chosen.prior_in_trie) == (0.0, 0.0, inside)
    assert chosen.valid_ndcg is None
    assert chosen.ranks["warm"].expected.tolist() == ([2.0, 2.0] if inside else [1.0, 1.0])


def test_tables_worked_by_hand() -> None:
    empty = np.zeros((1, 2, 4))
    perfect = {
        "empty": empty,
        "valid": both([[-2.0, -1.0], [-1.0, -2.0]], [[0.0, 0.0], [0.0, 0.0]]),
        "warm": both([[-2.0, -1.0], [-1.0, -2.0]], [[0.0, 0.0], [0.0, 0.0]]),
        "cold": np.zeros((0, 2, 1)),
    }
    settings = config(alphas=[0.0], gammas=[0.0], prior_in_trie=[False])
    scores = DomainScores(
        "films",
        CASES,
        {
            "popularity": popularity(CASES, LOG_PRIOR),
            "cocktail": calibration(perfect, CASES, LOG_PRIOR, settings, TRAINED),
        },
    )
    tables = compare([scores], settings, seed=3)
    rows = {
        (row["system"], row["metric"]): row
        for row in tables.results.to_pylist()
        if row["split"] == "warm"
    }
    # Popularity: u1 prefers item 1 (hit), u2 prefers item 0 to item 3 (rank 2).
    assert rows["popularity", "HR@1"]["value"] == 0.5
    assert rows["popularity", "MRR"]["value"] == 0.75
    assert rows["popularity", "NDCG@5"]["value"] == pytest.approx((1 + 1 / np.log2(3)) / 2)
    assert rows["cocktail", "HR@1"]["value"] == 1.0
    assert rows["cocktail", "HR@1"]["ci_low"] == rows["cocktail", "HR@1"]["ci_high"] == 1.0
    assert rows["cocktail (raw)", "HR@1"]["value"] == 1.0
    assert rows["cocktail", "HR@1"]["num_users"] == 2
    assert rows["cocktail", "HR@1"]["num_candidates"] == 2
    assert rows["cocktail", "HR@1"]["seed"] == 3
    differences = {
        (row["system_a"], row["system_b"], row["metric"]): row
        for row in tables.differences.to_pylist()
    }
    assert differences["cocktail", "popularity", "HR@1"]["difference"] == 0.5
    assert differences["popularity", "cocktail", "HR@1"]["difference"] == -0.5
    ranks = {(r["system"], r["user_id"]): r["rank"] for r in tables.ranks.to_pylist()}
    assert ranks["popularity", "u2"] == 2.0
    assert tables.calibration["films"]["popularity"]["gamma"] == 1.0
