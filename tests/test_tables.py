"""The tables of an evaluation from scores whose metrics are worked by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rc_ray.comparison import DomainScores, SystemScores, calibrate, catalogue_ranks, list_ranks
from rc_ray.config import Experiment
from rc_ray.core.domains import RankingCase
from rc_ray.evaluate_config import EvaluateConfig
from rc_ray.probe_table import probe_table
from rc_ray.tables import compare

LOG_PRIOR = np.log(np.array([0.4, 0.3, 0.2, 0.1]))
CASES = {
    "valid": [],
    "warm": [
        RankingCase("u1", (0,), target=1, candidates=(2, 1)),
        RankingCase("u2", (1, 2), target=3, candidates=(3, 0)),
    ],
    "cold": [],
    "shuffled_history": [RankingCase("u2", (1, 2), target=3, candidates=(3, 0))],
}
DOMAIN = SimpleNamespace(
    name="films",
    item_ids=("a", "b", "c", "d"),
    num_train=np.array([9, 5, 5, 0]),
    categories=("war", "war", "love", None),
)


def experiment(**settings: Any) -> Experiment:
    return SimpleNamespace(  # type: ignore[return-value]
        seed=3,
        evaluate=EvaluateConfig.model_validate({"num_bootstrap": 50, "ks": [1, 5], **settings}),
        popularity_list=None,
    )


def llm() -> SystemScores:
    """Ranks both targets first; with the history shuffled, u2's last."""
    zeros = np.zeros((2, 2))
    scores = {
        "empty": np.zeros((1, 2, 4)),
        "warm": np.stack([np.array([[-2.0, -1.0], [-1.0, -2.0]]), zeros], axis=1),
        "shuffled_history": np.array([[[-3.0, -1.5], [0.0, 0.0]]]),
    }
    settings = EvaluateConfig(alphas=(0.0,), gammas=(0.0,), prior_in_trie=(False,))
    return calibrate(scores, CASES, LOG_PRIOR, settings, (0.0, 0.0, False))


def baseline() -> SystemScores:
    """Two seeds: the first finds u1's target only, the second both."""
    final = {
        "warm": (np.array([[0.0, 1.0], [0.0, 1.0]]), np.array([[0.0, 1.0], [1.0, 0.0]])),
    }
    tops = (np.array([[1, 2], [3, -1]]), np.array([[1, 3], [3, -1]]))
    catalogue = [
        {"num_better": np.array([0, 1]), "num_tied": np.array([0, 0])},
        {"num_better": np.array([0, 0]), "num_tied": np.array([0, 1])},
    ]
    return SystemScores(
        final=final,
        ranks={**list_ranks(final, CASES), **catalogue_ranks({"warm": catalogue})},
        top={"warm": tops},
        chosen={"step": 4},
        costs=({"what": "training", "seconds": 1.0},),
    )


def scores(**systems: SystemScores) -> DomainScores:
    return DomainScores(DOMAIN, CASES, {}, systems)  # type: ignore[arg-type]


def rows_of(table: Any, *keys: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    return {tuple(row[key] for key in keys): row for row in table.to_pylist()}


def test_means_pairs_and_ranks() -> None:
    tables = compare([scores(sasrec=baseline(), cocktail=llm())], experiment())
    rows = rows_of(tables.results, "split", "candidates", "system", "metric")
    second = 1 / np.log2(3)
    # Mean over the seeds first: u1 1 and 1, u2 0 and 1.
    assert rows["warm", "main", "sasrec", "HR@1"]["value"] == pytest.approx(0.75)
    assert rows["warm", "main", "sasrec", "NDCG@5"]["value"] == pytest.approx((3 + second) / 4)
    assert rows["warm", "main", "sasrec", "MRR@5"]["value"] == pytest.approx(3.5 / 4)
    first = rows["warm", "main", "cocktail", "HR@1"]
    assert (first["value"], first["ci_low"], first["ci_high"]) == (1.0, 1.0, 1.0)
    assert (first["num_users"], first["num_candidates"], first["seed"]) == (2, 2, 3)
    assert rows["warm", "main", "cocktail (raw)", "HR@1"]["value"] == 1.0
    assert not any(system == "sasrec (raw)" for _, _, system, _ in rows)
    # The cocktail is right twice at 1 / (1 + 1 / e): the gap is what is missing to 1.
    gap = rows["warm", "main", "cocktail", "ECE"]
    assert gap["value"] == pytest.approx(1 - 1 / (1 + np.exp(-1)))
    assert gap["ci_low"] is None
    pairs = rows_of(tables.differences, "system_a", "system_b", "metric")
    assert pairs["cocktail", "sasrec", "HR@1"]["difference"] == pytest.approx(0.25)
    back = pairs["sasrec", "cocktail", "HR@1"]
    assert back["difference"] == pytest.approx(-0.25)
    assert back["ci_high"] == -pairs["cocktail", "sasrec", "HR@1"]["ci_low"]
    assert back["p_adjusted"] == back["p_value"]  # one pair needs no correction
    ranks = rows_of(tables.ranks, "system", "user_id")
    assert ranks["sasrec", "u2"]["rank"] == 1.5
    assert ranks["sasrec", "u2"]["rank_raw"] is None
    assert ranks["cocktail", "u2"]["rank_raw"] == 1.0
    assert tables.calibration["films"]["sasrec"]["step"] == 4
    assert tables.calibration["films"]["cocktail"]["gamma"] == 0.0
    assert tables.costs == [
        {"domain": "films", "system": "sasrec", "what": "training", "seconds": 1.0}
    ]


def test_the_catalogue_has_metrics_of_its_own() -> None:
    found = DomainScores(
        DOMAIN,  # type: ignore[arg-type]
        CASES,
        {"warm": CASES["warm"]},
        {"sasrec": baseline()},
    )
    rows = rows_of(compare([found], experiment()).results, "candidates", "metric")
    catalogue = {metric: row for (name, metric), row in rows.items() if name == "catalogue"}
    assert catalogue["HR@1"]["num_candidates"] == 4
    # u1 first with both seeds; u2 second, then tied for the first place of two.
    assert catalogue["HR@1"]["value"] == pytest.approx((2 + 0.5) / 4)
    # Seeds: items 1 2 3 of 4, then 1 3.
    assert catalogue["coverage@10"]["value"] == pytest.approx((3 / 4 + 2 / 4) / 2)
    # Counts 9 5 5 0 have percentiles 7/8, 1/2, 1/2, 1/8.
    first, other = (1 / 2 + 1 / 8) / 2, ((1 / 2 + 1 / 8) / 2 + 1 / 8) / 2
    assert catalogue["popularity@10"]["value"] == pytest.approx((first + other) / 2)
    # u2 is shown nothing with a category. u1 chose war: with the first seed half of what is
    # shown, with the second all of it.
    expected = -np.log(0.99 * 0.5 + 0.01) / 2
    assert catalogue["category_kl@10"]["value"] == pytest.approx(expected)


def test_probes_compare_the_same_users() -> None:
    rows = rows_of(
        probe_table(
            [scores(cocktail=llm(), sasrec=baseline())], experiment(probes=["shuffled_history"])
        ),
        "system",
        "metric",
    )
    assert {system for system, _ in rows} == {"cocktail"}  # the other was not asked
    row = rows["cocktail", "HR@1"]
    # u2 alone: first before, second after.
    assert (row["plain"], row["probed"], row["difference"]) == (1.0, 0.0, -1.0)
    assert (row["ci_low"], row["ci_high"], row["num_users"]) == (-1.0, -1.0, 1)
    assert row["max_score_change"] == pytest.approx(2.0)
    assert rows["cocktail", "MRR@5"]["difference"] == pytest.approx(-0.5)
