"""Everything a report shows, read from a run folder and checked on the way in."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rc_ray.artifacts import MANIFEST, RunFolder, read_json
from rc_ray.config import Experiment
from rc_ray.curves import Curve, read_curve
from rc_ray.mixtures import Cocktail, read_cocktail
from rc_ray.results import Results, read_results


@dataclass(frozen=True)
class Findings:
    """One run, ready to be told."""

    experiment: Experiment
    results: Results
    calibration: dict[str, dict[str, dict[str, Any]]]
    """Domain -> system -> alpha, gamma, prior in the trie, and how they were chosen."""
    mixtures: dict[str, Cocktail] = field(default_factory=dict)
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
            mixtures[domain] = read_cocktail(run.cocktail_dir(domain))
    losses = {"spirit": read_curve(run.spirit_dir / "metrics.jsonl", "loss")}
    for domain in experiment.data.ingredients:
        losses[domain] = read_curve(run.ingredient_dir(domain) / "metrics.jsonl", "loss")
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
