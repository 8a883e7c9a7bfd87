"""Behavioural probes: what happens to a system's ranking when one thing about the request changes.

Letters: N users, C candidates of the main list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rc_ray.comparison import DomainScores, SystemScores
from rc_ray.config import Experiment
from rc_ray.core.bootstrap import holm, paired_bootstrap
from rc_ray.core.domains import RankingCase
from rc_ray.core.metrics import TargetRanks, rank_targets
from rc_ray.evaluate_config import Probe
from rc_ray.requests import ASKED_PROBES, MAIN, list_slices, target_positions
from rc_ray.tables import per_user

SCHEMA = pa.schema(
    [
        ("domain", pa.string()),
        ("system", pa.string()),
        ("probe", pa.string()),
        ("metric", pa.string()),
        ("plain", pa.float64()),
        ("probed", pa.float64()),
        ("difference", pa.float64()),
        ("ci_low", pa.float64()),
        ("ci_high", pa.float64()),
        ("p_value", pa.float64()),
        ("p_adjusted", pa.float64()),
        ("num_users", pa.int64()),
        ("max_score_change", pa.float64()),
    ]
)

_Ranks = Sequence[TargetRanks]


def probe_table(domains: Sequence[DomainScores], experiment: Experiment) -> pa.Table:
    """Each system with and without the change, on the same warm test users and the main list.

    The p-values are corrected (Holm) over all systems and probes of a domain and metric.
    """
    rows: list[dict[str, Any]] = []
    for domain in domains:
        found = [
            row
            for probe in experiment.evaluate.probes
            for system, scores in domain.systems.items()
            for row in _rows(domain, system, scores, probe, experiment)
        ]
        for metric in dict.fromkeys(row["metric"] for row in found):
            same = [row for row in found if row["metric"] == metric]
            adjusted = holm([row["p_value"] for row in same])
            for row, p in zip(same, adjusted, strict=True):
                row["p_adjusted"] = p
        rows += found
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _rows(
    domain: DomainScores, system: str, scores: SystemScores, probe: Probe, experiment: Experiment
) -> Iterator[dict[str, Any]]:
    measured = _measured(domain, scores, probe, experiment)
    if measured is None:
        return
    plain, changed, change = measured
    settings = experiment.evaluate
    before, after = per_user(plain, settings.ks), per_user(changed, settings.ks)
    for metric in before:
        difference, low, high, p = paired_bootstrap(
            after[metric], before[metric], settings.num_bootstrap, experiment.seed
        )
        yield {
            "domain": domain.domain.name,
            "system": system,
            "probe": probe,
            "metric": metric,
            "plain": float(before[metric].mean()),
            "probed": float(after[metric].mean()),
            "difference": difference,
            "ci_low": low,
            "ci_high": high,
            "p_value": p,
            "num_users": len(before[metric]),
            "max_score_change": change,
        }


def _measured(
    domain: DomainScores, scores: SystemScores, probe: Probe, experiment: Experiment
) -> tuple[_Ranks, _Ranks, float | None] | None:
    """Ranks without and with the change, and by how much a score moved at most.

    None where the probe was not put to the system, or nobody was asked.
    """
    warm = domain.cases["warm"]
    if not warm:
        return None
    if probe == "popularity_negatives":
        name = experiment.popularity_list
        assert name is not None, "the experiment was validated"
        return scores.ranks["warm", MAIN], scores.ranks["warm", name], None
    assert probe in ASKED_PROBES
    if probe not in scores.final:
        return None
    cases = domain.cases[probe]
    place_of = {case.user_id: place for place, case in enumerate(warm)}
    rows = [place_of[case.user_id] for case in cases]
    main = list_slices(warm[0])[MAIN]
    plain = [one[rows, main] for one in scores.final["warm"]]
    changed = list(scores.final[probe])
    change = max(float(np.abs(a - b).max()) for a, b in zip(plain, changed, strict=True))
    return _ranks(plain, cases), _ranks(changed, cases), change


def _ranks(scores: Sequence[npt.NDArray[Any]], cases: Sequence[RankingCase]) -> _Ranks:
    return [rank_targets(one, target_positions(cases, MAIN)) for one in scores]
