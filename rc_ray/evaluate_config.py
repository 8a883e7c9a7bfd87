"""Settings of the evaluation: who is asked, what is compared, and how a score is calibrated."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from rc_ray.baselines_config import ItemKnnConfig, SasrecConfig, TitleEmbeddingConfig
from rc_ray.calibration_config import CalibrationConfig
from rc_ray.data_config import GpuShare, Section
from rc_ray.systems import DEFAULT_SYSTEMS, System

Probe = Literal["shuffled_history", "permuted_candidates", "popularity_negatives", "masked_titles"]


class EvaluateConfig(Section):
    systems: tuple[System, ...] = Field(default=DEFAULT_SYSTEMS, min_length=1)
    """Built-in ones and names of `merge.mixes`."""
    ks: tuple[PositiveInt, ...] = Field(default=(1, 5, 10), min_length=1)
    """Cut-offs of HR, NDCG and MRR."""
    num_test_users: PositiveInt | None = None
    """Seeded sample of scored users per split; null scores all."""
    num_catalogue_users: Annotated[int, Field(ge=0)] | None = 0
    """Those of them, per split, for whom the whole catalogue is ranked too; null ranks it for
    all. With an LLM that costs many times what a list of candidates does."""
    catalogue_max_nodes: PositiveInt = 4096
    """Trie nodes that an LLM reads for one user's catalogue ranking; where they do not suffice to
    prove the top of it, the report says so."""
    num_seeds: PositiveInt = 1
    """Times that a baseline trained by chance (SASRec) is trained; users' metrics are averaged."""
    probes: tuple[Probe, ...] = ()
    """What is changed to see whether the ranking follows; see docs/evaluation.md."""
    num_probe_users: PositiveInt | None = 100
    """Warm test users of a probe; null takes all of them."""
    num_valid_users: PositiveInt | None = 100
    """Validation users that choose alpha and gamma."""
    calibration: CalibrationConfig = CalibrationConfig()
    alphas: tuple[NonNegativeFloat, ...] = Field(default=(0.0, 0.5, 1.0), min_length=1)
    """Weights of log p(title | empty history) to choose from."""
    gammas: tuple[NonNegativeFloat, ...] = Field(default=(0.0, 0.5, 1.0, 2.0), min_length=1)
    """Weights of the popularity prior to choose from."""
    prior_in_trie: tuple[bool, ...] = Field(default=(False, True), min_length=1)
    """Whether the likelihood itself may hold the prior, at every branch of the trie."""
    max_titles: PositiveInt = 15
    """History titles in a prompt."""
    tokens_per_batch: PositiveInt = 4096
    num_bootstrap: PositiveInt = 2000
    item_knn: ItemKnnConfig = ItemKnnConfig()
    sasrec: SasrecConfig = SasrecConfig()
    title_embedding: TitleEmbeddingConfig = TitleEmbeddingConfig()
    num_actors: PositiveInt | None = None
    """Null: as many as the cluster has resources for."""
    cpus_per_actor: PositiveFloat = 1.0
    gpus_per_actor: GpuShare = 0.0

    @model_validator(mode="after")
    def _sorted(self) -> EvaluateConfig:
        if list(self.ks) != sorted(set(self.ks)):
            raise ValueError("`ks` must rise, each once")
        twice = [one for one in self.systems if self.systems.count(one) > 1]
        if twice:
            raise ValueError(f"`systems` names {twice[0]} more than once")
        return self
