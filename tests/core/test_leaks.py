"""Every kind of leak is planted by hand and must be found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rc_ray.core.candidates import CandidateDrawer
from rc_ray.core.cleaning import CleanDomain, clean
from rc_ray.core.draws import COLD_USER, FEW_SHOT, SCORED, UNLABELED
from rc_ray.core.held_out import CLICKS, HeldOut
from rc_ray.core.histories import Histories
from rc_ray.core.leaks import LeakError, check_candidates, check_no_leak
from rc_ray.core.splits import PURPOSES, TEMPERATURES, SplitDomain, split
from rc_ray.data_config import DataConfig
from tests.core.small_logs import config, random_raw

Sound = tuple[CleanDomain, SplitDomain, DataConfig]


def sound(role: str = "ingredient", **fields: Any) -> Sound:
    settings = config(
        role=role, cold_user_fraction=0.2, few_shot_user_fraction=0.2, num_few_shot=2, **fields
    )
    domain = clean(random_raw(num_users=60, num_titles=45), settings, seed=2)
    result = split(domain, settings, seed=2)
    check_no_leak(domain, result, settings)
    return domain, result, settings


def trained_on(result: SplitDomain, user: int, *items: int) -> SplitDomain:
    train = list(result.train)
    train[user] = (*train[user], *items)
    return dataclasses.replace(result, train=Histories.of(train))


def with_case(
    result: SplitDomain, kind: str, change: Callable[[tuple[int, ...], int], Any]
) -> SplitDomain:
    """Change history and target of the first case of a kind."""
    cases = result.cases
    place = next(i for i in range(len(cases)) if cases.name(i) == kind)
    histories, targets = list(cases.histories), cases.target.copy()
    histories[place], targets[place] = change(histories[place], int(targets[place]))
    return dataclasses.replace(
        result,
        cases=dataclasses.replace(cases, histories=Histories.of(histories), target=targets),
    )


def retagged(result: SplitDomain, kind: str, tag: str) -> SplitDomain:
    cases = result.cases
    place = next(i for i in range(len(cases)) if cases.name(i) == kind)
    tags = cases.split.copy()
    tags[place] = TEMPERATURES.index(tag)
    return dataclasses.replace(result, cases=dataclasses.replace(cases, split=tags))


def redrawn(result: SplitDomain, user: int, code: int) -> SplitDomain:
    draws = result.draws.copy()
    draws[user] = code
    return dataclasses.replace(result, draws=draws)


def first_user(result: SplitDomain, code: int) -> int:
    return int(np.flatnonzero((result.draws == code) & (result.train.lengths != 1))[0])


def unmet(domain: CleanDomain, result: SplitDomain, user: int) -> int:
    """A warm item that the user never met."""
    met = set(domain.histories[user])
    return next(i for i in np.flatnonzero(~result.cold).tolist() if i not in met)


def met_cold(domain: CleanDomain, result: SplitDomain, user: int) -> int:
    return next(i for i in domain.histories[user] if result.cold[i])


def leaks_of_leave_one_out(domain: CleanDomain, result: SplitDomain) -> dict[str, SplitDomain]:
    cases = result.cases
    valid = next(i for i in range(len(cases)) if cases.name(i) == "warm valid")
    cold = next(i for i in range(len(cases)) if cases.name(i) == "cold test")
    user, cold_user_of_cold = int(cases.user[valid]), int(cases.user[cold])
    scored = first_user(result, SCORED)
    cold_item = met_cold(domain, result, cold_user_of_cold)
    titles = domain.titles.to_pylist()
    warm_twin = next(
        item
        for item in range(len(titles))
        if titles.count(titles[item]) > 1 and not result.cold[item]
        and result.num_train[item] and result.num_train[titles.index(titles[item])]
    )  # fmt: skip

    def other_than(target: int) -> int:
        return next(i for i in np.flatnonzero(result.cold).tolist() if i != target)

    half_cold = result.cold.copy()
    half_cold[warm_twin] = True
    half_cold_train = Histories.of(
        [tuple(i for i in one if i != warm_twin) for one in result.train]
    )
    return {
        "the warm valid target stands in the training history": trained_on(
            result, user, int(cases.target[valid])
        ),
        "a cold item stands in the training history": trained_on(
            result, cold_user_of_cold, cold_item
        ),
        "an item of a cold title stands in the training history": dataclasses.replace(
            result, cold=half_cold, train=half_cold_train
        ),
        "the training history holds an item that the user never met": trained_on(
            result, scored, unmet(domain, result, scored)
        ),
        "a user who is held out trains": trained_on(
            result,
            (cold_user := first_user(result, COLD_USER)),
            next(i for i in domain.histories[cold_user] if not result.cold[i]),
        ),
        "a few-shot user trains more than `data.num_few_shot` items": trained_on(
            result,
            (few := first_user(result, FEW_SHOT)),
            [i for i in domain.histories[few] if not result.cold[i]][2],
        ),
        "the warm test target stands in its own history": with_case(
            result, "warm test", lambda past, target: ((*past, target), target)
        ),
        "the cold test history holds a cold item": with_case(
            result, "cold test", lambda past, target: ((*past, other_than(target)), target)
        ),
        "the warm valid history reaches past its target": with_case(
            result,
            "warm valid",
            lambda past, target: ((*past, int(cases.target[_test_of(result, user)])), target),
        ),
        "the warm valid target was never met by its user": with_case(
            result, "warm valid", lambda past, _: (past, unmet(domain, result, user))
        ),
        "the warm valid history holds an item that its user never met": with_case(
            result,
            "warm valid",
            lambda past, target: ((*past, unmet(domain, result, user)), target),
        ),
        "the cold test target is of the other kind": retagged(result, "warm test", "cold"),
        "case mixes up who is `cold_user`": retagged(result, "warm test", "cold_user"),
        "case mixes up who is `few_shot`": retagged(result, "warm test", "few_shot"),
        "the few_shot test history is longer than `num_few_shot`": with_case(
            result, "few_shot test", lambda past, target: ((past[0], *past), target)
        ),
    }  # fmt: skip


def _test_of(result: SplitDomain, user: int) -> int:
    cases = result.cases
    return next(
        i for i in range(len(cases)) if cases.user[i] == user and cases.name(i) == "warm test"
    )


def test_planted_leaks_are_found() -> None:
    domain, result, settings = sound()
    for words, leaky in leaks_of_leave_one_out(domain, result).items():
        with pytest.raises(LeakError, match=words) as caught:
            check_no_leak(domain, leaky, settings)
        assert "domain `shop`, user `u" in str(caught.value), words


def test_a_spirit_trains_on_nothing_that_is_held_out() -> None:
    settings = config(role="spirit")
    domain = clean(random_raw(num_users=60), settings, seed=2)
    result = split(domain, settings, seed=2)
    trained = result.train[0][0]
    title, user = domain.titles[trained].as_py(), domain.user_ids[0].as_py()
    nobody, nothing = pa.array([], pa.string()), pa.array([], pa.string())
    for held_out, words in (
        (HeldOut(pa.array([title]), nobody), "an item whose title another domain holds out"),
        (HeldOut(nothing, pa.array([user])), f"user `{user}`: a user who is held out trains"),
    ):
        with pytest.raises(LeakError, match=words):
            check_no_leak(domain, result, settings, held_out)
        sound = split(domain, settings, seed=2, held_out=held_out)
        check_no_leak(domain, sound, settings, held_out)
    assert first_user(sound, 4) == 0
    leaky = redrawn(result, 0, 4)
    leaky = dataclasses.replace(leaky, train=Histories.of([(), *list(result.train)[1:]]))
    with pytest.raises(LeakError, match="case is of a user who is held out elsewhere"):
        check_no_leak(domain, leaky, settings)


def test_what_another_domain_holds_out_trains_and_chooses_no_ingredient() -> None:
    """Each kind is held out after the split was made without it."""
    domain, result, settings = sound()
    cases = result.cases
    valid = next(
        i
        for i in range(len(cases))
        if cases.name(i) == "warm valid" and result.draws[cases.user[i]] == SCORED
    )
    user = domain.user_ids[int(cases.user[valid])].as_py()
    past, target = cases.histories[valid], int(cases.target[valid])
    nothing = HeldOut.nothing()
    untrained = dataclasses.replace(result, train=Histories.of([()] * len(result.train)))

    def titled(item: int) -> pa.Array:
        return pa.array([domain.titles[item].as_py()])

    def clicked(item: int, is_target: bool) -> HeldOut:
        row = {"user_id": [user], "title": titled(item), "is_target": [is_target]}
        return dataclasses.replace(nothing, clicks=pa.table(row, CLICKS))

    only = cases.take(np.array([valid]))
    alone = dataclasses.replace(untrained, cases=only)
    title, of_user = (
        HeldOut(titled(target), nothing.user_ids),
        HeldOut(nothing.titles, pa.array([user])),
    )
    for held_out, leaky, words in (
        (clicked(past[0], False), result, "a click that another domain keeps from training"),
        (of_user, untrained, "the warm valid case is of a user whom another domain holds"),
        (title, alone, "the warm valid target has a title that another domain holds out"),
        (HeldOut(titled(past[0]), nothing.user_ids), alone, "valid history holds a title that"),
        (clicked(target, True), untrained, "the warm valid target is the test target of its user"),
        (clicked(past[0], True), untrained, "the warm valid history holds the test target of"),
    ):
        with pytest.raises(LeakError, match=words) as caught:
            check_no_leak(domain, leaky, settings, held_out)
        assert f"user `{user}`" in str(caught.value)
        mended = split(domain, settings, seed=2, held_out=held_out)
        check_no_leak(domain, mended, settings, held_out)
    # Another domain's validation click may validate here too, and who is unlabeled chooses nothing.
    check_no_leak(domain, untrained, settings, clicked(target, False))
    unlabeled = redrawn(untrained, int(cases.user[valid]), UNLABELED)
    check_no_leak(domain, unlabeled, settings, of_user)


def test_leaks_through_time_are_found() -> None:
    domain, result, settings = sound(split="time", valid_from=0.5, test_from=0.7)
    assert result.cut_offs is not None
    first, second = result.cut_offs
    user = int(result.cases.user[0])
    rows = slice(domain.offsets[user], domain.offsets[user + 1])
    met = list(zip(domain.items[rows].tolist(), domain.times[rows].tolist(), strict=True))
    cases = {result.cases.name(i) for i in range(len(result.cases))}
    assert cases == {f"{tag} test" for tag in TEMPERATURES} | {"warm valid"}
    targets = {
        int(t) for u, t in zip(result.cases.user, result.cases.target, strict=True) if u == user
    }
    late = next(i for i, t in met if t >= first and i not in targets and not result.cold[i])
    early = next(i for i, t in met if t < first and not result.cold[i])
    after = next(i for i, t in met if t >= second and not result.cold[i])
    untrained = dataclasses.replace(
        result,
        train=Histories.of([() if u == user else one for u, one in enumerate(result.train)]),
    )

    def changed(change: Callable[[tuple[int, ...], int], Any]) -> SplitDomain:
        return with_case(untrained, "warm valid", change)

    for words, leaky in {
        "an interaction at or after the first cut-off trains": trained_on(result, user, late),
        "the warm valid target lies before its period": changed(lambda past, _: (past[1:], early)),
        "the warm valid target lies after its period": changed(lambda past, _: (past, after)),
        "the warm valid history reaches into its period": changed(
            lambda past, target: ((*past, late), target)
        ),
    }.items():
        with pytest.raises(LeakError, match=words) as caught:
            check_no_leak(domain, leaky, settings)
        assert f"user `{domain.user_ids[user]}`" in str(caught.value)


def test_unsound_lists_are_found() -> None:
    domain, result, settings = sound()
    for purpose in range(len(PURPOSES)):
        cases = result.cases.take(np.flatnonzero(result.cases.purpose == purpose))
        lists = CandidateDrawer(domain, result, settings, 3).draw("main", cases).candidates
        check_candidates(domain, cases, "main", lists)
        place = 7
        user, target = int(cases.user[place]), int(cases.target[place])
        met = next(i for i in domain.histories[user] if i != target)
        other = next(i for i in lists[place] if i != target)
        free = unmet(domain, result, user)
        for words, row in {
            "do not hold exactly one positive": [other, free, met],
            "list `main` repeat an item": [target, other, other],
            "a negative of the candidates of the list `main` stands in the": [target, met, other],
        }.items():
            leaky = lists.copy()
            leaky[place] = row
            with pytest.raises(LeakError, match=words) as caught:
                check_candidates(domain, cases, "main", leaky)
            assert f"domain `shop`, user `{domain.user_ids[user]}`" in str(caught.value)
