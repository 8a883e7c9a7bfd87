"""Weights of adapters, learned by gradient: mostly without labels, on prompts of the domain.

After AdaMerging (arXiv 2310.02575) and RecCocktail (arXiv 2502.08271): a few numbers set the weight
of every adapter in every linear layer (core/parametrisation.py), start at the uniform mix, and an
optimiser lowers an objective of the mix's predictions (core/objectives.py). The model is frozen:
one forward and one backward pass per prompt, in which nothing but activations has a gradient.

Letters: L adapted linear layers, G groups of them, K adapters, O options of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rc_ray.core import objectives
from rc_ray.core.adapters import Adapter, first_adapted_layer
from rc_ray.core.generation import GeneratedBatch
from rc_ray.core.model import AdapterMix
from rc_ray.core.objectives import Outcome
from rc_ray.core.parametrisation import Parametrisation
from rc_ray.core.predictions import CalibratedScore, Predictions, PromptBatch, UnlabeledPrompt
from rc_ray.core.ranking import Ranker
from rc_ray.mix_config import LearnedMix, SearchedMix

__all__ = [
    "CalibratedScore",
    "UnlabeledPrompt",
    "WeightingStep",
    "learn_weights",
    "measure_objective",
    "num_weighting_steps",
]


@dataclass(frozen=True)
class WeightingStep:
    """One step of the optimiser: the batch before it, the weights after it."""

    step: int
    entropy: float
    """Mean entropy of the batch's predictions, in nats."""
    weights: dict[str, list[float]]
    """Layer name -> K weights."""
    objective: float
    """What is lowered, its regulariser included."""
    mean_prediction_entropy: float
    """Entropy of the batch's mean prediction, in nats; a collapse lowers it."""
    num_reliable: int
    """Prompts of the batch that counted."""


def num_weighting_steps(num_prompts: int, config: LearnedMix | SearchedMix) -> int:
    """Steps that `learn_weights`, or evaluations that `search_weights`, will yield."""
    if isinstance(config, SearchedMix):
        return config.num_evaluations
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
    """Lower the objective step by step; the last yield holds the result.

    Args:
        ranker: of the target domain; its base LLM carries no other adapter meanwhile.
        adapters: spirit and ingredient, or any K of one or more.
        prompts: of users that are never scored, or `pseudo_users` for `distillation`.
        config: all but `prompts_of`, `num_prompts` and `max_titles`, by which prompts and ranker
            were made.
        seed: order of the prompts.
        with_prior: take the likelihood with the prior inside the trie.
        micro_batch_size: prompts whose gradients are held at once; changes memory, not the result.
        calibration: weights and prior of `score: calibrated`.

    Raises:
        FloatingPointError: the objective or a weight is not finite; the message names the step, and
            the learning rate where that is what to lower.
        ValueError: there are no prompts, or the settings do not fit each other or the prompts; the
            message names the field.
    """
    _check(ranker, prompts, config, calibration)
    mix = AdapterMix(adapters)
    shape = Parametrisation(
        mix.modules, len(adapters), config.granularity, config.parametrisation, config.temperature
    )
    start = shape.start().to(ranker.lm.device)
    parameters = start.clone().requires_grad_(True)  # (G, K)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.SGD
    optimizer = kind([parameters], lr=config.learning_rate)
    batches = _batches(
        ranker, adapters, prompts, config, seed, with_prior, micro_batch_size, calibration
    )
    step = 0
    for _ in range(config.num_epochs):
        for batch, _ in batches:
            optimizer.zero_grad(set_to_none=True)
            weights = shape.weights(parameters)  # (L, K)
            # A leaf of its own: parts of a batch free their graphs before the next one runs.
            acting = weights.detach().requires_grad_(True)
            with ranker.lm.using(mix.with_weights(acting)):
                outcome = batch.backward()
            pull = config.pull * (parameters - start).square().sum()
            objective = float(outcome.loss.detach() + pull.detach())
            _check_objective(objective, step, config)
            slopes = torch.zeros_like(acting) if acting.grad is None else acting.grad
            torch.autograd.backward([weights, pull], [slopes, torch.ones_like(pull)])
            _update(optimizer, step, config)
            with torch.no_grad():
                rows = shape.weights(parameters).double().tolist()
            _check_weights(rows, step, config)
            yield WeightingStep(
                step=step,
                entropy=outcome.entropy,
                weights=dict(zip(mix.modules, rows, strict=True)),
                objective=objective,
                mean_prediction_entropy=outcome.mean_prediction_entropy,
                num_reliable=outcome.num_reliable,
            )
            step += 1


def measure_objective(
    ranker: Ranker,
    adapters: Sequence[Adapter],
    prompts: Sequence[UnlabeledPrompt],
    config: LearnedMix,
    seed: int,
    weights: Mapping[str, Sequence[float]],
    *,
    with_prior: bool = False,
    micro_batch_size: int | None = None,
    calibration: CalibratedScore | None = None,
) -> float:
    """The objective of a finished mix: mean over all prompts, without the pull to the start.

    The steps of `learn_weights` tell it on one batch each, before their update; mixes are compared
    by this.

    Args:
        ranker: of the domain.
        adapters: K.
        prompts: those that the weights were learned on.
        config: with which they were learned.
        seed: order of the prompts.
        weights: layer name -> K weights.
        with_prior: as in `learn_weights`.
        micro_batch_size: as in `learn_weights`.
        calibration: as in `learn_weights`.

    Raises:
        ValueError: as `learn_weights` does.
    """
    _check(ranker, prompts, config, calibration)
    mix = AdapterMix(adapters)
    rows = torch.tensor([weights[name] for name in mix.modules], device=ranker.lm.device)  # (L, K)
    total = 0.0
    for batch, num_prompts in _batches(
        ranker, adapters, prompts, config, seed, with_prior, micro_batch_size, calibration
    ):
        # Batches know no other way to their loss; the slopes fall on a leaf that nobody reads.
        with ranker.lm.using(mix.with_weights(rows.clone().requires_grad_(True))):
            total += num_prompts * float(batch.backward().loss.detach())
    return total / len(prompts)


def _check_objective(objective: float, step: int, config: LearnedMix) -> None:
    if math.isfinite(objective):
        return
    if step == 0:  # nothing is learned yet
        raise FloatingPointError(
            f"the objective of the equal mix is {objective}; check the training losses of its "
            "adapters"
        )
    raise _diverged(step, f"the objective is {objective}", config)


def _update(optimizer: torch.optim.Optimizer, step: int, config: LearnedMix) -> None:
    try:
        optimizer.step()
    except RuntimeError as error:  # of a rate that single precision does not hold
        if "overflow" not in str(error):
            raise
        raise _diverged(step, "the update overflows", config) from None


def _check_weights(rows: Sequence[Sequence[float]], step: int, config: LearnedMix) -> None:
    for weight in (weight for row in rows for weight in row):
        if not math.isfinite(weight):
            raise _diverged(step, f"a weight is {weight}", config)


def _diverged(step: int, what: str, config: LearnedMix) -> FloatingPointError:
    return FloatingPointError(
        f"at step {step} of the learning {what}; lower `learning_rate` ({config.learning_rate:g})"
    )


def _batches(
    ranker: Ranker,
    adapters: Sequence[Adapter],
    prompts: Sequence[UnlabeledPrompt],
    config: LearnedMix,
    seed: int,
    with_prior: bool,
    micro_batch_size: int | None,
    calibration: CalibratedScore | None,
) -> list[tuple[_TitleBatch | GeneratedBatch, int]]:
    """The prompts in the batches of every epoch, each with their number."""
    order = np.random.default_rng(seed).permutation(len(prompts)).tolist()
    batches: list[tuple[_TitleBatch | GeneratedBatch, int]] = []
    for first in range(0, len(order), config.batch_size):
        chosen = [prompts[x] for x in order[first : first + config.batch_size]]
        if config.objective == "vocabulary_entropy":
            generated = GeneratedBatch(
                ranker,
                chosen,
                num_tokens=config.num_tokens,
                micro_batch_size=micro_batch_size,
                shared_layers=first_adapted_layer(adapters),
            )
            batches.append((generated, len(chosen)))
            continue
        packed = PromptBatch(
            ranker,
            chosen,
            over_catalogue=config.over == "catalogue",
            with_prior=with_prior,
            calibration=calibration if config.score == "calibrated" else None,
            micro_batch_size=micro_batch_size,
            # Layers below the first adapted one do not depend on the weights: run once.
            shared_layers=first_adapted_layer(adapters),
        )
        batches.append((_TitleBatch(ranker, adapters, packed, config), len(chosen)))
    return batches


class _TitleBatch:
    """Prompts of one step with an objective of predictions over titles."""

    def __init__(
        self,
        ranker: Ranker,
        adapters: Sequence[Adapter],
        packed: PromptBatch,
        config: LearnedMix,
    ) -> None:
        self._packed = packed
        self._config = config
        self._anchors: list[Tensor] = []
        if config.objective in ("anchored", "distillation"):
            single = []
            for adapter in adapters:
                with ranker.lm.using(AdapterMix([adapter])):
                    single.append(packed.predict().log_p)
            self._anchors = [torch.stack(own) for own in zip(*single, strict=True)]  # (K, O) each

    def backward(self) -> Outcome:
        return self._packed.backward(self._loss, is_mean=self._config.objective != "anchored")

    def _loss(self, found: Predictions) -> Outcome:
        config, log_p = self._config, found.log_p
        mean = objectives.mean_entropy(log_p)
        spread = objectives.mean_prediction_entropy(log_p, found.places, self._packed.num_places)
        num_reliable = len(log_p)
        if config.objective == "entropy":
            loss = mean
        elif config.objective == "clicks":
            loss = objectives.clicks(log_p, self._packed.target_indices(found))
        elif config.objective == "distillation":
            loss = objectives.distillation(log_p, [self._anchors[x] for x in found.prompts])
        else:
            loss, num_reliable = objectives.anchored(
                log_p,
                [self._anchors[x] for x in found.prompts],
                spread,
                divergence_weight=config.divergence_weight,
                spread_weight=config.spread_weight,
                max_entropy_share=config.max_entropy_share,
            )
        return Outcome(loss, float(mean.detach()), float(spread.detach()), num_reliable)


def _check(
    ranker: Ranker,
    prompts: Sequence[UnlabeledPrompt],
    config: LearnedMix,
    calibration: CalibratedScore | None,
) -> None:
    if not prompts:
        raise ValueError("the merge needs unlabeled prompts; the domain has none")
    if config.objective == "clicks" and any(prompt.target is None for prompt in prompts):
        raise ValueError("`objective: clicks` needs prompts whose next item is known")
    if config.objective == "vocabulary_entropy":
        if config.over != "candidates" or config.score != "likelihood":
            raise ValueError(
                "`objective: vocabulary_entropy` is of the LLM's own tokens; leave out `over` and "
                "`score`"
            )
    elif config.over == "catalogue" and ranker.renderer.style == "instruct":
        raise ValueError(
            "`over: catalogue` does not go with `style: instruct`, which lists the candidates in "
            "the prompt; use `over: candidates`"
        )
    if config.score == "calibrated" and calibration is None:
        raise ValueError("`score: calibrated` needs the weights of the score's two corrections")
