"""Which stages of a run are finished, which are stale, and why: the verb `show`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from rc_ray import recipes
from rc_ray.artifacts import MANIFEST, RunFolder, fingerprint, read_json, sha256_file
from rc_ray.config import Experiment
from rc_ray.data_config import DataConfig, Section, domain_names
from rc_ray.errors import ArtifactError, ConfigError
from rc_ray.guard import ARTICLES, read_guard
from rc_ray.prepare import fingerprint_config
from rc_ray.training_config import TrainConfig
from rc_ray.tune_config import TuneConfig

_NAMES = {
    "made": "the set of mixes that `merge.mixes` and `evaluate.systems` ask for",
    "model.content": "what is noted of the files in the model's folder",
    "held_out_by": "the set of domains on which its adapter is mixed, and whose held-out titles "
    "and users it must not train on (`data.ingredients`, `data.guests`, `merge.neighbours`),",
    "trials": "the set of trials that `tune.search` asks for",
    "own_share": "the number of histories that spirit and ingredient learn from (`num_steps` and "
    "`batch_size` of `train` and `tune`)",
    "valid_max_titles": "`evaluate.max_titles`",
    "num_test_users": "`evaluate.num_test_users`",
    "style": "`tune.style`",
    "with_prior": "whether adapters learn with the prior (`tune.loss`, `tune.prior_in_loss`)",
}
"""What a setting is called by that a manifest knows under a name of its own."""
_SECTIONS: dict[str, tuple[str, type[Section]]] = {
    "prepare": ("data", DataConfig),
    "train": ("train", TrainConfig),
    "tune": ("tune", TuneConfig),
}
"""Stage -> the section of the file whose fields its manifest names without it."""

State = Literal["finished", "stale", "missing", "unneeded"]


@dataclass(frozen=True)
class StageStatus:
    """One stage; its folders taken together."""

    stage: str
    state: State
    detail: str
    """What is missing or stale, one reason for each folder; "" for a finished stage, and for one
    that no compared system needs."""


def dump(experiment: Experiment) -> str:
    """The resolved experiment as YAML that `config.load` reads back."""
    return yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_status(experiment: Experiment) -> list[StageStatus]:
    """State of every stage. Reads manifests only: raw files and outputs are not hashed anew."""
    run = RunFolder(experiment.run_dir)
    has_joint = "joint" in experiment.evaluate.systems
    folders = {
        "prepare": [run.domain_dir(name) for name in experiment.data.domains],
        "train": [run.spirit_dir],
        "tune": [
            *(run.ingredient_dir(name) for name in experiment.data.ingredients),
            *(run.joint_dir(name) for name in experiment.data.ingredients if has_joint),
        ],
        "merge": [run.cocktail_dir(name) for name in experiment.data.tested],
        "evaluate": [run.evaluate_dir],
        "report": [run.report_dir],
    }
    result = []
    stale: set[Path] = set()
    for stage, places in folders.items():
        missing, old = [], []
        for folder in places:
            name = str(folder.relative_to(run.root))
            if not (folder / MANIFEST).exists():
                missing.append(name)
                continue
            reason = next(_reasons(experiment, run, folder, stale), None)
            if reason is not None:
                stale.add(folder)
                old.append(f"{name} ({reason})")
        details = [f"not there: {', '.join(missing)}"] if missing else []
        details += old
        state: State = "missing" if missing else "stale" if old else "finished"
        if missing and stage not in recipes.stages_needed(experiment):
            state, details = "unneeded", []
        result.append(StageStatus(stage, state, "; ".join(details)))
    return result


def refuse_stale(path: Path, experiment: Experiment, stages: Collection[str]) -> None:
    """Refuse to build on stages that were made with other settings.

    Args:
        path: the experiment file.
        experiment: what it says.
        stages: those that are to be built on.

    Raises:
        ConfigError: names the stage and the verb that makes it anew.
    """
    for status in read_status(experiment):
        if status.stage in stages and status.state == "stale":
            raise ConfigError(
                f"`{status.stage}` in {experiment.run_dir} is stale: {status.detail}; "
                f"run `rc-ray {status.stage} {path}` with the same settings first"
            )


def refuse_without_inputs(experiment: Experiment, stage: str) -> None:
    """Refuse a stage of which no part has what it reads, before Ray is started for it.

    Raises:
        ArtifactError: names the first folder that is missing and the verb that makes it.
    """
    data = experiment.data
    parts = {
        "train": lambda: [recipes.spirit(experiment)],
        "tune": lambda: [recipes.ingredient(experiment, name) for name in data.ingredients],
        "merge": lambda: [recipes.cocktail(experiment, name) for name in data.tested],
        "evaluate": lambda: [recipes.evaluation(experiment)],
    }[stage]()
    missing = []
    for part in parts:
        try:
            part.inputs(RunFolder(experiment.run_dir))
            return
        except ArtifactError as error:
            missing.append(error)
    raise missing[0]


def told_by_merges(experiment: Experiment) -> Iterator[str]:
    """By domain that has a cocktail: what is served and why, and which mixes failed.

    Raises:
        ArtifactError: what a guard said is damaged or missing.
    """
    run = RunFolder(experiment.run_dir)
    for domain in experiment.data.tested:
        verdict = read_guard(run.cocktail_dir(domain))
        if verdict is not None:
            yield f"{domain}: the guard serves {ARTICLES[verdict.chosen]}. {verdict.sentences}"
        try:
            metrics = read_json(run.cocktail_dir(domain) / MANIFEST)["metrics"]
        except (ArtifactError, KeyError, TypeError):
            continue  # not there, or damaged, which the stage's state says
        for name, why in metrics.get("failed_mixes", {}).items():
            yield f"{domain}: no mix {name}: {why}; `rc-ray merge` tries it again"


def _reasons(
    experiment: Experiment, run: RunFolder, folder: Path, stale: set[Path]
) -> Iterator[str]:
    try:
        manifest = read_json(folder / MANIFEST)
        seed, recorded, inputs = manifest["seed"], manifest["config"], manifest["inputs"]
    except (ArtifactError, KeyError, TypeError):
        yield "its manifest is damaged"
        return
    is_data = folder == run.domain_dir(folder.name)
    if seed != (experiment.split_seed if is_data else experiment.seed):
        yield f"made with seed {seed}"
    config, reads = _wanted(experiment, run, folder)
    for name, digest in inputs.items():
        source = run.root / name
        if source in stale:
            yield f"{name} is stale"
        elif (source / MANIFEST).exists() and sha256_file(source / MANIFEST) != digest:
            yield f"{name} has changed"
        elif source.is_file() and sha256_file(source) != digest:
            yield f"{name} has changed"
    if reads is not None:
        for name in sorted(set(reads) ^ set(inputs)):
            yield f"{name} is {'new' if name in reads else 'no longer'} among what it reads"
    for field in _differing(recorded, config):
        yield f"{_said(manifest.get('stage', ''), field)} has changed"
    if fingerprint(config=config, seed=seed, inputs=inputs) != manifest.get("fingerprint"):
        yield "made by another version of the method"


def _wanted(
    experiment: Experiment, run: RunFolder, folder: Path
) -> tuple[dict[str, Any], tuple[str, ...] | None]:
    """Today's settings of a stage folder, and the stage folders it reads; None reads raw files."""
    domain = folder.name
    if folder == run.domain_dir(domain):
        source = next(one for one in experiment.data.sources if domain in domain_names(one))
        return fingerprint_config(experiment, source, domain), None
    recipe = {
        run.spirit_dir: lambda: recipes.spirit(experiment),
        run.ingredient_dir(domain): lambda: recipes.ingredient(experiment, domain),
        run.joint_dir(domain): lambda: recipes.joint(experiment, domain),
        run.cocktail_dir(domain): lambda: recipes.cocktail(experiment, domain),
        run.evaluate_dir: lambda: recipes.evaluation(experiment),
        run.report_dir: lambda: recipes.report(experiment),
    }[folder]()
    return recipe.config, recipe.reads


def _said(stage: str, field: str) -> str:
    """A setting of a manifest as the experiment file names it."""
    name = field.removeprefix("trials.")  # a sweep's trials differ in what is searched alone
    if name in _NAMES:
        return _NAMES[name]
    section, fields = _SECTIONS.get(stage, ("", Section))
    first, _, rest = name.partition(".")
    if first == "training":
        name = f"{section}.{rest}"
    elif first == "scores":
        name = f"evaluate.{rest}"
    elif first == "source":
        name = "data.sources"
    elif first in fields.model_fields:
        name = f"{section}.{name}"
    return f"`{name}`"


def _differing(recorded: Any, now: Any, path: str = "") -> Iterator[str]:
    """Dotted names of what differs, or stands on one side only."""
    if isinstance(recorded, Mapping) and isinstance(now, Mapping):
        for key in sorted(recorded.keys() | now.keys()):
            inner = f"{path}.{key}" if path else key
            if key in recorded and key in now:
                yield from _differing(recorded[key], now[key], inner)
            else:
                yield inner
    elif isinstance(recorded, list) and isinstance(now, list) and len(recorded) == len(now):
        for before, after in zip(recorded, now, strict=True):
            yield from _differing(before, after, path)
    elif recorded != now:
        yield path
