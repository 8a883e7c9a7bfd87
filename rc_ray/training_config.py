"""The settings of a LoRA's training, and of the base spirit's run on Ray Train."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from rc_ray.data_config import Fraction, Section

EXECUTION_FIELDS = ("micro_batch_size", "activation_checkpointing")
"""Fields of `TrainingConfig` that say how a step runs, not what comes out."""


class LoraConfig(Section):
    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    """The update is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    first_layer: Annotated[int, Field(ge=0)] = 0
    """Decoder layers below this one stay frozen (0 adapts all)."""


class TrainingConfig(Section):
    """One LoRA training run; shared by the base spirit and the ingredients."""

    style: Literal["sequence", "brief", "instruct"] = "sequence"
    """`sequence`: every title of a history is a target. `brief`: the same, titles cut after the
    token that tells them apart. `instruct`: the paper's prompts."""
    loss: Literal["trie", "vocabulary"] = "trie"
    """`trie` normalises over the children of branching trie nodes; `vocabulary` over all tokens."""
    prior_in_loss: bool = True
    """Add the log clicks behind each trie branch to its logit (arXiv 2007.07314); `trie` only."""
    lora: LoraConfig = LoraConfig()
    num_steps: PositiveInt = 100
    batch_size: PositiveInt = 8
    """Histories per optimiser step over all workers."""
    micro_batch_size: PositiveInt | None = None
    """Examples per forward pass and worker; changes memory, not the result. Null: one pass."""
    activation_checkpointing: bool = False
    """Keep each layer's input alone and compute the rest anew in the backward pass: a fraction of
    the memory for about a third more time; not the result."""
    learning_rate: PositiveFloat = 1e-3
    warmup_fraction: Fraction = 0.05
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    max_titles: Annotated[int, Field(ge=2)] = 30
    """Titles per training history; longer histories are cropped at a seeded random place."""
    max_tokens: PositiveInt = 1024
    """Tokens per training row; oldest titles go first."""

    @model_validator(mode="after")
    def _whole_parts(self) -> TrainingConfig:
        self.num_parts(1)
        return self

    def num_parts(self, num_workers: int) -> int:
        """Forward passes per worker and optimiser step; ValueError where they come out uneven."""
        share, size = self.batch_size // num_workers, self.micro_batch_size
        if size is not None and share % size:
            raise ValueError(
                f"`batch_size` {self.batch_size} over {num_workers} worker(s) is {share} each, not "
                f"divisible by `micro_batch_size` {size}"
            )
        return 1 if size is None else share // size

    @model_validator(mode="after")
    def _brief_needs_the_trie(self) -> TrainingConfig:
        if self.style == "brief" and self.loss != "trie":
            raise ValueError("`style: brief` cuts titles, so it needs `loss: trie`")
        return self

    @property
    def learns_with_prior(self) -> bool:
        """Whether the trained model's own likelihood has the prior inside the trie."""
        return self.loss == "trie" and self.prior_in_loss


class DeepSpeedConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload: Literal["none", "cpu"] = "none"
    """Where ZeRO keeps the optimiser (and, at stage 3, the parameters)."""

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> DeepSpeedConfig:
        if self.offload == "cpu" and self.zero_stage == 0:
            raise ValueError("`offload: cpu` needs `zero_stage` 1, 2 or 3")
        return self


class TrainConfig(TrainingConfig):
    """The base spirit, on Ray Train."""

    num_workers: PositiveInt = 1
    gpus_per_worker: NonNegativeFloat = 0.0
    cpus_per_worker: PositiveFloat = 1.0
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    checkpoint_every: PositiveInt = 50
    """Optimiser steps between checkpoints."""
    num_checkpoints_to_keep: PositiveInt = 2
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Restarts from the last checkpoint after lost workers."""

    @model_validator(mode="after")
    def _divisible(self) -> TrainConfig:
        if self.batch_size % self.num_workers:
            raise ValueError(
                f"`batch_size` {self.batch_size} is not divisible by `num_workers` "
                f"{self.num_workers}"
            )
        self.num_parts(self.num_workers)
        if self.engine == "torch" and self.num_workers > 1:
            raise ValueError("`engine: torch` is for one worker; use `engine: deepspeed`")
        return self
