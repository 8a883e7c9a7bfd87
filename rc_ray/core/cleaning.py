"""Raw tables -> one clean, time-ordered history per user; every dropped row is counted.

Whatever looks random in the data is decided by a keyed hash of an id, never by a running generator:
adding, dropping or reordering other rows leaves the choice as it was.
"""

from __future__ import annotations

import hashlib
import html
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rc_ray.core.sources import RawDomain
from rc_ray.data_config import DataConfig
from rc_ray.errors import UserError

# Control characters, soft hyphens, zero-width spaces, bidirectional marks and overrides, byte order
# marks, private use and noncharacters. The joiners U+200C and U+200D stay: scripts need them.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufdd0-\ufdef"
    "\ue000-\uf8ff\ufeff\ufff0-\ufffb\ufffe\uffff]+"
)


class DomainError(UserError):
    """A domain has too little left to work with; the message counts what went where."""


@dataclass(frozen=True)
class CleanDomain:
    """Letters: I items, U users, N interactions."""

    name: str
    item_ids: tuple[str, ...]
    """(I,), sorted; a position here is the item index used everywhere else."""
    titles: tuple[str, ...]
    categories: tuple[str | None, ...]
    user_ids: tuple[str, ...]
    """(U,), sorted."""
    items: npt.NDArray[np.int32]
    """(N,) item indices, user after user, each user's in time order and without repeats."""
    offsets: npt.NDArray[np.int64]
    """(U + 1,) user u owns `items[offsets[u]:offsets[u + 1]]`."""
    counts: dict[str, int]
    """What was read and what each step dropped, in the order of the steps."""

    def history(self, user: int) -> npt.NDArray[np.int32]:
        return self.items[self.offsets[user] : self.offsets[user + 1]]


def keyed_hashes(values: Iterable[str], *key: object) -> npt.NDArray[np.uint64]:
    """One 64-bit hash per value; equal values and keys give equal hashes on every machine."""
    base = hashlib.blake2b("\x1f".join(map(str, key)).encode() + b"\x1e", digest_size=8)
    hashes = []
    for value in values:
        one = base.copy()
        one.update(value.encode())
        hashes.append(int.from_bytes(one.digest(), "little"))
    return np.array(hashes, dtype=np.uint64)


def clean_title(title: str | None, max_characters: int) -> str:
    """Printable text on one line, at most `max_characters` long; empty when nothing is left."""
    if not title:
        return ""
    text = title
    for _ in range(2):  # shops export titles escaped twice: "&amp;amp;"
        text = html.unescape(text)
    text = _UNPRINTABLE.sub(" ", unicodedata.normalize("NFC", text))
    return " ".join(text.split())[:max_characters].rstrip()


def clean(raw: RawDomain, config: DataConfig, seed: int) -> CleanDomain:
    """Drop what cannot be used and order the rest by time.

    A user's repeats of an item count once, at the first time. Equal times are ordered by a hash of
    the item id: by the id itself, the last of a tie (the test target) would favour late catalogue
    entries.

    Raises:
        DomainError: no user or fewer than `num_negatives + 1` items are left.
    """
    counts = {"raw_interactions": raw.interactions.num_rows, "raw_items": raw.items.num_rows}
    item_ids, titles, categories = _clean_items(raw.items, config.max_title_characters, counts)

    log = raw.interactions
    complete = pc.and_(
        pc.and_(
            pc.fill_null(pc.not_equal(log["user_id"], ""), False),
            pc.fill_null(pc.not_equal(log["item_id"], ""), False),
        ),
        pc.is_valid(log["timestamp"]),
    )
    counts["incomplete_interactions"] = log.num_rows - (pc.sum(complete).as_py() or 0)
    log = log.filter(complete)
    known = pc.is_in(log["item_id"], value_set=pa.array(item_ids, pa.string()))
    counts["interactions_without_item"] = log.num_rows - (pc.sum(known).as_py() or 0)
    log = log.filter(known)

    item = pc.index_in(log["item_id"], value_set=pa.array(item_ids, pa.string())).to_numpy()
    encoded = log["user_id"].combine_chunks().dictionary_encode()
    names, rank = np.unique(
        np.array(encoded.dictionary.to_pylist(), dtype=object), return_inverse=True
    )
    user = rank[encoded.indices.to_numpy()] if len(names) else np.zeros(0, dtype=np.int64)
    tie = keyed_hashes(item_ids, "tie")[item] if len(item) else item
    order = np.lexsort((tie, log["timestamp"].to_numpy(), user))
    user, item = user[order], item[order].astype(np.int32)

    pair = user.astype(np.int64) * max(1, len(item_ids)) + item
    first = np.sort(np.unique(pair, return_index=True)[1])
    counts["repeated_interactions"] = len(item) - len(first)
    user, item = user[first], item[first]

    length = np.bincount(user, minlength=len(names))
    kept = length >= config.min_user_interactions
    counts["users_below_minimum"] = int((~kept).sum())
    counts["interactions_below_minimum"] = int(length[~kept].sum())
    counts["users_over_maximum"] = 0
    counts["interactions_over_maximum"] = 0
    if config.max_users is not None and kept.sum() > config.max_users:
        candidates = np.flatnonzero(kept)
        drawn = np.argsort(keyed_hashes(names[candidates], seed, raw.name, "max_users"))
        over = candidates[drawn[config.max_users :]]
        kept[over] = False
        counts["users_over_maximum"] = len(over)
        counts["interactions_over_maximum"] = int(length[over].sum())
    item = item[kept[user]]
    counts["users"] = int(kept.sum())
    counts["items"] = len(item_ids)
    counts["interactions"] = len(item)

    if counts["users"] == 0:
        raise DomainError(
            f"domain `{raw.name}`: no user is left; lower `data.min_user_interactions` "
            f"({config.min_user_interactions}) or check the source ({describe(counts)})"
        )
    if counts["items"] < config.num_negatives + 1:
        raise DomainError(
            f"domain `{raw.name}`: {counts['items']} items are too few for "
            f"`data.num_negatives` = {config.num_negatives} ({describe(counts)})"
        )
    return CleanDomain(
        name=raw.name,
        item_ids=tuple(item_ids),
        titles=tuple(titles),
        categories=tuple(categories),
        user_ids=tuple(names[kept].tolist()),
        items=item,
        offsets=np.concatenate(([0], np.cumsum(length[kept]))).astype(np.int64),
        counts=counts,
    )


def describe(counts: dict[str, int]) -> str:
    """The counts as one line of words."""
    return ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items())


def _clean_items(
    table: pa.Table, max_title_characters: int, counts: dict[str, int]
) -> tuple[list[str], list[str], list[str | None]]:
    """Sorted ids with their titles and categories; the first titled row of an id wins."""
    kept: dict[str, tuple[str, str | None]] = {}
    counts.update(items_without_id=0, untitled_items=0, duplicate_items=0)
    columns = (table[name].to_pylist() for name in ("item_id", "title", "category"))
    for item_id, title, category in zip(*columns, strict=True):
        text = clean_title(title, max_title_characters)
        if not item_id:
            counts["items_without_id"] += 1
        elif not text:
            counts["untitled_items"] += 1
        elif item_id in kept:
            counts["duplicate_items"] += 1
        else:
            kept[item_id] = (text, category)
    ids = sorted(kept)
    return ids, [kept[i][0] for i in ids], [kept[i][1] for i in ids]
