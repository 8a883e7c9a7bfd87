"""A trial and the choice among trials, in this process: no Ray is needed to show them."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rc_ray import artifacts, mixing, trial_workers, tune
from rc_ray import trial as trials
from rc_ray.artifacts import RunFolder
from rc_ray.config import Experiment
from rc_ray.core.adapters import load_adapter, save_adapter
from rc_ray.engines import Learner
from rc_ray.errors import UserError
from rc_ray.freed_memory import give_memory_back
from rc_ray.merge import make_order
from rc_ray.sweep_choice import choose_trial
from rc_ray.sweep_plan import ERROR
from rc_ray.trial_process import write_error
from tests.conftest import Factory, Screen
from tests.core.test_model import random_adapter

SETTINGS = ("tune.num_steps=2", "tune.num_valid_users=3", "tune.checkpoint_every=1")


def plan(experiment: Experiment) -> list[tune.Trial]:
    folder = RunFolder(experiment.run_dir)
    return tune.plan_trials(experiment, folder, "tools", experiment.run_dir / "work")


def train(experiment: Experiment, trial: tune.Trial) -> dict[str, Any]:
    folder = RunFolder(experiment.run_dir)
    order = tune.trial_config(experiment, folder, trial, Path(experiment.model.path))
    return trials.train_ingredient(order)


def with_tune(experiment: Experiment, **fields: Any) -> Experiment:
    return experiment.model_copy(
        update={"tune": type(experiment.tune).model_validate(dict(experiment.tune) | fields)}
    )


def test_another_validation_trains_nothing(
    make_run: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = make_run(*SETTINGS)
    (trial,) = plan(experiment)
    assert train(experiment, trial)["num_valid_users"] == 3
    assert trial.is_finished
    assert not trials.base_model(Path(experiment.model.path), "float32", "cpu").model.training

    more = with_tune(experiment, num_valid_users=5)
    (again,) = plan(more)
    assert again.folder == trial.folder
    assert not again.is_finished
    before = (trial.folder / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(trials, "build_learner", None)  # would be called to train
        assert train(more, again)["num_valid_users"] == 5
    assert again.is_finished
    after = (trial.folder / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert before == after
    assert plan(with_tune(experiment, learning_rate=0.5))[0].folder != trial.folder


def test_nothing_hidden_is_left_of_killed_writers(make_run: Factory) -> None:
    experiment = make_run(*SETTINGS)
    (trial,) = plan(experiment)
    (trial.folder / "..checkpoint.x1y2").mkdir(parents=True)
    train(experiment, trial)
    assert trial.is_finished
    assert [path.name for path in trial.folder.iterdir() if path.name.startswith(".")] == []


def test_workers_start_without_the_record_that_a_killed_ray_left(
    make_run: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray_train = pytest.importorskip("ray.train")
    torch_train = pytest.importorskip("ray.train.torch")
    experiment = make_run(*SETTINGS, "tune.num_workers=2")
    (trial,) = plan(experiment)
    folder = RunFolder(experiment.run_dir)
    order = tune.trial_config(experiment, folder, trial, Path(experiment.model.path))
    books = trial.folder / trials.WORKERS / order["training_fingerprint"][:16]
    books.mkdir(parents=True)
    (books / "checkpoint_manager_snapshot.json").write_text('{"half')
    seen: list[list[str]] = []

    class Trainer:
        def __init__(self, *_: Any, **__: Any) -> None:
            seen.append([path.name for path in books.iterdir()])

        def fit(self) -> Any:
            return SimpleNamespace(return_value={"error": "seen"})

    monkeypatch.setattr(torch_train, "TorchTrainer", Trainer)
    monkeypatch.setattr(trial_workers, "_reporter", lambda _: ray_train.UserCallback())
    with pytest.raises(UserError, match="seen"):
        trial_workers.train_on_workers(order)
    assert seen == [[]]


@pytest.mark.parametrize("moved_aside", [False, True])
def test_the_checkpoint_outlives_a_kill_before_the_manifest(
    make_run: Factory, monkeypatch: pytest.MonkeyPatch, moved_aside: bool
) -> None:
    experiment = make_run(*SETTINGS)
    (trial,) = plan(experiment)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trials, "write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            train(experiment, trial)

    checkpoint = trial.folder / trials.CHECKPOINT
    if moved_aside:  # by a writer that was killed before the next one had its name
        checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.old-17"))

    def untrained(self: Any) -> Any:
        assert self.start_step == 2
        return iter(())

    monkeypatch.setattr(Learner, "steps", untrained)
    assert train(experiment, trial)["num_steps"] == 2
    assert trial.is_finished
    outputs = artifacts.read_json(trial.folder / artifacts.MANIFEST)["outputs"]
    assert all((trial.folder / name).exists() for name in outputs)
    assert not [path for path in trial.folder.iterdir() if path.name.startswith(".")]


def test_failed_trials_are_told_and_counted(
    make_run: Factory, screen: Screen, tmp_path: Path
) -> None:
    experiment = make_run(*SETTINGS, "tune.search={learning_rate: [0.01, 9.0]}")
    good, bad = plan(experiment)
    train(experiment, good)
    problems = {bad.folder: "the loss is nan"}
    choose_trial(tmp_path / "tools", [good, bad], problems, 3, screen.console, {})
    assert "tools: the trial learning_rate=9.0 failed: the loss is nan" in screen.text
    manifest = artifacts.read_json(tmp_path / "tools" / artifacts.MANIFEST)
    assert manifest["metrics"]["num_failed"] == 1


def test_a_damaged_record_of_a_trial_fails_its_domain_alone(
    make_run: Factory, screen: Screen
) -> None:
    experiment = make_run(*SETTINGS, "data.ingredients=[lamps,tools]", "data.spirit=[rivers]")
    folder = RunFolder(experiment.run_dir)
    lamps, tools = (
        tune.plan_trials(experiment, folder, name, experiment.run_dir / "ingredients.work")[0]
        for name in ("lamps", "tools")
    )
    train(experiment, tools)
    lamps.folder.mkdir(parents=True)
    (lamps.folder / artifacts.MANIFEST).write_text("{")
    with pytest.raises(tune.IngredientsFailed, match=r"no ingredient for lamps: .*damaged"):
        tune.run(experiment, console=screen.console)
    load_adapter(folder.ingredient_dir("tools"))


def test_running_out_of_memory_says_what_to_change(tmp_path: Path) -> None:
    write_error(tmp_path, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert artifacts.read_json(tmp_path / ERROR)["error"] == (
        "out of memory; set `tune.micro_batch_size` or `tune.activation_checkpointing` "
        "(CUDA out of memory. Tried to allocate 2 GiB)"
    )
    write_error(tmp_path, RuntimeError("mat1 and mat2\nshapes"))
    assert artifacts.read_json(tmp_path / ERROR)["error"] == "RuntimeError: mat1 and mat2"


def test_a_mix_takes_this_nodes_model_and_refuses_another_base(
    make_run: Factory, tmp_path: Path
) -> None:
    experiment = make_run()
    run = RunFolder(experiment.run_dir)
    for seed, folder in enumerate((run.spirit_dir, run.ingredient_dir("tools"))):
        save_adapter(folder, random_adapter(seed), experiment.model.path)
        artifacts.write_manifest(folder, stage="x", config={}, seed=3, inputs={}, metrics={})
    order = {**make_order(experiment, run, "tools"), "model_dir": str(tmp_path / "of_the_driver")}
    assert "error" not in mixing.mix_domain(order)
    load_adapter(run.cocktail_dir("tools"), experiment.model.path)
    shutil.rmtree(run.spirit_dir)
    save_adapter(run.spirit_dir, random_adapter(0), "another")
    assert "trained on another" in mixing.mix_domain(order)["error"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_freed_memory_goes_back_to_the_system() -> None:
    def resident_mb() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        (line,) = [one for one in lines if one.startswith("RssAnon")]
        return int(line.split()[1]) / 1024

    blocks = [b"x" * 100_000 for _ in range(2000)]
    kept = blocks[::50]  # what still lives between the freed blocks keeps their pages
    del blocks
    before = resident_mb()
    give_memory_back()
    assert resident_mb() < before - 100
    assert len(kept) == 40
