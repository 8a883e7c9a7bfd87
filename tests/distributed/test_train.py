"""The base spirit on Ray Train: two workers, a killed one, and requests that cannot be met."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from rc_ray import artifacts, engines, recipes, train, worker, zero
from rc_ray.artifacts import RunFolder
from rc_ray.checkpoint_store import CheckpointStore
from rc_ray.checkpoints import TrainingState, model_shape, write_state
from rc_ray.config import Experiment
from rc_ray.core.adapters import Adapter, LoraPair, load_adapter
from rc_ray.core.domains import read_domain
from rc_ray.core.loading import load_language_model
from rc_ray.core.training import StepMetrics
from rc_ray.core.validation import BestSoFar
from rc_ray.errors import ArtifactError, ConfigError
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


def run(
    experiment: Experiment, screen: Any, *, loop: Any = sharding_worker, **options: Any
) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "train_worker", loop)
        with ray_session(RunFolder(experiment.run_dir)):
            return train.run(experiment, console=screen.console, **options)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def store_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return (tmp_path_factory.mktemp("tracking") / "store").as_uri()


@pytest.fixture(scope="module")
def undisturbed(ray_local: None, make_run, store_uri: str) -> tuple[Experiment, Path]:
    from tests.conftest import Screen

    experiment = make_run(*SETTINGS, f"tracking.mlflow={store_uri}")
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


def test_one_worker_logs_the_sum_over_all(undisturbed, store_uri: str) -> None:
    mlflow = pytest.importorskip("mlflow")
    _, folder = undisturbed
    client = mlflow.MlflowClient(store_uri)
    (run_of_spirit,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert run_of_spirit.info.status == "FINISHED"
    logged = client.get_metric_history(run_of_spirit.info.run_id, "loss")
    assert [(one.step, one.value) for one in logged] == [
        (row["step"], row["loss"]) for row in rows(folder)
    ]


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


def mortal_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """The real loop, in a process that ends by SIGKILL where the run's `kills.json` says so."""
    folder = Path(settings["domain_dirs"][0]).parents[1]
    kills = json.loads((folder / "kills.json").read_text())
    original_steps = engines.Learner.steps

    def steps(self: engines.Learner) -> Iterator[StepMetrics]:
        for metrics in original_steps(self):
            mark = folder / f"killed-{metrics['step']}-{self.rank}"
            if [metrics["step"], self.rank] in kills and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield metrics

    engines.Learner.steps = steps
    return sharding_worker(settings)


def assert_ends_as(folder: Path, expected: Path) -> None:
    got, wanted = load_adapter(folder), load_adapter(expected)
    assert got.modules.keys() == wanted.modules.keys()
    for name, pair in got.modules.items():
        assert torch.equal(pair.a, wanted.modules[name].a)
        assert torch.equal(pair.b, wanted.modules[name].b)
    fields = ("step", "loss", "learning_rate", "num_titles", "num_tokens")
    assert [[row[field] for field in fields] for row in rows(folder)] == [
        [row[field] for field in fields] for row in rows(expected)
    ]


def run_with_kills(experiment: Experiment, screen: Any, kills: list[tuple[int, int]]) -> Path:
    (experiment.run_dir / "kills.json").write_text(json.dumps(kills))
    folder = run(experiment, screen, loop=mortal_worker)
    marks = {path.name for path in experiment.run_dir.glob("killed-*")}
    assert marks == {f"killed-{step}-{rank}" for step, rank in kills}
    return folder


def test_a_run_with_a_killed_worker_ends_bit_for_bit_as_an_undisturbed_one(
    undisturbed, make_run, screen
) -> None:
    # Rank 0 dies a step after it has handed over a checkpoint, in the middle of its upload or not.
    folder = run_with_kills(make_run(*SETTINGS), screen, [(9, 0)])
    assert_ends_as(folder, undisturbed[1])


@pytest.mark.slow
def test_ten_kills_at_random_steps_change_not_a_bit(undisturbed, make_run, screen) -> None:
    rng = random.Random(11)
    kills = [(step, rng.randrange(2)) for step in sorted(rng.sample(range(30), 10))]
    folder = run_with_kills(make_run(*SETTINGS), screen, kills)
    assert_ends_as(folder, undisturbed[1])
    # `max_failures` is 3: what counts is failing without getting on.
    assert "starting them again" in screen.text


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


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("train.lora.target_modules=[no_such_layer]",),
            r"`train.lora.target_modules` names no_such_layer; this model has down_proj, ",
        ),
        (("train.lora.first_layer=2",), r"`train.lora.first_layer` 2 leaves nothing to adapt"),
        (("train.checkpoint_storage=floppy://x",), r"`train.checkpoint_storage`: floppy://x"),
    ],
)
def test_what_the_model_or_the_storage_cannot_satisfy_is_refused_before_a_worker_starts(
    make_run, screen, overrides: tuple[str, ...], message: str
) -> None:
    experiment = make_run(*overrides)
    with pytest.raises(ConfigError, match=message) as error:
        run(experiment, screen)
    assert "\n" not in str(error.value)
    assert train_workers() == []
    assert not (experiment.run_dir / "spirit").exists()


def test_a_checkpoint_of_another_model_is_refused_before_a_worker_starts(make_run, screen) -> None:
    # The folder that `model.path` names holds another model than when the run was stopped.
    experiment = make_run()
    storage = experiment.run_dir / "storage"
    experiment = make_run(f"train.checkpoint_storage={storage}")
    known = recipes.spirit(experiment)
    inputs = known.inputs(RunFolder(experiment.run_dir))
    name = artifacts.fingerprint(config=known.config, seed=experiment.seed, inputs=inputs)[:16]
    model = load_language_model(experiment.model.path, torch.float32).model
    pair = LoraPair(a=torch.ones(1, 32), b=torch.ones(32, 1), scale=1.0)
    write_state(
        storage / f"tiny-{name}" / "checkpoint_1",
        TrainingState(
            num_steps_done=2,
            base_name=experiment.model.path,
            base_shape={**model_shape(model.config), "num_hidden_layers": 12},
            adapter=Adapter({"layer": pair}),
            moments={"layer.lora_A.exp_avg": torch.ones(1, 32)},
            best=BestSoFar(),
        ),
    )
    with pytest.raises(ArtifactError, match="another model: with num_hidden_layers 12, .* has 2"):
        run(experiment, screen)
    assert train_workers() == []


def test_checkpoints_may_lie_in_a_storage_of_their_own(make_run, screen, tmp_path: Path) -> None:
    storage = tmp_path / "bucket"
    experiment = make_run(
        "train.engine=torch",
        f"train.checkpoint_storage=file://{storage}",
        "train.valid_every=3",
        "train.learning_rate=0.01",
    )
    seen: list[str] = []
    forget = CheckpointStore.forget

    def watched(self: CheckpointStore, keep: int | None) -> None:
        found = self.newest()
        seen.append(f"{self.path} {found.num_steps_done if found else 0}")
        forget(self, keep)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointStore, "forget", watched)
        folder = run(experiment, screen)
    # Six steps lay there when the spirit was sealed, and nothing is left behind.
    assert seen[-1].startswith(f"{storage}/tiny-")
    assert seen[-1].endswith(" 6")
    assert [path for path in storage.rglob("*") if path.is_file()] == []
    metrics = artifacts.read_json(folder / artifacts.MANIFEST)["metrics"]
    validated = {row["step"]: row["valid_loss"] for row in rows(folder) if "valid_loss" in row}
    assert sorted(validated) == [2, 5]
    assert metrics["best_valid_loss"] == min(validated.values())
