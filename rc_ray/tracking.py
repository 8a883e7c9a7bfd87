"""Loss curves in TensorBoard and MLflow, through Ray's own integrations; both are off by default.

The curves of a run stand in its `metrics.jsonl` files whatever is set here: this is for those who
compare runs in one of the two tools. MLflow and Ray are imported where they are used.
"""

from __future__ import annotations

import functools
import logging
import os
import time
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
_PAUSE_S = 300.0
"""How long a tool that failed is left alone; a server that hangs takes half a minute to fail."""


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
                "`tracking.tensorboard` needs the package tensorboardX; run "
                "`pip install tensorboardX`, or set it to false"
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
    open in one process. No training ends because a tool fails: that is warned of once.

    Args:
        config: what is on.
        run_dir: the run folder.
        name: of the curve, e.g. `spirit` or `ingredients/books/0123`.
        fingerprint: of the training.
        start_step: the first step that will be logged.
        parameters: recorded once by MLflow.
    """
    with ExitStack() as stack:
        logs: list[Callable[[int, dict[str, float]], Any]] = []
        if config.tensorboard:
            board = _Forgiving("TensorBoard")
            writer = board.call(_tensorboard_writer, run_dir / "tensorboard" / name, start_step)
            if writer is not None:
                stack.callback(board.call, writer.close)
                logs.append(functools.partial(board.call, _log_to_tensorboard, writer))
        if config.mlflow is not None:
            curve = _MlflowCurve(
                config.mlflow, run_dir.name, name, fingerprint, start_step, dict(parameters)
            )
            curve.server.call(curve.open)
            stack.push(lambda kind, *_: curve.server.call(curve.end, kind))
            logs.append(functools.partial(curve.server.call, curve.log))

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
            "`tracking.mlflow` needs the package mlflow; run `pip install mlflow-skinny`, or "
            "leave the field out"
        )
    _prepare_environment(uri)
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        client = mlflow.MlflowClient(uri)
        if client.get_experiment_by_name(name) is None:
            client.create_experiment(name)
    except (MlflowException, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"`tracking.mlflow`: {uri} cannot be used: {reason[0]}") from None


class _Forgiving:
    """Calls a tool that may fail; its next call then waits, since each may take long to fail."""

    def __init__(self, tool: str) -> None:
        self._tool = tool
        self._next_at = 0.0
        self._has_warned = False

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function returns; None where it fails, or the tool failed a short while ago."""
        if time.monotonic() < self._next_at:
            return None
        try:
            return function(*arguments)
        except Exception as error:
            self._next_at = time.monotonic() + _PAUSE_S
            if not self._has_warned:
                logging.getLogger(__name__).warning(
                    "%s fails (%s: %s); the training goes on, its curve has gaps there",
                    self._tool,
                    type(error).__name__,
                    str(error).strip().partition("\n")[0],
                )
            self._has_warned = True
            return None


def _tensorboard_writer(folder: Path, start_step: int) -> Any:
    from tensorboardX import SummaryWriter

    # Also from step 0 on: a run killed before its first checkpoint has left steps too.
    return SummaryWriter(str(folder), purge_step=start_step, flush_secs=10)


def _log_to_tensorboard(writer: Any, step: int, values: dict[str, float]) -> None:
    for key, value in values.items():
        writer.add_scalar(key, value, global_step=step)


@functools.cache
def _mlflow_at(uri: str) -> _Forgiving:
    """One for all curves of a process: they would wait for the same server one by one."""
    return _Forgiving(f"MLflow at {uri}")


class _MlflowCurve:
    """One run of MLflow, opened as soon as the server answers."""

    def __init__(
        self,
        uri: str,
        experiment: str,
        name: str,
        fingerprint: str,
        start_step: int,
        parameters: dict[str, Any],
    ) -> None:
        self._what = uri, experiment, name, fingerprint, start_step, parameters
        self._opened: tuple[Any, str] | None = None
        self.server = _mlflow_at(uri)

    def open(self) -> tuple[Any, str]:
        """A client and the run's id."""
        if self._opened is None:
            self._opened = _mlflow_run(*self._what)
        return self._opened

    def log(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        client, run_id = self.open()
        now = int(time.time() * 1000)
        # In one request: the training waits for it.
        client.log_batch(run_id, [Metric(key, value, now, step) for key, value in values.items()])

    def end(self, error: type[BaseException] | None) -> None:
        if self._opened is not None:
            client, run_id = self._opened
            client.set_terminated(run_id, _status(error))


def _mlflow_run(
    uri: str,
    experiment: str,
    name: str,
    fingerprint: str,
    start_step: int,
    parameters: dict[str, Any],
) -> tuple[Any, str]:
    """A client, and the id of the run: the last one with this fingerprint, or a new one.

    A training that begins anew after it was finished (`--force`) is another run.
    """
    _prepare_environment(uri)
    import mlflow
    from ray.air.integrations.mlflow import setup_mlflow

    client = mlflow.MlflowClient(uri)
    known = client.get_experiment_by_name(experiment)
    runs = known and client.search_runs(
        [known.experiment_id], f"tags.`{RUN_TAG}` = '{fingerprint}'", max_results=1
    )
    if runs and (start_step > 0 or runs[0].info.status != "FINISHED"):
        client.update_run(runs[0].info.run_id, status="RUNNING")
        return client, runs[0].info.run_id
    try:
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
    finally:
        mlflow.end_run(status="RUNNING")  # no longer the process's only one, but not over
    return client, run.info.run_id


def _status(error: type[BaseException] | None) -> str:
    """MLflow's word for how a run ended; one that a scheduler stopped is not a failure."""
    if error is None:
        return "FINISHED"
    return "FAILED" if issubclass(error, Exception) else "KILLED"


def _prepare_environment(uri: str) -> None:
    """What MLflow reads from the environment; what the user has set stands."""
    # A server that is down should be told at once, not after minutes of attempts.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    # MLflow 3 keeps its folder store behind a switch; whoever names a folder has chosen it.
    if uri.startswith("file:"):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
