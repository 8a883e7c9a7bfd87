"""Loss curves in TensorBoard and MLflow, through Ray's own integrations; both are off by default.

The curves of a run stand in its `metrics.jsonl` files whatever is set here: this is for those who
compare runs in one of the two tools. Ray and MLflow are imported where they are used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rc_ray.data_config import Section
from rc_ray.errors import ConfigError

Log = Callable[[int, Mapping[str, float]], None]
"""Takes a step and its values by name."""

_RUN_TAG = "rc_ray.run"


class TrackingConfig(Section):
    """Where the loss curves go besides the run folder."""

    tensorboard: bool = False
    """Event files under `tensorboard/` of the run folder."""
    mlflow: str | None = None
    """Tracking URI of MLflow: a server (`http://...`) or, on one machine or on storage that all
    nodes share, a folder (`file:///absolute/path`). Null: no MLflow."""


def check(config: TrackingConfig) -> None:
    """Refuse what could only fail in a worker.

    Raises:
        ConfigError: a package is missing, or the URI is no URI.
    """
    if config.tensorboard and find_spec("tensorboardX") is None:
        raise ConfigError(
            "`tracking.tensorboard` needs the package tensorboardX; install `rc-ray[ray]`, or set "
            "it to false"
        )
    if config.mlflow is None:
        return
    if "://" not in config.mlflow:
        raise ConfigError(
            f"`tracking.mlflow` is {config.mlflow!r}, which is no URI; for a folder write "
            f"`file://{Path(config.mlflow).expanduser().resolve()}`"
        )
    if find_spec("mlflow") is None:
        raise ConfigError(
            "`tracking.mlflow` needs the package mlflow; install `rc-ray[tracking]` or mlflow "
            "itself, or leave the field out"
        )


def describe(config: TrackingConfig, run_dir: Path) -> list[str]:
    """A line for each place where the curves can be watched."""
    lines = []
    if config.tensorboard:
        lines.append(f"curves: tensorboard --logdir {tensorboard_dir(run_dir)}")
    if config.mlflow is not None:
        lines.append(f"curves: mlflow at {config.mlflow}, experiment {run_dir.name}")
    return lines


def tensorboard_dir(run_dir: Path) -> Path:
    return run_dir / "tensorboard"


@contextmanager
def worker_log(
    config: TrackingConfig,
    run_dir: Path,
    *,
    name: str,
    fingerprint: str,
    start_step: int,
    parameters: Mapping[str, Any],
) -> Iterator[Log]:
    """What the first worker of a Ray Train run logs with; it does nothing where all is off.

    A run that was stopped goes on in the same curve: TensorBoard drops what had been logged from
    `start_step` on, MLflow's run is found by its fingerprint and taken up again.

    Args:
        config: what is on.
        run_dir: the run folder; its name is MLflow's experiment.
        name: of the curve, e.g. `spirit`.
        fingerprint: of the training run.
        start_step: the first step that will be logged.
        parameters: recorded once by MLflow.
    """
    with ExitStack() as stack:
        logs: list[Log] = []
        if config.tensorboard:
            from tensorboardX import SummaryWriter

            writer = SummaryWriter(
                str(tensorboard_dir(run_dir) / name), purge_step=start_step or None, flush_secs=10
            )
            stack.callback(writer.close)

            def to_tensorboard(step: int, values: Mapping[str, float]) -> None:
                for key, value in values.items():
                    writer.add_scalar(key, value, global_step=step)

            logs.append(to_tensorboard)
        if config.mlflow is not None:
            logs.append(
                _mlflow_log(config.mlflow, run_dir.name, name, fingerprint, parameters, stack)
            )

        def log(step: int, values: Mapping[str, float]) -> None:
            for one in logs:
                one(step, values)

        yield log


def tune_callbacks(config: TrackingConfig, run_dir: Path) -> list[Any]:
    """Ray Tune's loggers for what is on."""
    callbacks: list[Any] = []
    if config.tensorboard:
        callbacks.append(_tensorboard_callback(tensorboard_dir(run_dir) / "ingredients"))
    if config.mlflow is not None:
        _allow_folders(config.mlflow)
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        callbacks.append(
            MLflowLoggerCallback(tracking_uri=config.mlflow, experiment_name=run_dir.name)
        )
    return callbacks


def _mlflow_log(
    uri: str,
    experiment: str,
    name: str,
    fingerprint: str,
    parameters: Mapping[str, Any],
    stack: ExitStack,
) -> Log:
    _allow_folders(uri)
    import mlflow
    from ray.air.integrations.mlflow import setup_mlflow

    mlflow.set_tracking_uri(uri)
    known = mlflow.get_experiment_by_name(experiment)
    runs = []
    if known is not None:
        runs = mlflow.search_runs(
            experiment_ids=[known.experiment_id],
            filter_string=f"tags.`{_RUN_TAG}` = '{fingerprint}'",
            max_results=1,
            output_format="list",
        )
    if runs:  # Ray's set-up takes a run that is active already
        mlflow.start_run(run_id=runs[0].info.run_id)
    setup_mlflow(
        None if runs else dict(parameters),
        tracking_uri=uri,
        experiment_name=experiment,
        run_name=name,
        create_experiment_if_not_exists=True,
        tags={_RUN_TAG: fingerprint},
    )
    stack.callback(mlflow.end_run)

    def log(step: int, values: Mapping[str, float]) -> None:
        mlflow.log_metrics(dict(values), step=step)

    return log


def _allow_folders(uri: str) -> None:
    """MLflow 3 keeps its folder store behind a switch; whoever names a folder has chosen it."""
    if uri.startswith("file:"):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")


def _tensorboard_callback(folder: Path) -> Any:
    from ray.tune.logger import TBXLoggerCallback

    class TensorBoardCallback(TBXLoggerCallback):  # type: ignore[misc]
        """Writes beside the run instead of among Tune's books, which the next sweep clears."""

        def log_trial_start(self, trial: Any) -> None:
            if trial in self._trial_writer:
                self._trial_writer[trial].close()
            trial_dir = Path(trial.config["trial"]["folder"])
            target = folder / trial_dir.parent.name / trial_dir.name
            self._trial_writer[trial] = self._summary_writer_cls(str(target), flush_secs=10)
            self._trial_result[trial] = {}

    return TensorBoardCallback()
