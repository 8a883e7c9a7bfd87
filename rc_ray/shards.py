"""Shards of an evaluation: some users of one domain under one system, scored once, kept on disk.

Letters: N users of a shard, C candidates, I items.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from rc_ray.config import System
from rc_ray.core.domains import Domain, RankingCase, read_domain
from rc_ray.core.model import choose_dtype, load_adapter, load_language_model
from rc_ray.core.prompts import PromptRenderer, Style
from rc_ray.core.ranking import Ranker
from rc_ray.engines import prepare_process
from rc_ray.errors import ArtifactError, UserError

USERS_PER_SHARD = 16
EMPTY = "empty"
"""The shard of the empty history: every item once, no users."""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Group:
    """All shards of one (domain, system)."""

    domain: str
    system: System
    domain_dir: Path
    adapter_dir: Path | None
    """None is the bare base."""
    folder: Path
    cases: dict[str, list[RankingCase]] = field(repr=False)
    """By split: valid, warm, cold."""
    style: Style
    max_titles: int
    tokens_per_batch: int

    def clear(self) -> None:
        """Forget the scores."""
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class Shard:
    """Some cases of one split."""

    group: Group
    split: str
    start: int

    @property
    def cases(self) -> list[RankingCase]:
        return self.group.cases.get(self.split, [])[self.start : self.start + USERS_PER_SHARD]

    @property
    def num_users(self) -> int:
        return len(self.cases)

    @property
    def path(self) -> Path:
        return self.group.folder / f"{self.split}-{self.start:07d}.npy"


def shards_of(group: Group) -> list[Shard]:
    """Every shard of a group; the empty history's first."""
    shards = [Shard(group, EMPTY, 0)]
    for split, cases in group.cases.items():
        shards += [Shard(group, split, start) for start in range(0, len(cases), USERS_PER_SHARD)]
    return shards


def read_group(group: Group) -> dict[str, Floats]:
    """The scores of a finished group: (I,) under `empty`, (N, C) by split.

    Raises:
        ArtifactError: a shard is missing or damaged.
    """
    found: dict[str, list[Floats]] = {split: [] for split in (EMPTY, *group.cases)}
    for shard in shards_of(group):
        try:
            found[shard.split].append(np.load(shard.path, allow_pickle=False))
        except (OSError, ValueError, EOFError):
            raise ArtifactError(
                f"{shard.path}: missing or damaged; delete it and evaluate again"
            ) from None
    return {
        split: np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)
        for split, parts in found.items()
    }


class ShardScorer:
    """A process with one base LLM; the Ray actor of the evaluation.

    Args:
        model_dir: folder of the base LLM.
        dtype: as in the config.
        num_cpus: threads.
        use_gpu: score on the GPU that Ray gave this process.
    """

    def __init__(self, model_dir: str, dtype: str, num_cpus: float, use_gpu: bool) -> None:
        prepare_process(num_cpus)
        device = "cuda" if use_gpu else "cpu"
        self._lm = load_language_model(model_dir, choose_dtype(dtype, device), device)
        self._folded = ExitStack()
        self._key: Path | None = None
        self._domain: Domain | None = None
        self._ranker: Ranker | None = None

    def score(self, shard: Shard) -> str | None:
        """Score a shard and write it; what is wrong where a retry would not help."""
        try:
            ranker, domain = self._prepare(shard.group)
            with torch.no_grad():
                if shard.split == EMPTY:
                    scores = ranker.empty_log_likelihoods().cpu().numpy()
                else:
                    scores = _score_cases(ranker, domain.titles, shard.cases)
            if not np.isfinite(scores).all():
                return "a score is not finite; check the adapter's training loss"
            _write(shard.path, scores)
        except UserError as error:
            return str(error)
        except Exception as error:
            traceback.print_exc()  # into the worker's log
            return f"{type(error).__name__}: {error}"
        return None

    def _prepare(self, group: Group) -> tuple[Ranker, Domain]:
        """Fold the group's adapter into the base, unless it is there already."""
        if self._key != group.folder or self._ranker is None or self._domain is None:
            self._folded.close()
            self._key = None
            if self._domain is None or self._domain.name != group.domain:
                self._domain = read_domain(group.domain_dir)
            adapter = load_adapter(group.adapter_dir) if group.adapter_dir else None
            self._folded.enter_context(self._lm.folded(adapter))
            self._ranker = Ranker(
                self._lm,
                group.domain,
                self._domain.titles,
                PromptRenderer(self._lm.tokenizer, group.style),
                max_titles=group.max_titles,
                tokens_per_batch=group.tokens_per_batch,
            )
            self._key = group.folder
        return self._ranker, self._domain


def _score_cases(ranker: Ranker, titles: Sequence[str], cases: Sequence[RankingCase]) -> Floats:
    scores = ranker.log_likelihoods(
        [[titles[item] for item in case.history] for case in cases],
        [case.candidates for case in cases],
    )
    return torch.stack(scores).cpu().numpy()  # (N, C)


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
