"""One experiment trained with several seeds on the same data, and what the seeds agree on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rc_ray import artifacts
from rc_ray.config import Experiment
from rc_ray.results import in_order, read_results

_SUMMARY = pa.schema(
    [
        ("domain", pa.string()),
        ("split", pa.string()),
        ("candidates", pa.string()),
        ("system", pa.string()),
        ("metric", pa.string()),
        ("mean", pa.float64()),
        ("standard_deviation", pa.float64()),
        ("lowest", pa.float64()),
        ("highest", pa.float64()),
        ("num_seeds", pa.int64()),
    ]
)


def variants(experiment: Experiment, num_seeds: int) -> list[Experiment]:
    """The experiment with seeds that follow its own; splits, candidates and users stay the same."""
    return [
        experiment.model_copy(
            update={
                "name": f"{experiment.name}-seed{experiment.seed + place}",
                "seed": experiment.seed + place,
                "data_seed": experiment.split_seed,
            }
        )
        for place in range(num_seeds)
    ]


def summarise(experiment: Experiment, runs: Sequence[Experiment]) -> Path:
    """Mean and spread over finished runs, as `summary.parquet` and `summary.md`.

    Args:
        experiment: names the folder, `<name>-seeds` beside the runs.
        runs: what `variants` returned, evaluated.

    Raises:
        ArtifactError: a run is not evaluated, or a table is damaged.
    """
    folders = [artifacts.RunFolder(one.run_dir).evaluate_dir for one in runs]
    values: dict[tuple[str, ...], list[float]] = {}
    for folder in folders:
        for key, score in read_results(folder).scores.items():
            values.setdefault(key, []).append(score.value)
    rows = [
        {
            **dict(zip(_SUMMARY.names[:5], key, strict=True)),
            "mean": float(np.mean(found)),
            # Of the seeds that one could have drawn, not of these: divided by n - 1.
            "standard_deviation": float(np.std(found, ddof=1)) if len(found) > 1 else 0.0,
            "lowest": min(found),
            "highest": max(found),
            "num_seeds": len(found),
        }
        for key, found in values.items()
    ]
    target = experiment.output_dir / f"{experiment.name}-seeds"
    with artifacts.replaced_dir(target) as work:
        pq.write_table(pa.Table.from_pylist(rows, schema=_SUMMARY), work / "summary.parquet")
        (work / "summary.md").write_text(_markdown(experiment, runs, values), encoding="utf-8")
        artifacts.write_manifest(
            work,
            stage="seeds",
            config={"seeds": [one.seed for one in runs]},
            seed=experiment.seed,
            inputs={str(folder): artifacts.manifest_digest(folder) for folder in folders},
            metrics={},
        )
    return target


def _markdown(
    experiment: Experiment, runs: Sequence[Experiment], values: dict[tuple[str, ...], list[float]]
) -> str:
    """Warm users, main list: mean over the seeds, standard deviation, lowest and highest."""
    seeds = ", ".join(str(one.seed) for one in runs)
    lines = [
        f"# {experiment.name}: seeds {seeds}",
        "",
        "Mean over the seeds ± standard deviation [lowest, highest]; same splits, candidates and "
        "users. Warm test users, main list of candidates.",
        "",
    ]
    metrics = list(dict.fromkeys(key[4] for key in values))
    for domain in dict.fromkeys(key[0] for key in values):
        lines += [f"## {domain}", "", f"| system | {' | '.join(metrics)} |"]
        lines.append("|---" * (1 + len(metrics)) + "|")
        for system in in_order(key[3] for key in values):
            found = [values.get((domain, "warm", "main", system, metric)) for metric in metrics]
            if any(found):
                lines.append(f"| {system} | {' | '.join(_cell(one) for one in found)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(values: list[float] | None) -> str:
    if not values:
        return ""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return f"{np.mean(values):.3f} ± {spread:.3f} [{min(values):.3f}, {max(values):.3f}]"
