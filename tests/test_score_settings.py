"""One setting of the score for several domains, from scores on disk."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from rc_ray.core.domains import RankingCase
from rc_ray.evaluate_config import EvaluateConfig
from rc_ray.score_settings import shared_points
from rc_ray.shards import DomainRun, SystemRun, shards_of, write_arrays

LOG_PRIOR = np.log(np.array([0.4, 0.3, 0.2, 0.1]))
LISTS = [(0, 3), (2, 1)]
POPULAR, RARE = [0, 1], [3, 2]
"""Targets of the two lists."""


def domain_run(folder: Path, name: str, targets: list[int]) -> DomainRun:
    """A base LLM that finds every item alike, so gamma alone orders the items."""
    cases = [
        RankingCase(f"u{place}", (), target, candidates)
        for place, (target, candidates) in enumerate(zip(targets, LISTS, strict=False))
    ]
    system = SystemRun("base", None, folder / name)
    run = DomainRun(name, folder, {"valid": cases}, {}, [system], "sequence", 5, 64)
    for shard in shards_of(run):
        num, width = (1, 4) if shard.split == "empty" else (len(shard.cases), 2)
        write_arrays(shard.path(system), scores=np.zeros((num, 2, width)), cost=[0.1, 1, 1.0])
    return run


def chosen(runs: list[DomainRun], **calibration: Any) -> dict[Any, Any]:
    settings = {
        "alphas": [0.0],
        "gammas": [0.0, 1.0],
        "prior_in_trie": [False],
        "calibration": {"scope": "global", **calibration},
    }
    experiment = SimpleNamespace(
        evaluate=EvaluateConfig.model_validate(settings), data=SimpleNamespace(negatives="uniform")
    )
    domains = {run.domain: SimpleNamespace(log_prior=lambda: LOG_PRIOR) for run in runs}
    return shared_points(experiment, domains, runs)  # type: ignore[arg-type]


def test_the_mean_over_the_domains_decides(tmp_path: Path) -> None:
    """Gamma 0 ties, NDCG (1 + 1 / log2 3) / 2 = .815; gamma 1 has 1 or .631 by the targets."""
    popular = domain_run(tmp_path, "popular", POPULAR)
    rare = domain_run(tmp_path, "rare", RARE)
    also_popular = domain_run(tmp_path, "also", POPULAR)
    nobody = domain_run(tmp_path, "nobody", [])
    assert chosen([popular]) == {"base": (0.0, 1.0, False)}
    assert chosen([rare]) == {"base": (0.0, 0.0, False)}
    # .815 against (1 + .631) / 2, the same: the first of the grid.
    assert chosen([popular, rare]) == {"base": (0.0, 0.0, False)}
    assert chosen([popular, rare, also_popular, nobody]) == {"base": (0.0, 1.0, False)}
    assert chosen([nobody]) == {}


def test_without_labels_and_without_a_choice(tmp_path: Path) -> None:
    rare = domain_run(tmp_path, "rare", RARE)
    # Its clicks say gamma 0; what the log expects of popular items says gamma 1.
    assert chosen([rare], chosen_by="unlabeled") == {"base": (0.0, 1.0, False)}
    assert chosen([rare], scope="domain") == {}
    fixed = {"chosen_by": "fixed", "alpha": 1.0, "gamma": 1.0, "prior_in_trie": True}
    assert chosen([rare], **fixed) == {}
