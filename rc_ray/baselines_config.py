"""Settings of the baselines that a recommender must beat: item kNN, SASRec, title embeddings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from rc_ray.data_config import Section

Decay = Annotated[float, Field(gt=0.0, le=1.0)]


class ItemKnnConfig(Section):
    """Item-based nearest neighbours; validation users choose among the listed values."""

    num_neighbours: tuple[PositiveInt, ...] = Field(default=(20, 100, 500), min_length=1)
    """Neighbours kept per item."""
    shrinkages: tuple[NonNegativeFloat, ...] = Field(default=(0.0, 10.0, 100.0), min_length=1)
    """Added to the cosine's denominator: similarities from few users count less."""
    decays: tuple[Decay, ...] = Field(default=(1.0, 0.9, 0.7, 0.4), min_length=1)
    """Weight of a history's item against the one that came after it; 1 forgets the order."""
    num_valid_users: PositiveInt = 1000
    """Validation users that choose; a seeded sample of more."""
    max_pairs: PositiveInt = 5_000_000
    """Item pairs held at once while neighbours are searched; memory, not the result."""


class SasrecConfig(Section):
    """Self-attention over the items of a history, trained on the domain's histories."""

    hidden_size: PositiveInt = 64
    num_layers: PositiveInt = 2
    num_heads: PositiveInt = 2
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """As the SASRec paper takes for sparse logs (arXiv 1808.09781)."""
    max_length: Annotated[int, Field(ge=1)] = 50
    """Items of a history that are read, the latest ones."""
    batch_size: PositiveInt = 128
    """Pieces of histories per optimiser step."""
    learning_rate: PositiveFloat = 2e-3
    max_rounds: PositiveInt = 60
    """A round is one pass over the histories or `min_round_steps`; validation follows it."""
    min_round_steps: PositiveInt = 30
    patience: PositiveInt = 5
    """Rounds without a better validation NDCG@10 after which training ends."""
    num_valid_users: PositiveInt = 1000
    """Validation users that stop the training; a seeded sample of more."""
    max_logits: PositiveInt = 4_000_000
    """Logits held at once in the loss over the whole catalogue; memory, not the result."""

    @model_validator(mode="after")
    def _whole_heads(self) -> SasrecConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"`hidden_size` {self.hidden_size} is not divisible by `num_heads` {self.num_heads}"
            )
        return self


class TitleEmbeddingConfig(Section):
    """Titles as vectors from the base LLM; validation users choose among the listed values."""

    layers: tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...] = Field(
        default=(0.1, 0.2), min_length=1
    )
    """Depths to read the hidden states at, as shares of the LLM's layers; what lies above the
    deepest is not run. In SmolLM2 deeper layers cost more and ranked no better."""
    transforms: tuple[Literal["centred", "whitened"], ...] = Field(
        default=("centred", "whitened"), min_length=1
    )
    """What mends the narrow cone that an LLM's hidden states lie in."""
    decays: tuple[Decay, ...] = Field(default=(1.0, 0.9, 0.7, 0.4), min_length=1)
    """Weight of a history's item against the one that came after it; 1 forgets the order."""
    num_valid_users: PositiveInt = 1000
    """Validation users that choose; a seeded sample of more."""
    tokens_per_batch: PositiveInt = 4096
