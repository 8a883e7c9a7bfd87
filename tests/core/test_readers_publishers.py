"""Every publisher's format, on small files in its true layout."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rc_ray.core.readers.faults import ReaderError
from rc_ray.core.readers.formats import FORMATS
from tests.core import readers_files as files
from tests.core.readers_files import read, write


def test_amazon_2014(tmp_path: Path) -> None:
    write(tmp_path / "reviews_Books_5.json.gz", files.AMAZON_2014_REVIEWS)
    write(tmp_path / "meta_Books.json.gz", files.AMAZON_2014_ITEMS)
    rows, counts = read("amazon-2014", tmp_path, "interactions")
    assert rows == [
        ("A2SUAM1J3GNN3B", "0000013714", 1252800000, 5.0),
        ("A1YJEY40YUW4SE", "7806397051", 1391040000, 1.0),
    ]
    assert counts == {"rows": 2}
    rows, counts = read("amazon-2014", tmp_path, "items")
    assert rows == [
        ("0000013714", 'Hymns: "Old" &amp; New', "Hymns"),
        ("7806397051", None, "Beauty"),
        ("0000000003", "Girl's Tutu", None),
    ]
    assert counts == {"rows": 3, "titles_missing": 1, "categories_missing": 1}


def test_amazon_2014_ratings_only(tmp_path: Path) -> None:
    write(tmp_path / "ratings_Books.csv", "A2,0000031852,5.0,1252800000\nA3,0000031853,1,5\n")
    write(tmp_path / "meta_Books.json.gz", files.AMAZON_2014_ITEMS)
    rows, _ = read("amazon-2014", tmp_path, "interactions")
    assert rows == [("A2", "0000031852", 1252800000, 5.0), ("A3", "0000031853", 5, 1.0)]


def test_amazon_2018(tmp_path: Path) -> None:
    write(tmp_path / "AMAZON_FASHION_5.json.gz", files.AMAZON_2018_REVIEWS)
    write(tmp_path / "meta_AMAZON_FASHION.json.gz", files.AMAZON_2018_ITEMS)
    rows, _ = read("amazon-2018", tmp_path, "interactions")
    assert rows == [
        ("AUI6WTTT0QZYS", "5120053084", 1514764800, 5.0),
        ("A1", "B01", 1473379200, 2.0),
    ]
    rows, counts = read("amazon-2018", tmp_path, "items")
    assert rows == [
        ("5120053084", "Shirt &quot;L&quot;", "Shirts"),
        ("B01", None, "AMAZON FASHION"),
        ("B02", None, None),
    ]
    assert counts["titles_spoilt"] == 1
    assert counts["titles_missing"] == 2


def test_amazon_2018_ratings_only_names_the_item_first(tmp_path: Path) -> None:
    write(tmp_path / "Books.csv", "0001713353,A1C6M8LCIX4M6M,5.0,1123804800\n")
    write(tmp_path / "meta_Books.json.gz", files.AMAZON_2018_ITEMS)
    rows, _ = read("amazon-2018", tmp_path, "interactions")
    assert rows == [("A1C6M8LCIX4M6M", "0001713353", 1123804800, 5.0)]


def test_amazon_2023(tmp_path: Path) -> None:
    write(tmp_path / "All_Beauty.jsonl.gz", files.AMAZON_2023_REVIEWS)
    write(tmp_path / "meta_All_Beauty.jsonl", files.AMAZON_2023_ITEMS)
    rows, _ = read("amazon-2023", tmp_path, "interactions")
    assert rows == [("AGKHLEW2SOWHNMFQIJGBECAF7INQ", "B00YQ6X8EP", 1588687728, 5.0)]
    rows, _ = read("amazon-2023", tmp_path, "items")
    assert rows == [("B00YQ6X8EP", "Howard LC0008 Conditioner", "All Beauty"), ("B2", None, "Hair")]


def test_amazon_2023_parquet_and_ratings_csv(tmp_path: Path) -> None:
    (tmp_path / "raw_meta_Toys").mkdir()
    pq.write_table(
        pa.table(
            {
                "parent_asin": ["B1", "B2"],
                "title": ["Kite", None],
                "categories": pa.array([["Toys", "Kites"], []], pa.list_(pa.string())),
                "main_category": ["Toys", "Toys"],
                "details": ["{}", "{}"],
            }
        ),
        tmp_path / "raw_meta_Toys" / "full-00000-of-00001.parquet",
    )
    write(
        tmp_path / "Toys.csv.zst", "user_id,parent_asin,rating,timestamp\nu,B1,4.0,1588687728999\n"
    )
    assert read("amazon-2023", tmp_path, "interactions")[0] == [("u", "B1", 1588687728, 4.0)]
    assert read("amazon-2023", tmp_path, "items")[0] == [
        ("B1", "Kite", "Kites"),
        ("B2", None, "Toys"),
    ]


def test_amazon_2023_in_seconds_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "X.csv", "user_id,parent_asin,rating,timestamp\nu,B1,4.0,1588687728\n")
    write(tmp_path / "meta_X.jsonl", files.AMAZON_2023_ITEMS)
    with pytest.raises(ReaderError, match=r"X\.csv: line 2: `timestamp` is 1588687728.*seconds"):
        read("amazon-2023", tmp_path, "interactions")


def test_movielens_100k(tmp_path: Path) -> None:
    write(tmp_path / "u.data", "196\t242\t3\t881250949\n186\t302\t3\t891717742\n")
    flags = "0|1|0|0|0|1|0|0|0|0|0|0|0|0|0|0|0|0|0"
    none = "1" + "|0" * 18
    write(
        tmp_path / "u.item",
        f"242|GoldenEye (1995)|01-Jan-1995||http://us.imdb.com/M/?GoldenEye%20(1995)|{flags}\n"
        f'302|Misérables, Les "1995"|01-Jan-1995||http://x|{none}\n',
        encoding="latin-1",
    )
    rows, _ = read("movielens-100k", tmp_path, "interactions")
    assert rows == [("196", "242", 881250949, 3.0), ("186", "302", 891717742, 3.0)]
    rows, counts = read("movielens-100k", tmp_path, "items")
    assert rows == [
        ("242", "GoldenEye (1995)", "Action"),
        ("302", 'Misérables, Les "1995"', None),
    ]
    assert "lines_with_broken_text" not in counts


@pytest.mark.parametrize(
    ("name", "encoding"), [("movielens-1m", "latin-1"), ("movielens-10m", "utf-8")]
)
def test_movielens_dat(name: str, encoding: str, tmp_path: Path) -> None:
    write(tmp_path / "ratings.dat", "1::1193::5::978300760\r\n1::661::3.5::978302109\r\n")
    write(
        tmp_path / "movies.dat",
        '1193::Cité: des "enfants", La (1995)::Children\'s|Comedy\n661::M (1931)::'
        "(no genres listed)\n",
        encoding=encoding,
    )
    rows, _ = read(name, tmp_path, "interactions")
    assert rows == [("1", "1193", 978300760, 5.0), ("1", "661", 978302109, 3.5)]
    rows, _ = read(name, tmp_path, "items")
    assert rows == [
        ("1193", 'Cité: des "enfants", La (1995)', "Children's"),
        ("661", "M (1931)", None),
    ]


def test_movielens_csv(tmp_path: Path) -> None:
    write(tmp_path / "ratings.csv", "userId,movieId,rating,timestamp\n1,2,3.5,1112486027\n")
    write(
        tmp_path / "movies.csv",
        "movieId,title,genres\n2,Jumanji (1995),Adventure|Children|Fantasy\n"
        '11,"American President, The (1995)",Comedy\n12,"Say ""Hi""",(no genres listed)\n',
    )
    write(tmp_path / "tags.csv", "userId,movieId,tag,timestamp\n1,2,x,1\n")
    assert read("movielens-csv", tmp_path, "interactions")[0] == [("1", "2", 1112486027, 3.5)]
    assert read("movielens-csv", tmp_path, "items")[0] == [
        ("2", "Jumanji (1995)", "Adventure"),
        ("11", "American President, The (1995)", "Comedy"),
        ("12", 'Say "Hi"', None),
    ]


def test_yelp(tmp_path: Path) -> None:
    write(tmp_path / "yelp_academic_dataset_review.json", files.YELP_REVIEWS)
    write(tmp_path / "yelp_academic_dataset_business.json", files.YELP_ITEMS)
    write(tmp_path / "yelp_academic_dataset_user.json", "{}\n")
    rows, _ = read("yelp", tmp_path, "interactions")
    # date -u -d '2018-07-07 22:09:11' +%s
    assert rows == [("mh_-eMZ6K5RLWhZyISBhwA", "XQfwVwDr-v0ZS3_CbbE5Xw", 1531001351, 3.0)]
    rows, _ = read("yelp", tmp_path, "items")
    assert rows == [
        ("XQfwVwDr-v0ZS3_CbbE5Xw", "Turning Point of North Wales", "Restaurants"),
        ("b2", "Café", None),
    ]


def test_steam(tmp_path: Path) -> None:
    write(tmp_path / "steam_reviews.json.gz", files.STEAM_REVIEWS)
    write(tmp_path / "steam_games.json.gz", files.STEAM_ITEMS)
    rows, _ = read("steam", tmp_path, "interactions")
    # date -u -d 2017-12-17 +%s; date -u -d 2017-08-02 +%s
    assert rows == [
        ("Chaos Syren", "725280", 1513468800, None),
        ("♥ Ariman", "328100", 1501632000, None),
    ]
    rows, counts = read("steam", tmp_path, "items")
    assert rows == [
        ("761140", "Lost Summoner Kitty", "Action"),
        ("643980", "Snow®", None),
        (None, None, None),
    ]
    assert counts["rows_without_item"] == 1


def test_steam_australian_users(tmp_path: Path) -> None:
    write(tmp_path / "australian_user_reviews.json.gz", files.STEAM_AUSTRALIAN)
    write(tmp_path / "steam_games.json.gz", files.STEAM_ITEMS)
    rows, counts = read("steam", tmp_path, "interactions")
    # date -u -d 2011-11-05 +%s; the second post names no year, so nobody knows when it was.
    assert rows == [
        ("76561197970982479", "1250", 1320451200, 1.0),
        ("76561197970982479", "22200", None, 0.0),
    ]
    assert counts == {"rows": 2, "rows_without_time": 1}


def test_goodreads(tmp_path: Path) -> None:
    write(tmp_path / "goodreads_interactions_poetry.json.gz", files.GOODREADS_INTERACTIONS)
    write(tmp_path / "goodreads_books_poetry.json.gz", files.GOODREADS_ITEMS)
    rows, _ = read("goodreads", tmp_path, "interactions")
    # date -u -d '2017-08-25 13:55:02 -0700' +%s; date -u -d '2008-01-02 00:00:01 +0100' +%s
    assert rows == [
        ("8842281e1d1347389f2ab93d60773d4d", "24375664", 1503694502, 5.0),
        ("u2", "36097", 1199228401, None),
    ]
    rows, _ = read("goodreads", tmp_path, "items")
    assert rows == [("24375664", "W.C. Fields: A Life", None), ("36097", None, None)]


def test_recbole(tmp_path: Path) -> None:
    write(
        tmp_path / "ml-100k.inter",
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n196\t242\t3\t881250949\n"
        "196\t302\t4.5\t8.81250950E8\n",
    )
    write(
        tmp_path / "ml-100k.item",
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        '242\tToy Story\t1995\tAnimation Children\'s Comedy\n302\tThe "Q" One\t1995\t\n',
    )
    assert read("recbole", tmp_path, "interactions")[0] == [
        ("196", "242", 881250949, 3.0),
        ("196", "302", 881250950, 4.5),
    ]
    assert read("recbole", tmp_path, "items")[0] == [
        ("242", "Toy Story", "Animation"),
        ("302", 'The "Q" One', None),
    ]


def test_recbole_with_other_names_and_quoted_categories(tmp_path: Path) -> None:
    write(tmp_path / "b.inter", "reader:token\tbook_id:token\ttimestamp:float\nr\t7\t5\n")
    write(
        tmp_path / "b.item",
        "book_id:token\ttitle:token\tcategories:token_seq\tshelf:token\n"
        "7\tNine\t'Arts, Crafts & Sewing', 'Knitting'\tRole Playing\n",
    )
    own = {"user_id": "reader"}
    assert read("recbole", tmp_path, "interactions", columns=own)[0] == [("r", "7", 5, None)]
    assert read("recbole", tmp_path, "items")[0] == [("7", "Nine", "Arts, Crafts & Sewing")]
    # A single token may hold spaces and is kept whole.
    own = {"category": "shelf"}
    assert read("recbole", tmp_path, "items", columns=own)[0] == [("7", "Nine", "Role Playing")]


@pytest.mark.parametrize("name", FORMATS)
def test_a_folder_without_the_files_says_which_are_expected(name: str, tmp_path: Path) -> None:
    write(tmp_path / "notes.md", "nothing")
    with pytest.raises(ReaderError) as caught:
        read(name, tmp_path, "interactions")
    message = str(caught.value)
    assert FORMATS[name].layouts[0].patterns[0] in message
    assert str(tmp_path) in message
    assert "\n" not in message
