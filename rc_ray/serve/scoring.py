"""The service without Ray: one base LLM, one adapter per domain, queries in batches."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError

from rc_ray.artifacts import MANIFEST, RunFolder, mix_place, read_json, sha256_file
from rc_ray.assets import model_dir
from rc_ray.config import Experiment
from rc_ray.core.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    check_adapter,
    load_adapter,
)
from rc_ray.core.domains import read_domain
from rc_ray.core.loading import choose_dtype, load_language_model
from rc_ray.core.model import AdapterMix, LanguageModel
from rc_ray.core.prompts import PromptRenderer
from rc_ray.core.ranking import Ranker, best_first, calibrated
from rc_ray.errors import ArtifactError
from rc_ray.prior import read_prior
from rc_ray.serve.calibration import Calibration, open_calibration
from rc_ray.serve.catalogue import DomainCatalogue, Limits, Query
from rc_ray.serve.schemas import (
    DomainInfo,
    RankedItem,
    RankRequest,
    RankResponse,
    RequestError,
    explain,
)
from rc_ray.serve.served import guard_of, maker, served_domains, served_system, stage_of


@dataclass(frozen=True)
class ServedDomain:
    """What it takes to score one domain's items on the shared base."""

    catalogue: DomainCatalogue
    system: str
    """What its adapter is."""
    calibration: Calibration
    ranker: Ranker
    mix: AdapterMix
    empty: np.ndarray
    """(I,) log p(title | empty history) under the adapter, computed once."""


def limits_of(experiment: Experiment) -> Limits:
    """The bounds that an experiment sets on a request."""
    return Limits(
        max_history=experiment.serve.max_history,
        max_candidates=experiment.serve.max_candidates,
        max_titles=experiment.evaluate.max_titles,
        max_title_characters=experiment.data.max_title_characters,
    )


def open_catalogue(experiment: Experiment, domain: str) -> DomainCatalogue:
    """Read one prepared domain, and the popularity that `rc-ray prior` counted, if it did.

    Raises:
        ArtifactError: it was not prepared, or its files are damaged.
    """
    run = RunFolder(experiment.run_dir)
    prepared = read_domain(run.domain_dir(domain))
    prior = read_prior(run, domain, prepared.item_ids)
    return DomainCatalogue(domain, prepared.item_ids, prepared.titles, prepared.num_train, prior)


def check_adapter_files(experiment: Experiment, domain: str) -> Path:
    """Folder of the adapter that serves a domain, proven to be what its stage wrote.

    Raises:
        ArtifactError: the stage has not finished, or a file changed since.
    """
    run, system = RunFolder(experiment.run_dir), served_system(experiment, domain)
    stage = stage_of(run, system, domain)
    verb = maker(system)
    inner = mix_place(system) if verb == "merge" else "."
    if not (stage / MANIFEST).exists():
        raise ArtifactError(f"{stage}: no {system} to serve; run `rc-ray {verb}` first")
    outputs = read_json(stage / MANIFEST).get("outputs", {})
    folder = stage / inner
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        path = folder / name
        if not path.exists():
            raise ArtifactError(f"{path}: missing; run `rc-ray {verb} --force`")
        if outputs.get(str(path.relative_to(stage))) != sha256_file(path):
            raise ArtifactError(
                f"{path}: changed since `rc-ray {verb}` wrote it; run it again with --force"
            )
    return folder


def describe(experiment: Experiment, catalogue: DomainCatalogue) -> DomainInfo:
    """What is served for a domain and why, and how its scores are calibrated."""
    calibration = open_calibration(experiment, catalogue.name)
    verdict = guard_of(experiment, catalogue.name)
    return catalogue.describe(
        system=served_system(experiment, catalogue.name),
        guard=None if verdict is None else verdict.sentences,
        alpha=calibration.alpha,
        gamma=calibration.gamma,
        prior_in_trie=calibration.prior_in_trie,
        calibrated=calibration.measured,
        chosen_by=calibration.chosen_by,
        scope=calibration.scope,
        calibration=calibration.why,
    )


class RankService:
    """Answers queries of many domains from one base LLM.

    Loading scores every catalogue once under an empty history, which also warms each adapter up.

    Args:
        experiment: names the run, the system and the limits.
        lm: the base LLM, shared by all domains.
        domains: which to load; None loads every served one.

    Raises:
        ArtifactError: a domain or adapter of the run is missing, damaged, or for another base LLM.
    """

    def __init__(
        self, experiment: Experiment, lm: LanguageModel, domains: Sequence[str] | None = None
    ) -> None:
        self.lm = lm
        self.limits = limits_of(experiment)
        self._lock = threading.Lock()  # an adapter acts on the whole base while it is in use
        # As `evaluate` measured and calibrated it, the spirit included.
        self._renderer = PromptRenderer(lm.tokenizer, experiment.tune.style)
        self._max_tokens = int(getattr(lm.model.config, "max_position_embeddings", 1 << 30))
        self.domains = {
            domain: self._load(experiment, domain)
            for domain in (domains or served_domains(experiment))
        }

    def rank(self, queries: Sequence[Query]) -> list[RankResponse | RequestError]:
        """Answer queries together, those of one domain in the same forward passes.

        Returns:
            One answer per query; a `RequestError` where the model cannot hold the query's text.
        """
        answers: dict[int, RankResponse | RequestError] = {}
        places: dict[str, list[int]] = {}
        for place, query in enumerate(queries):
            problem = self._too_long(query)
            if problem is not None:
                answers[place] = problem
            else:
                places.setdefault(query.domain, []).append(place)
        for domain, mine in places.items():
            found = self._rank_domain(self.domains[domain], [queries[place] for place in mine])
            answers.update(zip(mine, found, strict=True))
        return [answers[place] for place in range(len(queries))]

    def _load(self, experiment: Experiment, domain: str) -> ServedDomain:
        catalogue = open_catalogue(experiment, domain)
        folder = check_adapter_files(experiment, domain)
        adapter = load_adapter(folder, experiment.model.path)
        check_adapter(adapter, folder)
        mix = AdapterMix([adapter])
        ranker = Ranker(
            self.lm,
            domain,
            catalogue.titles,
            catalogue.clicks,
            self._renderer,
            max_titles=experiment.evaluate.max_titles,
            tokens_per_batch=experiment.evaluate.tokens_per_batch,
        )
        try:
            with torch.inference_mode(), self.lm.using(mix):
                both = ranker.empty_log_likelihoods().cpu().double().numpy()
        except (RuntimeError, KeyError, AttributeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ArtifactError(
                f"{folder}: does not act on the base LLM {experiment.model.path} ({reason}); "
                "serve the run with the model that trained it"
            ) from error
        if not np.isfinite(both).all():
            raise ArtifactError(f"{folder}: gives scores that are not finite; train it again")
        calibration = open_calibration(experiment, domain)
        return ServedDomain(
            catalogue=catalogue,
            system=served_system(experiment, domain),
            calibration=calibration,
            ranker=ranker,
            mix=mix,
            empty=both[int(calibration.prior_in_trie)],
        )

    def _too_long(self, query: Query) -> RequestError | None:
        if not query.titles:
            return None
        served = self.domains[query.domain]
        listed = [served.catalogue.titles[item] for item in _candidates(served, query)]
        prompt = self._renderer.prompt(query.domain, query.titles, listed)
        longest = max(served.ranker.trie.node_depths)
        if len(prompt) + longest <= self._max_tokens:
            return None
        return RequestError(
            f"the request is {len(prompt)} tokens of text, the model reads {self._max_tokens}; "
            "send shorter titles or fewer candidates"
        )

    def _rank_domain(self, served: ServedDomain, queries: list[Query]) -> list[RankResponse]:
        candidates = [_candidates(served, query) for query in queries]
        # A new user's likelihoods are the empty-history ones, which are known already.
        asked = [index for index, query in enumerate(queries) if query.titles]
        likelihoods = [served.empty[items] for items in candidates]
        if asked:
            with self._lock, torch.inference_mode(), self.lm.using(served.mix):
                scored = served.ranker.log_likelihoods(
                    [queries[index].titles for index in asked],
                    [candidates[index].tolist() for index in asked],
                    with_prior=served.calibration.prior_in_trie,
                )
            for index, values in zip(asked, scored, strict=True):
                likelihoods[index] = values.cpu().double().numpy()
        return [
            self._response(served, *parts)
            for parts in zip(queries, candidates, likelihoods, strict=True)
        ]

    def _response(
        self, served: ServedDomain, query: Query, items: np.ndarray, likelihoods: np.ndarray
    ) -> RankResponse:
        catalogue = served.catalogue
        scores = calibrated(
            likelihoods,
            served.empty[items],
            catalogue.log_prior[items],
            alpha=served.calibration.alpha,
            gamma=served.calibration.gamma,
        )
        order = best_first(scores, [catalogue.item_ids[item] for item in items])
        kept = [place for place in order if int(items[place]) not in query.excluded][: query.k]
        return RankResponse(
            domain=query.domain,
            system=served.system,
            items=[
                RankedItem(
                    item_id=catalogue.item_ids[items[place]],
                    title=catalogue.titles[items[place]],
                    score=float(scores[place]),
                    rank=rank,
                )
                for rank, place in enumerate(kept, start=1)
            ],
            unknown_history=list(query.unknown_history),
        )


def _candidates(served: ServedDomain, query: Query) -> np.ndarray:
    """(C,) item indices to score.

    Without a list it is always the whole catalogue, whose trie layout is then made only once; the
    history's items go afterwards.
    """
    if query.candidates is None:
        return np.arange(served.catalogue.num_items)
    return np.asarray(query.candidates, dtype=np.int64)


def open_language_model(experiment: Experiment) -> LanguageModel:
    """The base LLM of an experiment, on a GPU where serving asks for one.

    Raises:
        ArtifactError: the model is missing or damaged.
        AssetError: it is not to be had.
    """
    wants_gpu = experiment.serve.gpus_per_replica > 0 and torch.cuda.is_available()
    device = "cuda" if wants_gpu else "cpu"
    folder = model_dir(experiment.model.path)
    return load_language_model(folder, choose_dtype(experiment.model.dtype, device), device)


def rank_offline(
    experiment: Experiment,
    domain: str,
    history: Sequence[str],
    candidates: Sequence[str] | None = None,
    k: int = 10,
) -> RankResponse:
    """Answer one request in this process, as the service would; only its domain is loaded.

    No candidates, or an empty list of them, is the whole catalogue.

    Raises:
        RequestError: the request cannot be answered as it stands.
        ArtifactError: the run lacks what is to be served, or it is damaged.
    """
    known = served_domains(experiment)
    if domain not in known:
        raise RequestError(f"unknown domain {domain!r}; served: {', '.join(known)}", status=404)
    try:
        request = RankRequest(
            domain=domain,
            history=list(history),
            candidates=list(candidates) if candidates else None,
            k=k,
        )
    except ValidationError as error:
        raise RequestError("; ".join(explain(problem) for problem in error.errors())) from None
    # A mistake in the request is told before the model is loaded.
    query = open_catalogue(experiment, domain).resolve(request, limits_of(experiment))
    answer = RankService(experiment, open_language_model(experiment), [domain]).rank([query])[0]
    if isinstance(answer, RequestError):
        raise answer
    return answer
