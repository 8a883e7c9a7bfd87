"""The base spirit on Ray Train: two workers, a killed one, and requests that cannot be met."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from rc_ray import artifacts, engines, train, worker, zero
from rc_ray.artifacts import RunFolder
from rc_ray.config import Experiment
from rc_ray.core.adapters import load_adapter
from rc_ray.core.domains import read_domain
from rc_ray.core.model import load_language_model
from rc_ray.errors import ConfigError
from rc_ray.progress import JsonlTail
from rc_ray.session import ray_session

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("ray_local")]

SETTINGS = (
    "train.num_workers=2",
    "train.deepspeed.zero_stage=3",
    "train.num_steps=30",
    "train.checkpoint_every=3",
    "train.lora.dropout=0.0",
)
original_worker = worker.train_worker
original_settings = zero.deepspeed_settings


def sharding_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """The real loop, with ZeRO-3 made to shard matrices as small as the tiny model's."""

    def sharded(*args: Any, **kwargs: Any) -> dict[str, Any]:
        made = original_settings(*args, **kwargs)
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return made

    zero.deepspeed_settings = sharded
    return original_worker(settings)


def run(experiment: Experiment, screen: Any, **options: Any) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "train_worker", sharding_worker)
        with ray_session(RunFolder(experiment.run_dir)):
            return train.run(experiment, console=screen.console, **options)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(ray_local: None, make_run) -> tuple[Experiment, Path]:
    from tests.conftest import Screen

    experiment = make_run(*SETTINGS)
    return experiment, run(experiment, Screen())


def test_two_workers_follow_the_curve_of_one_process(undisturbed) -> None:
    experiment, folder = undisturbed
    alone = engines.build_learner(
        load_language_model(experiment.model.path, torch.float32),
        [read_domain(experiment.run_dir / "data" / name) for name in experiment.data.spirit],
        experiment.train,
        seed=experiment.seed,
        num_listed=experiment.data.num_negatives,
        base_name="tiny",
    )
    expected = list(alone.steps())
    got = rows(folder)
    assert [row["step"] for row in got] == list(range(30))
    for field in ("loss", "learning_rate"):
        assert [row[field] for row in got] == pytest.approx(
            [row[field] for row in expected], abs=1e-4
        )
    # All of it, not one worker's share.
    assert [row["num_tokens"] for row in got] == [row["num_tokens"] for row in expected]
    adapter, wanted = load_adapter(folder), alone.adapter()
    assert adapter.modules.keys() == wanted.modules.keys()
    for name, pair in adapter.modules.items():
        torch.testing.assert_close(pair.a, wanted.modules[name].a, atol=2e-3, rtol=0)
        torch.testing.assert_close(pair.b, wanted.modules[name].b, atol=2e-3, rtol=0)


def test_a_finished_spirit_is_sealed_and_stands(undisturbed, screen) -> None:
    experiment, folder = undisturbed
    manifest = artifacts.read_json(folder / artifacts.MANIFEST)
    assert {"adapter_config.json", "adapter_model.safetensors", "metrics.jsonl"} <= set(
        manifest["outputs"]
    )
    assert manifest["metrics"]["num_steps"] == 30
    assert not (experiment.run_dir / ".spirit.work").exists()
    start = time.monotonic()
    other_number = experiment.model_copy(
        update={"train": experiment.train.model_copy(update={"num_workers": 1})}
    )
    assert run(other_number, screen) == folder
    assert "up to date" in screen.text
    assert time.monotonic() - start < 5


def test_a_run_with_a_killed_worker_ends_as_an_undisturbed_one(
    undisturbed, make_run, screen
) -> None:
    _, expected = undisturbed
    experiment = make_run(*SETTINGS)
    killed: list[int] = []

    def kill_one() -> None:
        tails: dict[Path, JsonlTail] = {}
        for _ in range(600):
            time.sleep(0.1)
            for path in (experiment.run_dir / ".spirit.work").glob("*.jsonl"):
                seen = tails.setdefault(path, JsonlTail(path)).read_new()
                if any(row.get("step", 0) >= 8 for row in seen):
                    victims = train_workers()
                    if victims:
                        killed.append(victims[-1].pid)
                        victims[-1].kill()
                    return

    thread = threading.Thread(target=kill_one)
    thread.start()
    folder = run(experiment, screen)
    thread.join()
    assert killed, "no worker was killed; the test has shown nothing"
    got, wanted = load_adapter(folder), load_adapter(expected)
    for name, pair in got.modules.items():
        torch.testing.assert_close(pair.a, wanted.modules[name].a, atol=1e-6, rtol=0)
        torch.testing.assert_close(pair.b, wanted.modules[name].b, atol=1e-6, rtol=0)
    assert [row["step"] for row in rows(folder)] == list(range(30))
    assert [row["loss"] for row in rows(folder)] == pytest.approx(
        [row["loss"] for row in rows(expected)], abs=1e-6
    )


def train_workers() -> list[psutil.Process]:
    """Ray Train's workers below this process, and no other Ray's."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("train.num_workers=64", "train.batch_size=64"), r"64 x \(1 CPU\).*the cluster has 4 CPU"),
        (("train.cpus_per_worker=9",), r"train.cpus_per_worker.*the cluster has 4 CPU"),
        (("train.gpus_per_worker=1",), r"train.gpus_per_worker.*0 GPU"),
        (("train.gpus_per_worker=2",), r"a worker uses one GPU"),
        (("train.gpus_per_worker=0.5", "train.num_workers=2"), r"NCCL"),
    ],
)
def test_what_cannot_be_had_is_refused_before_a_worker_starts(
    make_run, screen, overrides: tuple[str, ...], message: str
) -> None:
    experiment = make_run(*overrides)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=message) as error:
        run(experiment, screen)
    assert "\n" not in str(error.value)
    assert time.monotonic() - start < 3
    assert train_workers() == []


def test_a_setting_that_the_model_cannot_satisfy_ends_the_run_without_retries(
    make_run, screen
) -> None:
    experiment = make_run("train.lora.target_modules=[no_such_layer]", "train.max_failures=3")
    with pytest.raises(train.TrainingFailed, match="names no_such_layer; this model has"):
        run(experiment, screen)
    assert not (experiment.run_dir / "spirit").exists()
