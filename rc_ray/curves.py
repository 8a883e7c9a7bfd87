"""What a training run leaves beside its adapter: the settings that shaped it and its loss curve."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

from rc_ray.artifacts import write_text
from rc_ray.base_content import known_base
from rc_ray.config import Experiment
from rc_ray.errors import ArtifactError
from rc_ray.precision import dtypes_in
from rc_ray.progress import JsonlTail
from rc_ray.training_config import EXECUTION_FIELDS, TrainingConfig

Curve = list[tuple[float, float]]
"""(step, value)."""


def shaping_config(
    training: TrainingConfig, experiment: Experiment, own_share: Fraction | None = None
) -> dict[str, Any]:
    """The settings that decide what a training run results in; those of its execution do not.

    Args:
        training: settings of the run.
        experiment: the whole experiment.
        own_share: of all examples, what the first domain gives; None pools all domains.
    """
    fields = set(TrainingConfig.model_fields) - set(EXECUTION_FIELDS)
    if training.valid_every is None:
        fields -= {"valid_every", "num_valid_histories", "patience"}
    shaping: dict[str, Any] = {
        "training": training.model_dump(mode="json", include=fields),
        "model": known_base(experiment.model),
    }
    if training.style == "instruct":  # its prompts list candidates
        shaping["data"] = {"num_negatives": experiment.data.num_negatives}
    if own_share is not None:
        shaping["own_share"] = str(own_share)
        if training.valid_every is not None:
            shaping["validated_on"] = "first domain"
    return shaping


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file in the order of steps; of a step that was run again, the last row."""
    rows = {row["step"]: row for row in JsonlTail(path).read_new() if "step" in row}
    return [rows[step] for step in sorted(rows)]


def read_curve(path: Path, name: str) -> Curve:
    """The finite values of one column of a metrics file; [] where file or column is absent."""
    return [
        (float(row["step"]), float(row[name]))
        for row in read_metrics(path)
        if isinstance(row.get(name), int | float) and math.isfinite(row[name])
    ]


def write_metrics(path: Path, rows: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a manifest says about a training run.

    Raises:
        ArtifactError: there are no rows.
    """
    if not rows:
        raise ArtifactError("the metrics of the training run are lost; run it again with --force")
    last = rows[-max(1, len(rows) // 10) :]
    seconds = sum(row["seconds"] for row in rows)
    tokens = sum(row["num_tokens"] for row in rows)
    best: dict[str, Any] = {}
    validated = [row for row in rows if math.isfinite(row.get("valid_loss", math.nan))]
    if validated:
        row = min(validated, key=lambda row: row["valid_loss"])
        best = {"best_valid_loss": row["valid_loss"], "best_num_steps": row["step"] + 1}
    dtypes = dtypes_in(rows)
    return {
        **best,
        **({"dtypes": dtypes} if dtypes else {}),
        "final_loss": sum(row["loss"] for row in last) / len(last),
        "num_steps": rows[-1]["step"] + 1,
        "seconds": round(seconds, 3),
        "tokens": tokens,
        "tokens_per_s": round(tokens / seconds, 1) if seconds else None,
    }
