"""Ray Train + DeepSpeed -> the base spirit: one LoRA over the histories of all spirit domains.

The workers meet the global batch of step n whatever their number, so neither the number of workers
nor the engine is part of what a finished spirit is known by. Ray is imported inside the functions,
after the session has set it up.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rc_ray import artifacts, recipes
from rc_ray.artifacts import RunFolder
from rc_ray.config import Experiment
from rc_ray.curves import read_metrics, summary, write_metrics
from rc_ray.errors import ConfigError, UserError
from rc_ray.progress import JsonlTail, Progress, polled
from rc_ray.session import require_resources
from rc_ray.training_config import TrainConfig

if TYPE_CHECKING:
    from ray.train import Checkpoint


class TrainingFailed(UserError):
    """The run ended without an adapter; the message says why."""


def run(experiment: Experiment, *, force: bool = False, console: Progress) -> Path:
    """Train the base spirit; a stopped run goes on from its last checkpoint.

    Call inside `ray_session`.

    Args:
        experiment: the whole experiment.
        force: train anew although a finished spirit, or a part of one, is there.
        console: shows progress.

    Returns:
        The spirit's folder, a PEFT LoRA with `metrics.jsonl` and a manifest.

    Raises:
        ConfigError: the cluster or DeepSpeed cannot do what is asked.
        ArtifactError: the prepared data are missing.
        TrainingFailed: the workers failed more often than `train.max_failures`.
    """
    folder = RunFolder(experiment.run_dir.absolute())
    recipe = recipes.spirit(experiment)
    shaping, inputs = recipe.config, recipe.inputs(folder)
    wanted = artifacts.fingerprint(config=shaping, seed=experiment.seed, inputs=inputs)
    console.stage("train: the base spirit")
    if not force and artifacts.is_finished(folder.spirit_dir, wanted):
        console.note(f"{folder.spirit_dir} is up to date")
        return folder.spirit_dir
    check_request(experiment.train)
    work = folder.root / ".spirit.work"
    name = wanted[:16]
    _clear(work, None if force else name)
    metrics_path = work / f"{name}.jsonl"
    start = time.monotonic()
    checkpoint = _fit(experiment, folder, work, name, metrics_path, console)
    metrics = _finish(
        folder.spirit_dir,
        checkpoint,
        metrics_path,
        manifest={"config": shaping, "seed": experiment.seed, "inputs": inputs},
    )
    shutil.rmtree(work, ignore_errors=True)
    best = (
        f", best validation loss {metrics['best_valid_loss']:.3f} after {metrics['best_num_steps']}"
        if "best_valid_loss" in metrics
        else ""
    )
    console.note(
        f"spirit: loss {metrics['final_loss']:.3f} after {metrics['num_steps']} steps{best}, "
        f"{time.monotonic() - start:.0f} s, in {folder.spirit_dir}"
    )
    return folder.spirit_dir


def check_request(config: TrainConfig) -> None:
    """Refuse what no worker could do, before one starts.

    Raises:
        ConfigError: with the field and the fix.
    """
    if config.gpus_per_worker > 1:
        raise ConfigError(
            f"`train.gpus_per_worker` is {config.gpus_per_worker:g}, a worker uses one GPU; set it "
            "to 1 and raise `train.num_workers`"
        )
    if config.num_workers > 1 and 0 < config.gpus_per_worker < 1:
        raise ConfigError(
            f"`train.gpus_per_worker` is {config.gpus_per_worker:g}: NCCL does not let several "
            "workers share a GPU; set it to 1, or `train.num_workers` to 1"
        )
    if config.engine == "deepspeed":
        from importlib.util import find_spec

        if find_spec("deepspeed") is None:
            raise ConfigError(
                "`train.engine: deepspeed` needs the package deepspeed; install `rc-ray[ray]`, or "
                "set `train.engine: torch` with one worker"
            )
    require_resources(
        "`train.num_workers` with `train.cpus_per_worker` and `train.gpus_per_worker`",
        cpus=config.cpus_per_worker,
        gpus=config.gpus_per_worker,
        count=config.num_workers,
    )


def _clear(work: Path, kept_name: str | None) -> None:
    """Remove what runs with other settings, data or code left; they are never gone on with."""
    if work.exists():
        for path in work.iterdir():
            if kept_name is None or path.name.removesuffix(".jsonl") != kept_name:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    work.mkdir(parents=True, exist_ok=True)


def _fit(
    experiment: Experiment,
    folder: RunFolder,
    work: Path,
    name: str,
    metrics_path: Path,
    console: Progress,
) -> Checkpoint:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train import TrainingFailedError as RayTrainingFailed
    from ray.train.torch import TorchConfig, TorchTrainer

    from rc_ray.assets import model_dir
    from rc_ray.worker import train_worker

    config = experiment.train
    use_gpu = config.gpus_per_worker > 0
    settings = {
        "train": config.model_dump(mode="json"),
        "seed": experiment.seed,
        "num_listed": experiment.data.num_negatives,
        "model": experiment.model.model_dump(mode="json"),
        # Fetched here once rather than by every worker, and a wrong path fails before they start.
        "model_dir": str(model_dir(experiment.model.path, console.note)),
        "domain_dirs": [str(folder.domain_dir(name)) for name in experiment.data.spirit],
    }
    resources = {"CPU": config.cpus_per_worker}
    if use_gpu:
        resources["GPU"] = config.gpus_per_worker
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=config.num_workers, use_gpu=use_gpu, resources_per_worker=resources
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        run_config=RunConfig(
            name=name,
            storage_path=str(work),
            failure_config=FailureConfig(
                max_failures=config.max_failures, controller_failure_limit=5
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=config.num_checkpoints_to_keep),
            callbacks=[_metrics_writer(metrics_path)],
        ),
    )
    console.note(
        f"{config.num_workers} worker(s), {config.engine}"
        + (f" ZeRO-{config.deepspeed.zero_stage}" if config.engine == "deepspeed" else "")
        + f", {config.num_steps} steps; starting takes about 20 s"
    )
    try:
        with _shown(metrics_path, config.num_steps, console):
            result = trainer.fit()
    except RayTrainingFailed as error:
        raise TrainingFailed(_explain(error, folder)) from error
    problem = (result.return_value or {}).get("error")
    if problem:
        raise TrainingFailed(f"train: {problem}")
    if result.checkpoint is None:
        raise TrainingFailed(f"train: no checkpoint was written; see {folder.logs_dir}")
    return result.checkpoint


def _explain(error: BaseException, folder: RunFolder) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    cause = next(iter(failures.values()), error)
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    ranks = f" on worker {', '.join(map(str, sorted(failures)))}" if failures else ""
    return (
        f"train: failed{ranks}: {lines[-1].strip() if lines else type(cause).__name__}; "
        f"the workers' logs are in {folder.logs_dir}"
    )


def _metrics_writer(path: Path) -> Any:
    """A callback that appends what rank 0 reports to a JSON-lines file, from Ray's controller.

    Ray keeps the metrics of checkpoints only, hence a file of our own.
    """
    from ray.train import UserCallback

    class MetricsWriter(UserCallback):  # type: ignore[misc]
        def after_report(
            self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
        ) -> None:
            with path.open("a", encoding="utf-8") as file:
                for row in metrics[0]["rows"]:
                    file.write(json.dumps(row) + "\n")

    return MetricsWriter()


@contextmanager
def _shown(metrics_path: Path, num_steps: int, console: Progress) -> Iterator[None]:
    """Show the rows of the metrics file while the block runs."""
    tail = JsonlTail(metrics_path)
    task = console.task("base spirit", num_steps)

    def look() -> None:
        rows = tail.read_new()
        for row in rows:
            if "note" in row:
                console.note(row["note"])
        steps = [row for row in rows if "step" in row]
        if steps:
            last = steps[-1]
            task.update(last["step"] + 1, loss=last["loss"], **{"tokens/s": last["tokens_per_s"]})

    with polled(look):
        yield


def _finish(
    target: Path, checkpoint: Checkpoint, metrics_path: Path, *, manifest: dict[str, Any]
) -> dict[str, Any]:
    """Check the last checkpoint's adapter, or the best in it, and put it sealed in its place."""
    from rc_ray.core.adapters import check_adapter, load_adapter
    from rc_ray.engines import check_trained

    rows = read_metrics(metrics_path)
    metrics = summary(rows)
    with artifacts.replaced_dir(target) as work:
        with checkpoint.as_directory() as folder:
            best = Path(folder) / "best"
            shutil.copytree(
                best if best.is_dir() else Path(folder) / "adapter", work, dirs_exist_ok=True
            )
        adapter = load_adapter(work)
        check_adapter(adapter, target)
        check_trained(adapter, target)
        write_metrics(work / "metrics.jsonl", rows)
        artifacts.write_manifest(work, stage="train", metrics=metrics, **manifest)
    return metrics
