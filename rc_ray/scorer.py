"""The Ray actor of the evaluation: one process, one base LLM, one adapter folded in after another.

Letters: N users of a shard, C candidates, I items, K items shown.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rc_ray.baseline_scores import BaselineRun, score_baseline
from rc_ray.core.adapters import Adapter, first_adapted_layer, load_adapter
from rc_ray.core.domains import Domain, RankingCase, read_domain
from rc_ray.core.loading import choose_dtype, dtype_name, load_language_model
from rc_ray.core.model import LanguageModel
from rc_ray.core.prompts import PromptRenderer
from rc_ray.core.ranking import Prepared, Ranker
from rc_ray.core.search import Found, top_k
from rc_ray.engines import local_model_dir, prepare_process
from rc_ray.errors import UserError
from rc_ray.requests import flat_candidates, made_up_titles, probed
from rc_ray.shards import (
    EMPTY,
    EMPTY_MASKED,
    CatalogueShard,
    DomainRun,
    Shard,
    Stopwatch,
    read_arrays,
    write_arrays,
)
from rc_ray.systems import System

Work = Shard | CatalogueShard | BaselineRun
"""What an actor may be given; each says which of its results are missing."""


class Scorer:
    """A process that scores shards.

    Decoder layers that none of a domain's adapters change are run once for all its systems.

    Args:
        model_dir: folder of the base LLM on the driver.
        model_path: the base LLM as the config names it, which the adapters must be of.
        dtype: as in the config.
        num_cpus: threads.
        use_gpu: score on the GPU that Ray gave this process.
    """

    def __init__(
        self, model_dir: str, model_path: str, dtype: str, num_cpus: float, use_gpu: bool
    ) -> None:
        prepare_process(num_cpus)
        self._model_dir = model_dir
        self._model_path = model_path
        self._dtype = dtype
        self._device = "cuda" if use_gpu else "cpu"
        self._loaded: LanguageModel | None = None
        self._run: DomainRun | None = None
        self._domain: Domain | None = None
        self._ranker: Ranker | None = None
        self._masked: Ranker | None = None
        self._adapters: dict[System, Adapter] = {}

    def score(self, work: Work) -> str | None:
        """Write what is missing; returns what is wrong where no retry would help."""
        try:
            match work:
                case BaselineRun():
                    score_baseline(work, self._language_model, self._device)
                case CatalogueShard():
                    self._search(work)
                case Shard():
                    return self._score(work)
        except UserError as error:
            return str(error)
        except Exception as error:
            traceback.print_exc()  # into the worker's log
            return f"{type(error).__name__}: {error}"
        return None

    def _score(self, shard: Shard) -> str | None:
        lm = self._language_model()
        watch = Stopwatch()
        domain, ranker = self._prepare(shard.run)
        if shard.split in (EMPTY_MASKED, "masked_titles"):
            ranker = self._masked_ranker(shard.run, domain)
        histories, listed, places = _requests(shard, ranker.titles)
        missing = shard.missing
        prepared = ranker.prepare(
            histories,
            listed,
            shared_layers=first_adapted_layer(list(self._adapters.values())),
        )
        num_tokens = _num_tokens(prepared)
        shared_s = watch.lap() / max(1, len(missing))
        for system in missing:
            with torch.no_grad(), lm.folded(self._adapters.get(system.system)):
                parts = [part.cpu().numpy() for part in ranker.score(prepared)]  # (2, c) each
            scores = np.stack([np.concatenate([parts[i] for i in row], axis=1) for row in places])
            if shard.probe == "permuted_candidates":
                scores = _in_place(scores, shard)
            if not np.isfinite(scores).all():
                return f"{system.system}: a score is not finite; check its training loss"
            cost = [shared_s + watch.lap(), num_tokens, watch.peak_memory_mb()]
            dtype = dtype_name(lm.dtype)
            write_arrays(shard.path(system), scores=scores, cost=cost, dtype=dtype)
        return None

    def _search(self, shard: CatalogueShard) -> None:
        """Find the top of the catalogue for each user, under each system's calibrated score."""
        lm = self._language_model()
        domain, ranker = self._prepare(shard.run)
        histories = _titles(shard.cases, ranker.titles)
        for system in shard.missing:
            watch = Stopwatch()
            chosen = shard.calibrations[system.system]
            empty = read_arrays(Shard(shard.run, EMPTY, 0).path(system))["scores"][0]  # (2, I)
            with torch.no_grad(), lm.folded(self._adapters.get(system.system)):
                found = top_k(
                    ranker,
                    histories,
                    shard.run.num_top,
                    alpha=chosen.alpha,
                    gamma=chosen.gamma,
                    prior_in_trie=chosen.prior_in_trie,
                    empty=empty,
                    log_prior=domain.log_prior(),
                    max_nodes=shard.run.max_nodes,
                )
            placed = _placed(found, shard.cases, len(domain.item_ids), shard.run.num_top)
            tokens = sum(one.num_nodes_read for one in found)
            write_arrays(
                shard.path(system),
                **placed,
                cost=[watch.lap(), tokens, watch.peak_memory_mb()],
                dtype=dtype_name(lm.dtype),
            )

    def _language_model(self) -> LanguageModel:
        """Loaded at the first use rather than at the start, where Ray would hide the reason."""
        if self._loaded is None:
            self._loaded = load_language_model(
                local_model_dir(self._model_dir, self._model_path),
                choose_dtype(self._dtype, self._device),
                self._device,
            )
        return self._loaded

    def _prepare(self, run: DomainRun) -> tuple[Domain, Ranker]:
        """The domain's catalogue and adapters, kept until another domain's turn."""
        if self._domain is None or self._ranker is None or self._run != run:
            self._domain = self._ranker = self._masked = None
            domain = read_domain(run.domain_dir)
            self._adapters = {
                system.system: load_adapter(system.adapter_dir, self._model_path)
                for system in run.systems
                if system.adapter_dir is not None
            }
            self._ranker = self._make_ranker(run, domain, domain.titles)
            self._run, self._domain = run, domain
        return self._domain, self._ranker

    def _masked_ranker(self, run: DomainRun, domain: Domain) -> Ranker:
        """The same catalogue under made-up titles; equal titles stay equal."""
        if self._masked is None:
            names = made_up_titles(len(domain.titles), run.seed)
            name_of = dict(zip(domain.titles, names, strict=True))
            self._masked = self._make_ranker(run, domain, [name_of[t] for t in domain.titles])
        return self._masked

    def _make_ranker(self, run: DomainRun, domain: Domain, titles: Sequence[str]) -> Ranker:
        lm = self._language_model()
        return Ranker(
            lm,
            run.domain,
            titles,
            domain.num_train,
            PromptRenderer(lm.tokenizer, run.style),
            max_titles=run.max_titles,
            tokens_per_batch=run.tokens_per_batch,
        )


def _requests(
    shard: Shard, titles: Sequence[str]
) -> tuple[list[list[str]], list[Sequence[int]], list[list[int]]]:
    """Histories and candidates of the ranker's requests, and which of them make up each case.

    One request holds all lists of a case, but in style `instruct`, whose prompts name a list.
    """
    if shard.split in (EMPTY, EMPTY_MASKED):
        return [[]], [range(len(titles))], [[0]]
    histories: list[list[str]] = []
    listed: list[Sequence[int]] = []
    places: list[list[int]] = []
    for case in shard.cases:
        history: Sequence[int] = case.history
        if shard.probe:
            altered = probed(case, shard.probe, shard.run.seed)
            history, lists = altered.history, [altered.candidates]
        elif shard.run.style == "instruct":
            lists = [case.candidates, *case.more_candidates.values()]
        else:
            lists = [flat_candidates(case)]
        places.append(list(range(len(listed), len(listed) + len(lists))))
        histories += [[titles[item] for item in history]] * len(lists)
        listed += lists
    return histories, listed, places


def _in_place(scores: np.ndarray, shard: Shard) -> np.ndarray:
    """Scores of permuted candidates, (N, 2, C), back in the order of the list."""
    rows = [
        row[:, probed(case, "permuted_candidates", shard.run.seed).places]
        for row, case in zip(scores, shard.cases, strict=True)
    ]
    return np.stack(rows)


def _titles(cases: Sequence[RankingCase], titles: Sequence[str]) -> list[list[str]]:
    return [[titles[item] for item in case.history] for case in cases]


def _num_tokens(prepared: Prepared) -> int:
    return sum(row.length for batch in prepared.batches for row in batch.rows)


def _placed(
    found: Sequence[Found], cases: Sequence[RankingCase], num_items: int, num_top: int
) -> dict[str, Any]:
    """Where each target stands in what was found; one that was not found is behind all of it."""
    num_better, num_tied = [], []
    top = np.full((len(cases), num_top), -1, dtype=np.int64)
    for row, (one, case) in enumerate(zip(found, cases, strict=True)):
        shown = one.items[:num_top]
        top[row, : len(shown)] = shown
        scores = np.asarray(one.scores, dtype=np.float64)
        if case.target in one.items:
            own = scores[one.items.index(case.target)]
            num_better.append(int((scores > own).sum()))
            num_tied.append(int((scores == own).sum()) - 1)
        else:
            num_better.append(num_items)
            num_tied.append(0)
    return {
        "num_better": np.array(num_better, dtype=np.int64),
        "num_tied": np.array(num_tied, dtype=np.int64),
        "top": top,
        "proved": np.array([one.is_proved for one in found], dtype=bool),
    }
