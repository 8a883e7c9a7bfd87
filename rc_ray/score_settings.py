"""The score's alpha, gamma and prior in the trie: what there is to choose and how good each is.

Letters: N users, C candidates of all their lists, I items.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rc_ray.config import Experiment
from rc_ray.core.calibration import popularity_groups, prior_mismatch
from rc_ray.core.candidates import POPULARITY_POWER
from rc_ray.core.domains import Domain, RankingCase
from rc_ray.core.metrics import TargetRanks, ndcg, rank_targets
from rc_ray.core.ranking import WITH_PRIOR, calibrated
from rc_ray.data_config import Negatives
from rc_ray.evaluate_config import EvaluateConfig
from rc_ray.requests import ASKED_PROBES, MAIN, flat_candidates, list_slices, target_positions
from rc_ray.shards import EMPTY, EMPTY_MASKED, DomainRun, read_scores
from rc_ray.systems import System

Floats = npt.NDArray[np.floating[Any]]
Cases = Mapping[str, Sequence[RankingCase]]
Point = tuple[float, float, bool]
"""Alpha, gamma, prior in the trie."""


def grid(config: EvaluateConfig) -> list[Point]:
    """Every setting to choose from, in the order that decides ties."""
    return list(itertools.product(config.alphas, config.gammas, config.prior_in_trie))


def grid_values(
    scores: Mapping[str, Floats],
    cases: Cases,
    log_prior: Floats,
    config: EvaluateConfig,
    negatives: Negatives = "uniform",
) -> list[float]:
    """How good each setting of `grid` is on the validation users; higher is better.

    With `chosen_by: unlabeled` no target is looked at. Arguments as in `calibrate`.
    """
    valid = cases["valid"]
    parts = (scores["valid"], *aligned("valid", valid, scores, log_prior))
    if config.calibration.chosen_by == "unlabeled":
        return [-mismatch(*parts, point, valid, negatives) for point in grid(config)]
    return [valid_ndcg(score_of(*parts, point), valid) for point in grid(config)]


def best_point(config: EvaluateConfig, *values: Sequence[float]) -> Point:
    """The setting with the highest mean of the values, one list of `grid_values` per domain."""
    means = np.mean(values, axis=0)
    return grid(config)[int(np.argmax(means))]


def shared_points(
    experiment: Experiment, domains: Mapping[str, Domain], runs: Sequence[DomainRun]
) -> dict[System, Point]:
    """One setting of the score per system for all domains that have validation users.

    Empty where each domain has its own.
    """
    settings = experiment.evaluate
    if settings.calibration.scope != "global" or settings.calibration.fixed is not None:
        return {}
    values: dict[System, list[list[float]]] = {}
    for llm in runs:
        log_prior = domains[llm.domain].log_prior()
        for system in llm.systems if llm.cases["valid"] else ():
            scores = read_scores(llm, system).by_split
            found = grid_values(scores, llm.cases, log_prior, settings, experiment.data.negatives)
            values.setdefault(system.system, []).append(found)
    return {system: best_point(settings, *found) for system, found in values.items()}


def score_of(likelihood: Floats, empty: Floats, prior: Floats, point: Point) -> Floats:
    """(N, C) scores under one setting, from both likelihoods (N, 2, C) and the prior (N, C)."""
    alpha, gamma, inside = point
    row = WITH_PRIOR if inside else 0
    return calibrated(likelihood[:, row], empty[:, row], prior, alpha=alpha, gamma=gamma)


def mismatch(
    likelihood: Floats,
    empty: Floats,
    prior: Floats,
    point: Point,
    cases: Sequence[RankingCase],
    negatives: Negatives,
) -> float:
    """How far the popularity of the main lists' predictions is from the training log's, in nats."""
    place = list_slices(cases[0])[MAIN]
    own = prior[:, place]
    # log prior - log chance of a negative; the chance is a power of the smoothed clicks.
    expected = own * (1 - POPULARITY_POWER) if negatives == "popularity" else own
    scores = score_of(likelihood, empty, prior, point)[:, place]
    return prior_mismatch(scores, expected, popularity_groups(own))


def valid_ndcg(scores: Floats, cases: Sequence[RankingCase]) -> float:
    """Mean NDCG over the whole main lists, (N, C) scores."""
    return float(ndcg(ranks_in(scores, cases, MAIN), len(cases[0].candidates)).mean())


def ranks_in(scores: Floats, cases: Sequence[RankingCase], name: str) -> TargetRanks:
    """Where the targets stand in one list of candidates, (N, C) scores of all lists."""
    return rank_targets(scores[:, list_slices(cases[0])[name]], target_positions(cases, name))


def aligned(
    split: str, cases: Sequence[RankingCase], scores: Mapping[str, Floats], log_prior: Floats
) -> tuple[Floats, Floats]:
    """Empty-history scores (N, 2, C) and prior (N, C) of the candidates, as they were scored."""
    if split in ASKED_PROBES:
        items = np.array([case.candidates for case in cases])
    else:
        items = np.array([flat_candidates(case) for case in cases])  # (N, C)
    empty = scores[EMPTY_MASKED if split == "masked_titles" else EMPTY][0]  # (2, I)
    return empty[:, items].transpose(1, 0, 2), log_prior[items]
