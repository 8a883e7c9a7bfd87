"""Search without gradients: a known minimum is found, bounds hold, the best is kept."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rc_ray.core.model import AdapterMix
from rc_ray.core.ranking import Ranker
from rc_ray.core.weight_search import EvolutionStrategy, search_weights
from rc_ray.core.weighting import num_weighting_steps
from rc_ray.mix_config import SearchedMix
from tests.core.small_catalogue import PROMPTS, make_ranker, scaled
from tests.core.test_model import random_adapter

CLICKS = [replace(prompt, target=place) for place, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Ranker:
    return make_ranker(tmp_path_factory.mktemp("model"))


def test_a_narrow_valley_has_its_bottom_found() -> None:
    """f = (x - 1)^2 + 100 (x + y + z)^2 + (y - z)^2, whose minimum is at (1, -1/2, -1/2)."""
    strategy = EvolutionStrategy(np.zeros(3), 0.3, seed=0)
    for _ in range(120):
        points = strategy.ask()
        x, y, z = points.T
        losses = (x - 1) ** 2 + 100 * (x + y + z) ** 2 + (y - z) ** 2
        strategy.tell(points, losses.tolist())
    np.testing.assert_allclose(strategy.mean, [1.0, -0.5, -0.5], atol=1e-3)
    assert EvolutionStrategy(np.zeros(1), 1.0, seed=0).population_size == 4


def test_the_best_mix_is_kept_and_no_gradient_taken(
    ranker: Ranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = [random_adapter(1), scaled(random_adapter(2), 2.0)]
    config = SearchedMix(method="lorahub", num_evaluations=15, max_weight=1.2, l1_weight=0.1)
    score = Ranker.score

    def watched(self: Ranker, prepared: object) -> list[torch.Tensor]:
        assert not torch.is_grad_enabled()
        return score(self, prepared)  # type: ignore[arg-type]

    monkeypatch.setattr(Ranker, "score", watched)
    steps = list(search_weights(ranker, adapters, CLICKS, config, seed=0))
    assert torch.is_grad_enabled()
    assert len(steps) == 15 == num_weighting_steps(len(CLICKS), config)
    assert {tuple(row) for row in steps[0].weights.values()} == {(0.5, 0.5)}
    best = min(step.objective for step in steps)
    assert best < steps[0].objective
    last = steps[-1].weights
    (row,) = {tuple(row) for row in last.values()}  # one weight for the model
    assert max(abs(weight) for weight in row) <= 1.2
    # The objective of the weights that were kept, by another path.
    mix = AdapterMix(adapters)
    with torch.no_grad(), ranker.lm.using(mix.with_weights(torch.tensor([row] * len(mix.modules)))):
        scores = ranker.log_likelihoods(
            [prompt.history for prompt in CLICKS], [prompt.candidates for prompt in CLICKS]
        )
    loss = -np.mean(
        [float(s.log_softmax(-1)[p.target]) for s, p in zip(scores, CLICKS, strict=True)]
    )
    assert best == pytest.approx(loss + 0.1 * float(np.mean(np.abs(row))), abs=1e-4)
    # Each step holds the best until then.
    kept = list(itertools.accumulate((step.objective for step in steps), min))
    changed = [a.weights != b.weights for a, b in itertools.pairwise(steps)]
    assert changed == [b < a for a, b in itertools.pairwise(kept)]


def test_a_seed_gives_the_same_search(ranker: Ranker) -> None:
    adapters = [random_adapter(1), random_adapter(2)]
    config = SearchedMix(method="lorahub", num_evaluations=7, granularity="projection")
    first, again, other = (
        list(search_weights(ranker, adapters, CLICKS[:3], config, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again
    assert [step.objective for step in first[1:]] != [step.objective for step in other[1:]]


def test_clicks_are_needed(ranker: Ranker) -> None:
    config = SearchedMix(method="lorahub")
    with pytest.raises(ValueError, match="next item is known"):
        next(search_weights(ranker, [random_adapter(1)], PROMPTS, config, seed=0))
    with pytest.raises(ValueError, match="needs validation clicks"):
        next(search_weights(ranker, [random_adapter(1)], [], config, seed=0))
    bound = SearchedMix(method="lorahub", max_weight=0.3)
    with pytest.raises(ValueError, match="`max_weight` is 0.3, .* the weight 1/2"):
        next(search_weights(ranker, [random_adapter(1), random_adapter(2)], CLICKS, bound, seed=0))
    assert math.isfinite(
        next(search_weights(ranker, [random_adapter(1)], CLICKS, config, seed=0)).objective
    )
