"""What tested domains hold out, and where a domain that must not train on it has it.

Across domains titles are compared exactly, after cleaning, and user ids as text.

Letters: I items, U users, N clicks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rc_ray.core.cleaning import CleanDomain
from rc_ray.core.pairs import PairSet

Flags = npt.NDArray[np.bool_]

CLICKS = pa.schema([("user_id", pa.string()), ("title", pa.string()), ("is_target", pa.bool_())])


@dataclass(frozen=True)
class HeldOut:
    """What tested domains keep from the training of every adapter that is mixed on them."""

    titles: pa.Array
    """Titles of cold items."""
    user_ids: pa.Array
    """Ids of cold users."""
    clicks: pa.Table = field(default_factory=CLICKS.empty_table)
    """(N,) schema `CLICKS`: what a domain's own training lacks of its other users and titles, as
    validation and test targets; `is_target` tells the test targets. None for a spirit domain."""
    by: tuple[str, ...] = ()
    """The domains, for messages."""

    @classmethod
    def nothing(cls) -> HeldOut:
        return cls(pa.array([], pa.string()), pa.array([], pa.string()))


class Outside:
    """Where a domain has what other domains hold out.

    Args:
        domain: clean histories.
        held_out: of the others.
    """

    def __init__(self, domain: CleanDomain, held_out: HeldOut) -> None:
        self.users: Flags = np.asarray(pc.is_in(domain.user_ids, value_set=held_out.user_ids))
        """(U,) users whom another domain holds out."""
        self.items: Flags = np.asarray(pc.is_in(domain.titles, value_set=held_out.titles))
        """(I,) items of a title that another domain holds out."""
        encoded = domain.titles.dictionary_encode()
        self._title = np.asarray(encoded.indices, dtype=np.int64)
        self._num_titles = len(encoded.dictionary)
        user = _places(held_out.clicks["user_id"], domain.user_ids)
        title = _places(held_out.clicks["title"], encoded.dictionary)
        known = (user >= 0) & (title >= 0)
        keys = user * self._num_titles + title
        is_target = np.asarray(held_out.clicks["is_target"].combine_chunks(), dtype=bool)
        self._clicks = PairSet(keys[known])
        self._targets = PairSet(keys[known & is_target])

    def trains_nothing(self, user: npt.NDArray[np.integer], item: npt.NDArray[np.integer]) -> Flags:
        """Whether clicks must not train: held-out users, titles, and clicks of these two.

        Args:
            user: (N,) places in the domain's user ids.
            item: (N,)
        """
        return self._whole(user, item) | self._clicks.holds(self._keys(user, item))

    def chooses_nothing(
        self, user: npt.NDArray[np.integer], item: npt.NDArray[np.integer]
    ) -> Flags:
        """Whether clicks must not choose an adapter either: the same, of clicks the test targets.

        Arguments as in `trains_nothing`. A validation click of two domains may validate in both.
        """
        return self._whole(user, item) | self._targets.holds(self._keys(user, item))

    def _whole(self, user: npt.NDArray[np.integer], item: npt.NDArray[np.integer]) -> Flags:
        found: Flags = self.users[user] | self.items[item]
        return found

    def _keys(
        self, user: npt.NDArray[np.integer], item: npt.NDArray[np.integer]
    ) -> npt.NDArray[np.int64]:
        keys: npt.NDArray[np.int64] = user.astype(np.int64) * self._num_titles + self._title[item]
        return keys


def _places(values: pa.ChunkedArray, known: pa.Array) -> npt.NDArray[np.int64]:
    """Where each value stands among the known ones; -1 for one that does not."""
    found = pc.fill_null(pc.index_in(values.combine_chunks(), value_set=known), -1)
    return np.asarray(found, dtype=np.int64)
