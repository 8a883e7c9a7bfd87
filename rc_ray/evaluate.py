"""The stage `evaluate`: every system ranks the frozen candidates and the whole catalogue.

Ray actors (rc_ray/scorer.py) score shards of users; each shard is a file, so a killed evaluation
goes on where it was. What the scores mean is decided in rc_ray/comparison.py and rc_ray/tables.py.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from rc_ray import artifacts, precision, recipes
from rc_ray.artifacts import RunFolder
from rc_ray.baseline_scores import BaselineRun, read_baseline
from rc_ray.compared import chosen_by_guard, left_out
from rc_ray.comparison import DomainScores, SystemScores, calibrate, catalogue_ranks
from rc_ray.config import Experiment
from rc_ray.core.domains import Domain, read_domain
from rc_ray.crew import Crew, EvaluationFailed, crew
from rc_ray.evaluate_plan import WORK, plan, prune
from rc_ray.probe_table import probe_table
from rc_ray.progress import Progress
from rc_ray.score_settings import Point, shared_points
from rc_ray.shards import (
    CatalogueShard,
    DomainRun,
    catalogue_shards,
    dtypes_of,
    read_arrays,
    read_scores,
    shards_of,
)
from rc_ray.systems import System
from rc_ray.tables import compare

__all__ = ["EvaluationFailed", "run"]


def run(experiment: Experiment, *, force: bool = False, console: Progress) -> Path:
    """Score, calibrate on validation users, and compare on test users.

    Call inside `ray_session`.

    Args:
        experiment: the whole experiment.
        force: score anew although finished scores are there.
        console: shows progress.

    Returns:
        The folder with `results.parquet`, `differences.parquet`, `probes.parquet`,
        `ranks.parquet`, `calibration.json` and `costs.json`.

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
    domains = {name: read_domain(folder.domain_dir(name)) for name in experiment.data.tested}
    plans = [plan(experiment, folder, domain, inputs) for domain in domains.values()]
    if force:
        shutil.rmtree(folder.root / WORK, ignore_errors=True)
    for line in left_out(experiment, folder):
        console.note(line)
    with crew(experiment, console) as actors:
        num_scores = score_lists(plans, actors)
        shared = shared_points(experiment, domains, [llm for llm, _ in plans])
        found = [
            _domain_scores(experiment, domains[llm.domain], llm, own, shared) for llm, own in plans
        ]
        num_scores += _rank_catalogues(found, plans, actors)
    if not num_scores:
        console.note("every score is there already")
    dtypes = precision.joined(*(one.dtypes for domain in found for one in domain.systems.values()))
    told = precision.mixed_precision("the scores", dtypes)
    if told is not None:
        console.note(told)
    seconds = time.monotonic() - start
    tables = compare(found, experiment)
    with artifacts.replaced_dir(target) as work:
        pq.write_table(tables.results, work / "results.parquet")
        pq.write_table(tables.differences, work / "differences.parquet")
        pq.write_table(probe_table(found, experiment), work / "probes.parquet")
        pq.write_table(tables.ranks, work / "ranks.parquet")
        artifacts.write_json(work / "calibration.json", tables.calibration)
        artifacts.write_json(work / "costs.json", [*_training_costs(folder, inputs), *tables.costs])
        artifacts.write_manifest(
            work,
            stage="evaluate",
            config=config,
            seed=experiment.seed,
            inputs=inputs,
            metrics={
                "dtypes": dtypes,
                # Of this run alone: scores that were on disk are not among them.
                "last_run_seconds": round(seconds, 1),
                "last_run_num_scores": num_scores,
                "last_run_scores_per_s": round(num_scores / seconds, 2),
            },
        )
    prune(folder.root / WORK, plans)
    return target


def score_lists(plans: Sequence[tuple[DomainRun, list[BaselineRun]]], actors: Crew) -> int:
    """Score every list that is not on disk; the number of (user, system) pairs scored."""
    # The longest work first, so that no actor is left alone with it in the end.
    baselines = sorted(
        (one for _, baselines in plans for one in baselines),
        key=lambda one: ("sasrec", "title_embedding", "item_knn", "popularity").index(one.system),
    )
    shards = [shard for llm, _ in plans if llm.systems for shard in shards_of(llm)]
    return actors.do([*baselines, *shards], "users x systems")


def _rank_catalogues(
    found: list[DomainScores],
    plans: Sequence[tuple[DomainRun, list[BaselineRun]]],
    actors: Crew,
) -> int:
    """Rank whole catalogues by the calibrated scores; puts the results into `found`."""
    shards: list[CatalogueShard] = []
    for domain, (llm, _) in zip(found, plans, strict=True):
        calibrations = {
            name: system.calibration
            for name, system in domain.systems.items()
            if system.calibration is not None
        }
        if calibrations:
            shards += catalogue_shards(llm, calibrations)
    num_scores = actors.do(shards, "users x systems, whole catalogue")
    for place, domain in enumerate(found):
        own = [shard for shard in shards if shard.run.domain == domain.domain.name]
        if own:
            found[place] = _with_catalogue(domain, own)
    return num_scores


def _with_catalogue(domain: DomainScores, shards: Sequence[CatalogueShard]) -> DomainScores:
    systems = dict(domain.systems)
    for run_of in shards[0].run.systems:
        scores = systems[run_of.system]
        parts: dict[str, list[dict[str, Any]]] = {}
        for shard in shards:
            parts.setdefault(shard.split, []).append(read_arrays(shard.path(run_of)))
        joined = {
            split: {
                name: np.concatenate([part[name] for part in found])
                for name in ("num_better", "num_tied", "top", "proved")
            }
            for split, found in parts.items()
        }
        dtypes = precision.joined(*(dtypes_of(part) for found in parts.values() for part in found))
        costs = [part["cost"] for found in parts.values() for part in found]
        proved = np.concatenate([one["proved"] for one in joined.values()])
        cost = {
            "what": "catalogue",
            "num_users": len(proved),
            "num_tokens": int(sum(cost[1] for cost in costs)),
            "seconds": float(sum(cost[0] for cost in costs)),
            "peak_memory_mb": float(max(cost[2] for cost in costs)),
            "proved": float(proved.mean()),
        }
        ranks = catalogue_ranks({split: [one] for split, one in joined.items()})
        systems[run_of.system] = replace(
            scores,
            ranks={**scores.ranks, **ranks},
            top={split: (one["top"],) for split, one in joined.items()},
            costs=(*scores.costs, cost),
            dtypes=tuple(precision.joined(scores.dtypes, dtypes)),
        )
    return replace(domain, systems=systems)


def _domain_scores(
    experiment: Experiment,
    domain: Domain,
    llm: DomainRun,
    baselines: Sequence[BaselineRun],
    shared: Mapping[System, Point],
) -> DomainScores:
    systems: dict[System, SystemScores] = {}
    for name in experiment.evaluate.systems:
        seeds = [one for one in baselines if one.system == name]
        if seeds:
            systems[name] = read_baseline(seeds)
    for system in llm.systems:
        scores = read_scores(llm, system)
        found = calibrate(
            scores.by_split,
            llm.cases,
            domain.log_prior(),
            experiment.evaluate,
            default=(0.0, 0.0, experiment.tune.learns_with_prior),
            negatives=experiment.data.negatives,
            shared=shared.get(system.system),
        )
        cost = {
            "what": "scoring",
            "num_users": scores.num_users,
            "num_tokens": scores.num_tokens,
            "seconds": scores.seconds,
            "peak_memory_mb": scores.peak_memory_mb,
            "proved": None,
        }
        systems[system.system] = replace(found, costs=(cost,), dtypes=scores.dtypes)
    ordered = {name: systems[name] for name in experiment.evaluate.systems if name in systems}
    aliases = {}
    if "guarded" in experiment.evaluate.systems and "guarded" not in systems:
        aliases["guarded"] = chosen_by_guard(RunFolder(experiment.run_dir), domain.name)
    return DomainScores(domain, llm.cases, llm.catalogue_cases, ordered, aliases)


def _training_costs(folder: RunFolder, inputs: dict[str, str]) -> list[dict[str, Any]]:
    """What the adapters cost to make, as their manifests tell."""
    rows = []
    for name in inputs:
        stage, _, domain = name.removeprefix("controls/").partition("/")
        if stage not in ("spirit", "ingredients", "joint", "cocktails"):
            continue
        metrics = artifacts.read_json(folder.root / name / artifacts.MANIFEST).get("metrics", {})
        rows.append(
            {
                "domain": domain or None,
                "system": {"ingredients": "ingredient", "cocktails": "cocktail"}.get(stage, stage),
                "what": "training",
                "num_users": None,
                "num_tokens": metrics.get("tokens"),
                "seconds": metrics.get("seconds"),
                "peak_memory_mb": metrics.get("peak_memory_mb"),
                "proved": None,
            }
        )
        for mix, own in metrics.get("mixes", {}).items():
            cost = {name: own[name] for name in ("seconds", "peak_memory_mb")}
            rows.append({**rows[-1], "system": mix, **cost})
    return rows
