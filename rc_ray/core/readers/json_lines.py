"""Files of one record per line: JSON, or Python literals (`{u'asin': ...}`) of older publishers.

JSON blocks go through Arrow with an explicit schema, so unwanted keys are never built. A block that
Arrow refuses is read line by line, which either names the line or reads what Arrow cannot (a lone
surrogate, a key given twice). Python literals go through `ast.literal_eval`, never `eval`.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.json as pa_json

from rc_ray.core.readers.batch import Batch, Kind
from rc_ray.core.readers.faults import ReaderError, fault, shown
from rc_ray.core.readers.text import Block, TextFile

Row = dict[str, Any]
_SNIFFED_LINES = 1000
_NO_RECORD = (ValueError, TypeError, SyntaxError, RecursionError, MemoryError)
"""What `json.loads` and `ast.literal_eval` raise for a line that they cannot read."""
_DEFAULT_TYPES: dict[Kind, pa.DataType] = {
    "id": pa.string(),
    "time": pa.float64(),
    "number": pa.float64(),
    "text": pa.string(),
    "texts": pa.list_(pa.string()),
}


class JsonLines:
    """Reads the wanted keys of every line.

    Args:
        text: the file.
        wanted: key -> what it is for.
        expand: makes several rows of one record; such files are read line by line.
    """

    def __init__(
        self,
        text: TextFile,
        wanted: Mapping[str, Kind],
        expand: Callable[[Row], Iterable[Row]] | None = None,
    ) -> None:
        self.names: set[str] = set()
        """Keys that were seen; of a large file those of its first lines."""
        self._text = text
        self._wanted = wanted
        self._expand = expand
        self._types: dict[str, pa.DataType] = {}

    def batches(self) -> Iterator[Batch]:
        """One batch per block of lines.

        Raises:
            ReaderError: a line is no record, or an id is a number here and a text there.
        """
        parse: Callable[[str], Any] | None = None
        for block in self._text.blocks():
            if parse is None:
                first = next(_lines(block), None)
                if first is None:
                    continue
                parse = self._syntax(*first)
                self._sniff(block, parse)
            batch = None
            if parse is json.loads and self._expand is None:
                batch = self._read_fast(block)
            if batch is None:
                batch = self._read_by_line(block, parse)
            if batch.num_rows:
                yield batch

    def _syntax(self, number: int, line: bytes) -> Callable[[str], Any]:
        """JSON or Python literals, told by the first line."""
        for parse in (json.loads, _literal):
            try:
                if isinstance(parse(line.decode()), dict):
                    return parse
            except _NO_RECORD:
                continue
        raise fault(
            self._text.path,
            f"line {number}",
            f"is no JSON object: {shown(line.decode())}; one object per line is read",
        )

    def _sniff(self, block: Block, parse: Callable[[str], Any]) -> None:
        """Learn from the first lines which type each wanted key has."""
        for position, (_, line) in enumerate(_lines(block)):
            if position >= _SNIFFED_LINES:
                break
            try:
                row = parse(line.decode())
            except _NO_RECORD:
                break  # the reading itself tells of it
            if isinstance(row, dict):
                for one in self._expand(row) if self._expand else (row,):
                    self._learn(one)
        for name, kind in self._wanted.items():
            if kind != "id":
                self._types.setdefault(name, _DEFAULT_TYPES[kind])

    def _learn(self, row: Row) -> None:
        self.names.update(row)
        for name, kind in self._wanted.items():
            if name not in self._types and row.get(name) not in (None, "", []):
                found = _type_of(kind, row[name])
                if found is not None:
                    self._types[name] = found

    def _read_fast(self, block: Block) -> Batch | None:
        """None: Arrow cannot read this block, for a reason that only single lines can tell."""
        data = block.data
        schema = pa.schema([(name, self._types.get(name, pa.string())) for name in self._wanted])
        try:
            table = pa_json.read_json(
                pa.BufferReader(data),
                read_options=pa_json.ReadOptions(use_threads=False, block_size=len(data) + 1),
                parse_options=pa_json.ParseOptions(
                    explicit_schema=schema, unexpected_field_behavior="ignore"
                ),
            )
        except pa.ArrowInvalid:
            return None
        columns = {name: table[name].combine_chunks() for name in self._wanted}
        for name, kind in self._wanted.items():
            if kind == "id" and name not in self._types and columns[name].null_count < len(table):
                self._types[name] = pa.string()
        return Batch(columns, table.num_rows, lambda row: _line_of(block, row))

    def _read_by_line(self, block: Block, parse: Callable[[str], Any]) -> Batch:
        rows: list[Row] = []
        numbers: list[int] = []
        for number, line in _lines(block):
            try:
                record = parse(line.decode())
            except _NO_RECORD as error:
                what = "JSON object" if parse is json.loads else "Python dict"
                reason = getattr(error, "msg", None) or type(error).__name__
                raise fault(
                    self._text.path,
                    f"line {number}",
                    f"is no {what} ({reason}): {shown(line.decode())}; mend or delete the line",
                ) from None
            if not isinstance(record, dict):
                raise fault(
                    self._text.path,
                    f"line {number}",
                    f"is no object but {shown(record)}; one object per line is read",
                )
            expanded = self._expand(record) if self._expand else (record,)
            for row in expanded:
                rows.append(row)
                numbers.append(number)
        columns = {}
        spoilt: set[int] = set()
        for name, kind in self._wanted.items():
            columns[name] = self._column(name, kind, rows, numbers, spoilt)
        self._text.replaced_lines += len(spoilt)
        return Batch(columns, len(rows), lambda row: f"line {numbers[row]}")

    def _column(
        self, name: str, kind: Kind, rows: list[Row], numbers: list[int], spoilt: set[int]
    ) -> pa.Array:
        values: list[Any] = []
        for row, number in zip(rows, numbers, strict=True):
            value = row.get(name)
            if value is None or value != value:  # NaN, which pandas writes for nothing
                values.append(None)
                continue
            try:
                value = self._checked(name, kind, value)
            except ValueError as error:
                raise self._wrong(number, name, str(error)) from None
            if isinstance(value, str) and not value.isascii():
                whole = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                if whole != value:
                    spoilt.add(number)
                value = whole
            values.append(value)
        if kind == "id":
            return pa.array(
                [None if value is None else str(value) for value in values], pa.string()
            )
        if kind in ("time", "number"):
            if any(isinstance(value, str) for value in values):
                return pa.array([None if v is None else str(v) for v in values], pa.string())
            return pa.array([None if v is None else float(v) for v in values], pa.float64())
        if kind == "texts" and any(isinstance(value, list) for value in values):
            lists = [[value] if isinstance(value, str) else value for value in values]
            return pa.array(lists, pa.list_(pa.string()))
        return pa.array(values, pa.string())

    def _checked(self, name: str, kind: Kind, value: Any) -> Any:
        """The value in one of the types that its kind may have.

        Raises:
            ValueError: it has another; the message says which.
        """
        if kind == "id":
            if value == "":
                return None
            found = _type_of(kind, value)
            if found is None:
                raise ValueError(f"is {shown(value)}; ids are text or whole numbers")
            known = self._types.setdefault(name, found)
            if known != found:
                here, before = (
                    "the number" if pa.types.is_integer(t) else "text" for t in (found, known)
                )
                raise ValueError(
                    f"is {here} {shown(json.dumps(value))}, in the rows before it was "
                    f"{before.removeprefix('the ')}; write all ids as text"
                )
        elif kind == "texts" and isinstance(value, list):
            return _texts(value)
        elif kind in ("time", "number"):
            if isinstance(value, bool) and kind == "time" or isinstance(value, list | dict):
                raise ValueError(f"is {shown(value)}, no number")
            if isinstance(value, int) and value.bit_length() > 1000:
                raise ValueError(f"is {shown(value)}, too large a number")
        elif isinstance(value, list | dict):
            raise ValueError(f"is {shown(value)}; it must be text")
        elif not isinstance(value, str):
            return str(value)
        return value

    def _wrong(self, number: int, name: str, what: str) -> ReaderError:
        return fault(self._text.path, f"line {number}", f"`{name}` {what}")


def _type_of(kind: Kind, value: Any) -> pa.DataType | None:
    """The Arrow type of a wanted value; None for one that its kind cannot have."""
    if kind == "id":
        if isinstance(value, str):
            return pa.string()
        whole = isinstance(value, int) and not isinstance(value, bool)
        return pa.int64() if whole else None
    if kind in ("time", "number", "texts") and isinstance(value, str):
        return pa.string()
    return _DEFAULT_TYPES[kind]


def _texts(value: list[Any]) -> list[str]:
    """A list of texts; of a list of lists (several category paths) the first."""
    if value and isinstance(value[0], list):
        value = value[0]
    return [str(one) for one in value if one is not None]


def _literal(line: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a "\d" in a review is no business of ours
        return ast.literal_eval(line.strip())


def _lines(block: Block) -> Iterator[tuple[int, bytes]]:
    """Number and text of every line that is not blank."""
    for number, line in enumerate(block.data.split(b"\n"), start=block.first_line):
        if line.strip():
            yield number, line


def _line_of(block: Block, row: int) -> str:
    for position, (number, _) in enumerate(_lines(block)):
        if position == row:
            return f"line {number}"
    return f"a line after {block.first_line}"
