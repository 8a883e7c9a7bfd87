"""Baselines fitted on one domain and what they rank: one piece of work of the evaluation.

Letters: N users, C candidates of all lists, I items, K items shown.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rc_ray.comparison import SystemScores, catalogue_ranks, list_ranks
from rc_ray.core.baselines import Popularity, Recommender
from rc_ray.core.domains import Domain, RankingCase, read_domain
from rc_ray.core.item_knn import ItemKnn
from rc_ray.core.loading import dtype_name
from rc_ray.core.metrics import rank_targets
from rc_ray.core.model import LanguageModel
from rc_ray.core.sasrec import Sasrec
from rc_ray.core.title_embedding import TitleEmbedding, embed_titles
from rc_ray.evaluate_config import EvaluateConfig
from rc_ray.precision import joined
from rc_ray.requests import ASKED_PROBES, flat_candidates, probed
from rc_ray.score_settings import valid_ndcg
from rc_ray.shards import Stopwatch, batched, dtypes_of, read_arrays, write_arrays
from rc_ray.systems import System

Floats = npt.NDArray[np.float32]
USERS_PER_BLOCK = 512
"""Users scored over the whole catalogue at a time."""


@dataclass(frozen=True)
class BaselineRun:
    """One baseline on one domain with one seed."""

    system: System
    domain: str
    domain_dir: Path
    cases: dict[str, Sequence[RankingCase]] = field(repr=False)
    """By split and by probe."""
    catalogue_cases: dict[str, Sequence[RankingCase]] = field(repr=False)
    settings: EvaluateConfig
    seed: int
    probe_seed: int
    num_top: int
    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / f"{self.system}.npz"

    @property
    def missing(self) -> bool:
        return not self.path.exists()

    @property
    def num_scores(self) -> int:
        """Users of the test splits, validation and probes."""
        return sum(len(found) for found in self.cases.values())

    @property
    def label(self) -> str:
        return f"{self.domain}, {self.system}"


def score_baseline(
    run: BaselineRun, language_model: Callable[[], LanguageModel], device: str
) -> None:
    """Fit the baseline, rank, and write it all."""
    if not run.missing:
        return
    watch = Stopwatch()
    domain = read_domain(run.domain_dir)
    recommender, chosen, num_tokens = _fit(run, domain, language_model, device)
    fit_s = watch.lap()
    arrays: dict[str, Any] = {}
    for split, cases in run.cases.items():
        if cases and _is_asked(split, run.system):
            arrays[f"scores.{split}"] = _list_scores(run, recommender, split, cases)
    for split, cases in run.catalogue_cases.items():
        found = _catalogue(recommender, cases, run.num_top)
        arrays |= {f"{name}.{split}": array for name, array in found.items()}
    if run.system == "title_embedding":  # the only one that the LLM has a part in
        arrays["dtype"] = dtype_name(language_model().dtype)
    memory = watch.peak_memory_mb()
    write_arrays(
        run.path,
        **arrays,
        cost=[fit_s, watch.lap(), num_tokens, memory],
        chosen=json.dumps(chosen),
    )


def _fit(
    run: BaselineRun,
    domain: Domain,
    language_model: Callable[[], LanguageModel],
    device: str,
) -> tuple[Recommender, dict[str, Any], int]:
    """The fitted baseline, what it chose on validation users, and the tokens that an LLM read.

    All validation users of the domain choose, also where fewer calibrate the LLM's scores.
    """
    num_items, settings = len(domain.item_ids), run.settings
    valid = [(case.history, case.target) for case in domain.cases("valid", "warm")]
    match run.system:
        case "popularity":
            return Popularity(domain.num_train), {}, 0
        case "item_knn":
            knn = ItemKnn.fit(domain.train, num_items, settings.item_knn, valid)
            return knn, knn.chosen, 0
        case "sasrec":
            sasrec = Sasrec.fit(
                domain.train, num_items, settings.sasrec, valid, seed=run.seed, device=device
            )
            return sasrec, sasrec.chosen, 0
        case _:
            states = embed_titles(language_model(), domain.titles, settings.title_embedding)
            embedding = TitleEmbedding.fit(states, settings.title_embedding, valid)
            return embedding, embedding.chosen, states.num_tokens


def read_baseline(runs: Sequence[BaselineRun]) -> SystemScores:
    """What a baseline ranked, with every seed.

    Raises:
        ArtifactError: a file is missing or damaged.
    """
    seeds = [read_arrays(run.path) for run in runs]
    cases, catalogue_cases = runs[0].cases, runs[0].catalogue_cases
    final = {
        split: tuple(arrays[f"scores.{split}"] for arrays in seeds)
        for split in cases
        if f"scores.{split}" in seeds[0]
    }
    parts = {
        split: [
            {name: arrays[f"{name}.{split}"] for name in ("num_better", "num_tied")}
            for arrays in seeds
        ]
        for split in catalogue_cases
    }
    quality = None
    if "valid" in final:
        quality = float(np.mean([valid_ndcg(one, cases["valid"]) for one in final["valid"]]))
    costs = np.array([arrays["cost"] for arrays in seeds])  # (seeds, 4)
    num_tokens = int(costs[:, 2].sum()) or None
    memory = float(costs[:, 3].max())
    common = {"num_tokens": num_tokens, "peak_memory_mb": memory, "proved": None}
    num_users = runs[0].num_scores * len(runs)
    return SystemScores(
        final=final,
        ranks={**list_ranks(final, cases), **catalogue_ranks(parts)},
        top={split: tuple(arrays[f"top.{split}"] for arrays in seeds) for split in catalogue_cases},
        chosen=json.loads(str(seeds[0]["chosen"])),
        dtypes=tuple(joined(*(dtypes_of(arrays) for arrays in seeds))),
        valid_ndcg=quality,
        costs=(
            {**common, "what": "training", "num_users": None, "seconds": float(costs[:, 0].sum())},
            {
                **common,
                "num_tokens": None,
                "what": "scoring",
                "num_users": num_users,
                "seconds": float(costs[:, 1].sum()),
            },
        ),
    )


def _is_asked(split: str, system: System) -> bool:
    """Titles are masked for those that read them; embedding all names anew is left out."""
    return split != "masked_titles" or system in ("popularity", "item_knn", "sasrec")


def _list_scores(
    run: BaselineRun, recommender: Recommender, split: str, cases: Sequence[RankingCase]
) -> Floats:
    """(N, C), under a probe of the main list alone and back in its order."""
    blocks = []
    for block in batched(cases, USERS_PER_BLOCK):
        probe = next((one for one in ASKED_PROBES if one == split), None)
        if probe is None:
            histories = [case.history for case in block]
            items = np.array([flat_candidates(case) for case in block])
        else:
            altered = [probed(case, probe, run.probe_seed) for case in block]
            histories = [one.history for one in altered]
            items = np.array([case.candidates for case in block])
        scores = recommender.scores(histories)  # (n, I)
        blocks.append(np.take_along_axis(scores, items, axis=1))
    return np.concatenate(blocks)


def _catalogue(
    recommender: Recommender, cases: Sequence[RankingCase], num_top: int
) -> dict[str, npt.NDArray[np.int64]]:
    """Where the targets stand among all items but those of the history, and the first K items."""
    better, tied, top = [], [], []
    for block in batched(cases, USERS_PER_BLOCK):
        scores = recommender.scores([case.history for case in block]).astype(np.float64)
        excluded = np.zeros(scores.shape, dtype=bool)
        for row, case in enumerate(block):
            excluded[row, list(case.history)] = True
        ranks = rank_targets(scores, [case.target for case in block], excluded)
        better.append(ranks.num_better)
        tied.append(ranks.num_tied)
        scores[excluded] = -np.inf
        top.append(_first(scores, num_top))
    return {
        "num_better": np.concatenate(better),
        "num_tied": np.concatenate(tied),
        "top": np.concatenate(top),
    }


def _first(scores: npt.NDArray[np.float64], num: int) -> npt.NDArray[np.int64]:
    """(N, K) items by falling score, equal scores by item; -1 where none is left."""
    top = np.full((len(scores), num), -1, dtype=np.int64)
    width = min(num, scores.shape[1])
    # A stable sort of all columns breaks ties at the K-th place by item, which a partition cannot.
    kth = -np.partition(-scores, width - 1, axis=1)[:, width - 1]
    for row, (own, least) in enumerate(zip(scores, kth, strict=True)):
        found = np.flatnonzero((own >= least) & (own > -np.inf))
        order = np.argsort(-own[found], kind="stable")[:width]
        top[row, : len(order)] = found[order]
    return top
