"""One rank of a Ray Train run: load, agree with the other ranks, train, report."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from rc_ray.checkpoint_store import CheckpointStore, Found
from rc_ray.core.domains import read_domain
from rc_ray.core.loading import choose_dtype, load_language_model
from rc_ray.engines import (
    Learner,
    build_learner,
    local_model_dir,
    prepare_process,
    read_share,
    sum_over_ranks,
)
from rc_ray.errors import ArtifactError, UserError
from rc_ray.precision import dtypes_in, joined, mixed_precision
from rc_ray.tracking import Log, TrackingConfig, tracked
from rc_ray.training_config import TrainConfig
from rc_ray.zero import sharded_loading

_REPORT_EVERY_S = 1.0


class Diverged(UserError):
    """The loss is not finite, which no restart mends."""


def train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """The training loop of one rank; what it returns under `error` ends the run without a retry."""
    import ray.train

    context = ray.train.get_context()
    config = TrainConfig.model_validate(settings["train"])
    prepare_process(config.cpus_per_worker)
    device = torch.device("cpu")
    if config.gpus_per_worker > 0:
        from ray.train.torch import get_device

        device = get_device()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    store = CheckpointStore(settings["storage"], settings["run_name"])
    store.clear_scratch()
    # Not Ray's own record: the newest that is whole, whether or not Ray got to hear of it.
    found: Found | None = _from_first(store.newest() if rank == 0 else None, world_size)
    with ExitStack() as stack:
        name = found.name if found else None
        folder = stack.enter_context(store.fetched(name)) if name else None
        learner, problem = _build(settings, config, device, rank, world_size, folder)
    if learner is None:
        return {"error": problem}
    notes = [*(found.notes if found else ()), *([learner.note] if learner.note else [])]
    told = mixed_precision(settings["curve"], joined(dtypes_in(learner.rows), [learner.dtype]))
    notes += [told] if told else []
    # One process logs; the others' losses are summed into its own.
    on = TrackingConfig.model_validate(settings["tracking"]) if rank == 0 else TrackingConfig()
    try:
        with tracked(
            on,
            Path(settings["run_dir"]),
            name=settings["curve"],
            fingerprint=settings["fingerprint"],
            start_step=learner.start_step,
            parameters=settings["train"],
        ) as curve:
            _train(learner, config, store, notes, curve)
    except Diverged as error:
        return {"error": str(error)}
    return {}


def _build(
    settings: dict[str, Any],
    config: TrainConfig,
    device: torch.device,
    rank: int,
    world_size: int,
    checkpoint: Path | None,
) -> tuple[Learner | None, str | None]:
    """The learner, or what is wrong; every rank gets the same kind of answer."""
    deepspeed = config.deepspeed if config.engine == "deepspeed" else None
    problem = None
    try:
        precision = _from_first(choose_dtype(settings["model"]["dtype"], device), world_size)
        model_dir = local_model_dir(settings["model_dir"], settings["model"]["path"])
        domains = [read_domain(Path(path)) for path in settings["domain_dirs"]]
    except UserError as error:
        problem = str(error)
    # A rank that left alone would keep the others waiting for it.
    problem = _first_problem(problem, world_size)
    if problem is not None:
        return None, problem
    # Under ZeRO-3 the ranks load together: one that fails ends the attempt for all.
    with sharded_loading(
        deepspeed, config, dtype=precision, world_size=world_size, use_gpu=device.type == "cuda"
    ):
        lm = load_language_model(model_dir, precision, device)
    try:
        learner = build_learner(
            lm,
            domains,
            config,
            seed=settings["seed"],
            num_listed=settings["num_listed"],
            base_name=settings["model"]["path"],
            deepspeed=deepspeed,
            rank=rank,
            world_size=world_size,
            checkpoint=checkpoint,
            own_share=read_share(settings.get("own_share")),
        )
    except ArtifactError:
        raise  # what one rank cannot read, it may read after a restart
    except ValueError as error:
        return None, str(error)  # settings that no model or data could satisfy, on every rank
    return learner, None


def _train(
    learner: Learner, config: TrainConfig, store: CheckpointStore, notes: list[str], curve: Log
) -> None:
    """Run the remaining steps; every rank raises alike.

    Raises:
        Diverged: a loss is not finite.
    """
    rows: list[dict[str, Any]] = [{"note": note} for note in notes]
    last_report = time.monotonic()
    for metrics in learner.steps():
        step = metrics["step"]
        due = learner.rank == 0 and time.monotonic() - last_report > _REPORT_EVERY_S
        loss, num_titles, num_tokens, num_due = sum_over_ranks(
            [metrics["loss"], metrics["num_titles"], metrics["num_tokens"], float(due)],
            learner.world_size,
            learner.device,
        )
        if not math.isfinite(loss):
            raise Diverged(
                f"the loss is {loss} at step {step}; lower `train.learning_rate` "
                f"({config.learning_rate:g})"
            )
        valid_loss = metrics.get("valid_loss")
        row = {
            "step": step,
            "loss": loss,
            "tokens_per_s": num_tokens / metrics["seconds"],
            "learning_rate": metrics["learning_rate"],
            "num_titles": int(num_titles),
            "num_tokens": int(num_tokens),
            "seconds": metrics["seconds"],
            "dtype": learner.dtype,
            **({} if valid_loss is None else {"valid_loss": valid_loss}),
        }
        curve(row)
        rows.append(row)
        learner.rows.append(row)
        num_done = step + 1
        if num_done % config.checkpoint_every == 0 or learner.finished:
            _report(rows, _saved(learner, store, num_done))
        elif num_due:  # on every rank alike, as reports must be
            _report(rows, None)
        else:
            continue
        rows, last_report = [], time.monotonic()


def _saved(learner: Learner, store: CheckpointStore, num_done: int) -> Path | None:
    """A folder with a checkpoint, on rank 0; every rank must call."""
    folder = store.scratch_dir() if learner.rank == 0 else None
    learner.save(folder, num_done)
    return folder


def _report(rows: list[dict[str, Any]], folder: Path | None) -> None:
    """Hand over to Ray, which uploads the folder beside the training and then removes it."""
    from ray.train import Checkpoint, CheckpointUploadMode, report

    report(
        {"rows": rows},
        checkpoint=Checkpoint.from_directory(folder) if folder else None,
        # For reports without one too: they would wait for the uploads before them.
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
    )


def _first_problem(problem: str | None, world_size: int) -> str | None:
    """The first rank's problem, on every rank."""
    if world_size == 1:
        return problem
    problems: list[str | None] = [None] * world_size
    torch.distributed.all_gather_object(problems, problem)
    return next((text for text in problems if text is not None), None)


def _from_first(value: Any, world_size: int) -> Any:
    """Rank 0's value, on every rank."""
    if world_size == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
