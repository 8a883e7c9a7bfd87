"""Domains trained together against the same domains trained one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from rc_ray.core.adapters import Adapter, adapter_of
from rc_ray.core.batches import Batch, Example, pack
from rc_ray.core.domains import Domain
from rc_ray.core.joint_training import JointTraining, Part, make_member, passes
from rc_ray.core.loading import load_language_model
from rc_ray.core.lora_bank import LoraBank
from rc_ray.core.model import LanguageModel, decoder_hidden
from rc_ray.core.prompts import PromptRenderer
from rc_ray.core.trainable_lora import with_lora
from rc_ray.core.training import StepMetrics, TorchEngine, TrainingModule, train_steps
from rc_ray.core.training_plan import TrainingPlan
from rc_ray.core.trie import CatalogueTrie
from rc_ray.errors import ArtifactError
from rc_ray.training_config import LoraConfig, TrainingConfig
from tests.tiny import make_model

NUM_STEPS = 20
TITLES = {
    "short": ("Tin", "Tea", "Top", "Toe", "Ink", "Ice", "Oak"),
    "long": (
        "A Field Guide to the Lamps of the North",
        "A Field Guide to the Rivers of the South",
        "The Collected Letters of an Engine Driver",
        "The Collected Songs of an Old Piano",
        "Windows, Ladders and Other Ways Out",
        "A Short History of Nearly Every Garden",
        "Seven Essays on Tin",
    ),
    "middle": ("Red Lamp", "Red River", "Blue Lamp", "Old Piano", "Old Pond", "Tin", "Tiny Window"),
}
HISTORIES = {
    "short": ((0, 1, 2), (3, 4, 5, 6, 0, 1), (2, 5), (6, 3, 1, 0), (5, 4, 3)),
    "long": ((0, 1), (3, 4, 5), (2, 5, 6), (6, 3, 1, 0)),
    "middle": ((0, 1, 2, 3, 4, 5, 6), (2, 5), (6, 3)),
}


def make_domain(name: str) -> Domain:
    titles = TITLES[name]
    return Domain(
        name=name,
        item_ids=tuple(f"i{i}" for i in range(len(titles))),
        titles=titles,
        num_train=np.array([3, 3, 2, 2, 1, 2, 2]),
        cold=np.zeros(len(titles), dtype=bool),
        train=HISTORIES[name],
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def make_plan(lm: LanguageModel, name: str, **settings: object) -> TrainingPlan:
    config = TrainingConfig.model_validate(
        {
            "batch_size": 4,
            "num_steps": NUM_STEPS,
            "learning_rate": 5e-3,
            "lora": {"rank": 3, "alpha": 6},
            **settings,
        }
    )
    renderer = PromptRenderer(lm.tokenizer, config.style)
    return TrainingPlan([make_domain(name)], renderer, config, seed=5, num_listed=3)


def alone(folder: Path, name: str, **settings: object) -> tuple[list[StepMetrics], Adapter]:
    lm = load_language_model(folder, torch.float32)
    plan = make_plan(lm, name, **settings)
    model = with_lora(lm.model, plan.config.lora, plan.seed)
    engine = TorchEngine(TrainingModule(model, plan.tries, plan.config), plan.config)
    steps = train_steps(
        engine,
        plan,
        device=torch.device("cpu"),
        learning_rate=lambda: engine.schedule.get_last_lr()[0],
    )
    return list(steps), adapter_of(model)


def make_group(
    folder: Path, names: Sequence[str], tokens_per_pass: int, **settings: object
) -> JointTraining:
    lm = load_language_model(folder, torch.float32)
    plans = {name: make_plan(lm, name, **settings) for name in names}
    lora = plans[names[0]].config.lora
    bank = LoraBank(lm.model, lora, {name: plan.seed for name, plan in plans.items()})
    members = {name: make_member(lm, bank, name, plan) for name, plan in plans.items()}
    return JointTraining(lm, bank, members, tokens_per_pass=tokens_per_pass)


def run(group: JointTraining) -> dict[str, list[StepMetrics]]:
    rows: dict[str, list[StepMetrics]] = {name: [] for name in group.members}
    while group.active:
        for name, metrics in group.step().items():
            assert not isinstance(metrics, Exception)
            rows[name].append(metrics)
    return rows


def largest_difference(one: Adapter, other: Adapter) -> float:
    assert one.modules.keys() == other.modules.keys()
    assert all(pair.scale == other.modules[name].scale for name, pair in one.modules.items())
    return max(
        float((x - y).abs().max())
        for name, pair in one.modules.items()
        for x, y in (
            (pair.a, other.modules[name].a),
            (pair.b, other.modules[name].b),
        )
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "num_steps": 8,
            "style": "brief",
            "micro_batch_size": 2,
            "schedule": "linear",
            "weight_decay": 0.1,
        },
        {
            "style": "instruct",
            "loss": "vocabulary",
            "lora": {"rank": 2, "first_layer": 1},
            "activation_checkpointing": True,
            "num_steps": 8,
        },
    ],
)
def test_together_as_one_by_one(folder: Path, settings: dict[str, object]) -> None:
    wanted = {name: alone(folder, name, **settings) for name in TITLES}
    for tokens_per_pass in (1, 100_000):
        group = make_group(folder, list(TITLES), tokens_per_pass, **settings)
        parts = [
            group._part(name, batch)
            for name, member in group.members.items()
            for batch in member.plan.batches(0)
        ]
        sizes = [len(one) for one in passes(parts, tokens_per_pass)]
        assert set(sizes) == {1} if tokens_per_pass == 1 else max(sizes) > 1
        rows = run(group)
        for name, (steps, adapter) in wanted.items():
            for key in ("step", "num_titles", "num_tokens", "learning_rate"):
                assert [row[key] for row in rows[name]] == [row[key] for row in steps]
            np.testing.assert_allclose(
                [row["loss"] for row in rows[name]], [row["loss"] for row in steps], atol=1e-5
            )
            assert max(float(pair.b.abs().max()) for pair in adapter.modules.values()) > 1e-2
            assert largest_difference(group.bank.adapter(name), adapter) < 1e-5


def test_members_end_at_their_own_steps_and_a_failure_stands_apart(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = make_group(folder, list(TITLES), 100_000, num_steps=8)
    short = group.members["short"].plan
    short.config = short.config.model_copy(update={"num_steps": 5})
    original = group.members["long"].engine.module.loss

    def spoilt(hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        bad = torch.nan if group.members["long"].num_steps_done == 3 else 1.0
        return original(hidden * bad, batch)

    monkeypatch.setattr(group.members["long"].engine.module, "loss", spoilt)
    seen: dict[str, list[int]] = {name: [] for name in TITLES}
    while group.active:
        for name, metrics in group.step().items():
            assert not isinstance(metrics, Exception)
            seen[name].append(metrics["step"])
            if not np.isfinite(metrics["loss"]):
                group.drop(name)
    assert seen == {"short": list(range(5)), "long": list(range(4)), "middle": list(range(8))}
    _, adapter = alone(folder, "middle", num_steps=8)
    assert largest_difference(group.bank.adapter("middle"), adapter) < 1e-5


def test_a_domain_without_a_batch_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = make_group(folder, ["short", "middle"], 100_000, num_steps=2)

    def broken(step: int) -> list[Batch]:
        raise KeyError("a title is gone")

    monkeypatch.setattr(group.members["short"].plan, "batches", broken)
    found = group.step()
    assert isinstance(found["short"], KeyError)
    assert found["middle"]["loss"] > 0  # type: ignore[index]
    assert [group.members[name].num_steps_done for name in ("short", "middle")] == [0, 1]


def test_each_row_goes_through_its_own_adapter(folder: Path) -> None:
    lm = load_language_model(folder, torch.float32)
    tokens = torch.randint(3, 200, (5, 9), generator=torch.Generator().manual_seed(0))
    bare = decoder_hidden(lm.model, tokens).detach()
    bank = LoraBank(lm.model, LoraConfig(rank=2), {"x": 1, "y": 2})
    for name in ("x", "y"):
        generator = torch.Generator().manual_seed(ord(name))
        for matrix in bank.parameters(name):
            matrix.data = torch.randn(matrix.shape, generator=generator) * 0.1
    with bank.tokens([("y", 9), ("x", 27), ("y", 9)]):
        mixed = decoder_hidden(lm.model, tokens).detach()
    torch.testing.assert_close(decoder_hidden(lm.model, tokens), bare)
    adapters = {name: bank.adapter(name) for name in ("x", "y")}
    bank.unload()
    for name, rows in (("y", [0, 4]), ("x", [1, 2, 3])):
        with lm.folded(adapters[name]):
            wanted = decoder_hidden(lm.model, tokens[rows])
        assert (wanted - bare[rows]).abs().max() > 0.1
        torch.testing.assert_close(mixed[rows], wanted, atol=1e-4, rtol=1e-4)


def test_first_values_are_those_of_a_run_alone(folder: Path) -> None:
    lm = load_language_model(folder, torch.float32)
    config = LoraConfig(rank=2, target_modules=("q_proj", "down_proj"))
    bank = LoraBank(lm.model, config, {"x": 1, "y": 2, "z": 1})
    adapters = {name: bank.adapter(name) for name in "xyz"}
    bank.unload()
    for name, seed in (("x", 1), ("y", 2), ("z", 1)):
        model = with_lora(lm.model, config, seed)
        assert largest_difference(adapters[name], adapter_of(model)) == 0.0
        model.unload()
    assert largest_difference(adapters["x"], adapters["y"]) > 0.01


def test_what_does_not_fit_the_bank_is_refused(folder: Path) -> None:
    lm = load_language_model(folder, torch.float32)
    with pytest.raises(ValueError, match=r"set `lora.dropout` to 0"):
        LoraBank(lm.model, LoraConfig(dropout=0.1), {"x": 1})
    bank = LoraBank(lm.model, LoraConfig(rank=2), {"x": 1})
    wider = adapter_of(with_lora(load_language_model(folder, torch.float32).model, LoraConfig(), 0))
    with pytest.raises(ArtifactError, match=r"of x has a matrix of shape .*, expected \(2, "):
        bank.load("x", wider)


def test_a_model_without_packed_attention_takes_turns(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = make_group(folder, ["short", "middle"], 100_000, num_steps=4)
    for member in group.members.values():
        member.engine.module.is_packed = False
    run(group)
    for name in ("short", "middle"):
        _, adapter = alone(folder, name, num_steps=4)
        assert largest_difference(group.bank.adapter(name), adapter) < 1e-5


def part(name: str, num_tokens: int, *, is_packed: bool = True) -> Part:
    trie = CatalogueTrie([[4], [5]])
    example = Example(name, (*range(6, 5 + num_tokens), 4), ((0, num_tokens - 1),))
    return Part(name, pack([example], {name: trie}, {name: [[4], [5]]}).flattened(), is_packed)


def test_passes_fill_up_to_the_bound() -> None:
    parts = [part("a", 10), part("b", 20), part("c", 30), part("d", 5, is_packed=False)]

    def names(tokens_per_pass: int) -> list[list[str]]:
        return [[p.name for p in group] for group in passes(parts, tokens_per_pass)]

    assert names(60) == [["c", "b", "a"], ["d"]]
    assert names(40) == [["c", "a"], ["b"], ["d"]]
    assert names(1) == [["c"], ["b"], ["a"], ["d"]]  # each is larger by itself
