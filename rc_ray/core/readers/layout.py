"""What a publisher's file holds: its names, its columns, its unit of time. Plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from rc_ray.core.readers.delimited import Dialect
from rc_ray.core.readers.times import TimeUnit

Role = Literal["interactions", "items"]
ROLES: tuple[Role, ...] = ("interactions", "items")
FIELDS: Mapping[Role, tuple[str, ...]] = {
    "interactions": ("user_id", "item_id", "timestamp", "rating"),
    "items": ("item_id", "title", "category"),
}
REQUIRED: Mapping[Role, tuple[str, ...]] = {
    "interactions": ("user_id", "item_id", "timestamp"),
    "items": ("item_id", "title"),
}
COMPRESSED = (".gz", ".zst")
ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.zst", ".7z", ".rar")
LINES = (".json", ".jsonl", ".ndjson")
DELIMITED = (".csv", ".tsv", ".txt", ".dat", ".data", ".item", ".inter")
PARQUET = (".parquet", ".pq")

Medium = Literal["lines", "delimited", "parquet"]


@dataclass(frozen=True)
class Category:
    """Which of an item's categories is kept: one text."""

    take: Literal["first", "last"] = "first"
    """Of a list."""
    separator: str | None = None
    """What stands between the categories of one text; its first is kept. None: the whole text."""
    flags: bool = False
    """Whether every category is a column of its own, with `1` where it applies."""
    nothing: tuple[str, ...] = ()
    """Texts that stand for no category."""


@dataclass(frozen=True)
class Layout:
    """One kind of file of a format."""

    role: Role
    patterns: tuple[str, ...]
    """Names of such files without `.gz` or `.zst`; one with a `/` names the folder too."""
    columns: Mapping[str, tuple[str, ...]]
    """Field -> columns that may hold it; the first one with a value counts, row by row."""
    time: TimeUnit = "s"
    category: Category = Category()
    dialect: Dialect = Dialect()
    medium: Medium | None = None
    """None: told by the file's name."""
    expand: Callable[[dict[str, Any]], Iterable[dict[str, Any]]] | None = None
    """Makes several rows of one record of a file of lines."""
    unrated: float | None = None
    """A rating that means "not rated"."""
    free: bool = False
    """Whether the caller may name columns, delimiter and unit of time."""
    spoilt_title: str | None = None
    """A text that no title holds unless the publisher's crawler went wrong."""

    def fits(self, path: Path) -> bool:
        """Whether the file bears one of the names."""
        name = plain_name(path).lower()
        in_folder = f"{path.parent.name.lower()}/{name}"
        return any(
            fnmatch(in_folder if "/" in pattern else name, pattern.lower())
            for pattern in self.patterns
        )


@dataclass(frozen=True)
class Format:
    """A publisher's format."""

    name: str
    layouts: tuple[Layout, ...]
    """The first that fits a file counts."""
    page: str = ""
    """Where the publisher describes it."""
    free: bool = False
    """Whether columns, delimiter and unit of time are the caller's to say."""
    names: str = ""
    """The file names in words, where the patterns are many."""

    def layout_of(self, path: Path) -> Layout | None:
        """The layout that the file's name tells; None if it tells none."""
        return next((layout for layout in self.layouts if layout.fits(path)), None)

    def expected(self) -> str:
        """The file names of this format, in words."""
        if self.names:
            return self.names
        parts = []
        for role in ROLES:
            names = [n for layout in self.layouts if layout.role == role for n in layout.patterns]
            parts.append(f"{role}: {', '.join(dict.fromkeys(names))}")
        return "; ".join(parts) + " (also as .gz or .zst)"


def plain_name(path: Path) -> str:
    """The file's name without the suffix of its compression."""
    return path.stem if path.suffix.lower() in COMPRESSED else path.name


def medium_of(path: Path) -> Medium | None:
    """What the file's name says of its inside; None if nothing."""
    suffix = Path(plain_name(path)).suffix.lower()
    if suffix in LINES:
        return "lines"
    if suffix in PARQUET:
        return "parquet"
    return "delimited" if suffix in DELIMITED else None


def dialect_of(path: Path, layout: Layout) -> Dialect:
    """The layout's dialect; where it leaves it open, `.tsv` means tabs."""
    if layout.dialect == Dialect() and Path(plain_name(path)).suffix.lower() == ".tsv":
        return Dialect(delimiter="\t")
    return layout.dialect
