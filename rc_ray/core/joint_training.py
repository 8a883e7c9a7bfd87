"""The step loop of several domains' LoRAs on one base: a step of each, in as few passes as fit.

Every domain has its own batch, loss, gradient norm, optimiser and schedule, so what it learns is
what it would learn alone, up to the order of summation.

Letters: B rows, T tokens, H hidden size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rc_ray.core.adapters import Adapter
from rc_ray.core.batches import Batch
from rc_ray.core.lora_bank import LoraBank
from rc_ray.core.model import LanguageModel, decoder_hidden
from rc_ray.core.training import StepMetrics, TorchEngine, TrainingModule, TrainingPlan
from rc_ray.core.validation import BestSoFar, HeldOutTitles

_MAX_PADDING = 0.1
"""Share of a pass that may be padding put there to join domains of different row length."""


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
    """Some rows of one member."""

    name: str
    batch: Batch


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
        tokens_per_pass: domains share a forward pass as long as it has no more tokens, padding
            included. It bounds the memory of activations however many domains there are, but for
            the single part of a batch that is larger by itself.
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
            parts += [Part(name, batch) for batch in batches]
        losses = {part.name: torch.zeros((), device=self.lm.device) for part in parts}
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
        loss = member.held_out.loss(lambda batch: self._loss(name, batch), self.lm.device)
        if member.best.improves(loss):
            member.best = BestSoFar(loss, num_done, adapter=self.bank.adapter(name))
        else:
            member.best.num_since += 1
        metrics["valid_loss"] = loss
        member.finished |= member.best.exhausted(config.patience)

    def _loss(self, name: str, batch: Batch) -> Tensor:
        with self.bank.rows([(name, batch.input_ids.shape[0])]):
            hidden = decoder_hidden(self.lm.model, batch.input_ids, batch.position_ids, batch.mask)
        return self.members[name].engine.module.loss(hidden, batch)

    def _backward(self, parts: Sequence[Part]) -> list[tuple[str, Tensor]]:
        """One forward and backward pass; the loss of each part."""
        input_ids, position_ids, mask = joined([part.batch for part in parts])
        device = self.lm.device
        counts = [(part.name, part.batch.input_ids.shape[0]) for part in parts]
        with self.bank.rows(counts):
            hidden = decoder_hidden(
                self.lm.model,
                input_ids.to(device),
                None if position_ids is None else position_ids.to(device),
                None if mask is None else mask.to(device),
            )  # (B, T, H)
        losses = []
        for part, rows in zip(parts, hidden.split([count for _, count in counts]), strict=True):
            own = rows[:, : part.batch.input_ids.shape[1]]
            module = self.members[part.name].engine.module
            losses.append((part.name, module.loss(own, part.batch.to(device))))
        # No matrix belongs to two members, so neither do the gradients, NaN included.
        torch.stack([loss for _, loss in losses]).sum().backward()
        return [(name, loss.detach()) for name, loss in losses]


def passes(parts: Sequence[Part], tokens_per_pass: int) -> list[list[Part]]:
    """Put parts of like row length together, the longest rows first.

    Args:
        parts: in any order.
        tokens_per_pass: rows times the longest row of a pass of several parts are no more.
    """
    found: list[list[Part]] = []
    # Masked attention costs more than causal attention: no part pays for its neighbour's mask.
    order = sorted(parts, key=lambda p: (p.batch.mask is None, -p.batch.input_ids.shape[1]))
    for part in order:
        if found and _fits([*found[-1], part], tokens_per_pass):
            found[-1].append(part)
        else:
            found.append([part])
    return found


def _fits(parts: Sequence[Part], tokens_per_pass: int) -> bool:
    if (parts[0].batch.mask is None) != (parts[-1].batch.mask is None):
        return False
    shapes = [part.batch.input_ids.shape for part in parts]
    num_cells = sum(rows for rows, _ in shapes) * max(length for _, length in shapes)
    padding = num_cells - sum(rows * length for rows, length in shapes)
    return num_cells <= tokens_per_pass and padding <= _MAX_PADDING * num_cells


def joined(batches: Sequence[Batch]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rows of several batches, all with a mask or all without, padded on the right.

    Returns:
        input_ids (B, T); position_ids (B, T) and mask (B, 1, T, T), or None without masks.
    """
    length = max(batch.input_ids.shape[1] for batch in batches)

    def widened(x: Tensor) -> Tensor:
        return nn.functional.pad(x, (0, length - x.shape[1]))

    input_ids = torch.cat([widened(batch.input_ids) for batch in batches])
    masks = [batch.mask for batch in batches if batch.mask is not None]
    if not masks:
        return input_ids, None, None
    position_ids = torch.cat(
        [widened(batch.position_ids) for batch in batches if batch.position_ids is not None]
    )
    # Padding sees itself: a row that sees nothing would be NaN.
    mask = torch.eye(length, dtype=torch.bool).repeat(len(input_ids), 1, 1, 1)
    start = 0
    for own in masks:
        size = own.shape[-1]
        mask[start : start + len(own), :, :size, :size] |= own
        start += len(own)
    return input_ids, position_ids, mask
