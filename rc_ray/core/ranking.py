"""Score and order candidates: the only inference path, for validation, test, merging and serving.

All candidates of a request are scored in one forward pass: the prompt once, then the candidates'
trie nodes packed behind it under a tree attention mask. Each node sees the prompt and its own
ancestors, and its position is prompt length + depth.

Letters: B rows, T tokens, C candidates, I items, V catalogue tokens, M visits, D decisions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rc_ray.core.model import LanguageModel
from rc_ray.core.packed_attention import install_packed_attention
from rc_ray.core.prompts import PromptRenderer
from rc_ray.core.trie import CatalogueTrie, Taken, TreeLayout

MAX_TREE_NODES = 1024
"""Longer candidate lists are scored in several rows, since attention grows with the square."""

FULL_PASS = 512
"""Tokens that keep any CPU busy."""
_MAX_STRETCH = 1.2
"""The longest row over the shortest of a pass that is full: as much is padding at most."""

WITH_PRIOR = 1
"""Row of a score that holds the prior inside the trie; row 0 is the LLM alone."""


@dataclass(frozen=True)
class _Row:
    """One prompt with some of its candidates."""

    request: int
    prompt: list[int]
    candidates: list[int]
    places: list[int]
    """Where these candidates stand in the request's list."""
    layout: TreeLayout
    chosen: list[int]
    """Items of the whole history, which cannot come again."""

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.layout.tokens)


@dataclass(frozen=True)
class _PackedRows:
    """Rows of one forward pass, run up to some layer."""

    rows: list[_Row]
    num_lower: int
    states: Tensor
    """(B, T, H) after `num_lower` layers; after none, the embeddings."""
    position_ids: Tensor
    """(B, T)."""
    mask: Tensor
    """(B, 1, T, T) bool."""
    visits: Tensor
    """(M,) index into the flattened hidden states."""
    nodes: Tensor
    """(M,) branching node of each visit."""
    taken: Taken


@dataclass(frozen=True)
class Prepared:
    """Packed requests, to be scored under one adapter after another."""

    batches: list[_PackedRows]
    num_candidates: list[int]


class Ranker:
    """Scores titles of one domain's catalogue under whatever adapters are active.

    Args:
        lm: the base LLM.
        domain: name of the domain, as in training prompts.
        titles: of all items, by item index.
        num_train: (I,) training clicks, the prior inside the trie.
        renderer: style and tokenizer.
        max_titles: history titles that a prompt takes, the latest ones.
        tokens_per_batch: padded tokens of one forward pass.
    """

    def __init__(
        self,
        lm: LanguageModel,
        domain: str,
        titles: Sequence[str],
        num_train: np.ndarray,
        renderer: PromptRenderer,
        *,
        max_titles: int = 15,
        tokens_per_batch: int = 4096,
    ) -> None:
        install_packed_attention(lm.model)  # for its attention in fp32 where that is faster
        self.lm = lm
        self.domain = domain
        self.titles = list(titles)
        self.renderer = renderer
        self.max_titles = max_titles
        self.tokens_per_batch = tokens_per_batch
        tokens = [renderer.title(title) for title in titles]
        self.trie = CatalogueTrie(tokens, num_train)
        self._item_of_title = {title: item for item, title in enumerate(tokens)}
        self._num_bearers = Counter(tokens)
        self._shown = {
            title: renderer.shown(title, self.trie.telling_depth(item))
            for item, title in enumerate(tokens)
        }
        self._rows = lm.output_rows(self.trie.vocabulary_ids)  # (V, H)

    def prepare(
        self,
        histories: Sequence[Sequence[str]],
        candidates: Sequence[Sequence[int]],
        *,
        shared_layers: int = 0,
    ) -> Prepared:
        """Pack requests for one or more calls of `score`.

        Args:
            histories: titles, oldest first, one list per request.
            candidates: item indices, one list per request.
            shared_layers: decoder layers below this one are run now, once; no adapter that is
                active in a later `score` may change them (see `model.first_adapted_layer`).
        """
        rows = [
            row
            for request, (history, items) in enumerate(zip(histories, candidates, strict=True))
            for row in self._split(request, history, items)
        ]
        return Prepared(
            batches=[self._pack(group, shared_layers) for group in self._groups(rows)],
            num_candidates=[len(items) for items in candidates],
        )

    def score(self, prepared: Prepared) -> list[Tensor]:
        """log p(title | history) over the whole catalogue's trie, in nats.

        Titles of the history are taken out of the trie, unless a list of candidates names them;
        where the candidates are the whole catalogue they come out at minus infinity.

        Returns:
            One (2, C) fp32 tensor per request, on the model's device: row 0 from the LLM alone,
            row 1 (`WITH_PRIOR`) with the clicks behind every branch added to its logit.
            Differentiable if gradients are enabled.
        """
        results = [
            torch.zeros(2, count, device=self.lm.device) for count in prepared.num_candidates
        ]
        for batch in prepared.batches:
            for row, scores in zip(batch.rows, self._score(batch), strict=True):
                places = torch.tensor(row.places, dtype=torch.long, device=scores.device)
                results[row.request] = results[row.request].index_copy(1, places, scores)
        return results

    def log_likelihoods(
        self,
        histories: Sequence[Sequence[str]],
        candidates: Sequence[Sequence[int]],
        *,
        with_prior: bool = False,
    ) -> list[Tensor]:
        """`prepare` and `score` in one call, one of its rows: a (C,) tensor per request."""
        scores = self.score(self.prepare(histories, candidates))
        return [score[WITH_PRIOR if with_prior else 0] for score in scores]

    def empty_log_likelihoods(self) -> Tensor:
        """Both log p(title | empty history) of every item, (2, I); of adapter and titles only."""
        return self.score(self.prepare([[]], [range(len(self.titles))]))[0]

    def chosen_items(self, history: Sequence[str]) -> list[int]:
        """One item per title of the history that the catalogue knows.

        A title counts at most as often as items bear it: a service's users may name one twice.
        """
        named = Counter(self.renderer.title(title) for title in history)
        return [
            self._item_of_title[title]
            for title, num in named.items()
            for _ in range(min(num, self._num_bearers[title]))
        ]

    def prompt_tokens(self, history: Sequence[str], candidates: Sequence[int]) -> list[int]:
        """Tokens of a request's prompt, which holds the latest `max_titles` titles."""
        recent = list(history)[-self.max_titles :]
        listed = [self.titles[item] for item in candidates] if recent else None
        return self.renderer.prompt(self.domain, recent, listed, shown=self._shown)

    def child_logits(self, hidden: Tensor, visit: Tensor, edges: Tensor) -> Tensor:
        """Logits of single children of branching nodes.

        Args:
            hidden: (M, H) last hidden states, one per visit.
            visit: (D,) index into the visits.
            edges: (D,) the child's edge.

        Returns:
            (D,) fp32.
        """
        columns = self.trie.edge_columns.to(edges.device)[edges]
        hidden = hidden.float()
        if 8 * len(edges) > len(hidden) * len(self._rows):  # the matrix product is the faster one
            return (hidden @ self._rows.T)[visit, columns]
        return torch.einsum("dh,dh->d", hidden[visit], self._rows[columns])

    def _split(self, request: int, history: Sequence[str], items: Sequence[int]) -> list[_Row]:
        chosen = self.chosen_items(history)
        if len(items) < len(self.titles):  # a listed title can come, whatever the history says
            listed_leaves = {self.trie.leaf_of_item[item] for item in items}
            chosen = [i for i in chosen if self.trie.leaf_of_item[i] not in listed_leaves]
        prompt = self.prompt_tokens(history, items)
        # Neighbours by leaf share ancestors, so sorted chunks hold fewer nodes.
        order = sorted(range(len(items)), key=lambda place: self.trie.paths[items[place]].nodes)
        chunks: list[list[int]] = [[]]
        num_nodes, seen = 0, set[int]()
        for place in order:
            new = set(self.trie.paths[items[place]].nodes) - seen
            if chunks[-1] and num_nodes + len(new) > MAX_TREE_NODES:
                chunks.append([])
                num_nodes, seen = 0, set()
                new = set(self.trie.paths[items[place]].nodes)
            chunks[-1].append(place)
            num_nodes += len(new)
            seen |= new
        return [
            _Row(
                request=request,
                prompt=prompt,
                candidates=[items[place] for place in places],
                places=places,
                layout=self.trie.layout([items[place] for place in places]),
                chosen=chosen,
            )
            for places in chunks
            if places
        ]

    def _groups(self, rows: list[_Row]) -> list[list[_Row]]:
        """Rows of like length together, padded to at most `tokens_per_batch` tokens."""
        groups: list[list[_Row]] = []
        # Padding costs a busy processor as much as tokens do; a GPU gains more by fewer passes.
        is_cpu = self.lm.device.type == "cpu"
        for row in sorted(rows, key=lambda row: row.length):
            group = groups[-1] if groups else []
            is_full = row.length * (len(group) + 1) > self.tokens_per_batch
            if group and is_cpu and group[-1].length * len(group) >= FULL_PASS:
                is_full |= row.length > _MAX_STRETCH * group[0].length
            if not group or is_full:
                groups.append([row])
            else:
                group.append(row)
        return groups

    def _pack(self, rows: list[_Row], shared_layers: int) -> _PackedRows:
        length = max(row.length for row in rows)
        input_ids = torch.zeros(len(rows), length, dtype=torch.long)
        position_ids = torch.zeros_like(input_ids)
        mask = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1)  # padding sees itself
        visits: list[int] = []
        nodes: list[int] = []
        taken: list[tuple[int, int, float]] = []
        for index, row in enumerate(rows):
            start, end = len(row.prompt), row.length
            input_ids[index, :start] = torch.tensor(row.prompt)
            input_ids[index, start:end] = torch.tensor(row.layout.tokens, dtype=torch.long)
            position_ids[index, :start] = torch.arange(start)
            depths = torch.tensor(row.layout.depths, dtype=torch.long)
            position_ids[index, start:end] = start + depths - 1
            mask[index, :start, :start] = torch.ones(start, start, dtype=torch.bool).tril()
            mask[index, start:end, :start] = True
            mask[index, start:end, start:end] = row.layout.ancestors
            visits.extend(index * length + start + slot for slot in row.layout.visit_slots)
            visit_of = {node: len(nodes) + v for v, node in enumerate(row.layout.visit_nodes)}
            taken += self.trie.taken_rows(visit_of, row.chosen)
            nodes.extend(row.layout.visit_nodes)
        device = self.lm.device
        ids, positions, seen = (x.to(device) for x in (input_ids, position_ids, mask[:, None]))
        with torch.no_grad():
            states = self.lm.lower_states(shared_layers, ids, positions, seen)
        return _PackedRows(
            rows=rows,
            num_lower=shared_layers,
            states=states,
            position_ids=positions,
            mask=seen,
            visits=torch.tensor(visits, dtype=torch.long, device=device),
            nodes=torch.tensor(nodes, dtype=torch.long, device=device),
            taken=Taken.from_rows(taken).to(device),
        )

    def _score(self, batch: _PackedRows) -> list[Tensor]:
        hidden = self.lm.upper_hidden(batch.num_lower, batch.states, batch.position_ids, batch.mask)
        flat = hidden.reshape(-1, hidden.shape[-1])  # (B * T, H)
        logits = flat[batch.visits].float() @ self._rows.T  # (M, V)
        both = [
            self._sum_decisions(
                batch,
                *self.trie.edge_log_probs(
                    logits, batch.nodes, with_prior=with_prior, taken=batch.taken
                ),
            )
            for with_prior in (False, True)
        ]
        counts = [len(row.candidates) for row in batch.rows]
        return list(torch.stack(both).split(counts, dim=1))

    def _sum_decisions(self, batch: _PackedRows, values: Tensor, starts: Tensor) -> Tensor:
        """Log probabilities of the batch's candidates, all rows one after another."""
        first_candidate, first_visit = 0, 0
        owner: list[int] = []
        visit: list[int] = []
        edge: list[int] = []
        for row in batch.rows:
            owner.extend(first_candidate + c for c in row.layout.decision_candidates)
            visit.extend(first_visit + v for v in row.layout.decision_visits)
            edge.extend(row.layout.decision_edges)
            first_candidate += len(row.candidates)
            first_visit += len(row.layout.visit_nodes)
        device = values.device
        at, edges = torch.tensor([visit, edge], dtype=torch.long, device=device)  # (D,) each
        chosen = values[starts[at] + edges - self.trie.first_edge.to(device)[batch.nodes[at]]]
        owners = torch.tensor(owner, dtype=torch.long, device=device)
        return torch.zeros(first_candidate, device=device).index_add(0, owners, chosen)


def calibrated(
    log_likelihood: np.ndarray,
    empty_log_likelihood: np.ndarray,
    log_prior: np.ndarray,
    *,
    alpha: float,
    gamma: float,
) -> np.ndarray:
    """Log p(title | history) - alpha log p(title | empty history) + gamma log prior(title).

    All three are aligned arrays of one request's candidates, in nats.
    """
    return log_likelihood - alpha * empty_log_likelihood + gamma * log_prior


def best_first(scores: np.ndarray, item_ids: Sequence[str]) -> list[int]:
    """Places of the candidates from best to worst; equal scores in the order of item ids."""
    return sorted(range(len(scores)), key=lambda place: (-float(scores[place]), item_ids[place]))
