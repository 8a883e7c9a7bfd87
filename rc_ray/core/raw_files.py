"""Parquet and delimited files as record batches of a wanted schema; errors name file and row.

A file is never held whole: what is read is one batch at a time, checked and cast. Only where a
value is wrong is the file read again, to tell its line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pc_csv
import pyarrow.parquet as pq

from rc_ray.core.raw_text import (
    Place,
    QuoteCounter,
    SourceError,
    broken_line,
    lines_from,
    refuse_unclosed,
)
from rc_ray.core.readers.faults import listed

__all__ = ["FractionalTimes", "SourceError", "csv_batches", "parquet_batches", "times"]

BATCH_ROWS = 1 << 20
_BLOCK_BYTES = 16 << 20


class FractionalTimes(SourceError):
    """A time is no whole number; the file's times can be read by their order alone."""


def parquet_batches(
    paths: Sequence[Path], schema: pa.Schema, optional: set[str], *, by_order: bool = False
) -> Iterator[pa.RecordBatch]:
    """Batches of Parquet files, one file after another.

    Args:
        paths: the files.
        schema: what the batches are cast to.
        optional: columns that may be missing; they become null.
        by_order: read times as codes that keep their order, see `times`.

    Raises:
        SourceError: a file is unreadable, lacks a column or holds a value that cannot be cast.
    """
    num_rows = 0
    for path in paths:
        start = 0
        try:
            with pq.ParquetFile(path) as file:
                found = file.schema_arrow.names
                missing = [n for n in schema.names if n not in found and n not in optional]
                if missing:
                    raise SourceError(
                        f"{path}: the column `{missing[0]}` is missing; found: {listed(found)}"
                    )
                wanted = [name for name in schema.names if name in found]
                _refuse_repeats(path, wanted, found)
                for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=wanted):
                    columns = {name: (name, batch.column(name)) for name in wanted}
                    yield _conform(path, columns, schema, _rows_from(start), start, by_order)
                    start += batch.num_rows
        except (pa.ArrowInvalid, OSError) as error:
            after = f" after row {start}" if start else ""
            raise SourceError(
                f"{path}: not a readable Parquet file{after}: {_one_line(error)}"
            ) from None
        num_rows += start
    if not num_rows:
        raise SourceError(f"{paths[0]}: has no rows")


def csv_batches(
    path: Path,
    delimiter: str,
    schema: pa.Schema,
    columns: Mapping[str, str | None],
    *,
    atomic: bool = False,
    by_order: bool = False,
) -> Iterator[pa.RecordBatch]:
    """Batches of a delimited file.

    Args:
        path: the file; UTF-8, with a header; compressed where its name says so (.gz, .zst ...).
        delimiter: one character.
        schema: what the batches are cast to.
        columns: name in the schema -> name in the file; null for a column that is absent. An
            absent column becomes null, an absent time the row's number.
        atomic: a file of RecBole's: no quotes, a fixed header.
        by_order: read times as codes that keep their order, see `times`.

    Raises:
        SourceError: the file is unreadable, lacks a column or holds a value that cannot be cast.
    """
    wanted = {name: column for name, column in columns.items() if column is not None}
    parse = pc_csv.ParseOptions(
        delimiter=delimiter, quote_char=False if atomic else '"', newlines_in_values=not atomic
    )
    start = 0
    try:
        blocks = pc_csv.ReadOptions(block_size=_BLOCK_BYTES)
        found = pc_csv.open_csv(path, read_options=blocks, parse_options=parse).schema.names
        _refuse_repeats(path, wanted.values(), found)
        for name, column in wanted.items():
            if column not in found:
                fix = (
                    "is this the file of MovieLens-100K in RecBole's form?"
                    if atomic
                    else f"set `columns.{name}` or `delimiter` of the source"
                )
                raise SourceError(
                    f"{path}: the column `{column}` is missing; found: {listed(found)}; {fix}"
                )
        # Everything is read as text first: types are then ours to decide and to complain about.
        text = QuoteCounter(path)
        reader = pc_csv.open_csv(
            pa.PythonFile(text, mode="r"),
            read_options=blocks,
            parse_options=parse,
            convert_options=pc_csv.ConvertOptions(
                include_columns=sorted(set(wanted.values())),
                column_types={column: pa.string() for column in wanted.values()},
                # "NA" and "null" are honest titles and names; only nothing is nothing.
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
        for batch in reader:
            if not batch.num_rows:
                continue
            place = lines_from(path, delimiter, atomic, start)
            named = {name: (column, batch.column(column)) for name, column in wanted.items()}
            yield _conform(path, named, schema, place, start, by_order)
            start += batch.num_rows
        # An odd number is the sign of a quote without an end, which swallows the rest of the file.
        if not atomic and text.num_quotes % 2:
            refuse_unclosed(path, delimiter)
    except pa.ArrowInvalid as error:
        if not atomic and "straddl" in str(error):
            refuse_unclosed(path, delimiter)
        line = broken_line(path, delimiter, atomic)
        raise SourceError(
            f"{path}: {line}not readable as UTF-8 text with the delimiter {delimiter!r}: "
            f"{_one_line(error)}"
        ) from None
    except OSError as error:  # of a compressed file
        line = broken_line(path, delimiter, atomic)
        raise SourceError(
            f"{path}: {line}the data is cut off or damaged here ({_one_line(error)}); fetch the "
            "file again"
        ) from None
    if not start:
        raise SourceError(f"{path}: has no rows")


def _refuse_repeats(path: Path, wanted: Iterable[str], found: Sequence[str]) -> None:
    for name in wanted:
        if found.count(name) > 1:
            raise SourceError(
                f"{path}: the column `{name}` is there {found.count(name)} times; leave one of "
                "them or rename the others"
            )


def _conform(
    path: Path,
    columns: Mapping[str, tuple[str, pa.Array]],
    schema: pa.Schema,
    place: Place,
    start: int,
    by_order: bool,
) -> pa.RecordBatch:
    """Rename and cast to `schema`; an absent column becomes null, absent time the row number."""
    num_rows = len(next(iter(columns.values()))[1])
    arrays = []
    for field in schema:
        if field.name not in columns:
            if field.name == "timestamp":
                arrays.append(pa.array(np.arange(start, start + num_rows), pa.int64()))
            else:
                arrays.append(pa.nulls(num_rows, field.type))
            continue
        column, values = columns[field.name]
        if field.name == "timestamp":
            arrays.append(times(path, column, values, place, by_order=by_order))
        elif pa.types.is_floating(field.type):
            arrays.append(_numbers(path, column, values, place).cast(field.type))
        else:
            try:
                arrays.append(values.cast(field.type))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                raise SourceError(
                    f"{path}: the column `{column}` has the type {values.type}; it must hold text"
                ) from None
    return pa.record_batch(arrays, schema=schema)


def times(
    path: Path, column: str, values: pa.Array, place: Place, *, by_order: bool = False
) -> pa.Array:
    """Whole seconds as int64, not negative; null where the file holds nothing.

    Args:
        path: the file, for errors.
        column: the column's name in the file, for errors.
        values: (N,) times as the file holds them.
        place: where a row stands in the file.
        by_order: give the bits of each number as a 64-bit float instead. For numbers that are not
            negative these rise with the number, so fractions keep their order exactly.

    Raises:
        SourceError: a time is no number, infinite or negative.
        FractionalTimes: a time is no whole number and `by_order` is not set.
    """
    kind = values.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        values = values.cast(pa.timestamp("s"), safe=False).cast(pa.int64())
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        try:
            values = values.cast(pa.int64())
        except pa.ArrowInvalid:
            pass  # not whole numbers, or no numbers: the next step says which
    if pa.types.is_integer(values.type) and not by_order:
        try:
            values = values.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise SourceError(f"{path}: the column `{column}`: {_one_line(error)}") from None
        low = pc.min(values).as_py()
        if low is not None and low < 0:
            raise _wrong_time(
                path, column, values, np.asarray(pc.fill_null(values, 0)) < 0, place, "is negative"
            )
        return values
    dates = "; give Unix seconds, or let `rc-ray import table --time-unit iso` read the dates"
    numbers = _numbers(path, column, values, place, fix=dates)
    floats = numbers.to_numpy(zero_copy_only=False)
    known = ~np.isnan(floats)  # a null reads as not-a-number
    for wrong, what in ((np.isinf(floats), "is infinite"), (floats < 0, "is negative")):
        if wrong.any():
            raise _wrong_time(path, column, numbers, wrong, place, what)
    result = np.zeros(len(floats), dtype=np.int64)
    if by_order:
        result[known] = (floats[known] + 0.0).view(np.int64)
        return pa.array(result, mask=~known)
    fraction = known & ((np.floor(floats) != floats) | (np.abs(floats) >= 2.0**63))
    if fraction.any():
        row = int(np.argmax(fraction))
        raise FractionalTimes(
            f"{path}: {place(row)}: `{column}` is {floats[row]}, no whole number of seconds"
        )
    result[known] = floats[known].astype(np.int64)
    return pa.array(result, mask=~known)


def _wrong_time(
    path: Path, column: str, values: pa.Array, wrong: Any, place: Place, what: str
) -> SourceError:
    row = int(np.argmax(wrong))
    return SourceError(
        f"{path}: {place(row)}: `{column}` is {values[row]}, which {what}; give Unix seconds, or "
        "numbers from 0 that sort"
    )


def _numbers(path: Path, column: str, values: pa.Array, place: Place, *, fix: str = "") -> pa.Array:
    if pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
        return values.cast(pa.float64(), safe=False)
    try:
        return values.cast(pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        row = _first_bad(values)
        raise SourceError(
            f"{path}: {place(row)}: the column `{column}` must hold numbers, found "
            f"{str(values[row])[:60]!r}{fix}"
        ) from None


def _first_bad(values: pa.Array) -> int:
    """The first row that is no number, by halving."""
    start, end = 0, len(values)
    while end - start > 1:
        middle = (start + end) // 2
        try:
            values.slice(start, middle - start).cast(pa.float64())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            end = middle
        else:
            start = middle
    return start


def _rows_from(start: int) -> Place:
    return lambda row: f"row {start + row + 1}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
