"""Whom the guard asks, and how it scores them."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rc_ray import mixing
from rc_ray.artifacts import RunFolder
from rc_ray.config import EvaluateConfig, Experiment
from rc_ray.core.adapters import Adapter
from rc_ray.core.domains import RankingCase
from rc_ray.core.ranking import Ranker
from rc_ray.guard import read_guard
from rc_ray.guard_scores import judge, score_systems
from rc_ray.merge_plan import make_order
from rc_ray.merge_prompts import guard_cases, prompts_for
from rc_ray.open_domain import OpenDomain
from rc_ray.serve.calibration import open_calibration
from tests.conftest import Factory
from tests.core.small_catalogue import TITLES, make_ranker
from tests.core.test_model import random_adapter
from tests.test_merge_search import BOTH, with_adapters

NUM_ITEMS = len(TITLES)
ADAPTERS = {"cocktail": random_adapter(0), "uniform": random_adapter(1)}


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Ranker:
    return make_ranker(tmp_path_factory.mktemp("model"))


def cases_of(num_users: int) -> list[RankingCase]:
    """Histories of one to five titles; each list goes on where the history ends."""
    found = []
    for user in range(num_users):
        history = tuple((user + step) % NUM_ITEMS for step in range(1 + user % 5))
        listed = tuple((history[-1] + step) % NUM_ITEMS for step in range(1, 9))
        found.append(RankingCase(f"u{user}", history, listed[user % 8], listed))
    return found


def test_batches_of_users_score_as_all_at_once(
    ranker: Ranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard's 16 users are held at once, and the catalogue by itself."""
    held = []
    original = Ranker.prepare

    def prepare(self: Ranker, histories: Any, candidates: Any, **settings: Any) -> Any:
        held.append((len(histories), max(map(len, candidates))))
        return original(self, histories, candidates, **settings)

    monkeypatch.setattr(Ranker, "prepare", prepare)
    cases = cases_of(35)
    found = score_systems(ranker, ADAPTERS, cases)
    assert held == [(1, NUM_ITEMS), (16, 8), (16, 8), (3, 8)]
    at_once = score_systems(ranker, ADAPTERS, cases, users_per_batch=len(cases))
    assert held[4:] == [(1, NUM_ITEMS), (35, 8)]
    for name, scores in found.items():
        assert scores["empty"].shape == (1, 2, NUM_ITEMS)
        assert scores["valid"].shape == (35, 2, 8)
        for split, values in scores.items():
            np.testing.assert_allclose(values, at_once[name][split], rtol=0, atol=1e-6)
    assert np.abs(found["cocktail"]["valid"] - found["uniform"]["valid"]).max() > 0.1
    # One user alone, in the third batch, by the plain call.
    last = cases[34]
    with torch.no_grad(), ranker.lm.folded(ADAPTERS["uniform"]):
        for row, with_prior in enumerate((False, True)):
            (alone,) = ranker.log_likelihoods(
                [[TITLES[item] for item in last.history]], [last.candidates], with_prior=with_prior
            )
            assert found["uniform"]["valid"][34, row] == pytest.approx(alone.numpy(), abs=1e-5)


class HandMade:
    """A ranker whose answers are given: two candidates, by system, without and with the prior."""

    titles = ("A", "B")
    answers: dict[int, tuple[list[float], list[float]]]

    def __init__(self, *answers: tuple[Adapter, list[float], list[float]]) -> None:
        self.answers = {id(adapter): (plain, prior) for adapter, plain, prior in answers}
        self.lm = SimpleNamespace(folded=self._folded)

    def _folded(self, adapter: Adapter) -> AbstractContextManager[None]:
        @contextmanager
        def folded() -> Any:
            self.acting = id(adapter)
            yield

        return folded()

    def prepare(self, histories: Any, candidates: Any, **_: Any) -> int:
        return len(histories)

    def score(self, num_requests: int) -> list[torch.Tensor]:
        return [torch.tensor(self.answers[self.acting]).log() for _ in range(num_requests)]


@pytest.mark.parametrize("with_prior", [False, True])
def test_the_entropy_is_that_of_the_likelihood_as_it_was_learned(with_prior: bool) -> None:
    """Of shares 1/2, 1/2 it is log 2, of 1/4, 3/4 (from .2 and .6) it is 2 log 2 - 3/4 log 3.

    Alpha 1 takes the likelihood away altogether, so a calibrated one would be log 2 for all.
    """
    first, second = ADAPTERS.values()
    ranker = HandMade((first, [0.2, 0.6], [0.3, 0.3]), (second, [0.4, 0.4], [0.2, 0.6]))
    settings = {"alphas": [1.0], "gammas": [0.0], "prior_in_trie": [False]}
    found = judge(
        ranker,  # type: ignore[arg-type]
        ADAPTERS,
        [RankingCase(f"u{user}", (), 1, (0, 1)) for user in range(3)],
        np.log([0.5, 0.5]),
        EvaluateConfig.model_validate(settings),
        with_prior=with_prior,
        negatives="uniform",
    )
    even, uneven = math.log(2), 2 * math.log(2) - 0.75 * math.log(3)
    expected = (even, uneven) if with_prior else (uneven, even)
    for one, entropy in zip(found.values(), expected, strict=True):
        assert one.entropy == pytest.approx([entropy] * 3, abs=1e-6)
        assert one.chosen_by == "clicks"
        assert one.ndcg == pytest.approx([(1 + 1 / math.log2(3)) / 2] * 3)  # the two tie


@pytest.mark.parametrize(
    ("calibration", "chosen_by"),
    [
        ({"chosen_by": "unlabeled", "scope": "global"}, "unlabeled"),
        ({"chosen_by": "fixed", "alpha": 1.0, "gamma": 0.5, "prior_in_trie": True}, "fixed"),
    ],
)
def test_who_chose_a_calibration_is_told(calibration: dict[str, Any], chosen_by: str) -> None:
    adapter = ADAPTERS["cocktail"]
    found = judge(
        HandMade((adapter, [0.5, 0.5], [0.5, 0.5])),  # type: ignore[arg-type]
        {"cocktail": adapter},
        [RankingCase("u", (), 1, (0, 1))],
        np.log([0.5, 0.5]),
        EvaluateConfig.model_validate({"calibration": calibration}),
        with_prior=False,
        negatives="uniform",
    )
    assert found["cocktail"].chosen_by == chosen_by


def test_users_whose_histories_were_prompts_are_asked_last() -> None:
    """Seven users, of whom five were prompts."""
    cases = [RankingCase(f"u{user}", (0,), 1, (0, 1)) for user in range(7)]
    prompted = {f"u{user}" for user in range(5)}

    def asked(num_users: int) -> set[str]:
        found = [case.user_id for case in guard_cases(cases, num_users, 0, prompted)]
        assert len(found) == len(set(found))
        return set(found)

    assert asked(1) < {"u5", "u6"}
    assert asked(2) == {"u5", "u6"}
    assert asked(4) > {"u5", "u6"}
    assert len(asked(4)) == 4
    assert asked(9) == {case.user_id for case in cases}
    everybody = {case.user_id for case in cases}
    assert len(guard_cases(cases, 3, 0, everybody)) == 3


@pytest.mark.parametrize("search", [(), ("merge.search={granularity: [model, linear]}",)])
def test_the_guard_s_users_have_not_taught_the_weights(
    make_run: Factory, search: tuple[str, ...]
) -> None:
    """No test history of theirs, which ends with the validation click, is a prompt."""
    opened, experiment = opened_for(make_run, "merge.guard.num_valid_users=8", *search)
    lent = prompted_by(opened, experiment)
    assert len(lent) == 6
    asked = {case.user_id for case in opened.valid_cases}
    assert len(asked) == 8
    assert not asked & lent


def test_what_a_guard_used_is_named_for_what_it_is(make_run: Factory) -> None:
    """From the settings to what is served: everybody was a prompt, no click calibrates."""
    opened, experiment = opened_for(
        make_run,
        "merge.num_prompts=100",
        "merge.num_epochs=1",
        "evaluate.calibration={chosen_by: unlabeled, scope: global}",
    )
    asked = {case.user_id for case in opened.valid_cases}
    lent = prompted_by(opened, experiment)
    assert "error" not in mixing.mix_domain(opened.order)
    verdict = read_guard(RunFolder(experiment.run_dir).cocktail_dir("tools"))
    assert verdict is not None
    assert f"The test histories of {len(asked & lent)} of these users" in verdict.why
    assert "Each system was calibrated on this domain alone" in verdict.why
    assert verdict.calibrated.endswith("without their clicks.")
    for one in verdict.systems.values():
        assert 0.0 < one["entropy"] < math.log(10)  # of ten candidates
    served = open_calibration(experiment, "tools")
    assert (served.measured, served.chosen_by, served.scope) == (True, "unlabeled", "domain")
    assert served.alpha == verdict.systems[verdict.chosen]["alpha"]


def opened_for(make_run: Factory, *overrides: str) -> tuple[OpenDomain, Experiment]:
    settings = ("merge.prompts_of=scored_users", *overrides)
    experiment = with_adapters(make_run(*BOTH, *settings))
    order = make_order(experiment, RunFolder(experiment.run_dir), "tools")
    return OpenDomain({**order, "model_dir": experiment.model.path}), experiment


def prompted_by(opened: OpenDomain, experiment: Experiment) -> set[str]:
    """Users whose test history is one of the cocktail's prompts."""
    domain = opened.domain
    prompts = prompts_for(
        domain,
        experiment.merge,
        experiment.seed,
        num_test_users=experiment.evaluate.num_test_users,
        split_seed=experiment.split_seed,
    )
    histories = {prompt.history for prompt in prompts}
    valid = {case.user_id: case.target for case in domain.cases("valid", "warm")}
    found = set()
    for case in domain.cases("test", "warm"):
        if tuple(domain.titles[item] for item in case.history) in histories:
            assert valid[case.user_id] == case.history[-1]
            found.add(case.user_id)
    return found
