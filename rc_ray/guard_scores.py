"""Validation clicks scored under a cocktail and its controls, as the evaluation scores and ranks.

Letters: N validation users, C candidates, I items.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from rc_ray.comparison import calibrate
from rc_ray.core.adapters import Adapter, first_adapted_layer
from rc_ray.core.domains import RankingCase
from rc_ray.core.metrics import hit_rate, ndcg, rank_targets
from rc_ray.core.objectives import entropy
from rc_ray.core.ranking import WITH_PRIOR, Ranker
from rc_ray.data_config import Negatives
from rc_ray.errors import UserError
from rc_ray.evaluate_config import EvaluateConfig
from rc_ray.guard import Judged
from rc_ray.requests import MAIN, target_positions
from rc_ray.shards import EMPTY, USERS_PER_SHARD, batched

Floats = npt.NDArray[np.float32]
_Requests = tuple[list[list[str]], list[Sequence[int]]]
"""Histories and candidates."""


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

    A calibration is of this domain alone, whatever `evaluate.calibration.scope` says.

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
    targets = target_positions(asked, MAIN)
    found = {}
    for name, scores in score_systems(ranker, adapters, asked).items():
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
        likelihoods = scores["valid"][:, WITH_PRIOR if with_prior else 0]  # (N, C)
        found[name] = Judged(
            ndcg=ndcg(ranks, len(asked[0].candidates)),
            hr1=hit_rate(ranks, 1),
            entropy=entropy(torch.from_numpy(likelihoods).double()).numpy(),
            calibration=chosen.calibration,
            chosen_by=chosen.chosen["chosen_by"],
        )
    return found


def score_systems(
    ranker: Ranker,
    adapters: Mapping[str, Adapter],
    cases: Sequence[RankingCase],
    *,
    users_per_batch: int = USERS_PER_SHARD,
) -> dict[str, dict[str, Floats]]:
    """Main lists under each system: (1, 2, I) under `empty` and (N, 2, C) under `valid`.

    As many requests are held at once as in a shard of the evaluation, and a pass takes the
    ranker's `tokens_per_batch`. So memory does not grow with N, but for the scores.

    Raises:
        UserError: a score is not finite.
    """
    parts: dict[str, list[Floats]] = {name: [] for name in adapters}
    shared_layers = first_adapted_layer(list(adapters.values()))
    for histories, listed in _requests(ranker.titles, cases, users_per_batch):
        prepared = ranker.prepare(histories, listed, shared_layers=shared_layers)
        for name, adapter in adapters.items():
            with torch.no_grad(), ranker.lm.folded(adapter):
                scores = torch.stack(ranker.score(prepared)).cpu().numpy()
            if not np.isfinite(scores).all():
                raise UserError(f"{name}: a score is not finite; check its training loss")
            parts[name].append(scores)
        del prepared  # else two batches are held while the next one is packed
    return {
        name: {EMPTY: empty, "valid": np.concatenate(rows)}
        for name, (empty, *rows) in parts.items()
    }


def _requests(
    titles: Sequence[str], cases: Sequence[RankingCase], users_per_batch: int
) -> Iterator[_Requests]:
    """The empty history's for the whole catalogue, then those of some users at a time."""
    yield [[]], [range(len(titles))]
    for some in batched(cases, users_per_batch):
        histories = [[titles[item] for item in case.history] for case in some]
        yield histories, [case.candidates for case in some]
