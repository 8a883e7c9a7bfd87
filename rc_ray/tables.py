"""Ranks of all systems -> the tables of `evaluate/`: means with intervals, pairs, probes, costs.

Letters: N users, C candidates, I items, K items shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rc_ray.comparison import DomainScores
from rc_ray.config import Experiment
from rc_ray.core.beyond_accuracy import (
    category_kl,
    coverage,
    expected_calibration_error,
    popularity_percentile,
)
from rc_ray.core.bootstrap import Comparison, bootstrap_interval, compare_systems
from rc_ray.core.domains import Domain, RankingCase
from rc_ray.core.metrics import TargetRanks, metric_values
from rc_ray.requests import CATALOGUE, MAIN, list_slices, target_positions
from rc_ray.results import RAW_SUFFIX
from rc_ray.shards import NUM_SHOWN
from rc_ray.systems import System

_WITHOUT_PROBABILITIES: tuple[System, ...] = ("popularity", "item_knn", "title_embedding")
"""Systems whose scores are not meant as log probabilities; those of all others are, up to a
constant."""

Floats = npt.NDArray[np.floating[Any]]
Values = dict[str, dict[str, Floats]]
"""Metric -> system -> (N,) one value per user."""

_WHERE = [("domain", pa.string()), ("split", pa.string()), ("candidates", pa.string())]
_DIFFERENCE = [
    ("difference", pa.float64()),
    ("ci_low", pa.float64()),
    ("ci_high", pa.float64()),
    ("p_value", pa.float64()),
    ("p_adjusted", pa.float64()),
    ("num_users", pa.int64()),
]
_RESULTS = pa.schema(
    [
        *_WHERE,
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
        *_WHERE,
        ("metric", pa.string()),
        ("system_a", pa.string()),
        ("system_b", pa.string()),
        *_DIFFERENCE,
    ]
)
_RANKS = pa.schema(
    [
        *_WHERE,
        ("system", pa.string()),
        ("user_id", pa.string()),
        ("rank", pa.float32()),
        ("rank_raw", pa.float32()),
    ]
)


@dataclass(frozen=True)
class Tables:
    """What `evaluate/` holds beside `probes.parquet`."""

    results: pa.Table
    differences: pa.Table
    ranks: pa.Table
    calibration: dict[str, dict[str, dict[str, Any]]]
    costs: list[dict[str, Any]]


def compare(domains: Sequence[DomainScores], experiment: Experiment) -> Tables:
    """Means with bootstrap intervals, every pair of systems, every user's rank.

    Args:
        domains: all domains.
        experiment: cut-offs, number of bootstrap samples and the seed of the resampling.
    """
    results: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    ranks: list[pa.Table] = []
    for domain in domains:
        for split, name, cases in _lists(domain):
            where = {"domain": domain.domain.name, "split": split, "candidates": name}
            settings = experiment.evaluate
            values = metric_table(domain, split, name, settings.ks)
            found = compare_systems(values, settings.num_bootstrap, experiment.seed)
            about = {**where, "num_users": len(cases), "seed": experiment.seed}
            about["num_candidates"] = _num_candidates(domain, name, cases)
            rows = [
                *_means(about, found),
                *_raw(about, domain, experiment),
                *_beyond(about, domain, cases),
            ]
            pairs = list(pair_rows({**where, "num_users": len(cases)}, found))
            results += [*rows, *_of_aliases(rows, domain)]
            differences += [*pairs, *_pairs_of_aliases(pairs, domain)]
            ranks.append(_ranks(where, domain, cases))
    return Tables(
        results=pa.Table.from_pylist(results, schema=_RESULTS),
        differences=pa.Table.from_pylist(differences, schema=_DIFFERENCES),
        ranks=pa.concat_tables(ranks) if ranks else _RANKS.empty_table(),
        calibration={domain.domain.name: _calibration(domain) for domain in domains},
        costs=[
            {"domain": domain.domain.name, "system": name, **cost}
            for domain in domains
            for name, system in domain.systems.items()
            for cost in system.costs
        ],
    )


def metric_table(domain: DomainScores, split: str, name: str, ks: Sequence[int]) -> Values:
    """Every metric of every system on one list; of several seeds, each user's mean."""
    table: Values = {}
    for system, scores in domain.systems.items():
        for metric, values in per_user(scores.ranks[split, name], ks).items():
            table.setdefault(metric, {})[system] = values
    return table


def per_user(ranks: Sequence[TargetRanks], ks: Sequence[int]) -> dict[str, Floats]:
    """Metric -> (N,), the mean over the seeds."""
    seeds = [metric_values(one, ks) for one in ranks]
    return {metric: np.mean([one[metric] for one in seeds], axis=0) for metric in seeds[0]}


def pair_rows(
    where: Mapping[str, Any], found: Mapping[str, Comparison]
) -> Iterator[dict[str, Any]]:
    """Both ways round of every pair of systems, p-values corrected within the metric."""
    for metric, comparison in found.items():
        for pair in comparison.pairs:
            own = {"p_value": pair.p_value, "p_adjusted": pair.p_adjusted, "metric": metric}
            yield {
                **where,
                **own,
                "system_a": pair.a,
                "system_b": pair.b,
                "difference": pair.difference,
                "ci_low": pair.low,
                "ci_high": pair.high,
            }
            yield {
                **where,
                **own,
                "system_a": pair.b,
                "system_b": pair.a,
                "difference": -pair.difference,
                "ci_low": -pair.high,
                "ci_high": -pair.low,
            }


def _of_aliases(rows: Sequence[dict[str, Any]], domain: DomainScores) -> Iterator[dict[str, Any]]:
    """The rows of a system once more under each of its other names."""
    for alias, system in domain.aliases.items():
        for row in rows:
            if row["system"].removesuffix(RAW_SUFFIX) == system:
                yield {**row, "system": row["system"].replace(system, alias, 1)}


def _pairs_of_aliases(
    pairs: Sequence[dict[str, Any]], domain: DomainScores
) -> Iterator[dict[str, Any]]:
    """The differences of a system under its other names: the same tests, so corrected as such."""
    same = {"difference": 0.0, "ci_low": 0.0, "ci_high": 0.0, "p_value": 1.0, "p_adjusted": 1.0}
    for alias, system in domain.aliases.items():
        told = set()
        for row in pairs:
            for own, other in (("system_a", "system_b"), ("system_b", "system_a")):
                if row[own] == system:
                    yield {**row, own: alias}
                    if row["metric"] not in told:
                        told.add(row["metric"])
                        yield {**row, **same, own: alias, other: system}
                        yield {**row, **same, own: system, other: alias}


def _lists(domain: DomainScores) -> Iterator[tuple[str, str, Sequence[RankingCase]]]:
    """Split, list of candidates and cases of everything that was ranked."""
    for split in domain.splits:
        for name in list_slices(domain.cases[split][0]):
            yield split, name, domain.cases[split]
        if domain.catalogue_cases.get(split):
            yield split, CATALOGUE, domain.catalogue_cases[split]


def _num_candidates(domain: DomainScores, name: str, cases: Sequence[RankingCase]) -> int:
    if name == CATALOGUE:
        return len(domain.domain.item_ids)
    place = list_slices(cases[0])[name]
    return int(place.stop - place.start)


def _means(about: Mapping[str, Any], found: Mapping[str, Comparison]) -> Iterator[dict[str, Any]]:
    for metric, comparison in found.items():
        for system, mean in comparison.means.items():
            yield {
                **about,
                "system": system,
                "metric": metric,
                "value": mean.value,
                "ci_low": mean.low,
                "ci_high": mean.high,
            }


def _raw(
    about: Mapping[str, Any], domain: DomainScores, experiment: Experiment
) -> Iterator[dict[str, Any]]:
    """Rows of what the likelihood alone would have ranked."""
    settings, split = experiment.evaluate, about["split"]
    raw = {
        system + RAW_SUFFIX: metric_values(scores.raw_ranks[split], settings.ks)
        for system, scores in domain.systems.items()
        if split in scores.raw_ranks and about["candidates"] == MAIN
    }
    for label, values in raw.items():
        for metric, one in values.items():
            low, high = bootstrap_interval(one, settings.num_bootstrap, experiment.seed)
            yield {
                **about,
                "system": label,
                "metric": metric,
                "value": float(one.mean()),
                "ci_low": low,
                "ci_high": high,
            }


def _beyond(
    about: Mapping[str, Any], domain: DomainScores, cases: Sequence[RankingCase]
) -> Iterator[dict[str, Any]]:
    """What accuracy does not tell; means over users and seeds, without intervals."""
    split, name = about["split"], about["candidates"]
    for system, scores in domain.systems.items():
        if name == CATALOGUE:
            found = [
                _of_shown(domain.domain, top[:, :NUM_SHOWN], cases) for top in scores.top[split]
            ]
        elif name == MAIN and system not in _WITHOUT_PROBABILITIES:
            place = list_slices(cases[0])[MAIN]
            found = [
                {"ECE": _calibration_error(one[:, place], cases)} for one in scores.final[split]
            ]
        else:
            continue
        for metric in found[0]:
            yield {
                **about,
                "system": system,
                "metric": metric,
                "value": float(np.mean([one[metric] for one in found])),
            }


def _of_shown(
    domain: Domain, top: npt.NDArray[np.int64], cases: Sequence[RankingCase]
) -> dict[str, float]:
    """Of the items on top of the catalogue, (N, K), -1 where there are fewer."""
    found = {
        f"coverage@{NUM_SHOWN}": coverage(top, len(domain.item_ids)),
        f"popularity@{NUM_SHOWN}": float(popularity_percentile(top, domain.num_train).mean()),
    }
    names = domain.categories
    if any(names):
        divergence = category_kl(
            [[names[item] for item in case.history] for case in cases],
            [[names[item] for item in row if item >= 0] for row in top],
        )
        known = divergence[np.isfinite(divergence)]
        if len(known):
            found[f"category_kl@{NUM_SHOWN}"] = float(known.mean())
    return found


def _calibration_error(scores: Floats, cases: Sequence[RankingCase]) -> float:
    shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares = shifted / shifted.sum(axis=1, keepdims=True)
    return expected_calibration_error(shares, target_positions(cases, MAIN))


def _ranks(
    where: Mapping[str, str], domain: DomainScores, cases: Sequence[RankingCase]
) -> pa.Table:
    split, name = where["split"], where["candidates"]
    users = [case.user_id for case in cases]
    parts = []
    for system, scores in domain.systems.items():
        rank = np.mean([one.expected for one in scores.ranks[split, name]], axis=0)
        raw = scores.raw_ranks.get(split) if name == MAIN else None
        columns = {
            **{key: [value] * len(users) for key, value in where.items()},
            "user_id": users,
            "rank": rank.astype(np.float32),
            "rank_raw": None if raw is None else raw.expected.astype(np.float32),
        }
        if raw is None:
            columns["rank_raw"] = pa.nulls(len(users), pa.float32())
        for shown in (system, *(one for one, own in domain.aliases.items() if own == system)):
            parts.append(pa.table({**columns, "system": [shown] * len(users)}, schema=_RANKS))
    return pa.concat_tables(parts)


def _calibration(domain: DomainScores) -> dict[str, dict[str, Any]]:
    chosen: dict[str, dict[str, Any]] = {}
    for name, scores in domain.systems.items():
        chosen[name] = {**scores.chosen, "valid_ndcg": scores.valid_ndcg}
        if scores.calibration is not None:
            chosen[name] |= {
                "alpha": scores.calibration.alpha,
                "gamma": scores.calibration.gamma,
                "prior_in_trie": scores.calibration.prior_in_trie,
            }
    for alias, system in domain.aliases.items():
        chosen[alias] = {**chosen[system], "is": system}
    return chosen
