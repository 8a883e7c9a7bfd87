"""Clean histories -> training histories and ranking cases.

Every case's history is the head of its user's warm items in time order, so a case is a user, a
length and a target. Nothing here loops over users.

Leave-one-out: the last warm item is the test target, the one before it the validation target, the
rest trains; a user's last cold item is the target of a case of its own. Time: two moments cut the
domain; what lies before the first one trains, and the first item after a moment is its target.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from rc_ray.core.cleaning import CleanDomain, DomainError, describe, list_field
from rc_ray.core.draws import (
    COLD_USER,
    FEW_SHOT,
    HELD_OUT,
    SCORED,
    UNLABELED,
    Codes,
    draw_cold,
    draw_users,
)
from rc_ray.core.hashing import keyed_hashes
from rc_ray.core.held_out import HeldOut, Outside
from rc_ray.core.histories import Histories, Indices, offsets_of
from rc_ray.data_config import DataConfig

Purpose = Literal["valid", "test"]
Temperature = Literal["warm", "cold", "cold_user", "few_shot"]
Group = Literal["scored", "unlabeled"]

PURPOSES: tuple[Purpose, ...] = ("valid", "test")
TEMPERATURES: tuple[Temperature, ...] = ("warm", "cold", "cold_user", "few_shot")
Lengths = npt.NDArray[np.int64]


@dataclass(frozen=True)
class CaseTable:
    """What is to be ranked, C cases ordered by purpose, user and split."""

    user: Indices
    """(C,) places in the domain's user ids."""
    purpose: Codes
    """(C,) places in `PURPOSES`."""
    split: Codes
    """(C,) places in `TEMPERATURES`."""
    target: Indices
    """(C,)"""
    histories: Histories
    """(C,)"""

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: npt.NDArray[np.int64]) -> CaseTable:
        """Some of the cases, in the order of `rows`."""
        return CaseTable(
            self.user[rows],
            self.purpose[rows],
            self.split[rows],
            self.target[rows],
            self.histories.take(rows),
        )

    def name(self, case: int) -> str:
        """Kind of a case, for messages: "warm test"."""
        return f"{TEMPERATURES[self.split[case]]} {PURPOSES[self.purpose[case]]}"


@dataclass(frozen=True)
class SplitDomain:
    """Letters: I items, U users."""

    cold: npt.NDArray[np.bool_]
    """(I,) items that no training history holds on purpose."""
    draws: Codes
    """(U,) places in `DRAWS`."""
    train: Histories
    """(U,) training histories; empty for a user who trains nothing."""
    cases: CaseTable
    cut_offs: tuple[int, int] | None
    """First times of the validation and the test period, in a split by time."""
    counts: dict[str, int]
    own_train: Histories | None = None
    """(U,) what would train if other domains held nothing out; null where they do not."""
    held_out_elsewhere: npt.NDArray[np.bool_] | None = None
    """(I,) items of a title that these domains hold out; null where they do not."""

    @property
    def num_train(self) -> npt.NDArray[np.int64]:
        """(I,) training interactions."""
        return np.bincount(self.train.values, minlength=len(self.cold))

    @property
    def num_known(self) -> npt.NDArray[np.int64]:
        """(I,) the same, whatever other domains hold out: what negatives are drawn by."""
        train = self.train if self.own_train is None else self.own_train
        return np.bincount(train.values, minlength=len(self.cold))


def split(
    domain: CleanDomain, config: DataConfig, seed: int, held_out: HeldOut | None = None
) -> SplitDomain:
    """Split a clean domain.

    Spirit domains draw no cold items and no groups of users: nobody is tested for them there. What
    the tested domains hold out is cold there. A tested domain whose adapter is mixed on others
    draws, tests and guides as if it stood alone; what the others hold out is taken out of its
    training histories, and out of the validation that chooses its adapter.

    Args:
        domain: clean histories.
        config: the data section.
        seed: the experiment's seed.
        held_out: what the domains hold out on which the adapter of this one is mixed.

    Raises:
        DomainError: too few warm items are left for a list of candidates, or nothing that may
            train.
    """
    is_ingredient = domain.name in config.tested
    outside = Outside(domain, held_out or HeldOut.nothing())
    if is_ingredient:
        cold = draw_cold(domain, config, seed)
        draws = draw_users(domain, config, seed)
    else:
        cold = outside.items
        draws = np.where(outside.users, HELD_OUT, SCORED).astype(np.uint8)
    counts = {
        "items_held_out_elsewhere": 0 if is_ingredient else int(cold.sum()),
        "interactions_held_out_elsewhere": 0 if is_ingredient else int(cold[domain.items].sum()),
        "users_held_out_elsewhere": int((draws == HELD_OUT).sum()),
        "cold_items_by_nature": 0,
    }
    cut_offs = _cut_offs(domain, config) if config.split == "time" else None
    warm = _Warm.of(domain, cold, cut_offs)
    if cut_offs is not None:
        # An item counts as known where one of its title trains: what it is called has been seen.
        num_train = np.bincount(_train(warm, draws, config).values, minlength=len(cold))
        title = np.asarray(domain.titles.dictionary_encode().indices)
        unseen = np.bincount(title, weights=num_train)[title] == 0
        counts["cold_items_by_nature"] = int((unseen & ~cold).sum())
        cold = cold | unseen
        warm = _Warm.of(domain, cold, cut_offs)
    num_warm = int((~cold).sum())
    for name, candidates in config.candidate_lists.items():
        if num_warm < candidates.num_negatives + 1:
            raise DomainError(
                f"domain `{domain.name}`: {num_warm} warm items are too few for "
                f"{list_field(name)} = {candidates.num_negatives} ({describe(domain.counts)})"
            )
    whole = _train(warm, draws, config)
    train, own_train, elsewhere = _sampled(whole, domain, config, seed), None, None
    cases = _cases(domain, warm, cold, draws, config, has_cold_cases=is_ingredient)
    if is_ingredient and held_out is not None:
        allowed = whole.where(~outside.trains_nothing(whole.owners, whole.values))
        if not len(allowed.values):
            raise DomainError(_nothing_to_train_on(domain, held_out))
        own_train, train = train, _sampled(allowed, domain, config, seed)
        elsewhere = outside.items
        num_cases, cases = len(cases), _allowed(cases, draws, outside)
        counts["items_held_out_elsewhere"] = int((outside.items & ~cold).sum())
        counts["interactions_held_out_elsewhere"] = len(whole.values) - len(allowed.values)
        counts["users_held_out_elsewhere"] = int(outside.users.sum())
        counts["valid_cases_held_out_elsewhere"] = num_cases - len(cases)
    counts |= {
        "cold_items": int(cold.sum()),
        "train_histories": int((train.lengths > 0).sum()),
        "train_interactions": len(train.values),
        "unlabeled_users": int((draws == UNLABELED).sum()),
        "cold_users": int((draws == COLD_USER).sum()),
        "few_shot_users": int((draws == FEW_SHOT).sum()),
    }
    return SplitDomain(cold, draws, train, cases, cut_offs, counts, own_train, elsewhere)


def _allowed(cases: CaseTable, draws: Codes, outside: Outside) -> CaseTable:
    """The cases without what may not choose an adapter that is mixed elsewhere."""
    chooses = (cases.purpose == PURPOSES.index("valid")) & (draws[cases.user] != UNLABELED)
    past = cases.histories
    owner = past.owners
    gone = chooses[owner] & outside.chooses_nothing(cases.user[owner], past.values)
    left = past.where(~gone)
    lost = outside.chooses_nothing(cases.user, cases.target) | (left.lengths == 0)
    return replace(cases, histories=left).take(np.flatnonzero(~(chooses & lost)))


def _nothing_to_train_on(domain: CleanDomain, held_out: HeldOut) -> str:
    return (
        f"domain `{domain.name}`: its ingredient is mixed on {', '.join(held_out.by)}, and nothing "
        "is left to train it on without what is held out there; name fewer domains in "
        "`merge.neighbours` or `data.guests`, or lower `data.cold_item_fraction` or "
        f"`data.cold_user_fraction` ({describe(domain.counts)})"
    )


@dataclass(frozen=True)
class _Warm:
    """Warm items of each user in time order, U users."""

    histories: Histories
    num_before_valid: Lengths
    """(U,) warm items before the validation period, in a split by time."""
    num_before_test: Lengths
    cut_offs: tuple[int, int] | None

    @classmethod
    def of(
        cls,
        domain: CleanDomain,
        cold: npt.NDArray[np.bool_],
        cut_offs: tuple[int, int] | None,
    ) -> _Warm:
        rows = np.flatnonzero(~cold[domain.items])
        # Warm rows before each user's first row: no array of N users is needed.
        offsets = np.searchsorted(rows, domain.offsets)
        histories = Histories(domain.items[rows], offsets.astype(np.int64))
        if cut_offs is None:
            none = np.zeros(len(histories), dtype=np.int64)
            return cls(histories, none, none, None)
        before = [
            np.diff(offsets_of((domain.times[rows] < moment).astype(np.int64))[offsets])
            for moment in cut_offs
        ]
        return cls(histories, before[0], before[1], cut_offs)


def _train(warm: _Warm, draws: Codes, config: DataConfig) -> Histories:
    """(U,) training histories."""
    length = warm.histories.lengths
    if warm.cut_offs is not None:
        known = warm.num_before_valid
    else:
        # Two warm items or fewer leave no history to predict from: all of them train.
        known = np.where(length >= 3, length - 2, length)
    few = warm.num_before_valid if warm.cut_offs is not None else length
    known = np.where(draws == FEW_SHOT, np.minimum(few, config.num_few_shot), known)
    known = np.where((draws == COLD_USER) | (draws == HELD_OUT), 0, known)
    return warm.histories.heads(np.arange(len(length)), known)


def _sampled(train: Histories, domain: CleanDomain, config: DataConfig, seed: int) -> Histories:
    """(U,) the training histories of `num_training_users` users, and empty ones for the others."""
    num = config.num_training_users.get(domain.name)
    users = np.flatnonzero(train.lengths)
    if num is None or num >= len(users):
        return train
    hashes = keyed_hashes(domain.user_ids, seed, domain.name, "training")
    kept = users[np.argsort(hashes[users], kind="stable")[:num]]
    lengths = np.zeros_like(train.lengths)
    lengths[kept] = train.lengths[kept]
    return train.heads(np.arange(len(train)), lengths)


def _cases(
    domain: CleanDomain,
    warm: _Warm,
    cold: npt.NDArray[np.bool_],
    draws: Codes,
    config: DataConfig,
    *,
    has_cold_cases: bool,
) -> CaseTable:
    histories, length = warm.histories, warm.histories.lengths
    usual = (draws == SCORED) | (draws == UNLABELED)
    cold_user, few_shot = draws == COLD_USER, draws == FEW_SHOT
    few = np.full(len(length), config.num_few_shot)
    # Rows: purpose, split, who, length of the history, place of the target among the warm items.
    rows: list[tuple[int, int, npt.NDArray[np.bool_], Lengths, Lengths]]
    if warm.cut_offs is None:
        long = usual & (length >= 3)
        known = np.where(length >= 3, length - 2, length)
        rows = [
            (0, 0, long, length - 2, length - 2),
            (1, 0, long, length - 1, length - 1),
            (1, 2, cold_user & (length >= 2), length - 1, length - 1),
            (1, 3, few_shot & (length > few), few, few),
        ]
    else:
        first, second = warm.num_before_valid, warm.num_before_test
        known = second
        goes_on = length > second
        rows = [
            (0, 0, usual & (first >= 1) & (second > first), first, first),
            (1, 0, usual & (second >= 1) & goes_on, second, second),
            (1, 2, cold_user & (second >= 1) & goes_on, second, second),
            (1, 3, few_shot & (first >= few) & goes_on, few, second),
        ]
    columns = [
        _rows(purpose, tag, users := np.flatnonzero(who), heads[users],
              histories.values[histories.offsets[users] + places[users]])
        for purpose, tag, who, heads, places in rows
    ]  # fmt: skip
    if has_cold_cases:
        row, user = _cold_targets(domain, cold, warm.cut_offs)
        num_before = np.searchsorted(np.flatnonzero(~cold[domain.items]), row)
        heads = np.minimum(known[user], num_before - histories.offsets[user])
        kept = usual[user] & (heads >= 1)
        columns.append(_rows(1, 1, user[kept], heads[kept], domain.items[row[kept]]))
    purpose, tag, user, heads, target = (np.concatenate(one) for one in zip(*columns, strict=True))
    order = np.lexsort((tag, user, purpose))
    return CaseTable(
        user=user[order].astype(np.int32),
        purpose=purpose[order].astype(np.uint8),
        split=tag[order].astype(np.uint8),
        target=target[order].astype(np.int32),
        histories=histories.heads(user[order], heads[order]),
    )


def _rows(
    purpose: int,
    tag: int,
    users: npt.NDArray[np.int64],
    heads: Lengths,
    targets: Indices,
) -> tuple[npt.NDArray[np.integer], ...]:
    return np.full(len(users), purpose), np.full(len(users), tag), users, heads, targets


def _cold_targets(
    domain: CleanDomain, cold: npt.NDArray[np.bool_], cut_offs: tuple[int, int] | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows of the cold targets, and their users: the last one, or the first one after a moment."""
    is_cold = cold[domain.items]
    if cut_offs is not None:
        is_cold &= domain.times >= cut_offs[1]
    rows = np.flatnonzero(is_cold)
    bounds = np.searchsorted(rows, domain.offsets)
    users = np.flatnonzero(np.diff(bounds))
    places = bounds[users] if cut_offs is not None else bounds[users + 1] - 1
    return rows[places], users


def _cut_offs(domain: CleanDomain, config: DataConfig) -> tuple[int, int]:
    """First times of the validation and the test period."""
    moments = []
    for share in (config.valid_from, config.test_from):
        place = min(int(share * len(domain.times)), len(domain.times) - 1)
        moments.append(int(np.partition(domain.times, place)[place]))
    if moments[0] == moments[1] or moments[0] == domain.times.min():
        raise DomainError(
            f"domain `{domain.name}`: its times do not tell the periods of `data.split: time` "
            f"apart ({moments[0]} and {moments[1]}); change `data.valid_from` and "
            "`data.test_from`, or take `leave-one-out`"
        )
    return moments[0], moments[1]
