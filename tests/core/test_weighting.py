"""Weights that lower the entropy: the gradient is true, the sure adapter wins, nobody is told."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rc_ray.core.adapters import Adapter, LoraPair
from rc_ray.core.loading import load_language_model
from rc_ray.core.merging import concatenate
from rc_ray.core.model import AdapterMix, LanguageModel
from rc_ray.core.objectives import entropy
from rc_ray.core.predictions import UnlabeledPrompt
from rc_ray.core.prompts import PromptRenderer
from rc_ray.core.ranking import Ranker
from rc_ray.core.weighting import learn_weights, num_weighting_steps
from rc_ray.merge_config import LearnedMix
from tests.core.test_model import random_adapter
from tests.tiny import ADJECTIVES, NOUNS, make_model

TITLES = [f"{a} {n}" for a in ADJECTIVES for n in NOUNS]
PROMPTS = [
    UnlabeledPrompt((TITLES[i], TITLES[i + 7]), tuple(range(i, i + 12))) for i in range(0, 24, 3)
]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_language_model(make_model(tmp_path_factory.mktemp("model")), torch.float32)


@pytest.fixture(scope="module")
def ranker(lm: LanguageModel) -> Ranker:
    return Ranker(lm, "tools", TITLES, np.ones(len(TITLES)), PromptRenderer(lm.tokenizer))


def scaled(adapter: Adapter, factor: float) -> Adapter:
    return Adapter(
        {n: replace(pair, scale=pair.scale * factor) for n, pair in adapter.modules.items()}
    )


def mean_entropy(ranker: Ranker) -> float:
    with torch.no_grad():
        scores = ranker.log_likelihoods(
            [p.history for p in PROMPTS], [p.candidates for p in PROMPTS]
        )
    return float(torch.stack([entropy(score) for score in scores]).mean())


def test_entropy_worked_by_hand() -> None:
    assert float(entropy(torch.zeros(8))) == pytest.approx(math.log(8))
    sure = torch.tensor([0.5, 0.25, 0.25]).log() - 3.0  # any constant cancels
    assert float(entropy(sure)) == pytest.approx(1.5 * math.log(2))


def test_entropy_falls_and_rows_are_weights(ranker: Ranker) -> None:
    adapters = [random_adapter(1), scaled(random_adapter(2), 2.0)]
    config = LearnedMix(num_epochs=15, batch_size=8, learning_rate=0.2)
    steps = list(learn_weights(ranker, adapters, PROMPTS, config, seed=0))
    assert len(steps) == num_weighting_steps(len(PROMPTS), config) == 15
    assert steps[-1].entropy < steps[0].entropy - 0.05
    for row in steps[-1].weights.values():
        assert sum(row) == pytest.approx(1.0, abs=1e-6)
        assert min(row) > 0.0
    assert len({round(row[1], 3) for row in steps[-1].weights.values()}) > 1  # layer by layer


def test_first_entropy_is_that_of_the_uniform_mix(lm: LanguageModel, ranker: Ranker) -> None:
    adapters = [random_adapter(1), random_adapter(2)]
    config = LearnedMix(num_epochs=1, batch_size=8)
    (step,) = learn_weights(ranker, adapters, PROMPTS, config, seed=0)
    # The uniform mix as one adapter, folded: an independent path to the same number.
    half = Adapter(
        {
            name: LoraPair(
                torch.cat([a.modules[name].a for a in adapters]),
                torch.cat([a.modules[name].b * a.modules[name].scale for a in adapters], dim=1),
                0.5,
            )
            for name in adapters[0].modules
        }
    )
    with lm.folded(half):
        assert step.entropy == pytest.approx(mean_entropy(ranker), abs=1e-4)


def test_one_step_follows_the_measured_slope(lm: LanguageModel, ranker: Ranker) -> None:
    """Adam's first step is the sign of the gradient: checked by finite differences."""
    adapters = [random_adapter(1), random_adapter(2)]
    config = LearnedMix(num_epochs=1, batch_size=8, learning_rate=0.01)
    (step,) = learn_weights(ranker, adapters, PROMPTS, config, seed=0)
    mix = AdapterMix(adapters)
    checked = 0
    for row, name in enumerate(mix.modules):
        slopes = []
        for delta in (0.05, -0.05):
            weights = torch.full((len(mix.modules), 2), 0.5)
            weights[row] += torch.tensor([-delta, delta])
            with lm.using(mix.with_weights(weights)):
                slopes.append(mean_entropy(ranker))
        slope = slopes[0] - slopes[1]
        if abs(slope) < 1e-4:
            continue
        checked += 1
        assert (step.weights[name][1] < 0.5) == (slope > 0)
    assert checked >= 3


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_a_step_in_parts_is_the_whole_step(ranker: Ranker, micro_batch_size: int) -> None:
    adapters = [random_adapter(1), scaled(random_adapter(2), 2.0)]
    config = LearnedMix(num_epochs=3, batch_size=5)  # 8 prompts: the last batch holds 3
    expected = list(learn_weights(ranker, adapters, PROMPTS, config, seed=0))
    got = list(
        learn_weights(ranker, adapters, PROMPTS, config, seed=0, micro_batch_size=micro_batch_size)
    )
    assert [step.entropy for step in got] == pytest.approx(
        [step.entropy for step in expected], abs=1e-5
    )
    assert len(got) == len(expected) == 6
    for name, row in expected[-1].weights.items():
        assert got[-1].weights[name] == pytest.approx(row, abs=1e-5)
    assert any(abs(row[0] - 0.5) > 0.01 for row in got[-1].weights.values())


def test_equal_adapters_merge_to_themselves(lm: LanguageModel, ranker: Ranker) -> None:
    adapters = [random_adapter(1), random_adapter(1)]
    config = LearnedMix(num_epochs=2, batch_size=8, learning_rate=0.5)
    *_, last = learn_weights(ranker, adapters, PROMPTS, config, seed=0)
    with lm.folded(concatenate(adapters, last.weights)):
        mixed = mean_entropy(ranker)
    with lm.folded(adapters[0]):
        assert mixed == pytest.approx(mean_entropy(ranker), abs=1e-4)


def test_no_prompts_is_refused(ranker: Ranker) -> None:
    with pytest.raises(ValueError, match="needs unlabeled prompts"):
        next(learn_weights(ranker, [random_adapter(1)], [], LearnedMix(), seed=0))
