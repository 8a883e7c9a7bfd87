"""Weights that lower the entropy: the gradient is true, the sure adapter wins, nobody is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from rc_ray.core.adapters import Adapter, LoraPair
from rc_ray.core.merging import concatenate
from rc_ray.core.model import AdapterMix, LanguageModel
from rc_ray.core.objectives import entropy
from rc_ray.core.predictions import CalibratedScore, UnlabeledPrompt
from rc_ray.core.prompts import PromptRenderer, Style
from rc_ray.core.ranking import Ranker
from rc_ray.core.weighting import (
    WeightingStep,
    learn_weights,
    measure_objective,
    num_weighting_steps,
)
from rc_ray.mix_config import LearnedMix
from tests.core.small_catalogue import PROMPTS, TITLES, make_ranker, scaled
from tests.core.test_model import random_adapter


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Ranker:
    return make_ranker(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def lm(ranker: Ranker) -> LanguageModel:
    return ranker.lm


def mean_entropy(ranker: Ranker) -> float:
    with torch.no_grad():
        scores = ranker.log_likelihoods(
            [p.history for p in PROMPTS], [p.candidates for p in PROMPTS]
        )
    return float(torch.stack([entropy(score) for score in scores]).mean())


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


@pytest.mark.parametrize("batch_size", [8, 5])  # 8 prompts: batches of 5 and 3 weigh as many
def test_the_objective_of_a_finished_mix_is_that_of_its_fold(
    lm: LanguageModel, ranker: Ranker, batch_size: int
) -> None:
    adapters = [random_adapter(1), scaled(random_adapter(2), 2.0)]
    config = LearnedMix(num_epochs=2, batch_size=batch_size, learning_rate=0.5, pull=3.0)
    *_, last = learn_weights(ranker, adapters, PROMPTS, config, seed=0)
    got = measure_objective(ranker, adapters, PROMPTS, config, 0, last.weights)
    with lm.folded(concatenate(adapters, last.weights)):
        expected = mean_entropy(ranker)
    assert got == pytest.approx(expected, abs=1e-4)
    assert abs(got - last.objective) > 0.01  # which is of one batch, before its update, and pulled


def test_an_objective_of_no_numbers_is_no_number(ranker: Ranker) -> None:
    adapters = [random_adapter(1), random_adapter(2)]
    weights = dict.fromkeys(adapters[0].modules, [torch.nan, 0.5])
    for over in ("candidates", "catalogue"):
        config = LearnedMix.model_validate({"over": over})
        assert np.isnan(measure_objective(ranker, adapters, PROMPTS, config, 0, weights))


def test_weights_that_overflow_end_the_learning_at_their_step(
    ranker: Ranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = [random_adapter(1), scaled(random_adapter(2), 2.0)]
    config = plain("entropy", parametrisation="free", optimizer="sgd", learning_rate=0.25)
    steps = learn_weights(ranker, adapters, PROMPTS, config, seed=0)
    next(steps)

    def step(self: torch.optim.SGD) -> None:
        with torch.no_grad():
            self.param_groups[0]["params"][0][0, 1] = torch.inf

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    told = r"at step 1 of the learning a weight is inf; lower `learning_rate` \(0.25\)"
    with pytest.raises(FloatingPointError, match=told):
        next(steps)


def test_an_objective_that_overflows_ends_the_learning_at_its_step(ranker: Ranker) -> None:
    """Weights of 1e30 are numbers, the scores of a model of such layers or their slopes are not."""
    adapters = [random_adapter(1), scaled(random_adapter(2), 2.0)]
    common = {"parametrisation": "free", "learning_rate": 1e30, "num_epochs": 4}
    steps = learn_weights(ranker, adapters, PROMPTS, plain("entropy", **common), seed=0)
    first = next(steps)
    assert all(np.isfinite(row).all() for row in first.weights.values())
    with pytest.raises(FloatingPointError, match=r"at step 1 of the learning .* is nan; lower"):
        next(steps)


def test_adapters_that_predict_nothing_are_not_the_learning_rates_fault(ranker: Ranker) -> None:
    adapters = [random_adapter(1), scaled(random_adapter(2), float("nan"))]
    with pytest.raises(FloatingPointError, match="equal mix is nan; check the training losses"):
        next(learn_weights(ranker, adapters, PROMPTS, plain("entropy"), seed=0))


def plain(objective: str, **settings: object) -> LearnedMix:
    return LearnedMix.model_validate({"objective": objective, "batch_size": 8, **settings})


TARGETS = (1, 2, 3, 4, 5, 6, 8, 9)  # 0 and 7 are in the history
CLICKS = [replace(prompt, target=at) for prompt, at in zip(PROMPTS, TARGETS, strict=True)]
ALL_COUNT = {"anchored": {"max_entropy_share": 1.0}}
CALIBRATION = CalibratedScore(0.7, 0.4, np.linspace(0.0, 2.0, len(TITLES)))
KINDS: list[dict[str, object]] = [
    {"objective": "entropy", "score": "calibrated"},
    {"objective": "entropy", "over": "catalogue"},
    {"objective": "vocabulary_entropy", "num_tokens": 3},
    {"objective": "anchored", "max_entropy_share": 0.9},
    {"objective": "anchored", "over": "catalogue", "score": "calibrated"},
    {"objective": "distillation"},
    {"objective": "clicks", "score": "calibrated"},
    {"objective": "clicks", "over": "catalogue"},
]


def name_of(kind: dict[str, object]) -> str:
    return "-".join(str(value) for value in kind.values())


def learn(
    ranker: Ranker,
    adapters: Sequence[Adapter],
    prompts: Sequence[UnlabeledPrompt],
    config: LearnedMix,
    micro_batch_size: int | None = None,
) -> list[WeightingStep]:
    return list(
        learn_weights(
            ranker,
            adapters,
            prompts,
            config,
            seed=0,
            with_prior=True,
            micro_batch_size=micro_batch_size,
            calibration=CALIBRATION,
        )
    )


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_every_objective_in_parts_and_in_any_order_of_adapters(
    ranker: Ranker, kind: dict[str, object]
) -> None:
    adapters = [random_adapter(1), scaled(random_adapter(2), 2.0), random_adapter(3)]
    config = LearnedMix.model_validate({"num_epochs": 2, "batch_size": 5, **kind})
    whole = learn(ranker, adapters, CLICKS, config)
    assert whole[-1].objective != whole[0].objective
    assert {row.index(max(row)) for row in whole[-1].weights.values()} != {0}
    parts = learn(ranker, adapters, CLICKS, config, micro_batch_size=2)
    turned = learn(ranker, adapters[::-1], CLICKS, config)
    for expected, part, other in zip(whole, parts, turned, strict=True):
        for field in ("entropy", "objective", "mean_prediction_entropy", "num_reliable"):
            assert getattr(part, field) == pytest.approx(getattr(expected, field), abs=1e-4)
            assert getattr(other, field) == pytest.approx(getattr(expected, field), abs=1e-4)
        for name, row in expected.weights.items():
            assert sum(row) == pytest.approx(1.0, abs=1e-6)
            assert part.weights[name] == pytest.approx(row, abs=2e-3)
            assert other.weights[name][::-1] == pytest.approx(row, abs=2e-3)


@pytest.mark.parametrize("kind", [k for k in KINDS if k["objective"] != "clicks"], ids=name_of)
def test_labels_are_not_read(ranker: Ranker, kind: dict[str, object]) -> None:
    adapters = [random_adapter(1), random_adapter(2)]
    config = LearnedMix.model_validate({"num_epochs": 1, "batch_size": 4, **kind})
    others = [replace(prompt, target=11 - place) for place, prompt in enumerate(PROMPTS)]
    expected = learn(ranker, adapters, PROMPTS, config)
    assert learn(ranker, adapters, CLICKS, config) == expected
    assert learn(ranker, adapters, others, config) == expected


def test_clicks_are_read_where_they_are_the_objective(ranker: Ranker) -> None:
    adapters = [random_adapter(1), random_adapter(2)]
    (step,) = learn(ranker, adapters, CLICKS, plain("clicks", num_epochs=1))
    mix = AdapterMix(adapters)
    with torch.no_grad(), ranker.lm.using(mix.with_weights(torch.full((len(mix.modules), 2), 0.5))):
        scores = ranker.log_likelihoods(
            [p.history for p in CLICKS], [p.candidates for p in CLICKS], with_prior=True
        )
    losses = [-float(s.log_softmax(-1)[p.target]) for s, p in zip(scores, CLICKS, strict=True)]
    assert step.objective == pytest.approx(np.mean(losses), abs=1e-4)


@pytest.mark.parametrize("objective", ["anchored", "distillation"])
def test_objectives_with_anchors_by_another_path(ranker: Ranker, objective: str) -> None:
    adapters = [random_adapter(1), random_adapter(2)]
    config = plain(objective, num_epochs=1, **ALL_COUNT.get(objective, {}))
    (step,) = learn(ranker, adapters, PROMPTS, config)
    mix = AdapterMix(adapters)
    found = []
    for row in ([0.5, 0.5], [1.0, 0.0], [0.0, 1.0]):
        weights = torch.tensor([row] * len(mix.modules))
        with torch.no_grad(), ranker.lm.using(mix.with_weights(weights)):
            scores = ranker.log_likelihoods(
                [p.history for p in PROMPTS], [p.candidates for p in PROMPTS], with_prior=True
            )
        found.append(torch.stack(scores).double().softmax(-1))
    p, *single = found  # (X, O) each

    def kl(q: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return (q * (q / r).log()).sum(-1)

    if objective == "distillation":
        expected = torch.stack([kl(q, p) for q in single]).mean()
    else:
        halves = [(p + q) / 2 for q in single]
        distances = [(kl(p, m) + kl(q, m)) / 2 for q, m in zip(single, halves, strict=True)]
        mean = p.mean(0)
        expected = (
            -(p * p.log()).sum(-1).mean()
            + torch.stack(distances).mean()
            + (mean * mean.log()).sum()
        )
    assert step.objective == pytest.approx(float(expected), abs=1e-4)
    assert step.entropy == pytest.approx(float(-(p * p.log()).sum(-1).mean()), abs=1e-4)


@pytest.mark.parametrize("granularity", ["model", "layer", "projection", "linear"])
def test_weights_are_equal_within_a_group(ranker: Ranker, granularity: str) -> None:
    adapters = [random_adapter(1), random_adapter(2)]
    config = plain("entropy", granularity=granularity, num_epochs=3, learning_rate=0.3)
    weights = learn(ranker, adapters, PROMPTS, config)[-1].weights
    keys = {
        "model": lambda name: "",
        "layer": lambda name: name.split(".")[2],
        "projection": lambda name: name.split(".")[-1],
        "linear": lambda name: name,
    }
    groups: dict[str, set[tuple[float, ...]]] = {}
    for name, row in weights.items():
        groups.setdefault(keys[granularity](name), set()).add(tuple(row))
    assert {len(rows) for rows in groups.values()} == {1}
    assert len({row for rows in groups.values() for row in rows}) == len(groups)
    assert len(groups) == {"model": 1, "layer": 2, "projection": 3, "linear": 6}[granularity]


@pytest.mark.parametrize("objective", ["entropy", "anchored", "distillation", "clicks"])
def test_a_step_of_gradient_descent_is_the_slope(ranker: Ranker, objective: str) -> None:
    """With free weights and SGD at rate 1 the first step is the slope itself, measured here."""
    adapters = [random_adapter(1), random_adapter(2)]
    common: dict[str, object] = {
        "granularity": "layer",
        "parametrisation": "free",
        "optimizer": "sgd",
    }
    common |= ALL_COUNT.get(objective, {})
    config = plain(objective, num_epochs=1, learning_rate=1.0, **common)
    (step,) = learn(ranker, adapters, CLICKS, config)
    rows = {name.split(".")[2]: row for name, row in step.weights.items()}
    # Shifted adapters at the uniform start are the shifted weights: b (1 + 2 d) at 1/2 is 1/2 + d.
    for layer in ("0", "1"):
        for k in (0, 1):
            losses = []
            for shift in (0.01, -0.01):
                moved = [
                    Adapter(
                        {
                            name: replace(pair, scale=pair.scale * (1 + 2 * shift))
                            if j == k and name.split(".")[2] == layer
                            else pair
                            for name, pair in adapter.modules.items()
                        }
                    )
                    for j, adapter in enumerate(adapters)
                ]
                losses.append(objective_of(ranker, moved, adapters, objective))
            slope = (losses[0] - losses[1]) / 0.02
            assert 0.5 - rows[layer][k] == pytest.approx(slope, rel=0.05, abs=5e-3)


def objective_of(
    ranker: Ranker, moved: list[Adapter], anchors: list[Adapter], objective: str
) -> float:
    def predict(adapters: list[Adapter], weight: float) -> torch.Tensor:
        mix = AdapterMix(adapters)
        weights = torch.full((len(mix.modules), len(adapters)), weight)
        with torch.no_grad(), ranker.lm.using(mix.with_weights(weights)):
            scores = ranker.log_likelihoods(
                [p.history for p in CLICKS], [p.candidates for p in CLICKS], with_prior=True
            )
        return torch.stack(scores).double().log_softmax(-1)

    log_p = predict(moved, 0.5)
    single = torch.stack([predict([anchor], 1.0) for anchor in anchors])  # (K, X, O)
    if objective == "clicks":
        return float(-log_p[torch.arange(8), [p.target for p in CLICKS]].mean())
    if objective == "distillation":
        return float((single.exp() * (single - log_p)).sum(-1).mean())
    sure = -(log_p.exp() * log_p).sum(-1).mean()
    if objective == "entropy":
        return float(sure)
    log_mean = ((single.exp() + log_p.exp()) / 2).log()
    near = (single.exp() * (single - log_mean) + log_p.exp() * (log_p - log_mean)).sum(-1) / 2
    mean = log_p.exp().mean(0)
    return float(sure + near.mean() + (mean * mean.log()).sum())


def test_pull_is_towards_the_start(ranker: Ranker) -> None:
    """The second step differs by the rate times twice the way of the first; the first does not."""
    adapters = [random_adapter(1), random_adapter(2)]
    common = {"parametrisation": "free", "optimizer": "sgd", "learning_rate": 0.1, "num_epochs": 2}
    first, second = learn(ranker, adapters, PROMPTS, plain("entropy", **common))
    pulled = learn(ranker, adapters, PROMPTS, plain("entropy", pull=0.8, **common))
    assert pulled[0] == first
    gap = 0.0
    for name, row in first.weights.items():
        for k, weight in enumerate(row):
            expected = second.weights[name][k] - 0.1 * 2 * 0.8 * (weight - 0.5)
            assert pulled[1].weights[name][k] == pytest.approx(expected, abs=1e-6)
            gap += (weight - 0.5) ** 2
    assert gap > 1e-5
    assert pulled[1].objective == pytest.approx(second.objective + 0.8 * gap, abs=1e-5)


def test_one_adapter_at_weight_one(ranker: Ranker) -> None:
    (*_, last) = learn(ranker, [random_adapter(1)], PROMPTS, plain("anchored", num_epochs=2))
    assert set(map(tuple, last.weights.values())) == {(1.0,)}


@pytest.mark.parametrize("parametrisation", ["softmax", "sigmoid", "free"])
def test_a_sequence_of_adapters_some_of_which_lack_layers(
    ranker: Ranker, parametrisation: str
) -> None:
    adapters = [random_adapter(1), random_adapter(2, rank=5), random_adapter(3, layers=1)]
    config = plain("entropy", parametrisation=parametrisation, num_epochs=6, learning_rate=0.05)
    steps = learn(ranker, adapters, PROMPTS, config)
    assert steps[-1].objective < steps[0].objective
    assert len(steps[-1].weights) == 6
    rows = [weight for row in steps[-1].weights.values() for weight in row]
    if parametrisation != "free":
        assert min(rows) > 0.0
        assert max(rows) < 1.0
    # Nothing hangs on the weight of an adapter in a layer that it lacks, if weights are apart.
    if parametrisation != "softmax":
        for name, row in steps[-1].weights.items():
            assert (row[2] == pytest.approx(1 / 3, abs=1e-6)) == (".layers.1." in name)


@pytest.mark.parametrize(
    ("settings", "style", "message"),
    [
        ({"objective": "clicks"}, "sequence", "next item is known"),
        ({"objective": "vocabulary_entropy", "over": "catalogue"}, "sequence", "leave out `over`"),
        ({"over": "catalogue"}, "instruct", "`style: instruct`"),
        ({"score": "calibrated"}, "sequence", "`score: calibrated`"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    ranker: Ranker, settings: dict[str, str], style: Style, message: str
) -> None:
    renderer = PromptRenderer(ranker.lm.tokenizer, style)
    other = Ranker(ranker.lm, "tools", TITLES, np.ones(len(TITLES)), renderer)
    config = LearnedMix().model_copy(update=settings)  # past what the file's own check refuses
    with pytest.raises(ValueError, match=message):
        next(learn_weights(other, [random_adapter(1)], PROMPTS, config, seed=0))


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2], KINDS[4]], ids=name_of)
def test_layers_below_the_first_adapted_one_are_shared(
    ranker: Ranker, kind: dict[str, object]
) -> None:
    """Adapters that do nothing in the first layer, or are not there: one of both shares it."""
    lower = [random_adapter(seed) for seed in (1, 2)]
    upper = [
        Adapter({n: pair for n, pair in adapter.modules.items() if ".layers.1." in n})
        for adapter in lower
    ]
    idle = [
        Adapter(
            {
                n: pair if n in above.modules else replace(pair, b=torch.zeros_like(pair.b))
                for n, pair in adapter.modules.items()
            }
        )
        for adapter, above in zip(lower, upper, strict=True)
    ]
    config = LearnedMix.model_validate({"num_epochs": 2, "batch_size": 5, **kind})
    shared, whole = (learn(ranker, adapters, CLICKS, config) for adapters in (upper, idle))
    for one, other in zip(shared, whole, strict=True):
        assert one.objective == pytest.approx(other.objective, abs=1e-4)
        for name, row in one.weights.items():
            assert row == pytest.approx(other.weights[name], abs=2e-3)
    assert any(abs(row[0] - 0.5) > 0.05 for row in shared[-1].weights.values())
