"""The formats by name, and what a caller may change of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from rc_ray.core.readers.amazon import AMAZON_2014, AMAZON_2018, AMAZON_2023
from rc_ray.core.readers.faults import ReaderError
from rc_ray.core.readers.goodreads import GOODREADS
from rc_ray.core.readers.layout import FIELDS, ROLES, Format
from rc_ray.core.readers.movielens import (
    MOVIELENS_1M,
    MOVIELENS_10M,
    MOVIELENS_100K,
    MOVIELENS_CSV,
)
from rc_ray.core.readers.recbole import RECBOLE
from rc_ray.core.readers.steam import STEAM
from rc_ray.core.readers.table import TABLE
from rc_ray.core.readers.times import UNITS
from rc_ray.core.readers.yelp import YELP

FORMATS: Mapping[str, Format] = {
    one.name: one
    for one in (
        AMAZON_2014,
        AMAZON_2018,
        AMAZON_2023,
        MOVIELENS_100K,
        MOVIELENS_1M,
        MOVIELENS_10M,
        MOVIELENS_CSV,
        YELP,
        STEAM,
        GOODREADS,
        RECBOLE,
        TABLE,
    )
}


def format_named(
    name: str,
    *,
    columns: Mapping[str, str] | None = None,
    delimiter: str | None = None,
    time_unit: str | None = None,
) -> Format:
    """The format, with a caller's columns, delimiter and unit of time where it leaves them open.

    Raises:
        ReaderError: unknown format, field or unit, or an option that this format fixes itself.
    """
    if name not in FORMATS:
        raise ReaderError(f"unknown format `{name}`; known: {', '.join(FORMATS)}")
    found = FORMATS[name]
    fields = dict.fromkeys(field for role in ROLES for field in FIELDS[role])
    for field in columns or {}:
        if field not in fields:
            raise ReaderError(f"--column: unknown field `{field}`; fields: {', '.join(fields)}")
    if time_unit is not None and time_unit not in UNITS:
        raise ReaderError(f"--time-unit: unknown unit `{time_unit}`; units: {', '.join(UNITS)}")
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
        raise ReaderError(f"--delimiter: {delimiter!r} is not one character; for a tab say `tab`")
    if not found.free:
        for option, value in (
            ("--column", columns),
            ("--delimiter", delimiter),
            ("--time-unit", time_unit),
        ):
            if value:
                raise ReaderError(
                    f"{option}: the format `{name}` says it itself; for other files use `table`"
                )
    layouts = []
    for layout in found.layouts:
        known = dict(layout.columns)
        for field, column in (columns or {}).items():
            if field in FIELDS[layout.role]:
                known[field] = (column,)
        layout = replace(layout, columns=known, free=found.free)
        if delimiter is not None:
            layout = replace(layout, dialect=replace(layout.dialect, delimiter=delimiter))
        if time_unit is not None:
            layout = replace(layout, time=UNITS[time_unit])
        layouts.append(layout)
    return replace(found, layouts=tuple(layouts))
