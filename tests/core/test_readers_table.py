"""Anybody's tables: columns, units of time, compression, oddities, and what is refused."""

from __future__ import annotations

import datetime
import gzip
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rc_ray.core.readers import text
from rc_ray.core.readers.faults import ReaderError
from rc_ray.core.readers.finding import find
from rc_ray.core.readers.formats import format_named
from rc_ray.core.readers.shard import ShardReader
from tests.core.readers_files import write

OWN = {"user_id": "who", "item_id": "what", "timestamp": "at"}
ITEMS = "item_id,title\na,Lamp\n"


def read_log(path: Path, format_name: str = "table", **options: Any) -> list[tuple[Any, ...]]:
    return read_with_counts(path, format_name, **options)[0]


def read_with_counts(
    path: Path, format_name: str = "table", role: str = "interactions", **options: Any
) -> tuple[list[tuple[Any, ...]], dict[str, int]]:
    """The rows of one file; the other role's file is a dummy that is never opened."""
    other = {"interactions": "items", "items": "interactions"}[role]
    named: Any = {role: [path], other: [path]}
    (shard,) = find(format_named(format_name, **options), [], **named)[role]  # type: ignore[index]
    reader = ShardReader(shard)
    rows = [tuple(row.values()) for batch in reader.batches() for row in batch.to_pylist()]
    return rows, reader.counts


def refused(path: Path, role: str = "interactions", **options: Any) -> str:
    """The one line that a bad file ends in, without the folder's name."""
    with pytest.raises(ReaderError) as caught:
        read_with_counts(path, role=role, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(path.parent) + "/", "")


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_csv_with_own_columns(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"log.csv{suffix}", "at;who;what;stars\n5;ann;7;4.5\n3;ann;7;\n")
    rows = read_log(path, columns={**OWN, "rating": "stars"}, delimiter=";")
    # Out of order and twice: as they stand in the file.
    assert rows == [("ann", "7", 5, 4.5), ("ann", "7", 3, None)]


def test_tsv_is_split_at_tabs(tmp_path: Path) -> None:
    path = write(tmp_path / "log.tsv", "user_id\titem_id\ttimestamp\nu\ta,b\t1\n")
    assert read_log(path) == [("u", "a,b", 1, None)]


def test_jsonl_with_own_keys(tmp_path: Path) -> None:
    path = write(
        tmp_path / "log.jsonl.gz",
        '{"who": 7, "what": "a", "at": "12", "more": {"x": [1, "y"]}}\n'
        '{"what": "b", "who": 8, "at": "13.9"}\n',
    )
    assert read_log(path, columns=OWN) == [("7", "a", 12, None), ("8", "b", 13, None)]


def test_parquet_of_pandas(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    moment = datetime.datetime(2024, 5, 31, tzinfo=datetime.UTC)
    pq.write_table(
        pa.table(
            {
                "who": pa.array([7.0, None, 9.0]),  # whole numbers with a gap
                "what": pa.array(["a", "b", "a"]).dictionary_encode(),
                "at": pa.array([moment] * 3, pa.timestamp("us", "UTC")),
                "rating": pa.array([1, 2, None], pa.int8()),
            }
        ),
        path,
    )
    assert read_log(path, columns=OWN) == [
        ("7", "a", 1717113600, 1.0),
        (None, "b", 1717113600, 2.0),
        ("9", "a", 1717113600, None),
    ]


@pytest.mark.parametrize(
    ("unit", "told", "seconds"),
    [
        ("s", "1717113600.75", 1717113600),
        ("ms", "1717113600999", 1717113600),
        ("us", "1717113600999999", 1717113600),
        ("iso", "2024-05-31", 1717113600),
        ("iso", "2024-05-31 00:00:01", 1717113601),
        ("iso", "2024-05-31T12:00:00+02:00", 1717149600),
        ("iso", "2024-05-31T00:00:00.250Z", 1717113600),
        ("iso", "2024-05-31 00:00:00 UTC", 1717113600),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_units_of_time(unit: str, told: str, seconds: int, suffix: str, tmp_path: Path) -> None:
    text = {
        "csv": f"user_id,item_id,timestamp\nu,a,{told}\nu,b,\n",
        "jsonl": f'{{"user_id": "u", "item_id": "a", "timestamp": "{told}"}}\n'
        '{"user_id": "u", "item_id": "b"}\n',
    }[suffix]
    path = write(tmp_path / f"log.{suffix}", text)
    assert read_log(path, time_unit=unit) == [("u", "a", seconds, None), ("u", "b", None, None)]


def test_a_sheet_saved_on_windows(tmp_path: Path) -> None:
    path = write(
        tmp_path / "items.csv",
        b'\xef\xbb\xbfitem_id,title,category\r\n7,"Two\r\nlines, ""quoted""",x\r\n\r\n8,NA,\r\n'
        b"9,,y\r\n10, ,y\r\n,Nobody,y\r\n\r\n\r\n",
    )
    rows, counts = read_with_counts(path, role="items")
    assert rows == [
        ("7", 'Two\r\nlines, "quoted"', "x"),
        ("8", "NA", None),
        ("9", None, "y"),
        ("10", None, "y"),
        (None, "Nobody", "y"),
    ]
    assert counts["titles_missing"] == 2
    assert counts["rows_without_item"] == 1


def test_titles_in_json_that_are_null_empty_absent_or_numbers(tmp_path: Path) -> None:
    path = write(
        tmp_path / "items.jsonl",
        '\ufeff{"item_id": "a", "title": null}\r\n{"item_id": "b", "title": ""}\r\n\r\n'
        '{"item_id": "c"}\r\n{"item_id": "d", "title": 1984}\r\n'
        '{"item_id": "e", "title": "A &amp; B"}\r\n{"item_id": "f", "title": NaN}\n \n',
    )
    rows, counts = read_with_counts(path, role="items")
    assert [title for _, title, _ in rows] == [None, None, None, "1984", "A &amp; B", None]
    assert counts["titles_missing"] == 4


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_bytes_that_are_no_utf8_are_replaced_and_counted(suffix: str, tmp_path: Path) -> None:
    data = {
        "csv": b"item_id,title\na,Caf\xe9\nb,\xff\xfe\nc,Caf\xc3\xa9\n",
        "jsonl": b'{"item_id": "a", "title": "Caf\xe9"}\n{"item_id": "b", "title": "\xff\xfe"}\n'
        b'{"item_id": "c", "title": "Caf\xc3\xa9"}\n',
    }[suffix]
    rows, counts = read_with_counts(write(tmp_path / f"items.{suffix}", data), role="items")
    assert [title for _, title, _ in rows] == ["Caf\ufffd", "\ufffd\ufffd", "Café"]
    assert counts["lines_with_broken_text"] == 2


def test_half_of_a_surrogate_pair_in_json_is_replaced(tmp_path: Path) -> None:
    path = write(
        tmp_path / "items.jsonl",
        '{"item_id": "a", "title": "x\\ud83d"}\n{"item_id": "b", "title": "\\ud83d\\ude00"}\n',
    )
    rows, counts = read_with_counts(path, role="items")
    assert [title for _, title, _ in rows] == ["x\ufffd", "😀"]
    assert counts["lines_with_broken_text"] == 1


def test_blocks_end_where_lines_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "BLOCK_BYTES", 40)  # less than a line
    lines = "".join(
        f'{{"user_id": "user {n}", "item_id": "é{n}", "timestamp": {n}}}\n' for n in range(50)
    )
    path = write(tmp_path / "log.jsonl.gz", lines)
    assert read_log(path) == [(f"user {n}", f"é{n}", n, None) for n in range(50)]
    write(tmp_path / "bad.jsonl", lines + '{"user_id": "u", "item_id": "i", "timestamp": -1}\n')
    assert "line 51" in refused(tmp_path / "bad.jsonl")


def test_a_quoted_value_over_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "BLOCK_BYTES", 10)
    title = "one\ntwo, three\n" * 20
    path = write(tmp_path / "items.csv", f'item_id,title\na,"{title}"\nb,Lamp\n')
    rows, _ = read_with_counts(path, role="items")
    assert rows == [("a", title, None), ("b", "Lamp", None)]


def test_a_row_longer_than_a_block(tmp_path: Path) -> None:
    path = write(tmp_path / "items.csv", "item_id,title\na,L\nb," + "x" * (9 << 20) + "\nc,M\n")
    assert refused(path, "items").startswith("items.csv: line 3: a row here or below is longer")


def jsonl(*times: str) -> str:
    return "".join(f'{{"user_id": "u", "item_id": "a", "timestamp": {t}}}\n' for t in times)


def csv(*times: str, head: str = "user_id,item_id,timestamp\n") -> str:
    return head + "".join(f"u,a,{t}\n" for t in times)


BAD_LOGS = {
    "empty": ("log.csv", "", "log.csv: is empty"),
    "header only": ("log.csv", csv(), "log.csv: has no rows"),
    "blank lines only": ("log.jsonl", "\n\n", "log.jsonl: has no rows"),
    "wrong column": (
        "log.csv",
        csv("1", head="user,item_id,timestamp\n"),
        "log.csv: the column `user_id` (user_id) is missing; found: item_id, timestamp, user; "
        "name the right one with `--column user_id=NAME`",
    ),
    "wrong key": (
        "log.jsonl",
        '{"user": "u", "item_id": "a", "timestamp": 1}\n',
        "log.jsonl: the column `user_id` (user_id) is missing; found: item_id, timestamp, user;",
    ),
    "no value at all": ("log.csv", csv("", ""), "none of its 2 rows has a value in `timestamp`"),
    "negative time": ("log.csv", csv("1", "-5"), "log.csv: line 3: `timestamp` is negative: -5"),
    "negative time in JSON": ("log.jsonl", "\n" + jsonl("1", "-5"), "line 3: `timestamp` is neg"),
    "time is no number": (
        "log.csv",
        csv("1", "2", "yesterday"),
        "log.csv: line 4: `timestamp` is 'yesterday', no number; dates want `--time-unit iso`",
    ),
    "time is text in JSON": ("log.jsonl", jsonl("1", '"now"'), "line 2: `timestamp` is 'now', no"),
    "time is a list in JSON": ("log.jsonl", jsonl("1", "[1]"), "line 2: `timestamp` is [1], no n"),
    "a time of 400 digits": ("log.jsonl", jsonl("9" * 400), "line 1: `timestamp` is infinite"),
    "infinite time": ("log.csv", csv("1", "1e999"), "line 3: `timestamp` is infinite"),
    "milliseconds": (
        "log.csv",
        csv("1", "1717113600999"),
        "line 3: `timestamp` is 1717113600999, as seconds a time after the year 5000; it looks "
        "like milliseconds (`--time-unit ms`)",
    ),
    "a line too short": ("log.csv", csv("1") + "u,b\n", "log.csv: line 3: has 2 values where 3"),
    "after a quoted newline": (
        "log.csv",
        'user_id,item_id,timestamp\n"u\nv",a,1\n\nu,a,x\n',
        "log.csv: line 5: `timestamp` is 'x'",
    ),
    "no JSON": ("log.jsonl", jsonl("1") + '{"user_id": "u"\n', "line 2: is no JSON object (Exp"),
    "a JSON array": ("log.jsonl", '[{"user_id": "u"}]\n', "line 1: is no JSON object: [{"),
    "a number for a line": ("log.jsonl", jsonl("1") + "5\n", "line 2: is no object but 5"),
    "ids of mixed types": (
        "log.jsonl",
        '{"user_id": 5, "item_id": "a", "timestamp": 1}\n'
        '{"user_id": "u6", "item_id": "a", "timestamp": 1}\n',
        'line 2: `user_id` is text "u6", in the rows before it was number; write all ids as text',
    ),
    "a fraction for an id": (
        "log.jsonl",
        '{"user_id": 5.5, "item_id": "a", "timestamp": 1}\n',
        "line 1: `user_id` is 5.5; ids are text or whole numbers",
    ),
    "line ends of old Macs": ("log.csv", csv("1").replace("\n", "\r"), "line 1: holds a bare car"),
    "UTF-16": ("log.csv", csv("1").encode("utf-16"), "log.csv: is UTF-16; save it as UTF-8"),
    "an archive": ("log.tar.gz", "x", "log.tar.gz: is an archive; unpack it first"),
    "an unknown suffix": ("log.xlsx", "x", "log.xlsx: its name says neither CSV"),
    "no Parquet": ("log.parquet", "PAR1 nothing", "log.parquet: is not readable as Parquet"),
    "an empty Parquet": ("log.parquet", "", "log.parquet: is empty"),
}


@pytest.mark.parametrize("case", BAD_LOGS)
def test_a_bad_log_is_one_line(case: str, tmp_path: Path) -> None:
    name, content, words = BAD_LOGS[case]
    message = refused(write(tmp_path / name, content))
    assert words in message


def test_ids_of_mixed_types_far_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "BLOCK_BYTES", 1000)
    path = write(
        tmp_path / "log.jsonl", jsonl(*["1"] * 100) + '{"user_id":7,"item_id":"a","timestamp":1}\n'
    )
    assert refused(path).startswith("log.jsonl: line 101: `user_id` is the number 7, in the rows")


def test_dates_that_are_none(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", csv("2024-05-31", "31.05.2024"))
    assert "log.csv: line 3: `timestamp` is '31.05.2024', no date" in refused(path, time_unit="iso")
    path = write(tmp_path / "log.csv", csv("2024-05-31", "1969-12-31"))
    assert "log.csv: line 3: `timestamp` is before 1970" in refused(path, time_unit="iso")
    path = write(tmp_path / "log.jsonl", jsonl("5"))
    assert "is a number, no date" in refused(path, time_unit="iso")


def test_times_with_and_without_an_offset_in_one_file(tmp_path: Path) -> None:
    path = write(
        tmp_path / "log.csv",
        csv("2024-05-31T00:00:00Z", "2024-05-31", "", "2024-05-31 12:00:00.123456789+0200"),
    )
    times = [time for _, _, time, _ in read_log(path, time_unit="iso")]
    assert times == [1717113600, 1717113600, None, 1717149600]


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ({"timestamp": pa.array([2**64 - 1], pa.uint64())}, "row 1: cannot be read: Integer value"),
        ({"user_id": pa.array([True])}, "row 1: `user_id` has the type bool; ids are text or"),
        ({"item_id": pa.array([["a"]])}, "row 1: `item_id` has the type list<"),
        ({"rating": pa.array([["a"]])}, "row 1: `rating` has the type list<"),
    ],
)
def test_parquet_columns_of_another_type(
    column: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "log.parquet"
    table = {"user_id": ["u"], "item_id": ["a"], "timestamp": [1], "rating": [1.5], **column}
    pq.write_table(pa.table(table), path)
    assert words in refused(path)


def test_a_value_that_arrow_cannot_hold_is_found_among_many(tmp_path: Path) -> None:
    times = [1] * 1000
    times[617] = 2**64 - 1
    table = {"user_id": ["u"] * 1000, "item_id": ["a"] * 1000}
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({**table, "timestamp": pa.array(times, pa.uint64())}), path)
    assert refused(path).startswith("log.parquet: row 618: cannot be read: Integer value")


def test_missing_ratings(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    log = {"user_id": ["u"] * 2, "item_id": ["a"] * 2, "timestamp": [1, 2]}
    pq.write_table(pa.table({**log, "rating": [float("nan"), 2.5]}), path)
    rows, counts = read_with_counts(path)
    assert [rating for *_, rating in rows] == [None, 2.5]
    assert counts["rows_without_rating"] == 1
    pq.write_table(pa.table({**log, "rating": ["2", "good"]}), path)
    assert "row 2: `rating` is 'good', no number" in refused(path)


def test_a_bad_value_in_parquet_names_its_row(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pq.write_table(
        pa.table({"user_id": ["u"] * 3, "item_id": ["a"] * 3, "timestamp": [1, 2, -3]}), path
    )
    assert refused(path).startswith("log.parquet: row 3: `timestamp` is negative: -3")
    pq.write_table(
        pa.table({"user_id": [1.5, 2.0], "item_id": ["a"] * 2, "timestamp": [1, 2]}), path
    )
    assert refused(path).startswith("log.parquet: row 1: `user_id` is 1.5")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["log.csv", "log.jsonl"])
def test_a_file_cut_off(name: str, suffix: str, tmp_path: Path) -> None:
    import random

    numbers = random.Random(0)
    times = [str(numbers.randrange(10**9)) for _ in range(2000)]
    path = write(tmp_path / (name + suffix), csv(*times) if name == "log.csv" else jsonl(*times))
    path.write_bytes(path.read_bytes()[:-500])
    message = refused(path)
    assert "is cut off or damaged here" in message
    assert message.startswith(f"{name}{suffix}: line ")


def test_a_file_cut_off_names_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the standard library sees it: the lines that can be unpacked, and the one that breaks."""
    import random
    import zlib

    numbers = random.Random(0)
    times = [str(numbers.randrange(10**9)) for _ in range(20_000)]
    path = write(tmp_path / "log.csv.gz", csv(*times))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 3 // 4])
    unpacked = zlib.decompressobj(31).decompress(path.read_bytes())
    last = unpacked.count(b"\n") + 1
    for block_bytes in (4 << 20, 1 << 14):
        monkeypatch.setattr(text, "BLOCK_BYTES", block_bytes)
        found = re.match(r"log\.csv\.gz: line (\d+): the gzip data is cut off", refused(path))
        assert found is not None
        # The last bytes of a broken stream may not come out.
        assert last - 10 <= int(found[1]) <= last


def test_a_space_in_the_header_is_seen(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", "user_id, item_id,timestamp\nu, a,1\n")
    assert "the column `item_id` (item_id) is missing; found: ' item_id', timestamp" in refused(
        path
    )


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_wanted_column_that_is_there_twice(suffix: str, tmp_path: Path) -> None:
    names = ["user_id", "user_id", "item_id", "timestamp", "note", "note"]
    path = tmp_path / f"log.{suffix}"
    if suffix == "csv":
        write(path, ",".join(names) + "\nu,v,a,1,x,y\n")
    else:
        columns = [pa.array([one]) for one in ("u", "v", "a", 1, "x", "y")]
        pq.write_table(pa.Table.from_arrays(columns, names), path)
    message = refused(path)
    assert message.startswith(f"log.{suffix}: the column `user_id` (user_id) is there 2 times")


def test_a_packed_file_without_the_suffix_and_the_reverse(tmp_path: Path) -> None:
    write(tmp_path / "log.csv", gzip.compress(csv("1").encode()))
    assert read_log(tmp_path / "log.csv") == [("u", "a", 1, None)]
    (tmp_path / "log.csv.gz").write_text(csv("2"))
    assert read_log(tmp_path / "log.csv.gz") == [("u", "a", 2, None)]


def test_a_damaged_python_literal(tmp_path: Path) -> None:
    good = "{'asin': 'a', 'title': 'T'}\n"
    path = write(tmp_path / "meta_X.json", good + "{'asin': open('x')}\n")
    with pytest.raises(ReaderError, match=r"meta_X\.json: line 2: is no Python dict"):
        read_with_counts(path, "amazon-2014", "items")


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_items_without_titles(suffix: str, tmp_path: Path) -> None:
    content = {
        "csv": "item_id,title\na,\nb,\n",
        "jsonl": '{"item_id": "a", "title": ""}\n{"item_id": "b"}\n',
    }[suffix]
    path = write(tmp_path / f"items.{suffix}", content)
    assert "none of its 2 rows has a value in `title` (title)" in refused(path, "items")


@pytest.mark.parametrize("num_rows", [1, 3, 100_000])
def test_an_unclosed_quote_swallows_nothing(num_rows: int, tmp_path: Path) -> None:
    """The last column: without care the rest of the file would become one title."""
    path = write(tmp_path / "items.csv", 'item_id,title\na,"L\nM"\nb,"N\n' + "c,O\n" * num_rows)
    message = refused(path, "items")
    assert message.startswith("items.csv: line 4: a value begins with a quote that is never closed")


def test_a_quote_within_a_value_is_a_character(tmp_path: Path) -> None:
    path = write(tmp_path / "items.csv", 'item_id,title\na,Seven 7" single\nb,N\n')
    rows, _ = read_with_counts(path, role="items")
    assert rows == [("a", 'Seven 7" single', None), ("b", "N", None)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"columns": {"users": "x"}}, "--column: unknown field `users`; fields: user_id, item_id"),
        ({"time_unit": "days"}, "--time-unit: unknown unit `days`; units: s, ms, us, iso"),
        ({"delimiter": "ab"}, "--delimiter: 'ab' is not one character"),
    ],
)
def test_wrong_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ReaderError, match=words):
        format_named("table", **options)
    with pytest.raises(ReaderError, match="the format `yelp` says it itself|unknown|not one"):
        format_named("yelp", **options)


def test_an_unknown_format_lists_the_known() -> None:
    with pytest.raises(ReaderError, match="unknown format `netflix`; known: amazon-2014, amazon-2"):
        format_named("netflix")
