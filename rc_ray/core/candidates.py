"""The lists of candidates: frozen negatives per case, drawn for many cases at once.

Each case has streams of random numbers of its own, from a keyed hash of its user. Its negatives are
the first distinct allowed items of such a stream. Allowed is what the user never met. The target is
among what the user met and takes no other part, so nothing in the list follows from it.

Letters: B cases of a block, K negatives, W numbers drawn at a time, P items of a pool.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from rc_ray.core.cleaning import CleanDomain
from rc_ray.core.hashing import (
    Hashes,
    below,
    fractions,
    keyed_hashes,
    mixed,
    purpose_key,
    stream,
)
from rc_ray.core.histories import Histories, Indices, offsets_of
from rc_ray.core.pairs import PairSet
from rc_ray.core.splits import PURPOSES, TEMPERATURES, CaseTable, SplitDomain
from rc_ray.data_config import DataConfig, Negatives

BLOCK_CASES = 1 << 14
POPULARITY_POWER = 0.75
"""Of the training count plus one, as word2vec draws its negatives (Mikolov et al. 2013)."""
_NUM_ROUNDS = 4
"""Rounds of drawing, each twice as wide as the one before; then the rest is listed item by item."""
_MAX_LISTED = 1 << 22

Rows = npt.NDArray[np.int64]
Blocked = Callable[[Rows, npt.NDArray[np.integer]], npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class Drawn:
    """Candidates of a block of cases under one list."""

    candidates: Indices
    """(B, K + 1) the target among its negatives, in an order that does not depend on it."""
    is_whole: npt.NDArray[np.bool_]
    """(B,) whether enough items were left; the other rows of `candidates` mean nothing."""
    is_filled: npt.NDArray[np.bool_]
    """(B,) whether the first kind of negatives was used up and another kind filled the list."""


class Sampler(Protocol):
    """Items that negatives are drawn from, with their chances."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw."""
        ...

    def draw(self, hashes: Hashes, rows: Rows) -> npt.NDArray[np.integer]:
        """Items for (B, W) hashes of the cases `rows`; -1 for a draw that found none."""
        ...

    def listed(self, rows: Rows) -> tuple[Rows, Rows, npt.NDArray[np.float64]]:
        """Every item that `draw` can find: place in `rows`, item, weight; flat."""
        ...

    def size(self, rows: Rows) -> Rows:
        """(B,) how many items `listed` would give each case."""
        ...


@dataclass(frozen=True)
class Uniform:
    pool: Indices
    """(P,)"""

    @property
    def is_empty(self) -> bool:
        return not len(self.pool)

    def draw(self, hashes: Hashes, rows: Rows) -> npt.NDArray[np.integer]:
        return self.pool[below(hashes, len(self.pool))]

    def listed(self, rows: Rows) -> tuple[Rows, Rows, npt.NDArray[np.float64]]:
        owner = np.repeat(np.arange(len(rows)), len(self.pool))
        return owner, np.tile(self.pool, len(rows)).astype(np.int64), np.ones(len(owner))

    def size(self, rows: Rows) -> Rows:
        return np.full(len(rows), len(self.pool))


@dataclass(frozen=True)
class Weighted:
    """Items drawn with chances of their own."""

    pool: Indices
    """(P,)"""
    weights: npt.NDArray[np.float64]
    """(P,) positive."""
    summed: npt.NDArray[np.float64]
    """(P,) running sums of the chances; the last one is 1."""

    @classmethod
    def of(cls, pool: Indices, weights: npt.NDArray[np.float64]) -> Weighted:
        summed = np.cumsum(weights)
        return cls(pool, weights, summed / summed[-1] if len(summed) else summed)

    @property
    def is_empty(self) -> bool:
        return not len(self.pool)

    def draw(self, hashes: Hashes, rows: Rows) -> npt.NDArray[np.integer]:
        place = np.searchsorted(self.summed, fractions(hashes), side="right")
        return self.pool[np.minimum(place, len(self.pool) - 1)]

    def listed(self, rows: Rows) -> tuple[Rows, Rows, npt.NDArray[np.float64]]:
        owner, items, _ = Uniform(self.pool).listed(rows)
        return owner, items, np.tile(self.weights, len(rows))

    def size(self, rows: Rows) -> Rows:
        return np.full(len(rows), len(self.pool))


@dataclass(frozen=True)
class OfCategories:
    """A random item of the history, then a random item of its category."""

    members: Histories
    """(G,) items of the pool by category."""
    category: npt.NDArray[np.int64]
    """(I,) place of each item's category; G, which has no members, for an item without one."""
    histories: Histories
    """(B,) of the block's cases."""

    @property
    def is_empty(self) -> bool:
        return not len(self.members.values)

    def draw(self, hashes: Hashes, rows: Rows) -> npt.NDArray[np.integer]:
        starts, lengths = self.histories.offsets[rows], self.histories.lengths[rows]
        place = starts[:, None] + below(hashes, lengths[:, None])
        group = self.category[self.histories.values[place]]
        num = self.members.lengths[group]
        member = self.members.offsets[group] + below(mixed(hashes), num)
        found = self.members.values[np.minimum(member, len(self.members.values) - 1)]
        return np.where(num > 0, found, np.int32(-1))

    def listed(self, rows: Rows) -> tuple[Rows, Rows, npt.NDArray[np.float64]]:
        owner, group, times = self._groups(rows)
        items = self.members.take(group)
        size = items.lengths
        weights = np.repeat(times / np.maximum(size, 1), size)
        return np.repeat(owner, size), items.values.astype(np.int64), weights

    def size(self, rows: Rows) -> Rows:
        owner, group, _ = self._groups(rows)
        sizes = np.bincount(owner, self.members.lengths[group], minlength=len(rows))
        return sizes.astype(np.int64)

    def _groups(self, rows: Rows) -> tuple[Rows, Rows, npt.NDArray[np.int64]]:
        """Categories of each history, each once: place in `rows`, category, times met."""
        past = self.histories.take(rows)
        key = past.owners * len(self.members) + self.category[past.values]
        key, times = np.unique(key, return_counts=True)
        owner, group = np.divmod(key, len(self.members))
        return owner, group, times


class CandidateDrawer:
    """Draws the lists of a domain's cases.

    Args:
        domain: clean histories; a negative never stands in its user's.
        result: the split.
        config: the data section.
        seed: the experiment's seed.
    """

    def __init__(
        self, domain: CleanDomain, result: SplitDomain, config: DataConfig, seed: int
    ) -> None:
        self.lists = config.candidate_lists
        self._domain = domain
        self._cold = result.cold
        self._num_train = result.num_known
        self._seeds = keyed_hashes(domain.user_ids, seed, domain.name, "candidates")
        encoded = domain.categories.dictionary_encode()
        self._num_categories = len(encoded.dictionary)
        self._category = np.asarray(
            pc.fill_null(encoded.indices, self._num_categories), dtype=np.int64
        )
        self._pools = {
            "warm": np.flatnonzero(~result.cold).astype(np.int32),
            "cold": np.flatnonzero(result.cold).astype(np.int32),
        }
        self._members = {
            name: self._by_category(pool)
            for name, pool in self._pools.items()
            if any(one.negatives == "category" for one in self.lists.values())
        }

    def draw(self, name: str, cases: CaseTable) -> Drawn:
        """Draw one list for a block of cases of one purpose.

        Args:
            name: of the list.
            cases: (B,), users in rising order.
        """
        settings = self.lists[name]
        num = settings.num_negatives
        blocked = self._blocked(cases)
        seeds = self._case_seeds(name, cases)
        chosen = np.full((len(cases), num), -1, dtype=np.int32)
        count = np.zeros(len(cases), dtype=np.int64)
        filled = np.zeros(len(cases), dtype=bool)
        is_cold = cases.split == TEMPERATURES.index("cold")
        for wanted, cold in ((is_cold, True), (~is_cold, False)):
            rows = np.flatnonzero(wanted)
            if not len(rows):
                continue
            tiers = self._tiers(settings.negatives, cases, cold=cold)
            for tier, sampler in enumerate(tiers):
                missing = rows[count[rows] < num]
                if tier and len(missing):
                    filled[missing] = True
                tier_seeds = mixed(seeds ^ np.uint64(tier + 1))
                _fill(sampler, missing, tier_seeds, blocked, chosen, count)
        candidates = np.sort(np.column_stack([cases.target, chosen]), axis=1)
        keys = stream(mixed(seeds ^ np.uint64(0)), 0, num + 1)
        order = np.argsort(keys, axis=1, kind="stable")
        return Drawn(np.take_along_axis(candidates, order, axis=1), count == num, filled)

    def _tiers(self, kind: Negatives, cases: CaseTable, *, cold: bool) -> Sequence[Sampler]:
        """A later sampler is used only where the earlier ones are used up."""
        warm_pool, cold_pool = self._pools["warm"], self._pools["cold"]
        tiers: list[Sampler] = [Uniform(cold_pool)] if cold else []
        match kind:
            case "popularity":
                # Among cold items this is uniform: none of them has a training interaction.
                counts = self._num_train[warm_pool].astype(np.float64)
                chances = np.power(counts + 1.0, POPULARITY_POWER)
                tiers.append(Weighted.of(warm_pool, chances))
            case "category":
                members = self._members["cold" if cold else "warm"]
                tiers.insert(0, OfCategories(members, self._category, cases.histories))
                tiers.append(Uniform(warm_pool))
            case _:
                tiers.append(Uniform(warm_pool))
        return tiers

    def _case_seeds(self, name: str, cases: CaseTable) -> Hashes:
        keys = np.array(
            [[purpose_key(p, t, name) for t in TEMPERATURES] for p in PURPOSES], dtype=np.uint64
        )
        return mixed(self._seeds[cases.user] ^ keys[cases.purpose, cases.split])

    def _by_category(self, pool: Indices) -> Histories:
        group = self._category[pool]
        order = np.argsort(group, kind="stable")
        order = order[: np.searchsorted(group[order], self._num_categories)]
        num = np.bincount(group[order], minlength=self._num_categories + 1)
        return Histories(pool[order], offsets_of(num))

    def _blocked(self, cases: CaseTable) -> Blocked:
        """Whether the user of a case of the block met an item."""
        num_items = len(self._cold)
        first, last = int(cases.user[0]), int(cases.user[-1])
        offsets = self._domain.offsets[first : last + 2]
        owner = np.repeat(np.arange(last - first + 1), np.diff(offsets))
        met = PairSet(owner * num_items + self._domain.items[offsets[0] : offsets[-1]])
        user = cases.user.astype(np.int64) - first
        return lambda rows, items: met.holds(user[rows] * num_items + items)


def _fill(
    sampler: Sampler,
    rows: Rows,
    seeds: Hashes,
    blocked: Blocked,
    chosen: Indices,
    count: Rows,
) -> None:
    """Add to `chosen` and `count`, in place, what the sampler finds for the cases `rows`."""
    num = chosen.shape[1]
    start, width = 0, num + 4 + num // 8
    for _ in range(_NUM_ROUNDS):
        rows = rows[count[rows] < num]
        if not len(rows) or sampler.is_empty:
            return
        found = sampler.draw(stream(seeds[rows], start, width), rows)
        allowed = (found >= 0) & ~blocked(rows[:, None], found)
        _accept(rows, found, allowed, chosen, count)
        start, width = start + width, 2 * width
    rows = rows[count[rows] < num]
    sizes = np.cumsum(sampler.size(rows))
    while len(rows):
        # The rest item by item, some cases at a time. A weighted draw without replacement orders
        # items by exponential keys (Efraimidis and Spirakis 2006): what more draws would end in.
        end = max(1, int(np.searchsorted(sizes, _MAX_LISTED, side="right")))
        _fill_listed(sampler, rows[:end], seeds, blocked, chosen, count)
        rows, sizes = rows[end:], sizes[end:] - sizes[end - 1]


def _accept(
    rows: Rows,
    found: npt.NDArray[np.integer],
    allowed: npt.NDArray[np.bool_],
    chosen: Indices,
    count: Rows,
) -> None:
    """Take the first allowed items of each row of (B, W) `found` that are not chosen yet."""
    num = chosen.shape[1]
    before = chosen[rows] if count[rows].any() else chosen[rows][:, :0]
    both = np.column_stack([before, found]).astype(np.int64)
    # The same item again lies behind its first place once item and place are sorted together.
    keys = np.sort(((both + 1) << 32) | np.arange(both.shape[1]), axis=1)
    again = np.zeros(keys.shape, dtype=bool)
    again[:, 1:] = (keys[:, 1:] >> 32) == (keys[:, :-1] >> 32)
    row, place = np.nonzero(again)
    column = (keys[row, place] & 0xFFFFFFFF) - before.shape[1]
    allowed[row[column >= 0], column[column >= 0]] = False
    rank = np.cumsum(allowed, axis=1) - 1 + count[rows][:, None]
    row, column = np.nonzero(allowed & (rank < num))
    chosen[rows[row], rank[row, column]] = found[row, column]
    count[rows] = np.minimum(rank[:, -1] + 1, num)


def _fill_listed(
    sampler: Sampler,
    rows: Rows,
    seeds: Hashes,
    blocked: Blocked,
    chosen: Indices,
    count: Rows,
) -> None:
    num = chosen.shape[1]
    owner, items, weights = sampler.listed(rows)
    free = ~blocked(rows[owner], items)
    owner, items, weights = owner[free], items[free], weights[free]
    width = 1 + max(int(items.max(initial=0)), int(chosen[rows].max(initial=0)))
    taken = (np.arange(len(rows))[:, None] * width + chosen[rows])[chosen[rows] >= 0]
    free = ~np.isin(owner * width + items, taken)
    owner, items, weights = owner[free], items[free], weights[free]
    chance = fractions(mixed(mixed(seeds[rows[owner]]) ^ items.astype(np.uint64)))
    order = np.lexsort((items, -np.log1p(-chance) / weights, owner))
    owner, items = owner[order], items[order]
    found = np.bincount(owner, minlength=len(rows))
    rank = np.arange(len(owner)) - np.repeat(offsets_of(found)[:-1], found)
    place = rank + count[rows][owner]
    fits = place < num
    chosen[rows[owner[fits]], place[fits]] = items[fits]
    count[rows] = np.minimum(count[rows] + found, num)
