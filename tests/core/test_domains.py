from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rc_ray.core import domains
from rc_ray.core.cleaning import DomainError, clean, clean_title
from rc_ray.core.sources import INTERACTIONS, ITEMS, RawDomain
from rc_ray.core.splits import LeakError, SplitDomain, check_no_leak, draw_candidates, split
from rc_ray.data_config import DataConfig
from rc_ray.errors import ArtifactError

Row = tuple[Any, ...]


def config(*, role: str = "spirit", **fields: Any) -> DataConfig:
    other = "ingredients" if role == "spirit" else "spirit"
    role_field = "spirit" if role == "spirit" else "ingredients"
    source = {"format": "parquet", "path": "nowhere"}
    return DataConfig.model_validate(
        {
            "sources": [{**source, "domain": "shop"}, {**source, "domain": "other"}],
            role_field: ["shop"],
            other: ["other"],
            "min_user_interactions": 3,
            "num_negatives": 2,
            **fields,
        }
    )


def raw(log: list[Row], items: list[Row]) -> RawDomain:
    def table(rows: list[Row], schema: pa.Schema) -> pa.Table:
        columns = list(zip(*rows, strict=True)) if rows else [()] * len(schema)
        columns += [(None,) * len(rows)] * (len(schema) - len(columns))
        return pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema)

    return RawDomain("shop", table(log, INTERACTIONS), table(items, ITEMS))


def random_raw(num_users: int = 30, num_items: int = 60, shuffle: int | None = None) -> RawDomain:
    rng = np.random.default_rng(5)
    log = [
        (f"u{user:02d}", f"i{item:02d}", time)
        for user in range(num_users)
        for time, item in enumerate(rng.permutation(num_items)[: rng.integers(6, 20)])
    ]
    if shuffle is not None:
        log = [log[i] for i in np.random.default_rng(shuffle).permutation(len(log))]
    return raw(log, [(f"i{i:02d}", f"Title {i}") for i in range(num_items)])


def prepared(tmp_path: Path, data: RawDomain, settings: DataConfig, seed: int = 3) -> Any:
    folder = tmp_path / "shop"
    domains.prepare_domain(data, folder, settings, seed, fingerprint_config={}, inputs={})
    return domains.read_domain(folder)


def test_titles_are_printable_and_bounded() -> None:
    assert clean_title(" Salt &amp;amp;\tPepper\u202e\x00 \n x ", 120) == "Salt & Pepper x"
    assert clean_title("Cafe\u0301", 120) == "Café"
    assert clean_title("one two three", 8) == "one two"
    assert clean_title("\u200b \x07", 120) == ""
    assert clean_title(None, 120) == ""
    assert clean_title("می\u200cخواهم", 120) == "می\u200cخواهم"


def test_every_dropped_row_is_counted() -> None:
    log = [
        ("u", "a", 30), ("u", "b", 10), ("u", "b", 20), ("u", "c", 20),  # b twice, first counts
        ("u", "gone", 5), ("u", "mute", 6), (None, "a", 1), ("u", "", 1), ("u", "a", None),
        ("short", "a", 1), ("short", "b", 2),
    ]  # fmt: skip
    items = [
        ("c", "Sea"), ("a", "Air &amp; Sky"), ("b", "Bay"), ("b", "Bay again"),
        ("mute", " \x00"), (None, "No id"), ("d", "Dew"),
    ]  # fmt: skip
    domain = clean(raw(log, items), config(), seed=0)
    assert domain.item_ids == ("a", "b", "c", "d")
    assert domain.titles == ("Air & Sky", "Bay", "Sea", "Dew")
    assert domain.user_ids == ("u",)
    assert domain.history(0).tolist() == [1, 2, 0]
    assert domain.counts == {
        "raw_interactions": 11,
        "raw_items": 7,
        "items_without_id": 1,
        "untitled_items": 1,
        "duplicate_items": 1,
        "incomplete_interactions": 3,
        "interactions_without_item": 2,
        "repeated_interactions": 1,
        "users_below_minimum": 1,
        "interactions_below_minimum": 2,
        "users_over_maximum": 0,
        "interactions_over_maximum": 0,
        "users": 1,
        "items": 4,
        "interactions": 3,
    }


def test_equal_times_are_ordered_alike_in_any_file_order() -> None:
    items = [(x, x) for x in "abcdef"]
    rows = [("u", x, 1) for x in "abcdef"]
    forward = clean(raw(rows, items), config(), seed=0).items.tolist()
    assert clean(raw(rows[::-1], items[::-1]), config(), seed=9).items.tolist() == forward
    assert forward != sorted(forward)  # the catalogue's order would decide who is the target


@pytest.mark.parametrize(
    ("log", "items", "words"),
    [
        ([], [("a", "A"), ("b", "B"), ("c", "C")], "no user is left; lower `data.min_user"),
        ([("u", "a", 1), ("u", "b", 2)], [("a", "A"), ("b", "B"), ("c", "C")], "users below mini"),
        ([("u", "a", 1)], [], "interactions without item 1"),
        ([("u", x, 1) for x in "abc"], [("a", "A"), ("b", "B"), ("c", " ")], "no user is left"),
    ],
)
def test_an_empty_domain_is_named_with_its_counts(
    log: list[Row], items: list[Row], words: str
) -> None:
    with pytest.raises(DomainError, match="domain `shop`") as caught:
        clean(raw(log, items), config(), seed=0)
    assert words in str(caught.value)


def test_too_few_items() -> None:
    with pytest.raises(DomainError, match="3 items are too few for `data.num_negatives` = 3"):
        clean(
            raw([("u", x, 1) for x in "abc"], [(x, x) for x in "abc"]),
            config(num_negatives=3),
            seed=0,
        )


def test_leave_one_out(tmp_path: Path) -> None:
    log = [("u", x, time) for time, x in enumerate("dbcae")]
    domain = prepared(tmp_path, raw(log, [(x, x.upper()) for x in "abcdefgh"]), config())
    assert domain.train == ((3, 1, 2),)
    (valid,), (test,) = domain.cases("valid"), domain.cases("test")
    assert (valid.history, valid.target) == ((3, 1, 2), 0)
    assert (test.history, test.target) == ((3, 1, 2, 0), 4)
    assert domain.num_train.tolist() == [0, 1, 1, 1, 0, 0, 0, 0]
    # Add-one smoothing by hand: 3 interactions + 8 items.
    np.testing.assert_allclose(np.exp(domain.log_prior()), np.array([1, 2, 2, 2, 1, 1, 1, 1]) / 11)
    for case in (valid, test):
        assert len(case.candidates) == 3
        assert set(case.candidates) - {case.target} <= {5, 6, 7}
    assert not domain.cold.any()
    assert domain.cases("test", "cold") == []
    assert domain.cases("test", group="unlabeled") == []


def test_cold_items_leave_training_and_get_their_own_cases(tmp_path: Path) -> None:
    settings = config(role="ingredient", cold_item_fraction=0.2, unlabeled_fraction=0.3)
    data = random_raw()
    domain = prepared(tmp_path, data, settings)
    # 2 negatives + 11 is at most a quarter of 60 items, so 13 instead of 0.2 * 60 = 12.
    assert domain.cold.sum() == 13
    full: dict[str, list[int]] = {}
    for row in data.interactions.to_pylist():
        full.setdefault(row["user_id"], []).append(int(row["item_id"][1:]))
    cold = set(np.flatnonzero(domain.cold).tolist())
    assert not cold & {item for history in domain.train for item in history}
    groups = {
        group: {case.user_id for case in domain.cases("test", group=group)}
        for group in ("scored", "unlabeled")
    }
    assert len(groups["unlabeled"]) == 9
    assert not groups["scored"] & groups["unlabeled"]
    cases = [
        case
        for group in ("scored", "unlabeled")
        for case in domain.cases("test", "cold", group=group)
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


def test_few_cold_items_are_filled_up_with_warm_ones() -> None:
    settings = config(role="ingredient", cold_item_fraction=0.05, num_negatives=9)
    domain = clean(random_raw(num_items=24), settings, seed=1)
    result = split(domain, settings, seed=1)
    assert result.cold.sum() == 1
    cold_cases = [case for case in result.cases if case.split == "cold"]
    assert cold_cases
    assert result.counts["cold_cases_filled_with_warm_negatives"] == len(cold_cases)
    assert all(len(case.candidates) == 10 for case in cold_cases)


def test_a_user_who_met_nearly_everything_gets_no_case() -> None:
    log = [("all", f"i{i:02d}", i) for i in range(10)] + [("u", f"i{i:02d}", i) for i in range(4)]
    settings = config(num_negatives=2)
    domain = clean(raw(log, [(f"i{i:02d}", f"T{i}") for i in range(11)]), settings, seed=0)
    result = split(domain, settings, seed=0)
    assert {domain.user_ids[case.user] for case in result.cases} == {"u"}
    assert result.counts["cases_without_enough_negatives"] == 2


def by_user(data: RawDomain, settings: DataConfig, seed: int = 3) -> dict[tuple[str, ...], Any]:
    domain = clean(data, settings, seed)
    return {
        (domain.user_ids[case.user], case.purpose, case.split): case.candidates.tolist()
        for case in split(domain, settings, seed).cases
    }


def test_candidates_depend_on_the_user_and_the_seed_alone() -> None:
    settings = config(role="ingredient")
    reference = by_user(random_raw(), settings)
    assert by_user(random_raw(shuffle=1), settings) == reference
    fewer = by_user(random_raw(num_users=11), settings)
    assert fewer == {key: value for key, value in reference.items() if key[0] < "u11"}
    assert by_user(random_raw(), settings, seed=4) != reference


def test_the_order_of_candidates_does_not_tell_the_target() -> None:
    free = np.ones(4, dtype=bool)
    orders = set()
    for target in range(4):
        found = draw_candidates(target, np.array([target], dtype=np.int32), (free,), 3, key=17)
        assert found is not None
        orders.add(tuple(found.tolist()))
    assert len(orders) == 1  # same set, same key: same order, whichever of them is the target
    positions = [
        draw_candidates(9, np.array([9], dtype=np.int32), (np.ones(40, dtype=bool),), 3, key=key)
        .tolist()  # type: ignore[union-attr]
        .index(9)
        for key in range(2000)
    ]  # fmt: skip
    # Uniform over 4 places: 500 each, standard deviation 19.
    assert np.abs(np.bincount(positions, minlength=4) - 500).max() < 80


def test_negatives_are_uniform() -> None:
    free = np.ones(10, dtype=bool)
    drawn = [
        draw_candidates(0, np.array([0, 1], dtype=np.int32), (free,), 3, key=key)
        for key in range(2000)
    ]
    counts = np.bincount(np.concatenate([d for d in drawn if d is not None]), minlength=10)
    assert counts[0] == 2000
    assert counts[1] == 0
    # Each of 8 items in 3 of 8 draws: 750, standard deviation 22.
    assert np.abs(counts[2:] - 750).max() < 90


@pytest.fixture
def sound() -> tuple[Any, SplitDomain]:
    settings = config(role="ingredient")
    domain = clean(random_raw(), settings, seed=2)
    return domain, split(domain, settings, seed=2)


def with_case(result: SplitDomain, kind: str, **changes: Any) -> SplitDomain:
    cases = list(result.cases)
    at = next(i for i, case in enumerate(cases) if f"{case.split} {case.purpose}" == kind)
    changes = {k: v(cases[at]) if callable(v) else v for k, v in changes.items()}
    cases[at] = dataclasses.replace(cases[at], **changes)
    return dataclasses.replace(result, cases=tuple(cases))


def test_planted_leaks_are_found(sound: tuple[Any, SplitDomain]) -> None:
    domain, result = sound
    check_no_leak(domain, result)
    first = next(case for case in result.cases if case.purpose == "valid")
    cold_item = np.flatnonzero(result.cold)[:1].astype(np.int32)

    def trained_on(item: Any) -> SplitDomain:
        train = list(result.train)
        train[first.user] = np.append(train[first.user], item).astype(np.int32)
        return dataclasses.replace(result, train=tuple(train))

    def negative_from_history(case: Any) -> Any:
        met = next(i for i in domain.history(case.user) if i != case.target)
        return np.array([case.target, met, *case.candidates[2:]], dtype=np.int32)

    leaks = {
        "warm valid target stands in the training": trained_on(first.target),
        "a cold item stands in the training history": trained_on(cold_item),
        "a cold item stands in the warm test history": with_case(
            result, "warm test", history=lambda case: np.append(case.history, cold_item)
        ),
        "the warm test target stands in its own history": with_case(
            result, "warm test", history=lambda case: np.append(case.history, case.target)
        ),
        "a cold test negative stands in the user's": with_case(
            result, "cold test", candidates=negative_from_history
        ),
        "the warm valid candidates do not hold exactly one positive": with_case(
            result, "warm valid", candidates=lambda case: case.candidates[1:][:0]
        ),
        "of the other kind": with_case(result, "warm test", split="cold"),
    }
    for words, leaky in leaks.items():
        with pytest.raises(LeakError, match=words) as caught:
            check_no_leak(domain, leaky)
        assert "domain `shop`, user `u" in str(caught.value)


def test_prepared_twice_is_the_same_to_the_byte(tmp_path: Path) -> None:
    settings = config(role="ingredient", max_users=20)
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


def ingredient_of(groups: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Split a domain of users who met 5 of 7 items each, grouped by hand."""
    log = [(user, x, time) for user in groups for time, x in enumerate("abcde")]
    settings = config(role="ingredient", cold_item_fraction=0.0)
    domain = clean(raw(log, [(x, x) for x in "abcdefg"]), settings, seed=0)
    found = tuple(groups[user] for user in domain.user_ids)
    monkeypatch.setattr("rc_ray.core.splits._draw_groups", lambda *_: found)
    return split(domain, settings, seed=0)


def test_an_ingredient_domain_needs_cases_of_both_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"u": "scored", "v": "unlabeled"}
    assert ingredient_of(both, monkeypatch).counts["valid_cases"] == 2
    with pytest.raises(DomainError, match="domain `shop`: no unlabeled user is left"):
        ingredient_of({"u": "scored", "v": "scored"}, monkeypatch)
    with pytest.raises(DomainError, match=r"domain `shop`: no user is left to validate.*unlabel"):
        ingredient_of({"u": "unlabeled", "v": "unlabeled"}, monkeypatch)
