"""A driver that is killed and started again goes on from the last checkpoint, to the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from rc_ray.core.adapters import load_adapter
from rc_ray.core.domains import read_domain
from rc_ray.core.loading import load_language_model
from rc_ray.engines import build_learner

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def wait_for_checkpoint(driver: subprocess.Popen[str], work: Path) -> None:
    """Until the driver's workers have uploaded two checkpoints."""
    for _ in range(3000):
        assert driver.poll() is None, driver.communicate()
        if len(list(work.glob("*/checkpoint_*/state.json"))) >= 2:
            return
        time.sleep(0.1)
    raise AssertionError("no checkpoint was written")


def test_a_killed_driver_goes_on_where_it_was(make_run) -> None:
    experiment = make_run(
        "train.engine=torch",
        "train.num_steps=400",
        "train.checkpoint_every=20",
        "train.learning_rate=0.01",
        "train.lora.dropout=0.1",
    )
    path = experiment.run_dir / "experiment.yaml"
    path.write_text(yaml.safe_dump(experiment.model_dump(mode="json")))
    command = [sys.executable, "-m", "rc_ray.cli", "train", str(path)]
    environment = {**os.environ, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    environment.pop("RAY_ADDRESS", None)

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    driver = start()
    wait_for_checkpoint(driver, experiment.run_dir / ".spirit.work")
    below = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    # Ray ends its processes when the driver is gone; what still trains must not go on writing.
    psutil.wait_procs(below, timeout=60)
    spirit_dir = experiment.run_dir / "spirit"
    assert not spirit_dir.exists()

    driver = start()
    output, _ = driver.communicate(timeout=500)
    assert driver.returncode == 0, output
    assert "going on from step" in output
    alone = build_learner(
        load_language_model(experiment.model.path, torch.float32),
        [read_domain(experiment.run_dir / "data" / name) for name in experiment.data.spirit],
        experiment.train,
        seed=experiment.seed,
        num_listed=experiment.data.num_negatives,
        base_name="tiny",
    )
    losses = [metrics["loss"] for metrics in alone.steps()]
    assert len(losses) == 400
    got, wanted = load_adapter(spirit_dir), alone.adapter()
    for name, pair in wanted.modules.items():
        assert torch.equal(got.modules[name].a, pair.a)
        assert torch.equal(got.modules[name].b, pair.b)
