"""The choice among a domain's trials: the best by validation becomes the ingredient."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rc_ray import artifacts
from rc_ray.curves import read_metrics, summary
from rc_ray.errors import ArtifactError, UserError
from rc_ray.precision import joined, mixed_precision
from rc_ray.progress import Progress
from rc_ray.sweep_plan import Trial


class IngredientsFailed(UserError):
    """Some domains got no ingredient; the others are finished."""


def choose_trial(
    target: Path,
    trials: list[Trial],
    problems: dict[Path, str],
    seed: int,
    console: Progress,
    config: dict[str, Any],
) -> Trial:
    """Put the best trial's adapter in the ingredient's place, with the table of all trials.

    Args:
        target: the ingredient's folder.
        trials: all of the domain.
        problems: trial folder -> what went wrong.
        seed: of the experiment.
        console: is told which trials failed.
        config: what the ingredient is known by.

    Returns:
        The best trial; one that was stopped early is never it.

    Raises:
        IngredientsFailed: no trial has finished.
    """
    finished = [trial for trial in trials if trial.is_finished]
    if not finished:
        raise IngredientsFailed(
            next((problems[t.folder] for t in trials if t.folder in problems), "no trial finished")
        )
    stopped = [trial for trial in trials if trial not in finished and trial.is_stopped]
    num_failed = len(trials) - len(finished) - len(stopped)
    for trial in trials:
        if trial not in finished and trial not in stopped:
            why = problems.get(trial.folder, "it did not finish")
            console.note(f"{trial.domain}: the trial {trial.label} failed: {why}")
    # Equal validation: the lower training loss, then the order of the grid.
    best = max(finished, key=lambda t: (t.result["valid_ndcg"] or 0.0, -t.result["final_loss"]))
    with artifacts.replaced_dir(target) as work:
        shutil.copytree(best.folder / "adapter", work, dirs_exist_ok=True)
        # The trial checked the adapter before it sealed it; these are the same bytes.
        _check_copy(best, work)
        shutil.copyfile(best.metrics_path, work / "metrics.jsonl")
        _write_trials(work / "trials.parquet", trials, best, problems)
        artifacts.write_manifest(
            work,
            stage="tune",
            config=config,
            seed=seed,
            inputs=trials[0].inputs,
            metrics={
                **summary(read_metrics(best.metrics_path)),
                **best.result,
                "num_failed": num_failed,
                "num_stopped": len(stopped),
            },
        )
    return best


def told_of_precision(what: str, trials: Iterable[Trial]) -> str | None:
    """What to tell where finished trials that are compared are not of one precision."""
    finished = (trial.result for trial in trials if trial.is_finished)
    return mixed_precision(what, joined(*(one.get("dtypes", ()) for one in finished)))


def _check_copy(trial: Trial, copy: Path) -> None:
    outputs = artifacts.read_json(trial.folder / artifacts.MANIFEST)["outputs"]
    for name, digest in outputs.items():
        place = Path(name)
        if place.parts[0] == "adapter":
            path = copy / place.relative_to("adapter")
            if not path.exists() or artifacts.sha256_file(path) != digest:
                raise ArtifactError(
                    f"{trial.folder / name}: not what the trial wrote; delete {trial.folder} and "
                    "run the stage again"
                )


def _write_trials(path: Path, trials: list[Trial], best: Trial, problems: dict[Path, str]) -> None:
    rows = []
    for trial in trials:
        curve = read_metrics(trial.metrics_path)
        metrics = trial.result if trial.is_finished else {}
        is_stopped = not metrics and trial.is_stopped
        error = None if metrics or is_stopped else problems.get(trial.folder, "it did not finish")
        rows.append(
            {
                "label": trial.label,
                "setting": json.dumps(trial.config["training"], sort_keys=True),
                "valid_ndcg": metrics.get("valid_ndcg"),
                "final_loss": metrics.get("final_loss"),
                "num_steps": len(curve),
                "seconds": metrics.get("seconds", sum(row["seconds"] for row in curve)),
                "chosen": trial is best,
                "stopped": is_stopped,
                "error": error,
            }
        )
    schema = pa.schema(
        [
            ("label", pa.string()),
            ("setting", pa.string()),
            ("valid_ndcg", pa.float64()),
            ("final_loss", pa.float64()),
            ("num_steps", pa.int64()),
            ("seconds", pa.float64()),
            ("chosen", pa.bool_()),
            ("stopped", pa.bool_()),
            ("error", pa.string()),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
