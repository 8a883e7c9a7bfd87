"""One raw file from end to end, as record batches in the project's own form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from rc_ray.artifacts import sha256_file
from rc_ray.core.readers.batch import Batch, Kind
from rc_ray.core.readers.columnar import Columnar
from rc_ray.core.readers.conform import Conform
from rc_ray.core.readers.delimited import Delimited
from rc_ray.core.readers.faults import fault, listed, one_line
from rc_ray.core.readers.json_lines import JsonLines
from rc_ray.core.readers.layout import (
    ARCHIVES,
    FIELDS,
    REQUIRED,
    Layout,
    Role,
    dialect_of,
    medium_of,
)
from rc_ray.core.readers.text import TextFile

_KINDS: dict[str, Kind] = {
    "user_id": "id",
    "item_id": "id",
    "timestamp": "time",
    "rating": "number",
    "title": "text",
    "category": "texts",
}


@dataclass(frozen=True)
class Shard:
    """A file and what it holds."""

    path: Path
    layout: Layout

    @property
    def role(self) -> Role:
        return self.layout.role


class ShardReader:
    """Reads a shard once.

    Args:
        shard: the file.
        tick: told bytes of the file read and rows read, each since the last call.
    """

    def __init__(self, shard: Shard, tick: Callable[[int, int], None] | None = None) -> None:
        self._path = shard.path
        self._layout = shard.layout
        self._dialect = dialect_of(shard.path, shard.layout)
        self._tick = tick or (lambda num_bytes, num_rows: None)
        self._text: TextFile | None = None
        self._conform: Conform | None = None

    @property
    def counts(self) -> dict[str, int]:
        """What was read so far, by name."""
        counts = dict(self._conform.counts) if self._conform else {}
        counts["lines_with_broken_text"] = self._text.replaced_lines if self._text else 0
        return counts

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the file; of a text file only once it was read to its end."""
        return self._text.digest if self._text else sha256_file(self._path)

    def batches(self) -> Iterator[Any]:
        """Record batches of the schema of the file's role.

        Raises:
            ReaderError: the file cannot be imported; names the file, the row and the fix.
        """
        if self._path.name.lower().endswith(ARCHIVES):
            raise fault(self._path, "", "is an archive; unpack it first and give the files in it")
        medium = self._layout.medium or medium_of(self._path)
        if medium == "parquet":
            yield from self._read_columnar()
        elif medium == "delimited":
            yield from self._read_delimited()
        elif medium == "lines":
            yield from self._read_lines()
        else:
            raise fault(
                self._path,
                "",
                "its name says neither CSV, TSV, JSON lines nor Parquet; give it the suffix "
                ".csv, .tsv, .jsonl or .parquet",
            )

    def _open(self) -> TextFile:
        return TextFile(self._path, encoding=self._dialect.encoding)

    def _read_columnar(self) -> Iterator[Any]:
        reader = Columnar(self._path, lambda num_bytes: self._tick(num_bytes, 0))
        columns = self._columns_of(reader.header())
        yield from self._conformed(reader.batches(_flat(columns)), columns)

    def _read_delimited(self) -> Iterator[Any]:
        self._text = TextFile(
            self._path,
            encoding=self._dialect.encoding,
            tick=lambda num_bytes: self._tick(num_bytes, 0),
        )
        reader = Delimited(self._text, self._dialect, self._open)
        columns = self._columns_of(reader.header())
        if self._dialect.typed_names:
            kinds = {reader.types.get(name) for name in columns.get("category", ())}
            if kinds and "token_seq" not in kinds:  # one token, which may hold spaces
                category = replace(self._layout.category, separator=None)
                self._layout = replace(self._layout, category=category)
        yield from self._conformed(reader.batches(_flat(columns)), columns)

    def _read_lines(self) -> Iterator[Any]:
        self._text = TextFile(self._path, tick=lambda num_bytes: self._tick(num_bytes, 0))
        columns = self._layout.columns
        wanted = {
            column: _KINDS[field] for field in reversed(_KINDS) for column in columns.get(field, ())
        }
        reader = JsonLines(self._text, wanted, self._layout.expand)
        yield from self._conformed(reader.batches(), columns, reader.names)

    def _conformed(
        self,
        batches: Iterator[Batch],
        columns: Mapping[str, tuple[str, ...]],
        names: set[str] | None = None,
    ) -> Iterator[Any]:
        """Conform every batch; refuse a file in which no row has what every row needs."""
        self._conform = Conform(self._path, self._layout, columns)
        convert = (
            self._conform.interactions
            if self._layout.role == "interactions"
            else self._conform.items
        )
        first = True
        for batch in batches:
            try:
                converted = convert(batch)
            except pa.ArrowException as error:
                where = batch.where(_first_bad(batch, convert))
                raise fault(self._path, where, f"cannot be read: {one_line(error)}") from None
            self._tick(0, batch.num_rows)
            if first and names is not None:
                # A title may be rare; one in a million rows is enough.
                spared = {
                    column
                    for field in FIELDS[self._layout.role]
                    if converted.column(field).null_count < batch.num_rows or field == "title"
                    for column in columns.get(field, ())
                }
                self._refuse_absent(columns, names, spared)
            first = False
            yield converted
        counts = self._conform.counts
        if not counts["rows"]:
            raise fault(self._path, "", "has no rows; fetch it again")
        for field, name in (
            ("user_id", "rows_without_user"),
            ("item_id", "rows_without_item"),
            ("timestamp", "rows_without_time"),
            ("title", "titles_missing"),
        ):
            if counts[name] == counts["rows"]:
                told = " or ".join(f"`{column}`" for column in columns[field])
                raise fault(
                    self._path,
                    "",
                    f"none of its {counts['rows']:,} rows has a value in {told} ({field}); "
                    f"{self._fix(field)}",
                )

    def _columns_of(self, header: list[str]) -> dict[str, tuple[str, ...]]:
        """Field -> columns that the header has, each once."""
        found = {
            field: tuple(column for column in columns if column in header)
            for field, columns in self._layout.columns.items()
        }
        self._refuse_absent(found, set(header))
        for field, columns in found.items():
            for column in columns:
                if header.count(column) > 1:
                    raise fault(
                        self._path,
                        "",
                        f"the column `{column}` ({field}) is there {header.count(column)} times; "
                        "leave one of them or rename the others",
                    )
        return found

    def _refuse_absent(
        self,
        columns: Mapping[str, tuple[str, ...]],
        names: set[str],
        spared: set[str] | frozenset[str] = frozenset(),
    ) -> None:
        for field in REQUIRED[self._layout.role]:
            if (names | spared).isdisjoint(columns.get(field, ())):
                asked = " or ".join(f"`{name}`" for name in self._layout.columns.get(field, ()))
                found = listed(sorted(names)[:20])
                raise fault(
                    self._path,
                    "",
                    f"the column {asked} ({field}) is missing; found: {found}; {self._fix(field)}",
                )

    def _fix(self, field: str) -> str:
        if self._layout.free:
            return f"name the right one with `--column {field}=NAME`"
        return "is the file of another format or release? `table` takes a map of columns"


def _first_bad(batch: Batch, convert: Callable[[Batch], Any]) -> int:
    """The first row that cannot be converted, by halving."""
    start, end = 0, batch.num_rows
    while end - start > 1:
        middle = (start + end) // 2
        try:
            convert(_part(batch, start, middle))
        except pa.ArrowException:
            end = middle
        else:
            start = middle
    return start


def _part(batch: Batch, start: int, end: int) -> Batch:
    columns = {name: column.slice(start, end - start) for name, column in batch.columns.items()}
    return Batch(columns, end - start, lambda row: batch.where(start + row))


def _flat(columns: Mapping[str, tuple[str, ...]]) -> list[str]:
    return list(dict.fromkeys(name for names in columns.values() for name in names))
