"""A domain's popularity counted anew from a log, old clicks fading if asked.

Letters: I items.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

_SECONDS = (10**8, 10**11)
"""Times that can be Unix seconds: later than 1973, earlier than 5138. Milliseconds lie above, and
numbers that only tell the order mostly below."""


class PriorError(ValueError):
    """A log does not tell what is asked of it."""


@dataclass(frozen=True)
class ClickCounts:
    """What a log says of a catalogue's popularity."""

    clicks: npt.NDArray[np.float64]
    """(I,) of each item, one at most per user, weighted by age."""
    num_rows: int
    num_counted: int
    """Pairs of a user and an item of the catalogue."""
    num_incomplete: int
    """Rows without a user or an item, or without the time that a weight by age needs."""
    num_unknown: int
    """Rows of items outside the catalogue."""
    unknown_items: int
    """Such items, each once."""
    newest: int | None
    """The latest time of a counted row in Unix seconds; None where the times are no such."""


def count_clicks(
    batches: Iterable[pa.RecordBatch],
    item_ids: Sequence[str],
    half_life_s: float | None = None,
) -> ClickCounts:
    """Count a log's clicks on the items of a catalogue.

    An item counts once for each user, at the user's last click on it, as `prepare` counts it once.
    With a half-life a click of age a, reckoned from the newest one counted, weighs
    `0.5 ** (a / half_life_s)`.

    Args:
        batches: with `user_id`, `item_id` and, in Unix seconds, `timestamp`.
        item_ids: (I,) distinct.
        half_life_s: > 0; None weighs all alike and looks at no time.

    Raises:
        PriorError: no row is of the catalogue, or a half-life is asked where times are no seconds.
    """
    known = pa.array(item_ids, pa.string())
    num_rows = num_incomplete = num_unknown = 0
    unknown = pa.array([], pa.string())
    parts: list[pa.Table] = []
    needed = ["user_id", "item_id"] + (["timestamp"] if half_life_s is not None else [])
    for batch in batches:
        whole = pc.is_valid(batch.column(needed[0]))
        for name in needed[1:]:
            whole = pc.and_(whole, pc.is_valid(batch.column(name)))
        rows = pa.table(
            {name: batch.column(name).filter(whole) for name in ("user_id", "item_id", "timestamp")}
        )
        place = pc.index_in(rows["item_id"], value_set=known)
        is_known = pc.is_valid(place)
        own = rows.filter(is_known)
        other = rows["item_id"].filter(pc.invert(is_known))
        num_rows += batch.num_rows
        num_incomplete += batch.num_rows - rows.num_rows
        num_unknown += len(other)
        unknown = pc.unique(pa.chunked_array([unknown, pc.unique(other)]))
        parts.append(_last(own.append_column("item", place.filter(is_known))))
    pairs = _last(pa.concat_tables(parts)) if parts else None
    if pairs is None or not pairs.num_rows:
        raise PriorError(
            f"none of its {num_rows:,} rows names an item of the catalogue, whose ids are like "
            f"{item_ids[0]!r}"
        )
    times = pairs["timestamp"].to_numpy()
    newest = pc.max(pairs["timestamp"]).as_py()
    weights = np.ones(pairs.num_rows)
    if half_life_s is not None:
        oldest = int(times.min())
        if not _are_seconds(oldest, newest):
            raise PriorError(
                f"its times go from {oldest} to {newest}, which are no Unix seconds, and a "
                "half-life in days needs those"
            )
        weights = np.exp2(-(newest - times) / half_life_s)
    items = pairs["item"].to_numpy()
    return ClickCounts(
        clicks=np.bincount(items, weights, minlength=len(item_ids)).astype(np.float64),
        num_rows=num_rows,
        num_counted=pairs.num_rows,
        num_incomplete=num_incomplete,
        num_unknown=num_unknown,
        unknown_items=len(unknown),
        newest=newest if newest is not None and _are_seconds(newest, newest) else None,
    )


def _last(rows: pa.Table) -> pa.Table:
    """Each pair of a user and an item once, at its latest time."""
    found = rows.group_by(["user_id", "item"]).aggregate([("timestamp", "max")])
    return found.rename_columns(
        [name.replace("timestamp_max", "timestamp") for name in found.column_names]
    )


def _are_seconds(oldest: int, newest: int) -> bool:
    return _SECONDS[0] <= oldest <= newest < _SECONDS[1]
