from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rc_ray import prepare
from rc_ray.config import load
from rc_ray.core import preparing
from rc_ray.core.candidates import CandidateDrawer, Drawn
from rc_ray.core.cleaning import CleanDomain, DomainError
from rc_ray.core.domains import read_domain
from rc_ray.core.histories import Histories
from rc_ray.core.leaks import LeakError
from rc_ray.core.sources import SourceError
from rc_ray.core.splits import CaseTable, SplitDomain, split
from rc_ray.progress import Progress
from rc_ray.status import read_status
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
    # What the ingredient domain holds out is known before a spirit domain is made.
    assert [line.split()[0] for line in lines[1:]] == ["tools", "lamps", "rivers"]
    assert "40 users" in lines[1]
    assert "6 cold items" in lines[1]


def test_what_stands_is_kept_until_its_settings_or_files_change(experiment: Path) -> None:
    run(experiment)

    def redone(*overrides: str, force: bool = False) -> list[str]:
        _, lines = run(experiment, *overrides, force=force)
        return [line.split()[0] for line in lines[1:] if "stands already" not in line]

    assert redone() == []
    assert redone(force=True) == ["tools", "lamps", "rivers"]
    # A setting of ingredient domains leaves the spirit's domains alone.
    assert redone("data.unlabeled_fraction=0.3") == ["tools"]
    assert redone("data.unlabeled_fraction=0.3", "train.num_steps=9") == []
    make_domain(experiment.parent / "raw" / "rivers", prefix="Rivers", seed=9)
    assert redone("data.unlabeled_fraction=0.3") == ["rivers"]
    assert redone("data.unlabeled_fraction=0.3", "seed=4") == ["tools", "lamps", "rivers"]


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
    assert ["stands already" in line for line in lines[1:]] == [True, False, True]


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


def test_a_spirit_domain_is_redone_when_what_is_held_out_changes(experiment: Path) -> None:
    run(experiment)

    def redone(*overrides: str) -> list[str]:
        _, lines = run(experiment, *overrides)
        return [line.split()[0] for line in lines[1:] if "stands already" not in line]

    def stale(*overrides: str) -> str:
        return next(
            s.detail for s in read_status(load(experiment, overrides)) if s.state == "stale"
        )

    # Another cold fraction holds other titles out; `show` knows it before `prepare` runs.
    fraction = "data.cold_item_fraction=0.3"
    assert all(f"data/{name} " in stale(fraction) for name in ("lamps", "rivers", "tools"))
    assert redone(fraction) == ["tools", "lamps", "rivers"]
    # Other items in the ingredient's log: its cold titles are others, the setting is the same.
    make_domain(experiment.parent / "raw" / "tools", prefix="Axes", seed=2)
    assert redone(fraction) == ["tools", "lamps", "rivers"]
    # More users, same items: the titles held out are the same.
    make_domain(experiment.parent / "raw" / "tools", prefix="Axes", num_users=60, seed=2)
    assert redone(fraction) == ["tools"]
    # An ingredient prepared by somebody else's settings is seen by its file.
    held_out = experiment.parent / "runs" / "tiny" / "data" / "tools" / "held_out.parquet"
    held_out.write_bytes(held_out.read_bytes() + b" ")
    assert "data/tools/held_out.parquet has changed" in stale(fraction)


def test_cold_titles_and_users_of_an_ingredient_stay_out_of_the_spirit(experiment: Path) -> None:
    # The same shop under two names: every title and user is in both.
    for name in ("lamps", "tools"):
        make_domain(experiment.parent / "raw" / name, prefix="Shop", num_users=60, seed=1)
    folder, _ = run(experiment, "data.cold_user_fraction=0.2", "data.cold_item_fraction=0.2")
    tools, lamps, rivers = (read_domain(folder / name) for name in ("tools", "lamps", "rivers"))
    cold = {title for title, flag in zip(tools.titles, tools.cold, strict=True) if flag}
    assert len(cold) == 8
    assert {title for title, flag in zip(lamps.titles, lamps.cold, strict=True) if flag} == cold
    assert not cold & {lamps.titles[item] for history in lamps.train for item in history}
    assert not rivers.cold.any()
    users = {case.user_id for case in tools.cases("test", "cold_user")}
    trained = set(pq.read_table(folder / "lamps" / "train.parquet")["user_id"].to_pylist())
    assert users
    assert not users & trained
    assert not users & set(pq.read_table(folder / "tools" / "train.parquet")["user_id"].to_pylist())


@pytest.mark.parametrize("leaky", ["lamps", "tools"])
def test_a_split_that_leaks_is_never_written(
    experiment: Path, monkeypatch: pytest.MonkeyPatch, leaky: str
) -> None:
    """A split that trains on the last item of everybody, in one domain of three."""

    def split_with_targets(domain: CleanDomain, *arguments: Any) -> SplitDomain:
        result = split(domain, *arguments)
        if domain.name != leaky:
            return result
        return dataclasses.replace(result, train=Histories.of(list(domain.histories)))

    monkeypatch.setattr(preparing, "split", split_with_targets)
    with pytest.raises(LeakError, match=f"domain `{leaky}`, user `u000`: ") as caught:
        run(experiment)
    assert "\n" not in str(caught.value)
    folder = experiment.parent / "runs" / "tiny" / "data"
    # The spirit waits for what the ingredient domain holds out.
    made = ["rivers", "tools"] if leaky == "lamps" else []
    assert sorted(path.name for path in folder.glob("*")) == made


def test_candidates_that_leak_are_never_written(
    experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negatives from the user's own history, which a model would know from training."""
    draw = CandidateDrawer.draw

    def drawn_from_history(drawer: CandidateDrawer, name: str, cases: CaseTable) -> Drawn:
        found = draw(drawer, name, cases)
        place = 0 if found.candidates[0, 0] != cases.target[0] else 1
        found.candidates[0, place] = cases.histories[0][0]
        return found

    monkeypatch.setattr(CandidateDrawer, "draw", drawn_from_history)
    with pytest.raises(LeakError, match="domain `tools`, user `u000`: a negative of the cand"):
        run(experiment)
    assert not list((experiment.parent / "runs" / "tiny" / "data").iterdir())


def test_spirit_domains_wait_for_the_ingredient_domains(experiment: Path) -> None:
    items = experiment.parent / "raw" / "tools" / "items.parquet"
    table = pq.read_table(items)
    pq.write_table(table.slice(0, 3), items)
    with pytest.raises(DomainError, match="domain `tools`"):
        run(experiment)
    folder = experiment.parent / "runs" / "tiny" / "data"
    assert not folder.exists() or list(folder.iterdir()) == []


def test_a_run_without_a_spirit(experiment: Path) -> None:
    folder, lines = run(experiment, "data.spirit=[]", "evaluate.systems=[popularity]")
    assert [path.name for path in folder.iterdir()] == ["tools"]
    assert len(lines) == 2


def test_a_slow_domain_says_what_it_is_at(
    experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 6))
    monkeypatch.setattr("rc_ray.prepare.time.monotonic", lambda: float(next(clock)))
    _, lines = run(experiment)
    tools = [line for line in lines if "tools" in line]
    assert len(tools) > 3
    assert any("sorting" in line for line in tools)
    assert "users" in tools[-1]
    assert "interactions" in tools[-1]
