from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rc_ray.core import sources
from rc_ray.core.sources import SourceError
from rc_ray.data_config import CsvSource, MovieLensSource, ParquetSource

ITEMS = "item_id,title\na,Lamp\nb,River\n"
LOG = "user_id,item_id,timestamp\nu,a,2\nu,b,1\n"


def csv_source(folder: Path, log: str | bytes, items: str | bytes, **fields: Any) -> CsvSource:
    for name, text in (("log.csv", log), ("items.csv", items)):
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return CsvSource(
        format="csv",
        domain="shop",
        interactions=folder / "log.csv",
        items=folder / "items.csv",
        **fields,
    )


def read_csv(folder: Path, log: str | bytes, items: str | bytes = ITEMS, **fields: Any) -> Any:
    return sources.read(csv_source(folder, log, items, **fields))["shop"]


def test_csv_with_a_column_map(tmp_path: Path) -> None:
    raw = read_csv(
        tmp_path,
        "when;who;what;stars\n1.5;ann;7;4.5\n0.25;ann;8;\n",
        'what;name;kind\n7;"Salt; ""fine""";kitchen\n8;NA;\n',
        delimiter=";",
        columns={
            "user_id": "who",
            "item_id": "what",
            "timestamp": "when",
            "rating": "stars",
            "title": "name",
            "category": "kind",
        },
    )
    assert raw.interactions.schema.equals(sources.INTERACTIONS)
    # Times that are no whole seconds keep their order only.
    assert raw.interactions.to_pylist() == [
        {"user_id": "ann", "item_id": "7", "timestamp": 1, "rating": 4.5},
        {"user_id": "ann", "item_id": "8", "timestamp": 0, "rating": None},
    ]
    assert raw.items.to_pylist() == [
        {"item_id": "7", "title": 'Salt; "fine"', "category": "kitchen"},
        {"item_id": "8", "title": "NA", "category": None},
    ]


def test_csv_without_time_takes_the_row_order(tmp_path: Path) -> None:
    raw = read_csv(tmp_path, "user_id,item_id\nu,b\nu,a\n", columns={"timestamp": None})
    assert raw.interactions["timestamp"].to_pylist() == [0, 1]


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("", ["log.csv", "empty"]),
        ("user_id,item_id,timestamp\n", ["log.csv", "no rows"]),
        ("user,item_id,timestamp\nu,a,1\n", ["log.csv", "`user_id`", "columns.user_id"]),
        (LOG + "u,a,yesterday\n", ["log.csv", "`timestamp`", "yesterday", "Unix seconds"]),
        (LOG + "u,a\n", ["log.csv", "Expected 3 columns, got 2"]),
        (b"user_id,item_id,timestamp\nu,Caf\xe9,1\n", ["log.csv", "UTF-8"]),
    ],
)
def test_bad_csv(tmp_path: Path, log: str | bytes, words: list[str]) -> None:
    with pytest.raises(SourceError) as caught:
        read_csv(tmp_path, log)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_missing_file(tmp_path: Path) -> None:
    source = csv_source(tmp_path, LOG, ITEMS)
    source.items.unlink()
    with pytest.raises(SourceError, match=r"items\.csv: no such file; .*`items`"):
        sources.read(source)


def write_parquet(folder: Path, **log: list[Any]) -> ParquetSource:
    pq.write_table(pa.table(log), folder / "interactions.parquet")
    pq.write_table(pa.table({"item_id": [7], "title": ["Salt"]}), folder / "items.parquet")
    return ParquetSource(format="parquet", domain="shop", path=folder)


def test_parquet_is_cast_to_the_schema(tmp_path: Path) -> None:
    source = write_parquet(tmp_path, item_id=[7], user_id=["u"], timestamp=[5.0])
    raw = sources.read(source)["shop"]
    assert raw.interactions.schema.equals(sources.INTERACTIONS)
    assert raw.interactions.to_pylist() == [
        {"user_id": "u", "item_id": "7", "timestamp": 5, "rating": None}
    ]
    assert raw.items.to_pylist() == [{"item_id": "7", "title": "Salt", "category": None}]


def test_parquet_without_a_column(tmp_path: Path) -> None:
    source = write_parquet(tmp_path, item_id=[7], timestamp=[5])
    with pytest.raises(SourceError, match="column `user_id` is missing; found: item_id, timestamp"):
        sources.read(source)


def test_truncated_parquet(tmp_path: Path) -> None:
    source = write_parquet(tmp_path, item_id=[7], user_id=["u"], timestamp=[5])
    path = tmp_path / "interactions.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SourceError, match=r"interactions\.parquet: not a readable Parquet file"):
        sources.read(source)


@pytest.fixture
def movielens(tmp_path: Path) -> Path:
    (tmp_path / "ml-100k.item").write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "1\tToy Story\t1995\tAnimation Children's Comedy\n"
        '2\tThe "Quoted" One\t1995\tAction Sci-Fi\n'
        "3\tAlien\t1979\tHorror Sci-Fi\n"
        "4\tSmoke\t1995\tDrama\n"
    )
    (tmp_path / "ml-100k.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        "u\t1\t3\t100\nu\t3\t4\t50\nv\t2\t1\t70\nv\t4\t5\t80\n"
    )
    return tmp_path


def test_movielens_as_one_domain(movielens: Path) -> None:
    raw = sources.read(MovieLensSource(format="movielens-100k", domain="films"), movielens)["films"]
    assert raw.items["title"].to_pylist()[1] == 'The "Quoted" One'
    assert raw.interactions.to_pylist()[1] == {
        "user_id": "u",
        "item_id": "3",
        "timestamp": 50,
        "rating": 4.0,
    }


def test_a_film_goes_to_the_first_domain_of_its_genres(movielens: Path) -> None:
    genres = {"comedy": ("Comedy",), "scifi": ("Sci-Fi",), "dark": ("Horror", "Action", "Drama")}
    source = MovieLensSource(format="movielens-100k", path=movielens, genre_domains=genres)
    raw = sources.read(source)
    assert list(raw) == list(sources.domain_names(source)) == ["comedy", "scifi", "dark"]
    assert {n: d.items["item_id"].to_pylist() for n, d in raw.items()} == {
        "comedy": ["1"],
        "scifi": ["2", "3"],
        "dark": ["4"],
    }
    assert raw["scifi"].interactions["user_id"].to_pylist() == ["u", "v"]


def test_unknown_genre(movielens: Path) -> None:
    source = MovieLensSource(
        format="movielens-100k", path=movielens, genre_domains={"x": ("Anime",)}
    )
    with pytest.raises(SourceError, match=r"`Anime` of `genre_domains\.x`; genres: Action, Anim"):
        sources.read(source)
