"""The sweep in one place: `ingredients/sweep.json` for programs, `ingredients/sweep.md` for people.

Domain names hold no dot, so neither can be taken for a domain's folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rc_ray.artifacts import RunFolder, write_json, write_text
from rc_ray.config import Experiment
from rc_ray.errors import printable

NDCG = ("validation NDCG", "valid_ndcg")
"""Heading and column of what decides, where nothing else is named."""


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
    domains = read_trials(experiment.data.ingredients, run.ingredient_dir, failed)
    for row in domains.values():
        if row.get("trials"):
            row["num_stopped"] = sum(bool(one.get("stopped")) for one in row["trials"])
    slots_s = spent["wall_s"] * spent["num_slots"]
    share = round(spent["training_s"] / slots_s, 3) if slots_s else None
    told = {"last_session": {**spent, "training_share": share}, "domains": domains}
    write_json(run.sweep_path.with_suffix(".json"), told)
    page = trials_page(
        f"Sweep of {experiment.name}",
        domains,
        counts={"trials": "num_trials", "stopped": "num_stopped", "failed": "num_failed"},
        lacking="ingredient",
        spent=spent,
        on_what=f", of whose time {100 * (share or 0.0):.0f} % went into optimiser steps",
    )
    write_text(run.sweep_path, page)
    return run.sweep_path


def read_trials(
    domains: Iterable[str],
    folder_of: Callable[[str], Path],
    failed: Mapping[str, str],
    of_best: Iterable[str] = NDCG[1:],
) -> dict[str, dict[str, Any]]:
    """Domain -> the rows of its `trials.parquet` and what they come to.

    Args:
        domains: their names.
        folder_of: a domain's name -> the folder with its table.
        failed: domain -> why nothing was chosen there: `failed`, in place of all else.
        of_best: columns that are told of the chosen trial.
    """
    found: dict[str, dict[str, Any]] = {}
    for domain in domains:
        path = folder_of(domain) / "trials.parquet"
        if domain in failed:
            found[domain] = {"failed": failed[domain], "trials": []}
        elif not path.exists():
            found[domain] = {}
        else:
            rows = pq.read_table(path).to_pylist()
            (best,) = (row for row in rows if row["chosen"])
            found[domain] = {
                "num_trials": len(rows),
                "num_failed": sum(row["error"] is not None for row in rows),
                "best": best.get("label"),
                **{name: best[name] for name in of_best},
                "seconds": round(sum(row["seconds"] or 0.0 for row in rows), 3),
                "trials": rows,
            }
    return found


def trials_page(
    title: str,
    domains: Mapping[str, Mapping[str, Any]],
    *,
    counts: Mapping[str, str],
    lacking: str,
    measure: tuple[str, str] = NDCG,
    note: str = "",
    spent: Mapping[str, float],
    on_what: str,
) -> str:
    """The page for people, in Markdown: a row per domain, then why trials failed.

    Args:
        title: of the page.
        domains: see `read_trials`.
        counts: heading -> field of a domain.
        lacking: what a failed domain has none of.
        measure: heading and field of what decided.
        note: below the table.
        spent: of the last session: `wall_s` and `num_slots`.
        on_what: the end of the sentence on it.
    """
    headings = ["domain", *counts, "best setting", measure[0], "seconds"]
    lines = [f"# {title}", "", _row(*headings), "|---" * len(headings) + "|"]
    problems = []
    for domain, row in domains.items():
        if not row or "failed" in row:
            why = f"no {lacking}: {cell(row['failed'])}" if row else "not there yet"
            lines.append(_row(domain, *("" for _ in counts), why, "", ""))
            continue
        value = "" if row[measure[1]] is None else f"{row[measure[1]]:.4f}"
        best, seconds = cell(row["best"] or "the only one"), f"{row['seconds']:.1f}"
        lines.append(_row(domain, *(str(row[n]) for n in counts.values()), best, value, seconds))
        problems += [
            f"- {domain}, {one.get('label') or 'the only trial'}: {line(one['error'])}"
            for one in row["trials"]
            if one["error"] is not None
        ]
    if note:
        lines += ["", note]
    if problems:
        lines += ["", "Failed trials:", "", *problems]
    if spent.get("num_slots"):
        slots = f"{spent['wall_s']:.0f} s with {spent['num_slots']} slot(s)"
        lines += ["", f"Last session: {slots}{on_what}."]
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    return "".join(f"| {one} " if one else "| " for one in cells) + "|"


def cell(text: str) -> str:
    """A text as one cell of a Markdown table."""
    return line(text).replace("|", "\\|")


def line(text: str) -> str:
    """A text on one line, without what steers a terminal."""
    return printable(" ".join(text.split("\n")))
