"""The verb `import`: raw files in, a folder of the project's own form out, whole or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner, Result

from rc_ray import importing
from rc_ray.artifacts import MANIFEST
from rc_ray.cli import app
from rc_ray.core import sources
from rc_ray.core.readers.faults import ReaderError
from rc_ray.core.readers.formats import FORMATS, format_named
from rc_ray.data_config import ParquetSource
from rc_ray.progress import Progress
from tests.core import readers_files as files
from tests.core.readers_files import write
from tests.test_layers import ROOT, imported_after


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["import", *map(str, arguments)])


def refused(*arguments: str | Path) -> str:
    """The one line on stderr that a mistake ends in."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: ")
    return result.stderr.strip()


def shards(folder: Path, num_shards: int) -> Path:
    for index in range(num_shards):
        rows = "".join(f"u{index},i{n},{100 * index + n}\n" for n in range(3))
        write(folder / f"part-{index}.csv.gz", "user_id,item_id,timestamp\n" + rows)
    return folder


def items(folder: Path) -> Path:
    return write(folder / "items.csv", "item_id,title\ni0,Lamp\ni1,River\ni2,\n")


@pytest.fixture
def amazon(tmp_path: Path) -> Path:
    write(tmp_path / "raw" / "reviews_Books_5.json.gz", files.AMAZON_2014_REVIEWS)
    write(tmp_path / "raw" / "meta_Books.json.gz", files.AMAZON_2014_ITEMS)
    return tmp_path / "raw"


def test_a_folder_becomes_a_source(
    amazon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("amazon-2014", amazon, "--domain", "books")
    assert result.exit_code == 0, result.output
    out = tmp_path / "imported" / "books"
    assert {path.name for path in out.iterdir()} == {
        "interactions.parquet",
        "items.parquet",
        MANIFEST,
    }
    assert "interactions: 2 rows" in result.stdout
    assert "items: 3 rows, titles missing 1, categories missing 1" in result.stdout

    (entry,) = yaml.safe_load(result.stdout.splitlines()[-1])
    raw = sources.read(ParquetSource.model_validate(entry))["books"]
    assert raw.interactions.to_table().to_pylist()[0] == {
        "user_id": "A2SUAM1J3GNN3B",
        "item_id": "0000013714",
        "timestamp": 1252800000,
        "rating": 5.0,
    }
    assert raw.items["title"].to_pylist()[2] == "Girl's Tutu"

    manifest = json.loads((out / MANIFEST).read_text())
    reviews = amazon / "reviews_Books_5.json.gz"
    assert manifest["stage"] == "import"
    assert manifest["config"]["format"] == "amazon-2014"
    assert manifest["inputs"][str(reviews)] == hashlib.sha256(reviews.read_bytes()).hexdigest()
    assert manifest["metrics"]["interactions"]["rows"] == 2
    assert set(manifest["outputs"]) == {"interactions.parquet", "items.parquet"}


def test_the_readers_import_neither_ray_nor_torch() -> None:
    found = imported_after(["rc_ray.importing", "rc_ray.core.readers.formats"])
    assert "pyarrow" in found
    assert not {"ray", "torch", "pandas"} & found


def test_an_import_is_made_anew_in_its_place(amazon: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call("amazon-2014", amazon, "--domain", "books", "--out", out).exit_code == 0
    write(amazon / "reviews_Books_5.json.gz", files.AMAZON_2014_REVIEWS.splitlines()[0])
    assert call("amazon-2014", amazon, "--domain", "books", "--out", out).exit_code == 0
    assert pq.read_table(out / "interactions.parquet").num_rows == 1


def test_files_named_one_by_one_by_name_and_by_role(amazon: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    named = sorted(amazon.iterdir())
    assert call("amazon-2014", *named, "--domain", "b", "--out", out).exit_code == 0
    moved = [path.rename(tmp_path / f"x{index}.gz") for index, path in enumerate(named)]
    roles = ("--items", moved[0], "--interactions", moved[1])
    assert call("amazon-2014", *roles, "--domain", "b", "--out", out).exit_code == 0
    assert pq.read_table(out / "items.parquet").num_rows == 3


@pytest.mark.parametrize("num_shards", [2, 11])
def test_a_folder_of_shards_in_this_process(num_shards: int, tmp_path: Path) -> None:
    logs = shards(tmp_path / "logs", num_shards)
    arguments = ("table", "--interactions", logs, "--items", items(tmp_path), "--domain", "shop")
    out = tmp_path / "out"
    result = call(*arguments, "--out", out)
    assert result.exit_code == 0, result.output
    expect_shards(out, num_shards)


def expect_shards(out: Path, num_shards: int) -> None:
    folder = out / "interactions.parquet"
    names = [f"part-{index:05d}.parquet" for index in range(num_shards)]
    assert sorted(path.name for path in folder.iterdir()) == names
    # Parts are numbered in the order of the files: part-10 after part-9.
    assert pq.read_table(folder / names[-1])["user_id"].to_pylist() == [f"u{num_shards - 1}"] * 3
    assert pq.read_table(folder).num_rows == 3 * num_shards
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["metrics"]["interactions"]["rows"] == 3 * num_shards
    assert len(manifest["inputs"]) == num_shards + 1
    assert set(manifest["outputs"]) == {
        "items.parquet",
        *(f"interactions.parquet/{name}" for name in names),
    }


def test_a_bad_shard_leaves_nothing(tmp_path: Path) -> None:
    logs = shards(tmp_path / "logs", 3)
    write(logs / "part-1.csv.gz", "user_id,item_id,timestamp\nu,i,1\nu,i,x\n")
    arguments = ("table", "--interactions", logs, "--items", items(tmp_path), "--domain", "shop")
    out = tmp_path / "new" / "out"
    message = refused(*arguments, "--out", out)
    assert "part-1.csv.gz: line 3: `timestamp` is 'x', no number" in message
    assert not out.parent.exists()


@pytest.mark.distributed
def test_shards_in_parallel(ray_local: None, tmp_path: Path) -> None:
    logs = shards(tmp_path / "logs", 3)
    arguments = ("table", "--interactions", logs, "--items", items(tmp_path), "--domain", "shop")
    result = call(*arguments, "--parallel", "--verbose", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    expect_shards(tmp_path / "out", 3)
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_many_large_files_are_read_in_parallel_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(Exception):
        pass

    def parallel(*_: object) -> None:
        raise Asked

    monkeypatch.setattr(importing, "_write_parallel", parallel)
    monkeypatch.setattr(importing, "PARALLEL_BYTES", 100)
    logs = shards(tmp_path / "logs", 9)
    request = importing.Request(
        format="table",
        domain="shop",
        out=tmp_path / "out",
        interactions=[logs],
        items=[items(tmp_path)],
    )
    with Progress(stream=io.StringIO()) as console:
        with pytest.raises(Asked):
            importing.run(request, console)
        (logs / "part-0.csv.gz").unlink()
        importing.run(request, console)


@pytest.mark.distributed
def test_a_bad_shard_in_parallel_is_one_line(ray_local: None, tmp_path: Path) -> None:
    logs = shards(tmp_path / "logs", 3)
    cut = (logs / "part-2.csv.gz").read_bytes()[:-5]
    (logs / "part-2.csv.gz").write_bytes(cut)
    request = importing.Request(
        format="table",
        domain="shop",
        out=tmp_path / "new" / "out",
        interactions=[logs],
        items=[items(tmp_path)],
        parallel=True,
        verbose=True,
    )
    with Progress(stream=io.StringIO()) as console, pytest.raises(ReaderError) as caught:
        importing.run(request, console)
    assert f"{logs / 'part-2.csv.gz'}: line " in str(caught.value)
    assert "gzip data is cut off" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


MISTAKES: dict[str, tuple[tuple[Any, ...], str]] = {
    "no such format": (("movielense", "raw"), "unknown format `movielense`; known: amazon-2014"),
    "no such file": (("yelp", "raw/none.json"), "raw/none.json: no such file or folder"),
    "no path": (("yelp",), "no PATH given: no file of interactions found; `yelp` expects"),
    "a folder of something else": (
        ("yelp", "raw"),
        "raw: holds no file that `yelp` expects (interactions: yelp_academic_dataset_review.json",
    ),
    "a name that tells nothing": (
        ("table", "raw/notes.csv"),
        "raw/notes.csv: its name is none of `table`",
    ),
    "one role only": (
        ("amazon-2014", "raw/meta_Books.json.gz"),
        "raw/meta_Books.json.gz: no file of interactions found; `amazon-2014` expects",
    ),
    "two categories": (
        ("amazon-2014", "."),
        ".: holds several tables of interactions: raw/reviews_Books_5.json.gz, toys/reviews_Toys",
    ),
    "a bad column": (("table", "raw", "--column", "title"), "--column title: must be FIELD=COLUMN"),
    "a bad name": (("amazon-2014", "raw", "--domain", "My Books"), "--domain My Books: must be"),
    "out is a file": (("amazon-2014", "raw", "--out", "raw/notes.csv"), "is a file; name a folder"),
    "out is precious": (("amazon-2014", "raw", "--out", "toys"), "toys: holds files that are no i"),
    "out is the input": (("amazon-2014", "raw", "--out", "raw"), "raw: holds files that are no im"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(
    case: str, amazon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "toys" / "reviews_Toys_5.json", files.AMAZON_2014_REVIEWS)
    write(amazon / "notes.csv", "x\n")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    arguments, words = MISTAKES[case]
    if "--domain" not in arguments:
        arguments += ("--domain", "books")
    assert words in refused(*arguments)
    assert sorted(tmp_path.rglob("*")) == before


DOCS = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def test_the_page_names_every_file_of_every_format() -> None:
    for found in FORMATS.values():
        assert f"| `{found.name}`" in DOCS
        assert found.page in DOCS
        if not found.names:
            for layout in found.layouts:
                for pattern in layout.patterns:
                    assert f"`{pattern}`" in DOCS, pattern


@pytest.mark.parametrize("line", re.findall(r"^rc-ray (import .*)$", DOCS, re.MULTILINE))
def test_the_commands_of_the_page_are_understood(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[importing.Request] = []
    monkeypatch.setattr(importing, "run", lambda request, _: asked.append(request) or {})
    result = CliRunner().invoke(app, shlex.split(line))
    assert result.exit_code == 0, result.output
    (request,) = asked
    assert request.paths or (request.interactions and request.items)
    delimiter = "\t" if request.delimiter == "tab" else request.delimiter
    format_named(
        request.format,
        columns=importing._columns(request.columns),
        delimiter=delimiter,
        time_unit=request.time_unit,
    )
