"""The best k titles of a whole catalogue under the calibrated score, exact or proved.

A prefix's log probability is never below that of a title that begins with it. So nodes of the trie
are read in the order of their bounds (core/frontier.py) until the k-th best title found exceeds
every bound left. A prompt is read once per user; each node joins its user's keys and values once,
under a tree attention mask, as in core/ranking.py. Several users share a forward pass.

Letters: B users of a pass, T tokens, L cached tokens, M visits, D children, E edges, I items.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rc_ray.core.frontier import BranchTree, Floats, Frontier
from rc_ray.core.kv_cache import KeyValueCache
from rc_ray.core.ranking import FULL_PASS, WITH_PRIOR, Ranker, calibrated
from rc_ray.core.trie import CatalogueTrie, Taken

EXACT_NODES = 128
"""Catalogues whose trie needs no more nodes are read whole: a search would read about as many."""
MAX_NODES = 4096
TOKENS_PER_STEP = {"cpu": 64, "cuda": 2048}
"""Trie tokens of a forward pass, all users together. Fewer leave the processor idle; more are read
in vain, since what the others told would have spared them."""
USERS_PER_CALL = 64
"""Users whose requests are packed at a time where a catalogue is read whole."""
MIN_WIDTH, MAX_WIDTH = 4, 64
"""Trie tokens per user and pass."""

_Picked = tuple["_User", list[tuple[int, float]]]
"""A user and the nodes to read for him, each with its log probability."""

_trees: weakref.WeakKeyDictionary[CatalogueTrie, BranchTree] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Found:
    """The top of a catalogue for one user."""

    items: tuple[int, ...]
    """Best first, ties by item index; more than k where several tie with the k-th."""
    scores: npt.NDArray[np.float64]
    """Calibrated scores, aligned with `items`."""
    is_proved: bool
    """False: `max_nodes` came first, and a better title may have been missed."""
    num_nodes_read: int
    """Trie tokens that were read behind the prompt."""


@dataclass
class _User:
    """One search."""

    prompt: list[int]
    chosen: list[int]
    frontier: Frontier
    tokens: list[int] = field(default_factory=list)
    """Read behind the prompt, in this order."""
    depths: list[int] = field(default_factory=list)
    seen: list[tuple[int, ...]] = field(default_factory=list)
    """For each token the places, in `tokens`, of its ancestors and itself."""
    columns: list[int] = field(default_factory=list)
    """Where each token stands in the cache."""
    place_of: dict[int, int] = field(default_factory=dict)
    """Branching node -> place of its token."""

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)


@torch.no_grad()
def top_k(
    ranker: Ranker,
    histories: Sequence[Sequence[str]],
    k: int,
    *,
    alpha: float,
    gamma: float,
    prior_in_trie: bool,
    empty: np.ndarray,
    log_prior: np.ndarray,
    max_nodes: int = MAX_NODES,
    exact_nodes: int = EXACT_NODES,
) -> list[Found]:
    """The k items with the highest calibrated score out of the whole catalogue.

    Titles of the history are left out, as in `Ranker.score` over the whole catalogue. The keys and
    values held at a time are about those of `ranker.tokens_per_batch` tokens, or of one user who
    needs more; users for whom there is no room any more go on later.

    Args:
        ranker: of the catalogue; the adapters that are active now count.
        histories: titles, oldest first, one list per user.
        k: at least 1.
        alpha: weight of the log likelihood under the empty history.
        gamma: weight of the log prior.
        prior_in_trie: the prior acts inside the trie's nodes, in both likelihoods.
        empty: (2, I) from `Ranker.empty_log_likelihoods`, in nats.
        log_prior: (I,) in nats.
        max_nodes: trie tokens to read at most for one user.
        exact_nodes: a catalogue whose trie has no more nodes to read is scored in one pass.

    Returns:
        One `Found` per user, in the order of `histories`.

    Raises:
        ValueError: k is below 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}, it must be at least 1")
    own = np.asarray(empty, dtype=np.float64)[WITH_PRIOR if prior_in_trie else 0]
    prior = np.asarray(log_prior, dtype=np.float64)
    corrections = calibrated(np.zeros_like(own), own, prior, alpha=alpha, gamma=gamma)
    tree = _trees.get(ranker.trie)
    if tree is None:
        tree = _trees[ranker.trie] = BranchTree.of(ranker.trie)
    num_nodes = int(tree.lengths.sum())
    if num_nodes <= exact_nodes:
        return _read_whole(ranker, histories, k, corrections, prior_in_trie, num_nodes)
    best_below = tree.best_below(corrections)
    everything = range(len(ranker.titles))
    users = [
        _User(
            prompt=ranker.prompt_tokens(history, everything),
            chosen=ranker.chosen_items(history),
            frontier=Frontier(tree, corrections, best_below, k),
        )
        for history in histories
    ]
    search = _Search(ranker, tree, prior_in_trie, max_nodes)
    queue = sorted(users, key=lambda user: -len(user.prompt))
    while queue:
        queue = search.run(queue)
    return [
        Found(*user.frontier.found(), user.frontier.is_proved, len(user.tokens)) for user in users
    ]


def _read_whole(
    ranker: Ranker,
    histories: Sequence[Sequence[str]],
    k: int,
    corrections: Floats,
    prior_in_trie: bool,
    num_nodes: int,
) -> list[Found]:
    found = []
    everything = range(len(ranker.titles))
    for start in range(0, len(histories), USERS_PER_CALL):
        some = histories[start : start + USERS_PER_CALL]
        whole = [everything] * len(some)
        for scored in ranker.log_likelihoods(some, whole, with_prior=prior_in_trie):
            scores = scored.double().cpu().numpy() + corrections
            left = np.flatnonzero(scores > -np.inf)
            order = left[np.lexsort((left, -scores[left]))]
            if len(order) > k:
                order = order[scores[order] >= scores[order[k - 1]]]
            found.append(Found(tuple(order.tolist()), scores[order], True, num_nodes))
    return found


class _Search:
    """Runs groups of users through the trie, each pass one reading step of every user."""

    def __init__(
        self, ranker: Ranker, tree: BranchTree, prior_in_trie: bool, max_nodes: int
    ) -> None:
        self._ranker = ranker
        self._tree = tree
        self._prior_in_trie = prior_in_trie
        self._max_nodes = max_nodes
        self._limit = ranker.tokens_per_batch
        self._step = TOKENS_PER_STEP.get(ranker.lm.device.type, 64)

    def run(self, queue: list[_User]) -> list[_User]:
        """Finish some users; returns those that are still to be run."""
        group = self._group(queue)
        waiting = queue[len(group) :]
        cache, length, hidden = self._begin(group)
        if self._tree.lengths[0] == 0:  # the prompt's end is the topmost branching node
            new = [row for row, user in enumerate(group) if not user.tokens]
            self._expand([(group[row], group[row].frontier.best(0, 0)) for row in new], hidden[new])
        while True:
            width = min(max(self._step // len(group), MIN_WIDTH), MAX_WIDTH)
            steps = []
            for row, user in enumerate(group):
                left = self._max_nodes - len(user.tokens)
                nodes = user.frontier.best(width, left) if not user.frontier.is_proved else []
                if nodes:
                    steps.append((row, user, nodes))
            if not steps:
                return waiting
            if len(steps) < len(group):
                cache.select([row for row, _, _ in steps])
                group = [user for _, user, _ in steps]
            picked = [(user, nodes) for _, user, nodes in steps]
            length, hidden = self._read(cache, length, picked)
            self._expand(picked, hidden)
            if len(group) > 1 and (length + MAX_WIDTH) * len(group) > self._limit:
                half = len(group) // 2  # the others go on later, from a reading of what they read
                waiting = group[half:] + waiting
                group = group[:half]
                cache.select(list(range(half)))

    def _group(self, queue: Sequence[_User]) -> list[_User]:
        """The first users of a queue, as many as are well run together."""
        group: list[_User] = []
        longest = 0
        for user in queue:
            longest = max(longest, user.length + max(MAX_WIDTH, len(user.tokens)))
            if group and longest * (len(group) + 1) > self._limit:
                break
            # Once a pass is full, short prompts wait for one of their own: padding costs as much.
            if group and user.length < 0.8 * group[0].length and longest * len(group) > FULL_PASS:
                break
            group.append(user)
        return group

    def _begin(self, group: list[_User]) -> tuple[KeyValueCache, int, Tensor]:
        """Read the prompts, and what was read behind them before a pause.

        Returns:
            The cache, its length, and (B, H) the hidden states at the prompts' ends.
        """
        start = max(len(user.prompt) for user in group)
        length = start + max(len(user.tokens) for user in group)
        input_ids = np.zeros((len(group), length), dtype=np.int64)
        position_ids = np.zeros_like(input_ids)
        mask = np.repeat(np.eye(length, dtype=bool)[None], len(group), axis=0)
        for row, user in enumerate(group):
            end, stop = len(user.prompt), start + len(user.tokens)
            input_ids[row, :end] = user.prompt
            input_ids[row, start:stop] = user.tokens
            position_ids[row, :end] = np.arange(end)
            position_ids[row, start:stop] = end - 1 + np.array(user.depths, dtype=np.int64)
            mask[row, :end, :end] = np.tri(end, dtype=bool)
            mask[row, start:stop, :end] = True
            for place, seen in enumerate(user.seen):
                mask[row, start + place, [start + column for column in seen]] = True
            user.columns = list(range(start, stop))
        cache = KeyValueCache(self._ranker.lm.model.config.num_hidden_layers)
        hidden = self._forward(cache, input_ids, position_ids, mask)
        ends = torch.tensor([len(user.prompt) - 1 for user in group], device=hidden.device)
        return cache, length, hidden[torch.arange(len(group), device=hidden.device), ends]

    def _read(
        self, cache: KeyValueCache, length: int, picked: Sequence[_Picked]
    ) -> tuple[int, Tensor]:
        """Read nodes of every user of the group.

        Returns:
            The new length of the cache, and (M, H) the hidden states at the nodes.
        """
        lengths = self._tree.lengths
        width = max(sum(int(lengths[node]) for node, _ in nodes) for _, nodes in picked)
        input_ids = np.zeros((len(picked), width), dtype=np.int64)
        position_ids = np.zeros_like(input_ids)
        mask = np.zeros((len(picked), width, length + width), dtype=bool)
        mask[:, np.arange(width), length + np.arange(width)] = True
        visits = []
        for row, (user, nodes) in enumerate(picked):
            slot, end = 0, len(user.prompt)
            for node, _ in nodes:
                above = user.place_of.get(int(self._tree.parents[node]))
                seen = user.seen[above] if above is not None else ()
                depth = int(self._tree.depths[node]) - len(self._tree.chains[node])
                for token in self._tree.chains[node]:
                    depth += 1
                    seen = (*seen, len(user.tokens))
                    user.tokens.append(token)
                    user.depths.append(depth)
                    user.seen.append(seen)
                    user.columns.append(length + slot)
                    input_ids[row, slot] = token
                    position_ids[row, slot] = end + depth - 1
                    mask[row, slot, [user.columns[place] for place in seen]] = True
                    slot += 1
                user.place_of[node] = len(user.tokens) - 1
                visits.append(row * width + slot - 1)
            mask[row, :slot, :end] = True
        hidden = self._forward(cache, input_ids, position_ids, mask)
        at = torch.tensor(visits, dtype=torch.long, device=hidden.device)
        return length + width, hidden.flatten(0, 1)[at]

    def _forward(
        self,
        cache: KeyValueCache,
        input_ids: npt.NDArray[np.int64],
        position_ids: npt.NDArray[np.int64],
        mask: npt.NDArray[np.bool_],
    ) -> Tensor:
        device = self._ranker.lm.device
        ids, positions, seen = (
            torch.from_numpy(array).to(device) for array in (input_ids, position_ids, mask)
        )
        return self._ranker.lm.cached_hidden(cache, ids, positions, seen[:, None])

    def _expand(self, picked: Sequence[_Picked], hidden: Tensor) -> None:
        """Hand the children of nodes that were read to their users' frontiers."""
        trie, device = self._ranker.trie, hidden.device
        nodes: list[int] = []
        prefixes: list[float] = []
        taken: list[tuple[int, int, float]] = []
        for user, own in picked:
            visit_of = {node: len(nodes) + place for place, (node, _) in enumerate(own)}
            taken += trie.taken_rows(visit_of, user.chosen)
            nodes += [node for node, _ in own]
            prefixes += [log_prob for _, log_prob in own]
        if not nodes:
            return
        at = torch.tensor(nodes, dtype=torch.long, device=device)
        visit, edges, starts = trie.edges_of(at)
        log_probs = trie.normalized(
            self._ranker.child_logits(hidden, visit, edges),
            at,
            with_prior=self._prior_in_trie,
            taken=Taken.from_rows(taken).to(device),
        )  # (D,)
        every_edge = edges.cpu().numpy()
        every = np.array(prefixes)[visit.cpu().numpy()] + log_probs.double().cpu().numpy()
        bounds = [*starts.tolist(), len(every)]
        first = 0
        for user, own in picked:
            children = slice(bounds[first], bounds[first + len(own)])
            user.frontier.extend(every_edge[children], every[children])
            first += len(own)
