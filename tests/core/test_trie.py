"""The trie's numbers, worked by hand on four titles."""

import math

import numpy as np
import pytest
import torch

from rc_ray.core.trie import CatalogueTrie, Taken

# Tokens: 1 "a", 2 "b", 3 "c", 9 end.  Titles: a|, ab|, ac|, b|
TITLES = [(1, 9), (1, 2, 9), (1, 3, 9), (2, 9)]


def test_only_branching_nodes_decide() -> None:
    trie = CatalogueTrie(TITLES)
    assert trie.vocabulary_ids.tolist() == [1, 2, 3, 9]
    # Root has children a, b; node "a" has children end, b, c. Nothing else branches.
    assert trie.first_edge.tolist() == [0, 2, 5]
    assert [len(path.decisions) for path in trie.paths] == [2, 2, 2, 1]
    # Nothing needs to be read for "b|": its one decision is at the root.
    assert [len(path.nodes) for path in trie.paths] == [1, 1, 1, 0]


def test_clicks_behind_an_edge_are_smoothed_sums() -> None:
    trie = CatalogueTrie(TITLES, np.array([0, 1, 2, 3]))  # smoothed: 1, 2, 3, 4
    assert trie.edge_clicks.tolist() == [6, 4, 1, 2, 3]
    assert trie.edge_items.tolist() == [3, 1, 1, 1, 1]


def test_probabilities_worked_by_hand() -> None:
    trie = CatalogueTrie(TITLES, np.array([0, 1, 2, 3]))
    logits = torch.tensor([[math.log(3.0), 0.0, 5.0, 5.0], [9.0, math.log(2.0), 0.0, 0.0]])
    nodes = torch.tensor([0, 1])
    values, starts = trie.edge_log_probs(logits, nodes, with_prior=False)
    assert starts.tolist() == [0, 2]
    # Root: a 3, b 1 (c and end are no children). Node a: end 1, b 2, c 1 in order of insertion.
    assert values.exp().tolist() == pytest.approx([3 / 4, 1 / 4, 1 / 4, 2 / 4, 1 / 4])
    with_prior, _ = trie.edge_log_probs(logits, nodes, with_prior=True)
    root = [3 * 0.6, 1 * 0.4]
    below = [1 / 6, 2 * 2 / 6, 3 / 6]
    expected = [x / sum(root) for x in root] + [x / sum(below) for x in below]
    assert with_prior.exp().tolist() == pytest.approx(expected)


def test_what_was_chosen_has_no_share_any_more() -> None:
    trie = CatalogueTrie(TITLES, np.array([0, 1, 2, 3]))
    logits = torch.tensor([[math.log(3.0), 0.0, 5.0, 5.0], [9.0, math.log(2.0), 0.0, 0.0]])
    nodes = torch.tensor([0, 1])
    rows = trie.taken_rows({0: 0, 1: 1}, [1])  # "ab|", 2 smoothed clicks, at both nodes
    taken = Taken.from_rows(rows)
    values, _ = trie.edge_log_probs(logits, nodes, with_prior=False, taken=taken)
    assert values.exp().tolist() == pytest.approx([3 / 4, 1 / 4, 1 / 2, 0, 1 / 2])
    with_prior, _ = trie.edge_log_probs(logits, nodes, with_prior=True, taken=taken)
    root = [3 * (6 - 2), 1 * 4]
    expected = [x / sum(root) for x in root] + [1 / 4, 0, 3 / 4]
    assert with_prior.exp().tolist() == pytest.approx(expected)
    assert trie.taken_rows({0: 0}, [1], keep=(trie.leaf_of_item[1],)) == []


def test_a_twin_of_a_chosen_title_stays() -> None:
    trie = CatalogueTrie([*TITLES, (1, 2, 9)], np.array([0, 1, 2, 3, 5]))
    taken = Taken.from_rows(trie.taken_rows({1: 0}, [1]))
    values, _ = trie.edge_log_probs(
        torch.zeros(1, 4), torch.tensor([1]), with_prior=True, taken=taken
    )
    # The leaf's 2 + 6 clicks are shared evenly by its two items.
    assert values.exp().tolist() == pytest.approx([1 / 8, 4 / 8, 3 / 8])


def test_equal_titles_share_a_leaf() -> None:
    trie = CatalogueTrie([*TITLES, (1, 2, 9)])
    assert trie.leaf_of_item[1] == trie.leaf_of_item[4]
    assert trie.paths[1] == trie.paths[4]


def test_a_title_that_begins_another_is_refused() -> None:
    with pytest.raises(ValueError, match="beginning of another"):
        CatalogueTrie([(1,), (1, 2)])
    with pytest.raises(ValueError, match="at least one title"):
        CatalogueTrie([])


def test_a_catalogue_of_one_title_has_nothing_to_decide() -> None:
    trie = CatalogueTrie([(1, 2, 9)])
    assert trie.paths[0].decisions == ()
    assert trie.layout([0]).tokens == ()


def test_layout_reads_shared_nodes_once() -> None:
    trie = CatalogueTrie([(1, 2, 3, 9), (1, 2, 4, 9), (1, 5, 9), (6, 9)])
    layout = trie.layout([0, 1, 2, 3])
    assert layout.tokens == (1, 2)  # "a" and "a b"; what follows the last branching is not read
    assert layout.depths == (1, 2)
    assert layout.ancestors.tolist() == [[True, False], [True, True]]
    # Visits: root from the prompt's end, "a" from slot 0, "a b" from slot 1.
    assert layout.visit_slots == (-1, 0, 1)
    assert layout.decision_candidates == (0, 0, 0, 1, 1, 1, 2, 2, 3)
