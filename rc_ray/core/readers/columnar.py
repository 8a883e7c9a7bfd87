"""Parquet files, some columns of them, row group by row group."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rc_ray.core.readers.batch import Batch
from rc_ray.core.readers.faults import fault, one_line

_BATCH_ROWS = 1 << 16


class Columnar:
    """Reads a Parquet file.

    Args:
        path: the file.
        tick: told a share of the file's size after every batch.

    Raises:
        ReaderError: it is no Parquet file.
    """

    def __init__(self, path: Path, tick: Callable[[int], None] | None = None) -> None:
        self._path = path
        self._tick = tick
        if path.stat().st_size == 0:
            raise fault(path, "", "is empty; fetch it again")
        try:
            self._file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable("", error) from None

    def header(self) -> list[str]:
        """Names of the columns."""
        return list(self._file.schema_arrow.names)

    def batches(self, wanted: Collection[str]) -> Iterator[Batch]:
        """Batches with the columns `wanted`, all of them in the header.

        Raises:
            ReaderError: a row group is damaged.
        """
        size = self._path.stat().st_size
        rows = max(1, self._file.metadata.num_rows)
        read = 0
        parts = self._file.iter_batches(
            batch_size=_BATCH_ROWS, columns=list(wanted), use_threads=False
        )
        while True:
            try:
                part = next(parts, None)
            except (pa.ArrowException, OSError) as error:
                raise self._unreadable(f"row {read + 1}", error) from None
            if part is None:
                return
            columns = {name: part.column(name) for name in wanted}
            start, read = read, read + part.num_rows
            if self._tick is not None:
                self._tick(size * read // rows - size * start // rows)
            if part.num_rows:
                yield Batch(columns, part.num_rows, partial(_row, start))

    def _unreadable(self, where: str, error: Exception) -> Exception:
        return fault(
            self._path, where, f"is not readable as Parquet ({one_line(error)}); fetch it again"
        )


def _row(start: int, row: int) -> str:
    return f"row {start + row + 1}"
