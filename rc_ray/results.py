"""What an evaluation measured, read from its tables and checked on the way in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from rc_ray.errors import ArtifactError
from rc_ray.requests import CATALOGUE, MAIN
from rc_ray.systems import SYSTEMS

Outcome = Literal["beats", "ties", "loses"]

MIN_USERS = 20
"""With fewer no difference is called one."""
LEVEL = 0.05
"""Of the p-values, after correction."""
RAW_SUFFIX = " (raw)"
"""Marks the rows of a system whose likelihoods were not calibrated."""
BEYOND = ("coverage@10", "popularity@10", "category_kl@10", "ECE")
"""What is measured beside accuracy."""


@dataclass(frozen=True)
class Score:
    """A metric of one system on one split and list, with its bootstrap interval over users."""

    value: float
    low: float
    high: float
    num_users: int
    num_candidates: int


@dataclass(frozen=True)
class Difference:
    """System a minus system b over the same users, or a system with a probe minus without."""

    value: float
    low: float
    high: float
    num_users: int
    p_adjusted: float = 0.0
    """Corrected for the other comparisons of the same kind."""

    @property
    def is_told_by_too_few(self) -> bool:
        """Whether a bootstrap over so few users promises more than it can hold."""
        return self.num_users < MIN_USERS

    @property
    def outcome(self) -> Outcome:
        """`ties` unless the interval lacks 0, the corrected p is low and users are enough."""
        if self.is_told_by_too_few or self.p_adjusted >= LEVEL:
            return "ties"
        if self.low > 0:
            return "beats"
        return "loses" if self.high < 0 else "ties"

    def reversed(self) -> Difference:
        """System b minus system a."""
        return Difference(-self.value, -self.high, -self.low, self.num_users, self.p_adjusted)


@dataclass(frozen=True)
class Probed:
    """One system under one probe by one metric."""

    plain: float
    probed: float
    difference: Difference
    max_score_change: float | None


@dataclass(frozen=True)
class Results:
    """All scores, paired differences and probes of one run."""

    scores: Mapping[tuple[str, str, str, str, str], Score]
    """By (domain, split, list, system, metric); raw scores under `<system> (raw)`."""
    differences: Mapping[tuple[str, str, str, str, str, str], Difference]
    """By (domain, split, list, metric, system a, system b)."""
    probes: Mapping[tuple[str, str, str, str], Probed] = field(default_factory=dict)
    """By (domain, system, probe, metric)."""

    def score(
        self, domain: str, split: str, system: str, metric: str, candidates: str = MAIN
    ) -> Score | None:
        """One score, or None where it was not measured."""
        return self.scores.get((domain, split, candidates, system, metric))

    def difference(
        self, domain: str, split: str, metric: str, a: str, b: str, candidates: str = MAIN
    ) -> Difference | None:
        """A minus b, whichever way round it was stored, or None where it was not measured."""
        found = self.differences.get((domain, split, candidates, metric, a, b))
        if found is not None:
            return found
        found = self.differences.get((domain, split, candidates, metric, b, a))
        return found.reversed() if found is not None else None

    def domains(self) -> list[str]:
        """Scored domains in order of first appearance."""
        return list(dict.fromkeys(key[0] for key in self.scores))

    def systems(self, domain: str | None = None) -> list[str]:
        """Scored systems, of one domain or of all, in the order of reports."""
        return in_order(key[3] for key in self.scores if domain in (None, key[0]))

    def lists(self, domain: str) -> list[str]:
        """Lists of candidates: the main one first, the whole catalogue last."""
        found = dict.fromkeys(key[2] for key in self.scores if key[0] == domain)
        return sorted(found, key=lambda name: (name != MAIN, name == CATALOGUE))

    def metrics(self) -> list[str]:
        """Metrics of accuracy, in the order of first appearance."""
        return [m for m in dict.fromkeys(key[4] for key in self.scores) if m not in BEYOND]

    def deep_metric(self) -> str:
        """The NDCG with the highest cut-off up to 10; else the last metric there is."""
        names = self.metrics()
        fitting = [m for m in names if m.startswith("NDCG@") and int(m.partition("@")[2]) <= 10]
        return fitting[-1] if fitting else names[-1] if names else "HR@1"


def in_order(systems: Iterable[str]) -> list[str]:
    """Names of systems as reports order them, mixes before the cocktail; without raw ones."""
    found = dict.fromkeys(systems)
    mixes = [one for one in found if one not in SYSTEMS and not one.endswith(RAW_SUFFIX)]
    place = SYSTEMS.index("cocktail")
    return [one for one in (*SYSTEMS[:place], *mixes, *SYSTEMS[place:]) if one in found]


def read_results(evaluate_dir: Path) -> Results:
    """Scores, paired differences and probes of a finished evaluation.

    Raises:
        ArtifactError: a table is missing, damaged or lacks a column.
    """
    where = ("domain", "split", "candidates")
    wanted = (*where, "system", "metric", "value", "ci_low", "ci_high", "num_users")
    scores = {}
    for row in _rows(evaluate_dir / "results.parquet", (*wanted, "num_candidates")):
        key = (*(row[name] for name in where), row["system"], row["metric"])
        value = row["value"]
        scores[key] = Score(
            value=value,
            low=value if row["ci_low"] is None else row["ci_low"],
            high=value if row["ci_high"] is None else row["ci_high"],
            num_users=row["num_users"],
            num_candidates=row["num_candidates"],
        )
    pair = (*where, "metric", "system_a", "system_b")
    measured = ("difference", "ci_low", "ci_high", "num_users", "p_adjusted")
    differences = {
        tuple(row[name] for name in pair): _difference(row)
        for row in _rows(evaluate_dir / "differences.parquet", (*pair, *measured))
    }
    probes = {}
    path = evaluate_dir / "probes.parquet"
    if path.exists():
        of_probe = ("domain", "system", "probe", "metric")
        extra = ("plain", "probed", "max_score_change")
        for row in _rows(path, (*of_probe, *measured, *extra)):
            probes[tuple(row[name] for name in of_probe)] = Probed(
                plain=row["plain"],
                probed=row["probed"],
                difference=_difference(row),
                max_score_change=row["max_score_change"],
            )
    return Results(scores=scores, differences=differences, probes=probes)


def _difference(row: Mapping[str, Any]) -> Difference:
    return Difference(
        row["difference"], row["ci_low"], row["ci_high"], row["num_users"], row["p_adjusted"]
    )


def _rows(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing; run `rc-ray evaluate` first") from None
    except (pa.ArrowException, OSError):
        raise ArtifactError(f"{path}: damaged; run `rc-ray evaluate --force`") from None
    absent = [name for name in columns if name not in table.column_names]
    if absent:
        raise ArtifactError(
            f"{path}: lacks the column {', '.join(absent)}; run `rc-ray evaluate --force`"
        )
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows
