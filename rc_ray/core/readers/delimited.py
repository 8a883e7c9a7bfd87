"""Delimited text: CSV with quotes, tab-separated files, `::`-separated files, with a header or not.

Every wanted column is read as text; what its values mean is decided, and complained about, later.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv

from rc_ray.core.readers.batch import Batch
from rc_ray.core.readers.faults import fault, one_line, shown
from rc_ray.core.readers.text import TextFile

_UNIT_SEPARATOR = "\x1f"
_BLOCK_BYTES = 4 << 20
_MAX_FIELD_CHARACTERS = 64 << 20


@dataclass(frozen=True)
class Dialect:
    """How a delimited file is written."""

    delimiter: str = ","
    """One character, or several as in `::`."""
    quoted: bool = True
    """Whether a value in double quotes may hold delimiters and line ends."""
    header: tuple[str, ...] | None = None
    """Names of the columns of a file that has no header line."""
    encoding: str = "utf-8"
    typed_names: bool = False
    """Whether names carry a type, as `user_id:token` does."""


class Delimited:
    """Reads some columns of a delimited file.

    Args:
        text: the file; its encoding is the dialect's.
        dialect: how it is written.
        again: opens the file anew, to find the line of a bad row.
    """

    def __init__(self, text: TextFile, dialect: Dialect, again: Callable[[], TextFile]) -> None:
        self.types: dict[str, str] = {}
        """Column -> its type in the header, where names carry one."""
        self._text = text
        self._dialect = dialect
        self._again = again

    def header(self) -> list[str]:
        """Names of the columns, without their types.

        Raises:
            ReaderError: the file is empty or its first line is blank.
        """
        if self._dialect.header is not None:
            return list(self._dialect.header)
        found = next(self._records(), None)
        if found is None:
            raise fault(self._text.path, "", "has no rows; fetch it again")
        names = found[1]
        if self._dialect.typed_names:
            pairs = [name.partition(":") for name in names]
            self.types = {name: kind for name, _, kind in pairs}
            names = [name for name, _, _ in pairs]
        return names

    def batches(self, wanted: Collection[str]) -> Iterator[Batch]:
        """Batches with the columns `wanted`, all of them in the header.

        Raises:
            ReaderError: a row has more or fewer values than the header.
        """
        names = self.header()
        positions = {name: names.index(name) for name in wanted}
        # Arrow sees numbers for names: a header may hold the same name twice.
        keys = [str(position) for position in range(len(names))]
        has_header = self._dialect.header is None
        ragged: list[Any] = []

        def note(row: Any) -> str:
            ragged.append(row)
            return "error"

        delimiter = self._dialect.delimiter
        feed = _Feed(self._text, delimiter)
        read = 0
        try:
            reader = pa_csv.open_csv(
                pa.PythonFile(feed, mode="r"),
                read_options=pa_csv.ReadOptions(
                    use_threads=False,
                    block_size=_BLOCK_BYTES,
                    column_names=keys,
                    skip_rows_after_names=int(has_header),
                ),
                parse_options=pa_csv.ParseOptions(
                    delimiter=delimiter if len(delimiter) == 1 else _UNIT_SEPARATOR,
                    quote_char='"' if self._dialect.quoted else False,
                    newlines_in_values=self._dialect.quoted,
                    invalid_row_handler=note,
                ),
                convert_options=pa_csv.ConvertOptions(
                    include_columns=[keys[position] for position in positions.values()],
                    column_types=dict.fromkeys(keys, pa.string()),
                    # "NA" and "null" are honest titles and names; only nothing is nothing.
                    null_values=[""],
                    strings_can_be_null=True,
                ),
            )
            for part in reader:
                columns = {
                    name: part.column(keys[position]) for name, position in positions.items()
                }
                start = read + has_header
                read += part.num_rows
                if part.num_rows:
                    yield Batch(columns, part.num_rows, partial(self._line_from, start))
            if self._dialect.quoted and feed.num_quotes % 2:
                self._refuse_unclosed()
        except pa.ArrowInvalid as error:
            if self._dialect.quoted and feed.num_quotes % 2:
                self._refuse_unclosed()
            if ragged:
                row = ragged[0]
                raise fault(
                    self._text.path,
                    self._ragged_line(len(names)),
                    f"has {row.actual_columns} values where {row.expected_columns} are due: "
                    f"{shown(row.text)}; mend the line or its quotes",
                ) from None
            if "Empty CSV" in str(error):
                return
            if "straddl" in str(error):
                raise fault(
                    self._text.path,
                    self._line(read + has_header),
                    f"a row here or below is longer than {_BLOCK_BYTES >> 20} MB; mend its quotes",
                ) from None
            raise fault(self._text.path, "", f"is not readable: {one_line(error)}") from None

    def _refuse_unclosed(self) -> None:
        """Refuse a quoted value without an end, which would swallow the rest of the file.

        An odd number of quotes is its sign, but a file may also hold a bare quote (12" single).
        """
        for _ in self._records(strict=True):
            pass

    def _line_from(self, start: int, row: int) -> str:
        return self._line(start + row)

    def _line(self, record: int) -> str:
        """Where the record stands; counts lines, which quoted values may hold several of."""
        for position, (number, _) in enumerate(self._records()):
            if position == record:
                return f"line {number}"
        return f"row {record + 1}"

    def _ragged_line(self, width: int) -> str:
        for number, values in self._records():
            if len(values) != width:
                return f"line {number}"
        return ""

    def _records(self, *, strict: bool = False) -> Iterator[tuple[int, list[str]]]:
        """First line and values of every record that is not blank; slow, for headers and errors."""
        text = self._again()
        if self._dialect.quoted:
            lines = (
                line
                for block in text.blocks()
                for line in io.StringIO(block.data.decode(), newline="\n")
            )
            csv.field_size_limit(_MAX_FIELD_CHARACTERS)
            reader = csv.reader(lines, delimiter=self._dialect.delimiter, strict=strict)
            start = 1
            try:
                for values in reader:
                    if values:
                        yield start, values
                    start = reader.line_num + 1
            except csv.Error as error:
                if "expected after" in str(error):
                    return  # of the strict reading alone: Arrow reads "12"" single" as it stands
                bare = "new-line character" in str(error)
                raise fault(
                    self._text.path,
                    f"line {start}",
                    "holds a bare carriage return; save the file with line ends LF or CRLF"
                    if bare
                    else "a value begins with a quote that is never closed; mend the line",
                ) from None
            return
        number = 0
        for block in text.blocks():
            for line in block.data.decode().removesuffix("\n").split("\n"):
                number += 1
                if line.strip("\r"):
                    yield number, line.rstrip("\r").split(self._dialect.delimiter)


class _Feed(io.RawIOBase):
    """The blocks of a text file as a stream that Arrow reads from."""

    def __init__(self, text: TextFile, delimiter: str) -> None:
        self._blocks = text.blocks()
        self._long = delimiter.encode() if len(delimiter) > 1 else b""
        self._left = memoryview(b"")
        self.num_quotes = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        # As many bytes as asked for: Arrow takes each answer for one block, and no row may span
        # three.
        pieces = []
        while size != 0:
            if not self._left:
                block = next(self._blocks, None)
                if block is None:
                    break
                self._left = memoryview(self._prepared(block.data))
            taken = self._left if size < 0 else self._left[:size]
            self._left = self._left[len(taken) :]
            pieces.append(taken)
            size -= len(taken) if size > 0 else 0
        return b"".join(pieces)

    def _prepared(self, data: bytes) -> bytes:
        self.num_quotes += data.count(b'"')
        return data.replace(self._long, _UNIT_SEPARATOR.encode()) if self._long else data
