"""Shards of an evaluation: some users of one domain, scored once under each system, kept on disk.

Letters: N users of a shard, C candidates of all their lists, I items, K items shown.
"""

from __future__ import annotations

import os
import resource
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rc_ray.artifacts import digest
from rc_ray.core.domains import RankingCase
from rc_ray.core.prompts import Style
from rc_ray.errors import ArtifactError
from rc_ray.evaluate_config import Probe
from rc_ray.precision import joined
from rc_ray.requests import ASKED_PROBES, flat_candidates
from rc_ray.systems import System

USERS_PER_SHARD = 16
EMPTY = "empty"
"""The shard of the empty history: every item once, no users."""
EMPTY_MASKED = "empty_masked"
"""The same with made-up titles."""
NUM_SHOWN = 10
"""K of the lists by which coverage and the like are judged."""

Floats = npt.NDArray[np.float32]
Arrays = dict[str, npt.NDArray[Any]]


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
    """All that the LLM scores on one domain."""

    domain: str
    domain_dir: Path
    cases: dict[str, Sequence[RankingCase]] = field(repr=False)
    """By split: valid, warm, cold ..., and by probe."""
    catalogue_cases: dict[str, Sequence[RankingCase]] = field(repr=False)
    """By split: for whom the whole catalogue is ranked."""
    systems: list[SystemRun]
    style: Style
    max_titles: int
    tokens_per_batch: int
    seed: int = 0
    num_top: int = NUM_SHOWN
    """Items that a catalogue ranking finds."""
    max_nodes: int = 4096


@dataclass(frozen=True)
class Shard:
    """Some cases of one split, under every system of the domain."""

    run: DomainRun
    split: str
    start: int

    @property
    def cases(self) -> Sequence[RankingCase]:
        return self.run.cases.get(self.split, [])[self.start : self.start + USERS_PER_SHARD]

    @property
    def probe(self) -> Probe | None:
        return next((probe for probe in ASKED_PROBES if probe == self.split), None)

    def path(self, system: SystemRun) -> Path:
        return system.folder / f"{self.split}-{self.start:07d}.npz"

    @property
    def missing(self) -> list[SystemRun]:
        """Systems whose scores are not on disk."""
        return [system for system in self.run.systems if not self.path(system).exists()]

    @property
    def num_scores(self) -> int:
        """(user, system) pairs that are missing."""
        return len(self.cases) * len(self.missing)

    @property
    def label(self) -> str:
        return self.run.domain


@dataclass(frozen=True)
class Calibration:
    """The settings of a system's score that validation users chose."""

    alpha: float
    gamma: float
    prior_in_trie: bool


@dataclass(frozen=True)
class CatalogueShard:
    """Some cases of one split for whom each system ranks the whole catalogue."""

    run: DomainRun
    split: str
    start: int
    calibrations: Mapping[System, Calibration]

    @property
    def cases(self) -> Sequence[RankingCase]:
        return self.run.catalogue_cases[self.split][self.start : self.start + USERS_PER_SHARD]

    def path(self, system: SystemRun) -> Path:
        chosen = self.calibrations[system.system]
        mark = digest(
            [chosen.alpha, chosen.gamma, chosen.prior_in_trie, self.run.num_top, self.run.max_nodes]
            + [case.user_id for case in self.cases]
        )
        return system.folder / f"catalogue-{self.split}-{self.start:07d}-{mark[:8]}.npz"

    @property
    def missing(self) -> list[SystemRun]:
        return [system for system in self.run.systems if not self.path(system).exists()]

    @property
    def num_scores(self) -> int:
        return len(self.cases) * len(self.missing)

    @property
    def label(self) -> str:
        return f"{self.run.domain}, whole catalogue"


def shards_of(run: DomainRun) -> list[Shard]:
    """Every shard of a domain; the empty history's first, since it is the longest."""
    shards = [Shard(run, EMPTY, 0)]
    if "masked_titles" in run.cases:
        shards.append(Shard(run, EMPTY_MASKED, 0))
    for split, cases in run.cases.items():
        shards += [Shard(run, split, start) for start in range(0, len(cases), USERS_PER_SHARD)]
    return shards


def catalogue_shards(
    run: DomainRun, calibrations: Mapping[System, Calibration]
) -> list[CatalogueShard]:
    """Every shard of a domain's catalogue rankings."""
    return [
        CatalogueShard(run, split, start, calibrations)
        for split, cases in run.catalogue_cases.items()
        for start in range(0, len(cases), USERS_PER_SHARD)
    ]


@dataclass(frozen=True)
class Scores:
    """What the LLM said under one system."""

    by_split: dict[str, Floats]
    """(1, 2, I) under `empty` and `empty_masked`, (N, 2, C) by split, (N, 2, C of main) by probe;
    splits without cases are absent."""
    seconds: float
    num_tokens: int
    peak_memory_mb: float
    num_users: int
    dtypes: tuple[str, ...]
    """Precisions of the base, each once; empty for files of before they were told."""


def read_scores(run: DomainRun, system: SystemRun) -> Scores:
    """The scores of a finished system.

    Raises:
        ArtifactError: a shard is missing or damaged.
    """
    found: dict[str, list[Floats]] = {}
    costs = []
    dtypes: list[str] = []
    for shard in shards_of(run):
        path = shard.path(system)
        arrays = read_arrays(path)
        if not {"scores", "cost"} <= arrays.keys():
            raise ArtifactError(f"{path}: holds no scores; delete it and evaluate again")
        scores = arrays["scores"]
        if not _fits(scores, shard):
            raise ArtifactError(
                f"{path}: holds scores of shape {scores.shape} for {len(shard.cases)} users; "
                "delete it and evaluate again"
            )
        found.setdefault(shard.split, []).append(scores)
        costs.append((*arrays["cost"], len(shard.cases)))
        dtypes += dtypes_of(arrays)
    seconds, tokens, memory, users = zip(*costs, strict=True)
    return Scores(
        by_split={split: np.concatenate(parts) for split, parts in found.items()},
        seconds=float(sum(seconds)),
        num_tokens=int(sum(tokens)),
        peak_memory_mb=float(max(memory)),
        num_users=sum(users),
        dtypes=tuple(joined(dtypes)),
    )


def dtypes_of(arrays: Mapping[str, Any]) -> list[str]:
    """The precision that a file of scores was computed in, where it tells."""
    return [str(arrays["dtype"])] if "dtype" in arrays else []


def read_arrays(path: Path) -> Arrays:
    """A file that `write_arrays` wrote.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
        raise ArtifactError(f"{path}: missing or damaged; delete it and evaluate again") from None


def write_arrays(path: Path, **arrays: npt.ArrayLike) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


class Stopwatch:
    """Seconds and memory of a piece of work, as a `cost` array holds them."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the start or the last lap."""
        now = time.perf_counter()
        self._start, passed = now, now - self._start
        return passed

    @staticmethod
    def peak_memory_mb() -> float:
        """The most that this process ever held."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def batched(cases: Sequence[RankingCase], size: int) -> Iterator[Sequence[RankingCase]]:
    """Cases in blocks of at most `size`."""
    for start in range(0, len(cases), size):
        yield cases[start : start + size]


def _fits(scores: Floats, shard: Shard) -> bool:
    if shard.split in (EMPTY, EMPTY_MASKED):
        return scores.ndim == 3 and scores.shape[:2] == (1, 2)
    first = shard.cases[0]
    width = len(first.candidates) if shard.probe else len(flat_candidates(first))
    return scores.shape == (len(shard.cases), 2, width)
