"""Scores -> the calibrated ranks of one system, from the LLM or from a baseline.

Letters: N users, C candidates of all their lists, I items, K items shown.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from rc_ray.config import EvaluateConfig, System
from rc_ray.core.domains import Domain, RankingCase
from rc_ray.core.metrics import TargetRanks, ndcg, rank_targets
from rc_ray.core.ranking import WITH_PRIOR, calibrated
from rc_ray.requests import (
    ASKED_PROBES,
    CATALOGUE,
    MAIN,
    flat_candidates,
    list_slices,
    target_positions,
)
from rc_ray.shards import EMPTY, EMPTY_MASKED, Calibration

Floats = npt.NDArray[np.floating[Any]]
Cases = Mapping[str, Sequence[RankingCase]]


@dataclass(frozen=True)
class SystemScores:
    """One system on one domain; tuples hold one entry for each seed that it was trained with."""

    final: Mapping[str, tuple[Floats, ...]]
    """By split and by probe: (N, C) scores that rank, of all lists one after another."""
    ranks: Mapping[tuple[str, str], tuple[TargetRanks, ...]]
    """By (split, list of candidates), `CATALOGUE` among the lists."""
    raw_ranks: Mapping[str, TargetRanks] = field(default_factory=dict)
    """By split, of the main list under the likelihood alone; empty for a baseline."""
    top: Mapping[str, tuple[npt.NDArray[np.int64], ...]] = field(default_factory=dict)
    """By split: (N, K) items on top of the catalogue, -1 where there are fewer."""
    calibration: Calibration | None = None
    """None for a baseline."""
    chosen: Mapping[str, Any] = field(default_factory=dict)
    """What a baseline chose for itself on validation users."""
    valid_ndcg: float | None = None
    """Of the chosen setting on the validation users; None without any."""
    costs: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class DomainScores:
    """All systems on one domain."""

    domain: Domain
    cases: Cases
    """By split and by probe."""
    catalogue_cases: Cases
    """By split."""
    systems: Mapping[System, SystemScores]

    @property
    def splits(self) -> list[str]:
        """Test splits that have cases."""
        return [name for name, found in self.cases.items() if is_test_split(name) and found]


def is_test_split(name: str) -> bool:
    """Whether a key of the cases is a split of test users: neither validation nor a probe."""
    return name != "valid" and name not in ASKED_PROBES


def calibrate(
    scores: Mapping[str, Floats],
    cases: Cases,
    log_prior: Floats,
    config: EvaluateConfig,
    default: tuple[float, float, bool],
) -> SystemScores:
    """Choose the score's settings by NDCG over the validation users' main lists, then rank.

    Args:
        scores: (1, 2, I) under `empty` (and `empty_masked`), (N, 2, C) by split, (N, 2, C of main)
            by probe.
        cases: by split and by probe, in the order of the scores.
        log_prior: (I,).
        config: the values to choose from; the first point of the grid wins a tie.
        default: (alpha, gamma, prior in the trie) where no validation user can choose.
    """
    parts = {
        split: (scores[split], *_aligned(split, found, scores, log_prior))
        for split, found in cases.items()
        if found
    }

    def final(split: str, alpha: float, gamma: float, inside: bool) -> Floats:
        likelihood, empty, prior = parts[split]
        row = WITH_PRIOR if inside else 0
        return calibrated(likelihood[:, row], empty[:, row], prior, alpha=alpha, gamma=gamma)

    best, quality = default, None
    if "valid" in parts:
        grid = list(itertools.product(config.alphas, config.gammas, config.prior_in_trie))
        values = [valid_ndcg(final("valid", *point), cases["valid"]) for point in grid]
        quality = max(values)
        best = grid[values.index(quality)]
    found = {split: (final(split, *best),) for split in parts}
    raw = {
        split: _ranks(final(split, 0.0, 0.0, False), cases[split], MAIN)
        for split in parts
        if is_test_split(split)
    }
    return SystemScores(
        final=found,
        ranks=list_ranks(found, cases),
        raw_ranks=raw,
        calibration=Calibration(*best),
        valid_ndcg=quality,
    )


def list_ranks(
    final: Mapping[str, tuple[Floats, ...]], cases: Cases
) -> dict[tuple[str, str], tuple[TargetRanks, ...]]:
    """Where the targets stand, by test split and list of candidates."""
    return {
        (split, name): tuple(_ranks(one, cases[split], name) for one in scores)
        for split, scores in final.items()
        if is_test_split(split)
        for name in list_slices(cases[split][0])
    }


def valid_ndcg(scores: Floats, cases: Sequence[RankingCase]) -> float:
    """Mean NDCG over the whole main lists, (N, C) scores."""
    return float(ndcg(_ranks(scores, cases, MAIN), len(cases[0].candidates)).mean())


def catalogue_ranks(
    parts: Mapping[str, Sequence[Mapping[str, npt.NDArray[Any]]]],
) -> dict[tuple[str, str], tuple[TargetRanks, ...]]:
    """Ranks in the whole catalogue, from the `num_better` and `num_tied` of each seed by split."""
    return {
        (split, CATALOGUE): tuple(TargetRanks(p["num_better"], p["num_tied"]) for p in seeds)
        for split, seeds in parts.items()
    }


def _ranks(scores: Floats, cases: Sequence[RankingCase], name: str) -> TargetRanks:
    return rank_targets(scores[:, list_slices(cases[0])[name]], target_positions(cases, name))


def _aligned(
    split: str, cases: Sequence[RankingCase], scores: Mapping[str, Floats], log_prior: Floats
) -> tuple[Floats, Floats]:
    """Empty-history scores (N, 2, C) and prior (N, C) of the candidates, as they were scored."""
    if split in ASKED_PROBES:
        items = np.array([case.candidates for case in cases])
    else:
        items = np.array([flat_candidates(case) for case in cases])  # (N, C)
    empty = scores[EMPTY_MASKED if split == "masked_titles" else EMPTY][0]  # (2, I)
    return empty[:, items].transpose(1, 0, 2), log_prior[items]
