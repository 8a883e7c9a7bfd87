"""Many sequences of item indices in two flat arrays; a million users cost no million objects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Indices = npt.NDArray[np.int32]
Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Histories(Sequence[tuple[int, ...]]):
    """A sequence of N sequences, compact in memory; a member is made a tuple when it is asked for.

    Letters: N sequences, L items in all.
    """

    values: Indices
    """(L,) item indices, one sequence after another."""
    offsets: Offsets
    """(N + 1,) sequence n is `values[offsets[n]:offsets[n + 1]]`."""

    @classmethod
    def of(cls, sequences: Iterable[Sequence[int]]) -> Histories:
        """Pack sequences of item indices."""
        if isinstance(sequences, Histories):
            return sequences
        found = [np.asarray(one, dtype=np.int32).reshape(-1) for one in sequences]
        values = np.concatenate(found) if found else np.zeros(0, dtype=np.int32)
        return cls(values, offsets_of(np.array([len(one) for one in found], dtype=np.int64)))

    @classmethod
    def from_arrow(cls, column: pa.ChunkedArray) -> Histories:
        """Of a column of lists of int32."""
        values, lengths = [np.zeros(0, dtype=np.int32)], [np.zeros(0, dtype=np.int64)]
        for lists in column.chunks:
            offsets = np.asarray(lists.offsets, dtype=np.int64)
            values.append(np.asarray(lists.values, dtype=np.int32)[offsets[0] : offsets[-1]])
            lengths.append(np.diff(offsets))
        return cls(np.concatenate(values), offsets_of(np.concatenate(lengths)))

    def to_arrow(self, start: int, end: int) -> pa.Array:
        """The sequences from `start` to `end` as `list<int32>`, without a copy of the values."""
        offsets = self.offsets[start : end + 1]
        places = (offsets - offsets[0]).astype(np.int32)
        return pa.ListArray.from_arrays(
            pa.array(places), pa.array(self.values[offsets[0] : offsets[-1]])
        )

    @property
    def lengths(self) -> Offsets:
        """(N,) items of each sequence."""
        return np.diff(self.offsets)

    @property
    def owners(self) -> Offsets:
        """(L,) the sequence that each value belongs to."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def row(self, index: int) -> Indices:
        """One sequence as an array, without a copy."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def take(self, rows: npt.NDArray[np.int64]) -> Histories:
        """(M,) the sequences at these places, in this order."""
        return self.heads(rows, self.lengths[rows])

    def heads(self, rows: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> Histories:
        """(M,) the first `lengths[m]` items of the sequence `rows[m]`."""
        offsets = offsets_of(lengths)
        starts = np.repeat(self.offsets[rows] - offsets[:-1], lengths)
        return Histories(self.values[starts + np.arange(offsets[-1])], offsets)

    def where(self, kept: npt.NDArray[np.bool_]) -> Histories:
        """(N,) the sequences with those of their items that an (L,) flag keeps."""
        lengths = np.bincount(self.owners[kept], minlength=len(self))
        return Histories(self.values[kept], offsets_of(lengths.astype(np.int64)))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> tuple[int, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[int, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[int, ...] | list[tuple[int, ...]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"history {index} of {len(self)}")
        return tuple(self.row(place).tolist())

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        for place in range(len(self)):
            yield tuple(self.row(place).tolist())

    def __eq__(self, other: object) -> bool:
        """Equal to any sequence of the same sequences."""
        if isinstance(other, Histories):
            return np.array_equal(self.offsets, other.offsets) and np.array_equal(
                self.values, other.values
            )
        if isinstance(other, Sequence):
            return len(self) == len(other) and all(
                tuple(one) == tuple(two) for one, two in zip(self, other, strict=True)
            )
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]


def offsets_of(lengths: npt.NDArray[np.int64]) -> Offsets:
    """(N + 1,) running sums from 0 of (N,) lengths."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
