"""Anybody's own tables: CSV, TSV, JSON lines or Parquet, with a map of columns."""

from __future__ import annotations

from rc_ray.core.readers.layout import FIELDS, Format, Layout, Role

_SUFFIXES = ("csv", "tsv", "json", "jsonl", "ndjson", "parquet")


def _layout(role: Role) -> Layout:
    return Layout(
        role,
        tuple(f"{role}*.{suffix}" for suffix in _SUFFIXES)
        + tuple(f"{role}/*.{suffix}" for suffix in _SUFFIXES),
        {name: (name,) for name in FIELDS[role]},
    )


TABLE = Format(
    name="table",
    layouts=(_layout("interactions"), _layout("items")),
    free=True,
    names="files or folders named interactions* and items*, as in interactions*.csv, with the "
    f"suffix .{', .'.join(_SUFFIXES)}, also as .gz or .zst",
)
