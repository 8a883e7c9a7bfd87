"""What the merge stage hands to the process that makes a domain's mixes; all of it JSON-able."""

from __future__ import annotations

from typing import Any

from rc_ray import artifacts, recipes
from rc_ray.artifacts import RunFolder
from rc_ray.config import Experiment


def make_order(experiment: Experiment, folder: RunFolder, domain: str) -> dict[str, Any]:
    """What the task of one domain needs to know.

    Raises:
        ArtifactError: the domain or one of the adapters is not there yet.
    """
    recipe = recipes.cocktail(experiment, domain)
    config, inputs = recipe.config, recipe.inputs(folder)
    return {
        **open_order(experiment, folder, domain),
        "mixes": {
            name: plan_mix(experiment, folder, domain, name) for name in recipes.mixes(experiment)
        },
        "work": str(folder.mix_work_dir(domain)),
        "target": str(folder.cocktail_dir(domain)),
        "curve_path": str(folder.root / "cocktails" / f".{domain}.entropy.jsonl"),
        "config": config,
        "inputs": inputs,
        "fingerprint": artifacts.fingerprint(config=config, seed=experiment.seed, inputs=inputs),
    }


def open_order(experiment: Experiment, folder: RunFolder, domain: str) -> dict[str, Any]:
    """What `OpenDomain` reads; nothing in it tells one mix of the adapters from another.

    Its `config` holds what shapes every mix of a domain.
    """
    adapters = recipes.adapters(experiment, domain)
    merge = experiment.merge
    return {
        "domain": domain,
        "domain_dir": str(folder.domain_dir(domain)),
        "adapters": {name: str(folder.root / place) for name, place in adapters.items()},
        "seed": experiment.seed,
        "split_seed": experiment.split_seed,
        "negatives": experiment.data.negatives,
        "evaluate": experiment.evaluate.model_dump(mode="json"),
        "is_chosen_by_clicks": merge.is_chosen_by_clicks,
        "num_cpus": merge.cpus_per_task,
        "use_gpu": merge.gpus_per_task > 0,
        "tokens_per_batch": experiment.evaluate.tokens_per_batch,
        "micro_batch_size": merge.micro_batch_size,
        "config": recipes.form(experiment),
        "guard": merge.guard.model_dump(mode="json"),
    }


def plan_mix(experiment: Experiment, folder: RunFolder, domain: str, name: str) -> dict[str, Any]:
    """One mix: its settings, and what it is known by.

    Raises:
        ArtifactError: the domain or one of the adapters is not there yet.
    """
    recipe = recipes.mix(experiment, domain, name)
    inputs = recipe.inputs(folder)
    known = artifacts.fingerprint(config=recipe.config, seed=experiment.seed, inputs=inputs)
    return {"config": recipe.config, "inputs": inputs, "fingerprint": known}
