"""A set of (user, item) pairs that answers fast for many pairs at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.int64]

_SLOTS_PER_KEY = 8
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


class PairSet:
    """Pairs as whole numbers, behind a filter that says at once of most others "not here".

    A binary search over a million keys costs some 20 misses of the cache, the filter one. Nearly
    all of what is asked is no member (a drawn negative that the user met), so few are searched.

    Args:
        keys: (N,) in any order.
    """

    def __init__(self, keys: Keys) -> None:
        self._keys = np.sort(keys)
        bits = max(1, (_SLOTS_PER_KEY * len(keys)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._is_used = np.zeros(1 << bits, dtype=bool)
        self._is_used[self._slots(self._keys)] = True

    def holds(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Whether each key is a member; any shape."""
        found: npt.NDArray[np.bool_] = self._is_used[self._slots(keys)]
        if len(self._keys):
            maybe = np.nonzero(found)
            asked = keys[maybe]
            place = np.minimum(np.searchsorted(self._keys, asked), len(self._keys) - 1)
            found[maybe] = self._keys[place] == asked
        return found

    def _slots(self, keys: Keys) -> npt.NDArray[np.int64]:
        with np.errstate(over="ignore"):
            return ((keys.astype(np.uint64) * _FACTOR) >> self._shift).astype(np.int64)
