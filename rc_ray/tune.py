"""Ray Tune -> one ingredient per domain: a trial per (domain, setting), the best by validation.

A trial is a plain function in one process. It keeps its own checkpoint and seals its own folder
under `ingredients.work/`, so whatever ended is never done twice, however the driver ended. Ray is
imported inside the functions, after the session has set it up.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rc_ray import artifacts, joint, recipes, tracking
from rc_ray.artifacts import RunFolder
from rc_ray.config import Experiment
from rc_ray.curves import read_metrics
from rc_ray.errors import ArtifactError, UserError
from rc_ray.progress import Progress
from rc_ray.session import resources_text
from rc_ray.sweep_choice import IngredientsFailed, choose_trial, told_of_precision
from rc_ray.sweep_plan import (
    ERROR,
    STOPPED,
    Trial,
    order_path,
    orders_in,
    orders_of,
    pending,
    plan_trial,
    plan_trials,
    read_orders,
    trial_config,
    write_groups,
    write_order,
)
from rc_ray.sweep_resources import check_request, make_request, slots
from rc_ray.sweep_summary import write_summary
from rc_ray.training_config import TrainingConfig

_MAX_LINES = 20
"""Domains that are told one by one at the end."""


def run(experiment: Experiment, *, force: bool = False, console: Progress) -> Path:
    """Train the ingredients of all domains side by side and keep each domain's best.

    Call inside `ray_session`. A domain that fails does not keep the others from finishing.

    Args:
        experiment: the whole experiment.
        force: train anew although finished ingredients or trials are there.
        console: shows progress.

    Returns:
        The folder with one PEFT LoRA folder per domain, and the sweep's summary. Where the system
        `joint` is compared, its LoRAs lie in `controls/joint/<domain>`.

    Raises:
        ConfigError: the cluster has no room for a single trial, or no trial could do what is asked.
        IngredientsFailed: names the domains without an ingredient and why.
    """
    folder = RunFolder(experiment.run_dir.absolute())
    target = folder.root / "ingredients"
    work = folder.root / "ingredients.work"
    console.stage("tune: the ingredients")
    if force:
        shutil.rmtree(work, ignore_errors=True)
    failed: dict[str, str] = {}
    trials: dict[str, list[Trial]] = {}
    up_to_date: list[str] = []
    for domain in experiment.data.ingredients:
        try:
            inputs = recipes.ingredient(experiment, domain).inputs(folder)
            if not force and _is_up_to_date(experiment, folder, domain, inputs):
                up_to_date.append(domain)
                continue
            found = _trials_of(experiment, folder, domain, work)
            pending(found)  # a damaged record of a trial is a problem of this domain alone
            trials[domain] = found
        except ArtifactError as error:
            failed[domain] = str(error)
    if len(up_to_date) > _MAX_LINES:
        console.note(f"{len(up_to_date)} ingredients in {target} are up to date")
    else:
        for domain in up_to_date:
            console.note(f"{folder.ingredient_dir(domain)} is up to date")
    start = time.monotonic()
    before = _seconds_trained(trials)
    num_slots, problems = _run_trials(experiment, folder, work, trials, console)
    spent = {
        "wall_s": round(time.monotonic() - start, 3),
        "num_slots": num_slots,
        # A trial that begins anew leaves fewer seconds behind than it had.
        "training_s": max(0.0, round(_seconds_trained(trials) - before, 3)),
    }
    lines = []
    for domain, found in trials.items():
        try:
            recipe = recipes.ingredient(experiment, domain).config
            best = choose_trial(
                folder.ingredient_dir(domain), found, problems, experiment.seed, console, recipe
            )
        except UserError as error:
            failed[domain] = str(error)
            continue
        row = best.result
        ndcg = row["valid_ndcg"]
        lines.append(
            f"{domain}: loss {row['final_loss']:.3f}, "
            + ("no validation users" if ndcg is None else f"validation NDCG {ndcg:.3f}")
            + (f" with {best.label}" if len(found) > 1 else "")
        )
    for line in lines[:_MAX_LINES]:
        console.note(line)
    chosen = (trial for name, found in trials.items() if name not in failed for trial in found)
    told = told_of_precision("the trials", chosen)
    if told is not None:
        console.note(told)
    if trials:
        path = write_summary(experiment, folder, failed, spent)
        if len(lines) > _MAX_LINES or len(lines) < sum(map(len, trials.values())):
            more = len(lines) - _MAX_LINES
            console.note(f"{f'{more} more domains' if more > 0 else 'all trials'}: {path}")
    if failed:
        raise IngredientsFailed(
            "\n".join(f"tune: no ingredient for {name}: {why}" for name, why in failed.items())
        )
    if "joint" in experiment.evaluate.systems:
        joint.run(experiment, folder, _fit, force=force, console=console)
    return target


def _is_up_to_date(
    experiment: Experiment, folder: RunFolder, domain: str, inputs: Mapping[str, str]
) -> bool:
    wanted = artifacts.fingerprint(
        config=recipes.ingredient(experiment, domain).config, seed=experiment.seed, inputs=inputs
    )
    return artifacts.is_finished(folder.ingredient_dir(domain), wanted)


def _trials_of(experiment: Experiment, folder: RunFolder, domain: str, work: Path) -> list[Trial]:
    """The planned trials of a domain, or those that Optuna has asked for so far."""
    if experiment.tune.is_planned:
        return plan_trials(experiment, folder, domain, work)
    inputs = recipes.ingredient(experiment, domain).inputs(folder)
    return [
        plan_trial(
            experiment, inputs, domain, work, TrainingConfig.model_validate(order["setting"])
        )
        for _, order in orders_of(_orders_dir(experiment, work), domain, inputs)
    ]


def _orders_dir(experiment: Experiment, work: Path) -> Path:
    """Where the orders of this search lie; those of another one are not mixed with them."""
    recipe = recipes.ingredient(experiment, "").config
    known = {"seed": experiment.seed, "method": artifacts.METHOD, **recipe}
    return work / ".orders" / artifacts.digest(known)[:16]


def _seconds_trained(trials: Mapping[str, list[Trial]]) -> float:
    """Seconds inside optimiser steps that the trials' loss curves tell of."""
    return sum(
        float(row["seconds"])
        for found in trials.values()
        for trial in found
        for row in read_metrics(trial.metrics_path)
    )


def _run_trials(
    experiment: Experiment,
    folder: RunFolder,
    work: Path,
    trials: dict[str, list[Trial]],
    console: Progress,
) -> tuple[int, dict[Path, str]]:
    """Run what is left of the trials, adding to them what Optuna asks for on the way.

    Returns:
        How many run side by side, and trial folder -> what went wrong.
    """
    config = experiment.tune
    left = pending(trial for found in trials.values() for trial in found)
    to_ask = 0
    if not config.is_planned:
        to_ask = sum(max(0, (config.num_samples or 0) - len(found)) for found in trials.values())
    num_slots = 0
    problems: dict[Path, str] = {}
    if left or to_ask:
        num_slots, problems = _fit(experiment, folder, work, trials, left, console, to_ask=to_ask)
    if not config.is_planned:
        for domain in trials:
            trials[domain] = _trials_of(experiment, folder, domain, work)
    # A domain whose other trials failed: the best of those that were stopped runs to its end.
    rescued = []
    for found in trials.values():
        stopped = [trial for trial in found if trial.is_stopped]
        if stopped and not any(trial.is_finished for trial in found):
            rescued.append(replace(min(stopped, key=_loss_when_stopped), scheduler=None))
    if rescued:
        console.note(f"{len(rescued)} stopped trial(s) go on: no other of the domain finished")
        by_domain = {trial.domain: [trial] for trial in rescued}
        slots, more = _fit(experiment, folder, work, by_domain, rescued, console)
        num_slots, problems = max(num_slots, slots), {**problems, **more}
    return num_slots, problems


def _loss_when_stopped(trial: Trial) -> float:
    return float(artifacts.read_json(trial.folder / STOPPED)["valid_loss"])


def _fit(
    experiment: Experiment,
    folder: RunFolder,
    work: Path,
    trials: Mapping[str, list[Trial]],
    left: list[Trial],
    console: Progress,
    *,
    to_ask: int = 0,
) -> tuple[int, dict[Path, str]]:
    """Run the trials that are left, and `to_ask` more that Optuna chooses.

    Returns:
        How many run side by side, and trial folder -> what went wrong.
    """
    from rc_ray.assets import model_dir
    from rc_ray.sweep import fit
    from rc_ray.sweep_view import SweepView
    from rc_ray.trial_process import mend_memory, run_group, run_trial

    config = experiment.tune
    for line in tracking.prepare(experiment.tracking, folder.root):
        console.note(line)
    model = model_dir(experiment.model.path, console.note)
    check_request(config, model)
    request = make_request(experiment, folder, model, left, trials)
    num_slots = slots(config, request)
    orders_dir = _orders_dir(experiment, work)
    # Of all trials of these domains: what the finished ones showed decides whom ASHA stops.
    orders = {}
    for trial in (trial for found in trials.values() for trial in found):
        order = trial_config(experiment, folder, trial, model, memory=request.memory)
        orders[trial.folder] = write_order(orders_dir, trial, order)
    handed = [orders[trial.folder] for trial in left]
    grouped = config.domains_per_trial > 1
    if grouped:
        handed = write_groups(orders_dir, left, config.domains_per_trial)
    scheduler, searcher = None, None
    if config.scheduler is not None and all(trial.scheduler is not None for trial in left):
        from rc_ray.halving import HalvingPerDomain

        scheduler = HalvingPerDomain(orders_dir, config.scheduler.model_dump(mode="json"))
    if to_ask:
        searcher = _optuna(experiment, folder, work, trials, model, request.memory)
    num_trials = len(left) + to_ask
    num_processes = len(handed) + to_ask
    console.note(
        f"{num_trials} trial(s)"
        + (f" in {num_processes} group(s)" if grouped else "")
        + f", {min(num_slots, num_processes)} at a time, each "
        f"{resources_text(request.cpus, request.gpus, request.memory)}"
        + (f" on each of {request.num_workers} workers" if request.num_workers > 1 else "")
    )
    view = SweepView(console, orders_dir, [trial.folder for trial in left], num_trials, request)
    with view.shown():
        died = fit(
            work / ".tune" / _sweep_name(experiment, folder, trials),
            handed,
            orders_dir / "groups" if grouped else orders_dir,
            run_group if grouped else run_trial,
            request,
            num_slots=num_slots,
            max_concurrent=config.max_concurrent_trials,
            scheduler=scheduler,
            searcher=searcher,
            num_samples=num_trials if to_ask else 1,
            note=console.note,
        )
    problems = {
        Path(artifacts.read_json(order)["folder"]): (
            f"its process died again and again; if memory ran out, raise "
            f"`tune.memory_per_trial_gb`, or {mend_memory(config.domains_per_trial)} ({why})"
        )
        for path, why in died.items()
        for order in orders_in(path)
    }
    for _, order in read_orders(orders_dir):
        error = Path(order["folder"]) / ERROR
        if error.exists():
            problems[Path(order["folder"])] = artifacts.read_json(error)["error"]
    return num_slots, problems


def _optuna(
    experiment: Experiment,
    folder: RunFolder,
    work: Path,
    domains: Iterable[str],
    model: Path,
    memory: int,
) -> Any:
    from rc_ray.optuna_search import OptunaPerDomain

    orders_dir = _orders_dir(experiment, work)
    inputs = {name: recipes.ingredient(experiment, name).inputs(folder) for name in domains}

    def known(domain: str) -> list[tuple[Path, dict[str, Any]]]:
        return orders_of(orders_dir, domain, inputs[domain])

    def make(domain: str, setting: TrainingConfig) -> tuple[Path, dict[str, Any]]:
        trial = plan_trial(experiment, inputs[domain], domain, work, setting)
        order = trial_config(experiment, folder, trial, model, memory=memory)
        return order_path(orders_dir, trial), order

    return OptunaPerDomain(inputs, experiment.tune, known, make)


def _sweep_name(
    experiment: Experiment, folder: RunFolder, trials: Mapping[str, list[Trial]]
) -> str:
    """Of Tune's books: another search, other data or other resources are another sweep."""
    is_planned = experiment.tune.is_planned
    planned = {
        domain: [
            recipes.ingredient(experiment, domain).inputs(folder),
            [trial.fingerprint for trial in found] if is_planned else None,
        ]
        for domain, found in trials.items()
    }
    judged = [trial.scheduler for found in trials.values() for trial in found][:1]
    settings = experiment.tune.model_dump(mode="json")
    return artifacts.digest([planned, judged, settings, experiment.seed, artifacts.METHOD])[:16]
