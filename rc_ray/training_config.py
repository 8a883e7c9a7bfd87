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
    max_grad_norm: Annotated[float, Field(gt=0.0, allow_inf_nan=True)] = 1.0
    """Longer gradients are cut to this length; infinite: none is."""
    max_titles: Annotated[int, Field(ge=2)] = 30
    """Titles per training history; longer histories are cropped at a seeded random place."""
    max_tokens: PositiveInt = 1024
    """Tokens per training row; oldest titles go first."""
    valid_every: PositiveInt | None = None
    """Steps between validations; the run then ends with its best adapter. Null: the last one."""
    num_valid_histories: PositiveInt = 64
    """Validation users, a seeded sample over the domains, whose next title is to be told."""
    patience: PositiveInt | None = None
    """Validations without a new best before the run stops; null runs all steps."""

    @model_validator(mode="after")
    def _patience_needs_validation(self) -> TrainingConfig:
        if self.patience is not None and self.valid_every is None:
            raise ValueError("`patience` counts validations; set `valid_every` too")
        return self

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
    min_workers: PositiveInt | None = None
    """Go on with as few as this when nodes are lost, and grow back when there are nodes again. The
    batch of a step stays the same, shares may differ by one. Null: always `num_workers`."""
    gpus_per_worker: NonNegativeFloat = 0.0
    cpus_per_worker: PositiveFloat = 1.0
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    checkpoint_every: PositiveInt = 50
    """Optimiser steps between checkpoints."""
    num_checkpoints_to_keep: PositiveInt = 2
    checkpoint_storage: str | None = None
    """Where checkpoints go: an absolute path or a URI (`s3://bucket/folder`); null: run folder."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Restarts after lost workers without a new checkpoint in between; with one, counted anew."""

    @model_validator(mode="after")
    def _divisible(self) -> TrainConfig:
        if self.min_workers is not None:
            return self
        if self.batch_size % self.num_workers:
            raise ValueError(
                f"`batch_size` {self.batch_size} is not divisible by `num_workers` "
                f"{self.num_workers}"
            )
        self.num_parts(self.num_workers)
        return self

    @model_validator(mode="after")
    def _elastic(self) -> TrainConfig:
        if self.min_workers is None:
            return self
        if self.min_workers > self.num_workers:
            raise ValueError(
                f"`min_workers` {self.min_workers} is above `num_workers` {self.num_workers}"
            )
        if self.batch_size < self.num_workers:
            raise ValueError(
                f"`batch_size` {self.batch_size} leaves some of `num_workers` {self.num_workers} "
                "without an example"
            )
        if self.micro_batch_size is not None:
            for number in range(self.min_workers, self.num_workers + 1):
                if self.batch_size % (number * self.micro_batch_size):
                    raise ValueError(
                        f"with `micro_batch_size` {self.micro_batch_size}, `batch_size` "
                        f"{self.batch_size} must divide evenly over every number of workers from "
                        f"`min_workers` to `num_workers`; over {number} it does not"
                    )
        return self

    @model_validator(mode="after")
    def _one_process(self) -> TrainConfig:
        if self.engine == "torch" and self.num_workers > 1:
            raise ValueError("`engine: torch` is for one worker; use `engine: deepspeed`")
        if self.engine == "torch" and self.deepspeed != DeepSpeedConfig():
            raise ValueError(
                "`deepspeed` is set, but `engine: torch` does not use it; set `engine: deepspeed`, "
                "or leave `deepspeed` out"
            )
        return self

    @model_validator(mode="after")
    def _storage(self) -> TrainConfig:
        storage = self.checkpoint_storage
        if storage is not None and "://" not in storage and not storage.startswith("/"):
            raise ValueError(
                f"`checkpoint_storage` {storage!r} must be an absolute path or a URI like "
                "s3://bucket/folder; workers have other working folders"
            )
        return self
