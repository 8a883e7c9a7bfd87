"""Prepared domains in memory: the form in which every stage meets the data.

core/preparing.py writes what is read here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rc_ray import artifacts
from rc_ray.core.baselines import log_popularity
from rc_ray.core.domain_files import FILES, HELD_OUT_ELSEWHERE
from rc_ray.core.histories import Histories, Indices
from rc_ray.core.preparing import prepare_domain
from rc_ray.core.splits import PURPOSES, TEMPERATURES, Group, Purpose, Temperature
from rc_ray.data_config import MAIN_LIST
from rc_ray.errors import ArtifactError

__all__ = [
    "Domain",
    "Group",
    "Histories",
    "Purpose",
    "RankingCase",
    "Temperature",
    "prepare_domain",
    "read_domain",
    "sample",
]

T = TypeVar("T")
Kind = tuple[Purpose, Temperature, Group]
GROUPS: tuple[Group, ...] = ("scored", "unlabeled")


@dataclass(frozen=True)
class RankingCase:
    """One thing to rank; items are indices into the domain's catalogue."""

    user_id: str
    history: tuple[int, ...]
    """In time order, never holding a cold item."""
    target: int
    candidates: tuple[int, ...]
    """The target among frozen negatives, in an order that does not depend on it."""
    more_candidates: dict[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    """Further lists by name, made alike."""


class Cases(Sequence[RankingCase]):
    """Cases that become objects when they are asked for.

    Letters: N cases on disk, of which M are these; C candidates of a list.

    Args:
        user_ids: (N,) strings.
        histories: (N,)
        targets: (N,)
        lists: name -> (N, C) candidates.
        rows: (M,) places of these cases.
    """

    def __init__(
        self,
        user_ids: pa.ChunkedArray,
        histories: Histories,
        targets: Indices,
        lists: Mapping[str, Indices],
        rows: npt.NDArray[np.int64],
    ) -> None:
        self._user_ids = user_ids
        self._histories = histories
        self._targets = targets
        self._lists = lists
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> RankingCase: ...
    @overload
    def __getitem__(self, index: slice) -> list[RankingCase]: ...
    def __getitem__(self, index: int | slice) -> RankingCase | list[RankingCase]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = int(self._rows[index])
        lists = {name: tuple(items[row].tolist()) for name, items in self._lists.items()}
        return RankingCase(
            user_id=self._user_ids[row].as_py(),
            history=self._histories[row],
            target=int(self._targets[row]),
            candidates=lists.pop(MAIN_LIST),
            more_candidates=lists,
        )


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
    train: Histories
    """Training histories in time order, one per user, none empty."""
    cases_by_kind: Mapping[Kind, Sequence[RankingCase]] = field(repr=False, default_factory=dict)
    categories: tuple[str | None, ...] = ()
    """(I,) null where an item has none."""
    held_out_elsewhere: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    """(I,) items of a title that trains nothing here, since other domains hold it out on which this
    one's ingredient is mixed. To the domain's own tests they are like any other."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "train", Histories.of(self.train))
        if not len(self.held_out_elsewhere):
            none = np.zeros(len(self.item_ids), dtype=bool)
            object.__setattr__(self, "held_out_elsewhere", none)
        if not self.categories:
            object.__setattr__(self, "categories", (None,) * len(self.item_ids))

    def cases(
        self, purpose: Purpose, split: Temperature = "warm", group: Group = "scored"
    ) -> Sequence[RankingCase]:
        """Cases in the order of user ids; empty where the domain has none of the kind."""
        return self.cases_by_kind.get((purpose, split, group), ())

    def log_prior(self) -> npt.NDArray[np.float64]:
        """(I,) log of the smoothed training popularity, see `baselines.log_popularity`."""
        return log_popularity(self.num_train)


def read_domain(folder: Path) -> Domain:
    """Read a prepared domain, checking every file against the manifest.

    Raises:
        ArtifactError: the domain is not prepared, or a file is missing or damaged.
    """
    outputs = _sealed_files(folder)
    for name in FILES:
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path}: missing; run `prepare` with --force")
        if artifacts.sha256_file(path) != outputs.get(name):
            raise ArtifactError(f"{path}: differs from its manifest; run `prepare` with --force")
    items = pq.read_table(folder / "items.parquet")
    train = pq.read_table(folder / "train.parquet", columns=["history"])
    elsewhere = np.zeros(len(items), dtype=bool)
    if HELD_OUT_ELSEWHERE in items.column_names:
        elsewhere = items[HELD_OUT_ELSEWHERE].to_numpy()
    return Domain(
        name=folder.name,
        item_ids=tuple(items["item_id"].to_pylist()),
        titles=tuple(items["title"].to_pylist()),
        categories=tuple(items["category"].to_pylist()),
        num_train=items["num_train"].to_numpy(),
        cold=items["cold"].to_numpy(),
        train=Histories.from_arrow(train["history"]),
        cases_by_kind=_cases(folder),
        held_out_elsewhere=elsewhere,
    )


def sample(cases: Sequence[T], num: int | None, seed: int) -> list[T]:
    """A seeded subsample in the order of `cases`; all of them when `num` is null or too large."""
    if num is None or num >= len(cases):
        return list(cases)
    chosen = np.random.default_rng(seed).choice(len(cases), num, replace=False)
    return [cases[int(i)] for i in np.sort(chosen)]


def _cases(folder: Path) -> dict[Kind, Sequence[RankingCase]]:
    candidates = pq.read_table(
        folder / "candidates.parquet", read_dictionary=["purpose", "split", "list"]
    )
    if "list" not in candidates.column_names:
        raise ArtifactError(
            f"{folder / 'candidates.parquet'}: written by an earlier version; run `prepare` again"
        )
    names = pc.unique(candidates["list"].cast(pa.string())).to_pylist()
    found: dict[Kind, Sequence[RankingCase]] = {}
    for purpose in PURPOSES:
        table = pq.read_table(folder / f"{purpose}.parquet", read_dictionary=["split", "group"])
        own = candidates.filter(pc.equal(candidates["purpose"], purpose))
        lists = {
            name: _matrix(folder, table, own.filter(pc.equal(own["list"], name))) for name in names
        }
        histories = Histories.from_arrow(table["history"])
        targets = table["target"].to_numpy()
        for split in TEMPERATURES:
            for group in GROUPS:
                chosen = pc.and_(pc.equal(table["split"], split), pc.equal(table["group"], group))
                rows = np.flatnonzero(chosen.to_numpy())
                if len(rows):
                    found[purpose, split, group] = Cases(
                        table["user_id"], histories, targets, lists, rows
                    )
    return found


def _matrix(folder: Path, cases: pa.Table, rows: pa.Table) -> Indices:
    """(N, C) candidates of one list, in the order of the cases."""
    aligned = rows["user_id"].equals(cases["user_id"]) and rows["split"].cast(pa.string()).equals(
        cases["split"].cast(pa.string())
    )
    if not aligned:
        raise ArtifactError(
            f"{folder / 'candidates.parquet'}: does not fit the cases; run `prepare` with --force"
        )
    found = Histories.from_arrow(rows["candidates"])
    return found.values.reshape(len(found), -1) if len(found) else np.zeros((0, 0), np.int32)


def _sealed_files(folder: Path) -> dict[str, str]:
    if not (folder / artifacts.MANIFEST).is_file():
        raise ArtifactError(f"{folder}: this domain is not prepared yet; run `prepare` first")
    manifest = artifacts.read_json(folder / artifacts.MANIFEST)
    outputs = manifest.get("outputs") if isinstance(manifest, dict) else None
    if not isinstance(outputs, dict):
        raise ArtifactError(f"{folder / artifacts.MANIFEST}: damaged; run `prepare` with --force")
    return outputs
