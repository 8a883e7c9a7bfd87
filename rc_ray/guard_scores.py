"""Validation clicks scored under a cocktail and its controls, as the evaluation scores and ranks.

Letters: N validation users, C candidates, I items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from rc_ray.comparison import calibrate
from rc_ray.core.adapters import Adapter, first_adapted_layer
from rc_ray.core.domains import RankingCase
from rc_ray.core.metrics import hit_rate, ndcg, rank_targets
from rc_ray.core.ranking import Ranker
from rc_ray.data_config import Negatives
from rc_ray.errors import UserError
from rc_ray.evaluate_config import EvaluateConfig
from rc_ray.guard import Judged
from rc_ray.requests import MAIN, target_positions
from rc_ray.shards import EMPTY


def judge(
    ranker: Ranker,
    adapters: Mapping[str, Adapter],
    cases: Sequence[RankingCase],
    log_prior: np.ndarray,
    config: EvaluateConfig,
    *,
    with_prior: bool,
    negatives: Negatives,
) -> dict[str, Judged]:
    """Each system's calibration on these users, and how it ranks their main lists under it.

    Args:
        ranker: of the domain.
        adapters: by system.
        cases: validation cases.
        log_prior: (I,).
        config: the calibrations to choose from.
        with_prior: whether the adapters learned with the prior in the trie.
        negatives: how those of the main lists were drawn.

    Raises:
        UserError: a score is not finite.
    """
    if not cases:
        return {}
    # The guard looks at the main list alone.
    asked = [replace(case, more_candidates={}) for case in cases]
    histories = [[ranker.titles[item] for item in case.history] for case in asked]
    everything: list[Sequence[int]] = [range(len(ranker.titles))]
    prepared = ranker.prepare(
        [[], *histories],
        everything + [case.candidates for case in asked],
        shared_layers=first_adapted_layer(list(adapters.values())),
    )
    targets = target_positions(asked, MAIN)
    found = {}
    for name, adapter in adapters.items():
        with torch.no_grad(), ranker.lm.folded(adapter):
            empty, *rows = [part.cpu().numpy() for part in ranker.score(prepared)]
        scores = {EMPTY: empty[None], "valid": np.stack(rows)}  # (1, 2, I), (N, 2, C)
        if not all(np.isfinite(one).all() for one in scores.values()):
            raise UserError(f"{name}: a score is not finite; check its training loss")
        chosen = calibrate(
            scores,
            {"valid": asked},
            log_prior,
            config,
            default=(0.0, 0.0, with_prior),
            negatives=negatives,
        )
        assert chosen.calibration is not None
        ranks = rank_targets(chosen.final["valid"][0], targets)
        found[name] = Judged(
            ndcg=ndcg(ranks, len(asked[0].candidates)),
            hr1=hit_rate(ranks, 1),
            calibration=chosen.calibration,
        )
    return found
