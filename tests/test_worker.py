"""One rank's loop, without Ray: what ends it for good."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rc_ray import worker
from rc_ray.checkpoint_store import CheckpointStore
from rc_ray.training_config import TrainConfig


def test_a_loss_that_is_not_finite_ends_the_curve_as_failed_and_asks_for_no_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    train = pytest.importorskip("ray.train")
    config = TrainConfig(num_steps=3, engine="torch")
    step: dict[str, Any] = {"num_titles": 1, "num_tokens": 5, "learning_rate": 0.1, "seconds": 1.0}
    learner = SimpleNamespace(
        steps=lambda: iter(
            [{"step": 0, "loss": 1.0, **step}, {"step": 1, "loss": torch.nan, **step}]
        ),
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        rows=[],
        note=None,
        dtype="float32",
        start_step=0,
        finished=False,
    )
    monkeypatch.setattr(worker, "_build", lambda *_: (learner, None))
    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(train, "get_context", lambda: context)
    uri = (tmp_path / "store").as_uri()
    found = worker.train_worker(
        {
            "train": config.model_dump(mode="json"),
            "storage": str(tmp_path / "checkpoints"),
            "run_name": "run",
            "run_dir": str(tmp_path / "shop"),
            "tracking": {"mlflow": uri},
            "curve": "spirit",
            "fingerprint": "f",
        }
    )
    assert found == {"error": "the loss is nan at step 1; lower `train.learning_rate` (0.001)"}
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("shop").experiment_id])
    assert run.info.status == "FAILED"
    assert run.data.metrics["loss"] == 1.0
    assert CheckpointStore(str(tmp_path / "checkpoints"), "run").newest() is None
