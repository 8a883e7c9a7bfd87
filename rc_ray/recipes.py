"""What each stage's result is known by: the settings that shape it and the folders it reads.

The stages seal their folders with these, and the verb `show` compares with these, so what it says
is what a stage will do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from rc_ray import __version__, artifacts
from rc_ray.artifacts import RunFolder
from rc_ray.base_content import known_base
from rc_ray.config import Experiment
from rc_ray.curves import shaping_config
from rc_ray.errors import ArtifactError
from rc_ray.mix_config import FixedMix, LearnedMix, MixConfig
from rc_ray.training_config import EXECUTION_FIELDS, TrainingConfig

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
    "merge": {
        "cpus_per_task",
        "gpus_per_task",
        "memory_per_task_gb",
        "max_concurrent_trials",
        "micro_batch_size",
    },
    "evaluate": {"num_actors", "cpus_per_actor", "gpus_per_actor", "tokens_per_batch"},
}
"""Fields that say how a stage runs, not what comes out."""

_MADE_BY = {
    "data": "prepare",
    "spirit": "train",
    "ingredients": "tune",
    "controls": "tune",
    "cocktails": "merge",
    "evaluate": "evaluate",
}
"""The first folder of what a stage reads -> the verb that makes it."""

_MADE_UP_FROM = "titles that are not held out"
"""What `objective: distillation` makes users up from. Mixes from before, whose users had held-out
titles too, do not say it, and are stale."""


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
        for name in self.reads:
            if not (run.root / name / artifacts.MANIFEST).exists():
                verb = _MADE_BY[name.partition("/")[0]]
                raise ArtifactError(f"{run.root / name}: not there yet; run `rc-ray {verb}` first")
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


def joint(experiment: Experiment, domain: str) -> Recipe:
    """Of a LoRA trained on the spirit's domains and this one at once."""
    return Recipe(
        {
            "trials": [
                validated(shaping_config(one, experiment, share), experiment)
                for one, share in joint_settings(experiment)
            ]
        },
        (f"data/{domain}", *(f"data/{name}" for name in experiment.data.spirit)),
    )


def joint_settings(experiment: Experiment) -> tuple[tuple[TrainingConfig, Fraction], ...]:
    """The ingredient's, with steps for as many histories as spirit and ingredient saw together.

    Each with the share of these histories that the ingredient saw, all of its own domain.
    """
    train, found = experiment.train, []
    for one in experiment.tune.settings():
        num_own = one.num_steps * one.batch_size
        num_histories = train.num_steps * train.batch_size + num_own
        num_steps = math.ceil(num_histories / one.batch_size)
        setting = one.model_copy(update={"num_steps": num_steps})
        found.append((setting, Fraction(num_own, num_histories)))
    return tuple(found)


def adapters(experiment: Experiment, domain: str) -> dict[str, str]:
    """What is mixed on a domain: name of each adapter -> its stage folder in the run folder."""
    own = {"spirit": "spirit", "ingredient": f"ingredients/{domain}"}
    return {name: own.get(name, f"ingredients/{name}") for name in experiment.adapter_names(domain)}


def mixes(experiment: Experiment) -> dict[str, MixConfig]:
    """Every mix of a domain by name: the cocktail, the uniform one, and the named ones."""
    setting = experiment.merge.setting({})
    cocktail = LearnedMix(**{name: getattr(setting, name) for name in LearnedMix.model_fields})
    found: dict[str, MixConfig] = {"cocktail": cocktail, "uniform": FixedMix(method="linear")}
    if "random_spirit" in experiment.evaluate.systems:
        found["random_spirit"] = cocktail
    return {**found, **experiment.merge.mixes}


def mix(
    experiment: Experiment, domain: str, name: str, *, searching: Experiment | None = None
) -> Recipe:
    """Of one mix alone, so that another mix in the file does not make it stale.

    Args:
        experiment: whose mix it is.
        domain: its name.
        name: of the mix.
        searching: the experiment that tries this one as a setting; it says who chooses.
    """
    config = mixes(experiment)[name]
    shaping: dict[str, Any] = {
        "mix": config.model_dump(mode="json"),
        "rank": experiment.merge.rank,
        **form(experiment),
    }
    if name == "random_spirit":
        shaping["random"] = ["spirit"]
    if _is_calibrated(config):
        shaping["scores"] = _choosing(searching or experiment)  # by equal weights
    if _is_transductive(config):
        shaping["num_test_users"] = experiment.evaluate.num_test_users
    if _is_made_up(config):
        shaping["made_up_from"] = _MADE_UP_FROM
    if _is_weighed(config):
        shaping["adapters"] = list(adapters(experiment, domain))
    return Recipe(shaping, (*adapters(experiment, domain).values(), f"data/{domain}"))


def merge_trial(experiment: Experiment, variant: Experiment, domain: str) -> Recipe:
    """Of the cocktail at one setting, and of what it is compared by.

    Args:
        experiment: the one that searches.
        variant: the same at one setting.
        domain: its name.
    """
    made = mix(variant, domain, "cocktail", searching=experiment)
    config = {
        **made.config,
        "choose_by": experiment.merge.choose_by,
        **_objective_seed(experiment),
    }
    if experiment.merge.is_chosen_by_clicks:
        config["scores"] = _choosing(experiment)
    return Recipe(config, made.reads)


def cocktail(experiment: Experiment, domain: str) -> Recipe:
    merge, made = experiment.merge, mixes(experiment)
    # Unsaid where it is the default: what was sealed before one could choose stays as it is.
    apart = _EXECUTION["merge"] | ({"search_algorithm"} if merge.is_planned else set())
    shaping: dict[str, Any] = {
        "merge": merge.model_dump(mode="json", exclude=apart),
        "made": list(made),
        **form(experiment),
        **_objective_seed(experiment),
    }
    variants = experiment.variants()
    if any(_is_transductive(config) for one in variants for config in mixes(one).values()):
        shaping["num_test_users"] = experiment.evaluate.num_test_users
    is_scored = any(_is_calibrated(config) for one in variants for config in mixes(one).values())
    # All of these calibrate as the evaluation does.
    if merge.guard.enabled or merge.is_chosen_by_clicks or is_scored:
        shaping["scores"] = _scores(experiment) | _spared(experiment)
    if any(_is_made_up(config) for one in variants for config in mixes(one).values()):
        shaping["made_up_from"] = _MADE_UP_FROM
    if any(_is_weighed(config) for config in mixes(experiment).values()):
        shaping["adapters"] = list(adapters(experiment, domain))
    mixed = dict.fromkeys(place for one in variants for place in adapters(one, domain).values())
    return Recipe(shaping, (*mixed, f"data/{domain}"))


def _objective_seed(experiment: Experiment) -> dict[str, Any]:
    """The seed of the prompts that an objective chooses on, unsaid where it is the experiment's.

    A search with a seed of its own was once measured on the experiment's prompts.
    """
    merge = experiment.merge
    chosen = merge.search is not None and merge.choose_by == "objective"
    if not chosen or merge.seed in (None, experiment.seed):
        return {}
    return {"objective_seed": merge.seed}


def _choosing(experiment: Experiment) -> dict[str, Any]:
    """How validation users choose before the guard asks anybody."""
    num_users = experiment.merge.guard.num_valid_users
    return _scores(experiment) | {"num_valid_users": num_users} | _spared(experiment)


def _spared(experiment: Experiment) -> dict[str, Any]:
    """How many users are scored, where those are not to choose; unsaid where anybody may."""
    if not experiment.merge.spares_scored_users:
        return {}
    return {"spared_test_users": experiment.evaluate.num_test_users}


def _is_weighed(config: MixConfig) -> bool:
    """Whether the order of the adapters says which weight is whose; inputs have no order."""
    return isinstance(config, FixedMix) and config.weights is not None


def _is_transductive(config: MixConfig) -> bool:
    return isinstance(config, LearnedMix) and config.prompts_of == "scored_users"


def _is_made_up(config: MixConfig) -> bool:
    return isinstance(config, LearnedMix) and config.objective == "distillation"


def _is_calibrated(config: MixConfig) -> bool:
    return isinstance(config, LearnedMix) and config.score == "calibrated"


def _scores(experiment: Experiment) -> dict[str, Any]:
    """What decides a calibration and the ranks under it."""
    fields = {"alphas", "gammas", "prior_in_trie", "calibration", "max_titles"}
    return experiment.evaluate.model_dump(mode="json", include=fields)


def form(experiment: Experiment) -> dict[str, Any]:
    """What mixes are made and scores computed with, beside adapters and data.

    `with_prior`: what the scores are ranked by, too, where no validation user chooses.
    """
    return {
        "style": experiment.tune.style,
        "with_prior": experiment.tune.learns_with_prior,
        "model": known_base(experiment.model),
    }


def stages_needed(experiment: Experiment) -> set[str]:
    """The stages that the systems under comparison need."""
    systems = set(experiment.evaluate.systems)
    needed = {"prepare", "evaluate", "report"}
    is_merged = any(experiment.is_mixed(system) for system in systems)
    if experiment.data.spirit and (is_merged or "spirit" in systems):
        needed.add("train")
    if is_merged or systems & {"ingredient", "joint"}:
        needed.add("tune")
    if is_merged:
        needed.add("merge")
    return needed


def evaluation(experiment: Experiment) -> Recipe:
    systems = set(experiment.evaluate.systems)
    # What a guard chose may be a system that is not compared by itself.
    is_guarded = "guarded" in systems
    reads = ["spirit"] if "spirit" in systems or (is_guarded and experiment.data.spirit) else []
    for domain in experiment.data.tested:
        reads.append(f"data/{domain}")
        is_ingredient = domain in experiment.data.ingredients
        if is_ingredient and ("ingredient" in systems or is_guarded):
            reads.append(f"ingredients/{domain}")
        if is_ingredient and "joint" in systems:
            reads.append(f"controls/joint/{domain}")
        if any(experiment.is_mixed(system) for system in systems):
            reads.append(f"cocktails/{domain}")
    return Recipe(
        {
            "evaluate": experiment.evaluate.model_dump(mode="json", exclude=_EXECUTION["evaluate"]),
            **form(experiment),
        },
        tuple(reads),
    )


def report(experiment: Experiment) -> Recipe:
    settings = experiment.model_dump(
        mode="json", exclude={"serve": True, "tracking": True, **_EXECUTION}
    )
    return Recipe({**settings, "version": __version__}, ("evaluate",))
