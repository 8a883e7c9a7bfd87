"""A search over merge settings on Ray Tune: one run for all domains, each trial only once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rc_ray import artifacts, merge, merge_trial, mixing, prepare, recipes, sweep
from rc_ray.artifacts import RunFolder
from rc_ray.config import Experiment, load
from rc_ray.core.adapters import load_adapter, save_adapter
from rc_ray.core.domains import read_domain
from rc_ray.guard import read_guard
from rc_ray.merge_prompts import valid_parts
from rc_ray.merge_search import plan_trials
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

    def fit(books: Path, orders: list[Path], *others: Any, **options: Any) -> dict[Path, str]:
        for path in orders:
            order = artifacts.read_json(path)
            ran.append(f"{order['domain']} {order['mix']['config']['mix']['granularity']}")
            begin(Path(order["folder"]))
            try:
                merge_trial.mix_cocktail(order)
            except Exception as error:
                fail(Path(order["folder"]), error, mend=order["mend"])
        return {}

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


def changed(experiment: Experiment, **fields: Any) -> Experiment:
    section = type(experiment.merge).model_validate({**experiment.merge.model_dump(), **fields})
    return experiment.model_copy(update={"merge": section})


def status(experiment: Experiment) -> str:
    return {one.stage: one.state for one in read_status(experiment)}["merge"]
