"""Searches over merge settings: what is tried, what cannot be compared, which setting is chosen."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from rc_ray import artifacts, recipes, search_space
from rc_ray.artifacts import RunFolder, fingerprint, write_manifest
from rc_ray.cli import app
from rc_ray.config import Experiment
from rc_ray.core.adapters import save_adapter
from rc_ray.core.domains import Domain, RankingCase, read_domain
from rc_ray.errors import ArtifactError, ConfigError
from rc_ray.merge_choice import MergeTrial, best_trial, sentence, told, write_summary, write_trials
from rc_ray.merge_config import MergeConfig, MergeSetting
from rc_ray.merge_plan import make_order, plan_trials, trial_order
from rc_ray.merge_prompts import scored_cases, valid_parts
from rc_ray.merge_search import _chosen
from rc_ray.merge_trial import mix_cocktail
from rc_ray.open_domain import OpenDomain
from rc_ray.progress import Progress
from rc_ray.sweep_plan import ERROR
from rc_ray.trial_process import fail
from tests.conftest import Factory
from tests.core.test_model import random_adapter
from tests.tiny import make_experiment

BOTH = ("data.ingredients=[tools,lamps]", "data.spirit=[rivers]")
GRID = "merge.search={granularity: [model, linear]}"


def with_adapters(experiment: Experiment) -> Experiment:
    run = RunFolder(experiment.run_dir)
    for seed, folder in enumerate((run.spirit_dir, *map(run.ingredient_dir, ("tools", "lamps")))):
        save_adapter(folder, random_adapter(seed), experiment.model.path)
        write_manifest(folder, stage="tune", config={}, seed=seed, inputs={}, metrics={})
    return experiment


def finish(trial: MergeTrial, ndcg: float | None = None, objective: float | None = None) -> None:
    trial.folder.mkdir(parents=True, exist_ok=True)
    metrics = {"valid_ndcg": ndcg, "final_objective": objective, "num_valid_users": 5}
    write_manifest(
        trial.folder,
        stage="merge",
        config=trial.config,
        seed=trial.variant.seed,
        inputs=trial.inputs,
        metrics={**metrics, "trial_seconds": 1.5, "num_steps": 2},
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("{}", "`search` names no setting"),
        ("{learning_rat: [1]}", "unknown field learning_rat; known: objective, over, score"),
        ("{guard.margin: [0, 1]}", "unknown field guard.margin"),
        ("{method: [learned]}", "unknown field method"),
        ("{micro_batch_size: [1, 2]}", "unknown field micro_batch_size"),
        ("{learning_rate: []}", "gives no value for learning_rate"),
        ("{learning_rate: 0.1}", "write a list of values, or one of"),
        ("{learning_rate: [0.1, -1]}", "does not hold: learning_rate: .*greater than 0"),
        ("{learning_rate: [0.1, 0.1]}", "the same point twice"),
        ("{granularity: [model, layers]}", "does not hold: granularity: .*'layer'"),
        ("{num_epochs: {uniform: [1, 3]}}", "num_epochs: .*; draw it with `randint`"),
        ("{learning_rate: {uniform: [0.0, 1.0]}}", "does not hold: learning_rate"),
        ("{neighbours: [tools]}", r"neighbours: each value is a list of domains, or all, as in"),
        ("{neighbours: [[], [lamps]]}", "`merge.search.neighbours` names lamps, which has no"),
        ("{objective: [entropy, vocabulary_entropy], over: [catalogue]}", "leave out `over`"),
        (
            f"{{num_prompts: {list(range(1, 41))}, batch_size: {list(range(1, 31))}}}",
            "1,200 points, each learned on every domain; .* at most 1,000",
        ),
    ],
)
def test_a_search_that_cannot_run_is_refused(
    make_run: Factory, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_run(f"merge.search={override}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["merge.num_samples=3"], "there is no `search` that draws"),
        ([GRID, "merge.num_samples=3"], "`search` draws nothing"),
        (["merge.search={rank: [null, 4]}"], "cannot tell one `rank` from another"),
        (["merge.search={objective: [entropy, anchored]}"], "cannot compare .* `objective`"),
        (["merge.search={score: [likelihood, calibrated]}"], "cannot compare .* `score`"),
        (["merge.search={over: [candidates, catalogue]}"], "cannot compare .* `over`"),
        (["merge.search={num_prompts: [2, 4]}"], "cannot compare .* `num_prompts`"),
        ([GRID, "merge.objective=clicks"], "chooses without labels"),
        (["merge.search={objective: [clicks]}"], "chooses without labels"),
        (
            ["merge.search={batch_size: [2, 4]}", "merge.objective=anchored"],
            "measures the mean prediction of a batch",
        ),
        (
            ["merge.search={neighbours: [[], all]}", "merge.objective=distillation", *BOTH],
            "`objective: distillation` measures against the adapters",
        ),
        (
            ["merge.search={neighbours: [[], all]}", "merge.score=calibrated", *BOTH],
            "`score: calibrated` measures against the adapters",
        ),
        (
            ["merge.search={neighbours: [[], all]}", *BOTH, "merge.choose_by=valid_ndcg"]
            + ["merge.mixes={a: {method: linear, weights: [1, 2]}}"],
            r"`merge.mixes.a.weights` has 2 values, but on tools 3 adapters are mixed",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(
    make_run: Factory, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_run("merge.choose_by=objective", *overrides)


OPTUNA = "merge.search_algorithm=optuna"
RATES = "learning_rate: {loguniform: [0.01, 1.0]}"
UNEQUAL = (
    "{over: {choice: [candidates, catalogue]}, objective: {choice: [entropy, vocabulary_entropy]}}"
)
FORTY = f"{{choice: {list(range(1, 41))}}}"
MANY = f"{{batch_size: {FORTY}, num_prompts: {FORTY}}}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "`search_algorithm: optuna` is set, but there is no `search`"),
        ([GRID], "needs a distribution in `search`"),
        (
            [f"merge.search={{granularity: [model, linear], {RATES}}}", "merge.num_samples=3"],
            r"draws every field; write granularity as \{choice: \[...\]\}",
        ),
        ([f"merge.search={{{RATES}}}"], "`num_samples` is 1; raise it"),
        (["merge.num_samples=3", f"merge.search={UNEQUAL}"], "leave out `over`"),
        (
            ["merge.num_samples=3", "merge.choose_by=objective"]
            + ["merge.search={rank: {choice: [null, 4]}}"],
            "cannot tell one `rank` from another",
        ),
        (["merge.num_samples=3", f"merge.search={MANY}"], "1,600 combinations of choices"),
    ],
)
def test_what_optuna_cannot_search_is_refused(
    make_run: Factory, overrides: list[str], message: str
) -> None:
    pytest.importorskip("optuna")
    with pytest.raises(ConfigError, match=message):
        make_run(*overrides, OPTUNA)


def test_optuna_is_asked_for_by_name_when_it_is_missing(
    make_run: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_space, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"merge.*run `pip install optuna`"):
        make_run(f"merge.search={{{RATES}}}", "merge.num_samples=2", OPTUNA)


def test_what_optuna_may_choose_is_known_in_advance(make_run: Factory) -> None:
    """Every combination of the lists stands in, so that what any of them reads is known."""
    pytest.importorskip("optuna")
    space = f"{{neighbours: {{choice: [[], [lamps]]}}, rank: {{choice: [2, 4]}}, {RATES}}}"
    experiment = make_run(*BOTH, f"merge.search={space}", "merge.num_samples=3", OPTUNA)
    found = {(one.merge.neighbours, one.merge.rank) for one in experiment.variants()}
    assert found == {((), 2), ((), 4), (("lamps",), 2), (("lamps",), 4)}
    assert len(experiment.variants()) == 4
    assert "ingredients/lamps" in recipes.cocktail(experiment, "tools").reads
    # A cocktail that was made before one could choose is not made anew.
    told = recipes.cocktail(experiment, "tools").config["merge"]
    assert told["search_algorithm"] == "optuna"
    drawn = make_run(*BOTH, f"merge.search={space}", "merge.num_samples=3")
    assert "search_algorithm" not in recipes.cocktail(drawn, "tools").config["merge"]


def test_what_measures_the_same_is_compared(make_run: Factory) -> None:
    space = "{temperature: [0.5, 1.0], parametrisation: [softmax, sigmoid], pull: [0.0, 0.1]}"
    made = make_run("merge.choose_by=objective", f"merge.search={space}")
    assert len(made.variants()) == 8
    made = make_run("merge.search={objective: [clicks, entropy]}")  # by clicks all may be labelled
    assert [one.merge.objective for one in made.variants()] == ["clicks", "entropy"]


def test_a_variant_is_the_file_with_the_setting_written_in(make_run: Factory) -> None:
    searched = make_run(*BOTH, "merge.search={rank: [4], neighbours: [all]}", "merge.pull=0.5")
    plain = make_run(*BOTH, "merge.rank=4", "merge.neighbours=all", "merge.pull=0.5")
    (variant,) = searched.variants()
    assert variant.merge == plain.merge
    assert variant.adapter_names("tools") == ("spirit", "ingredient", "lamps")
    assert recipes.mix(variant, "tools", "cocktail") == recipes.mix(plain, "tools", "cocktail")
    # Without a search the experiment is its own variant, and survives being written and read.
    assert plain.variants() == (plain,)
    again = Experiment.model_validate(searched.model_dump(mode="json"))
    assert again.variants() == searched.variants()


def test_draws_are_the_same_for_every_start_and_stay_when_there_are_more(make_run: Factory) -> None:
    space = "merge.search={learning_rate: {loguniform: [0.01, 1.0]}}"
    rates = [
        [one.merge.learning_rate for one in make_run(space, f"merge.num_samples={n}").variants()]
        for n in (2, 2, 4)
    ]
    assert rates[0] == rates[1] == rates[2][:2]
    assert len(set(rates[2])) == 4
    assert all(0.01 <= rate <= 1.0 for rate in rates[2])


def test_trials_are_known_by_what_shapes_them(make_run: Factory) -> None:
    experiment = with_adapters(make_run(*BOTH, GRID))
    run = RunFolder(experiment.run_dir)
    first = plan_trials(experiment, run, "tools")
    assert [trial.label for trial in first] == ["granularity=model", "granularity=linear"]

    def planned(**fields: Any) -> list[MergeTrial]:
        merge = type(experiment.merge).model_validate({**experiment.merge.model_dump(), **fields})
        return plan_trials(experiment.model_copy(update={"merge": merge}), run, "tools")

    longer = planned(search={"granularity": ["layer", "linear", "model"]})
    assert [t.fingerprint for t in longer[:0:-1]] == [t.fingerprint for t in first]
    assert {trial.folder for trial in first} < {trial.folder for trial in longer}
    faster = planned(max_concurrent_trials=1, memory_per_task_gb=2.0, micro_batch_size=1)
    assert [t.fingerprint for t in faster] == [t.fingerprint for t in first]
    # Another comparison finds the mixes where they are, and judges them anew.
    for judged in (planned(choose_by="objective"), planned(guard={"num_valid_users": 3})):
        assert [t.folder for t in judged] == [t.folder for t in first]
        assert [t.mix for t in judged] == [t.mix for t in first]
        assert not {t.fingerprint for t in judged} & {t.fingerprint for t in first}


@pytest.mark.parametrize(
    "space", ["learning_rate: [0.1, 0.2]", "prompts_of: [other_users, scored_users]"]
)
def test_planning_makes_the_settings_once_and_not_for_every_trial(
    make_run: Factory, monkeypatch: pytest.MonkeyPatch, space: str
) -> None:
    """Else the time to plan grows with the cube of their number."""
    experiment = with_adapters(make_run(*BOTH, f"merge.search={{{space}}}"))
    run, original = RunFolder(experiment.run_dir), MergeConfig.settings
    made: list[MergeConfig] = []

    def settings(merge: MergeConfig) -> tuple[MergeSetting, ...]:
        made.append(merge)
        return original(merge)

    monkeypatch.setattr(MergeConfig, "settings", settings)
    trials = plan_trials(experiment, run, "tools")
    for trial in trials:
        trial_order(experiment, run, trial, Path("model"))
    assert len(trials) == 2
    assert made == [experiment.merge]


def test_neighbours_that_come_to_the_same_adapters_are_one_trial(make_run: Factory) -> None:
    space = "merge.search={neighbours: [[], all, [lamps], [lamps, tools]]}"
    experiment = with_adapters(make_run(*BOTH, space))
    run = RunFolder(experiment.run_dir)
    trials = plan_trials(experiment, run, "tools")
    assert [trial.label for trial in trials] == ["neighbours=none", "neighbours=all"]
    assert [len(trial.inputs) for trial in trials] == [3, 4]
    # The domain is known by the adapters of all settings.
    reads = recipes.cocktail(experiment, "tools").reads
    assert reads == ("spirit", "ingredients/tools", "ingredients/lamps", "data/tools")
    order = trial_order(experiment, run, trials[1], Path("model"))
    assert list(order["opened"]["adapters"]) == ["spirit", "ingredient", "lamps"]
    made = make_order(trials[0].variant, run, "tools")
    assert made["mixes"]["uniform"]["inputs"] == trials[0].inputs


def test_the_search_makes_a_cocktail_stale_and_its_resources_do_not(make_run: Factory) -> None:
    def known(*overrides: str) -> str:
        config = recipes.cocktail(make_run(*overrides), "tools").config
        return fingerprint(config=config, seed=1, inputs={})

    searched = known(GRID)
    assert known() != searched
    assert known("merge.search={granularity: [model]}") != searched
    assert known(GRID, "merge.choose_by=objective") != searched
    assert known(GRID, "merge.max_concurrent_trials=1", "merge.memory_per_task_gb=3") == searched
    both = "merge.search={prompts_of: [other_users, scored_users]}"
    assert known(both, "evaluate.num_test_users=5") != known(both)
    assert known(GRID, "evaluate.num_test_users=5") == searched


@pytest.mark.parametrize(
    ("ndcgs", "chosen"),
    [
        ((0.25, 0.75, 0.5), 1),
        ((0.5, 0.75, 0.75), 1),  # of equals the first
        ((None, None, None), 0),  # no validation users
        ((0.25, "failed", 0.5), 2),
        (("failed", "failed", "failed"), None),
    ],
)
def test_the_highest_ndcg_is_chosen(
    make_run: Factory, ndcgs: tuple[Any, ...], chosen: int | None
) -> None:
    space = "merge.search={granularity: [model, layer, linear]}"
    trials = plan(make_run(*BOTH, space))
    for trial, ndcg in zip(trials, ndcgs, strict=True):
        if ndcg != "failed":
            finish(trial, ndcg=ndcg)
    assert best_trial(trials, "valid_ndcg") is (None if chosen is None else trials[chosen])


def test_the_lowest_objective_is_chosen(make_run: Factory) -> None:
    space = "merge.search={learning_rate: [0.1, 0.2, 0.3, 0.4]}"
    trials = plan(make_run(*BOTH, space, "merge.choose_by=objective"))
    for trial, objective in zip(trials[:3], (2.5, -1.0, -1.0), strict=True):
        finish(trial, objective=objective)
    assert best_trial(trials, "objective") is trials[1]


def test_a_trial_of_other_data_does_not_count(make_run: Factory) -> None:
    trials = plan(make_run(*BOTH, GRID))
    finish(replace(trials[0], inputs={"data/tools": "another"}), ndcg=1.0)
    finish(trials[1], ndcg=0.1)
    assert best_trial(trials, "valid_ndcg") is trials[1]


def test_the_tables_tell_what_was_tried_and_what_failed(make_run: Factory) -> None:
    experiment = with_adapters(make_run(*BOTH, GRID))
    run = RunFolder(experiment.run_dir)
    trials = plan_trials(experiment, run, "tools")
    finish(trials[1], ndcg=0.5)
    trials[0].folder.mkdir(parents=True)
    fail(trials[0].folder, MemoryError("no more"), mend="lower `merge.batch_size`")
    problems = {trials[0].folder: artifacts.read_json(trials[0].folder / ERROR)["error"]}
    write_trials(run.cocktail_dir("tools") / "trials.parquet", trials, trials[1], problems)
    rows = pq.read_table(run.cocktail_dir("tools") / "trials.parquet").to_pylist()
    assert [row["chosen"] for row in rows] == [False, True]
    assert rows[0]["error"] == "out of memory; lower `merge.batch_size` (no more)"
    assert rows[1]["valid_ndcg"] == 0.5
    spent = {"wall_s": 4.0, "num_slots": 2, "trials_s": 6.0}
    path = write_summary(experiment, run, {"lamps": "a | b\n\x1b[31m"}, spent)
    lines = path.read_text().splitlines()
    assert "| tools | 2 | 1 | granularity=linear | 0.5000 | 1.5 |" in lines
    assert "| lamps | | | no cocktail: a \\| b \N{REPLACEMENT CHARACTER}[31m | | |" in lines
    assert "- tools, granularity=model: out of memory; lower `merge.batch_size` (no more)" in lines
    assert artifacts.read_json(path.with_suffix(".json"))["domains"]["tools"]["num_failed"] == 1
    assert sentence(told(experiment, trials, trials[1])) == (
        "`granularity=linear` was chosen among 2 settings by the clicks of 5 validation users "
        "(NDCG 0.500); 1 failed."
    )


def test_who_chooses_does_not_guard() -> None:
    """Seven users, at most three in each part; five users, so that half of them choose."""

    def domain(num_users: int) -> Domain:
        cases = [RankingCase(f"u{n}", (0,), target=1, candidates=(0, 1)) for n in range(num_users)]
        return domain_of(cases)

    for num_users, sizes in ((7, (3, 3)), (5, (3, 2)), (1, (1, 0)), (0, (0, 0))):
        parts = valid_parts(domain(num_users), 3, seed=0)
        users = [{case.user_id for case in part} for part in parts]
        assert tuple(map(len, users)) == sizes
        assert not users[0] & users[1]
    assert valid_parts(domain(7), 3, seed=0) == valid_parts(domain(7), 3, seed=0)


def test_the_choosing_users_are_others_than_those_whose_histories_may_be_prompts() -> None:
    """Of seven users five are spared; at most three choose, or half where they are fewer."""
    cases = [RankingCase(f"u{n}", (0,), target=1, candidates=(0, 1)) for n in range(7)]
    spared = {f"u{n}" for n in range(5)}
    for num_users, wanted in ((1, 1), (2, 2), (3, 2), (9, 2)):
        parts = valid_parts(domain_of(cases), num_users, seed=0, spared=spared)
        choosing, guarding = ({case.user_id for case in part} for part in parts)
        assert len(choosing) == min(num_users, 4)
        assert len(choosing - spared) == wanted
        assert not choosing & guarding
    everybody = {case.user_id for case in cases}
    for spared in (set(), everybody):  # nobody to prefer: the draw of always
        again = valid_parts(domain_of(cases), 3, seed=0, spared=spared)
        assert again == valid_parts(domain_of(cases), 3, seed=0)


TRANSDUCTIVE = "merge.search={prompts_of: [other_users, scored_users]}"


@pytest.mark.parametrize("score", ["likelihood", "calibrated"])
def test_trial_and_guard_draw_the_same_choosing_users(make_run: Factory, score: str) -> None:
    """None of them is scored, so none lends a test history to any setting."""
    few = ("evaluate.num_test_users=10", "merge.guard.num_valid_users=6", f"merge.score={score}")
    experiment = with_adapters(make_run(*BOTH, TRANSDUCTIVE, *few))
    run = RunFolder(experiment.run_dir)
    trials = plan_trials(experiment, run, "tools")
    orders = [trial_order(experiment, run, one, Path("model"))["opened"] for one in trials]
    searching = make_order(experiment, run, "tools")
    orders += [of_the_best(experiment, one, searching) for one in trials]
    domain = read_domain(run.domain_dir("tools"))
    scored = {case.user_id for case in scored_cases(domain, 10, experiment.split_seed)}
    assert len(scored) == 10
    chosen = [{case.user_id for case in OpenDomain(order).choosing_cases} for order in orders]
    assert len(chosen) == 4
    assert all(users == chosen[0] for users in chosen)
    assert len(chosen[0]) == 6
    assert not chosen[0] & scored
    for order in orders[2:]:
        asked = {case.user_id for case in OpenDomain(order).valid_cases}
        assert len(asked) == 6
        assert not asked & chosen[0]
    # Without such a setting the draw is what it was.
    plain = with_adapters(make_run(*BOTH, GRID, *few))
    order = make_order(plain, RunFolder(plain.run_dir), "tools")
    expected = valid_parts(domain, 6, plain.split_seed)
    assert OpenDomain(order).choosing_cases == expected[0]
    assert OpenDomain(order).valid_cases == expected[1]
    assert {case.user_id for case in expected[0]} & scored


def test_other_choosing_users_make_other_trials_and_nothing_else(make_run: Factory) -> None:
    """What is known by no users, or chosen without clicks, stays what it was."""

    def keys(*overrides: str) -> list[bool]:
        experiment = make_run(*BOTH, "evaluate.num_test_users=10", *overrides)
        found = [recipes.cocktail(experiment, "tools").config.get("scores") or {}]
        for one in experiment.variants():
            found.append(recipes.merge_trial(experiment, one, "tools").config.get("scores") or {})
            made = recipes.mix(one, "tools", "cocktail", searching=experiment)
            found.append(made.config.get("scores") or {})
        assert all(one.get("spared_test_users", 10) == 10 for one in found)
        return ["spared_test_users" in one for one in found]

    assert keys(TRANSDUCTIVE) == [True, True, False, True, False]
    assert keys(TRANSDUCTIVE, "merge.score=calibrated") == [True] * 5
    learned_on_others = "merge.search={granularity: [model, linear]}"
    assert not any(keys(learned_on_others, "merge.score=calibrated"))
    assert not any(keys("merge.prompts_of=scored_users", "merge.score=calibrated"))
    beside = "merge.search={objective: [distillation, entropy]}"
    assert keys(beside, "merge.prompts_of=scored_users") == [True, True, False, True, False]
    drawn = ("merge.search={prompts_of: {choice: [other_users, scored_users]}}",)
    for num, wanted in ((2, True), (1, None)):  # one draw is of one of the two
        made = make_run(*BOTH, *drawn, f"merge.num_samples={num}").merge
        has_it = any(one.prompts_of == "scored_users" for one in made.settings())
        assert made.spares_scored_users == has_it
        assert wanted in (None, has_it)
    scored = "merge.prompts_of=scored_users"
    assert not any(keys(learned_on_others, scored, "merge.choose_by=objective"))


def of_the_best(experiment: Experiment, trial: MergeTrial, order: dict[str, Any]) -> dict[str, Any]:
    """The domain's order once a trial is chosen, as the search hands it on."""
    finish(trial, ndcg=1.0)
    run = RunFolder(experiment.run_dir)
    made = _chosen(experiment, run, order, [trial], {}, Progress(stream=io.StringIO()))
    (trial.folder / artifacts.MANIFEST).unlink()
    return made


@pytest.mark.parametrize("seed", [None, 5])
def test_the_objective_is_of_the_prompts_that_were_learned_on(
    make_run: Factory, seed: int | None
) -> None:
    """At a rate of 1e-9 the weights stay equal: the mean of the two batches of the learning."""
    settings = ("merge.choose_by=objective", "merge.num_prompts=4", "merge.batch_size=2")
    given = () if seed is None else (f"merge.seed={seed}",)
    space = "merge.search={learning_rate: [1.0e-9]}"
    experiment = with_adapters(make_run(*BOTH, space, *settings, *given))
    run = RunFolder(experiment.run_dir)
    (trial,) = plan_trials(experiment, run, "tools")
    trial.folder.mkdir(parents=True)
    metrics = mix_cocktail(trial_order(experiment, run, trial, Path(experiment.model.path)))
    lines = (trial.mix_dir / "entropy.jsonl").read_text().splitlines()
    steps = [json.loads(line)["objective"] for line in lines]
    assert len(steps) == 2
    assert metrics["final_objective"] == pytest.approx(np.mean(steps), abs=1e-5)


def test_an_objective_of_another_seed_makes_its_trials_stale_alone(make_run: Factory) -> None:
    """The experiment's seed is 3, and one that is written down changes no prompt."""

    def keys(*overrides: str) -> set[Any]:
        experiment = make_run(*BOTH, GRID, *overrides)
        configs = [recipes.cocktail(experiment, "tools").config]
        for one in experiment.variants():
            configs.append(recipes.merge_trial(experiment, one, "tools").config)
            assert "objective_seed" not in recipes.mix(one, "tools", "cocktail").config
        return {config.get("objective_seed") for config in configs}

    by_objective = "merge.choose_by=objective"
    assert keys(by_objective) == keys(by_objective, "merge.seed=3") == {None}
    assert keys("merge.seed=5") == {None}
    assert keys(by_objective, "merge.seed=5") == {5}


@pytest.mark.parametrize("choose_by", ["valid_ndcg", "objective"])
def test_a_trial_reads_no_test_click(
    make_run: Factory, monkeypatch: pytest.MonkeyPatch, choose_by: str
) -> None:
    """The worker's function itself, in this process; a look at a test case ends it."""
    experiment = with_adapters(make_run(*BOTH, GRID, f"merge.choose_by={choose_by}"))
    run = RunFolder(experiment.run_dir)
    trial = plan_trials(experiment, run, "tools")[0]
    original = Domain.cases
    asked = []

    def cases(self: Domain, purpose: Any, *others: Any) -> Any:
        assert purpose == "valid"
        asked.append(others)
        return original(self, purpose, *others)

    monkeypatch.setattr(Domain, "cases", cases)
    trial.folder.mkdir(parents=True)
    metrics = mix_cocktail(trial_order(experiment, run, trial, Path(experiment.model.path)))
    assert trial.is_finished
    assert asked
    if choose_by == "valid_ndcg":
        assert 0.0 < metrics["valid_ndcg"] <= 1.0
        assert metrics["final_objective"] is None
        assert metrics["num_valid_users"] == len(valid_parts_of(experiment)[0])
    else:
        assert metrics["valid_ndcg"] is None
        assert ("warm",) not in asked  # nor a click of a user who is scored
        assert 0.0 < metrics["final_objective"] < np.log(10)  # nats, of ten candidates
    weights = artifacts.read_json(trial.mix_dir / "weights.json")["weights"]
    assert all(row == weights[0] for row in weights)  # `granularity: model`


def test_a_setting_without_adapters_is_a_problem_of_its_domain(make_run: Factory) -> None:
    experiment = make_run(*BOTH, GRID)
    with pytest.raises(ArtifactError, match="spirit: not there yet"):
        plan_trials(experiment, RunFolder(experiment.run_dir), "tools")


def test_tune_leads_to_the_search(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["tune", str(make_experiment(tmp_path)), "--merge"])
    assert result.exit_code == 2
    assert "`--merge` searches over merge settings, but `merge.search` names none" in result.output


def plan(experiment: Experiment) -> list[MergeTrial]:
    return plan_trials(with_adapters(experiment), RunFolder(experiment.run_dir), "tools")


def valid_parts_of(experiment: Experiment) -> tuple[list[RankingCase], list[RankingCase]]:
    domain = read_domain(RunFolder(experiment.run_dir).domain_dir("tools"))
    return valid_parts(domain, experiment.merge.guard.num_valid_users, experiment.split_seed)


def domain_of(cases: list[RankingCase]) -> Domain:
    return Domain(
        name="films",
        item_ids=("a", "b"),
        titles=("A", "B"),
        num_train=np.ones(2, dtype=np.int64),
        cold=np.zeros(2, dtype=bool),
        train=((0, 1),),
        cases_by_kind={("valid", "warm", "scored"): cases},
    )
