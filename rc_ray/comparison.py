"""Scores -> calibrated ranks, metrics with intervals, and paired differences between systems.

Letters: N users, C candidates, I items.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rc_ray.config import EvaluateConfig, System
from rc_ray.core.domains import RankingCase
from rc_ray.core.metrics import (
    TargetRanks,
    bootstrap_interval,
    metric_values,
    ndcg,
    paired_bootstrap,
    rank_targets,
)
from rc_ray.core.ranking import WITH_PRIOR, calibrated

RAW_SUFFIX = " (raw)"
"""Marks the rows of a system whose likelihoods were not calibrated."""
COMPARED_METRICS = ("HR@1", "NDCG@5")
_RESULTS = pa.schema(
    [
        ("domain", pa.string()),
        ("split", pa.string()),
        ("system", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("ci_low", pa.float64()),
        ("ci_high", pa.float64()),
        ("num_users", pa.int64()),
        ("num_candidates", pa.int64()),
        ("seed", pa.int64()),
    ]
)
_DIFFERENCES = pa.schema(
    [
        ("domain", pa.string()),
        ("split", pa.string()),
        ("metric", pa.string()),
        ("system_a", pa.string()),
        ("system_b", pa.string()),
        ("difference", pa.float64()),
        ("ci_low", pa.float64()),
        ("ci_high", pa.float64()),
        ("p_value", pa.float64()),
        ("num_users", pa.int64()),
    ]
)
_RANKS = pa.schema(
    [
        ("domain", pa.string()),
        ("split", pa.string()),
        ("system", pa.string()),
        ("user_id", pa.string()),
        ("rank", pa.float32()),
        ("rank_raw", pa.float32()),
    ]
)

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class SystemScores:
    """One system on one domain, by split."""

    ranks: Mapping[str, TargetRanks]
    """With the chosen alpha and gamma."""
    raw_ranks: Mapping[str, TargetRanks]
    alpha: float
    gamma: float
    prior_in_trie: bool
    valid_ndcg: float | None
    """Of the chosen setting on the validation users; None without any."""


@dataclass(frozen=True)
class DomainScores:
    """All systems on one domain."""

    name: str
    cases: Mapping[str, Sequence[RankingCase]]
    systems: Mapping[System, SystemScores]


@dataclass(frozen=True)
class Tables:
    """What `evaluate/` holds."""

    results: pa.Table
    differences: pa.Table
    ranks: pa.Table
    calibration: dict[str, dict[str, dict[str, float | bool | None]]]


def calibration(
    scores: Mapping[str, Floats],
    cases: Mapping[str, Sequence[RankingCase]],
    log_prior: Floats,
    config: EvaluateConfig,
    default: tuple[float, float, bool],
) -> SystemScores:
    """Choose the score's settings by NDCG over the validation users' whole lists, then rank.

    Args:
        scores: (1, 2, I) under `empty`, (N, 2, C) by split.
        cases: by split, in the order of the scores.
        log_prior: (I,).
        config: the values to choose from; the first point of the grid wins a tie.
        default: (alpha, gamma, prior in the trie) where no validation user can choose.
    """
    parts = {
        split: (scores[split], *_aligned(found, scores["empty"][0], log_prior))
        for split, found in cases.items()
        if found
    }
    targets = {split: _targets(found) for split, found in cases.items() if found}

    def rank(split: str, alpha: float, gamma: float, inside: bool) -> TargetRanks:
        likelihood, empty, prior = parts[split]
        row = WITH_PRIOR if inside else 0
        final = calibrated(likelihood[:, row], empty[:, row], prior, alpha=alpha, gamma=gamma)
        return rank_targets(final, targets[split])

    grid = list(itertools.product(config.alphas, config.gammas, config.prior_in_trie))
    best: tuple[float, float, bool] = default
    quality = None
    if "valid" in parts:
        num_candidates = parts["valid"][0].shape[-1]
        values = [float(ndcg(rank("valid", *point), num_candidates).mean()) for point in grid]
        quality = max(values)
        best = grid[values.index(quality)]
    tests = [split for split in parts if split != "valid"]
    alpha, gamma, inside = best
    return SystemScores(
        ranks={split: rank(split, alpha, gamma, inside) for split in tests},
        raw_ranks={split: rank(split, 0.0, 0.0, False) for split in tests},
        alpha=alpha,
        gamma=gamma,
        prior_in_trie=inside,
        valid_ndcg=quality,
    )


def popularity(cases: Mapping[str, Sequence[RankingCase]], log_prior: Floats) -> SystemScores:
    """The prior alone: nothing to calibrate."""
    ranks = {
        split: rank_targets(
            np.stack([log_prior[list(case.candidates)] for case in found]), _targets(found)
        )
        for split, found in cases.items()
        if found
    }
    valid = ranks.pop("valid", None)
    quality = None
    if valid is not None:
        quality = float(ndcg(valid, len(cases["valid"][0].candidates)).mean())
    return SystemScores(ranks, ranks, alpha=0.0, gamma=1.0, prior_in_trie=False, valid_ndcg=quality)


def compare(domains: Sequence[DomainScores], config: EvaluateConfig, seed: int) -> Tables:
    """Means with bootstrap intervals, every pair of systems, every user's rank.

    Args:
        domains: all domains.
        config: number of bootstrap samples.
        seed: of the resampling; recorded in the results.
    """
    results: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    ranks: list[dict[str, Any]] = []
    chosen: dict[str, dict[str, dict[str, float | bool | None]]] = {}
    for domain in domains:
        chosen[domain.name] = {
            name: {
                "alpha": s.alpha,
                "gamma": s.gamma,
                "prior_in_trie": s.prior_in_trie,
                "valid_ndcg": s.valid_ndcg,
            }
            for name, s in domain.systems.items()
        }
        for split, cases in domain.cases.items():
            if split == "valid" or not cases:
                continue
            where = {"domain": domain.name, "split": split}
            final: dict[str, dict[str, Floats]] = {}
            for name, system in domain.systems.items():
                final[name] = dict(metric_values(system.ranks[split]))
                raw = metric_values(system.raw_ranks[split])
                for label, values in ((name, final[name]), (name + RAW_SUFFIX, raw)):
                    results += _rows(where, label, values, cases, config, seed)
                expected = system.ranks[split].expected
                expected_raw = system.raw_ranks[split].expected
                for case, rank, rank_raw in zip(cases, expected, expected_raw, strict=True):
                    user = {"system": name, "user_id": case.user_id}
                    ranks.append({**where, **user, "rank": rank, "rank_raw": rank_raw})
            differences += _pairs(where, final, config, seed)
    return Tables(
        results=pa.Table.from_pylist(results, schema=_RESULTS),
        differences=pa.Table.from_pylist(differences, schema=_DIFFERENCES),
        ranks=pa.Table.from_pylist(ranks, schema=_RANKS),
        calibration=chosen,
    )


def _rows(
    where: dict[str, str],
    label: str,
    values: Mapping[str, Floats],
    cases: Sequence[RankingCase],
    config: EvaluateConfig,
    seed: int,
) -> list[dict[str, Any]]:
    rows = []
    for metric, per_user in values.items():
        low, high = bootstrap_interval(per_user, config.num_bootstrap, seed)
        rows.append(
            {
                **where,
                "system": label,
                "metric": metric,
                "value": float(per_user.mean()),
                "ci_low": low,
                "ci_high": high,
                "num_users": len(per_user),
                "num_candidates": len(cases[0].candidates),
                "seed": seed,
            }
        )
    return rows


def _pairs(
    where: dict[str, str],
    values: Mapping[str, Mapping[str, Floats]],
    config: EvaluateConfig,
    seed: int,
) -> list[dict[str, Any]]:
    rows = []
    for metric in COMPARED_METRICS:
        for a, b in itertools.permutations(values, 2):
            first, second = values[a][metric], values[b][metric]
            difference, low, high, p = paired_bootstrap(first, second, config.num_bootstrap, seed)
            rows.append(
                {
                    **where,
                    "metric": metric,
                    "system_a": a,
                    "system_b": b,
                    "difference": difference,
                    "ci_low": low,
                    "ci_high": high,
                    "p_value": p,
                    "num_users": len(first),
                }
            )
    return rows


def _aligned(
    cases: Sequence[RankingCase], empty: Floats, log_prior: Floats
) -> tuple[Floats, Floats]:
    items = np.array([case.candidates for case in cases])  # (N, C)
    return empty[:, items].transpose(1, 0, 2), log_prior[items]  # (N, 2, C), (N, C)


def _targets(cases: Sequence[RankingCase]) -> list[int]:
    return [case.candidates.index(case.target) for case in cases]
