"""Item-based nearest neighbours (Sarwar et al., WWW 2001), as strong as validation can make them.

`score(i | h) = sum over j in h, j among the neighbours of i, of decay ** age(j) * s(i, j)` with
`s(i, j) = c_ij / (sqrt(n_i * n_j) + shrinkage)`, where c_ij counts the users who have both items
and n_i those who have i: the shrunk cosine that held its own in "Are We Really Making Much
Progress?" (arXiv 1907.06902). Recency weighting follows the kNN of "Evaluation of Session-based
Recommendation Algorithms" (arXiv 1803.09587). Items that are no neighbours of the history's follow
by popularity.

Letters: N users, I items, J items of a block, P item pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from rc_ray.baselines_config import ItemKnnConfig
from rc_ray.core.baselines import Case, Scores, catalogue_ndcg, valid_sample
from rc_ray.core.histories import Histories

Counts = npt.NDArray[np.int64]


class ItemKnn:
    """Neighbours of every item, and how a history's items are weighted.

    Args:
        speaks_for: (I, I) CSR, row j holds the similarities of the items that j is a neighbour of.
        num_train: (I,) users who have each item.
        decay: weight of a history's item against the one after it.
        chosen: what validation chose, for the record.
    """

    def __init__(
        self,
        speaks_for: sparse.csr_array,
        num_train: Counts,
        decay: float,
        chosen: dict[str, Any] | None = None,
    ) -> None:
        self._speaks_for = speaks_for
        self.decay = decay
        self.chosen = dict(chosen or {})
        most = max(int(num_train.max(initial=0)), 1)
        # Below every similarity, in the order of popularity; what nobody has comes last of all.
        self._fallback = np.where(num_train > 0, num_train / (most + 1.0) - 1.0, -2.0).astype(
            np.float32
        )

    @classmethod
    def fit(
        cls,
        train: Sequence[Sequence[int]],
        num_items: int,
        config: ItemKnnConfig,
        valid: Sequence[Case],
    ) -> ItemKnn:
        """Count, and choose neighbours, shrinkage and decay by NDCG@10 over the whole catalogue.

        Args:
            train: one history per user.
            num_items: I.
            config: the grid.
            valid: histories with their next items; where empty the grid's first point is taken.
        """
        users = _incidence(Histories.of(train), num_items)
        num_train = np.asarray(users.sum(axis=0), dtype=np.int64)
        cases = valid_sample(valid, config.num_valid_users)
        best: ItemKnn | None = None
        best_ndcg = -1.0
        for shrinkage in config.shrinkages:
            # A smaller neighbourhood is the head of a larger one: one search serves all.
            widest, places = neighbours(
                users, max(config.num_neighbours), shrinkage, config.max_pairs
            )
            for num in config.num_neighbours:
                speaks_for = _head(widest, places, num).T.tocsr()
                for decay in config.decays:
                    one = cls(speaks_for, num_train, decay)
                    value = catalogue_ndcg(one.scores, cases, num_items) if cases else 0.0
                    if value > best_ndcg:
                        best, best_ndcg = one, value
                        one.chosen = {
                            "num_neighbours": num,
                            "shrinkage": shrinkage,
                            "decay": decay,
                            "valid_ndcg": value if cases else None,
                        }
        assert best is not None  # the grid has a point
        return best

    def scores(self, histories: Sequence[Sequence[int]]) -> Scores:
        """(N, I): sums of similarities, above 0; then known items without any, by popularity."""
        read = recency_matrix(Histories.of(histories), len(self._fallback), self.decay)
        found = (read @ self._speaks_for).toarray()  # (N, I)
        return np.where(found > 0.0, found, self._fallback).astype(np.float32, copy=False)


def neighbours(
    users: sparse.csr_array, num: int, shrinkage: float, max_pairs: int
) -> tuple[sparse.csr_array, npt.NDArray[np.int32]]:
    """The most similar other items of every item, block by block.

    Args:
        users: (users, I) of ones: who has what.
        num: neighbours kept per item; equal similarities by the smaller index.
        shrinkage: added to the cosine's denominator.
        max_pairs: item pairs P held at once, as far as one item alone does not exceed it.

    Returns:
        (I, I) CSR of similarities, and (P,) the place of each of its entries among its row's
        neighbours, 0 the nearest.
    """
    num_items = users.shape[1]
    items = users.T.tocsr()  # (I, users)
    num_users = np.diff(items.indptr)
    norms = np.sqrt(num_users)
    blocks, places = [], []
    for start, end in _blocks(users, items, max_pairs):
        counts = (items[start:end] @ users).tocoo()  # (J, I), c_ij
        rows, columns = counts.row.astype(np.int64), counts.col.astype(np.int64)
        others = columns != rows + start
        rows, columns, shared = rows[others], columns[others], counts.data[others]
        values = shared / (norms[rows + start] * norms[columns] + shrinkage)
        order = np.lexsort((columns, -values, rows))
        rows, columns, values = rows[order], columns[order], values[order]
        firsts = np.searchsorted(rows, np.arange(end - start))
        place = np.arange(len(rows)) - firsts[rows]
        near = place < num
        blocks.append(
            sparse.csr_array(
                (
                    values[near].astype(np.float32),
                    columns[near].astype(np.int32),
                    np.searchsorted(rows[near], np.arange(end - start + 1)),
                ),
                shape=(end - start, num_items),
            )
        )
        places.append(place[near].astype(np.int32))
    return sparse.vstack(blocks, format="csr"), np.concatenate(places)


def _incidence(histories: Histories, num_items: int) -> sparse.csr_array:
    """(users, I) of ones."""
    table = sparse.csr_array(
        (np.ones(len(histories.values), dtype=np.float32), histories.values, histories.offsets),
        shape=(len(histories), num_items),
    )
    table.sum_duplicates()
    table.data[:] = 1.0
    return table


def recency_matrix(histories: Histories, num_items: int, decay: float) -> sparse.csr_array:
    """(N, I) weights of the items of each history: 1 for the last, times `decay` before it."""
    ages = histories.offsets[1:][histories.owners] - 1 - np.arange(len(histories.values))
    return sparse.csr_array(
        ((decay**ages).astype(np.float32), histories.values, histories.offsets),
        shape=(len(histories), num_items),
    )


def _head(widest: sparse.csr_array, places: npt.NDArray[np.int32], num: int) -> sparse.csr_array:
    """The first `num` neighbours of every item."""
    near = places < num
    kept = np.concatenate([[0], np.cumsum(near)])
    return sparse.csr_array(
        (widest.data[near], widest.indices[near], kept[widest.indptr]), shape=widest.shape
    )


def _blocks(
    users: sparse.csr_array, items: sparse.csr_array, max_pairs: int
) -> Iterator[tuple[int, int]]:
    """Ranges of items whose counts with all items are at most `max_pairs`, one item at least."""
    num_items = users.shape[1]
    bounds = np.minimum(items @ np.diff(users.indptr).astype(np.float64), num_items)  # (I,)
    ends = np.cumsum(bounds)
    start = 0
    while start < num_items:
        before = ends[start - 1] if start else 0.0
        end = max(start + 1, int(np.searchsorted(ends, before + max_pairs, side="right")))
        yield start, end
        start = end
