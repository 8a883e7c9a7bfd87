"""The benchmark of `prepare` doubles as a check of the data core by plain pandas."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from rc_ray.config import Experiment
from rc_ray.core.adapters import Adapter, LoraPair, save_adapter
from rc_ray.core.domains import Domain, RankingCase, read_domain
from rc_ray.core.loading import load_language_model
from rc_ray.core.splits import PURPOSES, Purpose
from rc_ray.training_config import LoraConfig, TrainingConfig
from tests.tiny import make_model

BENCHMARKS = Path(__file__).resolve().parents[1] / "jobs" / "benchmarks"
NUM_ROWS, NUM_USERS, NUM_ITEMS = 3000, 150, 250


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Prepared(NamedTuple):
    log: Path
    ours: Path
    pandas: Path
    our_counts: dict[str, int]
    pandas_counts: dict[str, int]

    @property
    def domain(self) -> Domain:
        return read_domain(self.ours)

    def cases(self, purpose: Purpose) -> dict[str, RankingCase]:
        cases = [
            *self.domain.cases(purpose, group="scored"),
            *self.domain.cases(purpose, group="unlabeled"),
        ]
        assert len({case.user_id for case in cases}) == len(cases)
        return {case.user_id: case for case in cases}


def prepared(folder: Path, *, ties: bool) -> Prepared:
    generate, prepare = load("generated_log").generate, load("prepare")
    generate(folder / "log", NUM_ROWS, NUM_USERS, NUM_ITEMS, ties=ties)
    paths = folder / "log", folder / "ours", folder / "pandas"
    return Prepared(
        *paths,
        our_counts=prepare.prepare_ours(paths[0], paths[1]),
        pandas_counts=prepare.prepare_pandas(paths[0], paths[2]),
    )


@pytest.fixture(scope="module")
def without_ties(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepared(tmp_path_factory.mktemp("without_ties"), ties=False)


@pytest.fixture(scope="module")
def with_ties(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepared(tmp_path_factory.mktemp("with_ties"), ties=True)


@pytest.mark.parametrize("which", ["without_ties", "with_ties"])
def test_the_generated_log_puts_every_step_to_work(
    which: str, request: pytest.FixtureRequest
) -> None:
    made: Prepared = request.getfixturevalue(which)
    log = pd.read_parquet(made.log / "interactions.parquet")
    items = pd.read_parquet(made.log / "items.parquet")
    assert len(log) == NUM_ROWS
    titled = items[items["title"].fillna("").str.strip() != ""]
    assert 0 < len(titled) < len(items)
    assert (~log["item_id"].isin(titled["item_id"])).any()
    assert log.duplicated(["user_id", "item_id"]).any()
    assert log.duplicated().any()
    once = log.drop_duplicates(["user_id", "item_id"])
    assert once.duplicated(["user_id", "timestamp"]).any() == (which == "with_ties")
    counts = made.our_counts
    assert 0 < counts["users"] < NUM_USERS
    assert 0 < counts["items"] < len(titled)


@pytest.mark.parametrize("which", ["without_ties", "with_ties"])
def test_counts_agree_with_plain_pandas(which: str, request: pytest.FixtureRequest) -> None:
    made: Prepared = request.getfixturevalue(which)
    assert made.our_counts == made.pandas_counts


def test_items_histories_and_targets_agree_with_plain_pandas(without_ties: Prepared) -> None:
    domain = without_ties.domain
    items = pd.read_parquet(without_ties.pandas / "items.parquet")
    assert list(domain.item_ids) == items["item_id"].tolist()
    known = pd.read_parquet(without_ties.pandas / "train.parquet")
    for purpose in PURPOSES:
        table = pd.read_parquet(without_ties.pandas / f"{purpose}.parquet")
        cases = without_ties.cases(purpose)
        targets = {user: domain.item_ids[case.target] for user, case in cases.items()}
        assert targets == dict(zip(table["user_id"], table["item_id"], strict=True))
        expected = known.sort_values("timestamp").groupby("user_id")["item_id"].agg(list)
        histories = {
            user: [domain.item_ids[item] for item in case.history] for user, case in cases.items()
        }
        assert histories == expected.to_dict()
        known = pd.concat([known, table[["user_id", "item_id", "timestamp"]]])


def test_with_ties_targets_have_the_last_times(with_ties: Prepared) -> None:
    domain = with_ties.domain
    log = pd.read_parquet(with_ties.log / "interactions.parquet").dropna()
    log = log[log["item_id"].isin(domain.item_ids)]
    first_met = log.groupby(["user_id", "item_id"])["timestamp"].min()
    last_times = first_met.groupby("user_id").agg(lambda times: sorted(times)[-2:])
    valid, test = (with_ties.cases(purpose) for purpose in PURPOSES)
    assert len(valid) == with_ties.pandas_counts["users"]
    for user in valid:
        targets = [domain.item_ids[cases[user].target] for cases in (valid, test)]
        assert [first_met[user, item] for item in targets] == last_times[user]


def test_candidates_are_the_target_and_items_never_met(with_ties: Prepared) -> None:
    parts = [pd.read_parquet(with_ties.pandas / f"{part}.parquet") for part in ("train", *PURPOSES)]
    met = pd.concat(parts).groupby("user_id")["item_id"].agg(set)
    item_ids = with_ties.domain.item_ids
    for purpose, table in zip(PURPOSES, parts[1:], strict=True):
        ours = {
            user: (case.target, case.candidates) for user, case in with_ties.cases(purpose).items()
        }
        theirs = {
            row.user_id: (item_ids.index(row.item_id), tuple(row.candidates))
            for row in table.itertuples()
        }
        for lists in (ours, theirs):
            assert set(lists) == set(met.index)
            for user, (target, candidates) in lists.items():
                assert len(set(candidates)) == len(candidates) == 20
                assert {item_ids[item] for item in candidates} & met[user] == {item_ids[target]}


def test_ingredients_together_in_turn_and_apart_are_the_same(
    make_run: Callable[..., Experiment],
) -> None:
    experiment = make_run()
    folders = [experiment.run_dir / "data" / name for name in ("lamps", "rivers", "tools")]
    benchmark = load("many_ingredients")
    config = TrainingConfig(num_steps=4, batch_size=4, max_titles=8, lora=LoraConfig(rank=2))
    lm = load_language_model(experiment.model.path, torch.float32)
    together, one = benchmark.train_together(lm, folders, config, 1000)
    in_turn, other = benchmark.train_in_turn(lm, folders, config)
    assert one["tokens"] == other["tokens"] > 0
    assert together.keys() == in_turn.keys() == {"lamps", "rivers", "tools"}
    for name, adapter in in_turn.items():
        for layer, pair in adapter.modules.items():
            assert pair.b.abs().max() > 1e-4
            torch.testing.assert_close(together[name].modules[layer].a, pair.a, atol=1e-5, rtol=0)
            torch.testing.assert_close(together[name].modules[layer].b, pair.b, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_the_benchmark_of_many_ingredients_runs(
    make_run: Callable[..., Experiment], capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = make_run()
    folders = [str(experiment.run_dir / "data" / name) for name in ("lamps", "tools")]
    rows = load("many_ingredients").main(
        [*folders, "--model", str(experiment.model.path), "--steps", "2", "--threads", "2"]
    )
    assert rows.keys() == {"together", "in-turn", "apart"}
    assert len({row["tokens"] for row in rows.values()}) == 1
    for row in rows.values():
        assert row["difference"] < 1e-5
        assert 0 < row["measured"] <= 1.2 * row["all_at_once"]
    assert rows["in-turn"]["difference"] == 0.0
    assert "together takes" in capsys.readouterr().out


@pytest.mark.distributed
@pytest.mark.slow
def test_the_slots_time_of_a_sweep_is_accounted_for(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    settings = "--trials 4 --domains 2 --steps 3 --valid-users 3 --first-layer 0".split()  # noqa: SIM905
    found = load("sweep_overhead").main([str(tmp_path / "bench"), *settings, "--model", str(model)])
    assert found["trials"] == 4
    assert 0.0 < found["share"] < 1.0
    parts = {key for key in found if key not in ("wall", "slots", "trials", "share")}
    assert sum(found[key] for key in parts) == pytest.approx(found["slots"])
    assert all(found[key] >= 0.0 for key in parts)


def test_contestants_in_training_see_the_same_histories(
    without_ties: Prepared, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    benchmark = load("training")
    folder = str(make_model(tmp_path / "model"))
    settings = "--random-config tiny --device cpu --dtype float32 --seconds 0 --batch-size 3"
    arguments = benchmark.parser().parse_args(
        [str(without_ties.ours), "--model", folder, *settings.split(), "--users", "8"]
    )
    found = {name: benchmark.measure(name, arguments) for name in benchmark.CONTESTANTS}
    for style in ("instruct", "sequence"):
        ours, theirs = found[f"ours-{style}"], found[f"trainer-{style}"]
        assert ours["num_steps"] == theirs["num_steps"] == 1
        assert ours["num_tokens"] == theirs["num_tokens"] > 0
        assert ours["num_titles"] == theirs["num_titles"]
    assert found["ours-instruct"]["num_titles"] == 3 < found["ours-sequence"]["num_titles"]
    assert found["ours-brief"]["num_tokens"] < found["ours-sequence"]["num_tokens"]
    for count in found.values():
        assert count["tokens_per_s"] > 0
        assert count["peak_mb"] > count["step_mb"] >= 0
    arguments.quality_minutes = 0.001
    for name in ("trainer-instruct", "ours-brief"):
        ranked = benchmark.quality(name, without_ties.ours, arguments)
        assert ranked["steps"] >= 1
        assert 0 < ranked["valid_ndcg"] <= 1


def with_random_adapters(experiment: Experiment) -> Path:
    """A run folder as far as the benchmark of merging reads it."""
    folder = experiment.run_dir
    lm = load_language_model(experiment.model.path, torch.float32)
    for seed, part in enumerate(("spirit", "ingredients/tools")):
        generator = torch.Generator().manual_seed(seed)
        modules = {
            name: LoraPair(
                a=torch.randn(2, layer.in_features, generator=generator),
                b=torch.randn(layer.out_features, 2, generator=generator),
                scale=0.1,
            )
            for name, layer in lm.model.named_modules()
            if isinstance(layer, torch.nn.Linear) and "layers.1." in name
        }
        save_adapter(folder / part, Adapter(modules), experiment.model.path)
    (folder / "config.yaml").write_text(yaml.safe_dump(experiment.model_dump(mode="json")))
    return folder


def test_learners_of_a_cocktail_learn_what_they_say(
    make_run: Callable[..., Experiment], capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = load("merging")
    settings = "--prompts 2 --reference-prompts 2 --goal-prompts 3 --batch-size 1 --pad-to 300"
    options = benchmark.parser().parse_args(
        [str(with_random_adapters(make_run())), "tools", *settings.split()]
    )
    order = {**vars(options), "dtype": "float32", "device": "cpu", "threads": 1, "users": 5}
    found = {name: benchmark.learn({**order, "learner": name}) for name in benchmark.LEARNERS}
    assert [one["num_steps"] for one in found.values()] == [2, 2, 2, 2, 2, 3]

    def learned(name: str) -> np.ndarray:
        return np.array(list(found[name]["weights"].values()))

    # Left padding and the cache of keys and values change the cost, not what is learned.
    np.testing.assert_allclose(learned("reference"), learned("reference-unpadded"), atol=1e-4)
    np.testing.assert_allclose(learned("reference-one"), learned("ours-same-loss"), atol=1e-4)
    assert np.abs(learned("reference") - 0.5).max() > 0.01
    assert np.abs(learned("reference") - learned("ours")).max() > 0.01
    per_prompt = {name: one["num_tokens"] / one["num_prompts"] for name, one in found.items()}
    assert per_prompt["reference"] > per_prompt["reference-unpadded"] > per_prompt["ours"] > 0
    assert per_prompt["reference-one"] >= 5 * 300

    instruct = benchmark.learn({**order, "learner": "reference-unpadded", "style": "instruct"})
    assert instruct["num_tokens"] != found["reference-unpadded"]["num_tokens"]

    weights = {name: found[name]["weights"] for name in benchmark.JUDGED}
    values = benchmark.judge({**order, "weights": weights})
    assert {len(one["HR@1"]) for one in values.values()} == {5}
    tables = load("merging_tables")
    tables.print_costs(found, options.goal_prompts)
    tables.print_quality(values, weights, 7)
    tables.print_goals(found, values, 1)
    printed = capsys.readouterr().out
    assert "(scaled)" in printed
    assert "ours-same-loss 15 times faster than reference-one" in printed


def test_the_reference_counts_the_first_five_tokens_of_each_of_five_titles(
    make_run: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = load("merging")
    options = benchmark.parser().parse_args([str(with_random_adapters(make_run())), "tools"])
    run = benchmark.read_run({**vars(options), "dtype": "float32", "device": "cpu", "threads": 1})
    learner = load("reference_merging").Generating(run.ranker("sequence"), run.adapters)
    (line_end,) = run.lm.tokenizer.encode("\n", add_special_tokens=False)
    (letter,) = run.lm.tokenizer.encode("a", add_special_tokens=False)
    written = [letter] * 6 + [line_end] + [letter, line_end] * 4 + [letter]
    w = torch.zeros(7, 2, requires_grad=True)
    counted = []

    def next_logits(tokens: list[int], _: int) -> torch.Tensor:
        counted.append(torch.is_grad_enabled())
        return w.sum() + torch.nn.functional.one_hot(torch.tensor(written[len(tokens) - 1]), 300)

    monkeypatch.setattr(learner, "_next_logits", next_logits)
    learner.gradient(w, [letter])
    assert counted == [True] * 5 + [False] * 2 + [True] * 8


def test_fixed_merges_are_held_against_their_formula() -> None:
    benchmark = load("fixed_merges")
    order = {"threads": 1, "shape": "tiny", "layers": 1, "rank": 4}
    found = {
        (one.result, one.who, one.call): benchmark.measure(
            {**order, "contestant": [one.result, one.who, one.call]}
        )["difference"]
        for one in benchmark.CONTESTANTS
        if one.who != "mergekit"
    }
    for result, call in (("linear", "linear"), ("ties-dense", "ties"), ("peft_linear",) * 2):
        assert found[result, "ours", call] < 1e-6
    for result, ours, peft in (("linear-16", "linear", "svd"), ("ties", "ties", "ties_svd")):
        assert 0.1 < found[result, "ours", ours] < 0.9
        assert found[result, "ours", ours] == pytest.approx(found[result, "peft", peft], abs=1e-5)
    assert found["linear", "peft", "cat"] < 1e-6
    for call in ("linear", "ties", "dare_linear", "dare_ties"):
        assert found[call, "peft", call] > 0.9  # of A and B apart


@pytest.mark.parametrize(
    ("calibration", "of_mix", "taken_at_two_errors"),
    [("each its own", 0.4, "mix"), ("one for all", 0.9, "uniform")],
)
def test_a_guard_s_rules_take_what_validation_users_say(
    calibration: str, of_mix: float, taken_at_two_errors: str
) -> None:
    """Two settings of the score, four users drawn in turn, one test user; worked by hand.

    Each its own: the mix takes the second setting (.6), the uniform mix the first (.725). It is
    ahead by .2, .2, .2 and -.1: .125 with a standard error of .075. One for all: the first, where
    it is ahead by .3, .3, .3 and 0: .225, again with .075.
    """
    trial = load("guard_trial")
    mix = trial.Measured(np.array([[0.5] * 4, [0.6] * 4]), np.array([[0.9], [0.4]]))
    controls = {
        "spirit": trial.Measured(np.array([[0.6] * 4, [0.0] * 4]), np.array([[0.3], [0.8]])),
        "uniform": trial.Measured(
            np.array([[0.8, 0.8, 0.8, 0.5], [0.0] * 4]), np.array([[0.7], [0.1]])
        ),
    }
    found = trial.served(mix, controls, np.arange(4), calibration)
    assert found["always the mix"] == ("mix", of_mix)
    assert found["always the spirit"] == ("spirit", 0.3)
    assert "always the ingredient" not in found  # the domain has none
    assert found["margin 0.1"] == ("uniform", 0.7)
    assert found["1 standard errors"] == ("uniform", 0.7)
    assert found["2 standard errors"][0] == taken_at_two_errors
    assert found["3 standard errors"][0] == "mix"
