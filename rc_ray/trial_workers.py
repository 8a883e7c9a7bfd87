"""A trial on several workers: Ray Train inside a Ray Tune trial, then one task that validates.

The trial's own process takes no CPU and loads nothing: it waits. So trials that wait for workers
cannot keep those workers from starting.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rc_ray.checkpoint_store import CheckpointStore
from rc_ray.checkpoints import read_state
from rc_ray.core.adapters import load_adapter, save_adapter
from rc_ray.curves import write_metrics
from rc_ray.errors import UserError
from rc_ray.tracking import curve_name
from rc_ray.training_config import TrainConfig, TrainingConfig
from rc_ray.trial import WORKERS, train_ingredient

_MAX_FAILURES = 2
_NUM_TO_KEEP = 2


def train_on_workers(trial: dict[str, Any]) -> dict[str, Any]:
    """Train with Ray Train and DeepSpeed, then validate and seal in a task of one worker's size.

    Args:
        trial: the trial's order.

    Returns:
        The manifest's metrics.

    Raises:
        UserError: the run ended without an adapter; the message says why.
    """
    import ray

    folder = Path(trial["folder"])
    if not (folder / "manifest.json").exists():
        _train(trial, folder)
    task = ray.remote(_validate).options(**_task_resources(trial))
    metrics: dict[str, Any] = ray.get(task.remote(trial))
    return metrics


def _validate(trial: dict[str, Any]) -> dict[str, Any]:
    adapter = load_adapter(Path(trial["folder"]) / "adapter", trial["model"]["path"])
    return train_ingredient(trial, adapter=adapter)


def _task_resources(trial: dict[str, Any]) -> dict[str, Any]:
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return {
        # Outside the trial's own placement group, which holds no CPU.
        "scheduling_strategy": PlacementGroupSchedulingStrategy(placement_group=None),
        "num_cpus": trial["num_cpus"],
        "num_gpus": trial["num_gpus"],
        "memory": trial["memory"],
    }


def _train(trial: dict[str, Any], folder: Path) -> None:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train import TrainingFailedError as RayTrainingFailed
    from ray.train.torch import TorchConfig, TorchTrainer

    from rc_ray.worker import train_worker

    setting = TrainingConfig.model_validate(trial["setting"])
    config = TrainConfig(
        **setting.model_dump(),
        num_workers=trial["num_workers"],
        cpus_per_worker=trial["num_cpus"],
        gpus_per_worker=trial["num_gpus"],
        deepspeed=trial["deepspeed"],
        checkpoint_every=trial["checkpoint_every"],
    )
    resources = {"CPU": trial["num_cpus"], "memory": trial["memory"]}
    if trial["use_gpu"]:
        resources["GPU"] = trial["num_gpus"]
    storage, run_name = str(folder / WORKERS), trial["training_fingerprint"][:16]
    store = CheckpointStore(storage, run_name)
    store.check_writable()
    # Ray would refuse to start from the half of its own record that a killed process left.
    store.forget(keep=_NUM_TO_KEEP)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "train": config.model_dump(mode="json"),
            "seed": trial["seed"],
            "num_listed": trial["num_listed"],
            "model": trial["model"],
            "model_dir": trial["model_dir"],
            "domain_dirs": [trial["domain_dir"], *trial.get("pooled_dirs", ())],
            "own_share": trial.get("own_share"),
            "tracking": trial["tracking"],
            "run_dir": trial["run_dir"],
            "curve": curve_name(trial),
            "fingerprint": trial["training_fingerprint"],
            "storage": storage,
            "run_name": run_name,
        },
        scaling_config=ScalingConfig(
            num_workers=trial["num_workers"],
            use_gpu=trial["use_gpu"],
            resources_per_worker=resources,
        ),
        torch_config=TorchConfig(backend="nccl" if trial["use_gpu"] else "gloo"),
        run_config=RunConfig(
            name=run_name,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=_MAX_FAILURES, controller_failure_limit=5),
            checkpoint_config=CheckpointConfig(num_to_keep=_NUM_TO_KEEP),
            callbacks=[_reporter(folder / "metrics.jsonl")],
        ),
    )
    try:
        result = trainer.fit()
    except RayTrainingFailed as error:
        failures = getattr(error, "worker_failures", None) or {}
        cause = next(iter(failures.values()), error)
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        raise UserError(f"its workers failed: {lines[-1].strip()}") from error
    problem = (result.return_value or {}).get("error")
    if problem:
        raise UserError(problem.replace("`train.", "`tune."))
    found = store.newest()
    if found is None or found.name is None:
        raise UserError("its workers wrote no checkpoint")
    with store.fetched(found.name) as checkpoint:
        state = read_state(checkpoint)
    save_adapter(folder / "adapter", state.best.adapter or state.adapter, trial["model"]["path"])
    write_metrics(folder / "metrics.jsonl", [dict(row) for row in state.rows])


def _reporter(path: Path) -> Any:
    """A callback that appends rank 0's rows to the loss curve and tells Tune of validations."""
    from ray.tune.integration.ray_train import TuneReportCallback

    class Reporter(TuneReportCallback):  # type: ignore[misc]
        def after_report(
            self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
        ) -> None:
            rows = metrics[0]["rows"]
            with path.open("a", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps(row) + "\n")
            for row in rows:
                if row.get("valid_loss") is not None:
                    told = {"num_steps_done": row["step"] + 1, "valid_loss": row["valid_loss"]}
                    super().after_report(run_context, [told], None)

    return Reporter()
