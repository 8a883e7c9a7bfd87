"""What an evaluation scores: the cases and systems of each domain, and where their scores lie."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rc_ray import artifacts
from rc_ray.artifacts import RunFolder
from rc_ray.base_content import known_base
from rc_ray.baseline_scores import BaselineRun
from rc_ray.compared import scored_adapters
from rc_ray.config import Experiment
from rc_ray.core.domains import Domain, RankingCase, sample
from rc_ray.requests import ASKED_PROBES
from rc_ray.shards import NUM_SHOWN, DomainRun, SystemRun
from rc_ray.systems import BASELINES, System

WORK = "evaluate.work"
"""Where in the run folder all scores lie; an evaluation that was killed finds its own there."""


def plan(
    experiment: Experiment, folder: RunFolder, domain: Domain, inputs: dict[str, str]
) -> tuple[DomainRun, list[BaselineRun]]:
    """What is to be scored on a domain: by systems that need the LLM, and by baselines.

    A system's folder is named after everything that shapes its scores: a new ingredient makes its
    own scores and the mixes' stale, not those of the base or the spirit.
    """
    settings = experiment.evaluate
    cases = chosen_cases(experiment, domain)
    catalogue_cases = chosen_catalogue_cases(experiment, cases)
    common = {
        "method": artifacts.METHOD,
        "domain": inputs[f"data/{domain.name}"],
        "seed": experiment.split_seed,
        "cases": {split: [case.user_id for case in found] for split, found in cases.items()},
    }
    systems = []
    for system, adapter_dir in scored_adapters(experiment, folder, domain.name).items():
        shaping = {
            **common,
            "model": known_base(experiment.model),
            "style": experiment.tune.style,
            "max_titles": settings.max_titles,
            # By content: a mix that is new in the file leaves the scores of the others alone.
            "adapter": "" if adapter_dir is None else artifacts.adapter_digest(adapter_dir),
        }
        # Two systems of one adapter, as a control that the guard chose, have one set of scores.
        systems.append(
            SystemRun(
                system=system,
                adapter_dir=adapter_dir,
                folder=folder.root / WORK / artifacts.digest(shaping)[:16],
            )
        )
    llm = DomainRun(
        domain=domain.name,
        domain_dir=folder.domain_dir(domain.name),
        cases=cases,
        catalogue_cases=catalogue_cases,
        systems=systems,
        style=experiment.tune.style,
        max_titles=settings.max_titles,
        tokens_per_batch=settings.tokens_per_batch,
        seed=experiment.split_seed,
        num_top=max(NUM_SHOWN, *settings.ks),
        max_nodes=settings.catalogue_max_nodes,
    )
    baselines = []
    for system in settings.systems:
        if system not in BASELINES:
            continue
        for seed in baseline_seeds(experiment, system):
            shaping = {
                **common,
                "seed": seed,
                "system": system,
                "config": baseline_config(experiment, system),
                "ks": settings.ks,
                "catalogue": [len(found) for found in catalogue_cases.values()],
            }
            baselines.append(
                BaselineRun(
                    system=system,
                    domain=domain.name,
                    domain_dir=folder.domain_dir(domain.name),
                    cases=cases,
                    catalogue_cases=catalogue_cases,
                    settings=settings,
                    seed=seed,
                    probe_seed=experiment.split_seed,
                    num_top=llm.num_top,
                    folder=folder.root / WORK / artifacts.digest(shaping)[:16],
                )
            )
    return llm, baselines


def prune(work: Path, plans: Sequence[tuple[DomainRun, list[BaselineRun]]]) -> None:
    """Remove the scores that belong to none of these systems: no evaluation would read them."""
    used = {system.folder for llm, _ in plans for system in llm.systems}
    used |= {baseline.folder for _, baselines in plans for baseline in baselines}
    for path in work.iterdir() if work.exists() else ():
        if path not in used:
            shutil.rmtree(path, ignore_errors=True)


def chosen_cases(experiment: Experiment, domain: Domain) -> dict[str, Sequence[RankingCase]]:
    """Cases that are ranked, by split and by probe; never those of unlabeled users."""
    settings, seed = experiment.evaluate, experiment.split_seed
    cases: dict[str, Sequence[RankingCase]] = {
        "valid": sample(domain.cases("valid", "warm"), settings.num_valid_users, seed)
    }
    for split in ("warm", "cold", "cold_user", "few_shot"):
        cases[split] = sample(domain.cases("test", split), settings.num_test_users, seed)
    for probe in settings.probes:
        if probe in ASKED_PROBES:
            cases[probe] = sample(cases["warm"], settings.num_probe_users, seed)
    return cases


def chosen_catalogue_cases(
    experiment: Experiment, cases: dict[str, Sequence[RankingCase]]
) -> dict[str, Sequence[RankingCase]]:
    """Those of the test cases for whom the whole catalogue is ranked, by split."""
    num = experiment.evaluate.num_catalogue_users
    if num == 0:
        return {}
    return {
        split: sample(cases[split], num, experiment.split_seed)
        for split in ("warm", "cold", "cold_user", "few_shot")
        if cases[split]
    }


def baseline_config(experiment: Experiment, system: System) -> dict[str, Any]:
    """The settings that shape a baseline's scores."""
    settings = experiment.evaluate
    match system:
        case "item_knn":
            return settings.item_knn.model_dump(mode="json")
        case "sasrec":
            return settings.sasrec.model_dump(mode="json")
        case "title_embedding":
            return {
                **settings.title_embedding.model_dump(mode="json"),
                "model": known_base(experiment.model),
            }
        case _:
            return {}


def baseline_seeds(experiment: Experiment, system: System) -> tuple[int, ...]:
    """The seeds that a baseline is trained with; more than one only where chance has a part."""
    num = experiment.evaluate.num_seeds if system == "sasrec" else 1
    return tuple(experiment.seed + place for place in range(num))
