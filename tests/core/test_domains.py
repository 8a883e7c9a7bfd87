from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from rc_ray.core import domains
from rc_ray.core.cleaning import DomainError
from rc_ray.core.domain_files import read_held_out
from rc_ray.core.domains import Domain, RankingCase
from rc_ray.core.held_out import HeldOut
from rc_ray.core.preparing import hold_out
from rc_ray.core.sources import RawDomain
from rc_ray.data_config import DataConfig
from rc_ray.errors import ArtifactError
from tests.core.small_logs import Row, config, random_raw, raw


def prepared(
    tmp_path: Path,
    data: RawDomain,
    settings: DataConfig,
    seed: int = 3,
    held_out: HeldOut | None = None,
) -> Domain:
    folder = tmp_path / "shop"
    domains.prepare_domain(
        data, folder, settings, seed, fingerprint_config={}, inputs={}, held_out=held_out
    )
    return domains.read_domain(folder)


def test_leave_one_out(tmp_path: Path) -> None:
    log = [("u", x, time) for time, x in enumerate("dbcae")]
    items = [(x, x.upper(), "vowel" if x in "ae" else None) for x in "abcdefgh"]
    domain = prepared(tmp_path, raw(log, items), config())
    assert domain.name == "shop"
    assert domain.item_ids == tuple("abcdefgh")
    assert domain.titles == tuple("ABCDEFGH")
    assert domain.categories == ("vowel", None, None, None, "vowel", None, None, None)
    assert list(domain.train) == [(3, 1, 2)]
    (valid,), (test,) = domain.cases("valid"), domain.cases("test")
    assert (valid.user_id, valid.history, valid.target) == ("u", (3, 1, 2), 0)
    assert (test.user_id, test.history, test.target) == ("u", (3, 1, 2, 0), 4)
    assert domain.num_train.tolist() == [0, 1, 1, 1, 0, 0, 0, 0]
    # Add-one smoothing by hand: 3 interactions + 8 items.
    np.testing.assert_allclose(np.exp(domain.log_prior()), np.array([1, 2, 2, 2, 1, 1, 1, 1]) / 11)
    for case in (valid, test):
        assert len(case.candidates) == 3
        assert set(case.candidates) - {case.target} <= {5, 6, 7}
        assert case.more_candidates == {}
    assert not domain.cold.any()
    assert len(domain.cases("test", "cold")) == 0
    assert len(domain.cases("test", group="unlabeled")) == 0


def test_cold_items_leave_training_and_get_their_own_cases(tmp_path: Path) -> None:
    settings = config(role="ingredient", cold_item_fraction=0.2, unlabeled_fraction=0.3)
    data = random_raw()
    domain = prepared(tmp_path, data, settings)
    # 2 negatives + 11 is at most a quarter of 60 items, so 13 instead of 0.2 * 60 = 12.
    assert domain.cold.sum() == 13
    full: dict[str, list[int]] = {}
    for row in data.interactions.to_table().to_pylist():
        full.setdefault(row["user_id"], []).append(int(row["item_id"][1:]))
    cold = set(np.flatnonzero(domain.cold).tolist())
    assert not cold & {item for history in domain.train for item in history}
    groups = {
        group: {case.user_id for case in domain.cases("test", group=group)}  # type: ignore[arg-type]
        for group in ("scored", "unlabeled")
    }
    assert groups["scored"]
    assert groups["unlabeled"]
    assert not groups["scored"] & groups["unlabeled"]
    cases = [
        case
        for group in ("scored", "unlabeled")
        for case in domain.cases("test", "cold", group=group)  # type: ignore[arg-type]
    ]
    assert len(cases) > 10
    for case in cases:
        history = full[case.user_id]
        training = [item for item in history if item not in cold][:-2]
        last = max(time for time, item in enumerate(history) if item in cold)
        assert case.target == history[last]
        assert case.history == tuple(item for item in history[:last] if item in training)
        assert set(case.candidates) <= cold
        assert not (set(case.candidates) - {case.target}) & set(history)


def test_every_list_holds_the_target_once_and_nothing_met(tmp_path: Path) -> None:
    settings = config(
        role="ingredient",
        cold_user_fraction=0.2,
        few_shot_user_fraction=0.2,
        more_candidates={
            "popular": {"negatives": "popularity", "num_negatives": 7},
            "alike": {"negatives": "category", "num_negatives": 4},
        },
    )
    data = random_raw(num_users=90, num_categories=5)
    domain = prepared(tmp_path, data, settings)
    met: dict[str, set[int]] = {}
    for row in data.interactions.to_table().to_pylist():
        met.setdefault(row["user_id"], set()).add(int(row["item_id"][1:]))
    seen = set()
    for kind, cases in domain.cases_by_kind.items():
        for case in cases:
            seen.add(kind)
            assert list(case.more_candidates) == ["popular", "alike"]
            lists = {"main": case.candidates, **case.more_candidates}
            assert [len(one) for one in lists.values()] == [3, 8, 5]
            for items in lists.values():
                assert len(set(items)) == len(items)
                assert set(items) & met[case.user_id] == {case.target}
    assert seen == {
        ("valid", "warm", "scored"), ("valid", "warm", "unlabeled"),
        ("test", "warm", "scored"), ("test", "warm", "unlabeled"),
        ("test", "cold", "scored"), ("test", "cold", "unlabeled"),
        ("test", "cold_user", "scored"), ("test", "few_shot", "scored"),
    }  # fmt: skip
    for case in domain.cases("test", "few_shot"):
        assert len(case.history) == 3
    assert len({case.candidates for case in domain.cases("test")}) == len(domain.cases("test"))


def test_cases_are_made_when_asked_for(tmp_path: Path) -> None:
    domain = prepared(tmp_path, random_raw(), config())
    cases = domain.cases("test")
    assert len(cases) == 30
    assert [case.user_id for case in cases] == [f"u{user:02d}" for user in range(30)]
    assert isinstance(cases[0], RankingCase)
    assert cases[-1] == cases[29]
    assert cases[3:5] == [cases[3], cases[4]]
    assert domains.sample(cases, 4, 1) == domains.sample(list(cases), 4, 1)
    with pytest.raises(IndexError):
        cases[30]
    copy = pickle.loads(pickle.dumps(domain))
    assert list(copy.cases("test")) == list(cases)
    assert copy.train == domain.train


def test_a_case_without_enough_items_for_one_list_is_left_out_of_all(tmp_path: Path) -> None:
    log: list[Row] = [("all", f"i{i:02d}", i) for i in range(10)]
    log += [("u", f"i{i:02d}", i) for i in range(4)]
    items = [(f"i{i:02d}", f"T{i}") for i in range(12)]
    settings = config(num_negatives=2, more_candidates={"more": {"num_negatives": 3}})
    domain = prepared(tmp_path, raw(log, items), settings)
    assert [case.user_id for case in domain.cases("valid")] == ["u"]
    assert [case.user_id for case in domain.cases("test")] == ["u"]
    manifest = json.loads((tmp_path / "shop" / "manifest.json").read_text())
    assert manifest["metrics"]["cases_without_enough_negatives"] == 2
    table = pq.read_table(tmp_path / "shop" / "candidates.parquet")
    assert set(table["user_id"].to_pylist()) == {"u"}
    assert table["list"].to_pylist() == ["main", "more"] * 2


def test_few_cold_items_are_filled_up_with_warm_ones(tmp_path: Path) -> None:
    settings = config(role="ingredient", cold_item_fraction=0.05, num_negatives=9)
    domain = prepared(tmp_path, random_raw(num_items=40), settings, seed=1)
    assert domain.cold.sum() == 2
    metrics = json.loads((tmp_path / "shop" / "manifest.json").read_text())["metrics"]
    assert metrics["cold_test_cases"] > 3
    assert metrics["cold_cases_filled_with_warm_negatives"] == metrics["cold_test_cases"]


def test_what_is_held_out_elsewhere_trains_no_spirit(tmp_path: Path) -> None:
    ingredient = config(role="ingredient", cold_item_fraction=0.2, cold_user_fraction=0.3)
    shop = prepared(tmp_path / "one", random_raw(num_users=60, num_titles=40), ingredient)
    held_out = read_held_out([tmp_path / "one" / "shop"])
    cold_titles = {t for t, cold in zip(shop.titles, shop.cold, strict=True) if cold}
    assert held_out.titles.to_pylist() == sorted(cold_titles)
    cold_users = {case.user_id for case in shop.cases("test", "cold_user")}
    assert 0 < len(cold_users)
    assert cold_users <= set(held_out.user_ids.to_pylist())

    spirit = prepared(tmp_path / "two", random_raw(num_users=60), config(), held_out=held_out)
    trained = {spirit.titles[item] for history in spirit.train for item in history}
    assert trained
    assert not trained & cold_titles
    assert spirit.num_train[spirit.cold].sum() == 0
    users = pq.read_table(tmp_path / "two" / "shop" / "train.parquet")["user_id"].to_pylist()
    assert sorted({f"u{u:02d}" for u in range(60)} - set(users)) == held_out.user_ids.to_pylist()
    metrics = json.loads((tmp_path / "two" / "shop" / "manifest.json").read_text())["metrics"]
    assert metrics["users_held_out_elsewhere"] == len(held_out.user_ids)
    assert metrics["items_held_out_elsewhere"] == spirit.cold.sum() > 0


def test_what_a_domain_holds_out_by_hand(tmp_path: Path) -> None:
    """Of abcde and edc the last two of each are targets; who trains one user alone holds out as
    much."""
    log = [(user, x, t) for user, xs in (("u", "abcde"), ("v", "edc")) for t, x in enumerate(xs)]
    items = [(x, x.upper()) for x in "abcdefgh"]
    settings = config(
        role="ingredient",
        cold_item_fraction=0.0,
        unlabeled_fraction=1e-9,
        num_training_users={"shop": 1},
    )
    folder = tmp_path / "shop"
    found = hold_out(raw(log, items), folder, settings, 7, fingerprint_config={}, inputs={})
    assert found == {"held_out_titles": 0, "held_out_users": 0, "held_clicks": 4}
    held_out = read_held_out([folder])
    assert held_out.by == ("shop",)
    assert [tuple(row.values()) for row in held_out.clicks.to_pylist()] == [
        ("u", "D", False),
        ("u", "E", True),
        ("v", "D", False),
        ("v", "C", True),
    ]
    # Cold titles and cold users are held out whole, so no click of theirs is told.
    settings = config(role="ingredient", cold_item_fraction=0.2, cold_user_fraction=0.3)
    shop = random_raw(num_users=60, num_titles=40)
    hold_out(shop, folder, settings, 7, fingerprint_config={}, inputs={})
    held_out = read_held_out([folder])
    assert 0 < len(held_out.titles) < 40
    assert 0 < len(held_out.user_ids) < 60
    assert not set(held_out.clicks["title"].to_pylist()) & set(held_out.titles.to_pylist())
    assert not set(held_out.clicks["user_id"].to_pylist()) & set(held_out.user_ids.to_pylist())
    prepared(tmp_path / "whole", shop, settings, seed=7)
    whole = read_held_out([tmp_path / "whole" / "shop"])
    assert whole.titles == held_out.titles
    assert whole.user_ids == held_out.user_ids


def test_prepared_twice_is_the_same_to_the_byte(tmp_path: Path) -> None:
    settings = config(role="ingredient", max_users=20, cold_user_fraction=0.2)
    digests = []
    for place in ("one", "two"):
        metrics = domains.prepare_domain(
            random_raw(shuffle=len(digests)),
            tmp_path / place / "shop",
            settings,
            3,
            fingerprint_config={},
            inputs={},
        )
        assert metrics["users"] == 20
        assert metrics["users_over_maximum"] == 10
        digests.append((tmp_path / place / "shop" / "manifest.json").read_bytes())
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"unlabeled_fraction": 1e-9}, "no unlabeled user is left to guide the merge"),
        ({"unlabeled_fraction": 0.999999}, r"no user is left to validate.*unlabeled_fraction"),
        ({"cold_user_fraction": 1e-9}, r"no user drawn by `data\.cold_user_fraction` has a case"),
        ({"few_shot_user_fraction": 1e-9}, r"by `data\.few_shot_user_fraction` has a case"),
    ],
)
def test_a_group_without_cases(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(DomainError, match=f"domain `shop`: .*{words}"):
        prepared(tmp_path, random_raw(), config(role="ingredient", **fields))
    assert list(tmp_path.iterdir()) == []


def test_candidates_that_do_not_fit_the_cases(tmp_path: Path) -> None:
    prepared(tmp_path, random_raw(), config())
    folder = tmp_path / "shop"
    table = pq.read_table(folder / "candidates.parquet")
    pq.write_table(table.slice(1), folder / "candidates.parquet")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["outputs"]["candidates.parquet"] = domains.artifacts.sha256_file(
        folder / "candidates.parquet"
    )
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"candidates\.parquet: does not fit the cases"):
        domains.read_domain(folder)


def test_a_domain_made_by_hand() -> None:
    domain = Domain(
        name="shop",
        item_ids=("a", "b"),
        titles=("A", "B"),
        num_train=np.array([1, 1]),
        cold=np.zeros(2, dtype=bool),
        train=((0, 1),),  # type: ignore[arg-type]
    )
    assert domain.train == [(0, 1)]
    assert domain.categories == (None, None)
    assert dataclasses.replace(domain, name="x").train is domain.train


def test_damage_is_an_artifact_error(tmp_path: Path) -> None:
    prepared(tmp_path, random_raw(), config())
    path = tmp_path / "shop" / "test.parquet"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ArtifactError, match=r"test\.parquet: differs from its manifest"):
        domains.read_domain(tmp_path / "shop")
    path.unlink()
    with pytest.raises(ArtifactError, match=r"test\.parquet: missing"):
        domains.read_domain(tmp_path / "shop")
    with pytest.raises(ArtifactError, match="not prepared yet"):
        domains.read_domain(tmp_path / "other")


def test_sample_is_seeded_and_keeps_the_order() -> None:
    assert domains.sample("abc", None, 0) == ["a", "b", "c"]
    assert domains.sample("abc", 9, 0) == ["a", "b", "c"]
    chosen = domains.sample(range(1000), 50, 1)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 50
    assert chosen == domains.sample(range(1000), 50, 1)
    assert chosen != domains.sample(range(1000), 50, 2)
