"""LoRA training: what a step sees, its loss, and the step loop as a generator of metrics.

The engine protocol is that of DeepSpeed: call, `backward(loss)`, `step()`. `TorchEngine` implements
it for one device. The global batch at step n is a function of the seed and n alone, whatever the
number of workers, and the loss is divided by the targets of the *global* batch.

Letters: B rows, T tokens, H hidden size, V catalogue tokens, D trie decisions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, NotRequired, Protocol, TypedDict

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from rc_ray.core.batches import Batch, Example, count_targets, pack
from rc_ray.core.domains import Domain
from rc_ray.core.model import base_of, checkpoint_activations, decoder_hidden, output_rows
from rc_ray.core.optimizer import make_optimizer, make_schedule
from rc_ray.core.packed_attention import fits_window, install_packed_attention
from rc_ray.core.prompts import PromptRenderer
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


class _Pool:
    """The training histories of some domains, drawn without end in seeded epochs.

    Args:
        domains: prepared domains.
        seed: of the permutations.

    Raises:
        ValueError: no domain has a training history of two titles.
    """

    def __init__(self, domains: Sequence[Domain], seed: tuple[int, int]) -> None:
        self.histories = [
            (domain.name, history)
            for domain in domains
            for history in domain.train
            if len(history) > 1
        ]
        if not self.histories:
            names = ", ".join(domain.name for domain in domains)
            raise ValueError(f"no domain of {names} has a training history of two titles or more")
        self._seed = seed
        self._epochs: dict[int, np.ndarray] = {}

    def drawn(self, number: int) -> tuple[str, Sequence[int]]:
        """Domain and history of the draw with this number."""
        epoch, place = divmod(number, len(self.histories))
        if epoch not in self._epochs:
            rng = np.random.default_rng((*self._seed, epoch))
            # A batch may straddle two epochs, seldom more.
            self._epochs = {e: p for e, p in self._epochs.items() if e >= epoch - 1}
            self._epochs[epoch] = rng.permutation(len(self.histories))
        return self.histories[int(self._epochs[epoch][place])]


class TrainingPlan:
    """The examples of every step, drawn from the training histories of some domains.

    Histories of all domains are pooled; each epoch is one seeded permutation of them. With
    `own_share`, the first domain and the others are two pools, drawn from in that proportion, each
    in epochs of its own: a small domain does not drown in large ones.

    Args:
        domains: prepared domains.
        renderer: of the style in `config`.
        config: style, batch size and length limits.
        seed: of permutations, crops and listed candidates.
        num_listed: candidates beside the target that an `instruct` prompt lists, as far as the
            domain has so many.
        own_share: of all examples, what the first domain gives; in (0, 1).

    Raises:
        ValueError: no domain has a training history of two titles; with `own_share`, either the
            first has none or all others have none.
    """

    def __init__(
        self,
        domains: Sequence[Domain],
        renderer: PromptRenderer,
        config: TrainingConfig,
        seed: int,
        *,
        num_listed: int,
        own_share: Fraction | None = None,
    ) -> None:
        self.config = config
        self.num_listed = num_listed
        self.renderer = renderer
        self.seed = seed
        self.domains = {domain.name: domain for domain in domains}
        self.title_tokens = {
            domain.name: [renderer.title(title) for title in domain.titles] for domain in domains
        }
        self.tries = {
            domain.name: CatalogueTrie(self.title_tokens[domain.name], domain.num_train)
            for domain in domains
        }
        self.shown = {
            name: [
                renderer.shown(title, self.tries[name].telling_depth(item))
                for item, title in enumerate(titles)
            ]
            for name, titles in self.title_tokens.items()
        }
        """By domain, the tokens of each title as a history shows it."""
        self._own_share = own_share
        if own_share is None:
            self._pools = [_Pool(domains, (seed, 0))]
        else:
            self._pools = [_Pool(domains[:1], (seed, 2)), _Pool(domains[1:], (seed, 3))]

    @property
    def num_histories(self) -> int:
        return sum(len(pool.histories) for pool in self._pools)

    def examples(self, step: int) -> list[Example]:
        """The global batch of a step."""
        size = self.config.batch_size
        found = []
        for slot in range(size):
            name, history = self._drawn(step * size + slot)
            rng = np.random.default_rng((self.seed, 1, step, slot))
            make = self._instruct if self.config.style == "instruct" else self._sequence
            found.append(make(name, history, rng))
        return found

    def batches(self, step: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
        """One worker's share of a step: every `world_size`-th example by falling length.

        Cut in parts of `micro_batch_size` neighbours, the longest first; each part counts the
        targets of the whole global batch.
        """
        examples = sorted(self.examples(step), key=lambda example: -len(example.tokens))
        num_titles = count_targets(examples, self.tries)
        num_tokens = sum(
            len(self.title_tokens[example.catalogue][item])
            for example in examples
            for item, _ in example.titles
        )
        share = examples[rank::world_size]
        size = self.config.micro_batch_size or len(share)
        return [
            replace(
                pack(share[start : start + size], self.tries, self.title_tokens),
                num_global_titles=num_titles,
                num_global_tokens=num_tokens,
            )
            for start in range(0, len(share), size)
        ]

    def _drawn(self, number: int) -> tuple[str, Sequence[int]]:
        """Domain and history of the example with this number, counted from the first step on."""
        if self._own_share is None:
            return self._pools[0].drawn(number)
        # Spread evenly: of the first n examples, floor(n * share) are the first domain's.
        num_own = math.floor(number * self._own_share)
        if math.floor((number + 1) * self._own_share) > num_own:
            return self._pools[0].drawn(num_own)
        return self._pools[1].drawn(number - num_own)

    def _sequence(self, name: str, history: Sequence[int], rng: np.random.Generator) -> Example:
        start = int(rng.integers(max(0, len(history) - self.config.max_titles) + 1))
        return self.titles_example(name, history, start)

    def titles_example(self, name: str, history: Sequence[int], start: int) -> Example:
        """Up to `max_titles` titles from `start` on, each a target; the oldest go if too long."""
        end = start + self.config.max_titles
        header = self.renderer.header(name)
        budget = self.config.max_tokens - len(header)
        sizes = [len(self.shown[name][item]) for item in history[start:end]]
        while sum(sizes) > budget and sizes:
            start += 1
            sizes.pop(0)
        tokens, titles = list(header), []
        for item in history[start:end]:
            titles.append((item, len(tokens)))
            tokens.extend(self.shown[name][item])
        return Example(name, tuple(tokens), tuple(titles), earlier=tuple(history[:start]))

    def _instruct(self, name: str, history: Sequence[int], rng: np.random.Generator) -> Example:
        domain = self.domains[name]
        place = int(rng.integers(1, len(history)))
        target = history[place]
        seen = set(history)
        others = [item for item in range(len(domain.titles)) if item not in seen]
        others = [item for item in others if not domain.cold[item]]
        count = min(self.num_listed, len(others))
        listed = [int(i) for i in rng.choice(others, size=count, replace=False)] + [target]
        listed = [listed[int(i)] for i in rng.permutation(len(listed))]
        return self.answer_example(name, history[:place], target, listed)

    def answer_example(
        self, name: str, history: Sequence[int], target: int, listed: Sequence[int]
    ) -> Example:
        """The prompt that lists candidates, answered with the target's title."""
        domain = self.domains[name]
        shown = list(history[-self.config.max_titles :])
        answer = self.title_tokens[name][target]
        while True:
            tokens = self.renderer.prompt(
                name,
                [domain.titles[item] for item in shown],
                [domain.titles[item] for item in listed],
            )
            if len(tokens) + len(answer) <= self.config.max_tokens or not shown:
                break
            shown.pop(0)
        return Example(name, (*tokens, *answer), ((target, len(tokens)),), earlier=tuple(history))


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
