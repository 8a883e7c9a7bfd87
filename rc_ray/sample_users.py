"""A few validation users' rankings under several systems: one base LLM, one adapter after another.

Letters: N users, C candidates.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from rc_ray.core.adapters import first_adapted_layer, load_adapter
from rc_ray.core.domains import Domain, RankingCase, read_domain, sample
from rc_ray.core.loading import choose_dtype, load_language_model
from rc_ray.core.metrics import expected_ranks
from rc_ray.core.model import LanguageModel
from rc_ray.core.prompts import PromptRenderer, Style
from rc_ray.core.ranking import Ranker, best_first, calibrated
from rc_ray.engines import local_model_dir, prepare_process
from rc_ray.errors import UserError
from rc_ray.shards import Calibration

NUM_USERS = 10
NUM_TOP = 5
"""Titles that are shown of each ranking."""


@dataclass(frozen=True)
class ShownSystem:
    """A system whose rankings are shown."""

    name: str
    adapter_dir: Path
    calibration: Calibration
    chosen_by: str = ""
    """Who chose the calibration; "" where nobody did, and the likelihood is as it was trained."""


@dataclass(frozen=True)
class SampleOrder:
    """What the task of one domain needs to know."""

    domain_dir: Path
    systems: tuple[ShownSystem, ...]
    model_dir: str
    """Folder of the base LLM on the driver."""
    model_path: str
    """The base LLM as the config names it, which the adapters must be of."""
    dtype: str
    style: Style
    max_titles: int
    tokens_per_batch: int
    seed: int
    num_cpus: float
    num_gpus: float


@dataclass(frozen=True)
class RankedTitle:
    """One line of a shown list."""

    title: str
    score: float
    """Calibrated; compares within one list only."""
    is_next: bool
    """Whether the user took this item next."""


@dataclass(frozen=True)
class Ranking:
    """One system's answer to one user."""

    top: tuple[RankedTitle, ...]
    """Best first."""
    rank: float
    """Expected rank of the true next item; 1 is best, half a rank comes from a tie."""


@dataclass(frozen=True)
class SampleUser:
    """One validation user under every system."""

    history: tuple[str, ...]
    """Titles, oldest first."""
    next_title: str
    num_candidates: int
    rankings: dict[str, Ranking]
    """By system, in the order of the systems."""


@dataclass(frozen=True)
class Sampled:
    """The answer of the task."""

    users: list[SampleUser] = field(default_factory=list)
    error: str | None = None
    """What is wrong where a retry would not help."""


def rank_sample(order: SampleOrder) -> Sampled:
    """The Ray task: the sample's rankings, or why there are none."""
    try:
        return Sampled(_rank(order))
    except UserError as error:
        return Sampled(error=str(error))
    except Exception as error:
        traceback.print_exc()  # into the worker's log
        return Sampled(error=f"{type(error).__name__}: {error}")


def _rank(order: SampleOrder) -> list[SampleUser]:
    prepare_process(order.num_cpus)
    domain = read_domain(order.domain_dir)
    cases = sampled_cases(domain, order.seed)
    if not cases:
        return []
    device = "cuda" if order.num_gpus > 0 else "cpu"
    lm = load_language_model(
        local_model_dir(order.model_dir, order.model_path),
        choose_dtype(order.dtype, device),
        device,
    )
    return rankings(lm, domain, cases, order)


def sampled_cases(domain: Domain, seed: int) -> list[RankingCase]:
    """Validation users, drawn by the seed; never a test case, never an unlabeled user."""
    return sample(domain.cases("valid", "warm"), NUM_USERS, seed)


def rankings(
    lm: LanguageModel, domain: Domain, cases: Sequence[RankingCase], order: SampleOrder
) -> list[SampleUser]:
    """Rank the candidates of every case under every system, all requests in one batch each.

    Raises:
        ArtifactError: an adapter is missing, damaged or of another base LLM.
        UserError: a score is not finite.
    """
    adapters = {
        system.name: load_adapter(system.adapter_dir, order.model_path) for system in order.systems
    }
    ranker = Ranker(
        lm,
        domain.name,
        domain.titles,
        domain.num_train,
        PromptRenderer(lm.tokenizer, order.style),
        max_titles=order.max_titles,
        tokens_per_batch=order.tokens_per_batch,
    )
    # The last request is the empty history's, for every item that any of the users is offered.
    listed = sorted({item for case in cases for item in case.candidates})
    prepared = ranker.prepare(
        [*([domain.titles[item] for item in case.history] for case in cases), []],
        [*(case.candidates for case in cases), listed],
        shared_layers=first_adapted_layer(list(adapters.values())),
    )
    log_prior = domain.log_prior()
    found: list[dict[str, Ranking]] = [{} for _ in cases]
    for system in order.systems:
        chosen = system.calibration
        with torch.no_grad(), lm.folded(adapters[system.name]):
            scored = [
                scores[int(chosen.prior_in_trie)].cpu().double().numpy()
                for scores in ranker.score(prepared)
            ]
        if not all(np.isfinite(scores).all() for scores in scored):
            raise UserError(f"{system.name}: a score is not finite; check its training loss")
        empty = dict(zip(listed, scored.pop(), strict=True))
        for rankings_of, case, likelihoods in zip(found, cases, scored, strict=True):
            items = list(case.candidates)
            scores = calibrated(
                likelihoods,
                np.array([empty[item] for item in items]),
                log_prior[items],
                alpha=chosen.alpha,
                gamma=chosen.gamma,
            )
            rankings_of[system.name] = _ranking(domain, case, scores)
    return [
        SampleUser(
            history=tuple(domain.titles[item] for item in case.history),
            next_title=domain.titles[case.target],
            num_candidates=len(case.candidates),
            rankings=rankings_of,
        )
        for case, rankings_of in zip(cases, found, strict=True)
    ]


def _ranking(domain: Domain, case: RankingCase, scores: np.ndarray) -> Ranking:
    """The top of a list of candidates with scores (C,), and where its target stands."""
    items = case.candidates
    best = best_first(scores, [domain.item_ids[item] for item in items])[:NUM_TOP]
    return Ranking(
        top=tuple(
            RankedTitle(
                domain.titles[items[place]], float(scores[place]), items[place] == case.target
            )
            for place in best
        ),
        rank=float(expected_ranks(scores[None], [items.index(case.target)])[0]),
    )
