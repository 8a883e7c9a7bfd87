"""The control `joint`: one LoRA per domain, trained on the spirit's histories and its own at once.

It sees as many histories as the spirit and the ingredient saw together, each side's share as it was
there, under the ingredient's settings, each point of the same search; the best by validation is
kept. If the cocktail does not beat it, two adapters and a merge have bought nothing but their
modularity.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from rc_ray import artifacts, recipes
from rc_ray.artifacts import RunFolder
from rc_ray.config import Experiment
from rc_ray.errors import ArtifactError, UserError
from rc_ray.progress import Progress
from rc_ray.sweep_choice import IngredientsFailed, choose_trial, told_of_precision
from rc_ray.sweep_plan import Trial, pending, plan_trial
from rc_ray.training_config import TrainingConfig

Fit = Callable[..., tuple[int, dict[Path, str]]]
"""Runs trials, see `tune.run`."""


def run(
    experiment: Experiment, folder: RunFolder, fit: Fit, *, force: bool, console: Progress
) -> None:
    """Train what is missing of the joint LoRAs of all ingredient domains.

    Raises:
        ConfigError: the cluster has no room for a single trial.
        IngredientsFailed: names the domains without one and why.
    """
    work = folder.root / "controls.work" / "joint"
    if force:
        shutil.rmtree(work, ignore_errors=True)
    failed: dict[str, str] = {}
    trials: dict[str, list[Trial]] = {}
    for domain in experiment.data.ingredients:
        recipe = recipes.joint(experiment, domain)
        try:
            inputs = recipe.inputs(folder)
        except ArtifactError as error:
            failed[domain] = str(error)
            continue
        wanted = artifacts.fingerprint(config=recipe.config, seed=experiment.seed, inputs=inputs)
        target = folder.joint_dir(domain)
        if not force and artifacts.is_finished(target, wanted):
            console.note(f"{target} is up to date")
            continue
        trials[domain] = [
            _planned(experiment, inputs, domain, work, setting, share)
            for setting, share in recipes.joint_settings(experiment)
        ]
    problems: dict[Path, str] = {}
    left = pending(trial for found in trials.values() for trial in found)
    if left:
        _, problems = fit(_alone(experiment), folder, work, trials, left, console)
    for domain, found in trials.items():
        config = recipes.joint(experiment, domain).config
        try:
            choose_trial(
                folder.joint_dir(domain), found, problems, experiment.seed, console, config
            )
        except UserError as error:
            failed[domain] = str(error)
    chosen = (trial for name, found in trials.items() if name not in failed for trial in found)
    told = told_of_precision("the trials of joint", chosen)
    if told is not None:
        console.note(told)
    if failed:
        raise IngredientsFailed(_told(failed))


def _planned(
    experiment: Experiment,
    inputs: dict[str, str],
    domain: str,
    work: Path,
    setting: TrainingConfig,
    share: Fraction,
) -> Trial:
    spirit = experiment.data.spirit
    trial = plan_trial(experiment, inputs, domain, work, setting, pooled=spirit, own_share=share)
    return replace(trial, label=f"joint {trial.label}".strip(), scheduler=None)


def _alone(experiment: Experiment) -> Experiment:
    """The experiment with trials that share no process and that nothing stops early."""
    tune = experiment.tune.model_copy(update={"domains_per_trial": 1, "scheduler": None})
    return experiment.model_copy(update={"tune": tune})


def _told(failed: Mapping[str, str]) -> str:
    return "\n".join(f"tune: no joint LoRA for {name}: {why}" for name, why in failed.items())
