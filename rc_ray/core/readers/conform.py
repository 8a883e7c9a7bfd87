"""Batches as a file names its columns -> record batches in the project's own form.

Nothing is cleaned and no row is dropped: a row without a user, an item or a time keeps a null
there, and duplicated rows stay. Cleaning counts them in one place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rc_ray.core.readers.batch import Batch
from rc_ray.core.readers.faults import fault
from rc_ray.core.readers.layout import Category, Layout
from rc_ray.core.readers.times import Complain, to_numbers, to_seconds
from rc_ray.core.sources import INTERACTIONS, ITEMS


class Conform:
    """Makes record batches of one file and counts what it sees.

    Args:
        path: the file, for messages.
        layout: what it holds.
        columns: field -> the file's columns that hold it, in order of preference.
    """

    def __init__(self, path: Path, layout: Layout, columns: Mapping[str, tuple[str, ...]]) -> None:
        self.counts: Counter[str] = Counter()
        self._path = path
        self._layout = layout
        self._columns = columns

    def interactions(self, batch: Batch) -> Any:
        """Rows of the schema `INTERACTIONS`."""
        user_id = self._ids(batch, "user_id")
        item_id = self._ids(batch, "item_id")
        timestamp = self._first_known(
            batch,
            "timestamp",
            lambda values, complain: to_seconds(values, self._layout.time, complain),
            pa.int64(),
        )
        rating = self._first_known(batch, "rating", to_numbers, pa.float64()).cast(
            pa.float32(), safe=False
        )
        rating = pc.if_else(pc.is_nan(rating), None, rating)
        if self._layout.unrated is not None:
            rating = pc.if_else(pc.equal(rating, self._layout.unrated), None, rating)
        self.counts.update(
            rows=batch.num_rows,
            rows_without_user=user_id.null_count,
            rows_without_item=item_id.null_count,
            rows_without_time=timestamp.null_count,
        )
        if self._columns.get("rating"):
            self.counts["rows_without_rating"] += rating.null_count
        return pa.record_batch([user_id, item_id, timestamp, rating], schema=INTERACTIONS)

    def items(self, batch: Batch) -> Any:
        """Rows of the schema `ITEMS`."""
        item_id = self._ids(batch, "item_id")
        title = self._first_known(batch, "title", _texts, pa.string())
        if self._layout.spoilt_title is not None:
            spoilt = pc.match_substring(title, self._layout.spoilt_title)
            self.counts["titles_spoilt"] += pc.sum(spoilt).as_py() or 0
            title = pc.if_else(spoilt, None, title)
        category = self._categories(batch)
        self.counts.update(
            rows=batch.num_rows,
            rows_without_item=item_id.null_count,
            titles_missing=title.null_count,
        )
        if self._columns.get("category"):
            self.counts["categories_missing"] += category.null_count
        return pa.record_batch([item_id, title, category], schema=ITEMS)

    def _ids(self, batch: Batch, field: str) -> Any:
        return self._first_known(batch, field, _ids, pa.string())

    def _categories(self, batch: Batch) -> Any:
        rule = self._layout.category
        if not rule.flags:
            return self._first_known(
                batch,
                "category",
                lambda values, complain: one_category(
                    values if _is_list(values.type) else _texts(values, complain), rule
                ),
                pa.string(),
            )
        names = [name for name in self._columns["category"] if name not in rule.nothing]
        return pc.coalesce(
            *(pc.if_else(pc.equal(batch.columns[name], "1"), name, None) for name in names)
        )

    def _first_known(self, batch: Batch, field: str, convert: Any, kind: Any) -> Any:
        """The field's columns converted, the first with a value per row; nulls without any."""
        parts = []
        for column in self._columns.get(field, ()):
            if column in batch.columns:
                values = batch.columns[column]
                if pa.types.is_dictionary(values.type):
                    values = values.cast(values.type.value_type)
                parts.append(convert(values, self._complain(batch, column)))
        if not parts:
            return pa.nulls(batch.num_rows, kind)
        return parts[0] if len(parts) == 1 else pc.coalesce(*parts)

    def _complain(self, batch: Batch, column: str) -> Complain:
        def complain(row: int, what: str) -> Exception:
            return fault(self._path, batch.where(row), f"`{column}` {what}")

        return complain


def _ids(values: Any, complain: Complain) -> Any:
    """Ids as text: whole numbers as their digits, so 7, "7" and 7.0 are the same id."""
    if pa.types.is_floating(values.type):  # what pandas makes of whole numbers with gaps
        numbers = np.nan_to_num(values.to_numpy(zero_copy_only=False), nan=0.0)
        broken = (np.floor(numbers) != numbers) | (np.abs(numbers) >= 2**53)
        if broken.any():
            row = int(broken.argmax())
            raise complain(row, f"is {numbers[row]:g}; ids are text or whole numbers")
        known = pc.and_(pc.is_valid(values), pc.invert(pc.fill_null(pc.is_nan(values), True)))
        return pa.array(numbers.astype(np.int64), mask=~np.asarray(known)).cast(pa.string())
    return _texts(values, complain, "ids are text or whole numbers", numbers=True)


def _texts(
    values: Any, complain: Complain, due: str = "it must be text", *, numbers: bool = False
) -> Any:
    """Text with empty (and, of what is not an id, blank) values as nulls."""
    kind = values.type
    if pa.types.is_null(kind):
        return pa.nulls(len(values), pa.string())
    plain = (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_integer(kind)
        or (pa.types.is_floating(kind) and not numbers)
        or kind in (pa.string_view(), pa.binary(), pa.large_binary())
    )
    if not plain:
        raise complain(0, f"has the type {kind}; {due}")
    try:
        texts = values.cast(pa.string())
    except pa.ArrowInvalid:
        raise complain(0, "or a row below is not UTF-8; write it as text") from None
    empty = pc.equal(texts, "") if numbers else pc.equal(pc.utf8_trim_whitespace(texts), "")
    return pc.if_else(empty, None, texts)


def one_category(values: Any, rule: Category) -> Any:
    """One category per item, by the rule; null where there is none."""
    if _is_list(values.type):
        lengths = np.asarray(pc.fill_null(pc.list_value_length(values), 0))
        flat = pc.list_flatten(values).cast(pa.string())
        ends = np.cumsum(lengths)
        position = ends - 1 if rule.take == "last" else ends - lengths
        texts = flat.take(pa.array(position, pa.int64(), mask=lengths == 0))
    elif rule.separator is not None:
        # A list in quotes, as in 'Arts, Crafts & Sewing', 'Knitting', has a first of its own.
        quoted = pc.fill_null(pc.match_substring_regex(values, r"^'[^']+'"), False)
        first = pc.replace_substring_regex(values, r"^'([^']+)'(?s:.*)$", r"\1")
        cut = pc.struct_field(pc.extract_regex(values, f"^(?P<one>[^{rule.separator}]*)"), "one")
        texts = pc.if_else(quoted, first, cut)
    else:
        texts = values
    texts = pc.utf8_trim_whitespace(texts)
    nothing = pc.is_in(texts, value_set=pa.array(["", *rule.nothing]))
    # Markup of the crawled page in place of a name.
    return pc.if_else(pc.or_(nothing, pc.starts_with(texts, "<")), None, texts)


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))
