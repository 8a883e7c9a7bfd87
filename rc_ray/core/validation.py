"""Validation during training: the loss on held-out next titles, the best adapter, when to stop.

The targets are the validation targets of scored users, the title after a user's whole training
history. No test target and no target of an unlabeled user is ever met.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rc_ray.core.adapters import Adapter
from rc_ray.core.batches import Batch, Example, count_targets, pack
from rc_ray.core.training_plan import TrainingPlan


class HeldOutTitles:
    """Validation users of a plan's domains, each with one next title to be told.

    Where the plan has an `own_share`, those of its first domain: the adapter is for that one, and
    in a sample of all users a small domain has no say.

    Args:
        plan: gives the domains, the form of the examples, their length limits and the seed.
        num_histories: at most so many users, a seeded sample.
    """

    def __init__(self, plan: TrainingPlan, num_histories: int) -> None:
        self.plan = plan
        names = list(plan.domains)
        pool = [
            (name, place)
            for name in (names if plan.own_share is None else names[:1])
            for place in range(len(plan.domains[name].cases("valid", "warm", "scored")))
        ]
        if num_histories < len(pool):
            rng = np.random.default_rng((plan.seed, 2))
            chosen = np.sort(rng.choice(len(pool), num_histories, replace=False))
            pool = [pool[int(place)] for place in chosen]
        examples = [self._example(name, place) for name, place in pool]
        told = [example for example in examples if count_targets([example], plan.tries)]
        self.examples = sorted(told, key=lambda example: -len(example.tokens))

    def __len__(self) -> int:
        return len(self.examples)

    def batches(self, rank: int = 0, world_size: int = 1) -> list[tuple[Batch, bool]]:
        """One worker's share and whether it counts: every worker gets the same number of batches.

        ZeRO-3 gathers weights in every forward pass, which all workers must make together; a worker
        without an example left repeats one that does not count.
        """
        config = self.plan.config
        size = config.micro_batch_size or max(1, config.batch_size // world_size)
        num_titles = len(self.examples)
        num_tokens = sum(
            len(self.plan.title_tokens[example.catalogue][item])
            for example in self.examples
            for item, _ in example.titles
        )
        found = []
        for start in range(0, num_titles, size * world_size):
            share = self.examples[start : start + size * world_size][rank::world_size]
            batch = pack(share or self.examples[:1], self.plan.tries, self.plan.title_tokens)
            batch = replace(batch, num_global_titles=num_titles, num_global_tokens=num_tokens)
            found.append((batch, bool(share)))
        return found

    @torch.no_grad()
    def loss(
        self,
        forward: Callable[[Batch], Tensor],
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> float:
        """This worker's share of the mean negative log-likelihood; the shares add up to it.

        Args:
            forward: the training loss of a batch, see `TrainingModule`, in evaluation mode.
            device: where batches go.
            rank: of this worker.
            world_size: number of workers.

        Returns:
            Nats per title, or per token with `loss: vocabulary`; >= 0.
        """
        total = 0.0
        for batch, counts in self.batches(rank, world_size):
            value = float(forward(batch.to(device)))
            total += value / world_size if counts else 0.0
        return total

    def _example(self, name: str, place: int) -> Example:
        case = self.plan.domains[name].cases("valid", "warm", "scored")[place]
        if self.plan.config.style == "instruct":
            return self.plan.answer_example(name, case.history, case.target, case.candidates)
        titles = (*case.history, case.target)
        start = max(0, len(titles) - self.plan.config.max_titles)
        example = self.plan.titles_example(name, titles, start)
        return replace(example, titles=example.titles[-1:], earlier=case.history)


@dataclass
class BestSoFar:
    """The validations of a run: the lowest loss, the adapter that had it, and patience."""

    loss: float | None = None
    num_steps: int = 0
    """Steps that the best adapter has been trained."""
    num_since: int = 0
    """Validations since the best one."""
    adapter: Adapter | None = None

    def improves(self, loss: float) -> bool:
        return math.isfinite(loss) and (self.loss is None or loss < self.loss)

    def exhausted(self, patience: int | None) -> bool:
        """Whether so many validations brought no new best."""
        return patience is not None and self.num_since >= patience
