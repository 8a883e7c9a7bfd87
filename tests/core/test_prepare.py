from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rc_ray import prepare
from rc_ray.config import load
from rc_ray.core.cleaning import DomainError
from rc_ray.core.domains import read_domain
from rc_ray.core.sources import SourceError
from rc_ray.progress import Progress
from tests.tiny import make_domain


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    domains = ("lamps", "rivers", "tools")
    for seed, domain in enumerate(domains):
        make_domain(tmp_path / "raw" / domain, prefix=domain.capitalize(), seed=seed)
    path = tmp_path / "experiment.yaml"
    sources = [{"format": "parquet", "domain": d, "path": f"raw/{d}"} for d in domains]
    data = {
        "sources": sources,
        "spirit": ["lamps", "rivers"],
        "ingredients": ["tools"],
        "num_negatives": 9,
    }
    path.write_text(
        json.dumps({"name": "tiny", "seed": 3, "output_dir": str(tmp_path / "runs"), "data": data})
    )
    return path


def run(path: Path, *overrides: str, force: bool = False) -> tuple[Path, list[str]]:
    stream = io.StringIO()
    with Progress(stream=stream) as console:
        folder = prepare.run(load(path, overrides), force=force, console=console)
    return folder, stream.getvalue().splitlines()


def test_prepare_writes_every_domain_and_says_so(experiment: Path) -> None:
    folder, lines = run(experiment)
    assert folder == experiment.parent / "runs" / "tiny" / "data"
    assert sorted(path.name for path in folder.iterdir()) == ["lamps", "rivers", "tools"]
    domain = read_domain(folder / "tools")
    assert domain.cold.sum() == 6  # 0.15 * 42; 9 + 11 would be more than a quarter
    assert all(len(case.candidates) == 10 for case in domain.cases("test"))
    assert not read_domain(folder / "lamps").cold.any()
    assert lines[0] == "prepare"
    assert "tools" in lines[3]
    assert "40 users" in lines[3]
    assert "6 cold items" in lines[3]


def test_what_stands_is_kept_until_its_settings_or_files_change(experiment: Path) -> None:
    run(experiment)

    def redone(*overrides: str, force: bool = False) -> list[str]:
        _, lines = run(experiment, *overrides, force=force)
        return [line.split()[0] for line in lines[1:] if "stands already" not in line]

    assert redone() == []
    assert redone(force=True) == ["lamps", "rivers", "tools"]
    # A setting of ingredient domains leaves the spirit's domains alone.
    assert redone("data.unlabeled_fraction=0.3") == ["tools"]
    assert redone("data.unlabeled_fraction=0.3", "train.num_steps=9") == []
    make_domain(experiment.parent / "raw" / "rivers", prefix="Rivers", seed=9)
    assert redone("data.unlabeled_fraction=0.3") == ["rivers"]
    assert redone("data.unlabeled_fraction=0.3", "seed=4") == ["lamps", "rivers", "tools"]


def test_a_failing_domain_leaves_the_others_finished(experiment: Path) -> None:
    items = experiment.parent / "raw" / "lamps" / "items.parquet"
    table = pq.read_table(items)
    pq.write_table(table.slice(0, 3), items)
    with pytest.raises(DomainError, match="domain `lamps`"):
        run(experiment)
    folder = experiment.parent / "runs" / "tiny" / "data"
    assert sorted(path.name for path in folder.iterdir()) == ["rivers", "tools"]
    pq.write_table(table, items)
    _, lines = run(experiment)
    assert ["stands already" in line for line in lines[1:]] == [False, True, True]


def test_several_failures_are_all_named(experiment: Path) -> None:
    raw = experiment.parent / "raw"
    (raw / "lamps" / "items.parquet").unlink()
    (raw / "tools" / "interactions.parquet").write_bytes(b"")
    with pytest.raises(prepare.PrepareError) as caught:
        run(experiment)
    first, second = str(caught.value).splitlines()
    assert first.endswith("names its folder")
    assert "items.parquet: no such file" in first
    assert "interactions.parquet: is empty" in second


def test_missing_folder(experiment: Path) -> None:
    with pytest.raises(SourceError, match=r"nowhere/interactions\.parquet: no such file"):
        run(
            experiment,
            "data.sources=[{format: parquet, domain: lamps, path: nowhere},"
            " {format: parquet, domain: tools, path: raw/tools}]",
            "data.spirit=[lamps]",
        )
