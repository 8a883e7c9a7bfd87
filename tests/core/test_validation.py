"""Validation loss against its definition, who is validated on, and when a run stops."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rc_ray.config import Experiment
from rc_ray.core.domains import Domain, RankingCase, read_domain
from rc_ray.core.loading import load_language_model
from rc_ray.core.model import LanguageModel
from rc_ray.core.prompts import PromptRenderer
from rc_ray.core.trainable_lora import with_lora
from rc_ray.core.training import TrainingModule
from rc_ray.core.training_plan import TrainingPlan
from rc_ray.core.validation import BestSoFar, HeldOutTitles
from rc_ray.curves import summary
from rc_ray.training_config import TrainingConfig
from tests.core.test_training import HISTORIES, make_domain

CASES = tuple(
    RankingCase(f"u{user}", history, target, (target, 6, 1))
    for user, (history, target) in enumerate(zip(HISTORIES, (3, 2, 0, 2, 5), strict=True))
)


def domain_with_cases() -> Domain:
    kinds: dict[Any, Any] = {
        ("valid", "warm", "scored"): CASES,
        ("valid", "warm", "unlabeled"): (RankingCase("secret", (0, 1), 6, (6, 2)),),
        ("test", "warm", "scored"): (RankingCase("u0", (0, 1, 2, 3), 6, (6, 2)),),
    }
    return replace(make_domain(), cases_by_kind=kinds)


@pytest.fixture(scope="module")
def lm(make_run) -> LanguageModel:
    return load_language_model(make_run().model.path, torch.float32)


def held_out(
    lm: LanguageModel, num: int = 64, **settings: object
) -> tuple[HeldOutTitles, TrainingModule]:
    config = TrainingConfig.model_validate(
        {"batch_size": 4, "lora": {"rank": 2, "alpha": 4, "dropout": 0.5}, **settings}
    )
    renderer = PromptRenderer(lm.tokenizer, config.style)
    plan = TrainingPlan([domain_with_cases()], renderer, config, seed=5, num_listed=3)
    peft_model = with_lora(lm.model, config.lora, 5)
    return HeldOutTitles(plan, num), TrainingModule(peft_model, plan.tries, config).eval()


@pytest.mark.parametrize("style", ["sequence", "instruct"])
def test_loss_is_the_mean_over_users_of_the_targets_nll(lm: LanguageModel, style: str) -> None:
    # Title by title with transformers' own forward pass and full-vocabulary softmax.
    held, module = held_out(lm, style=style, loss="vocabulary")
    plan = held.plan
    renderer, domain = plan.renderer, plan.domains["tools"]
    total, count = 0.0, 0
    for case in CASES:
        if style == "instruct":
            context = renderer.prompt(
                "tools",
                [domain.titles[item] for item in case.history],
                [domain.titles[item] for item in case.candidates],
            )
        else:
            context = renderer.header("tools")
            for item in case.history:
                context = [*context, *renderer.title(domain.titles[item])]
        answer = renderer.title(domain.titles[case.target])
        ids = torch.tensor([[*context, *answer]])
        with torch.no_grad():
            logits = lm.model(ids).logits[0, len(context) - 1 : -1].log_softmax(-1)
        total -= float(logits[range(len(answer)), torch.tensor(answer)].sum())
        count += len(answer)
    got = held.loss(module, torch.device("cpu"))
    module.model.unload()
    assert got == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"micro_batch_size": 1}, {"style": "brief"}])
def test_shares_of_workers_add_up_and_all_run_as_often(
    lm: LanguageModel, settings: dict[str, Any]
) -> None:
    held, module = held_out(lm, **settings)
    device = torch.device("cpu")
    alone = held.loss(module, device)
    assert alone > 0.1
    for world_size in (2, 3, 4):
        module.world_size = world_size
        shares = [held.loss(module, device, rank, world_size) for rank in range(world_size)]
        assert sum(shares) == pytest.approx(alone, rel=1e-5)
        numbers = {len(held.batches(rank, world_size)) for rank in range(world_size)}
        assert len(numbers) == 1
    module.model.unload()


def test_no_test_target_and_no_unlabeled_user_is_met(lm: LanguageModel) -> None:
    held, module = held_out(lm, max_titles=4)
    module.model.unload()
    targets = sorted(item for example in held.examples for item, _ in example.titles)
    assert targets == sorted(case.target for case in CASES)
    assert 6 not in targets
    few, module = held_out(lm, num=2)
    module.model.unload()
    assert len(few) == 2


def test_a_real_domain_gives_its_validation_users(make_run) -> None:
    experiment: Experiment = make_run()
    domain = read_domain(experiment.run_dir / "data" / "lamps")
    model = load_language_model(experiment.model.path, torch.float32)
    renderer = PromptRenderer(model.tokenizer, "sequence")
    plan = TrainingPlan([domain], renderer, TrainingConfig(), seed=1, num_listed=3)
    cases = domain.cases("valid", "warm", "scored")
    assert len(HeldOutTitles(plan, 10_000)) == len(cases) > 10


@pytest.mark.parametrize(
    ("own_share", "names"), [(None, {"tools", "lamps"}), (Fraction(1, 2), {"tools"})]
)
def test_a_domain_with_a_share_of_its_own_is_validated_alone(
    lm: LanguageModel, own_share: Fraction | None, names: set[str]
) -> None:
    """Five users of `tools` among forty: a joint sample would hardly know them."""
    own = domain_with_cases()
    kinds = {**own.cases_by_kind, ("valid", "warm", "scored"): CASES * 7}
    other = replace(own, name="lamps", cases_by_kind=kinds)
    plan = TrainingPlan(
        [own, other],
        PromptRenderer(lm.tokenizer),
        TrainingConfig(),
        seed=5,
        num_listed=3,
        own_share=own_share,
    )
    held = HeldOutTitles(plan, 20)
    assert {example.catalogue for example in held.examples} == names
    assert len(held) == (20 if own_share is None else 5)


def test_patience() -> None:
    best = BestSoFar()
    assert best.improves(2.0)
    assert not best.improves(float("nan"))
    best = BestSoFar(loss=2.0, num_since=1)
    assert not best.improves(2.0)
    assert best.improves(1.9)
    assert not best.exhausted(None)
    assert not best.exhausted(2)
    assert best.exhausted(1)
    with pytest.raises(ValidationError, match="`patience` counts validations; set `valid_every`"):
        TrainingConfig(patience=2)


def test_a_manifest_names_the_best_validation() -> None:
    rows: list[dict[str, Any]] = [
        {"step": step, "loss": 1.0, "seconds": 1.0, "num_tokens": 10} for step in range(6)
    ]
    assert "best_valid_loss" not in summary(rows)
    rows[1]["valid_loss"], rows[3]["valid_loss"], rows[5]["valid_loss"] = 0.9, 0.7, 0.8
    found = summary(rows)
    assert (found["best_valid_loss"], found["best_num_steps"]) == (0.7, 4)
    assert found["num_steps"] == 6
    rows[1]["valid_loss"] = float("nan")  # no number is below it
    assert summary(rows)["best_valid_loss"] == 0.7
    assert np.isclose(found["final_loss"], 1.0)
