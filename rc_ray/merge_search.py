"""Ray Tune -> the best setting of every domain's cocktail: a trial per (domain, setting).

A trial makes one whole cocktail in a folder of its own under `cocktails.work/`, sealed with what
it was compared by, so whatever ended is never done twice. The domain's best goes on to the rest of
the merge stage, which makes the mixes beside it and asks the guard. Ray is imported inside the
functions, after the session has set it up.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rc_ray import artifacts, recipes
from rc_ray.artifacts import RunFolder
from rc_ray.config import Experiment
from rc_ray.errors import ArtifactError, UserError
from rc_ray.merge_choice import MergeTrial, best_trial, told, write_trials
from rc_ray.merge_config import MergeSetting
from rc_ray.merge_plan import (
    MEND,
    asked_trials,
    make_order,
    order_path,
    orders_dir,
    plan_trial,
    plan_trials,
    trial_order,
)
from rc_ray.precision import joined, mixed_precision
from rc_ray.progress import Progress
from rc_ray.session import num_fitting, require_resources, resources_text
from rc_ray.sweep_plan import ERROR

RESOURCE_FIELDS = "`merge.cpus_per_task`, `merge.gpus_per_task` and `merge.memory_per_task_gb`"


@dataclass
class Searched:
    """What a search found."""

    orders: list[dict[str, Any]] = field(default_factory=list)
    """Of the domains with a chosen setting, in place of those that were searched."""
    failed: dict[str, str] = field(default_factory=dict)
    """Domain -> why no setting could be chosen."""
    spent: dict[str, float] = field(default_factory=dict)
    """`wall_s` and `num_slots` of this session, `trials_s` seconds inside its trials."""


def search(
    experiment: Experiment,
    folder: RunFolder,
    orders: Sequence[Mapping[str, Any]],
    console: Progress,
) -> Searched:
    """Run what is left of the trials of some domains, and choose each domain's setting.

    Args:
        experiment: with `merge.search`.
        folder: the run's.
        orders: of the domains, see `merge_plan.make_order`.
        console: shows progress.

    Raises:
        ConfigError: the cluster has no room for a single trial.
    """
    result = Searched()
    trials: dict[str, list[MergeTrial]] = {}
    for order in orders:
        domain = order["domain"]
        try:
            found = _trials_of(experiment, folder, domain)
            _pending(found)  # a damaged record of a trial is a problem of this domain alone
            trials[domain] = found
        except ArtifactError as error:
            result.failed[domain] = str(error)
    start = time.monotonic()
    before = _seconds_in(trials)
    num_slots, problems = _run_trials(experiment, folder, trials, console)
    result.spent = {
        "wall_s": round(time.monotonic() - start, 3),
        "num_slots": num_slots,
        "trials_s": round(_seconds_in(trials) - before, 3),
    }
    for order in orders:
        if order["domain"] in trials:
            try:
                result.orders.append(
                    _chosen(experiment, folder, order, trials[order["domain"]], problems, console)
                )
            except UserError as error:
                result.failed[order["domain"]] = str(error)
    return result


def _trials_of(experiment: Experiment, folder: RunFolder, domain: str) -> list[MergeTrial]:
    """The planned trials of a domain, or those that Optuna has asked for so far."""
    find = plan_trials if experiment.merge.is_planned else asked_trials
    return find(experiment, folder, domain)


def _seconds_in(trials: Mapping[str, list[MergeTrial]]) -> float:
    """Seconds that the finished trials took."""
    finished = (one for found in trials.values() for one in found if one.is_finished)
    return sum(float(one.result["trial_seconds"]) for one in finished)


def _pending(trials: Iterable[MergeTrial]) -> list[MergeTrial]:
    return [trial for trial in trials if not trial.is_finished]


def _run_trials(
    experiment: Experiment,
    folder: RunFolder,
    trials: dict[str, list[MergeTrial]],
    console: Progress,
) -> tuple[int, dict[Path, str]]:
    """Run what is left of the trials, adding to them what Optuna asks for on the way.

    Returns:
        How many run side by side, and trial folder -> what went wrong.
    """
    merge = experiment.merge
    left = _pending(trial for found in trials.values() for trial in found)
    to_ask = 0
    if not merge.is_planned:
        to_ask = sum(max(0, merge.num_samples - len(found)) for found in trials.values())
    if not left and not to_ask:
        return 0, {}
    num_slots, died = _fit(experiment, folder, trials, left, console, to_ask=to_ask)
    if not merge.is_planned:
        for domain in trials:
            trials[domain] = _trials_of(experiment, folder, domain)
        left = _pending(trial for found in trials.values() for trial in found)
    problems = {
        path: f"its process died again and again; if memory ran out, {MEND} ({why})"
        for path, why in died.items()
    }
    for trial in left:
        if (trial.folder / ERROR).exists():
            problems[trial.folder] = artifacts.read_json(trial.folder / ERROR)["error"]
    return num_slots, problems


def _fit(
    experiment: Experiment,
    folder: RunFolder,
    trials: Mapping[str, list[MergeTrial]],
    left: Sequence[MergeTrial],
    console: Progress,
    *,
    to_ask: int,
) -> tuple[int, dict[Path, str]]:
    """Run the trials that are left, and `to_ask` more that Optuna chooses.

    Returns:
        How many run side by side, and trial folder -> what killed its process.
    """
    from rc_ray.assets import model_dir
    from rc_ray.sweep import Request, fit
    from rc_ray.sweep_view import SweepView
    from rc_ray.trial_process import run_merge_trial

    merge = experiment.merge
    request = Request(
        merge.cpus_per_task, merge.gpus_per_task, int((merge.memory_per_task_gb or 0.0) * 1e9)
    )
    require_resources(RESOURCE_FIELDS, cpus=request.cpus, gpus=request.gpus, memory=request.memory)
    fitting = num_fitting(request.cpus, request.gpus, request.memory)
    num_slots = max(1, min(fitting, merge.max_concurrent_trials or fitting))
    model = model_dir(experiment.model.path, console.note)
    orders = orders_dir(experiment, folder)
    for trial in left:
        order = trial_order(experiment, folder, trial, model)
        artifacts.write_json(order_path(orders, trial), order)
    searcher = _optuna(experiment, folder, trials, model) if to_ask else None
    num_trials = len(left) + to_ask
    console.note(
        f"{num_trials} trial(s), {min(num_slots, num_trials)} at a time, each "
        f"{resources_text(request.cpus, request.gpus, request.memory)}"
    )
    view = SweepView(
        console,
        orders,
        [trial.folder for trial in left],
        num_trials,
        request,
        fields=RESOURCE_FIELDS.replace(" and ", " or "),
    )
    with view.shown():
        died = fit(
            folder.mix_work / ".tune" / _search_name(experiment, folder, trials),
            [order_path(orders, trial) for trial in left],
            orders,
            run_merge_trial,
            request,
            num_slots=num_slots,
            max_concurrent=merge.max_concurrent_trials,
            searcher=searcher,
            num_samples=num_trials if to_ask else 1,
            note=console.note,
        )
    return num_slots, {Path(artifacts.read_json(path)["folder"]): why for path, why in died.items()}


def _optuna(experiment: Experiment, folder: RunFolder, domains: Iterable[str], model: Path) -> Any:
    from rc_ray.optuna_search import OptunaPerDomain

    orders = orders_dir(experiment, folder)

    def known(domain: str) -> list[tuple[Path, dict[str, Any]]]:
        paths = [order_path(orders, one) for one in asked_trials(experiment, folder, domain)]
        return [(path, artifacts.read_json(path)) for path in paths]

    def make(domain: str, setting: MergeSetting) -> tuple[Path, dict[str, Any]]:
        trial = plan_trial(experiment, setting, folder, domain)
        return order_path(orders, trial), trial_order(experiment, folder, trial, model)

    by_objective = experiment.merge.choose_by == "objective"
    return OptunaPerDomain(
        domains,
        experiment.merge,
        known,
        make,
        metric="final_objective" if by_objective else "valid_ndcg",
        mode="min" if by_objective else "max",
    )


def _search_name(experiment: Experiment, folder: RunFolder, domains: Iterable[str]) -> str:
    """Of Tune's books: another search, other adapters or other resources are another one."""
    made = {domain: recipes.cocktail(experiment, domain) for domain in domains}
    known = [
        {domain: [recipe.config, recipe.inputs(folder)] for domain, recipe in made.items()},
        experiment.merge.model_dump(mode="json"),
        experiment.seed,
        artifacts.METHOD,
    ]
    return artifacts.digest(known)[:16]


def _chosen(
    experiment: Experiment,
    folder: RunFolder,
    order: Mapping[str, Any],
    trials: list[MergeTrial],
    problems: Mapping[Path, str],
    console: Progress,
) -> dict[str, Any]:
    """The domain's order at its best setting, whose cocktail is taken from its trial.

    Raises:
        UserError: no trial has finished.
    """
    domain = order["domain"]
    for trial in trials:
        if not trial.is_finished:
            why = problems.get(trial.folder, "it did not finish")
            console.note(f"{domain}: the trial {trial.label} failed: {why}")
    best = best_trial(trials, experiment.merge.choose_by)
    if best is None:
        raise UserError(
            next((problems[t.folder] for t in trials if t.folder in problems), "no trial finished")
        )
    finished = [trial.result for trial in trials if trial.is_finished]
    dtypes = joined(*(one.get("dtypes", ()) for one in finished))
    precision = mixed_precision(f"{domain}: the settings", dtypes)
    if precision is not None:
        console.note(precision)
    table = folder.mix_work_dir(domain) / "trials.parquet"
    write_trials(table, trials, best, problems)
    made = make_order(best.variant, folder, domain, searching=experiment)
    made["mixes"]["cocktail"]["folder"] = str(best.mix_dir)
    # Known by the whole search, and read by it: the adapters of every setting.
    kept = ("config", "inputs", "fingerprint", "is_chosen_by_clicks", "spares_scored_users")
    return {
        **made,
        **{name: order[name] for name in kept},
        "search": {"told": told(experiment, trials, best), "table": str(table)},
    }
