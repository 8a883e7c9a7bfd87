"""What learned weights lower: small functions of the predictions of a batch of prompts.

A prediction is a vector of log probabilities over what can come next: the candidates, or the titles
of the catalogue. `places` say where each entry belongs in a vector that all prompts share: the
position in the candidate list, or the number of the title.

Letters: X prompts, O options of a prompt, P shared places, K adapters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SMALLEST = 1e-30
"""Below it a probability has no slope: that of its entropy would be infinite at 0."""


@dataclass(frozen=True)
class Outcome:
    """An objective on a batch, and what is to be told of the batch."""

    loss: Tensor
    entropy: float
    """Mean over the prompts, in nats."""
    mean_prediction_entropy: float
    """In nats; at most the log of the number of places."""
    num_reliable: int
    """Prompts that count."""


def entropy(log_likelihood: Tensor) -> Tensor:
    """Entropy in nats of log likelihoods (..., O), normalised over the options: (...)."""
    log_p = torch.log_softmax(log_likelihood, dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


def divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(q || p) in nats: (..., O) twice -> (...)."""
    return (log_q.exp() * (log_q - log_p)).sum(dim=-1)


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats, from 0 to log 2: (..., O) twice -> (...)."""
    log_mean = torch.logaddexp(log_p, log_q) - math.log(2.0)
    return 0.5 * (divergence(log_p, log_mean) + divergence(log_q, log_mean))


def mean_prediction_entropy(
    log_p: Sequence[Tensor], places: Sequence[Tensor], num_places: int
) -> Tensor:
    """Entropy in nats of the mean of several predictions.

    The prompts of a domain have different next items, so their mean prediction is spread out. Where
    all predictions turn to the same places the entropy of each may fall, but so does this one.

    Args:
        log_p: X vectors (O,).
        places: X vectors (O,) of indices below `num_places`.
        num_places: P.
    """
    total = log_p[0].new_zeros(num_places)
    total = total.index_add(0, torch.cat(list(places)), torch.cat(list(log_p)).exp())
    mean = (total / len(log_p)).clamp(min=_SMALLEST)
    return -(mean * mean.log()).sum()


def mean_entropy(log_p: Sequence[Tensor]) -> Tensor:
    """Mean entropy of X predictions (AdaMerging, arXiv 2310.02575), scalar."""
    return torch.stack([entropy(one) for one in log_p]).mean()


def distillation(log_p: Sequence[Tensor], anchors: Sequence[Tensor]) -> Tensor:
    """Mean over prompts and adapters of KL(p_k || p), temperature 1 (MergeRec, arXiv 2601.01753).

    MergeRec adds a recommendation loss on its pseudo-users; here the single adapters teach alone.

    Args:
        log_p: X predictions (O,) of the mix.
        anchors: X tensors (K, O), the predictions of the single adapters.
    """
    rows = [divergence(own, one).mean() for one, own in zip(log_p, anchors, strict=True)]
    return torch.stack(rows).mean()


def clicks(log_p: Sequence[Tensor], targets: Sequence[int]) -> Tensor:
    """Mean negative log probability of what came next, index `targets` of each prediction."""
    return torch.stack([-one[at] for one, at in zip(log_p, targets, strict=True)]).mean()


def is_reliable(log_p: Tensor, max_entropy_share: float) -> bool:
    """Whether a prediction's entropy is below a share of log O (EATA, arXiv 2204.02610)."""
    return float(entropy(log_p.detach())) < max_entropy_share * math.log(len(log_p))


def anchored(
    log_p: Sequence[Tensor],
    anchors: Sequence[Tensor],
    spread: Tensor,
    *,
    divergence_weight: float,
    spread_weight: float,
    max_entropy_share: float,
) -> tuple[Tensor, int]:
    """Entropy that stays near the single adapters and does not collapse.

    The mean over reliable prompts of `H(p) + divergence_weight * mean_k JS(p, p_k)`, less
    `spread_weight` times the entropy of the mean prediction (SHOT, arXiv 2002.08546). Where
    no prompt is reliable all count.

    Args:
        log_p: X predictions (O,) of the mix.
        anchors: X tensors (K, O), the predictions of the single adapters.
        spread: entropy of the mean of all X predictions.
        divergence_weight: of the Jensen-Shannon divergences.
        spread_weight: of `spread`.
        max_entropy_share: a prompt is reliable if its entropy is below this share of log O.

    Returns:
        The loss, and how many prompts counted.
    """
    chosen = [x for x, one in enumerate(log_p) if is_reliable(one, max_entropy_share)]
    chosen = chosen or list(range(len(log_p)))
    rows = [
        entropy(log_p[x]) + divergence_weight * jensen_shannon(log_p[x], anchors[x]).mean()
        for x in chosen
    ]
    return torch.stack(rows).mean() - spread_weight * spread, len(chosen)
