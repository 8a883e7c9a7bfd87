"""Ray actors rank the test candidates of every domain with every system; the tables follow.

An actor loads the base once, folds one adapter after another into it and scores shards of users
(rc_ray/shards.py). Each shard is a file, so a killed evaluation goes on where it was. What the
scores mean is decided in rc_ray/comparison.py. Ray is imported inside the functions.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rc_ray import artifacts, recipes
from rc_ray.artifacts import RunFolder
from rc_ray.comparison import DomainScores, SystemScores, calibration, compare, popularity
from rc_ray.config import Experiment, System
from rc_ray.core.domains import Domain, RankingCase, read_domain, sample
from rc_ray.errors import UserError
from rc_ray.progress import Progress
from rc_ray.session import num_fitting, require_resources
from rc_ray.shards import DomainRun, Shard, SystemRun, read_scores, shards_of

_ADAPTERS: dict[System, str] = {
    "base": "",
    "spirit": "spirit",
    "ingredient": "ingredients/{domain}",
    "uniform": "cocktails/{domain}/uniform",
    "cocktail": "cocktails/{domain}",
}
"""Where a system's adapter lies in the run folder."""


_WORK = "evaluate.work"
_PATIENCE_S = 60.0


class EvaluationFailed(UserError):
    """A shard could not be scored; finished shards are kept."""


def run(experiment: Experiment, *, force: bool = False, console: Progress) -> Path:
    """Score, calibrate on validation users, and compare on test users, warm and cold.

    Call inside `ray_session`.

    Args:
        experiment: the whole experiment.
        force: score anew although finished scores are there.
        console: shows progress.

    Returns:
        The folder with `results.parquet`, `differences.parquet`, `ranks.parquet` and
        `calibration.json`.

    Raises:
        ArtifactError: a stage before this one has not finished.
        ConfigError: the cluster has no room for a single actor.
        EvaluationFailed: scoring failed.
    """
    folder = RunFolder(experiment.run_dir.absolute())
    target = folder.evaluate_dir
    console.stage("evaluate: every system on the frozen candidates")
    recipe = recipes.evaluation(experiment)
    config, inputs = recipe.config, recipe.inputs(folder)
    mark = artifacts.fingerprint(config=config, seed=experiment.seed, inputs=inputs)
    if not force and artifacts.is_finished(target, mark):
        console.note(f"{target} is up to date")
        return target
    start = time.monotonic()
    domains = {name: read_domain(folder.domain_dir(name)) for name in experiment.data.ingredients}
    runs = [plan_run(experiment, folder, domain, inputs) for domain in domains.values()]
    num_scores = score_all(experiment, runs, force=force, console=console)
    seconds = time.monotonic() - start
    tables = compare(
        [_domain_scores(experiment, domains[run.domain], run) for run in runs],
        experiment.evaluate,
        experiment.seed,
    )
    with artifacts.replaced_dir(target) as work:
        pq.write_table(tables.results, work / "results.parquet")
        pq.write_table(tables.differences, work / "differences.parquet")
        pq.write_table(tables.ranks, work / "ranks.parquet")
        artifacts.write_json(work / "calibration.json", tables.calibration)
        artifacts.write_manifest(
            work,
            stage="evaluate",
            config=config,
            seed=experiment.seed,
            inputs=inputs,
            metrics={
                # Of this run alone: scores that were on disk are not among them.
                "last_run_seconds": round(seconds, 1),
                "last_run_num_scores": num_scores,
                "last_run_scores_per_s": round(num_scores / seconds, 2),
            },
        )
    prune(folder.root / _WORK, runs)
    return target


def plan_run(
    experiment: Experiment, folder: RunFolder, domain: Domain, inputs: dict[str, str]
) -> DomainRun:
    """What is to be scored on a domain by systems that need the LLM.

    A system's folder is named after everything that shapes its scores: a new ingredient makes its
    own scores and the mixes' stale, not those of the base or the spirit.
    """
    settings = experiment.evaluate
    cases = chosen_cases(experiment, domain)
    systems = []
    for system in settings.systems:
        if system == "popularity":
            continue
        adapter = _ADAPTERS[system].format(domain=domain.name)
        shaping = {
            "method": artifacts.METHOD,
            "model": experiment.model.model_dump(mode="json"),
            "style": experiment.tune.style,
            "max_titles": settings.max_titles,
            "domain": inputs[f"data/{domain.name}"],
            "adapter": inputs.get(adapter.removesuffix("/uniform"), "") + adapter,
            "cases": {split: [case.user_id for case in found] for split, found in cases.items()},
        }
        systems.append(
            SystemRun(
                system=system,
                adapter_dir=folder.root / adapter if adapter else None,
                folder=folder.root / _WORK / artifacts.digest(shaping)[:16],
            )
        )
    return DomainRun(
        domain=domain.name,
        domain_dir=folder.domain_dir(domain.name),
        cases=cases,
        systems=systems,
        style=experiment.tune.style,
        max_titles=settings.max_titles,
        tokens_per_batch=settings.tokens_per_batch,
    )


def prune(work: Path, runs: list[DomainRun]) -> None:
    """Remove the scores that belong to none of these systems: no evaluation would read them."""
    used = {system.folder for run in runs for system in run.systems}
    for path in work.iterdir() if work.exists() else ():
        if path not in used:
            shutil.rmtree(path, ignore_errors=True)


def chosen_cases(experiment: Experiment, domain: Domain) -> dict[str, list[RankingCase]]:
    """Validation, warm and cold cases that are ranked; never those of unlabeled users."""
    settings, seed = experiment.evaluate, experiment.seed
    return {
        "valid": sample(domain.cases("valid", "warm"), settings.num_valid_users, seed),
        "warm": sample(domain.cases("test", "warm"), settings.num_test_users, seed),
        "cold": sample(domain.cases("test", "cold"), settings.num_test_users, seed),
    }


def score_all(
    experiment: Experiment, runs: list[DomainRun], *, force: bool, console: Progress
) -> int:
    """Score every shard that is not on disk; the number of (user, system) pairs scored.

    Raises:
        EvaluationFailed: a shard failed, or its actor died more than twice.
    """
    if force:
        for system in (system for run in runs for system in run.systems):
            shutil.rmtree(system.folder, ignore_errors=True)
    pending = [shard for run in runs for shard in shards_of(run) if shard.missing]
    if not pending:
        console.note("every score is there already")
        return 0
    import ray

    from rc_ray.assets import model_dir
    from rc_ray.shards import ShardScorer

    settings = experiment.evaluate
    require_resources(
        "`evaluate.cpus_per_actor` and `evaluate.gpus_per_actor`",
        cpus=settings.cpus_per_actor,
        gpus=settings.gpus_per_actor,
        count=settings.num_actors or 1,
    )
    num_actors = settings.num_actors or max(
        1, num_fitting(settings.cpus_per_actor, settings.gpus_per_actor)
    )
    model = str(model_dir(experiment.model.path, console.note))
    actor_class = ray.remote(ShardScorer).options(
        num_cpus=settings.cpus_per_actor,
        num_gpus=settings.gpus_per_actor,
        max_restarts=2,
        max_task_retries=2,
    )
    actors = [
        actor_class.remote(
            model,
            experiment.model.path,
            experiment.model.dtype,
            settings.cpus_per_actor,
            settings.gpus_per_actor > 0,
        )
        for _ in range(min(num_actors, len(pending)))
    ]
    try:
        return _hand_out(actors, pending, console)
    finally:
        for actor in actors:
            ray.kill(actor)


def _hand_out(actors: list[Any], pending: list[Shard], console: Progress) -> int:
    """Give the shards to the actors that live: one that finds no room must not hold any."""
    import ray

    total = sum(shard.num_scores for shard in pending)
    task = console.task("users x systems", total)
    done = 0
    is_told = False
    starting = {actor.__ray_ready__.remote(): actor for actor in actors}
    running: dict[Any, tuple[Any, Shard, int]] = {}

    def give(actor: Any) -> None:
        if pending:
            shard = pending.pop(0)
            running[actor.score.remote(shard)] = actor, shard, shard.num_scores

    while running or pending:
        waiting = [*running, *(starting if pending else ())]
        found, _ = ray.wait(waiting, num_returns=1, timeout=None if running else _PATIENCE_S)
        if not found:
            if not is_told:
                console.note("evaluate: its actors wait for resources that others of Ray hold")
                is_told = True
            continue
        ready = found[0]
        try:
            answer = ray.get(ready)
        except ray.exceptions.RayError as error:
            answer = f"its process died: {str(error).splitlines()[0]}"
            if ready in starting:
                raise EvaluationFailed(f"evaluate: an actor: {answer}") from None
        if ready in starting:
            give(starting.pop(ready))
            continue
        actor, shard, num_scores = running.pop(ready)
        if answer:
            raise EvaluationFailed(f"evaluate: {shard.run.domain}: {answer}")
        done += num_scores
        task.update(done)
        give(actor)
    return total


def _domain_scores(experiment: Experiment, domain: Domain, run: DomainRun) -> DomainScores:
    log_prior = domain.log_prior()
    systems: dict[System, SystemScores] = {}
    if "popularity" in experiment.evaluate.systems:
        systems["popularity"] = popularity(run.cases, log_prior)
    for system in run.systems:
        scores = read_scores(run, system)
        systems[system.system] = calibration(
            scores,
            run.cases,
            log_prior,
            experiment.evaluate,
            default=(0.0, 0.0, experiment.tune.learns_with_prior),
        )
    return DomainScores(name=domain.name, cases=run.cases, systems=systems)
