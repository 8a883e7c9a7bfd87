"""Ray Tune -> one ingredient per domain: a trial per (domain, setting), the best by validation.

A trial is a plain function in one process. It keeps its own checkpoint and seals its own folder
under `ingredients.work/`, so whatever ended is never done twice, however the driver ended. Ray is
imported inside the functions, after the session has set it up.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rc_ray import artifacts, recipes
from rc_ray.artifacts import RunFolder
from rc_ray.config import Experiment
from rc_ray.curves import read_metrics, shaping_config, summary
from rc_ray.errors import ArtifactError, UserError
from rc_ray.progress import JsonlTail, Progress, TaskHandle, polled
from rc_ray.session import require_resources
from rc_ray.training_config import TrainingConfig

_MAX_RESTARTS = 2
"""Of a trial whose process died; an exception is final."""


class IngredientsFailed(UserError):
    """Some domains got no ingredient; the others are finished."""


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

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def is_finished(self) -> bool:
        return artifacts.is_finished(self.folder, self.fingerprint)


def run(experiment: Experiment, *, force: bool = False, console: Progress) -> Path:
    """Train the ingredients of all domains side by side and keep each domain's best.

    Call inside `ray_session`. A domain that fails does not keep the others from finishing.

    Args:
        experiment: the whole experiment.
        force: train anew although finished ingredients or trials are there.
        console: shows progress.

    Returns:
        The folder with one PEFT LoRA folder per domain.

    Raises:
        ConfigError: the cluster has no room for a single trial.
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
    for domain in experiment.data.ingredients:
        try:
            found = plan_trials(experiment, folder, domain, work)
            if not force and artifacts.is_finished(
                folder.ingredient_dir(domain),
                artifacts.fingerprint(
                    config=recipes.ingredient(experiment, domain).config,
                    seed=experiment.seed,
                    inputs=found[0].inputs,
                ),
            ):
                console.note(f"{folder.ingredient_dir(domain)} is up to date")
                continue
            trials[domain] = found
        except ArtifactError as error:
            failed[domain] = str(error)
    pending = [trial for found in trials.values() for trial in found if not trial.is_finished]
    problems = _fit(experiment, folder, work, pending, console) if pending else {}
    for domain, found in trials.items():
        try:
            best = _choose(folder.ingredient_dir(domain), found, problems, experiment.seed, console)
        except UserError as error:
            failed[domain] = str(error)
            continue
        row = _result(best)
        ndcg = row["valid_ndcg"]
        console.note(
            f"{domain}: loss {row['final_loss']:.3f}, "
            + ("no validation users" if ndcg is None else f"validation NDCG {ndcg:.3f}")
            + (f" with {best.label}" if len(found) > 1 else "")
        )
    if failed:
        raise IngredientsFailed(
            "\n".join(f"tune: no ingredient for {name}: {why}" for name, why in failed.items())
        )
    return target


def plan_trials(experiment: Experiment, folder: RunFolder, domain: str, work: Path) -> list[Trial]:
    """The trials of one domain, one per point of the grid.

    Raises:
        ArtifactError: the domain is not prepared.
    """
    inputs = recipes.ingredient(experiment, domain).inputs(folder)
    trials = []
    for setting in experiment.tune.settings():
        shaping = shaping_config(setting, experiment)
        config = recipes.validated(shaping, experiment)
        training = artifacts.fingerprint(config=shaping, seed=experiment.seed, inputs=inputs)
        trials.append(
            Trial(
                domain=domain,
                setting=setting,
                label=_label(setting, tuple(experiment.tune.search)),
                folder=work / domain / training[:16],
                training_fingerprint=training,
                fingerprint=artifacts.fingerprint(
                    config=config, seed=experiment.seed, inputs=inputs
                ),
                config=config,
                inputs=inputs,
            )
        )
    return trials


def trial_config(
    experiment: Experiment, folder: RunFolder, trial: Trial, model: Path
) -> dict[str, Any]:
    """What `rc_ray.trial` needs to run a trial, on any node."""
    return {
        "seed": experiment.seed,
        "num_listed": experiment.data.num_negatives,
        "model": experiment.model.model_dump(mode="json"),
        "model_dir": str(model),
        "num_cpus": experiment.tune.cpus_per_trial,
        "use_gpu": experiment.tune.gpus_per_trial > 0,
        "checkpoint_every": experiment.tune.checkpoint_every,
        "num_valid_users": experiment.tune.num_valid_users,
        "valid_max_titles": experiment.evaluate.max_titles,
        "tokens_per_batch": experiment.evaluate.tokens_per_batch,
        "setting": trial.setting.model_dump(mode="json"),
        "domain_dir": str(folder.domain_dir(trial.domain)),
        "folder": str(trial.folder),
        "training_fingerprint": trial.training_fingerprint,
        "config": trial.config,
        "inputs": trial.inputs,
    }


def _label(setting: TrainingConfig, searched: tuple[str, ...]) -> str:
    parts = []
    for key in searched:
        section, _, leaf = key.rpartition(".")
        parts.append(f"{key}={getattr(setting.lora if section else setting, leaf)}")
    return " ".join(parts)


def _fit(
    experiment: Experiment,
    folder: RunFolder,
    work: Path,
    pending: list[Trial],
    console: Progress,
) -> dict[Path, str]:
    """Run the trials; trial folder -> what went wrong."""
    from ray import tune

    from rc_ray.assets import model_dir
    from rc_ray.trial import run_trial

    config = experiment.tune
    require_resources(
        "`tune.cpus_per_trial` and `tune.gpus_per_trial`",
        cpus=config.cpus_per_trial,
        gpus=config.gpus_per_trial,
    )
    model = model_dir(experiment.model.path, console.note)
    space = [trial_config(experiment, folder, trial, model) for trial in pending]
    for trial in pending:
        (trial.folder / "error.json").unlink(missing_ok=True)
    records = work / ".tune"  # Tune's own books; ours are the trial folders
    shutil.rmtree(records, ignore_errors=True)
    tuner = tune.Tuner(
        tune.with_resources(
            run_trial, {"cpu": config.cpus_per_trial, "gpu": config.gpus_per_trial}
        ),
        param_space={"trial": tune.grid_search(space)},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=config.max_concurrent_trials,
            reuse_actors=True,  # the base model stays loaded between trials
        ),
        run_config=tune.RunConfig(
            name=".tune",
            storage_path=str(work),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=_MAX_RESTARTS),
        ),
    )
    console.note(f"{len(pending)} trial(s)")
    with polled(_look(pending, console)):
        results = tuner.fit()
    problems = {}
    for result in results:
        if result.error is not None:
            lines = str(result.error).strip().splitlines() or [type(result.error).__name__]
            problems[Path(result.config["trial"]["folder"])] = lines[-1]
    for trial in pending:
        if (trial.folder / "error.json").exists():
            problems[trial.folder] = artifacts.read_json(trial.folder / "error.json")["error"]
    return problems


def _look(pending: list[Trial], console: Progress) -> Any:
    """A function that shows what the trials have written since its last call."""
    tails = {trial.folder: JsonlTail(trial.metrics_path) for trial in pending}
    tasks: dict[Path, TaskHandle] = {}

    def look() -> None:
        for trial in pending:
            rows = [row for row in tails[trial.folder].read_new() if "step" in row]
            if not rows:
                continue
            if trial.folder not in tasks:
                name = f"{trial.domain} {trial.label}".strip()
                tasks[trial.folder] = console.task(name, trial.setting.num_steps)
            tasks[trial.folder].update(rows[-1]["step"] + 1, loss=rows[-1]["loss"])

    return look


def _result(trial: Trial) -> dict[str, Any]:
    metrics: dict[str, Any] = artifacts.read_json(trial.folder / artifacts.MANIFEST)["metrics"]
    return metrics


def _choose(
    target: Path, trials: list[Trial], problems: dict[Path, str], seed: int, console: Progress
) -> Trial:
    """Put the best trial's adapter in the ingredient's place, with the table of all trials."""
    from rc_ray.core.adapters import check_adapter, load_adapter
    from rc_ray.engines import check_trained

    finished = [trial for trial in trials if trial.is_finished]
    if not finished:
        raise IngredientsFailed(
            next((problems[t.folder] for t in trials if t.folder in problems), "no trial finished")
        )
    for trial in trials:
        if trial not in finished:
            why = problems.get(trial.folder, "it did not finish")
            console.note(f"{trial.domain}: the trial {trial.label} failed: {why}")
    # Equal validation: the lower training loss, then the order of the grid.
    best = max(finished, key=lambda t: (_result(t)["valid_ndcg"] or 0.0, -_result(t)["final_loss"]))
    with artifacts.replaced_dir(target) as work:
        shutil.copytree(best.folder / "adapter", work, dirs_exist_ok=True)
        adapter = load_adapter(work)
        check_adapter(adapter, target)
        check_trained(adapter, target)
        shutil.copyfile(best.metrics_path, work / "metrics.jsonl")
        _write_trials(work / "trials.parquet", trials, best, problems)
        artifacts.write_manifest(
            work,
            stage="tune",
            config={"trials": [trial.config for trial in trials]},
            seed=seed,
            inputs=trials[0].inputs,
            metrics={
                **summary(read_metrics(best.metrics_path)),
                **_result(best),
                "num_failed": len(trials) - len(finished),
            },
        )
    return best


def _write_trials(path: Path, trials: list[Trial], best: Trial, problems: dict[Path, str]) -> None:
    rows = []
    for trial in trials:
        metrics = _result(trial) if trial.is_finished else {}
        rows.append(
            {
                "setting": json.dumps(trial.config["training"], sort_keys=True),
                "valid_ndcg": metrics.get("valid_ndcg"),
                "final_loss": metrics.get("final_loss"),
                "seconds": metrics.get("seconds"),
                "chosen": trial is best,
                "error": problems.get(trial.folder),
            }
        )
    schema = pa.schema(
        [
            ("setting", pa.string()),
            ("valid_ndcg", pa.float64()),
            ("final_loss", pa.float64()),
            ("seconds", pa.float64()),
            ("chosen", pa.bool_()),
            ("error", pa.string()),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
