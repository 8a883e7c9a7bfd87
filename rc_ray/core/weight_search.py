"""Weights of adapters, found without gradients on a few clicks (LoraHub, arXiv 2307.13269).

LoraHub lowers the loss of a few examples plus 0.05 times the mean absolute weight, weights between
-1.5 and 1.5, by Nevergrad's NGOpt. Here CMA-ES does it (Hansen's tutorial, arXiv 1604.00772): a
population is drawn from a normal distribution whose mean, step size and covariance follow the best.

Letters: L adapted linear layers, G groups of them, K adapters, D = G * K dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from rc_ray.core import objectives
from rc_ray.core.adapters import Adapter, first_adapted_layer
from rc_ray.core.model import AdapterMix
from rc_ray.core.parametrisation import Parametrisation
from rc_ray.core.predictions import PromptBatch, UnlabeledPrompt
from rc_ray.core.ranking import Ranker
from rc_ray.core.weighting import WeightingStep
from rc_ray.mix_config import SearchedMix

Floats = npt.NDArray[np.float64]

_START_SHARE = 0.2
"""First step size, as a share of the largest weight."""


class EvolutionStrategy:
    """(mu/mu_w, lambda)-CMA-ES with the tutorial's default settings, minimising.

    Args:
        mean: (D,) where to start.
        step_size: standard deviation of the first population in every direction.
        seed: of the draws.
    """

    def __init__(self, mean: Floats, step_size: float, seed: int) -> None:
        self.mean, self.step_size = mean.copy(), step_size
        self._rng = np.random.default_rng(seed)
        n = len(mean)
        self.population_size = 4 + int(3 * math.log(n))
        mu = self.population_size // 2
        raw = math.log((self.population_size + 1) / 2) - np.log(np.arange(1, mu + 1))
        self._shares: Floats = raw / raw.sum()
        mass = 1.0 / float((self._shares**2).sum())
        self._mass = mass
        self._c_sigma = (mass + 2) / (n + mass + 5)
        self._damping = 1 + 2 * max(0.0, math.sqrt((mass - 1) / (n + 1)) - 1) + self._c_sigma
        self._c_path = (4 + mass / n) / (n + 4 + 2 * mass / n)
        self._c_one = 2 / ((n + 1.3) ** 2 + mass)
        self._c_mu = min(1 - self._c_one, 2 * (mass - 2 + 1 / mass) / ((n + 2) ** 2 + mass))
        self._expected_norm = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))
        self._covariance: Floats = np.eye(n)
        self._path_sigma: Floats = np.zeros(n)
        self._path: Floats = np.zeros(n)
        self._generation = 0

    def ask(self) -> Floats:
        """A new population, (lambda, D)."""
        values, vectors = np.linalg.eigh(self._covariance)
        roots = np.sqrt(np.maximum(values, 1e-20))
        draws = self._rng.standard_normal((self.population_size, len(self.mean)))
        population: Floats = self.mean + self.step_size * (draws * roots) @ vectors.T
        return population

    def tell(self, population: Floats, losses: Sequence[float]) -> None:
        """Learn from a population, (lambda, D), which may have been clipped to bounds."""
        n = len(self.mean)
        best = population[np.argsort(losses, kind="stable")[: len(self._shares)]]
        steps = (best - self.mean) / self.step_size  # (mu, D)
        step = self._shares @ steps
        values, vectors = np.linalg.eigh(self._covariance)
        whitened = vectors @ ((vectors.T @ step) / np.sqrt(np.maximum(values, 1e-20)))
        self._generation += 1
        c = self._c_sigma
        self._path_sigma = (1 - c) * self._path_sigma + math.sqrt(
            c * (2 - c) * self._mass
        ) * whitened
        norm = float(np.linalg.norm(self._path_sigma))
        unbiased = norm / math.sqrt(1 - (1 - c) ** (2 * self._generation))
        is_short = unbiased < (1.4 + 2 / (n + 1)) * self._expected_norm
        c = self._c_path
        self._path = (1 - c) * self._path + is_short * math.sqrt(c * (2 - c) * self._mass) * step
        lost = (1 - is_short) * c * (2 - c)
        self._covariance = (
            (1 - self._c_one - self._c_mu + self._c_one * lost) * self._covariance
            + self._c_one * np.outer(self._path, self._path)
            + self._c_mu * (steps.T * self._shares) @ steps
        )
        self.mean = self.mean + self.step_size * step
        self.step_size *= math.exp(self._c_sigma / self._damping * (norm / self._expected_norm - 1))


@torch.no_grad()
def search_weights(
    ranker: Ranker,
    adapters: Sequence[Adapter],
    prompts: Sequence[UnlabeledPrompt],
    config: SearchedMix,
    seed: int,
    *,
    with_prior: bool = False,
) -> Iterator[WeightingStep]:
    """Evaluate one mix after another; the last yield holds the best.

    The first mix is the uniform one, so the result is never worse than it on these prompts.

    Args:
        ranker: of the target domain; its base LLM carries no other adapter meanwhile.
        adapters: any K of one or more.
        prompts: clicks of users that are never scored; their `target` says what came next.
        config: all but `num_prompts` and `max_titles`, by which prompts and ranker were made.
        seed: of the draws.
        with_prior: take the likelihood with the prior inside the trie.

    Yields:
        After each evaluation its objective and entropies, and the best weights until then.

    Raises:
        ValueError: there are no prompts, or one without `target`; or the uniform mix lies beyond
            `max_weight`.
    """
    if not prompts:
        raise ValueError("the search needs validation clicks; the domain has none")
    if any(prompt.target is None for prompt in prompts):
        raise ValueError("`method: lorahub` needs prompts whose next item is known")
    if config.max_weight < 1 / len(adapters):
        raise ValueError(
            f"`max_weight` is {config.max_weight:g}, but the search begins with the weight "
            f"1/{len(adapters)}"
        )
    mix = AdapterMix(adapters)
    shape = Parametrisation(mix.modules, len(adapters), config.granularity, "free")
    batch = PromptBatch(
        ranker,
        prompts,
        over_catalogue=False,
        with_prior=with_prior,
        calibration=None,
        micro_batch_size=None,
        shared_layers=first_adapted_layer(adapters),
    )
    start = shape.start().double().flatten().numpy()
    strategy = EvolutionStrategy(start, _START_SHARE * config.max_weight, seed)
    best_loss, best = math.inf, start
    population, losses = start[None], list[float]()
    for step in range(config.num_evaluations):
        if len(losses) == len(population):
            if step > 1:
                strategy.tell(population, losses)
            population = strategy.ask().clip(-config.max_weight, config.max_weight)
            losses = []
        point = population[len(losses)]
        weights = shape.weights(torch.from_numpy(point).view(shape.shape))  # (L, K)
        with ranker.lm.using(mix.with_weights(weights.float().to(ranker.lm.device))):
            found = batch.predict()
        loss = float(objectives.clicks(found.log_p, batch.target_indices(found)))
        loss += config.l1_weight * float(np.abs(point).mean())
        losses.append(loss)
        if loss < best_loss:
            best_loss, best = loss, point
        rows = shape.weights(torch.from_numpy(best).view(shape.shape)).tolist()
        yield WeightingStep(
            step=step,
            entropy=float(objectives.mean_entropy(found.log_p)),
            weights=dict(zip(mix.modules, rows, strict=True)),
            objective=loss,
            mean_prediction_entropy=float(
                objectives.mean_prediction_entropy(found.log_p, found.places, batch.num_places)
            ),
            num_reliable=len(prompts),
        )
