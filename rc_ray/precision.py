"""In which precision a stage computed, told as `dtypes` in its manifest, in the order of use.

`model.dtype: auto` is measured by each process, so what was finished on another processor or GPU
may be of the other precision. Nothing is refused for that; it is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def joined(*parts: Iterable[str]) -> list[str]:
    """Each name once."""
    return list(dict.fromkeys(name for part in parts for name in part))


def dtypes_in(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Of the steps of a training; none where they are of a version that did not tell."""
    return joined(str(row["dtype"]) for row in rows if "dtype" in row)


def mixed_precision(what: str, dtypes: Sequence[str]) -> str | None:
    """What to tell where parts of one whole are of different precision; None where they are not."""
    if len(dtypes) < 2:
        return None
    return (
        f"{what}: partly computed in {', partly in '.join(dtypes)}, as `model.dtype: auto` chose "
        "in each process; for one precision run this stage again with --force, or set `model.dtype`"
    )
