"""Raw formats -> interactions, as a stream of record batches, and items, in the project's own form.

interactions: `user_id string, item_id string, timestamp int64, rating float32 null`
items:        `item_id string, title string, category string null`

Nothing is cleaned here: what comes out is what the files hold, so that every row that cleaning
drops is counted in one place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rc_ray.core.raw_files import FractionalTimes, SourceError, csv_batches, parquet_batches
from rc_ray.data_config import CsvSource, MovieLensSource, ParquetSource, Source, domain_names

__all__ = ["INTERACTIONS", "ITEMS", "Interactions", "RawDomain", "SourceError", "read"]

INTERACTIONS = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("timestamp", pa.int64()),
        ("rating", pa.float32()),
    ]
)
ITEMS = pa.schema([("item_id", pa.string()), ("title", pa.string()), ("category", pa.string())])


@dataclass(frozen=True)
class Interactions:
    """A log of any length; each pass reads it anew, some rows at a time."""

    open: Callable[[bool], Iterator[pa.RecordBatch]]
    """Starts a pass; True asks for times by their order alone."""

    @classmethod
    def of(cls, table: pa.Table) -> Interactions:
        """Of a table in memory, schema `INTERACTIONS`."""
        return cls(lambda _: iter(table.to_batches()))

    def batches(self, *, by_order: bool = False) -> Iterator[pa.RecordBatch]:
        """Record batches of schema `INTERACTIONS`, rows in file order.

        Args:
            by_order: give numbers that sort like the times instead of the times, for a log whose
                times are no whole seconds.

        Raises:
            SourceError: a file cannot be used; `FractionalTimes` where `by_order` would help.
        """
        return self.open(by_order)

    def to_table(self) -> pa.Table:
        """All rows at once, for small logs."""
        try:
            return pa.Table.from_batches(self.batches(), INTERACTIONS)
        except FractionalTimes:
            return pa.Table.from_batches(self.batches(by_order=True), INTERACTIONS)


@dataclass(frozen=True)
class RawDomain:
    name: str
    interactions: Interactions
    items: pa.Table
    """Schema `ITEMS`, rows in file order."""

    @classmethod
    def from_tables(cls, name: str, interactions: pa.Table, items: pa.Table) -> RawDomain:
        """Of tables in memory."""
        return cls(name, Interactions.of(interactions), items)


def files(source: Source, movielens_dir: Path | None = None) -> dict[str, Path]:
    """Every file that `read` reads: a name that does not tell its folder -> its path.

    Args:
        source: the source section.
        movielens_dir: where a MovieLens source without a `path` finds its files.

    Raises:
        SourceError: a file is missing or empty.
    """
    interactions, items = _files(source, movielens_dir)
    log = interactions[0]
    if isinstance(source, ParquetSource) and log.parent != source.path:
        found = {f"{log.parent.name}/{path.name}": path for path in interactions}
    else:
        found = {log.name: log}
    return {**found, items.name if items.name not in found else f"items/{items.name}": items}


def _files(source: Source, movielens_dir: Path | None) -> tuple[tuple[Path, ...], Path]:
    """The files of interactions in order, and the file of items."""
    match source:
        case ParquetSource():
            log, items = source.path / "interactions.parquet", source.path / "items.parquet"
            fix = f"`path` of the source `{source.domain}` names its folder"
        case CsvSource():
            log, items = source.interactions, source.items
            fix = f"`interactions` and `items` of the source `{source.domain}` name the files"
        case MovieLensSource():
            folder = source.path or movielens_dir
            if folder is None:
                raise SourceError("movielens-100k: the source has no `path`; give the data folder")
            log, items = folder / "ml-100k.inter", folder / "ml-100k.item"
            fix = (
                "`path` of the movielens-100k source names its folder; null takes the embedded copy"
            )
    parts: tuple[Path, ...] = (log,)
    if isinstance(source, ParquetSource) and log.is_dir():
        parts = _parts(log)
        if not parts:
            raise SourceError(f"{log}: holds no file named *.parquet; {fix}")
    for path in (*parts, items):
        if not path.is_file():
            raise SourceError(f"{path}: no such file; {fix}")
        if path.stat().st_size == 0:
            raise SourceError(f"{path}: is empty; {fix}")
    return parts, items


def read(source: Source, movielens_dir: Path | None = None) -> dict[str, RawDomain]:
    """Open a source: domain name -> its log, to be streamed, and its items.

    Args:
        source: the source section.
        movielens_dir: where a MovieLens source without a `path` finds its files.

    Raises:
        SourceError: a file is missing, empty or unreadable, lacks a column, holds a value that is
            no number where one is needed, or no item has a title. What is wrong with a log may
            show only as it is streamed.
    """
    logs, items_path = _files(source, movielens_dir)
    interactions = _interactions(source, logs)
    match source:
        case ParquetSource():
            item_batches = parquet_batches((items_path,), ITEMS, {"category"})
        case CsvSource():
            columns = source.columns
            item_batches = csv_batches(
                items_path,
                source.delimiter,
                ITEMS,
                {"item_id": columns.item_id, "title": columns.title, "category": columns.category},
            )
        case MovieLensSource():
            item_batches = csv_batches(
                items_path,
                "\t",
                ITEMS,
                {
                    "item_id": "item_id:token",
                    "title": "movie_title:token_seq",
                    "category": "class:token_seq",
                },
                atomic=True,
            )
    items = pa.Table.from_batches(item_batches, ITEMS)
    if not pc.any(pc.not_equal(pc.utf8_trim_whitespace(items["title"]), "")).as_py():
        raise SourceError(
            f"{items_path}: no item has a title, and titles are what the model reads; fill the "
            "column of titles, or name another one"
        )
    if isinstance(source, MovieLensSource) and source.genre_domains is not None:
        return _split_by_genre(source.genre_domains, interactions, items, items_path)
    (name,) = domain_names(source)
    return {name: RawDomain(name, interactions, items)}


def open_log(source: Source, path: Path) -> tuple[dict[str, Path], Interactions]:
    """A further log of a source's domain: Parquet in the project's form, or the source's own form.

    Args:
        source: the source section; its own files are not looked at.
        path: a file, or a folder with `interactions.parquet` or with Parquet part files.

    Returns:
        The files by name, and the log, to be streamed.

    Raises:
        SourceError: the path holds no log that can be read so.
    """
    if path.is_dir():
        inner = path / "interactions.parquet"
        folder = inner if inner.is_dir() else path
        parts = (inner,) if inner.is_file() else _parts(folder)
        if not parts:
            raise SourceError(
                f"{path}: holds neither `interactions.parquet` nor part files named *.parquet; "
                "name the file of the log"
            )
    else:
        parts = (path,)
    for part in parts:
        if not part.is_file():
            raise SourceError(f"{part}: no such file or folder")
        if part.stat().st_size == 0:
            raise SourceError(f"{part}: is empty")
    if parts[0].suffix == ".parquet":
        return {part.name: part for part in parts}, _parquet_log(parts)
    if isinstance(source, ParquetSource):
        raise SourceError(
            f"{path}: is not named *.parquet, as the logs of `{source.domain}` are; "
            "`rc-ray import` makes Parquet of other formats"
        )
    return {path.name: path}, _interactions(source, parts)


def _parts(folder: Path) -> tuple[Path, ...]:
    return tuple(
        path for path in sorted(folder.glob("*.parquet")) if not path.name.startswith((".", "_"))
    )


def _parquet_log(logs: tuple[Path, ...]) -> Interactions:
    return Interactions(
        lambda by_order: parquet_batches(logs, INTERACTIONS, {"rating"}, by_order=by_order)
    )


def _interactions(source: Source, logs: tuple[Path, ...]) -> Interactions:
    """The log of a source, in its form, from these files."""
    columns: dict[str, str | None]
    match source:
        case ParquetSource():
            return _parquet_log(logs)
        case CsvSource():
            named, delimiter, atomic = source.columns, source.delimiter, False
            columns = {
                "user_id": named.user_id,
                "item_id": named.item_id,
                "timestamp": named.timestamp,
                "rating": named.rating,
            }
        case MovieLensSource():
            delimiter, atomic = "\t", True
            columns = {
                "user_id": "user_id:token",
                "item_id": "item_id:token",
                "timestamp": "timestamp:float",
                "rating": "rating:float",
            }
    return Interactions(
        lambda by_order: csv_batches(
            logs[0], delimiter, INTERACTIONS, columns, atomic=atomic, by_order=by_order
        )
    )


def _split_by_genre(
    genre_domains: Mapping[str, tuple[str, ...]],
    log: Interactions,
    items: pa.Table,
    items_path: Path,
) -> dict[str, RawDomain]:
    """A film goes to the first domain naming one of its genres; films of no domain are left out."""
    interactions = log.to_table()
    film_genres = pc.split_pattern(pc.fill_null(items["category"], ""), " ")
    known = sorted(set(pc.list_flatten(film_genres).to_pylist()) - {""})
    free = pa.array(np.ones(items.num_rows, dtype=bool))
    padded = pc.binary_join_element_wise("", pc.fill_null(items["category"], ""), "", " ")
    domains = {}
    for name, genres in genre_domains.items():
        chosen = pa.array(np.zeros(items.num_rows, dtype=bool))
        for genre in genres:
            if genre not in known:
                raise SourceError(
                    f"{items_path}: no film has the genre `{genre}` of `genre_domains.{name}`; "
                    f"genres: {', '.join(known)}"
                )
            chosen = pc.or_(chosen, pc.match_substring(padded, f" {genre} "))
        chosen = pc.and_(chosen, free)
        free = pc.and_not(free, chosen)
        films = items.filter(chosen)
        of_films = pc.is_in(interactions["item_id"], value_set=films["item_id"].combine_chunks())
        domains[name] = RawDomain.from_tables(name, interactions.filter(of_films), films)
    return domains
