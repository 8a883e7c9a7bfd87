from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
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
from rc_ray.errors import ConfigError
from rc_ray.progress import Progress
from rc_ray.status import read_status, refuse_stale
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


MIXED = (
    "data.spirit=[]", "data.ingredients=[lamps, tools]", "data.guests=[rivers]",
    "data.cold_item_fraction=0.1", "data.cold_user_fraction=0.1",
    "data.few_shot_user_fraction=0.15", "evaluate.systems=[popularity]",
    "data.more_candidates={popular: {negatives: popularity, num_negatives: 5}}",
)  # fmt: skip


def told(folder: Path, purpose: str) -> list[tuple[str, str, str, str, tuple[str, ...]]]:
    """User, split, group, target and history of each case, by title."""
    titles = pq.read_table(folder / "items.parquet")["title"].to_pylist()
    rows = pq.read_table(folder / f"{purpose}.parquet").to_pylist()
    return [
        (row["user_id"], row["split"], row["group"], titles[row["target"]],
         tuple(titles[item] for item in row["history"]))
        for row in rows
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "pairs"),
    [
        (
            ("merge.neighbours=all",),
            {("lamps", "tools"), ("tools", "lamps"), ("lamps", "rivers"), ("tools", "rivers")},
        ),
        ((), {("lamps", "rivers"), ("tools", "rivers")}),
        (
            ("merge.search={neighbours: [[], [tools]]}",),
            {("tools", "lamps"), ("lamps", "rivers"), ("tools", "rivers")},
        ),
    ],
)
def test_what_is_held_out_stays_out_of_adapters_that_are_mixed_there(
    experiment: Path, overrides: tuple[str, ...], pairs: set[tuple[str, str]]
) -> None:
    """One shop under three names, of which each draws titles, users and targets of its own."""
    for name in ("lamps", "rivers", "tools"):
        make_domain(experiment.parent / "raw" / name, prefix="Shop", num_users=90, seed=1)
    folder, _ = run(experiment, *MIXED, *overrides)
    other, _ = run(experiment, *MIXED, "data.guests=[]", "name=alone")

    def leaks(folder: Path, trained: str, tested: str) -> dict[str, set[Any]]:
        """What one domain's training and validation have of what another one's tests ask for."""
        held = read_domain(folder / tested)
        cold = {title for title, flag in zip(held.titles, held.cold, strict=True) if flag}
        tests = told(folder / tested, "test")
        asked = {(row[0], row[3]) for row in tests}
        targets = {(row[0], row[3]) for row in (*tests, *told(folder / tested, "valid"))}
        cold_users = {row[0] for row in tests if row[1] == "cold_user"}
        first_titles = {row[0]: set(row[4]) for row in tests if row[1] == "few_shot"}
        assert cold
        assert cold_users
        assert first_titles
        titles = read_domain(folder / trained).titles
        rows = pq.read_table(folder / trained / "train.parquet").to_pylist()
        clicks = {(row["user_id"], titles[item]) for row in rows for item in row["history"]}
        valid = [row for row in told(folder / trained, "valid") if row[2] == "scored"]
        assert len(clicks) > 50
        assert len(valid) > 5
        return {
            "a cold title trains": {title for _, title in clicks} & cold,
            "a cold user trains": {user for user, _ in clicks} & cold_users,
            "a target trains": clicks & targets,
            "a later click of a few-shot user trains": {
                (user, title)
                for user, title in clicks
                if user in first_titles and title not in first_titles[user]
            },
            "a cold user validates": {row[0] for row in valid} & cold_users,
            "a cold title validates": {t for row in valid for t in (row[3], *row[4])} & cold,
            "a test target validates": {
                (row[0], t) for row in valid for t in (row[3], *row[4]) if (row[0], t) in asked
            },
        }

    for trained, tested in pairs:
        assert not any(leaks(folder, trained, tested).values()), (trained, tested)
    # Prepared alone, or where no adapter is mixed, every one of them happens.
    free = {("lamps", "tools"), ("tools", "lamps")} - pairs
    for trained, tested in free:
        assert all(leaks(folder, trained, tested).values())
    assert all(leaks(other, "lamps", "tools").values())
    # What others hold out is told of the items, where a prompt would list them as wrong answers.
    for name in ("lamps", "tools", "rivers"):
        mine = read_domain(folder / name)
        others = [read_domain(folder / tested) for trained, tested in pairs if trained == name]
        cold = {t for one in others for t, flag in zip(one.titles, one.cold, strict=True) if flag}
        flags = zip(mine.titles, mine.held_out_elsewhere, strict=True)
        assert {title for title, flag in flags if flag} == cold & set(mine.titles)
    assert "held_out_elsewhere" not in pq.read_schema(other / "lamps" / "items.parquet").names
    # The domain's own tests, and whoever guides its merge, stay as they are.
    for name in ("lamps", "tools"):
        files = [(one / name / "test.parquet").read_bytes() for one in (folder, other)]
        assert files[0] == files[1]
        frozen = [
            pq.read_table(
                one / name / "candidates.parquet", filters=[("purpose", "=", "test")]
            ).to_pylist()
            for one in (folder, other)
        ]
        assert frozen[0] == frozen[1]
        guides, before = (
            [row for row in told(one / name, "valid") if row[2] == "unlabeled"]
            for one in (folder, other)
        )
        assert guides == before != []


def test_neighbours_make_a_finished_run_stale_and_the_verbs_say_why(experiment: Path) -> None:
    both = ("data.spirit=[rivers]", "data.ingredients=[lamps, tools]")
    run(experiment, *both)
    mixed = (*both, "merge.neighbours=[lamps]")
    (status,) = [s for s in read_status(load(experiment, mixed)) if s.state == "stale"]
    assert status.stage == "prepare"
    assert status.detail.startswith("data/lamps (the set of domains on which its adapter is mixed")
    assert status.detail.endswith("`merge.neighbours`), has changed)")
    assert "tools" not in status.detail
    with pytest.raises(ConfigError, match=r"`prepare` in .* is stale: .* run `rc-ray prepare") as e:
        refuse_stale(experiment, load(experiment, mixed), ("prepare", "tune"))
    assert "\n" not in str(e.value)

    def redone(*overrides: str, force: bool = False) -> list[str]:
        _, lines = run(experiment, *overrides, force=force)
        return [" ".join(line.split()[:2]) for line in lines[1:] if "stands already" not in line]

    # The spirit's domain reads the same held-out titles and users as before.
    assert redone(*mixed) == ["tools keeps", "lamps 40"]
    assert redone(*mixed) == []
    assert {s.stage for s in read_status(load(experiment, mixed)) if s.state == "stale"} == set()
    assert redone(*mixed, force=True) == ["tools keeps", "lamps 40", "tools 40", "rivers 40"]
    # How many users of `tools` train changes nothing of what it holds out.
    assert redone(*mixed, "data.num_training_users={tools: 9}") == ["tools 40"]
    assert redone(*mixed) == ["tools 40"]
    make_domain(experiment.parent / "raw" / "tools", prefix="Tools", num_users=60, seed=2)
    assert redone(*mixed) == ["tools keeps", "lamps 40", "tools 60"]
    # Back to no neighbours: what stood before, and `held_out` is not looked at.
    assert redone(*both) == ["lamps 40"]


def test_a_domain_waits_for_those_that_hold_out_from_it(experiment: Path) -> None:
    items = experiment.parent / "raw" / "tools" / "items.parquet"
    table = pq.read_table(items)
    pq.write_table(table.slice(0, 3), items)
    three = ("data.spirit=[]", "data.ingredients=[lamps, rivers, tools]")
    with pytest.raises(DomainError, match="domain `tools`") as caught:
        run(experiment, *three, "merge.neighbours=[lamps]", "evaluate.systems=[popularity]")
    assert "\n" not in str(caught.value)
    folder = experiment.parent / "runs" / "tiny" / "data"
    assert sorted(path.name for path in folder.iterdir()) == ["rivers"]


def test_nothing_left_to_train_on_is_said_plainly(experiment: Path) -> None:
    """Lamps sells what the others hold out, and nothing else that its users trained on."""
    for name in ("lamps", "tools"):
        make_domain(experiment.parent / "raw" / name, prefix="Shop", num_users=60, seed=1)
    both = ("data.spirit=[]", "data.ingredients=[lamps, tools]", "merge.neighbours=[lamps]")
    log = pq.read_table(experiment.parent / "raw" / "tools" / "interactions.parquet")
    # Everybody of lamps is met in tools at the last two places alone, in other words as targets.
    names = [f"u{user:03d}" for user in range(60)]
    rows = {name: [row for row in log.to_pylist() if row["user_id"] == name] for name in names}
    lamps = [
        {**row, "timestamp": time}
        for name in names
        for time, row in enumerate((*rows[name][-2:], *rows[name][:4]))
    ]
    table = pq.read_table(experiment.parent / "raw" / "lamps" / "interactions.parquet")
    lamps = [row for row in lamps if row["timestamp"] < 4]
    pq.write_table(
        pa.Table.from_pylist(lamps, schema=table.schema),
        experiment.parent / "raw" / "lamps" / "interactions.parquet",
    )
    fields = ("data.cold_item_fraction=0", "data.min_user_interactions=3", "data.num_negatives=5")
    with pytest.raises(DomainError, match="domain `lamps`: its ingredient is mixed on tools, and"):
        run(experiment, *both, *fields, "evaluate.systems=[popularity]")


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
