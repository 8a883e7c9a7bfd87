"""Examples -> packed tensors: several histories in one row, each seeing only itself.

Letters: B rows, T tokens of a row, N tokens that are not padding, D trie decisions, Y supervised
tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rc_ray.core.trie import CatalogueTrie, Taken


@dataclass(frozen=True)
class Example:
    """One training text of one catalogue.

    `titles` are (item, start) pairs: the item's title tokens begin at `start` of `tokens` and are
    supervised; the token before `start` predicts the first of them. A title that the user chose
    before, in `earlier` or among the `titles` so far, cannot be the next one.
    """

    catalogue: str
    tokens: tuple[int, ...]
    titles: tuple[tuple[int, int], ...]
    earlier: tuple[int, ...] = ()


@dataclass(frozen=True)
class Decisions:
    """Trie decisions of one catalogue within a batch."""

    positions: Tensor
    """(D,) index into the flattened (B * T) hidden states."""
    nodes: Tensor
    """(D,) branching node."""
    edges: Tensor
    """(D,) edge taken."""
    taken: Taken
    """What cannot be chosen at each decision."""

    def to(self, device: torch.device) -> Decisions:
        return Decisions(
            self.positions.to(device),
            self.nodes.to(device),
            self.edges.to(device),
            self.taken.to(device),
        )


@dataclass(frozen=True)
class Batch:
    """One worker's share of a global batch, or a part of it."""

    input_ids: Tensor
    """(B, T)."""
    position_ids: Tensor | None
    """(B, T), or None where every row holds one example."""
    segments: Tensor | None
    """(B, T) number of the example within its row, -1 for padding; None as above."""
    lengths: tuple[int, ...]
    """Tokens of every example, row by row."""
    places: Tensor
    """(N,) index of their tokens into the flattened (B * T)."""
    decisions: Mapping[str, Decisions]
    """By catalogue."""
    token_positions: Tensor
    """(Y,) index into the flattened hidden states that predict a title's tokens; none of titles
    that the text cuts short."""
    token_targets: Tensor
    """(Y,) the tokens."""
    num_titles: int
    """Supervised titles in this share."""
    num_tokens: int
    """Tokens that are not padding."""
    num_global_titles: int = field(default=0)
    """Supervised titles in the whole global batch."""
    num_global_tokens: int = field(default=0)
    """Supervised tokens in the whole global batch."""

    @property
    def mask(self) -> Tensor | None:
        """(B, 1, T, T) bool, made anew at every call; None for plain causal attention."""
        if self.segments is None:
            return None
        same = self.segments[:, :, None] == self.segments[:, None, :]
        return same.tril()[:, None]

    def flattened(self) -> Batch:
        """The same examples one behind the other in one row, (1, N), without padding."""
        device = self.input_ids.device
        moved = self._moved(torch.arange(len(self.places), device=device), 1, len(self.places))
        return replace(
            moved,
            position_ids=torch.cat([torch.arange(n, device=device) for n in self.lengths])[None],
            segments=torch.repeat_interleave(
                torch.arange(len(self.lengths), device=device),
                torch.tensor(self.lengths, device=device),
            )[None],
        )

    def apart(self) -> Batch:
        """The same examples each in a row of its own, which needs no mask."""
        width = max(self.lengths)
        places = [torch.arange(n) + row * width for row, n in enumerate(self.lengths)]
        return self._moved(torch.cat(places).to(self.input_ids.device), len(self.lengths), width)

    def _moved(self, places: Tensor, num_rows: int, width: int) -> Batch:
        """The tokens at other places, (N,), of a batch of another shape."""
        device = self.input_ids.device
        place_of = torch.zeros(self.input_ids.numel(), dtype=torch.long, device=device)
        place_of[self.places] = places
        input_ids = torch.zeros(num_rows * width, dtype=torch.long, device=device)
        input_ids[places] = self.input_ids.flatten()[self.places]
        return replace(
            self,
            input_ids=input_ids.view(num_rows, width),
            position_ids=None,
            segments=None,
            places=places,
            decisions={
                name: replace(found, positions=place_of[found.positions])
                for name, found in self.decisions.items()
            },
            token_positions=place_of[self.token_positions],
        )

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=None if self.position_ids is None else self.position_ids.to(device),
            segments=None if self.segments is None else self.segments.to(device),
            places=self.places.to(device),
            decisions={name: d.to(device) for name, d in self.decisions.items()},
            token_positions=self.token_positions.to(device),
            token_targets=self.token_targets.to(device),
        )


def count_targets(examples: Sequence[Example], tries: Mapping[str, CatalogueTrie]) -> int:
    """Supervised titles; one whose path never branches teaches nothing and is not counted."""
    return sum(
        bool(tries[example.catalogue].paths[item].decisions)
        for example in examples
        for item, _ in example.titles
    )


def pack(
    examples: Sequence[Example],
    tries: Mapping[str, CatalogueTrie],
    title_tokens: Mapping[str, Sequence[Sequence[int]]],
) -> Batch:
    """Pack examples into rows as long as the longest of them, first fit by falling length.

    Where the model attends to each example by itself, `Batch.flattened` takes the rows' place.

    Args:
        examples: at least one.
        tries: by catalogue.
        title_tokens: by catalogue, the tokens of every item's title.
    """
    capacity = max(len(example.tokens) for example in examples)
    rows: list[list[Example]] = []
    free: list[int] = []
    for example in sorted(examples, key=lambda e: -len(e.tokens)):
        row = next((r for r, room in enumerate(free) if room >= len(example.tokens)), None)
        if row is None:
            rows.append([])
            free.append(capacity)
            row = len(rows) - 1
        rows[row].append(example)
        free[row] -= len(example.tokens)

    input_ids = torch.zeros(len(rows), capacity, dtype=torch.long)
    position_ids = torch.zeros_like(input_ids)
    segments = torch.full_like(input_ids, -1)  # padding sees only padding
    found: dict[str, tuple[list[int], list[int], list[int]]] = {}
    taken: dict[str, list[tuple[int, int, float]]] = {}
    token_positions: list[int] = []
    token_targets: list[int] = []
    num_titles = 0
    for row, row_examples in enumerate(rows):
        offset = 0
        for segment, example in enumerate(row_examples):
            end = offset + len(example.tokens)
            input_ids[row, offset:end] = torch.tensor(example.tokens)
            position_ids[row, offset:end] = torch.arange(len(example.tokens))
            segments[row, offset:end] = segment
            trie = tries[example.catalogue]
            positions, nodes, edges = found.setdefault(example.catalogue, ([], [], []))
            removed = taken.setdefault(example.catalogue, [])
            chosen = list(example.earlier)
            for item, start in example.titles:
                before = row * capacity + offset + start - 1  # predicts the title's first token
                path = trie.paths[item]
                num_titles += bool(path.decisions)
                visit_of = {}
                for depth, node, edge in path.decisions:
                    visit_of[node] = len(positions)
                    positions.append(before + depth)
                    nodes.append(node)
                    edges.append(edge)
                removed += trie.taken_rows(visit_of, chosen, keep=(trie.leaf_of_item[item],))
                chosen.append(item)
                title = title_tokens[example.catalogue][item]
                if example.tokens[start : start + len(title)] == tuple(title):  # not cut short
                    token_positions.extend(range(before, before + len(title)))
                    token_targets.extend(title)
            offset = end
    several = any(len(row) > 1 for row in rows)
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids if several else None,
        segments=segments if several else None,
        lengths=tuple(len(example.tokens) for row in rows for example in row),
        places=(segments >= 0).flatten().nonzero().flatten(),
        decisions={
            name: Decisions(
                positions=torch.tensor(positions, dtype=torch.long),
                nodes=torch.tensor(nodes, dtype=torch.long),
                edges=torch.tensor(edges, dtype=torch.long),
                taken=Taken.from_rows(taken[name]),
            )
            for name, (positions, nodes, edges) in found.items()
        },
        token_positions=torch.tensor(token_positions, dtype=torch.long),
        token_targets=torch.tensor(token_targets, dtype=torch.long),
        num_titles=num_titles,
        num_tokens=sum(len(example.tokens) for example in examples),
    )
