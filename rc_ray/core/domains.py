"""Prepared domains on disk and in memory: the form in which every stage meets the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rc_ray import artifacts
from rc_ray.core.baselines import log_popularity
from rc_ray.core.cleaning import CleanDomain, clean
from rc_ray.core.sources import RawDomain
from rc_ray.core.splits import Group, Purpose, SplitDomain, Temperature, split
from rc_ray.data_config import DataConfig
from rc_ray.errors import ArtifactError

T = TypeVar("T")

_INDICES = pa.list_(pa.int32())
_ITEMS = pa.schema(
    [
        ("item_id", pa.string()),
        ("title", pa.string()),
        ("category", pa.string()),
        ("num_train", pa.int64()),
        ("cold", pa.bool_()),
    ]
)
_TRAIN = pa.schema([("user_id", pa.string()), ("history", _INDICES), ("group", pa.string())])
_CASES = pa.schema(
    [
        ("user_id", pa.string()),
        ("history", _INDICES),
        ("target", pa.int32()),
        ("split", pa.string()),
        ("group", pa.string()),
    ]
)
_CANDIDATES = pa.schema(
    [
        ("user_id", pa.string()),
        ("purpose", pa.string()),
        ("split", pa.string()),
        ("candidates", _INDICES),
    ]
)


@dataclass(frozen=True)
class RankingCase:
    """One thing to rank; items are indices into the domain's catalogue."""

    user_id: str
    history: tuple[int, ...]
    """In time order, never holding a cold item."""
    target: int
    candidates: tuple[int, ...]
    """The target among frozen negatives, in an order that does not depend on it."""


@dataclass(frozen=True)
class Domain:
    """A prepared domain; I items, sorted by id."""

    name: str
    item_ids: tuple[str, ...]
    titles: tuple[str, ...]
    num_train: npt.NDArray[np.int64]
    """(I,) training interactions: popularity without the held-out ones."""
    cold: npt.NDArray[np.bool_]
    """(I,) items that no training history holds on purpose."""
    train: tuple[tuple[int, ...], ...]
    """Training histories in time order, one per user, none empty."""
    cases_by_kind: Mapping[tuple[Purpose, Temperature, Group], list[RankingCase]] = field(
        repr=False, default_factory=dict
    )

    def cases(
        self, purpose: Purpose, split: Temperature = "warm", group: Group = "scored"
    ) -> list[RankingCase]:
        """Cases in the order of user ids; empty where the domain has none of the kind."""
        return list(self.cases_by_kind.get((purpose, split, group), ()))

    def log_prior(self) -> npt.NDArray[np.float64]:
        """(I,) log of the smoothed training popularity, see `baselines.log_popularity`."""
        return log_popularity(self.num_train)


def prepare_domain(
    raw: RawDomain,
    folder: Path,
    config: DataConfig,
    seed: int,
    *,
    fingerprint_config: Mapping[str, Any],
    inputs: Mapping[str, str],
) -> dict[str, Any]:
    """Clean, split and write a domain; the folder appears whole or not at all.

    Args:
        raw: the tables of the source.
        folder: where the prepared domain goes.
        config: the data section.
        seed: the experiment's seed.
        fingerprint_config: settings that the manifest records.
        inputs: digests of the source files, recorded likewise.

    Returns:
        The manifest's metrics: the counts of every step and `candidates_sha256`.

    Raises:
        DomainError: too few users or items are left.
        LeakError: the split would leak.
    """
    domain = clean(raw, config, seed)
    result = split(domain, config, seed)
    with artifacts.replaced_dir(folder) as work:
        for name, table in _tables(domain, result).items():
            pq.write_table(table, work / f"{name}.parquet")
        metrics: dict[str, Any] = {
            **domain.counts,
            **result.counts,
            "candidates_sha256": artifacts.sha256_file(work / "candidates.parquet"),
        }
        artifacts.write_manifest(
            work,
            stage="prepare",
            config=fingerprint_config,
            seed=seed,
            inputs=inputs,
            metrics=metrics,
        )
    return metrics


def read_domain(folder: Path) -> Domain:
    """Read a prepared domain, checking every file against the manifest.

    Raises:
        ArtifactError: the domain is not prepared, or a file is missing or damaged.
    """
    outputs = _sealed_files(folder)
    tables = {}
    for name in ("items", "train", "valid", "test", "candidates"):
        path = folder / f"{name}.parquet"
        if not path.is_file():
            raise ArtifactError(f"{path}: missing; run `prepare` with --force")
        if artifacts.sha256_file(path) != outputs.get(path.name):
            raise ArtifactError(f"{path}: differs from its manifest; run `prepare` with --force")
        tables[name] = pq.read_table(path)
    items = tables["items"]
    return Domain(
        name=folder.name,
        item_ids=tuple(items["item_id"].to_pylist()),
        titles=tuple(items["title"].to_pylist()),
        num_train=items["num_train"].to_numpy(),
        cold=items["cold"].to_numpy(),
        train=tuple(tuple(history) for history in tables["train"]["history"].to_pylist()),
        cases_by_kind=_cases(tables),
    )


def sample(cases: Sequence[T], num: int | None, seed: int) -> list[T]:
    """A seeded subsample in the order of `cases`; all of them when `num` is null or too large."""
    if num is None or num >= len(cases):
        return list(cases)
    chosen = np.random.default_rng(seed).choice(len(cases), num, replace=False)
    return [cases[i] for i in np.sort(chosen)]


def _tables(domain: CleanDomain, result: SplitDomain) -> dict[str, pa.Table]:
    users, groups = domain.user_ids, result.groups
    seen = np.concatenate(result.train)
    tables = {
        "items": pa.table(
            {
                "item_id": domain.item_ids,
                "title": domain.titles,
                "category": domain.categories,
                "num_train": np.bincount(seen, minlength=len(domain.item_ids)),
                "cold": result.cold,
            },
            schema=_ITEMS,
        )
    }
    trained = [user for user, history in enumerate(result.train) if len(history)]
    tables["train"] = pa.table(
        {
            "user_id": [users[user] for user in trained],
            "history": [result.train[user] for user in trained],
            "group": [groups[user] for user in trained],
        },
        schema=_TRAIN,
    )
    for purpose in ("valid", "test"):
        cases = [case for case in result.cases if case.purpose == purpose]
        tables[purpose] = pa.table(
            {
                "user_id": [users[case.user] for case in cases],
                "history": [case.history for case in cases],
                "target": [case.target for case in cases],
                "split": [case.split for case in cases],
                "group": [groups[case.user] for case in cases],
            },
            schema=_CASES,
        )
    tables["candidates"] = pa.table(
        {
            "user_id": [users[case.user] for case in result.cases],
            "purpose": [case.purpose for case in result.cases],
            "split": [case.split for case in result.cases],
            "candidates": [case.candidates for case in result.cases],
        },
        schema=_CANDIDATES,
    )
    return tables


def _cases(
    tables: Mapping[str, pa.Table],
) -> dict[tuple[Purpose, Temperature, Group], list[RankingCase]]:
    candidates = {
        (row["user_id"], row["purpose"], row["split"]): tuple(row["candidates"])
        for row in tables["candidates"].to_pylist()
    }
    cases: dict[tuple[Purpose, Temperature, Group], list[RankingCase]] = {}
    purposes: tuple[Purpose, ...] = ("valid", "test")
    for purpose in purposes:
        for row in tables[purpose].to_pylist():
            cases.setdefault((purpose, row["split"], row["group"]), []).append(
                RankingCase(
                    user_id=row["user_id"],
                    history=tuple(row["history"]),
                    target=row["target"],
                    candidates=candidates[row["user_id"], purpose, row["split"]],
                )
            )
    return cases


def _sealed_files(folder: Path) -> dict[str, str]:
    if not (folder / artifacts.MANIFEST).is_file():
        raise ArtifactError(f"{folder}: this domain is not prepared yet; run `prepare` first")
    manifest = artifacts.read_json(folder / artifacts.MANIFEST)
    outputs = manifest.get("outputs") if isinstance(manifest, dict) else None
    if not isinstance(outputs, dict):
        raise ArtifactError(f"{folder / artifacts.MANIFEST}: damaged; run `prepare` with --force")
    return outputs
