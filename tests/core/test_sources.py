from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rc_ray.core import sources
from rc_ray.core.sources import SourceError
from rc_ray.data_config import CsvSource, MovieLensSource, ParquetSource, Source, domain_names

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


def read(source: Source, movielens_dir: Path | None = None) -> dict[str, tuple[pa.Table, pa.Table]]:
    """Domain -> its log and its items, read to their ends."""
    found = sources.read(source, movielens_dir)
    return {name: (raw.interactions.to_table(), raw.items) for name, raw in found.items()}


def read_csv(
    folder: Path, log: str | bytes, items: str | bytes = ITEMS, **fields: Any
) -> tuple[pa.Table, pa.Table]:
    return read(csv_source(folder, log, items, **fields))["shop"]


def test_csv_with_a_column_map(tmp_path: Path) -> None:
    log, items = read_csv(
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
    assert log.schema.equals(sources.INTERACTIONS)
    # Times that are no whole seconds keep their order only.
    late, early = log["timestamp"].to_pylist()
    assert late > early > 0
    assert log.drop_columns("timestamp").to_pylist() == [
        {"user_id": "ann", "item_id": "7", "rating": 4.5},
        {"user_id": "ann", "item_id": "8", "rating": None},
    ]
    assert items.to_pylist() == [
        {"item_id": "7", "title": 'Salt; "fine"', "category": "kitchen"},
        {"item_id": "8", "title": "NA", "category": None},
    ]


def test_csv_without_time_takes_the_row_order(tmp_path: Path) -> None:
    log, _ = read_csv(tmp_path, "user_id,item_id\nu,b\nu,a\n", columns={"timestamp": None})
    assert log["timestamp"].to_pylist() == [0, 1]


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("", ["log.csv", "empty"]),
        ("user_id,item_id,timestamp\n", ["log.csv", "no rows"]),
        ("user,item_id,timestamp\nu,a,1\n", ["log.csv", "`user_id`", "columns.user_id"]),
        (LOG + "u,a,yesterday\n", ["log.csv: line 4", "`timestamp`", "yesterday", "Unix seconds"]),
        # A blank line and a value of two lines: line 7 is the fifth record.
        (LOG + '\n"u\nv",a,3\nu,b,soon\n', ["log.csv: line 7", "`timestamp`", "soon"]),
        (LOG + "u,a,-5\n", ["log.csv: line 4", "`timestamp` is -5", "negative"]),
        (LOG + "u,a,0.5\nu,a,-0.5\n", ["log.csv: line 5", "`timestamp` is -0.5", "negative"]),
        (LOG + "u,a,inf\n", ["log.csv: line 4", "infinite"]),
        (LOG + "u,a\n", ["log.csv: line 4", "Expected 3 columns, got 2"]),
        (b"user_id,item_id,timestamp\nu,a,1\nu,Caf\xe9,1\n", ["log.csv: line 3", "UTF-8"]),
    ],
)
def test_bad_csv(tmp_path: Path, log: str | bytes, words: list[str]) -> None:
    with pytest.raises(SourceError) as caught:
        read_csv(tmp_path, log)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize("num_rows", [1, 100_000, 3_000_000])
def test_an_unclosed_quote_swallows_nothing(tmp_path: Path, num_rows: int) -> None:
    """In the last column the rest of the file would become one title, without a word."""
    items = 'item_id,title\na,"L\nM"\nb,"N\n' + "c,OOO\n" * num_rows
    with pytest.raises(SourceError, match=r"items\.csv: line 4: a value begins with a quote that"):
        read(csv_source(tmp_path, LOG, items))


def test_a_quote_within_a_value_is_a_character(tmp_path: Path) -> None:
    items = 'item_id,title\na,Seven 7" single\nb,N\n'
    _, found = read(csv_source(tmp_path, LOG, items))["shop"]
    assert found["title"].to_pylist() == ['Seven 7" single', "N"]


def test_a_column_that_is_there_twice(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"items\.csv: the column `title` is there 2 times"):
        read(csv_source(tmp_path, LOG, "item_id,title,title\na,L,M\n"))
    columns = [pa.array([one]) for one in ("u", "v", "a", 1)]
    names = ["user_id", "user_id", "item_id", "timestamp"]
    pq.write_table(pa.Table.from_arrays(columns, names), tmp_path / "interactions.parquet")
    pq.write_table(pa.table({"item_id": ["a"], "title": ["L"]}), tmp_path / "items.parquet")
    source = ParquetSource(format="parquet", domain="shop", path=tmp_path)
    with pytest.raises(SourceError, match=r"interactions\.parquet: the column `user_id` is there"):
        read(source)


def compressed_source(folder: Path, data: bytes) -> CsvSource:
    (folder / "log.csv.gz").write_bytes(data)
    return csv_source(folder, LOG, ITEMS).model_copy(update={"interactions": folder / "log.csv.gz"})


def test_a_compressed_csv_is_read_like_a_plain_one(tmp_path: Path) -> None:
    log, _ = read(compressed_source(tmp_path, gzip.compress(LOG.encode())))["shop"]
    assert log["item_id"].to_pylist() == ["a", "b"]
    with pytest.raises(SourceError, match=r"log\.csv\.gz: line 4: `timestamp` is -5"):
        read(compressed_source(tmp_path, gzip.compress((LOG + "u,a,-5\n").encode())))


def test_a_compressed_csv_that_is_cut_off_is_named(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).integers(10**9, size=20_000)
    rows = "".join(f"u{number},a,1\n" for number in numbers)
    data = gzip.compress((LOG + rows).encode())
    with pytest.raises(SourceError, match=r"log\.csv\.gz: after line \d+: .*fetch") as caught:
        read(compressed_source(tmp_path, data[: len(data) // 2]))
    assert "\n" not in str(caught.value)


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
    log, items = read(source)["shop"]
    assert log.schema.equals(sources.INTERACTIONS)
    assert log.to_pylist() == [{"user_id": "u", "item_id": "7", "timestamp": 5, "rating": None}]
    assert items.to_pylist() == [{"item_id": "7", "title": "Salt", "category": None}]


def test_parquet_without_a_column(tmp_path: Path) -> None:
    source = write_parquet(tmp_path, item_id=[7], timestamp=[5])
    with pytest.raises(SourceError, match="column `user_id` is missing; found: item_id, timestamp"):
        read(source)


def test_truncated_parquet(tmp_path: Path) -> None:
    source = write_parquet(tmp_path, item_id=[7], user_id=["u"], timestamp=[5])
    path = tmp_path / "interactions.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SourceError, match=r"interactions\.parquet: not a readable Parquet file"):
        read(source)


def test_a_wrong_parquet_value_is_named_with_its_row(tmp_path: Path) -> None:
    source = write_parquet(
        tmp_path, item_id=[7, 8, 9], user_id=["u", "u", "u"], timestamp=[1.0, 2.0, -3.0]
    )
    with pytest.raises(SourceError, match=r"interactions\.parquet: row 3: `timestamp` is -3.0"):
        read(source)
    source = write_parquet(tmp_path, item_id=[7, 8], user_id=["u", "u"], timestamp=["1", "x"])
    with pytest.raises(SourceError, match=r"row 2: .* must hold numbers, .*--time-unit iso"):
        read(source)
    source = write_parquet(
        tmp_path, item_id=[7, 8], user_id=["u", "u"], timestamp=[1, 2], rating=["5", "good"]
    )
    with pytest.raises(SourceError, match=r"row 2: the column `rating` .* numbers, found 'good'$"):
        read(source)


def test_parquet_parts_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    source = write_parquet(tmp_path, item_id=[7], user_id=["u"], timestamp=[5])
    whole = tmp_path / "interactions.parquet"
    whole.unlink()
    whole.mkdir()
    for name, user in (("part-1", "second"), ("part-0", "first"), ("_hidden", "nobody")):
        table = pa.table({"user_id": [user], "item_id": ["7"], "timestamp": [1]})
        pq.write_table(table, whole / f"{name}.parquet")
    log, _ = read(source)["shop"]
    assert log["user_id"].to_pylist() == ["first", "second"]
    assert list(sources.files(source)) == [
        "interactions.parquet/part-0.parquet",
        "interactions.parquet/part-1.parquet",
        "items.parquet",
    ]
    pq.write_table(
        pa.table({"user_id": ["u"] * 2, "item_id": ["7"] * 2, "timestamp": [1, -1]}),
        whole / "part-1.parquet",
    )
    with pytest.raises(SourceError, match=r"part-1\.parquet: row 2"):
        read(source)
    for path in whole.glob("part*"):
        path.unlink()
    with pytest.raises(SourceError, match=r"interactions\.parquet: holds no file named"):
        read(source)


def test_a_fraction_late_in_the_log_still_keeps_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rc_ray.core.raw_files.BATCH_ROWS", 2)
    times = [3.0, 1.0, 2.0, 1.5, None, 0.0]
    source = write_parquet(tmp_path, item_id=[7] * 6, user_id=["u"] * 6, timestamp=times)
    log, _ = read(source)["shop"]
    found = log["timestamp"].to_pylist()
    assert found.pop(4) is None
    assert np.argsort(found).tolist() == [4, 1, 3, 2, 0]


def test_items_without_any_title(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"items\.csv: no item has a title"):
        read_csv(tmp_path, LOG, "item_id,title\na,\nb, \n")


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
    source = MovieLensSource(format="movielens-100k", domain="films")
    log, items = read(source, movielens)["films"]
    assert items["title"].to_pylist()[1] == 'The "Quoted" One'
    assert log.to_pylist()[1] == {
        "user_id": "u",
        "item_id": "3",
        "timestamp": 50,
        "rating": 4.0,
    }


def test_a_film_goes_to_the_first_domain_of_its_genres(movielens: Path) -> None:
    genres = {"comedy": ("Comedy",), "scifi": ("Sci-Fi",), "dark": ("Horror", "Action", "Drama")}
    source = MovieLensSource(format="movielens-100k", path=movielens, genre_domains=genres)
    raw = read(source)
    assert list(raw) == list(domain_names(source)) == ["comedy", "scifi", "dark"]
    assert {n: items["item_id"].to_pylist() for n, (_, items) in raw.items()} == {
        "comedy": ["1"],
        "scifi": ["2", "3"],
        "dark": ["4"],
    }
    assert raw["scifi"][0]["user_id"].to_pylist() == ["u", "v"]


def test_unknown_genre(movielens: Path) -> None:
    source = MovieLensSource(
        format="movielens-100k", path=movielens, genre_domains={"x": ("Anime",)}
    )
    with pytest.raises(SourceError, match=r"`Anime` of `genre_domains\.x`; genres: Action, Anim"):
        sources.read(source)
