"""Popularity from a newer log, counted by hand."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from rc_ray.core.baselines import log_popularity
from rc_ray.core.prior import PriorError, count_clicks

DAY = 86_400
NOW = 1_700_000_000
ITEMS = ("a", "b", "c")


def batches(*rows: tuple[str | None, str | None, int | None]) -> list[pa.RecordBatch]:
    """One row a batch, so that nothing may depend on where batches end."""
    schema = pa.schema(
        [("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64())]
    )
    return [
        pa.record_batch([[value] for value in row], schema=schema)  # type: ignore[arg-type]
        for row in rows
    ]


def test_an_item_counts_once_per_user_and_strangers_are_told() -> None:
    found = count_clicks(
        batches(
            ("u", "a", 5),
            ("u", "a", 9),
            ("v", "a", 1),
            ("v", "c", 2),
            ("v", "x", 3),
            ("w", "x", 3),
            ("w", "y", 3),
            (None, "a", 4),
            ("w", None, 4),
            ("w", "b", None),
        ),
        ITEMS,
    )
    assert found.clicks.tolist() == [2.0, 1.0, 1.0]
    assert (found.num_rows, found.num_counted, found.num_incomplete) == (10, 4, 2)
    assert (found.num_unknown, found.unknown_items) == (3, 2)
    assert found.newest is None  # 9 is no second of our time
    assert np.exp(log_popularity(found.clicks)) == pytest.approx(np.array([3, 2, 2]) / 7)


def test_a_click_fades_by_half_each_half_life_from_the_newest_on() -> None:
    found = count_clicks(
        batches(
            ("u", "a", NOW),
            ("v", "a", NOW - 10 * DAY),
            ("w", "b", NOW - 20 * DAY),
            ("w", "c", NOW - 40 * DAY),
            ("w", "c", NOW - 30 * DAY),  # the user's last click on it counts
            ("x", "c", None),
        ),
        ITEMS,
        half_life_s=10 * DAY,
    )
    assert found.clicks == pytest.approx([1.5, 0.25, 0.125])
    assert found.newest == NOW
    assert found.num_incomplete == 1
    assert np.exp(log_popularity(found.clicks))[0] == pytest.approx(2.5 / 4.875)


def test_a_log_without_the_catalogue_or_without_seconds_is_refused() -> None:
    with pytest.raises(PriorError, match="none of its 1 rows .* ids are like 'a'"):
        count_clicks(batches(("u", "x", 1)), ITEMS)
    with pytest.raises(PriorError, match="none of its 0 rows"):
        count_clicks([], ITEMS)
    for wrong in (7, NOW * 1000):
        with pytest.raises(PriorError, match="no Unix seconds"):
            count_clicks(batches(("u", "a", wrong), ("v", "a", NOW)), ITEMS, half_life_s=DAY)
