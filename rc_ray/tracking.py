"""Loss curves in TensorBoard and MLflow, through Ray's own integrations; both are off by default.

The curves of a run stand in its `metrics.jsonl` files whatever is set here: this is for those who
compare runs in one of the two tools. MLflow and Ray are imported where they are used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rc_ray.data_config import Section
from rc_ray.errors import ConfigError

Log = Callable[[Mapping[str, Any]], None]
"""Takes a row of `metrics.jsonl`: `step`, and numbers by name."""

RUN_TAG = "rc_ray.run"
"""MLflow's tag of a run: the fingerprint of the training."""


class TrackingConfig(Section):
    """Where the loss curves go besides the run folder."""

    tensorboard: bool = False
    """Event files under `tensorboard/` of the run folder."""
    mlflow: str | None = None
    """Tracking URI of MLflow: a server (`http://...`), or a folder on storage that all nodes share
    (`file:///absolute/path`). Null: no MLflow."""


def prepare(config: TrackingConfig, run_dir: Path) -> list[str]:
    """Refuse what could only fail in a worker, and make MLflow's experiment.

    Args:
        config: what is on.
        run_dir: the run folder; its name is MLflow's experiment.

    Returns:
        A line for each place where the curves can be watched.

    Raises:
        ConfigError: a package is missing, or there is no MLflow at the URI.
    """
    lines = []
    if config.tensorboard:
        if find_spec("tensorboardX") is None:
            raise ConfigError(
                "`tracking.tensorboard` needs the package tensorboardX; install `rc-ray[ray]`, or "
                "set it to false"
            )
        lines.append(f"curves: tensorboard --logdir {run_dir / 'tensorboard'}")
    if config.mlflow is not None:
        _make_experiment(config.mlflow, run_dir.name)
        lines.append(f"curves: the experiment {run_dir.name} of MLflow at {config.mlflow}")
    return lines


@contextmanager
def tracked(
    config: TrackingConfig,
    run_dir: Path,
    *,
    name: str,
    fingerprint: str,
    start_step: int,
    parameters: Mapping[str, Any],
) -> Iterator[Log]:
    """What a process that trains logs its rows with; it does nothing where all is off.

    A run that was stopped goes on in the same curve: TensorBoard drops what had been logged from
    `start_step` on, MLflow's run is found by its fingerprint and taken up again. Several may be
    open in one process.

    Args:
        config: what is on.
        run_dir: the run folder.
        name: of the curve, e.g. `spirit` or `ingredients/books/0123`.
        fingerprint: of the training.
        start_step: the first step that will be logged.
        parameters: recorded once by MLflow.
    """
    with ExitStack() as stack:
        logs: list[Callable[[int, dict[str, float]], None]] = []
        if config.tensorboard:
            from tensorboardX import SummaryWriter

            writer = SummaryWriter(
                str(run_dir / "tensorboard" / name), purge_step=start_step or None, flush_secs=10
            )
            stack.callback(writer.close)

            def to_tensorboard(step: int, values: dict[str, float]) -> None:
                for key, value in values.items():
                    writer.add_scalar(key, value, global_step=step)

            logs.append(to_tensorboard)
        if config.mlflow is not None:
            client, run_id = _mlflow_run(
                config.mlflow, run_dir.name, name, fingerprint, dict(parameters)
            )
            stack.push(lambda kind, *_: client.set_terminated(run_id, _status(kind)))

            def to_mlflow(step: int, values: dict[str, float]) -> None:
                for key, value in values.items():
                    client.log_metric(run_id, key, value, step=step)

            logs.append(to_mlflow)

        def log(row: Mapping[str, Any]) -> None:
            values = {
                key: float(value)
                for key, value in row.items()
                if key != "step" and isinstance(value, int | float)
            }
            for one in logs:
                one(int(row["step"]), values)

        yield log


def tracked_trial(trial: Mapping[str, Any], start_step: int) -> AbstractContextManager[Log]:
    """The same for a trial of the sweep, of its order."""
    return tracked(
        TrackingConfig.model_validate(trial["tracking"]),
        Path(trial["run_dir"]),
        name=curve_name(trial),
        fingerprint=trial["training_fingerprint"],
        start_step=start_step,
        parameters=trial["setting"],
    )


def curve_name(trial: Mapping[str, Any]) -> str:
    """Of a trial's order: its domain and setting, as far as the sweep searches."""
    label = trial["label"] or "trial"
    return f"ingredients/{trial['domain']}/{label.replace('/', '_').replace(' ', ',')}"


def _make_experiment(uri: str, name: str) -> None:
    if "://" not in uri:
        raise ConfigError(
            f"`tracking.mlflow` is {uri!r}, which is no URI; for a folder write "
            f"`{Path(uri).expanduser().resolve().as_uri()}`"
        )
    if find_spec("mlflow") is None:
        raise ConfigError(
            "`tracking.mlflow` needs the package mlflow; install `rc-ray[tracking]` or mlflow "
            "itself, or leave the field out"
        )
    _allow_folders(uri)
    # A server that is down should be told at once, not after minutes of attempts.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        client = mlflow.MlflowClient(uri)
        if client.get_experiment_by_name(name) is None:
            client.create_experiment(name)
    except (MlflowException, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"`tracking.mlflow`: {uri} cannot be used: {reason[0]}") from None


def _mlflow_run(
    uri: str, experiment: str, name: str, fingerprint: str, parameters: dict[str, Any]
) -> tuple[Any, str]:
    """A client, and the id of the run: the one with this fingerprint, or a new one."""
    _allow_folders(uri)
    import mlflow
    from ray.air.integrations.mlflow import setup_mlflow

    client = mlflow.MlflowClient(uri)
    known = client.get_experiment_by_name(experiment)
    runs = known and client.search_runs(
        [known.experiment_id], f"tags.`{RUN_TAG}` = '{fingerprint}'", max_results=1
    )
    if runs:
        client.update_run(runs[0].info.run_id, status="RUNNING")
        return client, runs[0].info.run_id
    setup_mlflow(
        parameters,
        tracking_uri=uri,
        experiment_name=experiment,
        run_name=name,
        create_experiment_if_not_exists=True,
        tags={RUN_TAG: fingerprint},
        rank_zero_only=False,  # the caller is the one that logs
    )
    run = mlflow.active_run()
    mlflow.end_run(status="RUNNING")  # no longer the process's only one, but not over
    return client, run.info.run_id


def _status(error: type[BaseException] | None) -> str:
    """MLflow's word for how a run ended; one that a scheduler stopped is not a failure."""
    if error is None:
        return "FINISHED"
    return "FAILED" if issubclass(error, Exception) else "KILLED"


def _allow_folders(uri: str) -> None:
    """MLflow 3 keeps its folder store behind a switch; whoever names a folder has chosen it."""
    if uri.startswith("file:"):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
