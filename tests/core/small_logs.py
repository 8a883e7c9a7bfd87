"""Small logs and settings for the tests of the data stage."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from rc_ray.core.sources import INTERACTIONS, ITEMS, RawDomain
from rc_ray.data_config import DataConfig

Row = tuple[Any, ...]


def config(*, role: str = "spirit", **fields: Any) -> DataConfig:
    """Settings under which the domain `shop` has a role."""
    other = "ingredients" if role == "spirit" else "spirit"
    role_field = "spirit" if role == "spirit" else "ingredients"
    sources = [
        {"format": "parquet", "domain": d, "path": f"nowhere/{d}"} for d in ("shop", "other")
    ]
    return DataConfig.model_validate(
        {
            "sources": sources,
            role_field: ["shop"],
            other: ["other"],
            "min_user_interactions": 3,
            "num_negatives": 2,
            **fields,
        }
    )


def raw(log: list[Row], items: list[Row]) -> RawDomain:
    """The domain `shop` of rows; columns left out at the end are null."""

    def table(rows: list[Row], schema: pa.Schema) -> pa.Table:
        columns = list(zip(*rows, strict=True)) if rows else [()] * len(schema)
        columns += [(None,) * len(rows)] * (len(schema) - len(columns))
        return pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema)

    return RawDomain.from_tables("shop", table(log, INTERACTIONS), table(items, ITEMS))


def random_raw(
    num_users: int = 30,
    num_items: int = 60,
    shuffle: int | None = None,
    num_titles: int | None = None,
    num_categories: int | None = None,
) -> RawDomain:
    """Users who met 6 to 19 of the items each, one at a time."""
    rng = np.random.default_rng(5)
    log = [
        (f"u{user:02d}", f"i{item:02d}", time)
        for user in range(num_users)
        for time, item in enumerate(rng.permutation(num_items)[: rng.integers(6, 20)])
    ]
    if shuffle is not None:
        log = [log[i] for i in np.random.default_rng(shuffle).permutation(len(log))]
    return raw(
        log,
        [
            (
                f"i{i:02d}",
                f"Title {i % (num_titles or num_items)}",
                None if num_categories is None else f"c{i % num_categories}",
            )
            for i in range(num_items)
        ],
    )
