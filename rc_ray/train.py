"""Ray Train + DeepSpeed -> the base spirit: one LoRA over the histories of all spirit domains.

The workers meet the global batch of step n whatever their number, so neither the number of workers
nor the engine is part of what a finished spirit is known by. Ray is imported inside the functions,
after the session has set it up.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rc_ray import artifacts, recipes, tracking
from rc_ray.artifacts import RunFolder
from rc_ray.checkpoint_store import CheckpointStore
from rc_ray.checkpoints import check_model, model_shape, read_state
from rc_ray.config import Experiment
from rc_ray.curves import summary, write_metrics
from rc_ray.errors import ArtifactError, ConfigError, UserError
from rc_ray.progress import JsonlTail, Progress, polled
from rc_ray.session import require_resources
from rc_ray.training_config import TrainConfig


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
    for line in tracking.prepare(experiment.tracking, folder.root):
        console.note(line)
    model_dir = _checked_model(experiment, console)
    work = folder.root / ".spirit.work"
    name = wanted[:16]
    _clear(work, None if force else name)
    job = _Job(experiment, folder, model_dir, work, name, console)
    if force:
        job.store.forget(keep=None)
    start = time.monotonic()
    job.run()
    metrics = _finish(
        folder.spirit_dir,
        job.store,
        manifest={"config": shaping, "seed": experiment.seed, "inputs": inputs},
    )
    job.store.forget(keep=None)
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
                "`train.engine: deepspeed` needs the package deepspeed; run `pip install "
                "deepspeed`, or set `train.engine: torch` with one worker"
            )
    require_resources(
        "`train.num_workers` with `train.cpus_per_worker` and `train.gpus_per_worker`",
        cpus=config.cpus_per_worker,
        gpus=config.gpus_per_worker,
        count=config.min_workers or config.num_workers,
    )


def _checked_model(experiment: Experiment, console: Progress) -> Path:
    """The base model's folder, fetched here once; a LoRA that does not fit it is refused."""
    from rc_ray.assets import model_dir
    from rc_ray.core.loading import model_without_weights
    from rc_ray.core.trainable_lora import lora_targets

    folder = model_dir(experiment.model.path, console.note)
    try:
        lora_targets(model_without_weights(folder), experiment.train.lora)
    except ArtifactError:
        raise
    except ValueError as error:
        raise ConfigError(str(error).replace("`lora.", "`train.lora.")) from None
    return folder


def _clear(work: Path, kept_name: str | None) -> None:
    """Remove what runs with other settings, data or code left; they are never gone on with."""
    if work.exists():
        for path in work.iterdir():
            if kept_name is None or path.name.removesuffix(".jsonl") != kept_name:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    work.mkdir(parents=True, exist_ok=True)


@dataclass
class _Job:
    """The run on Ray Train, from its last checkpoint to its end through lost workers."""

    experiment: Experiment
    folder: RunFolder
    model_dir: Path
    work: Path
    name: str
    console: Progress

    def __post_init__(self) -> None:
        storage = self.experiment.train.checkpoint_storage
        self.storage = storage or str(self.work)
        # Others may keep their runs in the same place.
        self.run_name = f"{self.experiment.name}-{self.name}" if storage else self.name
        self.store = CheckpointStore(self.storage, self.run_name)

    def run(self) -> None:
        """Start Ray Train until the run ends, as long as every start brings a new checkpoint.

        Raises:
            ConfigError: the checkpoints cannot be stored there.
            ArtifactError: the checkpoint that is there is of another model.
            TrainingFailed: the workers failed too often, or found what no restart can mend.
        """
        config = self.experiment.train
        self.store.check_writable()
        done = self._look()
        if done > 0:
            self.console.note(f"going on from step {done}")
        while True:
            self.store.forget(keep=config.num_checkpoints_to_keep)
            try:
                problem = self._fit()
            except TrainingFailed:
                before, done = done, self._look()
                if done <= before:
                    raise
                self.console.note(f"the workers failed after step {done}; starting them again")
                continue
            if problem:
                raise TrainingFailed(f"train: {problem}")
            return

    def _look(self) -> int:
        """Steps that the newest checkpoint has done."""
        found = self.store.newest()
        if found is None:
            return 0
        for note in found.notes:
            self.console.note(note)
        if found.name is not None:
            check_model(
                found.state, self.experiment.model.path, model_shape(_model_config(self.model_dir))
            )
        return found.num_steps_done

    def _fit(self) -> str | None:
        """What the workers found wrong, if anything; TrainingFailed where they were lost."""
        from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
        from ray.train import TrainingFailedError as RayTrainingFailed
        from ray.train.torch import TorchConfig, TorchTrainer

        from rc_ray.worker import train_worker

        experiment, config = self.experiment, self.experiment.train
        use_gpu = config.gpus_per_worker > 0
        settings = {
            "train": config.model_dump(mode="json"),
            "seed": experiment.seed,
            "num_listed": experiment.data.num_negatives,
            "model": experiment.model.model_dump(mode="json"),
            "model_dir": str(self.model_dir),
            "domain_dirs": [str(self.folder.domain_dir(name)) for name in experiment.data.spirit],
            "tracking": experiment.tracking.model_dump(mode="json"),
            "run_dir": str(self.folder.root),
            "curve": "spirit",
            "fingerprint": self.name,
            "storage": self.storage,
            "run_name": self.run_name,
        }
        resources = {"CPU": config.cpus_per_worker}
        if use_gpu:
            resources["GPU"] = config.gpus_per_worker
        num_workers: int | tuple[int, int] = config.num_workers
        if config.min_workers is not None:
            num_workers = (config.min_workers, config.num_workers)
            # How long Ray waits for a lost worker's place before it goes on with fewer.
            os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
        metrics_path = self.work / f"{self.name}.jsonl"
        trainer = TorchTrainer(
            train_worker,
            train_loop_config=settings,
            scaling_config=ScalingConfig(
                num_workers=num_workers, use_gpu=use_gpu, resources_per_worker=resources
            ),
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            run_config=RunConfig(
                name=self.run_name,
                storage_path=self.storage,
                failure_config=FailureConfig(
                    max_failures=config.max_failures, controller_failure_limit=5
                ),
                checkpoint_config=CheckpointConfig(num_to_keep=config.num_checkpoints_to_keep),
                callbacks=[_metrics_writer(metrics_path)],
            ),
        )
        least = f"{config.min_workers} to " if config.min_workers else ""
        self.console.note(
            f"{least}{config.num_workers} worker(s), {config.engine}"
            + (f" ZeRO-{config.deepspeed.zero_stage}" if config.engine == "deepspeed" else "")
            + f", {config.num_steps} steps; starting takes about 20 s"
        )
        try:
            with _shown(metrics_path, config.num_steps, self.console):
                result = trainer.fit()
        except RayTrainingFailed as error:
            raise TrainingFailed(_explain(error, self.folder)) from error
        problem: str | None = (result.return_value or {}).get("error")
        return problem


def _model_config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True)


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

    def show(rows: list[dict[str, Any]]) -> None:
        steps = [row for row in rows if "step" in row]
        if steps:
            last = steps[-1]
            task.update(last["step"] + 1, loss=last["loss"], **{"tokens/s": last["tokens_per_s"]})

    def look() -> None:
        rows = tail.read_new()
        for row in rows:
            if "note" in row:
                console.note(row["note"])
        show(rows)

    show(tail.read_new())  # what was noted before the run stopped has been told
    with polled(look):
        yield


def _finish(target: Path, store: CheckpointStore, *, manifest: dict[str, Any]) -> dict[str, Any]:
    """Check the last checkpoint's adapter, or the best in it, and put it sealed in its place."""
    from rc_ray.core.adapters import check_adapter, save_adapter
    from rc_ray.engines import check_trained

    found = store.newest()
    if found is None or found.name is None:
        raise TrainingFailed(f"train: no checkpoint was written to {store.path}")
    with store.fetched(found.name) as folder:
        state = read_state(folder)
    adapter = state.best.adapter or state.adapter
    metrics = summary([dict(row) for row in state.rows])
    check_adapter(adapter, target)
    check_trained(adapter, target)
    with artifacts.replaced_dir(target) as work:
        save_adapter(work, adapter, state.base_name)
        write_metrics(work / "metrics.jsonl", [dict(row) for row in state.rows])
        artifacts.write_manifest(work, stage="train", metrics=metrics, **manifest)
    return metrics
