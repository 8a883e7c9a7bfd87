"""The settings of the ingredients' sweep on Ray Tune."""

from __future__ import annotations

import itertools
from typing import Any

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from rc_ray.training_config import EXECUTION_FIELDS, LoraConfig, TrainingConfig

_FORM_FIELDS = ("style", "loss", "prior_in_loss")
"""What decides the form of the prompts and the likelihood that an adapter learns."""


class TuneConfig(TrainingConfig):
    """The ingredients, on Ray Tune: one trial per (domain, setting)."""

    search: dict[str, tuple[Any, ...]] = {}
    """Grid over fields of this section, e.g. `{learning_rate: [1e-3, 5e-4]}`; `lora.rank` works.

    Not over `style`, `loss` and `prior_in_loss`: spirit and ingredient are mixed in one form.
    """
    num_valid_users: PositiveInt = 50
    """Validation users that choose among a domain's trials."""
    cpus_per_trial: PositiveFloat = 1.0
    gpus_per_trial: NonNegativeFloat = 0.0
    max_concurrent_trials: PositiveInt | None = None
    """Null: as many as the cluster has resources for."""
    checkpoint_every: PositiveInt = 50

    @model_validator(mode="after")
    def _search_fields(self) -> TuneConfig:
        self.settings()
        return self

    def settings(self) -> tuple[TrainingConfig, ...]:
        """One `TrainingConfig` per point of the grid."""
        for key, values in self.search.items():
            if key in _FORM_FIELDS:
                raise ValueError(
                    f"`search` names `{key}`, which is no matter of search: spirit and ingredient "
                    "are mixed and scored in one form; set it under `train` and `tune`"
                )
            if not values:
                raise ValueError(f"`search` gives no value for {key}; list at least one")
        points: list[TrainingConfig] = []
        for values in itertools.product(*self.search.values()):
            fields: dict[str, Any] = {
                name: getattr(self, name) for name in TrainingConfig.model_fields
            }
            fields["lora"] = self.lora.model_dump()
            for key, value in zip(self.search, values, strict=True):
                if key in EXECUTION_FIELDS:
                    raise ValueError(f"`{key}` shapes no result: set it beside `search`")
                section, _, leaf = key.rpartition(".")
                target = fields["lora"] if section == "lora" else fields
                if section not in ("", "lora") or leaf not in target or leaf == "lora":
                    raise ValueError(
                        f"`search` names the unknown field {key}; known: "
                        f"{', '.join(f for f in TrainingConfig.model_fields if f != 'lora')}, "
                        f"{', '.join('lora.' + f for f in LoraConfig.model_fields)}"
                    )
                target[leaf] = value
            point = TrainingConfig.model_validate(fields)
            if point in points:
                raise ValueError("`search` has the same point twice; give each value once")
            points.append(point)
        return tuple(points)
