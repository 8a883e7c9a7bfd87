"""What a best-first search through a catalogue's trie has to know besides the LLM.

The trie is folded to its branching nodes: an edge leads to the next branching node below it or to a
leaf. The frontier holds branching nodes that were not read yet, each with a bound that no title
below it can exceed: its log probability plus the best correction of a title below.

Letters: I items, N branching nodes, E edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from rc_ray.core.trie import CatalogueTrie

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class BranchTree:
    """The branching nodes of a trie and what lies between them."""

    first_edge: Ints
    """(N + 1,) edges of branching node n are first_edge[n] .. first_edge[n + 1] - 1."""
    edge_next: Ints
    """(E,) branching node that comes next behind an edge; -1 behind which a title ends."""
    parent_edge: Ints
    """(N,) edge that leads to a branching node; -1 for the topmost."""
    chains: list[tuple[int, ...]]
    """(N,) tokens from below the branching node above down to this one; they are read together."""
    depths: Ints
    """(N,) depth in the trie."""
    levels: list[Ints]
    """Branching nodes by the number of branching nodes above them."""
    first_item: Ints
    """(E + 1,) items that end behind edge e are items[first_item[e]:first_item[e + 1]]."""
    items: Ints
    """(I,)"""

    @classmethod
    def of(cls, trie: CatalogueTrie) -> BranchTree:
        """Fold a trie."""
        num_nodes, num_edges = len(trie.first_edge) - 1, len(trie.edge_columns)
        edge_next = np.full(num_edges, -1)
        parent_edge = np.full(num_nodes, -1)
        depths = np.zeros(num_nodes, dtype=np.int64)
        level_of = np.zeros(num_nodes, dtype=np.int64)
        chains: list[tuple[int, ...]] = [()] * num_nodes
        seen = np.zeros(num_nodes, dtype=bool)
        last_edge = np.empty(trie.num_items, dtype=np.int64)
        for item, path in enumerate(trie.paths):
            above, through = 0, -1
            for level, (depth, node, edge) in enumerate(path.decisions):
                if not seen[node]:
                    seen[node] = True
                    depths[node], level_of[node], parent_edge[node] = depth, level, through
                    chains[node] = tuple(trie.node_tokens[n] for n in path.nodes[above:depth])
                    if through >= 0:
                        edge_next[through] = node
                above, through = depth, edge
            last_edge[item] = through
        return cls(
            first_edge=trie.first_edge.numpy(),
            edge_next=edge_next,
            parent_edge=parent_edge,
            chains=chains,
            depths=depths,
            levels=[
                np.flatnonzero(level_of == level) for level in range(level_of.max(initial=-1) + 1)
            ],
            first_item=np.searchsorted(np.sort(last_edge), np.arange(num_edges + 1)),
            items=np.argsort(last_edge, kind="stable"),
        )

    @cached_property
    def parents(self) -> Ints:
        """(N,) the branching node above each; -1 for the topmost."""
        return np.searchsorted(self.first_edge, self.parent_edge, side="right") - 1

    @cached_property
    def lengths(self) -> Ints:
        """(N,) tokens to read for each branching node."""
        return np.array([len(chain) for chain in self.chains], dtype=np.int64)

    def best_below(self, corrections: Floats) -> Floats:
        """The best correction of a title behind each edge: (I,) per item -> (E,) per edge."""
        best = np.full(len(self.edge_next), -np.inf)
        last_edge = np.repeat(np.arange(len(best)), np.diff(self.first_item))
        np.maximum.at(best, last_edge, corrections[self.items])
        for nodes in reversed(self.levels[1:]):  # whatever lies below is known by then
            best[self.parent_edge[nodes]] = np.maximum.reduceat(best, self.first_edge[:-1])[nodes]
        return best


class Frontier:
    """What one user's search has found, and what it has not read yet.

    Args:
        tree: the folded trie.
        corrections: (I,) what is added to an item's log likelihood.
        best_below: (E,) from `BranchTree.best_below`.
        k: titles wanted.
    """

    def __init__(self, tree: BranchTree, corrections: Floats, best_below: Floats, k: int) -> None:
        self._tree = tree
        self._corrections = corrections
        self._best_below = best_below
        self._k = k
        self._nodes = np.zeros(1, dtype=np.int64)  # the topmost branching node
        self._log_probs = np.zeros(1)
        self._bounds = np.array([best_below.max()])
        self._items = np.empty(0, dtype=np.int64)
        self._scores = np.empty(0)
        self.threshold = -np.inf
        """Score of the k-th best title found; nothing below it matters any more."""

    @property
    def is_proved(self) -> bool:
        """Nothing unread can reach or tie with the k-th best title found."""
        return len(self._nodes) == 0

    def best(self, num_tokens: int, num_left: int) -> list[tuple[int, float]]:
        """Take out the nodes with the highest bounds.

        Args:
            num_tokens: to read at most; the first node may exceed it.
            num_left: to read at most, whatever comes.

        Returns:
            (branching node, log probability) of each; empty where `num_left` is too small.
        """
        some = min(max(num_tokens, 1), len(self._nodes))
        places = np.argpartition(-self._bounds, some - 1)[:some]
        places = places[np.argsort(-self._bounds[places], kind="stable")]
        ends = self._tree.lengths[self._nodes[places]].cumsum()
        count = max(int((ends <= num_tokens).sum()), 1)
        count = min(count, int((ends <= num_left).sum()))
        chosen = places[:count]
        found = list(
            zip(self._nodes[chosen].tolist(), self._log_probs[chosen].tolist(), strict=True)
        )
        self._keep(np.delete(np.arange(len(self._nodes)), chosen))
        return found

    def extend(self, edges: Ints, log_probs: Floats) -> None:
        """Add the children of nodes that were read, by edge and log probability of the prefix."""
        possible = log_probs > -np.inf
        edges, log_probs = edges[possible], log_probs[possible]
        following = self._tree.edge_next[edges]
        self._finish(edges[following < 0], log_probs[following < 0])
        inner = following >= 0
        bounds = log_probs[inner] + self._best_below[edges[inner]]
        self._nodes = np.concatenate([self._nodes, following[inner]])
        self._log_probs = np.concatenate([self._log_probs, log_probs[inner]])
        self._bounds = np.concatenate([self._bounds, bounds])
        # A node whose bound equals the k-th score may hide a tie with it.
        self._keep(np.flatnonzero(self._bounds >= self.threshold))

    def found(self) -> tuple[tuple[int, ...], Floats]:
        """The best k titles found, and those that tie with the last of them, best first."""
        order = np.lexsort((self._items, -self._scores))
        return tuple(self._items[order].tolist()), self._scores[order]

    def _finish(self, edges: Ints, log_probs: Floats) -> None:
        first, end = self._tree.first_item[edges], self._tree.first_item[edges + 1]
        counts = end - first
        starts = np.repeat(first - (counts.cumsum() - counts), counts)
        items = self._tree.items[starts + np.arange(len(starts))]
        scores = np.repeat(log_probs, counts) + self._corrections[items]
        self._items = np.concatenate([self._items, items])
        self._scores = np.concatenate([self._scores, scores])
        if len(self._scores) >= self._k:
            self.threshold = float(np.partition(self._scores, -self._k)[-self._k])
            kept = self._scores >= self.threshold
            self._items, self._scores = self._items[kept], self._scores[kept]

    def _keep(self, places: Ints | Sequence[int]) -> None:
        self._nodes = self._nodes[places]
        self._log_probs = self._log_probs[places]
        self._bounds = self._bounds[places]
