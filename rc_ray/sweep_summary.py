"""The sweep in one place: `ingredients/sweep.json` for programs, `ingredients/sweep.md` for people.

Domain names hold no dot, so neither can be taken for a domain's folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rc_ray.artifacts import RunFolder, write_json, write_text
from rc_ray.config import Experiment
from rc_ray.errors import printable


def write_summary(
    experiment: Experiment,
    run: RunFolder,
    failed: Mapping[str, str],
    spent: Mapping[str, float],
) -> Path:
    """Write both files from the tables of trials beside the ingredients.

    Args:
        experiment: names the domains.
        run: the run folder.
        failed: domain -> why it has no ingredient.
        spent: of the last session: `wall_s` its wall-clock, `num_slots` trials side by side,
            `training_s` seconds in optimiser steps over all slots.

    Returns:
        The path of the file for people.
    """
    domains = {}
    for domain in experiment.data.ingredients:
        if domain in failed:
            domains[domain] = {"failed": failed[domain], "trials": []}
            continue
        path = run.ingredient_dir(domain) / "trials.parquet"
        domains[domain] = _of_domain(pq.read_table(path).to_pylist()) if path.exists() else {}
    slots_s = spent["wall_s"] * spent["num_slots"]
    told = {
        "last_session": {
            **spent,
            "training_share": round(spent["training_s"] / slots_s, 3) if slots_s else None,
        },
        "domains": domains,
    }
    write_json(run.sweep_path.with_suffix(".json"), told)
    write_text(run.sweep_path, _markdown(experiment, told))
    return run.sweep_path


def _of_domain(rows: list[dict[str, Any]]) -> dict[str, Any]:
    (best,) = (row for row in rows if row["chosen"])
    return {
        "num_trials": len(rows),
        "num_stopped": sum(bool(row.get("stopped")) for row in rows),
        "num_failed": sum(row["error"] is not None for row in rows),
        "best": best.get("label"),
        "valid_ndcg": best["valid_ndcg"],
        "seconds": round(sum(row["seconds"] or 0.0 for row in rows), 3),
        "trials": rows,
    }


def _markdown(experiment: Experiment, told: Mapping[str, Any]) -> str:
    lines = [
        f"# Sweep of {experiment.name}",
        "",
        "| domain | trials | stopped | failed | best setting | validation NDCG | training s |",
        "|---|---|---|---|---|---|---|",
    ]
    problems = []
    for domain, row in told["domains"].items():
        if "failed" in row:
            lines.append(f"| {domain} | | | | no ingredient: {cell(row['failed'])} | | |")
            continue
        if not row:
            lines.append(f"| {domain} | | | | not there yet | | |")
            continue
        ndcg = "" if row["valid_ndcg"] is None else f"{row['valid_ndcg']:.4f}"
        lines.append(
            f"| {domain} | {row['num_trials']} | {row['num_stopped']} | {row['num_failed']} "
            f"| {cell(row['best'] or 'the only one')} | {ndcg} | {row['seconds']:.1f} |"
        )
        problems += [
            f"- {domain}, {one.get('label') or 'the only trial'}: {line(one['error'])}"
            for one in row["trials"]
            if one["error"] is not None
        ]
    if problems:
        lines += ["", "Failed trials:", "", *problems]
    last = told["last_session"]
    if last["num_slots"]:
        lines += [
            "",
            f"Last session: {last['wall_s']:.0f} s with {last['num_slots']} slot(s), of whose time "
            f"{100 * (last['training_share'] or 0.0):.0f} % went into optimiser steps.",
        ]
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    """A text as one cell of a Markdown table."""
    return line(text).replace("|", "\\|")


def line(text: str) -> str:
    """A text on one line, without what steers a terminal."""
    return printable(" ".join(text.split("\n")))
