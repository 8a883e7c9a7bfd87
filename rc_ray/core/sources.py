"""Raw formats -> interactions and items, as Arrow tables in the project's own form.

interactions: `user_id string, item_id string, timestamp int64, rating float32 null`
items:        `item_id string, title string, category string null`

Nothing is cleaned here: the tables hold what the files hold, so that every row that cleaning drops
is counted in one place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pc_csv
import pyarrow.parquet as pq

from rc_ray.data_config import CsvSource, MovieLensSource, ParquetSource, Source
from rc_ray.errors import UserError

INTERACTIONS = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("timestamp", pa.int64()),
        ("rating", pa.float32()),
    ]
)
ITEMS = pa.schema([("item_id", pa.string()), ("title", pa.string()), ("category", pa.string())])


class SourceError(UserError):
    """A raw file cannot be used; the message names the file, the column and the fix."""


@dataclass(frozen=True)
class RawDomain:
    name: str
    interactions: pa.Table
    """Schema `INTERACTIONS`, rows in file order."""
    items: pa.Table
    """Schema `ITEMS`, rows in file order."""


def domain_names(source: Source) -> tuple[str, ...]:
    """The domains that `read` returns for this source, in its order."""
    if isinstance(source, MovieLensSource) and source.genre_domains is not None:
        return tuple(source.genre_domains)
    assert source.domain is not None
    return (source.domain,)


def files(source: Source, movielens_dir: Path | None = None) -> tuple[Path, Path]:
    """The file of interactions and the file of items that `read` reads.

    Args:
        source: the source section.
        movielens_dir: where a MovieLens source without a `path` finds its files.

    Raises:
        SourceError: a file is missing or empty.
    """
    match source:
        case ParquetSource():
            pair = (source.path / "interactions.parquet", source.path / "items.parquet")
            fix = f"`path` of the source `{source.domain}` names its folder"
        case CsvSource():
            pair = (source.interactions, source.items)
            fix = f"`interactions` and `items` of the source `{source.domain}` name the files"
        case MovieLensSource():
            folder = source.path or movielens_dir
            if folder is None:
                raise SourceError("movielens-100k: the source has no `path`; give the data folder")
            pair = (folder / "ml-100k.inter", folder / "ml-100k.item")
            fix = (
                "`path` of the movielens-100k source names its folder; null takes the embedded copy"
            )
    for path in pair:
        if not path.is_file():
            raise SourceError(f"{path}: no such file; {fix}")
        if path.stat().st_size == 0:
            raise SourceError(f"{path}: is empty; {fix}")
    return pair


def read(source: Source, movielens_dir: Path | None = None) -> dict[str, RawDomain]:
    """Read a source: domain name -> its tables.

    Args:
        source: the source section.
        movielens_dir: where a MovieLens source without a `path` finds its files.

    Raises:
        SourceError: a file is missing, empty or unreadable, lacks a column or holds a value that is
            no number where one is needed.
    """
    interactions_path, items_path = files(source, movielens_dir)
    match source:
        case ParquetSource():
            interactions = _read_parquet(interactions_path, INTERACTIONS, optional={"rating"})
            items = _read_parquet(items_path, ITEMS, optional={"category"})
        case CsvSource():
            columns = source.columns
            interactions = _read_csv(
                interactions_path,
                source.delimiter,
                INTERACTIONS,
                {
                    "user_id": columns.user_id,
                    "item_id": columns.item_id,
                    "timestamp": columns.timestamp,
                    "rating": columns.rating,
                },
            )
            items = _read_csv(
                items_path,
                source.delimiter,
                ITEMS,
                {"item_id": columns.item_id, "title": columns.title, "category": columns.category},
            )
        case MovieLensSource():
            interactions = _read_csv(
                interactions_path,
                "\t",
                INTERACTIONS,
                {
                    "user_id": "user_id:token",
                    "item_id": "item_id:token",
                    "timestamp": "timestamp:float",
                    "rating": "rating:float",
                },
                atomic=True,
            )
            items = _read_csv(
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
            if source.genre_domains is not None:
                return _split_by_genre(source.genre_domains, interactions, items, items_path)
    (name,) = domain_names(source)
    return {name: RawDomain(name, interactions, items)}


def _read_parquet(path: Path, schema: pa.Schema, optional: set[str]) -> pa.Table:
    try:
        file = pq.ParquetFile(path)
        found = file.schema_arrow.names
        missing = [name for name in schema.names if name not in found and name not in optional]
        if missing:
            raise SourceError(
                f"{path}: the column `{missing[0]}` is missing; found: {', '.join(found)}"
            )
        table = file.read(columns=[name for name in schema.names if name in found])
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(f"{path}: not a readable Parquet file: {_one_line(error)}") from None
    return _conform(path, table, schema, {name: name for name in table.column_names})


def _read_csv(
    path: Path,
    delimiter: str,
    schema: pa.Schema,
    columns: Mapping[str, str | None],
    *,
    atomic: bool = False,
) -> pa.Table:
    """Read a delimited file; `atomic` files (RecBole's) know no quotes and have a fixed header."""
    wanted = {name: column for name, column in columns.items() if column is not None}
    parse = pc_csv.ParseOptions(
        delimiter=delimiter,
        quote_char=False if atomic else '"',
        newlines_in_values=not atomic,
    )
    # Everything is read as text first: types are then ours to decide and to complain about.
    try:
        found = pc_csv.open_csv(path, parse_options=parse).schema.names
        for name, column in wanted.items():
            if column not in found:
                fix = (
                    "is this the file of MovieLens-100K in RecBole's form?"
                    if atomic
                    else f"set `columns.{name}` or `delimiter` of the source"
                )
                raise SourceError(
                    f"{path}: the column `{column}` is missing; found: {', '.join(found)}; {fix}"
                )
        table = pc_csv.read_csv(
            path,
            parse_options=parse,
            convert_options=pc_csv.ConvertOptions(
                include_columns=sorted(set(wanted.values())),
                column_types={column: pa.string() for column in wanted.values()},
                # "NA" and "null" are honest titles and names; only nothing is nothing.
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
    except pa.ArrowInvalid as error:
        raise SourceError(
            f"{path}: not readable as UTF-8 text with the delimiter {delimiter!r}: "
            f"{_one_line(error)}"
        ) from None
    return _conform(path, table, schema, wanted)


def _conform(
    path: Path, table: pa.Table, schema: pa.Schema, columns: Mapping[str, str]
) -> pa.Table:
    """Rename and cast to `schema`; an absent column becomes null, absent time the row order."""
    if table.num_rows == 0:
        raise SourceError(f"{path}: has no rows")
    arrays = []
    for field in schema:
        if field.name not in columns:
            if field.name == "timestamp":
                arrays.append(pa.array(np.arange(table.num_rows), pa.int64()))
            else:
                arrays.append(pa.nulls(table.num_rows, field.type))
            continue
        column = columns[field.name]
        values = table[column]
        if field.name == "timestamp":
            arrays.append(_times(path, column, values))
        elif pa.types.is_floating(field.type):
            arrays.append(_numbers(path, column, values).cast(field.type))
        else:
            try:
                arrays.append(values.cast(field.type))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                raise SourceError(
                    f"{path}: the column `{column}` has the type {values.type}; it must hold text"
                ) from None
    return pa.table(arrays, schema=schema)


def _times(path: Path, column: str, values: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    """Whole seconds where the numbers are whole, else their dense order from 0."""
    if pa.types.is_timestamp(values.type) or pa.types.is_date(values.type):
        return values.cast(pa.timestamp("s"), safe=False).cast(pa.int64())
    if pa.types.is_integer(values.type):
        return values.cast(pa.int64())
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        try:
            return values.cast(pa.int64())
        except pa.ArrowInvalid:
            pass  # not whole numbers, or no numbers: the next step says which
    numbers = _numbers(path, column, values).combine_chunks()
    floats = numbers.to_numpy(zero_copy_only=False)
    known = np.isfinite(floats)
    if np.isinf(floats).any():
        raise SourceError(f"{path}: the column `{column}` holds an infinite number")
    whole = known & (np.floor(floats) == floats) & (np.abs(floats) < 2**53)
    times = np.zeros(len(floats), dtype=np.int64)
    if whole.sum() == known.sum():
        times[known] = floats[known].astype(np.int64)
    else:
        times[known] = np.unique(floats[known], return_inverse=True)[1]
    return pa.array(times, pa.int64(), mask=~known)


def _numbers(path: Path, column: str, values: pa.ChunkedArray) -> pa.ChunkedArray:
    try:
        return values.cast(pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise SourceError(
            f"{path}: the column `{column}` must hold numbers (time in Unix seconds): "
            f"{_one_line(error)}"
        ) from None


def _split_by_genre(
    genre_domains: Mapping[str, tuple[str, ...]],
    interactions: pa.Table,
    items: pa.Table,
    items_path: Path,
) -> dict[str, RawDomain]:
    """A film goes to the first domain naming one of its genres; films of no domain are left out."""
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
        domains[name] = RawDomain(name, interactions.filter(of_films), films)
    return domains


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
