"""The trials of a sweep, and how each is handed to a worker: a small file that names everything.

Ray Tune carries the file's path alone, so its books stay small with hundreds of domains.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from rc_ray import artifacts, recipes
from rc_ray.artifacts import RunFolder
from rc_ray.config import Experiment
from rc_ray.curves import shaping_config
from rc_ray.training_config import TrainingConfig

ERROR = "error.json"
"""In a trial's folder: why it failed."""
STOPPED = "stopped.json"
"""In a trial's folder: it was stopped early, in favour of others of its domain."""


@dataclass(frozen=True)
class Trial:
    """One setting on one domain."""

    domain: str
    setting: TrainingConfig
    label: str
    folder: Path
    """Named after what shapes the training: another validation finds the trained adapter there."""
    training_fingerprint: str
    fingerprint: str
    """Of training and validation."""
    config: dict[str, Any]
    inputs: dict[str, str]
    scheduler: dict[str, Any] | None = None
    """What may stop it early."""
    pooled: tuple[str, ...] = ()
    """Further domains whose histories it trains on."""
    own_share: Fraction | None = None
    """Of all examples, what `domain` gives, where others are pooled."""

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def is_finished(self) -> bool:
        return artifacts.is_finished(self.folder, self.fingerprint)

    @property
    def is_stopped(self) -> bool:
        """Whether this scheduler stopped it; another one's verdict does not count."""
        return was_stopped(self.folder, self.scheduler)

    @property
    def problem(self) -> str | None:
        """What went wrong, where something did."""
        path = self.folder / ERROR
        return str(artifacts.read_json(path)["error"]) if path.exists() else None

    @property
    def result(self) -> dict[str, Any]:
        """The metrics of a finished trial."""
        metrics: dict[str, Any] = artifacts.read_json(self.folder / artifacts.MANIFEST)["metrics"]
        return metrics


def was_stopped(folder: Path, scheduler: Mapping[str, Any] | None) -> bool:
    """Whether this scheduler stopped the trial of the folder."""
    path = folder / STOPPED
    if scheduler is None or not path.exists():
        return False
    return bool(artifacts.read_json(path)["scheduler"] == scheduler)


def plan_trials(experiment: Experiment, folder: RunFolder, domain: str, work: Path) -> list[Trial]:
    """The trials of one domain, one per point of the grid and draw.

    Raises:
        ArtifactError: the domain is not prepared.
    """
    inputs = recipes.ingredient(experiment, domain).inputs(folder)
    return [
        plan_trial(experiment, inputs, domain, work, setting)
        for setting in experiment.tune.settings()
    ]


def plan_trial(
    experiment: Experiment,
    inputs: dict[str, str],
    domain: str,
    work: Path,
    setting: TrainingConfig,
    *,
    pooled: tuple[str, ...] = (),
    own_share: Fraction | None = None,
) -> Trial:
    """The trial of one setting.

    Args:
        experiment: the whole experiment.
        inputs: name -> digest of everything that the domain's ingredient is made from.
        domain: its name.
        work: the folder of all trials.
        setting: of the training.
        pooled: further domains whose histories it trains on.
        own_share: of all examples, what `domain` gives; None draws from all histories alike.
    """
    shaping = shaping_config(setting, experiment, own_share)
    config = recipes.validated(shaping, experiment)
    training = artifacts.fingerprint(config=shaping, seed=experiment.seed, inputs=inputs)
    scheduler = experiment.tune.scheduler
    return Trial(
        domain=domain,
        setting=setting,
        label=_label(setting, tuple(experiment.tune.search)),
        folder=work / domain / training[:16],
        training_fingerprint=training,
        fingerprint=artifacts.fingerprint(config=config, seed=experiment.seed, inputs=inputs),
        config=config,
        inputs=inputs,
        scheduler=scheduler.model_dump(mode="json") if scheduler is not None else None,
        pooled=pooled,
        own_share=own_share,
    )


def trial_config(
    experiment: Experiment, folder: RunFolder, trial: Trial, model: Path, *, memory: int = 0
) -> dict[str, Any]:
    """What `rc_ray.trial` needs to run a trial, on any node; all JSON-able.

    Args:
        experiment: the whole experiment.
        folder: the run's.
        trial: which one.
        model: the base model's folder on the driver's node.
        memory: bytes that a process of the trial is given.
    """
    config = experiment.tune
    return {
        "domain": trial.domain,
        "label": trial.label,
        "run_dir": str(folder.root),
        "tracking": experiment.tracking.model_dump(mode="json"),
        "seed": experiment.seed,
        "num_listed": experiment.data.num_negatives,
        "model": experiment.model.model_dump(mode="json"),
        "model_dir": str(model),
        "num_cpus": config.cpus_per_trial,
        "num_gpus": config.gpus_per_trial,
        "use_gpu": config.gpus_per_trial > 0,
        "memory": memory,
        "num_workers": config.num_workers,
        "deepspeed": config.deepspeed.model_dump(mode="json"),
        "tokens_per_pass": config.tokens_per_pass,
        "checkpoint_every": config.checkpoint_every,
        "num_valid_users": config.num_valid_users,
        "valid_max_titles": experiment.evaluate.max_titles,
        "tokens_per_batch": experiment.evaluate.tokens_per_batch,
        "setting": trial.setting.model_dump(mode="json"),
        "domain_dir": str(folder.domain_dir(trial.domain)),
        "pooled_dirs": [str(folder.domain_dir(name)) for name in trial.pooled],
        "own_share": str(trial.own_share) if trial.own_share is not None else None,
        "folder": str(trial.folder),
        "training_fingerprint": trial.training_fingerprint,
        "config": trial.config,
        "inputs": trial.inputs,
        "scheduler": trial.scheduler,
    }


def order_path(orders: Path, trial: Trial) -> Path:
    """Its name begins with the domain's, which has no dot."""
    return orders / f"{trial.domain}.{trial.folder.name}.json"


def write_order(orders: Path, trial: Trial, config: Mapping[str, Any]) -> Path:
    """Write what a worker needs for a trial; the file's path is all that Ray Tune carries."""
    path = order_path(orders, trial)
    artifacts.write_json(path, dict(config))
    return path


def write_groups(orders: Path, trials: Iterable[Trial], size: int) -> list[Path]:
    """Put trials of one setting in groups, and write an order for each group.

    Args:
        orders: the folder with the trials' own orders.
        trials: in the order in which they should run.
        size: trials in a group at most.
    """
    by_setting: dict[str, list[Path]] = {}
    for trial in trials:
        known = artifacts.digest(trial.setting.model_dump(mode="json"))
        by_setting.setdefault(known, []).append(order_path(orders, trial))
    groups = []
    for paths in by_setting.values():
        for start in range(0, len(paths), size):
            names = [str(path) for path in paths[start : start + size]]
            groups.append(orders / "groups" / f"{artifacts.digest(names)[:16]}.json")
            artifacts.write_json(groups[-1], {"orders": names})
    return groups


def orders_in(path: Path) -> list[Path]:
    """The trials' orders behind what Ray Tune was given: a group's, or the one itself."""
    content = artifacts.read_json(path)
    return [Path(name) for name in content["orders"]] if "orders" in content else [path]


def read_orders(orders: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Every order's path and content, by name."""
    return [(path, artifacts.read_json(path)) for path in sorted(orders.glob("*.json"))]


def orders_of(
    orders: Path, domain: str, inputs: Mapping[str, str]
) -> list[tuple[Path, dict[str, Any]]]:
    """The orders of a domain as it is now; those of other data may lie beside them.

    Args:
        orders: the folder with the orders.
        domain: its name.
        inputs: name -> digest of everything that its ingredient is made from.
    """
    # By its name, for the orders of hundreds of domains lie here.
    found = ((path, artifacts.read_json(path)) for path in sorted(orders.glob(f"{domain}.*.json")))
    return [(path, order) for path, order in found if order["inputs"] == inputs]


def is_finished(order: Mapping[str, Any]) -> bool:
    """Whether the trial of an order is finished."""
    known = artifacts.fingerprint(
        config=order["config"], seed=order["seed"], inputs=order["inputs"]
    )
    return artifacts.is_finished(Path(order["folder"]), known)


def pending(trials: Iterable[Trial]) -> list[Trial]:
    """Those that still have to run."""
    return [trial for trial in trials if not trial.is_finished and not trial.is_stopped]


def _label(setting: TrainingConfig, searched: tuple[str, ...]) -> str:
    parts = []
    for key in searched:
        section, _, leaf = key.rpartition(".")
        parts.append(f"{key}={getattr(setting.lora if section else setting, leaf)}")
    return " ".join(parts)
