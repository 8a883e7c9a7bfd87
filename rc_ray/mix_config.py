"""Settings of a mix: by formula, learned by gradient, or found by a gradient-free search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import (
    Field,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from rc_ray.data_config import Section

FixedMethod = Literal[
    "linear",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "knots",
    "peft_linear",
]
Objective = Literal["entropy", "vocabulary_entropy", "anchored", "distillation", "clicks"]
Granularity = Literal["model", "layer", "projection", "linear"]


Parts = Mapping[str, tuple[str, tuple[str, ...]]]
"""Setting -> another setting, and the values of it with which the first has a part in a mix."""

_OF_FORMULAS: Parts = {
    "density": ("method", ("ties", "dare_linear", "dare_ties", "knots")),
    "majority_sign": ("method", ("ties", "dare_ties", "knots")),
    "seed": ("method", ("dare_linear", "dare_ties")),
}
OF_LEARNING: Parts = {
    "temperature": ("parametrisation", ("softmax", "sigmoid")),
    "prompts_of": ("objective", ("entropy", "vocabulary_entropy", "anchored", "clicks")),
    "num_tokens": ("objective", ("vocabulary_entropy",)),
    "divergence_weight": ("objective", ("anchored",)),
    "spread_weight": ("objective", ("anchored",)),
    "max_entropy_share": ("objective", ("anchored",)),
}


def is_changed(mix: Section, field: str) -> bool:
    """Whether a setting is another than its default."""
    return bool(getattr(mix, field) != type(mix).model_fields[field].default)


def check_parts(mix: Section, parts: Parts) -> None:
    """Refuse settings that were changed and do nothing beside the others.

    Raises:
        ValueError: names the field and the fix.
    """
    for field, (other, values) in parts.items():
        value = getattr(mix, other)
        if value not in values and is_changed(mix, field):
            raise ValueError(
                f"`{field}` has no part in `{other}: {value}`; leave it out, or take one of "
                f"{', '.join(values)}"
            )


class FixedMix(Section):
    """A mix by formula: no data is seen."""

    method: FixedMethod
    weights: tuple[FiniteFloat, ...] | None = None
    """One per adapter (spirit, ingredient, neighbours); null: 1/K each, for `task_arithmetic` 1."""
    density: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Share of an update's entries that TIES and KnOTS keep and DARE does not drop."""
    majority_sign: Literal["total", "frequency"] = "total"
    """How TIES elects a sign: by the sum of the values or by their number."""
    seed: NonNegativeInt | None = None
    """What DARE drops by; null: the experiment's."""

    @model_validator(mode="after")
    def _of_the_method(self) -> FixedMix:
        check_parts(self, _OF_FORMULAS)
        return self


class LearnedMix(Section):
    """A mix whose weights are learned by gradient on prompts of the domain."""

    method: Literal["learned"] = "learned"
    objective: Objective = "entropy"
    """`entropy`: of the trie's distribution; `vocabulary_entropy`: the paper's, of the first tokens
    of greedily generated titles; `anchored`: entropy, nearness to the single adapters and a
    spread-out mean prediction; `distillation`: nearness to the single adapters on made-up users;
    `clicks`: the loss of the prompts' true next items, which is not label-free."""
    over: Literal["candidates", "catalogue"] = "candidates"
    """What the distribution is over."""
    score: Literal["likelihood", "calibrated"] = "likelihood"
    """Whether the distribution is of the raw likelihood or of the calibrated score."""
    granularity: Granularity = "linear"
    """What has a weight of its own: the model, each decoder layer, each projection (q, k, v ...)
    whatever its layer, or each linear layer."""
    parametrisation: Literal["softmax", "sigmoid", "free"] = "softmax"
    """Weights that sum to 1, that lie between 0 and 1 each, or any."""
    temperature: PositiveFloat = 1.0
    """T of lambda = softmax(w / T) or sigmoid(w / T)."""
    prompts_of: Literal["other_users", "scored_users"] = "other_users"
    """`other_users` are never scored; `scored_users` is the transductive setting of the paper."""
    num_prompts: PositiveInt = 48
    num_epochs: PositiveInt = 2
    batch_size: PositiveInt = 8
    seed: NonNegativeInt | None = None
    """Which prompts, and in which order; null: the experiment's."""
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: PositiveFloat = 0.1
    pull: NonNegativeFloat = 0.0
    """Weight of the squared distance of w from its start."""
    num_tokens: PositiveInt = 5
    """`vocabulary_entropy`: generated tokens whose entropy counts."""
    divergence_weight: NonNegativeFloat = 1.0
    """`anchored`: of the Jensen-Shannon divergence from the single adapters."""
    spread_weight: NonNegativeFloat = 1.0
    """`anchored`: of the entropy of the mean prediction, which a collapse lowers."""
    max_entropy_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    """`anchored`: prompts whose entropy is above this share of log C do not count."""
    max_titles: PositiveInt = 15
    """History titles in a prompt."""

    @model_validator(mode="after")
    def _of_the_own_tokens(self) -> LearnedMix:
        plain = self.over == "candidates" and self.score == "likelihood"
        if self.objective == "vocabulary_entropy" and not plain:
            raise ValueError(
                "`objective: vocabulary_entropy` is of the LLM's own tokens; leave out `over` and "
                "`score`"
            )
        return self

    @model_validator(mode="after")
    def _no_clicks_of_scored_users(self) -> LearnedMix:
        if self.objective == "clicks" and self.prompts_of == "scored_users":
            raise ValueError(
                "`objective: clicks` learns from next items, and those of `prompts_of: "
                "scored_users` are what is tested; take `prompts_of: other_users`"
            )
        return self

    @model_validator(mode="after")
    def _of_the_learning(self) -> LearnedMix:
        check_parts(self, OF_LEARNING)
        return self


class SearchedMix(Section):
    """A mix whose weights a gradient-free search finds on a few clicks (LoraHub, 2307.13269)."""

    method: Literal["lorahub"]
    num_prompts: PositiveInt = 16
    """Validation clicks of users that are never scored."""
    num_evaluations: PositiveInt = 40
    seed: NonNegativeInt | None = None
    """Which clicks, and which weights are tried; null: the experiment's."""
    granularity: Granularity = "model"
    max_weight: PositiveFloat = 1.5
    """Weights lie between minus this and this; at least 1/K, where the search begins."""
    l1_weight: NonNegativeFloat = 0.05
    """Weight of the mean absolute weight in the objective."""
    max_titles: PositiveInt = 15


MixConfig = Annotated[FixedMix | LearnedMix | SearchedMix, Field(discriminator="method")]
