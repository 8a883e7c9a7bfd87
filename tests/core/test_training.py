"""The loss against its definition, and the plan's promises: seed and step decide the batch."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from rc_ray.core.batches import Batch, Example, pack
from rc_ray.core.domains import Domain
from rc_ray.core.loading import load_language_model
from rc_ray.core.model import LanguageModel
from rc_ray.core.prompts import PromptRenderer
from rc_ray.core.trainable_lora import with_lora
from rc_ray.core.training import TorchEngine, TrainingModule, train_steps
from rc_ray.core.training_plan import TrainingPlan
from rc_ray.training_config import LoraConfig, TrainingConfig
from tests.tiny import make_model

TITLES = ("Red Lamp", "Red River", "Blue Lamp", "Old Piano", "Old Pond", "Tin", "Tiny Window")
HISTORIES = ((0, 1, 2), (3, 4, 5, 6, 0, 1), (2, 5), (6, 3, 1, 0), (4,))


def make_domain(name: str = "tools") -> Domain:
    return Domain(
        name=name,
        item_ids=tuple(f"i{i}" for i in range(len(TITLES))),
        titles=TITLES,
        num_train=np.array([3, 3, 2, 2, 1, 2, 2]),
        cold=np.zeros(len(TITLES), dtype=bool),
        train=HISTORIES,
    )


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def lm(model_folder: Path) -> LanguageModel:
    return load_language_model(model_folder, torch.float32)


def make_plan(lm: LanguageModel, **settings: object) -> TrainingPlan:
    config = TrainingConfig.model_validate(
        {"batch_size": 4, "num_steps": 5, "lora": {"rank": 2, "alpha": 4}, **settings}
    )
    return TrainingPlan(
        [make_domain()], PromptRenderer(lm.tokenizer, config.style), config, seed=5, num_listed=3
    )


def plain_title_nll(
    lm: LanguageModel,
    tokens: list[int],
    start: int,
    item: int,
    chosen: list[int],
    *,
    with_prior: bool,
) -> float:
    """By definition: at each token, the softmax over what titles of equal beginning go on with."""
    titles = [PromptRenderer(lm.tokenizer).title(title) for title in TITLES]
    weights = make_domain().num_train + 1.0
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([tokens])).logits[0].double()
    total = 0.0
    for depth, token in enumerate(titles[item]):
        alike = [i for i, t in enumerate(titles) if t[:depth] == titles[item][:depth]]
        alike = [i for i in alike if i not in chosen]
        children = sorted({titles[i][depth] for i in alike})
        values = logits[start - 1 + depth][children]
        if with_prior:
            mass = [sum(weights[i] for i in alike if titles[i][depth] == c) for c in children]
            values = values + torch.tensor(mass).log()
        total -= float(torch.log_softmax(values, dim=-1)[children.index(token)])
    return total


@pytest.mark.parametrize("prior", [False, True])
def test_loss_is_the_mean_over_titles(lm: LanguageModel, prior: bool) -> None:
    plan = make_plan(lm, prior_in_loss=prior, max_titles=3)
    examples = plan.examples(0)
    assert any(example.earlier for example in examples)
    expected = [
        plain_title_nll(
            lm,
            list(example.tokens),
            start,
            item,
            [*example.earlier, *(i for i, _ in example.titles[:place])],
            with_prior=prior,
        )
        for example in examples
        for place, (item, start) in enumerate(example.titles)
    ]
    model = with_lora(lm.model, plan.config.lora, seed=0)  # B is zero: the base's own prediction
    (batch,) = plan.batches(0)
    loss = TrainingModule(model, plan.tries, plan.config)(batch)
    assert batch.num_titles == batch.num_global_titles == len(expected)
    assert loss.item() == pytest.approx(np.mean(expected), abs=1e-4)


def test_packing_changes_nothing(lm: LanguageModel) -> None:
    plan = make_plan(lm)
    examples = []
    for history in ((3, 4, 5, 6, 0, 1, 2), (2,), (5,), (6, 3)):
        tokens, titles = plan.renderer.header("x"), []
        for item in history:
            titles.append((item, len(tokens)))
            tokens += plan.title_tokens["tools"][item]
        examples.append(Example("tools", tuple(tokens), tuple(titles)))
    packed = pack(examples, plan.tries, plan.title_tokens)
    assert packed.input_ids.shape[0] < len(examples)
    assert packed.mask is not None
    model = TrainingModule(with_lora(lm.model, plan.config.lora, 0), plan.tries, plan.config)

    def total(batch: Batch) -> float:
        return model(replace(batch, num_global_titles=1)).item()

    alone = sum(total(pack([e], plan.tries, plan.title_tokens)) for e in examples)
    assert total(packed) == pytest.approx(alone, rel=1e-5)


def test_brief_examples_hold_cut_titles(lm: LanguageModel) -> None:
    plan = make_plan(lm, style="brief")
    shown = {"Red Lamp": "Red L", "Old Piano": "Old Pi", "Tin": "Tin", "Tiny Window": "Tiny"}
    for title, text in shown.items():
        tokens = plan.shown["tools"][TITLES.index(title)]
        assert lm.tokenizer.decode(tokens) == text + "\n"
    model = with_lora(lm.model, plan.config.lora, seed=0)
    (batch,) = plan.batches(0)
    assert torch.isfinite(TrainingModule(model, plan.tries, plan.config)(batch))
    last = [example.tokens[-1] for example in plan.examples(0)]
    assert set(last) == set(plan.renderer.terminator)


@pytest.mark.parametrize("style", ["sequence", "brief", "instruct"])
def test_workers_share_the_global_batch(lm: LanguageModel, style: str) -> None:
    plan = make_plan(lm, style=style)
    model = TrainingModule(
        with_lora(lm.model, plan.config.lora, 0), plan.tries, plan.config, world_size=2
    )
    for step in range(3):
        (whole,) = plan.batches(step)
        shares = [share for rank in range(2) for share in plan.batches(step, rank, 2)]
        assert sum(share.num_tokens for share in shares) == whole.num_tokens
        # Engines average gradients over workers, so the mean of the shares must be the loss.
        mean = sum(model(share).item() for share in shares) / 2
        model.world_size = 1
        assert mean == pytest.approx(model(whole).item(), rel=1e-5)
        model.world_size = 2


def test_batches_depend_on_seed_and_step_alone(lm: LanguageModel) -> None:
    first, second = make_plan(lm), make_plan(lm)
    for step in (7, 0, 3):  # in any order, as after a resume
        assert first.examples(step) == second.examples(step)
    assert first.examples(0) != first.examples(1)


def test_an_epoch_sees_every_history_once(lm: LanguageModel) -> None:
    plan = make_plan(lm, batch_size=2)
    assert plan.num_histories == 4  # the history of one title teaches nothing
    seen = [e.titles for step in range(2) for e in plan.examples(step)]
    assert len(set(seen)) == 4


def test_long_histories_are_cropped_to_consecutive_titles(lm: LanguageModel) -> None:
    plan = make_plan(lm, max_titles=3)
    for step in range(20):
        for example in plan.examples(step):
            items = tuple(item for item, _ in example.titles)
            assert len(items) <= 3
            assert any(
                items == history[i : i + len(items)] and example.earlier == history[:i]
                for history in HISTORIES
                for i in range(len(history))
            )


def test_token_limit_drops_the_oldest_titles(lm: LanguageModel) -> None:
    plan = make_plan(lm, max_tokens=55)
    for step in range(10):
        for example in plan.examples(step):
            assert len(example.tokens) <= 55
            assert example.titles
            whole = (*example.earlier, *(item for item, _ in example.titles))
            assert whole in HISTORIES  # what was dropped still cannot come again


def test_instruct_example_answers_with_a_listed_title(lm: LanguageModel) -> None:
    plan = make_plan(lm, style="instruct")
    for step in range(5):
        for example in plan.examples(step):
            ((item, start),) = example.titles
            text = lm.tokenizer.decode(example.tokens)
            prompt = lm.tokenizer.decode(example.tokens[:start])
            assert text == prompt + TITLES[item] + "<|im_end|>"
            listed = prompt.split("Candidates: ")[1].split("\n")[0].split(" || ")
            assert len(listed) in (1 + 3, 1 + 1)  # who chose six of seven titles leaves one more
            history = prompt.split("in this order: ")[1].split("\n")[0].split(" || ")
            assert TITLES[item] in listed
            assert not set(history) & set(listed)


def test_instruct_lists_no_title_that_is_held_out_here_or_elsewhere(lm: LanguageModel) -> None:
    """Of seven titles `Old Pond` is cold, and another domain holds out `Tin`; neither trains."""
    histories = ((0, 1, 2), (3, 6, 0, 1), (6, 3, 1, 0))
    config = TrainingConfig(style="instruct", batch_size=4, num_steps=5)

    def shown(**flags: int) -> set[str]:
        masks = {name: np.arange(len(TITLES)) == item for name, item in flags.items()}
        domain = replace(make_domain(), train=histories, **masks)
        renderer = PromptRenderer(lm.tokenizer, "instruct")
        plan = TrainingPlan([domain], renderer, config, seed=5, num_listed=7)
        texts = [lm.tokenizer.decode(one.tokens) for n in range(5) for one in plan.examples(n)]
        lines = [text.split("Candidates: ")[1].split("\n")[0] for text in texts]
        return {title for line in lines for title in line.split(" || ")}

    assert shown() == set(TITLES)
    assert shown(cold=4, held_out_elsewhere=5) == set(TITLES) - {"Old Pond", "Tin"}


def test_vocabulary_loss_is_the_usual_cross_entropy(lm: LanguageModel) -> None:
    plan = make_plan(lm, style="instruct", loss="vocabulary")
    examples = plan.examples(0)
    losses, count = 0.0, 0
    for example in examples:
        ((_, start),) = example.titles
        labels = torch.tensor([[-100] * start + list(example.tokens[start:])])
        with torch.no_grad():
            output = lm.model(input_ids=torch.tensor([example.tokens]), labels=labels)
        size = len(example.tokens) - start
        losses, count = losses + float(output.loss) * size, count + size
    module = TrainingModule(with_lora(lm.model, plan.config.lora, 0), plan.tries, plan.config)
    (batch,) = plan.batches(0)
    assert module(batch).item() == pytest.approx(losses / count, rel=1e-5)


@pytest.mark.parametrize("style", ["sequence", "instruct"])
def test_training_learns(lm: LanguageModel, style: str) -> None:
    config = make_plan(
        lm, style=style, num_steps=40, learning_rate=2e-2, prior_in_loss=False
    ).config
    domain = replace(make_domain(), train=((0, 1), (6, 4)))
    plan = TrainingPlan([domain], PromptRenderer(lm.tokenizer, style), config, seed=5, num_listed=3)
    module = TrainingModule(with_lora(lm.model, plan.config.lora, 0), plan.tries, plan.config)
    engine = TorchEngine(module, plan.config)
    steps = list(
        train_steps(
            engine,
            plan,
            device=torch.device("cpu"),
            learning_rate=lambda: engine.optimizer.param_groups[0]["lr"],
        )
    )
    losses = [step["loss"] for step in steps]
    assert [step["step"] for step in steps] == list(range(40))
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    rates = [step["learning_rate"] for step in steps]
    assert rates[0] == pytest.approx(1e-2)  # first of two warm-up steps
    assert rates[2] == pytest.approx(2e-2)
    assert rates[-1] == pytest.approx(2e-3, rel=0.2)  # a tenth of the peak
    frozen = [p for n, p in module.named_parameters() if "lora_" not in n]
    assert not any(p.requires_grad for p in frozen)


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize(("style", "loss"), [("sequence", "trie"), ("instruct", "vocabulary")])
def test_a_step_in_parts_is_the_whole_step(
    model_folder: Path, style: str, loss: str, micro_batch_size: int
) -> None:
    curves, gradients, adapters = [], [], []
    for size in (None, micro_batch_size):
        lm = load_language_model(model_folder, torch.float32)
        plan = make_plan(lm, style=style, loss=loss, learning_rate=1e-2, micro_batch_size=size)
        module = TrainingModule(with_lora(lm.model, plan.config.lora, 0), plan.tries, plan.config)
        engine = TorchEngine(module, plan.config)
        parts = plan.batches(0)
        assert len(parts) == (1 if size is None else 4 // size)
        for part in parts:
            engine.backward(engine(part) * len(parts))
        # Adam forgives a wrong scale, so the gradients are compared themselves.
        gradients.append([p.grad.clone() for p in engine.parameters])
        engine.optimizer.zero_grad()
        steps = list(
            train_steps(
                engine,
                plan,
                device=torch.device("cpu"),
                learning_rate=lambda engine=engine: engine.schedule.get_last_lr()[0],
            )
        )
        curves.append(
            [[step[key] for step in steps] for key in ("loss", "num_titles", "num_tokens")]
        )
        adapters.append([p.detach() for p in engine.parameters])
    np.testing.assert_allclose(curves[1], curves[0], atol=1e-5, rtol=0)
    for expected, got in (gradients, adapters):
        assert any(one.abs().max() > 1e-3 for one in got)
        for one, other in zip(expected, got, strict=True):
            torch.testing.assert_close(other, one, atol=1e-5, rtol=0)


def test_no_history_is_refused(lm: LanguageModel) -> None:
    domain = replace(make_domain(), train=((1,), (2,)))
    with pytest.raises(ValueError, match="two titles or more"):
        TrainingPlan([domain], PromptRenderer(lm.tokenizer), TrainingConfig(), seed=0, num_listed=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"target_modules": ["q_proj", "w9"]}, "names w9"), ({"first_layer": 2}, "has 2 layers")],
)
def test_lora_settings_that_fit_no_model_are_refused(
    lm: LanguageModel, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        with_lora(lm.model, LoraConfig.model_validate(settings), seed=0)


def test_a_domain_keeps_its_share_however_small_it_is(lm: LanguageModel) -> None:
    few = replace(make_domain(), train=((0, 1), (1, 2), (2, 3)))
    many = [replace(make_domain(), name=name, train=((3, 1),) * 7) for name in ("lamps", "rivers")]
    config = TrainingConfig(batch_size=6, num_steps=5)
    plan = TrainingPlan(
        [few, *many],
        PromptRenderer(lm.tokenizer),
        config,
        seed=5,
        num_listed=3,
        own_share=Fraction(2, 5),
    )
    assert plan.num_histories == 17
    drawn = [
        (example.catalogue, tuple(item for item, _ in example.titles))
        for step in range(5)
        for example in plan.examples(step)
    ]
    own = [name == few.name for name, _ in drawn]
    # floor(n * 2 / 5) of the first n: the third and the fifth of every five.
    assert own == [False, False, True, False, True] * 6
    histories = [titles for name, titles in drawn if name == few.name]
    for start in range(0, 12, 3):  # each epoch of its own has every history once
        assert sorted(histories[start : start + 3]) == [(0, 1), (1, 2), (2, 3)]
    others = [name for name, _ in drawn if name != few.name]
    assert others[:14].count("lamps") == others[:14].count("rivers") == 7
    with pytest.raises(ValueError, match="two titles or more"):
        TrainingPlan([few], plan.renderer, config, seed=5, num_listed=3, own_share=Fraction(1, 2))
