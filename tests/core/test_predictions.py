"""What a mix predicts: the trie's distribution, the calibrated score, and their slopes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from rc_ray.core import ranking
from rc_ray.core.domains import Domain
from rc_ray.core.histories import Histories
from rc_ray.core.model import AdapterMix
from rc_ray.core.objectives import Outcome, mean_entropy
from rc_ray.core.predictions import CalibratedScore, Predictions, PromptBatch, UnlabeledPrompt
from rc_ray.core.pseudo_users import pseudo_users
from rc_ray.core.ranking import Ranker
from rc_ray.merge_config import LearnedMix
from rc_ray.merge_prompts import prompts_for
from tests.core.small_catalogue import PROMPTS, TITLES, make_ranker
from tests.core.test_model import random_adapter

# "Old Lamp" is sold twice; a history of both titles with "Red La" spends a whole branching node.
DOUBLED = [*TITLES, "Old Lamp", "Red Larder"]
HISTORIES = [("Red Lamp", "Red Ladder", "Red Larder"), ("Blue River",), ()]


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Ranker:
    return make_ranker(tmp_path_factory.mktemp("model"), DOUBLED)


def batch_of(ranker: Ranker, prompts: list[UnlabeledPrompt], **settings: object) -> PromptBatch:
    plain = {
        "over_catalogue": False,
        "with_prior": False,
        "calibration": None,
        "micro_batch_size": None,
        "shared_layers": 0,
    }
    return PromptBatch(ranker, prompts, **{**plain, **settings})  # type: ignore[arg-type]


def entropy_of(found: Predictions) -> Outcome:
    return Outcome(mean_entropy(found.log_p), 0.0, 0.0, len(found.log_p))


def calibration(ranker: Ranker) -> CalibratedScore:
    prior = np.linspace(-1.0, 1.5, len(ranker.titles))
    return CalibratedScore(alpha=0.8, gamma=0.5, log_prior=prior)


@pytest.mark.parametrize("with_prior", [False, True])
def test_over_the_catalogue_it_is_the_tries_distribution(ranker: Ranker, with_prior: bool) -> None:
    """A candidate of a list of one is scored alone: the same number without any normalising."""
    prompts = [UnlabeledPrompt(history, (0,)) for history in HISTORIES]
    batch = batch_of(ranker, prompts, over_catalogue=True, with_prior=with_prior)
    assert batch.num_places == len(set(DOUBLED)) == 43
    found = batch.predict()
    titles = list(dict.fromkeys(DOUBLED))
    for history, log_p, places in zip(HISTORIES, found.log_p, found.places, strict=True):
        left = [title for title in titles if title not in history]
        assert sorted(titles[place] for place in places.tolist()) == sorted(left)
        alone = ranker.log_likelihoods(
            [history] * len(left),
            [[DOUBLED.index(titles[place])] for place in places.tolist()],
            with_prior=with_prior,
        )
        torch.testing.assert_close(log_p, torch.cat(alone), atol=1e-4, rtol=0)
        assert float(log_p.exp().sum()) == pytest.approx(1.0, abs=1e-5)


def test_titles_of_the_history_come_out_at_minus_infinity(ranker: Ranker) -> None:
    """Also below a node whose children are all taken: `Red La` has no title left."""
    (found,) = ranker.log_likelihoods([HISTORIES[0]], [range(len(DOUBLED))])
    taken = {item for item, title in enumerate(DOUBLED) if title in HISTORIES[0]}
    assert set(torch.isneginf(found).nonzero().flatten().tolist()) == taken
    assert not found.isnan().any()


@pytest.mark.parametrize("over_catalogue", [False, True])
def test_a_likelihood_that_is_no_number_is_no_certainty(
    ranker: Ranker, over_catalogue: bool
) -> None:
    """Every option stays, without a probability, also the history's, whose mask is lost in it."""
    mix = AdapterMix([random_adapter(1), random_adapter(2)])
    batch = batch_of(
        ranker, [UnlabeledPrompt(HISTORIES[1], (0, 1, 2))], over_catalogue=over_catalogue
    )
    with ranker.lm.using(mix.with_weights(torch.full((len(mix.modules), 2), torch.nan))):
        found = batch.predict()
    assert len(found.log_p[0]) == (43 if over_catalogue else 3)
    assert found.log_p[0].isnan().all()
    assert mean_entropy(found.log_p).isnan()


@pytest.mark.parametrize("over_catalogue", [False, True])
def test_calibrated_is_the_plain_formula(ranker: Ranker, over_catalogue: bool) -> None:
    score = calibration(ranker)
    found = batch_of(
        ranker, PROMPTS[:3], over_catalogue=over_catalogue, with_prior=True, calibration=score
    ).predict()
    empty = ranker.empty_log_likelihoods()[1]
    everything = range(len(DOUBLED))
    for prompt, log_p, places in zip(PROMPTS[:3], found.log_p, found.places, strict=True):
        asked = everything if over_catalogue else prompt.candidates
        (own,) = ranker.log_likelihoods([prompt.history], [asked], with_prior=True)
        scores = ranking.calibrated(
            own.numpy(),
            empty.numpy()[list(asked)],
            score.log_prior[list(asked)],
            alpha=0.8,
            gamma=0.5,
        )
        if over_catalogue:
            # The title that is sold twice is worth its better item: the second, by this prior.
            kept = [i for i, title in enumerate(DOUBLED) if i != DOUBLED.index("Old Lamp")]
            scores = scores[kept]
            scores = scores[np.isfinite(scores)]
            assert len(scores) == 41
        else:
            assert places.tolist() == list(range(12))
        expected = torch.from_numpy(scores).log_softmax(-1)
        torch.testing.assert_close(log_p.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("over_catalogue", [False, True])
@pytest.mark.parametrize("micro_batch_size", [None, 2])
@pytest.mark.parametrize("is_calibrated", [False, True])
def test_slopes_by_finite_differences(
    ranker: Ranker,
    monkeypatch: pytest.MonkeyPatch,
    over_catalogue: bool,
    micro_batch_size: int | None,
    is_calibrated: bool,
) -> None:
    """Whole or in parts, catalogues cut into rows, the empty history's term with its own slope."""
    if micro_batch_size is not None:
        monkeypatch.setattr(ranking, "MAX_TREE_NODES", 40)
    adapters = [random_adapter(1), random_adapter(2)]
    mix = AdapterMix(adapters)
    prompts = [PROMPTS[0], PROMPTS[4], UnlabeledPrompt(HISTORIES[0], (9, 5, 30))]
    batch = batch_of(
        ranker,
        prompts,
        over_catalogue=over_catalogue,
        calibration=calibration(ranker) if is_calibrated else None,
        micro_batch_size=micro_batch_size,
    )
    weights = torch.full((len(mix.modules), 2), 0.5)

    def loss(weights: Tensor) -> float:
        with ranker.lm.using(mix.with_weights(weights)):
            return float(mean_entropy(batch.predict().log_p))

    acting = weights.clone().requires_grad_(True)
    with ranker.lm.using(mix.with_weights(acting)):
        outcome = batch.backward(entropy_of, is_mean=True)
    assert acting.grad is not None
    assert outcome.loss.item() == pytest.approx(loss(weights), abs=1e-5)
    directions = torch.randn(4, *weights.shape, generator=torch.Generator().manual_seed(0))
    for direction in directions:
        step = 0.01 * direction
        measured = (loss(weights + step) - loss(weights - step)) / 0.02
        assert float((acting.grad * direction).sum()) == pytest.approx(measured, rel=0.03, abs=3e-3)


def test_made_up_users_are_the_catalogue_alone() -> None:
    users = pseudo_users(DOUBLED, 30, seed=3)
    assert users == pseudo_users(DOUBLED, 30, seed=3)
    assert users != pseudo_users(DOUBLED, 30, seed=4)
    assert len({user.history for user in users}) > 28  # different items, one title twice at most
    for user in users:
        (title,) = user.history
        assert user.target is None
        assert len(user.candidates) == len(set(user.candidates)) == 20
        assert title in DOUBLED
        assert title not in {DOUBLED[item] for item in user.candidates}
    assert len(pseudo_users(TITLES[:5], 99, seed=0)) == 5
    assert len(pseudo_users(TITLES[:5], 1, seed=0)[0].candidates) == 4
    with pytest.raises(ValueError, match="three titles"):
        pseudo_users(["A", "A", "B"], 3, seed=0)


def test_made_up_users_have_no_title_that_is_held_out() -> None:
    """Six titles of which three are cold: everybody has one of the others, and chooses of two."""
    cold = np.array([False, True, False, True, True, False])
    domain = Domain(
        name="shop",
        item_ids=tuple("abcdef"),
        titles=("A", "B", "C", "D", "E", "F"),
        num_train=np.zeros(6, dtype=np.int64),
        cold=cold,
        train=Histories.of([]),
    )
    config = LearnedMix(objective="distillation", num_prompts=99)
    users = prompts_for(domain, config, 5, num_test_users=None, split_seed=0)
    assert sorted((user.history, tuple(sorted(user.candidates))) for user in users) == [
        (("A",), (2, 5)),
        (("C",), (0, 5)),
        (("F",), (0, 2)),
    ]
    cold[0] = True
    with pytest.raises(ValueError, match="three titles or more that are not held out"):
        prompts_for(domain, config, 5, num_test_users=None, split_seed=0)


def test_targets_by_position_and_by_title(ranker: Ranker) -> None:
    twin = len(TITLES)  # the second "Old Lamp"
    prompts = [UnlabeledPrompt(("Blue River",), (3, twin, 7), target=1)]
    listed = batch_of(ranker, prompts)
    assert listed.target_indices(listed.predict()) == [1]
    whole = batch_of(ranker, prompts, over_catalogue=True)
    found = whole.predict()
    (at,) = whole.target_indices(found)
    (alone,) = ranker.log_likelihoods([("Blue River",)], [[twin]])
    assert float(found.log_p[0][at]) == pytest.approx(float(alone), abs=1e-4)
    known = replace(prompts[0], history=(DOUBLED[3],), target=0)
    again = batch_of(ranker, [known], over_catalogue=True)
    with pytest.raises(ValueError, match="in its history"):
        again.target_indices(again.predict())
