"""The text of delimited files: a count of its quotes, and the line of a bad record.

Records are read here with the standard library, slowly, and only once something is wrong.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow as pa

from rc_ray.errors import UserError

_MAX_FIELD_CHARACTERS = 64 << 20

Place = Callable[[int], str]
"""Row of a batch, from 0 -> its place in the file: "line 17" or "row 17"."""


class SourceError(UserError):
    """A raw file cannot be used; the message names the file, the row or column, and the fix."""


class QuoteCounter(io.RawIOBase):
    """The unpacked bytes of a file, with a count of the quotes that went by."""

    def __init__(self, path: Path) -> None:
        self._stream = pa.input_stream(path, compression="detect")
        self.num_quotes = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._stream.read(size if size >= 0 else None)
        self.num_quotes += data.count(b'"')
        return data


def refuse_unclosed(path: Path, delimiter: str) -> None:
    """Raise where a value begins with a quote that is never closed: it swallows what follows.

    An odd number of quotes is the sign of it, but may also come from a bare one within a value
    (12" single), which is read as it stands.
    """
    with suppress(csv.Error):
        for _ in _records(path, delimiter, atomic=False, strict=True):
            pass


def lines_from(path: Path, delimiter: str, atomic: bool, start: int) -> Place:
    """Where rows stand in the file.

    Args:
        path: the file.
        delimiter: one character.
        atomic: without quotes.
        start: records between the header and the batch that the rows are of.
    """

    def place(row: int) -> str:
        records = _records(path, delimiter, atomic)
        next(records, None)
        for number, (line, _) in enumerate(records):
            if number == start + row:
                return f"line {line}"
        return f"row {start + row + 1}"

    return place


def _records(
    path: Path, delimiter: str, atomic: bool, *, strict: bool = False
) -> Iterator[tuple[int, list[str]]]:
    """First line and values of every record, the header included; blank lines are none.

    Raises:
        SourceError: where `strict`, a quoted value has no end.
        csv.Error: where `strict`, a bare quote stands in a quoted value.
    """
    with (
        pa.input_stream(path, compression="detect") as raw,
        io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="") as file,
    ):
        reader = (
            csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE)
            if atomic
            else csv.reader(file, delimiter=delimiter, strict=strict)
        )
        csv.field_size_limit(_MAX_FIELD_CHARACTERS)
        line = 1
        try:
            for record in reader:
                if record:
                    yield line, record
                line = reader.line_num + 1
        except csv.Error as error:
            if strict and ("unexpected end" in str(error) or "field larger" in str(error)):
                raise SourceError(
                    f"{path}: line {line}: a value begins with a quote that is never closed; mend "
                    "the line"
                ) from None
            raise


def broken_line(path: Path, delimiter: str, atomic: bool) -> str:
    """Where the first record has another number of values than the header or is no UTF-8.

    Of compressed data that cannot be read on: the last line that is whole. Text to set before a
    message, empty where no line is to blame.
    """
    width, line = None, 0
    try:
        for line, record in _records(path, delimiter, atomic):
            width = len(record) if width is None else width
            if len(record) != width or any(not _is_text(value) for value in record):
                return f"line {line}: "
    except csv.Error:
        return ""
    except OSError:
        return f"after line {line}: " if line else ""
    return ""


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
