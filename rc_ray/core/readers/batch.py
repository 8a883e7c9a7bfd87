"""What every reader of a file yields: some rows, column by column, as the file names them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["id", "time", "number", "text", "texts"]
"""What a column is wanted for. `texts`: one text or a list of them; the others: one value."""


@dataclass(frozen=True)
class Batch:
    columns: Mapping[str, Any]
    """Column name -> Arrow array, each of `num_rows`; what the file lacks is absent."""
    num_rows: int
    where: Callable[[int], str]
    """The place in the file of a row of this batch: "line 17" or "row 17"."""
