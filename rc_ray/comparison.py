"""Scores -> the calibrated ranks of one system, from the LLM or from a baseline.

Letters: N users, C candidates of all their lists, I items, K items shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from rc_ray.core.domains import Domain
from rc_ray.core.metrics import TargetRanks
from rc_ray.data_config import Negatives
from rc_ray.evaluate_config import EvaluateConfig
from rc_ray.requests import ASKED_PROBES, CATALOGUE, MAIN, list_slices
from rc_ray.score_settings import (
    Cases,
    Floats,
    Point,
    aligned,
    best_point,
    grid_values,
    mismatch,
    ranks_in,
    score_of,
    valid_ndcg,
)
from rc_ray.shards import Calibration
from rc_ray.systems import System


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
    """What a baseline chose for itself on validation users; else how the calibration was chosen."""
    valid_ndcg: float | None = None
    """Of the chosen setting on the validation users; None without any."""
    costs: tuple[Mapping[str, Any], ...] = ()
    dtypes: tuple[str, ...] = ()
    """Precisions of the base that the scores were computed in; empty where it had no part."""


@dataclass(frozen=True)
class DomainScores:
    """All systems on one domain."""

    domain: Domain
    cases: Cases
    """By split and by probe."""
    catalogue_cases: Cases
    """By split."""
    systems: Mapping[System, SystemScores]
    aliases: Mapping[System, System] = field(default_factory=dict)
    """Another name of a system -> the system: what a guard chose, under the name `guarded`."""

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
    default: Point,
    *,
    negatives: Negatives = "uniform",
    shared: Point | None = None,
) -> SystemScores:
    """Choose the score's settings on the validation users' main lists, then rank.

    Args:
        scores: (1, 2, I) under `empty` (and `empty_masked`), (N, 2, C) by split, (N, 2, C of main)
            by probe.
        cases: by split and by probe, in the order of the scores.
        log_prior: (I,).
        config: how to choose and the values to choose from; the first point of the grid wins a tie.
        default: (alpha, gamma, prior in the trie) where no validation user can choose.
        negatives: how those of the main list were drawn, for a choice without clicks.
        shared: what was chosen for all domains at once; it is taken as it is.
    """
    parts = {
        split: (scores[split], *aligned(split, found, scores, log_prior))
        for split, found in cases.items()
        if found
    }

    def final(split: str, point: Point) -> Floats:
        return score_of(*parts[split], point)

    settings = config.calibration
    best, chosen_by = default, "default"
    if settings.fixed is not None:
        best, chosen_by = settings.fixed, "fixed"
    elif shared is not None:
        best, chosen_by = shared, settings.chosen_by
    elif "valid" in parts:
        values = grid_values(scores, cases, log_prior, config, negatives)
        best, chosen_by = best_point(config, values), settings.chosen_by
    chosen: dict[str, Any] = {"chosen_by": chosen_by, "scope": settings.scope}
    quality = None
    if "valid" in parts:
        quality = valid_ndcg(final("valid", best), cases["valid"])
        if chosen_by == "unlabeled":
            chosen["prior_mismatch"] = mismatch(*parts["valid"], best, cases["valid"], negatives)
    found = {split: (final(split, best),) for split in parts}
    raw = {
        split: ranks_in(final(split, (0.0, 0.0, False)), cases[split], MAIN)
        for split in parts
        if is_test_split(split)
    }
    return SystemScores(
        final=found,
        ranks=list_ranks(found, cases),
        raw_ranks=raw,
        calibration=Calibration(*best),
        chosen=chosen,
        valid_ndcg=quality,
    )


def list_ranks(
    final: Mapping[str, tuple[Floats, ...]], cases: Cases
) -> dict[tuple[str, str], tuple[TargetRanks, ...]]:
    """Where the targets stand, by test split and list of candidates."""
    return {
        (split, name): tuple(ranks_in(one, cases[split], name) for one in scores)
        for split, scores in final.items()
        if is_test_split(split)
        for name in list_slices(cases[split][0])
    }


def catalogue_ranks(
    parts: Mapping[str, Sequence[Mapping[str, npt.NDArray[Any]]]],
) -> dict[tuple[str, str], tuple[TargetRanks, ...]]:
    """Ranks in the whole catalogue, from the `num_better` and `num_tied` of each seed by split."""
    return {
        (split, CATALOGUE): tuple(TargetRanks(p["num_better"], p["num_tied"]) for p in seeds)
        for split, seeds in parts.items()
    }
