"""The step loop of several domains' LoRAs on one base: a step of each, in as few passes as fit.

Every domain has its own batch, loss, gradient norm, optimiser and schedule, so what it learns is
what it would learn alone, up to the order of summation.

Letters: N tokens, H hidden size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from rc_ray.core.adapters import Adapter
from rc_ray.core.batches import Batch
from rc_ray.core.lora_bank import LoraBank
from rc_ray.core.model import LanguageModel, decoder_hidden
from rc_ray.core.training import StepMetrics, TorchEngine, TrainingModule
from rc_ray.core.training_plan import TrainingPlan
from rc_ray.core.validation import BestSoFar, HeldOutTitles


@dataclass
class Member:
    """One domain in the group."""

    plan: TrainingPlan
    engine: TorchEngine
    """Over the domain's own LoRA; its module computes the loss of hidden states."""
    held_out: HeldOutTitles | None = None
    """What is validated on; None without validation."""
    num_steps_done: int = 0
    best: BestSoFar = field(default_factory=BestSoFar)
    finished: bool = False
    """Whether no step remains, by their number or by `patience`."""


class Part(NamedTuple):
    """What one member has to read in a pass."""

    name: str
    batch: Batch
    is_packed: bool
    """Whether the texts stand one behind the other in one row."""

    @property
    def num_tokens(self) -> int:
        """Padding included."""
        return self.batch.input_ids.numel()


def make_member(lm: LanguageModel, bank: LoraBank, name: str, plan: TrainingPlan) -> Member:
    """A member that trains the bank's LoRA of this name, from its present values on."""
    module = TrainingModule(lm.model, plan.tries, plan.config)
    module.lora = bank.parameters(name)  # what the engine's optimiser gets
    config = plan.config
    held_out = HeldOutTitles(plan, config.num_valid_histories) if config.valid_every else None
    return Member(
        plan,
        TorchEngine(module.to(lm.device), config),
        held_out if held_out is not None and len(held_out) else None,
    )


class JointTraining:
    """Members that take their steps together.

    Args:
        lm: the base, which carries the bank.
        bank: has a LoRA by each member's name.
        members: by name; one that is taken out takes no further steps.
        tokens_per_pass: domains share a forward pass as long as it has no more tokens. It bounds
            the memory of activations however many domains there are, but for the single part of a
            batch that is larger by itself. A model without packed attention reads each domain in
            passes of its own.
    """

    def __init__(
        self,
        lm: LanguageModel,
        bank: LoraBank,
        members: Mapping[str, Member],
        *,
        tokens_per_pass: int,
    ) -> None:
        self.lm = lm
        self.bank = bank
        self.members = dict(members)
        self.tokens_per_pass = tokens_per_pass

    @property
    def active(self) -> list[str]:
        """Members with steps left to take."""
        return [name for name, member in self.members.items() if not member.finished]

    def result(self, name: str) -> Adapter:
        """What a member's run is for: its best adapter, the last without validation."""
        return self.members[name].best.adapter or self.bank.adapter(name)

    def drop(self, name: str) -> None:
        """Take a member out of the group; its LoRA and optimiser are forgotten."""
        del self.members[name]
        self.bank.remove(name)

    def step(self) -> dict[str, StepMetrics | Exception]:
        """The next step of every active member.

        Returns:
            By name what the step leaves, or why no batch could be made. A member whose loss is not
            finite keeps its LoRA as it was and is not one step further; the caller drops it. The
            step's seconds are shared out by tokens.
        """
        start = time.perf_counter()
        found: dict[str, Exception] = {}
        parts: list[Part] = []
        for name in self.active:
            member = self.members[name]
            try:
                batches = member.plan.batches(member.num_steps_done)
            except Exception as error:  # of this domain's data: the others go on
                found[name] = error
                continue
            parts += [self._part(name, batch) for batch in batches]
        losses = {part.name: torch.zeros((), device=self.lm.device) for part in parts}
        self.lm.model.train()
        for together in passes(parts, self.tokens_per_pass):
            for name, loss in self._backward(together):
                losses[name] += loss
        taken: dict[str, StepMetrics] = {}
        for name, loss in losses.items():
            member = self.members[name]
            own = [part.batch for part in parts if part.name == name]
            taken[name] = StepMetrics(
                step=member.num_steps_done,
                loss=loss.item(),
                num_titles=sum(batch.num_titles for batch in own),
                num_tokens=sum(batch.num_tokens for batch in own),
                learning_rate=float(member.engine.schedule.get_last_lr()[0]),
                seconds=0.0,
            )
            if math.isfinite(taken[name]["loss"]):
                member.engine.update()
                member.num_steps_done += 1
        seconds = time.perf_counter() - start
        num_tokens = sum(metrics["num_tokens"] for metrics in taken.values())
        for metrics in taken.values():
            metrics["seconds"] = seconds * metrics["num_tokens"] / num_tokens
        for name, metrics in taken.items():
            self._after_step(name, metrics)
        return {**found, **taken}

    def _after_step(self, name: str, metrics: StepMetrics) -> None:
        """Validate where the settings say so; see whether the member is done."""
        member = self.members[name]
        config, num_done = member.plan.config, member.num_steps_done
        if num_done != metrics["step"] + 1:
            return
        member.finished = num_done == config.num_steps
        due = member.finished or num_done % (config.valid_every or config.num_steps) == 0
        if member.held_out is None or not due:
            return
        self.lm.model.eval()
        loss = member.held_out.loss(lambda batch: self._loss(name, batch), self.lm.device)
        if member.best.improves(loss):
            member.best = BestSoFar(loss, num_done, adapter=self.bank.adapter(name))
        else:
            member.best.num_since += 1
        metrics["valid_loss"] = loss
        member.finished |= member.best.exhausted(config.patience)

    def _part(self, name: str, batch: Batch) -> Part:
        module = self.members[name].engine.module
        return Part(name, module.arranged(batch), module.reads_packed(batch))

    def _loss(self, name: str, batch: Batch) -> Tensor:
        part = self._part(name, batch)
        with self.bank.tokens([(name, part.num_tokens)]):
            return self._losses([part])[0]

    def _losses(self, parts: Sequence[Part]) -> list[Tensor]:
        """One forward pass; the loss of each part."""
        device = self.lm.device
        batches = [part.batch.to(device) for part in parts]
        if parts[0].is_packed:
            positions = [batch.position_ids for batch in batches if batch.position_ids is not None]
            hidden = decoder_hidden(
                self.lm.model,
                torch.cat([batch.input_ids for batch in batches], dim=1),
                torch.cat(positions, dim=1),
                lengths=[length for batch in batches for length in batch.lengths],
            )
        else:
            (batch,) = batches
            hidden = decoder_hidden(self.lm.model, batch.input_ids, batch.position_ids, batch.mask)
        owned = hidden.flatten(0, 1).split([part.num_tokens for part in parts])  # (N, H) each
        return [
            self.members[part.name].engine.module.loss(own, batch)
            for part, own, batch in zip(parts, owned, batches, strict=True)
        ]

    def _backward(self, parts: Sequence[Part]) -> list[tuple[str, Tensor]]:
        """One forward and backward pass; the loss of each part."""
        with self.bank.tokens([(part.name, part.num_tokens) for part in parts]):
            losses = self._losses(parts)
            # No matrix belongs to two members, so neither do the gradients, NaN included.
            torch.stack(losses).sum().backward()
        return [(part.name, loss.detach()) for part, loss in zip(parts, losses, strict=True)]


def passes(parts: Sequence[Part], tokens_per_pass: int) -> list[list[Part]]:
    """Put packed parts together in few passes: first fit by falling length.

    Args:
        parts: in any order.
        tokens_per_pass: a pass of several parts has no more tokens.
    """
    found: list[list[Part]] = []
    free: list[int] = []
    for part in sorted(parts, key=lambda part: -part.num_tokens):
        fits = (i for i, room in enumerate(free) if part.is_packed and part.num_tokens <= room)
        place = next(fits, None)
        if place is None:
            found.append([])
            free.append(tokens_per_pass if part.is_packed else 0)
            place = len(found) - 1
        found[place].append(part)
        free[place] -= part.num_tokens
    return found
