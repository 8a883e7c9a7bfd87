"""Curves in TensorBoard's and MLflow's own files, read back by their own readers."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rc_ray import tracking
from rc_ray.errors import ConfigError
from rc_ray.tracking import TrackingConfig


def log_some(config: TrackingConfig, run_dir: Path, steps: range, start_step: int) -> None:
    with tracking.worker_log(
        config,
        run_dir,
        name="spirit",
        fingerprint="abc",
        start_step=start_step,
        parameters={"lora": {"rank": 4}},
    ) as log:
        for step in steps:
            log(step, {"loss": 10.0 - step})


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
    log_some(config, tmp_path / "shop", range(4), 0)
    assert scalars(tmp_path / "shop" / "tensorboard") == [
        (step, "loss", 10.0 - step) for step in range(4)
    ]
    log_some(config, tmp_path / "shop", range(2, 4), 2)
    everything = scalars(tmp_path / "shop" / "tensorboard")
    assert [row for row in everything if row[1] == "start"] == [(2, "start", 1.0)]


def test_mlflow_goes_on_in_the_same_run(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    uri = f"file://{tmp_path / 'store'}"
    config = TrackingConfig(mlflow=uri)
    log_some(config, tmp_path / "shop", range(3), 0)
    log_some(config, tmp_path / "shop", range(3, 5), 3)
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("shop")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 1
    assert runs[0].info.run_name == "spirit"
    assert runs[0].info.status == "FINISHED"
    assert runs[0].data.params == {"lora/rank": "4"}
    history = client.get_metric_history(runs[0].info.run_id, "loss")
    assert [(one.step, one.value) for one in history] == [(s, 10.0 - s) for s in range(5)]


def test_trials_write_beside_the_run(tmp_path: Path) -> None:
    (callback,) = tracking.tune_callbacks(TrackingConfig(tensorboard=True), tmp_path)
    trial: Any = SimpleNamespace(
        config={"trial": {"folder": "anywhere/ingredients.work/toys/0123"}}, evaluated_params=None
    )
    callback.log_trial_start(SimpleHashable(trial))
    callback.log_trial_result(
        1, SimpleHashable(trial), {"training_iteration": 1, "timesteps_total": 7, "loss": 2.5}
    )
    callback.log_trial_end(SimpleHashable(trial))
    assert (7, "ray/tune/loss", 2.5) in scalars(tmp_path / "tensorboard/ingredients/toys/0123")


class SimpleHashable:
    """Stands for Tune's trial: equal where what it wraps is the same."""

    def __init__(self, trial: Any) -> None:
        self._trial = trial

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trial, name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SimpleHashable) and other._trial is self._trial

    def __hash__(self) -> int:
        return id(self._trial)


def test_off_means_nothing_is_written(tmp_path: Path) -> None:
    log_some(TrackingConfig(), tmp_path / "shop", range(2), 0)
    assert list(tmp_path.iterdir()) == []
    assert tracking.tune_callbacks(TrackingConfig(), tmp_path) == []
    assert tracking.describe(TrackingConfig(), tmp_path) == []


@pytest.mark.parametrize(
    ("settings", "absent", "message"),
    [
        ({"mlflow": "mlruns"}, None, r"`tracking.mlflow` is 'mlruns', which is no URI.*file:///"),
        ({"mlflow": "http://tracking:5000"}, "mlflow", r"needs the package mlflow; install"),
        ({"tensorboard": True}, "tensorboardX", r"needs the package tensorboardX; install"),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    settings: dict[str, Any], absent: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if absent:
        monkeypatch.setattr(tracking, "find_spec", lambda name: None if name == absent else sys)
    with pytest.raises(ConfigError, match=message) as error:
        tracking.check(TrackingConfig.model_validate(settings))
    assert "\n" not in str(error.value)
