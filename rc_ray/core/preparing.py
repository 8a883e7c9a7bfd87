"""Raw domain -> prepared domain on disk: clean, split, check, draw candidates, write.

Candidates are drawn, checked and written block by block; with many lists they are by far the
largest part of a prepared domain and are never in memory as a whole.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rc_ray import artifacts
from rc_ray.core.candidates import BLOCK_CASES, CandidateDrawer
from rc_ray.core.cleaning import CleanDomain, DomainError, clean, describe
from rc_ray.core.domain_files import (
    CANDIDATES,
    HELD_CLICKS_FILE,
    HELD_OUT_FILE,
    write_block,
    write_held_clicks,
    write_held_out,
    write_tables,
)
from rc_ray.core.draws import COLD_USER, UNLABELED
from rc_ray.core.encoding import Say, silent
from rc_ray.core.held_out import HeldOut
from rc_ray.core.leaks import check_candidates, check_no_leak
from rc_ray.core.sources import RawDomain
from rc_ray.core.splits import PURPOSES, TEMPERATURES, CaseTable, SplitDomain, split
from rc_ray.data_config import MAIN_LIST, DataConfig


def prepare_domain(
    raw: RawDomain,
    folder: Path,
    config: DataConfig,
    seed: int,
    *,
    fingerprint_config: Mapping[str, Any],
    inputs: Mapping[str, str],
    held_out: HeldOut | None = None,
    say: Say = silent,
) -> dict[str, Any]:
    """Clean, split and write a domain; the folder appears whole or not at all.

    Args:
        raw: the domain as its source holds it.
        folder: where the prepared domain goes.
        config: the data section.
        seed: the experiment's seed.
        fingerprint_config: settings that the manifest records.
        inputs: digests of what was read, recorded likewise.
        held_out: what the domains hold out on which the adapter of this one is mixed.
        say: told now and then what is being done.

    Returns:
        The manifest's metrics: the counts of every step and `candidates_sha256`.

    Raises:
        SourceError: the log cannot be read.
        DomainError: too few users or items are left, or nothing that may train.
        LeakError: the split would leak.
    """
    domain = clean(raw, config, seed, say)
    say(f"splitting {len(domain.user_ids):,} users")
    result = split(domain, config, seed, held_out)
    say("looking for leaks")
    check_no_leak(domain, result, config, held_out)
    with artifacts.replaced_dir(folder) as work:
        cases, counts = _write_candidates(
            work / "candidates.parquet",
            domain,
            result,
            CandidateDrawer(domain, result, config, seed),
            say,
        )
        say("writing")
        counts = {**domain.counts, **result.counts, **counts}
        _check_cases(domain.name, config, result, cases, counts)
        write_tables(work, domain, result, cases)
        if domain.name in config.tested:
            write_held_out(work / HELD_OUT_FILE, domain, result)
        metrics: dict[str, Any] = {
            **counts,
            "cut_offs": result.cut_offs,
            "candidates_sha256": artifacts.sha256_file(work / "candidates.parquet"),
        }
        artifacts.write_manifest(
            work,
            stage="prepare",
            config=fingerprint_config,
            seed=seed,
            inputs=inputs,
            metrics=metrics,
        )
    return metrics


def hold_out(
    raw: RawDomain,
    folder: Path,
    config: DataConfig,
    seed: int,
    *,
    fingerprint_config: Mapping[str, Any],
    inputs: Mapping[str, str],
    say: Say = silent,
) -> dict[str, Any]:
    """Write what a tested domain holds out, before it is prepared itself.

    Two domains whose adapters are mixed on each other hold out from each other. Neither could be
    prepared first, but for this: what a domain holds out follows from its own log alone.

    Args and raises as in `prepare_domain`, except that no split is checked for leaks.

    Returns:
        The manifest's metrics: how many titles, users and clicks.
    """
    domain = clean(raw, config, seed, say)
    say(f"splitting {len(domain.user_ids):,} users")
    result = split(domain, config.model_copy(update={"num_training_users": {}}), seed)
    with artifacts.replaced_dir(folder) as work:
        write_held_out(work / HELD_OUT_FILE, domain, result)
        write_held_clicks(work / HELD_CLICKS_FILE, domain, result)
        metrics: dict[str, Any] = {
            "held_out_titles": pc.count_distinct(domain.titles.filter(result.cold)).as_py(),
            "held_out_users": int((result.draws == COLD_USER).sum()),
            "held_clicks": pq.read_metadata(work / HELD_CLICKS_FILE).num_rows,
        }
        artifacts.write_manifest(
            work,
            stage="prepare",
            config=fingerprint_config,
            seed=seed,
            inputs=inputs,
            metrics=metrics,
        )
    return metrics


def _write_candidates(
    path: Path, domain: CleanDomain, result: SplitDomain, drawer: CandidateDrawer, say: Say
) -> tuple[CaseTable, dict[str, int]]:
    """Draw, check and write all lists; returns the cases for which every list could be drawn."""
    cases = result.cases
    whole = np.ones(len(cases), dtype=bool)
    num_cold_filled = 0
    num_filled = dict.fromkeys(drawer.lists, 0)
    with pq.ParquetWriter(path, CANDIDATES, use_dictionary=["purpose", "split", "list"]) as writer:
        for one in _in_parallel(lambda rows: _draw(domain, result, drawer, rows), _blocks(cases)):
            whole[one.rows] = False
            whole[one.rows[one.kept]] = True
            for name, candidates in one.lists.items():
                num_filled[name] += one.num_filled[name]
                write_block(writer, domain, one.cases, name, candidates)
            is_cold = one.cases.split == TEMPERATURES.index("cold")
            all_cold = result.cold[one.lists[MAIN_LIST]].all(axis=1)
            num_cold_filled += int((is_cold & ~all_cold).sum())
            say(f"candidates of {one.rows[-1] + 1:,} of {len(cases):,} cases")
    left = cases.take(np.flatnonzero(whole))
    kinds = [(PURPOSES[p], TEMPERATURES[t]) for p in range(2) for t in range(len(TEMPERATURES))]
    num = np.bincount(
        left.purpose.astype(np.int64) * len(TEMPERATURES) + left.split, minlength=len(kinds)
    )
    counts = {
        "valid_cases": int(num[kinds.index(("valid", "warm"))]),
        "test_cases": int(num[kinds.index(("test", "warm"))]),
        "cold_test_cases": int(num[kinds.index(("test", "cold"))]),
        "cold_user_test_cases": int(num[kinds.index(("test", "cold_user"))]),
        "few_shot_test_cases": int(num[kinds.index(("test", "few_shot"))]),
        "cases_without_enough_negatives": int((~whole).sum()),
        "cold_cases_filled_with_warm_negatives": num_cold_filled,
        **{
            f"cases_filled_with_other_negatives_{name}": num
            for name, num in num_filled.items()
            if drawer.lists[name].negatives == "category"
        },
    }
    return left, counts


@dataclass(frozen=True)
class _Block:
    """Candidates of neighbouring cases."""

    rows: npt.NDArray[np.int64]
    """Places among all cases."""
    kept: npt.NDArray[np.int64]
    """Places in `rows` of the cases for which every list could be drawn."""
    cases: CaseTable
    """Those that are kept."""
    lists: Mapping[str, npt.NDArray[np.int32]]
    num_filled: Mapping[str, int]


def _draw(
    domain: CleanDomain, result: SplitDomain, drawer: CandidateDrawer, rows: npt.NDArray[np.int64]
) -> _Block:
    cases = result.cases.take(rows)
    drawn = {name: drawer.draw(name, cases) for name in drawer.lists}
    kept = np.flatnonzero(np.all([one.is_whole for one in drawn.values()], axis=0))
    cases = cases.take(kept)
    lists = {name: one.candidates[kept] for name, one in drawn.items()}
    for name, candidates in lists.items():
        check_candidates(domain, cases, name, candidates)
    num_filled = {name: int(one.is_filled[kept].sum()) for name, one in drawn.items()}
    return _Block(rows, kept, cases, lists, num_filled)


def _in_parallel(
    work: Callable[[npt.NDArray[np.int64]], _Block], blocks: Iterable[npt.NDArray[np.int64]]
) -> Iterator[_Block]:
    """Results in the order of the blocks; a few blocks at a time, so that memory is bounded."""
    num_threads = min(4, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(num_threads) as pool:
        waiting: deque[Future[_Block]] = deque()
        for block in blocks:
            waiting.append(pool.submit(work, block))
            if len(waiting) > num_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _blocks(cases: CaseTable) -> Iterable[npt.NDArray[np.int64]]:
    """Places of neighbouring cases of one purpose."""
    for purpose in range(len(PURPOSES)):
        rows = np.flatnonzero(cases.purpose == purpose)
        for start in range(0, len(rows), BLOCK_CASES):
            yield rows[start : start + BLOCK_CASES]


def _check_cases(
    name: str,
    config: DataConfig,
    result: SplitDomain,
    cases: CaseTable,
    counts: Mapping[str, int],
) -> None:
    """Raise where no user is left for something that a later stage needs."""
    is_ingredient = name in config.tested
    warm = cases.split == TEMPERATURES.index("warm")
    unlabeled = result.draws[cases.user] == UNLABELED
    found = {
        (PURPOSES[purpose], group): bool(
            (warm & (cases.purpose == purpose) & (unlabeled == (group == "unlabeled"))).any()
        )
        for purpose in range(len(PURPOSES))
        for group in ("scored", "unlabeled")
    }
    lacking = None
    if not (found["valid", "scored"] and found["test", "scored"]):
        lacking = (
            "no user is left to validate and test on; lower `data.cold_item_fraction` or "
            "`data.num_negatives`"
        )
        if is_ingredient:
            lacking += " or `data.unlabeled_fraction`"
        if counts.get("valid_cases_held_out_elsewhere"):
            lacking += (
                ", or let the ingredient be mixed on fewer domains (`merge.neighbours`, "
                "`data.guests`), which hold some of its validation users out"
            )
    elif is_ingredient and not found["valid", "unlabeled"]:
        lacking = "no unlabeled user is left to guide the merge; raise `data.unlabeled_fraction`"
    elif is_ingredient:
        fields = {
            "cold_user_fraction": (config.cold_user_fraction, "cold_user_test_cases"),
            "few_shot_user_fraction": (config.few_shot_user_fraction, "few_shot_test_cases"),
        }
        for field, (fraction, count) in fields.items():
            if fraction and not counts[count]:
                lacking = f"no user drawn by `data.{field}` has a case; raise it or set it to 0"
    if lacking:
        raise DomainError(f"domain `{name}`: {lacking} ({describe(dict(counts))})")
