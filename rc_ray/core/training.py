"""LoRA training: the loss of a batch, and the step loop as a generator of metrics.

The engine protocol is that of DeepSpeed: call, `backward(loss)`, `step()`. `TorchEngine` implements
it for one device. The loss is divided by the targets of the *global* batch, so the number of
workers does not change it.

Letters: B rows, T tokens, H hidden size, V catalogue tokens, D trie decisions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, NotRequired, Protocol, TypedDict

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from rc_ray.core.batches import Batch
from rc_ray.core.model import base_of, checkpoint_activations, decoder_hidden, output_rows
from rc_ray.core.optimizer import make_optimizer, make_schedule
from rc_ray.core.packed_attention import fits_window, install_packed_attention
from rc_ray.core.training_plan import TrainingPlan
from rc_ray.core.trie import CatalogueTrie
from rc_ray.training_config import TrainingConfig


class StepMetrics(TypedDict):
    """What one optimiser step leaves; the sum of `loss` over workers is the global mean."""

    step: int
    loss: float
    """This worker's share of the mean negative log-likelihood, nats per title (`trie`) or token."""
    num_titles: int
    num_tokens: int
    learning_rate: float
    seconds: float
    valid_loss: NotRequired[float]
    """Mean over all workers, where the run validates after this step."""


class Engine(Protocol):
    """What the step loop needs; a DeepSpeed engine is one."""

    def __call__(self, batch: Batch) -> Tensor: ...

    def backward(self, loss: Tensor) -> Any: ...

    def step(self) -> Any: ...


class TrainingModule(nn.Module):
    """A LoRA model whose forward pass is the loss of a batch.

    Args:
        model: the trainable model; a bare one where something else trains it.
        tries: by catalogue.
        config: which loss.
        world_size: workers whose gradients the engine averages.
    """

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        tries: Mapping[str, CatalogueTrie],
        config: TrainingConfig,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.world_size = world_size
        checkpoint_activations(model, config.activation_checkpointing)
        self.is_packed = install_packed_attention(base_of(model))
        self.tries = dict(tries)
        # Frozen rows are copied once: the projection then costs the catalogue's tokens only, and
        # ZeRO-3 need not gather the whole vocabulary at every step.
        for name, trie in self.tries.items():
            rows = output_rows(model, trie.vocabulary_ids)
            self.register_buffer(f"rows_{name}", rows, persistent=False)

    def forward(self, batch: Batch) -> Tensor:
        """Sum of this share's negative log-likelihoods over the global number of targets.

        Multiplied by the number of workers, since engines average gradients over them.
        """
        batch = self.arranged(batch)
        if self.reads_packed(batch):
            hidden = decoder_hidden(
                self.model, batch.input_ids, batch.position_ids, lengths=batch.lengths
            )
        else:
            hidden = decoder_hidden(self.model, batch.input_ids, batch.position_ids, batch.mask)
        return self.loss(hidden, batch)

    def reads_packed(self, batch: Batch) -> bool:
        """Whether the model reads the batch's texts one behind the other in one row."""
        return self.is_packed and fits_window(base_of(self.model), batch.lengths)

    def arranged(self, batch: Batch) -> Batch:
        """The batch in the rows that the model reads it in."""
        if self.reads_packed(batch):
            return batch.flattened()
        # A mask of ours would let a layer look past its window; transformers' own does not.
        return batch if fits_window(base_of(self.model), batch.lengths) else batch.apart()

    def loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        """The same from the last hidden states of the batch's rows, (B, T, H)."""
        flat = hidden.reshape(-1, hidden.shape[-1])  # (B * T, H)
        if self.config.loss == "vocabulary":
            base = base_of(self.model)
            logits = base.get_output_embeddings()(flat[batch.token_positions])  # (Y, vocabulary)
            total = nn.functional.cross_entropy(
                logits.float(), batch.token_targets, reduction="sum"
            )
            return total * self.world_size / max(batch.num_global_tokens, 1)
        total = flat.sum() * 0.0
        for name, decisions in batch.decisions.items():
            rows: Tensor = getattr(self, f"rows_{name}")
            logits = flat[decisions.positions].float() @ rows.float().T  # (D, V)
            chosen = self.tries[name].decision_log_probs(
                logits,
                decisions.nodes,
                decisions.edges,
                with_prior=self.config.prior_in_loss,
                taken=decisions.taken,
            )
            total = total - chosen.sum()
        return total * self.world_size / max(batch.num_global_titles, 1)


class TorchEngine:
    """The engine protocol on one device, with gradient clipping and a learning-rate schedule.

    As with DeepSpeed, `backward` takes the mean over the parts of a step, and `step` acts on the
    last part's call.
    """

    def __init__(self, module: TrainingModule, config: TrainingConfig) -> None:
        self.module = module
        self.num_parts = config.num_parts(module.world_size)
        self._num_calls = 0
        self.max_grad_norm = config.max_grad_norm
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.parameters, config)
        self.schedule = make_schedule(self.optimizer, config)

    def __call__(self, batch: Batch) -> Tensor:
        loss: Tensor = self.module(batch)
        return loss

    def backward(self, loss: Tensor) -> None:
        (loss / self.num_parts).backward()

    def step(self) -> None:
        self._num_calls += 1
        if self._num_calls % self.num_parts == 0:
            self.update()

    def update(self) -> None:
        """Act on the gradients as they are."""
        nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)


def train_steps(
    engine: Engine,
    plan: TrainingPlan,
    *,
    device: torch.device,
    learning_rate: Any,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[StepMetrics]:
    """Run the remaining optimiser steps, yielding after each.

    Args:
        engine: call, backward, step.
        plan: gives the batch of each step.
        device: where batches go.
        learning_rate: called without arguments, the rate that the coming step uses.
        start_step: first step to run; a resumed run passes the number of steps done.
        rank: of this worker.
        world_size: number of workers.
    """
    for step in range(start_step, plan.config.num_steps):
        start = time.perf_counter()
        torch.manual_seed((plan.seed * 1_000_003 + step) * 1_009 + rank)  # dropout, exact on resume
        parts = plan.batches(step, rank, world_size)
        rate = float(learning_rate())
        total = torch.zeros((), device=device)
        for part in parts:
            loss = engine(part.to(device))
            engine.backward(loss * len(parts))  # engines take the mean over the parts
            engine.step()
            total += loss.detach()
        yield StepMetrics(
            step=step,
            loss=total.item() / world_size,
            num_titles=sum(part.num_titles for part in parts),
            num_tokens=sum(part.num_tokens for part in parts),
            learning_rate=rate,
            seconds=time.perf_counter() - start,
        )
