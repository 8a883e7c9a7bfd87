"""What the merge stage hands to the processes that make a domain's mixes; all of it JSON-able.

A domain's task gets one order for all its mixes. Of a search each trial has an order of its own, a
file whose path alone Ray Tune carries.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rc_ray import artifacts, recipes
from rc_ray.artifacts import RunFolder
from rc_ray.config import Experiment
from rc_ray.merge_choice import MergeTrial
from rc_ray.merge_config import MergeSetting

MEND = (
    "set `merge.micro_batch_size` or lower `merge.batch_size`, or with `merge.memory_per_task_gb` "
    "let fewer run side by side"
)
"""What helps where memory runs out."""


def make_order(
    experiment: Experiment,
    folder: RunFolder,
    domain: str,
    *,
    searching: Experiment | None = None,
) -> dict[str, Any]:
    """What the task of one domain needs to know.

    Args:
        experiment: whose mixes they are.
        folder: the run's.
        domain: its name.
        searching: the experiment that found this one by a search.

    Raises:
        ArtifactError: the domain or one of the adapters is not there yet.
    """
    recipe = recipes.cocktail(experiment, domain)
    config, inputs = recipe.config, recipe.inputs(folder)
    return {
        **open_order(experiment, folder, domain),
        "mixes": {
            name: plan_mix(experiment, folder, domain, name, searching=searching)
            for name in recipes.mixes(experiment)
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
        "spares_scored_users": merge.spares_scored_users,
        "num_cpus": merge.cpus_per_task,
        "use_gpu": merge.gpus_per_task > 0,
        "tokens_per_batch": experiment.evaluate.tokens_per_batch,
        "micro_batch_size": merge.micro_batch_size,
        "config": recipes.form(experiment),
        "guard": merge.guard.model_dump(mode="json"),
    }


def plan_mix(
    experiment: Experiment,
    folder: RunFolder,
    domain: str,
    name: str,
    *,
    searching: Experiment | None = None,
) -> dict[str, Any]:
    """One mix: its settings, and what it is known by; arguments as in `recipes.mix`.

    Raises:
        ArtifactError: the domain or one of the adapters is not there yet.
    """
    recipe = recipes.mix(experiment, domain, name, searching=searching)
    inputs = recipe.inputs(folder)
    known = artifacts.fingerprint(config=recipe.config, seed=experiment.seed, inputs=inputs)
    return {"config": recipe.config, "inputs": inputs, "fingerprint": known}


def plan_trials(experiment: Experiment, folder: RunFolder, domain: str) -> list[MergeTrial]:
    """The trials of one domain, one per setting; settings that come to the same mix count once.

    Raises:
        ArtifactError: the domain or one of the adapters is not there yet.
    """
    trials: dict[Path, MergeTrial] = {}
    for setting in experiment.merge.settings():
        trial = plan_trial(experiment, setting, folder, domain)
        trials.setdefault(trial.folder, trial)
    return list(trials.values())


def plan_trial(
    experiment: Experiment, setting: MergeSetting, folder: RunFolder, domain: str
) -> MergeTrial:
    """The trial of one setting.

    Raises:
        ArtifactError: the domain or one of the adapters is not there yet.
    """
    merge = experiment.merge
    variant = experiment.model_copy(update={"merge": merge.at(setting)})
    recipe = recipes.merge_trial(experiment, variant, domain)
    mix = plan_mix(variant, folder, domain, "cocktail", searching=experiment)
    inputs = mix["inputs"]
    return MergeTrial(
        domain=domain,
        variant=variant,
        label=merge.label(setting),
        # A mix's name holds no dash.
        folder=folder.mix_work_dir(domain) / f"trial-{mix['fingerprint'][:16]}",
        mix=mix,
        config=recipe.config,
        inputs=inputs,
        fingerprint=artifacts.fingerprint(
            config=recipe.config, seed=experiment.seed, inputs=inputs
        ),
    )


def asked_trials(experiment: Experiment, folder: RunFolder, domain: str) -> list[MergeTrial]:
    """The trials that Optuna has asked for so far; those of other adapters or data do not count.

    Raises:
        ArtifactError: an order is damaged, or the domain or an adapter is not there yet.
    """
    trials = []
    orders = orders_dir(experiment, folder)
    # By its name, for the orders of hundreds of domains lie here.
    for path in sorted(orders.glob(f"{domain}.*.json")):
        told = artifacts.read_json(path)["setting"]
        setting = MergeSetting.model_validate({k: told[k] for k in MergeSetting.model_fields})
        trial = plan_trial(experiment, setting, folder, domain)
        if order_path(orders, trial) == path:
            trials.append(trial)
    return trials


def trial_order(
    experiment: Experiment, folder: RunFolder, trial: MergeTrial, model: Path
) -> dict[str, Any]:
    """What `rc_ray.merge_trial` needs to run a trial, on any node; all JSON-able.

    Args:
        experiment: the one that searches.
        folder: the run's.
        trial: which one.
        model: the base model's folder on the driver's node.
    """
    merge = trial.variant.merge
    # As many as there are where the domain has the prompts.
    num_steps = merge.num_epochs * -(-merge.num_prompts // merge.batch_size)
    opened = open_order(trial.variant, folder, trial.domain)
    opened["spares_scored_users"] = experiment.merge.spares_scored_users
    return {
        "domain": trial.domain,
        "label": trial.label,
        "folder": str(trial.folder),
        "setting": {**trial.setting, "num_steps": num_steps},
        "opened": {**opened, "model_dir": str(model)},
        "mix": trial.mix,
        "choose_by": experiment.merge.choose_by,
        "model": experiment.model.model_dump(mode="json"),
        "model_dir": str(model),
        "num_cpus": merge.cpus_per_task,
        "use_gpu": merge.gpus_per_task > 0,
        "scheduler": None,
        "mend": MEND,
        "seed": experiment.seed,
        "config": trial.config,
        "inputs": trial.inputs,
    }


def orders_dir(experiment: Experiment, folder: RunFolder) -> Path:
    """Where the orders of this search lie; those of another one are not mixed with them.

    Named after the search and what shapes its trials, not after what is made beside the cocktail.
    """
    known = [
        experiment.merge.model_dump(
            mode="json",
            include={"search", "num_samples", "search_seed", "search_algorithm", "neighbours"},
        ),
        [recipes.merge_trial(experiment, one, "").config for one in experiment.variants()],
        experiment.seed,
        artifacts.METHOD,
    ]
    return folder.mix_work / ".orders" / artifacts.digest(known)[:16]


def order_path(orders: Path, trial: MergeTrial) -> Path:
    """Its name begins with the domain's, which has no dot."""
    return orders / f"{trial.domain}.{trial.folder.name}.json"
