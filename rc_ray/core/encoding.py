"""A streamed log -> integer codes in time order; no row is ever a Python object.

Ids become codes batch by batch, so that the texts of one batch at most are in memory. Rows are then
sorted as single 64-bit keys, which is several times faster than sorting by three columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rc_ray.core.raw_files import FractionalTimes
from rc_ray.core.sources import Interactions

Say = Callable[[str], None]
"""Told now and then what a long piece of work is doing."""

KEY_BITS = 64


def silent(_: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Log:
    """Rows as codes. Letters: N rows, U users."""

    user_ids: pa.Array
    """(U,) strings, sorted."""
    user: npt.NDArray[np.int32]
    """(N,)"""
    item: npt.NDArray[np.int32]
    """(N,)"""
    time: npt.NDArray[np.int64]
    """(N,)"""


def encode(
    interactions: Interactions, item_ids: pa.Array, counts: dict[str, int], say: Say = silent
) -> Log:
    """Read a log, leaving out rows that lack a field or whose item is not in the catalogue.

    Args:
        interactions: the log.
        item_ids: (I,) the catalogue, each id once; positions are the item codes.
        counts: gets `raw_interactions`, `incomplete_interactions`, `interactions_without_item`.
        say: told how many rows are read.

    Returns:
        The rows that are left, in file order.
    """
    try:
        return _encode(interactions, item_ids, counts, say, by_order=False)
    except FractionalTimes:
        return _encode(interactions, item_ids, counts, say, by_order=True)


def _encode(
    interactions: Interactions,
    item_ids: pa.Array,
    counts: dict[str, int],
    say: Say,
    *,
    by_order: bool,
) -> Log:
    users: list[pa.Array] = []
    items: list[npt.NDArray[np.int32]] = []
    times: list[npt.NDArray[np.int64]] = []
    num_rows = num_incomplete = num_unknown = 0
    for batch in interactions.batches(by_order=by_order):
        user_codes, user_names = _codes(batch.column("user_id"))
        item_codes, item_names = _codes(batch.column("item_id"))
        time = batch.column("timestamp")
        complete = (user_codes >= 0) & (item_codes >= 0) & _valid(time)
        in_catalogue = pc.fill_null(pc.index_in(item_names, value_set=item_ids), -1)
        # One more place, for the code -1 of rows that lack the item.
        catalogue_code = np.append(np.asarray(in_catalogue, dtype=np.int32), np.int32(-1))
        item = catalogue_code[item_codes]
        kept = complete & (item >= 0)
        num_rows += batch.num_rows
        num_incomplete += batch.num_rows - int(complete.sum())
        num_unknown += int(complete.sum()) - int(kept.sum())
        users.append(pa.DictionaryArray.from_arrays(pa.array(user_codes[kept]), user_names))
        items.append(item[kept])
        times.append(np.asarray(pc.fill_null(time, 0))[kept])
        say(f"{num_rows:,} rows read")
    counts["raw_interactions"] = num_rows
    counts["incomplete_interactions"] = num_incomplete
    counts["interactions_without_item"] = num_unknown
    if not users:
        none = np.zeros(0, dtype=np.int32)
        return Log(pa.array([], pa.string()), none, none, none.astype(np.int64))
    say("giving users their numbers")
    unified = pa.chunked_array(users).unify_dictionaries()
    names = unified.chunk(0).dictionary
    order = np.asarray(pc.sort_indices(names))
    rank = np.empty(len(order), dtype=np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    user = np.concatenate([rank[np.asarray(part.indices)] for part in unified.chunks])
    del unified, users
    return Log(names.take(pa.array(order)), user, np.concatenate(items), np.concatenate(times))


def _codes(column: pa.Array) -> tuple[npt.NDArray[np.int32], pa.Array]:
    """(N,) places in the (D,) distinct texts, -1 for nothing and for the empty text."""
    encoded = column.dictionary_encode()
    codes = np.asarray(pc.fill_null(encoded.indices, -1), dtype=np.int32)
    empty = pc.index(encoded.dictionary, "").as_py()
    if empty >= 0:
        codes = np.where(codes == empty, np.int32(-1), codes)
    return codes, encoded.dictionary


def _valid(column: pa.Array) -> npt.NDArray[np.bool_]:
    return np.asarray(pc.is_valid(column))


def in_time_order(log: Log, tie: npt.NDArray[np.int64]) -> Log:
    """User after user, each in time order, each item once, at its first time.

    Args:
        log: rows in any order.
        tie: (I,) a permutation of the items; it orders a user's items of equal time.

    Returns:
        The rows that are left; a function of the set of rows, not of their order.
    """
    if not len(log.user):
        return log
    time, levels = log.time - log.time.min(), None
    user_bits, item_bits = _bits(len(log.user_ids)), _bits(len(tie))
    if user_bits + item_bits + _bits(int(time.max()) + 1) > KEY_BITS:
        time, levels = _ranks(log.time)
    time_bits = _bits(int(time.max()) + 1)
    if user_bits + item_bits + time_bits > KEY_BITS:
        return _in_time_order_by_columns(log, tie)
    low = log.time.min()

    key = _packed(log.user, item_bits, log.item, time_bits, time)
    del time
    key.sort()
    pair = key >> np.uint64(time_bits)
    key = key[np.append(True, pair[1:] != pair[:-1])]
    del pair
    user, item, time = _unpacked(key, item_bits, time_bits)
    key = _packed(user, time_bits, time, item_bits, tie[item])
    key.sort()
    user, time, place = _unpacked(key, time_bits, item_bits)
    del key
    item_of = np.empty(len(tie), dtype=np.int32)
    item_of[tie] = np.arange(len(tie), dtype=np.int32)
    times = time + low if levels is None else levels[time]
    return Log(log.user_ids, user.astype(np.int32), item_of[place], times)


def _in_time_order_by_columns(log: Log, tie: npt.NDArray[np.int64]) -> Log:
    """The same where a row does not fit into one key; slower."""
    order = np.lexsort((log.time, log.item, log.user))
    user, item = log.user[order], log.item[order]
    first = np.append(True, (user[1:] != user[:-1]) | (item[1:] != item[:-1]))
    order = order[first]
    order = order[np.lexsort((tie[log.item[order]], log.time[order], log.user[order]))]
    return Log(log.user_ids, log.user[order], log.item[order], log.time[order])


def _bits(num: int) -> int:
    """Bits that hold the numbers below `num`."""
    return max(1, (num - 1).bit_length())


def _ranks(values: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Dense ranks from 0, and the value of each rank."""
    order = np.argsort(values)
    ordered = values[order]
    new = np.append(True, ordered[1:] != ordered[:-1])
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[order] = np.cumsum(new) - 1
    return ranks, ordered[new]


def _packed(
    first: npt.NDArray[np.integer],
    bits: int,
    second: npt.NDArray[np.integer],
    more_bits: int,
    third: npt.NDArray[np.integer],
) -> npt.NDArray[np.uint64]:
    key = first.astype(np.uint64)
    key <<= np.uint64(bits)
    key |= second.astype(np.uint64)
    key <<= np.uint64(more_bits)
    key |= third.astype(np.uint64)
    return key


def _unpacked(
    key: npt.NDArray[np.uint64], bits: int, more_bits: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    third = (key & np.uint64((1 << more_bits) - 1)).astype(np.int64)
    rest = key >> np.uint64(more_bits)
    second = (rest & np.uint64((1 << bits) - 1)).astype(np.int64)
    return (rest >> np.uint64(bits)).astype(np.int64), second, third
