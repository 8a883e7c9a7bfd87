"""The split against a plain implementation, user by user, that shares no code with it."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rc_ray.core.cleaning import CleanDomain, DomainError, clean
from rc_ray.core.draws import DRAWS
from rc_ray.core.held_out import CLICKS, HeldOut
from rc_ray.core.leaks import LeakError, check_no_leak
from rc_ray.core.splits import PURPOSES, TEMPERATURES, SplitDomain, split
from rc_ray.data_config import DataConfig
from tests.core.small_logs import config, random_raw, raw

Case = tuple[tuple[int, ...], int]
Key = tuple[str, str, str]


def found_cases(domain: CleanDomain, result: SplitDomain) -> dict[Key, Case]:
    cases = result.cases
    return {
        (domain.user_ids[int(u)].as_py(), PURPOSES[p], TEMPERATURES[s]): (past, int(target))
        for u, p, s, past, target in zip(
            cases.user, cases.purpose, cases.split, cases.histories, cases.target, strict=True
        )
    }


def drawn(domain: CleanDomain, result: SplitDomain) -> dict[str, str]:
    users = domain.user_ids.to_pylist()
    return {user: DRAWS[code] for user, code in zip(users, result.draws, strict=True)}


def plain_split(
    domain: CleanDomain, held_cold: set[int], draws: dict[str, str], settings: DataConfig
) -> tuple[dict[str, tuple[int, ...]], dict[Key, Case], set[int]]:
    """Training histories, cases and cold items, by the words of docs and configuration."""
    rows: dict[str, list[tuple[int, int]]] = {}
    ids = domain.user_ids.to_pylist()
    for place, user in enumerate(ids):
        part = slice(domain.offsets[place], domain.offsets[place + 1])
        rows[user] = list(
            zip(domain.items[part].tolist(), domain.times[part].tolist(), strict=True)
        )
    by_time = settings.split == "time"
    times = sorted(time for row in rows.values() for _, time in row)
    first = times[int(settings.valid_from * len(times))] if by_time else 0
    second = times[int(settings.test_from * len(times))] if by_time else 0

    def training(user: str, cold: set[int]) -> list[int]:
        warm = [(item, time) for item, time in rows[user] if item not in cold]
        if draws[user] in ("cold_user", "held_out"):
            return []
        if by_time:
            warm = [(item, time) for item, time in warm if time < first]
        elif draws[user] != "few_shot" and len(warm) >= 3:
            warm = warm[:-2]
        if draws[user] == "few_shot":
            warm = warm[: settings.num_few_shot]
        return [item for item, _ in warm]

    cold = set(held_cold)
    if by_time:
        titles = domain.titles.to_pylist()
        seen = {titles[item] for user in rows for item in training(user, cold)}
        cold |= {item for item, title in enumerate(titles) if title not in seen}
    train = {user: tuple(training(user, cold)) for user in rows}
    cases: dict[Key, Case] = {}
    for user, row in rows.items():
        warm = [(item, time) for item, time in row if item not in cold]
        items = [item for item, _ in warm]
        role = draws[user]
        few = settings.num_few_shot
        if by_time:
            early = [item for item, time in warm if time < first]
            known = [item for item, time in warm if time < second]
            late = [item for item, time in warm if time >= second]
            between = known[len(early) :]
            if role in ("scored", "unlabeled"):
                if early and between:
                    cases[user, "valid", "warm"] = (tuple(early), between[0])
                if known and late:
                    cases[user, "test", "warm"] = (tuple(known), late[0])
                late_cold = [item for item, time in row if item in cold and time >= second]
                if known and late_cold and user_is_tested_cold(settings, domain):
                    cases[user, "test", "cold"] = (tuple(known), late_cold[0])
            elif role == "cold_user" and known and late:
                cases[user, "test", "cold_user"] = (tuple(known), late[0])
            elif role == "few_shot" and len(early) >= few and late:
                cases[user, "test", "few_shot"] = (tuple(early[:few]), late[0])
            continue
        if role in ("scored", "unlabeled"):
            if len(items) >= 3:
                cases[user, "valid", "warm"] = (tuple(items[:-2]), items[-2])
                cases[user, "test", "warm"] = (tuple(items[:-1]), items[-1])
            places = [place for place, (item, _) in enumerate(row) if item in cold]
            if places and user_is_tested_cold(settings, domain):
                before = [item for item, _ in row[: places[-1]] if item in train[user]]
                if before:
                    cases[user, "test", "cold"] = (tuple(before), row[places[-1]][0])
        elif role == "cold_user" and len(items) >= 2:
            cases[user, "test", "cold_user"] = (tuple(items[:-1]), items[-1])
        elif role == "few_shot" and len(items) > few:
            cases[user, "test", "few_shot"] = (tuple(items[:few]), items[few])
    return train, cases, cold


def user_is_tested_cold(settings: DataConfig, domain: CleanDomain) -> bool:
    return domain.name in settings.ingredients


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no cold items": {"cold_item_fraction": 0.0},
    "many cold items": {"cold_item_fraction": 0.5},
    "groups": {"cold_user_fraction": 0.2, "few_shot_user_fraction": 0.2, "num_few_shot": 4},
    "time": {"split": "time", "valid_from": 0.6, "test_from": 0.75},
    "time, groups": {
        "split": "time", "valid_from": 0.5, "test_from": 0.7,
        "cold_user_fraction": 0.2, "few_shot_user_fraction": 0.2, "num_few_shot": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("role", ["ingredient", "spirit"])
@pytest.mark.parametrize("fields", SETTINGS.values(), ids=SETTINGS)
def test_the_split_is_that_of_a_plain_loop(role: str, fields: dict[str, Any]) -> None:
    settings = config(role=role, **fields)
    domain = clean(random_raw(num_users=80, num_titles=50), settings, seed=1)
    held_out = HeldOut(pa.array(["Title 3", "Title 7"]), pa.array(["u05", "u06", "nobody"]))
    result = split(domain, settings, seed=1, held_out=held_out if role == "spirit" else None)
    draws = drawn(domain, result)
    if role == "spirit":
        assert {user for user, role in draws.items() if role != "scored"} == {"u05", "u06"}
        titles = domain.titles.to_pylist()
        held_cold = {i for i, title in enumerate(titles) if title in ("Title 3", "Title 7")}
        assert len(held_cold) == 4  # items 3, 53, 7, 57
    elif "split" in fields:
        plain = settings.model_copy(update={"split": "leave-one-out"})
        held_cold = set(np.flatnonzero(split(domain, plain, seed=1).cold).tolist())
    else:
        held_cold = set(np.flatnonzero(result.cold).tolist())
    train, cases, cold = plain_split(domain, held_cold, draws, settings)
    users = domain.user_ids.to_pylist()
    assert dict(zip(users, result.train, strict=True)) == train
    assert set(np.flatnonzero(result.cold).tolist()) == cold
    assert found_cases(domain, result) == cases
    wanted = {"valid warm", "test warm"}
    if role == "ingredient":
        wanted |= {f"test {name}" for name in ("cold_user", "few_shot") if len(fields) >= 3} - (
            {"test cold_user", "test few_shot"}
            if fields.get("cold_user_fraction") is None
            else set()
        )
        wanted |= {"test cold"} if fields.get("cold_item_fraction") != 0.0 else set()
    assert {f"{purpose} {tag}" for _, purpose, tag in cases} == wanted
    trained = Counter(item for history in train.values() for item in history)
    assert result.num_train.tolist() == [trained[item] for item in range(len(result.cold))]
    check_no_leak(domain, result, settings, held_out if role == "spirit" else None)


def test_leave_one_out_by_hand() -> None:
    log = [("u", x, time) for time, x in enumerate("dbcae")]
    domain = clean(raw(log, [(x, x.upper()) for x in "abcdefgh"]), config(), seed=0)
    result = split(domain, config(), seed=0)
    assert list(result.train) == [(3, 1, 2)]
    assert found_cases(domain, result) == {
        ("u", "valid", "warm"): ((3, 1, 2), 0),
        ("u", "test", "warm"): ((3, 1, 2, 0), 4),
    }


def test_time_by_hand() -> None:
    # 10 interactions: the 6th smallest time, 15, ends training, the 8th, 17, validation.
    log = [
        ("u", "a", 10), ("u", "b", 11), ("u", "c", 15), ("u", "a2", 18), ("u", "b2", 19),
        ("v", "a", 12), ("v", "c", 13), ("v", "b2", 14), ("v", "a2", 16), ("v", "b", 17),
    ]  # fmt: skip
    settings = config(split="time", valid_from=0.5, test_from=0.7)
    titles = [("a", "A"), ("a2", "A"), ("b", "B"), ("b2", "New"), ("c", "C"), ("z", "Z")]
    domain = clean(raw(log, titles), settings, seed=0)
    result = split(domain, settings, seed=0)
    a, a2, b, b2, c, z = range(6)
    assert result.cut_offs == (15, 17)
    assert list(result.train) == [(a, b), (a, c, b2)]
    # z trains nowhere. a2 neither, but its title does: the text is no news to a model.
    assert np.flatnonzero(result.cold).tolist() == [z]
    assert found_cases(domain, result) == {
        ("u", "valid", "warm"): ((a, b), c),
        ("u", "test", "warm"): ((a, b, c), a2),
        ("v", "valid", "warm"): ((a, c, b2), a2),
        ("v", "test", "warm"): ((a, c, b2, a2), b),
    }


def clicks(*rows: tuple[str, str, bool]) -> pa.Table:
    columns = zip(*rows, strict=True)
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, CLICKS, strict=True)], CLICKS)


def test_what_is_held_out_elsewhere_trains_no_ingredient_by_hand() -> None:
    log = [
        (user, x, time)
        for user, items in {"u": "abcdef", "v": "bcaedf", "w": "acebdf"}.items()
        for time, x in enumerate(items)
    ]
    settings = config(role="ingredient", cold_item_fraction=0.0, unlabeled_fraction=1e-9)
    domain = clean(raw(log, [(x, x.upper()) for x in "abcdefgh"]), settings, seed=0)
    held_out = HeldOut(
        pa.array(["B", "Nowhere"]),
        pa.array(["nobody", "w"]),
        clicks(("u", "C", False), ("v", "D", True), ("u", "Nowhere", True), ("nobody", "A", True)),
        by=("other",),
    )
    result = split(domain, settings, seed=0, held_out=held_out)
    a, b, c, d, e, f = range(6)
    # Of abcd, bcae and aceb: B trains nobody, C not u, and w nothing.
    assert list(result.train) == [(a, d), (c, a, e), ()]
    assert result.num_train.tolist() == [2, 0, 1, 1, 1, 0, 0, 0]
    # Negatives are drawn as if nothing were held out elsewhere.
    assert result.num_known.tolist() == [3, 3, 3, 1, 2, 0, 0, 0]
    # D is a test of v elsewhere, so v chooses no adapter here; nor does w. All are tested as ever.
    assert found_cases(domain, result) == {
        ("u", "valid", "warm"): ((a, c, d), e),
        ("u", "test", "warm"): ((a, b, c, d, e), f),
        ("v", "test", "warm"): ((b, c, a, e, d), f),
        ("w", "test", "warm"): ((a, c, e, b, d), f),
    }
    assert not result.cold.any()
    held = {name: num for name, num in result.counts.items() if name.endswith("elsewhere")}
    assert held == {
        "items_held_out_elsewhere": 1,
        "interactions_held_out_elsewhere": 7,
        "users_held_out_elsewhere": 1,
        "valid_cases_held_out_elsewhere": 2,
    }
    check_no_leak(domain, result, settings, held_out)
    # Of `num_training_users` nobody is wasted on w, who could train nothing.
    for num, expected in ((2, 2), (1, 1)):
        few = settings.model_copy(update={"num_training_users": {"shop": num}})
        limited = split(domain, few, seed=0, held_out=held_out)
        assert (limited.train.lengths > 0).sum() == expected
        assert limited.train.lengths[2] == 0
        check_no_leak(domain, limited, few, held_out)

    everything = HeldOut(domain.titles, pa.array([], pa.string()), by=("moon", "sun"))
    with pytest.raises(DomainError, match="domain `shop`: its ingredient is mixed on moon, sun, "):
        split(domain, settings, seed=0, held_out=everything)


@pytest.mark.parametrize("fields", SETTINGS.values(), ids=SETTINGS)
def test_a_tested_domain_is_tested_whatever_others_hold_out(fields: dict[str, Any]) -> None:
    settings = config(role="ingredient", **fields)
    domain = clean(random_raw(num_users=80, num_titles=50), settings, seed=1)
    alone = split(domain, settings, seed=1)
    users, titles = domain.user_ids.to_pylist(), domain.titles.to_pylist()
    rows = [
        (users[u], titles[i], bool((u + i) % 3))
        for u, i in zip(domain.histories.owners, domain.items, strict=True)
        if (u + i) % 4 == 0
    ]
    held_out = HeldOut(pa.array(["Title 3", "Title 7"]), pa.array(["u05", "u06"]), clicks(*rows))
    result = split(domain, settings, seed=1, held_out=held_out)
    assert np.array_equal(result.cold, alone.cold)
    assert np.array_equal(result.draws, alone.draws)
    trained, tests = {row[:2] for row in rows}, {row[:2] for row in rows if row[2]}

    def left(user: int, past: tuple[int, ...], lacking: set[tuple[str, str]]) -> tuple[int, ...]:
        if users[user] in ("u05", "u06"):
            return ()
        pairs = [(item, (users[user], titles[item])) for item in past]
        return tuple(
            i for i, pair in pairs if pair not in lacking and pair[1] not in ("Title 3", "Title 7")
        )

    assert list(result.train) == [left(u, past, trained) for u, past in enumerate(alone.train)]
    expected = {}
    for (user, purpose, tag), (past, target) in found_cases(domain, alone).items():
        u = users.index(user)
        if purpose == "valid" and DRAWS[alone.draws[u]] != "unlabeled":
            past = left(u, past, tests)
            if not past or not left(u, (target,), tests):
                continue
        expected[user, purpose, tag] = (past, target)
    assert found_cases(domain, result) == expected
    assert 10 < len(expected) < len(alone.cases)
    check_no_leak(domain, result, settings, held_out)


def test_times_that_cannot_be_cut() -> None:
    log = [(user, x, 7) for user in "uv" for x in "abcde"]
    settings = config(split="time")
    domain = clean(raw(log, [(x, x) for x in "abcde"]), settings, seed=0)
    with pytest.raises(DomainError, match="domain `shop`: its times do not tell"):
        split(domain, settings, seed=0)


def test_items_of_one_title_are_cold_together() -> None:
    settings = config(role="ingredient", cold_item_fraction=0.3)
    domain = clean(random_raw(num_titles=25), settings, seed=0)
    cold = split(domain, settings, seed=0).cold
    by_title = defaultdict(set)
    for title, flag in zip(domain.titles.to_pylist(), cold.tolist(), strict=True):
        by_title[title].add(flag)
    assert all(len(flags) == 1 for flags in by_title.values())
    # 0.3 * 60 = 18 in titles of 2 or 3 items: the last title may lead past it by 2.
    assert 18 <= cold.sum() <= 20


def test_a_title_of_very_many_items_is_not_held_out() -> None:
    log = [("u", f"i{i}", i) for i in range(8)] + [("v", f"i{i}", i) for i in range(8)]
    items = [(f"i{i}", "Gift card" if i < 9 else f"T{i}") for i in range(20)]
    settings = config(role="ingredient", cold_item_fraction=0.2, num_negatives=2)
    for seed in range(20):
        domain = clean(raw(log, items), settings, seed=seed)
        cold = split(domain, settings, seed=seed).cold
        assert cold.sum() == 4
        assert not cold[
            [i for i, t in enumerate(domain.titles.to_pylist()) if t == "Gift card"]
        ].any()


def test_draws_depend_on_the_user_and_the_seed_alone() -> None:
    settings = config(role="ingredient", cold_user_fraction=0.2, few_shot_user_fraction=0.2)

    def draws(num_users: int, seed: int = 3, shuffle: int | None = None) -> dict[str, str]:
        data = random_raw(num_users=num_users, shuffle=shuffle)
        domain = clean(data, settings, seed)
        return drawn(domain, split(domain, settings, seed))

    reference = draws(90)
    assert draws(90, shuffle=1) == reference
    assert draws(20) == {user: role for user, role in reference.items() if user < "u20"}
    assert draws(90, seed=4) != reference
    # 90 users: 18 of each group are expected, standard deviation 3.8.
    counts = Counter(reference.values())
    assert all(6 < counts[role] < 31 for role in ("cold_user", "few_shot", "unlabeled"))
    # Which users are unlabeled does not change with the other groups.
    settings = config(role="ingredient")
    unlabeled = {user for user, role in draws(90).items() if role == "unlabeled"}
    assert unlabeled == {user for user, role in reference.items() if role == "unlabeled"}


def test_training_sees_a_few_users_and_all_are_tested_as_before() -> None:
    settings = config(role="ingredient")
    domain = clean(random_raw(num_users=90), settings, seed=3)
    whole = split(domain, settings, seed=3)

    def limited(num: int) -> SplitDomain:
        few = settings.model_copy(update={"num_training_users": {domain.name: num}})
        result = split(domain, few, seed=3)
        check_no_leak(domain, result, few, HeldOut.nothing())
        return result

    result = limited(7)
    trained = {u: h for u, h in enumerate(result.train) if h}
    assert len(trained) == 7
    assert all(history == whole.train[user] for user, history in trained.items())
    assert result.num_train.sum() == sum(map(len, trained.values()))
    assert found_cases(domain, result) == found_cases(domain, whole)
    assert np.array_equal(result.cold, whole.cold)
    # More users keep the first ones; more than there are change nothing.
    assert set(trained) < {u for u, h in enumerate(limited(20).train) if h}
    assert list(limited(1000).train) == list(whole.train)
    # A history beyond the limit is a leak.
    few = settings.model_copy(update={"num_training_users": {domain.name: 6}})
    with pytest.raises(LeakError, match=r"more users train than `data.num_training_users`"):
        check_no_leak(domain, result, few, HeldOut.nothing())
