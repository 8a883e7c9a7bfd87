"""Ingredients on Ray Tune: side by side, a broken domain apart, what is finished left alone."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from rc_ray import artifacts, tune
from rc_ray.artifacts import RunFolder
from rc_ray.config import Experiment
from rc_ray.core.adapters import load_adapter
from rc_ray.core.domains import Domain, RankingCase
from rc_ray.engines import Learner
from rc_ray.errors import ConfigError
from rc_ray.session import ray_session
from rc_ray.trial import train_ingredient, validate
from tests.test_together import largest_difference

pytestmark = pytest.mark.distributed

SETTINGS = (
    "data.ingredients=[tools,lamps]",
    "data.spirit=[rivers]",
    "tune.learning_rate=0.01",
    "tune.num_valid_users=6",
    "tune.num_steps=8",
    "tune.checkpoint_every=3",
    "tune.max_concurrent_trials=2",
)


def run(experiment: Experiment, screen: Any, **options: Any) -> Path:
    with ray_session(RunFolder(experiment.run_dir)):
        return tune.run(experiment, console=screen.console, **options)


def changed_files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_domains_run_side_by_side_and_a_broken_one_stands_apart(
    ray_local, make_run, screen
) -> None:
    experiment = make_run(*SETTINGS, "tune.search={learning_rate: [0.01, 0.0001]}")
    folder = RunFolder(experiment.run_dir)
    items = folder.domain_dir("tools") / "items.parquet"
    whole = items.read_bytes()
    items.write_bytes(whole[:100])
    with pytest.raises(tune.IngredientsFailed, match=r"no ingredient for tools: .*items\.parquet"):
        run(experiment, screen)
    assert not folder.ingredient_dir("tools").exists()
    lamps = folder.ingredient_dir("lamps")
    assert artifacts.read_json(lamps / artifacts.MANIFEST)["metrics"]["num_steps"] == 8
    load_adapter(lamps)
    table = pq.read_table(lamps / "trials.parquet").to_pylist()
    rates = [json.loads(row["setting"])["learning_rate"] for row in table]
    assert rates == [0.01, 0.0001]
    assert all(0.0 < row["valid_ndcg"] <= 1.0 for row in table)
    chosen = [row for row in table if row["chosen"]]
    assert len(chosen) == 1
    assert chosen[0]["valid_ndcg"] == max(row["valid_ndcg"] for row in table)

    # Mended: the broken domain alone is run, from its start.
    items.write_bytes(whole)
    before = changed_files(lamps)
    trials = changed_files(experiment.run_dir / "ingredients.work" / "lamps")
    run(experiment, screen)
    load_adapter(folder.ingredient_dir("tools"))
    assert changed_files(lamps) == before
    assert changed_files(experiment.run_dir / "ingredients.work" / "lamps") == trials

    # An ingredient that was lost comes back from its finished trials, without training.
    shutil.rmtree(lamps)
    run(experiment, screen)
    assert (
        load_adapter(lamps).modules.keys()
        == load_adapter(folder.ingredient_dir("tools")).modules.keys()
    )
    assert changed_files(experiment.run_dir / "ingredients.work" / "lamps") == trials


def test_a_trial_goes_on_from_its_checkpoint(make_run, screen, monkeypatch) -> None:
    """The trial function itself, in this process: no Ray is needed to show it."""
    from rc_ray import trial as trials

    experiment = make_run(*SETTINGS)
    folder = RunFolder(experiment.run_dir)

    def specification(name: str) -> dict[str, Any]:
        planned = tune.plan_trials(experiment, folder, "tools", experiment.run_dir / name)[0]
        return tune.trial_config(experiment, folder, planned, Path(experiment.model.path))

    unbroken = specification("unbroken")
    trials.train_ingredient(unbroken)
    broken = specification("broken")
    original = Learner.save

    def save_and_die(self: Any, target: Path, num_done: int) -> None:
        original(self, target, num_done)
        if num_done == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(Learner, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        trials.train_ingredient(broken)
    monkeypatch.setattr(Learner, "save", original)
    metrics = trials.train_ingredient(broken)
    assert metrics["num_steps"] == 8
    first = load_adapter(Path(unbroken["folder"]) / "adapter")
    second = load_adapter(Path(broken["folder"]) / "adapter")
    for name, pair in first.modules.items():
        assert torch.equal(pair.a, second.modules[name].a)
        assert torch.equal(pair.b, second.modules[name].b)
    manifests = [
        artifacts.read_json(Path(spec["folder"]) / artifacts.MANIFEST)["metrics"]
        for spec in (unbroken, broken)
    ]
    assert manifests[0]["valid_ndcg"] == manifests[1]["valid_ndcg"]


def test_domains_of_a_group_share_a_process(ray_local, make_run, screen) -> None:
    experiment = make_run(*SETTINGS, "tune.domains_per_trial=2")
    folder = RunFolder(experiment.run_dir)
    (folder.domain_dir("lamps") / "items.parquet").write_bytes(b"x")
    with pytest.raises(tune.IngredientsFailed, match=r"no ingredient for lamps: .*items\.parquet"):
        run(experiment, screen)
    assert "2 trial(s) in 1 group(s), 1 at a time" in screen.text
    assert "tools  8/8" in screen.text
    (alone,) = tune.plan_trials(experiment, folder, "tools", experiment.run_dir / "alone")
    train_ingredient(tune.trial_config(experiment, folder, alone, Path(experiment.model.path)))
    trained = load_adapter(folder.ingredient_dir("tools"))
    assert largest_difference(trained, load_adapter(alone.folder / "adapter")) < 1e-5


def test_a_trial_larger_than_the_cluster_is_refused(ray_local, make_run, screen) -> None:
    with pytest.raises(ConfigError, match=r"tune.cpus_per_trial.*the cluster has 4 CPU"):
        run(make_run(*SETTINGS, "tune.cpus_per_trial=5"), screen)


def test_validation_ranks_by_the_likelihood_as_trained() -> None:
    """Two users, three titles; by hand: the clicks are on ranks 1 and 3."""

    class Fixed:
        def log_likelihoods(
            self, histories: list[list[str]], candidates: list[list[int]], *, with_prior: bool
        ) -> list[torch.Tensor]:
            assert with_prior
            return [torch.tensor([-1.5, -1.0, -3.0]), torch.tensor([-2.0, -1.0, -1.5])]

    domain = Domain(
        name="films",
        item_ids=("a", "b", "c"),
        titles=("A", "B", "C"),
        num_train=np.ones(3, dtype=np.int64),
        cold=np.zeros(3, dtype=bool),
        train=((0, 1),),
        cases_by_kind={
            ("valid", "warm", "scored"): [
                RankingCase("u", (0,), target=1, candidates=(0, 1, 2)),
                RankingCase("v", (1,), target=0, candidates=(0, 1, 2)),
            ]
        },
    )
    quality, num_users = validate(
        Fixed(),  # type: ignore[arg-type]
        domain,
        num_users=5,
        seed=0,
        with_prior=True,
    )
    assert num_users == 2
    assert quality == pytest.approx((1.0 + 1.0 / math.log2(4.0)) / 2)
