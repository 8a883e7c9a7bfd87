"""A finished run of many mixes, read for `cocktail_tables.py`: each user's quality and entropy.

Letters: N test users, C candidates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from rc_ray import recipes
from rc_ray.artifacts import RunFolder, read_json
from rc_ray.comparison import is_test_split
from rc_ray.config import Experiment, load
from rc_ray.core import objectives
from rc_ray.core.domains import read_domain
from rc_ray.core.metrics import hit_rate, ndcg
from rc_ray.evaluate_plan import plan
from rc_ray.mix_config import LearnedMix
from rc_ray.mixtures import Mixture, read_mixture
from rc_ray.requests import MAIN, list_slices
from rc_ray.score_settings import Floats, Point, aligned, ranks_in, score_of
from rc_ray.shards import read_scores

ONE_CALIBRATION = "NDCG@10, all systems under the calibration of equal weights"
"""What adapters alone differ by: which calibration validation users chose has no part in it."""

Key = tuple[str, str]
"""Domain and system."""


@dataclass
class Study:
    """A finished run, by (domain, system)."""

    experiment: Experiment
    folder: RunFolder
    measured: dict[tuple[str, str, str, str], Floats] = field(default_factory=dict)
    """(N,) by domain, system, split and measure."""
    raw: dict[Key, Floats] = field(default_factory=dict)
    """(N,) NDCG@10 of warm users before calibration."""
    entropies: dict[Key, Floats] = field(default_factory=dict)
    """(N,) of each warm user's raw distribution over the main list, in nats."""
    hits: dict[Key, Floats] = field(default_factory=dict)
    """(N,) HR@1 of warm users before calibration."""

    @property
    def kinds(self) -> dict[str, list[str]]:
        """Kind of ingredient -> its domains."""
        data = self.experiment.data
        few = [name for name in data.ingredients if name in data.num_training_users]
        rest = [name for name in data.ingredients if name not in few]
        found = {"all training users": rest, "few training users": few}
        return {kind: domains for kind, domains in found.items() if domains}

    def pooled(self, domains: Iterable[str], system: str, measure: str) -> Floats | None:
        """(N of all domains,) on warm users; None where a domain lacks the system."""
        keys = [(domain, system, "warm", measure) for domain in domains]
        if any(key not in self.measured for key in keys):
            return None
        return np.concatenate([self.measured[key] for key in keys])

    def mixture(self, domain: str, mix: str) -> Mixture:
        return read_mixture(self.folder.mix_dir(domain, mix))

    def learned(self, domain: str) -> list[str]:
        """Mixes of a domain whose weights were learned by gradient, the cocktail first."""
        made = recipes.mixes(self.experiment)
        return [
            name
            for name, mix in made.items()
            if isinstance(mix, LearnedMix)
            and (self.folder.mix_dir(domain, name) / "weights.json").exists()
        ]


def read_study(path: Path) -> Study:
    """The run is the folder that the file lies in, wherever it was moved."""
    run_dir = path.resolve().parent
    experiment = load(path, (f"output_dir={run_dir.parent}", f"name={run_dir.name}"))
    study = Study(experiment, RunFolder(experiment.run_dir))
    chosen = read_json(study.folder.evaluate_dir / "calibration.json")
    inputs = recipes.evaluation(experiment).inputs(study.folder)
    inside = experiment.tune.learns_with_prior
    for name in experiment.data.tested:
        domain = read_domain(study.folder.domain_dir(name))
        llm, _ = plan(experiment, study.folder, domain, inputs)
        for system in llm.systems:
            scores = read_scores(llm, system).by_split
            one = chosen[name][system.system]
            point, common = point_of(one), point_of(chosen[name].get("uniform", one))
            for split, cases in llm.cases.items():
                if not is_test_split(split) or not cases:
                    continue
                parts = (scores[split], *aligned(split, cases, scores, domain.log_prior()))
                ranks = ranks_in(score_of(*parts, point), cases, MAIN)
                key = (name, system.system, split)
                study.measured[*key, "NDCG@10"] = ndcg(ranks, 10)
                study.measured[*key, "HR@1"] = hit_rate(ranks, 1)
                alike = ranks_in(score_of(*parts, common), cases, MAIN)
                study.measured[*key, ONE_CALIBRATION] = ndcg(alike, 10)
                if split == "warm":
                    raw = score_of(*parts, (0.0, 0.0, inside))
                    of_raw = ranks_in(raw, cases, MAIN)
                    study.raw[key[:2]] = ndcg(of_raw, 10)
                    study.hits[key[:2]] = hit_rate(of_raw, 1)
                    study.entropies[key[:2]] = entropy(raw[:, list_slices(cases[0])[MAIN]])
        guard = study.folder.cocktail_dir(name) / "guard.json"
        if guard.exists() and "guarded" in experiment.evaluate.systems:
            taken = read_json(guard)["chosen"]
            for key in [key for key in study.measured if key[:2] == (name, taken)]:
                study.measured[name, "guarded", *key[2:]] = study.measured[key]
    return study


def point_of(chosen: dict[str, float]) -> Point:
    """A system's entry of `calibration.json` as a point of the grid."""
    return chosen["alpha"], chosen["gamma"], bool(chosen["prior_in_trie"])


def entropy(scores: Floats) -> Floats:
    """(N,) entropy in nats of the softmax over each row of (N, C) scores."""
    return np.asarray(objectives.entropy(torch.from_numpy(np.asarray(scores)).double()).numpy())
