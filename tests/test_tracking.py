"""Curves in TensorBoard's and MLflow's own files, read back by their own readers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from rc_ray import together, tracking
from rc_ray.artifacts import RunFolder
from rc_ray.errors import ConfigError
from rc_ray.sweep_plan import plan_trials, trial_config
from rc_ray.together import train_group
from rc_ray.tracking import TrackingConfig
from rc_ray.trial import train_ingredient
from tests.conftest import Factory


def log_some(config: TrackingConfig, run_dir: Path, steps: range, name: str = "spirit") -> None:
    with tracking.tracked(
        config,
        run_dir,
        name=name,
        fingerprint=f"of {name}",
        start_step=steps.start,
        parameters={"lora": {"rank": 4}},
    ) as log:
        for step in steps:
            log({"step": step, "loss": 10.0 - step, "note": "no number"})


def scalars(folder: Path) -> list[tuple[int, str, float]]:
    """What the event files hold, in the order of writing; a restart's mark is step and `start`."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:  # length (8), its checksum (4), the record, its checksum (4)
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.HasField("session_log"):
                found.append((event.step, "start", float(event.session_log.status)))
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def test_tensorboard_drops_what_a_stopped_run_had_logged_too_far(tmp_path: Path) -> None:
    config = TrackingConfig(tensorboard=True)
    log_some(config, tmp_path / "shop", range(4))
    assert scalars(tmp_path / "shop" / "tensorboard" / "spirit") == [
        (0, "start", 1.0),  # of a run that was killed before its first checkpoint
        *((step, "loss", 10.0 - step) for step in range(4)),
    ]
    log_some(config, tmp_path / "shop", range(2, 4))
    everything = scalars(tmp_path / "shop" / "tensorboard" / "spirit")
    assert [row[0] for row in everything if row[1] == "start"][-1] == 2


@pytest.mark.parametrize("grouped", [False, True])
def test_trials_log_each_step_alone_and_in_groups(make_run: Factory, grouped: bool) -> None:
    experiment = make_run(
        "data.ingredients=[tools,lamps]",
        "data.spirit=[rivers]",
        "tune.num_steps=3",
        "tune.search={learning_rate: [0.01, 0.02]}",
        "tracking.tensorboard=true",
    )
    run_dir = experiment.run_dir
    orders = [
        trial_config(experiment, RunFolder(run_dir), trial, Path(experiment.model.path))
        for domain in ("tools", "lamps")
        for trial in plan_trials(experiment, RunFolder(run_dir), domain, run_dir / "work")[:1]
    ]
    if grouped:
        assert train_group(orders) == []
    else:
        for order in orders:
            train_ingredient(order)
    for order in orders:
        path = Path(order["folder"]) / "metrics.jsonl"
        losses = [json.loads(line)["loss"] for line in path.read_text().splitlines()]
        curve = run_dir / "tensorboard" / "ingredients" / order["domain"] / "learning_rate=0.01"
        logged = [row for row in scalars(curve) if row[1] == "loss"]
        assert [row[0] for row in logged] == [0, 1, 2]
        assert [row[2] for row in logged] == pytest.approx(losses)


def test_a_finished_training_done_anew_is_another_run_of_mlflow(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    uri = (tmp_path / "store").as_uri()
    log_some(TrackingConfig(mlflow=uri), tmp_path / "shop", range(3))
    log_some(TrackingConfig(mlflow=uri), tmp_path / "shop", range(2))
    log_some(TrackingConfig(mlflow=uri), tmp_path / "shop", range(2, 3))  # the newest goes on
    client = mlflow.MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("shop").experiment_id])
    steps = [
        [one.step for one in client.get_metric_history(run.info.run_id, "loss")] for run in runs
    ]
    assert steps == [[0, 1, 2], [0, 1, 2]]


def test_the_curve_of_a_domain_that_leaves_its_group_ends_as_failed(
    make_run: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    uri = (tmp_path / "store").as_uri()
    experiment = make_run(
        "data.ingredients=[tools,lamps]",
        "data.spirit=[rivers]",
        "tune.num_steps=2",
        f"tracking.mlflow={uri}",
    )
    run_dir = experiment.run_dir
    orders = [
        trial_config(experiment, RunFolder(run_dir), trial, Path(experiment.model.path))
        for domain in ("tools", "lamps")
        for trial in plan_trials(experiment, RunFolder(run_dir), domain, run_dir / "work")
    ]
    original = together.write_step

    def write_step(log: Any, metrics: Any, setting: Any, dtype: str) -> None:
        if "lamps" in log.name and metrics["step"] == 1:
            raise OSError("the disk is gone")
        original(log, metrics, setting, dtype)

    monkeypatch.setattr(together, "write_step", write_step)
    assert train_group(orders) == [Path(orders[1]["folder"])]
    client = mlflow.MlflowClient(uri)
    experiment_id = client.get_experiment_by_name(run_dir.name).experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment_id])}
    assert {name.split("/")[1]: run.info.status for name, run in runs.items()} == {
        "tools": "FINISHED",
        "lamps": "FAILED",
    }


def test_mlflow_goes_on_in_the_same_run(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    uri = (tmp_path / "store").as_uri()
    config = TrackingConfig(mlflow=uri)
    log_some(config, tmp_path / "shop", range(3))
    log_some(config, tmp_path / "shop", range(3, 5))
    log_some(config, tmp_path / "shop", range(1), "ingredients/toys")
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("shop")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {"spirit", "ingredients/toys"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert runs["spirit"].data.params == {"lora/rank": "4"}
    history = client.get_metric_history(runs["spirit"].info.run_id, "loss")
    assert [(one.step, one.value) for one in history] == [(s, 10.0 - s) for s in range(5)]


def test_several_curves_are_open_at_once_and_a_failed_one_says_so(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    uri = (tmp_path / "store").as_uri()
    common: dict[str, Any] = {"start_step": 0, "parameters": {}}
    config = TrackingConfig(mlflow=uri)

    def fail() -> None:
        with (
            tracking.tracked(config, tmp_path, name="a", fingerprint="1", **common) as first,
            tracking.tracked(config, tmp_path, name="b", fingerprint="2", **common) as second,
        ):
            first({"step": 0, "loss": 1.0})
            second({"step": 0, "loss": 2.0})
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name(tmp_path.name)
    runs = client.search_runs([experiment.experiment_id])
    found = {run.info.run_name: (run.info.status, run.data.metrics["loss"]) for run in runs}
    assert found == {"a": ("FAILED", 1.0), "b": ("FAILED", 2.0)}


def test_a_server_that_dies_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mlflow = pytest.importorskip("mlflow")
    uri = (tmp_path / "store").as_uri()
    monkeypatch.setattr(tracking, "_PAUSE_S", 0.0)
    original, calls = mlflow.MlflowClient.log_batch, []

    def failing(self: Any, *arguments: Any, **named: Any) -> None:
        calls.append(len(calls))
        if len(calls) in (2, 3):
            raise mlflow.exceptions.MlflowException("Max retries exceeded\nand so on")
        original(self, *arguments, **named)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", failing)
    log_some(TrackingConfig(mlflow=uri), tmp_path / "shop", range(5))
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("shop").experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(one.step, one.value) for one in history] == [(s, 10.0 - s) for s in (0, 3, 4)]
    assert run.info.status == "FINISHED"
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "rc_ray.tracking"]
    assert warning.startswith(f"MLflow at {uri} fails (MlflowException: Max retries exceeded); the")


def test_a_server_that_is_down_when_a_worker_starts_is_asked_again_after_a_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    uri = (tmp_path / "store").as_uri()
    now, attempts, original = [1000.0], [], tracking._mlflow_run
    monkeypatch.setattr(tracking.time, "monotonic", lambda: now[0])

    def starting(*arguments: Any) -> Any:
        attempts.append(now[0])
        if now[0] < 1100.0:
            raise OSError("refused")
        return original(*arguments)

    monkeypatch.setattr(tracking, "_mlflow_run", starting)
    common: dict[str, Any] = {"fingerprint": "1", "start_step": 0, "parameters": {}}
    config = TrackingConfig(mlflow=uri)
    with (
        tracking.tracked(config, tmp_path, name="a", **common) as log,
        tracking.tracked(config, tmp_path, name="b", **common),  # does not ask by itself
    ):
        for step in range(4):
            log({"step": step, "loss": 1.0})
            now[0] += tracking._PAUSE_S / 2
    assert attempts == [1000.0, 1000.0 + tracking._PAUSE_S]
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name(tmp_path.name).experiment_id])
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == [2, 3]


def test_a_full_disk_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("tensorboardX.SummaryWriter", full)
    log_some(TrackingConfig(tensorboard=True), tmp_path / "shop", range(3))
    assert "TensorBoard fails (OSError: No space left on device)" in caplog.text


def test_off_means_nothing_is_written(tmp_path: Path) -> None:
    log_some(TrackingConfig(), tmp_path / "shop", range(2))
    assert tracking.prepare(TrackingConfig(), tmp_path / "shop") == []
    assert list(tmp_path.iterdir()) == []


def test_where_the_curves_are_is_told(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    uri = (tmp_path / "store").as_uri()
    config = TrackingConfig(tensorboard=True, mlflow=uri)
    for _ in range(2):  # an experiment that is there already is taken
        assert tracking.prepare(config, tmp_path / "shop") == [
            f"curves: tensorboard --logdir {tmp_path / 'shop' / 'tensorboard'}",
            f"curves: the experiment shop of MLflow at {uri}",
        ]
    assert mlflow.MlflowClient(uri).get_experiment_by_name("shop") is not None


@pytest.mark.parametrize(
    ("settings", "absent", "message"),
    [
        ({"mlflow": "mlruns"}, None, r"`tracking.mlflow` is 'mlruns', which is no URI.*file:///"),
        (
            {"mlflow": "http://tracking:5000"},
            "mlflow",
            r"needs the package mlflow; run `pip install",
        ),
        ({"mlflow": "nowhere://tracking"}, None, r"`tracking.mlflow`: nowhere://tracking cannot"),
        (
            {"tensorboard": True},
            "tensorboardX",
            r"needs the package tensorboardX; run `pip install",
        ),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    settings: dict[str, Any], absent: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if absent is not None:
        monkeypatch.setattr(tracking, "find_spec", lambda name: None if name == absent else sys)
    with pytest.raises(ConfigError, match=message) as error:
        tracking.prepare(TrackingConfig.model_validate(settings), Path("shop"))
    assert "\n" not in str(error.value)
