"""What a probe changes, and that it changes nothing else."""

from __future__ import annotations

import numpy as np

from rc_ray.core.domains import RankingCase
from rc_ray.requests import (
    flat_candidates,
    list_slices,
    made_up_titles,
    probed,
    target_positions,
)

CASE = RankingCase(
    "u1",
    (5, 6, 7, 8, 9, 10, 11),
    target=3,
    candidates=(4, 3, 2, 1, 0),
    more_candidates={"popular": (1, 3), "thirty": (3, 0, 2)},
)


def test_lists_lie_one_behind_another() -> None:
    assert flat_candidates(CASE) == (4, 3, 2, 1, 0, 1, 3, 3, 0, 2)
    assert list_slices(CASE) == {
        "main": slice(0, 5),
        "popular": slice(5, 7),
        "thirty": slice(7, 10),
    }
    assert [target_positions([CASE], name) for name in list_slices(CASE)] == [[1], [1], [0]]


def test_a_shuffled_history_is_a_permutation_that_differs_between_users() -> None:
    found = probed(CASE, "shuffled_history", seed=1)
    assert sorted(found.history) == sorted(CASE.history)
    assert found.history != CASE.history
    assert found.candidates == CASE.candidates
    assert found.history == probed(CASE, "shuffled_history", seed=1).history
    orders = {
        probed(RankingCase(f"u{i}", CASE.history, 3, (3, 1)), "shuffled_history", 1).history
        for i in range(8)
    }
    assert len(orders) > 4


def test_permuted_candidates_know_the_way_back() -> None:
    found = probed(CASE, "permuted_candidates", seed=2)
    assert found.history == CASE.history
    assert sorted(found.candidates) == [0, 1, 2, 3, 4]
    assert found.candidates != CASE.candidates
    assert tuple(np.array(found.candidates)[found.places]) == CASE.candidates


def test_made_up_titles_are_distinct_words_of_the_seed() -> None:
    names = made_up_titles(500, seed=3)
    assert len(set(names)) == 500
    assert all(len(name.split()) == 2 and name.replace(" ", "").isalpha() for name in names)
    assert made_up_titles(500, seed=3) == names
    assert made_up_titles(500, seed=4) != names
