"""Clean histories -> training histories, ranking cases and their frozen candidates.

Per user, in time order: the last warm item is the test target, the one before it the validation
target, the rest the training history. Cold items of an ingredient domain leave all of that; a
user's last cold item is the target of a case of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from rc_ray.core.cleaning import CleanDomain, DomainError, describe, keyed_hashes
from rc_ray.data_config import DataConfig
from rc_ray.errors import UserError

Purpose = Literal["valid", "test"]
Temperature = Literal["warm", "cold"]
Group = Literal["scored", "unlabeled"]
Indices = npt.NDArray[np.int32]


class LeakError(UserError):
    """The prepared data would tell a model what it is tested on."""


@dataclass(frozen=True)
class Case:
    """One row of valid.parquet or test.parquet with its candidates."""

    user: int
    purpose: Purpose
    split: Temperature
    history: Indices
    target: int
    candidates: Indices
    """(num_negatives + 1,)"""


@dataclass(frozen=True)
class SplitDomain:
    """Letters: I items, U users."""

    cold: npt.NDArray[np.bool_]
    """(I,)"""
    groups: tuple[Group, ...]
    """(U,)"""
    train: tuple[Indices, ...]
    """(U,) training histories; empty for a user who met cold items only."""
    cases: tuple[Case, ...]
    counts: dict[str, int]


def split(domain: CleanDomain, config: DataConfig, seed: int) -> SplitDomain:
    """Split a clean domain and draw the candidates.

    Spirit domains have no cold items and no unlabeled users: nobody is tested for them there.

    Raises:
        DomainError: no user is left to validate or test on.
        LeakError: see `check_no_leak`.
    """
    is_ingredient = domain.name in config.ingredients
    cold = _draw_cold(domain, config, seed) if is_ingredient else np.zeros(len(domain.titles), bool)
    groups = _draw_groups(domain, config.unlabeled_fraction if is_ingredient else 0.0, seed)
    warm = ~cold
    if warm.sum() < config.num_negatives + 1:
        raise DomainError(
            f"domain `{domain.name}`: {warm.sum()} warm items are too few for "
            f"`data.num_negatives` = {config.num_negatives} ({describe(domain.counts)})"
        )
    seeds = {
        (purpose, temperature): keyed_hashes(
            domain.user_ids, seed, domain.name, "candidates", purpose, temperature
        )
        for purpose, temperature in (("valid", "warm"), ("test", "warm"), ("test", "cold"))
    }
    train: list[Indices] = []
    cases: list[Case] = []
    num_filled = num_short = 0
    for user in range(len(domain.user_ids)):
        full = domain.history(user)
        is_cold = cold[full]
        warm_part = full[~is_cold]
        # Two warm items or fewer leave no history to predict from: all of them train.
        is_long = len(warm_part) >= 3
        history = warm_part[:-2] if is_long else warm_part
        train.append(history)
        rows: list[tuple[Purpose, Temperature, Indices, int]] = []
        if is_long:
            rows.append(("valid", "warm", history, int(warm_part[-2])))
            rows.append(("test", "warm", warm_part[:-1], int(warm_part[-1])))
        if is_cold.any():
            last = int(np.flatnonzero(is_cold)[-1])
            before = history[: int((~is_cold[:last]).sum())]
            if len(before):
                rows.append(("test", "cold", before, int(full[last])))
        for purpose, temperature, past, target in rows:
            pools = (warm,) if temperature == "warm" else (cold, warm)
            key = int(seeds[purpose, temperature][user])
            candidates = draw_candidates(target, full, pools, config.num_negatives, key)
            if candidates is None:
                num_short += 1
                continue
            if temperature == "cold" and not cold[candidates].all():
                num_filled += 1
            cases.append(Case(user, purpose, temperature, past, target, candidates))
    result = SplitDomain(
        cold=cold,
        groups=groups,
        train=tuple(train),
        cases=tuple(cases),
        counts={
            "cold_items": int(cold.sum()),
            "train_histories": sum(len(history) > 0 for history in train),
            "train_interactions": sum(len(history) for history in train),
            "unlabeled_users": groups.count("unlabeled"),
            "valid_cases": sum(case.purpose == "valid" for case in cases),
            "test_cases": sum((case.purpose, case.split) == ("test", "warm") for case in cases),
            "cold_test_cases": sum(case.split == "cold" for case in cases),
            "cases_without_enough_negatives": num_short,
            "cold_cases_filled_with_warm_negatives": num_filled,
        },
    )
    lacking = _lacking(result, is_ingredient)
    if lacking is not None:
        raise DomainError(
            f"domain `{domain.name}`: {lacking} ({describe({**domain.counts, **result.counts})})"
        )
    check_no_leak(domain, result)
    return result


def _lacking(result: SplitDomain, is_ingredient: bool) -> str | None:
    """What no user is left for, and the fix; None where every group has its cases."""
    found = {
        (case.purpose, result.groups[case.user]) for case in result.cases if case.split == "warm"
    }
    if not is_ingredient:
        needed = {("valid", "scored"), ("test", "scored")}
        return None if needed <= found else _NO_CASES.format("validate and test on")
    if not {("valid", "scored"), ("test", "scored")} <= found:
        return _NO_CASES.format("validate and test on") + " or `data.unlabeled_fraction`"
    if ("valid", "unlabeled") not in found:
        return "no unlabeled user is left to guide the merge; raise `data.unlabeled_fraction`"
    return None


_NO_CASES = "no user is left to {}; lower `data.cold_item_fraction` or `data.num_negatives`"


def draw_candidates(
    target: int,
    history: Indices,
    pools: Sequence[npt.NDArray[np.bool_]],
    num_negatives: int,
    key: int,
) -> Indices | None:
    """The target among uniform negatives that the user never met.

    The order is a permutation that depends on `key` alone, applied to the sorted candidates: which
    of them is the target leaves no trace in it.

    Args:
        target: item index, part of `history`.
        history: the user's full history, cold items included.
        pools: (I,) masks; a later pool is used only where the earlier ones are exhausted.
        num_negatives: how many to draw.
        key: 64-bit seed of this user and purpose.

    Returns:
        (num_negatives + 1,) item indices, or None where too few items are left.
    """
    generator = np.random.default_rng([key, 0])
    chosen = [np.array([target], dtype=np.int32)]
    missing = num_negatives
    for pool in pools:
        allowed = pool.copy()
        allowed[history] = False
        free = np.flatnonzero(allowed).astype(np.int32)
        num = min(missing, len(free))
        chosen.append(generator.choice(free, num, replace=False))
        missing -= num
    if missing:
        return None
    candidates = np.sort(np.concatenate(chosen))
    order = np.random.default_rng([key, 1]).permutation(len(candidates))
    return candidates[order]


def check_no_leak(domain: CleanDomain, result: SplitDomain) -> None:
    """Assert what makes the data leak-proof.

    Raises:
        LeakError: a validation or test target stands in that user's training history; a negative
            in the user's full history; a cold item in a training history or in the history of any
            case; a target in its own history; a case has not exactly one positive or repeats a
            candidate.
    """

    def require(holds: bool, user: int, what: str) -> None:
        if not holds:
            raise LeakError(f"domain `{domain.name}`, user `{domain.user_ids[user]}`: {what}")

    cold = result.cold
    for user, history in enumerate(result.train):
        require(not cold[history].any(), user, "a cold item stands in the training history")
    for case in result.cases:
        name = f"{case.split} {case.purpose}"
        others = case.candidates[case.candidates != case.target]
        require(
            case.target not in result.train[case.user],
            case.user,
            f"the {name} target stands in the training history",
        )
        require(
            case.target not in case.history,
            case.user,
            f"the {name} target stands in its own history",
        )
        require(
            not cold[case.history].any(), case.user, f"a cold item stands in the {name} history"
        )
        require(
            bool(cold[case.target]) == (case.split == "cold"),
            case.user,
            f"the {name} target is of the other kind",
        )
        require(
            len(others) == len(case.candidates) - 1,
            case.user,
            f"the {name} candidates do not hold exactly one positive",
        )
        require(
            len(np.unique(case.candidates)) == len(case.candidates),
            case.user,
            f"the {name} candidates repeat an item",
        )
        require(
            not np.isin(others, domain.history(case.user)).any(),
            case.user,
            f"a {name} negative stands in the user's history",
        )


def _draw_cold(domain: CleanDomain, config: DataConfig, seed: int) -> npt.NDArray[np.bool_]:
    """(I,) the share of items held out, large enough to draw cold negatives from if affordable."""
    num_items = len(domain.item_ids)
    cold = np.zeros(num_items, dtype=bool)
    if config.cold_item_fraction == 0.0:
        return cold
    num = round(config.cold_item_fraction * num_items)
    enough = config.num_negatives + 11
    if enough <= num_items / 4:
        num = max(num, enough)
    hashes = keyed_hashes(domain.item_ids, seed, domain.name, "cold")
    cold[np.argsort(hashes)[:num]] = True
    return cold


def _draw_groups(domain: CleanDomain, fraction: float, seed: int) -> tuple[Group, ...]:
    """(U,) exactly the rounded share of users is unlabeled."""
    num = round(fraction * len(domain.user_ids))
    hashes = keyed_hashes(domain.user_ids, seed, domain.name, "group")
    unlabeled = np.zeros(len(hashes), dtype=bool)
    unlabeled[np.argsort(hashes)[:num]] = True
    return tuple("unlabeled" if flag else "scored" for flag in unlabeled)
