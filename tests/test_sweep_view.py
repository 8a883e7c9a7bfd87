"""The table of a sweep, its counts, its lines off a terminal, and the note that nothing runs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rc_ray import artifacts, sweep_view
from rc_ray.artifacts import write_manifest
from rc_ray.curves import write_metrics
from rc_ray.sweep import Request
from rc_ray.sweep_plan import ERROR, STOPPED
from rc_ray.sweep_view import SweepView
from rc_ray.trial_process import begin
from tests.conftest import Screen

REQUEST = Request(cpus=2.0, gpus=0.0, memory=3_000_000_000)


def write_orders(root: Path, num: int) -> list[Path]:
    folders = []
    for place in range(num):
        folder = root / f"domain{place}" / "trial"
        order = {
            "domain": f"domain{place}",
            "label": "learning_rate=0.1",
            "folder": str(folder),
            "setting": {"num_steps": 8},
            "config": {"num_valid_users": 9},
            "seed": 1,
            "inputs": {},
        }
        artifacts.write_json(root / "orders" / f"domain{place}.trial.json", order)
        folders.append(folder)
    return folders


def view_of(
    root: Path, folders: list[Path], screen: Screen, request: Request = REQUEST, **fields: Any
) -> SweepView:
    return SweepView(screen.console, root / "orders", folders, len(folders), request, **fields)


def seal(folder: Path, ndcg: float, num_valid_users: int = 9) -> None:
    write_manifest(
        folder,
        stage="tune",
        config={"num_valid_users": num_valid_users},
        seed=1,
        inputs={},
        metrics={"valid_ndcg": ndcg},
    )


def drawn(view: SweepView) -> str:
    stream = io.StringIO()
    Console(file=stream, width=120).print(view.render())
    return stream.getvalue()


def rows_of(*losses: float) -> list[dict[str, float]]:
    return [{"step": step, "loss": loss} for step, loss in enumerate(losses)]


def test_rows_and_counts_follow_the_trial_folders(tmp_path: Path, screen: Screen) -> None:
    folders = write_orders(tmp_path, 5)
    view = view_of(tmp_path, folders, screen)
    running, done, failed, stopped, _ = folders
    validated = {**rows_of(0.0, 0.0, 3.25)[-1], "valid_loss": 2.75}
    write_metrics(running / "metrics.jsonl", [*rows_of(4.5, 4.0), validated])
    write_metrics(done / "metrics.jsonl", rows_of(*[1.5] * 8))
    seal(done, 0.5)
    for folder, name in ((failed, ERROR), (stopped, STOPPED)):
        write_metrics(folder / "metrics.jsonl", rows_of(9.0))
        artifacts.write_json(folder / name, {"error": "broken"})
    view.look()
    assert view.counts().startswith("done 1, running 1, waiting 1, stopped 1, failed 1")
    table = drawn(view).splitlines()
    assert table[0].split() == "domain trial step loss best validation left".split()  # noqa: SIM905
    assert table[1].split() == ["domain0", "learning_rate=0.1", "3/8", "3.25", "2.75"]
    assert table[2].split() == "domain1 learning_rate=0.1 8/8 1.5 NDCG 0.500 done".split()  # noqa: SIM905
    assert table[5].split() == ["domain4", "learning_rate=0.1", "0/8", "waiting"]
    lines = screen.text.splitlines()
    assert "  domain1 learning_rate=0.1  8/8  loss 1.5  best NDCG 0.500  done" in lines
    assert any(line.startswith("  domain2") and line.endswith("failed") for line in lines)


def test_a_hundred_trials_show_those_that_run(tmp_path: Path, screen: Screen) -> None:
    folders = write_orders(tmp_path, 100)
    view = view_of(tmp_path, folders, screen)
    for folder in folders[40:43]:
        write_metrics(folder / "metrics.jsonl", rows_of(2.0))
    view.look()
    table = drawn(view).splitlines()
    assert [line.split()[0] for line in table[1:-1]] == ["domain40", "domain41", "domain42"]
    assert table[-1].strip() == "done 0, running 3, waiting 97"
    # Off a terminal: the counts, no line per trial.
    assert screen.text.splitlines() == ["  done 0, running 3, waiting 97"]


def test_a_sweep_that_does_not_start_says_what_it_asks_and_what_is_free(
    tmp_path: Path, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_view, "_FIRST_NOTE_S", 0.0)
    folders = write_orders(tmp_path, 1)
    view = view_of(tmp_path, folders, screen, free=lambda: {"CPU": 1.0, "memory": 2e9})
    view._next_note_s = 0.0
    view.look()
    (line,) = screen.text.splitlines()
    assert "asks for (2 CPU, 3.0 GB)" in line
    assert "1 CPU, 0 GPU, 2.0 GB free" in line
    assert "lower `tune.cpus_per_trial`" in line
    write_metrics(folders[0] / "metrics.jsonl", rows_of(2.0))
    view.look()
    view.look()
    assert screen.text.count("no trial has started") == 1


def test_trials_that_come_later_join_and_no_order_is_read_twice(
    tmp_path: Path, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = write_orders(tmp_path, 1)
    view = SweepView(screen.console, tmp_path / "orders", folders, 3, REQUEST)
    write_orders(tmp_path, 2)
    read: list[str] = []
    original = artifacts.read_json
    monkeypatch.setattr(artifacts, "read_json", lambda path: (read.append(path), original(path))[1])
    for _ in range(2):
        view.look()
    assert [row.domain for row in view.rows] == ["domain0", "domain1"]
    assert view.counts() == "done 0, running 0, waiting 3"
    assert read == [tmp_path / "orders" / "domain1.trial.json"]


def test_several_workers_run_from_their_first_step_on(
    tmp_path: Path, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial's own process asks for nothing, so it starts whether or not there is room."""
    monkeypatch.setattr(sweep_view, "_FIRST_NOTE_S", 0.0)
    (folder,) = write_orders(tmp_path, 1)
    two = Request(cpus=2.0, gpus=0.0, memory=3_000_000_000, num_workers=2)
    view = view_of(tmp_path, [folder], screen, two, free=lambda: {"CPU": 1.0, "memory": 2e9})
    view._next_note_s = 0.0
    begin(folder)
    view.look()
    assert "no trial has started for 0 s: each asks for 2 x (2 CPU, 3.0 GB)" in screen.text
    assert "lower `tune.num_workers`, `tune.cpus_per_trial`" in screen.text
    for losses in ((2.0,), (2.0, 1.9)):
        write_metrics(folder / "metrics.jsonl", rows_of(*losses))
        view.look()
    told = screen.text.count("no trial has started")
    view.look()
    assert screen.text.count("no trial has started") == told


def test_a_folder_that_another_validation_sealed_is_not_done(
    tmp_path: Path, screen: Screen
) -> None:
    (folder,) = write_orders(tmp_path, 1)
    write_metrics(folder / "metrics.jsonl", rows_of(5.0, 4.0))
    seal(folder, 0.25, num_valid_users=50)
    view = view_of(tmp_path, [folder], screen)
    begin(folder)
    view.look()
    assert view.counts().startswith("done 0, running 1")
    seal(folder, 0.75)
    view.look()
    assert "best NDCG 0.750  done" in screen.text


def test_what_ran_before_is_not_taken_for_running(tmp_path: Path, screen: Screen) -> None:
    (folder,) = write_orders(tmp_path, 1)
    write_metrics(folder / "metrics.jsonl", rows_of(5.0, 4.0))
    view = view_of(tmp_path, [folder], screen)
    view.look()
    assert view.counts() == "done 0, running 0, waiting 1"


def test_a_merge_trial_shows_its_objective_and_the_steps_that_there_are(
    tmp_path: Path, screen: Screen
) -> None:
    folders = write_orders(tmp_path, 1)
    view = view_of(tmp_path, folders, screen, fields="`merge.cpus_per_task`")
    begin(folders[0])
    row = '{"mix": "cocktail", "step": 1, "objective": 2.25, "num_steps": 4}\n'
    (folders[0] / "metrics.jsonl").write_text(row)
    view.look()
    assert "2/4" in drawn(view)  # the order says 8
    assert "2.25" in drawn(view)
    write_manifest(
        folders[0],
        stage="merge",
        config={"num_valid_users": 9},
        seed=1,
        inputs={},
        metrics={"valid_ndcg": None, "final_objective": 1.5},
    )
    view.look()
    assert view.rows[0].best == "objective 1.5"
    assert view.rows[0].state == "done"
