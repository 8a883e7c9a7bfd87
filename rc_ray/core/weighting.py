"""Label-free merge weights: per linear layer, the mixture that makes predictions least uncertain.

RecCocktail (arXiv 2502.08271) after AdaMerging (arXiv 2310.02575): `lambda[l] = softmax(w[l] / T)`,
w starts equal, and Adam lowers the mean entropy of the predictions on unlabeled prompts. Here the
prediction is the trie likelihood of the prompt's candidates, normalised over them: one pass per
prompt, no generation.

Letters: L adapted linear layers, K adapters, C candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rc_ray.core.adapters import Adapter, first_adapted_layer
from rc_ray.core.model import AdapterMix
from rc_ray.core.ranking import WITH_PRIOR, Ranker
from rc_ray.merge_config import LearnedMix


@dataclass(frozen=True)
class UnlabeledPrompt:
    """A history and a candidate list; nobody says which candidate was chosen."""

    history: tuple[str, ...]
    candidates: tuple[int, ...]
    target: int | None = None
    """Position in `candidates` of the item that came next; objective `clicks` alone reads it."""


@dataclass(frozen=True)
class CalibratedScore:
    """log p(title | history) - alpha log p(title | empty history) + gamma log prior(title)."""

    alpha: float
    gamma: float
    log_prior: np.ndarray
    """(I,) by item, in nats; any constant may be added."""


@dataclass(frozen=True)
class WeightingStep:
    """State after one optimiser step."""

    step: int
    entropy: float
    """Mean entropy of the batch's predictions before the step, in nats."""
    weights: dict[str, list[float]]
    """Layer name -> K weights after the step."""
    objective: float
    """What the step lowers, on the batch before it."""
    mean_prediction_entropy: float
    """Entropy of the batch's mean prediction before the step, in nats; a collapse lowers it."""
    num_reliable: int
    """Prompts of the batch that counted."""


def entropy(log_likelihood: Tensor) -> Tensor:
    """Entropy in nats of log-likelihoods (C,) normalised over the candidates: scalar."""
    log_p = torch.log_softmax(log_likelihood, dim=-1)
    return -(log_p.exp() * log_p).sum()


def num_weighting_steps(num_prompts: int, config: LearnedMix) -> int:
    """Optimiser steps that `learn_weights` will take."""
    return config.num_epochs * -(-num_prompts // config.batch_size)


def learn_weights(
    ranker: Ranker,
    adapters: Sequence[Adapter],
    prompts: Sequence[UnlabeledPrompt],
    config: LearnedMix,
    seed: int,
    *,
    with_prior: bool = False,
    micro_batch_size: int | None = None,
    calibration: CalibratedScore | None = None,
) -> Iterator[WeightingStep]:
    """Lower the mean prediction entropy step by step; the last yield holds the result.

    Args:
        ranker: of the target domain; its base LLM carries no other adapter meanwhile.
        adapters: spirit and ingredient, or any K.
        prompts: of users that are never scored.
        config: epochs, batch size and its parts, learning rate, temperature.
        seed: order of the prompts.
        with_prior: take the likelihood with the prior inside the trie.
        micro_batch_size: prompts whose gradients are held at once; changes memory, not the result.
        calibration: weights and prior of `score: calibrated`.

    Raises:
        ValueError: there are no prompts.
    """
    if not prompts:
        raise ValueError("the merge needs unlabeled prompts; the domain has none")
    mix = AdapterMix(adapters)
    logits = torch.zeros(len(mix.modules), len(adapters), device=ranker.lm.device)
    logits.requires_grad_(True)
    optimizer = torch.optim.Adam([logits], lr=config.learning_rate)
    # Layers below the first adapted one do not depend on the weights: run once, not every epoch.
    shared_layers = first_adapted_layer(adapters)
    order = np.random.default_rng(seed).permutation(len(prompts))
    batches = []
    for start in range(0, len(order), config.batch_size):
        chosen = [prompts[int(i)] for i in order[start : start + config.batch_size]]
        size = micro_batch_size or len(chosen)
        batches.append(
            [
                ranker.prepare(
                    [prompt.history for prompt in chosen[first : first + size]],
                    [prompt.candidates for prompt in chosen[first : first + size]],
                    shared_layers=shared_layers,
                )
                for first in range(0, len(chosen), size)
            ]
        )
    row = WITH_PRIOR if with_prior else 0
    step = 0
    for _ in range(config.num_epochs):
        for parts in batches:
            num_prompts = sum(len(part.num_candidates) for part in parts)
            mean_entropy = 0.0
            found: list[Tensor] = []
            optimizer.zero_grad(set_to_none=True)
            for part in parts:
                # Anew for every part: its backward pass frees the graph that led here.
                weights = torch.softmax(logits / config.temperature, dim=-1)  # (L, K)
                with ranker.lm.using(mix.with_weights(weights)), torch.enable_grad():
                    scores = ranker.score(part)
                    found += [torch.log_softmax(score[row].detach(), dim=-1) for score in scores]
                    loss = torch.stack([entropy(score[row]) for score in scores]).sum()
                    loss = loss / num_prompts
                    loss.backward()
                mean_entropy += loss.item()
            optimizer.step()
            with torch.no_grad():
                learned = torch.softmax(logits / config.temperature, dim=-1).cpu()
            rows = learned.double().tolist()
            yield WeightingStep(
                step,
                mean_entropy,
                dict(zip(mix.modules, rows, strict=True)),
                mean_entropy,
                float(entropy(torch.stack(found).exp().mean(dim=0).log())),
                num_prompts,
            )
            step += 1
