"""The joint LoRA: trained in this process in the place of Ray Tune, against training by hand."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from rc_ray import artifacts, joint, recipes
from rc_ray.artifacts import RunFolder
from rc_ray.config import Experiment
from rc_ray.core.adapters import load_adapter
from rc_ray.core.domains import read_domain
from rc_ray.core.loading import load_language_model
from rc_ray.engines import build_learner
from rc_ray.errors import ConfigError
from rc_ray.status import read_status
from rc_ray.sweep_choice import IngredientsFailed
from rc_ray.sweep_plan import trial_config
from rc_ray.trial import train_ingredient
from tests.conftest import Factory, Screen
from tests.test_together import largest_difference


def fit_here(
    experiment: Experiment, folder: RunFolder, work: Path, trials: Any, left: Any, console: Any
) -> tuple[int, dict[Path, str]]:
    for trial in left:
        train_ingredient(trial_config(experiment, folder, trial, Path(experiment.model.path)))
    return 1, {}


def test_it_learns_from_all_domains_as_long_as_spirit_and_ingredient_did(
    make_run: Factory, screen: Screen
) -> None:
    experiment = make_run(
        "evaluate.systems=[ingredient,joint]",
        "tune.search={learning_rate: [0.01, 0.00001]}",
        "tune.num_valid_users=6",
    )
    folder = RunFolder(experiment.run_dir)
    for _ in range(2):
        joint.run(experiment, folder, fit_here, force=False, console=screen.console)
    assert screen.text.count("is up to date") == 1
    target = folder.joint_dir("tools")
    manifest = artifacts.read_json(target / "manifest.json")
    assert set(manifest["inputs"]) == {"data/tools", "data/lamps", "data/rivers"}
    # 6 steps of 4 histories for the spirit and 6 of 4 for the ingredient, 4 at a time.
    assert manifest["metrics"]["num_steps"] == 12
    (chosen,) = [
        setting
        for setting, share in recipes.joint_settings(experiment)
        if share == Fraction(1, 2)
        and largest_difference(load_adapter(target), _by_hand(experiment, setting)) < 1e-4
    ]
    assert chosen.num_steps == 12
    (stage,) = [one for one in read_status(experiment) if one.stage == "tune"]
    assert "controls/joint" not in stage.detail
    assert "controls/joint/tools" in recipes.evaluation(experiment).reads


def _by_hand(experiment: Experiment, setting: Any) -> Any:
    folder = RunFolder(experiment.run_dir)
    learner = build_learner(
        load_language_model(Path(experiment.model.path), torch.float32),
        [read_domain(folder.domain_dir(name)) for name in ("tools", "lamps", "rivers")],
        setting,
        seed=experiment.seed,
        num_listed=9,
        base_name=experiment.model.path,
        own_share=Fraction(1, 2),
    )
    for _ in learner.steps():
        pass
    return learner.result()


def test_what_is_missing_is_named(make_run: Factory, screen: Screen) -> None:
    experiment = make_run("evaluate.systems=[joint]")
    folder = RunFolder(experiment.run_dir)
    (folder.domain_dir("rivers") / "manifest.json").unlink()
    with pytest.raises(IngredientsFailed, match="no joint LoRA for tools: .*rivers: not there yet"):
        joint.run(experiment, folder, fit_here, force=False, console=screen.console)
    with pytest.raises(ConfigError, match="names joint, made from a base spirit"):
        make_run("evaluate.systems=[joint]", "data.spirit=[]")
