"""Titles as vectors from the base LLM without training: what the words alone say.

A title's vector is the mean of the hidden states of its tokens after some layer. Hidden states of
an LLM lie in a narrow cone; centring removes its axis ("All-but-the-Top", arXiv 1702.01417),
whitening evens out all directions (arXiv 2103.15316). A user's vector is the recency-weighted mean
of the unit vectors of the history, and the score is its cosine with an item's.

Letters: N users, I items, L layers, B titles of a batch, T tokens of a title, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rc_ray.baselines_config import TitleEmbeddingConfig
from rc_ray.core.baselines import Case, Scores, catalogue_ndcg, valid_sample
from rc_ray.core.histories import Histories
from rc_ray.core.item_knn import recency_matrix
from rc_ray.core.model import LanguageModel
from rc_ray.core.prompts import PromptRenderer

Vectors = npt.NDArray[np.float32]
Transform = Literal["centred", "whitened"]


@dataclass(frozen=True)
class TitleStates:
    """What the LLM makes of all titles; costs minutes, so it is worth keeping."""

    layers: tuple[int, ...]
    """Decoder layers run, rising."""
    values: Vectors
    """(L, I, H) mean hidden state of each title's tokens after each of the layers."""
    num_tokens: int
    """Tokens that the LLM read."""


class TitleEmbedding:
    """Unit vectors of all items, and how a history's items are weighted.

    Args:
        items: (I, H) unit vectors.
        decay: weight of a history's item against the one after it.
        chosen: what validation chose, for the record.
    """

    def __init__(self, items: Vectors, decay: float, chosen: dict[str, Any] | None = None) -> None:
        self.items = items
        self.decay = decay
        self.chosen = dict(chosen or {})

    @classmethod
    def fit(
        cls, states: TitleStates, config: TitleEmbeddingConfig, valid: Sequence[Case]
    ) -> TitleEmbedding:
        """Choose layer, transform and decay by NDCG@10 over the whole catalogue.

        Args:
            states: of all I titles.
            config: the grid; its layers are those of `states`.
            valid: histories with their next items; where empty the grid's first point is taken.
        """
        cases = valid_sample(valid, config.num_valid_users)
        best: TitleEmbedding | None = None
        best_ndcg = -1.0
        for layer, values in zip(states.layers, states.values, strict=True):
            for transform in config.transforms:
                items = unit_vectors(values, transform)
                for decay in config.decays:
                    one = cls(items, decay)
                    value = catalogue_ndcg(one.scores, cases, len(items)) if cases else 0.0
                    if value > best_ndcg:
                        best, best_ndcg = one, value
                        one.chosen = {
                            "layer": layer,
                            "transform": transform,
                            "decay": decay,
                            "valid_ndcg": value if cases else None,
                        }
        assert best is not None  # the grid has a point
        return best

    def scores(self, histories: Sequence[Sequence[int]]) -> Scores:
        """(N, I) cosines, -1 to 1; an empty history gives 0 to all."""
        read = recency_matrix(Histories.of(histories), len(self.items), self.decay)
        users = _normalized(read @ self.items)  # (N, H)
        scores: Scores = users @ self.items.T
        return scores


@torch.no_grad()
def embed_titles(
    lm: LanguageModel, titles: Sequence[str], config: TitleEmbeddingConfig
) -> TitleStates:
    """Run the titles, equal ones once, through the lower layers of the LLM.

    Args:
        lm: the base LLM, without adapters.
        titles: I titles.
        config: at which depths to read, and tokens per pass.
    """
    total = int(lm.model.config.num_hidden_layers)
    layers = tuple(sorted({max(1, round(depth * total)) for depth in config.layers}))
    renderer = PromptRenderer(lm.tokenizer)
    start = [token for token in (lm.tokenizer.bos_token_id,) if token is not None]
    # A first token attracts attention and has a state like no other: not a title's own.
    head = start or renderer.terminator
    distinct, owners = np.unique(np.array(titles, dtype=object), return_inverse=True)
    tokens = [(*head, *renderer.title(title)) for title in distinct]
    order = sorted(range(len(tokens)), key=lambda i: (len(tokens[i]), tokens[i]))
    values = np.empty(
        (len(layers), len(tokens), int(lm.model.config.hidden_size)), dtype=np.float32
    )
    for batch in _batches(order, [len(one) for one in tokens], config.tokens_per_batch):
        values[:, batch] = _mean_states(lm, [tokens[i] for i in batch], len(head), layers)
    return TitleStates(
        layers=layers, values=values[:, owners], num_tokens=sum(len(one) for one in tokens)
    )


def unit_vectors(values: Vectors, transform: Transform) -> Vectors:
    """(I, H) vectors of mean 0, whitened if so asked, then of length 1.

    Whitening divides every principal axis by its deviation, softly: variances well below the median
    are noise and stay small. Against the mean hardly any axis would count, for a few axes of an LLM
    vary a thousand times more than the others.
    """
    centred = values.astype(np.float64) - values.mean(axis=0, dtype=np.float64)
    if transform == "whitened":
        variances, axes = np.linalg.eigh(centred.T @ centred / len(centred))
        real = variances > variances.max(initial=0.0) * 1e-12  # at most I - 1 of the H
        floor = float(np.median(variances[real])) if real.any() else 1.0
        centred = centred @ axes / np.sqrt(np.maximum(variances, 0.0) + floor)
    return _normalized(centred)


def _mean_states(
    lm: LanguageModel, rows: Sequence[Sequence[int]], num_head: int, layers: Sequence[int]
) -> Vectors:
    """(L, B, H) means over the tokens after the head; the last newline counts as one."""
    width = max(len(row) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    own = torch.zeros(len(rows), width)
    for place, row in enumerate(rows):
        input_ids[place, : len(row)] = torch.tensor(row)
        own[place, num_head : len(row)] = 1.0 / (len(row) - num_head)
    input_ids, own = input_ids.to(lm.device), own.to(lm.device)
    found: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output  # (B, T, H)
        found.append(torch.einsum("bt,bth->bh", own, states.float()))

    decoder_layers = lm.model.get_decoder().layers
    hooks = [decoder_layers[layer - 1].register_forward_hook(keep) for layer in layers]
    try:
        # Causal attention: padding on the right changes nothing before it.
        positions = torch.arange(width, device=lm.device).expand(len(rows), width)
        lm.lower_states(max(layers), input_ids, positions, None)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found).cpu().numpy()


def _batches(order: Sequence[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Titles by rising length, as many at a time as keep rows times the longest within `limit`."""
    batches: list[list[int]] = []
    for i in order:
        if not batches or (len(batches[-1]) + 1) * lengths[i] > limit:
            batches.append([])
        batches[-1].append(i)
    return batches


def _normalized(rows: npt.NDArray[Any]) -> Vectors:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: Vectors = (rows / np.where(lengths > 0.0, lengths, 1.0)).astype(np.float32)
    return unit
