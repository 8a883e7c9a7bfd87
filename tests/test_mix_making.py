"""Mixes that overflow are told plainly and leave nothing; what is told is of the mix kept."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rc_ray import mix_making
from rc_ray.artifacts import MANIFEST, RunFolder, read_json
from rc_ray.config import Experiment
from rc_ray.core.adapters import save_adapter
from rc_ray.core.model import AdapterMix
from rc_ray.core.weighting import WeightingStep
from rc_ray.errors import UserError
from rc_ray.merge_plan import make_order, plan_trials, trial_order
from rc_ray.merge_trial import mix_cocktail
from rc_ray.mix_config import SearchedMix
from rc_ray.mix_making import fold_check, make_mix
from rc_ray.mixing import mix_domain
from rc_ray.open_domain import OpenDomain
from rc_ray.sweep_plan import ERROR
from rc_ray.trial_process import fail
from tests.conftest import Factory
from tests.core.small_catalogue import scaled
from tests.core.test_model import random_adapter
from tests.test_merge_search import BOTH, with_adapters

FREE = "merge.parametrisation=free"
DIVERGED = (
    r"the mix {}: at step 1 of the learning (the objective|a weight) is nan; "
    r"lower `learning_rate` \(1e\+30\)"
)


def order_of(experiment: Experiment) -> dict[str, Any]:
    order = make_order(experiment, RunFolder(experiment.run_dir), "tools")
    return {**order, "model_dir": experiment.model.path}


def test_what_is_told_of_a_searched_mix_is_of_the_one_that_is_kept(
    make_run: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three mixes are tried, the second is the best."""

    def tried(ranker: Any, adapters: Any, *others: Any, **options: Any) -> Iterator[WeightingStep]:
        for step, (entropy, objective) in enumerate([(1.0, 2.0), (0.25, 1.5), (0.75, 1.75)]):
            weights = dict.fromkeys(adapters[0].modules, [0.5, 0.5])
            yield WeightingStep(step, entropy, weights, objective, 2.0, 3)

    monkeypatch.setattr(mix_making, "search_weights", tried)
    config = SearchedMix(method="lorahub", num_evaluations=3)
    opened = OpenDomain(order_of(with_adapters(make_run(*BOTH))))
    plan = {"rank": None, "random": ()}
    told = make_mix(opened, "hub", plan, config, tmp_path, io.StringIO())
    assert (told["first_entropy"], told["last_entropy"], told["last_objective"]) == (1.0, 0.25, 1.5)
    rows = [json.loads(line) for line in (tmp_path / "entropy.jsonl").read_text().splitlines()]
    assert [row["entropy"] for row in rows] == [1.0, 0.25, 0.75]


def test_a_mix_that_diverges_is_told_by_name_and_leaves_nothing(make_run: Factory) -> None:
    """Free weights of 1e30 after the first step: the second finds no number."""
    mixes = "{wild: {method: learned, parametrisation: free, learning_rate: 1.0e30, num_epochs: 2}}"
    experiment = with_adapters(make_run(*BOTH, f"merge.mixes={mixes}"))
    run = RunFolder(experiment.run_dir)
    told = mix_domain(order_of(experiment))
    assert list(told["failed_mixes"]) == ["wild"]
    assert re.fullmatch(DIVERGED.format("wild"), told["failed_mixes"]["wild"])
    assert {path.name for path in run.mix_work_dir("tools").iterdir()} == {"cocktail", "uniform"}
    assert not run.mix_dir("tools", "wild").exists()


@pytest.mark.parametrize(
    ("rate", "scale", "words"),
    [
        (1e30, 1.0, "its logits are not finite, or all 0"),
        (3e37, 100.0, "its weights are too large to save"),
        (3e38, 1.0, "at step 0 of the learning the update overflows"),
    ],
)
def test_a_last_step_that_diverges_is_found_before_it_is_sealed(
    make_run: Factory, rate: float, scale: float, words: str
) -> None:
    """One step: no further objective is there to tell that the weights are too large."""
    one_step = ("merge.num_epochs=1", "merge.batch_size=6", "merge.num_prompts=6")
    experiment = with_adapters(make_run(*BOTH, FREE, *one_step, f"merge.learning_rate={rate}"))
    run = RunFolder(experiment.run_dir)
    save_adapter(
        run.ingredient_dir("tools"), scaled(random_adapter(1), scale), experiment.model.path
    )
    told = mix_domain(order_of(experiment))
    assert told["error"] == f"the mix cocktail: {words}; lower `learning_rate` ({rate:g})"
    assert {path.name for path in run.mix_work_dir("tools").iterdir()} == {"uniform"}


def test_a_trial_that_diverges_fails_alone(make_run: Factory) -> None:
    space = "merge.search={learning_rate: [1.0e30, 0.1]}"
    experiment = with_adapters(make_run(*BOTH, FREE, "merge.num_epochs=2", space))
    run = RunFolder(experiment.run_dir)
    wild, calm = plan_trials(experiment, run, "tools")
    for trial in (wild, calm):
        trial.folder.mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        mix_cocktail(trial_order(experiment, run, wild, Path(experiment.model.path)))
    fail(wild.folder, caught.value)
    assert re.fullmatch(DIVERGED.format("cocktail"), read_json(wild.folder / ERROR)["error"])
    assert not [path for path in wild.folder.iterdir() if "mix" in path.name]
    mix_cocktail(trial_order(experiment, run, calm, Path(experiment.model.path)))
    assert calm.is_finished
    assert (calm.mix_dir / MANIFEST).exists()


def test_the_fold_check_sees_every_prompt(make_run: Factory) -> None:
    """A difference that is no number counts, whichever prompt has it."""
    opened = OpenDomain(order_of(with_adapters(make_run(*BOTH))))
    fine, odd = random_adapter(1), scaled(random_adapter(1), float("nan"))
    texts = opened.check_texts
    assert len(texts) > 1
    assert fold_check(opened.lm, texts, AdapterMix([fine]), fine)["relative"] < 1e-4
    found = fold_check(opened.lm, texts, AdapterMix([fine]), odd)
    assert all(torch.tensor(list(found.values())).isnan())
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        fold_check(opened.lm, texts, AdapterMix([odd]), fine)
