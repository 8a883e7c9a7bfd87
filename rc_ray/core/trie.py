"""Titles -> token trie: where titles branch, what share of clicks lies behind each branch.

A title's probability is the product over *branching* nodes of the softmax restricted to that node's
children; nodes with one child contribute nothing. It sums to 1 over the distinct titles of the
catalogue. Always built from the whole catalogue, never from a candidate list: a candidate would
inherit the mass of every title that shares its first token.

Letters: I items, N branching nodes, E edges out of branching nodes, V catalogue tokens,
H hidden size, D decisions, M visits to branching nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        weights = np.ones(len(titles)) if counts is None else np.asarray(counts, dtype=float) + 1.0
        children: list[dict[int, int]] = [{}]
        mass: list[float] = [0.0]
        self.node_tokens: list[int] = [-1]
        self.node_depths: list[int] = [0]
        self.node_parents: list[int] = [-1]
        node_paths: list[list[int]] = []
        for title, weight in zip(titles, weights, strict=True):
            node, path = 0, []
            mass[0] += weight
            for token in title:
                following = children[node].get(token)
                if following is None:
                    following = len(children)
                    children[node][token] = following
                    children.append({})
                    mass.append(0.0)
                    self.node_tokens.append(int(token))
                    self.node_depths.append(self.node_depths[node] + 1)
                    self.node_parents.append(node)
                node = following
                mass[node] += weight
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
        edge_mass: list[float] = []
        edge_of: dict[int, int] = {}
        for node in branching:
            for token, child in children[node].items():
                edge_of[child] = len(edge_columns)
                edge_columns.append(column_of[token])
                edge_mass.append(np.log(mass[child] / mass[node]))
            first_edge.append(len(edge_columns))

        self.vocabulary_ids = torch.tensor(columns, dtype=torch.long)
        """(V,) tokens that label an edge: the rows of the output projection that are needed."""
        self.first_edge = torch.tensor(first_edge, dtype=torch.long)
        """(N + 1,) edges of branching node n are first_edge[n] .. first_edge[n + 1] - 1."""
        self.edge_columns = torch.tensor(edge_columns, dtype=torch.long)
        """(E,) index into `vocabulary_ids`."""
        self.edge_log_mass = torch.tensor(edge_mass, dtype=torch.float32)
        """(E,) log share of the node's clicks that lies behind the edge."""
        self.paths = [self._path(path, edge_of) for path in node_paths]
        leaves = {path[-1] if path else 0: index for index, path in enumerate(node_paths)}
        self.leaf_of_item = [leaves[path[-1] if path else 0] for path in node_paths]
        """Items with equal titles have equal entries."""
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

    def edge_log_probs(
        self, logits: Tensor, nodes: Tensor, *, with_prior: bool
    ) -> tuple[Tensor, Tensor]:
        """Log probability of every child of the visited branching nodes.

        Args:
            logits: (M, V) of the catalogue tokens at each visit.
            nodes: (M,) branching node of each visit.
            with_prior: add each edge's log prior mass to its logit (logit adjustment,
                arXiv 2007.07314, equation 10).

        Returns:
            values: (sum of children,) log probabilities, the visits one after another.
            starts: (M,) where each visit's children begin in `values`.
        """
        first = self.first_edge.to(nodes.device)
        num_children = first[nodes + 1] - first[nodes]  # (M,)
        starts = num_children.cumsum(0) - num_children
        visit = torch.repeat_interleave(torch.arange(len(nodes), device=nodes.device), num_children)
        within = torch.arange(len(visit), device=nodes.device) - starts[visit]
        edges = first[nodes][visit] + within  # (sum of children,)
        values = logits[visit, self.edge_columns.to(nodes.device)[edges]].float()
        if with_prior:
            values = values + self.edge_log_mass.to(nodes.device)[edges]
        peak = torch.full_like(starts, -torch.inf, dtype=values.dtype)
        peak = peak.scatter_reduce(0, visit, values.detach(), reduce="amax")
        total = torch.zeros_like(peak).index_add(0, visit, (values - peak[visit]).exp())
        return values - (total.log() + peak)[visit], starts

    def decision_log_probs(
        self, logits: Tensor, nodes: Tensor, edges: Tensor, *, with_prior: bool
    ) -> Tensor:
        """Log probability of one chosen edge per visit: (M, V), (M,), (M,) -> (M,)."""
        values, starts = self.edge_log_probs(logits, nodes, with_prior=with_prior)
        return values[starts + edges - self.first_edge.to(nodes.device)[nodes]]
