"""What each stage's result is known by: the settings that shape it and the folders it reads.

The stages seal their folders with these, and the verb `show` compares with these, so what it says
is what a stage will do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rc_ray import __version__, artifacts
from rc_ray.artifacts import RunFolder
from rc_ray.config import OF_THE_SPIRIT, Experiment, System
from rc_ray.curves import shaping_config
from rc_ray.training_config import EXECUTION_FIELDS

_EXECUTION: dict[str, set[str]] = {
    "train": {
        "num_workers",
        "min_workers",
        "cpus_per_worker",
        "gpus_per_worker",
        *EXECUTION_FIELDS,
        "checkpoint_every",
        "num_checkpoints_to_keep",
        "checkpoint_storage",
        "max_failures",
    },
    "tune": {
        "max_concurrent_trials",
        "cpus_per_trial",
        "gpus_per_trial",
        "memory_per_trial_gb",
        "num_workers",
        "deepspeed",
        *EXECUTION_FIELDS,
        "domains_per_trial",
        "tokens_per_pass",
        "checkpoint_every",
    },
    "merge": {"cpus_per_task", "gpus_per_task", "micro_batch_size"},
    "evaluate": {"num_actors", "cpus_per_actor", "gpus_per_actor", "tokens_per_batch"},
}
"""Fields that say how a stage runs, not what comes out."""


@dataclass(frozen=True)
class Recipe:
    """Of one stage folder."""

    config: dict[str, Any]
    reads: tuple[str, ...]
    """Stage folders, relative to the run folder."""

    def inputs(self, run: RunFolder) -> dict[str, str]:
        """Name -> digest of everything that is read.

        Raises:
            ArtifactError: a stage before this one has not finished.
        """
        return {name: artifacts.manifest_digest(run.root / name) for name in self.reads}


def spirit(experiment: Experiment) -> Recipe:
    return Recipe(
        shaping_config(experiment.train, experiment),
        tuple(f"data/{name}" for name in experiment.data.spirit),
    )


def ingredient(experiment: Experiment, domain: str) -> Recipe:
    config = experiment.tune
    shaping: dict[str, Any]
    if config.is_planned:
        settings = config.settings()
        shaping = {
            "trials": [validated(shaping_config(one, experiment), experiment) for one in settings]
        }
    else:
        shaping = {
            **validated(shaping_config(config, experiment), experiment),
            "search": config.model_dump(
                mode="json", include={"search", "num_samples", "search_seed", "search_algorithm"}
            ),
        }
    if config.scheduler is not None:
        shaping["scheduler"] = config.scheduler.model_dump(mode="json")
    return Recipe(shaping, (f"data/{domain}",))


def validated(shaping: dict[str, Any], experiment: Experiment) -> dict[str, Any]:
    """Settings of one trial: of its training, and of the validation that ranks it."""
    return {
        **shaping,
        "num_valid_users": experiment.tune.num_valid_users,
        "valid_max_titles": experiment.evaluate.max_titles,
    }


def cocktail(experiment: Experiment, domain: str) -> Recipe:
    return Recipe(
        {
            "merge": experiment.merge.model_dump(mode="json", exclude=_EXECUTION["merge"]),
            "style": experiment.tune.style,
            "with_prior": experiment.tune.learns_with_prior,
            "model": experiment.model.model_dump(mode="json"),
        },
        ("spirit", f"ingredients/{domain}", f"data/{domain}"),
    )


def stages_needed(experiment: Experiment) -> set[str]:
    """The stages that the systems under comparison need."""
    systems = set(experiment.evaluate.systems)
    needed = {"prepare", "evaluate", "report"}
    if systems & set(OF_THE_SPIRIT):
        needed.add("train")
    if systems & {"ingredient", "uniform", "cocktail"}:
        needed.add("tune")
    if systems & {"uniform", "cocktail"}:
        needed.add("merge")
    return needed


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
                "model": experiment.model.model_dump(mode="json"),
            }
        case _:
            return {}


def baseline_seeds(experiment: Experiment, system: System) -> tuple[int, ...]:
    """The seeds that a baseline is trained with; more than one only where chance has a part."""
    num = experiment.evaluate.num_seeds if system == "sasrec" else 1
    return tuple(experiment.seed + place for place in range(num))


def evaluation(experiment: Experiment) -> Recipe:
    systems = set(experiment.evaluate.systems)
    reads = ["spirit"] if "spirit" in systems else []
    for domain in experiment.data.ingredients:
        reads.append(f"data/{domain}")
        if "ingredient" in systems:
            reads.append(f"ingredients/{domain}")
        if systems & {"uniform", "cocktail"}:
            reads.append(f"cocktails/{domain}")
    return Recipe(
        {
            "evaluate": experiment.evaluate.model_dump(mode="json", exclude=_EXECUTION["evaluate"]),
            "style": experiment.tune.style,
            # What the scores are ranked by where no validation user chooses.
            "with_prior": experiment.tune.learns_with_prior,
            "model": experiment.model.model_dump(mode="json"),
        },
        tuple(reads),
    )


def report(experiment: Experiment) -> Recipe:
    settings = experiment.model_dump(
        mode="json", exclude={"serve": True, "tracking": True, **_EXECUTION}
    )
    return Recipe({**settings, "version": __version__}, ("evaluate",))
