from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from rc_ray.core import candidates
from rc_ray.core.candidates import CandidateDrawer, Drawn
from rc_ray.core.cleaning import CleanDomain, clean
from rc_ray.core.histories import Histories
from rc_ray.core.splits import PURPOSES, TEMPERATURES, CaseTable, SplitDomain, split
from rc_ray.data_config import DataConfig
from tests.core.small_logs import Row, config, random_raw, raw

Key = tuple[str, str, str]


def made(data: Any, settings: DataConfig, seed: int = 3) -> tuple[CleanDomain, SplitDomain]:
    domain = clean(data, settings, seed)
    return domain, split(domain, settings, seed)


def of_purpose(cases: CaseTable, purpose: str) -> CaseTable:
    return cases.take(np.flatnonzero(cases.purpose == PURPOSES.index(purpose)))


def draw(
    domain: CleanDomain,
    result: SplitDomain,
    settings: DataConfig,
    name: str = "main",
    seed: int = 3,
) -> dict[Key, list[int]]:
    """Lists by user, purpose and split, of the cases with enough items left."""
    drawer = CandidateDrawer(domain, result, settings, seed)
    users = domain.user_ids.to_pylist()
    found = {}
    for purpose in PURPOSES:
        cases = of_purpose(result.cases, purpose)
        drawn = drawer.draw(name, cases)
        for place in np.flatnonzero(drawn.is_whole):
            key = (users[cases.user[place]], purpose, TEMPERATURES[cases.split[place]])
            found[key] = drawn.candidates[place].tolist()
    return found


def test_candidates_depend_on_the_user_and_the_seed_alone() -> None:
    settings = config(role="ingredient")
    reference = draw(*made(random_raw(), settings), settings)
    assert draw(*made(random_raw(shuffle=1), settings), settings) == reference
    fewer = draw(*made(random_raw(num_users=11), settings), settings)
    assert fewer == {key: value for key, value in reference.items() if key[0] < "u11"}
    assert draw(*made(random_raw(), settings), settings, seed=4) != reference


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {kind: {"negatives": kind, "num_negatives": 20} for kind in ("popularity", "category")}
    settings = config(role="ingredient", more_candidates=kinds)
    domain, result = made(random_raw(num_categories=9), settings)
    drawer = CandidateDrawer(domain, result, settings, 3)
    cases = of_purpose(result.cases, "test")
    monkeypatch.setattr(candidates, "_MAX_LISTED", 10)
    for name in ("main", "popularity", "category"):
        whole = drawer.draw(name, cases)
        monkeypatch.setattr(candidates, "_MAX_LISTED", 1 << 22)
        for place in range(len(cases)):
            one = drawer.draw(name, cases.take(np.array([place])))
            assert one.is_whole[0] == whole.is_whole[place]
            assert one.candidates[0].tolist() == whole.candidates[place].tolist()


@pytest.mark.parametrize("kind", ["uniform", "popularity", "category"])
def test_the_target_leaves_no_trace(kind: str) -> None:
    """Another target, same user: the same negatives, in the same order of the sorted list."""
    settings = config(negatives=kind, num_negatives=5)
    domain, result = made(random_raw(num_users=60, num_categories=4), settings)
    drawer = CandidateDrawer(domain, result, settings, 3)
    cases = of_purpose(result.cases, "test")
    before = drawer.draw("main", cases)
    rng = np.random.default_rng(0)
    num_compared = 0
    for place, user in enumerate(cases.user.tolist()):
        met = domain.items[domain.offsets[user] : domain.offsets[user + 1]]
        last = int(domain.offsets[user + 1]) - 1
        assert domain.items[last] == cases.target[place]
        listed = set(before.candidates[place].tolist())
        fresh = [item for item in range(60) if item not in listed and item not in met]
        new = int(rng.choice(fresh))
        items = domain.items.copy()
        items[last] = new
        changed = CandidateDrawer(dataclasses.replace(domain, items=items), result, settings, 3)
        changed._num_train = drawer._num_train
        case = cases.take(np.array([place]))
        case = dataclasses.replace(case, target=np.array([new], dtype=np.int32))
        after = changed.draw("main", case).candidates[0].tolist()
        old_negatives = listed - {int(cases.target[place])}
        # The former target may be drawn now; otherwise not one negative may differ.
        if int(cases.target[place]) not in after:
            num_compared += 1
            assert set(after) - {new} == old_negatives
            ranks = np.argsort(np.argsort(before.candidates[place]))
            assert np.argsort(np.argsort(after)).tolist() == ranks.tolist()
    assert num_compared > 40


def test_positions_of_the_target_are_uniform() -> None:
    log: list[Row] = [
        (f"u{user:04d}", item, time) for user in range(2000) for time, item in enumerate("abc")
    ]
    settings = config(num_negatives=3)
    domain, result = made(raw(log, [(x, x) for x in "abcdefghij"]), settings)
    lists = draw(domain, result, settings)
    # Both targets stand before all negatives in the sorted list: only the permutation can hide it.
    positions = [row.index(2) for (_, purpose, _), row in lists.items() if purpose == "test"]
    # Uniform over 4 places: 500 each, standard deviation 19.
    assert np.abs(np.bincount(positions, minlength=4) - 500).max() < 80


def shares(settings: DataConfig, log: list[Row], items: list[Row]) -> npt.NDArray[np.float64]:
    """How often each item is among a user's test negatives, with its items a, b, c met."""
    domain, result = made(raw(log, items), settings)
    lists = draw(domain, result, settings)
    rows = [row for (_, purpose, _), row in lists.items() if purpose == "test"]
    return np.bincount(np.concatenate(rows), minlength=len(domain.item_ids)) / len(rows)


def test_uniform_negatives() -> None:
    log: list[Row] = [
        (f"u{user:04d}", item, time) for user in range(3000) for time, item in enumerate("abc")
    ]
    found = shares(config(num_negatives=3), log, [(x, x) for x in "abcdefghij"])
    assert found[:3].tolist() == [0, 0, 1]  # c is the target
    # Each of 7 items in 3 of 7 lists: .429, standard deviation .009.
    assert np.abs(found[3:] - 3 / 7).max() < 0.04


def test_negatives_by_popularity() -> None:
    # Training: d 0 times, e 15 times, f 80 times; weights 1, 8, 27 (16 ** .75, 81 ** .75).
    log: list[Row] = [
        (f"u{user:04d}", item, time) for user in range(3000) for time, item in enumerate("abc")
    ]
    for num, item in ((15, "e"), (80, "f")):
        log += [
            (f"{item}{i:02d}", x, t) for i in range(num) for t, x in enumerate((item, "a", "b"))
        ]
    settings = config(negatives="popularity", num_negatives=1)
    domain, result = made(raw(log, [(x, x) for x in "abcdef"]), settings)
    assert result.num_train.tolist()[3:] == [0, 15, 80]
    lists = draw(domain, result, settings)
    rows = [
        row for (user, purpose, _), row in lists.items() if purpose == "test" and user[0] == "u"
    ]
    found = np.bincount(np.concatenate(rows), minlength=6) / len(rows)
    # Standard deviation below .008.
    assert np.abs(found[3:] - np.array([1, 8, 27]) / 36).max() < 0.03


def categories(log: list[Row], kinds: dict[str, str | None], num: int) -> Any:
    settings = config(negatives="category", num_negatives=num)
    items = [(item, item, kind) for item, kind in kinds.items()]
    domain, result = made(raw(log, items), settings)
    drawer = CandidateDrawer(domain, result, settings, 3)
    cases = of_purpose(result.cases, "test")
    return domain, cases, drawer.draw("main", cases)


def test_negatives_of_the_history_s_categories() -> None:
    # History a, b (test target c of the category z): twice x, so all negatives are of x.
    kinds = {"a": "x", "b": "x", "c": "z", **{f"x{i}": "x" for i in range(5)}}
    kinds |= {f"z{i}": "z" for i in range(5)} | {f"n{i}": None for i in range(5)}  # type: ignore[dict-item]
    log: list[Row] = [
        (f"u{user:02d}", item, time) for user in range(50) for time, item in enumerate("abc")
    ]
    domain, cases, drawn = categories(log, kinds, 4)
    ids = domain.item_ids.to_pylist()
    for row in drawn.candidates:
        assert {ids[item][0] for item in row} == {"x", "c"}
    assert not drawn.is_filled.any()


def test_a_category_that_is_used_up_is_filled_at_random() -> None:
    kinds: dict[str, str | None] = {"a": "x", "b": "x", "c": "z", "x0": "x", "x1": "x"}
    kinds |= {f"z{i}": "z" for i in range(5)} | {f"n{i}": None for i in range(5)}
    log: list[Row] = [
        (f"u{user:03d}", item, time) for user in range(300) for time, item in enumerate("abc")
    ]
    domain, _, drawn = categories(log, kinds, 4)
    assert drawn.is_whole.all()
    assert drawn.is_filled.all()
    ids = domain.item_ids.to_pylist()
    found: dict[str, int] = {}
    for row in drawn.candidates:
        names = [ids[item] for item in row]
        assert {"x0", "x1", "c"} < set(names)
        for name in names:
            found[name] = found.get(name, 0) + 1
    # Two of the ten others each: 60 of 300, standard deviation 6.9.
    others = [found[name] for name in found if name not in ("x0", "x1", "c")]
    assert len(others) == 10
    assert all(30 < num < 90 for num in others)


def test_items_without_a_category_are_filled_at_random() -> None:
    log: list[Row] = [("u", item, time) for time, item in enumerate("abc")]
    _, _, drawn = categories(log, dict.fromkeys("abcdefgh"), 3)
    assert drawn.is_whole.all()
    assert drawn.is_filled.all()


@pytest.mark.parametrize("kind", ["uniform", "popularity", "category"])
@pytest.mark.parametrize("num_left", [4, 5, 6])
def test_a_short_pool_is_used_to_its_last_item(kind: str, num_left: int) -> None:
    """5 negatives out of what is left of the catalogue: all of it, or no case."""
    num = 6 + num_left
    log: list[Row] = [("u", f"i{i:02d}", i) for i in range(6)]
    log += [(f"v{v}", f"i{i:02d}", i) for v in range(30) for i in (6, 7, 8)]
    items = [(f"i{i:02d}", f"T{i}", f"c{i % 2}") for i in range(num)]
    settings = config(negatives=kind, num_negatives=5)
    lists = draw(*made(raw(log, items), settings), settings)
    if num_left < 5:
        assert ("u", "test", "warm") not in lists
        return
    found = set(lists["u", "test", "warm"]) - {5}
    assert len(found) == 5
    assert found <= set(range(6, num))


def test_cold_cases_draw_cold_items_first() -> None:
    settings = config(role="ingredient", cold_item_fraction=0.05, num_negatives=9)
    domain, result = made(random_raw(num_items=40), settings, seed=1)
    cold = set(np.flatnonzero(result.cold).tolist())
    assert len(cold) == 2
    drawer = CandidateDrawer(domain, result, settings, 1)
    cases = of_purpose(result.cases, "test")
    cases = cases.take(np.flatnonzero(cases.split == TEMPERATURES.index("cold")))
    drawn: Drawn = drawer.draw("main", cases)
    assert len(cases) > 3
    for place, user in enumerate(cases.user.tolist()):
        met = set(domain.items[domain.offsets[user] : domain.offsets[user + 1]].tolist())
        row = set(drawn.candidates[place].tolist())
        assert cold - met <= row  # every cold item that the user did not meet
        assert drawn.is_filled[place]
    warm = of_purpose(result.cases, "valid")
    assert not cold & set(drawer.draw("main", warm).candidates.ravel().tolist())


def test_heavy_weights_do_not_keep_light_items_out() -> None:
    """The listed rest follows the weights too, where drawing would take thousands of numbers."""
    weights = np.array([1e6, 1e6, 1.0, 3.0])
    sampler = candidates.Weighted.of(np.arange(4, dtype=np.int32), weights)
    num = 4000
    chosen = np.full((num, 3), -1, dtype=np.int32)
    count = np.zeros(num, dtype=np.int64)
    seeds = np.random.default_rng(0).integers(0, 2**63, num).astype(np.uint64)

    def never(rows: Any, items: Any) -> Any:
        return np.zeros(np.broadcast_shapes(rows.shape, items.shape), dtype=bool)

    candidates._fill(sampler, np.arange(num), seeds, never, chosen, count)
    assert (count == 3).all()
    assert all(len(set(row)) == 3 for row in chosen.tolist())
    assert (np.sort(chosen, axis=1)[:, :2] == [0, 1]).all()
    # The third one is 2 or 3 with chances 1 to 3; standard deviation .007.
    assert abs((chosen == 3).any(axis=1).mean() - 0.75) < 0.03


def test_histories_pack_and_unpack() -> None:
    packed = Histories.of([(1, 2), (), (3,)])
    assert list(packed) == [(1, 2), (), (3,)]
    assert packed == ((1, 2), (), (3,))
    assert packed[-1] == (3,)
    assert packed[:2] == [(1, 2), ()]
    assert packed.take(np.array([2, 0])) == [(3,), (1, 2)]
    assert packed.heads(np.array([0, 0]), np.array([1, 2])) == [(1,), (1, 2)]
    with pytest.raises(IndexError):
        packed[3]
