"""How the score's settings are chosen: raw, without labels, by clicks, per domain or for all.

    python jobs/benchmarks/calibration.py runs/demo/config.yaml

Reads the scores that a finished `rc-ray run` keeps in `evaluate.work`; nothing is scored anew, no
Ray is started and nothing is written. Each way chooses alpha, gamma and the prior in the trie from
the experiment's grids; what it reaches on the test users of every list is printed as a Markdown
table. Beside them stand two settings that nothing chooses: `as trained`, the likelihood with the
prior inside where the adapters learned so, and `1, 1`, which corrects the prior in full. `best` is
the setting with the best NDCG on the test users themselves: no choice, but the most that this grid
can give. Differences of means are over all systems and domains, with 95 % bootstrap intervals over
cases of users.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rc_ray import recipes
from rc_ray.artifacts import RunFolder
from rc_ray.comparison import is_test_split
from rc_ray.config import Experiment, load
from rc_ray.core.bootstrap import paired_bootstrap
from rc_ray.core.domains import RankingCase, read_domain
from rc_ray.core.metrics import hit_rate, ndcg
from rc_ray.evaluate_config import EvaluateConfig
from rc_ray.evaluate_plan import plan
from rc_ray.requests import MAIN
from rc_ray.score_settings import (
    Cases,
    Floats,
    Point,
    aligned,
    best_point,
    grid,
    grid_values,
    ranks_in,
    score_of,
)
from rc_ray.shards import read_scores
from rc_ray.systems import System

RAW: Point = (0.0, 0.0, False)
FULL: Point = (1.0, 1.0, False)
WAYS = (
    "raw",
    "as trained",
    "1, 1",
    "unlabeled",
    "unlabeled, global",
    "clicks",
    "clicks, global",
    "best",
)

PAIRS = (
    ("unlabeled", "raw"),
    ("unlabeled", "as trained"),
    ("unlabeled", "1, 1"),
    ("unlabeled", "clicks"),
    ("unlabeled, global", "unlabeled"),
    ("clicks, global", "clicks"),
)
"""Ways whose difference is told with an interval."""


class Scored:
    """One system on one domain, and how good each setting is by either way of choosing."""

    def __init__(
        self, experiment: Experiment, scores: dict[str, Floats], cases: Cases, log_prior: Floats
    ) -> None:
        self._cases = {split: found for split, found in cases.items() if found}
        self._parts = {
            split: (scores[split], *aligned(split, found, scores, log_prior))
            for split, found in self._cases.items()
        }
        self.values = {
            way: grid_values(
                scores, cases, log_prior, with_choice(experiment, way), experiment.data.negatives
            )
            for way in ("unlabeled", "clicks")
        }

    @property
    def splits(self) -> list[str]:
        return [split for split in self._cases if is_test_split(split)]

    def measured(self, split: str, point: Point) -> tuple[Floats, Floats]:
        """(N,) NDCG@10 and HR@1 of the main lists of a split."""
        cases: Sequence[RankingCase] = self._cases[split]
        ranks = ranks_in(score_of(*self._parts[split], point), cases, MAIN)
        return ndcg(ranks, 10), hit_rate(ranks, 1)


def with_choice(experiment: Experiment, way: str) -> EvaluateConfig:
    """The experiment's grids under another way of choosing."""
    settings = experiment.evaluate
    calibration = settings.calibration.model_copy(update={"chosen_by": way})
    return settings.model_copy(update={"calibration": calibration})


def read_run(path: Path) -> tuple[Experiment, dict[System, dict[str, Scored]]]:
    """Every LLM system of a finished run, by system and domain.

    The run is the folder that the file lies in, wherever it was moved.
    """
    run_dir = path.resolve().parent
    experiment = load(path, (f"output_dir={run_dir.parent}", f"name={run_dir.name}"))
    folder = RunFolder(experiment.run_dir)
    inputs = recipes.evaluation(experiment).inputs(folder)
    found: dict[System, dict[str, Scored]] = {}
    for name in experiment.data.ingredients:
        domain = read_domain(folder.domain_dir(name))
        llm, _ = plan(experiment, folder, domain, inputs)
        for system in llm.systems:
            scores = read_scores(llm, system).by_split
            found.setdefault(system.system, {})[name] = Scored(
                experiment, scores, llm.cases, domain.log_prior()
            )
    return experiment, found


def chosen(experiment: Experiment, of_system: dict[str, Scored], domain: str) -> dict[str, Point]:
    """What each way chooses for a domain."""
    settings = experiment.evaluate
    trained: Point = (0.0, 0.0, experiment.tune.learns_with_prior)
    points: dict[str, Point] = {"raw": RAW, "as trained": trained, "1, 1": FULL}
    for way in ("unlabeled", "clicks"):
        points[way] = best_point(settings, of_system[domain].values[way])
        points[f"{way}, global"] = best_point(
            settings, *(one.values[way] for one in of_system.values())
        )
    return points


def rank_correlation(one: Sequence[float], two: Sequence[float]) -> float:
    """Spearman's, with the mean rank for ties."""

    def ranks(values: Sequence[float]) -> Floats:
        array = np.round(np.asarray(values), 12)
        return np.array([(array < x).sum() + ((array == x).sum() - 1) / 2 for x in array])

    return float(np.corrcoef(ranks(one), ranks(two))[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="config.yaml in the folder of a finished run")
    experiment, systems = read_run(parser.parse_args().config)
    gathered: dict[str, dict[str, dict[str, list[Floats]]]] = {}
    print("| domain, test items | system | " + " | ".join(WAYS) + " |")
    print("|---" * (len(WAYS) + 2) + "|")
    for system, of_system in systems.items():
        for domain, scored in of_system.items():
            points = chosen(experiment, of_system, domain)
            for split in scored.splits:
                best = max(
                    grid(experiment.evaluate), key=lambda p: scored.measured(split, p)[0].mean()
                )
                cells = []
                for way in WAYS:
                    quality, hits = scored.measured(split, points.get(way, best))
                    cells.append(f"{quality.mean():.3f} / {hits.mean():.3f}")
                    of_way = gathered.setdefault(split, {}).setdefault(way, {})
                    of_way.setdefault(domain, []).append(quality)
                print(f"| {domain}, {split} | {system} | " + " | ".join(cells) + " |")
    told_pairs = []
    for split, by_way in gathered.items():
        # A case's mean over the systems, the cases of all domains one after another.
        means = {
            way: np.concatenate([np.mean(own, axis=0) for own in by_domain.values()])
            for way, by_domain in by_way.items()
        }
        told = " | ".join(f"{means[way].mean():.3f}" for way in WAYS)
        print(f"| mean NDCG@10, {split} | all | {told} |")
        for one, two in PAIRS:
            difference, low, high, _ = paired_bootstrap(means[one], means[two], 2000, 0)
            told_pairs.append(
                f"{split}: {one} - {two}: {difference:+.3f} [{low:+.3f}, {high:+.3f}]"
            )
    print("\n" + "\n".join(told_pairs))
    print()
    print("| domain | system | raw | unlabeled | clicks | rank correlation over the grid |")
    print("|---|---|---|---|---|---|")
    for system, of_system in systems.items():
        for domain, scored in of_system.items():
            points = chosen(experiment, of_system, domain)
            told = " | ".join(shown(points[way]) for way in ("raw", "unlabeled", "clicks"))
            agreement = rank_correlation(scored.values["unlabeled"], scored.values["clicks"])
            print(f"| {domain} | {system} | {told} | {agreement:+.2f} |")


def shown(point: Point) -> str:
    alpha, gamma, inside = point
    return f"{alpha:g}, {gamma:g}{', inside' if inside else ''}"


if __name__ == "__main__":
    main()
