"""Sweeps on Ray Tune: halving, Optuna, memory, several workers, and a driver that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from rc_ray import artifacts, tune
from rc_ray.artifacts import RunFolder
from rc_ray.config import Experiment, load
from rc_ray.core.adapters import load_adapter
from rc_ray.errors import ConfigError
from rc_ray.sweep import Request, fit
from tests.distributed.test_tune import changed_files, run

pytestmark = pytest.mark.distributed

SETTINGS = (
    "data.ingredients=[tools]",
    "data.spirit=[rivers]",
    "tune.num_valid_users=6",
    "tune.num_steps=8",
    "tune.checkpoint_every=3",
    "tune.max_concurrent_trials=2",
)


def table(experiment: Experiment) -> list[dict[str, Any]]:
    folder = RunFolder(experiment.run_dir).ingredient_dir("tools")
    rows: list[dict[str, Any]] = pq.read_table(folder / "trials.parquet").to_pylist()
    return rows


def test_bad_trials_are_stopped_and_stay_stopped(ray_local, make_run, screen) -> None:
    experiment = make_run(
        *SETTINGS,
        "tune.search={learning_rate: [0.01, 1.0e-3, 5.0e-4, 1.0e-4, 1.0e-5]}",
        "tune.valid_every=2",
        "tune.scheduler={name: asha, grace_period: 2, reduction_factor: 2}",
    )
    run(experiment, screen)
    rows = table(experiment)
    stopped = [row for row in rows if row["stopped"]]
    # After two steps a smaller rate shows a larger loss. So whenever the largest rate arrives, each
    # of the others but the first is in the worse half of those before it.
    assert len(stopped) >= 2
    assert not rows[0]["stopped"]
    (chosen,) = (row for row in rows if row["chosen"])
    assert chosen["valid_ndcg"] == max(r["valid_ndcg"] for r in rows if not r["stopped"])
    assert not chosen["stopped"]
    best = f"learning_rate={json.loads(chosen['setting'])['learning_rate']}"
    assert all(row["num_steps"] < 8 and row["error"] is None for row in stopped)
    summary = artifacts.read_json(experiment.run_dir / "ingredients" / "sweep.json")
    assert summary["domains"]["tools"]["num_stopped"] == len(stopped)
    assert summary["domains"]["tools"]["best"] == best
    assert 0.0 < summary["last_session"]["training_share"] < 1.0
    text = (experiment.run_dir / "ingredients" / "sweep.md").read_text()
    assert f"| tools | 5 | {len(stopped)} | 0 | {best} |" in text

    # Another validation ranks those that finished, and trains none of those that were stopped.
    work = experiment.run_dir / "ingredients.work" / "tools"
    curves = {str(path): path.read_bytes() for path in work.rglob("metrics.jsonl")}
    more = experiment.model_copy(
        update={"tune": experiment.tune.model_copy(update={"num_valid_users": 5})}
    )
    run(more, screen)
    assert {str(path): path.read_bytes() for path in work.rglob("metrics.jsonl")} == curves
    assert [row["stopped"] for row in table(more)] == [row["stopped"] for row in rows]


def test_a_stopped_trial_goes_on_when_the_others_fail(ray_local, make_run, screen) -> None:
    experiment = make_run(
        *SETTINGS,
        "tune.search={learning_rate: [0.01, 0.02]}",
        "tune.valid_every=2",
        "tune.scheduler={name: asha, grace_period: 2, reduction_factor: 2}",
    )
    folder = RunFolder(experiment.run_dir)
    work = experiment.run_dir / "ingredients.work"
    for trial in tune.plan_trials(experiment, folder, "tools", work):
        loss = trial.setting.learning_rate
        told = {"scheduler": trial.scheduler, "num_steps": 2, "valid_loss": loss}
        artifacts.write_json(trial.folder / "stopped.json", told)
    run(experiment, screen)
    assert "1 stopped trial(s) go on" in screen.text
    rows = table(experiment)
    assert [(row["chosen"], row["stopped"], row["num_steps"]) for row in rows] == [
        (True, False, 8),
        (False, True, 0),
    ]


def test_optuna_asks_each_domain_by_itself(ray_local, make_run, screen) -> None:
    pytest.importorskip("optuna")
    experiment = make_run(
        "data.ingredients=[tools,lamps]",
        *SETTINGS[1:],
        "tune.num_steps=2",
        "tune.search={learning_rate: {loguniform: [1.0e-4, 1.0e-1]}, lora.rank: {choice: [2, 4]}}",
        "tune.num_samples=3",
        "tune.search_algorithm=optuna",
    )
    run(experiment, screen)
    folder = RunFolder(experiment.run_dir)
    for domain in ("tools", "lamps"):
        rows = pq.read_table(folder.ingredient_dir(domain) / "trials.parquet").to_pylist()
        rates = [json.loads(row["setting"])["learning_rate"] for row in rows]
        assert len(set(rates)) == 3
        assert all(1e-4 <= rate <= 1e-1 for rate in rates)
        assert all(row["valid_ndcg"] is not None for row in rows)
    # What was found is not searched again.
    before = changed_files(experiment.run_dir / "ingredients.work")
    run(experiment, screen)
    assert screen.text.count("is up to date") == 2
    assert changed_files(experiment.run_dir / "ingredients.work") == before


def test_a_trial_larger_than_a_nodes_memory_is_refused(ray_local, make_run, screen) -> None:
    with pytest.raises(ConfigError, match=r"tune.memory_per_trial_gb.*99999.0 GB.*the cluster has"):
        run(make_run(*SETTINGS, "tune.memory_per_trial_gb=99999"), screen)


@pytest.mark.slow
def test_memory_bounds_how_many_run_at_a_time(ray_local, make_run, screen) -> None:
    import ray

    free = ray.cluster_resources()["memory"] / 1e9
    experiment = make_run(
        *SETTINGS[:-1],
        "tune.num_steps=2",
        "tune.search={learning_rate: [0.01, 0.02]}",
        f"tune.memory_per_trial_gb={0.6 * free}",
    )
    run(experiment, screen)
    assert "2 trial(s), 1 at a time, each 1 CPU" in screen.text
    assert (
        artifacts.read_json(experiment.run_dir / "ingredients" / "sweep.json")["last_session"][
            "num_slots"
        ]
        == 1
    )


def test_a_process_that_dies_again_and_again_is_told_and_stops_no_other(
    ray_local, make_run, tmp_path
) -> None:
    def die_or_report(config: dict[str, Any]) -> None:
        from ray import tune

        if "broken" in config["trial"]:
            os._exit(1)
        Path(config["trial"]).with_suffix(".done").touch()
        tune.report({"failed": False})

    orders = [tmp_path / "orders" / f"{name}.a.json" for name in ("broken", "whole")]
    for order in orders:
        artifacts.write_json(order, {})
    request = Request(cpus=1.0, gpus=0.0, memory=1)
    books = tmp_path / ".tune" / "books"
    died = fit(books, orders, orders[0].parent, die_or_report, request, num_slots=2)
    assert list(died) == [orders[0]]
    assert orders[1].with_suffix(".done").exists()
    assert not books.exists()


@pytest.mark.slow
def test_a_trial_on_two_workers_equals_one_on_one(ray_local, make_run, screen) -> None:
    settings = (*SETTINGS, "tune.valid_every=4")
    alone, together = make_run(*settings), make_run(*settings, "tune.num_workers=2")
    run(alone, screen)
    run(together, screen)
    assert "on each of 2 workers" in screen.text
    folders = [RunFolder(one.run_dir).ingredient_dir("tools") for one in (alone, together)]
    first, second = (load_adapter(folder) for folder in folders)
    for name, pair in first.modules.items():
        torch.testing.assert_close(pair.a, second.modules[name].a, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(pair.b, second.modules[name].b, rtol=1e-3, atol=1e-4)
    ndcgs = [artifacts.read_json(f / artifacts.MANIFEST)["metrics"]["valid_ndcg"] for f in folders]
    assert ndcgs[0] == pytest.approx(ndcgs[1], abs=0.05)
    # Neither the workers nor their books are part of what the ingredient is known by.
    run(together.model_copy(update={"tune": alone.tune}), screen)
    assert "is up to date" in screen.text
    work = together.run_dir / "ingredients.work" / "tools"
    assert not list(work.rglob(".workers"))


PROGRAM = """
import sys
from pathlib import Path
from rc_ray import tune
from rc_ray.artifacts import RunFolder
from rc_ray.config import load
from rc_ray.progress import Progress
from rc_ray.session import ray_session
from rc_ray.sweep import Request, fit

if __name__ == "__main__":
    experiment = load(Path(sys.argv[1]), tuple(sys.argv[2:]))
    with Progress() as console, ray_session(RunFolder(experiment.run_dir), num_cpus=2):
        tune.run(experiment, console=console)
"""


@pytest.mark.slow
def test_a_killed_driver_goes_on_where_it_was(make_run, tmp_path) -> None:
    overrides = (
        *SETTINGS,
        "tune.num_steps=250",
        "tune.checkpoint_every=10",
        "tune.max_concurrent_trials=1",
        "tune.search={learning_rate: [0.01, 0.02, 0.03]}",
    )
    broken, whole = make_run(*overrides), make_run(*overrides)
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(tune.__file__).parents[1]),
        "PYTHONDONTWRITEBYTECODE": "",
    }

    def start(experiment: Experiment) -> subprocess.Popen[str]:
        path = tmp_path / f"{experiment.run_dir.parent.name}.yaml"
        path.write_text(json.dumps(experiment.model_dump(mode="json")))
        assert load(path).tune == experiment.tune
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )

    work = broken.run_dir / "ingredients.work"
    first, second, _ = tune.plan_trials(broken, RunFolder(broken.run_dir), "tools", work)
    process = start(broken)
    deadline = time.monotonic() + 240
    while not (first.is_finished and (second.folder / ".checkpoint" / "state.json").exists()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(1.5)  # Tune writes its books every second
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not second.is_finished
    before = changed_files(first.folder)
    first_rows = second.metrics_path.read_text().splitlines()[:10]
    again = start(broken)
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 0, output
    assert "the sweep of a driver that was killed goes on" in output
    assert changed_files(first.folder) == before
    assert json.loads(first_rows[0]) == json.loads(second.metrics_path.read_text().splitlines()[0])
    undisturbed = start(whole)
    output, _ = undisturbed.communicate(timeout=240)
    assert undisturbed.returncode == 0, output
    for one in tune.plan_trials(whole, RunFolder(whole.run_dir), "tools", work):
        other = whole.run_dir / "ingredients.work" / "tools" / one.folder.name
        left, right = load_adapter(one.folder / "adapter"), load_adapter(other / "adapter")
        for name, pair in left.modules.items():
            assert torch.equal(pair.a, right.modules[name].a)
            assert torch.equal(pair.b, right.modules[name].b)
