"""The settings of the ingredients' sweep on Ray Tune."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from rc_ray.data_config import Section
from rc_ray.search_space import SearchSpace, apply_point, check_for_optuna, read_space
from rc_ray.training_config import EXECUTION_FIELDS, DeepSpeedConfig, LoraConfig, TrainingConfig

_FORM_FIELDS = ("style", "loss", "prior_in_loss")
"""What decides the form of the prompts and the likelihood that an adapter learns."""
_JUDGE_FIELDS = ("valid_every", "num_valid_histories", "patience")
"""What decides when and on whom trials are compared."""
_MAX_CORNERS = 1000
"""Of the space that Optuna chooses from, to be checked in advance."""


class AshaConfig(Section):
    """Asynchronous successive halving (arXiv 1810.05934), each domain by itself.

    After `grace_period` steps, and then after each `reduction_factor` times as many, a trial goes
    on if its validation loss is among the best 1 / `reduction_factor` of its domain's trials that
    have come so far.
    """

    name: Literal["asha"] = "asha"
    grace_period: PositiveInt
    """Steps that every trial may run."""
    reduction_factor: Annotated[float, Field(gt=1.0)] = 3.0


class TuneConfig(TrainingConfig):
    """The ingredients, on Ray Tune: one trial per (domain, setting)."""

    search: dict[str, Any] = {}
    """Settings to try, by field of this section (`learning_rate`, `num_steps`, `lora.rank` ...).

    A list is a grid. `{loguniform: [low, high]}`, `{uniform: [low, high]}`,
    `{randint: [low, high]}` and `{choice: [...]}` are drawn `num_samples` times; low and high are
    included.
    Not over `style`, `loss` and `prior_in_loss`: spirit and ingredient are mixed in one form.
    """
    num_samples: PositiveInt | None = None
    """Draws for each domain, and for each point of the grid where there is one."""
    search_seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of the draws; the same for every domain."""
    search_algorithm: Literal["random", "optuna"] = "random"
    """`optuna`: each domain's later draws learn from the validation of its earlier ones."""
    scheduler: AshaConfig | None = None
    """Stops bad trials early by their validation loss, e.g. `{name: asha, grace_period: 50}`."""
    num_valid_users: PositiveInt = 50
    """Validation users that choose among a domain's trials."""
    cpus_per_trial: PositiveFloat = 1.0
    gpus_per_trial: NonNegativeFloat = 0.0
    """At most one; a fraction shares a GPU among trials."""
    memory_per_trial_gb: PositiveFloat | None = None
    """Main memory that a trial is given on its node, in 10^9 bytes; null: estimated."""
    num_workers: PositiveInt = 1
    """Above 1 each trial trains with Ray Train and DeepSpeed on so many workers; CPUs, GPUs and
    memory per trial are then those of each worker."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """Of trials with several workers."""
    domains_per_trial: PositiveInt = 1
    """Domains of one setting whose LoRAs train in one process on one copy of the base, with the
    resources of one trial. Changes memory and speed, not the result."""
    tokens_per_pass: PositiveInt = 2048
    """Tokens up to which such domains share a forward pass; a domain's own batch may be larger."""
    max_concurrent_trials: PositiveInt | None = None
    """Null: as many as the cluster has resources for."""
    checkpoint_every: PositiveInt = 50

    @field_validator("scheduler", mode="before")
    @classmethod
    def _scheduler_is_a_section(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(
                f"{value!r} alone says too little; write {{name: asha, grace_period: 50}}, or null"
            )
        return value

    @model_validator(mode="after")
    def _sweep_holds_together(self) -> TuneConfig:
        for key in self.search:
            if key in _FORM_FIELDS:
                raise ValueError(
                    f"`search` names `{key}`, which is no matter of search: spirit and ingredient "
                    "are mixed and scored in one form; set it under `train` and `tune`"
                )
            if key in _JUDGE_FIELDS:
                raise ValueError(
                    f"`search` names `{key}`, which says how trials are judged: set it beside "
                    "`search`, for all trials alike"
                )
            if key in EXECUTION_FIELDS:
                raise ValueError(f"`{key}` shapes no result: set it beside `search`")
        space = self.space
        if self.num_samples is not None and not space.distributions:
            raise ValueError(
                "`num_samples` is set, but `search` draws nothing; add a distribution such as "
                "{loguniform: [1.0e-4, 1.0e-2]}, or leave `num_samples` out"
            )
        if self.num_samples is None and space.distributions:
            raise ValueError(
                f"`search` draws {', '.join(space.distributions)}; set `num_samples`, how often"
            )
        if self.search_algorithm == "optuna":
            check_for_optuna(space)
        for field, distribution in space.distributions.items():
            for value in distribution.ends:
                self.setting({**space.draw(self.search_seed, 0), field: value})
        if self.gpus_per_trial > 1:
            raise ValueError(
                f"`gpus_per_trial` is {self.gpus_per_trial:g}: a process uses one GPU; set it to "
                "1, and `num_workers` to the GPUs that a trial should use"
            )
        settings = self.settings()
        if self.num_workers > 1:
            self._check_workers(self.possible_settings())
        if self.scheduler is not None:
            self._check_scheduler(self.scheduler, settings)
        if self.domains_per_trial > 1:
            self._check_together(settings)
        return self

    def _check_together(self, settings: tuple[TrainingConfig, ...]) -> None:
        apart = "; set `domains_per_trial` to 1, or"
        if self.num_workers > 1:
            raise ValueError(
                "domains train together in one process, `num_workers` gives each trial several"
                f"{apart} `num_workers` to 1"
            )
        if self.scheduler is not None or self.search_algorithm != "random":
            field = "scheduler" if self.scheduler is not None else "search_algorithm: optuna"
            raise ValueError(
                f"`{field}` judges each trial by itself, domains that train together have one"
                f"{apart} leave it out"
            )
        if any(setting.lora.dropout for setting in settings):
            raise ValueError(
                "dropout would tie together what domains learn side by side"
                f"{apart} `lora.dropout` to 0"
            )

    def _check_workers(self, settings: tuple[TrainingConfig, ...]) -> None:
        if 0 < self.gpus_per_trial < 1:
            raise ValueError(
                f"`gpus_per_trial` is {self.gpus_per_trial:g}: with `num_workers` above 1 it is a "
                "worker's, which uses one whole GPU; set it to 1 or 0"
            )
        for setting in settings:
            if setting.batch_size % self.num_workers:
                raise ValueError(
                    f"`batch_size` {setting.batch_size} is not divisible by `num_workers` "
                    f"{self.num_workers}"
                )
            setting.num_parts(self.num_workers)

    def _check_scheduler(self, asha: AshaConfig, settings: tuple[TrainingConfig, ...]) -> None:
        every = self.valid_every
        if every is None:
            raise ValueError(
                "`scheduler: asha` judges by the validation loss; set `valid_every`, the steps "
                "between validations"
            )
        if len(settings) == 1:
            raise ValueError(
                "`scheduler: asha` has one trial per domain and nothing to compare it with; give "
                "`search` more points, or leave `scheduler` out"
            )
        shortest = min(setting.num_steps for setting in settings)
        if not every <= asha.grace_period < shortest:
            raise ValueError(
                f"`scheduler.grace_period` is {asha.grace_period}; it must be at least "
                f"`valid_every` ({every}) and below `num_steps` ({shortest})"
            )

    @property
    def space(self) -> SearchSpace:
        return read_space(self.search)

    @property
    def is_planned(self) -> bool:
        """Whether all points are known in advance; Optuna finds them on the way."""
        return self.search_algorithm == "random"

    def settings(self) -> tuple[TrainingConfig, ...]:
        """One `TrainingConfig` per point of the grid and draw.

        Where Optuna chooses they are random stand-ins, for checks and counts.
        """
        points = self.space.points(self.num_samples or 1, self.search_seed)
        settings: list[TrainingConfig] = []
        for point in points:
            setting = self.setting(point)
            if setting in settings:
                raise ValueError("`search` has the same point twice; give each value once")
            settings.append(setting)
        return tuple(settings)

    def possible_settings(self) -> tuple[TrainingConfig, ...]:
        """What has to be possible before a sweep starts, to be checked and measured.

        All points; where Optuna chooses, every combination of the ends of its distributions.
        """
        if self.is_planned:
            return self.settings()
        ends = {field: one.ends for field, one in self.space.distributions.items()}
        corners = itertools.islice(itertools.product(*ends.values()), _MAX_CORNERS)
        return tuple(self.setting(dict(zip(ends, corner, strict=True))) for corner in corners)

    def setting(self, point: Mapping[str, Any]) -> TrainingConfig:
        """The setting at one point, field -> value.

        Raises:
            ValueError: a value does not hold, or not beside the others.
        """
        fields: dict[str, Any] = {name: getattr(self, name) for name in TrainingConfig.model_fields}
        fields["lora"] = self.lora.model_dump()
        fields = apply_point(fields, point, _known_fields)
        try:
            return TrainingConfig.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            what = first["msg"].removeprefix("Value error, ")
            if "integer" in what and place in self.space.distributions:
                what += "; draw it with `randint` or `choice`"
            raise ValueError(
                f"`search` has a value that does not hold: {place or 'a point'}: {what}"
            ) from None


def _known_fields() -> str:
    apart = {"lora", *_FORM_FIELDS, *_JUDGE_FIELDS, *EXECUTION_FIELDS}
    return ", ".join(
        [field for field in TrainingConfig.model_fields if field not in apart]
        + [f"lora.{field}" for field in LoraConfig.model_fields]
    )
