"""A run goes on under other numbers of workers and ZeRO stages, to the same curve and adapter."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from rc_ray import zero
from rc_ray.checkpoints import read_state
from rc_ray.config import Experiment
from rc_ray.core.domains import read_domain
from rc_ray.core.loading import load_language_model
from rc_ray.engines import Learner, build_learner
from rc_ray.training_config import DeepSpeedConfig

pytestmark = pytest.mark.distributed


def make_learner(
    experiment: Experiment,
    deepspeed: DeepSpeedConfig | None,
    checkpoint: Path | None,
    rank: int = 0,
    world_size: int = 1,
) -> Learner:
    with zero.sharded_loading(
        deepspeed, experiment.train, dtype=torch.float32, world_size=world_size, use_gpu=False
    ):
        lm = load_language_model(experiment.model.path, torch.float32)
    return build_learner(
        lm,
        [read_domain(experiment.run_dir / "data" / name) for name in experiment.data.spirit],
        experiment.train,
        seed=experiment.seed,
        num_listed=experiment.data.num_negatives,
        base_name="tiny",
        deepspeed=deepspeed,
        rank=rank,
        world_size=world_size,
        checkpoint=checkpoint,
    )


def one_rank(
    rank: int,
    world_size: int,
    port: int,
    experiment: Experiment,
    deepspeed: DeepSpeedConfig,
    checkpoint: Path | None,
    target: Path,
    until: int,
) -> None:
    """Train up to a step and leave a checkpoint, its rows the losses over all ranks."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    original = zero.deepspeed_settings

    def settings(*args: object, **kwargs: object) -> dict[str, object]:
        made = original(*args, **kwargs)  # type: ignore[arg-type]
        # DeepSpeed keeps matrices below 100,000 elements whole: all of a tiny model.
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return made

    zero.deepspeed_settings = settings
    learner = make_learner(experiment, deepspeed, checkpoint, rank, world_size)
    if deepspeed.zero_stage == 3:
        frozen = [p for p in learner.module.parameters() if not p.requires_grad]
        # A share of every matrix, never the whole.
        assert all(p.numel() == 0 for p in frozen)
        assert all(p.ds_tensor.numel() == -(-p.ds_numel // world_size) for p in frozen)
    for metrics in learner.steps():
        loss = torch.tensor(metrics["loss"], dtype=torch.float64)
        torch.distributed.all_reduce(loss)
        row = {"step": metrics["step"], "loss": float(loss), "rate": metrics["learning_rate"]}
        learner.rows.append(row)
        if metrics["step"] + 1 == until:
            learner.save(target, until)
            break
    torch.distributed.destroy_process_group()


def train_on(world_size: int, *arguments: object) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(one_rank, (world_size, port, *arguments), nprocs=world_size)


def test_three_workers_then_two_then_one_are_one_run(make_run, tmp_path: Path) -> None:
    # Uneven shares of 5; clipped, decayed and scheduled, so that every part of the state counts.
    experiment = make_run(
        "train.batch_size=5",
        "train.num_workers=3",
        "train.min_workers=1",
        "train.learning_rate=0.01",
        "train.max_grad_norm=1.6",
        "train.weight_decay=0.1",
    )
    plain = make_learner(experiment, None, None)
    expected = list(plain.steps())
    first, second = tmp_path / "first", tmp_path / "second"
    train_on(3, experiment, DeepSpeedConfig(zero_stage=3), None, first, 2)
    train_on(2, experiment, DeepSpeedConfig(zero_stage=2, offload="cpu"), first, second, 4)
    rows = list(read_state(second).rows)
    resumed = make_learner(experiment, None, second)
    rows += [
        {"step": row["step"], "loss": row["loss"], "rate": row["learning_rate"]}
        for row in resumed.steps()
    ]
    assert [row["step"] for row in rows] == list(range(6))
    assert [row["rate"] for row in rows] == [row["learning_rate"] for row in expected]
    assert [row["loss"] for row in rows] == pytest.approx(
        [row["loss"] for row in expected], abs=5e-5
    )
    got, wanted = resumed.adapter(), plain.adapter()
    for name, pair in wanted.modules.items():
        torch.testing.assert_close(got.modules[name].a, pair.a, atol=5e-5, rtol=0)
        torch.testing.assert_close(got.modules[name].b, pair.b, atol=5e-5, rtol=0)
