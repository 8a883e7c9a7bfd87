"""Times of publishers -> whole Unix seconds, column by column.

What is ambiguous is refused, never guessed. Milliseconds that are read as seconds keep their order,
so nothing would fail; but beside a file in seconds, or a split at a date, they would be wrong
without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

TimeUnit = Literal["s", "ms", "us", "iso", "goodreads", "steam"]
"""Numbers since 1970 in seconds, milliseconds or microseconds; ISO 8601 dates; "Wed Mar 22 11:37:04
-0700 2017"; "Posted November 5, 2011."."""
NUMERIC_UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000}
UNITS: Mapping[str, TimeUnit] = {"s": "s", "ms": "ms", "us": "us", "iso": "iso"}
"""What a person may name."""

_FAR = 10**11
"""Seconds in the year 5138, milliseconds in 1973."""
_LATE = "is {{}}, as {} a time after the year 5000; it looks like {}"
_EARLY = "is {{}}, as {} a time before 1974; it looks like seconds (`--time-unit s`)"
_WRONG_UNIT = {
    1: (_LATE.format("seconds", "milliseconds (`--time-unit ms`)"), ""),
    1_000: (
        _LATE.format("milliseconds", "microseconds (`--time-unit us`)"),
        _EARLY.format("milliseconds"),
    ),
    1_000_000: (
        _LATE.format("microseconds", "nanoseconds; divide them by 1000"),
        _EARLY.format("microseconds"),
    ),
}
_MONTHS = tuple("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split())
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_GOODREADS = (
    r"^\w{3} (?P<month>\w{3}) (?P<day>\d\d) (?P<clock>\d\d:\d\d:\d\d) (?P<zone>[+-]\d{4}) "
    r"(?P<year>\d{4})$"
)
_STEAM = r"^Posted (?P<month>\w{3})\w* (?P<day>\d{1,2}), (?P<year>\d{4})\.?$"
_ZONED = r":\d\d(\.\d+)?(Z|[+-]\d\d(:?\d\d)?)$"

Complain = Callable[[int, str], Exception]
"""Makes the error for a row of the batch and a text that says what is wrong with its time."""


def to_seconds(values: Any, unit: TimeUnit, complain: Complain) -> Any:
    """Whole seconds since 1970, rounded down; null where the file holds nothing.

    Args:
        values: an Arrow array of text, numbers, or (from Parquet) timestamps.
        unit: what the values are; typed timestamps know it themselves.
        complain: makes the error that is raised.
    """
    kind = values.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        seconds = values.cast(pa.timestamp("ns")) if pa.types.is_date(kind) else values
        return _not_negative(
            seconds.cast(pa.timestamp("s"), safe=False).cast(pa.int64()), values, complain
        )
    if unit in ("iso", "goodreads", "steam"):
        if pa.types.is_null(kind):
            return pa.nulls(len(values), pa.int64())
        if not pa.types.is_string(kind) and not pa.types.is_large_string(kind):
            raise complain(0, "is a number, no date; numbers want `--time-unit s`, `ms` or `us`")
        texts = pc.utf8_trim_whitespace(values.cast(pa.string()))
        texts = pc.if_else(pc.equal(texts, ""), None, texts)
        read = {"iso": _iso, "goodreads": _goodreads, "steam": _steam}[unit]
        return _not_negative(read(texts, complain), values, complain)
    return _from_numbers(to_numbers(values, complain, whole=True), NUMERIC_UNITS[unit], complain)


def to_numbers(values: Any, complain: Complain, *, whole: bool = False) -> Any:
    """Numbers (float64, or int64 where `whole` and all are); null where the file holds nothing."""
    kind = values.type
    if pa.types.is_null(kind):
        return pa.nulls(len(values), pa.float64())
    if pa.types.is_boolean(kind):
        return values.cast(pa.int8()).cast(pa.float64())
    if pa.types.is_integer(kind):
        return values.cast(pa.int64()) if whole else values.cast(pa.float64())
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return values.cast(pa.float64())
    if not pa.types.is_string(kind) and not pa.types.is_large_string(kind):
        raise complain(0, f"has the type {kind}; it must hold numbers")
    for target in (pa.int64(), pa.float64()) if whole else (pa.float64(),):
        try:
            return values.cast(target)
        except pa.ArrowInvalid:
            continue
    texts = pc.utf8_trim_whitespace(values.cast(pa.string()))
    texts = pc.if_else(pc.equal(texts, ""), None, texts)
    bad = _first(pc.invert(pc.match_substring_regex(texts, _NUMBER)))
    if bad is not None:
        hint = "; dates want `--time-unit iso`" if whole else "; empty the value or mend it"
        raise complain(bad, f"is {str(values[bad].as_py())[:60]!r}, no number{hint}")
    return texts.cast(pa.float64())


def _from_numbers(values: Any, scale: int, complain: Complain) -> Any:
    """Int64 or float64 counts of 1/scale seconds -> whole seconds, refusing the wrong scale."""
    known = pc.fill_null(values, 0)
    numbers = np.asarray(known)
    if numbers.dtype.kind == "f":
        if np.isinf(numbers).any():
            raise complain(int(np.isinf(numbers).argmax()), "is infinite; mend the row")
        values = pc.if_else(pc.is_nan(values), None, values)
        numbers = np.nan_to_num(numbers)
    far, near = _WRONG_UNIT[scale]
    for wrong, what in (
        (numbers < 0, "is negative: {}; times before 1970 cannot be read, mend or delete the row"),
        (numbers >= _FAR * scale, far),
        ((numbers > 0) & (numbers < _FAR * (scale // 1_000)), near),
    ):
        if np.any(wrong):
            row = int(np.argmax(wrong))
            raise complain(row, what.format(f"{numbers[row]:.15g}"))
    seconds = np.floor_divide(numbers, scale).astype(np.int64)
    return pa.array(seconds, pa.int64(), mask=np.asarray(pc.is_null(values)))


def _iso(texts: Any, complain: Complain) -> Any:
    texts = pc.replace_substring_regex(texts, r" ?UTC$", "Z")
    zoned = pc.fill_null(pc.match_substring_regex(texts, _ZONED), False)
    plain = pc.if_else(zoned, None, texts)
    with_zone = pc.if_else(zoned, texts, None)
    seconds = []
    for part, kind in ((plain, pa.timestamp("ns")), (with_zone, pa.timestamp("ns", "UTC"))):
        try:
            seconds.append(_cast_time(part, kind))
        except pa.ArrowInvalid:
            row = _first_uncastable(part, kind)
            raise complain(
                row,
                f"is {str(part[row].as_py())[:60]!r}, no date such as 2024-05-31 or "
                "2024-05-31T12:00:00Z",
            ) from None
    return pc.coalesce(*seconds)


def _cast_time(texts: Any, kind: Any) -> Any:
    return texts.cast(kind).cast(pa.timestamp("s", kind.tz), safe=False).cast(pa.int64())


def _first_uncastable(texts: Any, kind: Any) -> int:
    for row in range(len(texts)):
        try:
            texts.slice(row, 1).cast(kind)
        except pa.ArrowInvalid:
            return row
    return 0


def _goodreads(texts: Any, complain: Complain) -> Any:
    parts = pc.extract_regex(texts, _GOODREADS)
    bad = _first(pc.and_(pc.is_null(parts), pc.is_valid(texts)))
    if bad is not None:
        raise complain(
            bad,
            f"is {texts[bad].as_py()[:60]!r}, no date such as 'Wed Mar 22 11:37:04 -0700 2017'",
        )
    return _iso(
        _joined(parts, pc.struct_field(parts, "clock"), pc.struct_field(parts, "zone")), complain
    )


def _steam(texts: Any, complain: Complain) -> Any:
    """Posts of the year of the crawl are written without a year, and no file says which: null."""
    parts = pc.extract_regex(texts, _STEAM)
    return _iso(_joined(parts, None, None), complain)


def _joined(parts: Any, clock: Any | None, zone: Any | None) -> Any:
    """Year, month and day (and clock and zone) of a struct as ISO text; null where one is."""
    month = pc.index_in(pc.struct_field(parts, "month"), value_set=pa.array(_MONTHS))
    numbers = pa.array([f"{number:02}" for number in range(1, 13)])
    day = pc.utf8_lpad(pc.struct_field(parts, "day"), 2, padding="0")
    date = pc.binary_join_element_wise(
        pc.struct_field(parts, "year"), numbers.take(month), day, "-"
    )
    if clock is None:
        return date
    return pc.binary_join_element_wise(pc.binary_join_element_wise(date, clock, "T"), zone, "")


def _not_negative(seconds: Any, values: Any, complain: Complain) -> Any:
    bad = _first(pc.less(seconds, 0))
    if bad is not None:
        raise complain(
            bad,
            f"is before 1970: {str(values[bad].as_py())[:60]}; such times cannot be read, "
            "mend or delete the row",
        )
    return seconds


def _first(mask: Any) -> int | None:
    """Position of the first true of a mask; nulls are false."""
    flags = np.asarray(pc.fill_null(mask, False))
    return int(flags.argmax()) if flags.any() else None
