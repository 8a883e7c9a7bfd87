"""Shards of an evaluation: some users of one domain, scored once under each system, kept on disk.

Letters: N users of a shard, C candidates, I items.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from rc_ray.config import System
from rc_ray.core.adapters import Adapter, first_adapted_layer, load_adapter
from rc_ray.core.domains import Domain, RankingCase, read_domain
from rc_ray.core.model import LanguageModel, choose_dtype, load_language_model
from rc_ray.core.prompts import PromptRenderer, Style
from rc_ray.core.ranking import Ranker
from rc_ray.engines import local_model_dir, prepare_process
from rc_ray.errors import ArtifactError, UserError

USERS_PER_SHARD = 16
EMPTY = "empty"
"""The shard of the empty history: every item once, no users."""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SystemRun:
    """One system on one domain."""

    system: System
    adapter_dir: Path | None
    """None is the bare base."""
    folder: Path
    """Takes the scores."""


@dataclass(frozen=True)
class DomainRun:
    """All that is scored on one domain."""

    domain: str
    domain_dir: Path
    cases: dict[str, list[RankingCase]] = field(repr=False)
    """By split: valid, warm, cold."""
    systems: list[SystemRun]
    style: Style
    max_titles: int
    tokens_per_batch: int


@dataclass(frozen=True)
class Shard:
    """Some cases of one split, under every system of the domain."""

    run: DomainRun
    split: str
    start: int

    @property
    def cases(self) -> list[RankingCase]:
        return self.run.cases.get(self.split, [])[self.start : self.start + USERS_PER_SHARD]

    def path(self, system: SystemRun) -> Path:
        return system.folder / f"{self.split}-{self.start:07d}.npy"

    @property
    def missing(self) -> list[SystemRun]:
        """Systems whose scores are not on disk."""
        return [system for system in self.run.systems if not self.path(system).exists()]

    @property
    def num_scores(self) -> int:
        """(user, system) pairs that are missing."""
        return len(self.cases) * len(self.missing)


def shards_of(run: DomainRun) -> list[Shard]:
    """Every shard of a domain; the empty history's first, since it is the longest."""
    shards = [Shard(run, EMPTY, 0)]
    for split, cases in run.cases.items():
        shards += [Shard(run, split, start) for start in range(0, len(cases), USERS_PER_SHARD)]
    return shards


def read_scores(run: DomainRun, system: SystemRun) -> dict[str, Floats]:
    """The scores of a finished system: (1, 2, I) under `empty`, (N, 2, C) by split.

    Raises:
        ArtifactError: a shard is missing or damaged.
    """
    found: dict[str, list[Floats]] = {split: [] for split in (EMPTY, *run.cases)}
    for shard in shards_of(run):
        path = shard.path(system)
        try:
            scores = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            raise ArtifactError(
                f"{path}: missing or damaged; delete it and evaluate again"
            ) from None
        if not _fits(scores, shard):
            raise ArtifactError(
                f"{path}: holds scores of shape {scores.shape} for {len(shard.cases)} users; "
                "delete it and evaluate again"
            )
        found[shard.split].append(scores)
    return {
        split: np.concatenate(parts) if parts else np.zeros((0, 2, 1), np.float32)
        for split, parts in found.items()
    }


def _fits(scores: Floats, shard: Shard) -> bool:
    if shard.split == EMPTY:
        return scores.ndim == 3 and scores.shape[:2] == (1, 2)
    return scores.shape == (len(shard.cases), 2, len(shard.cases[0].candidates))


class ShardScorer:
    """A process with one base LLM; the Ray actor of the evaluation.

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
        self._domain: Domain | None = None
        self._ranker: Ranker | None = None
        self._adapters: dict[System, Adapter] = {}

    def score(self, shard: Shard) -> str | None:
        """Write what is missing of a shard; returns what is wrong where no retry would help."""
        try:
            lm = self._language_model()
            ranker, domain = self._prepare(shard.run, lm)
            histories, listed = _requests(shard, domain)
            prepared = ranker.prepare(
                histories,
                listed,
                shared_layers=first_adapted_layer(list(self._adapters.values())),
            )
            for system in shard.missing:
                with torch.no_grad(), lm.folded(self._adapters.get(system.system)):
                    scores = torch.stack(ranker.score(prepared)).cpu().numpy()  # (N, 2, C)
                if not np.isfinite(scores).all():
                    return f"{system.system}: a score is not finite; check its training loss"
                _write(shard.path(system), scores)
        except UserError as error:
            return str(error)
        except Exception as error:
            traceback.print_exc()  # into the worker's log
            return f"{type(error).__name__}: {error}"
        return None

    def _language_model(self) -> LanguageModel:
        """Loaded at the first shard rather than at the start, where Ray would hide the reason."""
        if self._loaded is None:
            self._loaded = load_language_model(
                local_model_dir(self._model_dir, self._model_path),
                choose_dtype(self._dtype, self._device),
                self._device,
            )
        return self._loaded

    def _prepare(self, run: DomainRun, lm: LanguageModel) -> tuple[Ranker, Domain]:
        """The domain's catalogue and adapters, kept until another domain's turn."""
        if self._domain is None or self._ranker is None or self._domain.name != run.domain:
            self._domain = None
            domain = read_domain(run.domain_dir)
            self._adapters = {
                system.system: load_adapter(system.adapter_dir, self._model_path)
                for system in run.systems
                if system.adapter_dir is not None
            }
            self._ranker = Ranker(
                lm,
                run.domain,
                domain.titles,
                domain.num_train,
                PromptRenderer(lm.tokenizer, run.style),
                max_titles=run.max_titles,
                tokens_per_batch=run.tokens_per_batch,
            )
            self._domain = domain
        return self._ranker, self._domain


def _requests(shard: Shard, domain: Domain) -> tuple[list[list[str]], list[Sequence[int]]]:
    if shard.split == EMPTY:
        return [[]], [range(len(domain.titles))]
    histories = [[domain.titles[item] for item in case.history] for case in shard.cases]
    return histories, [case.candidates for case in shard.cases]


def _write(path: Path, scores: Floats) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.save(file, scores)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
