"""A raw domain -> one clean, time-ordered history per user; every dropped row is counted.

Whatever looks random in the data is decided by a keyed hash of an id, never by a running generator:
adding, dropping or reordering other rows leaves the choice as it was.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rc_ray.core.encoding import Log, Say, encode, in_time_order, silent
from rc_ray.core.hashing import keyed_hashes
from rc_ray.core.histories import Histories, Indices, Offsets, offsets_of
from rc_ray.core.sources import RawDomain
from rc_ray.core.titles import clean_titles
from rc_ray.data_config import MAIN_LIST, DataConfig
from rc_ray.errors import UserError


class DomainError(UserError):
    """A domain has too little left to work with; the message counts what went where."""


@dataclass(frozen=True)
class CleanDomain:
    """Letters: I items, U users, N interactions."""

    name: str
    item_ids: pa.Array
    """(I,) strings, sorted; a position here is the item index used everywhere else."""
    titles: pa.Array
    """(I,) strings, none empty."""
    categories: pa.Array
    """(I,) strings, null where the item has none."""
    user_ids: pa.Array
    """(U,) strings, sorted."""
    items: Indices
    """(N,) item indices, user after user, each user's in time order and without repeats."""
    offsets: Offsets
    """(U + 1,) user u owns `items[offsets[u]:offsets[u + 1]]`."""
    times: npt.NDArray[np.int64]
    """(N,)"""
    counts: dict[str, int]
    """What was read and what each step dropped, in the order of the steps."""

    @property
    def histories(self) -> Histories:
        """(U,) every user's whole history."""
        return Histories(self.items, self.offsets)


@dataclass(frozen=True)
class _Catalogue:
    item_ids: pa.Array
    titles: pa.Array
    categories: pa.Array

    def take(self, items: npt.NDArray[np.int64]) -> _Catalogue:
        places = pa.array(items)
        return _Catalogue(
            self.item_ids.take(places), self.titles.take(places), self.categories.take(places)
        )


def clean(raw: RawDomain, config: DataConfig, seed: int, say: Say = silent) -> CleanDomain:
    """Drop what cannot be used and order the rest by time.

    A user's repeats of an item count once, at the first time. Equal times are ordered by a hash of
    the item id: by the id itself, the last of a tie (the test target) would favour late catalogue
    entries.

    Args:
        raw: the domain as its source holds it.
        config: the data section.
        seed: the experiment's seed; it draws the sample of users.
        say: told what is being done.

    Raises:
        DomainError: no user is left, or fewer items than a list of candidates needs.
        SourceError: the log cannot be read.
    """
    counts = {"raw_interactions": 0, "raw_items": raw.items.num_rows}
    catalogue = _clean_items(raw.items, config.max_title_characters, counts)
    log = encode(raw.interactions, catalogue.item_ids, counts, say)
    say(f"sorting {len(log.user):,} rows")
    num_rows = len(log.user)
    tie = np.argsort(np.argsort(keyed_hashes(catalogue.item_ids, "tie"), kind="stable"))
    log = in_time_order(log, tie)
    counts["repeated_interactions"] = num_rows - len(log.user)

    rows = _core(log, len(tie), config.min_user_interactions, config.min_item_interactions, counts)
    user, item, time = log.user[rows], log.item[rows], log.time[rows]
    del rows
    num_met = np.bincount(item, minlength=len(tie))
    length = np.bincount(user, minlength=len(log.user_ids))
    counts["users_over_maximum"] = 0
    counts["interactions_over_maximum"] = 0
    kept = np.flatnonzero(length)
    if config.max_users is not None and len(kept) > config.max_users:
        drawn = np.argsort(
            keyed_hashes(log.user_ids.take(pa.array(kept)), seed, raw.name, "max_users"),
            kind="stable",
        )
        over = kept[drawn[config.max_users :]]
        counts["users_over_maximum"] = len(over)
        counts["interactions_over_maximum"] = int(length[over].sum())
        length[over] = 0
        kept = np.flatnonzero(length)
        chosen = (length > 0)[user]
        item, time = item[chosen], time[chosen]
    if config.min_item_interactions:
        items = np.flatnonzero(num_met >= config.min_item_interactions)
        catalogue = catalogue.take(items)
        new = np.full(len(tie), -1, dtype=np.int32)
        new[items] = np.arange(len(items), dtype=np.int32)
        item = new[item]
    counts["users"] = len(kept)
    counts["items"] = len(catalogue.item_ids)
    counts["interactions"] = len(item)
    _check_size(raw.name, config, counts)
    return CleanDomain(
        name=raw.name,
        item_ids=catalogue.item_ids,
        titles=catalogue.titles,
        categories=catalogue.categories,
        user_ids=log.user_ids.take(pa.array(kept)),
        items=item,
        offsets=offsets_of(length[kept]),
        times=time,
        counts=counts,
    )


def describe(counts: dict[str, int]) -> str:
    """The counts as one line of words, but for the zeros of what cleaning may find."""
    told = {name: count for name, count in counts.items() if count or name.startswith("raw")}
    return ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in told.items())


def list_field(name: str) -> str:
    """The field that says how many negatives a list of candidates has."""
    inner = "" if name == MAIN_LIST else f"more_candidates.{name}."
    return f"`data.{inner}num_negatives`"


def _check_size(name: str, config: DataConfig, counts: dict[str, int]) -> None:
    if counts["users"] == 0:
        fields = f"`data.min_user_interactions` ({config.min_user_interactions})"
        if config.min_item_interactions:
            fields += f" or `data.min_item_interactions` ({config.min_item_interactions})"
        raise DomainError(
            f"domain `{name}`: no user is left; lower {fields} or check the source "
            f"({describe(counts)})"
        )
    for one, candidates in config.candidate_lists.items():
        if counts["items"] < candidates.num_negatives + 1:
            raise DomainError(
                f"domain `{name}`: {counts['items']} items are too few for "
                f"{list_field(one)} = {candidates.num_negatives} ({describe(counts)})"
            )


def _clean_items(table: pa.Table, max_title_characters: int, counts: dict[str, int]) -> _Catalogue:
    """Sorted ids with their titles and categories; the first titled row of an id wins."""
    found = clean_titles(table["title"].combine_chunks(), max_title_characters)
    ids = pc.fill_null(table["item_id"].combine_chunks(), "")
    titles, categories = found.titles, table["category"].combine_chunks()
    has_id = np.asarray(pc.not_equal(ids, ""))
    has_title = np.asarray(pc.not_equal(titles, ""))
    rows = np.flatnonzero(has_id & has_title)
    ordered = rows[np.asarray(pc.sort_indices(ids.take(pa.array(rows))))]
    sorted_ids = ids.take(pa.array(ordered))
    if len(ordered):
        repeats = np.asarray(pc.equal(sorted_ids[1:], sorted_ids[:-1]))
        ordered = ordered[np.append(True, ~repeats)]
    counts["items_without_id"] = int((~has_id).sum())
    counts["untitled_items"] = int((has_id & ~has_title).sum())
    counts["duplicate_items"] = len(rows) - len(ordered)
    counts["titles_with_control_tokens"] = found.num_with_control_tokens
    counts["titles_cut"] = found.num_cut
    return _Catalogue(ids, titles, categories).take(ordered)


def _core(
    log: Log, num_items: int, min_user: int, min_item: int, counts: dict[str, int]
) -> npt.NDArray[np.int64]:
    """Places of the rows of the largest part in which all users and items reach their minimum."""
    rows = np.arange(len(log.user))
    users = np.bincount(log.user, minlength=len(log.user_ids)) > 0
    items = np.ones(num_items, dtype=bool)
    counts.update(
        users_below_minimum=0,
        interactions_below_minimum=0,
        items_below_minimum=0,
        interactions_of_items_below_minimum=0,
        kcore_rounds=0,
    )
    while True:
        num_left = users.sum() + items.sum()
        met = np.bincount(log.item[rows], minlength=num_items)
        few = items & (met < min_item)
        counts["items_below_minimum"] += int(few.sum())
        if few.any():
            items &= ~few
            kept = rows[items[log.item[rows]]]
            counts["interactions_of_items_below_minimum"] += len(rows) - len(kept)
            rows = kept
        length = np.bincount(log.user[rows], minlength=len(users))
        short = users & (length < min_user)
        counts["users_below_minimum"] += int(short.sum())
        if short.any():
            users &= ~short
            kept = rows[users[log.user[rows]]]
            counts["interactions_below_minimum"] += len(rows) - len(kept)
            rows = kept
        if users.sum() + items.sum() == num_left:
            return rows
        counts["kcore_rounds"] += 1
        if not min_item:
            return rows
