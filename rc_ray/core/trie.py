"""Titles -> token trie: where titles branch, what share of clicks lies behind each branch.

A title's probability is the product over *branching* nodes of the softmax restricted to that node's
children; nodes with one child contribute nothing. It sums to 1 over the distinct titles of the
catalogue. What a user has chosen already can be taken out (choosing without replacement): neither
model nor prior then spends mass on titles that cannot come next. The trie is always built from the
whole catalogue, never from a candidate list: a candidate would inherit the mass of every title that
shares its first token.

Letters: I items, N branching nodes, E edges out of branching nodes, V catalogue tokens,
M visits to branching nodes, X removals of a chosen title at a visit.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TitlePath:
    """How one title runs through the trie."""

    nodes: tuple[int, ...]
    """Trie nodes from depth 1 down to its last branching node; their tokens must be read."""
    decisions: tuple[tuple[int, int, int], ...]
    """(depth, branching node, edge) of every choice on the way."""


@dataclass(frozen=True)
class TreeLayout:
    """Trie nodes of some candidates, packed behind a prompt under a tree attention mask."""

    tokens: tuple[int, ...]
    depths: tuple[int, ...]
    """1 for a first token; its position is prompt length + depth - 1."""
    ancestors: Tensor
    """(S, S) bool: row sees column (itself and its ancestors)."""
    visit_slots: tuple[int, ...]
    """Slot whose hidden state predicts, per visited branching node; -1 is the prompt's end."""
    visit_nodes: tuple[int, ...]
    decision_candidates: tuple[int, ...]
    """Index into the candidates, one entry per (candidate, decision)."""
    decision_visits: tuple[int, ...]
    """Index into the visits."""
    decision_edges: tuple[int, ...]


@dataclass(frozen=True)
class Taken:
    """Titles that cannot be chosen any more, at the visits where they would have had a share."""

    visits: Tensor
    """(X,) index into the visits."""
    edges: Tensor
    """(X,) the edge behind which the title lies."""
    clicks: Tensor
    """(X,) its smoothed clicks, fp64."""

    @classmethod
    def from_rows(cls, rows: Sequence[tuple[int, int, float]]) -> Taken:
        """From (visit, edge, clicks)."""
        return cls(
            visits=torch.tensor([row[0] for row in rows], dtype=torch.long),
            edges=torch.tensor([row[1] for row in rows], dtype=torch.long),
            clicks=torch.tensor([row[2] for row in rows], dtype=torch.float64),
        )

    def to(self, device: torch.device) -> Taken:
        return Taken(self.visits.to(device), self.edges.to(device), self.clicks.to(device))


class CatalogueTrie:
    """The token trie of a catalogue.

    Args:
        titles: tokens of each item's title, terminator included. Equal titles share a leaf.
        counts: clicks per item for the prior mass of branches; smoothed by one each. None: equal.

    Raises:
        ValueError: no titles, or one title's tokens are a proper prefix of another's.
    """

    def __init__(self, titles: Sequence[Sequence[int]], counts: np.ndarray | None = None) -> None:
        if not titles:
            raise ValueError("a catalogue needs at least one title")
        clicks = np.ones(len(titles)) if counts is None else np.asarray(counts, dtype=float) + 1.0
        children: list[dict[int, int]] = [{}]
        mass: list[float] = [0.0]
        num_items: list[int] = [0]
        self.node_tokens: list[int] = [-1]
        self.node_depths: list[int] = [0]
        self.node_parents: list[int] = [-1]
        node_paths: list[list[int]] = []
        for title, weight in zip(titles, clicks.tolist(), strict=True):
            node, path = 0, []
            for token in title:
                following = children[node].get(token)
                if following is None:
                    following = len(children)
                    children[node][token] = following
                    children.append({})
                    mass.append(0.0)
                    num_items.append(0)
                    self.node_tokens.append(int(token))
                    self.node_depths.append(self.node_depths[node] + 1)
                    self.node_parents.append(node)
                node = following
                mass[node] += weight
                num_items[node] += 1
                path.append(node)
            node_paths.append(path)
        for path in node_paths:
            if children[path[-1] if path else 0]:
                raise ValueError("a title's tokens are the beginning of another's")

        branching = [node for node, below in enumerate(children) if len(below) > 1]
        self._branch_index = {node: index for index, node in enumerate(branching)}
        columns = sorted({token for node in branching for token in children[node]})
        column_of = {token: column for column, token in enumerate(columns)}
        first_edge: list[int] = [0]
        edge_columns: list[int] = []
        edge_child: list[int] = []
        edge_of: dict[int, int] = {}
        for node in branching:
            for token, child in children[node].items():
                edge_of[child] = len(edge_columns)
                edge_columns.append(column_of[token])
                edge_child.append(child)
            first_edge.append(len(edge_columns))

        self.vocabulary_ids = torch.tensor(columns, dtype=torch.long)
        """(V,) tokens that label an edge: the rows of the output projection that are needed."""
        self.first_edge = torch.tensor(first_edge, dtype=torch.long)
        """(N + 1,) edges of branching node n are first_edge[n] .. first_edge[n + 1] - 1."""
        self.edge_columns = torch.tensor(edge_columns, dtype=torch.long)
        """(E,) index into `vocabulary_ids`."""
        self.edge_clicks = torch.tensor([mass[c] for c in edge_child], dtype=torch.float64)
        """(E,) smoothed clicks behind the edge."""
        self.edge_items = torch.tensor([num_items[c] for c in edge_child], dtype=torch.long)
        """(E,) items behind the edge."""
        self.paths = [self._path(path, edge_of) for path in node_paths]
        self.leaf_of_item = [path[-1] if path else 0 for path in node_paths]
        """The trie node where a title ends; items with equal titles have equal entries."""
        self.clicks_of_item = [mass[leaf] / max(num_items[leaf], 1) for leaf in self.leaf_of_item]
        """Smoothed clicks, averaged over the items with this title."""
        self._layouts: dict[tuple[int, ...], TreeLayout] = {}

    def _path(self, path: list[int], edge_of: dict[int, int]) -> TitlePath:
        decisions = []
        node = 0
        for depth, child in enumerate(path):
            if node in self._branch_index:
                decisions.append((depth, self._branch_index[node], edge_of[child]))
            node = child
        deepest = decisions[-1][0] if decisions else 0
        return TitlePath(nodes=tuple(path[:deepest]), decisions=tuple(decisions))

    @property
    def num_items(self) -> int:
        return len(self.paths)

    def telling_depth(self, item: int) -> int:
        """How many first tokens of a title no other title shares; 0 where nothing branches."""
        decisions = self.paths[item].decisions
        return decisions[-1][0] + 1 if decisions else 0

    def layout(self, candidates: Sequence[int]) -> TreeLayout:
        """Pack what must be read to score these items, each trie node once."""
        key = tuple(candidates)
        cached = self._layouts.get(key)
        if cached is not None:
            return cached
        nodes = sorted({node for item in key for node in self.paths[item].nodes})
        slot_of = {node: slot for slot, node in enumerate(nodes)}
        ancestors = torch.zeros(len(nodes), len(nodes), dtype=torch.bool)
        for slot, node in enumerate(nodes):  # a parent's number is below its children's
            parent = slot_of.get(self.node_parents[node])
            if parent is not None:
                ancestors[slot] = ancestors[parent]
            ancestors[slot, slot] = True
        visit_of: dict[int, int] = {}
        visit_slots: list[int] = []
        decision_candidates, decision_visits, decision_edges = [], [], []
        for index, item in enumerate(key):
            path = self.paths[item]
            for depth, branch, edge in path.decisions:
                if branch not in visit_of:
                    visit_of[branch] = len(visit_slots)
                    visit_slots.append(slot_of[path.nodes[depth - 1]] if depth else -1)
                decision_candidates.append(index)
                decision_visits.append(visit_of[branch])
                decision_edges.append(edge)
        layout = TreeLayout(
            tokens=tuple(self.node_tokens[node] for node in nodes),
            depths=tuple(self.node_depths[node] for node in nodes),
            ancestors=ancestors,
            visit_slots=tuple(visit_slots),
            visit_nodes=tuple(visit_of),
            decision_candidates=tuple(decision_candidates),
            decision_visits=tuple(decision_visits),
            decision_edges=tuple(decision_edges),
        )
        if len(self._layouts) < 64:  # whole-catalogue layouts recur, candidate lists seldom do
            self._layouts[key] = layout
        return layout

    def taken_rows(
        self, visit_of: Mapping[int, int], chosen: Iterable[int], *, keep: Container[int] = ()
    ) -> list[tuple[int, int, float]]:
        """Rows for `Taken`: where chosen items lose their share.

        Args:
            visit_of: branching node -> index of the visit to it.
            chosen: items that cannot come again.
            keep: leaves that stay, those of titles being scored.
        """
        return [
            (visit_of[node], edge, self.clicks_of_item[item])
            for item in chosen
            if self.leaf_of_item[item] not in keep
            for _, node, edge in self.paths[item].decisions
            if node in visit_of
        ]

    def edge_log_probs(
        self, logits: Tensor, nodes: Tensor, *, with_prior: bool, taken: Taken | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log probability of every child of the visited branching nodes.

        Args:
            logits: (M, V) of the catalogue tokens at each visit.
            nodes: (M,) branching node of each visit.
            with_prior: add the log of the clicks behind each edge to its logit (logit adjustment,
                arXiv 2007.07314, equation 10).
            taken: titles that cannot be chosen any more.

        Returns:
            values: (sum of children,) log probabilities, the visits one after another; minus
                infinity where nothing is left behind an edge.
            starts: (M,) where each visit's children begin in `values`.
        """
        visit, edges, starts = self.edges_of(nodes)
        values = logits[visit, self.edge_columns.to(nodes.device)[edges]].float()
        return self.normalized(values, nodes, with_prior=with_prior, taken=taken), starts

    def edges_of(self, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Every child of the visited branching nodes, the visits one after another.

        Args:
            nodes: (M,) branching node of each visit.

        Returns:
            visits: (sum of children,) the visit that each child belongs to.
            edges: (sum of children,) its edge.
            starts: (M,) where each visit's children begin.
        """
        first = self.first_edge.to(nodes.device)
        num_children = first[nodes + 1] - first[nodes]  # (M,)
        starts = num_children.cumsum(0) - num_children
        visit = torch.repeat_interleave(torch.arange(len(nodes), device=nodes.device), num_children)
        within = torch.arange(len(visit), device=nodes.device) - starts[visit]
        return visit, first[nodes][visit] + within, starts

    def normalized(
        self,
        values: Tensor,
        nodes: Tensor,
        *,
        with_prior: bool,
        taken: Taken | None = None,
    ) -> Tensor:
        """Logits of the children that `edges_of` lists -> their log probabilities, same shape."""
        visit, edges, starts = self.edges_of(nodes)
        first = self.first_edge.to(nodes.device)
        items = self.edge_items.to(nodes.device)[edges]
        clicks = self.edge_clicks.to(nodes.device)[edges]
        if taken is not None and len(taken.visits):
            at = starts[taken.visits] + taken.edges - first[nodes[taken.visits]]
            items = items.index_add(0, at, torch.ones_like(at), alpha=-1)
            clicks = clicks.index_add(0, at, taken.clicks, alpha=-1)
        if with_prior:
            # Sums of clicks in another order differ in their last bits: never take log of that.
            values = values + clicks.clamp(min=0.5).log().to(values.dtype)
        values = values.masked_fill(items <= 0, -torch.inf)
        peak = torch.full_like(starts, -torch.inf, dtype=values.dtype)
        peak = peak.scatter_reduce(0, visit, values.detach(), reduce="amax")
        spent = peak == -torch.inf  # all children are taken: they stay at minus infinity
        peak = peak.masked_fill(spent, 0.0)
        total = torch.zeros_like(peak).index_add(0, visit, (values - peak[visit]).exp())
        return values - (total.masked_fill(spent, 1.0).log() + peak)[visit]

    def decision_log_probs(
        self,
        logits: Tensor,
        nodes: Tensor,
        edges: Tensor,
        *,
        with_prior: bool,
        taken: Taken | None = None,
    ) -> Tensor:
        """Log probability of one chosen edge per visit: (M, V), (M,), (M,) -> (M,)."""
        values, starts = self.edge_log_probs(logits, nodes, with_prior=with_prior, taken=taken)
        return values[starts + edges - self.first_edge.to(nodes.device)[nodes]]
