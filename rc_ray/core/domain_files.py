"""The files of a prepared domain: their columns, and how they are written.

core/domains.py reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rc_ray.core.cleaning import CleanDomain
from rc_ray.core.draws import COLD_USER, DRAWS, UNLABELED
from rc_ray.core.held_out import CLICKS, HeldOut
from rc_ray.core.histories import Histories, offsets_of
from rc_ray.core.splits import PURPOSES, TEMPERATURES, CaseTable, SplitDomain

FILES = ("items.parquet", "train.parquet", "valid.parquet", "test.parquet", "candidates.parquet")
HELD_OUT_FILE = "held_out.parquet"
"""Titles and users of a tested domain that no adapter may see that is mixed on it."""
HELD_CLICKS_FILE = "held_clicks.parquet"
"""What else such an adapter may not train on, where it is another domain's ingredient."""
HELD_OUT_ELSEWHERE = "held_out_elsewhere"
"""Column of the items of a domain whose ingredient is mixed on others; other domains lack it."""

_ROWS = 1 << 17
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
CANDIDATES = pa.schema(
    [
        ("user_id", pa.string()),
        ("purpose", pa.string()),
        ("split", pa.string()),
        ("list", pa.string()),
        ("candidates", _INDICES),
    ]
)
_HELD_OUT = pa.schema([("kind", pa.string()), ("value", pa.string())])


def read_held_out(folders: Iterable[Path]) -> HeldOut:
    """What tested domains keep from adapters that are mixed on them, all of them together.

    Args:
        folders: of prepared domains, or of what was held out before any was prepared.
    """
    folders = list(folders)
    tables = [pq.read_table(folder / HELD_OUT_FILE, schema=_HELD_OUT) for folder in folders]
    clicks = [
        pq.read_table(path, schema=CLICKS)
        for folder in folders
        if (path := folder / HELD_CLICKS_FILE).is_file()
    ]
    rows = pa.concat_tables([_HELD_OUT.empty_table(), *tables])

    def values(kind: str) -> pa.Array:
        found = pc.unique(rows.filter(pc.equal(rows["kind"], kind))["value"])
        return found.take(pc.sort_indices(found))

    return HeldOut(
        titles=values("title"),
        user_ids=values("user"),
        clicks=pa.concat_tables([CLICKS.empty_table(), *clicks]),
        by=tuple(folder.name for folder in folders),
    )


def write_block(
    writer: pq.ParquetWriter,
    domain: CleanDomain,
    cases: CaseTable,
    name: str,
    candidates: npt.NDArray[np.int32],
) -> None:
    if not len(cases):
        return
    num, width = candidates.shape
    offsets = np.arange(num + 1, dtype=np.int32) * width
    columns = [
        domain.user_ids.take(pa.array(cases.user)),
        _tags(PURPOSES, cases.purpose),
        _tags(TEMPERATURES, cases.split),
        pa.repeat(name, num),
        pa.ListArray.from_arrays(pa.array(offsets), pa.array(candidates.reshape(-1))),
    ]
    writer.write_table(pa.table(columns, schema=CANDIDATES))


def write_tables(work: Path, domain: CleanDomain, result: SplitDomain, cases: CaseTable) -> None:
    items = [
        domain.item_ids,
        domain.titles,
        domain.categories,
        pa.array(result.num_train),
        pa.array(result.cold),
    ]
    schema = _ITEMS
    if result.held_out_elsewhere is not None:
        items.append(pa.array(result.held_out_elsewhere))
        schema = schema.append(pa.field(HELD_OUT_ELSEWHERE, pa.bool_()))
    pq.write_table(pa.table(items, schema=schema), work / "items.parquet")
    trained = np.flatnonzero(result.train.lengths)
    groups = result.draws[trained]
    _write(
        work / "train.parquet",
        _TRAIN,
        result.train.take(trained),
        {
            "user_id": domain.user_ids.take(pa.array(trained)),
            "group": _tags(DRAWS, groups),
        },
    )
    for code, purpose in enumerate(PURPOSES):
        own = cases.take(np.flatnonzero(cases.purpose == code))
        is_unlabeled = result.draws[own.user] == UNLABELED
        _write(
            work / f"{purpose}.parquet",
            _CASES,
            own.histories,
            {
                "user_id": domain.user_ids.take(pa.array(own.user)),
                "target": pa.array(own.target),
                "split": _tags(TEMPERATURES, own.split),
                "group": _tags(DRAWS, is_unlabeled.astype(np.uint8)),
            },
        )


def _write(
    path: Path, schema: pa.Schema, histories: Histories, columns: Mapping[str, pa.Array]
) -> None:
    tags = [name for name in ("split", "group") if name in schema.names]
    with pq.ParquetWriter(path, schema, use_dictionary=tags) as writer:
        for start in range(0, max(1, len(histories)), _ROWS):
            end = min(start + _ROWS, len(histories))
            part = {name: column.slice(start, end - start) for name, column in columns.items()}
            part["history"] = histories.to_arrow(start, end)
            writer.write_table(pa.table([part[name] for name in schema.names], schema=schema))


def write_held_out(path: Path, domain: CleanDomain, result: SplitDomain) -> None:
    found = {
        "title": pc.unique(domain.titles.filter(pa.array(result.cold))),
        "user": domain.user_ids.filter(pa.array(result.draws == COLD_USER)),
    }
    tables = [
        pa.table([pa.repeat(kind, len(values)), values], schema=_HELD_OUT)
        for kind, values in found.items()
    ]
    rows = pa.concat_tables(tables)
    pq.write_table(rows.sort_by([("kind", "ascending"), ("value", "ascending")]), path)


def write_held_clicks(path: Path, domain: CleanDomain, result: SplitDomain) -> None:
    """Write what a domain's training lacks of clicks on warm items, see `_kept_from_training`."""
    rows = np.flatnonzero(_kept_from_training(domain, result))
    user, item = domain.histories.owners[rows], domain.items[rows]
    tested = result.cases.purpose == PURPOSES.index("test")
    targets = _pairs(domain, result.cases.user[tested], result.cases.target[tested])
    columns = [
        domain.user_ids.take(pa.array(user)),
        domain.titles.take(pa.array(item)),
        pa.array(np.isin(_pairs(domain, user, item), targets)),
    ]
    pq.write_table(pa.table(columns, schema=CLICKS), path)


def _kept_from_training(domain: CleanDomain, result: SplitDomain) -> npt.NDArray[np.bool_]:
    """(N,) clicks of warm items that do not train, of users who are not held out whole.

    Args:
        domain: clean histories, N clicks.
        result: the split, without `data.num_training_users`.
    """
    owner = domain.histories.owners
    is_warm = ~result.cold[domain.items]
    num_before = offsets_of(is_warm.astype(np.int64))
    place = num_before[:-1] - num_before[domain.offsets[:-1]][owner]
    is_late = place >= result.train.lengths[owner]
    kept: npt.NDArray[np.bool_] = is_warm & is_late & (result.draws[owner] != COLD_USER)
    return kept


def _pairs(
    domain: CleanDomain, user: npt.NDArray[np.integer], item: npt.NDArray[np.integer]
) -> npt.NDArray[np.int64]:
    return user.astype(np.int64) * len(domain.item_ids) + item


def _tags(names: tuple[str, ...], codes: npt.NDArray[np.uint8]) -> pa.Array:
    return pa.array(names, pa.string()).take(pa.array(codes))
