"""Everything a report shows, read from a run folder and checked on the way in."""

from __future__ import annotations

import math
import os
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rc_ray.artifacts import MANIFEST, RunFolder, read_json
from rc_ray.config import Experiment
from rc_ray.curves import read_metrics
from rc_ray.errors import ArtifactError
from rc_ray.guard import Verdict, read_guard
from rc_ray.results import Results, read_results

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
"""Columns of the weight map, in the order in which a layer computes."""

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Mixture:
    """What the merge of one domain learned."""

    ingredient_weights: dict[tuple[int, str], float]
    """By (layer, projection); of a guest, all ingredients together."""
    entropy: Curve
    """(step, mean entropy in nats)."""
    about: dict[str, Any] = field(default_factory=dict)
    """The manifest's metrics."""
    guard: Verdict | None = None
    """What is served, and why."""

    def columns(self) -> list[str]:
        """Projections that occur, known ones first."""
        found = {projection for _, projection in self.ingredient_weights}
        known = [name for name in PROJECTIONS if name in found]
        return known + sorted(found - set(known))


@dataclass(frozen=True)
class Findings:
    """One run, ready to be told."""

    experiment: Experiment
    results: Results
    calibration: dict[str, dict[str, dict[str, Any]]]
    """Domain -> system -> alpha, gamma, prior in the trie, and how they were chosen."""
    mixtures: dict[str, Mixture] = field(default_factory=dict)
    losses: dict[str, Curve] = field(default_factory=dict)
    """Name of the adapter -> (step, training loss in nats per title)."""
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Domain -> what `prepare` counted."""
    costs: list[dict[str, Any]] = field(default_factory=list)
    """Rows of `costs.json`."""

    @property
    def command(self) -> str:
        """The command that makes this run again, from the working folder of today."""
        path = self.experiment.run_dir / "config.yaml"
        if path.is_relative_to(Path.cwd()):
            path = Path(os.path.relpath(path))
        return f"rc-ray run {shlex.quote(str(path))} --force"


def read_findings(experiment: Experiment) -> Findings:
    """Read what the stages left in the run folder.

    Raises:
        ArtifactError: `evaluate` has not finished, or a file that is there is damaged.
    """
    run = RunFolder(experiment.run_dir)
    mixtures = {}
    for domain in experiment.data.tested:
        if (run.cocktail_dir(domain) / MANIFEST).exists():
            mixtures[domain] = _read_mixture(run.cocktail_dir(domain))
    losses = {"spirit": _curve(run.spirit_dir / "metrics.jsonl", "loss")}
    for domain in experiment.data.ingredients:
        losses[domain] = _curve(run.ingredient_dir(domain) / "metrics.jsonl", "loss")
    costs = run.evaluate_dir / "costs.json"
    return Findings(
        experiment=experiment,
        results=read_results(run.evaluate_dir),
        calibration=read_json(run.evaluate_dir / "calibration.json"),
        mixtures=mixtures,
        losses={name: curve for name, curve in losses.items() if curve},
        data={
            domain: read_json(run.domain_dir(domain) / MANIFEST).get("metrics", {})
            for domain in experiment.data.domains
            if (run.domain_dir(domain) / MANIFEST).exists()
        },
        costs=read_json(costs) if costs.exists() else [],
    )


def _read_mixture(folder: Path) -> Mixture:
    path = folder / "weights.json"
    raw = read_json(path)
    weights: dict[tuple[int, str], float] = {}
    try:
        names = raw["adapters"]
        shown = ["ingredient"] if "ingredient" in names else [n for n in names if n != "spirit"]
        columns = [names.index(name) for name in shown]
        for module, row in zip(raw["modules"], raw["weights"], strict=True):
            weights[_place(module)] = float(sum(row[column] for column in columns))
    except (KeyError, TypeError, ValueError, IndexError):
        raise ArtifactError(
            f"{path}: is not in the form that `rc-ray merge` writes; run it with --force"
        ) from None
    return Mixture(
        ingredient_weights=weights,
        entropy=_curve(folder / "entropy.jsonl", "entropy"),
        about=read_json(folder / MANIFEST).get("metrics", {}),
        guard=read_guard(folder),
    )


def _place(module: str) -> tuple[int, str]:
    """Layer and projection of a linear's name, e.g. `model.layers.3.mlp.up_proj` -> (3, `up`)."""
    number = re.search(r"\.(\d+)\.", module)
    return (int(number.group(1)) if number else 0), module.rpartition(".")[2].removesuffix("_proj")


def _curve(path: Path, name: str) -> Curve:
    """(step, value) of a JSON-lines file; [] where it is absent."""
    return [
        (float(row["step"]), float(row[name]))
        for row in read_metrics(path)
        if isinstance(row.get(name), int | float) and math.isfinite(row[name])
    ]
