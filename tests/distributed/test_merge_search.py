"""A search over merge settings on Ray Tune: one run for all domains, each trial only once."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from rc_ray import artifacts, merge, merge_trial, mixing, prepare, recipes, sweep
from rc_ray.artifacts import RunFolder
from rc_ray.config import Experiment, load
from rc_ray.core.adapters import load_adapter, save_adapter
from rc_ray.core.domains import read_domain
from rc_ray.guard import read_guard
from rc_ray.merge_plan import asked_trials, plan_trials
from rc_ray.merge_prompts import valid_parts
from rc_ray.status import read_status
from rc_ray.trial_process import begin, fail
from tests.conftest import Screen
from tests.core.test_model import random_adapter
from tests.tiny import make_experiment

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("ray_local")]

DOMAINS = ("tools", "lamps")


@pytest.fixture
def experiment(tmp_path: Path, screen: Screen) -> Experiment:
    path = make_experiment(
        tmp_path,
        merge={
            "search": {"granularity": ["model", "linear"], "neighbours": ["all"]},
            "max_concurrent_trials": 1,
            "guard": {"num_valid_users": 8},
        },
    )
    roles = ("data.ingredients=[tools,lamps]", "data.spirit=[rivers]")
    made = load(path, roles)
    prepare.run(made, console=screen.console)
    run = RunFolder(made.run_dir)
    made_by = {run.ingredient_dir(name): recipes.ingredient(made, name) for name in DOMAINS}
    made_by[run.spirit_dir] = recipes.spirit(made)
    for seed, (folder, recipe) in enumerate(made_by.items()):
        save_adapter(folder, random_adapter(seed), made.model.path)
        seal = {"seed": made.seed, "inputs": recipe.inputs(run), "metrics": {}}
        artifacts.write_manifest(folder, stage="tune", config=recipe.config, **seal)
    return made


@pytest.fixture
def without_workers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trials and tasks in this process: workers of Ray take seconds to start.

    Returns:
        The trials that were run, as `domain granularity`.
    """
    ran: list[str] = []

    def work(path: Path) -> dict[str, Any]:
        order = artifacts.read_json(path)
        ran.append(f"{order['domain']} {order['mix']['config']['mix']['granularity']}")
        begin(Path(order["folder"]))
        try:
            return {"failed": False, **merge_trial.mix_cocktail(order)}
        except Exception as error:
            fail(Path(order["folder"]), error, mend=order["mend"])
            return {"failed": True}

    def fit(
        books: Path, orders: list[Path], *others: Any, searcher: Any, **options: Any
    ) -> dict[Path, str]:
        if searcher is None:
            for path in orders:
                work(path)
            return {}
        for number in itertools.count():
            asked = searcher.suggest(str(number))
            if asked == searcher.FINISHED:
                return {}
            searcher.on_trial_complete(str(number), work(Path(asked["trial"])))

    def mix_all(experiment: Experiment, orders: list[Any], console: Any) -> dict[str, str]:
        model = {"model_dir": experiment.model.path}
        found = {one["domain"]: mixing.mix_domain({**one, **model}) for one in orders}
        return {domain: one["error"] for domain, one in found.items() if "error" in one}

    monkeypatch.setattr(sweep, "fit", fit)
    monkeypatch.setattr(merge, "_mix_all", mix_all)
    return ran


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def table(run: RunFolder, domain: str) -> list[dict[str, Any]]:
    path = run.cocktail_dir(domain) / "trials.parquet"
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def test_all_domains_are_searched_in_one_run_and_a_broken_one_stands_apart(
    experiment: Experiment, screen: Screen
) -> None:
    run = RunFolder(experiment.run_dir)
    items = run.domain_dir("lamps") / "items.parquet"
    items.write_bytes(items.read_bytes()[:100])
    with pytest.raises(merge.CocktailsFailed, match=r"no cocktail for lamps: .*items\.parquet"):
        merge.run(experiment, console=screen.console)
    assert "4 trial(s), 1 at a time, each 1 CPU" in screen.text
    assert not list((run.mix_work / ".tune").glob("*"))
    assert not run.cocktail_dir("lamps").exists()
    rows = table(run, "tools")
    assert [row["label"].split()[0] for row in rows] == ["granularity=model", "granularity=linear"]
    assert all(0.0 < row["valid_ndcg"] <= 1.0 for row in rows)
    (chosen,) = (row for row in rows if row["chosen"])
    assert chosen["valid_ndcg"] == max(row["valid_ndcg"] for row in rows)

    # The domain's cocktail is the chosen trial's, beside its controls and a guard of other users.
    cocktail = run.cocktail_dir("tools")
    granularity = json.loads(chosen["setting"])["granularity"]
    weights = json.loads((cocktail / "weights.json").read_text())
    assert weights["adapters"] == ["spirit", "ingredient", "lamps"]
    assert (len({tuple(row) for row in weights["weights"]}) == 1) == (granularity == "model")
    assert load_adapter(run.mix_dir("tools", "uniform")).modules
    parts = valid_parts(read_domain(run.domain_dir("tools")), 8, experiment.split_seed)
    verdict = read_guard(cocktail)
    assert verdict is not None
    assert verdict.num_valid_users == len(parts[1])
    told = artifacts.read_json(cocktail / artifacts.MANIFEST)["metrics"]["search"]
    assert told["chosen"] == chosen["label"]
    assert told["num_valid_users"] == len(parts[0])
    best = next(one for one in plan_trials(experiment, run, "tools") if one.label in told["chosen"])
    name = "adapter_model.safetensors"
    assert (cocktail / name).read_bytes() == (best.mix_dir / name).read_bytes()
    summary = run.search_path.read_text()
    assert "| tools | 2 | 0 | granularity=" in summary
    assert "no cocktail: " in summary


def test_what_is_finished_is_never_done_again(
    experiment: Experiment, screen: Screen, without_workers: list[str]
) -> None:
    run = RunFolder(experiment.run_dir)
    items = run.domain_dir("lamps") / "items.parquet"
    whole = items.read_bytes()
    items.write_bytes(whole[:100])
    with pytest.raises(merge.CocktailsFailed, match="no cocktail for lamps"):
        merge.run(experiment, console=screen.console)

    # Mended: the broken domain alone is searched.
    items.write_bytes(whole)
    without_workers.clear()
    before = {**files(run.cocktail_dir("tools")), **files(run.mix_work_dir("tools"))}
    merge.run(experiment, console=screen.console)
    assert without_workers == ["lamps model", "lamps linear"]
    now = files(run.root)
    assert {path: now[path] for path in before} == before
    assert len(table(run, "lamps")) == 2
    assert status(experiment) == "finished"
    merge.run(experiment, console=screen.console)
    assert files(run.root) == now

    # One setting more: it alone is run, on each domain.
    search = {**(experiment.merge.search or {}), "granularity": ["model", "linear", "layer"]}
    longer = changed(experiment, search=search)
    assert status(longer) == "stale"
    without_workers.clear()
    merge.run(longer, console=screen.console)
    assert without_workers == ["tools layer", "lamps layer"]
    assert [len(table(run, domain)) for domain in DOMAINS] == [3, 3]
    assert status(longer) == "finished"

    # Another comparison: every trial is judged anew, and no weight is learned anew.
    mixes = {path: time for path, time in files(run.mix_work).items() if "/mix/" in path}
    without_workers.clear()
    by_objective = changed(longer, choose_by="objective")
    merge.run(by_objective, console=screen.console)
    assert len(without_workers) == 6
    now = files(run.mix_work)
    assert {path: now[path] for path in mixes} == mixes
    for domain in DOMAINS:
        rows = table(run, domain)
        (chosen,) = (row for row in rows if row["chosen"])
        assert chosen["final_objective"] == min(row["final_objective"] for row in rows)
        verdict = read_guard(run.cocktail_dir(domain))
        assert verdict is not None
        assert verdict.num_valid_users == 8  # nobody has chosen, so the guard may ask all

    # A trial whose record is damaged is a problem of its domain alone.
    for trial in plan_trials(longer, run, "lamps"):
        (trial.folder / artifacts.MANIFEST).write_text("{")
    with pytest.raises(merge.CocktailsFailed) as caught:
        merge.run(longer, console=screen.console)
    (line,) = str(caught.value).splitlines()
    assert "no cocktail for lamps: " in line
    assert "manifest.json: damaged; delete it" in line


def optuna(experiment: Experiment, **fields: Any) -> Experiment:
    space = {
        "granularity": {"choice": ["model", "linear"]},
        "neighbours": {"choice": [[], ["tools", "lamps"]]},
        "learning_rate": {"loguniform": [0.01, 1.0]},
    }
    given = {"search": space, "num_samples": 2, "search_algorithm": "optuna", **fields}
    return changed(experiment, **given)


def test_optuna_asks_each_domain_by_itself(experiment: Experiment, screen: Screen) -> None:
    """On Ray Tune; the trials of one domain all fail, which is no end to the other's."""
    pytest.importorskip("optuna")
    searched = optuna(experiment)
    run = RunFolder(searched.run_dir)
    items = run.domain_dir("lamps") / "items.parquet"
    items.write_bytes(items.read_bytes()[:100])
    with pytest.raises(merge.CocktailsFailed, match=r"no cocktail for lamps: .*items\.parquet"):
        merge.run(searched, console=screen.console)
    assert "4 trial(s), 1 at a time, each 1 CPU" in screen.text
    assert not list((run.mix_work / ".tune").glob("*"))
    rows = table(run, "tools")
    assert len({row["label"] for row in rows}) == 2
    rates = [json.loads(row["setting"])["learning_rate"] for row in rows]
    assert all(0.01 <= rate <= 1.0 for rate in rates)
    (chosen,) = (row for row in rows if row["chosen"])
    assert chosen["valid_ndcg"] == max(row["valid_ndcg"] for row in rows)
    assert len(asked_trials(searched, run, "lamps")) == 2


def test_what_optuna_has_found_is_not_searched_again(
    experiment: Experiment, screen: Screen, without_workers: list[str]
) -> None:
    pytest.importorskip("optuna")
    searched = optuna(experiment, choose_by="objective")
    run = RunFolder(searched.run_dir)
    merge.run(searched, console=screen.console)
    assert sorted(one.split()[0] for one in without_workers) == ["lamps"] * 2 + ["tools"] * 2
    for domain in DOMAINS:
        rows = table(run, domain)
        (chosen,) = (row for row in rows if row["chosen"])
        assert chosen["final_objective"] == min(row["final_objective"] for row in rows)
    assert status(searched) == "finished"
    now = files(run.root)
    merge.run(searched, console=screen.console)
    assert files(run.root) == now

    # A trial that was cut off is run again, the finished one beside it is not.
    lost, kept = asked_trials(searched, run, "tools")
    (lost.folder / artifacts.MANIFEST).unlink()
    (run.cocktail_dir("tools") / artifacts.MANIFEST).unlink()
    before = files(kept.folder)
    without_workers.clear()
    merge.run(searched, console=screen.console)
    assert len(without_workers) == 1
    assert files(kept.folder) == before
    assert {one.folder for one in asked_trials(searched, run, "tools")} == {
        lost.folder,
        kept.folder,
    }
    assert all(one.is_finished for one in asked_trials(searched, run, "tools"))

    # Of another adapter nothing is known.
    manifest = run.ingredient_dir("tools") / artifacts.MANIFEST
    artifacts.write_json(manifest, {**artifacts.read_json(manifest), "metrics": {"changed": 1}})
    assert asked_trials(searched, run, "tools") == []


KILLED = """
import json, os, signal, sys, time
from pathlib import Path

from rc_ray import trial_process
from rc_ray.cli import app

driver, told = os.getpid(), Path(sys.argv[2])

def kill_the_driver(config):
    import psutil
    from rc_ray import mix_making
    from rc_ray.trial_process import run_merge_trial  # the worker's own

    learn_weights = mix_making.learn_weights

    def cut_off(*given, **options):
        for step in learn_weights(*given, **options):
            yield step
            below = psutil.Process(driver).children(recursive=True)
            told.write_text(json.dumps([one.pid for one in below]))
            os.kill(driver, signal.SIGKILL)
            time.sleep(600)  # Ray ends this process too

    if "granularity=linear" in json.loads(Path(config["trial"]).read_text())["label"]:
        mix_making.learn_weights = cut_off
    run_merge_trial(config)

trial_process.run_merge_trial = kill_the_driver
app(["merge", sys.argv[1]])
"""


@pytest.mark.slow
def test_a_killed_drivers_search_goes_on(
    experiment: Experiment, screen: Screen, tmp_path: Path, without_workers: list[str]
) -> None:
    """Killed after the first step of the second trial's learning, by its worker: no race."""
    run = RunFolder(experiment.run_dir)
    alone = experiment.model_copy(update={"output_dir": tmp_path / "alone"})
    shutil.copytree(run.root, alone.run_dir)
    path, told_path = tmp_path / "search.yaml", tmp_path / "below.json"
    path.write_text(json.dumps(experiment.model_dump(mode="json")))
    environment = {**os.environ, "PYTHONPATH": str(Path(merge.__file__).parents[1])}
    environment.pop("RAY_ADDRESS", None)

    def start(*command: str) -> subprocess.CompletedProcess[str]:
        whole = [sys.executable, *command]
        return subprocess.run(whole, env=environment, capture_output=True, text=True, timeout=400)

    killed = start("-c", KILLED, str(path), str(told_path))
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    # What still runs must not go on writing; some of Ray's own would stay for long.
    for number in json.loads(told_path.read_text()):
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(number)
            process.kill()
            process.wait(timeout=60)
    trials = [trial for domain in DOMAINS for trial in plan_trials(experiment, run, domain)]
    assert [trial.is_finished for trial in trials] == [True, False, False, False]
    before = files(trials[0].folder)

    again = start("-m", "rc_ray.cli", "merge", str(path))
    assert again.returncode == 0, again.stdout + again.stderr
    assert files(trials[0].folder) == before
    assert all(trial.is_finished for trial in trials)
    assert not list(trials[1].folder.glob(".mix.*"))

    merge.run(alone, console=screen.console)
    assert len(without_workers) == 4
    undisturbed = RunFolder(alone.run_dir)
    for domain in DOMAINS:
        assert [known(row) for row in table(run, domain)] == [
            known(row) for row in table(undisturbed, domain)
        ]
        for name in ("adapter_model.safetensors", "weights.json", "guard.json"):
            made = (run.cocktail_dir(domain) / name).read_bytes()
            assert made == (undisturbed.cocktail_dir(domain) / name).read_bytes()


def known(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table of trials but for how long it took."""
    return {name: value for name, value in row.items() if name != "seconds"}


def changed(experiment: Experiment, **fields: Any) -> Experiment:
    section = type(experiment.merge).model_validate({**experiment.merge.model_dump(), **fields})
    return experiment.model_copy(update={"merge": section})


def status(experiment: Experiment) -> str:
    return {one.stage: one.state for one in read_status(experiment)}["merge"]
