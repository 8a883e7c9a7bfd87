from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from rc_ray.baselines_config import ItemKnnConfig
from rc_ray.core.baselines import Popularity, catalogue_ndcg, valid_sample
from rc_ray.core.item_knn import ItemKnn, neighbours

# Users who have items 0..3: 0 has three users, 1 two, 2 two, 3 one; nobody has 4 and 5.
TRAIN = [(0, 1), (0, 1, 2), (0, 2, 3)]


def config(**fields: object) -> ItemKnnConfig:
    one_point = {"num_neighbours": (10,), "shrinkages": (0.0,), "decays": (1.0,)}
    return ItemKnnConfig.model_validate({**one_point, **fields})


def incidence() -> sparse.csr_array:
    return sparse.csr_array(
        np.array([[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 0, 0]], dtype=np.float32)
    )


def test_popularity_is_the_log_of_the_smoothed_share_for_everybody() -> None:
    scores = Popularity(np.array([3, 0, 1, 0])).scores([(0,), (1, 2), ()])
    # (3 + 1, 0 + 1, 1 + 1, 0 + 1) of 4 + 4
    np.testing.assert_allclose(np.exp(scores), np.tile([4 / 8, 1 / 8, 2 / 8, 1 / 8], (3, 1)), 1e-6)
    assert scores.dtype == np.float32


def test_similarity_is_the_shrunk_cosine_over_users() -> None:
    # c_01 = 2, c_02 = 2, c_03 = 1, c_12 = 1, c_23 = 1; n = 3, 2, 2, 1.
    table, _ = neighbours(incidence(), 10, 0.0, max_pairs=1000)
    expected = np.zeros((6, 6))
    for (i, j), value in {
        (0, 1): 2 / 6**0.5,
        (0, 2): 2 / 6**0.5,
        (0, 3): 1 / 3**0.5,
        (1, 2): 1 / 2,
        (2, 3): 1 / 2**0.5,
    }.items():
        expected[i, j] = expected[j, i] = value
    np.testing.assert_allclose(table.toarray(), expected, rtol=1e-6)
    shrunk, _ = neighbours(incidence(), 10, 4.0, max_pairs=1000)
    assert shrunk.toarray()[1, 2] == pytest.approx(1 / (2 + 4))


def test_the_nearest_are_kept_and_equal_ones_by_index() -> None:
    table, places = neighbours(incidence(), 2, 0.0, max_pairs=1000)
    # Item 0 is equally near to 1 and 2, item 3 nearer to 2 (0.707) than to 0 (0.577).
    assert [row.nonzero()[0].tolist() for row in table.toarray()[:4]] == [
        [1, 2],
        [0, 2],
        [0, 3],
        [0, 2],
    ]
    assert table[[3]].indices.tolist() == [2, 0]
    assert places.tolist() == [0, 1] * 4


def test_blocks_change_nothing() -> None:
    rng = np.random.default_rng(0)
    users = sparse.csr_array((rng.random((50, 40)) < 0.15).astype(np.float32))
    whole, places = neighbours(users, 7, 3.0, max_pairs=10**6)
    small, small_places = neighbours(users, 7, 3.0, max_pairs=1)
    np.testing.assert_array_equal(whole.toarray(), small.toarray())
    np.testing.assert_array_equal(places, small_places)


def test_a_history_speaks_for_items_it_is_near_to_the_later_the_louder() -> None:
    knn = ItemKnn.fit(TRAIN, 6, config(decays=(0.5,)), [])
    scores = knn.scores([(1, 3)])[0]
    assert scores[2] == pytest.approx(0.5 * 1 / 2 + 1 / 2**0.5)
    assert scores[0] == pytest.approx(0.5 * 2 / 6**0.5 + 1 / 3**0.5)


def test_items_near_to_nothing_follow_by_popularity_and_unknown_ones_come_last() -> None:
    # 3 and 4 were seen together and by nobody else; 5 is unknown.
    knn = ItemKnn.fit([(0, 1), (0, 1), (0, 2), (3, 4)], 7, config(), [])
    near, empty = knn.scores([(3,), ()])
    assert near[4] > near[0] > near[1] > near[2] == near[3] > near[5] == near[6]
    assert empty[0] > empty[1] > empty[2] == empty[3] == empty[4] > empty[5] == empty[6]


def test_scores_equal_a_dense_computation() -> None:
    rng = np.random.default_rng(1)
    train = [rng.permutation(30)[: rng.integers(2, 9)].tolist() for _ in range(60)]
    histories = [rng.permutation(30)[: rng.integers(1, 9)].tolist() for _ in range(20)]
    found = ItemKnn.fit(
        train, 30, config(num_neighbours=(5,), shrinkages=(2.0,), decays=(0.8,)), []
    ).scores(histories)
    has = np.zeros((60, 30))
    for row, history in enumerate(train):
        has[row, history] = 1
    together, users = has.T @ has, has.sum(axis=0)
    cosine = together / (np.sqrt(np.outer(users, users)) + 2.0)
    np.fill_diagonal(cosine, 0.0)
    for i in range(30):
        cosine[i, np.argsort(-cosine[i], kind="stable")[5:]] = 0.0
    for row, history in enumerate(histories):
        weights = [0.8 ** (len(history) - 1 - place) for place in range(len(history))]
        expected = np.array([np.dot(weights, cosine[i, history]) for i in range(30)])
        np.testing.assert_allclose(found[row][expected > 0], expected[expected > 0], rtol=1e-5)
        assert (found[row][expected == 0] < 0).all()


def test_validation_chooses_the_decay_that_ranks_best() -> None:
    # After (0, 2) comes 3, what goes with the later item, though 1 is as near to the earlier one.
    train = [(0, 1)] * 5 + [(2, 3)] * 5
    knn = ItemKnn.fit(train, 4, config(decays=(1.0, 0.3)), [((0, 2), 3), ((2, 0), 1)])
    assert knn.decay == 0.3
    assert knn.chosen == {
        "num_neighbours": 10,
        "shrinkage": 0.0,
        "decay": 0.3,
        "valid_ndcg": 1.0,
    }


def test_validation_chooses_the_neighbours() -> None:
    # Item 0 goes with 1 in most histories; by its one nearest neighbour alone 2 is silent, and so
    # popularity puts 3 before it.
    train = [(0, 1), (0, 1), (0, 2), (2, 3), (2, 3), (3,), (3,)]
    cases = [((0,), 2)]
    knn = ItemKnn.fit(train, 4, config(num_neighbours=(1, 3)), cases)
    assert knn.chosen["num_neighbours"] == 3


def test_catalogue_ndcg_leaves_the_history_out_and_shares_ties() -> None:
    rows = {(0,): [9.0, 1.0, 5.0, 0.0], (3,): [2.0, 2.0, 1.0, 9.0]}
    cases = [((0,), 1), ((3,), 0)]
    # 1 is second behind 2; 0 ties with 1 for the first place.
    expected = (1 / np.log2(3) + (1 + 1 / np.log2(3)) / 2) / 2

    def scores(histories: object) -> np.ndarray:
        return np.array([rows[tuple(h)] for h in histories], dtype=np.float32)  # type: ignore[attr-defined]

    assert catalogue_ndcg(scores, cases, 4) == pytest.approx(expected)
    assert catalogue_ndcg(scores, cases, 10**8) == pytest.approx(expected)  # user by user


def test_a_sample_keeps_the_order() -> None:
    cases = [((user,), user) for user in range(50)]
    sample = valid_sample(cases, 10)
    assert len(sample) == 10
    assert sample == sorted(sample)
    assert sample != cases[:10]
    assert valid_sample(cases, 50) == cases
