"""Two raylets: one is taken away in the middle of a run, which ends with the right adapter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from rc_ray.artifacts import MANIFEST, read_json
from rc_ray.core.adapters import load_adapter
from rc_ray.core.domains import read_domain
from rc_ray.core.loading import load_language_model
from rc_ray.engines import build_learner

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize("kind", ["elastic", "fixed"])
def test_a_run_outlives_the_loss_of_a_node(make_run, kind: str) -> None:
    # It goes on with one worker.
    experiment = make_run(
        "train.num_steps=200",
        "train.batch_size=5" if kind == "elastic" else "train.batch_size=4",
    )
    path = experiment.run_dir / "experiment.yaml"
    path.write_text(yaml.safe_dump(experiment.model_dump(mode="json")))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    }
    environment.pop("RAY_ADDRESS", None)
    data_dir = experiment.run_dir / "data"
    command = [sys.executable, "-m", "tests.distributed.two_nodes", str(path)]
    done = subprocess.run(
        [*command, str(data_dir), kind],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "removed a node" in done.stdout
    folder = experiment.run_dir / kind / "tiny" / "spirit"
    assert read_json(folder / MANIFEST)["metrics"]["num_steps"] == 200
    alone = build_learner(
        load_language_model(experiment.model.path, torch.float32),
        [read_domain(data_dir / name) for name in experiment.data.spirit],
        experiment.train,
        seed=experiment.seed,
        num_listed=experiment.data.num_negatives,
        base_name="tiny",
    )
    list(alone.steps())
    got, wanted = load_adapter(folder), alone.adapter()
    for name, pair in wanted.modules.items():
        update, expected = (x.b @ x.a * x.scale for x in (got.modules[name], pair))
        assert (update - expected).norm() < 0.02 * expected.norm()
