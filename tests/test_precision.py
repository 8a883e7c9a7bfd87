"""What was computed in which precision is told, and told loudly where one whole has two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rc_ray import artifacts, evaluate, merge, mixing, scorer, tune, worker
from rc_ray import trial as trials
from rc_ray.artifacts import MANIFEST, RunFolder
from rc_ray.config import Experiment
from rc_ray.core.loading import dtype_name
from rc_ray.curves import summary
from rc_ray.engines import Learner
from rc_ray.merge_plan import make_order
from rc_ray.precision import dtypes_in, joined, mixed_precision
from rc_ray.shards import read_scores, shards_of, write_arrays
from rc_ray.sweep_choice import told_of_precision
from rc_ray.training_config import TrainConfig
from tests.conftest import Factory, Screen
from tests.test_evaluate import COST, make_domain_run
from tests.test_merge_search import BOTH, with_adapters

BOTH_TOLD = "partly computed in float32, partly in bfloat16, as `model.dtype: auto` chose"


def test_two_precisions_in_one_whole_are_told() -> None:
    assert dtype_name(torch.bfloat16) == "bfloat16"
    assert joined(["a", "b"], (), ["b", "c", "a"]) == ["a", "b", "c"]
    assert mixed_precision("the scores", []) is None
    assert mixed_precision("the scores", ["bfloat16"]) is None
    told = mixed_precision("the scores", ["float32", "bfloat16"])
    assert told is not None
    assert told.startswith(f"the scores: {BOTH_TOLD}")
    assert "--force" in told


def test_a_curve_tells_it_by_step() -> None:
    row = {"loss": 1.0, "seconds": 1.0, "num_tokens": 1}
    old = [{**row, "step": 0}]
    assert dtypes_in(old) == []
    assert "dtypes" not in summary(old)
    rows = [*old, {**row, "step": 1, "dtype": "bfloat16"}, {**row, "step": 2, "dtype": "float32"}]
    assert summary(rows)["dtypes"] == ["bfloat16", "float32"]


def test_files_of_scores_tell_it(tmp_path: Path) -> None:
    """Four files, the third in another precision; files of before it was told say nothing."""
    run = make_domain_run(tmp_path)
    (system,) = run.systems
    places = shards_of(run)
    assert len(places) == 4

    def write(place: int, **told: str) -> None:
        shard = places[place]
        scores = np.zeros((len(shard.cases) or 1, 2, 3), np.float32)
        write_arrays(shard.path(system), scores=scores, cost=COST, **told)

    for place in range(4):
        write(place)
    assert read_scores(run, system).dtypes == ()
    for place, name in enumerate(("float32", "float32", "bfloat16")):
        write(place, dtype=name)
    assert read_scores(run, system).dtypes == ("float32", "bfloat16")


class InThisProcess:
    """The evaluation's actors without Ray; `auto` means what `dtype` is."""

    def __init__(self, experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dtype = torch.float32
        path = experiment.model.path
        self._new = lambda: scorer.Scorer(path, path, "auto", 1.0, False)
        monkeypatch.setattr(scorer, "choose_dtype", lambda *_: self.dtype)
        monkeypatch.setattr(evaluate, "crew", lambda *_: nullcontext(self))

    def do(self, pending: Sequence[Any], what: str) -> int:
        actor, todo = self._new(), [work for work in pending if work.missing]
        assert [answer for answer in map(actor.score, todo) if answer is not None] == []
        return len(todo)


def test_an_evaluation_that_goes_on_elsewhere_says_so(
    make_run: Factory, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("num_test_users=3", "num_catalogue_users=2", "systems=[title_embedding, base]")
    experiment = make_run("model.dtype=auto", *(f"evaluate.{one}" for one in settings))
    run = RunFolder(experiment.run_dir)
    actors = InThisProcess(experiment, monkeypatch)

    def evaluated() -> list[str]:
        (run.evaluate_dir / MANIFEST).unlink(missing_ok=True)
        evaluate.run(experiment, console=screen.console)
        found: list[str] = artifacts.read_json(run.evaluate_dir / MANIFEST)["metrics"]["dtypes"]
        return found

    def lost(pattern: str) -> None:
        paths = list((run.root / "evaluate.work").glob(f"*/{pattern}"))
        assert paths
        for path in paths:
            path.unlink()

    assert evaluated() == ["float32"]
    actors.dtype = torch.bfloat16
    assert evaluated() == ["float32"]  # every score was there
    assert "partly" not in screen.text
    for pattern in ("title_embedding.npz", "warm-*.npz", "catalogue-*.npz"):
        lost(pattern)
        assert sorted(evaluated()) == ["bfloat16", "float32"], pattern
        assert "the scores: partly computed in" in screen.text
        actors.dtype = torch.float32
        lost(pattern)
        assert evaluated() == ["float32"]
        actors.dtype = torch.bfloat16


def test_a_trial_that_goes_on_elsewhere_tells_both(
    make_run: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after a step in float32; the next process finds bf16 to be faster."""
    settings = ("tune.num_steps=2", "tune.num_valid_users=3", "tune.checkpoint_every=1")
    experiment = make_run(*settings, "model.dtype=auto")
    run = RunFolder(experiment.run_dir)
    (trial,) = tune.plan_trials(experiment, run, "tools", run.root / "work")
    order = tune.trial_config(experiment, run, trial, Path(experiment.model.path))
    original = Learner.steps

    def killed(self: Learner) -> Iterator[Any]:
        yield next(original(self))
        raise KeyboardInterrupt

    trials.forget_base()
    monkeypatch.setattr(trials, "choose_dtype", lambda *_: torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "steps", killed)
        with pytest.raises(KeyboardInterrupt):
            trials.train_ingredient(order)
    trials.forget_base()
    monkeypatch.setattr(trials, "choose_dtype", lambda *_: torch.bfloat16)
    try:
        metrics = trials.train_ingredient(order)
    finally:
        trials.forget_base()
    assert metrics["num_steps"] == 2
    assert metrics["dtypes"] == ["float32", "bfloat16"]
    told = told_of_precision("the trials", [trial])
    assert told is not None
    assert told.startswith(f"the trials: {BOTH_TOLD}")


def test_a_run_of_workers_that_goes_on_elsewhere_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = pytest.importorskip("ray.train")
    learner = SimpleNamespace(rows=[], note=None, dtype="bfloat16", start_step=1)
    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(train, "get_context", lambda: context)
    monkeypatch.setattr(worker, "_build", lambda *_: (learner, None))
    told: list[str] = []
    monkeypatch.setattr(worker, "_train", lambda *given: told.extend(given[3]))
    settings = {
        "train": TrainConfig(engine="torch").model_dump(mode="json"),
        "storage": str(tmp_path / "checkpoints"),
        "run_name": "run",
        "run_dir": str(tmp_path),
        "tracking": {},
        "curve": "spirit",
        "fingerprint": "f",
    }
    assert worker.train_worker(settings) == {}
    learner.rows = [{"step": 0, "dtype": "bfloat16"}]
    assert worker.train_worker(settings) == {}
    assert told == []
    learner.rows = [{"step": 0, "dtype": "float32"}]
    assert worker.train_worker(settings) == {}
    assert [line[: len(BOTH_TOLD) + 8] for line in told] == [f"spirit: {BOTH_TOLD}"]


def test_mixes_that_were_there_already_tell_it(make_run: Factory) -> None:
    experiment = with_adapters(make_run(*BOTH))
    run = RunFolder(experiment.run_dir)
    order = {**make_order(experiment, run, "tools"), "model_dir": experiment.model.path}
    result = mixing.mix_domain(order)
    assert result["dtypes"] == ["float32"]
    assert not [line for line in merge._told("tools", result) if "partly" in line]
    path = run.mix_work_dir("tools") / "uniform" / MANIFEST
    manifest = artifacts.read_json(path)
    assert manifest["metrics"]["dtypes"] == ["float32"]
    manifest["metrics"]["dtypes"] = ["bfloat16"]
    artifacts.write_json(path, manifest)
    result = mixing.mix_domain(order)
    assert result["mixes"]["uniform"]["dtypes"] == ["bfloat16"]
    assert result["dtypes"] == ["float32", "bfloat16"]
    told = [line for line in merge._told("tools", result) if "partly" in line]
    assert [line[: len(BOTH_TOLD) + 24] for line in told] == [
        f"tools: mixes and guard: {BOTH_TOLD}"
    ]
    sealed = artifacts.read_json(run.cocktail_dir("tools") / MANIFEST)["metrics"]
    assert sealed["dtypes"] == ["float32", "bfloat16"]
